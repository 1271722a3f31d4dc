"""The learning rules against hand-computed values, and what makes them ready for a GPU."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from rl.agent import DQN, QLearner, crossings
from rl.optim import CenteredRMSprop, RectifiedAdam, rectification
from rl.policy import DuelingHead
from rl.pqn import PQN, lambda_returns
from tests.host_reads import HostReads

ALGORITHMS = ["dqn", "pqn"]


def fake_batch(agent: DQN, n: int = 8) -> ReplayBufferSamples:
    generator = torch.Generator().manual_seed(0)
    shape = (n, *agent.observation_space.shape)  # type: ignore[misc]
    return ReplayBufferSamples(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(0, 6, (n, 1), generator=generator),
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.tensor([[0.0], [1.0]] * (n // 2)),
        torch.randn(n, 1, generator=generator) * 3,
        torch.full((n, 1), 0.9),
    )


def one_update(agent: QLearner) -> None:
    """One update on made-up data of the agent's own device."""
    device = agent.device
    shape = agent.observation_space.shape
    assert shape is not None
    if isinstance(agent, DQN):
        batch = ReplayBufferSamples(*(x.to(device) for x in fake_batch(agent) if x is not None))
        agent.update(batch, partial(agent.target_q, batch))
    else:
        assert isinstance(agent, PQN)
        observations = torch.zeros((16, *shape), dtype=torch.uint8, device=device)
        agent.update(
            observations,
            torch.zeros((16, 1), dtype=torch.int64, device=device),
            torch.ones((16, 1), device=device),
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_dqn_descends_the_huber_loss_to_the_bootstrapped_target(
    make_dqn: Callable[..., DQN], double: bool, dueling: bool
) -> None:
    agent = make_dqn(double=double, dueling=dueling, max_grad_norm=None)
    with torch.no_grad():
        for parameter in agent.policy.q_net_target.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = fake_batch(agent)
    online = copy.deepcopy(agent.policy.q_net)

    # by hand: Mnih et al. 2015, and van Hasselt et al. 2016 for double
    next_target = agent.policy.q_net_target(batch.next_observations).detach()
    chosen = online(batch.next_observations) if double else next_target
    target = torch.stack(
        [
            batch.rewards[i, 0] + (0 if batch.dones[i, 0] else 0.9 * next_target[i, int(chosen[i].argmax())])
            for i in range(8)
        ]
    )
    q = torch.stack([online(batch.observations)[i, int(batch.actions[i, 0])] for i in range(8)])
    error = (q - target).abs()
    loss = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    loss.backward()

    agent.update(batch, partial(agent.target_q, batch))
    assert agent.metrics()["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for mine, expected in zip(agent.policy.q_net.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_dueling_head_is_value_plus_centred_advantage() -> None:
    head = DuelingHead(3, 4)
    features = torch.randn(5, 3)
    advantage = head.advantage(features)
    expected = head.value(features) + advantage - advantage.mean(1, keepdim=True)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(features).mean(1, keepdim=True), head.value(features))


def test_updates_and_target_copies_per_agent_step_do_not_depend_on_n_envs(
    make_dqn: Callable[..., DQN],
) -> None:
    for n_envs in (1, 4, 8):
        agent = make_dqn(n_envs=n_envs, train_freq=4, learning_starts=40)
        copies: list[int] = []
        load = agent.policy.q_net_target.load_state_dict

        def counted(state: Any, agent: DQN = agent, load: Any = load, copies: list[int] = copies) -> None:
            copies.append(agent.num_timesteps)
            load(state)

        agent.policy.q_net_target.load_state_dict = counted  # type: ignore[method-assign]
        for _ in agent.iterate(40 + 400):
            pass
        assert agent._n_updates == pytest.approx(100, abs=2)
        assert len(copies) == pytest.approx(400 / 64, abs=1)


def test_crossings_counts_multiples() -> None:
    assert [crossings(step, 3, 4) for step in (3, 6, 9, 12)] == [0, 1, 1, 1]
    assert crossings(32, 32, 4) == 8


def test_epsilon_is_linear_in_agent_steps_and_knows_nothing_of_the_runs_length(
    make_dqn: Callable[..., DQN],
) -> None:
    agent = make_dqn(exploration_initial=1.0, exploration_final=0.1, exploration_steps=100)
    for step, expected in ((0, 1.0), (50, 0.55), (100, 0.1), (1_000_000, 0.1)):
        agent.num_timesteps = step
        assert agent.epsilon() == pytest.approx(expected)


def test_on_the_ladder_every_environment_has_an_epsilon_of_its_own(make_dqn: Callable[..., DQN]) -> None:
    """Ape-X, section 4.1: 0.4^(1 + 7i/(N-1)); by hand for N = 8: 0.4, 0.16, 0.064, ..., 0.4^8."""
    agent = make_dqn(n_envs=8, exploration_ladder=0.4)
    agent.exploration_rate = 0.01
    expected = [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.01, 0.01, 0.01]
    assert agent.epsilons() == pytest.approx(expected)
    agent.exploration_rate = 1.0
    assert agent.epsilons() == pytest.approx([1.0] * 8)
    alike = make_dqn(n_envs=8)
    alike.exploration_rate = 0.3
    assert alike.epsilons() == pytest.approx([0.3] * 8)


def test_every_environment_explores_by_its_own_draw(make_dqn: Callable[..., DQN]) -> None:
    agent = make_dqn(n_envs=8)
    greedy = np.full(8, 6)  # no random action can be 6
    explored = np.stack([agent.explore(greedy, 8, 0.5) != 6 for _ in range(400)])
    mixed = explored.any(1) & ~explored.all(1)
    assert mixed.mean() > 0.9, "one draw for all environments would explore in all or none"
    assert explored.mean() == pytest.approx(0.5, abs=0.05)
    assert not (agent.explore(greedy, 8, 0.0) != 6).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("optimizer", ["adam", "radam", "rmsprop"])
def test_a_training_step_runs_on_the_meta_device(
    make_dqn: Callable[..., DQN], make_pqn: Callable[..., PQN], algorithm: str, optimizer: str
) -> None:
    make = {"dqn": make_dqn, "pqn": make_pqn}[algorithm]
    changes = {"double": True, "dueling": True} if algorithm == "dqn" else {}
    agent = make(device="meta", optimizer=optimizer, **changes)  # in fp32: meta has no autocast
    one_update(agent)  # a tensor left on the CPU, or a number read back, raises here
    assert next(agent.policy.q_net.parameters()).device.type == "meta"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("optimizer", ["adam", "radam", "rmsprop"])
def test_a_training_step_never_waits_for_the_device(
    make_dqn: Callable[..., DQN], make_pqn: Callable[..., PQN], algorithm: str, optimizer: str
) -> None:
    make = {"dqn": make_dqn, "pqn": make_pqn}[algorithm]
    changes = {"double": True, "dueling": True} if algorithm == "dqn" else {}
    agent = make(optimizer=optimizer, **changes)
    one_update(agent)
    with HostReads() as reads:
        if isinstance(agent, DQN):
            for _ in agent.iterate(60):  # fills the memory
                pass
            reads.seen.clear()
            agent._beside = None  # what another thread reads would not be seen
            agent.train(3, 8)  # sampling included
        else:
            assert isinstance(agent, PQN)
            next(agent.iterate(1))
            assert agent._rollout()
            targets = agent._returns()
            reads.seen.clear()
            assert agent.train(targets)
    assert not reads.seen


def test_the_host_read_detector_detects() -> None:
    with HostReads() as reads:
        float(torch.ones(1).sum())
        torch.ones(3)[torch.ones(3) > 0]
    assert len(reads.seen) == 2


def test_lambda_returns_by_hand() -> None:
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    values = torch.tensor([[10.0], [20.0], [40.0]])
    zero = torch.zeros(3, 1)
    got = lambda_returns(rewards, zero, zero, values, gamma=0.5, td_lambda=0.25)
    r2 = 4 + 0.5 * 40
    r1 = 2 + 0.5 * (0.25 * r2 + 0.75 * 20)
    r0 = 1 + 0.5 * (0.25 * r1 + 0.75 * 10)
    assert got.flatten().tolist() == [r0, r1, r2]


def test_lambda_returns_stop_at_an_end_and_bootstrap_at_a_cut() -> None:
    rewards = torch.ones(3, 1)
    values = torch.tensor([[10.0], [20.0], [40.0]])
    middle = torch.tensor([[0.0], [1.0], [0.0]])
    zero = torch.zeros(3, 1)
    ended = lambda_returns(rewards, middle, zero, values, gamma=0.5, td_lambda=1.0)
    assert ended.flatten().tolist() == [1.5, 1.0, 21.0]
    cut = lambda_returns(rewards, zero, middle, values, gamma=0.5, td_lambda=1.0)
    assert cut.flatten().tolist() == [1 + 0.5 * 11, 11.0, 21.0]


def test_lambda_one_is_the_discounted_sum_and_lambda_zero_one_step() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(6, 3, generator=generator) for _ in range(2))
    zero = torch.zeros(6, 3)
    one_step = lambda_returns(rewards, zero, zero, values, 0.9, 0.0)
    torch.testing.assert_close(one_step, rewards + 0.9 * values)
    whole = lambda_returns(rewards, zero, zero, values, 0.9, 1.0)
    expected = sum(0.9**k * rewards[k] for k in range(6)) + 0.9**6 * values[5]
    torch.testing.assert_close(whole[0], expected)


