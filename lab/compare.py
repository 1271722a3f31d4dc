"""Which is better, by how much, how sure, and what was different: runs in groups, one metric at a time.

From `lab.records` (the same records wherever runs were kept) and `lab.statistics` to a `Comparison`, which
`lab.report` shows. Nothing is dropped in silence: what does not count is in `notes`.
"""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lab import statistics
from lab.errors import LabError, did_you_mean
from lab.records import AXES, Record, Series
from lab.statistics import Array, Band, Interval

IGNORED = ("seed", "name", "tracking.", "device.", "wandb", "group")
"""Config keys that do not make another group: the seed, and what changes no result."""
TASKS = ("env.game", "env_id", "env.id", "task", "dataset", "data.name")
"""Config keys that name the task, the first of which counts that differs between runs."""
FIELDS = ("group", "name", "job_type", "state", "id")
"""What runs can be grouped by besides the keys of their config."""
FALLING = ("loss", "error", "kl", "perplexity", "bits", "fid", "distance")
"""Words in a metric's name that say that less is better."""
GOALS = ("maximize", "minimize")
SCORES = ("final", "last", "best", "auc")
FINAL_SHARE = 0.1
POINTS = 200


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the runs."""

    metric: str
    by: tuple[str, ...] = ()
    """Config keys (or `FIELDS`) that make the groups; none: all of the config but the seed."""
    baseline: str = ""
    """The group the others are compared with; empty: the one that came out last."""
    score: str = "final"
    """What a run's curve comes down to: final, the mean over the last tenth of its x; last, best, or auc."""
    goal: str = ""
    """maximize or minimize; empty: by the metric's name."""
    axis: str = "step"
    """One of `AXES`."""
    threshold: float | None = None
    """How long it took to come so far is shown, too."""
    task: str = ""
    """Config key of the task; empty: found by itself."""
    gamma: float = 1.0
    """The score from which on the optimality gap is 0."""
    confidence: float = 0.95
    reps: int = 2000
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("goal", GOALS), ("axis", tuple(AXES))):
            value = getattr(self, name)
            if value and value not in known:
                raise LabError(
                    f"--{name} {value}: is none of {', '.join(known)}.{did_you_mean(value, known)}"
                )
        if not 0 < self.confidence < 1:
            raise LabError(f"--confidence {self.confidence:g}: must lie between 0 and 1, e.g. 0.95.")

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        if self.goal:
            return self.goal == "minimize"
        words = self.metric.lower().replace("/", "_").split("_")
        return any(word in FALLING for word in words)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but the seed, or in nothing that was asked about."""

    label: str
    records: tuple[Record, ...]
    scores: dict[str, Array]
    """By task: a score per run, NaN and infinities included."""
    seeds: int
    """Different ones."""
    unfinished: dict[str, int]
    """Runs that did not finish, by state."""
    without: int
    """Runs that have not one value of the metric."""
    mean: float
    std: float
    """Over all runs, n - 1; NaN for one run."""
    median: float
    estimates: Mapping[statistics.Aggregate, Interval]
    """iqm, mean, median and optimality_gap over tasks, with bootstrap intervals."""
    better_than_baseline: Interval | None
    """Probability that a run of it is better than one of the baseline; None of the baseline itself."""
    auc: float
    threshold_steps: statistics.ThresholdSteps | None
    threshold_seconds: statistics.ThresholdSteps | None
    win_rate: Interval | None
    """Of win rates: Wilson's interval over all comparisons of all its runs."""
    curve_x: Array
    curve: Band | None
    """Mean over the runs, and over tasks; None if there is no curve."""
    profile: Band | None
    """Share of runs above each of the comparison's `thresholds`."""
    note: str | None

    @property
    def n(self) -> int:
        """Runs that have a score."""
        return sum(int(np.isfinite(task).sum()) for task in self.scores.values())


