"""What all prompts begin with (a system prompt, a chat template's opening) is read once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def hidden_states(base: Any, config: Any, ids: Tensor, shared: int) -> Tensor:
    """Hidden states of `ids[:, shared:]` by a causal model without head, gradients included.

    Args:
        base: transformers' model without its head, or what is called like one.
        config: its configuration, which says what kind of cache it has.
        ids: (batch, time), padded on the right, if at all.
        shared: so many tokens are the same in every row.

    Returns:
        (batch, time - shared, width)
    """
    if shared == 0:
        return base(input_ids=ids, use_cache=False).last_hidden_state
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    if len(ids) == 1 or any(type(layer) is not DynamicLayer for layer in cache.layers):
        # Nothing to share; or a sliding window or a state, which cannot be given to several rows.
        return base(input_ids=ids, use_cache=False).last_hidden_state[:, shared:]
    base(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    for kept in cache.layers:
        layer: Any = kept
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    positions = torch.arange(shared, ids.shape[1], device=ids.device)[None]
    return base(
        input_ids=ids[:, shared:], position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
