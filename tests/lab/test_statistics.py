"""Aggregates, intervals and curves against rliable, scipy, arithmetic and the laws they must obey."""

import itertools
import math
from random import Random
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import statistics
from lab.statistics import (
    AGGREGATES,
    Aggregate,
    Array,
    align,
    area_under_curve,
    common_grid,
    curve_band,
    few_seeds_note,
    finite,
    human_normalized,
    iqm,
    mean,
    median,
    median_steps_to_threshold,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    steps_to_threshold,
    stratified_bootstrap,
    wilson_interval,
)

# (tasks, runs): the transpose of what rliable takes.
X = [np.array([0.12, 0.05, 0.31, 0.22, 0.09, 0.18]), np.array([1.31, 2.75, 0.98, 1.02, 4.10, 1.77])]
X.append(np.array([0.40, 0.33, 0.57, -0.08, 0.45, 0.91]))
Y = [
    np.array([0.10, 0.35, 0.31, 0.40]),
    np.array([1.02, 0.75, 3.10, 1.31]),
    np.array([0.40, 0.61, 0.70, 0.12]),
]
THRESHOLDS = [0.0, 0.31, 0.4, 1.0, 1.02, 3.0]
SEVEN = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3]
# np.random.default_rng(7).normal(size=20).round(2)
TWENTY = [0.0, 0.3, -0.27, -0.89, -0.45, -0.99, 0.06, 1.34, -0.49, -0.62]
TWENTY += [0.49, 0.36, 0.11, -0.93, -0.03, 0.7, -1.34, -0.46, -1.9, -1.29]

values = st.floats(-100, 100).map(lambda x: round(x, 3))


def tasks(min_tasks: int = 1, max_tasks: int = 4, min_seeds: int = 2) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(values, min_size=min_seeds, max_size=6), min_size=min_tasks, max_size=max_tasks)


# ---- aggregates ----


def test_aggregates_are_those_of_rliables_own_test() -> None:
    # rliable 1.2.0, tests/rliable/metrics_test.py
    x = [[1, 2, 1, 2], [2, 2, 1, 1]]
    y = [[1, 2, 3], [1, 2, 3]]
    assert (median(x), mean(x), iqm(x)) == (1.5, 1.5, 1.5)
    assert (median(y), mean(y), iqm(y)) == (2, 2, 2)
    assert probability_of_improvement(x, y).point == pytest.approx(1 / 3)


def test_aggregates_are_those_of_rliable_on_uneven_scores() -> None:
    # rliable 1.2.0, metrics.aggregate_{iqm,mean,median,optimality_gap}
    assert [iqm(X), mean(X), median(X)] == pytest.approx([0.537, 0.86, 0.43])
    assert [optimality_gap(X), optimality_gap(X, 2.0)] == pytest.approx([0.47055556, 1.29833333])
    assert [iqm(Y), mean(Y), median(Y)] == pytest.approx([0.535, 0.76416667, 0.4575])
    assert optimality_gap(Y) == pytest.approx(0.43833333)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 3.0), (2, 2.0), (3, 8 / 3), (4, 2.25), (5, 8.5 / 3), (6, 2.775), (7, 3.28)]
)
def test_iqm_cuts_the_quarters_as_scipy_does(n: int, expected: float) -> None:
    # scipy 1.17.1, stats.trim_mean(SEVEN[:n], 0.25)
    assert iqm([SEVEN[:n]]) == pytest.approx(expected)


def test_a_huge_score_that_is_cut_leaves_no_trace_in_the_iqm() -> None:
    assert iqm([[1.1, 2.3, 3.2, 1e300]]) == pytest.approx(2.75)


def test_iqm_of_uneven_tasks_counts_every_task_alike() -> None:
    # A task of 2 seeds (weight 6 / (2 * 2) = 1.5 each) and one of 4 (0.75 each): of a weight of 6 in all,
    # int(6 / 4) = 1 is cut on either side. Left are 0.5 of the score 0, 0.75 four times, and 0.5 of the 10.
    assert iqm([[0, 10], [1, 2, 3, 4]]) == pytest.approx((0.5 * 0 + 0.75 * (1 + 2 + 3 + 4) + 0.5 * 10) / 4)
    # The same agent on an easy and a hard game, once with more seeds on the one and once on the other.
    easy, hard = [1.0, 1.0], [0.0, 0.0]
    assert iqm([easy * 3, hard]) == pytest.approx(0.5)
    assert iqm([easy, hard * 3]) == pytest.approx(0.5)


