"""Whether groups of runs differ: by how much, how sure that is, and how many runs would settle it.

Each group is compared with one baseline that no outcome chose, and all of these comparisons are one family.

- One task: Welch's t (Welch 1947, Biometrika 34, 28-35), which Colas et al. 2018/2019 recommend for comparing
  algorithms by their seeds (arXiv 1806.08295, 1904.06979); where both groups have the same seeds, Student's t
  of the differences seed by seed.
- Several tasks: the mean over tasks of the difference in each, its variance by the tasks' own (stratified, as
  in Agarwal et al. 2021, arXiv 2108.13264, section 4.1), its degrees of freedom by Satterthwaite (1946,
  Biometrics 2, 110-114). With one run a task, the tasks are the pairs.
- The family: Holm's step-down procedure (Holm 1979, Scand. J. Statist. 6, 65-70).

Welch's t trusts the spread that it sees in two groups. Where a few seeds fail, three runs often show none of
it: three that worked and three that failed look like a sure difference (1.9% of pairs of equals if 30% fail,
which no level of Holm's brings down), and groups of unequal size are worse off still (3 and 10 runs: 13%). So
a difference has to hold by the pooled spread as well: that of both groups, and with fewer than `FEW` runs
that of all groups.
`benchmarks/verdict_errors.py` measures what comes of it: false claims, power and coverage.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from lab.statistics import Array

Pairing = Literal["auto", "on", "off"]
PAIRINGS: tuple[Pairing, ...] = ("auto", "on", "off")
LEAST_RUNS = 3
"""Of a group, on one task, for a claim: of two runs that failed it is not seen that others would not."""
FEW = 5
"""With fewer runs a task the spread of all groups counts."""
POWER = 0.8
"""With which the number of runs that is named would show the difference."""
MOST_RUNS = 1000


class Sample(NamedTuple):
    """A group's runs on one task."""

    values: Array
    """(runs,), finite."""
    seeds: tuple[str, ...]
    """(runs,); empty if they are not known or not different: nothing can be paired then."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A group's mean score less the baseline's, in the scores' unit."""

    point: float
    low: float
    """With `high` the interval at the level at which Holm's procedure tested it: without 0 if `settled`."""
    high: float
    p: float
    """Two-sided, adjusted by Holm; NaN if nothing could be tested."""
    settled: bool
    """Whether the difference is larger than chance explains, at the level asked for."""
    method: str
    """welch, seeds (paired by seed), tasks (paired by task), or empty: no test was possible."""
    family: int
    """Comparisons that were tested together."""
    runs_needed: int | None
    """Runs a group (and task) that would show this difference; None: over `MOST_RUNS`, or unknown."""
    wins: float
    """Pairs of runs (paired: of one seed) in which the group's has the larger value; ties count half."""
    pairs: int
    tasks: int
    why: str = ""
    """Why it could not be tested."""


class _Estimate(NamedTuple):
    """A standard error and its degrees of freedom."""

    error: float
    freedom: float


@dataclass(frozen=True, kw_only=True)
class _Test:
    point: float
    estimates: tuple[_Estimate, ...]
    """All of which have to show the difference."""
    method: str
    runs: float
    """A group and task, the harmonic mean where they differ."""
    exact: float
    """The smallest p that exchanging runs between the groups could give."""
    too_few: str
    """Why there are too few runs for a claim; empty if there are enough."""

    @property
    def without_spread(self) -> bool:
        """Whether the two groups' scores do not vary at all, but for rounding: then t is no guide."""
        return self.estimates[0].error <= abs(self.point) * 1e-9

    @property
    def p(self) -> float:
        if not self.point:
            return 1.0
        found = [self.exact] if self.without_spread else []
        found += [2 * _tail(abs(self.point) / e.error, e.freedom) for e in self.estimates if e.error]
        return max(found)

    def interval(self, level: float) -> tuple[float, float]:
        """The widest of the estimates'; NaN where there is no spread to make one from."""
        if self.without_spread and self.point and self.exact > level:
            return math.nan, math.nan
        half = max(e.error * _quantile(1 - level / 2, e.freedom) for e in self.estimates)
        return self.point - half, self.point + half

    def runs_needed(self, level: float) -> int | None:
        """How many runs a group would show a difference of this size with `POWER`, at this level."""
        if not self.point or self.without_spread:
            return None
        samples = 2 if self.method == "welch" else 1
        spread = max(estimate.error for estimate in self.estimates) ** 2 * self.runs / self.point**2

        def enough(runs: int) -> bool:
            freedom = samples * (runs - 1)
            return runs >= spread * (_quantile(1 - level / 2, freedom) + _quantile(POWER, freedom)) ** 2

        if not enough(MOST_RUNS):
            return None
        return LEAST_RUNS + bisect.bisect_left(range(LEAST_RUNS, MOST_RUNS), True, key=enough)


