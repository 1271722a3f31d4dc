"""Runs read from W&B's server are the runs in their folders and in W&B's files, and no server can hang us.

The client is the real `wandb.Api`, and what it reads was logged by the lab's own tracker or sent by the real
`wandb sync`; only the server is a stand-in.
"""

import contextlib
import json
import math
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import cli, records, report
from lab.compare import Question, compare, wanted_metrics
from lab.errors import LabError
from lab.records import Record, load
from lab.run import Run
from tests.lab.runs import log
from tests.lab.wandb_stand_in import ENTITY, ReceivedRun, WandbStandIn
from tests.lab.wandb_world import end_service, use, wandb_world

METRIC = "eval/mean_reward"
CONFIG: dict[str, Any] = {
    **{
        "env": {"game": "pong", "n_envs": 8.0},
        "none": None,
        "yes": True,
        "no": False,
        "one": 1,
        "rate": 1e-4,
    },
    **{"onef": 1.0, "big": 1e20, "empty": {}, "list": [1, 2.0, None, True, "x", [], {"deep": 3.0}]},
    **{"text": "ü\n| <b>", "dot.key": 5, "nested": {"a": {"b": 2.5, "c": []}}},
}
NAN, INF = math.nan, math.inf


@contextlib.contextmanager
def impatient(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """`wandb_world` with little patience, and tables as wide as they like."""
    with wandb_world(home, timeout_seconds=1) as patch:
        patch.setenv("COLUMNS", "400")
        patch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # else the killed run's rows never left
        patch.setattr(records, "API_SECONDS", 2)
        yield patch


# ---- the same from everywhere ----


def session(
    folder: Path,
    mode: str,
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    state: str,
    config: Mapping[str, Any] | None = None,
    checkpoint_after: int = 0,
    **about: Any,
) -> int:
    """One session of a run; returns how long metrics.jsonl was at its checkpoint, after so many rows."""
    if config is None:
        while list(folder.glob(f"wandb/*{time.strftime('%Y%m%d_%H%M%S')}*")):
            time.sleep(0.02)  # W&B names its folders by the second, and no process resumes that fast
        run = Run.resume(folder)
        run.continue_from(about.pop("metrics_bytes"))
    else:
        kind = {"pipeline": "rl", "job_type": "train", "group": "g", "x_axis": "agent_steps", **about}
        run = Run.create(folder, config=config, name=folder.name, compute={"device": "cpu"}, **kind)
    with run.recording_its_end():
        tracker = run.tracker(mode, "asked for", "lab-tests", None, ["t"])
        log(tracker, rows[:checkpoint_after])
        length = tracker.sync()
        log(tracker, rows[checkpoint_after:])
        tracker.finish({"finished": 0, "interrupted": 255, "failed": 1}[state], {"best": 1})
        run.end(state)
    return length


def make_runs(root: Path, mode: str, server: WandbStandIn) -> None:
    """Runs of two algorithms with all that can happen to them."""

    def config(algorithm: str, seed: int) -> dict[str, Any]:
        return {**CONFIG, "seed": seed, "agent": {"algorithm": algorithm}}

    def row(step: int, value: float) -> tuple[int, dict[str, Any]]:
        return step, {METRIC: value, "frames": 4 * step, "time/elapsed_seconds": step / 3, "note": "text"}

    session(
        root / "dqn0",
        mode,
        [row(0, -21.0), (5, {"train/loss": 0.1 + 0.2}), row(10, NAN), row(20, INF), row(30, 18.25)],
        "finished",
        config("dqn", 0),
    )
    parents = [{"run_id": "abc", "stage": "sft", "sha256": "0f"}]
    session(
        root / "dqn1",
        mode,
        [row(0, 1e-300), row(10, -INF), (15, {"train/loss": NAN}), row(30, 2 / 3)],
        "failed",
        config("dqn", 1),
        parents=parents,
    )
    steps = [row(step, step / 7) for step in (0, 10, 20, 30)]
    length = session(root / "pqn0", mode, steps, "interrupted", config("pqn", 0), checkpoint_after=2)
    session(
        root / "pqn0",
        mode,
        [row(step, step / 5) for step in (20, 30, 40)],
        "interrupted",
        metrics_bytes=length,
    )
    session(root / "rm", mode, [(1, {"train/accuracy": 0.5})], "finished", config("rm", 0), job_type="rm")
    program = f"""
        import json, sys, time
        from pathlib import Path
        from lab.run import Run
        folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
        run = Run.create(folder, config=config, pipeline="rl", job_type="train", name=folder.name,
                         group="other", x_axis="agent_steps", compute={{}})
        tracker = run.tracker({mode!r}, "asked for", "lab-tests", None, None)
        for step in (0, 10, 20, 30):
            tracker.log(step, {{"{METRIC}": step, "frames": step, "time/elapsed_seconds": step}})
        time.sleep(60)
    """
    end_service()  # else the process would log through this one's, which ends as it should
    command = [sys.executable, "-c", textwrap.dedent(program), str(root / "pqn1")]
    with subprocess.Popen([*command, json.dumps(config("pqn", 1))]) as process:
        until(
            lambda: b"".join(log.read_bytes() for log in root.glob("pqn1/**/*.wandb")).count(b"frames") >= 4
        )
        if mode == "online":
            until(lambda: len(server.runs[Run.open(root / "pqn1").info["id"]].history) == 4)
        process.kill()


def until(true: Callable[[], bool]) -> None:
    """Waits for something that soon is so."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module", params=["online", "sync"])
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WandbStandIn, Path]]:
    """A server and a folder with the same runs: tracked online, or offline and then sent by `wandb sync`."""
    root = tmp_path_factory.mktemp("kept")
    with impatient(root) as patch, WandbStandIn() as server:
        use(server, patch)
        patch.setenv("WANDB_X_GRAPHQL_TIMEOUT_SECONDS", "30")  # this server answers, if not at once
        make_runs(root / "runs", "online" if request.param == "online" else "offline", server)
        end_service()
        if request.param == "sync":
            command = [records._wandb_command(), "sync", "--entity", ENTITY, "--project", "lab-tests"]
            places = [str(path) for path in (root / "runs").glob("*/wandb/offline-run-*/*.wandb")]
            again = max(path for path in places if "/pqn0/" in path)  # the sessions in order
            for part in ([path for path in places if path != again], [again]):
                subprocess.run([*command, *part], check=True, capture_output=True, cwd=root)
        # After five minutes without a word the real server does so.
        server.runs[Run.open(root / "runs" / "pqn1").info["id"]].state = "crashed"
        yield server, root / "runs"


@pytest.fixture(scope="module")
def found(kept: tuple[WandbStandIn, Path]) -> dict[str, list[Record]]:
    """The runs by name, from each place they are kept."""
    sources = {
        "folders": [str(kept[1])],
        "files": sorted(str(path) for path in kept[1].glob("*/wandb")),
        "server": [f"wandb:{ENTITY}/lab-tests"],
        "server, by column": [f"wandb:{ENTITY}/lab-tests"],
    }
    return {place: _read(names, by_column="column" in place) for place, names in sources.items()}


def _read(sources: list[str], by_column: bool) -> list[Record]:
    """The runs of one place; with pages of two rows they are longer than one, and read column by column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PAGE", 2 if by_column else records.PAGE)
        found = load(sources, wanted_metrics([Question(metric=METRIC)]))
    assert found.notes == []
    return sorted(found.records, key=lambda record: record.name)


def test_a_run_is_the_same_in_its_folder_in_wandbs_files_and_on_the_server(
    found: dict[str, list[Record]],
) -> None:
    assert [record.name for record in found["folders"]] == ["dqn0", "dqn1", "pqn0", "pqn1", "rm"]
    states = {record.name: record.state for record in found["folders"]}
    assert states == {
        **{"dqn0": "finished", "dqn1": "failed", "pqn0": "interrupted", "pqn1": "crashed", "rm": "finished"}
    }
    same = ("id", "name", "group", "job_type", "state", "x_axis", "config", "parents", "metrics", "seed")
    for place in ("files", "server", "server, by column"):
        for mine, theirs in zip(found["folders"], found[place], strict=True):
            for field in same:
                a, b = getattr(mine, field), getattr(theirs, field)
                assert a == b, (place, mine.name, field)
                assert json.dumps(a, default=sorted) == json.dumps(b, default=sorted) or field == "parents"
            for name in (METRIC, "frames", "time/elapsed_seconds"):
                assert (name in mine.series) == (name in theirs.series), (place, mine.name, name)
                for axis in ("step", "frames", "time") if name in mine.series else ():
                    for ours, other in zip(mine.over(name, axis), theirs.over(name, axis), strict=True):
                        np.testing.assert_array_equal(ours, other)
    nan, resumed = found["server"][0].series[METRIC], found["server"][2].series[METRIC]
    assert str(nan.y.tolist()) == "[-21.0, nan, inf, 18.25]"
    assert resumed.x.tolist() == [0, 10, 20, 30, 40]
    assert resumed.y.tolist() == [0, 10 / 7, 20 / 5, 30 / 5, 40 / 5], "what was said anew counts"


def test_comparisons_of_them_are_the_same_to_the_letter(found: dict[str, list[Record]]) -> None:
    for question in (
        Question(metric=METRIC, by=("agent.algorithm",), threshold=3.0, reps=100),
        Question(metric=METRIC, score="best", axis="time", reps=100),
        Question(metric=METRIC, by=("group", "onef"), axis="frames", reps=100),
    ):
        said = []
        for of in found.values():
            comparison = compare([replace(record, source="") for record in of], question)
            csv = [report.groups_csv, report.runs_csv, report.curves_csv]
            said.append([report.markdown([comparison]), *(write([comparison]) for write in csv)])
        assert said[0] == said[1] == said[2] == said[3]
        assert len(said[0][3].splitlines()) > 200, "there are curves"


def test_runs_from_both_places_make_one_group(kept: tuple[WandbStandIn, Path]) -> None:
    """W&B keeps 1.0 as 1: that alone must not make another group."""
    server, root = kept
    dqn1 = Run.open(root / "dqn1").info["id"]
    found = load([str(root / "dqn0"), f"wandb:{ENTITY}/lab-tests/{dqn1}"], [METRIC])
    (group,) = compare(found.records, Question(metric=METRIC)).groups
    assert sorted(record.source for record in group.records) == [
        *(str(root / "dqn0"), f"wandb:{ENTITY}/lab-tests/{dqn1}")
    ]
    assert server.unknown <= {"OrganizationCoreWeaveOrganizationID"}


# ---- queries ----


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbStandIn]:
    """A server with three runs of twelve rows in project lab, and two in the project of somebody else."""
    with impatient(tmp_path) as patch, WandbStandIn() as stand_in:
        use(stand_in, patch)
        for seed in range(3):
            add(stand_in, f"run{seed}", "lab", {"seed": seed, "algo": "dqn"}, METRIC, seed)
        for seed, tags in enumerate((["v1", "good"], ["v1"])):
            config = {"seed": seed, "env_id": f"Pong-v{seed}", "exp_name": "ppo", "group": "x"}
            add(stand_in, f"clean{seed}", "cleanrl", config, "charts/return", 10 + seed, tags)
        yield stand_in


