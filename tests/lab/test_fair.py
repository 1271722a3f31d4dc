"""What is compared is comparable: groups, budgets, seeds, tasks and axes, each as untidy as runs are."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import grouping, report, report_page
from lab.compare import Comparison, Question, compare
from lab.errors import LabError
from lab.records import Record, Series, _definitions, load, read_columns
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"


def run(
    name: str,
    config: Mapping[str, Any],
    ys: list[float],
    xs: list[float] | None = None,
    metric: str = METRIC,
    **more: Any,
) -> Record:
    x = np.arange(len(ys), dtype=float) if xs is None else np.array(xs, float)
    series = {metric: Series(x, np.array(ys, float))}
    about: dict[str, Any] = {"metrics": frozenset(series), "job_type": "train", **more}
    return Record(id=name, name=name, source=name, config=dict(config), series=series, **about)


def seeds(label: str, config: Mapping[str, Any], scores: list[float], **more: Any) -> list[Record]:
    return [run(f"{label}{s}", {"seed": s, **config}, [score], **more) for s, score in enumerate(scores)]


def ask(records: list[Record], **options: Any) -> Comparison:
    return compare(records, Question(**{"metric": METRIC, **options}))


def said(comparison: Comparison, text: str) -> bool:
    return any(text in note for note in comparison.notes)


# ---- groups ----


@pytest.mark.parametrize(
    ("key", "a", "b"),
    [
        *(("group_size", 1, 8), ("group_by_length", True, False), ("seed_episodes", 1, 8)),
        *(("name_or_path", "gpt2", "opt"), ("wandb_alpha", 1, 2), ("device_batch", 1, 2)),
        *(("x", 1, "1"), ("x", None, "null"), ("x", True, "true"), ("x", True, 1), ("x", [1], "[1]")),
        *(("x", "a", "a "), ("x", "", None), ("x", {"a": 1}, '{"a": 1}'), ("labeler.name", "vader", "judge")),
    ],
)
@pytest.mark.parametrize("by", [False, True])
def test_two_settings_are_two_groups(key: str, a: Any, b: Any, by: bool) -> None:
    records = seeds("a", {key: a}, [1, 2, 3]) + seeds("b", {key: b}, [4, 5, 6])
    groups = ask(records, by=(key,) if by else ()).groups
    assert [group.n for group in groups] == [3, 3]
    assert len({group.label for group in groups}) == 2


def test_a_key_that_is_absent_is_not_null() -> None:
    records = seeds("a", {"lr": None}, [1, 2, 3]) + seeds("b", {}, [4, 5, 6])
    assert sorted(group.label for group in ask(records, by=("lr",)).groups) == ["lr=-", "lr=null"]


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists)
)
def test_canonical_values_are_json_and_tell_values_apart(value: Any) -> None:
    text = grouping.canonical(value)
    json.loads(text)
    if not isinstance(value, str):
        assert text != grouping.canonical(text)


def test_floats_are_short_and_noise_in_their_last_digits_makes_no_group() -> None:
    records = seeds("a", {"lr": 0.00015000000000000001}, [1, 2, 3])
    records += [run("x", {"seed": 9, "lr": 0.00015}, [2.0])]
    (group,) = ask(records, by=("lr",)).groups
    assert group.label == "lr=0.00015"


def stock_sb3(algo: str, lr: float, seed: int, number: int) -> dict[str, Any]:
    """What SB3's WandbCallback leaves in a config: every attribute of the model as text."""
    at = f"0x7f{number:010x}"
    return {
        **{"algo": algo, "learning_rate": lr, "seed": seed, "device": "cpu", "verbose": 1},
        **{"policy_class": f"<class 'stable_baselines3.{algo}.policies.CnnPolicy'>"},
        **{"start_time": 1796032035467621300 + number, "tensorboard_log": f"runs/{number}"},
        **{"env": f"<stable_baselines3.common.vec_env.VecTransposeImage object at {at}>"},
        **{"rollout_buffer": f"<stable_baselines3.common.buffers.RolloutBuffer object at {at}>"},
        **{"_last_obs": f"[[{number}.5 -0.0{seed}]\n [0.1 0.2]]", "_logger": f"<Logger object at {at}>"},
        **{"policy": f"ActorCriticPolicy(\n  (net): Linear(4, 64)\n  {algo} " + "x" * 300 + ")"},
        **{"lr_schedule": f"<function get_schedule_fn.<locals>.func at {at}>", "_n_updates": 0},
    }


def test_stock_sb3_runs_are_grouped_by_what_was_set() -> None:
    records = [
        run(f"{algo}{lr}{seed}", stock_sb3(algo, lr, seed, index * 7 + seed), [float(seed + index)])
        for index, (algo, lr) in enumerate([("ppo", 3e-4), ("ppo", 1e-3), ("a2c", 3e-4)])
        for seed in range(3)
    ]
    comparison = ask(records)
    assert [group.n for group in comparison.groups] == [3, 3, 3]
    for group in comparison.groups:
        assert len(group.label) <= 64
        assert "object at" not in group.label
    assert {"algo", "learning_rate"} <= set(comparison.differences)
    assert not {"start_time", "tensorboard_log", "_last_obs"} & set(comparison.differences)
    text = report.markdown([comparison])
    assert len(text) < 4000
    assert all(len(cell) <= 64 for values in comparison.differences.values() for cell in values.values())


