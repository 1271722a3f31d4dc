"""Tracking: every row is in metrics.jsonl, and nothing that happens to W&B can stop or hang training.

The W&B client is the real one, with its real service process; only the server is a stand-in.
"""

import contextlib
import json
import os
import pty
import select
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from lab import tracking
from lab.errors import LabError
from lab.run import Run
from lab.tracking import Tracker, choose_mode, read_metrics, rewind
from tests.lab.wandb_stand_in import MANIFEST, WandbStandIn
from tests.lab.wandb_world import KEY, end_service, use, wandb_world

IDENTITY = {
    **{"project": "lab-tests", "entity": None, "id": "run00001", "name": "pong__dqn__s1"},
    **{"group": "pong__dqn__abc", "job_type": "train", "tags": ["a", "b"]},
}


@pytest.fixture(autouse=True)
def no_wandb_settings(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "home").mkdir()
    with wandb_world(tmp_path / "home"):
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbStandIn]:
    """A live server, and a key for it."""
    with WandbStandIn() as stand_in:
        use(stand_in, monkeypatch)
        yield stand_in


@pytest.fixture
def dead_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A key for a server whose port refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, so that nobody else can, but not listening
        host = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield host


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def tracker(folder: Path, mode: str, config: dict[str, Any] | None = None, **kwargs: Any) -> Tracker:
    return Tracker(folder, config or {"seed": 1}, mode, IDENTITY, **kwargs)


def strict(line: str) -> Any:
    """Parses JSON proper: the words NaN and Infinity are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


# ---- metrics.jsonl ----


def test_every_row_is_in_the_file_at_once_and_is_json_proper(folder: Path) -> None:
    import numpy as np
    import torch

    track = tracker(folder, "disabled")
    values = {"a": 1.5, "b": float("nan"), "c": float("inf"), "d": -np.float64("inf"), "e": np.int64(3)}
    track.log(10, values | {"f": torch.tensor(0.25), "g": "text", "h": None})
    [line] = (folder / "metrics.jsonl").read_text().splitlines()  # without sync or finish
    row = strict(line)
    assert abs(row.pop("_time") - time.time()) < 60
    assert row == {
        **{"global_step": 10, "a": 1.5, "b": "nan", "c": "inf", "d": "-inf", "e": 3},
        **{"f": 0.25, "g": "text", "h": None},
    }
    assert float(row["b"]) != float(row["b"]), "float() reads it back"
    track.finish(0)


def test_sync_returns_the_length_that_rewind_cuts_back_to(folder: Path) -> None:
    track = tracker(folder, "disabled")
    track.log(1, {"x": 1})
    length = track.sync()
    track.log(2, {"x": 2})
    track.log(3, {"x": 3})
    track.finish(0)
    rewind(folder / "metrics.jsonl", length)
    assert [row["global_step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]
    discarded = folder / "metrics.discarded.jsonl"
    assert [row["global_step"] for row in read_metrics(discarded)] == [2, 3]
    rewind(folder / "metrics.jsonl", length)
    assert len(read_metrics(discarded)) == 2, "nothing behind the cut: nothing to discard"
    second = tracker(folder, "disabled")  # what the resumed run writes follows the kept rows
    second.log(2, {"x": 20})
    second.finish(0)
    assert [row["x"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 20]


def test_a_row_cut_in_half_by_a_kill_is_skipped_and_kept_apart(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text('{"global_step": 1}\n{"global_step": 2, "x')
    assert read_metrics(path) == [{"global_step": 1}]
    rewind(path, 19)
    assert path.read_text() == '{"global_step": 1}\n'
    assert (folder / "metrics.discarded.jsonl").read_text() == '{"global_step": 2, "x\n'


def test_rewinding_or_reading_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    rewind(tmp_path / "metrics.jsonl", 5)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert not list(tmp_path.glob("metrics*"))


def test_a_full_disk_is_one_clear_error_and_earlier_rows_stay(folder: Path) -> None:
    program = """
        import resource, sys
        from pathlib import Path
        from lab.errors import LabError
        from lab.tracking import Tracker
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        track = Tracker(Path(sys.argv[1]), {}, "disabled", {})
        try:
            for step in range(100):
                track.log(step, {"x": step})
        except LabError as error:
            print(error)
        track.finish(1)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert "metrics.jsonl: cannot be written: File too large. Free some space" in result.stdout
    rows = read_metrics(folder / "metrics.jsonl")
    assert len(rows) > 10
    assert [row["x"] for row in rows] == list(range(len(rows)))