def _tail(t: float, freedom: float) -> float:
    """How likely Student's t is larger."""
    from scipy import special

    return float(special.stdtr(freedom, -t))


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t."""
    from scipy import special

    return float(special.stdtrit(freedom, share))


Groups = Mapping[str, Mapping[str, Sample]]
"""By label and task."""


def differences(
    groups: Groups, baseline: str, *, confidence: float = 0.95, pairing: Pairing = "auto"
) -> dict[str, Difference]:
    """Each group against the baseline, on the tasks that both have.

    Args:
        pairing: auto pairs by seed where both groups have the same seeds on every task; on pairs the seeds
            that both have and leaves out the others.

    Returns:
        By the labels of all groups but the baseline.
    """
    others = [label for label in groups if label != baseline]
    tests = {label: _test(groups, label, baseline, pairing) for label in others}
    tested = {label: test for label, test in tests.items() if isinstance(test, _Test)}
    claims = {label: test for label, test in tested.items() if not test.too_few}
    levels, adjusted = _holm({label: test.p for label, test in claims.items()}, 1 - confidence)
    found = {}
    for label in others:
        test = tests[label]
        wins, pairs = _wins(groups[label], groups[baseline], getattr(test, "method", ""))
        tasks = sum(task in groups[baseline] for task in groups[label])
        if not isinstance(test, _Test):
            point = _mean(groups[label], groups[baseline])
            found[label] = Difference(
                **{"point": point, "low": math.nan, "high": math.nan, "p": math.nan, "settled": False},
                **{"method": "", "family": len(claims), "runs_needed": None, "why": test},
                **{"wins": wins, "pairs": pairs, "tasks": tasks},
            )
            continue
        level = levels.get(label, 1 - confidence)
        low, high = test.interval(level)
        found[label] = Difference(
            **{"point": test.point, "low": low, "high": high, "p": adjusted.get(label, math.nan)},
            **{"settled": label in levels and test.p <= level, "method": test.method, "family": len(claims)},
            **{"runs_needed": test.runs_needed(level), "wins": wins, "pairs": pairs, "tasks": tasks},
            why=test.too_few,
        )
    return found


def turned(difference: Difference) -> Difference:
    """The baseline against the group."""
    return replace(
        difference,
        point=-difference.point,
        low=-difference.high,
        high=-difference.low,
        wins=difference.pairs - difference.wins,
    )


def mean_interval(tasks: Sequence[Array], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean over tasks of the mean over runs, with Student's interval; NaN where a task has one run.

    Args:
        tasks: (runs,) of each.
    """
    point = float(np.mean([task.mean() for task in tasks]))
    if min(task.size for task in tasks) < 2:
        return point, math.nan, math.nan
    error, freedom = _satterthwaite(
        [(_variance(task) / task.size, task.size - 1) for task in tasks], len(tasks)
    )
    if not error:
        return point, point, point
    half = error * _quantile((1 + confidence) / 2, freedom)
    return point, point - half, point + half


# ---- one comparison ----


