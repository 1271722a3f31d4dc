"""Replay memory that stores every frame once, with n-step returns and incremental saving.

Each environment has a stream of slots, a ring in memory. A slot holds the newest frame of one observation
and, if an action was taken there, the action, the reward and whether it ended the episode. An observation
is the four frames that end at its slot. Two kinds of slot are no transition: the first three frames of a
fresh game (its stack is written whole, whatever the emulator filled it with), and the last observation of
a game that is over (written so that a cut-off game can be bootstrapped from).

At 84x84 a slot takes 7,062 bytes where SB3's memory takes 56,468 a transition.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from lab.errors import LabError
from lab.files import explain_write_errors, safetensors_errors, written_aside

# Slots beyond `buffer_size`, for those that are no transition. A game needs four: 2% serve games of 200
# agent steps; shorter ones cost a few transitions of capacity, never memory.
SLACK = 0.02
_IS_TRANSITION, _IS_TERMINAL = 1, 2


class FrameReplay(ReplayBuffer):
    """A `ReplayBuffer` for stacked frames that SB3's off-policy algorithms accept.

    Args:
        buffer_size: transitions to hold, over all environments.
        observation_space: Box of uint8, (stack, height, width), newest frame last.
        action_space: Discrete.
        device: where batches are returned.
        n_envs: environments that fill it.
        n_steps: length of the returns; fewer where the episode ends or the memory's newest slot is near.
        gamma: discount per agent step.
        storage_device: where the frames lie; a GPU here saves the copy of each batch. On the CPU, memory
            is taken from the system only as it fills.
        seed: of the sampling.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        gamma: float = 0.99,
        storage_device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        assert isinstance(observation_space, spaces.Box)
        # A size of one slot keeps the parent from allocating arrays of its own.
        super().__init__(n_envs, observation_space, action_space, device, n_envs=n_envs)
        self.observations = self.next_observations = np.empty(0, np.uint8)
        self.stack, self.height, self.width = observation_space.shape
        self.n_steps, self.gamma = n_steps, gamma
        self.buffer_size = buffer_size
        self.slots = int(np.ceil(buffer_size / n_envs * (1 + SLACK))) + self.stack + n_steps
        self.rng = np.random.default_rng(seed)

        pixels = self.height * self.width
        self.storage_device = torch.device(storage_device)
        if self.storage_device.type == "cpu":
            # numpy's zeros are untouched pages: the system hands them out one by one as frames arrive.
            self._frames = torch.from_numpy(np.zeros((n_envs * self.slots, pixels), np.uint8))
        else:
            self._frames = torch.zeros(
                (n_envs * self.slots, pixels), dtype=torch.uint8, device=storage_device
            )
        self._actions = np.zeros((n_envs, self.slots), np.uint8)
        self._rewards = np.zeros((n_envs, self.slots), np.float32)
        self._kinds = np.zeros((n_envs, self.slots), np.uint8)
        # Slots ever written to each stream; the newest one is number written - 1, at that index modulo
        # the ring's length.
        self._written = np.zeros(n_envs, np.int64)
        self._fresh = np.ones(n_envs, bool)
        self._saved = np.zeros(n_envs, np.int64)
        self._segments: list[str] = []
        self._discounts = (gamma ** np.arange(n_steps + 1)).astype(np.float32)

    # ---- writing ----

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Stores one transition per environment.

        Args:
            obs, next_obs: uint8, (n_envs, stack, height, width); next_obs holds the terminal observation
                where an episode ended.
            action, reward, done: (n_envs,) or, for action, (n_envs, 1).
            infos: "game_over" False says that a done ended no game (a life was lost), so frames go on;
                "TimeLimit.truncated" that a game was cut off, so its value is bootstrapped.
        """
        for i in np.flatnonzero(self._fresh):
            for k in range(self.stack):
                self._push(np.array([i]), obs[i : i + 1, k])
        self._fresh[:] = False

        envs = np.arange(self.n_envs)
        at = (self._written - 1) % self.slots
        self._actions[envs, at] = np.asarray(action).reshape(self.n_envs)
        self._rewards[envs, at] = reward
        kinds = np.full(self.n_envs, _IS_TRANSITION, np.uint8)
        for i in np.flatnonzero(done):
            if not infos[i].get("TimeLimit.truncated", False):
                kinds[i] |= _IS_TERMINAL
            self._fresh[i] = infos[i].get("game_over", True)
        self._kinds[envs, at] = kinds
        self._push(envs, next_obs[:, -1])

    def cut(self) -> None:
        """All games are about to be restarted: what follows is not the sequel of the newest slots."""
        self._fresh[:] = True

    def _push(self, envs: np.ndarray, frames: np.ndarray) -> None:
        at = self._written[envs] % self.slots
        rows = torch.from_numpy(envs * self.slots + at).to(self.storage_device)
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).reshape(len(envs), -1)
        self._frames.index_copy_(0, rows, pixels.to(self.storage_device))
        self._kinds[envs, at] = 0
        self._written[envs] += 1

    # ---- reading ----

    @property
    def empty(self) -> bool:
        """Whether nothing was ever stored, as in an agent that was loaded without its memory."""
        return not self._written.any()

    def size(self) -> int:
        """Transitions that can be sampled now."""
        if int(self._written.max()) > self.slots:
            kinds = self._kinds.copy()
            for k in range(self.stack - 1):  # their stacks reach into what was overwritten
                kinds[np.arange(self.n_envs), (self._written + k) % self.slots] = 0
            return int(np.count_nonzero(kinds & _IS_TRANSITION))
        return int(np.count_nonzero(self._kinds & _IS_TRANSITION))

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draws transitions uniformly, with replacement.

        Returns:
            observations, next_observations: uint8, (batch, stack, height, width); the second is the one
                `k` steps later, k = n_steps or less.
            actions: int64 (batch, 1); rewards: float32 (batch, 1), sum of gamma^j r_j over those k steps.
            dones: float32 (batch, 1), 1 where the episode terminated within them.
            discounts: float32 (batch, 1), gamma^k.
        """
        return self._gather(*self._draw(batch_size))

    def _draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(environment, slot number) of `batch_size` transitions, by rejecting slots that are none."""
        live = np.minimum(self._written, self.slots)
        # Skip the oldest slots of a full ring, whose stacks are cut, and the newest, which has no action.
        oldest = self._written - live + np.where(self._written > self.slots, self.stack - 1, 0)
        ends = np.cumsum(self._written - 1 - oldest)
        if ends[-1] <= 0:
            raise LabError("replay memory: empty, nothing to sample. Raise agent.learning_starts.")
        envs = np.empty(0, np.int64)
        numbers = np.empty(0, np.int64)
        while len(envs) < batch_size:
            flat = self.rng.integers(ends[-1], size=batch_size + 8)
            e = np.searchsorted(ends, flat, side="right")
            n = oldest[e] + flat - np.where(e > 0, ends[e - 1], 0)
            good = (self._kinds[e, n % self.slots] & _IS_TRANSITION) > 0
            envs, numbers = np.concatenate((envs, e[good])), np.concatenate((numbers, n[good]))
        return envs[:batch_size], numbers[:batch_size]

    def _gather(self, envs: np.ndarray, numbers: np.ndarray) -> ReplayBufferSamples:
        at = numbers % self.slots
        rewards = self._rewards[envs, at].copy()
        terminal = (self._kinds[envs, at] & _IS_TERMINAL) > 0
        steps = np.ones(len(envs), np.int64)
        running = ~terminal
        for k in range(1, self.n_steps):
            after = (numbers + k) % self.slots
            kinds = self._kinds[envs, after]
            # The next slot is no transition if the game was cut off there, or if it is the newest.
            running &= (kinds & _IS_TRANSITION) > 0
            rewards += np.where(running, self._discounts[k] * self._rewards[envs, after], 0)
            steps += running
            ended = running & ((kinds & _IS_TERMINAL) > 0)
            terminal |= ended
            running &= ~ended
        last = np.concatenate((numbers, numbers + steps))
        stacks = (last[:, None] + np.arange(1 - self.stack, 1)) % self.slots
        rows = torch.from_numpy(np.tile(envs, 2)[:, None] * self.slots + stacks)
        frames = self._frames.index_select(0, rows.flatten().to(self.storage_device))
        frames = frames.view(2, len(envs), self.stack, self.height, self.width)
        observations, next_observations = frames.to(self.device, non_blocking=True)

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(self.device, non_blocking=True).unsqueeze(1)

        return ReplayBufferSamples(
            observations,
            column(self._actions[envs, at].astype(np.int64)),
            next_observations,
            column(terminal.astype(np.float32)),
            column(rewards),
            column(self._discounts[steps]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes the memory takes once it is full."""
        small = self._actions.nbytes + self._rewards.nbytes + self._kinds.nbytes
        return self._frames.numel() + small

    # ---- saving ----

    def save_new(self, folder: Path) -> list[Path]:
        """Writes what came since the last call as one segment; returns the segments a restore needs.

        Frames are deflated (Atari's shrink 15 to 80 times), so a segment costs about 2 ms and 10 to 50 kB
        per hundred transitions however large the memory is. Segments whose slots are all overwritten are
        left out of the list; deleting them is the caller's.

        Raises:
            LabError: the segment cannot be written. A later call writes its slots again.
        """
        from safetensors.numpy import save_file

        # The newest slot is written again next time: it has no action yet.
        first = np.maximum(self._saved - 1, np.maximum(self._written - self.slots, 0))
        last = self._written.copy()
        tensors: dict[str, np.ndarray] = {"first": first, "last": last}
        with ThreadPoolExecutor(2) as pool:
            packed = pool.map(lambda i: self._pack(i, int(first[i]), int(last[i])), range(self.n_envs))
            for i, streams in enumerate(packed):
                tensors |= {f"{name}_{i}": data for name, data in streams.items()}
        path = folder / f"replay_{int(last.sum()):014d}.safetensors"
        with explain_write_errors(str(path), "Free some space, then continue with --resume."):
            folder.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as aside, safetensors_errors():
                save_file(tensors, aside)
        self._saved = last
        if path.name not in self._segments:
            self._segments.append(path.name)
        self._drop_overwritten_segments(folder)
        return [folder / name for name in self._segments]

    def restore(self, folder: Path, segments: list[str]) -> None:
        """Fills the memory from segments written by `save_new`, oldest first."""
        from safetensors.numpy import load_file

        for name in segments:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no segment's name")
            tensors = load_file(folder / name)
            if (tensors["last"] - tensors["first"] > self.slots).any():
                raise ValueError(f"{name} holds more than the memory does")
            for i in range(self.n_envs):
                self._unpack(i, tensors)
            self._written = tensors["last"].copy()
        self._saved = self._written.copy()
        self._segments = list(segments)

    def state(self) -> dict[str, Any]:
        """What beside the segments is needed to go on exactly (JSON)."""
        return {
            "fresh": self._fresh.tolist(),
            "rng": self.rng.bit_generator.state,
            "segments": self._segments,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned, all but the segments."""
        self._fresh = np.array(state["fresh"], bool)
        self.rng.bit_generator.state = state["rng"]

    def _pack(self, env: int, first: int, last: int) -> dict[str, np.ndarray]:
        at = np.arange(first, last) % self.slots
        frames = self._frames.index_select(0, torch.from_numpy(env * self.slots + at).to(self.storage_device))
        deflated = zlib.compress(frames.cpu().numpy().data, level=1)
        return {
            "frames": np.frombuffer(deflated, np.uint8),
            "actions": self._actions[env, at],
            "rewards": self._rewards[env, at],
            "kinds": self._kinds[env, at],
        }

    def _unpack(self, env: int, tensors: dict[str, np.ndarray]) -> None:
        at = np.arange(tensors["first"][env], tensors["last"][env]) % self.slots
        size = len(at) * self.height * self.width  # a few bytes may claim to be a thousand times as many
        deflated = zlib.decompressobj().decompress(tensors[f"frames_{env}"].data, size + 1)
        frames = np.frombuffer(deflated, np.uint8).copy()
        rows = torch.from_numpy(env * self.slots + at).to(self.storage_device)
        self._frames.index_copy_(0, rows, torch.from_numpy(frames).view(len(at), -1).to(self.storage_device))
        for name, ring in (("actions", self._actions), ("rewards", self._rewards), ("kinds", self._kinds)):
            ring[env, at] = tensors[f"{name}_{env}"]

    def _drop_overwritten_segments(self, folder: Path) -> None:
        """Forgets leading segments none of whose slots is still in the ring."""
        from safetensors import safe_open

        while len(self._segments) > 1:
            with safe_open(folder / self._segments[0], framework="numpy") as segment:
                last = segment.get_tensor("last")
            if (last > self._written - self.slots).any():
                return
            self._segments.pop(0)
