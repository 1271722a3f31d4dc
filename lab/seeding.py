"""Seeds. What draws within a run has a generator of its own, which is captured with the run."""

import random

import numpy as np


def derive_seed(*words: int) -> int:
    """A 30-bit seed that depends on every word, e.g. (run seed, checkpoint number)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x3FFFFFFF


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (SB3 draws from the global generator)
    torch.manual_seed(seed)
