"""Q-learners on Stable-Baselines3: what DQN and PQN share, and DQN.

A learner is an iterator: `for agent_steps in agent.iterate(total)` acts and learns, and knows nothing of
logging, checkpoints or evaluation. Between two items, and where a stop broke an iteration off, its state is
consistent: `capture` takes all of it, `restore` goes on bit for bit. SB3's own `learn(total, callback)`
drives the same iterator and calls callbacks when SB3 does; `save` and `load` write and read SB3's zip files.
(Those hold pickles: `load` runs what is in the file, so load your own. The command `lab` reads none, and
writes them for `lab export` alone.)
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from stable_baselines3 import DQN as SB3DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples
from stable_baselines3.common.utils import get_device, is_vectorized_observation, set_random_seed
from stable_baselines3.common.vec_env import VecCheckNan, VecEnv, VecEnvWrapper, VecVideoRecorder
from torch import Tensor, nn
from torch.nn import functional as F

from lab.device import Compute, spare_core
from lab.errors import LabError
from lab.seeding import derive_seed
from rl.config import AgentConfig, DQNConfig
from rl.envs import AtariVecEnv, training_seed
from rl.optim import make_optimizer
from rl.policy import BackboneQPolicy, q_values
from rl.replay import FrameReplay

Tensors = dict[str, dict[str, Tensor]]


def policy_kwargs(config: AgentConfig) -> dict[str, Any]:
    """The arguments that rebuild an agent's policy, for training and for export."""
    return {
        "backbone": config.backbone,
        "backbone_spec": dict(config.backbone_spec),
        "dueling": config.dueling,
    }


def never() -> bool:
    """Nobody asks for a stop."""
    return False


_HARMLESS_WRAPPERS = (VecCheckNan, VecVideoRecorder)
"""Of an environment: they look on."""