def test_stock_hugging_face_runs_are_grouped_by_what_was_set() -> None:
    def config(lr: float, seed: int) -> dict[str, Any]:
        name = f"./out/lr{lr}-{seed}"
        return {
            **{
                "learning_rate": lr,
                "seed": seed,
                "output_dir": name,
                "run_name": name,
                "logging_dir": f"{name}/runs",
            },
            **{"_name_or_path": "gpt2", "group_by_length": False, "data_seed": None},
        }

    records = [run(f"{lr}{s}", config(lr, s), [lr + s]) for lr in (0.1, 0.2) for s in range(3)]
    assert [(g.label, g.n) for g in ask(records).groups] == [
        ("learning_rate=0.2", 3),
        ("learning_rate=0.1", 3),
    ]


def test_a_random_search_is_not_one_group() -> None:
    """Each run has a learning rate of its own: these are settings, however few share one."""
    records = [run(f"r{i}", {"seed": 0, "lr": 0.1 + i / 7, "opt": f"opt{i}"}, [float(i)]) for i in range(5)]
    assert len(ask(records).groups) == 5


@pytest.mark.parametrize("where", [("lr=0.1",), ("lr=0.1", "seed=0,1,2"), ("lr=1e-1",)])
def test_where(where: tuple[str, ...]) -> None:
    records = seeds("a", {"lr": 0.1}, [1, 2, 3, 4]) + seeds("b", {"lr": 0.2}, [4, 5, 6])
    (group,) = ask(records, where=where).groups
    assert group.n == (3 if len(where) > 1 else 4)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("lr", "write KEY=VALUE"),
        ("lrr=1", "Did you mean 'lr'?"),
        ("lr=7", "no run has it. There are: 0.1, 0.2."),
    ],
)
def test_where_that_means_nothing(where: str, message: str) -> None:
    records = seeds("a", {"lr": 0.1}, [1.0]) + seeds("b", {"lr": 0.2}, [4.0])
    with pytest.raises(LabError) as error:
        ask(records, where=(where,))
    assert message in str(error.value)


# ---- seeds ----


def test_a_seed_run_twice_counts_once() -> None:
    records = seeds("a", {"lr": 1}, [1, 2, 3])
    again = [run(f"copy{r.name}", r.config, [float(r.series[METRIC].y[0])]) for r in records]
    (group,) = ask(records + again).groups
    assert group.n == 3
    assert said(ask(records + again), "3 runs repeat the seed of one with the same config, and count once")
    # Another setting is another run, also in one group.
    other = seeds("b", {"lr": 2}, [4, 5, 6])
    (pooled,) = ask(records + other, by=("job_type",)).groups
    assert report.runs(pooled) == "6 of 3 seeds"


@pytest.mark.parametrize(
    ("places", "n_groups"),
    [
        (["/a/x.csv", "/a/y.csv"], 2),
        (["/a/x.csv", "/b/x.csv"], 1),
        (["C:\\a\\x.csv", "C:\\a\\y.csv"], 2),
    ],
)
def test_runs_of_different_files_are_no_reruns(places: list[str], n_groups: int) -> None:
    """Where a run wrote to is no setting, nor is where its data lay, but which they were."""
    records = [
        run(f"r{i}", {"seed": 0, "data.source": place, "run_dir": f"/out/{i}"}, [i])
        for i, place in enumerate(places)
    ]
    compared = ask(records)
    assert len(compared.groups) == n_groups
    assert said(compared, "repeat the seed") == (n_groups == 1)


@pytest.mark.parametrize(
    ("key", "n_groups"),
    [
        *(("corpus", 2), ("train_path", 2), ("model.reward_model", 2), ("tokenizer_file", 2)),
        *(("my_output", 1), ("run_dir", 1), ("best_ckpt", 1), ("video_folder", 1)),
    ],
)
def test_a_file_of_any_name_that_a_run_reads_is_a_setting(key: str, n_groups: int) -> None:
    """Two runs of one seed on other data counted as one run, the second left out as its repetition."""
    records = [run(name, {"seed": 0, key: f"/data/{name}.txt"}, [1.0]) for name in ("a", "b")]
    assert len(ask(records).groups) == n_groups
    # Where the seeds or the settings tell the runs apart, a path of each run's own is where it writes to.
    grid = [
        run(f"{lr}{s}", {"seed": s, "lr": lr, key: f"/x/{lr}{s}.txt"}, [1.0])
        for lr in (1, 2)
        for s in range(3)
    ]
    assert [group.n for group in ask(grid).groups] == [3, 3]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(lambda s: {"experiment.seed": s}, id="nested"),
        pytest.param(lambda s: {"manual_seed": s}, id="another word"),
        pytest.param(lambda s: {"hparams.random_state": s, "seed": None}, id="beside a seed of null"),
        pytest.param(lambda s: {"env.seed": s, "eval.seed": s + 1000}, id="two"),
        pytest.param(lambda s: {"train_cfg.seed": s, "split.random_state": 42}, id="beside a constant"),
    ],
)
def test_a_seed_of_another_name_is_the_seed(seed: Callable[[int], dict[str, Any]]) -> None:
    """Else each run is a group of its own."""
    records = [run(f"{lr}{s}", {"lr": lr, **seed(s)}, [lr + s]) for lr in (1, 2) for s in range(3)]
    compared = ask(records)
    assert [(group.label, group.seeds) for group in compared.groups] == [("lr=2", 3), ("lr=1", 3)]
    assert said(compared, "taken for the seed: ")
    again = [run(f"again{r.name}", r.config, [1.0]) for r in records]
    assert said(ask(records + again), "6 runs repeat the seed of one with the same config")


