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
resets the game at every lost life, `life_loss_info` leaves stale memory in `final_obs`, and its time limit
breaks off within a step, so that the last observation shows frames of the step before. So all four stay
off; clipping, lost lives and the time limit are worked out here, and games that are over are reset here.

An emulator of ale-py's vector environment cannot be saved, but it is deterministic in its seed and the
actions since. `capture` returns both, and `replay` brings a new environment to exactly that point. So that
this never takes more than minutes, an environment is seeded again at the end of the first game that finds
`RESEED_STEPS` behind the last seed. (Each seed reloads the ROM: 90 ms, as much as 250 agent steps.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from lab.errors import LabError
from lab.seeding import derive_seed
from rl import games

STACK = 4
RESEED_STEPS = 5_000
"""Agent steps of one environment behind its last seed from which on a new game begins with a new seed."""
TRAINING_SEEDS = 2**30
"""Seeds from here on are those of training games; below it lie those that evaluations may name."""
MAX_SEED = 2**31 - 1
"""The largest seed that an emulator takes."""
_NO_LIMIT = 2**31 - 2

# observations, rewards, dones, infos
Step = tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]


def training_seed(seed: int) -> int:
    """The first seed of the training games of a run with this seed; room for 2^29 environments above it."""
    return TRAINING_SEEDS + derive_seed(seed, 4) // 2


def emulators(
    game: str,
    n_envs: int,
    image_size: int | Sequence[int] = 84,
    frame_skip: int = 4,
    sticky_actions: float = 0.0,
    noop_max: int = 30,
    fire_reset: bool = True,
    full_action_space: bool = False,
    num_threads: int = 0,
    color: bool = False,
) -> Any:
    """ale-py's vector environment with everything off that `AtariVecEnv` works out itself.

    A game that is over waits for a `reset` with a `reset_mask`; its last observation is what `step` returned.
    """
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.vector import AutoresetMode

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return AtariVectorEnv(
        game,
        num_envs=n_envs,
        num_threads=min(num_threads, n_envs),
        img_height=210 if color else height,
        img_width=160 if color else width,
        grayscale=not color,
        stack_num=1 if color else STACK,
        frameskip=frame_skip,
        repeat_action_probability=sticky_actions,
        noop_max=noop_max,
        use_fire_reset=fire_reset,
        max_num_frames_per_episode=_NO_LIMIT,
        full_action_space=full_action_space,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        reward_clipping=False,
        episodic_life=False,
        life_loss_info=False,
    )


