"""Evaluation apart from training: own games and seeds, whole games, raw unclipped scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.dqn.policies import QNetwork
from torch import Tensor

from lab import checkpoint, config
from lab.device import Compute, resolve
from lab.run import Run
from rl import games
from rl.config import DRQNConfig, EnvConfig, EvalConfig, RunConfig, run_config_class
from rl.drqn import RecurrentQNetwork, RecurrentQPolicy
from rl.envs import AtariVecEnv
from rl.policy import BackboneQPolicy, q_values
from supervised.backbones.recurrent import State


class Player:
    """A trained Q-network that plays its game epsilon-greedily."""

    def __init__(self, q_net: QNetwork, env: EnvConfig) -> None:
        self.q_net, self.env = q_net, env
        self._memory: list[State | None] = []

    def begin(self, n_games: int) -> None:
        """New games: whoever has a memory has an empty one."""
        self._memory = [None] * n_games

    def forget(self, games: np.ndarray) -> None:
        """These games begin anew."""
        for game in games:
            self._memory[game] = None

    def q_values(self, observations: np.ndarray, games: np.ndarray) -> Tensor:
        """Q-values (n, n_actions) for observations uint8 (n, 4, height, width), the next of these games."""
        if not isinstance(self.q_net, RecurrentQNetwork):
            return q_values(self.q_net, observations)
        begins = np.array([self._memory[game] is None for game in games])
        before = [memory for game in games if (memory := self._memory[game]) is not None]
        state = None
        if before:
            empty = tuple(torch.zeros_like(tensor) for tensor in before[0])
            rows = [self._memory[game] or empty for game in games]
            state = tuple(torch.stack(tensors) for tensors in zip(*rows, strict=True))
        q, state = self.q_net.step(observations, state, begins)
        for row, game in enumerate(games):
            self._memory[game] = tuple(tensor[row] for tensor in state)
        return q

    def choose(self, q: Tensor, epsilon: float, rng: np.random.Generator) -> np.ndarray:
        """Actions (n,): the best by Q-values (n, n_actions), or each by its own draw a random one."""
        greedy = q.argmax(1).cpu().numpy()
        n_actions = int(self.q_net.action_space.n)
        random = rng.integers(n_actions, size=len(greedy))
        return np.where(rng.random(len(greedy)) < epsilon, random, greedy)


@dataclass(frozen=True)
class Evaluation:
    """Raw returns and lengths (agent steps) of whole games."""

    game: str
    returns: list[float]
    lengths: list[int]
    epsilon: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else 0.0

    @property
    def human_normalized(self) -> float | None:
        """1.0 is the human of the table `games.published` names, 0 random play; None without one."""
        return games.human_normalized(self.game, self.mean)

    def metrics(self) -> dict[str, float]:
        """A row of metrics, in the lab's names."""
        row = {
            "eval/mean_reward": self.mean,
            "eval/std_reward": self.std,
            "eval/mean_ep_length": float(np.mean(self.lengths)),
            "eval/episodes": len(self.returns),
        }
        normalized = self.human_normalized
        return row if normalized is None else row | {"eval/human_normalized": normalized}


def make_env(env: EnvConfig, n_envs: int, seed: int, *, training: bool, color: bool = False) -> AtariVecEnv:
    """The vector environment of a config; out of training it plays whole games for raw scores."""
    return AtariVecEnv(
        env.game,
        n_envs,
        seed,
        image_size=env.image_size,
        frame_skip=env.frame_skip,
        sticky_actions=env.sticky_actions,
        noop_max=env.noop_max,
        life_loss=env.life_loss and training,
        clip_rewards=env.clip_rewards and training,
        max_episode_frames=env.max_episode_frames,
        full_action_space=env.full_action_space,
        num_threads=env.num_threads,
        color=color,
    )


def evaluate(
    player: Player,
    episodes: int,
    epsilon: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Plays `episodes` games side by side, each seeded with its own number, and keeps each one's score.

    One game per environment: taking the first N games that end would favour short ones.
    """
    env = make_env(player.env, episodes, seed, training=False)
    rng = np.random.default_rng(seed)
    observations = env.reset()
    player.begin(episodes)
    returns: list[float | None] = [None] * episodes
    lengths = [0] * episodes
    playing = np.ones(episodes, bool)
    actions = np.zeros(episodes, np.int64)
    while playing.any():
        q = player.q_values(observations[playing], np.flatnonzero(playing))
        actions[playing] = player.choose(q, epsilon, rng)
        observations, _, dones, infos = env.step(actions)
        for i in np.flatnonzero(dones & playing):
            returns[i], lengths[i] = infos[i]["episode"]["r"], infos[i]["episode"]["l"]
            playing[i] = False
            if progress is not None:
                progress(int(episodes - playing.sum()))
    env.close()
    return Evaluation(env.game, [r for r in returns if r is not None], lengths, epsilon)


def run_config(run: Run) -> RunConfig:
    """The typed config of a run on disk."""
    values = run.info["config"]
    source = str(run.folder / "run.json")
    return config.build(run_config_class(values, lambda _: source), values, {}, source)


def load_player(run: Run, which: str) -> tuple[Player, Path, Compute]:
    """The agent of checkpoint `which` ("best", "latest" or a folder's name) of a run.

    Raises:
        LabError: there is none, or it is damaged.
    """
    path = run.find_checkpoint(which)
    saved = checkpoint.load(path)
    settings = run_config(run)
    compute = resolve(settings.device, run.info["compute"])
    env = make_env(settings.env, 1, 0, training=False)
    agent = settings.agent
    policy_class = RecurrentQPolicy if isinstance(agent, DRQNConfig) else BackboneQPolicy
    policy = policy_class(
        env.observation_space,
        env.action_space,  # type: ignore[arg-type]
        lambda _: 0.0,
        backbone=agent.backbone,
        backbone_spec=dict(agent.backbone_spec),
        dueling=agent.dueling,
    ).to(compute.device)
    env.close()
    policy.q_net.load_state_dict(saved.tensors("model"))
    policy.set_precision(compute.precision)
    policy.set_training_mode(False)
    return Player(policy.q_net, settings.env), path, compute


def score_table(evaluation: Evaluation) -> list[tuple[str, float]]:
    """(who, mean return) rows, from low to high: this agent and whoever has a published score."""
    rows = [*games.landmarks(evaluation.game), ("this agent", evaluation.mean)]
    return sorted(rows, key=lambda row: row[1])


def evaluate_run(run: Run, which: str, override: EvalConfig | None = None, **kwargs: Any) -> dict[str, Any]:
    """Evaluates a run's checkpoint and returns what `lab evaluate --json` prints."""
    player, path, compute = load_player(run, which)
    settings = override or run_config(run).eval
    result = evaluate(player, settings.episodes, settings.epsilon, settings.seed, **kwargs)
    return {
        "run": str(run.folder),
        "checkpoint": path.resolve().name,
        "weights_sha256": checkpoint.weights_hash(path),
        "game": result.game,
        "episodes": len(result.returns),
        "epsilon": result.epsilon,
        "seed": settings.seed,
        "mean_reward": result.mean,
        "std_reward": result.std,
        "returns": result.returns,
        "lengths": result.lengths,
        "human_normalized": result.human_normalized,
        "human_table": table.table if (table := games.published(result.game)) else None,
        "scores": dict(score_table(result)),
        "compute": compute.describe(),
    }