def test_a_constant_called_seed_makes_no_reruns() -> None:
    """The runs' own seeds are not in their configs: they are different runs."""
    records = [run(f"r{i}", {"data.seed": 42, "lr": 1}, [float(i)]) for i in range(4)]
    (group,) = ask(records).groups
    assert group.n == 4


def test_a_seed_that_is_asked_for_stays_a_key() -> None:
    records = [run(f"r{i}", {"data.seed": i}, [float(i)]) for i in range(3)]
    groups = ask(records, by=("data.seed",)).groups
    assert [group.label for group in groups] == [f"seed={i}" for i in (2, 1, 0)]


@pytest.mark.parametrize("key", ["env_name", "gym_id", "env", "environment.name", "task_name"])
def test_games_are_not_pooled_whatever_their_key_is_called(key: str) -> None:
    records = [
        run(f"{a}{g}{s}", {"algo": a, key: g, "seed": s}, [scale * (1 + (a == "pqn") / 9) + s])
        for a in ("dqn", "pqn")
        for g, scale in (("Pong", 20), ("Breakout", 400))
        for s in range(3)
    ]
    for by in ((), ("algo",)):
        compared = ask(records, by=by)
        assert compared.task_key == key
        assert compared.tasks == ("Breakout", "Pong")
        assert len(compared.groups) == 2
        assert compared.normalized


def test_a_run_continued_in_another_folder_is_one_run() -> None:
    records = [run("first", {"seed": 0}, [0, 1, 2], xs=[0, 10, 20])]
    records += [run("second", {"seed": 0}, [2.5, 3, 4], xs=[20, 30, 40])]
    (group,) = ask(records, score="last").groups
    assert (group.n, group.mean) == (1, 4.0)
    (one,) = group.records
    assert one.series[METRIC].x.tolist() == [0, 10, 20, 30, 40]
    assert one.series[METRIC].y.tolist() == [0, 1, 2.5, 3, 4]


def test_seeds_that_are_missing_are_said() -> None:
    comparison = ask(seeds("a", {"lr": 1}, [1, 2, 3, 4]) + seeds("b", {"lr": 2}, [1, 2]))
    assert said(comparison, "lr=2: lacks the seeds 2, 3, which other groups have")
    nameless = [run(f"n{i}", {"lr": 1}, [float(i)]) for i in range(3)]
    (group,) = ask(nameless).groups
    assert report.runs(group) == "3"


# ---- budgets ----


def curve(
    name: str, lr: int, seed: int, end: int, slope: float = 0.01, every: int = 100, **more: Any
) -> Record:
    xs = list(range(every, end + 1, every))
    return run(
        name, {"lr": lr, "seed": seed}, [slope * x + seed / 10 for x in xs], xs=[*map(float, xs)], **more
    )


def half_trained(state: str) -> list[Record]:
    whole = [curve(f"a{s}", 1, s, 1000) for s in range(3)]
    return whole + [curve(f"b{s}", 2, s, 500, state=state) for s in range(3)]


@pytest.mark.parametrize("state", ["crashed", "failed", "running", "interrupted"])
@pytest.mark.parametrize("score", ["final", "last", "best", "auc"])
def test_half_trained_runs_are_compared_up_to_where_they_came(state: str, score: str) -> None:
    comparison = ask(half_trained(state), score=score)
    a, b = comparison.groups
    assert a.mean == pytest.approx(b.mean)
    assert "Not settled" in report.headline(comparison)
    assert said(
        comparison, "compared up to step 500, the largest that all runs reached: b0, b1, b2 ended there"
    )
    assert b.unfinished == {state: 3} or a.unfinished == {state: 3}


def test_a_threshold_counts_within_the_common_budget() -> None:
    """Else those that were stopped early `never` come so far, and those that went on do."""
    records = [run(f"a{s}", {"seed": s, "alg": "a"}, list(range(11))) for s in range(3)]
    records += [run(f"b{s}", {"seed": s, "alg": "b"}, list(range(5))) for s in range(3)]
    for r in records:
        r.series["time/elapsed_seconds"] = Series(np.arange(11.0), 10 * np.arange(11.0))

    def reached(threshold: float, **more: Any) -> list[tuple[int, int]]:
        groups = ask(records, threshold=threshold, **more).groups
        return [
            (g.threshold_steps.reached, g.threshold_seconds.reached)
            for g in groups
            if g.threshold_steps and g.threshold_seconds
        ]

    assert reached(4.0) == [(3, 3), (3, 3)]
    assert reached(5.0) == [(0, 0), (0, 0)]
    assert sorted(reached(5.0, until="end")) == [(0, 0), (3, 3)]


