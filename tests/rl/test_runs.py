"""Whole runs by the command: killed and resumed they equal one never stopped; and what they leave."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import LabStart
from tests.forks import Fork
from tests.lab.wandb_stand_in import WandbStandIn

REPO = Path(__file__).resolve().parents[2]
Start = Callable[..., Fork]
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("dqn", "drqn")]
TINY = {
    "pqn": [
        "configs/rl/pong_cpu.yaml",
        "--total_steps=1536",
        "--env.n_envs=4",
        "--agent.rollout_steps=16",
        "--agent.minibatch_size=32",
        "--checkpoint.every_steps=512",
        "--eval.every_steps=512",
        "--log_every_steps=128",
    ],
    "dqn": [
        "configs/rl/pong_dqn_cpu.yaml",
        "--total_steps=2000",
        "--env.n_envs=4",
        "--agent.buffer_size=1000",  # wraps around within the run
        "--agent.learning_starts=200",
        "--agent.batch_size=8",
        "--agent.target_update_steps=100",
        "--env.restart_every_steps=700",
        "--checkpoint.every_steps=600",
        "--eval.every_steps=1000",
        "--log_every_steps=150",
    ],
    "drqn": [
        "configs/rl/pong_drqn_cpu.yaml",
        "--total_steps=2000",
        "--env.n_envs=4",
        "--agent.buffer_size=1000",  # wraps around within the run
        "--agent.learning_starts=200",
        "--agent.batch_size=2",
        "--agent.sequence_steps=4",
        "--agent.train_freq=16",
        "--agent.target_update_steps=100",
        "--checkpoint.every_steps=800",
        "--eval.every_steps=1000",
        "--log_every_steps=100",
    ],
}
COMMON = [
    "--env.max_episode_frames=600",
    "--eval.episodes=1",
    "--eval.stop_at=null",
    "--film.max_steps=0",
    "--device.threads=1",
    "--env.num_threads=1",
    "--tracking.wandb=disabled",
    "--device.precision=fp32",
]


@pytest.fixture(scope="module")
def start(lab_start: LabStart) -> Start:
    """Begins a tiny run of an algorithm in a folder, with more arguments."""

    def start(folder: Path, algorithm: str, *more: str) -> Fork:
        return lab_start("train", *TINY[algorithm], *COMMON, "--out", folder, *more, cwd=REPO)

    return start


def finish(process: Fork) -> str:
    """What it says until its end."""
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, output
    return output


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("_time", "time/")
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(clock)} for line in lines
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, exploration, replay and metrics, bit for bit."""
    assert rows(one) == rows(other)
    for which in ("latest", "best"):
        a, b = one / "checkpoints" / which, other / "checkpoints" / which
        names = sorted(path.name for path in a.glob("*.safetensors"))
        assert names == sorted(path.name for path in b.glob("*.safetensors"))
        for name in names:
            left, right = load_file(a / name), load_file(b / name)
            assert left.keys() == right.keys()
            for key in left:
                np.testing.assert_array_equal(left[key], right[key], err_msg=f"{name}: {key}")
        states = [json.loads((path / "state.json").read_text()) for path in (a, b)]
        for state in states:
            state.pop("elapsed_seconds", None)
            state.pop("metrics_bytes", None)
            state.get("agent", {}).get("replay", {}).pop("segments", None)
        assert states[0] == states[1]


@pytest.fixture(scope="module")
def unstopped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One run of each algorithm that nobody stopped."""
    made: dict[str, Path] = {}

    def get(algorithm: str) -> Path:
        if algorithm not in made:
            folder = tmp_path_factory.mktemp("runs") / algorithm
            finish(start(folder, algorithm))
            made[algorithm] = folder
        return made[algorithm]

    return get


def wait_for_rows(process: Fork, folder: Path, n: int) -> None:
    """Until metrics.jsonl has `n` rows, so that the signal falls at another place each time."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_bytes().splitlines()) >= n:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def kill(process: Fork) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("algorithm", ["pqn", *SLOWER])
