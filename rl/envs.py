"""ale-py's vector environment as an SB3 `VecEnv`, with the meaning of every number made plain.

One agent step is one decision and `frame_skip` emulator frames. The adapter keeps these apart:
  * reward: what the learner sees, clipped to its sign if `clip_rewards`;
  * infos[i]["episode"]: when a whole game ended, its raw return `r`, clipped return `clipped_r` and
    length `l` in agent steps;
  * done: the game ended, or (with `life_loss`) a life was lost; in the second case the game goes on and
    infos[i]["game_over"] is False;
  * infos[i]["TimeLimit.truncated"]: the game was cut off at `max_episode_frames`: the value of the last
    observation still counts.

Why not the options ale-py has for these: `reward_clipping` leaves no raw score anywhere, `episodic_life`
resets the game at every lost life, and `life_loss_info` leaves stale memory in `final_obs`. So all three
stay off, and clipping and lost lives are worked out here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from rl import games

STACK = 4

# observations, rewards, dones, infos
Step = tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]


class AtariVecEnv(VecEnv):
    """`n_envs` copies of one Atari game, stepped together in C++.

    Args:
        game: any of `rl.games.names()`.
        n_envs: number of copies.
        seed: copy i is seeded with seed + i.
        image_size: height and width of the grey image, pixels.
        frame_skip: emulator frames per agent step; the last two are max-pooled.
        sticky_actions: probability that the emulator repeats the last action instead (0.25 in
            Machado et al. 2018, 0 in Mnih et al. 2015).
        noop_max: up to so many no-ops begin each game.
        life_loss: end an episode for the learner at each lost life, without resetting the game.
        clip_rewards: hand the learner the sign of each reward.
        max_episode_frames: emulator frames until a game is cut off (108,000 is 30 minutes).
        full_action_space: all 18 actions instead of those the game uses.
        num_threads: emulator threads; 0 takes one per core. Results do not depend on it.
        color: RGB images of the whole 210x160 screen, for films.

    Observations: uint8, (n_envs, 4, height, width), newest frame last; (n_envs, 1, 210, 160, 3) in color.
    """

    def __init__(
        self,
        game: str,
        n_envs: int = 1,
        seed: int = 0,
        image_size: int | Sequence[int] = 84,
        frame_skip: int = 4,
        sticky_actions: float = 0.0,
        noop_max: int = 30,
        life_loss: bool = False,
        clip_rewards: bool = True,
        max_episode_frames: int = 108_000,
        full_action_space: bool = False,
        num_threads: int = 0,
        color: bool = False,
    ) -> None:
        from ale_py.vector_env import AtariVectorEnv
        from gymnasium.vector import AutoresetMode

        self.game = games.check(game)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._atari = AtariVectorEnv(
            self.game,
            num_envs=n_envs,
            num_threads=min(num_threads, n_envs),
            img_height=210 if color else height,
            img_width=160 if color else width,
            grayscale=not color,
            stack_num=1 if color else STACK,
            frameskip=frame_skip,
            repeat_action_probability=sticky_actions,
            noop_max=noop_max,
            max_num_frames_per_episode=max_episode_frames,
            full_action_space=full_action_space,
            autoreset_mode=AutoresetMode.SAME_STEP,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=False,
        )
        self.render_mode = None
        observation_space = self._atari.single_observation_space
        action_space = self._atari.single_action_space
        assert isinstance(observation_space, spaces.Box)
        assert isinstance(action_space, spaces.Discrete)
        super().__init__(n_envs, observation_space, action_space)
        self.life_loss, self.clip_rewards, self.frame_skip = life_loss, clip_rewards, frame_skip
        self._base_seed = seed
        self._actions: list[np.ndarray] = []
        self._observation = np.empty(0, np.uint8)

    @property
    def action_meanings(self) -> list[str]:
        """The names of the actions, e.g. NOOP, FIRE, RIGHT."""
        return [action.name for action in self._atari.ale.get_action_set()]

    def reset(self) -> np.ndarray:
        """Starts fresh games: with the seed last given to `seed`, else where the generators stand."""
        seeds = [seed for seed in self._seeds if seed is not None]
        if seeds:
            self._base_seed = seeds[0]
        self._reset_seeds()
        return self.restart(self._base_seed)

    def restart(self, seed: int) -> np.ndarray:
        """Starts fresh games exactly as a new environment with this seed would."""
        self._base_seed = seed
        self._actions = []
        self._observation, info = self._atari.reset(seed=seed)
        self._lives = info["lives"].copy()
        self._returns = np.zeros(self.num_envs)
        self._clipped_returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        return self._observation

    def step_async(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, dtype=np.int64).reshape(self.num_envs)
        self._actions.append(actions.astype(np.uint8))
        self._atari.send(actions)

    def step(self, actions: np.ndarray) -> Step:
        self.step_async(actions)
        return self.step_wait()

    def step_wait(self) -> Step:
        observation, raw, terminated, truncated, info = self._atari.recv()
        raw = raw.astype(np.float32)
        rewards = np.sign(raw) if self.clip_rewards else raw
        game_over = terminated | truncated
        lives = info["lives"]
        # `lives` is the value after a reset, so a game that just ended must not count as a life lost.
        life_lost = (lives < self._lives) & ~game_over
        self._lives = lives.copy()
        self._returns += raw
        self._clipped_returns += np.sign(raw)
        self._lengths += 1

        dones = game_over | life_lost if self.life_loss else game_over
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(dones):
            infos[i] = {
                "game_over": bool(game_over[i]),
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                # final_obs is written only for games that were reset; the others' rows are stale.
                "terminal_observation": info["final_obs"][i].copy()
                if game_over[i]
                else observation[i].copy(),
            }
            if game_over[i]:
                infos[i]["episode"] = {
                    "r": float(self._returns[i]),
                    "clipped_r": float(self._clipped_returns[i]),
                    "l": int(self._lengths[i]),
                }
                self._returns[i] = self._clipped_returns[i] = self._lengths[i] = 0
        self._observation = observation
        return observation, rewards, dones, infos

    def capture(self) -> tuple[int, np.ndarray]:
        """The seed of the last restart and all actions since, uint8 (steps, n_envs).

        The emulator cannot be saved, but it is deterministic in seed and actions: `replay` brings a new
        environment to exactly this point.
        """
        actions = np.stack(self._actions) if self._actions else np.empty((0, self.num_envs), np.uint8)
        return self._base_seed, actions

    def replay(self, seed: int, actions: np.ndarray) -> np.ndarray:
        """Restores what `capture` took; returns the observation at that point."""
        self.restart(seed)
        for row in actions:
            self.step(row)
        return self._observation

    def close(self) -> None:
        self._actions = []

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        from stable_baselines3.common.monitor import Monitor

        # Whole-game statistics are in infos[i]["episode"], which is all SB3 wants to know of a Monitor.
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        return list(self._observation[:, -1])

    def _get_indices(self, indices: VecEnvIndices) -> Iterable[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else indices