def test_up_to_a_step_that_is_asked_for() -> None:
    records = half_trained("crashed")
    at = ask(records, until="300", score="last")
    assert {round(group.mean, 6) for group in at.groups} == {3.1}
    late = ask(records, until="800")
    assert [group.n for group in late.groups] == [3, 0]
    assert said(late, "b0, b1, b2: did not reach step 800; not counted")
    assert "lr=2 has no score" in report.headline(late)
    own = ask(records, until="end")
    assert said(own, "unequal budgets: runs count to their own ends, from 500 to 1,000 steps")
    with pytest.raises(LabError, match="--until soon: must be a step, or end"):
        ask(records, until="soon")


def test_steps_of_different_kinds_cut_nothing_off() -> None:
    """Ten epochs are no budget of ten optimizer steps."""
    records = [
        run(f"{kind}{s}", {"kind": kind, "seed": s}, [0.1 * i + s / 100 for i in range(1, 11)], xs, **about)
        for kind, scale in (("epoch", 1.0), ("optimizer_steps", 100.0))
        for s in range(3)
        for xs, about in [([scale * i for i in range(1, 11)], {"x_axis": kind})]
    ]
    for score in ("final", "last", "best"):
        comparison = ask(records, by=("kind",), score=score)
        assert [group.mean for group in comparison.groups] == pytest.approx([1.01, 1.01])
        assert not any(group.diverged for group in comparison.groups)
        assert said(comparison, "the steps count different things (epoch, optimizer_steps): runs count to")


def test_too_few_values_are_no_divergence() -> None:
    records = [run("a", {"lr": 1}, [1.0, 2.0], xs=[1, 2]), run("b", {"lr": 2}, [3.0, 4.0], xs=[5, 9])]
    comparison = ask(records, until="2")
    assert [(group.n, group.diverged) for group in comparison.groups] == [(1, 0), (0, 0)]
    assert said(comparison, "b: has 0 values up to step 2, too few for final; not counted")
    comparison = ask([run("a", {"lr": 1}, [1.0]), run("b", {"lr": 2}, [2.0])], score="auc")
    assert said(comparison, "a, b: has 1 values, too few for auc; not counted")


def test_rounding_of_the_last_step_is_no_other_budget() -> None:
    records = [curve("a", 1, 0, 1000, every=100), curve("b", 2, 0, 1005, every=201)]
    assert not said(ask(records), "compared up to")


def test_the_best_of_more_evaluations_is_no_better() -> None:
    rng = np.random.default_rng(0)

    def noisy(name: str, lr: int, seed: int, number: int) -> Record:
        xs = np.linspace(0, 1000, number)
        return run(name, {"lr": lr, "seed": seed}, list(20 + rng.normal(0, 2, number)), xs=list(xs))

    often = [noisy(f"a{s}", 1, s, 101) for s in range(8)]
    seldom = [noisy(f"b{s}", 2, 100 + s, 5) for s in range(8)]
    comparison = ask(often + seldom, score="best")
    assert "Not settled" in report.headline(comparison)
    assert abs(comparison.groups[0].mean - comparison.groups[1].mean) < 1.5
    assert said(comparison, "evaluated 5 to 101 times: all count at the steps of the one with the fewest")
    # A run that diverged early has few values, and says nothing of where the others are to be measured.
    gone = run("gone", {"lr": 1, "seed": 99}, [0.0, math.nan], xs=[0, 10])
    with_it = ask([*often, *seldom, gone], score="best")
    before, after = ({k: v for g in of.groups for k, v in g.compared.items()} for of in (comparison, with_it))
    assert {**after, **before} == after


@pytest.mark.parametrize("score", ["final", "last", "best", "auc"])
def test_one_curve_logged_more_often_is_no_other_curve(score: str) -> None:
    """The mean of the last tenth of a falling loss lags, if the tenth holds more than its last value."""
    metric, steps = "train/loss", np.arange(1000.0)
    often = [
        run(f"a{s}", {"x": "a", "seed": s}, list(5 - steps / 250), xs=list(steps), metric=metric)
        for s in range(3)
    ]
    seldom = [
        run(
            f"b{s}",
            {"x": "b", "seed": s},
            list(5 - steps[99::100] / 250),
            xs=list(steps[99::100]),
            metric=metric,
        )
        for s in range(3)
    ]
    a, b = ask(often + seldom, metric=metric, score=score).groups
    assert a.mean == pytest.approx(b.mean)
    assert a.auc == pytest.approx(b.auc)


