"""What all prompts begin with (a system prompt, a chat template's opening) is read once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supervised.backbones.transformer import take

WORTH = 1 / 8
"""The share of all tokens that must be saved: reading in two parts costs a little by itself."""


def shared_prefix(prompts: Sequence[Sequence[int]], n_tokens: int) -> int:
    """How many tokens to read once: those with which all prompts begin, but at most all but their last.

    Args:
        n_tokens: of prompts and answers together. If `WORTH` of them is not saved, the result is 0.
    """
    common = 0
    for column in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        common += 1
    return common if common * (len(prompts) - 1) >= WORTH * n_tokens else 0


def hidden_states(base: Any, config: Any, ids: Tensor, at: Tensor, shared: int = 0) -> Tensor:
    """Hidden states of some tokens of `ids` by a causal model without head, gradients included.

    Args:
        base: transformers' model without its head, or what is called like one.
        config: its configuration, which says what kind of cache it has.
        ids: (batch, time), padded on the right, if at all.
        at: (batch, n) indices into time.
        shared: so many tokens are the same in every row; `at` has none of them.

    Returns:
        (batch, n, width)
    """
    cache = _cache_of_the_beginning(base, config, ids, shared) if shared else None
    if cache is None:
        return _read(base, at, input_ids=ids, use_cache=False)
    positions = torch.arange(shared, ids.shape[1], device=ids.device)[None]
    rest = {"input_ids": ids[:, shared:], "position_ids": positions}
    return _read(base, at - shared, **rest, past_key_values=cache, use_cache=True)


def _cache_of_the_beginning(base: Any, config: Any, ids: Tensor, shared: int) -> Any:
    """The keys and values of the first `shared` tokens for all rows, computed for one; None: not possible."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    if len(ids) == 1 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None  # nothing to share; or a sliding window or a state, which cannot be given to several rows
    base(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    for kept in cache.layers:
        layer: Any = kept
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    return cache


def _read(base: Any, at: Tensor, **inputs: Any) -> Tensor:
    if getattr(base, "takes_output_at", False):  # a LabGPT: it computes no more than is wanted of it
        return base(**inputs, output_at=at).last_hidden_state
    return take(base(**inputs).last_hidden_state, at)
