"""World models: records of play as data, dreams, and playing in them."""

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lab import checkpoint, config
from lab.errors import LabError
from lab.run import Run
from lab.terminal import half_blocks, parse_keys
from supervised import dreaming, objectives
from supervised.backbones.diffusion import Condition
from supervised.config import WorldModelConfig, run_config_class
from supervised.data import Batches, FrameSplit, load
from supervised.data.config import DataConfig
from supervised.objectives.world_model import WorldModel, near_motion
from supervised.pipeline import SupervisedPipeline
from supervised.play import action_of, open_dream
from tests.e2e.test_supervised import assert_same_run
from tests.signals import Signals

TINY: dict[str, Any] = {
    "objective": {"name": "world_model", "rollout": 5},
    "data": {"source": "catch"},
    "model": {"backbone": "unet", "spec": {"width": 8, "mults": [1, 2], "n_res": 1, "groups": 4}},
    "batch_size": 16,
    "max_steps": 3,
    "device": {"device": "cpu", "precision": "fp32", "threads": 1},
    "tracking": {"wandb": "disabled"},
    "checkpoint": {"every_epochs": 1e6},
    "eval": {"every_epochs": 1e6, "batch_size": 64},
}


def settings_of(**changes: Any) -> Any:
    values = config.merge(TINY, changes)
    return config.build(run_config_class(values, lambda _: "test"), values, {}, "test")


def objective_of(**changes: Any) -> WorldModel:
    torch.manual_seed(0)
    settings = settings_of(**changes)
    made = objectives.make(settings, load(settings.data))
    assert isinstance(made, WorldModel)
    return made


@torch.no_grad()
def loss_of(objective: WorldModel, batch: Any) -> float:
    return float(objective.loss("model", batch).value)


def counted(lengths: list[int]) -> FrameSplit:
    """Stretches whose frame t is full of t, where action t is taken."""
    n = sum(lengths)
    begins = torch.zeros(n, dtype=torch.bool)
    begins[np.cumsum([0, *lengths[:-1]])] = True
    frames = torch.arange(n, dtype=torch.uint8)[:, None, None].expand(n, 4, 6).contiguous()
    return FrameSplit(frames, torch.arange(n), begins)


def write_record(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "frames": rng.integers(256, size=(60, 8, 8), dtype=np.uint8),
        "actions": rng.integers(3, size=60).astype(np.uint8),
        "rewards": np.zeros(60, np.float32),
        "begins": np.arange(60) % 20 == 0,
        "action_meanings": np.array(["NOOP", "UP", "DOWN"]),
        "game": np.array("pong"),
    }
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


# ---- data ----


@pytest.mark.parametrize("shuffle", [True, False])
def test_windows_stay_within_their_stretch(shuffle: bool) -> None:
    lengths, window = [7, 3, 9, 4, 1], 4
    made = Batches(counted(lengths), 3, shuffle=shuffle, context=window)
    seen = []
    for batch in made.epoch(0):
        frames, actions = batch["frames"], batch["actions"]
        assert frames.shape[1:] == (window, 4, 6)
        assert frames.dtype == torch.uint8
        assert torch.equal(frames[:, :, 0, 0].long(), actions)
        seen += actions.tolist()
    ends = np.cumsum(lengths)
    for actions in seen:
        assert actions == list(range(actions[0], actions[0] + window))
        assert np.searchsorted(ends, actions[0], "right") == np.searchsorted(ends, actions[-1], "right")
    firsts = sorted(actions[0] for actions in seen)
    assert firsts == ([0, 1, 2, 3, *range(10, 16), 19] if shuffle else [0, 10, 14, 19])