def test_runs_to_their_own_ends_are_not_cut_by_the_one_with_the_fewest_values() -> None:
    long = [run(f"a{s}", {"x": "a", "seed": s}, list(range(101))) for s in range(3)]
    short = [run(f"b{s}", {"x": "b", "seed": s}, [0.0, 1.0]) for s in range(3)]
    for score in ("best", "final", "last"):
        compared = ask(long + short, score=score, until="end")
        assert {group.label: group.mean for group in compared.groups}["x=a"] >= 95


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_is_not_better_for_its_failures(value: float) -> None:
    steady = seeds("a", {"lr": 1}, [10.0, 10.1, 9.9, 10.2, 9.8])
    fragile = seeds("b", {"lr": 2}, [10.5, 10.6, value, value, 10.4])
    comparison = ask(steady + fragile, paired="off")
    b = next(group for group in comparison.groups if group.label == "lr=2")
    assert (b.n, b.diverged) == (5, 2)
    assert "2 diverged" in report.runs(b)
    assert "is better than" not in report.headline(comparison)
    assert said(comparison, "counts with the worst score of all, 9.8")


# ---- tasks ----


def games(scores: Mapping[str, Mapping[str, list[float]]]) -> list[Record]:
    return [
        run(f"{a}{g}{s}", {"algo": a, "env.game": g, "seed": s}, [score])
        for a, of in scores.items()
        for g, values in of.items()
        for s, score in enumerate(values)
    ]


def test_the_game_is_the_task_and_games_of_other_units_weigh_alike() -> None:
    records = games(
        {
            "dqn": {"pong": [20.0, 21.0, 19.0], "seaquest": [2000.0, 2500.0, 2200.0]},
            "pqn": {"pong": [10.0, 11.0, 9.0], "seaquest": [2100.0, 2600.0, 2300.0]},
        }
    )
    comparison = ask(records)
    assert comparison.task_key == "env.game"
    assert [group.label for group in comparison.groups] == ["algo=dqn", "algo=pqn"]
    assert comparison.normalized
    assert said(
        comparison, "scores of each env.game are scaled to 0 for its lowest run and 1 for its highest"
    )
    dqn = comparison.groups[0]
    assert dqn.mean == pytest.approx((11 / 12 + (700 / 3) / 600) / 2)
    assert dqn.task_means == pytest.approx({"pong": 20.0, "seaquest": 6700 / 3})
    plain = ask(records, normalize="none")
    assert said(plain, "averaged as they are, whatever their units")
    assert plain.groups[0].label == "algo=pqn"


def test_groups_of_different_games_are_not_compared() -> None:
    comparison = ask(games({"dqn": {"pong": [20.0, 21.0, 19.0]}, "pqn": {"breakout": [300.0, 301.0, 299.0]}}))
    assert report.headline(comparison).startswith("Not comparable: no env.game is common to all groups")
    assert all(group.difference is None for group in comparison.groups)


def test_mean_and_iqm_weigh_games_alike_however_many_runs_each_has() -> None:
    rows = {"dqn": {"a": [0.0] * 2, "b": [1.0] * 8}, "pqn": {"a": [0.0] * 5, "b": [1.0] * 5}}
    for group in ask(games(rows), normalize="none").groups:
        assert group.mean == group.estimates["iqm"].point == group.median == 0.5


# ---- directions and baselines ----


def test_a_direction_nobody_knows_is_asked_for_and_wandbs_word_is_taken() -> None:
    records = seeds("a", {"lr": 1}, [1, 2, 3], metric="eval/zork") + seeds(
        "b", {"lr": 2}, [4, 5, 6], metric="eval/zork"
    )
    with pytest.raises(LabError, match="--goal maximize or --goal minimize"):
        ask(records, metric="eval/zork")
    told = [Record(**{**vars(r), "goals": {"eval/zork": "minimize"}}) for r in records]
    comparison = ask(told, metric="eval/zork")
    assert (comparison.groups[0].label, comparison.why_direction) == ("lr=1", "told to W&B")
    assert ask(told, metric="eval/zork", goal="maximize").groups[0].label == "lr=2"


def test_no_outcome_chooses_the_baseline() -> None:
    good, bad = [9.0, 9.1, 9.2], [1.0, 1.1, 1.2]
    for a, b in ((good, bad), (bad, good)):
        comparison = ask(seeds("a", {"lr": 1}, a) + seeds("b", {"lr": 10}, b) + seeds("c", {"lr": 2}, a))
        assert (comparison.baseline, comparison.why_baseline) == ("lr=1", "the first by name")
    # Numbers in the order of their size, and a group without a score last.
    empty = [run("e", {"lr": 0.5, "seed": 0}, [], metric="other")]
    assert ask(empty + seeds("a", {"lr": 1}, good)).baseline == "lr=1"


@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=4), min_size=2, max_size=4), st.booleans())
def test_the_headline_never_contradicts_the_table(scores: list[list[float]], less: bool) -> None:
    records = [r for i, of in enumerate(scores) for r in seeds(f"g{i}-", {"lr": i}, of)]
    comparison = ask(records, goal="minimize" if less else "maximize", reps=1)
    told = report.headline(comparison)
    means = [group.mean for group in comparison.groups]
    assert means == sorted(means, reverse=not less)
    verdicts = [
        report.verdict(group.difference, less) for group in comparison.groups if group.difference is not None
    ]
    base = next(i for i, group in enumerate(comparison.groups) if group.difference is None)
    assert set(verdicts[:base]) <= {"better", "not settled"}
    assert set(verdicts[base:]) <= {"worse", "not settled"}
    assert ("etter than" in told or "Worse than" in told) == bool({"better", "worse"} & set(verdicts))
    assert "probability" not in told


