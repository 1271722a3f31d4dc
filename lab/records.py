"""What ran, wherever it was kept: run folders, W&B's offline files and W&B itself give the same `Record`s.

A source is a run folder, a folder or a glob of them, a W&B offline folder or `*.wandb` file, or
`wandb:entity/project?filters`. Metrics are read whole: nothing is sampled, nothing dropped in silence.

Besides what was logged, a run has `evaluate/NAME`, the last of what `lab evaluate` measured of it, and
`summary/NAME`, what its summary says at the end (in run.json, or at W&B).
"""

import contextlib
import fnmatch
import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import orjson

from lab import locks
from lab.errors import LONGEST_VALUE, LabError, cut, did_you_mean, first_line
from lab.escape import harmless, one_line
from lab.files import lines_of
from lab.tracking import ENDED, INTERRUPTED, choose_mode

Array = npt.NDArray[np.float64]

STEP = "global_step"
AXES = {
    "step": STEP,
    "frames": "frames",
    "tokens": "train/num_tokens",
    "episodes": "episode",
    "time": "time/elapsed_seconds",
}
"""What may stand on a curve's x axis, by the metric that counts it."""
_CLOCK = "_time"
"""Seconds since 1970 of every row; W&B's name for it is _timestamp."""
EVALUATE, SUMMARY = "evaluate/", "summary/"
"""Before the names of what was measured by `lab evaluate`, and of what a summary says."""
_CONDITIONS = ("game", "data", "part", "checkpoint", "episodes", "epsilon", "seed", "prompts", "samples")
"""Of what `lab evaluate` says, what it measured with: not a result."""
PARALLEL_BYTES = 32 * 2**20
"""From so much metrics on, all cores read."""
PAGE = 1000
"""Rows that W&B gives at once; a run that has no more is read whole, of a longer one what is asked for."""
LARGEST = 1e150
"""Values beyond it count as infinite: the squares of which a spread is made would be."""
READERS = 8
"""Runs that are read from W&B at the same time."""
TROUBLES = 3
"""After so many runs in a row that W&B does not give, the rest is not asked for."""
API_SECONDS = 10
"""How long one answer of W&B's server is waited for."""
# By default wandb tries for hours. These bound a silent server to half a minute; the environment goes first.
_PATIENCE = {
    "WANDB_X_GRAPHQL_RETRY_MAX": "2",
    "WANDB_X_GRAPHQL_RETRY_WAIT_MIN_SECONDS": "1",
    "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "8",
    "WANDB_X_GRAPHQL_TIMEOUT_SECONDS": str(API_SECONDS),
}
_ROWS = "logged rows"
"""What the steps of a W&B run count that names none."""
_FILTERS = {
    **{"tag": "tags", "user": "username", "group": "group", "state": "state", "job_type": "jobType"},
    **{"name": "display_name", "id": "name", "seed": "config.seed.value"},
}
"""Words of a query, and what W&B calls them."""
_RLOPS = {"we": "entity", "wpn": "project", "ceik": "task", "cen": "by", "metric": "metric", "cl": "label"}
"""openrlbenchmark's words for where to look and how to show it."""
_STATES = {"killed": "interrupted", "preempting": "interrupted", "preempted": "interrupted"}
"""W&B's states that we call otherwise."""


