"""`lab` commands as forks of one process that has imported what they import, which takes seconds each time.

A fork runs the same `main`, in its own folder, environment and standard streams, and ends as a process does.
What it does not show is how a command begins from nothing: tests of that, and of what is imported when, start
a real one.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

IMPORTED = (
    *("lab.cli", "lab.compare", "lab.sweep", "lab.sync", "rl.commands", "rlhf.commands"),
    *("supervised.commands", "rl.pipeline", "rlhf.pipeline", "supervised.pipeline"),
    *("torch", "stable_baselines3", "ale_py", "gymnasium", "pandas", "scipy.stats", "datasets"),
    *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.trainer"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "peft"),
    *("trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.grpo_trainer"),
)
"""Not wandb, which looks at the environment when it is imported."""


class Fork:
    """A command that runs, as `subprocess.Popen` shows one; `communicate` gives its output and errors."""

    def __init__(self, arguments: Sequence[str], answers: IO[str], connection: socket.socket, folder: str):
        self.args, self.returncode = list(arguments), None
        self._answers, self._connection, self._folder = answers, connection, folder
        self.pid = int(answers.readline())

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All it wrote to stdout and stderr, once it has ended."""
        self.wait(timeout)
        out, err = (Path(self._folder, name).read_text() for name in ("out", "err"))
        return out, err

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: no handler runs."""
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that commands are forks of, one at a time; it ends with the one that made it."""

    def __init__(self, environment: Mapping[str, str]):
        self._socket, other = socket.socketpair()
        self._answers = self._socket.makefile("r")
        self._folder = tempfile.TemporaryDirectory()
        self._last: Fork | None = None
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def start(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Fork:
        """As `subprocess.Popen` of `python -m lab.cli ARGUMENTS`, with text captured and nothing to read.

        What is left of the command before it is killed.
        """
        if self._last is not None:
            self._last.kill()
            self._last.wait()
        folder = tempfile.mkdtemp(dir=self._folder.name)
        order = [list(arguments), str(cwd), dict(environment), f"{folder}/out", f"{folder}/err"]
        self._socket.sendall(json.dumps(order).encode() + b"\n")
        self._last = Fork(arguments, self._answers, self._socket, folder)
        return self._last

    def run(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        """As `subprocess.run`: a command from its beginning to its end, or to `timeout` seconds."""
        fork = self.start(arguments, cwd, environment)
        try:
            out, err = fork.communicate(timeout)
        except subprocess.TimeoutExpired:
            fork.kill()
            raise
        return subprocess.CompletedProcess(fork.args, fork.wait(), out, err)

    def close(self) -> None:
        """Lets the process end."""
        self._answers.close()
        self._socket.close()
        self._process.wait(10)
        self._folder.cleanup()


def _serve(orders: socket.socket) -> int:
    """Forks for each line that comes; returns in the forks, with the exit code of the command."""
    for line in orders.makefile("r"):
        arguments, cwd, environment, out, err = json.loads(line)
        if pid := os.fork():
            orders.sendall(f"{pid}\n".encode())
            _, status = os.waitpid(pid, 0)
            orders.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            continue
        orders.close()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv[1:] = arguments
        sys.path[0] = cwd  # as `python -m` sets it
        from lab.cli import main

        return main()
    return 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, on being imported
        for name in IMPORTED:
            __import__(name)
    sys.exit(_serve(socket.socket(fileno=int(sys.argv[1]))))
