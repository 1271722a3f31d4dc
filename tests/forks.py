"""`lab` commands as forks of one process that has imported what they import, which takes seconds each time.

A fork runs the same `main`, in its own folder, environment and standard streams, and ends as a process does.
What it does not show is how a command begins from nothing: tests of that, and of what is imported when, start
a real one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED = (
    *("lab.cli", "lab.compare", "lab.sweep", "lab.sync", "rl.commands", "rlhf.commands"),
    *("supervised.commands", "rl.pipeline", "rlhf.pipeline", "supervised.pipeline"),
    *("torch", "stable_baselines3", "ale_py", "gymnasium", "pandas", "scipy.stats", "datasets"),
    *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.trainer"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "peft"),
    *("trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.grpo_trainer"),
)
"""Not wandb, which looks at the environment when it is imported."""


class Forks:
    """The process that commands are forks of; it ends with the one that made it."""

    def __init__(self, environment: Mapping[str, str]):
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self._socket, other = socket.socketpair()
        self._answers = self._socket.makefile("r")
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def run(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        """As `subprocess.run` of `python -m lab.cli ARGUMENTS`, with text captured and nothing to read."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = [list(arguments), str(cwd), dict(environment), str(out), str(err)]
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(order).encode() + b"\n")
            pid = int(self._answers.readline())
            try:
                self._socket.settimeout(timeout)
                code = int(self._answers.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self.close()  # a stream that timed out is not read again
                self._start()
                raise subprocess.TimeoutExpired(list(arguments), timeout) from None
            return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())

    def close(self) -> None:
        """Lets the process end."""
        self._answers.close()
        self._socket.close()
        self._process.wait(10)


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
