"""Which runs are one group, and which of them are one run: by their configs, without the words of a metric.

Runs whose configs differ in nothing but the seed are a group. What names, places or times a run, or shows the
state of its program (addresses and dumps in the config of stock SB3, folders in that of Hugging Face's
Trainer), is not a setting: see `is_bookkeeping` and `settings`.
"""

import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lab.errors import LabError, did_you_mean
from lab.records import Record, Series

SEEDS = ("seed", "random_seed", "rng_seed", "args.seed", "train.seed", "training.seed", "trainer.seed")
"""Config keys of a run's seed, the first of which counts that it has."""
SEED_WORDS = frozenset(
    ("seed", "random_seed", "rng_seed", "manual_seed", "global_seed", "torch_seed", "random_state")
)
"""The last part of a key that is the seed where a run has none of `SEEDS`: see `with_seeds`."""
TASKS = (
    *("env.game", "env_id", "env.id", "task", "dataset", "data.name", "env_name", "env.name", "env.env_id"),
    *("env.env_name", "gym_id", "environment", "environment.name", "game", "env", "task_name", "task.name"),
)
"""Config keys that name the task, the first of which counts that differs between runs."""
OUTPUTS = frozenset(
    {
        *(
            "out",
            "output",
            "outputs",
            "save",
            "saved",
            "log",
            "logs",
            "logging",
            "logdir",
            "result",
            "results",
        ),
        *(
            "tmp",
            "temp",
            "cache",
            "video",
            "videos",
            "monitor",
            "tensorboard",
            "tb",
            "work",
            "workdir",
            "root",
        ),
        *(
            "run",
            "runs",
            "exp",
            "experiment",
            "record",
            "export",
            "best",
            "figure",
            "figures",
            "plots",
            "dump",
        ),
    }
)
"""Words in the key of a path that a run writes to."""
FIELDS = ("group", "name", "job_type", "state", "id")
"""What runs can be grouped by besides the keys of their config."""
SECTIONS = ("tracking", "device", "wandb", "film")
"""Sections of a config that change no result."""
NAMES = frozenset(
    ("name", "group", "tags", "notes", "host", "hostname", "pid", "cwd", "started", "date", "wandb", "track")
)
"""Config keys that name or place a run. Deeper in a config the same words are settings (`labeler.name`)."""
BOOKKEEPING = frozenset(
    {
        *("run_name", "run_id", "run_uuid", "start_time", "created_at", "timestamp", "launch_time"),
        *("output_dir", "logging_dir", "log_dir", "logdir", "save_dir", "save_path", "work_dir", "workdir"),
        *("out_dir", "checkpoint_dir", "ckpt_dir", "results_dir", "tensorboard_log", "tb_log_name"),
        *("use_wandb", "report_to", "wandb_project", "wandb_project_name", "wandb_entity", "wandb_dir"),
        *("wandb_group", "wandb_name", "wandb_run_name", "wandb_run_id", "wandb_mode", "wandb_tags"),
        *("hub_model_id", "hub_token", "push_to_hub", "local_rank", "verbose", "capture_video", "git_commit"),
    }
)
"""Likewise, as the last part of a dotted key."""
INPUTS = frozenset(
    {
        *("source", "data", "dataset", "data_path", "data_dir", "dataset_path", "dataset_name", "train_file"),
        *("start_from", "path", "model_name_or_path", "base_model", "pretrained", "init_from"),
    }
)
"""Likewise, keys of what a run learned from or began with: of one seed and other files, runs are no reruns;
the same file elsewhere is no other setting."""
LABEL_LENGTH = 60
"""Characters of a label or a cell at most."""
ABSENT = "-"
"""What stands for a key that a run does not have."""

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}\b")
_PATH = re.compile(r"^(~|\.{0,2})/|^[A-Za-z]:\\|/.*/")
_DUMP_LENGTH = 80


@dataclass(frozen=True)
class Grouped:
    """Runs by the label of their group, in the order in which they were found."""

    groups: dict[str, list[Record]]
    keys: tuple[str, ...] = ()
    """The config keys that make the groups."""
    unused: tuple[str, ...] = ()
    """Keys that differ from run to run, but are no settings by the look of their values."""


# ---- values ----


def canonical(value: Any) -> str:
    """A config's value as JSON, so that 1, "1", null, "null" and true are five values and 1 and 1.0 are one.

    Addresses of objects are left out, and floats have 12 digits: 0.00015000000000000001 is 0.00015.
    """
    if value is None or isinstance(value, str | int | float):
        return _of_scalar(type(value), value)
    return json.dumps(_plain(value), sort_keys=True, default=str)


