"""The same record of a run from its folder, from W&B's file, and however it was interrupted."""

import json
import math
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import cli, files, records, statistics
from lab.compare import Question
from lab.compare import compare as compare_runs
from lab.errors import LabError
from lab.records import _continued, columns_of, load, parse_query, read_columns
from lab.tracking import read_metrics
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"
CONFIG: dict[str, Any] = {"seed": 3, "env": {"game": "pong"}, "agent": {"algorithm": "dqn", "n_step": 3}}


def curve(folder: Path, seed: int = 3, **options: Any) -> None:
    rows = [(step, {METRIC: step / 10, "time/elapsed_seconds": step / 2}) for step in range(0, 50, 10)]
    make_run(folder, rows, config={**CONFIG, "seed": seed}, **options)


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


def test_a_file_of_rows_may_be_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no row takes no memory: here zeros, as a hole in the file."""
    curve(tmp_path / "a")
    rows = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with (tmp_path / "a" / "metrics.jsonl").open("ab") as file:
        file.truncate(len(rows) + 3 * 2**20)
        file.seek(0, 2)
        file.write(b"\n" + rows.splitlines(keepends=True)[-1].replace(b"40", b"50"))
    monkeypatch.setattr(files, "LONGEST_ROW", 2**10)
    tracemalloc.start()
    record = one(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record.series[METRIC].x.tolist() == [0, 10, 20, 30, 40, 50]
    assert "1 lines are damaged, the first is line 6" in record.notes[0]
    assert peak < 2**21
    assert [row["global_step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")][-1] == 50


def test_a_name_is_no_longer_than_a_line(tmp_path: Path) -> None:
    curve(tmp_path / "a")
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(info | {"name": "n" * 10_000 + " end"}))
    name = one(tmp_path / "a").name
    assert len(name) <= 200
    assert name.endswith("n end")


@pytest.mark.parametrize("id_", ["", "../../other", "a/b", "*", "a\nb"])
def test_an_id_is_no_path_and_no_pattern(tmp_path: Path, id_: str) -> None:
    """`lab sync` sends the W&B files that are named by it."""
    curve(tmp_path / "a")
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(info | {"id": id_}))
    with pytest.raises(
        LabError, match=r"damaged: id = .* is not what the lab writes\. Restore it from a copy"
    ):
        load([str(tmp_path / "a")], [METRIC])


def test_numbers_beyond_all_floats_are_none(tmp_path: Path) -> None:
    curve(tmp_path / "a")
    path = tmp_path / "a" / "run.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"summary": {"score": 10**400, "loss": 1}}))
    (record,) = load([str(tmp_path / "a")], ["score", "loss"]).records
    assert "loss" in record.series
    assert "score" not in record.series
    assert "a" not in columns_of([{"global_step": 1, "a": 10**400}], ["a"])


@pytest.mark.parametrize("end", ["NaN", "Infinity", "-Infinity", '"nan"', "1e400"])
def test_a_row_that_ends_in_no_number_is_no_damaged_line(tmp_path: Path, end: str) -> None:
    """Python's json writes NaN, which JSON has not: without these rows a diverged run ends well."""
    curve(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(f'{{"global_step": 50, "{METRIC}": {end}}}\n')
    record = one(tmp_path / "a")
    assert not record.notes
    assert record.series[METRIC].x[-1] == 50
    assert not np.isfinite(record.series[METRIC].y[-1])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        pytest.param([[0.5], [0.6]], [], id="lists of one"),
        pytest.param([[1, 2], [3, 4]], [], id="lists"),
        pytest.param([[1], 0.5, [1, 2], "x", {"a": 1}], [0.5], id="among numbers"),
    ],
)
def test_values_that_are_no_numbers_do_not_count(values: list[Any], kept: list[float]) -> None:
    found = read_columns([{"global_step": i, "a": value} for i, value in enumerate(values)], ["a"])
    assert [y for series in found.series.values() for y in series.y] == kept
    assert found.notes == (["4 values of a are no numbers and do not count"] if kept else [])