def test_pqn_bootstraps_a_cut_off_game_from_its_last_observation(make_pqn: Callable[..., PQN]) -> None:
    agent = make_pqn(n_envs=4, rollout_steps=64, max_episode_frames=200, td_lambda=0.5, gamma=0.9)
    agent._last_obs = agent.env.reset()  # type: ignore[assignment]
    seen: list[tuple[int, int, np.ndarray]] = []
    step_wait = agent.env.step_wait
    calls = 0

    def recording() -> Any:
        nonlocal calls
        result = step_wait()
        seen.extend((calls, int(i), result[3][i]["terminal_observation"]) for i in np.flatnonzero(result[2]))
        calls += 1
        return result

    agent.env.step_wait = recording  # type: ignore[method-assign]
    assert agent._rollout()
    returns = agent._returns()
    assert seen
    for t, i, last in seen:
        expected = agent._rewards[t, i] + 0.9 * float(agent.q_values(last[None]).max())
        assert float(returns[t, i]) == pytest.approx(expected, rel=1e-4)


def test_rectified_adam_follows_torchs_radam_once_the_variance_is_tractable() -> None:
    def run(optimizer: torch.optim.Optimizer, weight: Tensor, start: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        for step in range(60):
            weight.grad = torch.randn(7, generator=generator)
            if step < start:  # keep the moments, undo the step: the two differ in the first five only
                before = weight.detach().clone()
                optimizer.step()
                weight.data.copy_(before)
            else:
                optimizer.step()
        return weight.detach()

    a, b = torch.zeros(7, requires_grad=True), torch.zeros(7, requires_grad=True)
    mine = run(RectifiedAdam([a], lr=0.01, fused=True), a, 5)
    torchs = run(torch.optim.RAdam([b], lr=0.01), b, 5)
    torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-6)
    assert [rectification(t) for t in range(1, 6)] == [0.0] * 5
    assert 0 < rectification(6) < rectification(1000) < rectification(100_000) <= 1


