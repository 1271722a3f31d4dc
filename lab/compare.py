"""Which is better, by how much, how sure, and what was different: runs in groups, one metric at a time.

From `lab.records` (the same records wherever runs were kept) to a `Comparison`, which `lab.report` shows:
`lab.grouping` says which runs are one group, `lab.scores` what a run's curve comes down to and up to where it
counts, `lab.verdict` whether the groups differ, `lab.statistics` how well each is known. Nothing is dropped
in silence: what does not count is in `notes`.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lab import grouping, statistics
from lab.errors import LabError, did_you_mean
from lab.grouping import LABEL_LENGTH, seed_of, task_of
from lab.records import AXES, EVALUATE, Record, Series
from lab.scores import (
    GOALS,
    SAME_BUDGET,
    SCORES,
    Budget,
    budget,
    direction,
    diverged,
    places,
    same_unit,
    score_of,
    upto,
    words_of,
)
from lab.statistics import Array, Band, Interval
from lab.verdict import PAIRINGS, Difference, Pairing, Sample, differences, mean_interval

POINTS = 200
NORMALIZATIONS = ("auto", "range", "none")
END = "end"
"""As `Question.until`: each run counts to its own end."""
NAMED = 3
"""Runs or groups that a note names; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the runs."""

    metric: str
    by: tuple[str, ...] = ()
    """Config keys (or `grouping.FIELDS`) that make the groups; none: all settings but the seed."""
    where: tuple[str, ...] = ()
    """KEY=VALUE that the config of a run must have to take part."""
    baseline: str = ""
    """The group the others are compared with; empty: the first by name."""
    score: str = "final"
    """What a run's curve comes down to: final, the mean over the last tenth of its x; last, best, or auc."""
    goal: str = ""
    """maximize or minimize; empty: as W&B was told (`define_metric`), else by the metric's name."""
    until: str = ""
    """The last step that counts: a number; end, each run's own; empty: the largest that all runs reached."""
    paired: Pairing = "auto"
    normalize: str = "auto"
    """Of several tasks' scores: range (by a task's lowest and highest run), none, auto (if units differ)."""
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
        choices = {
            "score": SCORES,
            "goal": GOALS,
            "axis": tuple(AXES),
            "paired": PAIRINGS,
            "normalize": NORMALIZATIONS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value and value not in known:
                raise LabError(
                    f"--{name} {value}: is none of {', '.join(known)}.{did_you_mean(value, known)}"
                )
        if not 0 < self.confidence < 1:
            raise LabError(f"--confidence {self.confidence:g}: must lie between 0 and 1, e.g. 0.95.")
        for name in ("threshold", "gamma"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise LabError(f"--{name} {value}: must be a finite number.")
        if self.until not in ("", END) and self.last_step is None:
            raise LabError(f"--until {self.until}: must be a step, or {END}.")

    @property
    def last_step(self) -> float | None:
        """`until` as a number; None if it is none."""
        try:
            step = float(self.until)
        except ValueError:
            return None
        return step if math.isfinite(step) else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but the seed, or in nothing that was asked about."""

    label: str
    records: tuple[Record, ...]
    scores: dict[str, Array]
    """By task: a score per run that has one, as compared: normalised where the question says so."""
    by_run: dict[str, float]
    """By the ids of the records: the score of each in the metric's own unit; NaN if it has none."""
    compared: dict[str, float]
    """By the ids of those that have one: what `scores` holds of each."""
    task_means: dict[str, float]
    """By task, in the metric's own unit."""
    seeds: int
    """Different ones; runs whose config names none count as different."""
    unfinished: dict[str, int]
    """Runs that did not finish, by state."""
    without: int
    """Runs that have no score."""
    diverged: int
    """Runs that ended in NaN or infinities; they count with the worst score of their task."""
    mean: float
    """Over tasks, of the means over runs: what the verdict is about."""
    interval: Interval
    """The mean with Student's interval."""
    std: float
    """Over runs, n - 1, averaged over tasks (by squares); NaN for one run."""
    median: float
    """Over runs, averaged over tasks."""
    estimates: Mapping[statistics.Aggregate, Interval]
    """iqm, mean, median and optimality_gap over tasks, with bootstrap intervals corrected for few runs.
    Where less is better there is no optimality gap: it is what scores fall short of a goal."""
    difference: Difference | None
    """Its mean less the baseline's; None of the baseline itself."""
    auc: float
    """Mean height of the runs' curves, averaged over tasks; NaN if one of them holds NaN or infinities."""
    threshold_steps: statistics.ThresholdSteps | None
    threshold_seconds: statistics.ThresholdSteps | None
    win_rate: Interval | None
    """Of a single run that gives its win rate with an interval over its prompts: that."""
    curve_x: Array
    curve: Band | None
    """Mean over the runs, and over tasks, in the unit of the scores; None if there is no curve."""
    run_curves: dict[str, Series]
    """By the ids of the records: each run's curve, in the same unit."""
    profile: Band | None
    """Share of runs above each of the comparison's `thresholds`."""
    note: str | None

    @property
    def n(self) -> int:
        """Runs that have a score."""
        return sum(task.size for task in self.scores.values())


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
    lower_is_better: bool
    why_direction: str
    """Where the direction is from: asked for, told to W&B, or by its name."""
    groups: tuple[Group, ...]
    """The best first."""
    baseline: str
    why_baseline: str
    task_key: str
    tasks: tuple[str, ...]
    normalized: bool
    """Whether scores are shares of each task's range."""
    until: dict[str, float]
    """By task, the last step that counts; infinity: all."""
    comparable: str
    """Why nothing can be said of which is better, whatever the numbers; empty if it can."""
    x_label: str
    differences: dict[str, dict[str, str]]
    """Config keys that differ: the values of each group, by its label."""
    links: tuple[Link, ...]
    names: dict[str, str]
    """Names of all linked runs by their ids."""
    thresholds: Array
    """Of the performance profiles."""
    notes: tuple[str, ...] = field(default=())


class _Notes:
    """What is to be said, the same of several told once."""

    def __init__(self, notes: Iterable[str]) -> None:
        self._by_text: dict[str, list[str]] = {}
        for note in notes:
            self(note)

    def __call__(self, text: str, who: str = "") -> None:
        whom = self._by_text.setdefault(text, [])
        if who and who not in whom:
            whom.append(who)

    def __iter__(self) -> Any:
        for text, whom in self._by_text.items():
            yield f"{named(whom)}: {text}" if whom else text


def named(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def wanted_metrics(questions: Iterable[Question]) -> list[str]:
    """The metrics that records must be read with."""
    return [f"{q.metric}{end}" for q in questions for end in ("", "_n", "_low", "_high")]


def compare(records: Sequence[Record], question: Question, notes: Sequence[str] = ()) -> Comparison:
    """Compares runs.

    Args:
        records: read with `wanted_metrics`.
        notes: what is known to be wrong already.

    Raises:
        LabError: no run has the metric, it is not known which way it is better, or a key, a baseline or an
            axis does not exist.
    """
    q = question
    say = _Notes(notes)
    for record in records:
        for note in record.notes:
            who, _, text = note.partition(": ")
            say(text, who) if text else say(note)
    taking_part = _with_metric(grouping.selected(records, q.where), q, say)
    less, why_direction = _lower_is_better(taking_part, q)
    grouping.check_keys(taking_part, q.by, "--by")
    grouping.check_keys(taking_part, [q.task] if q.task else [], "--task")
    taking_part, seed_keys = grouping.with_seeds(taking_part, {*q.by, q.task})
    if seed_keys:
        say(f"taken for the seed: {named(seed_keys)}")
    once = grouping.without_repeats(taking_part, q.metric)
    _say_repeats(once, say)
    tasks_by = q.task or grouping.task_key(once.records, q.by)
    grouped = grouping.grouped(once.records, q.by, tasks_by)
    if grouped.unused:
        say(f"not made into groups, as they name or place a run: {named(grouped.unused)}")
    members, comparable = _common_tasks(grouped.groups, tasks_by, say)
    for key in grouped.keys:
        if key in grouping.TASKS and key != tasks_by and not same_unit(q.metric):
            say(f"the groups differ in {key}: {q.metric} may have another unit, or be harder, for each")
    scores = _Scores(members, q, tasks_by, less, say, comparable=not comparable)
    order = sorted(grouping.in_order(members), key=lambda label: _rank(scores.of[label], less))
    baseline, why_baseline = _baseline(q.baseline, members, scores)
    found = (
        {}
        if comparable
        else differences(scores.samples(), baseline, confidence=q.confidence, pairing=q.paired)
    )
    _say_seeds(members, scores, say)
    _say_conditions(once.records, q, say)
    _say_percent(scores, q, say)
    if any(difference.method == "seeds" for difference in found.values()):
        say(_what_pairs_share(once.records))
    axis_mixed = _mixed_axes(taking_part, q)
    if axis_mixed:
        say(axis_mixed)
    _say_axis(taking_part, q, say)
    finite = np.concatenate([np.empty(0), *(s.values for of in scores.of.values() for s in of.values())])
    thresholds = np.linspace(finite.min(), finite.max(), 101) if finite.size else np.empty(0)
    groups = tuple(
        _group(label, members[label], scores, found.get(label), q, thresholds, curves=not axis_mixed, say=say)
        for label in order
    )
    _say_order(groups, less, say)
    links, names = _lineage(records)
    return Comparison(
        question=q,
        lower_is_better=less,
        why_direction=why_direction,
        groups=groups,
        baseline=baseline,
        why_baseline=why_baseline,
        task_key=tasks_by,
        tasks=tuple(scores.tasks),
        normalized=scores.normalized,
        until={task: one.until for task, one in scores.budgets.items()},
        comparable=comparable,
        x_label=_x_label(taking_part, q),
        differences=_differences(members),
        links=links,
        names=names,
        thresholds=thresholds,
        notes=tuple(say),
    )


# ---- who takes part ----


def _with_metric(records: Sequence[Record], question: Question, say: _Notes) -> list[Record]:
    """Runs of the kinds that log the metric: a recipe's other stages are not missing it."""
    metric = question.metric
    kinds = {record.job_type for record in records if metric in record.series}
    if not kinds:
        known = sorted({name for record in records for name in record.metrics | record.said})
        if metric in known:
            raise LabError(f"--metric {metric}: is no number in any of the {len(records)} runs.")
        some = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
        raise LabError(
            f"--metric {metric}: none of the {len(records)} runs has it."
            f"{did_you_mean(metric, known)} They have {some or 'none'}."
        )
    others = Counter(record.job_type or "other" for record in records if record.job_type not in kinds)
    if others:
        kind = ", ".join(f"{count} {name}" for name, count in others.items())
        say(f"left out, since no run of their kind has {metric}: {kind}")
    taking_part = [record for record in records if record.job_type in kinds]
    for record in taking_part:
        if metric not in record.series:
            near = did_you_mean(metric, sorted((record.metrics | record.said) - {metric}))
            say(f"has no value of {metric}.{near}".removesuffix("."), record.name)
    return taking_part


def _lower_is_better(records: Sequence[Record], question: Question) -> tuple[bool, str]:
    """Whether less is better, and who says so.

    Raises:
        LabError: nobody does.
    """
    metric = question.metric
    if question.goal:
        return question.goal == "minimize", "asked for"
    told = {record.goals[metric] for record in records if metric in record.goals}
    if len(told) == 1:
        return told == {"minimize"}, "told to W&B"
    if goal := direction(metric):
        return goal == "minimize", "by its name"
    raise LabError(
        f"--metric {metric}: its name does not say which way is better. "
        "Add --goal maximize or --goal minimize."
    )


def _say_repeats(once: grouping.Merged, say: _Notes) -> None:
    if once.again:
        names = named([record.name for record in once.again])
        say(f"{len(once.again)} runs repeat the seed of one with the same config, and count once: {names}")
    if once.continued:
        names = named([record.name for record in once.continued])
        say(f"{len(once.continued)} runs go on with one of the same config and seed, and are joined: {names}")


def _common_tasks(
    groups: Mapping[str, Sequence[Record]], key: str, say: _Notes
) -> tuple[dict[str, list[Record]], str]:
    """The groups on the tasks that all of them were run on, and why there are none."""
    members = {label: list(group) for label, group in groups.items()}
    if not key:
        return members, ""
    of = {label: {task_of(record, key) for record in group} for label, group in members.items()}
    common, everything = set.intersection(*of.values()), set.union(*of.values())
    if not common:
        why = f"no {key} is common to all groups: their numbers are of different tasks"
        say(f"{why}. --where {key}=... compares those that share one")
        return members, why
    if common != everything:
        out = grouping.in_order(everything - common)
        say(f"compared on the {len(common)} {key} that all groups have; left out: {named(out)}")
    kept = {label: [r for r in group if task_of(r, key) in common] for label, group in members.items()}
    return kept, ""


# ---- scores ----


class _Scores:
    """The score of each run at the budget of its task, and what the groups' scores are compared as."""

    def __init__(
        self,
        members: Mapping[str, Sequence[Record]],
        question: Question,
        key: str,
        less: bool,
        say: _Notes,
        *,
        comparable: bool,
    ) -> None:
        self.question, self.key, self.less = question, key, less
        everyone = [record for group in members.values() for record in group]
        self.tasks = sorted({task_of(record, key) for record in everyone})
        by_task = {task: [r for r in everyone if task_of(r, key) == task] for task in self.tasks}
        self.budgets = {task: self._budget(of, say) for task, of in by_task.items()}
        self.grids = {task: self._grid(of, task, say) for task, of in by_task.items()}
        self.by_run: dict[str, float] = {}
        self.diverged: set[str] = set()
        for task, of in by_task.items():
            self._score(of, task, say)
        several = len(self.tasks) > 1
        wanted = question.normalize == "range" or (
            question.normalize == "auto" and not same_unit(question.metric)
        )
        self.normalized = comparable and several and wanted
        if self.normalized:
            self._say_normalized(everyone, say)
        elif comparable and several and not same_unit(question.metric):
            say(f"scores of different {key or 'tasks'} are averaged as they are, whatever their units")
        self.scales = {task: self._scale(of) for task, of in by_task.items()}
        self.of: dict[str, dict[str, Sample]] = {
            label: {task: self._sample(group, task) for task in self.tasks}
            for label, group in members.items()
        }

    def samples(self) -> dict[str, dict[str, Sample]]:
        """By label and task, of groups that have a score."""
        return {
            label: {task: sample for task, sample in of.items() if sample.values.size}
            for label, of in self.of.items()
        }

    def compared(self, members: Sequence[Record]) -> dict[str, float]:
        """By the ids of runs that have a score: what is compared of it."""
        found = {}
        for record in members:
            less, by = self.scales[task_of(record, self.key)]
            if math.isfinite(self.by_run[record.id]):
                found[record.id] = (self.by_run[record.id] - less) / by
        return found

    def curve(self, record: Record, axis: str = "step") -> Series:
        """A run's values up to its budget, over one of `AXES`."""
        task = task_of(record, self.key)
        steps = record.over(self.question.metric, "step")
        until = self.budgets[task].until
        kept = np.flatnonzero(steps.x <= until if steps.has_steps else np.isinf(np.full(steps.x.size, until)))
        if steps.has_steps and (grid := self.grids[task]) is not None:
            kept = kept[places(steps.x[kept], grid)]
        series = record.over(self.question.metric, axis)
        return Series(series.x[kept], series.y[kept]) if series.x.size == steps.x.size else series

    def scaled(self, record: Record, series: Series) -> Series:
        """A run's values in the unit in which its score is compared."""
        less, by = self.scales[task_of(record, self.key)]
        return Series(series.x, (series.y - less) / by) if self.normalized else series

    def _budget(self, records: Sequence[Record], say: _Notes) -> Budget:
        q = self.question
        found = budget(records, q.metric)
        where = f" on {task_of(records[0], self.key)}" if self.key else ""
        kinds = _kinds_of_steps(records, q.metric)
        if len(kinds) > 1 and q.last_step is None:
            say(f"the steps count different things{where} ({', '.join(kinds)}): runs count to their own ends")
            return Budget(until=math.inf, reached=found.reached, limited_by=())
        if q.until == END:
            if found.limited_by:
                first, last = (f"{step:,.12g}" for step in found.reached)
                say(f"unequal budgets{where}: runs count to their own ends, from {first} to {last} steps")
            return Budget(until=math.inf, reached=found.reached, limited_by=())
        if q.last_step is not None:
            return Budget(until=q.last_step, reached=found.reached, limited_by=())
        if found.limited_by:
            first, last = (f"{step:,.12g}" for step in found.reached)
            say(
                f"compared up to step {first}{where}, the largest that all runs reached: "
                f"{named(found.limited_by)} ended there, others went on to {last}. "
                f"--until STEP compares those that came further"
            )
        elif found.without_steps:
            say(
                f"says its value once, without a step{where}, others log it: runs count to their own ends",
                named(found.without_steps),
            )
        elif found.uneven:
            first, last = (f"{step:,.12g}" for step in found.reached)
            say(f"the runs' single values{where} are of different steps, from {first} to {last}")
        return found

    def _grid(self, records: Sequence[Record], task: str, say: _Notes) -> Array | None:
        """Of unequal numbers of evaluations: the steps of the run with the fewest.

        The best of more is better by chance, and the mean over the last tenth of a curve that still falls is
        the larger, the more of its values are early ones. Runs that diverged have few, and do not count here.
        """
        q, until = self.question, self.budgets[task].until
        there = [r for r in records if q.metric in r.series and not diverged(r, q.metric)]
        curves = [curve for r in there if (curve := upto(r.series[q.metric], until)).has_steps]
        sizes = [curve.x.size for curve in curves]
        if len(_kinds_of_steps(records, q.metric)) > 1 or not sizes or max(sizes) < 1.5 * min(sizes):
            return None
        told = f"evaluated {min(sizes)} to {max(sizes)} times{f' on {task}' if task else ''}"
        ends = [float(curve.x[-1]) for curve in curves]
        if math.isinf(until) and max(ends) - min(ends) > SAME_BUDGET * abs(max(ends)):
            say(f"{told}: the runs with fewer are the noisier")
            return None
        say(f"{told}: all count at the steps of the one with the fewest, as if evaluated only then")
        return min(curves, key=lambda curve: curve.x.size).x

    def _score(self, records: Sequence[Record], task: str, say: _Notes) -> None:
        """Scores of one task. Runs that diverged get the worst of all, those that stopped too early none."""
        q, until = self.question, self.budgets[task].until
        asked = q.last_step is not None
        for record in records:
            series = record.series.get(q.metric)
            gone = diverged(record, q.metric)
            short = series is not None and math.isfinite(until) and series.x[-1] < until - 0.01 * abs(until)
            curve = self.curve(record) if series is not None else Series(np.empty(0), np.empty(0))
            score = score_of(curve, q.score, self.less)
            if series is not None and curve.x.size < 2 and not math.isfinite(score) and not gone:
                score = math.nan
                where = f" up to step {until:,.12g}" if math.isfinite(until) else ""
                say(f"has {curve.x.size} values{where}, too few for {q.score}; not counted", record.name)
            elif short and asked and not gone:
                score = math.nan
                say(f"did not reach step {until:,.12g}; not counted", record.name)
            elif series is not None and (not math.isfinite(score) or (gone and (short or q.score != "best"))):
                self.diverged.add(record.id)
                score = math.nan
            self.by_run[record.id] = score
        usable = [self.by_run[r.id] for r in records if math.isfinite(self.by_run[r.id])]
        gone_here = [record for record in records if record.id in self.diverged]
        if not gone_here:
            return
        if not usable:
            self.diverged -= {record.id for record in gone_here}
            say("all values are NaN or infinite", named([record.name for record in gone_here]))
            return
        worst = max(usable) if self.less else min(usable)
        for record in gone_here:
            self.by_run[record.id] = worst
        say(
            f"diverged (NaN or infinity at the end); counts with the worst score of all, {worst:.4g}, "
            "the least that a failure costs",
            named([record.name for record in gone_here]),
        )

    def _say_normalized(self, everyone: Sequence[Record], say: _Notes) -> None:
        text = (
            f"scores of each {self.key or 'task'} are scaled to 0 for its lowest run and 1 for its highest, "
            "as their units may differ; --normalize none averages them as they are"
        )
        other = "eval/human_normalized"
        if all(other in record.metrics for record in everyone):
            text += f". {other} has one unit for all of them"
        say(text)

    def _scale(self, records: Sequence[Record]) -> tuple[float, float]:
        """What is taken off a task's scores, and what they are divided by."""
        usable = [self.by_run[r.id] for r in records if math.isfinite(self.by_run[r.id])]
        if not self.normalized or not usable:
            return 0.0, 1.0
        return min(usable), (max(usable) - min(usable)) or 1.0

    def _sample(self, group: Sequence[Record], task: str) -> Sample:
        less, by = self.scales[task]
        there = [
            record
            for record in group
            if task_of(record, self.key) == task and math.isfinite(self.by_run[record.id])
        ]
        seeds = tuple(seed_of(record) for record in there)
        known = all(seeds) and len(set(seeds)) == len(seeds)
        values = np.array([(self.by_run[record.id] - less) / by for record in there], np.float64)
        return Sample(values, seeds if known else ())


def _full(of: Mapping[str, Sample]) -> list[Array]:
    return [sample.values for sample in of.values() if sample.values.size]


def _rank(of: Mapping[str, Sample], less: bool) -> float:
    """For sorting: the best first, those without a score last."""
    tasks = _full(of)
    if not tasks:
        return math.inf
    value = statistics.mean(tasks)
    return value if less else -value


def _baseline(wanted: str, labels: Iterable[str], scores: _Scores) -> tuple[str, str]:
    """The group that the others are compared with, and why it is."""
    labels = grouping.in_order(labels)
    if not wanted:
        first = next((label for label in labels if _full(scores.of[label])), labels[0])
        return first, "the first by name"
    fitting = (
        [label for label in labels if label == wanted]
        or [label for label in labels if label.endswith(f"={wanted}")]
        or [label for label in labels if wanted in label]
    )
    if len(fitting) != 1:
        what = "is no group" if not fitting else f"fits {len(fitting)} groups"
        there = "; ".join(labels[:12]) + (" ..." if len(labels) > 12 else "")
        raise LabError(f"--baseline {wanted}: {what}.{did_you_mean(wanted, labels)} There are: {there}.")
    return fitting[0], "asked for"


def _say_seeds(members: Mapping[str, Sequence[Record]], scores: _Scores, say: _Notes) -> None:
    """Runs without a seed, and seeds that some groups have and others lack."""
    everyone = [record for group in members.values() for record in group]
    nameless = [record for record in everyone if not seed_of(record)]
    if nameless and len(nameless) < len(everyone):
        say(f"{len(nameless)} of {len(everyone)} runs name no seed; they count as different ones")
    elif nameless and len(everyone) > len(members):
        say("no run names its seed: whether some are the same run cannot be seen")
    if nameless or len(members) < 2:
        return
    of = {label: {seed_of(record) for record in group} for label, group in members.items()}
    everything = set.union(*of.values())
    if not set.intersection(*of.values()):  # nobody meant them to be the same
        return
    for label, seeds in of.items():
        if lacking := grouping.in_order(everything - seeds):
            say(f"lacks the seeds {named(lacking)}, which other groups have", label)


def _what_pairs_share(records: Sequence[Record]) -> str:
    """What runs of one seed have in common: stages that they started from, as far as recorded."""
    by_seed: dict[str, list[set[str]]] = defaultdict(list)
    for record in records:
        parents = {f"{p['stage']} {p['sha256']}" for p in record.parents if {"stage", "sha256"} <= p.keys()}
        by_seed[seed_of(record)].append(parents)
    shared = [{one.split()[0] for one in set.intersection(*of)} for of in by_seed.values() if len(of) > 1]
    stages = sorted(set.intersection(*shared)) if shared else []
    what = f"started from the same {' and '.join(stages)}" if stages else "share what a seed decides"
    return f"paired by seed: runs of one seed {what}; --paired off takes all runs as independent"


def _say_conditions(records: Sequence[Record], question: Question, say: _Notes) -> None:
    """Where `lab evaluate` measured the runs by different means."""
    if not question.metric.startswith(EVALUATE):
        return
    of = [record.conditions for record in records if question.metric in record.series]
    for key in sorted({key for one in of for key in one} - {"game", "checkpoint"}):
        values = grouping.in_order({one.get(key, grouping.ABSENT) for one in of})
        if len(values) > 1:
            say(f"`lab evaluate` measured the runs with different {key}: {named(values)}")


def _say_percent(scores: _Scores, question: Question, say: _Notes) -> None:
    """Where some groups seem to give a share as a fraction and others in percent."""
    if not same_unit(question.metric) or {"normalized", "normalised"} & set(words_of(question.metric)):
        return
    of = {label: np.concatenate(_full(tasks)) for label, tasks in scores.of.items() if _full(tasks)}
    fractions = [label for label, values in of.items() if ((values >= 0) & (values <= 1)).all()]
    percents = [label for label, values in of.items() if ((values > 1) & (values <= 100)).all()]
    if not scores.normalized and fractions and percents:
        say(
            f"{named(fractions)}: all values from 0 to 1; {named(percents)}: all above 1. "
            "If these are fractions and those percent, the difference between them says nothing"
        )


def _say_order(groups: Sequence[Group], less: bool, say: _Notes) -> None:
    """Where single outliers decide the order over several tasks."""
    iqm = {g.label: g.estimates["iqm"].point for g in groups if len(g.scores) > 1 and "iqm" in g.estimates}
    if len(iqm) < 2:
        return
    best = (min if less else max)(iqm, key=lambda label: iqm[label])
    if best != groups[0].label:
        say(f"by the IQM, which a few outliers do not move, {best} is first, not {groups[0].label}")


def _mixed_axes(records: Sequence[Record], question: Question) -> str:
    kinds = _kinds_of_steps(records, question.metric)
    if question.axis != "step" or len(kinds) < 2:
        return ""
    return (
        f"no curves: the runs' steps count different things ({', '.join(kinds)}). "
        f"--axis time, or another of {', '.join(AXES)}, lays them over one another."
    )


def _kinds_of_steps(records: Sequence[Record], metric: str) -> list[str]:
    """What the steps of the runs count, as far as it is known."""
    return sorted({record.x_axis for record in records if metric in record.series} - {""})


def _say_axis(records: Sequence[Record], question: Question, say: _Notes) -> None:
    """Runs whose axis falls, or that do not have it."""
    axes = {question.axis, "time"} if question.threshold is not None else {question.axis}
    for axis in sorted(axes - {"step"}):
        for record in records:
            if question.metric not in record.series:
                continue
            if falls := record.restarts(axis):
                times = "once" if falls == 1 else f"{falls} times"
                say(f"{axis} falls {times}; it goes on from where it was", record.name)
            if not record.over(question.metric, axis).x.size:
                say(f"has no {axis}: no curve of it", record.name)


def _x_label(records: Sequence[Record], question: Question) -> str:
    if question.axis == "step":
        kinds = {record.x_axis for record in records} - {""}
        return kinds.pop().replace("_", " ") if len(kinds) == 1 else "steps"
    return {"time": "seconds"}.get(question.axis, question.axis)


def _group(
    label: str,
    members: Sequence[Record],
    scores: _Scores,
    difference: Difference | None,
    question: Question,
    thresholds: Array,
    *,
    curves: bool,
    say: _Notes,
) -> Group:
    q, of = question, scores.of[label]
    tasks = _full(of)
    bootstrap: dict[str, Any] = {"reps": q.reps, "confidence": q.confidence, "seed": q.seed}
    steps = seconds = None
    if q.threshold is not None:
        steps, seconds = (_threshold(members, scores, q.threshold, axis) for axis in (q.axis, "time"))
    run_curves = {r.id: scores.scaled(r, r.over(q.metric, q.axis)) for r in members}
    curve_x, curve = _curve(members, run_curves, q, scores.key) if curves else (np.empty(0), None)
    note = statistics.few_seeds_note(min(task.size for task in tasks), len(tasks)) if tasks else None
    if note:
        say(note, label)
    nothing = Interval(math.nan, math.nan, math.nan)
    aggregates: list[statistics.Aggregate] = [
        n for n in statistics.AGGREGATES if n != "optimality_gap" or not scores.less
    ]
    variances = [task.var(ddof=1) for task in tasks if task.size > 1]
    raw = _raw_means(members, scores)
    return Group(
        label=label,
        records=tuple(members),
        scores={task: sample.values for task, sample in of.items()},
        by_run={record.id: scores.by_run[record.id] for record in members},
        compared=scores.compared(members),
        task_means=raw,
        seeds=len({seed_of(record) or record.id for record in members}),
        unfinished=dict(Counter(record.state for record in members if record.state != "finished")),
        without=sum(not math.isfinite(scores.by_run[record.id]) for record in members),
        diverged=sum(record.id in scores.diverged for record in members),
        mean=statistics.mean(tasks) if tasks else math.nan,
        interval=_mean_interval(tasks, q) if tasks else nothing,
        std=math.sqrt(float(np.mean(variances))) if variances else math.nan,
        median=float(np.mean([np.median(task) for task in tasks])) if tasks else math.nan,
        estimates=(
            statistics.stratified_bootstrap(tasks, aggregates, gamma=q.gamma, few_seeds=True, **bootstrap)
            if tasks
            else {}
        ),
        difference=difference,
        auc=_area(members, scores),
        threshold_steps=steps,
        threshold_seconds=seconds,
        win_rate=_win_rate(members, scores, say),
        curve_x=curve_x,
        curve=curve,
        run_curves=run_curves,
        profile=statistics.performance_profile(tasks, thresholds, **bootstrap) if tasks else None,
        note=note,
    )


def _mean_interval(tasks: Sequence[Array], question: Question) -> Interval:
    """The mean with Student's interval, which for shares such as accuracies ends at 0 and 1."""
    point, low, high = mean_interval(tasks, question.confidence)
    is_share = same_unit(question.metric) and all(((task >= 0) & (task <= 1)).all() for task in tasks)
    if is_share and not {"normalized", "normalised"} & set(words_of(question.metric)):
        low, high = float(np.maximum(low, 0)), float(np.minimum(high, 1))  # NaN stays
    return Interval(point, low, high)


def _raw_means(members: Sequence[Record], scores: _Scores) -> dict[str, float]:
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in members:
        if math.isfinite(scores.by_run[record.id]):
            by_task[task_of(record, scores.key)].append(scores.by_run[record.id])
    return {task: float(np.mean(values)) for task, values in sorted(by_task.items())}


def _area(members: Sequence[Record], scores: _Scores) -> float:
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in members:
        curve = scores.scaled(record, scores.curve(record, scores.question.axis))
        if curve.x.size > 1:
            by_task[task_of(record, scores.key)].append(score_of(curve, "auc"))
    return float(np.mean([np.mean(areas) for areas in by_task.values()])) if by_task else math.nan


def _threshold(
    members: Sequence[Record], scores: _Scores, threshold: float, axis: str
) -> statistics.ThresholdSteps | None:
    """When the runs came so far, within their budget: who was given longer did not come further."""
    curves = [scores.curve(record, axis) for record in members]
    curves = [curve for curve in curves if curve.has_steps]
    if not curves:
        return None
    return statistics.median_steps_to_threshold(curves, threshold, lower_is_better=scores.less)


def _win_rate(members: Sequence[Record], scores: _Scores, say: _Notes) -> Interval | None:
    """A single run's last win rate within its budget, with the interval that it gives over its prompts.

    Comparisons of several runs are not put together: how much runs differ is not in them. Nor is the number
    of comparisons a sample size, since answers to one prompt are alike: without `METRIC_low` and
    `METRIC_high` the number of prompts is.
    """
    question = scores.question
    if len(members) != 1 or f"{question.metric}_n" not in members[0].series:
        return None
    (record,) = members
    until = scores.budgets[task_of(record, scores.key)].until
    rate, low, high = (
        upto(record.series.get(f"{question.metric}{end}", Series(np.empty(0), np.empty(0))), until)
        for end in ("", "_low", "_high")
    )
    if not rate.x.size:
        return None
    if low.x.size and high.x.size:
        return Interval(float(rate.y[-1]), float(low.y[-1]), float(high.y[-1]))
    prompts = record.config.get("eval.prompts")
    if not isinstance(prompts, int) or prompts < 1 or not 0 <= rate.y[-1] <= 1:
        say(f"gives no interval over its prompts ({question.metric}_low and _high)", record.name)
        return None
    say(f"gives no interval of its own; Wilson's counts each of its {prompts} prompts once", record.name)
    return statistics.wilson_interval(float(rate.y[-1]) * prompts, prompts)


def _curve(
    members: Sequence[Record], run_curves: Mapping[str, Series], question: Question, key: str
) -> tuple[Array, Band | None]:
    """The group's mean curve on the x that all its runs have."""
    by_task: dict[str, list[Series]] = defaultdict(list)
    for record in members:
        if run_curves[record.id].x.size > 1:
            by_task[task_of(record, key)].append(run_curves[record.id])
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
        few_seeds=True,
    )
    return grid, band


# ---- what was different, and what came from what ----


def _differences(members: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, str]]:
    """The settings that are not the same in all runs: each group's value or values."""
    everyone = list(itertools.chain(*members.values()))
    usable, _ = grouping.settings(everyone)
    table = {}
    for key in usable:
        values = {grouping.value_of(record, key) for record in everyone}
        if len(values) < 2:
            continue
        table[key] = {
            label: _cell([grouping.value_of(record, key) for record in group])
            for label, group in members.items()
        }
    return table


def _cell(values: Sequence[str | None]) -> str:
    """The different values of a group, as far as a cell goes."""
    different = grouping.in_order({grouping.shown(value) for value in values})
    text = " | ".join(different[:NAMED]) + (
        f" | and {len(different) - NAMED} more" if len(different) > NAMED else ""
    )
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 3]}..."


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