def test_a_number_too_large_to_square_is_infinite(tmp_path: Path) -> None:
    """A loss of 1e200 ended the comparison with a traceback."""
    for name, end in (("a", 1e200), ("b", 1.0)):
        for seed in range(3):
            folder = tmp_path / f"{name}{seed}"
            rows = [(0, {"eval/loss": 2.0 + seed}), (10, {"eval/loss": end if seed else 1.5})]
            make_run(folder, rows, config={"seed": seed, "x": name})
    compared = compare_runs(load([str(tmp_path)], ["eval/loss"]).records, Question(metric="eval/loss"))
    assert {group.label: group.diverged for group in compared.groups} == {"x=a": 2, "x=b": 0}


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
    (place / file.name).write_bytes(data[: int(len(data) * 0.9)])
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


def session(first: int, last: int, own: int = 0, scale: int = 1) -> list[dict[str, Any]]:
    """Rows of a session by epoch, with W&B's own count from `own`."""
    return [
        {"_step": own + scale * i, "epoch": epoch, "acc": epoch / 10}
        for i, epoch in enumerate(range(first, last))
    ]


@pytest.mark.parametrize(
    ("sessions", "steps", "accuracies"),
    [
        pytest.param([session(0, 5), session(3, 8)], range(8), range(8), id="goes on"),
        pytest.param([session(0, 5), session(5, 7), session(6, 8)], range(8), range(8), id="three"),
        pytest.param([session(0, 5), session(0, 8)], range(8), range(8), id="begun again"),
        pytest.param(
            [session(0, 5, 0, 10), session(3, 8, 30, 10)], range(0, 80, 10), range(8), id="own steps"
        ),
        pytest.param([[], session(0, 3), []], range(3), range(3), id="empty"),
    ],
)
def test_sessions_of_an_offline_run_go_on(
    sessions: list[list[dict[str, Any]]], steps: range, accuracies: range
) -> None:
    """W&B counts each from 0: a run that was stopped was compared by its last session alone."""
    rows = _continued(sessions)
    found = columns_of(rows, ["acc"])["acc"]
    assert found.x.tolist() == list(steps)
    assert found.y.tolist() == [i / 10 for i in accuracies]


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
        "wandb:dqn_atari?we=openrlbenchmark&wpn=cleanrl&ceik=env_id&cen=exp_name"
        "&metric=charts/episodic_return&tag=pr-299&tag=v1&user=costa-huang&seed=1&seed=2&cl=CleanRL DQN"
    )
    assert query.path == "openrlbenchmark/cleanrl"
    conditions = [
        {"tags": {"$in": ["pr-299"]}},
        {"tags": {"$in": ["v1"]}},  # as there, a run must have both
        {"username": "costa-huang"},
        {"config.seed.value": {"$in": [1, 2]}},
        {"config.exp_name.value": "dqn_atari"},
    ]
    assert query.filters == {"$and": conditions}
    words = {"task": "env_id", "by": "exp_name", "metric": "charts/episodic_return", "label": "CleanRL DQN"}
    assert query.words == words
    assert query.wishes == {"by": "group", "task": "task", "metric": "charts/episodic_return"}
    assert parse_query("wandb:?we=me&wpn=lab").wishes == {}


def test_a_query_by_config() -> None:
    query = parse_query(
        "wandb:me/lab?config.agent.n_step=3&config.agent.algorithm=dqn&state=finished&state=failed"
        "&config.agent.double=True&config.agent.lr=1e-4"
    )
    conditions = [
        {"config.agent.n_step.value": 3},
        {"config.agent.algorithm.value": "dqn"},
        {"state": {"$in": ["finished", "failed"]}},
        {"config.agent.double.value": True},
        {"config.agent.lr.value": 0.0001},
    ]
    assert query == ("me/lab", {"$and": conditions}, {})