def test_killed_again_and_again_it_ends_as_if_never_stopped(
    start: Start, unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    folder = tmp_path / "run"
    process = start(folder, algorithm)
    wait_for_rows(process, folder, 2)  # before the first checkpoint
    kill(process)
    assert json.loads((folder / "run.json").read_text())["state"] == "running"
    process = start(folder, algorithm, "--resume")
    wait_for_rows(process, folder, 9)  # behind it
    kill(process)
    finish(start(folder, algorithm, "--resume"))
    assert_same_run(unstopped(algorithm), folder)
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["pqn", "dqn", "drqn"])
def test_interrupted_between_checkpoints_it_loses_nothing_and_ends_the_same(
    start: Start, unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    folder = tmp_path / "run"
    process = start(folder, algorithm)
    wait_for_rows(process, folder, 7)
    process.send_signal(signal.SIGTERM if algorithm == "pqn" else signal.SIGINT)
    output = finish(process)
    assert "Continue with" in output
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "interrupted"
    step = json.loads((folder / "checkpoints/latest/state.json").read_text())["agent"]["num_timesteps"]
    output = finish(start(folder, algorithm, "--resume"))
    assert f"resuming at agent step {step:,}" in output
    assert_same_run(unstopped(algorithm), folder)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["pqn", "dqn", "drqn"])
def test_what_is_saved_logged_and_filmed_how_often_does_not_change_what_is_learned(
    start: Start, unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    folder = tmp_path / "run"
    often = ["--checkpoint.every_steps=300", "--log_every_steps=64", "--eval.every_steps=500"]
    finish(start(folder, algorithm, *often, "--film.every_steps=700", "--film.max_steps=5"))
    for name in ("model", "optimizer"):
        a, b = (
            load_file(run / f"checkpoints/latest/{name}.safetensors")
            for run in (unstopped(algorithm), folder)
        )
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["pqn", "drqn"])
def test_a_stop_is_heard_within_an_evaluation_which_is_made_again(
    start: Start, unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    """The process says nothing while it evaluates; to be sure to hit it, it waits there for the signal."""
    folder = tmp_path / "run"
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, signal, sys\n"
        "import rl.evaluate, rl.train\n"
        "whole, calls = rl.evaluate.Player.q_values, [0]\n"
        "def q_values(self, observations, games):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == 20:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert calls[0] < 25, 'played on after the signal'\n"
        "    return whole(self, observations, games)\n"
        "rl.evaluate.Player.q_values = q_values\n"
        "from lab.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(script), "train", *TINY[algorithm], *COMMON, "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "run.json").read_text())["state"] == "interrupted"
    state = json.loads((folder / "checkpoints/latest/state.json").read_text())
    assert state["due"][0] == "evaluate"
    finish(start(folder, algorithm, "--resume"))
    assert_same_run(unstopped(algorithm), folder)


@pytest.mark.slow
def test_more_steps_can_be_added_to_a_finished_run(
    start: Start, unstopped: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unstopped("pqn"), folder, symlinks=True)
    output = finish(start(folder, "pqn", "--resume", "--total_steps=1792"))
    assert "resuming at agent step 1,536" in output
    assert rows(folder)[-1]["global_step"] == 1792


