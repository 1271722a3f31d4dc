"""The processes that make the runs of a sweep, several at once."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lab import locks, trust
from lab.errors import LabError
from lab.files import explain_write_errors, open_own
from lab.interrupt import SIGNALS, StopRequest
from lab.progress import duration
from lab.search import Setting
from lab.sweep_file import Sweep, check_setting, word
from lab.sweep_record import Candidate, MissingMetric, Record, Trial, last_value, runs_of, states_of
from lab.tracking import SWEEP_VARIABLE

POLL_SECONDS = 0.1
# Exit codes of who was stopped before it could save.
_STOPPED = tuple(code for number in SIGNALS for code in (-number, 128 + number))


class Runner:
    """Runs the trials of a sweep, several at once, each in a process of its own."""

    def __init__(self, sweep: Sweep, record: Record, jobs: int) -> None:
        self.sweep, self.record, self.jobs = sweep, record, jobs
        self.processes: list[tuple[Trial, Candidate, subprocess.Popen[bytes], float]] = []
        self.problem: LabError | None = None
        """Why the sweep cannot go on."""
        self.stopped = False
        """Whether it was asked to stop."""
        self._told = False
        self._waiting_for = ""
        self._left_alone: set[str] = set()

    def run(self) -> None:
        """Runs until everything has ended, or until asked to stop.

        Raises:
            LabError: the metric is not there.
            KeyboardInterrupt: asked to stop a second time; the runs are killed then.
        """
        with StopRequest() as stop:
            try:
                while True:
                    self._collect()
                    self.stopped = bool(stop)
                    if stop or self.problem:
                        self._stop_children(stop.signal_name or "")
                    else:
                        self._fill()
                    if not self.processes and (stop or self.problem or not self._waiting_for):
                        break
                    time.sleep(POLL_SECONDS)
            except BaseException:
                self._kill_children()
                raise
        if self.problem:
            raise self.problem

    # ---- starting ----

    def _fill(self) -> None:
        """Starts runs until there are as many as may be at once."""
        self._waiting_for = ""
        while len(self.processes) < self.jobs and (found := self._next()):
            self._start(*found)

    def _next(self) -> tuple[Trial, Candidate] | None:
        """The next run to start; the search is asked for another setting when all of the last have begun."""
        for candidate in self.record.candidates:
            for trial in candidate.trials:
                if trial.state != "waiting":
                    continue
                if not _is_busy(self.record.folder / trial.name):
                    return trial, candidate
                # A sweep that was killed leaves its runs running: they are left alone, and waited for.
                if trial.name not in self._left_alone:
                    self._say(f"{'waiting':11} {trial.name}: another process is running it")
                    self._left_alone.add(trial.name)
                self._waiting_for = trial.name
        setting = self.sweep.ask(self.record.tried(self.sweep.goal))
        if setting is None:
            return None
        candidate = self.record.add(self.sweep, setting)
        return candidate.trials[0], candidate

    def _start(self, trial: Trial, candidate: Candidate) -> None:
        folder = self.record.folder / trial.name
        try:
            check_setting(self.sweep, candidate.setting)
        except LabError as error:  # Bayesian search may combine what does not go together
            self._end(trial, "failed", str(error))
            return
        if (folder / "run.json").exists() and states_of(folder) == {"finished"}:
            self._finish(trial, 0.0)  # by a process that a killed sweep left behind
            return
        resumed = any(runs_of(folder))
        named = {"name": f"{self.sweep.name}__{trial.name}"} if "name" in self.sweep.resolved else {}
        seeded = {} if trial.seed is None else {"seed": trial.seed}
        arguments = train_arguments(
            self.sweep, {**named, **self.sweep.overrides, **candidate.setting, **seeded}
        )
        arguments += ["--out", str(folder)] + (["--resume"] if (folder / "run.json").exists() else [])
        log = self.log(trial)
        with explain_write_errors(str(log), "Free some space; the same command goes on then."):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open_own(log, "ab") as out:
                out.write(f"$ lab {shlex.join(arguments)}\n".encode())
                out.flush()
                process = subprocess.Popen(
                    [sys.executable, "-m", "lab.cli", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=self._environment(),
                    process_group=0,  # Ctrl-C is for the sweep, which tells its runs once
                )
        trial.state, trial.error, trial.value = "running", "", None
        self.processes.append((trial, candidate, process, time.monotonic()))
        self.record.save()
        self._say(f"{'resumed' if resumed else 'started':11} {trial.name}")

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        environment.pop(SWEEP_VARIABLE, None)
        if self.jobs > 1:  # alone, a run looks for itself how many cores are idle
            environment.setdefault("OMP_NUM_THREADS", str(threads_each(self.jobs)))
        if self.record.wandb:
            environment[SWEEP_VARIABLE] = self.record.wandb["id"]
        return environment

    # ---- ending ----

    def _collect(self) -> None:
        """Takes note of runs that have ended."""
        for entry in list(self.processes):
            trial, _, process, began = entry
            code = process.poll()
            if code is None:
                continue
            self.processes.remove(entry)
            folder = self.record.folder / trial.name
            states = states_of(folder)
            if code == 0 and states == {"finished"}:
                self._finish(trial, time.monotonic() - began)
            elif code != 0 and _is_busy(folder):
                self._end(trial, "waiting")  # another process was quicker by a moment
            elif self._told or (code == 0 and "interrupted" in states) or code in _STOPPED:
                self._end(trial, "interrupted")
            else:
                self._end(trial, "failed", self._last_words(trial, code))

    def _finish(self, trial: Trial, seconds: float) -> None:
        """A run came to its end: what came out?"""
        try:
            trial.value = last_value(self.record.folder / trial.name, self.sweep.metric)
        except LabError as error:
            values = [one.value for one in self.record.trials if one.value is not None]
            if isinstance(error, MissingMetric) and not values:
                # No run so far has it: it is misspelt, and all others would be trained for nothing.
                self.problem = error
                self._end(trial, "finished")
            else:
                self._end(trial, "failed", str(error))
            return
        took = f" in {duration(seconds)}" if seconds else ""
        self._end(trial, "finished", note=f"  {self.sweep.metric} {trial.value:.6g}{took}")

    def _end(self, trial: Trial, state: str, error: str = "", note: str = "") -> None:
        trial.state, trial.error = state, error
        self.record.save()
        self._say(f"{state:11} {trial.name}{note}{f': {error}' if error else ''}")

    def _stop_children(self, signal_name: str) -> None:
        """Asks every run to save and end, once."""
        if self._told or not self.processes:
            return
        self._told = True
        if signal_name:
            n = len(self.processes)
            self._say(f"{signal_name}: {n} run{'s' * (n > 1)} will save and end; once more ends them at once")
        for _, _, process, _ in self.processes:
            process.terminate()

    def _kill_children(self) -> None:
        for trial, _, process, _ in self.processes:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # a run's own helpers with it
            process.wait()
            trial.state = "interrupted"
        with contextlib.suppress(LabError):
            self.record.save()

    # ---- saying ----

    def log(self, trial: Trial) -> Path:
        """What a run said."""
        return self.record.folder / "logs" / f"{trial.name}.log"

    def _last_words(self, trial: Trial, code: int) -> str:
        """Why a run failed, shortly: its last line, or how it ended."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}{', perhaps for want of memory' * (name == 'SIGKILL')}"
        lines = (
            self.log(trial).read_text(encoding="utf-8", errors="replace").split("\n$ lab ")[-1].splitlines()
        )
        said = [line for line in lines[1:] if line.strip()]
        words = said[-1].removeprefix("lab: ") if said else f"exit code {code}"
        return f"{words} (see {self.log(trial)})"

    def _say(self, line: str) -> None:
        total = self.record.total(self.sweep)
        ended = sum(trial.state in ("finished", "failed") for trial in self.record.trials)
        print(f"[{ended:>{len(str(total))}}/{total}] {line}", file=sys.stderr, flush=True)


def train_arguments(sweep: Sweep, values: Setting) -> list[str]:
    """What follows `lab` on the command line of a run with these values, but for its folder."""
    words = [f"--{key}={word(value)}" for key, value in values.items()]
    return ["train", str(sweep.config), *trust.arguments(), *words]


def threads_each(jobs: int) -> int:
    """CPU threads of each of so many runs at once."""
    from lab.device import usable_cores

    return max(1, min(usable_cores() // jobs, 4))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from running the sweep in this folder meanwhile."""
    with explain_write_errors(str(folder), "Choose a folder you may write to with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = open_own(folder / ".lock", "a", alone=False)
    with lock:
        if not locks.lock(lock):
            raise LabError(f"{folder}: another process runs this sweep. Wait for it, or stop it first.")
        yield


def _is_busy(folder: Path) -> bool:
    """Whether a process runs in a run folder or one of its stages."""
    return any(locks.is_locked(path) for path in (folder / ".lock", *folder.glob("*/.lock")))
