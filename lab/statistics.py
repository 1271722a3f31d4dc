"""Statistics that compare groups of runs: aggregates, bootstrap intervals, profiles and curve bands.

A group is one config run with several seeds on one or more tasks (games, data sets). Its scores are a list
with one 1-D array per task and an entry per seed; tasks may differ in their number of seeds. Scores of
different tasks are averaged, so they must share a unit (see `human_normalized`). Every task counts alike,
however many seeds it has: a task with more seeds is better known, not more important.

The estimators are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (arXiv 2108.13264), with rliable's numbers where every task has the same number of seeds.

Nothing is dropped in silence: a NaN or an infinity among scores is a ValueError, and `finite` takes them out
and counts them. In curves they make NaN. Where a task has a single seed, intervals are NaN, not of width 0.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Scores = Sequence[npt.ArrayLike]
"""One 1-D array of scores per task, an entry per seed."""
Curve = tuple[npt.ArrayLike, npt.ArrayLike]
"""x, never falling, and y, both of shape (measurements,)."""
Aggregate = Literal["iqm", "mean", "median", "optimality_gap"]
AGGREGATES: tuple[Aggregate, ...] = ("iqm", "mean", "median", "optimality_gap")

REPS = 2000
# What a bootstrap works on at once: little enough for the CPU's cache. Its result, 8 bytes per point and
# resample, comes on top.
CHUNK_BYTES = 4 * 2**20

_FloatOrArray = TypeVar("_FloatOrArray", float, Array)
# Values per task, (seeds,) or (seeds, points), and how often each resample holds each seed, (seeds, reps),
# to one estimate per resample, (reps,) or (points, reps).
_Estimator = Callable[[Sequence[Array], Sequence[Array]], Array]


class Interval(NamedTuple):
    """An estimate and its confidence interval, NaN where none can be given."""

    point: float
    low: float
    high: float


class Band(NamedTuple):
    """Estimates along an axis and their pointwise confidence intervals, each of shape (points,)."""

    point: Array
    low: Array
    high: Array


class ThresholdSteps(NamedTuple):
    """When a group reached a threshold: the median x, and how many of its `total` runs ever did."""

    median: float
    reached: int
    total: int


# ---- scores ----


def mean(scores: Scores) -> float:
    """Mean over tasks of the mean over seeds, in the scores' unit."""
    return _estimate(_mean, scores)


def median(scores: Scores) -> float:
    """Median over tasks of the mean over seeds. On a single task that is its mean."""
    return _estimate(_median, scores)


def iqm(scores: Scores) -> float:
    """Interquartile mean: the mean of what is left when a quarter of all scores is cut on either side.

    Agarwal et al. 2021, section 4.3. Of n scores in all int(n / 4) are cut on either side, as in
    `scipy.stats.trim_mean(scores, 0.25, axis=None)`: with fewer than 4 it is the mean. Where tasks differ in
    their number of seeds, a score weighs n / (tasks * seeds of its task), and a score on the border of the
    cut counts with the part of its weight that is inside. Without these weights, a group with more seeds on
    an easy game would beat the same agent with more seeds on a hard one.
    """
    return _estimate(_iqm, scores)


def optimality_gap(scores: Scores, gamma: float = 1.0) -> float:
    """How far scores fall short of `gamma` on average, those above it counted as `gamma`.

    Lower is better. Agarwal et al. 2021, section 4.3; `gamma` is 1 for human-normalised scores.
    """
    return _estimate(functools.partial(_optimality_gap, gamma=gamma), scores)


def human_normalized(score: _FloatOrArray, random: float, human: float) -> _FloatOrArray:
    """(score - random) / (human - random): 0 is random play, 1 the human tester. Mnih et al. 2015, figure 3.

    Raises:
        ValueError: `random` and `human` are equal.
    """
    if human == random:
        raise ValueError(f"random and human scores are both {human:g}: there is no scale between them")
    return (score - random) / (human - random)


def finite(scores: Scores) -> tuple[list[Array], int]:
    """The scores without NaN and infinities, and how many were taken out (which a reader must be told)."""
    tasks = [np.asarray(task, np.float64) for task in scores]
    kept = [task[np.isfinite(task)] for task in tasks]
    return kept, sum(task.size for task in tasks) - sum(task.size for task in kept)