class Series(NamedTuple):
    """A metric over a run: its steps, rising, and its values, NaN and infinities included.

    What was said once, without a step (in a summary, by `lab evaluate`), is one value at NaN.
    """

    x: Array
    y: Array

    @property
    def has_steps(self) -> bool:
        """Whether it has values, and they have steps."""
        return self.x.size > 0 and math.isfinite(self.x[-1])


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run as all comparisons see it."""

    id: str
    name: str
    source: str
    """Where it was read: a folder, a file or a W&B path."""
    group: str = ""
    job_type: str = ""
    state: str = "finished"
    """finished, running, interrupted, failed, or crashed: it stopped without a word."""
    x_axis: str = ""
    """What its steps count: agent_steps, optimizer_steps, tokens; empty: not recorded."""
    started: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """Flat, with dotted keys."""
    parents: tuple[dict[str, str], ...] = ()
    series: dict[str, Series] = field(default_factory=dict)
    """Of the metrics asked for, those it has."""
    metrics: frozenset[str] = frozenset()
    """Names of metrics it has; of a large run, of those near its beginning and end."""
    said: frozenset[str] = frozenset()
    """Names of what its summary says, but for the last values of metrics, and `lab evaluate`."""
    goals: dict[str, str] = field(default_factory=dict)
    """minimize or maximize, of the metrics of which W&B was told so (`define_metric`)."""
    conditions: dict[str, str] = field(default_factory=dict)
    """With what its last `lab evaluate` measured: episodes, seed, checkpoint ..."""
    error: str = ""
    """Why it failed, if that is recorded."""
    notes: tuple[str, ...] = ()
    """What is wrong with it, one line each."""

    def __post_init__(self) -> None:
        """Whoever wrote the record may not speak to the terminal, a table or a plot of who reads it."""
        for key in ("id", "name", "group", "job_type", "state", "x_axis", "started"):
            object.__setattr__(self, key, cut(one_line(getattr(self, key)), LONGEST_VALUE))
        config = {one_line(key): harmless(x) if isinstance(x, str) else x for key, x in self.config.items()}
        object.__setattr__(self, "config", config)

    @property
    def seed(self) -> Any:
        """Of the config; None if it has none."""
        return self.config.get("seed")

    def over(self, metric: str, axis: str) -> Series:
        """A metric over one of `AXES`; where its rows do not have it, interpolated between those that do."""
        of = self.series.get(metric, Series(np.empty(0), np.empty(0)))
        if axis == "step" or not of.x.size:
            return of
        scale = self._scale(axis) if of.has_steps else None
        if scale is None or not scale.x.size:
            return Series(np.empty(0), np.empty(0))
        rising, _ = _joined(scale.y)
        return Series(np.interp(of.x, scale.x, rising), of.y)

    def restarts(self, axis: str) -> int:
        """How often the counter of an axis falls: a clock set back, or a count begun again after a resume.

        `over` goes on from where it was.
        """
        scale = self._scale(axis) if axis != "step" else None
        return 0 if scale is None else _joined(scale.y)[1]

    def _scale(self, axis: str) -> Series | None:
        """The axis over the steps, finite."""
        scale = self.series.get(AXES[axis])
        if scale is None and axis == "time":
            scale = self.series.get(_CLOCK)
            scale = scale and Series(scale.x, scale.y - scale.y[0])
        if scale is None:
            return None
        usable = np.isfinite(scale.y) & np.isfinite(scale.x)
        return Series(scale.x[usable], scale.y[usable])


class Found(NamedTuple):
    """What a source holds, and what was wrong with it."""

    records: list[Record]
    notes: list[str]


class Query(NamedTuple):
    """`wandb:entity/project?filters`: where to look, for what, and what openrlbenchmark's words add."""

    path: str
    filters: dict[str, Any]
    words: dict[str, str]
    """Of by, task, metric and label, those given; they hold for the runs of this source."""

    @property
    def wishes(self) -> dict[str, str]:
        """What to compare by if the command line does not say: see `_as_wished`."""
        wishes = {key: self.words[key] for key in ("metric",) if key in self.words}
        wishes |= {"task": "task"} if "task" in self.words else {}
        return wishes | ({"by": "group"} if {"by", "label"} & self.words.keys() else {})


