"""What `lab compare` answers, and what it refuses to."""

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import cli, report, statistics
from lab.compare import Comparison, Question, compare, wanted_metrics
from lab.errors import LabError
from lab.records import Record, Series, load
from lab.report_page import page
from lab.scores import direction, score_of
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"


def record(
    name: str, ys: list[float] | None, config: Mapping[str, Any], xs: list[float] | None = None, **more: Any
) -> Record:
    series = {}
    if ys is not None:
        x = np.arange(len(ys), dtype=float) if xs is None else np.array(xs, float)
        series[METRIC] = Series(x, np.array(ys, float))
    fields: dict[str, Any] = {"job_type": "train", "x_axis": "agent_steps", **more}
    return Record(
        id=name,
        name=name,
        source=name,
        config=dict(config),
        series=series,
        metrics=frozenset(series),
        **fields,
    )


def grid(scores: Mapping[str, Mapping[str, list[float]]]) -> list[Record]:
    """A run per algorithm, game and seed, each of one score."""
    return [
        record(f"{a}-{g}-{s}", [score], {"seed": s, "env.game": g, "agent.algorithm": a, "lr": 0.1})
        for a, games in scores.items()
        for g, values in games.items()
        for s, score in enumerate(values)
    ]


def ask(records: list[Record], **options: Any) -> Comparison:
    return compare(records, Question(metric=METRIC, **options))


# ---- groups ----


def test_runs_that_differ_in_the_seed_alone_are_a_group() -> None:
    records = grid({"dqn": {"pong": [1, 2, 3]}, "pqn": {"pong": [4, 5]}})
    comparison = ask(records)
    assert [(g.label, g.n, g.seeds) for g in comparison.groups] == [
        ("algorithm=pqn", 2, 2),
        ("algorithm=dqn", 3, 3),
    ]
    assert comparison.baseline == "algorithm=dqn"


def test_by_one_key_and_by_two() -> None:
    records = grid({"dqn": {"pong": [1], "breakout": [2]}, "pqn": {"pong": [3], "breakout": [4]}})
    assert {g.label for g in ask(records, by=("agent.algorithm",)).groups} == {"dqn", "pqn"}
    two = ask(records, by=("agent.algorithm", "env.game"))
    assert {g.label for g in two.groups} >= {"algorithm=dqn, game=pong", "algorithm=pqn, game=breakout"}
    assert len(two.groups) == 4