def test_what_is_held_out_are_the_last_whole_stretches(tmp_path: Path) -> None:
    data = load(DataConfig(source=str(write_record(tmp_path / "play.npz")), held_out=0.3))
    assert data.kind == "frames"
    assert data.classes == ("NOOP", "UP", "DOWN")
    assert (len(data.train), len(data.test)) == (40, 20)
    assert data.train.begins.nonzero()[:, 0].tolist() == [0, 20]
    assert data.test.begins.nonzero()[:, 0].tolist() == [0]
    with np.load(tmp_path / "play.npz") as arrays:
        np.testing.assert_array_equal(torch.cat((data.train.frames, data.test.frames)), arrays["frames"])
        np.testing.assert_array_equal(torch.cat((data.train.actions, data.test.actions)), arrays["actions"])
    single = write_record(tmp_path / "one.npz", begins=np.zeros(60, bool))
    data = load(DataConfig(source=str(single), held_out=0.3))
    assert (len(data.train), len(data.test)) == (42, 18)
    assert data.test.begins.nonzero()[:, 0].tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actions": None}, "a record of play without 'actions'"),
        ({"begins": None}, "a record of play without 'begins'"),
        ({"frames": np.zeros((60, 8, 8), np.float32)}, "frames are 60 x 8 x 8 of float32"),
        ({"frames": np.zeros((60, 8, 8, 3), np.uint8)}, "frames are 60 x 8 x 8 x 3"),
        ({"actions": np.zeros(59, np.uint8)}, "actions are 59 of uint8, for 60 frames"),
        ({"begins": np.zeros(60)}, "begins are 60 of float64"),
        ({"actions": np.full(60, 7, np.uint8)}, "there is an action 7, and 3 have a name"),
        (
            {
                "frames": np.zeros((0, 8, 8), np.uint8),
                "actions": np.zeros(0, np.uint8),
                "begins": np.zeros(0, bool),
            },
            "holds no frames",
        ),
    ],
)
def test_a_record_that_is_none_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_record(tmp_path / "play.npz", **changes)
    with pytest.raises(LabError, match=re.escape(said)) as error:
        load(DataConfig(source=str(path)))
    assert "play.npz" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"rollout": 100}}, "no stretch of play has the 104 frames"),
        ({"objective": {"context": 70}}, "no held-out stretch has objective.context = 70"),
        ({"objective": {"patch": 3}}, "objective.patch = 3: does not divide"),
        ({"data": {"source": "digits"}}, "holds images, and world_model learns from frames"),
        ({"model": {"backbone": "vae"}}, "Use one of unet"),
        ({"model": {"spec": {"out_chans": 1}}}, "model.spec.out_chans: follows from the data"),
        ({"objective": {"start": "end"}}, "none of frame, noise"),
        ({"objective": {"start": "noise", "start_noise": 0.1}}, "is of start: frame"),
        ({"objective": {"sampling_steps": 0}}, "must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=re.escape(said)):
        objective_of(**changes).batches("test", torch.device("cpu"))


def test_only_a_world_model_learns_from_play() -> None:
    values = {**TINY, "objective": {"name": "denoising"}}
    settings = config.build(run_config_class(values, lambda _: "test"), values, {}, "test")
    with pytest.raises(LabError, match="holds frames, and denoising learns from images"):
        objectives.make(settings, load(settings.data))


# ---- dreams ----


class Adds(nn.Module):
    """Says that the next frame is brighter by a tenth of the action taken, and notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []

    def forward(self, x: Any, past: Any, times: Any, actions: Any) -> Any:
        self.shown.append((past[0, :, 0, 0].clone(), actions[0].clone()))
        return torch.full_like(x, 0.1) * actions[:, -1, None, None, None]


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_dream_is_fed_with_itself_and_the_actions_in_turn(n_steps: int) -> None:
    network = Adds()
    past = torch.tensor([-0.4, -0.3, -0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    actions = torch.tensor([[0, 0, 1, 2, 3]])
    made = torch.cat(list(dreaming.dream(network, past, actions, n_steps=n_steps, noise=0.0)), 1)
    torch.testing.assert_close(made[0, :, 0, 0], torch.tensor([-0.1, 0.1, 0.4]))
    last_past, last_actions = network.shown[-1]
    torch.testing.assert_close(last_past, torch.tensor([-0.2, -0.1, 0.1]))
    assert last_actions.tolist() == [1, 2, 3]


def test_where_a_way_begins() -> None:
    past = torch.full((1000, 2, 2, 2), 0.5)
    assert torch.equal(dreaming.start_of(past, 0.0), past[:, -1:])
    for noise, mean, std in ((0.1, 0.5, 0.1), (None, 0.0, 1.0)):
        found = dreaming.start_of(past, noise, torch.Generator().manual_seed(0))
        assert float(found.mean()) == pytest.approx(mean, abs=0.05)
        assert float(found.std()) == pytest.approx(std, rel=0.05)


def test_vectors_of_several_labels_are_added_up() -> None:
    condition = Condition(8, 6, 4)
    times, vectors = torch.tensor([3.0, 5.0]), condition.classes
    assert vectors is not None
    nn.init.zeros_(condition.linear2.weight)
    nn.init.zeros_(condition.linear2.bias)
    found = condition(times, torch.tensor([[0, 2], [3, 3]]))
    of_each = vectors.weight
    torch.testing.assert_close(
        found, torch.nn.functional.silu(torch.stack((of_each[0] + of_each[2], 2 * of_each[3])))
    )


def test_bytes_survive_scaling() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(dreaming.unscaled(dreaming.scaled(every)), every)


def test_errors_are_those_computed_by_hand() -> None:
    """Of a model that knows nothing, whose dreams are copies; and of one whose output is known."""
    objective = objective_of()
    batches = list(objective.batches("test", torch.device("cpu")).epoch(0))
    with torch.inference_mode():
        found = objective.evaluate(objective.players, batches)  # the last layer begins at 0
    frames = torch.cat([batch["frames"] for batch in batches]).float() / 255
    errors = (frames[:, 4:] - frames[:, 3:4]).square()
    assert found["copy_mse"] == pytest.approx(float(errors.mean()), rel=1e-4)
    assert found["rollout_mse"] == pytest.approx(found["copy_mse"], rel=1e-4)
    assert found["changed_mse_of_copy"] == pytest.approx(1, rel=1e-4)

    bias = objective.players["model"].backbone.head.bias  # type: ignore[union-attr]
    with torch.inference_mode():
        bias.fill_(0.1)  # type: ignore[union-attr, operator]
        brighter = objective.evaluate(objective.players, batches)
    steps = torch.arange(1, 6).view(1, 5, 1, 1)
    dreamed = (frames[:, 3:4] + 0.05 * steps).clamp(max=1)
    wanted = (frames[:, 4:] - dreamed).square()
    assert brighter["rollout_mse"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    per_step = wanted.mean((0, 2, 3)) < errors.mean((0, 2, 3))
    assert brighter["steps_below_copy"] == int(per_step.sum())


def test_the_loss_is_of_the_frame_behind_the_last_action() -> None:
    """A network whose answer is the true difference has no loss, whatever was put on the past."""
    objective = objective_of(objective={"first_share": 0.0})
    batch = next(objective.batches("train", torch.device("cpu")).epoch(0))
    frames = dreaming.scaled(batch["frames"])

    class Knows(nn.Module):
        def forward(self, x: Any, past: Any, times: Any, actions: Any) -> Any:
            assert torch.equal(past, frames[:, :4])
            assert torch.equal(actions, batch["actions"][:, :4])
            return frames[:, 4:] - frames[:, 3:4]

    objective.players["model"] = Knows()
    assert loss_of(objective, batch) == pytest.approx(0, abs=1e-12)


def test_near_motion_is_near_what_moved_in_the_past() -> None:
    past = torch.zeros(2, 4, 12, 12)
    past[0, 1, 5, 2] = 1.0
    found = near_motion(past)
    assert found.shape == (2, 1, 12, 12)
    wanted = torch.zeros(12, 12)
    wanted[2:9, 0:6] = 1
    assert torch.equal(found[0, 0], wanted)
    assert not found[1].any()


def test_motion_counts_more_and_own_frames_are_dreamed() -> None:
    plain = objective_of()
    weighted = objective_of(objective={"motion_weight": 9.0})
    batch = next(plain.batches("train", torch.device("cpu")).epoch(0))
    torch.manual_seed(1)
    before = loss_of(plain, batch)
    torch.manual_seed(1)
    # The error of a network that says nothing is where something moves, and here it moved before.
    assert loss_of(weighted, batch) == pytest.approx(10 * before, rel=1e-4)

    own = objective_of(objective={"own_frames": 2, "own_share": 0.25})
    batch = next(own.batches("train", torch.device("cpu")).epoch(0))
    assert batch["frames"].shape[1] == 7
    shown = []
    bias = own.players["model"].backbone.head.bias  # type: ignore[union-attr]
    with torch.no_grad():
        bias.fill_(0.1)  # type: ignore[union-attr, operator]
    hook = own.players["model"].register_forward_hook(lambda _, args, out: shown.append(args[1:]))
    own.loss("model", batch)
    hook.remove()
    past, _, actions = shown[-1]
    frames = dreaming.scaled(batch["frames"])
    n_own = 4  # of 16
    torch.testing.assert_close(past[:n_own, :2], frames[:n_own, 2:4])
    torch.testing.assert_close(past[:n_own, 3:], (frames[:n_own, 3:4] + 0.2).clamp(max=1))
    assert torch.equal(past[n_own:], frames[n_own:, 2:6])
    assert torch.equal(actions, batch["actions"][:, 2:6])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_learns_the_rules_of_a_made_game(tmp_path: Path) -> None:
    """Copying the last frame is far off soon; the ball and the paddle follow rules."""
    settings = settings_of(
        objective={"motion_weight": 5.0},
        model={"spec": {"width": 16}},
        batch_size=32,
        max_steps=250,
        epochs=100.0,
        ema_decay=0.98,
        optimizer={"learning_rate": 4e-3, "warmup_steps": 20, "max_grad_norm": 1.0},
    )
    SupervisedPipeline().train(settings, tmp_path / "run", resume=False)
    found = Run.open(tmp_path / "run").info["summary"]
    assert found["eval/steps_below_copy"] == 5
    assert found["eval/rollout_mse_of_copy"] < 0.5
    assert {path.name for path in (tmp_path / "run" / "media").iterdir()} >= {
        "dream.png",
        "rollout_error.png",
    }


# ---- stopping ----


def test_a_stop_is_heard_within_evaluations_and_drawing_which_are_made_again(tmp_path: Path) -> None:
    """Each of the 15 frames of a dream takes several passes: at full size an evaluation takes minutes."""
    often = settings_of(eval={"every_epochs": 1e-6, "batch_size": 64}, log_every_steps=2, max_steps=2)
    whole = tmp_path / "whole"
    with Signals(dreaming, "next_frame", 0) as signals:
        SupervisedPipeline().train(often, whole, resume=False)
    for at in (3, signals.calls // 2, signals.calls - 3):  # of the first step, of the last, of the figures
        folder = tmp_path / f"stopped_at_{at}"
        with Signals(dreaming, "next_frame", at) as stopped:
            SupervisedPipeline().train(often, folder, resume=False)
        assert stopped.calls == at
        assert Run.open(folder).info["state"] == "interrupted"
        SupervisedPipeline().train(often, folder, resume=True)
        assert Run.open(folder).info["state"] == "finished"
        assert_same_run(whole, folder)
        assert {path.name for path in whole.rglob("*.png")} == {path.name for path in folder.rglob("*.png")}


# ---- playing ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("world") / "run"
    SupervisedPipeline().train(settings_of(ema_decay=0.5, name="tiny"), folder, resume=False)
    return Run.open(folder)


def test_a_dream_needs_no_data_and_begins_with_real_frames(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr("supervised.data.sources.read", gone)
    dream, names = open_dream(run, checkpoint.load(run.find_checkpoint("best")), seed=0)
    monkeypatch.undo()
    assert names == ["NOOP", "RIGHT", "LEFT"]
    data = load(DataConfig(source="catch"))
    held_out = data.test.frames.numpy()
    seen = []
    for _ in range(4):
        matches = [np.array_equal(dream.frame, frame) for frame in held_out]
        assert any(matches)
        seen.append(dream.past.clone())
        dream.begin()
    assert not all(torch.equal(seen[0], other) for other in seen[1:])


def test_the_action_played_is_the_one_the_model_is_told(run: Run) -> None:
    dream, _ = open_dream(run, checkpoint.load(run.find_checkpoint("latest")), seed=0)
    told = []
    dream.model.register_forward_hook(lambda _, args, out: told.append(args[3][0].tolist()))
    real = dream.actions[0].tolist()
    for action in (2, 1, 2):
        dream.step(action)
    assert told == [[*real[:3], 2], [*real[1:3], 2, 1], [real[2], 2, 1, 2]]


def test_keys_and_what_they_stand_for() -> None:
    assert parse_keys("a\x1b[A\x1bOB \x1b[1;5C\x1b[3~q\r") == (
        ["a", "up", "down", "space", "right", "q", "enter"],
        "",
    )
    for beginning in ("\x1b", "\x1b[", "\x1b[1;"):
        assert parse_keys(f"w{beginning}") == (["w"], beginning)
    pong = ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    maze = ["NOOP", "UP", "RIGHT", "LEFT", "DOWN"]
    assert [action_of(key, pong) for key in ("up", "s", "d", "a", "space", "x")] == [2, 3, 2, 3, 1, None]
    assert [action_of(key, maze) for key in ("w", "down", "right", "left", "space")] == [1, 4, 2, 3, None]


def test_half_blocks_show_two_pixels_each() -> None:
    image = np.array([[0, 255], [9, 9], [1, 2]], np.uint8)
    plain = half_blocks(image)
    assert re.sub(r"\x1b\[[0-9;]*[mK]", "", plain) == "▀▀\r\n▀▀"
    assert plain.startswith("\x1b[38;2;0;0;0m\x1b[48;2;9;9;9m▀\x1b[38;2;255;255;255m▀")


class Player:
    """`lab play` in a terminal of its own."""

    def __init__(self, run: Run, environment: Mapping[str, str], *more: str) -> None:
        self.parent, child = pty.openpty()
        self.child = os.dup(child)
        self.before = termios.tcgetattr(child)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.cli", "play", str(run.folder), "--world-model", *more],
            **{"stdin": child, "stdout": child, "stderr": child, "env": dict(environment)},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose Ctrl-C is its own
        )
        os.close(child)
        self.seen = ""

    def read(self, seconds: float = 0.1) -> bool:
        """Whether there was something, within so many seconds."""
        if not select.select([self.parent], [], [], seconds)[0]:
            return False
        try:
            self.seen += os.read(self.parent, 65536).decode(errors="replace")
        except OSError:  # nobody has the other side open any more
            return False
        return True

    def until(self, words: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while words not in self.seen and time.monotonic() < end:
            self.read()
        assert words in self.seen, self.seen[-2000:]

    def press(self, keys: str) -> None:
        os.write(self.parent, keys.encode())

    def end(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        while self.read(0.05):
            pass
        self.process.kill()  # does nothing to one that has ended
        return self.process.wait(10)

    def restored(self) -> bool:
        """Attributes as before, the ordinary screen, and a cursor."""
        return (
            termios.tcgetattr(self.child) == self.before
            and self.seen.rfind("\x1b[?1049l") > self.seen.rfind("\x1b[?1049h") >= 0
            and self.seen.rfind("\x1b[?25h") > self.seen.rfind("\x1b[?25l")
        )


def test_a_game_in_a_terminal(run: Run, lab_environment: dict[str, str]) -> None:
    player = Player(run, lab_environment)
    player.until("frame 2 ")
    assert "▀" in player.seen
    player.press("\x1b[C")
    player.until("right")
    player.press("a")
    player.until("left")
    player.until("noop", seconds=60)
    player.press("r")
    player.press("q")
    assert player.end() == 0
    assert player.restored()
    assert re.search(r"run: \d+ frames, [0-9.]+ a second", player.seen)


@pytest.mark.slow
def test_ctrl_c_and_a_bound_restore_the_terminal(run: Run, lab_environment: dict[str, str]) -> None:
    player = Player(run, lab_environment)
    player.until("frame 1 ")
    player.press("\x03")
    assert player.end() == 0
    assert player.restored()
    bounded = Player(run, lab_environment, "--max_steps=3")
    assert bounded.end() == 0
    assert bounded.restored()
    assert "run: 3 frames" in bounded.seen


def test_what_cannot_be_played_is_one_line(run: Run, lab_command: Any, tmp_path: Path) -> None:
    model = str(run.folder)
    for arguments, said in (
        ([model, "--world-model"], "needs a terminal"),
        ([model], "is a world model. Play in it: lab play"),
        ([model, "--world-model", "--out", "a.mp4"], "--out is for films of agents"),
        ([model, "--world-model", "--epsilon=0.1"], "--epsilon is for films of agents"),
    ):
        result = lab_command("play", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_command_evaluates_step_by_step(run: Run, lab_command: Any, tmp_path: Path) -> None:
    result = lab_command("evaluate", run.folder, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["eval"]
    steps = [found[f"copy_mse_step_{step:02}"] for step in range(1, 6)]
    assert found["copy_mse"] == pytest.approx(np.mean(steps), rel=1e-5)
    assert WorldModelConfig().rollout == 15
