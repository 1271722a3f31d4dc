"""PQN: Q-learning on parallel environments, without replay memory and target network (arXiv 2407.04811)."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor
from torch.nn import functional as F

from lab.device import Compute
from lab.seeding import derive_seed
from rl.agent import QLearner, Tensors, policy_kwargs
from rl.config import PQNConfig
from rl.envs import AtariVecEnv
from rl.policy import BackboneQPolicy

_ROLLOUT = (
    *("_observations", "_actions", "_rewards", "_terminal", "_cut"),
    *("_cut_values", "_next_values"),
)
"""What is kept of each step of a rollout, (rollout_steps, n_envs, ...)."""
_LEARNING = ("_targets", "_order")
"""What is kept while it is learned from a rollout."""


class PQN(QLearner):
    """Plays `rollout_steps` steps in every environment, then learns from them in `epochs` passes.

    Layer normalisation in the backbone takes the part of the target network (section 3 of the paper).
    """

    config: PQNConfig

    def __init__(
        self,
        config: PQNConfig | None = None,
        env: AtariVecEnv | None = None,
        compute: Compute | None = None,
        seed: int | None = 0,
        *,
        policy: Any = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        """`policy`, `device` and `_init_setup_model` are what SB3's `load` hands over."""
        config = config or PQNConfig()
        self._begin_init(config, compute, device)
        BaseAlgorithm.__init__(
            self,
            BackboneQPolicy,
            env,
            learning_rate=config.learning_rate,
            policy_kwargs=policy_kwargs(config),
            seed=seed,
            device=self.compute.device,
            supported_action_spaces=(spaces.Discrete,),
            support_multi_env=True,
        )
        self.exploration_rate = config.exploration_initial
        self._rollouts = 0
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_saved(PQNConfig, BackboneQPolicy)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = BackboneQPolicy(
            self.observation_space,
            self.action_space,  # type: ignore[arg-type]
            self.lr_schedule,
            **self.policy_kwargs,
        ).to(self.device)
        self._prepare()
        steps, n_envs = self.config.rollout_steps, self.n_envs
        assert self.observation_space.shape is not None
        shape = (steps, n_envs, *self.observation_space.shape)
        self._observations = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._actions = np.zeros((steps, n_envs), np.int64)
        self._rewards = np.zeros((steps, n_envs), np.float32)
        self._terminal = np.zeros((steps, n_envs), np.float32)
        # A cut-off game: its return is the value of its last observation, whatever came after the reset.
        self._cut = np.zeros((steps, n_envs), np.float32)
        self._cut_values = torch.zeros((steps, n_envs), device=self.device)
        self._next_values = torch.zeros((steps, n_envs), device=self.device)
        self._shuffle = torch.Generator().manual_seed(derive_seed(self.seed or 0, 3))
        self._discard_rollout()

    def _discard_rollout(self) -> None:
        """The next step is the first of a rollout."""
        self._played = self._learned = 0
        """Steps of this rollout that are played, and updates that are made from it."""
        self._targets: Tensor | None = None
        self._order: Tensor | None = None

    def _excluded_save_params(self) -> list[str]:
        here = ["_shuffle", "_played", "_learned", *_ROLLOUT, *_LEARNING]
        return [*super()._excluded_save_params(), *here]

    @property
    def steps_per_iteration(self) -> int:
        return self.n_envs * self.config.rollout_steps

    def _log_clock(self) -> int:
        return self._rollouts

    @property
    def within_iteration(self) -> bool:
        return self._played > 0

    def _iteration(self) -> None:
        if self._targets is None:
            self._begin_rollout()
            if not self._rollout():
                return
            self._targets = self._returns()
            self._end_rollout()
            self._rollouts += 1
        if self.train(self._targets):
            self._discard_rollout()

    def _rollout(self) -> bool:
        """Plays on; False if a callback ended it, or a stop was requested before its end.

        A life lost or a game over ends a return; a game cut off by the time limit does not, its last
        observation's value stands for the rest (Pardo et al. 2018, arXiv 1712.00378).
        """
        steps, n_envs = self._rewards.shape
        observations = self._last_obs
        assert isinstance(observations, np.ndarray)
        while (t := self._played) < steps:
            if t > 0 and self._stop():
                return False
            self.exploration_rate = self.epsilon()
            q = self.q_values(observations)
            if t > 0:
                self._next_values[t - 1] = q.amax(1)
            actions = self.explore(q.argmax(1).cpu().numpy(), n_envs, self.epsilons())
            # Before the emulators start: a copy beside them would fight them for the cores.
            self._observations[t].copy_(torch.from_numpy(observations))
            self.env.step_async(actions)
            observations, self._rewards[t], dones, infos = self.env.step_wait()
            self._actions[t] = actions
            self._terminal[t] = self._cut[t] = 0
            for i in np.flatnonzero(dones):
                if infos[i]["TimeLimit.truncated"]:
                    self._cut[t, i] = 1
                    self._cut_values[t, i] = self.q_values(infos[i]["terminal_observation"][None]).amax()
                else:
                    self._terminal[t, i] = 1
            self._last_obs = observations  # type: ignore[assignment]
            self._played += 1
            self._after_env_step(
                dones,
                infos,
                actions=actions,
                clipped_actions=actions,
                new_obs=observations,
                rewards=self._rewards[t],
                values=q,
                n_steps=t + 1,
                n_rollout_steps=steps,
            )
            if self._stopped:
                self._discard_rollout()  # as SB3's PPO does
                return False
        return True

    def _returns(self) -> Tensor:
        """The lambda returns of a whole rollout, float32 (rollout_steps, n_envs)."""
        assert isinstance(self._last_obs, np.ndarray)
        self._next_values[-1] = self.q_values(self._last_obs).amax(1)
        rewards, ends, cuts = (
            torch.from_numpy(x).to(self.device) for x in (self._rewards, self._terminal, self._cut)
        )
        next_values = torch.where(cuts > 0, self._cut_values, self._next_values)
        return lambda_returns(rewards, ends, cuts, next_values, self.config.gamma, self.config.td_lambda)

    def train(self, targets: Tensor) -> bool:
        """Fits the Q-values of the rollout to `targets`, float32 (rollout_steps, n_envs); False if a stop was
        requested before all updates were made."""
        self._set_learning_rate()
        observations = self._observations.flatten(0, 1)
        actions = torch.from_numpy(self._actions).to(self.device).flatten().unsqueeze(1)
        targets = targets.flatten().unsqueeze(1)
        size = self.config.minibatch_size
        per_epoch = -(-len(targets) // size)
        for number in range(self._learned, self.config.epochs * per_epoch):
            if number > 0 and self._stop():
                return False
            at = number % per_epoch
            if at == 0 or self._order is None:
                self._order = torch.randperm(len(targets), generator=self._shuffle).to(self.device)
            rows = self._order[at * size : (at + 1) * size]
            self.update(observations[rows], actions[rows], targets[rows])
            self._learned += 1
        return True

    def update(self, observations: Tensor, actions: Tensor, targets: Tensor) -> None:
        """One update: half the squared error to the lambda returns (algorithm 1 of the paper)."""
        q = self.policy.q_net(observations).gather(1, actions)
        loss = 0.5 * F.mse_loss(q, targets)
        self.descend(loss)
        self._count(loss, q)

    # ---- checkpoints ----

    def _games_began(self) -> None:
        self._discard_rollout()

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        tensors, state = super().capture()
        progress = tensors["progress"]
        progress["shuffle"] = self._shuffle.get_state()
        state["learned"] = self._learned
        if self._played:  # a stop fell within an iteration
            progress |= {name: torch.as_tensor(getattr(self, name)[: self._played]) for name in _ROLLOUT}
        progress |= {name: tensor for name in _LEARNING if (tensor := getattr(self, name)) is not None}
        return tensors, state

    def restore(self, tensors: Tensors, state: dict[str, Any]) -> None:
        super().restore(tensors, state)
        kept = tensors["progress"]
        self._shuffle.set_state(kept["shuffle"])
        self._discard_rollout()
        learned = state.get("learned", 0)
        if type(learned) is not int or learned < 0:
            raise ValueError(f"{learned} updates made")
        self._learned = learned
        for name in _ROLLOUT if _ROLLOUT[0] in kept else ():
            self._played = len(kept[name])
            torch.as_tensor(getattr(self, name))[: self._played] = kept[name]
        for name in _LEARNING:
            setattr(self, name, kept[name].to(self.device) if name in kept else None)


def lambda_returns(
    rewards: Tensor, terminal: Tensor, cut: Tensor, next_values: Tensor, gamma: float, td_lambda: float
) -> Tensor:
    """R_t = r_t + gamma (1 - terminal_t) [lambda R_{t+1} + (1 - lambda) max_a Q(s_{t+1}, a)].

    The targets of PQN (arXiv 2407.04811), after Peng's Q(lambda) (Daley & Amato 2019).

    Args:
        rewards, terminal, cut: float32 (steps, n_envs). Where `cut` is 1 the game was cut off: the return
            there is r_t + gamma next_values_t.
        next_values: float32 (steps, n_envs), max_a Q of the observation that followed step t.

    Returns:
        float32 (steps, n_envs).
    """
    returns = torch.empty_like(rewards)
    following = next_values[-1]
    for t in range(len(rewards) - 1, -1, -1):
        mixed = torch.lerp(next_values[t], following, td_lambda * (1 - cut[t]))
        following = rewards[t] + gamma * (1 - terminal[t]) * mixed
        returns[t] = following
    return returns