def load(sources: Sequence[str], wanted: Sequence[str]) -> Found:
    """The records of all sources, each run once. What cannot be read of some of them is in the notes.

    Args:
        sources: see above.
        wanted: metrics to read; axes are read with them.

    Raises:
        LabError: a source is misspelt, or there is no run in any of them.
    """
    columns = (*wanted, *(name for name in AXES.values() if name != STEP), _CLOCK)
    queries = {source: parse_query(source) for source in sources if source.startswith("wandb:")}
    places = {source: _paths(source) for source in sources if source not in queries}
    records: dict[str, Record] = {}
    notes: list[str] = []
    for source in dict.fromkeys(sources):
        local = source in places
        found = _local(places[source], columns) if local else _online(queries[source], wanted, columns)
        notes += found.notes or ([] if found.records else [f"{source}: no run in it"])
        for record in found.records:
            if record.id in records and records[record.id].source != record.source:
                notes.append(
                    f"{record.source}: the run {record.id} again, of {records[record.id].source}; left out"
                )
            else:
                records.setdefault(record.id, record)
    if not records:
        more = f" (and {len(notes) - 1} more like it)" if len(notes) > 1 else ""
        raise LabError(
            f"{notes[0].rstrip('.')}{more}. Name a run folder, a folder or glob of them, a W&B offline "
            "folder, or wandb:entity/project."
        )
    return Found(list(records.values()), notes)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config, the same wherever it was kept: W&B turns 1.0 into 1 and forgets empty mappings."""
    return {key: _whole(value) for key, value in sorted(flatten(values).items()) if value != {}}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in sorted(value.items())}
    return [_whole(item) for item in value] if isinstance(value, list | tuple) else value


# ---- rows ----


class Columns(NamedTuple):
    """The metrics of a run, and what of them does not count or was placed by inference."""

    series: dict[str, Series]
    notes: list[str]


def columns_of(rows: Iterable[Mapping[str, Any]], wanted: Collection[str]) -> dict[str, Series]:
    """The metrics of `wanted` that the rows have; see `read_columns`."""
    return read_columns(rows, wanted).series


def read_columns(rows: Iterable[Mapping[str, Any]], wanted: Collection[str], axis: str = STEP) -> Columns:
    """The metrics of `wanted` that the rows have, all over the one count of steps that `axis` names.

    Rows that lack it stand between the rows around them that have it, by W&B's own count of rows (`_step`);
    where no row has it, that count takes its place.
    """
    kept: dict[str, tuple[list[Any], list[Any], list[Any]]] = {name: ([], [], []) for name in wanted}
    pairs = list(kept.items())
    known: list[tuple[Any, Any]] = []
    for row in rows:
        step, own = row.get(axis), row.get("_step")
        if step is not None and own is not None:
            known.append((own, step))
        for name, (steps, owns, values) in pairs:
            value = row.get(name)
            if value is None and name == _CLOCK:
                value = row.get("_timestamp")
            if value is not None:
                steps.append(step)
                owns.append(own)
                values.append(value)
    series: dict[str, Series] = {}
    notes: list[str] = []
    for name, (steps, owns, values) in pairs:
        asked = name not in (*AXES.values(), _CLOCK)  # of the axes one need not hear
        if None in steps:
            lacking = sum(step is None for step in steps)
            steps, values = _placed(steps, owns, values, known)
            if asked and known:
                notes.append(f"{lacking} values of {name} without {axis} stand between those that have it")
            elif asked and len(values) < len(owns):
                notes.append(f"{len(owns) - len(values)} values of {name} have no step and do not count")
        found, repeated, together, odd = _series(steps, values)
        if found.x.size:
            series[name] = found
        if asked and odd and found.x.size:
            notes.append(f"{odd} values of {name} are no numbers and do not count")
        if asked and repeated:
            notes.append(
                f"steps of {name} begin again at {found.x[0]:,.12g}: "
                f"{repeated} values logged before do not count"
            )
        if asked and together:
            notes.append(f"{together} values of {name} have the step of the one behind them and do not count")
    return Columns(series, notes)


def _placed(
    steps: list[Any], owns: list[Any], values: list[Any], known: Sequence[tuple[Any, Any]]
) -> tuple[list[Any], list[Any]]:
    """Gives a step to the values that have none, if W&B's own count tells where they belong."""
    if not known:
        usable = [index for index, own in enumerate(owns) if own is not None or steps[index] is not None]
        return [owns[i] if steps[i] is None else steps[i] for i in usable], [values[i] for i in usable]
    pairs = sorted({own: step for own, step in known if _number(step) is not None}.items())
    places, counts = (np.array([float(pair[i]) for pair in pairs]) for i in (0, 1))
    usable = [index for index, own in enumerate(owns) if own is not None or steps[index] is not None]
    placed = [np.interp(owns[i], places, counts) if steps[i] is None else steps[i] for i in usable]
    return placed, [values[i] for i in usable]


def _series(steps: list[Any], values: list[Any]) -> tuple[Series, int, int, int]:
    """Steps and values as numbers, rising, how many went if even the first was logged again, how many since
    the next was logged at the same step (episodes that end together), and how many were no numbers.

    A resumed run repeats the steps since its checkpoint, which is as it should be.
    """
    try:
        x, y = np.array(steps, np.float64), np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):  # "NaN", or a metric that is no number
        x = y = np.empty(0)
    if x.shape != (len(steps),) or y.shape != (len(values),):  # or lists, as of a histogram
        numbers = [(_number(step), _number(value)) for step, value in zip(steps, values, strict=True)]
        pairs = [(a, b) for a, b in numbers if a is not None and b is not None]
        x, y = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    odd = len(values) - x.size
    y = _bounded(y)
    usable = np.isfinite(x)
    if not usable.all():
        x, y = x[usable], y[usable]
    found = _without_overlap(x, y)
    begun_again = x.size > 0 and bool((x[1:] <= x[0]).any())
    return found, (x.size - found.x.size) if begun_again else 0, int((np.diff(x) == 0).sum()), odd


def _bounded(y: Array) -> Array:
    return np.where(np.abs(y) > LARGEST, np.copysign(np.inf, y), y)


def _without_overlap(x: Array, y: Array) -> Series:
    """Leaves out what a later row says anew: a resumed run repeats the steps behind its checkpoint."""
    if x.size > 1 and not (np.diff(x) > 0).all():
        least_after = np.minimum.accumulate(x[::-1])[::-1]
        kept = np.append(x[:-1] < least_after[1:], True)
        x, y = x[kept], y[kept]
    return Series(x, y)


def _joined(values: Array) -> tuple[Array, int]:
    """A counter that never falls, and how often it did: after each fall it goes on from where it was."""
    falls = np.minimum(np.diff(values, prepend=values[:1]), 0.0)
    # The maximum takes away what rounding leaves.
    return np.maximum.accumulate(values - falls.cumsum()), int((falls < 0).sum())


