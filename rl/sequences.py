"""Replay of sequences of single frames, for agents that remember."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rl.replay import _IS_TERMINAL, _IS_TRANSITION, FrameReplay


class Sequences(NamedTuple):
    """Consecutive steps of games, with burn-in steps before and n_steps observations behind them.

    Where a game is over before a sequence is, `mask` leaves the rest out.
    """

    frames: Tensor
    """uint8 (batch, burn_in + steps + n_steps, 1, height, width)."""
    begins: Tensor
    """bool (batch, burn_in + steps + n_steps): an episode begins here, and all before it is forgotten."""
    actions: Tensor
    """int64 (batch, steps)."""
    rewards: Tensor
    """float32 (batch, steps): sum of gamma^j r_j over the next k steps, k = n_steps or less."""
    dones: Tensor
    """float32 (batch, steps): 1 where the episode terminated within them."""
    discounts: Tensor
    """float32 (batch, steps): gamma^k."""
    following: Tensor
    """int64 (batch, steps): index of the observation k steps later, burn-in steps not counted."""
    mask: Tensor
    """float32 (batch, steps): 1 where there is something to learn."""


class SequenceReplay(FrameReplay):
    """A `FrameReplay` that also draws sequences. It stores no memories: burn-in makes them anew."""

    def sample_sequences(self, batch_size: int, burn_in: int, steps: int) -> Sequences:
        """Draws sequences whose first step to learn from is uniform among all transitions."""
        envs, numbers = self._draw(batch_size)
        rows = envs[:, None]
        # One slot more on the left, to know where episodes begin; what the ring has lost counts as none.
        at = numbers[:, None] + np.arange(-burn_in - 1, steps + self.n_steps)
        written = self._written[rows]
        there = (at >= np.maximum(written - self.slots, 0)) & (at < written)
        kinds = np.where(there, self._kinds[rows, at % self.slots], 0)
        transition, terminal = (kinds & _IS_TRANSITION) > 0, (kinds & _IS_TERMINAL) > 0
        begins = (~transition | terminal)[:, :-1]

        learned = slice(burn_in + 1, burn_in + 1 + steps)
        slots = at[:, learned] % self.slots
        # The first step is a transition, and each further one if no episode ended before it.
        mask = np.logical_and.accumulate(transition[:, learned], axis=1)
        mask[:, 1:] &= ~np.logical_or.accumulate(terminal[:, learned], axis=1)[:, :-1]
        rewards = self._rewards[rows, slots].copy()
        done, count = terminal[:, learned].copy(), np.ones_like(slots)
        running = ~done
        for k in range(1, self.n_steps):
            later = slice(learned.start + k, learned.stop + k)
            running &= transition[:, later]
            rewards += np.where(
                running, self._discounts[k] * self._rewards[rows, at[:, later] % self.slots], 0
            )
            count += running
            done |= running & terminal[:, later]
            running &= ~terminal[:, later]

        places = torch.from_numpy(rows * self.slots + at[:, 1:] % self.slots)
        frames = self._frames.index_select(0, places.flatten().to(self.storage_device))

        def there_as(values: np.ndarray, dtype: type) -> Tensor:
            return torch.from_numpy(values.astype(dtype)).to(self.device, non_blocking=True)

        return Sequences(
            frames.view(batch_size, -1, 1, self.height, self.width).to(self.device, non_blocking=True),
            there_as(begins, np.bool_),
            there_as(self._actions[rows, slots], np.int64),
            there_as(rewards, np.float32),
            there_as(done, np.float32),
            there_as(self._discounts[count], np.float32),
            there_as(count + np.arange(steps), np.int64),
            there_as(mask, np.float32),
        )