def few_seeds_note(n_seeds: int, n_tasks: int = 1) -> str | None:
    """What a reader must know about numbers from few seeds, one sentence without a full stop, or None.

    Corrected intervals (see `stratified_bootstrap`) hold the truth as often as they say if scores are normal.
    But of a failure that one seed in four suffers, three seeds often show nothing.

    Args:
        n_seeds: seeds per task, the smallest number where tasks differ.

    Raises:
        ValueError: there are no seeds or no tasks.
    """
    if n_seeds < 1 or n_tasks < 1:
        raise ValueError(f"{n_seeds} seeds on {n_tasks} tasks: there is nothing to say about no runs")
    each = "" if n_tasks == 1 else " per task"
    if n_seeds == 1:
        return f"one seed{each}: no interval can be given"
    if n_seeds >= 5:
        return None
    return f"{n_seeds} seeds{each}: intervals are wide and assume scores without outliers"


# ---- intervals of scores ----


def stratified_bootstrap(
    scores: Scores,
    aggregates: Sequence[Aggregate] = AGGREGATES,
    *,
    reps: int = REPS,
    confidence: float = 0.95,
    seed: int = 0,
    gamma: float = 1.0,
    few_seeds: bool = False,
) -> dict[Aggregate, Interval]:
    """Aggregates with percentile intervals, all from the same resamples.

    Agarwal et al. 2021, section 4.1: each resample draws with replacement as many seeds as there are, within
    each task by itself. The tasks stay, so the interval is about other seeds, not about other tasks.

    Where there are no more than `reps` different resamples (one task of up to 7 seeds, three tasks of 3), all
    of them are taken, each with its probability: the interval is then exact, what infinitely many draws would
    give, and `seed` plays no part (Fisher and Hall 1991, "Bootstrap algorithms for small samples"). The order
    of a task's scores plays no part either way.

    A resample of n seeds varies less than n new seeds would, by sqrt((n - 1) / n), and its percentiles are
    those of a normal distribution where Student's t is due. On one task with normal scores, a 95% interval
    of the mean holds the truth so often: 3 seeds 75%, 5 seeds 84%, 10 seeds 90%, 20 seeds 93%. `few_seeds`
    stretches the intervals about the estimate by both factors (Hesterberg 2015, "What Teachers Should Know
    About the Bootstrap", arXiv 1411.5279, on the bias of narrowness).

    Args:
        scores: one 1-D array per task.
        reps: resamples to draw.
        gamma: for `optimality_gap`.
        few_seeds: correct the intervals for few seeds. Off, they are rliable's.

    Raises:
        ValueError: a score is not finite, a task has none, or an argument is out of range.
    """
    tasks = [_ordered(task) for task in _tasks(scores)]
    estimators = [_estimator(name, gamma) for name in aggregates]
    point, low, high = _bootstrap(
        [len(task) for task in tasks],
        lambda counts: np.stack([estimator(tasks, counts) for estimator in estimators]),
        reps=reps,
        confidence=confidence,
        seed=seed,
        stretch=_stretch(tasks, confidence) if few_seeds else None,
    )
    return {
        name: Interval(float(point[i]), float(low[i]), float(high[i])) for i, name in enumerate(aggregates)
    }


