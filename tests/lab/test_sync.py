"""`lab sync`: what it calls verified is on the server, every row once, whatever happened before.

Runs are made by the lab's own tracker, sent by the real `wandb sync` and read back by the real `wandb.Api`;
only the server is a stand-in.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab import records, sync, sync_server, sync_verify
from lab.errors import LabError
from lab.run import Run
from lab.sync_rows import identity
from lab.sync_source import Source, locked
from lab.tracking import Tracker, read_metrics
from tests.lab.wandb_stand_in import WandbStandIn
from tests.lab.wandb_world import end_service, use, wandb_world

PROGRAM = """
import argparse, sys
from lab import sync
parser = argparse.ArgumentParser()
sync.add_arguments(parser)
sys.exit(sync.do(parser.parse_args()))
"""


@pytest.fixture(autouse=True)
def impatient(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "home").mkdir()
    with wandb_world(tmp_path / "home", timeout_seconds=2) as patch:
        patch.setattr(sync_verify, "SETTLE_SECONDS", 0.2)
        patch.setattr(sync_server, "API_SECONDS", 2)
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A live server, and a key for it."""
    with WandbStandIn() as stand_in:
        use(stand_in, monkeypatch)
        yield stand_in


@contextlib.contextmanager
def restarted(server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A server that knows what the one before it stored."""
    with WandbStandIn() as again:
        again.runs = server.runs
        use(again, monkeypatch)
        yield again


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def session(
    folder: Path,
    steps: Sequence[int],
    mode: str = "offline",
    media: bool = False,
    finish: bool = True,
    why: str = "asked for",
) -> str:
    """One session of a run, new or resumed, which logs a row a step; returns the run's id."""
    if (folder / "run.json").exists():
        while list(folder.glob(f"wandb/*{time.strftime('%Y%m%d_%H%M%S')}*")):
            time.sleep(0.02)  # W&B names its folders by the second, and no process resumes that fast
        run = Run.resume(folder)
        run.continue_from(run.metrics.stat().st_size)
    else:
        config = {"seed": 1, "agent": {"lr": 0.5}, "tracking": {"tags": ["tagged"]}}
        details: dict[str, Any] = {"pipeline": "rl", "job_type": "train", "name": "pong", "group": "dqn"}
        run = Run.create(folder, config=config, x_axis="agent_steps", compute={"device": "cpu"}, **details)
    with run.recording_its_end():
        track = run.tracker(mode, why, "lab-tests", None, ["tagged"])
        for step in steps:
            track.log(step, row(step))
        if media:
            Image.new("RGB", (2, 2)).save(run.media / "curve.png")
            track.log_media(steps[-1], "media/curve", run.media / "curve.png")
            track.log_table(steps[-1], "samples", ["text", "score"], [["a", 1.5], ["b", 2.5]])
        run.summarize(best=0.75)
        track.finish(0, {"best": 0.75})
        run.end("finished" if finish else "interrupted")
    end_service()  # the process ends; the file is whole
    return run.info["id"]


def log_without_wandb(folder: Path, steps: Sequence[int]) -> None:
    """Rows that only metrics.jsonl has."""
    track = Tracker(folder, {}, "disabled", {})
    for step in steps:
        track.log(step, row(step))
    track.finish(0)


def row(step: int) -> dict[str, Any]:
    odd = {0: float("nan"), 1: float("inf"), 2: -float("inf")}.get(step % 5, step)
    return {"train/loss": step / 7, "train/odd": odd, "train/none": None, "eval/accuracy": 0.1 + 0.2}


def synced(capsys: pytest.CaptureFixture[str], *arguments: Path | str, code: int = 0, runs: int = 1) -> str:
    """The last line of a `lab sync`."""
    parser = argparse.ArgumentParser()
    sync.add_arguments(parser)
    capsys.readouterr()
    result = sync.do(parser.parse_args([str(argument) for argument in arguments]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (runs + 1 if runs > 1 else 1), lines
    assert result == code, lines
    return "\n".join(lines)


def steps_of(server: WandbStandIn, name: str) -> list[int]:
    """The steps of the plain rows that the server stored, each checked for its values."""
    stored = [stored for stored in server.runs[name].history if "train/loss" in stored]
    for one in stored:
        for key, value in row(one["global_step"]).items():
            assert str(one[key]) == str(value) or one[key] == value, (key, one)
    return [one["global_step"] for one in stored]


def wait_for_the_lock(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with locked(folder) as handles:
            if handles:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- the usual way ----


def test_runs_are_sent_with_all_that_belongs_to_them_and_are_known_to_be_there(
    server: WandbStandIn, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    session(runs / "pong", [0, 1, 2, 3], finish=False)
    name = session(runs / "pong", [3, 4], media=True)  # goes over step 3 once more, as after a crash
    apart = session(runs / "group/apart", range(5), mode="disabled")
    session(runs / "empty", [], mode="disabled", why="W&B offline is not available (...)")
    (runs / "broken").mkdir()
    (runs / "broken/run.json").write_text("{")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for variable in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.setenv(variable, "never")  # of some other run: it must not reach this one

    running = Run.resume(runs / "group/apart")
    text = synced(capsys, runs, code=2, runs=4)
    running._release_lock()
    assert "broken/run.json: damaged" in text
    assert "group/apart: skipped: it is running or being sent just now; run it again afterwards\n" in text
    assert "empty: nothing to send: it has no rows\n" in text
    assert "pong: sent and verified: 8 rows, last step 4\n4 runs: 2 in order, 2 not" in text
    assert list(server.runs) == [name]
    run = server.runs[name]
    assert steps_of(server, name) == [0, 1, 2, 3, 3, 4]
    assert run.column("_step") == list(range(8)), "W&B numbers them through"
    assert run.column("media/curve")[0]["_type"] == "image-file"
    assert run.column("samples")[0]["_type"] == "table-file"
    assert any(file.startswith("media/images/media/curve") for file in run.files)
    assert (run.config["seed"], run.config["agent"], run.config["x_axis"]) == (1, {"lr": 0.5}, "agent_steps")
    assert (run.state, run.summary["best"]) == ("finished", 0.75)
    wanted = {"project": "lab-tests", "groupName": "dqn", "displayName": "pong", "tags": ["tagged"]}
    assert {key: run.settings[key] for key in wanted} == wanted
    assert list((tmp_path / "here").iterdir()) == [], "W&B leaves nothing where one stands"
    record = json.loads((runs / "pong/wandb/synced.json").read_text())
    assert (record["rows"], record["run"]) == ("8 rows, last step 4", f"tester/lab-tests/{name}")
    monkeypatch.delenv("WANDB_PROJECT")
    sources = [str(runs / "pong"), str(runs / "pong/wandb"), "wandb:tester/lab-tests"]
    kept = [records.load([source], ["train/loss"]).records[0].series["train/loss"] for source in sources]
    assert [series.x.tolist() for series in kept] == [[0, 1, 2, 3, 4]] * 3, "all compare the same"

    # A run that W&B never heard of.
    assert "made without W&B on purpose, not sent; --disabled sends it" in synced(capsys, runs / "group")
    assert synced(capsys, runs / "group", "--disabled").endswith(
        "sent and verified: 5 rows, last step 4 (5 of them from metrics.jsonl)"
    )
    run = server.runs[apart]
    assert steps_of(server, apart) == [0, 1, 2, 3, 4]
    assert (run.state, run.summary["best"], run.summary["global_step"]) == ("finished", 0.75, 4)
    assert run.config["agent"] == {"lr": 0.5}
    assert {key: run.settings[key] for key in wanted} == wanted
    assert [path.name for path in (runs / "group/apart/wandb").iterdir()] == ["synced.json"]

    # What is known to be there is not even asked about.
    assert "(verified" not in synced(capsys, runs / "group", "--force")
    assert "group/apart: already there: 5 rows, last step 4 (verified 2" in synced(capsys, runs / "group")
    server.die()
    [first, _] = sorted(runs.glob("pong/wandb/offline-run-*"))
    assert "pong: already there: 8 rows, last step 4 (verified 2" in synced(capsys, first)
    log_without_wandb(runs / "pong", [5])
    with pytest.raises(LabError, match="cannot be reached"):
        synced(capsys, runs / "pong")


# ---- interrupted ----


@pytest.mark.slow
def test_killed_at_any_moment_and_repeated_it_sends_every_row_once(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(40))
    for rows, kill in ((20, os.killpg), (30, os.kill)):  # while a file is sent, and while rows are
        server.silent_after_rows = rows
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(runs)], start_new_session=True)
        while not server.silent:
            assert process.poll() is None, "it must not end before it is killed"
            time.sleep(0.01)
        kill(process.pid, signal.SIGKILL)
        process.wait()
        if kill is os.kill:  # what it started lives on, and keeps others away
            assert "skipped: it is running or being sent just now" in synced(capsys, runs, code=2)
        assert len(server.runs[name].history) == rows
        server.silent = False
        wait_for_the_lock(runs / "pong")
    assert synced(capsys, runs).endswith(": 40 rows, last step 39")
    assert steps_of(server, name) == list(range(40))


def test_a_server_that_dies_in_the_middle_gets_only_what_is_missing_later(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It dies in an online run, and again while that is completed."""
    with WandbStandIn() as server:
        use(server, monkeypatch)
        server.die_after_rows = 4
        name = session(runs / "pong", range(10), mode="online", media=True)
        assert len(server.runs[name].history) == 4
    with restarted(server, monkeypatch) as again:
        again.die_after_rows = 3
        assert "not verified: W&B's server" in synced(capsys, runs, code=2)
        assert not (runs / "pong/wandb/synced.json").exists()
        assert len(server.runs[name].history) == 7
    with restarted(server, monkeypatch) as again:
        assert synced(capsys, runs).endswith("sent and verified: 12 rows, last step 9")
        assert steps_of(again, name) == list(range(10)), "in their order, too"
        run = again.runs[name]
        for key in ("media/curve", "samples"):
            [media] = run.column(key)
            assert media["path"] in run.files
        assert (run.state, run.summary["global_step"], run.summary["best"]) == ("finished", 9, 0.75)


# ---- servers that are not well ----


def test_nothing_counts_as_sent_before_the_server_shows_it(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`wandb sync` itself ends with 0, and marks as synced what the server did not store."""
    name = session(runs / "pong", range(5))
    server.drops_rows, server.errors = True, 1
    assert synced(capsys, runs, code=2).endswith("pong: incomplete: the server has 0 of 5 rows; run it again")
    assert list(runs.glob("pong/wandb/offline-run-*/*.synced")), "what W&B thinks of it"
    assert server.runs[name].state == "finished"
    server.drops_rows, server.hides_rows = False, 2
    assert synced(capsys, runs, code=2).endswith("incomplete: the server has 3 of 5 rows; run it again")
    text = synced(capsys, runs, code=2)
    assert "not sent: the server counts 2 rows more than it shows, maybe the 2 that seem" in text
    server.hides_rows = 0
    assert synced(capsys, runs).endswith("already there: 5 rows, last step 4")
    assert steps_of(server, name) == [0, 1, 2, 3, 4]

    # Rows that are only there: what seems to be missing may be one of them in another form.
    shutil.rmtree(runs / "pong/wandb")  # metrics.jsonl has all of it
    stored = server.runs[name].history
    stored.append({**stored[-1], "_step": 5})
    text = synced(capsys, runs, code=2)
    assert "not as here: W&B has all 5 rows, last step 4, and 1 row more: sent twice by something" in text
    [*_, last] = (runs / "pong/metrics.jsonl").read_text().splitlines(keepends=True)
    (runs / "pong/metrics.discarded.jsonl").write_text(last)  # unless a resumed run computed it anew
    (runs / "pong/wandb/synced.json").mkdir(parents=True)
    assert "pong: cannot be written: Is a directory. See to the disk" in synced(capsys, runs, code=2)
    (runs / "pong/wandb/synced.json").rmdir()
    assert "already there: 5 rows" in synced(capsys, runs)
    stored[0]["train/loss"] = 0.5
    text = synced(capsys, runs, "--force", code=2)
    assert "not sent: the server lacks 1 row of this run and has 1 that are not here" in text
    assert len(stored) == 6


@pytest.mark.parametrize("wrong", ["no key", "bad key", "refused", "silent", "offline"])
def test_without_a_server_it_is_one_line_within_seconds_and_nothing_changes(
    server: WandbStandIn, runs: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    session(runs / "pong", [1], mode="disabled", why="no key")
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, but nobody listens
        if wrong == "no key":
            monkeypatch.delenv("WANDB_API_KEY")
        elif wrong == "bad key":
            monkeypatch.setenv("WANDB_API_KEY", "short")
        elif wrong == "refused":
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{bound.getsockname()[1]}")
        elif wrong == "silent":
            server.silent = True
        else:
            monkeypatch.setenv("WANDB_MODE", "offline")
        began = time.monotonic()
        with pytest.raises(LabError) as caught:
            list(sync_verify.sync([runs]))
        assert time.monotonic() - began < 15
    line = str(caught.value)
    assert not line.startswith("lab")
    assert line.endswith("nothing is lost.")
    assert "\n" not in line
    says = {
        "no key": "no W&B key for 127.0.0.1. Run `wandb login`",
        "bad key": f"W&B's server {server.url} refuses or does not answer (",
        "refused": "cannot be reached (Connection refused). Run `wandb login`, or see to the network",
        "silent": "takes connections and does not answer within 5 s. Run `wandb login`",
        "offline": "WANDB_MODE is 'offline'. Unset it",
    }
    assert says[wrong] in line
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
    assert server.runs == {}


# ---- runs that are not well ----

KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.lab.test_sync import row
from lab.run import Run
details = {"pipeline": "rl", "job_type": "train", "name": "n", "group": "dqn", "x_axis": "agent_steps"}
run = Run.create(Path(sys.argv[1]), config={"seed": 1, "agent": {"lr": 0.5}}, compute={}, **details)
track = run.tracker("offline", "no key", "lab-tests", None, [])
for step in range(20):
    track.log(step, row(step))
time.sleep(1.5)  # W&B writes once a second
for step in range(20, 30):
    track.log(step, row(step))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_completed_from_its_metrics(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-c", KILLED, str(runs / "pong"), str(Path(__file__).parents[2])]
    subprocess.run(program, check=False)
    logged = [stored["_time"] for stored in read_metrics(runs / "pong/metrics.jsonl")]
    with (runs / "pong/metrics.jsonl").open("ab") as file:
        file.write(b'{"damaged \xff\n{"cut o')
    text = synced(capsys, runs)
    assert "sent and verified: 30 rows, last step 29 (" in text
    assert re.search(r"cut off file: offline-run-\w+-\w+; 1 damaged line lost\)", text), text
    if lacking := re.search(
        r"(\d+) of them from metrics.jsonl; ", text
    ):  # W&B may have had the time to write all
        assert 0 < int(lacking[1]) < 30
    [name] = server.runs
    assert steps_of(server, name) == list(range(30))
    assert server.runs[name].state == "failed"
    times = [stored["_timestamp"] for stored in server.runs[name].history]
    assert times == pytest.approx(logged, abs=1), "when it was logged, not when it was sent"


def test_what_a_damaged_wandb_file_lacks_comes_from_the_metrics(runs: Path) -> None:
    session(runs / "pong", range(30))
    [file] = runs.glob("pong/wandb/offline-run-*/*.wandb")
    whole = file.read_bytes()
    third = len(whole) * 2 // 3
    flipped = whole[:third] + bytes([whole[third] ^ 0xFF]) + whole[third + 1 :]
    source = Source(runs / "pong", Run.open(runs / "pong").info)
    for content, least in ((whole[:third], 1), (flipped, 1), (whole[:7], 0)):
        file.write_bytes(content)
        (of_file, rest), damaged = source.parts()
        assert (of_file.is_cut, damaged) == (True, 0)
        assert least <= len(of_file.rows) < 30
        assert [row["global_step"] for row in (*of_file.rows, *rest.rows)] == list(range(30))


def test_a_path_that_is_none_is_one_line_and_nothing_is_sent(
    server: WandbStandIn, runs: Path, tmp_path: Path
) -> None:
    session(runs / "pong", [1], mode="disabled", why="no key")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for path, line in (
        (runs / "pog", "not there. Did you mean 'pong'? Name a run folder or a folder of them."),
        (tmp_path / "nothing", "no run folder in it. Name one, e.g. runs/pong. W&B's own folders, "),
        (tmp_path / "notes.txt", "no run folder in it. Name one, e.g. runs/pong. W&B's own folders, "),
    ):
        with pytest.raises(LabError) as caught:
            list(sync_verify.sync([runs, path]))
        assert str(caught.value).startswith(f"{path}: {line}")
    assert server.runs == {}


# ---- rows ----


def test_a_row_is_the_same_however_it_was_kept() -> None:
    ours = {
        "global_step": 3,
        "a/b": 1.0,
        "bad": "nan",
        "big": "inf",
        "none": None,
        "n": {"x": 2},
        "_time": 7.5,
    }
    from_file = {"global_step": 3, "a/b": 1, "bad": "NaN", "big": "Infinity", "n.x": 2.0, "_step": 9}
    from_server = {"_timestamp": 7.4, "global_step": 3.0, "a/b": 1.0000000000001, "bad": float("nan")}
    from_server |= {"big": float("inf"), "n": {"x": 2}, "none": None}
    assert identity(ours) == identity(from_file) == identity(from_server)
    media = {"global_step": 3, "m": {"_type": "image-file", "path": "p1", "sha256": "1"}}
    flat = {"global_step": 3, "m._type": "image-file", "m.path": "p2"}
    assert identity(media) == identity(flat)
    others = [
        ours | {"a/b": 1.001}, ours | {"bad": "inf"}, ours | {"big": "-inf"}, ours | {"global_step": 4},
        ours | {"more": 0}, {key: value for key, value in ours.items() if key != "n"}, ours | {"bad": "text"},
        media, {"global_step": 3, "m": {"_type": "video-file"}},
    ]  # fmt: skip
    assert len({identity(other) for other in [ours, *others]}) == len(others) + 1
    assert identity({"x": "1"}) != identity({"x": 1})


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        pytest.param({"loss": -0.0}, {"loss": 0}, id="minus zero"),
        pytest.param({"n": 10**400, "m": -(10**400)}, {"n": math.inf, "m": "-Infinity"}, id="beyond floats"),
        pytest.param({"l": [1.0, 2.5, math.nan, None]}, {"l": [1, 2.5, "NaN", None]}, id="list"),
        pytest.param({"l": [12345678901234567890123]}, {"l": [1.2345678901234568e22]}, id="large in a list"),
        pytest.param({"l": [{"b": 1.0}]}, {"l": [{"b": 1}]}, id="mappings in a list"),
        pytest.param({"a": {"b": 1.0, "c": {}}, "e": {}}, {"a": {"b": 1}}, id="empty mappings"),
        pytest.param({"": 1, "a": 1}, {"a": 1}, id="no name"),
        pytest.param({"a": "x\ud800"}, {"a": "x\ufffd"}, id="half a character"),
    ],
)
def test_a_value_that_wandb_keeps_otherwise_is_the_same(kept: dict[str, Any], shown: dict[str, Any]) -> None:
    """Each of these was incomplete for ever, or sent twice where it was in W&B's file, too."""
    assert identity({"global_step": 1, **kept}) == identity({"global_step": 1, **shown})


def test_values_in_a_list_are_told_apart() -> None:
    rows = [{"l": [1]}, {"l": [2]}, {"l": [1, None]}, {"l": ["1"]}, {"l": {"0": 1}}, {"l": [[1]]}, {"l": 1}]
    assert len({identity(one) for one in rows}) == len(rows)


@pytest.mark.slow
def test_odd_values_of_a_run_arrive(
    runs: Path, server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real `wandb`, which says what it keeps of them."""
    session(runs / "pong", range(2))
    log_without_wandb(runs / "pong", [2])
    odd = {"a": -0.0, "b": [1.0, 2.5], "c": [{"d": 1.0}], "e": {}, "": 1, "f": "\ud800", "n": 10**400}
    with (runs / "pong" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"global_step": 3, **odd, "g": [math.nan, math.inf]}) + "\n")
    assert "sent and verified: 4 rows" in synced(capsys, runs)