def add(
    server: WandbStandIn,
    name: str,
    project: str,
    config: Mapping[str, Any],
    metric: str,
    value: float,
    tags: Sequence[str] = (),
    rows: int = 12,
) -> ReceivedRun:
    """A run as another program leaves it."""
    about = {"project": project, "displayName": name, "groupName": None, "jobType": None, "tags": list(tags)}
    run = ReceivedRun(name, about, dict(config), state="finished", created=float(len(server.runs)))
    run.history = [
        {"_step": step, "_timestamp": 100.0 + step, "global_step": 5 * step, metric: value}
        for step in range(rows)
    ]
    run.summary = dict(run.history[-1])
    server.runs[name] = run
    return run


Out = tuple[int, str, str]


def lab_compare(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Out:
    code = cli.main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(out: str) -> dict[str, str]:
    """The mean of each group in the table shown."""
    lines = out.splitlines()[2:]
    answers = ("better than", "Not settled", "Not comparable", "nothing to compare")
    end = next(i for i, line in enumerate(lines) if any(answer in line for answer in answers))
    cells = [line.split("  ") for line in lines[:end]]
    return {cell[0].strip(): [part for part in cell[1:] if part.strip()][1].split()[0] for cell in cells}


def test_projects_with_other_words_are_compared_under_labels(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """As openrlbenchmark does: each source has its own words for experiment, task and metric."""
    code, out, err = lab_compare(
        capsys,
        f"wandb:?we={ENTITY}&wpn=lab&cen=algo&metric={METRIC}&cl=Ours\\nhere",
        f"wandb:ppo?we={ENTITY}&wpn=cleanrl&ceik=env_id&metric=charts/return&tag=v1&cl=CleanRL PPO",
        f"--metric={METRIC}",
        "--score=last",
    )
    assert (code, err) == (0, "")
    assert rows_of(out) == {"CleanRL PPO": "10.5", "Ours here": "1"}


def test_tags_are_all_asked_for_and_seeds_either(server: WandbStandIn) -> None:
    def ids(query: str) -> list[str]:
        return [record.id for record in load([f"wandb:{ENTITY}/{query}"], ["charts/return"]).records]

    assert ids("cleanrl?tag=v1&tag=good") == ["clean0"]
    assert ids("cleanrl?tag=good,v1") == ["clean0", "clean1"]
    assert ids("lab?seed=0&seed=2") == ["run0", "run2"]
    assert ids(f"lab?user={ENTITY}&config.algo=dqn&name=run1") == ["run1"]
    assert ids("lab/run2") == ["run2"]


def test_all_pages_of_runs_and_of_rows_are_read(server: WandbStandIn) -> None:
    for number in range(120):
        add(server, f"many{number:03}", "many", {"seed": number}, METRIC, number)
    sparse = add(server, "sparse", "sparse", {}, METRIC, 1.0, rows=1500)
    for number, row in enumerate(sparse.history):
        row["_step"] = row["global_step"] = 1000 * number
        if number % 3:
            del row[METRIC]
        if number % 2:
            del row["global_step"]  # then it is W&B's own step
    found = load([f"wandb:{ENTITY}/many"], [METRIC])
    assert [record.id for record in found.records] == [f"many{number:03}" for number in range(120)]
    (record,) = load([f"wandb:{ENTITY}/sparse"], [METRIC]).records
    assert record.series[METRIC].x.tolist() == [1000 * number for number in range(0, 1500, 3)]
    assert record.over(METRIC, "time").x.tolist() == [float(number) for number in range(0, 1500, 3)]


def test_runs_are_read_several_at_a_time(server: WandbStandIn) -> None:
    for number in range(24):
        add(server, f"many{number}", "many", {}, METRIC, number)
    load([f"wandb:{ENTITY}/many"], [METRIC])  # the service is there
    server.delay = 0.1
    began = time.monotonic()
    load([f"wandb:{ENTITY}/many"], [METRIC])
    assert time.monotonic() - began < 24 * 3 * 0.1 / 2, "one after the other each takes three answers"


def test_rows_that_the_server_does_not_show_are_told_of(server: WandbStandIn) -> None:
    server.hides_rows = 2
    found = load([f"wandb:{ENTITY}/lab/run0"], [METRIC])
    (note,) = found.records[0].notes
    assert note == "run0: W&B shows 10 of 12 rows"


# ---- what may go wrong ----


def good_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    session(folder, "disabled", [(0, {METRIC: 5.0})], "finished", {"seed": 7, "algo": "ours"})
    return folder


def make_ill(server: WandbStandIn, patch: pytest.MonkeyPatch, how: str) -> str:
    """Lets something be wrong with W&B; returns the source to ask for."""
    if how == "no key":
        patch.delenv("WANDB_API_KEY")
    elif how == "offline":
        patch.setenv("WANDB_MODE", "offline")
    elif how == "dead":
        server.die()
    elif how == "silent":
        server.silent = True
    elif how == "errors":
        server.errors = 10**9
    elif how == "key refused":
        server.refused.add("Viewer")
    elif how == "empty":
        server.runs.clear()
    return f"wandb:{ENTITY}/" + {"no project": "lub", "no run fits": "lab?seed=9"}.get(how, "lab")


ILL = {
    "no key": "no W&B key for 127.0.0.1: run `wandb login`",
    "offline": "WANDB_MODE is 'offline': unset it to read from W&B",
    "dead": "cannot be reached (Connection refused)",
    "silent": "takes connections and does not answer within 5 s",
    "errors": "W&B's server does not answer as it should (",
    "key refused": "permission denied",
    "no project": "no such project, or the key may not read it. Did you mean 'lab'?",
    "no run fits": 'no run fits [{"config.seed.value": 9}]',
    "empty": "no such project, or the key may not read it.",
}


@pytest.mark.parametrize("how", ILL)
def test_without_w_and_b_there_is_one_line_in_seconds_and_the_rest_is_the_result(
    server: WandbStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: str
) -> None:
    source = make_ill(server, monkeypatch, how)
    began = time.monotonic()
    code, out, err = lab_compare(capsys, source)
    assert time.monotonic() - began < 15
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"lab: wandb:{ENTITY}/")
    assert ILL[how] in line
    code, out, err = lab_compare(capsys, source, good_folder(tmp_path))
    assert (code, err) == (0, "")
    (note,) = (line for line in out.splitlines() if line.startswith(f"note: wandb:{ENTITY}/"))
    assert ILL[how] in note


def test_a_server_that_fails_in_the_middle_leaves_the_runs_read_before(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "READERS", 1)
    for number in range(30):
        add(server, f"many{number:02}", "many", {"seed": number}, METRIC, number)
    answer, asked = server.answer, set[str]()

    def fails(operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = str(variables.get("name") or variables.get("run"))
        asked.add(run)
        return None if operation == "HistoryPage" and run > "many20" else answer(operation, variables)

    monkeypatch.setattr(server, "answer", fails)
    code, out, err = lab_compare(capsys, f"wandb:{ENTITY}/many", f"--metric={METRIC}")
    assert (code, err) == (0, "")
    assert f"note: wandb:{ENTITY}/many: 9 of 30 runs cannot be read: W&B's server does not answer" in out
    assert max(asked) == "many23", "after three that failed no other is asked for"


def test_a_run_that_the_server_cannot_give_costs_no_other(server: WandbStandIn) -> None:
    answer = server.answer
    server.answer = lambda operation, variables: (  # type: ignore[method-assign]
        None if operation == "HistoryPage" and variables["run"] == "run1" else answer(operation, variables)
    )
    found = load([f"wandb:{ENTITY}/lab"], [METRIC])
    assert [record.id for record in found.records] == ["run0", "run2"]
    (note,) = found.notes
    assert note.startswith(f"wandb:{ENTITY}/lab: 1 of 3 runs cannot be read: W&B's server does not answer as")


def test_one_project_of_two_that_is_not_there(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load([f"wandb:{ENTITY}/lab", f"wandb:{ENTITY}/nothing"], [METRIC])
    assert len(found.records) == 3
    assert found.notes == [f"wandb:{ENTITY}/nothing: no such project, or the key may not read it."]
    with pytest.raises(LabError, match=r"no such project.* \(and 1 more like it\)\. Name a run folder"):
        load([f"wandb:{ENTITY}/nothing", f"wandb:{ENTITY}/neither"], [METRIC])
