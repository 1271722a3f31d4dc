"""What all prompts begin with (a system prompt, a chat template's opening) is read once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supervised.backbones.ragged import Ragged

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


def hidden_states(
    base: Any,
    config: Any,
    ids: Tensor,
    lengths: Sequence[int],
    wanted: Sequence[int],
    shared: int = 0,
    together: bool = True,
) -> Tensor:
    """Hidden states of the last tokens of each row of `ids` by a causal model without head, with gradients.

    Args:
        base: transformers' model without its head, or what is called like one.
        config: its configuration, which says what kind of cache it has.
        ids: (batch, time); what stands behind a row's length is not read.
        lengths: tokens of each row.
        wanted: of how many of its last tokens the hidden state is wanted, at least 1.
        shared: so many tokens are the same in every row; none of them is wanted.
        together: read rows of several lengths at once; else one by one.

    Returns:
        (sum of wanted, width), one row's behind the other's.
    """
    if not together:
        rows = zip(ids, lengths, wanted, strict=True)
        return torch.cat([hidden_states(base, config, row[None], [n], [k], 0) for row, n, k in rows])
    if getattr(base, "takes_documents", False):  # a LabGPT: it computes no padding, and only what is wanted
        rows = Ragged([length - shared for length in lengths], ids.device, lead=shared)
        own = rows.unpad(ids[:, shared : shared + rows.shape[1]])
        tokens = torch.cat((ids[0, :shared], own))[None]
        read = base(input_ids=tokens, documents=rows, wanted=rows.tails(wanted), use_cache=False)
        return read.last_hidden_state[0]
    cache = _cache_of_the_beginning(base, config, ids, shared) if shared else None
    begin = shared if cache is not None else 0
    rows = Ragged([length - begin for length in lengths], ids.device)
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
    if cache is not None:
        inputs["position_ids"] = torch.arange(begin, ids.shape[1], device=ids.device)[None]
    hidden = base(input_ids=ids[:, begin:], **inputs).last_hidden_state
    return rows.tails(wanted).take(rows.unpad(hidden[:, : rows.shape[1]])[None])[0]


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
