"""Seeds. What draws within a run has a generator of its own, which is captured with the run."""

import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*words: int) -> int:
    """A 30-bit seed that depends on every word, e.g. (run seed, checkpoint number)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x3FFFFFFF


def seed_step(seed: int, device: "torch.device") -> None:
    """Seeds what one step on a device draws from.

    `torch.manual_seed` also tells devices that are not there, each with a stack trace: 0.3 ms.
    """
    import torch

    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (SB3 draws from the global generator)
    torch.manual_seed(seed)
