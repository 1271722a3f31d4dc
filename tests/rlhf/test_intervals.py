"""Intervals over prompts: by hand, against known cases, and how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.interval_coverage import coverage
from rlhf import intervals


def test_one_answer_a_prompt_is_wilsons_interval_with_students_quantile() -> None:
    """50 of 100: the score interval of Wilson 1927 at z = t(0.975, 99) = 1.984217, and all of them count.

    The variance between 100 prompts of 0 or 1 is p (1 - p) / 99, so they are worth 99 independent ones.
    """
    found = intervals.fraction(np.array([0.0, 1.0] * 50), 100)
    z2, n = 1.984217**2, 99
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(0.25 / n + z2 / (4 * n**2))
    assert found["mean"] == 0.5
    assert found["low"] == pytest.approx(0.5 - half, abs=1e-6)
    assert found["high"] == pytest.approx(0.5 + half, abs=1e-6)


def test_answers_to_one_prompt_are_no_independent_evidence() -> None:
    """Each prompt won or lost as a whole: ten answers to it say no more than one."""
    prompts = np.array([0.0, 1.0] * 5)
    assert intervals.fraction(prompts, 100) == intervals.fraction(prompts, 10)
    wide = intervals.fraction(prompts, 100)
    assert wide["high"] - wide["low"] > 0.5


def test_prompts_that_agree_are_worth_all_their_answers_and_no_more() -> None:
    found = intervals.fraction(np.full(10, 0.5), 100)
    assert found["low"] == pytest.approx(0.39, abs=0.02)
    assert found == intervals.fraction(np.full(10, 0.5), 100)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_won_is_no_certainty(value: float) -> None:
    """Of 20 prompts all won: Wilson's bound for 20 of 20 with t(0.975, 19) = 2.093 is 20 / (20 + t^2)."""
    found = intervals.fraction(np.full(20, value), 300)
    other = found["low"] if value else 1 - found["high"]
    assert found["mean"] == value
    assert other == pytest.approx(20 / (20 + 2.093024**2), abs=1e-6)


def test_of_one_prompt_nothing_is_known_about_others() -> None:
    assert intervals.fraction(np.array([0.7]), 15) == {"mean": 0.7, "low": 0.0, "high": 1.0}
    assert intervals.mean(np.array([3.0])) == {"mean": 3.0, "low": None, "high": None}


def test_a_mean_has_students_interval() -> None:
    """1, 2, 3, 4: mean 2.5, standard error 0.645497, t(0.975, 3) = 3.182446."""
    found = intervals.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["mean"] == 2.5
    assert found["high"] - 2.5 == pytest.approx(0.645497 * 3.182446, abs=1e-5)
    assert 2.5 - found["low"] == pytest.approx(found["high"] - 2.5)


def test_a_ratio_of_proportional_numbers_is_exact() -> None:
    below = np.array([1.0, 5.0, 2.0])
    found = intervals.ratio(3 * below, below)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([3, 3, 3])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 500))
def test_an_interval_of_a_fraction_holds_it_and_is_one(wins: list[int], answers: int) -> None:
    found = intervals.fraction(np.array(wins) / 12, max(answers, len(wins)))
    assert 0 <= found["low"] <= found["mean"] + 1e-12
    assert found["mean"] <= found["high"] + 1e-12 <= 1 + 2e-12
    mirrored = intervals.fraction(1 - np.array(wins) / 12, max(answers, len(wins)))
    assert mirrored["low"] == pytest.approx(1 - found["high"])


@pytest.mark.parametrize(("prompts", "answers"), [(20, 15), (20, 5), (4, 2)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("logit", [0.0, 1.5, 3.0])
def test_intervals_hold_the_truth_as_often_as_they_say(
    prompts: int, answers: int, spread: float, logit: float
) -> None:
    """Of 400 evaluations at least 92%: 95% less three standard errors. The benchmark's are 2,000."""
    assert coverage(prompts, answers, spread, logit, repetitions=400, seed=1) >= 0.92