def test_keys_that_change_no_result_make_no_group() -> None:
    records = [
        record(
            f"{threads}",
            [1.0],
            {"seed": threads, "lr": 1, "device.threads": threads, "tracking.wandb": "auto"},
        )
        for threads in (1, 2)
    ]
    assert [group.n for group in ask(records).groups] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": ("agent.algoritm",)}, "no run has such a key in its config. Did you mean 'agent.algorithm'?"),
        ({"baseline": "ppo"}, "--baseline ppo: is no group."),
        ({"baseline": "qn"}, "--baseline qn: fits 2 groups."),
        ({"score": "median"}, "--score median: is none of final, last, best, auc."),
        ({"goal": "max"}, "--goal max: is none of maximize, minimize."),
        ({"axis": "epochs"}, "--axis epochs: is none of"),
        ({"confidence": 95.0}, "--confidence 95: must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_answered(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError) as error:
        ask(grid({"dqn": {"pong": [1]}, "pqn": {"pong": [2]}}), **options)
    assert message in str(error.value)


def test_a_metric_that_no_run_has() -> None:
    with pytest.raises(LabError) as error:
        compare(grid({"dqn": {"pong": [1]}}), Question(metric="eval/mean_rewrd"))
    assert "--metric eval/mean_rewrd: none of the 1 runs has it. Did you mean 'eval/mean_reward'?" in str(
        error.value
    )


# ---- numbers ----


def test_the_numbers_of_a_group_are_those_of_its_runs() -> None:
    ys = [3.0, 1.0, 4.0, 1.0, 5.0]
    (group,) = ask(grid({"dqn": {"pong": ys}})).groups
    assert group.mean == pytest.approx(2.8)
    assert group.std == pytest.approx(np.std(ys, ddof=1))
    assert group.median == 3.0
    assert group.estimates["iqm"] == statistics.stratified_bootstrap([ys], few_seeds=True)["iqm"]
    # Student's t with 4 degrees of freedom: 2.776.
    half = 2.7764 * np.std(ys, ddof=1) / 5**0.5
    assert group.interval == pytest.approx((2.8, 2.8 - half, 2.8 + half), rel=1e-4)
    assert group.estimates["iqm"].point == pytest.approx((1 + 3 + 4) / 3)


def test_over_games_runs_are_resampled_within_each() -> None:
    scores = {"dqn": {"a": [1.0, 2, 3], "b": [10.0, 12, 14]}, "pqn": {"a": [2.0, 3, 4], "b": [9.0, 13, 14]}}
    comparison = ask(grid(scores), by=("agent.algorithm",), baseline="dqn", normalize="none")
    assert comparison.task_key == "env.game"
    assert comparison.tasks == ("a", "b")
    pqn = next(g for g in comparison.groups if g.label == "pqn")
    expected = statistics.stratified_bootstrap(list(scores["pqn"].values()), few_seeds=True)
    assert pqn.estimates["iqm"] == expected["iqm"]
    assert pqn.difference is not None
    assert (pqn.difference.wins, pqn.difference.pairs) == (4.5, 6)  # seed by seed, game by game


def test_only_games_that_all_groups_have_are_compared_and_the_rest_is_told() -> None:
    comparison = ask(
        grid({"dqn": {"a": [1], "b": [2]}, "pqn": {"a": [3], "c": [4]}}), by=("agent.algorithm",)
    )
    assert [g.n for g in comparison.groups] == [1, 1]
    assert "compared on the 1 env.game that all groups have; left out: b, c" in comparison.notes
    nothing = ask(grid({"dqn": {"a": [1]}, "pqn": {"b": [2]}}), by=("agent.algorithm",))
    assert any("no env.game is common to all groups" in note for note in nothing.notes)


def test_less_is_better_for_losses() -> None:
    losses = ((0.1, 2.0), (0.2, 1.0))
    records = [
        record(f"{lr}-{seed}", [loss + seed / 10], {"lr": lr, "seed": seed + lr * 100})
        for lr, loss in losses
        for seed in range(3)
    ]
    records = [Record(**{**vars(r), "series": {"eval/loss": r.series[METRIC]}}) for r in records]
    comparison = compare(records, Question(metric="eval/loss", by=("lr",)))
    assert [group.label for group in comparison.groups] == ["lr=0.2", "lr=0.1"]
    assert comparison.baseline == "lr=0.1"
    better = comparison.groups[0].difference
    assert better is not None
    assert (better.point, better.wins, better.pairs) == (pytest.approx(-1.0), 0, 9)
    assert report.headline(comparison).startswith("lr=0.2 is better than lr=0.1 by 1 (95% 0.7")
    turned = compare(records, Question(metric="eval/loss", by=("lr",), baseline="0.2", goal="maximize"))
    assert turned.baseline == "lr=0.2"
    assert [group.label for group in turned.groups] == ["lr=0.1", "lr=0.2"]


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        *((name, "minimize") for name in ("eval/loss", "objective/kl", "eval/wer", "rmse", "mae", "nll")),
        *((name, "minimize") for name in ("cost", "regret", "val.loss", "val-loss", "valLoss", "evalWER")),
        *((name, "maximize") for name in ("eval/mean_reward", "eval/win_rate", "testAccuracy", "eval/mAP50")),
        *((name, "maximize") for name in ("rollout/ep_rew_mean", "explained_variance", "summary/best_acc")),
        *((name, "") for name in ("eval/error_free_rate", "distance_travelled", "loss_scale", "grad_norm")),
        *((name, "") for name in ("rewards/rejected", "steps_to_success", "reward_variance", "acc_drop")),
        *((name, "") for name in ("reward_loss", "rollout/ep_len_mean", "evaluate/std_reward", "x")),
    ],
)  # fmt: skip
def test_which_way_is_better_by_the_name(metric: str, goal: str) -> None:
    assert direction(metric) == goal


@pytest.mark.parametrize(("how", "value"), [("last", 4.0), ("best", 9.0), ("final", 6.5), ("auc", 4.45)])
def test_what_a_curve_comes_down_to(how: str, value: float) -> None:
    x = np.arange(0, 11.0)
    y = np.array([0, 1, 2, 3, 4, 5, 6, 7, 5.5, 9, 4.0])
    assert score_of(Series(x, y), how) == pytest.approx(value)


def test_a_run_that_ends_in_nan_counts_as_the_worst() -> None:
    records = grid({"dqn": {"pong": [1.0, float("nan"), 3.0]}})
    records.append(record("none", None, {"seed": 9, "env.game": "pong", "agent.algorithm": "dqn", "lr": 0.1}))
    comparison = ask(records)
    (group,) = comparison.groups
    assert (group.n, group.without, group.diverged) == (3, 1, 1)
    assert group.mean == pytest.approx((1 + 1 + 3) / 3)
    assert any(note.startswith("dqn-pong-1: diverged") for note in comparison.notes)
    assert f"none: has no value of {METRIC}" in comparison.notes
    assert report.runs(group) == "3 (1 diverged, 1 without a value)"


