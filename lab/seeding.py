"""Seeds, and capture and restore of random states as JSON and tensors."""

import random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*words: int) -> int:
    """A 30-bit seed that depends on every word, e.g. (run seed, checkpoint number)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x3FFFFFFF


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (SB3 draws from the global generator)
    torch.manual_seed(seed)


def capture_global() -> tuple[dict[str, Any], dict[str, "torch.Tensor"]]:
    """The global generators' states: what JSON can hold, and torch's byte tensors."""
    import torch

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"torch_cuda_{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def restore_global(state: dict[str, Any], tensors: dict[str, "torch.Tensor"]) -> None:
    """Puts back what `capture_global` took."""
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(tensors["torch_cpu"])
    cuda = [tensors[f"torch_cuda_{i}"] for i in range(len(tensors)) if f"torch_cuda_{i}" in tensors]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