@functools.lru_cache(maxsize=2**14)
def _of_scalar(_: type, value: Any) -> str:
    """By type, since 1, 1.0 and true are equal and have one hash."""
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _ADDRESS.sub("0x..", value)
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.12g}")
        return int(short) if short.is_integer() and abs(short) < 2**53 else short
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def shown(value: str | None, length: int = LABEL_LENGTH) -> str:
    """A canonical value for people: texts without quotes, unless they would read as something else."""
    if value is None:
        return ABSENT
    text = value
    if value.startswith('"'):
        inside = json.loads(value)
        text = inside if _is_word(inside) else value
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _is_word(text: str) -> bool:
    """Whether a text says by itself that it is one, as an algorithm's name does and "3" does not."""
    if not text or text == ABSENT or text != text.strip():
        return False
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


# ---- keys ----


def is_bookkeeping(key: str) -> bool:
    """Whether a config key names, places or times a run, or says which of several like it this is."""
    section, dot, _ = key.partition(".")
    last = key.rpartition(".")[2]
    return key in SEEDS or key in NAMES or (bool(dot) and section in SECTIONS) or last in BOOKKEEPING


def seed_of(record: Record) -> str:
    """A run's seed as canonical JSON; empty if its config has none."""
    for key in SEEDS:
        if record.config.get(key) is not None:
            return canonical(record.config[key])
    return ""


def with_seeds(records: Sequence[Record], kept: Iterable[str] = ()) -> tuple[list[Record], list[str]]:
    """The runs, each with the key `seed`, and the keys that were taken for it.

    Where a config has none of `SEEDS`, the seed is what is called so deeper in it, if it differs between
    runs: one that is the same everywhere (of how the data were split) makes no run another's rerun.

    Args:
        kept: keys that stay as they are.
    """
    lacking = [record for record in records if not seed_of(record)]
    values: dict[str, set[str]] = defaultdict(set)
    for record in lacking:
        for key, value in record.config.items():
            if key.rpartition(".")[2] in SEED_WORDS and value is not None:
                values[key].add(canonical(value))
    keys = sorted(key for key, found in values.items() if len(found) > 1 and key not in kept)
    return [record if seed_of(record) else _seeded(record, keys) for record in records], keys


def _seeded(record: Record, keys: Sequence[str]) -> Record:
    own = {key: record.config[key] for key in keys if record.config.get(key) is not None}
    if not own:
        return record
    different = list({canonical(value): value for value in own.values()}.values())
    config = {key: value for key, value in record.config.items() if key not in own}
    return replace(record, config=config | {"seed": different[0] if len(different) == 1 else different})


def value_of(record: Record, key: str) -> str | None:
    """A config's value as canonical JSON, or a field of the run; None if there is none."""
    if key in FIELDS and key not in record.config:
        return canonical(getattr(record, key))
    return canonical(record.config[key]) if key in record.config else None