def _step_metric(rows: Sequence[Mapping[str, Any]], wanted: Iterable[str], laid: Mapping[str, str]) -> str:
    """What counts the steps of a W&B run: what the first of `wanted` was laid over, else global_step.

    Args:
        laid: names or patterns of metrics, and what W&B lays them over.
    """
    for name in wanted:
        axis = laid.get(name) or next((laid[p] for p in laid if fnmatch.fnmatchcase(name, p)), "")
        if axis and any(name in row for row in rows) and any(axis in row for row in rows):
            return axis
    return STEP


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of a file of rows; None: it is damaged."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line)  # Python writes NaN and Infinity, which JSON has not
        except (ValueError, RecursionError):
            return None
    return row if isinstance(row, dict) else None


def _number(value: Any) -> float | None:
    """NaN and infinities are texts in JSON."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(value)
    return None


# ---- folders ----


def _paths(source: str) -> list[Path]:
    """The paths a source names.

    Raises:
        LabError: there are none.
    """
    # A folder may be called like a pattern.
    found = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))  # noqa: PTH207
    if not found:
        place = Path(source).parent
        near = (
            did_you_mean(Path(source).name, [path.name for path in place.glob("*")]) if place.is_dir() else ""
        )
        raise LabError(f"{source}: not there.{near}")
    return [Path(path) for path in found]


def _local(paths: Sequence[Path], wanted: Collection[str]) -> Found:
    folders: list[Path] = []
    files: list[Path] = []
    for path in paths:
        runs, fragments = _find(path)
        folders += runs
        files += fragments
    notes: list[str] = []
    records = _read_folders(list(dict.fromkeys(folders)), wanted, notes)
    records += _read_wandb(list(dict.fromkeys(files)), wanted, notes)
    return Found(records, notes)


def _find(path: Path) -> tuple[list[Path], list[Path]]:
    """Run folders in `path`, and W&B's files outside of them (inside they are a run folder's mirror)."""
    if path.is_file():
        return ([path.parent], []) if path.name == "run.json" else ([], [path])
    folders: list[Path] = []
    files: list[Path] = []
    for place, below, names in os.walk(path):
        if "run.json" in names:
            folders.append(Path(place))
            below[:] = [name for name in below if name not in ("wandb", "checkpoints", "media", "model")]
        else:
            files += [Path(place, name) for name in names if name.endswith(".wandb")]
        below.sort()
    return sorted(folders), sorted(files)


def _read_folders(folders: Sequence[Path], wanted: Collection[str], notes: list[str]) -> list[Record]:
    sizes = [_size(folder / "metrics.jsonl") for folder in folders]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results: list[Record | str]
    if sum(sizes) < PARALLEL_BYTES or cores == 1:
        results = [_read_folder(folder, wanted) for folder in folders]
    else:
        with ProcessPoolExecutor(cores) as pool:
            share = max(1, len(folders) // (8 * cores))
            results = list(pool.map(_read_folder, folders, [wanted] * len(folders), chunksize=share))
    notes += [result for result in results if isinstance(result, str)]
    return [result for result in results if isinstance(result, Record)]


def _read_folder(folder: Path, wanted: Collection[str]) -> Record | str:
    """The run in a folder, or why there is none."""
    from lab.run import Run

    try:
        info = Run.open(folder).info
        sessions = info["sessions"] or [{}]
        about: dict[str, Any] = {
            **{key: str(info[key]) for key in ("id", "name", "group", "job_type", "x_axis", "state")},
            **{"started": str(sessions[0].get("started", "")), "config": _config(info["config"])},
            "parents": _parents(info["parents"]),
        }
    except LabError as error:
        return str(error)
    except (AttributeError, TypeError, LookupError):
        return f"{folder / 'run.json'}: damaged: not what the lab writes. Restore it from a copy."
    if about["state"] == "running" and not locks.is_locked(folder / ".lock"):
        about["state"] = "crashed"
    series, metrics, notes = _read_metrics(folder / "metrics.jsonl", wanted)
    said, conditions, damaged = _evaluated(folder)
    said |= _prefixed(SUMMARY, info["summary"])
    return Record(
        **about,
        source=str(folder),
        series=_with_said(series, said, wanted),
        metrics=metrics,
        said=_worth_naming(said, metrics),
        notes=(*notes, *damaged),
        conditions=conditions,
        error=str(sessions[-1].get("error", "")),
    )


def _evaluated(folder: Path) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """What `lab evaluate` last said of a run, with what it measured, and what is wrong with the file."""
    path = folder / "evaluations.jsonl"
    if not path.is_file():
        return {}, {}, ()
    row: Any = None
    try:
        for line in lines_of(path):
            row = found if (found := _row(line)) is not None else row
    except OSError as error:
        return {}, {}, (f"{path}: cannot be read: {error.strerror}",)
    if row is None:
        return {}, {}, (f"{path}: damaged: no line of it can be read",) if _size(path) else ()
    result = {key: row.pop(key) for key in ("eval",) if isinstance(row.get(key), dict)}
    conditions = {key: str(row.pop(key)) for key in _CONDITIONS if row.get(key) is not None}
    row = {key: value for key, value in row.items() if key not in ("scores", "compute")}
    return _prefixed(EVALUATE, {**row, **result.get("eval", {})}), conditions, ()


def _prefixed(prefix: str, values: Any) -> dict[str, Any]:
    """The numbers of a nested mapping by `prefix` and their dotted keys."""
    flat = flatten(values) if isinstance(values, Mapping) else {}
    return {
        f"{prefix}{key}": value
        for key, value in flat.items()
        if not key.startswith("_") and not isinstance(value, bool) and isinstance(value, int | float)
    }


def _with_said(
    series: dict[str, Series], said: Mapping[str, Any], wanted: Collection[str]
) -> dict[str, Series]:
    """Adds what was said once of a run. A summary's value may be named without its prefix."""
    for name in wanted:
        value = said.get(name, said.get(f"{SUMMARY}{name}"))
        number = _number(value)
        if number is not None and name not in series:
            series[name] = Series(np.array([math.nan]), _bounded(np.array([number])))
    return series


