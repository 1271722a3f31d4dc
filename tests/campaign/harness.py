"""One command in a process that is forked from this one, and what must hold of it however it ends."""

import contextlib
import hashlib
import os
import resource
import signal
import stat
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 20
"""Of one processor: a command that needs more hangs. On the clock it may wait four times as long."""
BYTES = 12 * 2**30
LINES = 3
_STREAMS = ((0, "r"), (1, "w"), (2, "w"))


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def fault(self) -> str:
        """What is wrong with it; empty if it was refused in a few lines, or did what it is for."""
        if self.code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            return "hangs"
        if "Traceback (most recent call last)" in self.err + self.out:
            return f"traceback: {self.err.strip().splitlines()[-1][:300]}"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        lines = [line for line in self.err.splitlines() if line.startswith("lab: ")]
        # `lab sync` lists there what became of each run, of those in order as well.
        lines = lines or [
            line for line in self.out.splitlines() if "not sent; --disabled sends it" not in line
        ]
        if self.code == 2 and not 1 <= len(lines) <= LINES:
            return f"{len(lines)} lines of refusal: {self.err[-300:]!r}"
        if any(len(line) > 1_500 for line in self.err.splitlines()):
            return "a line of more than 1,500 characters"
        if any(not c.isprintable() and c not in "\n\t\r" for c in self.err + self.out):
            return "control characters on the terminal"
        return ""


def forked(
    do: Callable[[], int],
    cwd: Path,
    scratch: Path,
    kill_after: float | None = None,
    file_bytes: int = resource.RLIM_INFINITY,
) -> Result:
    """Runs `do` in a fork of this process, with limits of time and memory, and in a folder of its own.

    Args:
        do: returns the exit code.
        cwd: where it runs.
        scratch: where its output goes.
        kill_after: seconds after which it is killed, like by a power cut.
        file_bytes: no file can be written longer, as if the disk were full.

    Torch is loaded once, in this process, and must not have computed anything in several threads before.
    """
    out, err = scratch / "stdout", scratch / "stderr"
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(number, mode, closefd=False, encoding="utf-8") for number, mode in _STREAMS
            )
            os.chdir(cwd)
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
            signal.alarm(4 * SECONDS)
            code = do()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    timer = threading.Timer(8 * SECONDS if kill_after is None else kill_after, _kill, (child,))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # helpers that it left behind
    said, refused = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
    return Result(os.waitstatus_to_exitcode(status), said, refused, time.monotonic() - began)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def lab(*arguments: str) -> Callable[[], int]:
    """The command `lab ARGUMENTS`."""

    def do() -> int:
        from lab.cli import main

        return main(arguments)

    return do


def snapshot(folder: Path) -> dict[str, str]:
    """What is in a folder: names, kinds, and hashes of the contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            found[str(path)] = f"-> {path.readlink()}"
        elif stat.S_ISREG(kind):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = oct(stat.S_IFMT(kind))
    return found


@dataclass
class Tally:
    """What a campaign found, and how much it tried."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, what: str, result: Result, touched: Sequence[str] = ()) -> None:
        """Counts a case."""
        self.ends[{0: "worked", 2: "refused"}.get(result.code, "other")] += 1
        self.slowest = max(self.slowest, (result.seconds, what))
        if touched:
            self.faults.append(f"{what}: touched {touched[0]}")
        elif result.fault:
            self.faults.append(f"{what}: {result.fault}")

    def report(self, name: str) -> str:
        """One line of figures."""
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        seconds, what = self.slowest
        total = f"{self.ends.total()} cases: {ends}; {len(self.faults)} faults"
        return f"{name}: {total}; slowest {seconds:.1f} s ({what})"
