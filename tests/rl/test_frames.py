"""Records of play: `lab frames`."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from lab.errors import LabError
from rl import commands
from rl.config import EnvConfig
from rl.envs import AtariVecEnv
from rl.evaluate import load_player
from rl.frames import record

N_ENVS, ROWS = 3, 60
CUT = EnvConfig(game="pong", n_envs=N_ENVS, image_size=20, max_episode_frames=80, num_threads=1)


def lab_frames(*arguments: object) -> None:
    """The command in this process."""
    parser = argparse.ArgumentParser()
    commands_ = parser.add_subparsers()

    def command(name: str, do: object, text: str, **kwargs: object) -> argparse.ArgumentParser:
        sub = commands_.add_parser(name, help=text)
        sub.set_defaults(do=do)
        return sub

    commands.add(command)
    options = parser.parse_args(["frames", *map(str, arguments)])
    assert options.do(options) == 0


def test_a_record_holds_what_was_seen_before_each_action_and_where_games_begin() -> None:
    arrays = record(CUT, None, N_ENVS * ROWS - 1, epsilon=0.5, seed=4)
    frames, actions, rewards, begins = (arrays[key] for key in ("frames", "actions", "rewards", "begins"))
    assert frames.shape == (N_ENVS * ROWS - 1, 20, 20)
    assert [array.dtype for array in (frames, actions, rewards, begins)] == [
        np.uint8,
        np.uint8,
        np.float32,
        bool,
    ]
    assert str(arrays["game"]) == "pong"

    # The same actions in an environment of its own; the last one's record is one step shorter.
    env = AtariVecEnv(
        "pong", N_ENVS, 4, image_size=20, max_episode_frames=80, num_threads=1, clip_rewards=False
    )
    assert list(arrays["action_meanings"]) == env.action_meanings
    seen, dones = env.reset(), np.ones(N_ENVS, bool)
    for row in range(ROWS - 1):
        at = np.arange(N_ENVS) * ROWS + row
        np.testing.assert_array_equal(frames[at], seen[:, -1])
        np.testing.assert_array_equal(begins[at], dones)
        seen, brought, dones, _ = env.step(actions[at])
        np.testing.assert_array_equal(rewards[at], brought)
    assert begins.sum() > N_ENVS, "no game ended"


def test_the_same_seed_makes_the_same_record() -> None:
    first, same, other = (record(CUT, None, 50, 0.5, seed) for seed in (1, 1, 2))
    for key, array in first.items():
        np.testing.assert_array_equal(array, same[key])
    assert not np.array_equal(first["actions"], other["actions"])


def test_a_trained_agent_plays_as_it_would_elsewhere(finished_run: Path, tmp_path: Path) -> None:
    from lab.run import Run

    out = tmp_path / "frames.npz"
    lab_frames("pong", "--run", finished_run, "--epsilon", 0, "--steps", 40, "--n_envs", 2, "--out", out)
    with np.load(out) as arrays:
        frames, actions = arrays["frames"], arrays["actions"]
    player, _, _ = load_player(Run.open(finished_run), "best")
    size = player.env.image_size
    assert frames.shape == (40, size, size)
    env = AtariVecEnv("pong", 2, 0, image_size=size, num_threads=1, max_episode_frames=400)
    seen = env.reset()
    for row in range(20):
        greedy = player.q_values(seen, np.arange(2)).argmax(1).numpy()
        np.testing.assert_array_equal(actions[[row, 20 + row]], greedy)
        seen, *_ = env.step(greedy)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "frames.npz"
    lab_frames("ALE/Pong-v5", "--steps", 30, "--image_size", 16, "--n_envs", 4, "--out", out, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["game"] == "pong"
    assert (said["steps"], said["image_size"], said["stretches"]) == (30, [16, 16], 4)
    assert said["bytes"] == out.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["frames.npz"]
    with pytest.raises(LabError, match="is there already"):
        lab_frames("pong", "--out", out)
    assert out.stat().st_size == said["bytes"]


def test_what_is_wrong_is_said_before_anything_is_played(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    for arguments, said in (
        (["pnog", "--out", out], "pong"),
        (["pong", "--out", tmp_path / "f.npy"], ".npz"),
        (["pong", "--out", __file__ + "/f.npz"], "Name another file"),
        (["pong", "--out", out, "--run", tmp_path / "no"], "no run"),
        (["breakout", "--out", out, "--run", finished_run], "plays pong"),
        (["pong", "--out", out, "--run", finished_run, "--image_size", 99], "Leave --image_size out"),
        (["pong", "--out", out, "--run", finished_run, "--checkpoint", "no"], "no checkpoint"),
    ):
        with pytest.raises(LabError, match=said):
            lab_frames(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import resource
    import signal

    arrays = record(CUT, None, 200, 0.5, 0)
    from rl.frames import save

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(LabError, match=r"cannot be written.*Free some space"):
            save(tmp_path / "f.npz", arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed", 3_000_000_000), "--seed: 3000000000 must be from 0 to"),
        (("--seed", 2**30 - 1), "--seed: 1073741823 must be from 0 to"),  # seed + i is what has to fit
        (("--n_envs", 10**9), "env.n_envs: 1000000000 must be from 1 to"),
        (("--image_size", 9_999), "env.image_size: 9999 must be from 8 to"),
    ],
)
def test_numbers_that_no_emulator_takes_are_refused(
    tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    with pytest.raises(LabError, match=said):
        lab_frames("pong", "--out", tmp_path / "new" / "play.npz", *arguments)
    assert not (tmp_path / "new").exists()