def probability_of_improvement(
    x_scores: Scores,
    y_scores: Scores,
    *,
    reps: int = REPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """How likely a run of X scores higher than one of Y on the same task: P(X > Y) + P(X = Y) / 2.

    The mean over tasks of the Mann-Whitney U of each, divided by its number of pairs; 0.5 is no difference.
    Agarwal et al. 2021, section 4.3. The bootstrap resamples X and Y independently.

    Args:
        x_scores: one 1-D array per task.
        y_scores: the same tasks in the same order; their numbers of seeds may differ.

    Raises:
        ValueError: X and Y differ in their number of tasks, a score is not finite, or a task has none.
    """
    xs, ys = ([_ordered(task) for task in _tasks(scores)] for scores in (x_scores, y_scores))
    if len(xs) != len(ys):
        raise ValueError(f"X has {len(xs)} tasks and Y has {len(ys)}: compare them on the tasks both have")
    # Which of each pair of runs wins, (seeds of X, seeds of Y).
    wins = [(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in zip(xs, ys, strict=True)]

    def evaluate(counts: Sequence[Array]) -> Array:
        pairs = zip(wins, counts[: len(xs)], counts[len(xs) :], strict=True)
        return np.mean([((win.T @ of_x) * of_y).sum(0) / win.size for win, of_x, of_y in pairs], axis=0)

    sizes = [len(task) for task in (*xs, *ys)]
    point, low, high = _bootstrap(sizes, evaluate, reps=reps, confidence=confidence, seed=seed)
    return Interval(float(point), float(low), float(high))


def performance_profile(
    scores: Scores,
    thresholds: npt.ArrayLike,
    *,
    averaged: bool = False,
    reps: int = REPS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Band:
    """How large a part of the runs scores above each threshold, with a pointwise interval.

    Agarwal et al. 2021, section 4.2: the mean over tasks of the fraction of seeds with score > threshold. The
    area above this curve and left of gamma is the optimality gap.

    Args:
        thresholds: (points,) in the scores' unit.
        averaged: the fraction of tasks whose mean over seeds is above the threshold, instead; it hides how
            much single runs vary.

    Raises:
        ValueError: a score is not finite, or a task has none.
    """
    tasks = [_ordered(task) for task in _tasks(scores)]
    taus = np.asarray(thresholds, np.float64)
    if averaged:

        def evaluate(counts: Sequence[Array]) -> Array:
            return (_task_means(tasks, counts)[:, None] > taus[:, None]).mean(0)
    else:
        above = [(task[:, None] > taus).astype(np.float64) for task in tasks]
        evaluate = functools.partial(_mean, above)
    sizes = [len(task) for task in tasks]
    return Band(*_bootstrap(sizes, evaluate, width=len(taus), reps=reps, confidence=confidence, seed=seed))


def wilson_interval(wins: float, n: int, confidence: float = 0.95) -> Interval:
    """A win rate with its score interval (Wilson 1927), which stays within [0, 1] and works at 0 and n wins.

    Args:
        wins: ties count as half a win each. They vary less than wins and losses, so with ties the interval
            is somewhat wider than it need be.
        n: comparisons, independent of one another. None: all NaN.

    Raises:
        ValueError: `wins` is not within 0 and `n`.
    """
    if not 0 <= wins <= n:
        raise ValueError(f"{wins:g} wins of {n}: wins must lie between 0 and the number of comparisons")
    _check_confidence(confidence)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    rate = wins / n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # The bounds enclose the rate; only rounding could tell otherwise, at 0 and n wins.
    return Interval(rate, min(max(center - half, 0.0), rate), max(min(center + half, 1.0), rate))


# ---- curves ----


def common_grid(curves: Sequence[Curve], points: int = 200) -> Array:
    """`points` evenly spaced x over the range all curves cover: the last first x to the first last x.

    Raises:
        ValueError: no x is common to all curves, or a curve is not one.
    """
    xs = [_curve(curve)[0] for curve in curves]
    if not xs:
        raise ValueError("there is no curve to lay a grid under")
    first, last = max(float(x[0]) for x in xs), min(float(x[-1]) for x in xs)
    if first > last:
        raise ValueError(f"the curves share no x: one begins at {first:g}, another ends at {last:g}")
    return np.linspace(first, last, points)


def align(curves: Sequence[Curve], x_grid: npt.ArrayLike) -> Array:
    """The curves' y on one grid, (curves, points): a row each, NaN outside of its own range.

    Linear between measurements. Holding the last value instead would show each run late by half an interval
    of its measurements on average, and so favour the runs that are measured more often.

    A y that is NaN or infinite is not bridged: it makes NaN of the grid up to the measurements beside it. Of
    several measurements at one x the last counts there.
    """
    grid = np.asarray(x_grid, np.float64)
    rows = np.full((len(curves), len(grid)), np.nan)
    for row, curve in zip(rows, curves, strict=True):
        x, y = _curve(curve)
        row[:] = np.interp(grid, x, np.where(np.isfinite(y), y, np.nan), left=np.nan, right=np.nan)
    return rows


def curve_band(
    curves: npt.NDArray[np.floating] | Sequence[npt.NDArray[np.floating]],
    aggregate: Aggregate = "mean",
    *,
    reps: int = REPS,
    confidence: float = 0.95,
    seed: int = 0,
    gamma: float = 1.0,
    few_seeds: bool = False,
) -> Band:
    """An aggregate of aligned curves with a pointwise bootstrap band, as by `stratified_bootstrap`.

    A resample draws whole curves, so neighbouring points of the band are of the same draws. Where a seed's
    value is not finite, all three are NaN: to leave the seed out there would flatter the group.

    Args:
        curves: (seeds, points), as from `align`; or a list of such, one per task.
        gamma: for `optimality_gap`.
        few_seeds: correct the band for few seeds, as in `stratified_bootstrap`.

    Raises:
        ValueError: a matrix is not one, is empty, or tasks differ in their number of points.
    """
    matrices = [curves] if isinstance(curves, np.ndarray) else curves
    tasks = [np.asarray(matrix, np.float64) for matrix in matrices]
    if not tasks or any(task.ndim != 2 or not len(task) for task in tasks):
        raise ValueError("curves must be a matrix (seeds, points), or a list with one per task")
    if len({task.shape[1] for task in tasks}) > 1:
        raise ValueError("all tasks need the same points: align their curves on one grid")
    usable = np.logical_and.reduce([np.isfinite(task).all(0) for task in tasks])
    estimator = _estimator(aggregate, gamma)
    band = Band(*(np.full(len(usable), np.nan) for _ in range(3)))
    if not usable.any():
        return band
    tasks = [_ordered(task[:, usable]) for task in tasks]
    found = _bootstrap(
        [len(task) for task in tasks],
        functools.partial(estimator, tasks),
        width=int(usable.sum()),
        reps=reps,
        confidence=confidence,
        seed=seed,
        stretch=_stretch(tasks, confidence) if few_seeds else None,
    )
    for whole, part in zip(band, found, strict=True):
        whole[usable] = part
    return band


def area_under_curve(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """The mean height of a curve over its x range, in y's unit: the trapezoid rule divided by the range.

    NaN where there is no range (all measurements at one x) or a y is not finite.
    """
    xs, ys = _curve((x, y))
    if xs[0] == xs[-1] or not np.isfinite(ys).all():
        return math.nan
    return float(np.trapezoid(ys, xs) / (xs[-1] - xs[0]))


def steps_to_threshold(
    x: npt.ArrayLike, y: npt.ArrayLike, threshold: float, *, lower_is_better: bool = False
) -> float:
    """The first measured x at which y is at least `threshold` (at most, if lower is better), NaN if never."""
    xs, ys = _curve((x, y))
    reached = ys <= threshold if lower_is_better else ys >= threshold
    return float(xs[reached.argmax()]) if reached.any() else math.nan


def median_steps_to_threshold(
    curves: Sequence[Curve], threshold: float, *, lower_is_better: bool = False
) -> ThresholdSteps:
    """The median over runs of `steps_to_threshold`, and how many reached the threshold.

    A run that never did counts as later than all others. The median of those that did would make a group look
    faster for failing more often. NaN if the median run never did.
    """
    steps = np.array(
        [steps_to_threshold(x, y, threshold, lower_is_better=lower_is_better) for x, y in curves]
    )
    reached = int(np.isfinite(steps).sum())
    middle = float(np.median(np.where(np.isnan(steps), np.inf, steps))) if len(steps) else math.inf
    return ThresholdSteps(middle if math.isfinite(middle) else math.nan, reached, len(steps))


# ---- estimators ----


def _task_means(tasks: Sequence[Array], counts: Sequence[Array]) -> Array:
    """(tasks, reps) or (tasks, points, reps)."""
    return np.stack([task.T @ count / len(task) for task, count in zip(tasks, counts, strict=True)])


def _mean(tasks: Sequence[Array], counts: Sequence[Array]) -> Array:
    return _task_means(tasks, counts).mean(0)


def _median(tasks: Sequence[Array], counts: Sequence[Array]) -> Array:
    return np.median(_task_means(tasks, counts), axis=0)


def _optimality_gap(tasks: Sequence[Array], counts: Sequence[Array], gamma: float) -> Array:
    return gamma - _mean([np.minimum(task, gamma) for task in tasks], counts)


def _iqm(tasks: Sequence[Array], counts: Sequence[Array]) -> Array:
    """Sorts the scores once, for all resamples; each resample then weighs them by its counts."""
    scores = np.concatenate(tasks)
    n = len(scores)
    # With equally many seeds on each task the factor is exactly 1.
    weights = np.concatenate(
        [count * (n / (len(tasks) * len(task))) for task, count in zip(tasks, counts, strict=True)]
    )
    cut = int(0.25 * n)
    order = scores.argsort(0)
    weight_upto = np.zeros((*scores.shape[1:], weights.shape[1]))
    inside_before, total = cut, np.zeros_like(weight_upto)
    for rank, score in zip(order, np.take_along_axis(scores, order, 0), strict=True):
        weight_upto += weights[rank]
        inside_upto = weight_upto.clip(cut, n - cut)
        total += (inside_upto - inside_before) * score[..., None]
        inside_before = inside_upto
    return total / (n - 2 * cut)


def _estimator(name: Aggregate, gamma: float) -> _Estimator:
    known: dict[Aggregate, _Estimator] = {
        "iqm": _iqm,
        "mean": _mean,
        "median": _median,
        "optimality_gap": functools.partial(_optimality_gap, gamma=gamma),
    }
    if name not in known:
        raise ValueError(f"{name!r} is no aggregate; those known are {', '.join(known)}")
    return known[name]


def _estimate(estimator: _Estimator, scores: Scores) -> float:
    tasks = _tasks(scores)
    return float(estimator(tasks, [np.ones((len(task), 1)) for task in tasks])[0])


# ---- the bootstrap ----


def _bootstrap(
    sizes: Sequence[int],
    evaluate: Callable[[Sequence[Array]], Array],
    *,
    width: int = 1,
    reps: int,
    confidence: float,
    seed: int,
    stretch: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Point, low and high, each of shape (...,), of what `evaluate` makes of resamples.

    Args:
        sizes: seeds in each stratum.
        evaluate: counts, an array (seeds, reps) per stratum, to estimates (..., reps).
        width: numbers that `evaluate` works on per seed and resample.
        stretch: by what intervals are stretched about their points, as `_stretch` gives it.
    """
    _check_confidence(confidence)
    if reps < 1:
        raise ValueError(f"reps = {reps}: a bootstrap needs resamples")
    point = evaluate([np.ones((size, 1)) for size in sizes])[..., 0]
    if min(sizes) < 2:  # resamples of one seed are all alike, which says nothing about other seeds
        unknown = np.full_like(point, np.nan)
        return point, unknown, unknown.copy()
    chunk = max(1, CHUNK_BYTES // (8 * width * sum(sizes)))
    estimates, weights = [], []
    for counts, weight in _resamples(sizes, reps, seed, chunk):
        estimates.append(evaluate(counts))
        weights.append(weight)
    low, high = _percentiles(np.concatenate(estimates, axis=-1), np.concatenate(weights), confidence)
    if stretch is not None:
        low, high = point + stretch * (low - point), point + stretch * (high - point)
    return point, low, high


def _stretch(tasks: Sequence[Array], confidence: float) -> Array:
    """By what a bootstrap interval of so few seeds is too narrow, () or (points,).

    The standard error of a mean over tasks by that of its resamples, times Student's quantile by the normal
    one, its degrees of freedom by Satterthwaite.

    Args:
        tasks: (seeds,) or (seeds, points) each.
    """
    from scipy import special

    if min(len(task) for task in tasks) < 2:
        return np.ones(tasks[0].shape[1:])
    own = [task.var(0, ddof=1) / len(task) for task in tasks]
    drawn = [part * (len(task) - 1) / len(task) for part, task in zip(own, tasks, strict=True)]
    total = np.sum(own, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = total**2 / np.sum([p**2 / (len(t) - 1) for p, t in zip(own, tasks, strict=True)], axis=0)
        wider = np.sqrt(total / np.sum(drawn, axis=0))
        tail = (1 + confidence) / 2
        wider = wider * special.stdtrit(freedom, tail) / NormalDist().inv_cdf(tail)
    return np.where(total > 0, wider, 1.0)


def _resamples(sizes: Sequence[int], reps: int, seed: int, chunk: int) -> Iterator[tuple[list[Array], Array]]:
    """Yields up to `chunk` resamples at a time: counts (seeds, chunk) per stratum, and weights (chunk,)."""
    lengths = [math.comb(2 * size - 1, size) for size in sizes]
    different = math.prod(lengths)
    if different <= reps:
        tables = [_all_resamples(size) for size in sizes]
        for start in range(0, different, chunk):
            rows = np.unravel_index(np.arange(start, min(start + chunk, different)), lengths)
            counts = [count[:, row] for (count, _), row in zip(tables, rows, strict=True)]
            yield counts, np.prod([ways[row] for (_, ways), row in zip(tables, rows, strict=True)], axis=0)
        return
    # A generator for each stratum: the draws do not depend on the size of the chunks.
    generators = np.random.default_rng(seed).spawn(len(sizes))
    for start in range(0, reps, chunk):
        n = min(chunk, reps - start)
        draws = (
            rng.multinomial(size, np.full(size, 1 / size), n)
            for rng, size in zip(generators, sizes, strict=True)
        )
        yield [np.ascontiguousarray(draw.T, np.float64) for draw in draws], np.ones(n)


@functools.cache
def _all_resamples(size: int) -> tuple[Array, Array]:
    """Every different resample of `size` seeds, (size, C(2 size - 1, size)), and the ways to draw each."""
    drawn = np.array(list(itertools.combinations_with_replacement(range(size), size)))
    counts = (drawn == np.arange(size)[:, None, None]).sum(-1)
    factorials = np.array([math.factorial(i) for i in range(size + 1)], np.float64)
    return counts.astype(np.float64), math.factorial(size) / factorials[counts].prod(0)


def _percentiles(values: Array, weights: Array, confidence: float) -> tuple[Array, Array]:
    """The ends of the central interval of weighted values (..., reps), each (...,).

    Either end is the outermost value with more than (1 - confidence) / 2 of the weight on it and beyond, so
    the interval of the negated values is the negated interval.
    """
    total = weights.sum()
    tail = (1 - confidence) / 2 * total
    if weights.min() == weights.max():  # drawn: each end is so many values from the edge
        ordered, skip = np.sort(values, -1), int(tail / weights[0])
        return ordered[..., skip], ordered[..., -1 - skip]
    order = values.argsort(-1)
    upto = weights[order].cumsum(-1)
    low, high = (
        np.take_along_axis(order, beyond.sum(-1, keepdims=True), -1)
        for beyond in (upto <= tail, upto < total - tail)
    )
    return np.take_along_axis(values, low, -1)[..., 0], np.take_along_axis(values, high, -1)[..., 0]


# ---- checks ----


def _tasks(scores: Scores) -> list[Array]:
    """One 1-D array of finite floats per task.

    Raises:
        ValueError: they are not.
    """
    if isinstance(scores, np.ndarray):
        raise ValueError(
            "scores must be a list with one array per task: [scores] for a single task, "
            "list(matrix.T) for a matrix (runs, tasks)"
        )
    tasks = [np.asarray(task, np.float64) for task in scores]
    if not tasks:
        raise ValueError("there are no scores")
    for i, task in enumerate(tasks):
        if task.ndim != 1:
            raise ValueError("scores must be a list with one 1-D array per task: [scores] for a single task")
        if not task.size:
            raise ValueError(f"task {i} has no scores")
        if bad := int((~np.isfinite(task)).sum()):
            raise ValueError(f"{bad} of {task.size} scores of task {i} are not finite: see `finite`")
    return tasks


def _ordered(task: Array) -> Array:
    """The seeds of a task, (seeds,) or (seeds, points), in an order of their values alone.

    So the draws hit the same seeds in whatever order the runs were found.
    """
    return task[np.lexsort(np.atleast_2d(task.T))]


def _curve(curve: Curve) -> tuple[Array, Array]:
    x, y = (np.asarray(side, np.float64) for side in curve)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"a curve is x and y of one length, at least 1: these are {x.shape} and {y.shape}")
    if not np.isfinite(x).all() or (np.diff(x) < 0).any():
        raise ValueError("the x of a curve must be finite and must not fall")
    return x, y


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence:g}: it is a share between 0 and 1, such as 0.95")