class QLearner(BaseAlgorithm):
    """Acting, exploring, counting, capturing: all but the learning rule.

    Subclasses mix it in before an SB3 algorithm and implement `_iteration`.
    """

    policy: BackboneQPolicy
    env: AtariVecEnv
    config: AgentConfig
    compute: Compute
    exploration_rate: float

    def _begin_init(self, config: AgentConfig, compute: Compute | None, device: torch.device | str) -> None:
        """Called at the beginning of a subclass's `__init__`."""
        if compute is None:
            compute = Compute(get_device(device), "fp32", torch.get_num_threads(), "as torch is set")
        self.config, self.compute = config, compute
        self._precision = compute.precision
        self._callback: BaseCallback | None = None
        self._stopped = False
        self._in_rollout = False
        self._stop: Callable[[], bool] = never

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """The environment, if it can be learned from; SB3 asks when it is given to `__init__`, `set_env` and
        `load`.

        Raises:
            LabError: it is none of `rl.envs`, or in a wrapper that changes what is seen, earned or reported.
        """
        inner, wrappers = env, []
        while isinstance(inner, VecEnvWrapper):
            wrappers.append(inner)
            inner = inner.venv
        if not isinstance(inner, VecEnv) or not all(
            hasattr(inner, name) for name in ("waiting", "frame_skip")
        ):
            raise LabError(
                f"env: is a {type(inner).__name__}, and agents here learn from rl.envs.AtariVecEnv alone. "
                "Make one, as in AtariVecEnv('pong', 8)."
            )
        for wrapper in wrappers:
            if not isinstance(wrapper, _HARMLESS_WRAPPERS):
                raise LabError(
                    f"env: {type(wrapper).__name__} changes what is seen, earned or reported, and "
                    "AtariVecEnv stacks frames, clips rewards and reports episodes itself. Leave it out."
                )
        return BaseAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _prepare(self) -> None:
        """Called at the end of a subclass's `_setup_model`, when the policy exists: all that is not saved."""
        config, seed = self.config, self.seed or 0
        self.compute = replace(self.compute, device=self.device, precision=self._precision)
        if "rng" not in self.__dict__:
            self.rng = np.random.default_rng(derive_seed(seed, 1))
        self.policy.set_precision(self._precision)
        self.policy.optimizer = make_optimizer(
            config.optimizer, self.policy.q_net.parameters(), config.learning_rate, config.optimizer_eps
        )
        if self.ep_info_buffer is None:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
        self._loss_sum = torch.zeros((), device=self.device)
        self._q_sum = torch.zeros((), device=self.device)
        self._n_summed = 0

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds Python's, numpy's and torch's generators, and the environment with `training_seed`."""
        if seed is None:
            return
        set_random_seed(seed, using_cuda=self.device.type == "cuda")
        self.action_space.seed(seed)
        if self.env is not None:
            self.env.seed(training_seed(seed))

    # ---- SB3's zip files ----

    def _check_saved(self, config: type, policy: type) -> None:
        """Called at the beginning of a subclass's `_setup_model`, when `load` has taken over what a file has.

        Raises:
            LabError: the file is of another class of agents, or of SB3's own policies.
        """
        if type(self.config) is not config or not issubclass(self.policy_class, policy):
            raise LabError(
                f"{type(self).__name__}.load: the file holds a {self.policy_class.__name__} with "
                f"{type(self.config).__name__}, where {policy.__name__} with {config.__name__} is wanted. "
                "Open it with the class that saved it."
            )

    def _excluded_save_params(self) -> list[str]:
        """What `save` leaves out: what is made again, and what holds threads or the environment."""
        passing = ["compute", "_callback", "_loss_sum", "_q_sum", "_n_summed", "_in_rollout", "_stop"]
        return [*super()._excluded_save_params(), *passing]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    # ---- the loop ----

    @property
    def steps_per_iteration(self) -> int:
        """Agent steps of one iteration, all environments together."""
        return self.n_envs

    @property
    @abstractmethod
    def within_iteration(self) -> bool:
        """Whether a stop broke the last iteration off: the next one goes on there."""

    @abstractmethod
    def _iteration(self) -> None:
        """Acts, then learns, or both; breaks off between two steps or updates where `_stop` says so."""

    def iterate(self, total_timesteps: int, stop: Callable[[], bool] = never) -> Iterator[int]:
        """Trains until `total_timesteps` agent steps; yields their number after every iteration.

        Args:
            total_timesteps: agent steps in all.
            stop: asked within iterations, which may take minutes; where it says yes, the iteration is broken
                off, to be gone on with by another `iterate`, and this one ends.
        """
        self._stop = stop
        if self._last_obs is None:
            self._last_obs = self.env.reset()  # type: ignore[assignment]
            self._games_began()
        while (self.num_timesteps < total_timesteps or self.within_iteration) and not self._stopped:
            self._iteration()
            if self.within_iteration:
                return
            yield self.num_timesteps

    def _setup_learn(self, total_timesteps: int, callback: Any = None, *args: Any, **kwargs: Any) -> Any:
        before = self._last_obs
        result = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self._last_obs is not before:  # it reset the environment: SB3 issue 46
            self._games_began()
        return result

    def learn(  # type: ignore[override]
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """SB3's interface to `iterate`.

        Callbacks are called when SB3 calls them: a rollout is what is played between two phases of learning.
        `log_interval` counts games for DQN and rollouts for PQN, as SB3's DQN and PPO count.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        assert isinstance(callback, BaseCallback)
        self._callback, self._stopped, self._in_rollout = callback, False, False
        callback.on_training_start(locals(), globals())
        logged = self._log_clock()
        for _ in self.iterate(total_timesteps):
            if log_interval is not None and self._log_clock() // log_interval > logged // log_interval:
                logged = self._log_clock()
                self.dump_logs()
        if not self._stopped:
            self._end_rollout()
        callback.on_training_end()
        self._callback = None
        return self

    def _log_clock(self) -> int:
        """What `log_interval` counts."""
        return self._episode_num

    def dump_logs(self) -> None:
        """Writes `metrics` to SB3's logger."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        for key, value in self.metrics().items():
            self.logger.record(key, value)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds))
        self.logger.record("time/total_timesteps", self.num_timesteps)
        self.logger.dump(step=self.num_timesteps)

    def _begin_rollout(self) -> None:
        if self._callback is not None and not self._in_rollout:
            self._callback.on_rollout_start()
        self._in_rollout = True

    def _end_rollout(self) -> None:
        if self._callback is not None and self._in_rollout:
            self._callback.on_rollout_end()
        self._in_rollout = False

    def _games_began(self) -> None:
        """Fresh games stand in `_last_obs`: what belongs to the ones before must not run on into them."""

    def _after_env_step(self, dones: np.ndarray, infos: list[dict[str, Any]], **seen: Any) -> None:
        """Counts a step of all environments and tells the callback, with `seen` among its `locals`."""
        self.num_timesteps += self.n_envs
        ended = [info["episode"] for info in infos if "episode" in info]
        self._episodes().extend(ended)
        self._episode_num += len(ended)
        if self._callback is not None:
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            seen |= {
                "self": self,
                "env": self.env,
                "callback": self._callback,
                "dones": dones,
                "infos": infos,
            }
            self._callback.update_locals(seen)
            if not self._callback.on_step():
                self._stopped = True

    def _episodes(self) -> deque[dict[str, Any]]:
        """The last 100 whole games, as `AtariVecEnv` reports them."""
        assert self.ep_info_buffer is not None
        return self.ep_info_buffer

    # ---- acting ----

    def epsilon(self) -> float:
        """Probability of a random action now; linear in agent steps, whatever the run's length."""
        c = self.config
        done = min(self.num_timesteps / c.exploration_steps, 1.0) if c.exploration_steps else 1.0
        return c.exploration_initial + done * (c.exploration_final - c.exploration_initial)

    def epsilons(self) -> np.ndarray:
        """Probability of a random action now in each environment, at least its rung of the ladder.

        Rung i of N is base^(1 + 7 i / (N - 1)): some environments try much, others play what was learned
        (Ape-X, arXiv 1803.00933, section 4.1).
        """
        base, n_envs = self.config.exploration_ladder, self.n_envs
        if base is None or n_envs == 1:  # one rung is no ladder
            return np.full(n_envs, self.exploration_rate)
        return np.maximum(self.exploration_rate, base ** (1 + 7 * np.arange(n_envs) / (n_envs - 1)))

    def q_values(self, observations: np.ndarray) -> Tensor:
        """Q-values on the device: uint8 (batch, 4, height, width) -> float32 (batch, n_actions)."""
        return q_values(self.policy.q_net, observations)

    def explore(self, greedy: np.ndarray | None, n: int, epsilon: float | np.ndarray) -> np.ndarray:
        """Replaces each of `n` actions by a random one with probability epsilon, each by its own draw."""
        n_actions = int(self.action_space.n)  # type: ignore[attr-defined]
        random = self.rng.integers(n_actions, size=n)
        chance = self.rng.random(n) < epsilon
        return random if greedy is None else np.where(chance, random, greedy)

    def predict(  # type: ignore[override]
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for observations (n, 4, height, width) or one (4, height, width); epsilon-greedy unless
        deterministic."""
        batch, batched = self._as_batch(observation)
        actions = self.q_values(batch).argmax(1).cpu().numpy()
        if not deterministic:
            actions = self.explore(actions, len(batch), self.exploration_rate)
        return (actions if batched else actions.squeeze(0)), state

    def _as_batch(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[np.ndarray, bool]:
        """Observations (n, 4, height, width) of one or several, and whether it was several.

        Raises:
            ValueError: of another shape than the agent's, as of SB3's own.
        """
        assert not isinstance(observation, dict)
        frames = maybe_transpose(np.asarray(observation), self.observation_space)
        batched = is_vectorized_observation(frames, self.observation_space)
        return np.ascontiguousarray(frames if batched else frames[None]), batched

    # ---- learning ----

    def learning_rate_now(self) -> float:
        """The learning rate at this agent step."""
        c = self.config
        if not c.learning_rate_decay_steps:
            return c.learning_rate
        return c.learning_rate * (1 - 0.9 * min(self.num_timesteps / c.learning_rate_decay_steps, 1.0))

    def descend(self, loss: Tensor) -> None:
        """One step of the optimiser down `loss`; reads nothing back from the device."""
        optimizer = self.policy.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.policy.q_net.parameters(), self.config.max_grad_norm, foreach=False)
        optimizer.step()

    def _set_learning_rate(self) -> None:
        for group in self.policy.optimizer.param_groups:
            group["lr"] = self.learning_rate_now()

    def _count(self, loss: Tensor, q: Tensor) -> None:
        self._loss_sum += loss.detach()
        self._q_sum += q.detach().mean()
        self._n_summed += 1
        self._n_updates += 1

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call, in the lab's names. The only place that waits for the device."""
        values = {
            "frames": self.num_timesteps * self.env.frame_skip,
            "rollout/exploration_rate": self.exploration_rate,
            "rollout/episodes": self._episode_num,
            "train/n_updates": self._n_updates,
            "train/learning_rate": self.learning_rate_now(),
        }
        episodes = self._episodes()
        if episodes:
            values |= {
                "rollout/ep_rew_mean": float(np.mean([e["r"] for e in episodes])),
                "rollout/ep_clipped_rew_mean": float(np.mean([e["clipped_r"] for e in episodes])),
                "rollout/ep_len_mean": float(np.mean([e["l"] for e in episodes])),
            }
        if self._n_summed:
            values["train/loss"] = float(self._loss_sum) / self._n_summed
            values["train/q_mean"] = float(self._q_sum) / self._n_summed
            self._loss_sum.zero_()
            self._q_sum.zero_()
            self._n_summed = 0
        return values

    # ---- checkpoints ----

    def begin_games(self) -> None:
        """Starts fresh games; the running ones are cut off and count for no statistic."""
        self._last_obs = self.env.restart()  # type: ignore[assignment]
        self._games_began()

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        """Everything needed to go on exactly: tensors by file and name, and JSON values."""
        games, actions = self.env.capture()
        optimizer = self.policy.optimizer.state_dict()
        tensors: Tensors = {
            "model": dict(self.policy.q_net.state_dict()),
            "optimizer": {
                f"{index}.{name}": value
                for index, group in optimizer["state"].items()
                for name, value in group.items()
            },
            "progress": {
                "loss_sum": self._loss_sum,
                "q_sum": self._q_sum,
                "env_actions": torch.from_numpy(actions),
            },
        }
        state = {
            "num_timesteps": self.num_timesteps,
            "n_updates": self._n_updates,
            "n_summed": self._n_summed,
            "episode_num": self._episode_num,
            "episodes": list(self._episodes()),
            "exploration_rate": self.exploration_rate,
            "rng": self.rng.bit_generator.state,
            "games": games,
            "optimizer": optimizer["param_groups"],
        }
        return tensors, state

    def restore(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Puts back what `capture` took."""
        self.policy.q_net.load_state_dict(tensors["model"])
        parameters = [p for group in self.policy.optimizer.param_groups for p in group["params"]]
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            # The fused kernels walk memory, not indices: a moment must lie as its parameter does.
            same_layout = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            optimizer_state.setdefault(int(index), {})[name] = same_layout
        self.policy.optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["optimizer"]})
        self._loss_sum.copy_(tensors["progress"]["loss_sum"])
        self._q_sum.copy_(tensors["progress"]["q_sum"])
        self.num_timesteps = state["num_timesteps"]
        self._n_updates, self._n_summed = state["n_updates"], state["n_summed"]
        self._episode_num = state["episode_num"]
        self._episodes().clear()
        self._episodes().extend(state["episodes"])
        self.exploration_rate = state["exploration_rate"]
        self.rng.bit_generator.state = state["rng"]
        actions = tensors["progress"]["env_actions"].numpy()
        self._last_obs = self.env.replay(state["games"], actions)  # type: ignore[assignment]


class _BrokenOff(NamedTuple):
    """Where a stop fell between two updates of DQN."""

    updates: int
    """Those of this iteration that were made."""
    actions: np.ndarray
    """What the emulators were told; they begin that step again."""


class DQN(QLearner, SB3DQN):  # pyright: ignore[reportIncompatibleMethodOverride]  (both return self)
    """SB3's DQN with single-frame replay, n-step returns, double and dueling, and a lean update.

    What differs from SB3's: every environment draws its own epsilon; `train_freq` and the target's
    interval count agent steps, so results do not depend on `n_envs`; the emulators step while the
    network learns; no update waits for the device.
    """

    config: DQNConfig
    config_class: ClassVar[type[DQNConfig]] = DQNConfig
    q_policy_class: ClassVar[type[BackboneQPolicy]] = BackboneQPolicy
    replay_class: ClassVar[type[FrameReplay]] = FrameReplay

    def __init__(
        self,
        config: DQNConfig | None = None,
        env: AtariVecEnv | None = None,
        compute: Compute | None = None,
        seed: int | None = 0,
        *,
        policy: Any = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        """`policy`, `device` and `_init_setup_model` are what SB3's `load` hands over."""
        config = config or self.config_class()
        self._begin_init(config, compute, device)
        SB3DQN.__init__(
            self,
            self.q_policy_class,
            env,  # type: ignore[arg-type]
            learning_rate=config.learning_rate,
            buffer_size=config.buffer_size,
            learning_starts=config.learning_starts,
            batch_size=config.batch_size,
            gamma=config.gamma,
            replay_buffer_class=self.replay_class,
            replay_buffer_kwargs={
                "n_steps": config.n_step,
                "gamma": config.gamma,
                "storage_device": config.replay_device,
                "seed": derive_seed(seed or 0, 2),
            },
            target_update_interval=config.target_update_steps,
            policy_kwargs=policy_kwargs(config),
            seed=seed,
            device=self.compute.device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        self._check_saved(self.config_class, self.q_policy_class)
        self.target_update_interval = max(self.target_update_interval, self.n_envs)  # else SB3 warns
        super()._setup_model()
        self._prepare()
        # The target network depends on no update of this step: a CPU with cores to spare asks it beside
        # the online network, a sixth of the time of an update.
        self._beside = spare_core(self.compute)
        self._broken_off: _BrokenOff | None = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_beside", "_broken_off"]

    @property
    def within_iteration(self) -> bool:
        return self._broken_off is not None

    @property
    def replay(self) -> FrameReplay:
        """The replay memory."""
        assert isinstance(self.replay_buffer, FrameReplay)
        return self.replay_buffer

    def _iteration(self) -> None:
        observations, before = self._last_obs, self._broken_off
        assert isinstance(observations, np.ndarray)
        n_envs = self.env.num_envs
        warming_up = self.num_timesteps < self.config.learning_starts
        if before is None:
            self.exploration_rate = 1.0 if warming_up else self.epsilon()
            greedy = None if warming_up else self.q_values(observations).argmax(1).cpu().numpy()
            actions = self.explore(greedy, n_envs, self.epsilons())
        else:
            actions = before.actions

        if not self.env.waiting:
            self.env.step_async(actions)
        if not warming_up and not self.replay.empty:  # learn while the emulators work
            updates = crossings(self.num_timesteps, n_envs, self.config.train_freq)
            made = self._train(updates, self.config.batch_size, before.updates if before else 0)
            self._broken_off = None if made == updates else _BrokenOff(made, actions)
            if self._broken_off:
                return
            if crossings(self.num_timesteps, n_envs, self.config.target_update_steps):
                self.policy.q_net_target.load_state_dict(self.policy.q_net.state_dict())
        self._begin_rollout()  # behind the updates, which belong to the one before
        new_observations, rewards, dones, infos = self.env.step_wait()

        self._after_env_step(
            dones,
            infos,
            actions=actions,
            buffer_actions=actions,
            new_obs=new_observations,
            rewards=rewards,
            replay_buffer=self.replay,
        )
        # What a callback that stops has seen is stored as well: a later `learn` goes on from here.
        self._store_transition(self.replay, actions, new_observations, rewards, dones, infos)  # type: ignore[arg-type]
        if not self._stopped and crossings(self.num_timesteps, n_envs, self.config.train_freq):
            self._end_rollout()

    def train(self, gradient_steps: int, batch_size: int = 32) -> None:
        """Makes `gradient_steps` updates of `batch_size` transitions each."""
        self._train(gradient_steps, batch_size)

    def _train(self, updates: int, batch_size: int, made: int = 0) -> int:
        """Makes `updates` updates, of which `made` are made already; how many are then: fewer where a stop
        was requested. The next call draws the same transitions."""
        if updates <= made:
            return updates
        self._set_learning_rate()
        drawn = self.replay.rng.bit_generator.state
        sample = self.replay.sample(updates * batch_size)
        parts = zip(*(part.split(batch_size) for part in sample if part is not None), strict=True)
        batches = [ReplayBufferSamples(*part) for part in parts][made:]
        answers = [self._ask_target(batch) for batch in batches]
        for batch, next_q in zip(batches, answers, strict=True):
            self.update(batch, next_q)
            made += 1
            if made < updates and self._stop():
                self.replay.rng.bit_generator.state = drawn
                if self._beside is not None:  # what it was asked is of no use any more
                    self._beside.shutdown(cancel_futures=True)
                    self._beside = spare_core(self.compute)
                break
        return made

    def _ask_target(self, batch: ReplayBufferSamples) -> Callable[[], Tensor]:
        """Begins `target_q` beside this thread, if it may; what is returned waits for it."""
        if self._beside is None:
            return partial(self.target_q, batch)
        return self._beside.submit(self.target_q, batch).result

    def target_q(self, batch: ReplayBufferSamples) -> Tensor:
        """The target network's Q-values of the next observations, float32 (batch, n_actions)."""
        with torch.no_grad():
            return self.policy.q_net_target(batch.next_observations)

    def update(self, batch: ReplayBufferSamples, next_q: Callable[[], Tensor]) -> None:
        """One update on one batch (Mnih et al. 2015, algorithm 1; the Huber loss is its error clipping).

        Args:
            batch: as `FrameReplay.sample` returns it.
            next_q: called once, returns what `target_q` does for this batch.
        """
        with self.compute.autocast():  # one context for both passes: the weights are converted once
            q = self.policy.q_net(batch.observations).gather(1, batch.actions)
            next_values = next_q()
            if self.config.double:
                with torch.no_grad():
                    choice = self.policy.q_net(batch.next_observations).argmax(1, keepdim=True)
                next_value = next_values.gather(1, choice)
            else:
                next_value = next_values.amax(1, keepdim=True)
        target = batch.rewards + (1 - batch.dones) * batch.discounts * next_value  # type: ignore[operator]
        loss = F.smooth_l1_loss(q, target)
        self.descend(loss)
        self._count(loss, q)

    def _games_began(self) -> None:
        self.replay.cut()

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        tensors, state = super().capture()
        tensors["target"] = dict(self.policy.q_net_target.state_dict())
        state["replay"] = self.replay.state()
        if self._broken_off is not None:
            state["updates"], state["actions"] = self._broken_off.updates, self._broken_off.actions.tolist()
        return tensors, state

    def restore(self, tensors: Tensors, state: dict[str, Any]) -> None:
        super().restore(tensors, state)
        self.policy.q_net_target.load_state_dict(tensors["target"])
        self.replay.set_state(state["replay"])
        self._broken_off = None
        if "updates" in state:
            made, actions = state["updates"], np.array(state["actions"], np.int64)
            if not (type(made) is int and made > 0 and actions.shape == (self.n_envs,)):
                raise ValueError(f"{made} updates made, actions of shape {actions.shape}")
            if not all(self.action_space.contains(action) for action in actions):
                raise ValueError("actions that the game does not have")
            self._broken_off = _BrokenOff(made, actions)


def crossings(step: int, stride: int, interval: int) -> int:
    """How many multiples of `interval` lie in (step - stride, step]."""
    return step // interval - (step - stride) // interval
