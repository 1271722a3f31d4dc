"""What is kept of a sweep: its settings, their runs, and how these ended.

runs/pong_lr/
  sweep.json                        what is kept here
  learning_rate=0.0003__s0/         one run folder each, as `lab train` makes it
  logs/learning_rate=0.0003__s0.log what that run said
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from lab import config
from lab.errors import LabError, did_you_mean
from lab.files import check_contained, explain_write_errors, read_json, write_json
from lab.run import Run, folder_name, is_plain_name
from lab.search import Goal, Setting, Tried, same_name
from lab.sweep_file import Sweep, short_names, word
from lab.tracking import read_metrics

FORMAT = 1
NAME_LENGTH = 120
STATES = ("waiting", "running", "interrupted", "finished", "failed")


class MissingMetric(LabError):
    """A run has no metric of that name."""


@dataclass
class Trial:
    """One run: a setting with a seed."""

    name: str
    """Of its folder."""
    seed: int | None
    """None: the config's."""
    state: str = "waiting"
    """One of `STATES`."""
    value: float | None = None
    """The metric's last value."""
    error: str = ""

    def __post_init__(self) -> None:
        """Raises a `TypeError` for what no sweep writes: the record may be a stranger's."""
        is_number = self.value is None or (isinstance(self.value, int | float) and math.isfinite(self.value))
        is_seed = self.seed is None or (isinstance(self.seed, int) and self.seed >= 0)
        if not (is_plain_name(self.name) and self.state in STATES and is_seed and is_number):
            raise TypeError(self.name)


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

    @property
    def failed(self) -> int:
        """Runs that failed, or whose metric was no number at the end."""
        return sum(trial.state == "failed" for trial in self.trials)

    def mean(self, worst: float) -> float | None:
        """Over the seeds, those that failed at the worst value of all runs; None if there is no value.

        Without them the mean would be the better, the more of a setting's runs diverge.
        """
        return mean([*self.scores, *[worst] * self.failed]) if self.scores else None

    def tried(self, worst: float) -> Tried:
        """For the search: the mean over the seeds, once all have ended."""
        return Tried(self.setting, None if self.pending else self.mean(worst), self.pending)


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

    def worst(self, goal: Goal) -> float:
        """The worst value of all runs: what a failed one counts as. 0 if there is none."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        return (min if goal == "maximize" else max)(values, default=0.0)

    def tried(self, goal: Goal) -> list[Tried]:
        """All settings, for the search."""
        worst = self.worst(goal)
        return [candidate.tried(worst) for candidate in self.candidates]

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
        if folder.is_dir():
            check_contained(folder)
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
            changed = config.differences(_ungrown(raw["identity"], identity), identity)
            candidates = [
                Candidate(_setting(one["setting"], sweep), [Trial(**trial) for trial in one["trials"]])
                for one in raw["candidates"]
            ]
            if not isinstance(raw["metric"], str) or not all(one.trials for one in candidates):
                raise TypeError
            record = cls(folder, identity, raw["metric"], candidates, _place(raw["wandb"]))
        except (KeyError, TypeError, AttributeError):
            raise LabError(f"{path}: damaged. Restore it from a copy, or choose another folder.") from None
        if changed:
            key, (was, now) = next(iter(changed.items()))
            raise LabError(
                f"{folder}: holds another sweep: {key} was {was!r} there, now it is {now!r}. Set it back, or "
                "choose another folder with --out. Seeds, values and ranges may be added to."
            )
        record._add_seeds(sweep)
        return record

    def _add_seeds(self, sweep: Sweep) -> None:
        """Gives settings tried before a run for each seed that is new."""
        default = sweep.resolved.get("seed", 0)
        for candidate in self.candidates:
            there = {default if trial.seed is None else trial.seed for trial in candidate.trials}
            base = candidate.trials[0].name.rpartition("__s")[0]
            candidate.trials += [Trial(f"{base}__s{seed}", seed) for seed in sweep.seeds if seed not in there]

    def revive(self, metric: str, retry: bool) -> list[str]:
        """Makes runs wait again that were stopped or deleted, and reads again what the finished ones gave.

        Args:
            metric: may be another than before.
            retry: failed runs wait again, too.

        Returns:
            Names of runs that had ended and whose folders are gone: they are made again.

        Raises:
            LabError: no finished run has the metric.
        """
        problem: LabError | None = None
        gone: list[str] = []
        for trial in self.trials:
            folder = self.folder / trial.name
            if trial.state == "finished" and not any(runs_of(folder)):
                gone.append(trial.name)
                trial.state, trial.value = "waiting", None
            if trial.state in ("running", "interrupted") or (retry and trial.state == "failed"):
                trial.state, trial.error = "waiting", ""
            if trial.state == "finished":
                try:
                    trial.value = last_value(folder, metric)
                except LabError as error:
                    trial.value, problem = None, error
        if problem and not any(trial.value is not None for trial in self.trials):
            raise problem
        self.metric = metric
        return gone

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


def _ungrown(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The identity `old` with the seeds, values and ranges of `new` where these only add to it."""
    grown = json.loads(json.dumps(old))
    if set(old["seeds"] or [old["config"].get("seed", 0)]) <= set(new["seeds"]):
        grown["seeds"] = new["seeds"]
    for key in old["parameters"].keys() & new["parameters"].keys():
        if _covers(new["parameters"][key], old["parameters"][key]):
            grown["parameters"][key] = new["parameters"][key]
    return grown


def _covers(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether a parameter may still be all that it could be before."""
    if old["values"]:
        return set(map(same_name, old["values"])) <= set(map(same_name, new["values"]))
    alike = all(new[key] == old[key] for key in ("distribution", "q"))
    return alike and new["low"] <= old["low"] and old["high"] <= new["high"]


def _setting(value: Any, sweep: Sweep) -> Setting:
    """A setting as it was kept; a `TypeError` for one of other keys than are searched."""
    if value.keys() != {parameter.key for parameter in sweep.parameters}:
        raise TypeError(value)
    return value


def _place(value: Any) -> dict[str, str] | None:
    """Where W&B has the sweep; a `TypeError` for what W&B never says: it becomes words of a command line."""
    if value is not None and not all(
        isinstance(value[key], str) and re.fullmatch(r"(?!-)[\w./:@%+~-]*", value[key])
        for key in ("path", "id", "url")
    ):
        raise TypeError(value)
    return value


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
