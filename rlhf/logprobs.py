"""Log-probabilities of given tokens without the logits of all positions and all of the vocabulary."""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.prefix import hidden_states
from rlhf.sequences import Sequences

# Logits held at once, in numbers: 64 MB of float32.
LOGITS_AT_ONCE = 2**24


def add_logprob_head(model: Any, temperature: float = 1.0) -> None:
    """Lets `model(logprobs_of=sequences)` return the log-probabilities of their answers.

    Then `forward` returns, instead of its output, two float32 tensors (batch, longest answer): the
    log-probability of each token given what stands before it, and the entropy there (without gradient); 0
    behind an answer's end. Only hidden states that predict an answer's token meet the vocabulary, in blocks
    of at most `LOGITS_AT_ONCE` logits that are computed again in the backward pass. Being the model's own
    forward, it works below DDP and PEFT wrappers.

    Args:
        model: a transformers causal LM, wrapped or not.
        temperature: the logits are divided by it, as in sampling.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = inner.forward

    @functools.wraps(type(inner).forward)
    def with_logprobs(self: Any, *args: Any, logprobs_of: Sequences | None = None, **kwargs: Any) -> Any:
        if logprobs_of is None:
            return forward(*args, **kwargs)
        hidden = answer_states(self, logprobs_of)
        numbers = token_logprobs(hidden, self.get_output_embeddings(), logprobs_of.answers, temperature)
        return tuple(map(logprobs_of.rows.pad, numbers))

    inner.forward = types.MethodType(with_logprobs, inner)


def answer_states(model: Any, of: Sequences) -> Tensor:
    """Hidden states of a model with a head that predict each answer's tokens, (answer tokens, width)."""
    read = [length - 1 for length in of.lengths]  # the last token predicts nothing that is asked for
    return hidden_states(model.base_model, model.config, of.ids, read, of.answer_lengths, of.shared)


def token_logprobs(hidden: Tensor, head: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (n,) from hidden states (n, width), and entropies."""
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    logprobs, entropies = [], []
    for begin in range(0, len(tokens), rows):
        block = (hidden[begin : begin + rows], head, tokens[begin : begin + rows], temperature)
        whole = len(tokens) <= rows  # one block fits in memory: nothing is gained by computing it twice
        logprob, entropy = (
            _block(*block)
            if whole or not torch.is_grad_enabled()
            else checkpoint(_block, *block, use_reentrant=False)
        )
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)


def _block(hidden: Tensor, head: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    normalized = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(normalized.exp() * normalized).sum(-1)
    return normalized.gather(1, tokens[:, None]).squeeze(1), entropy