def test_mean_and_median_of_uneven_tasks_are_of_the_tasks_means() -> None:
    scores = [[0, 2], [10, 10, 10, 10], [4, 5, 6]]
    assert mean(scores) == pytest.approx((1 + 10 + 5) / 3)
    assert median(scores) == pytest.approx(5)
    assert optimality_gap(scores, 5) == pytest.approx((4 + 0 + 1 / 3) / 3)


def test_human_normalised_scores() -> None:
    assert human_normalized(401.2, random=1.7, human=31.8) == pytest.approx(13.27, abs=0.005)  # DQN, Breakout
    np.testing.assert_allclose(human_normalized(np.array([-20.7, 9.3]), -20.7, 9.3), [0, 1])
    with pytest.raises(ValueError, match="both 3"):
        human_normalized(1.0, 3.0, 3.0)


def test_what_is_not_finite_is_counted_or_refused() -> None:
    scores = [[1.0, math.nan, 2.0], [math.inf, -math.inf], [3.0]]
    kept, dropped = finite(scores)
    assert [task.tolist() for task in kept] == [[1.0, 2.0], [], [3.0]]
    assert dropped == 3
    with pytest.raises(ValueError, match="1 of 3 scores of task 0 are not finite"):
        iqm(scores)
    with pytest.raises(ValueError, match="2 of 2 scores of task 1"):
        stratified_bootstrap([[1.0], [math.inf, -math.inf]])
    with pytest.raises(ValueError, match="task 1 has no scores"):
        mean(kept)


