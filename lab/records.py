"""What ran, wherever it was kept: run folders, W&B's offline files and W&B itself give the same `Record`s.

A source is a run folder, a folder or a glob of them, a W&B offline folder or `*.wandb` file, or
`wandb:entity/project?filters`. Metrics are read whole: nothing is sampled, nothing dropped in silence.
"""

import contextlib
import glob
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import orjson

from lab.errors import LabError, did_you_mean

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
_CLOCKS = ("_time", "_timestamp")  # ours and W&B's, in seconds
PARALLEL_BYTES = 32 * 2**20
"""From so much metrics on, all cores read."""
_FILTERS = ("tag", "user", "group", "state", "job_type", "name", "id")
_RLOPS = {"we": "entity", "wpn": "project", "ceik": "task", "cen": "by", "metric": "metric", "cl": "label"}


class Series(NamedTuple):
    """A metric over a run: its steps, rising, and its values, NaN and infinities included."""

    x: Array
    y: Array


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
    notes: tuple[str, ...] = ()
    """What is wrong with it, one line each."""

    @property
    def seed(self) -> Any:
        """Of the config; None if it has none."""
        return self.config.get("seed")

    def over(self, metric: str, axis: str) -> Series:
        """A metric over one of `AXES`; where its rows do not have it, interpolated between those that do."""
        of = self.series.get(metric, Series(np.empty(0), np.empty(0)))
        if axis == "step" or not of.x.size:
            return of
        scale = self.series.get(AXES[axis])
        if scale is None and axis == "time":
            scale = self.series.get("_time") or self.series.get("_timestamp")
            scale = scale and Series(scale.x, scale.y - scale.y[0])
        if scale is None or not scale.x.size:
            return Series(np.empty(0), np.empty(0))
        return Series(np.interp(of.x, scale.x, scale.y), of.y)


class Found(NamedTuple):
    """What a source holds, and what was wrong with it."""

    records: list[Record]
    notes: list[str]


class Query(NamedTuple):
    """`wandb:entity/project?filters`: where to look, and what openrlbenchmark's words ask for besides."""

    path: str
    filters: dict[str, Any]
    wishes: dict[str, str]
    """Of by, task, metric and label, those given."""


def load(sources: Sequence[str], wanted: Collection[str]) -> Found:
    """The records of all sources, each run once.

    Args:
        sources: see above.
        wanted: metrics to read; axes are read with them.

    Raises:
        LabError: a source is not there or holds no run.
    """
    columns = (*wanted, *AXES.values(), *_CLOCKS)
    records: dict[str, Record] = {}
    notes: list[str] = []
    for source in sources:
        found = (
            _online(parse_query(source), wanted) if source.startswith("wandb:") else _local(source, columns)
        )
        if not found.records:
            raise LabError(
                f"{source}: no run in it{f' ({found.notes[0]})' if found.notes else ''}. Name a run folder, "
                "a folder or glob of them, a W&B offline folder, or wandb:entity/project."
            )
        notes += found.notes
        for record in found.records:
            if record.id in records and records[record.id].source != record.source:
                notes.append(
                    f"{record.source}: the run {record.id} again, of {records[record.id].source}; left out"
                )
            else:
                records.setdefault(record.id, record)
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


# ---- rows ----


def columns_of(rows: Iterable[Mapping[str, Any]], wanted: Collection[str]) -> dict[str, Series]:
    """The metrics of `wanted` that the rows have; a row's step is its global_step, else W&B's own."""
    kept: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in wanted}
    pairs = list(kept.items())
    for row in rows:
        step = row.get(STEP)
        if step is None:
            step = row.get("_step")
        for name, (steps, values) in pairs:
            value = row.get(name)
            if value is not None and step is not None:
                steps.append(step)
                values.append(value)
    return {name: series for name, pair in pairs if (series := _series(*pair)).x.size}


def _series(steps: list[Any], values: list[Any]) -> Series:
    try:
        x, y = np.array(steps, np.float64), np.array(values, np.float64)
    except (TypeError, ValueError):  # "NaN", or a metric that is no number
        numbers = [(_number(step), _number(value)) for step, value in zip(steps, values, strict=True)]
        pairs = [(a, b) for a, b in numbers if a is not None and b is not None]
        x, y = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    return _without_overlap(x, y)


