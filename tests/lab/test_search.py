"""Where a sweep looks next: grids, random draws and Bayesian search, without a run."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lab import search
from lab.errors import LabError
from lab.search import Parameter, Setting, Tried, next_setting, read_parameters


def parameters(**specs: Any) -> list[Parameter]:
    return read_parameters({key.replace("__", "."): spec for key, spec in specs.items()}, "sweep.yaml")


def tries(
    method: str,
    space: Sequence[Parameter],
    n: int,
    objective: Callable[[Setting], float | None] = lambda setting: 0.0,
    seed: int = 0,
    goal: search.Goal = "minimize",
) -> list[Tried]:
    """The first `n` settings, each valued before the next is asked for."""
    tried: list[Tried] = []
    while len(tried) < n and (setting := next_setting(method, space, goal, seed, tried)) is not None:
        tried.append(Tried(setting, objective(setting)))
    return tried


def test_a_grid_is_every_combination_once_the_last_key_changing_fastest() -> None:
    space = parameters(
        a={"values": [1, 2]}, b={"value": "x"}, c={"min": 3, "max": 5}, d={"min": 0.0, "max": 1.0, "q": 0.5}
        | {"distribution": "q_uniform"}
    )  # fmt: skip
    found = [one.setting for one in tries("grid", space, 99)]
    assert found == [
        {"a": a, "b": "x", "c": c, "d": d} for a in (1, 2) for c in (3, 4, 5) for d in (0.0, 0.5, 1.0)
    ]
    assert search.grid_size(space) == len(found) == 18


def test_a_random_search_is_the_same_again_and_another_with_another_seed() -> None:
    space = parameters(a={"min": 0.0, "max": 1.0}, b={"values": ["x", "y"]})
    ten = [one.setting for one in tries("random", space, 10)]
    assert ten == [one.setting for one in tries("random", space, 10, lambda setting: 5.0)]
    assert ten == [one.setting for one in tries("random", space, 20)][:10], "more of it begins alike"
    assert ten != [one.setting for one in tries("random", space, 10, seed=1)]
    # Known by heart, so that no change of the code changes somebody's sweep.
    assert ten[:2] == [{"a": 0.5014, "b": "x"}, {"a": 0.2921, "b": "x"}]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_what_can_be_counted_is_tried_whole_and_nothing_twice(method: str) -> None:
    space = parameters(a={"values": [1, 2, [3]]}, b={"min": 1, "max": 4}, c={"value": None})
    found = [one.setting for one in tries(method, space, 99)]
    assert len(found) == 12
    assert sorted(map(json.dumps, found)) == sorted(
        json.dumps(one.setting) for one in tries("grid", space, 99)
    )


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: float(f"{number:.6g}"))
quantiles = st.floats(0, 1, exclude_max=True)


@given(numbers, numbers, quantiles)
def test_a_uniform_number_is_within_its_range(one: float, other: float, quantile: float) -> None:
    low, high = sorted((one, other))
    if low < high:
        [parameter] = parameters(a={"min": low, "max": high, "distribution": "uniform"})
        assert low <= parameter.at(quantile) <= high
        assert parameter.at(quantile) == pytest.approx(
            low + quantile * (high - low), rel=1e-3, abs=1e-3 * max(abs(low), abs(high))
        )


@given(st.integers(-1000, 1000), st.integers(1, 1000), quantiles)
def test_a_whole_number_is_one_and_all_are_as_likely(low: int, width: int, quantile: float) -> None:
    [parameter] = parameters(a={"min": low, "max": low + width})
    value = parameter.at(quantile)
    assert type(value) is int
    assert value == low + math.floor(quantile * (width + 1))
    assert parameter.at(0) == low
    assert parameter.at(1 - 1e-9) == low + width


@given(st.floats(1e-9, 1e6), st.floats(1.01, 1e6), quantiles)
def test_a_logarithmic_number_is_within_its_range_and_half_lie_below_its_geometric_mean(
    low: float, factor: float, quantile: float
) -> None:
    [parameter] = parameters(a={"min": low, "max": low * factor, "distribution": "log_uniform_values"})
    assert low <= parameter.at(quantile) <= low * factor
    assert parameter.at(0.5) == pytest.approx(low * math.sqrt(factor), rel=1e-3)


@given(numbers, numbers, st.floats(1e-3, 1e3), quantiles, st.booleans())
def test_a_quantised_number_is_a_multiple_within_its_range(
    one: float, other: float, q: float, quantile: float, log: bool
) -> None:
    low, high = sorted((abs(one) + 1e-3, abs(other) + 1e-3) if log else (one, other))
    name = "q_log_uniform_values" if log else "q_uniform"
    assume(low < high and math.floor(high / q) > math.ceil(low / q))
    [parameter] = parameters(a={"min": low, "max": high, "q": q, "distribution": name})
    value = parameter.at(quantile)
    slack = 1e-6 * max(abs(low), abs(high), q)
    assert low - slack <= value <= high + slack
    assert abs(value / q - round(value / q)) < 1e-3
    assert type(parameter.tidy(3)) is (int if q.is_integer() else float)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"values": []}, "values = [] is not valid. Expected a list"),
        ({"values": 3}, "values = 3 is not valid"),
        ({"values": [1, 1.0]}, "1 is there twice"),
        ({"values": [float("nan")]}, "nan is not valid"),
        ({"values": [1], "value": 1}, "expected either value, or values, or min and max"),
        ({"min": 1}, "expected either value, or values, or min and max"),
        ({"min": 2, "max": 1}, "min 2 is not below max 1"),
        ({"min": "a", "max": 1}, "min = 'a' is not valid. Expected a number"),
        ({"min": True, "max": 3}, "min = True is not valid"),
        ({"min": 0, "max": 1, "distribution": "log_uniform_values"}, "min 0 must be above 0"),
        ({"min": -9.2, "max": 0, "distribution": "log_uniform"}, "themselves, here min: 0.000101, max: 1."),
        ({"min": 0, "max": 9.2, "distribution": "inv_log_uniform"}, "here min: 0.000101, max: 1."),
        (
            {"min": 0, "max": "x", "distribution": "q_log_uniform"},
            "q_log_uniform_values with the numbers themselves.",
        ),
        ({"min": 0, "max": 1e9, "distribution": "log_uniform"}, "with the numbers themselves."),
        ({"min": 1, "max": 2, "distribution": "inv_log_uniform_values"}, "the same as log_uniform_values"),
        ({"distribution": "q_log_normal", "mu": 0}, "Write q_log_uniform_values with min and max"),
        ({"distribution": "categorical_w_probabilities"}, "Write categorical, without probabilities"),
        ({"distribution": ["normal"]}, "distribution = ['normal'] is not supported"),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "probabilities: all values are drawn alike"),
        ({"min": 1, "max": 2, "distribution": "unifrom"}, "Did you mean 'uniform'?"),
        ({"distribution": "normal", "mu": 0, "sigma": 1}, "distribution = 'normal' is not supported"),
        ({"min": 0.5, "max": 2, "distribution": "int_uniform"}, "must be whole numbers"),
        ({"min": 1, "max": 2, "distribution": "categorical"}, "takes value or values"),
        ({"values": [1, 2], "distribution": "uniform"}, "values take neither q nor a distribution"),
        ({"min": 1, "max": 2, "q": 1}, "q is for q_uniform"),
        ({"min": 1, "max": 2, "q": 0, "distribution": "q_uniform"}, "q = 0 must be positive"),
        ({"min": 1.1, "max": 1.9, "distribution": "q_uniform"}, "no multiple of q = 1"),
        ({"valeus": [1]}, "unknown key 'valeus'. Did you mean 'values'?"),
        (3, "parameter a = 3 is not valid"),
        ({"parameters": {}}, "parameters.a.parameters = {} is not valid"),
    ],
)
def test_a_parameter_that_cannot_be_is_one_clear_line(spec: Any, words: str) -> None:
    with pytest.raises(LabError) as error:
        parameters(a=spec)
    assert words in str(error.value)
    assert str(error.value).startswith("sweep.yaml: ")
    assert "\n" not in str(error.value)


def test_groups_may_be_nested_as_wandb_nests_them() -> None:
    nested = {
        "agent": {"parameters": {"lr": {"value": 1}, "net": {"parameters": {"width": {"values": [1, 2]}}}}}
    }
    assert [one.key for one in read_parameters(nested, "x")] == ["agent.lr", "agent.net.width"]
    for specs, words in (
        ({"a": {"value": 1}, "a.b": {"value": 1}}, "a and a.b contradict each other"),
        ({"a.b": {"value": 1}, "a": {"parameters": {"b": {"value": 1}}}}, "a.b is there twice"),
    ):
        with pytest.raises(LabError, match=words):
            read_parameters(specs, "x")


# ---- Bayesian search ----

BOWL = {
    "lr": {"min": 1e-5, "max": 1e-1, "distribution": "log_uniform_values"},
    "x": {"min": -5.0, "max": 5.0},
    "n": {"min": 1, "max": 8},
    "kind": {"values": ["bad", "good", "worse"]},
}


def bowl(setting: Setting) -> float:
    """Best at lr 1e-3, x 2, n 3, kind good, where it is 0."""
    kind = {"good": 0, "bad": 3, "worse": 6}[setting["kind"]]
    return (
        math.log10(setting["lr"] / 1e-3) ** 2 + (setting["x"] - 2) ** 2 + 0.1 * (setting["n"] - 3) ** 2 + kind
    )


def test_bayesian_search_finds_what_random_search_does_not() -> None:
    space = parameters(**BOWL)
    best: dict[str, list[float]] = {"random": [], "bayes": []}
    for method, found in best.items():
        for seed in range(3):
            found.append(min(one.value or 0.0 for one in tries(method, space, 50, bowl, seed)))
    assert max(best["bayes"]) < min(best["random"])
    assert statistics.mean(best["bayes"]) < 0.5


def test_bayesian_search_knows_which_way_is_up() -> None:
    space = parameters(**BOWL)
    down = tries("bayes", space, 40, bowl)
    up = tries("bayes", space, 40, lambda setting: -bowl(setting), goal="maximize")
    assert [one.setting for one in down] == [one.setting for one in up]


def test_bayesian_search_follows_from_what_was_tried_alone() -> None:
    """So a sweep that was stopped goes on as if it never was."""
    space = parameters(**BOWL)
    tried = tries("bayes", space, 15, bowl)
    for n in (0, 5, 12):
        assert next_setting("bayes", space, "minimize", 0, tried[:n]) == tried[n].setting
    back = [Tried(json.loads(json.dumps(one.setting)), one.value) for one in tried[:14]]
    assert next_setting("bayes", space, "minimize", 0, back) == tried[14].setting


def test_bayesian_search_side_by_side_looks_at_different_places_and_still_finds_it() -> None:
    space = parameters(**BOWL)
    tried: list[Tried] = []
    for _ in range(15):  # four at once
        batch: list[Tried] = []
        for _ in range(4):
            setting = next_setting("bayes", space, "minimize", 0, [*tried, *batch])
            assert setting is not None
            assert setting not in [one.setting for one in [*tried, *batch]]
            batch.append(Tried(setting, pending=True))
        tried += [Tried(one.setting, bowl(one.setting)) for one in batch]
    assert min(one.value or 0.0 for one in tried) < 1.0


def test_bayesian_search_bears_failures() -> None:
    space = parameters(**BOWL)
    tried = tries("bayes", space, 60, lambda setting: None if setting["kind"] == "worse" else bowl(setting))
    assert any(one.value is None for one in tried)
    assert min(one.value for one in tried if one.value is not None) < 1.0
    assert len(tries("bayes", space, 15, lambda setting: None)) == 15, "even of everything"


@pytest.mark.parametrize("method", ["grid", "random"])
def test_a_hundred_thousand_values_are_looked_at_once_each(method: str) -> None:
    n, began = 100_000, time.process_time()
    space = search.read_parameters({"a": {"values": [*range(n)]}, "b": {"value": 1}}, "here")
    setting = search.next_setting(method, space, "maximize", 0, [search.Tried({"a": n - 1, "b": 1}, 1.0)])
    assert setting is not None
    with pytest.raises(LabError, match="7 is there twice"):
        search.read_parameters({"a": {"values": [*range(n), 7]}}, "here")
    with pytest.raises(LabError, match=r"parameters a and a\.b contradict"):
        search.read_parameters(
            {f"c{i}": {"value": 1} for i in range(n // 10)} | {"a": {"value": 1}, "a.b": {"value": 1}}, "here"
        )
    assert time.process_time() - began < 10  # it was hours


@pytest.mark.parametrize(
    "spec", [{"min": 0, "max": 10**30}, {"distribution": "q_uniform", "min": 0, "max": 1e12, "q": 1e-3}]
)
def test_a_range_is_never_written_out(spec: dict[str, Any]) -> None:
    space = search.read_parameters({"a": spec, "b": {"values": [1, 2]}}, "here")
    assert (search.grid_size(space) or 0) > 10**15
    first = next(search.grid(space) or iter(()))
    assert first == {"a": 0, "b": 1}
    assert search.next_setting("random", space, "maximize", 0, []) is not None