def test_a_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"list\(matrix.T\)"):
        mean(np.ones((3, 2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\[scores\] for a single task"):
        mean([1.0, 2.0])
    with pytest.raises(ValueError, match="no scores"):
        mean([])
    with pytest.raises(ValueError, match="2 tasks and Y has 1"):
        probability_of_improvement([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="'mode' is no aggregate"):
        stratified_bootstrap([[1, 2]], ["mode"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("seeds", "n_tasks", "note"),
    [
        (1, 1, "one seed: no interval can be given"),
        (1, 26, "one seed per task: no interval can be given"),
        (
            3,
            1,
            "3 seeds: intervals are wide and assume scores without outliers",
        ),
        (2, 2, "2 seeds per task: intervals are wide and assume scores without outliers"),
        (4, 1, "4 seeds: intervals are wide and assume scores without outliers"),
        (5, 1, None),
    ],
)
def test_few_seeds_are_said(seeds: int, n_tasks: int, note: str | None) -> None:
    assert few_seeds_note(seeds, n_tasks) == note


# ---- intervals ----


def test_seven_seeds_have_scipys_interval_without_its_noise() -> None:
    found = stratified_bootstrap([SEVEN], ["mean", "iqm", "median"])
    # scipy 1.17.1, stats.bootstrap(method="percentile") of np.mean with 1,000,000 and trim_mean with 300,000
    assert found["mean"] == pytest.approx((26.4 / 7, 2.1142857142857143, 5.785714285714286))
    assert found["iqm"] == pytest.approx((3.28, 1.82, 5.98))
    assert found["median"] == found["mean"]  # of one task
    assert found == stratified_bootstrap([SEVEN], ["mean", "iqm", "median"], seed=1)


def test_the_interval_of_three_seeds_by_hand() -> None:
    # 27 ways to draw from 0, 3, 9: the mean is 0 in 1 (3.7%), 1 in 3, ..., 7 in 3, 9 in 1.
    low, high = stratified_bootstrap([[0, 3, 9]], ["mean"], confidence=0.95)["mean"][1:]
    assert (low, high) == (0, 9)
    low, high = stratified_bootstrap([[0, 3, 9]], ["mean"], confidence=0.9)["mean"][1:]
    assert (low, high) == (1, 7)


def test_twenty_seeds_have_scipys_interval() -> None:
    found = stratified_bootstrap([TWENTY], ["mean"], reps=50_000)["mean"]
    # scipy 1.17.1, stats.bootstrap((TWENTY,), np.mean, n_resamples=400_000, method="percentile")
    assert found == pytest.approx((-0.315, -0.6485, 0.0185), abs=0.01)


def test_intervals_of_several_tasks_are_rliables() -> None:
    # rliable 1.2.0, get_interval_estimates(reps=50_000); the tolerance is above its noise and below 1 / 10
    # of each interval.
    found = stratified_bootstrap(X, reps=20_000)
    assert list(found) == list(AGGREGATES) == list(get_args(Aggregate))
    assert found["iqm"] == pytest.approx((0.537, 0.426, 0.709), abs=0.012)
    assert found["mean"] == pytest.approx((0.86, 0.58055556, 1.19222222), abs=0.012)
    assert found["median"] == pytest.approx((0.43, 0.19666667, 0.66333333), abs=0.012)
    assert found["optimality_gap"] == pytest.approx((0.47055556, 0.39055556, 0.55333333), abs=0.006)


def test_each_task_is_resampled_by_itself() -> None:
    # Tasks far apart, seeds alike: drawn from one bag the mean would vary between 0 and 100.
    assert stratified_bootstrap([[0.0] * 5, [100.0] * 5], ["mean", "iqm"]) == {
        "mean": pytest.approx((50, 50, 50)),
        "iqm": pytest.approx((50, 50, 50)),
    }


def test_every_resample_of_two_tasks_comes_once_with_its_weight() -> None:
    scores = [[0.0, 1.0, 5.0], [2.0, 3.0]]
    drawn = [
        (np.mean(a) + np.mean(b)) / 2
        for a in itertools.product(scores[0], repeat=3)
        for b in itertools.product(scores[1], repeat=2)
    ]  # 27 * 4 draws, all equally likely
    for confidence in (0.5, 0.8, 0.95):
        tail = (1 - confidence) / 2 * len(drawn)
        _, low, high = stratified_bootstrap(scores, ["mean"], confidence=confidence)["mean"]
        assert low == pytest.approx(sorted(drawn)[math.floor(tail)])
        assert high == pytest.approx(sorted(drawn)[-1 - math.floor(tail)])


def test_a_seed_reproduces_draws_and_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first = stratified_bootstrap(X)
    assert stratified_bootstrap(X) == first
    assert stratified_bootstrap(X, seed=1)["mean"] != first["mean"]
    curves = np.random.default_rng(0).normal(size=(9, 7))
    band = curve_band(curves, "iqm")
    few = curve_band(curves[:4], "iqm")
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 5_000)
    assert stratified_bootstrap(X) == first
    np.testing.assert_allclose(curve_band(curves, "iqm"), band, rtol=1e-12)
    np.testing.assert_allclose(curve_band(curves[:4], "iqm"), few, rtol=1e-12)


def test_one_seed_has_no_interval() -> None:
    interval = stratified_bootstrap([[3.0]], ["mean"])["mean"]
    assert interval.point == 3
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert math.isnan(stratified_bootstrap([[1, 2, 3], [3]], ["iqm"])["iqm"].low)
    assert math.isnan(probability_of_improvement([[1, 2]], [[0]]).high)
    band = curve_band(np.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(band.point, [1, 2])
    assert np.isnan([band.low, band.high]).all()


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"such as 0\.95"):
        stratified_bootstrap([[1, 2]], confidence=confidence)
    with pytest.raises(ValueError, match=r"such as 0\.95"):
        wilson_interval(1, 2, confidence)


def test_a_bootstrap_needs_resamples() -> None:
    with pytest.raises(ValueError, match="reps = 0"):
        stratified_bootstrap([[1, 2]], reps=0)


@pytest.mark.parametrize(("n", "expected"), [(3, 0.75), (5, 0.84), (20, 0.93)])
def test_intervals_hold_the_truth_as_often_as_is_said(n: int, expected: float) -> None:
    """Each of 3,000 points is an experiment of its own; three standard errors are 0.015 to 0.024."""
    band = curve_band(np.random.default_rng(n).normal(3.0, 2.0, size=(n, 3_000)))
    assert ((band.low <= 3) & (band.high >= 3)).mean() == pytest.approx(expected, abs=0.025)


@given(tasks(), st.floats(0.5, 20), st.floats(-50, 50))
@settings(max_examples=40)
def test_aggregates_and_intervals_scale_and_shift_with_the_scores(
    scores: list[list[float]], scale: float, shift: float
) -> None:
    moved = [np.array(task) * scale + shift for task in scores]
    names: list[Aggregate] = ["iqm", "mean", "median"]
    before = stratified_bootstrap(scores, names, reps=200)
    after = stratified_bootstrap(moved, names, reps=200)
    for name in names:
        assert after[name] == pytest.approx(np.array(before[name]) * scale + shift, abs=1e-6)


@given(st.lists(values, min_size=2, max_size=7), st.sampled_from([0.5, 0.9, 0.95]))
@settings(max_examples=40)
def test_what_is_better_the_other_way_round_has_the_mirrored_interval(
    scores: list[float], confidence: float
) -> None:
    names: list[Aggregate] = ["iqm", "mean"]
    found = stratified_bootstrap([scores], names, confidence=confidence)
    mirrored = stratified_bootstrap([[-score for score in scores]], names, confidence=confidence)
    for name in names:
        point, low, high = found[name]
        assert mirrored[name] == pytest.approx((-point, -high, -low), abs=1e-9)


@given(tasks(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_seeds_plays_no_part(scores: list[list[float]], random: Random) -> None:
    shuffled = [random.sample(task, len(task)) for task in scores]
    assert stratified_bootstrap(shuffled, reps=100) == stratified_bootstrap(scores, reps=100)
    taus = [-1.0, 0.0, 1.0]
    np.testing.assert_array_equal(
        performance_profile(shuffled, taus, reps=100), performance_profile(scores, taus, reps=100)
    )


@given(tasks())
@settings(max_examples=40)
def test_an_interval_holds_its_mean(scores: list[list[float]]) -> None:
    point, low, high = stratified_bootstrap(scores, ["mean"])["mean"]
    assert low - 1e-9 <= point <= high + 1e-9


# ---- probability of improvement ----


def test_probability_of_improvement_is_rliables() -> None:
    # rliable 1.2.0, metrics.probability_of_improvement; its interval with 20,000 resamples
    found = probability_of_improvement(X, Y, reps=20_000)
    assert found == pytest.approx((5 / 12, 0.21527778, 0.625), abs=0.008)
    assert found.point == pytest.approx(0.4166666666666667)


def test_ties_are_half_a_win() -> None:
    # Pairs: 1 > 0, 1 = 1, 3 > 0, 3 > 1
    assert probability_of_improvement([[1, 3]], [[0, 1]]).point == pytest.approx(3.5 / 4)
    # All draws of X and Y by hand: 11, 13 (twice), 33 against 00, 01 (twice), 11; means of wins in quarters.
    # 11-11 is the only draw of 0.5: 1 in 16. The next, 0.75, is 11-01 or 13-11 (2 and 2 in 16).
    _, low, high = probability_of_improvement([[1, 3]], [[0, 1]], confidence=0.95)
    assert (low, high) == (0.5, 1.0)
    _, low, high = probability_of_improvement([[1, 3]], [[0, 1]], confidence=0.8)
    assert (low, high) == (0.75, 1.0)


@given(tasks(min_tasks=2, max_tasks=2), tasks(min_tasks=2, max_tasks=2))
@settings(max_examples=40)
def test_one_improves_as_often_as_the_other_does_not(
    x_scores: list[list[float]], y_scores: list[list[float]]
) -> None:
    forth, back = (
        probability_of_improvement(x_scores, y_scores, reps=50),
        probability_of_improvement(y_scores, x_scores, reps=50),
    )
    assert forth.point + back.point == pytest.approx(1)
    assert 0 <= forth.low <= forth.high <= 1


# ---- performance profiles ----


def test_performance_profiles_are_rliables() -> None:
    # rliable 1.2.0, score_distributions and create_performance_profile(reps=20_000). A step is 1 / 18.
    point, low, high = performance_profile(X, THRESHOLDS, reps=20_000)
    np.testing.assert_allclose(point, [17 / 18, 11 / 18, 9 / 18, 5 / 18, 4 / 18, 1 / 18])
    np.testing.assert_allclose(low, [15 / 18, 9 / 18, 7 / 18, 3 / 18, 2 / 18, 0], atol=1e-9)
    np.testing.assert_allclose(high, [1, 12 / 18, 11 / 18, 6 / 18, 6 / 18, 3 / 18], atol=1e-9)


def test_profiles_of_averages_are_rliables() -> None:
    # rliable 1.2.0, average_score_distributions and create_performance_profile(use_score_distribution=False)
    point, low, high = performance_profile(X, THRESHOLDS, averaged=True, reps=20_000)
    np.testing.assert_allclose(point, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(low, [1, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(high, [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])


@given(tasks(min_seeds=1))
@settings(max_examples=40)
def test_the_area_above_the_profile_is_the_optimality_gap(scores: list[list[float]]) -> None:
    gamma = 10.0
    steps = np.unique([*np.concatenate([np.asarray(task) for task in scores]), gamma, -100.0])
    steps = steps[steps <= gamma]  # the profile is flat from each of these to the next
    above = performance_profile(scores, steps, reps=1).point
    assert ((1 - above)[:-1] * np.diff(steps)).sum() == pytest.approx(optimality_gap(scores, gamma), abs=1e-9)


# ---- win rates ----


@pytest.mark.parametrize(
    ("wins", "n", "confidence", "low", "high"),
    [
        # scipy 1.17.1, stats.binomtest(wins, n).proportion_ci(confidence, "wilson")
        (8, 10, 0.95, 0.4901624715366418, 0.9433178485456248),
        (8, 10, 0.9, 0.5407928056874879, 0.9314420122624679),
        (0, 10, 0.95, 0.0, 0.27753279986288926),
        (10, 10, 0.95, 0.7224672001371109, 1.0),
        (263, 500, 0.95, 0.4822016483694956, 0.5694018859265038),
    ],
)
def test_wilson_intervals_are_scipys(wins: int, n: int, confidence: float, low: float, high: float) -> None:
    assert wilson_interval(wins, n, confidence) == pytest.approx((wins / n, low, high))


def test_half_wins_lie_between_whole_ones() -> None:
    below, between, above = (wilson_interval(wins, 20) for wins in (11, 11.5, 12))
    assert between.point == 0.575
    assert below.low < between.low < above.low
    assert below.high < between.high < above.high


def test_no_comparisons_tell_nothing_and_wrong_ones_are_refused() -> None:
    assert np.isnan(wilson_interval(0, 0)).all()
    for wins in (-1, 3, math.nan):
        with pytest.raises(ValueError, match="of 2"):
            wilson_interval(wins, 2)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.01, 0.999))
def test_wilson_stays_within_0_and_1_around_the_rate(n: int, share: float, confidence: float) -> None:
    rate, low, high = wilson_interval(round(share * 2 * n) / 2, n, confidence)
    assert 0 <= low <= rate <= high <= 1
    assert low < high


# ---- curves ----


def test_the_common_grid_is_where_all_curves_are() -> None:
    curves = [([0, 5, 10], [0, 1, 2]), ([2, 12], [0, 1]), ([1, 8], [3, 3])]
    np.testing.assert_allclose(common_grid(curves, points=4), [2, 4, 6, 8])
    with pytest.raises(ValueError, match="one begins at 9, another ends at 8"):
        common_grid([*curves, ([9, 10], [0, 0])])
    with pytest.raises(ValueError, match="no curve"):
        common_grid([])


def test_curves_are_joined_by_straight_lines_and_end_where_they_end() -> None:
    aligned = align([([0, 10], [0, 5]), ([4, 4, 8], [1, 2, 4])], [0, 4, 6, 10, 11])
    nan = math.nan
    np.testing.assert_allclose(aligned, [[0, 2, 3, 5, nan], [nan, 2, 3, nan, nan]])


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_hole_in_a_curve_is_not_bridged(hole: float) -> None:
    aligned = align([([0, 2, 4, 6, 8], [0, 2, hole, 6, 8])], [0, 1, 2, 3, 4, 5, 6, 7])
    nan = math.nan
    np.testing.assert_array_equal(aligned, [[0, 1, 2, nan, nan, nan, 6, 7]])


@pytest.mark.parametrize(
    "curve", [([0, 2, 1], [0, 0, 0]), ([0, math.nan], [0, 0]), ([0, 1], [0]), ([], []), ([[0]], [[0]])]
)
def test_what_is_no_curve_is_refused(curve: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="curve"):
        align([curve], [0])
    with pytest.raises(ValueError, match="curve"):
        area_under_curve(*curve)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("seeds", [4, 9])
def test_a_band_is_the_interval_of_the_scores_at_each_point(aggregate: Aggregate, seeds: int) -> None:
    # Seeds in the same order at each point, so that both make the same draws.
    curves = np.sort(np.random.default_rng(0).normal(size=(seeds, 5)), axis=0)
    band = curve_band(curves, aggregate)
    for i, column in enumerate(curves.T):
        expected = stratified_bootstrap([column], [aggregate])[aggregate]
        assert (band.point[i], band.low[i], band.high[i]) == pytest.approx(expected)


def test_a_band_over_tasks_is_the_interval_of_their_scores_at_each_point() -> None:
    rng = np.random.default_rng(0)
    games = [np.sort(rng.normal(size=(seeds, 3)), axis=0) for seeds in (3, 5)]
    band = curve_band(games, "iqm")
    for i in range(3):
        expected = stratified_bootstrap([game[:, i] for game in games], ["iqm"])["iqm"]
        assert (band.point[i], band.low[i], band.high[i]) == pytest.approx(expected)


def test_a_band_draws_whole_curves() -> None:
    # Crossing curves whose sum is the same at both points for every draw: the bands mirror each other.
    curves = np.array([[0.0, 8.0], [1.0, 7.0], [8.0, 0.0], [3.0, 5.0]] * 3)
    band = curve_band(curves)
    np.testing.assert_allclose(band.point.sum(), 8)
    np.testing.assert_allclose(band.low + band.high[::-1], [8, 8], atol=1e-9)


def test_a_band_is_nan_where_a_seed_is() -> None:
    curves = np.array([[1.0, math.nan, 3.0, math.inf], [2.0, 2.0, 4.0, 5.0]])
    for row in curve_band(curves):
        assert np.isnan(row).tolist() == [False, True, False, True]
    assert np.isnan(curve_band(np.full((2, 3), math.nan))).all()


def test_a_wrong_matrix_is_refused() -> None:
    for curves in (np.ones(3), np.ones((0, 3)), []):
        with pytest.raises(ValueError, match=r"\(seeds, points\)"):
            curve_band(curves)
    with pytest.raises(ValueError, match="one grid"):
        curve_band([np.ones((2, 3)), np.ones((2, 4))])


def test_an_area_has_the_metrics_unit() -> None:
    assert area_under_curve([0, 10, 40], [0, 10, 10]) == pytest.approx((50 + 300) / 40)
    assert area_under_curve([100, 300], [7, 7]) == pytest.approx(7)
    assert math.isnan(area_under_curve([5], [7]))
    assert math.isnan(area_under_curve([0, 1, 2], [1, math.inf, 1]))


def test_steps_to_a_threshold_are_those_of_the_first_measurement_past_it() -> None:
    x, y = [0, 10, 20, 30], [math.nan, 5, 3, 9]
    assert steps_to_threshold(x, y, 4) == 10
    assert steps_to_threshold(x, y, 9) == 30
    assert math.isnan(steps_to_threshold(x, y, 10))
    assert steps_to_threshold(x, y, 3, lower_is_better=True) == 20
    assert math.isnan(steps_to_threshold(x, y, 2, lower_is_better=True))


def test_runs_that_never_reach_the_threshold_are_the_latest() -> None:
    fast, slow, never = ([0, 10], [0, 1]), ([0, 90], [0, 1]), ([0, 99], [0, 0])
    assert median_steps_to_threshold([fast, slow, never], 1) == (90, 2, 3)
    assert median_steps_to_threshold([fast, slow], 1) == (50, 2, 2)
    median_step, reached, total = median_steps_to_threshold([fast, never], 1)
    assert math.isnan(median_step)
    assert (reached, total) == (1, 2)


@given(st.integers(1, 8), st.integers(1, 30), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_aligning_to_its_own_x_changes_nothing(curves: int, points: int, random: Random) -> None:
    x = np.array(sorted(random.sample(range(1000), points)), np.float64)
    y: Array = np.array([[random.gauss(0, 1) for _ in x] for _ in range(curves)])
    np.testing.assert_array_equal(align([(x, row) for row in y], x), y)
