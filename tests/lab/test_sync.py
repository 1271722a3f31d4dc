"""`lab sync`: what it calls verified is on the server, every row once, whatever happened before.

Runs are made by the lab's own tracker, sent by the real `wandb sync` and read back by the real `wandb.Api`;
only the server is a stand-in.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lab import sync
from lab.errors import LabError
from lab.run import Run
from lab.tracking import Tracker, read_metrics
from tests.lab.wandb_stand_in import WandbStandIn

KEY = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import argparse, sys
from lab import sync
parser = argparse.ArgumentParser()
sync.add_arguments(parser)
sys.exit(sync.do(parser.parse_args()))
"""


@pytest.fixture(autouse=True)
def quick_and_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings and no home of this machine; little patience; W&B's service is gone afterwards."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER"):
        # Below one second, and from no retry at all, W&B would make its own defaults.
        for name, value in (("MAX", 1), ("WAIT_MIN_SECONDS", 1), ("WAIT_MAX_SECONDS", 1)):
            monkeypatch.setenv(f"WANDB_X_{part}_RETRY_{name}", str(value))
        monkeypatch.setenv(f"WANDB_X_{part}_TIMEOUT_SECONDS", "2")
    monkeypatch.setattr(sync, "SETTLE_SECONDS", 0.4)
    monkeypatch.setattr(sync, "API_SECONDS", 3)
    yield
    end_service()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A live server, and a key for it."""
    with WandbStandIn() as stand_in:
        use(stand_in, monkeypatch)
        yield stand_in


def use(server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    end_service()  # it remembers the server before
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@contextlib.contextmanager
def restarted(server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A server that knows what the one before it stored."""
    with WandbStandIn() as again:
        again.runs = server.runs
        use(again, monkeypatch)
        yield again


def end_service() -> None:
    if "wandb" in sys.modules:
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()


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


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the usual way ----