@pytest.mark.slow
def test_a_run_ends_once_it_plays_well_enough_and_stays_ended(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(start(folder, "pqn", "--eval.stop_at=-21"))  # nobody plays worse
    assert rows(folder)[-1]["global_step"] == 512
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    finish(start(folder, "pqn", "--eval.stop_at=-21", "--resume"))
    assert rows(folder)[-1]["global_step"] == 512


def test_another_config_is_not_the_same_run(start: Start, unstopped: Callable[[str], Path]) -> None:
    process = start(unstopped("pqn"), "pqn", "--resume", "--agent.gamma=0.5")
    _, said = process.communicate()
    assert process.returncode == 2
    assert "agent.gamma = 0.99, now it is 0.5" in said


def lab(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "lab.cli", *arguments], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_run_leaves_its_whole_story(unstopped: Callable[[str], Path]) -> None:
    folder = unstopped("dqn")
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["config"]["agent"]["n_step"] == 3
    assert record["summary"]["global_step"] == 2000
    keys = {key for row in rows(folder) for key in row}
    assert keys >= {
        "global_step",
        "frames",
        "rollout/ep_rew_mean",
        "rollout/ep_clipped_rew_mean",
        "rollout/ep_len_mean",
        "rollout/exploration_rate",
        "eval/mean_reward",
        "eval/std_reward",
        "train/loss",
        "train/learning_rate",
    }
    assert (folder / "media/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_000000001800", "step_000000002000"]
    assert (folder / "checkpoints/latest").readlink() == Path("step_000000002000")


def test_evaluating_again_gives_the_number_training_reported(unstopped: Callable[[str], Path]) -> None:
    folder = unstopped("pqn")
    result = json.loads(lab("evaluate", str(folder), "--checkpoint", "latest", "--seed=10000", "--json"))
    assert not result["unseen"]
    last = next(row for row in reversed(rows(folder)) if "eval/mean_reward" in row)
    assert result["mean_reward"] == last["eval/mean_reward"]
    assert result["human_table"] is result["human_normalized"] is None  # its games are of 600 frames
    assert result["scores"] == {"this agent": result["mean_reward"]}
    assert json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["returns"]
    text = lab("evaluate", str(folder), "--episodes=2", "--epsilon=0.05")
    assert "2 games, epsilon 0.05, seeds from 20000 (unseen)" in text
    assert json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])["unseen"] is True
    assert "600: not comparable with published scores" in text


@pytest.mark.parametrize("algorithm", ["pqn", pytest.param("dqn", marks=pytest.mark.slow)])
def test_an_export_plays_in_stock_sb3_as_it_does_here(
    unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    path = tmp_path / "agent.zip"
    lab("export", str(unstopped(algorithm)), "--format", "sb3", "--out", str(path))

    import torch
    from stable_baselines3 import DQN

    from lab.run import Run
    from rl.evaluate import load_player
    from rl.policy import q_values

    model = DQN.load(path, device="cpu")
    player, _, _ = load_player(Run.open(unstopped(algorithm)), "best")
    observations = np.random.default_rng(0).integers(0, 256, (5, 4, 44, 44)).astype(np.uint8)
    ours = q_values(player.q_net, observations)
    theirs = model.q_net(torch.from_numpy(observations))
    torch.testing.assert_close(ours, theirs.detach())
    actions, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, ours.argmax(1).numpy())


def test_a_film_shows_the_game_and_the_q_values(unstopped: Callable[[str], Path], tmp_path: Path) -> None:
    import imageio_ffmpeg

    path = tmp_path / "film.mp4"
    out = lab("play", str(unstopped("pqn")), "--out", str(path), "--max_steps", "30")
    assert "30 agent steps" in out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # imageio-ffmpeg leaves its pipes to the collector
        reader = imageio_ffmpeg.read_frames(str(path))
        size = next(reader)["size"]  # type: ignore[index]
        frames = [np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3) for frame in reader]  # type: ignore[arg-type]
        del reader
        gc.collect()
    assert len(frames) == 30
    screen, panel = frames[20][:, :320], frames[20][:, 320:]
    assert screen.std() > 10, "the game's picture"
    assert (np.abs(panel.astype(int) - (240, 160, 40)).sum(2) < 90).sum() > 30, "the chosen action's bar"
    assert not np.array_equal(frames[0][:, :320], frames[29][:, :320])


@pytest.mark.slow
def test_online_its_checkpoints_are_versions_of_a_model(lab_start: LabStart, tmp_path: Path) -> None:
    """W&B's server is a stand-in."""
    more = ("--out", tmp_path / "run", "--tracking.wandb=online", "--total_steps=512")
    with WandbStandIn() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
        finish(lab_start("train", *TINY["pqn"], *COMMON, *more, cwd=REPO, env=env))
    info = json.loads((tmp_path / "run/run.json").read_text())
    checkpoints = tmp_path / "run/checkpoints"
    for alias, folder in (("latest", (checkpoints / "latest").resolve()), ("best", checkpoints / "best")):
        sent = server.aliases["deep-rl-lab", f"{info['name']}-{info['id']}:{alias}"].files
        assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
