"""Evaluation apart from training: own games and seeds, whole games, raw unclipped scores."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.dqn.policies import QNetwork
from torch import Tensor

from lab import checkpoint, config
from lab.device import Compute, resolve, usable_cores
from lab.errors import LabError
from lab.run import Run
from rl import games
from rl.config import DRQNConfig, EnvConfig, RunConfig, is_unseen, run_config_class
from rl.drqn import RecurrentQNetwork, RecurrentQPolicy
from rl.envs import AtariVecEnv, emulators
from rl.policy import BackboneQPolicy, q_values
from supervised.backbones.recurrent import State

AT_ONCE = 64
"""Games of an evaluation played side by side; each has an emulator and a thread of its own."""


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
    """Raw returns and lengths (agent steps) of whole games, and which of them the time limit cut off."""

    game: str
    returns: list[float]
    lengths: list[int]
    truncated: list[bool]
    epsilon: float
    max_episode_frames: int
    """The time limit, in frames of the emulator."""

    @property
    def is_comparable(self) -> bool:
        """Whether published scores are of games as long: those that ours cut off were cut off there, too."""
        return not any(self.truncated) or self.max_episode_frames >= games.PUBLISHED_MAX_FRAMES

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else 0.0

    @property
    def human_normalized(self) -> float | None:
        """1.0 is the human of the table `games.published` names, 0 random play; None without comparison."""
        return games.human_normalized(self.game, self.mean) if self.is_comparable else None

    def metrics(self) -> dict[str, float]:
        """A row of metrics, in the lab's names."""
        row = {
            "eval/mean_reward": self.mean,
            "eval/std_reward": self.std,
            "eval/mean_ep_length": float(np.mean(self.lengths)),
            "eval/episodes": len(self.returns),
            "eval/truncated_episodes": sum(self.truncated),
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
        fire_reset=env.fire_reset,
        life_loss=env.life_loss and training,
        clip_rewards=env.clip_rewards and training,
        max_episode_frames=env.max_episode_frames,
        full_action_space=env.full_action_space,
        num_threads=env.num_threads,
        color=color,
    )


class _Game:
    """One game in an emulator of its own, which stands still once the game is over."""

    def __init__(self, env: EnvConfig, seed: int) -> None:
        self._atari = emulators(
            env.game,
            1,
            env.image_size,
            env.frame_skip,
            env.sticky_actions,
            env.noop_max,
            env.fire_reset,
            env.full_action_space,
            num_threads=1,
        )
        self._limit = -(-env.max_episode_frames // env.frame_skip)
        self.observation = self._atari.reset(seed=seed)[0][0]
        self.score, self.length, self.over, self.truncated = 0.0, 0, False, False

    def send(self, action: int) -> None:
        self._atari.send(np.array([action]))

    def recv(self) -> None:
        observations, rewards, terminated, _, _ = self._atari.recv()
        self.observation = observations[0]
        self.score += float(rewards[0])
        self.length += 1
        self.truncated = self.length >= self._limit and not terminated[0]
        self.over = bool(terminated[0]) or self.truncated


def evaluate(
    player: Player,
    episodes: int,
    epsilon: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Plays `episodes` games, each seeded with its own number, and keeps each one's score.

    Every game counts: taking the first N that end would favour short ones. What is over is not emulated any
    more, so that it takes as long as the games are, and at most `max_episode_frames` of each.
    """
    rng = np.random.default_rng(seed)
    done: list[_Game] = []
    while len(done) < episodes:
        now = min(AT_ONCE, episodes - len(done))
        first = seed + len(done)
        with ThreadPoolExecutor(usable_cores()) as pool:  # most of the time is loading the ROM
            wave = list(pool.map(lambda i: _Game(player.env, i), range(first, first + now)))
        player.begin(now)
        playing = np.arange(now)
        while len(playing):
            q = player.q_values(np.stack([wave[i].observation for i in playing]), playing)
            for i, action in zip(playing, player.choose(q, epsilon, rng), strict=True):
                wave[i].send(action)
            for i in playing:
                wave[i].recv()
            left = playing[[not wave[i].over for i in playing]]
            if progress is not None and len(left) < len(playing):
                progress(len(done) + now - len(left))
            playing = left
        done += wave
    return Evaluation(
        player.env.game,
        [game.score for game in done],
        [game.length for game in done],
        [game.truncated for game in done],
        epsilon,
        player.env.max_episode_frames,
    )


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
    compute = resolve(settings.device, run.info["compute"], elsewhere=True)
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
    load_weights(policy.q_net, saved.weights(), path)
    policy.set_precision(compute.precision)
    policy.set_training_mode(False)
    return Player(policy.q_net, settings.env), path, compute


def load_weights(net: QNetwork, weights: dict[str, Tensor], path: Path) -> None:
    """Loads a checkpoint's weights.

    Raises:
        LabError: they are not those of the network that the config describes.
    """
    there, wanted = ({name: tuple(t.shape) for name, t in x.items()} for x in (weights, net.state_dict()))
    for name in {**wanted, **there}:
        if there.get(name) != wanted.get(name):
            raise LabError(
                f"{path / 'model.safetensors'}: does not fit the config in run.json: {name} is "
                f"{there.get(name, 'missing')}, of this network it is {wanted.get(name, 'no part')}. Restore "
                "both from one copy."
            )
    net.load_state_dict(weights)


def score_table(evaluation: Evaluation) -> list[tuple[str, float]]:
    """(who, mean return) rows, from low to high: this agent and whoever has a comparable published score."""
    known = games.landmarks(evaluation.game) if evaluation.is_comparable else []
    rows = [*known, ("this agent", evaluation.mean)]
    return sorted(rows, key=lambda row: row[1])


def evaluate_run(
    run: Run, which: str, episodes: int, epsilon: float, seed: int, **kwargs: Any
) -> dict[str, Any]:
    """Evaluates a run's checkpoint and returns what `lab evaluate --json` prints."""
    player, path, compute = load_player(run, which)
    result = evaluate(player, episodes, epsilon, seed, **kwargs)
    table = games.published(result.game)
    return {
        "run": str(run.folder),
        "checkpoint": path.resolve().name,
        "weights_sha256": checkpoint.weights_hash(path),
        "game": result.game,
        "episodes": len(result.returns),
        "epsilon": result.epsilon,
        "seed": seed,
        "unseen": is_unseen(run_config(run).eval, seed, episodes),
        "mean_reward": result.mean,
        "std_reward": result.std,
        "returns": result.returns,
        "lengths": result.lengths,
        "truncated": sum(result.truncated),
        "max_episode_frames": result.max_episode_frames,
        "human_normalized": result.human_normalized,
        "human_table": table.table if table and result.is_comparable else None,
        "scores": dict(score_table(result)),
        "compute": compute.describe(),
    }