# ---- which mode ----


def test_without_a_key_it_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == ("offline", "no W&B key for api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == ("offline", "no W&B key for wandb.example.org")


def test_with_a_key_and_a_server_it_is_online(server: WandbStandIn) -> None:
    assert choose_mode("auto")[0] == "online"
    assert choose_mode("online")[0] == "online"


def test_a_key_in_netrc_counts(server: WandbStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is where `wandb login` writes it."""
    monkeypatch.delenv("WANDB_API_KEY")
    assert choose_mode("auto") == ("offline", "no W&B key for 127.0.0.1")
    netrc = Path(os.environ["NETRC"])
    netrc.write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert choose_mode("auto")[0] == "online"
    netrc.write_text("machine what is this")
    assert choose_mode("auto")[0] == "offline", "a broken netrc is no key"


def test_the_server_that_wandb_login_saved_is_the_one_asked(
    server: WandbStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
    assert choose_mode("auto")[0] == "online"
    (tmp_path / "settings").write_text("[default]\nbase_url = http://127.0.0.1:1\n")
    mode, why = choose_mode("auto")
    assert mode == "offline"
    assert "127.0.0.1:1" in why


def test_a_key_with_a_dead_server_is_offline_at_once(dead_server: str) -> None:
    began = time.monotonic()
    mode, why = choose_mode("auto")
    assert time.monotonic() - began < 3
    assert mode == "offline"
    assert why == f"W&B's server {dead_server} cannot be reached (Connection refused)"


def test_a_server_that_never_answers_costs_at_most_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full drops connections without a word, as a firewall does."""
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(silent.getsockname())
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        mode, why = choose_mode("auto")
        assert time.monotonic() - began < 3
    assert mode == "offline"
    assert "cannot be reached (timed out)" in why


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "takes connections and does not answer within 0.5 s"),
        (b"", "does not answer as one (RemoteDisconnected: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "does not answer as one (JSONDecodeError: "),
        (b"SSH-2.0-OpenSSH\r\n", "does not answer as one (BadStatusLine: "),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", ""),
    ],
)
def test_a_port_that_is_open_is_not_yet_a_server(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, why: str
) -> None:
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as open_port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{open_port.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)

        def serve() -> None:
            open_port.accept()[0].close()  # who only looks whether the port is open
            client, _ = open_port.accept()
            with client:
                asked = client.recv(10_000)
                assert KEY.encode() not in asked, "nothing secret goes to who may be no server"
                if answer is None:
                    silent.wait()
                else:
                    client.sendall(answer)

        silent, thread = threading.Event(), threading.Thread(target=serve)
        thread.start()
        try:
            mode, told = choose_mode("auto")
        finally:
            silent.set()
            thread.join()
    assert mode == ("offline" if why else "online")
    assert why in told


def test_a_server_that_falls_silent_before_the_run_begins_costs_seconds_and_no_number(
    server: WandbStandIn, folder: Path
) -> None:
    """In a process of its own: W&B's client has its last say when that ends."""
    server.silent = True
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from lab.tracking import Tracker

        track = Tracker(Path(sys.argv[1]), {}, "online", {"project": "p"}, init_seconds=1)
        track.log(1, {"x": 5})
        track.finish(0)
        print(track.mode)
    """)
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, check=True
    )
    # Importing wandb takes some, and what follows a failure 3; both more than that on a busy machine.
    assert time.monotonic() - began < 20 - tracking.INIT_SECONDS
    assert result.stdout == "offline\n"
    [line] = result.stderr.splitlines()
    assert line.startswith("lab: W&B online is not available (")
    assert [row["x"] for row in read_metrics(folder / "metrics.jsonl")] == [5]
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_online_by_name_is_never_downgraded(dead_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match=r"tracking\.wandb = 'online': W&B's server .* cannot be reached"):
        choose_mode("online")
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(LabError, match=r"tracking\.wandb = 'online': no W&B key .* Run `wandb login`"):
        choose_mode("online")


@pytest.mark.parametrize(
    ("variable", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
def test_wandb_mode_in_the_environment_is_honoured_unless_the_config_says_more(
    server: WandbStandIn, monkeypatch: pytest.MonkeyPatch, variable: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    assert choose_mode("auto") == (mode, "asked for")
    assert choose_mode("online")[0] == "online"


def test_wandb_mode_online_without_a_server_goes_offline(
    dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode("auto")[0] == "offline"


# ---- online ----


def test_an_online_run_reaches_the_server_with_every_row(
    server: WandbStandIn, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track = tracker(folder, "online", {"seed": 1, "agent": {"lr": 0.5, "api_key": "s3cret"}})
    assert (track.mode, track.problem) == ("online", "")
    for step in (10, 20, 5, 30):  # a resumed run goes back: W&B drops such rows if it is given step=
        track.log(step, {"train/loss": step / 4, "train/odd": float("nan")})
    Image.new("RGB", (2, 2)).save(folder / "curve.png")
    track.log_media(30, "media/curve", folder / "curve.png")
    track.finish(0, {"eval/mean_reward": 21.0})
    run = server.runs[IDENTITY["id"]]
    assert server.keys == {KEY}
    assert run.column("global_step") == [10, 20, 5, 30, 30]
    assert run.column("train/loss") == [2.5, 5.0, 1.25, 7.5]
    assert {str(value).lower() for value in run.column("train/odd")} == {"nan"}
    assert run.summary["eval/mean_reward"] == 21.0
    assert run.config["agent"] == {"lr": 0.5, "api_key": "<redacted>"}
    assert {key: run.settings[key] for key in ("project", "groupName", "jobType", "displayName", "tags")} == {
        **{"project": "lab-tests", "groupName": IDENTITY["group"], "jobType": "train"},
        **{"displayName": IDENTITY["name"], "tags": ["a", "b"]},
    }
    assert run.exit_code == 0
    assert any(name.startswith("media/images/media/curve") for name in run.files), list(run.files)
    assert capfd.readouterr().err == ""


def test_results_become_artifacts_online_and_their_failure_stops_nothing(
    server: WandbStandIn, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"1234")
    (folder / "rankings.jsonl").write_text("{}\n")
    track = tracker(folder, "online")
    track.use_artifact("recipe s0-sft")
    track.log(1, {"x": 1})
    track.log_artifact("recipe s0-reward", "model", folder / "model", "abc")
    track.log_artifact("recipe s0-collect", "dataset", folder / "rankings.jsonl", "def")
    track.log_artifact("missing", "model", folder / "missing", "0")
    track.log(2, {"x": 2})
    track.finish(0)
    sent = [
        (
            one.about["artifactCollectionName"],
            one.about["artifactTypeName"],
            json.loads(one.about["metadata"]),
        )
        for one in server.artifacts
    ]
    assert sent == [
        ("recipe-s0-reward", "model", {"sha256": "abc"}),
        ("recipe-s0-collect", "dataset", {"sha256": "def"}),
    ]
    assert server.aliases["lab-tests", "recipe-s0-reward:latest"].files["weights"] == b"1234"
    assert server.aliases["lab-tests", "recipe-s0-collect:def"].files["rankings.jsonl"] == b"{}\n"
    assert {one.about["runName"] for one in server.artifacts} == {IDENTITY["id"]}
    assert server.runs[IDENTITY["id"]].column("x") == [1, 2]
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("lab: W&B does not know recipe s0-sft (")
    assert second.startswith("lab: W&B did not take missing (")
    assert not [path for path in folder.rglob("*") if path.name == "weights" and "wandb" in path.parts]


def weights(value: float) -> dict[str, Any]:
    import torch

    return {"model": {"w": torch.full((4,), value)}, "optimizer": {"m": torch.zeros(4)}}


def test_checkpoints_become_versions_with_aliases_and_the_next_stage_is_linked_to_its_own(
    server: WandbStandIn, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lab import checkpoint

    root, data = folder / "checkpoints", {}
    track = tracker(folder, "online", {"seed": 1, "tracking": {"artifacts": True}})
    for step, name, aliases in (
        (1, "best", ["best"]),
        (1, "step_1", []),
        (2, "step_2", []),
        (3, "step_3", []),
    ):
        path = checkpoint.save(root, name, weights(step), {"step": step})
        data[name] = {file: (path / file).read_bytes() for file in ("model.safetensors", "state.json")}
        track.log_checkpoint(path, *aliases)
        checkpoint.prune(root, keep=1)  # it may be gone before it was sent
    sha256 = checkpoint.weights_hash(root / "step_3")
    track.finish(0)
    assert [path.name for path in checkpoint.steps(root)] == ["step_3"]
    name = f"{IDENTITY['name']}-{IDENTITY['id']}"
    versions = {alias: server.aliases["lab-tests", f"{name}:{alias}"] for alias in ("best", "latest")}
    for alias, step in (("best", "best"), ("latest", "step_3")):
        files = {file: content for file, content in versions[alias].files.items() if file in data[step]}
        assert files == data[step]
        assert set(versions[alias].files) == {"model.safetensors", "state.json", MANIFEST}, "no optimizer"
        assert versions[alias].about["artifactTypeName"] == "model"
    assert not (folder / "wandb" / "uploads").exists(), "what was on its way is cleared away"

    (tmp_path / "next").mkdir()
    for sha in (sha256, ""):
        child = Tracker(tmp_path / "next", {}, "online", {**IDENTITY, "id": f"child{sha[:2]}"})
        child.use_artifact(name, sha)
        child.finish(0)
    assert server.uses == [(f"child{sha256[:2]}", versions["latest"].id), ("child", versions["latest"].id)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("mode", "artifacts"), [("offline", True), ("disabled", True), ("online", False)])
def test_no_artifact_is_made_offline_or_if_none_is_wanted(
    server: WandbStandIn, folder: Path, mode: str, artifacts: bool
) -> None:
    from lab import checkpoint

    path = checkpoint.save(folder / "checkpoints", "best", weights(1), {"step": 1})
    track = tracker(folder, mode, {"tracking": {"artifacts": artifacts}})
    track.log_checkpoint(path, "best")
    track.log_artifact("model", "model", path, "ab")
    track.use_artifact("model")
    track.finish(0)
    assert (server.artifacts, server.uses) == ([], [])
    assert [path.parent.name for path in folder.rglob("model.safetensors")] == ["best"]


def test_a_server_that_falls_silent_holds_up_no_checkpoint(
    server: WandbStandIn, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lab import checkpoint

    track = tracker(folder, "online", finish_seconds=1)
    server.silent = True
    path = checkpoint.save(folder / "checkpoints", "best", weights(1), {"step": 1})
    began = time.monotonic()
    for _ in range(20):
        track.use_artifact("sft")
        track.log_checkpoint(path, "best")
        track.log(1, {"x": 1})
    assert time.monotonic() - began < 2
    track.finish(0)
    assert time.monotonic() - began < 10
    first, second = capfd.readouterr().err.splitlines()
    assert first == "lab: W&B did not take all checkpoints within 1 s; they stay in the run folder"
    assert second.startswith("lab: W&B did not take the rest within 1 s; nothing is lost")
    assert len(read_metrics(folder / "metrics.jsonl")) == 20


def test_an_offline_run_copies_no_result_for_an_upload(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"1234")
    track = tracker(folder, "offline")
    track.use_artifact("sft")
    track.log_artifact("reward", "model", folder / "model", "abc")
    track.finish(0)
    assert [path.parent.name for path in folder.rglob("weights")] == ["model"]


def test_a_resumed_online_run_continues_the_same_run(server: WandbStandIn, folder: Path) -> None:
    for steps in ((1, 2), (3, 4)):
        track = tracker(folder, "online")
        for step in steps:
            track.log(step, {"x": step})
        track.finish(0)
    assert list(server.runs) == [IDENTITY["id"]]
    assert server.runs[IDENTITY["id"]].column("x") == [1, 2, 3, 4]
    assert [row["x"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_server_that_dies_in_mid_run_stops_nothing_and_loses_nothing(
    server: WandbStandIn, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Left alone, wandb would wait for the server at the end of the run, for ever."""
    track = tracker(folder, "online", finish_seconds=2)
    track.log(1, {"x": 1})
    server.die()
    for step in range(2, 6):
        track.log(step, {"x": step})
    began = time.monotonic()
    track.finish(0, {"done": 1})
    assert time.monotonic() - began < 15
    assert [row["x"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("lab: W&B did not take the rest within 2 s; nothing is lost: ")
    assert f"`lab sync {folder}` sends it later" in line


def test_a_killed_wandb_service_stops_nothing_and_warns_once(
    server: WandbStandIn, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    track = tracker(folder, "online")
    track.log(1, {"x": 1})
    services = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
    assert services, "the test must kill the service this test started"
    for process in services:
        process.kill()
    psutil.wait_procs(services, timeout=5)
    for step in range(2, 50):
        track.log(step, {"x": step})
        time.sleep(0.01)
    track.finish(0)
    assert [row["x"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 50))
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lab: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("lab: W&B stopped (")


def test_a_server_that_refuses_the_run_leaves_an_offline_run_and_one_line(
    server: WandbStandIn, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here because the key cannot be one; an expired key or a full quota look alike."""
    monkeypatch.setenv("WANDB_API_KEY", "short")
    track = tracker(folder, "online")
    track.log(1, {"x": 1})
    track.finish(0)
    assert track.mode == "offline"
    assert track.problem.startswith("W&B online is not available (AuthenticationError: ")
    assert capfd.readouterr().err == f"lab: {track.problem}\n"
    assert server.runs == {}
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_run_json_keeps_why_a_run_is_not_online_after_all(
    server: WandbStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    details: dict[str, Any] = {
        "pipeline": "rl",
        "job_type": "train",
        "name": "n",
        "group": "g",
        "x_axis": "agent_steps",
    }
    run = Run.create(tmp_path / "run", config={"seed": 1}, compute={}, **details)
    with run.recording_its_end():
        run.tracker(*choose_mode("auto"), "lab-tests", None, None).finish(0)
        run.end("finished")
    recorded = Run.open(tmp_path / "run").info["wandb"]
    assert recorded["mode"] == "offline"
    assert recorded["why"].startswith("W&B online is not available (")


# ---- offline ----


def test_an_offline_run_leaves_its_log_inside_the_run_folder_and_nothing_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    track = tracker(folder, "offline")
    track.log(1, {"x": 1})
    track.finish(0)
    end_service()
    [log] = folder.rglob("*.wandb")
    assert log.name == f"run-{IDENTITY['id']}.wandb"
    assert log.parent.parent == folder / "wandb"
    assert log.stat().st_size > 100
    assert [p.name for p in (tmp_path / "cwd").iterdir()] == []


def test_no_secret_lies_anywhere_in_the_run_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B records config, command line and more of its own accord."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "s3cret-token")
    argv = ["lab", "train", "--hf-token", "s3cret-a", "--api_key=s3cret-b", "--spec={password: s3cret-c}"]
    monkeypatch.setattr(sys, "argv", argv)
    track = tracker(folder, "offline", {"x": {"api_key": "s3cret-d"}, "list": [{"secret": "s3cret-e"}]})
    track.log(1, {"x": 1})
    track.finish(0)
    end_service()
    assert sys.argv == argv, "the process's own command line is given back"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" and b"redacted" in path.read_bytes() for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"s3cret" not in content, path
        assert KEY.encode() not in content, path


def test_a_killed_offline_run_keeps_all_but_its_last_second(folder: Path) -> None:
    """By default wandb holds rows back for 15 seconds: a kill would leave nothing to sync."""
    program = """
        import os, signal, sys, time
        from pathlib import Path
        from lab.tracking import Tracker
        track = Tracker(Path(sys.argv[1]), {}, "offline", {"project": "p", "id": "run00001"})
        for step in range(20):
            track.log(step, {"some/metric": step})
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(folder)], check=False)
    assert len(read_metrics(folder / "metrics.jsonl")) == 20
    [log] = folder.rglob("*.wandb")
    assert log.read_bytes().count(b"some/metric") >= 20


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_there_is_never_a_prompt_even_on_a_terminal(folder: Path, mode: str) -> None:
    """Without a key wandb asks at a terminal what to do, and would wait for the answer for ever."""
    program = """
        import sys
        from pathlib import Path
        from lab.errors import LabError
        from lab.tracking import Tracker, choose_mode
        try:
            mode, why = choose_mode(sys.argv[2])
        except LabError as error:
            raise SystemExit(f"refused: {error}")
        track = Tracker(Path(sys.argv[1]), {}, mode, {"project": "p"})
        track.log(1, {"x": 1})
        track.finish(0)
        print("done", mode)
    """
    terminal, inside = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder), mode]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside) as process:
        os.close(inside)
        output = b""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and select.select([terminal], [], [], 1)[0] is not None:
            with contextlib.suppress(BlockingIOError):
                try:
                    chunk = os.read(terminal, 4096) if select.select([terminal], [], [], 0)[0] else None
                except OSError:  # the other end is closed
                    break
                output += chunk or b""
            if process.poll() is not None and not select.select([terminal], [], [], 0)[0]:
                break
        finished = process.poll() is not None or process.wait(timeout=5) is not None
    os.close(terminal)
    text = output.decode()
    assert finished, text
    if mode == "auto":
        assert text.split() == ["done", "offline"]
    else:
        assert text.startswith("refused: tracking.wandb = 'online': no W&B key")