@dataclass(frozen=True, kw_only=True)
class Link:
    """That one run started from what another left."""

    parent: str
    child: str
    stage: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer."""

    question: Question
    groups: tuple[Group, ...]
    """The best first."""
    baseline: str
    task_key: str
    tasks: tuple[str, ...]
    x_label: str
    differences: dict[str, dict[str, str]]
    """Config keys that differ: the values of each group, by its label."""
    links: tuple[Link, ...]
    names: dict[str, str]
    """Names of all linked runs by their ids."""
    thresholds: Array
    """Of the performance profiles."""
    notes: tuple[str, ...] = field(default=())


def wanted_metrics(questions: Iterable[Question]) -> list[str]:
    """The metrics that records must be read with."""
    return [name for q in questions for name in (q.metric, f"{q.metric}_n")]


def compare(records: Sequence[Record], question: Question, notes: Sequence[str] = ()) -> Comparison:
    """Compares runs.

    Args:
        records: read with `wanted_metrics`.
        notes: what is known to be wrong already.

    Raises:
        LabError: no run has the metric, or a key, a baseline or an axis does not exist.
    """
    said = [*notes, *(note for record in records for note in record.notes)]
    taking_part = _with_metric(records, question, said)
    tasks_by = question.task or _task_key(taking_part, question.by)
    _check_keys(taking_part, [*question.by, *([question.task] if question.task else [])])
    members = _grouped(taking_part, question.by)
    tasks = _common_tasks(members, tasks_by, said)
    members = {
        label: [r for r in group if not tasks or _task(r, tasks_by) in tasks]
        for label, group in members.items()
    }
    scores = {label: _scores(group, question, tasks_by) for label, group in members.items()}
    for label, by_task in scores.items():
        bad = sum(int((~np.isfinite(task)).sum()) for task in by_task.values())
        missing = sum(int(question.metric not in r.series) for r in members[label])
        if bad - missing:
            said.append(
                f"{label}: {bad - missing} of {len(members[label])} scores are NaN or infinite; not counted"
            )
    order = sorted(members, key=lambda label: _rank(scores[label], question.lower_is_better))
    baseline = _baseline(question.baseline, order)
    x_label = _x_label(taking_part, question)
    axis_mixed = _mixed_axes(taking_part, question)
    if axis_mixed:
        said.append(axis_mixed)
    everything = np.concatenate([task for by_task in scores.values() for task in by_task.values()])
    finite = everything[np.isfinite(everything)]
    thresholds = np.linspace(finite.min(), finite.max(), 101) if finite.size else np.empty(0)
    groups = tuple(
        _group(
            label,
            members[label],
            scores,
            baseline,
            question,
            tasks_by,
            thresholds,
            curves=not axis_mixed,
            said=said,
        )
        for label in order
    )
    links, names = _lineage(records)
    return Comparison(
        question=question,
        groups=groups,
        baseline=baseline,
        task_key=tasks_by,
        tasks=tuple(sorted({task for by_task in scores.values() for task in by_task})),
        x_label=x_label,
        differences=_differences(members),
        links=links,
        names=names,
        thresholds=thresholds,
        notes=tuple(dict.fromkeys(said)),
    )


# ---- who takes part ----


def _with_metric(records: Sequence[Record], question: Question, said: list[str]) -> list[Record]:
    """Runs of the kinds that log the metric: a recipe's other stages are not missing it."""
    kinds = {record.job_type for record in records if question.metric in record.series}
    if not kinds:
        known = sorted({name for record in records for name in record.metrics})
        some = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
        raise LabError(
            f"--metric {question.metric}: none of the {len(records)} runs has it."
            f"{did_you_mean(question.metric, known)} They have {some or 'none'}."
        )
    others = Counter(record.job_type or "other" for record in records if record.job_type not in kinds)
    if others:
        kind = ", ".join(f"{count} {name}" for name, count in others.items())
        said.append(f"left out, since no run of their kind has {question.metric}: {kind}")
    return [record for record in records if record.job_type in kinds]


