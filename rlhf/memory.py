"""How many answers can be sampled at once: by what a cache takes, and what the device has."""

from typing import Any

import psutil
import torch

AT_MOST = 4096
"""Rows at once where memory would take any number."""
SHARE = 0.5
"""Of the memory found free, for sampling: what allocators lose and other processes take comes from the
rest."""


def bytes_per_row(config: Any, n_tokens: int, cache_bytes: int) -> int:
    """Memory of one row of `n_tokens` while it is sampled: its cache, and the largest of what is computed of
    it.

    The cache is reckoned as keys and values in every layer; windows and states take less.

    Args:
        config: of a transformers model.
        n_tokens: of prompt and answer.
        cache_bytes: a number in the cache takes.
    """
    text = config.get_text_config()
    width = int(text.hidden_size)
    layers = [_layer(layer, width) for layer in getattr(text, "per_layer_config", [text])]
    cache = 2 * sum(kept for kept, _ in layers) * n_tokens * cache_bytes
    inner = max(inner for _, inner in layers)
    logits = (
        5 * 4 * int(text.vocab_size)
    )  # fp32: as they come, scaled, their softmax and its sum, a comparison
    reading = n_tokens * (8 * width + 3 * inner) * 4  # one layer of the prompt
    return cache + logits + reading


def _layer(config: Any, width: int) -> tuple[int, int]:
    """Width of a layer's keys, and of what is inside of it."""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    head = int(getattr(config, "head_dim", None) or width // heads)
    kept_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return kept_heads * head, max(inner) if isinstance(inner, list | tuple) else int(inner)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, the allocator's own unused included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def rows_that_fit(model: Any, n_tokens: int, reserve: int = 0) -> int:
    """How many rows of `n_tokens` can be sampled at once: a power of two, at least 1.

    Args:
        model: whose; its device, weights and autocast decide.
        n_tokens: of prompt and answer.
        reserve: bytes that will be needed besides, as of an optimiser that has not stepped yet.
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    kind = weight.device.type
    if kind == "meta":
        return AT_MOST
    dtype = weight.dtype
    if torch.is_autocast_enabled(kind):  # copies of the weights are made in the format that is computed in
        dtype = torch.get_autocast_dtype(kind)
        reserve += sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return rows_in(free_bytes(weight.device) - reserve, model.config, n_tokens, dtype.itemsize)


def rows_in(free: int, config: Any, n_tokens: int, cache_bytes: int) -> int:
    """How many rows fit `SHARE` of the free bytes: a power of two, at least 1; see `bytes_per_row`."""
    rows = int(free * SHARE) // bytes_per_row(config, n_tokens, cache_bytes)
    return min(AT_MOST, 1 << (rows.bit_length() - 1)) if rows > 0 else 1