def test_an_offline_run_is_sent_with_all_that_belongs_to_it(
    server: WandbStandIn, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = session(runs / "pong", range(10), media=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for variable in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RESUME"):
        monkeypatch.setenv(variable, "never")  # of some other run: it must not reach this one
    assert synced(capsys, runs).endswith("pong: sent and verified: 12 rows, last step 9")
    assert list(server.runs) == [name]
    run = server.runs[name]
    assert steps_of(server, name) == list(range(10))
    assert run.column("media/curve")[0]["_type"] == "image-file"
    assert run.column("samples")[0]["_type"] == "table-file"
    assert any(file.startswith("media/images/media/curve") for file in run.files)
    assert (run.config["seed"], run.config["agent"], run.config["x_axis"]) == (1, {"lr": 0.5}, "agent_steps")
    assert (run.state, run.summary["best"]) == ("finished", 0.75)
    wanted = {"project": "lab-tests", "groupName": "dqn", "displayName": "pong", "tags": ["tagged"]}
    assert {key: run.settings[key] for key in wanted} == wanted
    assert list((tmp_path / "here").iterdir()) == [], "W&B leaves nothing where one stands"
    record = json.loads((runs / "pong/wandb/synced.json").read_text())
    assert (record["rows"], record["run"]) == ("12 rows, last step 9", f"tester/lab-tests/{name}")


def test_a_run_that_is_there_is_not_sent_again_and_not_even_asked_about(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(5))
    synced(capsys, runs)
    (runs / "pong/wandb/synced.json").rename(runs / "kept.json")
    assert "already there: 5 rows, last step 4" in synced(capsys, runs / "pong")
    assert "(verified 2" in synced(capsys, runs / "pong")
    assert "(verified" not in synced(capsys, runs / "pong", "--force")
    assert steps_of(server, name) == [0, 1, 2, 3, 4]
    server.die()
    assert "already there: 5 rows, last step 4 (verified 2" in synced(capsys, runs / "pong")
    log_without_wandb(runs / "pong", [5])
    with pytest.raises(LabError, match="cannot be reached"):
        synced(capsys, runs / "pong")


def test_the_sessions_of_a_resumed_run_become_one_run(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(runs / "pong", [0, 1, 2], finish=False)
    session(runs / "pong", [3, 4], finish=False)
    name = session(runs / "pong", [4, 5])  # goes over step 4 once more, as after a crash
    assert len(list(runs.glob("pong/wandb/offline-run-*"))) == 3
    assert synced(capsys, runs).endswith("sent and verified: 7 rows, last step 5")
    assert steps_of(server, name) == [0, 1, 2, 3, 4, 4, 5]
    assert server.runs[name].column("_step") == list(range(7)), "W&B numbers them through"
    session(runs / "pong", [6, 7])
    assert synced(capsys, runs).endswith("sent and verified: 9 rows, last step 7")
    assert steps_of(server, name) == [0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_several_runs_are_sent_and_one_bad_one_spoils_only_itself(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = session(runs / "a", [1]), session(runs / "group/b", [2])
    (runs / "broken").mkdir()
    (runs / "broken/run.json").write_text("{")
    session(runs / "empty", [])
    text = synced(capsys, runs, code=2, runs=4)
    assert "a: sent and verified: 1 row, last step 1\n" in text
    assert "group/b: sent and verified: 1 row, last step 2\n" in text
    assert "broken/run.json: damaged" in text
    assert "empty: nothing to send: it has no rows\n" in text
    assert text.endswith("4 runs: 3 in order, 1 not")
    assert set(server.runs) == {first, second}


def test_wandb_files_are_found_by_themselves_and_within_a_run_folder(
    server: WandbStandIn, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(runs / "pong", [1, 2], finish=False)
    name = session(runs / "pong", [3])
    [first, second] = sorted(runs.glob("pong/wandb/offline-run-*"))
    moved = tmp_path / "elsewhere/wandb"
    moved.mkdir(parents=True)
    for part in (first, second):
        subprocess.run(["cp", "-r", str(part), str(moved)], check=True)
    text = synced(capsys, moved / first.name)  # one of its files stands for all
    assert text.endswith(f"{second.name}/run-{name}.wandb: sent and verified: 3 rows, last step 3")
    assert steps_of(server, name) == [1, 2, 3]
    assert server.runs[name].settings["displayName"] == "pong"
    assert "already there: 3 rows" in synced(capsys, next((moved / second.name).glob("*.wandb")))
    assert "pong: already there: 3 rows" in synced(capsys, second), "in a run folder it means the run"


# ---- interrupted ----


def test_killed_at_any_moment_and_repeated_it_sends_every_row_once(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed with all that it started, as by a power cut: early, and while rows are on their way."""
    session(runs / "pong", range(60), finish=False)
    name = session(runs / "pong", range(60, 120))
    log_without_wandb(runs / "pong", range(120, 150))
    command = [sys.executable, "-c", PROGRAM, str(runs)]
    for rows in (None, 0, 20, 60, 90, 120, 140):
        server.silent_after_rows = rows
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        began = time.monotonic()
        while not server.silent and (rows is not None or time.monotonic() < began + 0.5):
            assert process.poll() is None, "it must not end before it is killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        server.silent = False
        assert len(server.runs[name].history if rows is not None else []) == (rows or 0)
    assert "sent and verified: 150 rows, last step 149 (30 of them from" in synced(capsys, runs)
    assert steps_of(server, name) == list(range(150))


@pytest.mark.parametrize("rows", [0, 3, 8])
def test_a_server_that_dies_in_the_middle_gets_only_what_is_missing_later(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    session(runs / "pong", range(5), finish=False)
    name = session(runs / "pong", range(5, 10), media=True)
    with WandbStandIn() as server:
        use(server, monkeypatch)
        server.die_after_rows = rows
        assert "not verified: W&B's server" in synced(capsys, runs, code=2)
        assert not (runs / "pong/wandb/synced.json").exists()
        assert len(server.runs[name].history) == rows
    with restarted(server, monkeypatch) as again:
        assert synced(capsys, runs).endswith("sent and verified: 12 rows, last step 9")
        assert steps_of(again, name) == list(range(10)), "in their order, too"
        run = again.runs[name]
        assert [len(run.column(key)) for key in ("media/curve", "samples")] == [1, 1]
        for key in ("media/curve", "samples"):
            assert run.column(key)[0]["path"] in run.files
        assert (run.state, run.summary["global_step"], run.summary["best"]) == ("finished", 9, 0.75)


def test_a_sender_that_outlives_a_killed_lab_keeps_others_away(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(20))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(runs)], start_new_session=True)
    while name not in server.runs:
        time.sleep(0.01)
    server.silent = True  # the rows are on their way
    process.kill()
    process.wait()
    assert "skipped: it is running or being sent just now" in synced(capsys, runs, code=2)
    server.silent = False
    deadline = time.monotonic() + 20
    while True:
        with sync._lock(runs / "pong/.lock") as handles:
            if handles:
                break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    synced(capsys, runs)
    assert steps_of(server, name) == list(range(20))


def test_an_online_run_whose_server_died_is_completed(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with WandbStandIn() as server:
        use(server, monkeypatch)
        server.die_after_rows = 4
        name = session(runs / "pong", range(10), mode="online")
        assert len(server.runs[name].history) == 4
    with restarted(server, monkeypatch) as again:
        assert synced(capsys, runs).endswith("sent and verified: 10 rows, last step 9")
        assert steps_of(again, name) == list(range(10))


# ---- servers that are not well ----


def test_a_server_that_stores_nothing_but_says_so_is_found_out(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`wandb sync` itself ends with 0 and marks the run as synced."""
    name = session(runs / "pong", range(5))
    server.drops_rows = True
    text = synced(capsys, runs, code=2)
    assert text.endswith("pong: incomplete: the server has 0 of 5 rows; run it again")
    assert list(runs.glob("pong/wandb/offline-run-*/*.synced")), "what W&B thinks of it"
    assert server.runs[name].state == "finished"
    server.drops_rows = False
    assert synced(capsys, runs).endswith("sent and verified: 5 rows, last step 4")
    assert steps_of(server, name) == [0, 1, 2, 3, 4]


def test_an_error_of_the_server_is_ridden_out(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(5))
    server.errors = 1
    assert "sent and verified: 5 rows" in synced(capsys, runs)
    assert steps_of(server, name) == [0, 1, 2, 3, 4]


def test_rows_that_are_counted_but_not_shown_yet_are_not_sent_again(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(5))
    server.hides_rows = 2
    assert synced(capsys, runs, code=2).endswith("incomplete: the server has 3 of 5 rows; run it again")
    text = synced(capsys, runs, code=2)
    assert "not sent: the server counts 2 rows more than it shows, maybe the 2 that seem" in text
    server.hides_rows = 0
    assert synced(capsys, runs).endswith("already there: 5 rows, last step 4")
    assert steps_of(server, name) == [0, 1, 2, 3, 4]


def test_rows_that_are_only_on_the_server_stop_the_sending(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever they are: what seems to be missing may be there in another form, and would be doubled."""
    name = session(runs / "pong", range(5))
    synced(capsys, runs)
    stored = server.runs[name].history
    stored.append({**stored[-1], "_step": 5})
    text = synced(capsys, runs, "--force", code=2)
    assert "not as here: W&B has all 5 rows, last step 4, and 1 row more: sent twice by something" in text
    stored[0]["train/loss"] = 0.5
    text = synced(capsys, runs, "--force", code=2)
    assert "not sent: the server lacks 1 row of this run and has 2 that are not here" in text
    assert len(stored) == 6


@pytest.mark.parametrize("wrong", ["no key", "bad key", "refused", "silent", "offline"])
def test_without_a_server_it_is_one_line_within_seconds_and_nothing_changes(
    server: WandbStandIn, runs: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    session(runs / "pong", [1])
    before = tree(runs)
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
            list(sync.sync([runs]))
        assert time.monotonic() - began < 15
    line = str(caught.value)
    assert line.startswith("lab sync: ")
    assert line.endswith("nothing is lost.")
    assert "\n" not in line
    says = {
        "no key": "no W&B key for 127.0.0.1. Run `wandb login`",
        "bad key": f"W&B's server {server.url} refuses or does not answer (",
        "refused": "cannot be reached (Connection refused). Run `wandb login`, or see to the network",
        "silent": f"W&B's server {server.url} refuses or does not answer (",
        "offline": "WANDB_MODE is 'offline'. Unset it",
    }
    assert says[wrong] in line
    assert tree(runs) == before
    assert server.runs == {}


# ---- runs that are not well ----


def test_a_killed_run_is_completed_from_its_metrics(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = """
        import os, signal, sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from tests.lab.test_sync import row
        from lab.run import Run
        details = {"pipeline": "rl", "job_type": "train", "name": "n", "group": "g", "x_axis": "agent_steps"}
        run = Run.create(Path(sys.argv[1]), config={"seed": 1}, compute={}, **details)
        track = run.tracker("offline", "no key", "lab-tests", None, [])
        for step in range(20):
            track.log(step, row(step))
        time.sleep(2.5)  # W&B writes once a second
        for step in range(20, 30):
            track.log(step, row(step))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    arguments = [str(runs / "pong"), str(Path(__file__).parents[2])]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), *arguments], check=False)
    text = synced(capsys, runs)
    assert "sent and verified: 30 rows, last step 29 (10 of them from metrics.jsonl: cut off file: " in text
    [name] = server.runs
    assert steps_of(server, name) == list(range(30))
    assert server.runs[name].state == "failed"
    times = [stored["_timestamp"] for stored in server.runs[name].history]
    logged = [stored["_time"] for stored in read_metrics(runs / "pong/metrics.jsonl")]
    assert times == pytest.approx(logged, abs=1), "when it was logged, not when it was sent"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_wandb_file_costs_no_row(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    name = session(runs / "pong", range(40))
    [file] = runs.glob("pong/wandb/offline-run-*/*.wandb")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) * 2 // 3] ^= 0xFF
    file.write_bytes(content[: {"cut": len(content) * 2 // 3, "empty": 7}.get(damage, len(content))])
    text = synced(capsys, runs)
    assert "sent and verified: 40 rows, last step 39 (" in text
    assert f"of them from metrics.jsonl: cut off file: {file.parent.name})" in text
    assert steps_of(server, name) == list(range(40))
    assert server.runs[name].config["agent"] == {"lr": 0.5}
    assert server.runs[name].settings["groupName"] == "dqn"


def test_a_cut_off_file_without_its_run_folder_says_that_rows_are_lost(
    server: WandbStandIn, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(40))
    [part] = runs.glob("pong/wandb/offline-run-*")
    part.rename(tmp_path / part.name)
    [file] = (tmp_path / part.name).glob("*.wandb")
    file.write_bytes(file.read_bytes()[:-1500])
    text = synced(capsys, tmp_path / part.name)
    assert f"(cut off file: {part.name}; what was behind the cut is lost)" in text
    steps = steps_of(server, name)
    assert 0 < len(steps) < 40
    assert f"sent and verified: {len(steps)} rows" in text


def test_a_run_without_wandb_files_is_made_from_its_metrics(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", range(5), mode="disabled", why="W&B offline is not available (...)")
    assert "sent and verified: 5 rows, last step 4 (5 of them from metrics.jsonl)" in synced(capsys, runs)
    run = server.runs[name]
    assert steps_of(server, name) == [0, 1, 2, 3, 4]
    assert (run.state, run.summary["best"], run.summary["global_step"]) == ("finished", 0.75, 4)
    assert run.config["agent"] == {"lr": 0.5}
    wanted = {"project": "lab-tests", "groupName": "dqn", "displayName": "pong", "tags": ["tagged"]}
    assert {key: run.settings[key] for key in wanted} == wanted
    assert sorted(path.name for path in (runs / "pong/wandb").iterdir()) == ["synced.json"]


def test_a_run_made_without_wandb_on_purpose_is_sent_only_if_asked_to(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = session(runs / "pong", [1, 2], mode="disabled")
    assert "made without W&B on purpose, not sent; --disabled sends it" in synced(capsys, runs)
    assert server.runs == {}
    assert "sent and verified: 2 rows" in synced(capsys, runs, "--disabled")
    assert steps_of(server, name) == [1, 2]
    assert "already there: 2 rows, last step 2 (verified" in synced(capsys, runs)


def test_a_run_that_is_running_is_left_alone(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session(runs / "pong", [1])
    run = Run.resume(runs / "pong")
    try:
        text = synced(capsys, runs, code=2)
    finally:
        run._release_lock()
    assert "pong: skipped: it is running or being sent just now; run it again afterwards" in text
    assert server.runs == {}
    assert "sent and verified: 1 row" in synced(capsys, runs)


def test_a_path_that_is_none_is_one_line_and_nothing_is_sent(
    server: WandbStandIn, runs: Path, tmp_path: Path
) -> None:
    session(runs / "pong", [1])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for path, line in (
        (runs / "pog", "not there. Did you mean 'pong'? Name a run folder or a folder of them."),
        (tmp_path / "nothing", "no run in it, nor a W&B file. Name a run folder, e.g. runs/pong."),
        (tmp_path / "notes.txt", "no run in it, nor a W&B file. Name a run folder, e.g. runs/pong."),
    ):
        with pytest.raises(LabError) as caught:
            list(sync.sync([runs, path]))
        assert str(caught.value) == f"{path}: {line}"
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
    assert sync.identity(ours) == sync.identity(from_file) == sync.identity(from_server)
    media = {"global_step": 3, "m": {"_type": "image-file", "path": "p1", "sha256": "1"}}
    flat = {"global_step": 3, "m._type": "image-file", "m.path": "p2"}
    assert sync.identity(media) == sync.identity(flat)
    others = [
        ours | {"a/b": 1.001}, ours | {"bad": "inf"}, ours | {"big": "-inf"}, ours | {"global_step": 4},
        ours | {"more": 0}, {key: value for key, value in ours.items() if key != "n"}, ours | {"bad": "text"},
        media, {"global_step": 3, "m": {"_type": "video-file"}},
    ]  # fmt: skip
    assert len({sync.identity(other) for other in [ours, *others]}) == len(others) + 1
    assert sync.identity({"x": "1"}) != sync.identity({"x": 1})
