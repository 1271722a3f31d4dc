"""A run is a folder: never overwritten, held by one process, and telling how it ended."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lab import run as run_module
from lab.errors import LabError
from lab.run import PACKAGES, Run, folder_name
from lab.tracking import scrub, scrub_argv

REPO = Path(__file__).resolve().parents[2]


def create(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> Run:
    arguments: dict[str, Any] = {
        "config": config or {"seed": 7, "agent": {"n_step": 3}},
        "pipeline": "rl",
        "job_type": "train",
        "name": "pong__dqn__s7",
        "group": "pong__dqn__abc",
        "x_axis": "agent_steps",
        "compute": {"device": "cpu", "reason": "auto: cpu, because there is no cuda and no mps"},
    }
    return Run.create(folder, **{**arguments, **changes})


def finish(run: Run) -> None:
    with run.recording_its_end():
        run.end("finished")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


# ---- what run.json tells ----


def test_run_json_tells_what_ran_from_what_on_what(tmp_path: Path) -> None:
    parents = [{"run_id": "0123abcd", "path": "runs/parent", "sha256": "f" * 64}]
    finish(create(tmp_path / "run", parents=parents))
    info = read(tmp_path / "run")
    assert info["config"] == {"seed": 7, "agent": {"n_step": 3}}
    assert info["seed"] == 7
    assert info["parents"] == parents
    assert info["compute"]["reason"].startswith("auto: cpu")
    assert info["x_axis"] == "agent_steps"
    assert info["packages"].keys() == set(PACKAGES)
    assert all(version[0].isdigit() for version in info["packages"].values())
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))
    [session] = info["sessions"]
    assert session["started"] <= session["ended"]
    assert session["state"] == info["state"] == "finished"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "run.json", "checkpoints", "media"}


def test_the_commit_and_whether_it_was_changed_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a repository made here, so that the answer is known."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "run.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "lab" / "run.py"))
    out = tmp_path.parent / f"{tmp_path.name}-runs"
    finish(create(out / "clean"))
    assert read(out / "clean")["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "lab" / "run.py").write_text("changed")
    finish(create(out / "dirty"))
    assert read(out / "dirty")["git"]["dirty"] is True
    monkeypatch.setattr(run_module, "__file__", str(out / "no" / "repository.py"))
    finish(create(out / "none"))
    assert read(out / "none")["git"] == {"commit": None, "dirty": None}


def test_the_summary_grows_and_the_file_is_never_half_written(tmp_path: Path) -> None:
    """A reader that polls run.json while it is rewritten always finds valid JSON."""
    run = create(tmp_path / "run")
    stop, seen = threading.Event(), set[int]()

    def poll() -> None:
        while not stop.is_set():
            seen.add(read(tmp_path / "run")["summary"].get("n", -1))

    reader = threading.Thread(target=poll)
    reader.start()
    for n in range(50):
        run.summarize(n=n, text="x" * 5_000)
    stop.set()
    reader.join()
    assert len(seen) > 1
    run.summarize(other=1)
    assert read(tmp_path / "run")["summary"] == {"n": 49, "text": "x" * 5_000, "other": 1}
    finish(run)


# ---- a run is never overwritten ----


def test_a_folder_with_a_run_is_never_overwritten(tmp_path: Path) -> None:
    finish(create(tmp_path / "run"))
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(LabError, match=r"already holds a run\. Continue it with --resume"):
        create(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_folder_with_other_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LabError, match="is not empty and no run"):
        create(tmp_path)
    with pytest.raises(LabError, match="is a file"):
        create(tmp_path / "notes.txt")
    with pytest.raises(LabError, match="cannot be written"):
        create(tmp_path / "notes.txt" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    finish(create(tmp_path))
    assert read(tmp_path)["state"] == "finished"


# ---- resume ----


def test_a_run_that_is_not_there_cannot_be_resumed_or_opened(tmp_path: Path) -> None:
    finish(create(tmp_path / "pong"))
    for do in (Run.resume, Run.open):
        with pytest.raises(LabError, match=r"pomg: no run.* Did you mean '.*/pong'\?"):
            do(tmp_path / "pomg")
    assert not (tmp_path / "pomg").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "5", '{"config": {}}'])
def test_a_damaged_run_json_is_one_clear_line(tmp_path: Path, content: str) -> None:
    finish(create(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text(content)
    for do in (Run.resume, Run.open):
        with pytest.raises(LabError, match=r"run\.json: damaged") as caught:
            do(tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_a_resumed_run_keeps_its_sessions_and_cuts_its_metrics_back(tmp_path: Path) -> None:
    finish(create(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"global_step": 1}\n{"global_step": 2}\n')
    run = Run.resume(tmp_path / "run")
    run.continue_from(19)
    assert read(tmp_path / "run")["state"] == "running"
    finish(run)
    info = read(tmp_path / "run")
    assert [session["state"] for session in info["sessions"]] == ["finished", "finished"]
    assert run.metrics.read_text() == '{"global_step": 1}\n'
    assert (tmp_path / "run" / "metrics.discarded.jsonl").read_text() == '{"global_step": 2}\n'


# ---- one process at a time ----

HOLD = """
import sys
from pathlib import Path
from lab.run import Run
run = Run.resume(Path(sys.argv[1]))
run.continue_from(0)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_run_in_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(create(folder))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LabError, match=rf"is running just now \(process {other.pid}\)"):
            Run.resume(folder)
        assert Run.open(folder).info["state"] == "running", "reading is always allowed"
        other.kill()
        other.wait()
        run = Run.resume(folder)
    run.continue_from(0)
    finish(run)
    assert [s.get("state") for s in read(folder)["sessions"]] == ["finished", None, "finished"]


