"""The same record of a run from its folder, from W&B's file, and however it was interrupted."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import records
from lab.errors import LabError
from lab.records import columns_of, load, parse_query
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"
CONFIG: dict[str, Any] = {"seed": 3, "env": {"game": "pong"}, "agent": {"algorithm": "dqn", "n_step": 3}}


def curve(folder: Path, **options: Any) -> None:
    rows = [(step, {METRIC: step / 10, "time/elapsed_seconds": step / 2}) for step in range(0, 50, 10)]
    make_run(folder, rows, config=CONFIG, **options)


def one(*sources: Path | str) -> records.Record:
    (record,) = load([str(source) for source in sources], [METRIC]).records
    return record


def test_a_run_folder(tmp_path: Path) -> None:
    curve(tmp_path / "a")
    record = one(tmp_path / "a")
    assert (record.name, record.state, record.x_axis, record.seed) == ("a", "finished", "agent_steps", 3)
    assert record.config["agent.algorithm"] == "dqn"
    x, y = record.series[METRIC]
    assert x.tolist() == [0, 10, 20, 30, 40]
    assert y.tolist() == [0, 1, 2, 3, 4]
    assert {METRIC, "time/elapsed_seconds"} == record.metrics
    assert record.over(METRIC, "time").x.tolist() == [0, 5, 10, 15, 20]


def test_folder_and_wandb_file_tell_the_same(tmp_path: Path) -> None:
    rows: list[tuple[int, dict[str, Any]]] = [
        (0, {METRIC: -21.0, "frames": 0}),
        (10, {METRIC: math.nan, "frames": 40}),
        (20, {METRIC: math.inf, "frames": 80}),
        (30, {"train/loss": 0.5}),
        (40, {METRIC: 18.25, "frames": 160}),
    ]
    parents = [{"run_id": "abc", "stage": "sft", "sha256": "0f"}]
    make_run(tmp_path / "a", rows, config=CONFIG, parents=parents, wandb="offline")
    folder = one(tmp_path / "a")
    mirror = one(tmp_path / "a" / "wandb")
    assert mirror.source != folder.source
    for name in ("id", "name", "group", "job_type", "state", "x_axis", "config", "parents", "metrics"):
        assert getattr(mirror, name) == getattr(folder, name), name
    for axis in ("step", "frames"):
        for mine, theirs in zip(folder.over(METRIC, axis), mirror.over(METRIC, axis), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert folder.series[METRIC].y.tolist()[0] == -21.0
    assert np.isnan(folder.series[METRIC].y[1])
    assert np.isinf(folder.series[METRIC].y[2])


def test_a_folder_of_runs_and_a_glob_leave_their_mirrors_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        curve(tmp_path / "runs" / name, wandb="offline" if name == "a" else "disabled")
    for source in (tmp_path / "runs", tmp_path / "runs" / "*", f"{tmp_path}/**/run.json"):
        found = load([str(source)], [METRIC])
        assert [record.name for record in found.records] == ["a", "b"]
        assert not found.notes


def test_a_run_named_twice_counts_once_and_is_told_of(tmp_path: Path) -> None:
    curve(tmp_path / "a", wandb="offline")
    found = load([str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "a" / "wandb")], [METRIC])
    assert len(found.records) == 1
    assert len(found.notes) == 1
    assert "left out" in found.notes[0]


def test_damaged_lines_are_told_of_and_a_half_written_last_one_is_normal(tmp_path: Path) -> None:
    curve(tmp_path / "a", state="running")
    path = tmp_path / "a" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + '\n{"global_step": 50, "eval/me')
    record = one(tmp_path / "a")
    assert record.series[METRIC].x.tolist() == [0, 20, 30, 40]
    assert record.state == "crashed"
    (note,) = record.notes
    assert "metrics.jsonl: 1 lines are damaged, the first is line 2" in note


def test_a_run_going_on_is_not_crashed(tmp_path: Path) -> None:
    from lab.run import Run

    curve(tmp_path / "a", state="interrupted")
    run = Run.resume(tmp_path / "a")
    run.continue_from(run.metrics.stat().st_size)
    assert one(tmp_path / "a").state == "running"
    run.end("finished")
    run._release_lock()
    assert one(tmp_path / "a").state == "finished"


def test_a_damaged_run_beside_a_good_one_is_a_note(tmp_path: Path) -> None:
    curve(tmp_path / "good")
    curve(tmp_path / "bad")
    (tmp_path / "bad" / "run.json").write_text("{")
    found = load([str(tmp_path)], [METRIC])
    assert [record.name for record in found.records] == ["good"]
    assert any("bad/run.json" in note for note in found.notes)


def test_a_damaged_wandb_file_is_a_note(tmp_path: Path) -> None:
    curve(tmp_path / "a", wandb="offline")
    (tmp_path / "offline-run-x").mkdir()
    (tmp_path / "offline-run-x" / "run-x.wandb").write_bytes(b"nonsense")
    found = load([str(tmp_path)], [METRIC])
    assert len(found.records) == 1
    assert any("run-x.wandb: damaged" in note for note in found.notes)


def test_a_cut_off_wandb_file_keeps_its_rows(tmp_path: Path) -> None:
    curve(tmp_path / "a", wandb="offline")
    (file,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
    data = file.read_bytes()
    place = tmp_path / "copy" / "offline-run-1"
    place.mkdir(parents=True)
    (place / file.name).write_bytes(data[: int(len(data) * 0.8)])
    record = one(tmp_path / "copy")
    whole = one(tmp_path / "a").series[METRIC]
    kept = record.series[METRIC]
    assert record.state == "crashed"
    assert 0 < kept.x.size <= whole.x.size
    assert kept.x.tolist() == whole.x.tolist()[: kept.x.size]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: not there."),
        ("rnus", "Did you mean 'runs'?"),
        ("empty", "empty: no run in it. Name a run folder"),
        ("none*", "none*: not there."),
    ],
)
def test_sources_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("empty").mkdir()
    with pytest.raises(LabError) as error:
        load([source], [METRIC])
    assert message in str(error.value)


# ---- rows ----


def test_what_a_resumed_run_says_again_replaces_what_it_said() -> None:
    rows = [{"global_step": s, "loss": v} for s, v in [(1, 1), (2, 2), (3, 3), (2, 20), (3, 30), (4, 40)]]
    x, y = columns_of(rows, ["loss"])["loss"]
    assert x.tolist() == [1, 2, 3, 4]
    assert y.tolist() == [1, 20, 30, 40]


def test_metrics_that_are_logged_at_different_steps_do_not_disturb_each_other() -> None:
    """The evaluation of step 2 comes when training is at 4; both count."""
    rows = [{"global_step": 2, "loss": 1.0}, {"global_step": 4, "loss": 0.5}, {"global_step": 2, "eval": 7.0}]
    columns = columns_of(rows, ["loss", "eval"])
    assert columns["loss"].x.tolist() == [2, 4]
    assert columns["eval"].x.tolist() == [2]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_steps_always_rise_and_the_last_word_on_each_counts(steps: list[int]) -> None:
    rows = [{"global_step": step, "a": index} for index, step in enumerate(steps)]
    x, y = columns_of(rows, ["a"])["a"]
    assert (np.diff(x) > 0).all()
    assert x[-1] == steps[-1]
    assert y[-1] == len(steps) - 1
    for step, index in zip(x, y, strict=True):
        assert steps[int(index)] == step
        assert all(later > step for later in steps[int(index) + 1 :])


def test_rows_of_other_programs_count_wandbs_own_steps_and_texts_are_no_numbers() -> None:
    rows = [{"_step": 0, "a": 1, "b": "hello"}, {"_step": 1, "a": "NaN"}, {"_step": 2, "a": "-Infinity"}]
    columns = columns_of(rows, ["a", "b"])
    assert columns["a"].x.tolist() == [0, 1, 2]
    assert str(columns["a"].y.tolist()) == "[1.0, nan, -inf]"
    assert "b" not in columns


def test_reading_by_all_cores_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        rows = [(step, {METRIC: seed + step}) for step in range(5)]
        make_run(tmp_path / str(seed), rows, config={"seed": seed})
    alone = load([str(tmp_path)], [METRIC])
    monkeypatch.setattr(records, "PARALLEL_BYTES", 0)
    together = load([str(tmp_path)], [METRIC])
    assert [r.id for r in alone.records] == [r.id for r in together.records]
    for one_, other in zip(alone.records, together.records, strict=True):
        np.testing.assert_array_equal(one_.series[METRIC].y, other.series[METRIC].y)


# ---- W&B's queries ----


def test_a_query_with_openrlbenchmarks_words() -> None:
    query = parse_query(
        "wandb:?we=openrlbenchmark&wpn=cleanrl&ceik=env_id&cen=exp_name"
        "&metric=charts/episodic_return&tag=pr-299&user=costa-huang&cl=CleanRL DQN"
    )
    assert query.path == "openrlbenchmark/cleanrl"
    assert query.filters == {"$and": [{"tags": {"$in": ["pr-299"]}}, {"username": "costa-huang"}]}
    wishes = {"task": "env_id", "by": "exp_name", "metric": "charts/episodic_return", "label": "CleanRL DQN"}
    assert query.wishes == wishes


def test_a_query_by_config() -> None:
    query = parse_query("wandb:me/lab?config.agent.n_step=3&config.agent.algorithm=dqn&state=finished")
    conditions = [
        {"config.agent.n_step.value": 3},
        {"config.agent.algorithm.value": "dqn"},
        {"state": "finished"},
    ]
    assert query == ("me/lab", {"$and": conditions}, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wandb:me/lab?tga=v1", "unknown filter 'tga'. Did you mean 'tag'?"),
        ("wandb:?tag=v1", "names no project. Write wandb:entity/project."),
    ],
)
def test_queries_that_mean_nothing(source: str, message: str) -> None:
    with pytest.raises(LabError) as error:
        parse_query(source)
    assert message in str(error.value)


def test_wandb_without_a_key_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(LabError, match="no W&B key"):
        load(["wandb:me/lab"], [METRIC])


def test_flatten() -> None:
    assert records.flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert json.dumps(records.flatten({})) == "{}"