def test_centered_rmsprop_has_eps_inside_the_root() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = CenteredRMSprop([weight], lr=0.1, decay=0.95, eps=0.01)
    mean = mean_square = 0.0
    value = 1.0
    for gradient in (0.5, -0.2, 0.7):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        mean = 0.95 * mean + 0.05 * gradient
        mean_square = 0.95 * mean_square + 0.05 * gradient**2
        value -= 0.1 * gradient / math.sqrt(mean_square - mean**2 + 0.01)
        assert float(weight.detach()) == pytest.approx(value, rel=1e-5)


def test_bf16_differs_little_from_fp32(make_dqn: Callable[..., DQN]) -> None:
    full, half = make_dqn(precision="fp32"), make_dqn(precision="bf16")
    observations = fake_batch(full).observations.numpy()
    a, b = full.q_values(observations), half.q_values(observations)
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sb3s_own_learn_drives_it_with_callbacks(
    make_dqn: Callable[..., DQN], make_pqn: Callable[..., PQN], algorithm: str
) -> None:
    class Count(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 80

    agent = {"dqn": make_dqn, "pqn": make_pqn}[algorithm](n_envs=4)
    callback = Count()
    agent.learn(400, callback=callback)
    assert 80 <= agent.num_timesteps < 120, "the callback's False stops training"
    assert callback.n_calls >= 20