def _test(groups: Groups, label: str, baseline: str, pairing: Pairing) -> _Test | str:
    """The test of one group against the baseline, or why there is none."""
    own, other = groups[label], groups[baseline]
    tasks = [task for task in other if task in own and own[task].values.size and other[task].values.size]
    if not tasks:
        return "no task is common to both"
    if pairing != "off" and (pairs := _by_seed(own, other, tasks, pairing)) is not None:
        siblings = [groups[g] for g in groups if g not in (label, baseline)]
        blocks = [_blocks(task, *pair, siblings) for task, pair in zip(tasks, pairs, strict=True)]
        test = _paired(blocks, "seeds")
        # Differences that are all the same have no spread to go by; the runs themselves have one.
        return _welch(groups, label, baseline, tasks) if test.without_spread else test
    if pairing == "on":
        return "the groups have no two seeds in common on every task, so nothing can be paired"
    sizes = [(own[task].values.size, other[task].values.size) for task in tasks]
    if len(tasks) > 1 and all(size == (1, 1) for size in sizes):
        rows = [own, other]
        rows += [
            group
            for name, group in groups.items()
            if name not in (label, baseline) and all(group.get(t, _NONE).values.size == 1 for t in tasks)
        ]
        return _paired([np.array([[float(row[t].values[0]) for t in tasks] for row in rows])], "tasks")
    if min(min(size) for size in sizes) < 2:
        return "one run" + (" a task" if len(tasks) > 1 else "")
    return _welch(groups, label, baseline, tasks)


_NONE = Sample(np.empty(0), ())


def _by_seed(
    own: Mapping[str, Sample], other: Mapping[str, Sample], tasks: Sequence[str], pairing: Pairing
) -> list[tuple[list[str], Array, Array]] | None:
    """The seeds and both groups' values in their order, for each task; None if they do not pair."""
    pairs = []
    for task in tasks:
        mine, theirs = own[task], other[task]
        common = sorted(set(mine.seeds) & set(theirs.seeds))
        if len(common) < 2 or (pairing == "auto" and len(common) < max(mine.values.size, theirs.values.size)):
            return None
        a, b = (np.array([s.values[s.seeds.index(seed)] for seed in common]) for s in (mine, theirs))
        pairs.append((common, a, b))
    return pairs


def _blocks(
    task: str, seeds: list[str], own: Array, other: Array, siblings: Sequence[Mapping[str, Sample]]
) -> Array:
    """(groups, seeds): the two compared, then the others that have these seeds."""
    rows = [own, other]
    for sibling in siblings:
        sample = sibling.get(task, _NONE)
        if set(seeds) <= set(sample.seeds):
            rows.append(np.array([sample.values[sample.seeds.index(seed)] for seed in seeds]))
    return np.array(rows)


def _paired(blocks: Sequence[Array], method: str) -> _Test:
    """Student's t of the differences, and by the residual spread of all groups where there are few pairs.

    Args:
        blocks: (groups, pairs) of each task, the group and the baseline first.
    """
    gaps = [block[0] - block[1] for block in blocks]
    point = float(np.mean([gap.mean() for gap in gaps]))
    own = [(_variance(gap) / gap.size, gap.size - 1) for gap in gaps]
    # Two-way layout, groups and pairs: what neither explains is the spread of a run.
    pooled = []
    for block in blocks:
        rest = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
        freedom = (block.shape[0] - 1) * (block.shape[1] - 1)
        pooled.append((2 * _square(rest) / freedom / block.shape[1], freedom))
    least = min(gap.size for gap in gaps)
    parts = [own, pooled] if least < FEW else [own]
    return _Test(
        point=point,
        estimates=tuple(_satterthwaite(part, len(gaps)) for part in parts),
        method=method,
        runs=len(gaps) / sum(1 / gap.size for gap in gaps),
        exact=min(1.0, 2 / math.prod(2.0**gap.size for gap in gaps)),
        too_few=f"there are {least} pairs" if least < LEAST_RUNS else "",
    )


