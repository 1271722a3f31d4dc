"""The real command on data sets: stopped by signals, a full disk and mistakes, and nothing is lost."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lab import checkpoint
from lab.run import Run
from lab.tracking import read_metrics
from tests.conftest import LabCommand, LabStart
from tests.e2e.test_bad_input import damage, refuse, snapshot

CONFIG: dict[str, Any] = {
    "pipeline": "supervised",
    "objective": {"name": "classification", "label_smoothing": 0.1},
    "data": {"source": "digits", "limit": 400, "augment": {"shift": 1}},
    "model": {"backbone": "mlp", "spec": {"hidden": [300]}, "dropout": 0.1},
    "epochs": 40,
    "batch_size": 32,
    "accumulate": 2,
    "ema_decay": 0.9,
    "log_every_steps": 5,
    "eval": {"every_epochs": 3},
    "checkpoint": {"every_epochs": 2.5, "keep": 100},
    "device": {"device": "cpu", "precision": "fp32", "threads": 1},
    "tracking": {"wandb": "disabled"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "digits.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def unstopped(lab_command: LabCommand, config: Path) -> Path:
    folder = config.parent / "unstopped"
    result = lab_command("train", config, "--out", folder, cwd=config.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def run(unstopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unstopped, tmp_path / "run", symlinks=True))


def stop(lab_start: LabStart, number: int, n_rows: int, *arguments: object) -> int:
    """Trains until there are so many more rows of metrics, then sends a signal; returns the exit code."""
    folder = Path(str(arguments[-1]))
    process = lab_start("train", *arguments, cwd=folder.parent)
    deadline, path = time.monotonic() + 300, folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= n_rows:
            break
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(300)


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, and weights, average and optimiser, bit for bit."""
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "_"))} for row in read_metrics(path)]
        for path in (one / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    for which in ("latest", "best"):
        a, b = one / "checkpoints" / which, other / "checkpoints" / which
        names = sorted(path.name for path in a.glob("*.safetensors"))
        assert names == sorted(path.name for path in b.glob("*.safetensors"))
        for name in names:
            left, right = load_file(a / name), load_file(b / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), (which, name)


@pytest.mark.slow
def test_killed_and_stopped_within_an_epoch_it_ends_as_if_never_stopped(
    unstopped: Path, config: Path, lab_command: LabCommand, lab_start: LabStart, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop(lab_start, signal.SIGKILL, 3, config, "--out", folder)  # before the first checkpoint
    assert Run.open(folder).info["state"] == "running"
    stop(lab_start, signal.SIGKILL, 17, config, "--resume", "--out", folder)
    assert stop(lab_start, signal.SIGTERM, 33, config, "--resume", "--out", folder) == 0
    assert Run.open(folder).info["state"] == "interrupted"
    result = lab_command("train", folder, "--resume", cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(Run.open(folder).info["sessions"]) == 4
    assert_same_run(unstopped, folder)


# Less than the weights; less than the record of the run.
@pytest.mark.slow
@pytest.mark.parametrize("limit", [30_000, 3_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    unstopped: Path, run: Path, lab_command: LabCommand, tmp_path: Path, limit: int
) -> None:
    last = checkpoint.find(run / "checkpoints")
    assert last is not None
    shutil.rmtree(last)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = lab_command("train", run, "--resume", cwd=tmp_path, preexec_fn=full, timeout=300)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("lab: ")
    assert "cannot be written" in line
    assert "File too large" in line
    result = lab_command("train", run, "--resume", cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_same_run(unstopped, run)


MISTAKES = {
    "unknown key": (["--objective.beam=2"], ["command line: unknown key 'objective.beam'"]),
    "too small": (["--model.backbone=alexnet"], ["img_size [8, 8] is too small"]),
    "no linear layer": (["--model.backbone=resnet8", "--model.adapt=lora"], ["no linear layers"]),
    "no run": (["--model.start_from=nowhere"], ["model.start_from = 'nowhere': no run"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    name: str, config: Path, lab_command: LabCommand, tmp_path: Path
) -> None:
    arguments, words = MISTAKES[name]
    bare = config.with_name("bare.yaml")
    bare.write_text(yaml.safe_dump({**CONFIG, "model": {"backbone": "mlp"}}))
    refuse(lab_command("train", bare, *arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_run_is_one_line_and_changes_nothing(
    run: Path, config: Path, lab_command: LabCommand
) -> None:
    before = snapshot(run)
    refuse(lab_command("train", config, "--out", run, cwd=run.parent), "already holds a run")
    result = lab_command("train", config, "--out", run, "--resume", "--ema_decay=0.5", cwd=run.parent)
    refuse(result, "was started with ema_decay = 0.9, now it is 0.5")
    refuse(lab_command("evaluate", run, "--part", "test", cwd=run.parent), "has no such part, only train")
    refuse(lab_command("evaluate", run, "--episodes", "3", cwd=run.parent), "--episodes is for agents")
    refuse(lab_command("play", run, cwd=run.parent), "plays no game")
    refuse(lab_command("export", run, cwd=run.parent), "no agent for Stable-Baselines3")
    arguments = (f"--model.start_from={run}", "--model.spec.hidden=[299]")
    refuse(lab_command("train", config, *arguments, cwd=run.parent), "its backbone is another one")
    assert snapshot(run) == before
    words = damage(run / "checkpoints/best/model.safetensors", "tampered")
    for command in (["evaluate", run], ["train", config, f"--model.start_from={run}"]):
        refuse(lab_command(*command, cwd=run.parent), words)
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
