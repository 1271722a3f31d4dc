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
import tempfile
from collections import defaultdict
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
from lab.errors import LabError, did_you_mean, first_line
from lab.escape import harmless, one_line
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
PARALLEL_BYTES = 32 * 2**20
"""From so much metrics on, all cores read."""
PAGE = 1000
"""Rows that W&B gives at once; a run that has no more is read whole, of a longer one what is asked for."""
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

    def __post_init__(self) -> None:
        """Whoever wrote the record may not speak to the terminal, a table or a plot of who reads it."""
        for key in ("id", "name", "group", "job_type", "state", "x_axis", "started"):
            object.__setattr__(self, key, one_line(getattr(self, key)))
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
        scale = self.series.get(AXES[axis])
        if scale is None and axis == "time":
            scale = self.series.get(_CLOCK)
            scale = scale and Series(scale.x, scale.y - scale.y[0])
        if scale is None or not scale.x.size:
            return Series(np.empty(0), np.empty(0))
        return Series(np.interp(of.x, scale.x, scale.y), of.y)


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
            f"{notes[0]}{more}. Name a run folder, a folder or glob of them, a W&B offline folder, or "
            "wandb:entity/project."
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
            if value is None and name == _CLOCK:
                value = row.get("_timestamp")
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
    return Record(**about, source=str(folder), series=series, metrics=metrics, notes=notes)


def _parents(value: Any) -> tuple[dict[str, str], ...]:
    """What a run names as its origins; other programs may mean something else by it."""
    return tuple(one for one in value if isinstance(one, dict)) if isinstance(value, list) else ()


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
    what = f"{len(damaged)} lines are damaged, the first is line {damaged[0]}" if damaged else ""
    return (
        series,
        _metric_names(names | set(series)),
        ((f"{path}: {what}; the others count",) if damaged else ()),
    )


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
    states = {None: "crashed", 0: "finished", INTERRUPTED: "interrupted"}
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
        config=_config(ours),
        x_axis=str(config.get("x_axis") or ""),
        parents=_parents(config.get("parents")),
        metrics=_metric_names(metrics),
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
    rows, notes = _online_rows(run, known, [*columns, *names])
    series = {names.get(name, name): s for name, s in columns_of(rows, [*columns, *names]).items()}
    record = _of_wandb(
        id=run.id,
        name=run.name or run.id,
        source=f"wandb:{'/'.join(run.path)}",
        group=run.group or "",
        job_type=run.job_type or "",
        state=summary.get(ENDED, run.state) if run.state == "failed" else _STATES.get(run.state, run.state),
        started=str(run.created_at or ""),
        config=config,
        series=series,
        metrics=known | {names[name] for name in names if name in known},
        notes=notes,
    )
    return _as_wished(record, query.words)


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