# ---- how it ended ----


def test_a_run_that_raises_is_marked_failed_with_the_reason(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.recording_its_end():
        _ = 1 / 0
    info = read(tmp_path / "run")
    assert info["state"] == info["sessions"][-1]["state"] == "failed"
    assert info["sessions"][-1]["error"] == "ZeroDivisionError: division by zero"
    finish(Run.resume(tmp_path / "run"))  # the lock was let go


def test_a_keyboard_interrupt_counts_as_failed_and_is_passed_on(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.recording_its_end():
        raise KeyboardInterrupt
    assert read(tmp_path / "run")["sessions"][-1]["error"] == "KeyboardInterrupt: KeyboardInterrupt"


# ---- no secrets ----


def test_secrets_are_scrubbed_from_config_and_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--api_key=s3cret", "--hf-token", "s3cret", "--agent.backbone_spec={password: s3cret}"]
    monkeypatch.setattr(sys, "argv", ["lab", "train", *options, "--seed=1"])
    spec = {"width": 5, "password": "s3cret", "list": [{"client_secret": "s3cret"}], "token": None}
    finish(create(tmp_path / "run", {"seed": 1, "wandb_api_key": "s3cret", "spec": spec}))
    text = (tmp_path / "run" / "run.json").read_text()
    assert "s3cret" not in text
    info = json.loads(text)
    assert info["config"] == {
        "seed": 1,
        "wandb_api_key": "<redacted>",
        "spec": {
            "width": 5,
            "password": "<redacted>",
            "list": [{"client_secret": "<redacted>"}],
            "token": None,
        },
    }
    assert info["sessions"][0]["argv"] == [
        *("lab", "train", "--api_key=<redacted>", "--hf-token", "<redacted>"),
        *("--agent.backbone_spec=<redacted>", "--seed=1"),
    ]


def test_harmless_keys_are_not_scrubbed() -> None:
    """`num_tokens` is no token, and a run named after a secret is not one."""
    values = {"num_tokens": 5, "max_token_length": 9, "tokenizer": "bpe", "key": "x", "n": [1, 2]}
    assert scrub(values) == values
    argv = ["lab", "train", "--out", "runs/secrets", "--tokenizer=bpe", "--spec={width: 5}", "--seed", "-1"]
    assert scrub_argv(argv) == argv


@pytest.mark.parametrize(
    ("name", "folder"),
    [("pong__dqn__s1", "pong__dqn__s1"), ("a b/c", "a-b-c"), ("../..", "run"), ("", "run"), ("ä=1", "ä=1")],
)
def test_any_name_gives_a_folder_below_runs(name: str, folder: str) -> None:
    assert folder_name(name) == folder


@pytest.mark.parametrize("hindrance", ["link", "folder"])
def test_an_evaluation_that_cannot_be_kept_is_said_and_nothing_else_is_touched(
    hindrance: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create(tmp_path / "run")
    run.keep_evaluation({"score": 1})
    kept = run.folder / "evaluations.jsonl"
    assert json.loads(kept.read_text())["score"] == 1
    kept.unlink()
    if hindrance == "link":
        (tmp_path / "precious").write_text("as it was")
        kept.symlink_to(tmp_path / "precious")
    else:
        kept.mkdir()
    run.keep_evaluation({"score": 2})
    assert f"note: {kept}: not kept there: " in capsys.readouterr().err
    if hindrance == "link":
        assert (tmp_path / "precious").read_text() == "as it was"
    finish(run)
