"""DRQN: the memory, the sequences it learns from, the loss; and that it solves what DQN cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from lab.device import Compute
from rl.agent import DQN
from rl.config import DQNConfig, DRQNConfig, EnvConfig
from rl.drqn import DRQN
from rl.envs import AtariVecEnv
from rl.evaluate import Player
from rl.frames import record
from rl.sequences import SequenceReplay
from supervised import backbones
from tests.host_reads import HostReads
from tests.rl.conftest import SMALL_NET
from tests.rl.test_replay import SIDE, Stream

CPU = Compute(torch.device("cpu"), "fp32", 1, "test")
SMALL: dict[str, Any] = {
    **{"buffer_size": 500, "learning_starts": 40, "batch_size": 4, "target_update_steps": 64},
    **{"backbone_spec": {**SMALL_NET, "hidden": 16}, "sequence_steps": 3, "burn_in_steps": 2},
}


@pytest.fixture
def make_drqn() -> Callable[..., DRQN]:
    def make(device: str = "cpu", **changes: Any) -> DRQN:
        env = AtariVecEnv("pong", 2, 0, image_size=44, num_threads=1)
        compute = Compute(torch.device(device), "fp32", 1, "test")
        return DRQN(DRQNConfig(**(SMALL | changes)), env, compute, 0)

    return make


# ---- the memory ----


def test_the_papers_body_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        body = backbones.build("drqn", in_chans=1, img_size=84)
    assert sum(p.numel() for p in body.parameters()) == 7_547_040


@pytest.mark.parametrize("memory", ["lstm", "gru", "rnn"])
def test_step_by_step_it_says_what_it_says_of_the_whole_and_forgets_where_a_game_begins(memory: str) -> None:
    body = backbones.build("drqn", img_size=12, memory=memory, hidden=8, eyes="lenet1")
    frames = torch.rand(3, 6, 1, 12, 12)
    whole, end = body(frames)
    state, steps = None, []
    for t in range(6):
        features, state = body(frames[:, t : t + 1], state)
        steps.append(features)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert state is not None
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b)
    begins = torch.zeros(3, 6, dtype=torch.bool)
    begins[1, 4] = True
    forgetful, _ = body(frames, None, begins)
    torch.testing.assert_close(forgetful[1, 4:], body(frames[1:2, 4:])[0][0])
    torch.testing.assert_close(forgetful[[0, 2]], whole[[0, 2]])
    assert not torch.allclose(forgetful[1, 5], whole[1, 5])


def test_what_it_acts_on_is_its_memory_of_this_game_alone(make_drqn: Callable[..., DRQN]) -> None:
    agent = make_drqn()
    rng = np.random.default_rng(0)
    seen = rng.integers(256, size=(4, 2, 4, 44, 44), dtype=np.uint8)
    said = []
    for t in range(4):
        if t == 2:
            agent._after_env_step(np.array([False, True]), [{}, {}])  # the second game was over
        said.append(agent.q_values(seen[t]))
    frames = torch.from_numpy(seen[:, :, -1:]).transpose(0, 1)
    whole, _ = agent.policy.q_net(frames)
    torch.testing.assert_close(torch.stack(said[:2], 1), whole[:, :2])
    torch.testing.assert_close(said[3][0], whole[0, 3])
    torch.testing.assert_close(said[3][1], agent.policy.q_net(frames[1:, 2:])[0][0, 1])
    first, state = agent.predict(seen[0], deterministic=True)
    second, _ = agent.predict(seen[1], state, np.zeros(2, bool), deterministic=True)
    assert first.tolist() == whole[:, 0].argmax(1).tolist()
    assert second.tolist() == whole[:, 1].argmax(1).tolist()


# ---- sequences ----


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.integers(5, 90))
def test_sequences_are_consecutive_steps_of_one_episode(
    seed: int, n_steps: int, burn_in: int, length: int, played: int
) -> None:
    space = spaces.Box(0, 255, (4, SIDE, SIDE), np.uint8)
    replay = SequenceReplay(
        40, space, spaces.Discrete(6), "cpu", n_envs=2, n_steps=n_steps, gamma=0.9, seed=seed
    )
    stream = Stream(2, seed)
    for _ in range(played):
        stream.step(replay)
    batch = replay.sample_sequences(16, burn_in, length)
    place = {}  # the newest frame of an observation is of one step only
    for env in range(2):
        for number, row in enumerate(stream.record[env]):
            place[row[0][-1].tobytes()] = (env, number)
    for b in range(16):
        env, first = place[batch.frames[b, burn_in, 0].numpy().tobytes()]
        record, over = stream.record[env], False
        for j in range(length):
            number = first + j
            over = over or number >= len(record)
            assert bool(batch.mask[b, j]) == (not over)
            if over:
                continue
            observation, action, _, _, _, _ = record[number]
            assert (batch.frames[b, burn_in + j, 0].numpy() == observation[-1]).all()
            assert batch.actions[b, j] == action
            total, k, done = 0.0, 0, False
            for later in record[number : number + n_steps]:
                total += 0.9**k * float(later[2])
                k, done = k + 1, bool(later[4])
                if done or later[5]:
                    break
            assert batch.rewards[b, j] == pytest.approx(total)
            assert bool(batch.dones[b, j]) == done
            assert batch.discounts[b, j] == pytest.approx(0.9**k)
            assert batch.following[b, j] == j + k
            if not done:
                after = record[number + k - 1][3][-1]
                assert (batch.frames[b, burn_in + j + k, 0].numpy() == after).all()
                assert not batch.begins[b, burn_in + j + 1 : burn_in + j + k + 1].any()
            over = bool(record[number][4] or record[number][5])
        # Behind the last beginning, burn-in steps are those before the first one, of the same episode.
        since = burn_in
        while since > 0 and not batch.begins[b, since]:
            since -= 1
        for t in range(since if batch.begins[b, since] else 0, burn_in):
            before = record[first - (burn_in - t)]
            assert (batch.frames[b, t, 0].numpy() == before[0][-1]).all()
            assert not before[4]
            assert not before[5]


# ---- learning ----


@pytest.mark.parametrize("double", [False, True])
def test_the_loss_is_dqns_at_every_step_behind_the_burn_in(
    make_drqn: Callable[..., DRQN], double: bool
) -> None:
    agent = make_drqn(double=double, n_step=2, dueling=True)
    for _ in agent.iterate(60):
        pass
    online, target = agent.policy.q_net, agent.policy.q_net_target
    torch.manual_seed(0)
    for parameter in target.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    assert isinstance(agent.replay, SequenceReplay)
    batch = agent.replay.sample_sequences(4, 2, 3)
    losses = []
    for b in range(4):
        with torch.no_grad():
            mine, _ = online(batch.frames[b : b + 1], None, batch.begins[b : b + 1])
            theirs, _ = target(batch.frames[b : b + 1], None, batch.begins[b : b + 1])
        for j in range(3):
            if batch.mask[b, j]:
                at = 2 + int(batch.following[b, j])
                best = (mine if double else theirs)[0, at].argmax()
                wanted = (
                    batch.rewards[b, j]
                    + (1 - batch.dones[b, j]) * batch.discounts[b, j] * theirs[0, at, best]
                )
                losses.append(F.smooth_l1_loss(mine[0, 2 + j, batch.actions[b, j]], wanted))
    agent._loss_sum.zero_()
    before = [p.clone() for p in online.parameters()]
    agent.learn_from(batch)
    torch.testing.assert_close(agent._loss_sum, torch.stack(losses).mean())
    assert all(not torch.equal(a, b) for a, b in zip(before, online.parameters(), strict=True))


def test_who_is_recorded_forgets_where_a_game_begins(make_drqn: Callable[..., DRQN]) -> None:
    class Noting(Player):
        """Keeps what it said."""

        said: list[torch.Tensor] = []  # noqa: RUF012

        def q_values(self, observations: np.ndarray, games: np.ndarray) -> torch.Tensor:
            self.said.append(super().q_values(observations, games))
            return self.said[-1]

    q_net = make_drqn().policy.q_net
    env = EnvConfig(game="pong", n_envs=2, image_size=44, max_episode_frames=80, num_threads=1)
    arrays = record(env, Noting(q_net, env), 2 * 40, 0.0, 3)
    second = int(np.flatnonzero(arrays["begins"][:40])[1])
    fresh, stale = Player(q_net, env), Player(q_net, env)
    for player, first in ((fresh, second), (stale, 0)):
        player.begin(1)
        q = torch.empty(0)
        for step in range(first, second + 3):
            seen = np.repeat(arrays["frames"][None, None, step], 4, 1)
            q = player.q_values(seen, np.zeros(1, np.int64))
        difference = float((q[0] - Noting.said[second + 2][0]).abs().max())
        assert (difference < 1e-6) == (player is fresh)


def test_a_step_runs_on_the_meta_device_and_never_waits(make_drqn: Callable[..., DRQN]) -> None:
    agent = make_drqn(double=True, n_step=2)
    for _ in agent.iterate(60):
        pass
    with HostReads() as reads:
        agent.train(2, 4)
    assert not reads.seen
    assert isinstance(agent.replay, SequenceReplay)
    batch = agent.replay.sample_sequences(4, 2, 3)
    elsewhere = make_drqn(device="meta", double=True, n_step=2)
    elsewhere.learn_from(type(batch)(*(tensor.to("meta") for tensor in batch)))
    assert next(elsewhere.policy.q_net.parameters()).device.type == "meta"


class Cue(VecEnv):
    """The first frame is bright on one side; seven dark ones later, that side is to be named."""

    frame_skip, delay = 1, 7

    def __init__(self, n_envs: int) -> None:
        super().__init__(n_envs, spaces.Box(0, 255, (4, 8, 8), np.uint8), spaces.Discrete(2))
        self.rng = np.random.default_rng(0)
        self.frames = np.zeros((n_envs, 4, 8, 8), np.uint8)
        self.sides, self.time = np.zeros(n_envs, int), np.zeros(n_envs, int)
        self.right: list[bool] = []
        self.waiting = False  # as `AtariVecEnv` has it

    def begin(self, i: Any) -> None:
        self.sides[i], self.time[i] = self.rng.integers(2), 0
        self.frames[i] = 0
        self.frames[i, -1, :, 4 * self.sides[i] : 4 * self.sides[i] + 4] = 255

    def reset(self) -> np.ndarray:
        for i in range(self.num_envs):
            self.begin(i)
        return self.frames.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions, self.waiting = actions, True

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.time, self.waiting = self.time + 1, False
        dones = self.time > self.delay
        rewards = np.where(dones, np.where(self.actions == self.sides, 1.0, -1.0), 0.0)
        self.frames = np.concatenate((self.frames[:, 1:], np.zeros((self.num_envs, 1, 8, 8), np.uint8)), 1)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False, "game_over": True} for _ in dones]
        for i in np.flatnonzero(dones):
            self.right.append(bool(rewards[i] > 0))
            infos[i]["terminal_observation"] = self.frames[i].copy()
            self.begin(i)
        return self.frames.copy(), rewards, dones, infos

    def close(self) -> None: ...
    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def env_method(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        return [None] * self.num_envs

    def set_attr(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.slow
def test_it_remembers_a_cue_that_dqn_has_long_forgotten() -> None:
    eyes = {"channels": [4], "kernels": [4], "strides": [4], "paddings": [0], "width": 16}
    of_both: dict[str, Any] = {
        **{"buffer_size": 4_000, "learning_starts": 400, "target_update_steps": 200, "learning_rate": 3e-3},
        **{"exploration_steps": 3_000, "exploration_final": 0.02, "train_freq": 8, "gamma": 0.99},
    }
    shares = {}
    for name in ("drqn", "dqn"):
        env: Any = Cue(8)
        agent: DQN
        if name == "drqn":
            spec = {**eyes, "hidden": 16}
            more = {"backbone_spec": spec, "sequence_steps": 8, "burn_in_steps": 4, "batch_size": 16}
            agent = DRQN(DRQNConfig(**of_both, **more), env, CPU, 0)
        else:
            agent = DQN(DQNConfig(**of_both, backbone_spec=eyes), env, CPU, 0)
        for _ in agent.iterate(9_000):
            pass
        shares[name] = float(np.mean(env.right[-150:]))
    assert shares["drqn"] > 0.9
    assert shares["dqn"] < 0.7