def settings(records: Sequence[Record], aside: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The config keys that may make groups, and those that differ as no setting does.

    The latter are, where no two runs share a value: paths but those of `INPUTS`, times, and dumps of objects;
    where a value belongs to a seed: dumps and keys called after the seed; and dumps that a program keeps for
    itself (`_last_obs`).
    Numbers and words are settings even if no two runs share one, since a random search draws such.
    So are paths that alone tell runs of one seed apart, unless they are called like a place to write to: the
    runs read different files.
    """
    keys = sorted({key for record in records for key in record.config} - set(aside))
    seeds = [seed_of(record) for record in records]
    usable, unused = [], []
    for key in keys:
        if is_bookkeeping(key):
            continue
        there = [index for index, record in enumerate(records) if key in record.config]
        values = [records[index].config[key] for index in there]
        marks = [canonical(value) for value in values]
        if len(set(marks)) > 1 and _no_setting(key, values, marks, [seeds[index] for index in there]):
            unused.append(key)
        else:
            usable.append(key)
    marks = [(*(canonical(r.config.get(key)) for key in (*usable, *aside)), seed_of(r)) for r in records]
    for key in [key for key in unused if _may_be_read(key, records)]:
        files: dict[Any, set[str]] = defaultdict(set)
        for record, mark in zip(records, marks, strict=True):
            if key in record.config and mark[-1]:
                files[mark].add(_file_name(record.config[key]))
        if any(len(names) > 1 for names in files.values()):
            unused.remove(key)
            usable.append(key)
    return sorted(usable), unused


def _may_be_read(key: str, records: Sequence[Record]) -> bool:
    """Whether a key names paths, and does not say that they are written to."""
    values = [record.config[key] for record in records if key in record.config]
    words = re.split(r"[^a-z0-9]+", key.rpartition(".")[2].lower())
    return not OUTPUTS & set(words) and all(isinstance(v, str) and _PATH.search(v) for v in values)


def _file_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _no_setting(key: str, values: Sequence[Any], marks: Sequence[str], seeds: Sequence[str]) -> bool:
    """Whether the differing values of a key are no settings."""
    alone = len(set(marks)) == len(marks)
    pairs = set(zip(seeds, marks, strict=True))
    by_seed = len(pairs) == len(set(seeds)) == len(set(marks)) < len(marks)
    texts = [value for value in values if isinstance(value, str)]
    last = key.rpartition(".")[2]
    if any(len(text) > _DUMP_LENGTH or text[:1] in ("[", "<") or "\n" in text for text in texts):
        return alone or by_seed or last.startswith("_")
    if by_seed and "seed" in last:
        return True
    if not alone:
        return False
    if texts:
        files = {_file_name(text) for text in texts}
        if last in INPUTS and len(files) > 1 and len(set(seeds)) < len(seeds):
            return False
        return all(_PATH.search(text) for text in texts)
    # Seconds or nanoseconds since 1970.
    return all(isinstance(v, int | float) and not isinstance(v, bool) and v > 1e9 for v in values)


def check_keys(records: Sequence[Record], keys: Sequence[str], option: str) -> None:
    """Refuses keys that no run has.

    Raises:
        LabError: names the option and the nearest key.
    """
    known = sorted({key for record in records for key in record.config} | set(FIELDS))
    for key in keys:
        if key not in known:
            raise LabError(f"{option} {key}: no run has such a key in its config.{did_you_mean(key, known)}")


def task_key(records: Sequence[Record], by: Sequence[str]) -> str:
    """The config key that names the runs' tasks; empty if they have but one."""
    for key in TASKS:
        names = {r.config[key] for r in records if isinstance(r.config.get(key), str)}
        if key not in by and len({canonical(name) for name in names}) > 1:
            return key
    return ""


def task_of(record: Record, key: str) -> str:
    """The name of a run's task by that key; empty without one."""
    return shown(value_of(record, key)) if key else ""


# ---- groups ----


def grouped(records: Sequence[Record], by: Sequence[str], task: str) -> Grouped:
    """The runs by the label of their group.

    Args:
        by: config keys or `FIELDS`; none: all settings but the task's key.
        task: that key; empty: there is one task.
    """
    unused: list[str] = []
    keys = list(by)
    if not by:
        keys, unused = settings(records, [task] if task else [])
    marks = [tuple(value_of(record, key) for key in keys) for record in records]
    different = dict.fromkeys(marks)
    differing = [index for index in range(len(keys)) if len({mark[index] for mark in different}) > 1]
    all_keys = sorted({key for record in records for key in record.config} | set(by))
    labels = dict.fromkeys(different, "")
    named = list(range(len(keys))) if by else differing
    alone = len(keys) == 1 and bool(by) and all(_says_itself(mark[0]) for mark in different)
    for mark in different:
        if alone:
            labels[mark] = shown(mark[0])
        elif named:
            parts = [f"{_short(keys[i], all_keys)}={shown(mark[i])}" for i in named]
            labels[mark] = ", ".join(parts)
        else:
            labels[mark] = records[0].group or records[0].name
    if max(map(len, labels.values()), default=0) > LABEL_LENGTH:
        few = _enough(list(different), named)
        for mark in different:
            label = ", ".join(f"{_short(keys[i], all_keys)}={shown(mark[i])}" for i in few)
            labels[mark] = label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 3]}..."
    _tell_apart(labels)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record, mark in zip(records, marks, strict=True):
        groups[labels[mark]].append(record)
    return Grouped(dict(groups), tuple(keys[i] for i in differing), tuple(unused))


def _says_itself(value: str | None) -> bool:
    """Whether a canonical value is a word, which needs no key before it."""
    return bool(value) and value[0] == '"' and _is_word(json.loads(value))


def _enough(marks: Sequence[Sequence[str | None]], named: Sequence[int]) -> list[int]:
    """The fewest keys that still tell the groups apart: each time the one that tells most apart."""
    chosen: list[int] = []

    def told(keys: Sequence[int]) -> int:
        return len({tuple(mark[i] for i in keys) for mark in marks})

    while told(chosen) < told(named):
        chosen.append(max((i for i in named if i not in chosen), key=lambda i: told([*chosen, i])))
    return sorted(chosen)