def test_runs_that_did_not_finish_are_counted_and_named() -> None:
    states = ["finished", "crashed", "crashed", "running"]
    records = [
        record(str(s), [float(s)], {"seed": s, "lr": 1}, state=state) for s, state in enumerate(states)
    ]
    (group,) = ask(records).groups
    assert group.n == 4
    assert report.runs(group) == "4 (2 crashed, 1 running)"


def test_few_seeds_are_said_to_be_few() -> None:
    comparison = ask(grid({"dqn": {"pong": [1]}, "pqn": {"pong": [1, 2, 3]}}), by=("agent.algorithm",))
    assert "dqn: one seed: no interval can be given" in comparison.notes
    assert any(note.startswith("pqn: 3 seeds: intervals are wide") for note in comparison.notes)


def test_time_to_a_threshold() -> None:
    clock = Series(np.arange(4.0), np.array([0.0, 10, 20, 30]))
    records = [
        record(str(s), ys, {"seed": s})
        for s, ys in enumerate([[0.0, 1, 2, 3], [0.0, 0, 0, 5], [0.0, 0, 0, 1]])
    ]
    for r in records:
        r.series["time/elapsed_seconds"] = clock
    (group,) = ask(records, threshold=2.0).groups
    assert group.threshold_steps == (3.0, 2, 3)
    assert group.threshold_seconds == (30.0, 2, 3)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"low": 0.6, "high": 0.95}, (0.8, 0.6, 0.95)),
        ({}, statistics.wilson_interval(0.8 * 20, 20)),  # 20 prompts, not 300 answers
    ],
)
def test_a_win_rate_has_the_interval_of_its_prompts_and_runs_are_not_pooled(
    own: Mapping[str, float], expected: tuple[float, float, float]
) -> None:
    def win_rate(seed: int, rate: float) -> Record:
        of = record(str(seed), [rate], {"seed": seed, "eval.prompts": 20})
        of.series["eval/win_rate"] = of.series.pop(METRIC)
        for end, value in {"n": 300.0, **own}.items():
            of.series[f"eval/win_rate_{end}"] = Series(np.zeros(1), np.array([value]))
        return of

    question = Question(metric="eval/win_rate")
    (single,) = compare([win_rate(0, 0.8)], question).groups
    assert single.win_rate == expected
    # What was said behind the last step that counts is not the rate there.
    longer = win_rate(0, 0.8)
    for end, value in {"": 0.1, "_low": 0.05, "_high": 0.15, "_n": 300.0}.items():
        before = longer.series.get(f"eval/win_rate{end}", Series(np.empty(0), np.empty(0)))
        longer.series[f"eval/win_rate{end}"] = Series(np.append(before.x, 9.0), np.append(before.y, value))
    (single,) = compare([longer], Question(metric="eval/win_rate", until="5")).groups
    assert single.win_rate == expected
    (group,) = compare([win_rate(0, 0.8), win_rate(1, 0.9)], question).groups
    assert group.win_rate is None
    assert group.interval.low < 0.8 < 0.9 < group.interval.high


# ---- curves ----


def test_curves_lie_on_the_x_that_all_runs_of_a_group_have() -> None:
    records = [
        record("long", [0, 10], {"seed": 0}, xs=[0, 100]),
        record("short", [5, 10], {"seed": 1}, xs=[50, 100]),
    ]
    (group,) = ask(records).groups
    assert group.curve is not None
    assert (group.curve_x[0], group.curve_x[-1]) == (50, 100)
    assert group.curve.point[0] == pytest.approx(5.0)
    assert group.curve.low[0] == pytest.approx(5.0)


def test_different_kinds_of_steps_are_not_laid_over_one_another() -> None:
    records = [
        record("rl", [0, 1], {"seed": 0, "kind": "rl"}, x_axis="agent_steps"),
        record("lm", [0, 2], {"seed": 0, "kind": "lm"}, x_axis="optimizer_steps"),
    ]
    comparison = ask(records, by=("kind",))
    assert all(group.curve is None for group in comparison.groups)
    assert any("count different things (agent_steps, optimizer_steps)" in note for note in comparison.notes)
    for r in records:
        r.series["time/elapsed_seconds"] = Series(np.arange(2.0), np.array([0.0, 60.0]))
    timed = ask(records, by=("kind",), axis="time")
    assert all(group.curve is not None for group in timed.groups)
    assert timed.x_label == "seconds"


# ---- what was different, what came from what ----


def test_the_config_keys_that_differ_and_no_others() -> None:
    comparison = ask(grid({"dqn": {"pong": [1, 2]}, "pqn": {"pong": [3]}}), by=("agent.algorithm",))
    assert comparison.differences == {"agent.algorithm": {"dqn": "dqn", "pqn": "pqn"}}


