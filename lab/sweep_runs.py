"""The runs of a sweep: what is kept of them, and the processes that make them.

runs/pong_lr/
  sweep.json                        the settings, their runs and how they ended
  learning_rate=0.0003__s0/         one run folder each, as `lab train` makes it
  logs/learning_rate=0.0003__s0.log what that run said
"""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import IO, Any

from lab import config
from lab.errors import LabError, did_you_mean
from lab.files import explain_write_errors, read_json, write_json
from lab.interrupt import StopRequest
from lab.progress import duration
from lab.run import Run, folder_name
from lab.search import Setting, Tried
from lab.sweep_file import Sweep, check_setting, short_names, word
from lab.tracking import SWEEP_VARIABLE, read_metrics

FORMAT = 1
POLL_SECONDS = 0.1
_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # exit codes of who was stopped before it could save
NAME_LENGTH = 120


class MissingMetric(LabError):
    """A run has no metric of that name."""


# ---- what is kept of it ----


@dataclass
class Trial:
    """One run: a setting with a seed."""

    name: str
    """Of its folder."""
    seed: int | None
    """None: the config's."""
    state: str = "waiting"
    """waiting, running, interrupted, finished or failed."""
    value: float | None = None
    """The metric's last value."""
    error: str = ""


@dataclass
class Candidate:
    """A setting and its runs."""

    setting: Setting
    trials: list[Trial]

    @property
    def scores(self) -> list[float]:
        """Values of the runs that have one."""
        return [trial.value for trial in self.trials if trial.value is not None]

    @property
    def pending(self) -> bool:
        """Whether a run has not come to its end."""
        return any(trial.state not in ("finished", "failed") for trial in self.trials)

    def tried(self) -> Tried:
        """For the search: the mean over the seeds, once all have ended."""
        scores = self.scores
        return Tried(self.setting, mean(scores) if scores and not self.pending else None, self.pending)


@dataclass
class Record:
    """sweep.json."""

    folder: Path
    identity: dict[str, Any]
    metric: str
    """Whose values are kept."""
    candidates: list[Candidate] = field(default_factory=list)
    wandb: dict[str, str] | None = None
    """The sweep at W&B: `path` (entity/project/id), `id` and `url`."""

    @property
    def path(self) -> Path:
        return self.folder / "sweep.json"

    @property
    def trials(self) -> list[Trial]:
        """All runs."""
        return [trial for candidate in self.candidates for trial in candidate.trials]

    def total(self, sweep: Sweep) -> int:
        """How many runs there are to be; a sweep that was longer before keeps those."""
        return max(sweep.count, len(self.candidates)) * (len(sweep.seeds) or 1)

    def save(self) -> None:
        """Writes it, atomically."""
        with explain_write_errors(str(self.path), "Free some space; the same command goes on then."):
            write_json(
                self.path,
                {
                    "format": FORMAT,
                    "identity": self.identity,
                    "metric": self.metric,
                    "wandb": self.wandb,
                    "candidates": [asdict(candidate) for candidate in self.candidates],
                },
            )

    @classmethod
    def open(cls, folder: Path, sweep: Sweep) -> "Record":
        """The sweep in `folder`, or a new one.

        Raises:
            LabError: the folder holds another sweep, or something else.
        """
        path, identity = folder / "sweep.json", sweep.identity()
        if not path.exists():
            if folder.exists() and not folder.is_dir():
                raise LabError(f"{folder}: is a file. Choose another folder with --out.")
            if folder.is_dir() and any(one.is_file() and one.name != ".lock" for one in folder.rglob("*")):
                raise LabError(f"{folder}: is not empty and no sweep. Choose another folder with --out.")
            return cls(folder, identity, sweep.metric)
        raw = read_json(path, "the record of the sweep")
        try:
            if raw["format"] != FORMAT:
                raise LabError(f"{path}: has format {raw['format']}, this version of the lab reads {FORMAT}.")
            changed = config.differences(raw["identity"], identity)
            candidates = [
                Candidate(one["setting"], [Trial(**trial) for trial in one["trials"]])
                for one in raw["candidates"]
            ]
            record = cls(folder, identity, raw["metric"], candidates, raw["wandb"])
        except (KeyError, TypeError, AttributeError):
            raise LabError(f"{path}: damaged. Restore it from a copy, or choose another folder.") from None
        if changed:
            key, (was, now) = next(iter(changed.items()))
            raise LabError(
                f"{folder}: holds another sweep: {key} was {was!r} there, now it is {now!r}. Set it back, or "
                "choose another folder with --out."
            )
        return record

    def revive(self, metric: str, retry: bool) -> None:
        """Makes runs wait again that were stopped, and reads anew what came out of those that finished.

        Args:
            metric: may be another than before.
            retry: failed runs wait again, too.

        Raises:
            LabError: no finished run has the metric.
        """
        problem: LabError | None = None
        for trial in self.trials:
            if trial.state in ("running", "interrupted") or (retry and trial.state == "failed"):
                trial.state, trial.error = "waiting", ""
            folder = self.folder / trial.name
            if trial.state == "finished" and (folder.exists() or metric != self.metric):
                try:
                    trial.value = last_value(folder, metric)
                except LabError as error:
                    trial.value, problem = None, error
        if problem and not any(trial.value is not None for trial in self.trials):
            raise problem
        self.metric = metric

    def add(self, sweep: Sweep, setting: Setting) -> Candidate:
        """Adds a setting with its runs, still to be made."""
        names = {trial.name for trial in self.trials}
        seeds: Sequence[int | None] = sweep.seeds or (None,)
        base = setting_name(sweep, setting)
        suffixes = [sweep.resolved.get("seed", 0) if seed is None else seed for seed in seeds]
        if any(f"{base}__s{suffix}" in names for suffix in suffixes):  # 1 and "1" look alike
            base += f"-{len(self.candidates)}"
        trials = [Trial(f"{base}__s{suffix}", seed) for seed, suffix in zip(seeds, suffixes, strict=True)]
        self.candidates.append(Candidate(setting, trials))
        return self.candidates[-1]


