"""The replay memory against hand-computed values and a plain reference that keeps whole observations."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from rl.replay import FrameReplay

SIDE = 2


def memory(size: int = 100, n_envs: int = 1, **kwargs: Any) -> FrameReplay:
    space = spaces.Box(0, 255, (4, SIDE, SIDE), np.uint8)
    return FrameReplay(size, space, spaces.Discrete(6), "cpu", n_envs=n_envs, **kwargs)


class Stream:
    """A made-up game whose every frame has its own number, and a plain record of all transitions."""

    def __init__(self, n_envs: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.n_envs, self.next_frame = n_envs, 0
        self.observations = np.stack([self.fresh() for _ in range(n_envs)])
        # per environment: (observation, action, reward, next observation, terminal, boundary behind it)
        self.record: list[list[tuple[Any, ...]]] = [[] for _ in range(n_envs)]

    def frame(self) -> np.ndarray:
        self.next_frame += 1
        digits = self.next_frame % 256, self.next_frame // 256 % 256
        return np.array([[digits[0], digits[1]], [7, 7]], np.uint8)

    def fresh(self) -> np.ndarray:
        return np.stack([np.zeros((SIDE, SIDE), np.uint8)] * 3 + [self.frame()])

    def step(self, replay: FrameReplay, p_end: float = 0.15) -> None:
        before = self.observations.copy()
        after = np.stack([np.concatenate((o[1:], self.frame()[None])) for o in before])
        actions = self.rng.integers(6, size=self.n_envs)
        rewards = self.rng.integers(-1, 2, size=self.n_envs).astype(np.float32)
        dones = self.rng.random(self.n_envs) < p_end
        infos: list[dict[str, Any]] = [{} for _ in range(self.n_envs)]
        following = after.copy()
        for i in range(self.n_envs):
            kind = self.rng.choice(["over", "truncated", "life"]) if dones[i] else ""
            if kind:
                infos[i] = {"game_over": kind != "life", "TimeLimit.truncated": kind == "truncated"}
            if kind in ("over", "truncated"):
                following[i] = self.fresh()
            self.record[i].append(
                (before[i], actions[i], rewards[i], after[i], kind in ("over", "life"), kind == "truncated")
            )
        replay.add(before, after, actions, rewards, dones, infos)
        self.observations = following

    def cut(self, replay: FrameReplay) -> None:
        replay.cut()
        for i in range(self.n_envs):
            if self.record[i]:
                self.record[i][-1] = (*self.record[i][-1][:5], True)
            self.observations[i] = self.fresh()

    def expected(self, env: int, index: int, n_steps: int, gamma: float) -> tuple[Any, ...]:
        """The n-step transition that starts at `index`, straight from the definition."""
        reward, steps = 0.0, 0
        rows = self.record[env]
        while True:
            _, _, r, after, terminal, boundary = rows[index + steps]
            reward += gamma**steps * r
            steps += 1
            if terminal or boundary or steps == n_steps or index + steps == len(rows):
                return rows[index][0], rows[index][1], after, terminal, reward, gamma**steps


def by_key(samples: Any) -> dict[bytes, tuple[Any, ...]]:
    """Samples by the bytes of their observation (every observation occurs once)."""
    return {
        samples.observations[k].numpy().tobytes(): tuple(part[k] for part in samples)
        for k in range(len(samples.observations))
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_envs=st.integers(1, 4),
    n_steps=st.integers(1, 5),
    steps=st.integers(2, 150),
    size=st.integers(8, 120),
)
def test_samples_are_exactly_the_transitions_that_happened(
    seed: int, n_envs: int, n_steps: int, steps: int, size: int
) -> None:
    gamma = 0.9
    replay = memory(size, n_envs, n_steps=n_steps, gamma=gamma, seed=seed)
    stream = Stream(n_envs, seed)
    for t in range(steps):
        stream.step(replay)
        if t % 37 == 36:
            stream.cut(replay)
    expected = {}
    for env in range(n_envs):
        for index, row in enumerate(stream.record[env]):
            expected[row[0].tobytes()] = stream.expected(env, index, n_steps, gamma)
    samples = by_key(replay.sample(256))
    assert samples
    for key, (observation, action, next_observation, done, reward, discount) in samples.items():
        want = expected[key]
        np.testing.assert_array_equal(observation, want[0])
        assert int(action) == want[1]
        np.testing.assert_array_equal(next_observation, want[2])
        assert bool(done) == want[3]
        assert float(reward) == pytest.approx(want[4], abs=1e-5)
        assert float(discount) == pytest.approx(want[5], rel=1e-5)


def test_three_step_return_by_hand() -> None:
    replay = memory(n_steps=3, gamma=0.5)
    frames = np.arange(1, 20, dtype=np.uint8)
    observation = np.broadcast_to(frames[:4, None, None], (4, SIDE, SIDE))[None].copy()
    for k, reward in enumerate([1.0, 2.0, 4.0, 8.0]):
        following = np.roll(observation, -1, axis=1)
        following[:, -1] = frames[4 + k]
        replay.add(observation, following, np.array([k]), np.array([reward]), np.array([False]), [{}])
        observation = following
    sample = by_key(replay.sample(64))
    first = next(s for s in sample.values() if int(s[1]) == 0)
    assert float(first[4]) == 1 + 0.5 * 2 + 0.25 * 4
    assert float(first[5]) == 0.125
    assert first[2][:, 0, 0].tolist() == [4, 5, 6, 7]
    last = next(s for s in sample.values() if int(s[1]) == 3)  # only one step has followed it so far
    assert float(last[4]) == 8
    assert float(last[5]) == 0.5


def test_every_stored_transition_can_be_drawn_and_all_are_equally_likely() -> None:
    replay = memory(60, n_envs=3, seed=1)
    stream = Stream(3, 0)
    for _ in range(40):
        stream.step(replay, p_end=0.3)
    draws: dict[bytes, int] = {}
    for _ in range(200):
        for observation in replay.sample(50).observations:
            draws[observation.numpy().tobytes()] = draws.get(observation.numpy().tobytes(), 0) + 1
    assert len(draws) == replay.size()
    expected = 200 * 50 / len(draws)
    chi_squared = sum((n - expected) ** 2 / expected for n in draws.values())
    freedom = len(draws) - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n_envs", [1, 8, 32, 128])
def test_a_million_transitions_take_at_most_7_3_gigabytes(n_envs: int) -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = FrameReplay(1_000_000, space, spaces.Discrete(18), "cpu", n_envs=n_envs, n_steps=3)
    assert 7.05e9 < replay.nbytes <= 7.3e9  # not touched: the system has given out none of it yet


def test_a_fresh_memory_takes_no_memory() -> None:
    code = (
        "import numpy as np, psutil\n"
        "from gymnasium import spaces\n"
        "from rl.replay import FrameReplay\n"
        "before = psutil.Process().memory_info().rss\n"
        "space = spaces.Box(0, 255, (4, 84, 84), np.uint8)\n"
        "replay = FrameReplay(1_000_000, space, spaces.Discrete(6), 'cpu', n_envs=8)\n"
        "obs = np.ones((8, 4, 84, 84), np.uint8)\n"
        "for _ in range(100): replay.add(obs, obs, np.zeros(8), np.zeros(8), np.zeros(8, bool), [{}] * 8)\n"
        "replay.sample(32)\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60e6


def test_a_full_memory_keeps_at_least_its_size_when_games_are_long() -> None:
    replay = memory(1000, n_envs=4)
    stream = Stream(4, 0)
    for _ in range(600):
        stream.step(replay, p_end=0.004)
    assert replay.size() >= 1000


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_saved_in_parts_and_restored_it_samples_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    replay = memory(80, n_envs=2, n_steps=3, seed=seed)
    stream = Stream(2, seed)
    files: list[Path] = []
    for part in parts:
        for _ in range(part):
            stream.step(replay)
        if part % 2:
            stream.cut(replay)
        files = replay.save_new(folder)
    for file in folder.iterdir():  # what is left out of the list may be deleted
        if file not in files:
            file.unlink()
    other = memory(80, n_envs=2, n_steps=3, seed=seed + 1)
    other.restore(folder, [file.name for file in files])
    other.set_state(replay.state())
    for _ in range(3):
        for _ in range(9):
            before = stream.observations.copy(), stream.next_frame, stream.rng.bit_generator.state
            stream.step(replay)
            stream.observations, stream.next_frame, stream.rng.bit_generator.state = before
            stream.step(other)
        for left, right in zip(replay.sample(32), other.sample(32), strict=True):
            assert left is not None
            assert right is not None
            assert torch.equal(left, right)


def test_a_second_save_writes_only_what_is_new(tmp_path: Path) -> None:
    replay = memory(10_000, n_envs=2)
    stream = Stream(2, 0)
    for _ in range(2000):
        stream.step(replay)
    first = replay.save_new(tmp_path)[-1].stat().st_size
    for _ in range(20):
        stream.step(replay)
    second = replay.save_new(tmp_path)[-1].stat().st_size
    assert second < first / 10


def test_an_empty_memory_says_so() -> None:
    with pytest.raises(LabError, match="empty"):
        memory().sample(1)


def test_it_can_live_on_another_device() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = FrameReplay(
        100, space, spaces.Discrete(6), torch.device("meta"), n_envs=2, storage_device="meta"
    )
    obs = np.zeros((2, 4, 84, 84), np.uint8)
    replay.add(obs, obs, np.zeros(2), np.zeros(2), np.zeros(2, bool), [{}, {}])
    sample = replay.sample(8)
    assert sample.observations.device.type == "meta"
    assert sample.observations.shape == (8, 4, 84, 84)