def _value(record: Record, key: str) -> Any:
    return getattr(record, key) if key in FIELDS and key not in record.config else record.config.get(key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check_keys(records: Sequence[Record], keys: Sequence[str]) -> None:
    known = sorted({key for record in records for key in record.config} | set(FIELDS))
    for key in keys:
        if key not in known:
            raise LabError(f"--by {key}: no run has such a key in its config.{did_you_mean(key, known)}")


def _grouped(records: Sequence[Record], by: Sequence[str]) -> dict[str, list[Record]]:
    """The runs by the label of their group."""

    def keys_of(record: Record) -> Iterable[str]:
        return by or [key for key in record.config if not key.startswith(IGNORED)]

    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[json.dumps({key: _text(_value(record, key)) for key in sorted(keys_of(record))})].append(
            record
        )
    described = {mark: json.loads(mark) for mark in groups}
    all_keys = sorted({key for values in described.values() for key in values})
    differing = [key for key in all_keys if len({values.get(key, "-") for values in described.values()}) > 1]
    labels: dict[str, list[Record]] = {}
    for mark, group in groups.items():
        values = described[mark]
        if len(by) == 1 and _is_word(values[by[0]]):
            label = values[by[0]]
        elif by or differing:
            label = ", ".join(f"{_short(key, all_keys)}={values.get(key, '-')}" for key in (by or differing))
        else:
            label = group[0].group or group[0].name
        labels.setdefault(label, []).extend(group)
    return labels


def _is_word(value: str) -> bool:
    """Whether a value says by itself what it is of, as an algorithm's name does and a number does not."""
    try:
        json.loads(value)
    except ValueError:
        return True
    return False


def _short(key: str, keys: Sequence[str]) -> str:
    """The end of a dotted key that is still its alone."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in keys) == 1:
            return end
    return key


def _task_key(records: Sequence[Record], by: Sequence[str]) -> str:
    for key in TASKS:
        if key not in by and len({_text(r.config[key]) for r in records if key in r.config}) > 1:
            return key
    return ""


def _task(record: Record, key: str) -> str:
    return _text(record.config.get(key, "-")) if key else ""


def _common_tasks(members: Mapping[str, Sequence[Record]], key: str, said: list[str]) -> set[str]:
    """The tasks that all groups were run on; empty: there is but one, or none is common to all."""
    if not key:
        return set()
    of = {label: {_task(record, key) for record in group} for label, group in members.items()}
    common = set.intersection(*of.values())
    everything = set.union(*of.values())
    if common == everything:
        return common
    if not common:
        said.append(f"no {key} is common to all groups: their numbers are of different tasks")
        return set()
    out = ", ".join(sorted(everything - common))
    said.append(f"compared on the {len(common)} {key} that all groups have; left out: {out}")
    return common


# ---- scores ----


def score_of(series: Series, how: str, lower_is_better: bool = False) -> float:
    """What a curve comes down to; see `Question.score`. NaN if it is empty."""
    x, y = series
    if not x.size:
        return math.nan
    if how == "last":
        return float(y[-1])
    if how == "best":
        usable = y[np.isfinite(y)]
        return math.nan if not usable.size else float(usable.min() if lower_is_better else usable.max())
    if how == "auc":
        return statistics.area_under_curve(x, y) if x.size > 1 else math.nan
    return float(y[x >= x[-1] - FINAL_SHARE * (x[-1] - x[0])].mean())


def _scores(group: Sequence[Record], question: Question, task_key: str) -> dict[str, Array]:
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in group:
        series = record.over(question.metric, "step")
        by_task[_task(record, task_key)].append(score_of(series, question.score, question.lower_is_better))
    return {task: np.array(scores) for task, scores in sorted(by_task.items())}


def _finite(by_task: Mapping[str, Array]) -> list[Array]:
    """The finite scores of each task that has some."""
    tasks, _ = statistics.finite(list(by_task.values()))
    return [task for task in tasks if task.size]


def _rank(by_task: Mapping[str, Array], lower_is_better: bool) -> float:
    """For sorting: the best first, those without a score last."""
    tasks = _finite(by_task)
    if not tasks:
        return math.inf
    value = statistics.iqm(tasks)
    return value if lower_is_better else -value


def _baseline(wanted: str, labels: Sequence[str]) -> str:
    if not wanted:
        return labels[-1]
    fitting = [label for label in labels if label == wanted or label.endswith(f"={wanted}")] or [
        label for label in labels if wanted in label
    ]
    if len(fitting) != 1:
        what = "is no group" if not fitting else f"fits {len(fitting)} groups"
        raise LabError(
            f"--baseline {wanted}: {what}.{did_you_mean(wanted, labels)} There are: {'; '.join(labels)}."
        )
    return fitting[0]


def _mixed_axes(records: Sequence[Record], question: Question) -> str:
    kinds = {record.x_axis for record in records if question.metric in record.series} - {""}
    if question.axis != "step" or len(kinds) < 2:
        return ""
    return (
        f"no curves: the runs' steps count different things ({', '.join(sorted(kinds))}). "
        f"--axis time, or another of {', '.join(AXES)}, lays them over one another."
    )


def _x_label(records: Sequence[Record], question: Question) -> str:
    if question.axis == "step":
        kinds = {record.x_axis for record in records} - {""}
        return kinds.pop().replace("_", " ") if len(kinds) == 1 else "steps"
    return {"time": "seconds"}.get(question.axis, question.axis)


def _group(
    label: str,
    members: Sequence[Record],
    scores: Mapping[str, Mapping[str, Array]],
    baseline: str,
    question: Question,
    task_key: str,
    thresholds: Array,
    *,
    curves: bool,
    said: list[str],
) -> Group:
    q, tasks = question, _finite(scores[label])
    bootstrap: dict[str, Any] = {"reps": q.reps, "confidence": q.confidence, "seed": q.seed}
    together = np.concatenate(tasks) if tasks else np.empty(0)
    better = None
    if label != baseline and tasks:
        both = [t for t in scores[label] if t in scores[baseline]]
        pairs = [
            (own, other)
            for t in both
            for own, other in [(_only_finite(scores[label][t]), _only_finite(scores[baseline][t]))]
            if own.size and other.size
        ]
        if pairs:
            sign = -1 if q.lower_is_better else 1
            better = statistics.probability_of_improvement(
                [sign * own for own, _ in pairs], [sign * other for _, other in pairs], **bootstrap
            )
    steps = seconds = None
    if q.threshold is not None:
        steps, seconds = (_threshold(members, q, q.threshold, axis) for axis in (q.axis, "time"))
    curve_x, curve = _curve(members, q, task_key) if curves else (np.empty(0), None)
    areas = [score_of(record.over(q.metric, q.axis), "auc") for record in members]
    areas = [area for area in areas if math.isfinite(area)]
    note = statistics.few_seeds_note(min(task.size for task in tasks), len(tasks)) if tasks else None
    if note:
        said.append(f"{label}: {note}")
    return Group(
        label=label,
        records=tuple(members),
        scores=dict(scores[label]),
        seeds=len({_text(record.seed) for record in members}),
        unfinished=dict(Counter(record.state for record in members if record.state != "finished")),
        without=sum(q.metric not in record.series for record in members),
        mean=float(together.mean()) if together.size else math.nan,
        std=float(together.std(ddof=1)) if together.size > 1 else math.nan,
        median=float(np.median(together)) if together.size else math.nan,
        estimates=statistics.stratified_bootstrap(tasks, gamma=q.gamma, **bootstrap) if tasks else {},
        better_than_baseline=better,
        auc=float(np.mean(areas)) if areas else math.nan,
        threshold_steps=steps,
        threshold_seconds=seconds,
        win_rate=_win_rate(members, q),
        curve_x=curve_x,
        curve=curve,
        profile=statistics.performance_profile(tasks, thresholds, **bootstrap) if tasks else None,
        note=note,
    )


def _only_finite(scores: Array) -> Array:
    return scores[np.isfinite(scores)]


def _threshold(
    members: Sequence[Record], question: Question, threshold: float, axis: str
) -> statistics.ThresholdSteps | None:
    curves = [record.over(question.metric, axis) for record in members]
    curves = [curve for curve in curves if curve.x.size]
    if not curves:
        return None
    return statistics.median_steps_to_threshold(curves, threshold, lower_is_better=question.lower_is_better)


def _win_rate(members: Sequence[Record], question: Question) -> Interval | None:
    """Wilson's interval over all comparisons, of metrics that come with their number as METRIC_n."""
    pairs = [(r.series.get(question.metric), r.series.get(f"{question.metric}_n")) for r in members]
    counted = [(float(rate.y[-1]), float(n.y[-1])) for rate, n in pairs if rate is not None and n is not None]
    if not counted:
        return None
    total = sum(n for _, n in counted)
    return statistics.wilson_interval(sum(rate * n for rate, n in counted), int(total), question.confidence)


def _curve(members: Sequence[Record], question: Question, task_key: str) -> tuple[Array, Band | None]:
    """The group's mean curve on the x that all its runs have."""
    by_task: dict[str, list[Series]] = defaultdict(list)
    for record in members:
        series = record.over(question.metric, question.axis)
        if series.x.size > 1:
            by_task[_task(record, task_key)].append(series)
    curves = [curve for task in by_task.values() for curve in task]
    if not curves:
        return np.empty(0), None
    try:
        grid = statistics.common_grid(curves, POINTS)
    except ValueError:  # no x is common to all
        return np.empty(0), None
    band = statistics.curve_band(
        [statistics.align(task, grid) for task in by_task.values()],
        reps=question.reps,
        confidence=question.confidence,
        seed=question.seed,
    )
    return grid, band


# ---- what was different, and what came from what ----


def _differences(members: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, str]]:
    """The config keys that are not the same in all runs, but for the seed: each group's value or values."""
    everyone = list(itertools.chain(*members.values()))
    keys = sorted({key for record in everyone for key in record.config})
    table = {}
    for key in keys:
        if key in ("seed", "name") or len({_text(record.config.get(key)) for record in everyone}) < 2:
            continue
        table[key] = {
            label: " | ".join(sorted({_text(record.config.get(key, "-")) for record in group}))
            for label, group in members.items()
        }
    return table


def _lineage(records: Sequence[Record]) -> tuple[tuple[Link, ...], dict[str, str]]:
    names = {record.id: record.name for record in records}
    links = [
        Link(
            parent=parent["run_id"],
            child=record.id,
            stage=parent.get("stage", ""),
            sha256=parent.get("sha256", ""),
        )
        for record in records
        for parent in record.parents
        if "run_id" in parent
    ]
    linked = {end for link in links for end in (link.parent, link.child)}
    return tuple(links), {id_: names.get(id_, id_) for id_ in linked}