def _tell_apart(labels: dict[Any, str]) -> None:
    """Numbers labels that came out alike, so that no two groups become one."""
    twice = {label for label, count in Counter(labels.values()).items() if count > 1}
    count: Counter[str] = Counter()
    for mark, label in labels.items():
        if label in twice:
            count[label] += 1
            labels[mark] = f"{label} #{count[label]}"


def _short(key: str, keys: Sequence[str]) -> str:
    """The end of a dotted key that is still its alone."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in keys) == 1:
            return end
    return key


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels as people sort them, numbers by their size."""
    return sorted(labels, key=_natural)


def _natural(label: str) -> list[tuple[int, float, str]]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", label)
    return [(0, float(part), "") if index % 2 else (1, 0.0, part.lower()) for index, part in enumerate(parts)]


def selected(records: Sequence[Record], where: Sequence[str]) -> list[Record]:
    """The runs whose config says what is asked for.

    Args:
        where: KEY=VALUE, all of which must hold; VALUE,VALUE takes either.

    Raises:
        LabError: one is misspelt, or no run is left.
    """
    left = list(records)
    for condition in where:
        key, equals, text = condition.partition("=")
        if not equals:
            raise LabError(f"--where {condition}: write KEY=VALUE, for example --where env.game=pong.")
        check_keys(records, [key], "--where")
        wanted = {value for one in [text, *text.split(",")] for value in (one, *_readings(one))}
        kept = [record for record in left if {value_of(record, key), shown(value_of(record, key))} & wanted]
        if not kept:
            there = in_order({shown(value_of(record, key)) for record in left})
            some = ", ".join(there[:8]) + (" ..." if len(there) > 8 else "")
            raise LabError(
                f"--where {condition}: no run has it.{did_you_mean(text, there)} There are: {some}."
            )
        left = kept
    return left


def _readings(text: str) -> list[str]:
    """What a value on the command line may mean: JSON or a text."""
    found = [canonical(text)]
    try:
        found.append(canonical(json.loads(text)))
    except ValueError:
        found += [json.dumps({"True": True, "False": False, "None": None}[text])] if text in _WORDS else []
    return found


_WORDS = ("True", "False", "None")


# ---- runs that are one ----


@dataclass
class Merged:
    """What became of runs that are there more than once."""

    records: list[Record]
    again: list[Record] = field(default_factory=list)
    """Reruns of a seed that counts already."""
    continued: list[Record] = field(default_factory=list)
    """Runs that go on where another one stopped; joined with it."""


def without_repeats(records: Sequence[Record], metric: str) -> Merged:
    """Counts runs of the same settings and seed once: they are reproducible, so they are one run.

    Of a seed run twice the one that came furthest counts, of two alike the first. One that begins its
    `metric` later than another goes on with it (a run continued in another folder), and both are joined.
    """
    usable, _ = settings(records)
    alike: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        seed = seed_of(record)
        mark = (seed, record.job_type, *(value_of(record, key) for key in usable)) if seed else record.id
        alike[mark].append(record)
    merged = Merged([])
    for same in alike.values():
        if len(same) == 1:
            merged.records.append(same[0])
            continue
        first, *others = sorted(same, key=lambda r: (_begin(r, metric), -_end(r, metric), r.started))
        joined = first
        for record in others:
            if _begin(record, metric) > _begin(first, metric) and _end(record, metric) > _end(joined, metric):
                joined = _join(joined, record)
                merged.continued.append(record)
            else:
                merged.again.append(record)
        merged.records.append(joined)
    place = {record.id: index for index, record in enumerate(records)}
    merged.records.sort(key=lambda record: place[record.id])
    return merged


def _begin(record: Record, metric: str) -> float:
    series = record.series.get(metric)
    return float(series.x[0]) if series is not None else math.inf


def _end(record: Record, metric: str) -> float:
    series = record.series.get(metric)
    return float(series.x[-1]) if series is not None else -math.inf


def _join(first: Record, later: Record) -> Record:
    """One run of two: up to where the later one begins the first's values, from there on the later one's."""
    series = dict(first.series)
    for name, more in later.series.items():
        if name in series:
            before = series[name].x < more.x[0]
            series[name] = Series(
                np.concatenate([series[name].x[before], more.x]),
                np.concatenate([series[name].y[before], more.y]),
            )
        else:
            series[name] = more
    return replace(first, series=series, state=later.state, error=later.error)
