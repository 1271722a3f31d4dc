"""Log-probabilities of given tokens without the logits of all positions and all of the vocabulary."""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.prefix import hidden_states

# Logits held at once, in numbers: 64 MB of float32.
LOGITS_AT_ONCE = 2**24


def add_logprob_head(model: Any, temperature: float = 1.0) -> None:
    """Lets `model(input_ids=..., logprobs_of=tokens, logprobs_at=positions)` return log-probabilities.

    Then `forward` returns, instead of its output, two float32 tensors of the shape of `logprobs_of`
    (batch, width): the log-probability of each token given what lies at and before its position, and the
    entropy there (without gradient). Padding is on the right, if at all; `shared=n` says that the rows begin
    with the same n tokens, before all positions. Only hidden states at those positions meet the vocabulary,
    in blocks of at most `LOGITS_AT_ONCE` logits that are computed again in the backward pass. Being the
    model's own forward, it works below DDP and PEFT wrappers.

    Args:
        model: a transformers causal LM, wrapped or not.
        temperature: the logits are divided by it, as in sampling.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = inner.forward

    @functools.wraps(type(inner).forward)
    def with_logprobs(
        self: Any,
        *args: Any,
        logprobs_of: Tensor | None = None,
        logprobs_at: Tensor | None = None,
        shared: int = 0,
        **kwargs: Any,
    ) -> Any:
        if logprobs_of is None or logprobs_at is None:
            return forward(*args, **kwargs)
        hidden = hidden_states(self.base_model, self.config, kwargs["input_ids"], logprobs_at, shared)
        return token_logprobs(hidden, self.get_output_embeddings(), logprobs_of, temperature)

    inner.forward = types.MethodType(with_logprobs, inner)


def token_logprobs(hidden: Tensor, head: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (batch, width) from hidden states (batch, width, d), and entropies."""
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    logprobs, entropies = [], []
    for begin in range(0, len(flat), rows):
        block = (flat[begin : begin + rows], head, wanted[begin : begin + rows], temperature)
        whole = len(flat) <= rows  # one block fits in memory: nothing is gained by computing it twice
        logprob, entropy = (
            _block(*block)
            if whole or not torch.is_grad_enabled()
            else checkpoint(_block, *block, use_reentrant=False)
        )
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs).view(tokens.shape), torch.cat(entropies).view(tokens.shape)


def _block(hidden: Tensor, head: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    normalized = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(normalized.exp() * normalized).sum(-1)
    return normalized.gather(1, tokens[:, None]).squeeze(1), entropy