def _welch(groups: Groups, label: str, baseline: str, tasks: Sequence[str]) -> _Test:
    own, other = groups[label], groups[baseline]
    values = [(own[task].values, other[task].values) for task in tasks]
    point = float(np.mean([a.mean() - b.mean() for a, b in values]))
    welch = [(_variance(x) / x.size, x.size - 1) for pair in values for x in pair]
    everyone = [[g[t].values for g in groups.values() if t in g and g[t].values.size > 1] for t in tasks]
    spreads = [_pooled(pair, pair) for pair in values]
    all_spreads = [_pooled(pair, all_) for pair, all_ in zip(values, everyone, strict=True)]
    least = min(x.size for pair in values for x in pair)
    parts = [welch, spreads, all_spreads] if least < FEW else [welch, spreads]
    smaller = min((label, baseline), key=lambda name: min(groups[name][task].values.size for task in tasks))
    each = " on a task" if len(tasks) > 1 else ""
    return _Test(
        point=point,
        estimates=tuple(_satterthwaite(part, len(tasks)) for part in parts),
        method="welch",
        runs=2 * len(values) / sum(1 / x.size for pair in values for x in pair),
        exact=min(1.0, 2 / math.prod(float(math.comb(a.size + b.size, a.size)) for a, b in values)),
        too_few=f"{smaller} has {least} runs{each}" if least < LEAST_RUNS else "",
    )


def _pooled(pair: tuple[Array, Array], groups: Sequence[Array]) -> tuple[float, int]:
    """The variance of the difference of two means by the spread within all groups, and its freedom."""
    freedom = sum(group.size - 1 for group in groups)
    spread = sum(_square(group - group.mean()) for group in groups) / freedom
    return spread * sum(1 / x.size for x in pair), freedom


def _satterthwaite(parts: Sequence[tuple[float, int]], tasks: int) -> _Estimate:
    """The standard error of a mean over tasks, from (variance, degrees of freedom) of independent parts."""
    total = sum(variance for variance, _ in parts)
    if not total > 0:
        return _Estimate(0.0, 1.0)
    shares = sum((variance / total) ** 2 / freedom for variance, freedom in parts)
    return _Estimate(math.sqrt(total) / tasks, 1 / shares)


def _variance(values: Array) -> float:
    return float(values.var(ddof=1))


def _square(values: Array) -> float:
    return float((values**2).sum())


def _mean(own: Mapping[str, Sample], other: Mapping[str, Sample]) -> float:
    gaps = [
        float(own[task].values.mean() - other[task].values.mean())
        for task in other
        if task in own and own[task].values.size and other[task].values.size
    ]
    return float(np.mean(gaps)) if gaps else math.nan


def _wins(own: Mapping[str, Sample], other: Mapping[str, Sample], method: str) -> tuple[float, int]:
    wins, pairs = 0.0, 0
    for task in other:
        mine, theirs = own.get(task, _NONE), other[task]
        if method == "seeds":
            common = sorted(set(mine.seeds) & set(theirs.seeds))
            a, b = (np.array([s.values[s.seeds.index(seed)] for seed in common]) for s in (mine, theirs))
        else:
            a, b = np.repeat(mine.values, theirs.values.size), np.tile(theirs.values, mine.values.size)
        wins += float((a > b).sum() + 0.5 * (a == b).sum())
        pairs += a.size
    return wins, pairs


# ---- the family ----


def _holm(p: Mapping[str, float], level: float) -> tuple[dict[str, float], dict[str, float]]:
    """The level at which each is tested, and its adjusted p (Holm 1979)."""
    ordered = sorted(p, key=lambda label: (p[label], label))
    levels: dict[str, float] = {}
    adjusted: dict[str, float] = {}
    at, worst = level / max(len(p), 1), 0.0
    going = True
    for index, label in enumerate(ordered):
        if going:
            at = level / (len(ordered) - index)
            going = p[label] <= at
        levels[label] = at
        worst = max(worst, min(1.0, p[label] * (len(ordered) - index)))
        adjusted[label] = worst
    return levels, adjusted