@pytest.mark.parametrize("source", ["wandb:me/lab/ab12", "wandb:me/lab/runs/ab12", "wandb:me/lab?id=ab12"])
def test_one_run_by_its_id(source: str) -> None:
    assert parse_query(source) == ("me/lab", {"$and": [{"name": "ab12"}]}, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wandb:me/lab?tga=v1", "unknown filter 'tga'. Did you mean 'tag'?"),
        ("wandb:me/lab?metrics=x", "unknown filter 'metrics'. Did you mean 'metric'?"),
        ("wandb:?tag=v1", "names no project. Write wandb:entity/project."),
        ("wandb:/", "names no project. Write wandb:entity/project."),
        ("wandb:me/lab/x/y", "names no project. Write wandb:entity/project."),
    ],
)
def test_queries_that_mean_nothing(source: str, message: str) -> None:
    with pytest.raises(LabError) as error:
        load([source], [METRIC])
    assert message in str(error.value)


def test_wandb_without_a_key_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(LabError, match="no W&B key"):
        load(["wandb:me/lab"], [METRIC])


# ---- one that is broken among others ----


def compare(*arguments: Path | str) -> int:
    return cli.main(["compare", "--metric", METRIC, *map(str, arguments)])


def break_it(place: Path, how: str) -> None:
    """Makes `place` a source that lacks something."""
    if how == "empty":
        place.mkdir()
        return
    curve(place, seed=9, wandb="offline" if "wandb" in how else "disabled")
    (file,) = place.rglob("*.wandb") if "wandb" in how else [place / "metrics.jsonl"]
    if how == "run.json is cut":
        (place / "run.json").write_text('{"id": "a", "na')
    elif how == "run.json is none":
        info = json.loads((place / "run.json").read_text())
        (place / "run.json").write_text(json.dumps({**info, "config": [1], "sessions": 3}))
    elif how == "metrics.jsonl is gone":
        file.unlink()
    elif how == "metrics.jsonl is empty":
        file.write_bytes(b"")
    elif how == "metrics.jsonl has a damaged line":
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([lines[0][:30] + b"\n", b"\xff\xfe\x00\n", b"[1]\n", *lines[1:]]))
    elif how == "metrics.jsonl is half-written":
        file.write_bytes(file.read_bytes()[:-20])
    if "alone" in how:
        content = b"" if "empty" in how else file.read_bytes()[:200] if "cut" in how else b"\0nonsense" * 99
        shutil.rmtree(place)
        place.mkdir()
        (place / "run-x.wandb").write_bytes(content)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "bad: no run in it"),
        ("run.json is cut", "bad/run.json: damaged"),
        ("run.json is none", "bad/run.json: damaged"),
        ("metrics.jsonl is gone", "bad/metrics.jsonl: cannot be read: No such file or directory"),
        ("metrics.jsonl is empty", ""),
        ("metrics.jsonl has a damaged line", "bad/metrics.jsonl: 3 lines are damaged, the first is line 1"),
        ("metrics.jsonl is half-written", ""),
        ("a wandb file alone, empty", "run-x.wandb: damaged: no run can be read from it"),
        ("a wandb file alone, cut", "run-x.wandb: damaged: no run can be read from it"),
        ("a wandb file alone, of nonsense", "run-x.wandb: damaged: no run can be read from it"),
    ],
)
def test_one_broken_source_among_good_ones_is_a_line_and_the_rest_is_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, says: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for seed, name in enumerate(("good1", "good2")):
        curve(tmp_path / name, seed=seed)
    break_it(tmp_path / "bad", how)
    assert compare(tmp_path / "good1", tmp_path / "bad", tmp_path / "good2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    counted = 3 if "half" in how or "line" in how else 2
    assert re.search(rf"^group +{counted} ", out, re.MULTILINE), out
    assert says in out


@pytest.mark.parametrize("how", ["empty", "run.json is cut", "a wandb file alone, of nonsense"])
def test_nothing_but_broken_sources_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    for name in ("bad1", "bad2"):
        break_it(tmp_path / name, how)
    assert compare(tmp_path / "bad1", tmp_path / "bad2") == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert "bad1" in line
    assert "(and 1 more like it). Name a run folder" in line


def test_a_source_that_is_misspelt_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve(tmp_path / "good")
    assert compare(tmp_path / "good", tmp_path / "goud") == 2
    assert capsys.readouterr().err == f"lab: {tmp_path}/goud: not there. Did you mean 'good'?\n"
    assert compare(tmp_path / "good", "wandb:me/lab?tga=v1") == 2
    assert "unknown filter 'tga'. Did you mean 'tag'?" in capsys.readouterr().err


def test_a_file_that_is_no_run_is_called_so(tmp_path: Path) -> None:
    curve(tmp_path / "good")
    (tmp_path / "notes.md").write_text("# notes")
    found = load([str(tmp_path / "good"), str(tmp_path / "notes.md")], [METRIC])
    assert found.notes == [f"{tmp_path}/notes.md: no run: neither a run.json nor a .wandb file"]


# ---- over games ----


def test_human_normalised_scores_are_put_together_over_games(tmp_path: Path) -> None:
    """Four seeds a game: the IQM drops the lowest and highest quarter of all eight runs of a group."""
    metric = "eval/human_normalized"
    scores = {
        "dqn": {"pong": [0.1, 0.2, 0.3, 0.4], "breakout": [1.0, 1.2, 1.4, 9.0]},
        "pqn": {"pong": [0.5, 0.6, 0.7, 0.8], "breakout": [2.0, 2.2, 2.4, 2.6]},
    }
    for algorithm, games in scores.items():
        for game, values in games.items():
            for seed, value in enumerate(values):
                config = {"seed": seed, "env": {"game": game}, "agent": {"algorithm": algorithm}}
                rows = [(0, {metric: 0.0}), (100, {metric: value})]
                make_run(tmp_path / f"{algorithm}-{game}-{seed}", rows, config=config)
    question = Question(metric=metric, by=("agent.algorithm",), baseline="dqn")
    found = load([str(tmp_path)], [metric])
    comparison = compare_runs(found.records, question)
    assert (comparison.task_key, comparison.tasks) == ("env.game", ("breakout", "pong"))
    dqn, pqn = comparison.groups  # by the mean, which one run of breakout lifts
    assert "by the IQM, which a few outliers do not move, pqn is first, not dqn" in comparison.notes
    assert [(group.label, group.n, group.seeds) for group in (pqn, dqn)] == [("pqn", 8, 4), ("dqn", 8, 4)]
    assert dqn.estimates["iqm"].point == pytest.approx((0.3 + 0.4 + 1.0 + 1.2) / 4)
    assert pqn.estimates["iqm"].point == pytest.approx((0.7 + 0.8 + 2.0 + 2.2) / 4)
    # Of the mean scores of the games; of the part that is missing to 1, which more than 1 does not make up.
    assert dqn.estimates["mean"].point == pytest.approx((0.25 + 3.15) / 2)
    assert dqn.estimates["median"].point == pytest.approx((0.25 + 3.15) / 2)
    assert dqn.estimates["optimality_gap"].point == pytest.approx((0.9 + 0.8 + 0.7 + 0.6) / 8)
    assert pqn.estimates["optimality_gap"].point == pytest.approx((0.5 + 0.4 + 0.3 + 0.2) / 8)
    # All of pong's 16 pairs are won by pqn, of breakout's those against 1.0, 1.2 and 1.4.
    assert pqn.difference is not None
    assert not pqn.difference.settled
    assert pqn.difference.point == pytest.approx((0.65 + 2.3 - 0.25 - 3.15) / 2)
    assert pqn.difference.method == "seeds"
    assert not comparison.normalized  # its unit is the same for all games
    # Runs are drawn again within each game: no sample has fewer runs of a game than there are.
    expected = statistics.stratified_bootstrap(list(scores["dqn"].values()), few_seeds=True)["iqm"]
    assert dqn.estimates["iqm"] == expected
    assert expected.low < expected.point < expected.high


def test_flatten() -> None:
    assert records.flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert json.dumps(records.flatten({})) == "{}"