def test_stages_are_linked_by_hash_and_the_other_stages_are_not_missing_the_metric() -> None:
    sft = record("sft", None, {"seed": 0}, job_type="sft")
    evaluation = record(
        "eval",
        [0.9],
        {"seed": 0},
        job_type="eval",
        parents=({"run_id": "sft", "stage": "sft", "sha256": "ab12"},),
    )
    comparison = ask([sft, evaluation])
    (group,) = comparison.groups
    assert (group.n, group.without) == (1, 0)
    assert report.lineage(comparison) == ["eval (eval) from sft (sft, sha256 ab12)"]
    assert comparison.notes[0] == f"left out, since no run of their kind has {METRIC}: 1 sft"


# ---- how it is shown ----


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for algorithm, gain in (("dqn", 1.0), ("pqn", 2.0)):
        for seed in range(3):
            rows = [
                (step, {METRIC: gain * step + seed, "time/elapsed_seconds": step / 10})
                for step in range(0, 60, 10)
            ]
            config = {"seed": seed, "agent": {"algorithm": algorithm}, "env": {"game": "<b>pong</b>"}}
            make_run(tmp_path / "runs" / f"{algorithm}{seed}", rows, config=config)
    return tmp_path / "runs"


Lab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lab:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "160")
        code = cli.main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_answer_names_the_better_one_even_if_it_is_the_baseline(runs: Path, lab: Lab) -> None:
    _, out, _ = lab(runs, "--by", "agent.algorithm", "--baseline", "pqn")
    assert "pqn is better than dqn by 50 (95% 47.7 to 52.3, Welch)." in out


def test_one_command_says_which_is_better(runs: Path, lab: Lab) -> None:
    code, out, err = lab(runs, "--by", "agent.algorithm", "--baseline", "dqn")
    assert (code, err) == (0, "")
    assert "pqn is better than dqn by " in out
    assert "more is better, by its name; baseline dqn: asked for" in out
    assert "agent.algorithm" in out


def test_what_it_writes(runs: Path, lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = lab(runs, "--by=agent.algorithm", "--threshold=30", "--out", out)
    assert code == 0
    assert str(out / "comparison.html") in said.replace("\n", "")
    groups = list(csv.DictReader((out / "groups.csv").read_text().splitlines()))
    assert [row["group"] for row in groups] == ["pqn", "dqn"]
    assert float(groups[0]["mean"]) == pytest.approx(101.0)
    assert float(groups[0]["steps_to_threshold"]) == 20.0
    assert len(list(csv.DictReader((out / "runs.csv").read_text().splitlines()))) == 6
    curves = list(csv.DictReader((out / "curves.csv").read_text().splitlines()))
    assert {row["group"] for row in curves} == {"pqn", "dqn"}
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "comparison.svg").read_text()
    text = (out / "comparison.md").read_text()
    assert "| pqn | 3 | 101.0 [98.5, 103.5] | 1 | 101.0 |" in text
    assert "--by=agent.algorithm --threshold=30.0" in text
    assert not list(out.glob(".*"))


def test_the_page_stands_alone_and_takes_labels_for_text(runs: Path) -> None:
    question = Question(metric=METRIC, by=("env.game",))
    found = load([str(runs)], wanted_metrics([question]))
    text = page([compare(found.records, question)], "a </script> title", "lab compare")
    assert "default-src 'none'" in text
    assert "<b>pong</b>" not in text
    assert "a </script> title" not in text
    data = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert [group["n"] for group in json.loads(data)[0]["groups"]]
    assert {"curves0", "scores0"} <= set(re.findall(r'<figure id="(\w+)"', text))
    assert "src=" not in text
    assert set(re.findall(r'href="(.)', text)) <= {"#"}


def test_the_command_on_the_page_asks_the_same_again(runs: Path, lab: Lab, tmp_path: Path) -> None:
    lab(runs, "--by=agent.algorithm", "--metric", METRIC, "--score=best", "--out", tmp_path / "a")
    line = (tmp_path / "a" / "comparison.md").read_text().splitlines()[2].strip("`")
    words = line.split()
    assert words[:2] == ["lab", "compare"]
    lab(*words[2:], "--out", tmp_path / "b")
    assert (tmp_path / "a" / "groups.csv").read_bytes() == (tmp_path / "b" / "groups.csv").read_bytes()


def test_the_same_numbers_every_time(runs: Path, lab: Lab) -> None:
    assert lab(runs, "--by=agent.algorithm") == lab(runs, "--by=agent.algorithm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "lab: nowhere: not there."),
        (["runs", "--metric=eval/mean_rewar"], "Did you mean 'eval/mean_reward'?"),
        (["runs", "--by=agent.algorithmm"], "Did you mean 'agent.algorithm'?"),
        (["runs", "--threshold=high"], "lab: command line: argument --threshold"),
        (["runs", "--goal=up"], "lab: --goal up: is none of maximize, minimize."),
        (["runs", "--out=runs/dqn0/run.json"], "Name another folder with --out."),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(runs.parent)
    code, _, err = lab(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err