def _worth_naming(said: Iterable[str], metrics: Collection[str]) -> frozenset[str]:
    """The names of what was said but for the last values of metrics, which W&B repeats in its summary."""
    known = {*metrics, STEP}
    bare = {name: name.removeprefix(SUMMARY) for name in said}
    return frozenset(name for name, of in bare.items() if not {of, of.split(".")[0]} & known)


def _parents(value: Any) -> tuple[dict[str, str], ...]:
    """What a run names as its origins; other programs may mean something else by it."""
    return tuple(one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()


def _read_metrics(
    path: Path, wanted: Collection[str]
) -> tuple[dict[str, Series], frozenset[str], tuple[str, ...]]:
    """The metrics of a metrics.jsonl: those wanted, the names of all, and what was wrong."""
    names: set[str] = set()
    newest: deque[Mapping[str, Any]] = deque(maxlen=100)
    damaged: list[int] = []

    def rows() -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(lines_of(path), 1):
            if line == b"\n":
                continue
            row = _row(line)
            if row is None:
                if line.endswith(b"\n"):  # the last is half-written while a run goes on, or was killed
                    damaged.append(number)
                continue
            if number <= 100:
                names.update(row)
            newest.append(row)
            yield row

    try:
        series, found = read_columns(rows(), wanted)
    except OSError as error:
        return {}, frozenset(), (f"{path}: cannot be read: {error.strerror}",)
    names.update(*newest)
    notes = [f"{path}: {note}" for note in found]
    if damaged:
        what = f"{len(damaged)} lines are damaged, the first is line {damaged[0]}"
        notes.append(f"{path}: {what}; the others count")
    return series, _metric_names(names | set(series)), tuple(notes)


def _metric_names(keys: Iterable[str]) -> frozenset[str]:
    """The keys of rows that may be compared: not W&B's own, nor the parts of its images and tables."""
    keys = set(keys)
    media = tuple(key.removesuffix("_type") for key in keys if key.endswith("._type"))
    return frozenset(
        key for key in keys if not key.startswith(("_", *media)) and f"{key}." not in media and key != STEP
    )


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


# ---- W&B's offline files ----


def _read_wandb(files: Sequence[Path], wanted: Collection[str], notes: list[str]) -> list[Record]:
    """One record per run id: an offline run that was resumed has a file for every session."""
    fragments: dict[str, list[_Fragment]] = defaultdict(list)
    for file in files:
        fragment = _read_fragment(file)
        if isinstance(fragment, str):
            notes.append(fragment)
        else:
            fragments[fragment.info["run_id"]].append(fragment)
    return [
        _join(sorted(parts, key=lambda part: part.info.get("start_time", "")), wanted)
        for parts in fragments.values()
    ]


class _Fragment(NamedTuple):
    file: Path
    info: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    exit_code: int | None
    notes: tuple[str, ...]
    laid: dict[str, str]
    """Metrics, or patterns of them, and what W&B lays them over."""
    goals: dict[str, str]
    summary: dict[str, Any]


def _read_fragment(file: Path) -> _Fragment | str:
    """A W&B file, by the reader that W&B supports; or why it cannot be read."""
    if file.suffix != ".wandb":
        return f"{file}: no run: neither a run.json nor a .wandb file"
    command = [_wandb_command(), "leet", "inspect", "--json", str(file)]
    # It writes a log of its own: not into the folder where the user happens to be.
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_DIR": tempfile.gettempdir()}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    info: dict[str, Any] = {}
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    laid: dict[str, str] = {}
    goals: dict[str, str] = {}
    summary: dict[str, Any] = {}
    exit_code = None
    for line in done.stdout.splitlines():
        try:
            entry = orjson.loads(line)
            kind, body = entry["type"], entry[entry["type"]]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
        if kind == "run":
            info |= {key: value for key, value in body.items() if key != "config"}
            config |= body.get("config", {}).get("update", {})
        elif kind == "config":
            config |= body.get("update", {})
        elif kind == "history":
            rows.append(body["item"])
        elif kind == "summary":
            summary |= body.get("update", {})
        elif kind == "metric":
            name = body.get("name") or body.get("glob_name", "")
            if axis := body.get("step_metric"):
                laid[name] = axis
            if goal := _goal(body.get("summary", {}), body.get("goal")):
                goals[name] = goal
        elif kind == "exit":
            exit_code = body.get("exit_code", 0)
    if "run_id" not in info:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        return f"{file}: damaged: no run can be read from it{f' ({why[-1][:120]})' if why else ''}"
    cut = (f"{file}: cut off after {len(rows)} rows; those count",) if done.returncode else ()
    return _Fragment(file, info, config, rows, exit_code, cut, laid, goals, summary)


def _goal(summary: Any, goal: Any) -> str:
    """Which way W&B was told that a metric gets better: by its goal, or by what its summary keeps."""
    if goal in (1, "GOAL_MINIMIZE", "minimize") or (isinstance(summary, Mapping) and summary.get("min")):
        return "minimize"
    if goal in (2, "GOAL_MAXIMIZE", "maximize") or (isinstance(summary, Mapping) and summary.get("max")):
        return "maximize"
    return ""


def _join(parts: Sequence[_Fragment], wanted: Collection[str]) -> Record:
    first, last = parts[0], parts[-1]
    rows = _continued([part.rows for part in parts])
    states = {None: "crashed", 0: "finished", INTERRUPTED: "interrupted"}
    names = frozenset(key for row in (*rows[:100], *rows[-100:]) for key in row)
    laid, goals, summary = ({k: v for part in parts for k, v in of(part).items()} for of in _DEFINED)
    return _of_wandb(
        id=first.info["run_id"],
        name=last.info.get("display_name") or first.info["run_id"],
        source=str(first.file),
        group=last.info.get("run_group", ""),
        job_type=last.info.get("job_type", ""),
        state=states.get(last.exit_code, "failed"),
        started=first.info.get("start_time", ""),
        config=last.config,
        rows=rows,
        wanted=wanted,
        laid=laid,
        goals=goals,
        summary=summary,
        metrics=names,
        notes=tuple(note for part in parts for note in part.notes),
    )


_COUNTERS = frozenset(
    {
        *("epoch", "epochs", "step", "steps", "iter", "iters", "iteration", "iterations", "batch", "batches"),
        *("update", "updates", "timestep", "timesteps", "frame", "frames", "episode", "episodes", "tokens"),
    }
)
"""Last words of what counts a run's progress."""


def _continued(sessions: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a run's sessions, W&B's own count of them going on.

    Offline it begins at 0 in every session. That a session goes on with the one before, and does not begin
    the run again, another counter tells (`epoch`): then what it says anew is left out of the one before.
    """
    done: list[dict[str, Any]] = []
    for rows in sessions:
        firsts = {key: value for row in reversed(rows) for key, value in _counts(row).items()}
        begun = {key: value for row in reversed(done) for key, value in _counts(row).items()}
        common = firsts.keys() & begun.keys()
        own, start = (next((row["_step"] for row in of if "_step" in row), 0) for of in (rows, done))
        if own <= start and common and all(firsts[key] > begun[key] for key in common):
            done = [row for row in done if all(v < firsts[k] for k, v in _counts(row).items() if k in common)]
            past = max((row["_step"] for row in done if "_step" in row), default=-1) + 1 - own
            rows = [row | {"_step": row["_step"] + past} if "_step" in row else row for row in rows]
        done += rows
    return done


def _counts(row: Mapping[str, Any]) -> dict[str, float]:
    """The counters in a row, but W&B's own."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, int | float)
        and not key.startswith("_")
        and re.split(r"[^a-z0-9]+", key.lower())[-1] in _COUNTERS
    }


_DEFINED = (lambda part: part.laid, lambda part: part.goals, lambda part: part.summary)


def _wandb_command() -> str:
    beside = Path(sys.executable).with_name("wandb")
    found = str(beside) if beside.exists() else shutil.which("wandb")
    if not found:
        raise LabError("wandb: not installed, and W&B's files need it. Install it: pip install wandb")
    return found


def _of_wandb(
    *,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    wanted: Collection[str],
    laid: Mapping[str, str],
    summary: Mapping[str, Any],
    metrics: Iterable[str],
    notes: Sequence[str],
    **fields: Any,
) -> Record:
    """A record whose config is what the tracker told W&B: ours, with what else it knows of the run."""
    ours = {
        key: value for key, value in config.items() if key not in ("_wandb", "x_axis", "parents", "compute")
    }
    axis = _step_metric(rows, wanted, laid)
    series, found = read_columns(rows, wanted, axis)
    names = _metric_names(metrics)
    said = _prefixed(SUMMARY, summary)
    if axis == STEP and series and not any(STEP in row for row in rows):
        axis = _ROWS
    return Record(
        config=_config(ours),
        x_axis=str(config.get("x_axis") or (axis if axis != STEP else "")),
        parents=_parents(config.get("parents")),
        series=_with_said(series, said, wanted),
        metrics=names,
        said=_worth_naming(said, names),
        notes=(*notes, *(f"{fields['name']}: {note}" for note in found)),
        **fields,
    )


# ---- W&B itself ----


def parse_query(source: str) -> Query:
    """Reads `wandb:entity/project?tag=v1&user=ann&config.agent.algorithm=dqn`, and openrlbenchmark's words.

    Those are we and wpn (entity and project), ceik (the config key of the task), cen (that of the experiment,
    which makes the groups), metric (its name there), tag, user and cl (the group's label). What stands before
    the ? is the experiment if wpn names the project: `wandb:ppo?we=ann&wpn=cleanrl&tag=v1&cl=PPO`.
    A word given twice asks for either value, but for tags, of which a run must have all.

    Raises:
        LabError: no project, or a word that is none of these.
    """
    place, _, text = source.removeprefix("wandb:").partition("?")
    place, words = place.strip("/"), dict[str, str]()
    asked: dict[str, list[Any]] = defaultdict(list)
    conditions: list[dict[str, Any]] = []
    for word, value in parse_qsl(text, keep_blank_values=True):
        if word in _RLOPS:
            words[_RLOPS[word]] = value
        elif word == "tag":
            conditions.append({"tags": {"$in": value.split(",")}})
        elif word in _FILTERS:
            asked[_FILTERS[word]].append(_literal(value) if word == "seed" else value)
        elif word.startswith("config."):
            asked[f"config.{word.removeprefix('config.')}.value"].append(_literal(value))
        else:
            known = [*_FILTERS, *_RLOPS, "config.KEY"]
            raise LabError(
                f"{source}: unknown filter {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}."
            )
    project, entity = words.pop("project", ""), words.pop("entity", "")
    if project:
        if place:
            asked[f"config.{words.setdefault('by', 'exp_name')}.value"].append(place)
        place = "/".join(part for part in (entity, project) if part)
    parts = place.split("/")
    if len(parts) > 2:  # entity/project/id, or as in an address, entity/project/runs/id
        asked["name"].append(parts[-1])
    if not all(parts) or len(parts) > 4 or (len(parts) == 4 and parts[2] != "runs"):
        raise LabError(f"{source}: names no project. Write wandb:entity/project.")
    conditions += [{key: values[0] if len(values) == 1 else {"$in": values}} for key, values in asked.items()]
    return Query("/".join(parts[:2]), {"$and": conditions} if conditions else {}, words)


def _literal(text: str) -> Any:
    """A value of a config as one writes it: JSON, or Python's words, or a text."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return {"True": True, "False": False, "None": None}.get(text, text)


class _Unanswered(Exception):
    """Why W&B was not asked, or what it said."""


def _online(query: Query, wanted: Sequence[str], columns: Collection[str]) -> Found:
    """The runs of a project, every metric whole. What W&B does not give is in the notes."""
    source, runs, notes = f"wandb:{query.path}", list[Any](), list[str]()
    try:
        api = _connect()
        try:
            for run in api.runs(query.path, filters=query.filters, order="+created_at"):
                if run.job_type != "comparison":  # what `lab compare --publish` left there
                    runs.append(run)
        except ValueError as error:
            if "Could not find project" not in str(error):
                raise
            raise _Unanswered(f"no such project, or the key may not read it.{_like(api, query)}") from error
    except Exception as error:
        notes.append(f"{source}: {f'only {len(runs)} runs are listed: ' if runs else ''}{_says(error)}")
    if not runs and not notes and query.filters:
        notes.append(f"{source}: no run fits {json.dumps(query.filters['$and'])}")
    troubles = 0

    def read(run: Any) -> Record | str:
        nonlocal troubles
        if troubles >= TROUBLES:
            return "not asked for"
        try:
            record = _online_run(run, query, wanted, columns)
            troubles = 0
        except Exception as error:
            troubles += 1
            return _says(error)
        return record

    pool = ThreadPoolExecutor(READERS)
    try:
        results = list(pool.map(read, runs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    unread = [result for result in results if isinstance(result, str)]
    if unread:
        notes.append(f"{source}: {len(unread)} of {len(runs)} runs cannot be read: {unread[0]}")
    return Found([result for result in results if isinstance(result, Record)], notes)


def _connect() -> Any:
    """W&B's client. It never asks for a key, and a server that does not answer costs seconds."""
    mode, why = choose_mode("auto")
    if mode != "online":
        asked = f"WANDB_MODE is {os.environ.get('WANDB_MODE', mode)!r}: unset it to read from W&B"
        raise _Unanswered(asked if why == "asked for" else f"{why}: run `wandb login`, or see to the network")
    for name, value in {"WANDB_SILENT": "true", **_PATIENCE}.items():
        os.environ.setdefault(name, value)
    import wandb

    return wandb.Api(timeout=API_SECONDS)


def _says(error: Exception) -> str:
    if isinstance(error, _Unanswered):
        return str(error)
    text = first_line(error).rstrip(".: ")
    silent = "did not respond in time" in text or "Client.Timeout" in text
    return f"W&B's server does not answer{'' if silent else f' as it should ({text[:160]})'}"


def _like(api: Any, query: Query) -> str:
    with contextlib.suppress(Exception):
        entity, _, name = query.path.rpartition("/")
        return did_you_mean(name, [project.name for project in api.projects(entity or None)])
    return ""


def _online_run(run: Any, query: Query, wanted: Sequence[str], columns: Collection[str]) -> Record:
    there = query.words.get("metric", "")
    names = {there: wanted[0], f"{there}_n": f"{wanted[0]}_n"} if there and there not in wanted else {}
    config, summary = dict(run.config), dict(run.summary)
    known = set((run.history_keys or {}).get("keys") or summary)
    laid, goals = _definitions(config.get("_wandb"))
    rows, notes = _online_rows(run, known, [*columns, *names, *laid.values()])
    record = _of_wandb(
        id=run.id,
        name=run.name or run.id,
        source=f"wandb:{'/'.join(run.path)}",
        group=run.group or "",
        job_type=run.job_type or "",
        state=summary.get(ENDED, run.state) if run.state == "failed" else _STATES.get(run.state, run.state),
        started=str(run.created_at or ""),
        config=config,
        rows=rows,
        wanted=[*columns, *names],
        laid=laid,
        goals=goals,
        summary=summary,
        metrics=known | {names[name] for name in names if name in known},
        notes=notes,
    )
    series = {names.get(name, name): one for name, one in record.series.items()}
    return _as_wished(replace(record, series=series), query.words)


def _definitions(told: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What `define_metric` told W&B's server: over what metrics lie, and which way they get better.

    It keeps W&B's messages with numbers for names: 1 the metric or 2 a pattern, 4 its step metric or 5 the
    place of that in the list, 7 what its summary keeps (1 min, 2 max), 8 its goal (1 minimize, 2 maximize).
    """
    entries = told.get("m") if isinstance(told, Mapping) else None
    entries = [one for one in entries if isinstance(one, Mapping)] if isinstance(entries, list) else []
    laid, goals = dict[str, str](), dict[str, str]()
    for entry in entries:
        name, place = entry.get("1") or entry.get("2") or "", entry.get("5")
        axis = entry.get("4")
        if isinstance(place, int) and 0 < place <= len(entries):
            axis = entries[place - 1].get("1")
        if axis:
            laid[name] = axis
        kept = entry.get("7")
        kept = kept if isinstance(kept, list) else []
        if goal := _goal({"min": 1 in kept, "max": 2 in kept}, entry.get("8")):
            goals[name] = goal
    return laid, goals


def _online_rows(
    run: Any, known: Collection[str], columns: Collection[str]
) -> tuple[list[Any], tuple[str, ...]]:
    """All rows of a run, or of a long one the columns asked for, and what is wrong with them.

    By `scan_history`, which gives every row; `history` would be a sample of 500.
    """
    count = run.historyLineCount or 0
    last = max((run.history_keys or {}).get("lastStep", 0), count - 1)
    page = PAGE * -(-(last + 1) // max(count, 1))  # pages are cut by W&B's steps, which may have gaps
    if count <= PAGE:
        rows = list(run.scan_history(page_size=page, use_cache=False))
        lacking = count - len(rows)
        return rows, (f"{run.name}: W&B shows {len(rows)} of {count} rows",) if lacking > 0 else ()
    # Rows that have all keys asked for: each column for itself, put together by W&B's own step.
    names = {STEP, *columns} - {_CLOCK} | (set() if AXES["time"] in known else {"_timestamp"})
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for name in sorted(names & {*known}):
        for row in run.scan_history(keys=["_step", name], page_size=10 * page, use_cache=False):
            by_step[row["_step"]] |= row
    return [by_step[step] for step in sorted(by_step)], ()


def _as_wished(record: Record, words: Mapping[str, str]) -> Record:
    """The run in the words of its source, so that projects with different ones can be compared.

    Its group is the label, or its value of the experiment's key; its task is the config key `task`.
    """
    config = dict(record.config)
    if "task" in words:
        config["task"] = config.get(words["task"])
    if not {"by", "label"} & words.keys():
        return replace(record, config=config)
    experiment = config.get(words.get("by", ""), record.group)
    label = words.get("label", experiment if isinstance(experiment, str) else json.dumps(experiment))
    label = label.replace("\\n", " ")
    config |= {"group": label} if "group" in config else {}  # it would go before the run's
    return replace(record, group=label, config=config)