def setting_name(sweep: Sweep, setting: Setting) -> str:
    """A setting as a folder name: the keys that vary, as short as they are clear."""
    varying = [parameter.key for parameter in sweep.parameters if len(parameter.values) != 1]
    texts = {key: word(setting[key]) for key in varying}
    for key in varying:
        if not isinstance(setting[key], int | float):  # a number may begin with its sign
            texts[key] = folder_name(texts[key])
    words = [f"{short}={texts[key]}" for key, short in short_names(varying).items()]
    name = folder_name("__".join(words) or "config")
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 9]}-{config.config_hash(setting, without=())}"


# ---- what the runs left ----


def runs_of(folder: Path) -> list[Path]:
    """The run in a folder, or the runs of a recipe's stages in it, the one that wrote last behind."""
    if (folder / "run.json").exists():
        return [folder]
    # `lab rlhf --from` puts stages aside as sft.old1.
    stages = [path.parent for path in folder.glob("*/run.json") if not path.parent.suffix]
    return sorted(stages, key=lambda stage: _last_time(stage / "metrics.jsonl"))


def _last_time(path: Path) -> float:
    return max((row.get("_time", 0.0) for row in read_metrics(path)), default=0.0)


def states_of(folder: Path) -> set[str]:
    """The states of the runs in a folder; an unreadable run.json counts as failed."""
    states = set()
    for path in runs_of(folder):
        try:
            states.add(str(Run.open(path).info["state"]))
        except LabError:
            states.add("failed")
    return states


def last_value(folder: Path, metric: str) -> float:
    """The last value of a metric in a run or a recipe.

    Raises:
        LabError: it has no such metric, or the value is no finite number.
    """
    names: set[str] = set()
    for path in reversed(runs_of(folder)):
        for row in reversed(read_metrics(path / "metrics.jsonl")):
            names |= row.keys()
            if metric in row:
                try:
                    value = float(row[metric])
                except (TypeError, ValueError):
                    value = math.nan
                if not math.isfinite(value):
                    raise LabError(f"{folder}: its last {metric} is {row[metric]!r}, which is no number.")
                return value
    names -= {"_time"}
    raise MissingMetric(
        f"{folder}: has no metric {metric!r}, which metric.name asks for.{did_you_mean(metric, names)} "
        f"It has {', '.join(sorted(names)) or 'none'}."
    )


def _is_busy(folder: Path) -> bool:
    """Whether a process runs in a run folder or one of its stages."""
    return any(_is_locked(path) for path in (folder / ".lock", *folder.glob("*/.lock")))


def _is_locked(path: Path) -> bool:
    try:
        import fcntl

        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, FileNotFoundError):
        return False
    except OSError:
        return True
    return False


# ---- running them ----


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
        with StopRequest() as stop, _hangup_as_termination():
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
        setting = self.sweep.ask([candidate.tried() for candidate in self.record.candidates])
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
            with log.open("ab") as out:
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
    return ["train", str(sweep.config), *(f"--{key}={word(value)}" for key, value in values.items())]


def threads_each(jobs: int) -> int:
    """CPU threads of each of so many runs at once."""
    from lab.device import usable_cores

    return max(1, min(usable_cores() // jobs, 4))


@contextlib.contextmanager
def _hangup_as_termination() -> Iterator[None]:
    """A terminal that is closed asks for an end like SIGTERM; under nohup it does not."""
    if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from running the sweep in this folder meanwhile."""
    with explain_write_errors(str(folder), "Choose a folder you may write to with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (folder / ".lock").open("w")
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise LabError(
                f"{folder}: another process runs this sweep. Wait for it, or stop it first."
            ) from None
        yield