# ---- axes ----


def test_rows_without_the_steps_stand_where_they_belong() -> None:
    rows: list[dict[str, Any]] = [
        {"_step": i, **({"global_step": 10 * i} if i % 2 == 0 else {}), "a": float(i)} for i in range(20)
    ]
    found = read_columns(rows, ["a"])
    # The last has no row with steps after it: it takes the place of the one before.
    assert found.series["a"].x.tolist() == [10.0 * i for i in range(19)]
    assert found.series["a"].y[-1] == 19
    assert any("10 values of a without global_step" in note for note in found.notes)


def test_steps_that_begin_again_are_said() -> None:
    rows = [{"global_step": s, "a": 1.0 + s} for s in (0, 1, 2, 0, 1, 2)]
    found = read_columns(rows, ["a"])
    assert found.series["a"].x.size == 3
    assert any("begin again at 0: 3 values logged before do not count" in note for note in found.notes)


def test_values_of_one_step_are_said() -> None:
    """Environments side by side, whose episodes end together."""
    rows = [{"global_step": s, "a": float(i)} for i, s in enumerate([8, 16, 16, 16, 24])]
    found = read_columns(rows, ["a"])
    assert found.series["a"].y.tolist() == [0, 3, 4]
    assert found.notes == ["2 values of a have the step of the one behind them and do not count"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_an_axis_that_falls_is_joined(values: list[float]) -> None:
    record = run("r", {"seed": 0}, [float(i) for i in range(len(values))])
    record.series["episode"] = Series(np.arange(len(values), dtype=float), np.array(values))
    over = record.over(METRIC, "episodes")
    assert (np.diff(over.x) >= 0).all()
    assert record.restarts("episodes") == int((np.diff(values) < 0).sum())


@pytest.mark.parametrize("axis", ["time", "episodes", "tokens", "frames"])
def test_a_clock_set_back_is_a_note(axis: str) -> None:
    from lab.records import AXES

    records = [curve(f"a{s}", 1, s, 500) for s in range(2)]
    for record in records:
        x = record.series[METRIC].x
        record.series[AXES[axis]] = Series(x, np.array([10.0, 20.0, 5.0, 15.0, 25.0]))
    comparison = ask(records, axis=axis, threshold=2.0)
    assert said(comparison, f"a0, a1: {axis} falls once; it goes on from where it was")
    assert comparison.groups[0].curve is not None


def test_define_metric_is_honoured_offline_and_as_the_server_keeps_it() -> None:
    server = [
        {"1": "train/global_step"},
        {"2": "*", "5": 1, "6": [1]},
        {"1": "wer", "7": [1]},
        {"1": "x", "8": 2},
    ]
    laid, goals = _definitions({"m": server})
    assert laid == {"*": "train/global_step"}
    assert goals == {"wer": "minimize", "x": "maximize"}
    assert _definitions({"m": "nonsense"}) == _definitions(None) == ({}, {})


@pytest.mark.timeout(120)
def test_a_stock_trainers_steps_are_those_it_told_wandb(tmp_path: Path) -> None:
    """As transformers' WandbCallback logs: everything over train/global_step, at other rows in each run."""
    import wandb

    for number, every in enumerate((2, 7)):
        with wandb.init(
            mode="offline", dir=tmp_path, config={"seed": number}, settings={"silent": True}
        ) as of:
            of.define_metric("train/global_step")
            of.define_metric("*", step_metric="train/global_step", step_sync=True)
            of.define_metric("eval/zork", summary="min")
            for step in range(1, 29):
                if step % every == 0:
                    of.log({"train/loss": 1 / step, "train/global_step": step})
                if step % 14 == 0:
                    of.log({"eval/zork": 1 / step, "train/global_step": step})
            of.summary["best_acc"] = 0.5 + number
    found = load([str(tmp_path)], ["eval/zork", "train/loss", "best_acc", "summary/best_acc"])
    assert len(found.records) == 2
    for record in found.records:
        assert record.series["eval/zork"].x.tolist() == [14, 28]
        assert record.x_axis == "train/global_step"
        assert record.goals == {"eval/zork": "minimize"}
        assert record.series["best_acc"].y[0] == record.series["summary/best_acc"].y[0] == 0.5 + record.seed
    comparison = compare(found.records, Question(metric="eval/zork"))
    assert (comparison.lower_is_better, comparison.x_label) == (True, "train/global step")


# ---- units ----


def two_games(metric: str) -> list[Record]:
    """A run a seed of two agents on two games, whose scores differ by a factor of 20."""
    return [
        run(
            f"{alg}{game}{seed}",
            {"agent.algorithm": alg, "env.game": game, "seed": seed},
            [scale * (step / 10) * better + seed * scale / 100 for step in range(11)],
            metric=metric,
        )
        for alg, better in (("dqn", 1.0), ("pqn", 1.2))
        for game, scale in (("pong", 20.0), ("breakout", 400.0))
        for seed in range(3)
    ]


def test_what_is_scaled_is_scaled_in_the_curves_too(tmp_path: Path) -> None:
    comparison = ask(two_games(METRIC), score="last")
    for group in comparison.groups:
        assert group.curve is not None
        assert group.curve.point[-1] == pytest.approx(group.mean)
        for record in group.records:
            assert group.run_curves[record.id].y[-1] == pytest.approx(group.compared[record.id])
        areas = [np.trapezoid(c.y, c.x) / np.ptp(c.x) for c in group.run_curves.values()]
        assert group.auc == pytest.approx(np.mean(areas))
    text = "eval/mean_reward (scaled)"
    assert report_page.page([comparison], "t", "c").count(text) >= 3
    report.write([comparison], tmp_path, "t", "c")
    assert text in (tmp_path / "comparison.svg").read_text()
    plain = ask(two_games(METRIC), score="last", normalize="none").groups[0]
    assert plain.auc == pytest.approx(sum(1.2 * s / 2 + s / 100 for s in (20.0, 400.0)) / 2)


def test_where_less_is_better_there_is_no_optimality_gap() -> None:
    """It would be the smaller, the worse a group is."""
    less, more = (compare(two_games(metric), Question(metric=metric)) for metric in ("eval/loss", METRIC))
    assert "optimality gap to 1" not in report.table(less)[0]
    assert "optimality gap to 1" in report.table(more)[0]
    assert "optimality_gap" not in less.groups[0].estimates
    rows = list(csv.DictReader(report.groups_csv([less]).splitlines()))
    assert [row["optimality_gap_over_tasks"] for row in rows] == ["nan", "nan"]


def test_an_area_with_a_hole_is_not_that_of_the_other_runs() -> None:
    records = [run(f"a{s}", {"seed": s}, [1.0, math.nan if s == 0 else 2.0, 3.0]) for s in range(3)]
    (group,) = ask(records).groups
    assert math.isnan(group.auc)


def test_fractions_beside_percent_are_said() -> None:
    metric = "eval/accuracy"
    records = [*seeds("a", {"x": "a"}, [0.91, 0.92, 0.9], metric=metric)]
    records += seeds("b", {"x": "b"}, [93.0, 92.0, 94.0], metric=metric)
    assert said(ask(records, metric=metric), "x=a: all values from 0 to 1; x=b: all above 1")
    assert not said(ask(records[:3], metric=metric), "all above 1")


def test_groups_that_are_games_are_said_to_be_of_other_units() -> None:
    text = "the groups differ in env.game: eval/mean_reward may have another unit"
    assert said(ask(two_games(METRIC), by=("env.game",)), text)
    assert not said(ask(two_games(METRIC)), text)


@pytest.mark.parametrize("option", ["threshold", "gamma"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_compared_with_is_a_finite_number(option: str, value: float) -> None:
    with pytest.raises(LabError, match=f"--{option} (nan|inf): must be a finite number"):
        Question(**{"metric": METRIC, option: value})


def test_the_columns_of_a_csv_file_have_a_name_each() -> None:
    comparison = ask(two_games(METRIC))
    for text in (report.groups_csv, report.runs_csv, report.curves_csv):
        heads = next(csv.reader(text([comparison]).splitlines()))
        assert len(heads) == len(set(heads))


@pytest.mark.parametrize(
    ("value", "within", "text"),
    [
        *((0.9996, 0.0, "0.9996"), (0.99961, 3e-5, "0.999610"), (0.781, 0.2, "0.781"), (1.0, 0.0, "1")),
        *((12345.12, 0.3, "12,345.12"), (12345.12, 40.0, "12,345"), (0.5, 1e-17, "0.5"), (0.0, 0.1, "0")),
        *((22.04, 0.0, "22"), (-0.91234, 0.0011, "-0.9123"), (3e8, 2e4, "3e+08"), (0.25, math.nan, "0.25")),
        *((0.99999999, 0.0, "1"), (5e-05, 1e-6, "5e-05"), (300000123.0, 20.0, "300000123")),
        *((1000000001.1, 0.25, "1000000001.1"), (0.8333333333, 1.4e-16, "0.833")),
    ],
)
def test_a_number_has_the_digits_that_show_how_well_it_is_known(
    value: float, within: float, text: str
) -> None:
    assert report.number(value, within) == text


@pytest.mark.parametrize(
    ("confidence", "text"), [(0.95, "95%"), (0.995, "99.5%"), (0.9, "90%"), (0.999, "99.9%")]
)
def test_a_confidence_is_said_as_it_is(confidence: float, text: str) -> None:
    records = [*seeds("a", {"x": "a"}, [1.0, 2, 3]), *seeds("b", {"x": "b"}, [7.0, 9, 8])]
    comparison = ask(records, confidence=confidence)
    assert f"mean [{text}]" in report.table(comparison)[0]
    assert f"({text} " in report.headline(comparison)


def test_equal_means_need_no_more_seeds() -> None:
    records = [*seeds("a", {"x": "a"}, [1.0, 2, 3]), *seeds("b", {"x": "b"}, [3.0, 1, 2])]
    assert report.headline(ask(records)).endswith("Their means are equal.")


# ---- what was measured afterwards ----


def test_held_out_evaluations_and_summaries_are_metrics(tmp_path: Path) -> None:
    for algorithm, gain in (("dqn", 0.0), ("pqn", 5.0)):
        for seed in range(3):
            folder = tmp_path / f"{algorithm}{seed}"
            made = make_run(
                folder, [(0, {METRIC: 0.0})], config={"seed": seed, "agent": {"algorithm": algorithm}}
            )
            made.summarize(best_mean_reward=gain + seed)
            rows = [
                {"mean_reward": -99.0, "episodes": 1},
                {"mean_reward": gain + seed / 10, "episodes": 10, "seed": 7},
            ]
            (folder / "evaluations.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows) + '{"torn'
            )
    for metric in ("evaluate/mean_reward", "summary/best_mean_reward"):
        found = load([str(tmp_path)], [metric])
        assert metric in found.records[0].said
        comparison = compare(found.records, Question(metric=metric, by=("agent.algorithm",)))
        assert [group.label for group in comparison.groups] == ["pqn", "dqn"]
        assert "pqn is better than dqn by 5" in report.headline(comparison)
    assert found.records[0].conditions == {"episodes": "10", "seed": "7"}
    (tmp_path / "pqn0" / "evaluations.jsonl").write_text('{"mean_reward": 5, "episodes": 100, "seed": 7}')
    found = load([str(tmp_path)], ["evaluate/mean_reward"])
    comparison = compare(found.records, Question(metric="evaluate/mean_reward", by=("agent.algorithm",)))
    assert said(comparison, "`lab evaluate` measured the runs with different episodes: 10, 100")
    assert not said(comparison, "with different seed")
    with pytest.raises(LabError, match=r"Did you mean 'evaluate/mean_reward'\?"):
        compare(found.records, Question(metric="evaluate/mean_rewrd"))


@pytest.mark.parametrize("score", ["final", "last", "best"])
def test_a_value_said_once_is_compared_with_the_end_of_those_that_log_it(tmp_path: Path, score: str) -> None:
    """It has no step: not step 0, up to which the others were compared."""
    for seed in range(3):
        logged = [(step, {METRIC: 10.0 * (step > 0) + seed}) for step in range(0, 1100, 100)]
        make_run(tmp_path / f"a{seed}", logged, config={"seed": seed, "algorithm": "a"})
        once = make_run(tmp_path / f"b{seed}", [(0, {"other": 1.0})], config={"seed": seed, "algorithm": "b"})
        once.summarize(**{METRIC: 5.0 + seed})
    question = Question(metric=METRIC, by=("algorithm",), score=score, threshold=10.5)
    comparison = compare(load([str(tmp_path)], [METRIC]).records, question)
    assert {group.label: group.mean for group in comparison.groups} == pytest.approx({"a": 11.0, "b": 6.0})
    assert said(comparison, "b0, b1, b2: says its value once, without a step, others log it")


def test_a_run_that_lacks_the_metric_is_named_with_what_it_has_instead() -> None:
    records = seeds("a", {"lr": 1}, [1, 2, 3])
    records.append(run("odd", {"lr": 1, "seed": 9}, [5.0], metric="eval/mean_rewrd"))
    assert said(ask(records), "odd: has no value of eval/mean_reward. Did you mean 'eval/mean_rewrd'?")


def test_as_json_there_is_no_nan_and_all_of_the_answer() -> None:
    comparison = ask(seeds("a", {"lr": 1}, [1.0]) + seeds("b", {"lr": 2}, [4, 5, 6]))
    (entry,) = json.loads(json.dumps(report.as_json([comparison]), allow_nan=False))
    assert entry["goal"] == "maximize"
    assert entry["answer"] == report.headline(comparison)
    a = next(group for group in entry["groups"] if group["label"] == "lr=1")
    assert a["mean"] == {"point": 1.0, "low": None, "high": None}


def test_names_from_files_neither_steer_a_terminal_nor_become_formulas(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    evil = "\x1b]0;owned\x07\x1b[2J"
    records = seeds(f"a{evil}", {"k": f"=cmd()|x{evil}"}, [1, 2, math.nan], state=f"failed{evil}")
    records += seeds("b", {"k": "+1+1"}, [4, 5, 6])
    comparison = ask(records, by=("k",))
    report.show(comparison, Console(width=200))
    out = capsys.readouterr().out
    assert "owned" in out
    assert "\x1b]" not in out
    assert "\x07" not in out
    for text in (report.groups_csv([comparison]), report.runs_csv([comparison])):
        cells = [cell for line in text.splitlines() for cell in line.split(",")]
        assert not any(cell.lstrip('"').startswith(("=", "+", "@")) for cell in cells)