def _without_overlap(x: Array, y: Array) -> Series:
    """Leaves out what a later row says anew: a resumed run repeats the steps behind its checkpoint."""
    if x.size > 1 and not (np.diff(x) > 0).all():
        least_after = np.minimum.accumulate(x[::-1])[::-1]
        kept = np.append(x[:-1] < least_after[1:], True)
        x, y = x[kept], y[kept]
    return Series(x, y)


def _number(value: Any) -> float | None:
    """NaN and infinities are texts in JSON."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    return None


# ---- folders ----


def _local(source: str, wanted: Collection[str]) -> Found:
    # A folder may be called like a pattern.
    found = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))  # noqa: PTH207
    paths = [Path(path) for path in found]
    if not paths:
        place = Path(source).parent
        near = (
            did_you_mean(Path(source).name, [path.name for path in place.glob("*")]) if place.is_dir() else ""
        )
        raise LabError(f"{source}: not there.{near}")
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
    except LabError as error:
        return str(error)
    series, metrics, notes = _read_metrics(folder / "metrics.jsonl", wanted)
    state = str(info["state"])
    return Record(
        id=info["id"],
        name=info["name"],
        source=str(folder),
        group=info["group"],
        job_type=info["job_type"],
        state="crashed" if state == "running" and not _is_locked(folder / ".lock") else state,
        x_axis=info["x_axis"],
        started=(info["sessions"] or [{}])[0].get("started", ""),
        config=flatten(info["config"]),
        parents=tuple(info["parents"]),
        series=series,
        metrics=metrics,
        notes=notes,
    )


def _read_metrics(
    path: Path, wanted: Collection[str]
) -> tuple[dict[str, Series], frozenset[str], tuple[str, ...]]:
    """The metrics of a metrics.jsonl: those wanted, the names of all, and what was wrong."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return {}, frozenset(), (f"{path}: cannot be read: {error.strerror}",)
    names: set[str] = set()
    damaged: list[int] = []

    def rows() -> Iterator[Mapping[str, Any]]:
        last = len(lines) - 1
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                if number < last:  # the last is half-written while a run goes on, or was killed
                    damaged.append(number + 1)
                continue
            if number < 100 or number > last - 100:
                names.update(row)
            yield row

    series = columns_of(rows(), wanted)
    names = {name for name in names | set(series) if not name.startswith("_") and name != STEP}
    what = f"{len(damaged)} lines are damaged, the first is line {damaged[0]}" if damaged else ""
    return series, frozenset(names), ((f"{path}: {what}; the others count",) if damaged else ())


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run."""
    try:
        import fcntl

        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


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


def _read_fragment(file: Path) -> _Fragment | str:
    """A W&B file, by the reader that W&B supports; or why it cannot be read."""
    command = [_wandb_command(), "leet", "inspect", "--json", str(file)]
    environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    info: dict[str, Any] = {}
    config: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
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
        elif kind == "exit":
            exit_code = body.get("exit_code", 0)
    if "run_id" not in info:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        return f"{file}: damaged: no run can be read from it{f' ({why[-1][:120]})' if why else ''}"
    cut = (f"{file}: cut off after {len(rows)} rows; those count",) if done.returncode else ()
    return _Fragment(file, info, config, rows, exit_code, cut)


def _join(parts: Sequence[_Fragment], wanted: Collection[str]) -> Record:
    first, last = parts[0], parts[-1]
    rows = [row for part in parts for row in part.rows]
    states = {None: "crashed", 0: "finished"}
    names = frozenset(key for row in (*rows[:100], *rows[-100:]) for key in row)
    return _of_wandb(
        id=first.info["run_id"],
        name=last.info.get("display_name") or first.info["run_id"],
        source=str(first.file),
        group=last.info.get("run_group", ""),
        job_type=last.info.get("job_type", ""),
        state=states.get(last.exit_code, "failed"),
        started=first.info.get("start_time", ""),
        config=last.config,
        series=columns_of(rows, wanted),
        metrics=names,
        notes=tuple(note for part in parts for note in part.notes),
    )


def _wandb_command() -> str:
    beside = Path(sys.executable).with_name("wandb")
    found = str(beside) if beside.exists() else shutil.which("wandb")
    if not found:
        raise LabError("wandb: not installed, and W&B's files need it. Install it: pip install wandb")
    return found


def _of_wandb(*, config: Mapping[str, Any], metrics: Iterable[str], **fields: Any) -> Record:
    """A record whose config is what the tracker told W&B: ours, with what else it knows of the run."""
    ours = {
        key: value for key, value in config.items() if key not in ("_wandb", "x_axis", "parents", "compute")
    }
    return Record(
        config=flatten(ours),
        x_axis=config.get("x_axis") or "",
        parents=tuple(config.get("parents") or ()),
        metrics=frozenset(name for name in metrics if not name.startswith("_") and name != STEP),
        **fields,
    )


# ---- W&B itself ----


def parse_query(source: str) -> Query:
    """Reads `wandb:entity/project?tag=v1&user=ann&config.agent.algorithm=dqn`, and openrlbenchmark's words.

    Those are we and wpn (entity and project), ceik (config key of the task), cen (config key to group by),
    metric, tag, user and cl (the group's label).

    Raises:
        LabError: no project, or a word that is none of these.
    """
    place, _, query = source.removeprefix("wandb:").partition("?")
    place, rest = place.strip("/"), dict[str, str]()
    conditions: list[dict[str, Any]] = []
    for word, value in parse_qsl(query, keep_blank_values=True):
        if word in _RLOPS:
            rest[_RLOPS[word]] = value
        elif word == "tag":
            conditions.append({"tags": {"$in": value.split(",")}})
        elif word == "user":
            conditions.append({"username": value})
        elif word in _FILTERS:
            key = {"job_type": "jobType", "name": "display_name", "id": "name"}.get(word, word)
            conditions.append({key: value})
        elif word.startswith("config."):
            conditions.append({f"config.{word.removeprefix('config.')}.value": _literal(value)})
        else:
            known = [*_FILTERS, *_RLOPS, "config.KEY"]
            raise LabError(
                f"{source}: unknown filter {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}."
            )
    if "project" in rest:
        place = "/".join(part for part in (rest.get("entity", ""), rest["project"]) if part)
    if not place:
        raise LabError(f"{source}: names no project. Write wandb:entity/project.")
    wishes = {key: value for key, value in rest.items() if key not in ("entity", "project")}
    return Query(place, {"$and": conditions} if conditions else {}, wishes)


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def _online(query: Query, wanted: Collection[str]) -> Found:
    """The runs of a project; every metric whole, by `scan_history`: `history` is a sample of 500 rows."""
    from lab.tracking import choose_mode

    choose_mode("online")  # a clear line without key or server, within seconds
    import wandb

    records: list[Record] = []
    notes: list[str] = []
    try:
        api = wandb.Api(timeout=30)
        for run in api.runs(query.path, filters=query.filters, order="+created_at"):
            records.append(_online_run(run, wanted))  # noqa: PERF401 (those before an error stay)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not records:
            raise LabError(
                f"wandb:{query.path}: {line} Is the project right, and the key allowed to read it?"
            ) from error
        notes.append(f"wandb:{query.path}: read only {len(records)} runs: {line}")
    return Found(records, notes)


def _online_run(run: Any, wanted: Collection[str]) -> Record:
    config, summary = dict(run.config), dict(run.summary)
    series: dict[str, Series] = {}
    for name in (*wanted, *AXES.values()):
        if name in summary and name != STEP:
            # The rows that have all keys; W&B's own clock is in each of them.
            rows = list(run.scan_history(keys=[STEP, name, "_timestamp"]))
            rows = rows or list(run.scan_history(keys=["_step", name, "_timestamp"]))
            series |= columns_of(rows, [name])
            if name in wanted and "_timestamp" not in series:
                series |= columns_of(rows, ["_timestamp"])
    return _of_wandb(
        id=run.id,
        name=run.name or run.id,
        source=f"wandb:{'/'.join(run.path)}",
        group=run.group or "",
        job_type=run.job_type or "",
        state={"killed": "interrupted"}.get(run.state, run.state),
        started=str(run.created_at or ""),
        config=config,
        series=series,
        metrics=summary,
    )