class AtariVecEnv(VecEnv):
    """`n_envs` copies of one Atari game, stepped together in C++.

    Args:
        game: any of `rl.games.names()`.
        n_envs: number of copies.
        seed: copy i begins its first game with seed + i; later seeds are derived from it.
        image_size: height and width of the grey image, pixels.
        frame_skip: emulator frames per agent step; the last two are max-pooled.
        sticky_actions: probability that the emulator repeats the last action instead (0.25 in
            Machado et al. 2018, 0 in Mnih et al. 2015).
        noop_max: up to so many no-ops begin each game.
        fire_reset: begin each game with FIRE where the game has it, as ale-py does unless told otherwise.
        life_loss: end an episode for the learner at each lost life, without resetting the game.
        clip_rewards: hand the learner the sign of each reward.
        max_episode_frames: emulator frames, rounded up to agent steps, until a game is cut off (108,000 is
            30 minutes).
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
        fire_reset: bool = True,
        life_loss: bool = False,
        clip_rewards: bool = True,
        max_episode_frames: int = 108_000,
        full_action_space: bool = False,
        num_threads: int = 0,
        color: bool = False,
    ) -> None:
        self.game = games.check(game)
        self._atari: Any = emulators(
            self.game,
            n_envs,
            image_size,
            frame_skip,
            sticky_actions,
            noop_max,
            fire_reset,
            full_action_space,
            num_threads,
            color,
        )
        self.render_mode = None
        observation_space = self._atari.single_observation_space
        action_space = self._atari.single_action_space
        assert isinstance(observation_space, spaces.Box)
        assert isinstance(action_space, spaces.Discrete)
        super().__init__(n_envs, observation_space, action_space)
        self.life_loss, self.clip_rewards, self.frame_skip = life_loss, clip_rewards, frame_skip
        self.max_episode_frames = max_episode_frames
        self._base_seed = seed
        # How often each copy was seeded, the number of the row of `_actions` from which its seed counts, and
        # the rows: what brings a new environment to this point.
        self._seedings = np.zeros(n_envs, np.int64)
        self._since = np.zeros(n_envs, np.int64)
        self._actions: list[np.ndarray] = []
        self._observation = np.empty(0, np.uint8)
        self.waiting = False
        """A step has begun that is not ended yet."""

    @property
    def action_meanings(self) -> list[str]:
        """The names of the actions, e.g. NOOP, FIRE, RIGHT."""
        return [action.name for action in self._atari.ale.get_action_set()]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Sets the seed that the next `reset` takes: copy i's is seed + i; None draws one.

        Raises:
            LabError: one of them is not from 0 to 2^31 - 1, which is what an emulator takes.
        """
        if seed is None:
            seed = int(np.random.default_rng().integers(TRAINING_SEEDS))
        if not 0 <= seed <= MAX_SEED - self.num_envs + 1:
            raise LabError(
                f"seed = {seed}: of {self.num_envs} environments it must be from 0 to "
                f"{MAX_SEED - self.num_envs + 1}, that seed + i fits an emulator. Choose such a seed."
            )
        return super().seed(seed)

    def reset(self) -> np.ndarray:
        """Starts fresh games: with the seed last given to `seed`, else with the next seeds."""
        seeds = [seed for seed in self._seeds if seed is not None]
        self._reset_seeds()
        return self.restart(seeds[0] if seeds else None)

    def restart(self, seed: int | None = None) -> np.ndarray:
        """Starts fresh games in all copies; with a seed exactly those that a new environment begins with."""
        if seed is not None:
            self._base_seed = seed
            self._seedings[:] = 0
        self._actions = []
        self._since[:] = 0
        self._lives = np.zeros(self.num_envs, np.int32)
        self._returns = np.zeros(self.num_envs)
        self._clipped_returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        everyone = np.ones(self.num_envs, bool)
        self._begin(everyone, everyone)
        return self._observation

    def _begin(self, which: np.ndarray, seeded: np.ndarray) -> None:
        """Begins a new game in the copies of the mask `which`, those of `seeded` with their next seed."""
        seeds = np.full(self.num_envs, -1)  # ale-py's word for: go on with the generators you have
        for i in np.flatnonzero(seeded):
            number = int(self._seedings[i])
            derived = TRAINING_SEEDS + derive_seed(self._base_seed, int(i), number)
            seeds[i] = derived if number else self._base_seed + i
            self._seedings[i] += 1
            self._since[i] = len(self._actions)
        options = None if which.all() else {"reset_mask": which}
        self._observation, info = self._atari.reset(seed=seeds[which], options=options)
        self._lives[which] = info["lives"][which]
        self._returns[which] = self._clipped_returns[which] = self._lengths[which] = 0

    def step_async(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, dtype=np.int64).reshape(self.num_envs)
        self._actions.append(actions.astype(np.uint8))
        self._atari.send(actions)
        self.waiting = True

    def step(self, actions: np.ndarray) -> Step:
        self.step_async(actions)
        return self.step_wait()

    def step_wait(self) -> Step:
        last, raw, terminated, _, info = self._atari.recv()
        self.waiting = False
        raw = raw.astype(np.float32)
        rewards = np.sign(raw) if self.clip_rewards else raw
        self._returns += raw
        self._clipped_returns += np.sign(raw)
        self._lengths += 1
        truncated = (self._lengths * self.frame_skip >= self.max_episode_frames) & ~terminated
        game_over = terminated | truncated
        dones = game_over
        if self.life_loss:
            dones = game_over | (info["lives"] < self._lives)
        self._lives = info["lives"].copy()

        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(dones):
            infos[i] = {
                "game_over": bool(game_over[i]),
                "TimeLimit.truncated": bool(truncated[i]),
                "terminal_observation": last[i].copy(),
            }
            if game_over[i]:
                infos[i]["episode"] = {
                    "r": float(self._returns[i]),
                    "clipped_r": float(self._clipped_returns[i]),
                    "l": int(self._lengths[i]),
                }
        self._observation = last
        if game_over.any():
            self._begin(game_over, game_over & (len(self._actions) - self._since >= RESEED_STEPS))
            self._drop_old_actions()
        return self._observation, rewards, dones, infos

    def _drop_old_actions(self) -> None:
        """Forgets rows that lie behind every copy's last seed."""
        oldest = int(self._since.min())
        if oldest >= RESEED_STEPS:
            del self._actions[:oldest]
            self._since -= oldest

    def capture(self) -> tuple[dict[str, Any], np.ndarray]:
        """What brings a new environment to exactly this point; of a step that has begun, to where it begins.

        Returns:
            JSON values, and the actions since the oldest of the last seeds, uint8 (steps, n_envs).
        """
        oldest = int(self._since.min())
        rows = self._actions[oldest : len(self._actions) - self.waiting]
        actions = np.stack(rows) if rows else np.empty((0, self.num_envs), np.uint8)
        where = {
            "seed": self._base_seed,
            "seedings": self._seedings.tolist(),
            "since": (self._since - oldest).tolist(),
        }
        return where, actions

    def replay(self, where: dict[str, Any], actions: np.ndarray) -> np.ndarray:
        """Restores what `capture` took, by playing it again; returns the observation at that point.

        A copy that was seeded later than another does something of no account until its turn comes.

        Args:
            where, actions: from `capture`.
        """
        since, seedings = np.array(where["since"]), np.array(where["seedings"])
        self._base_seed = where["seed"]
        self._seedings = seedings - 1  # the number of its last seed
        self.restart()
        for number in range(len(actions) + 1):
            if number and (now := since == number).any():
                self._seedings[now] = seedings[now] - 1
                self._begin(now, now)
            if number < len(actions):
                self.step(actions[number])
        return self._observation

    def close(self) -> None:
        """Ends the emulators and their threads."""
        self._actions = []
        self._atari = None

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
