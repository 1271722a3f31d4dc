"""Log-probabilities of given tokens without the logits of all positions and all of the vocabulary.

A model's forward is more than a body and a linear layer: families cap, scale and shift logits, or hidden
states before. So what follows the body is left to the model's own forward, which is given the hidden states
that matter in its body's place; whether that is right for a model is found by comparing, see `reading_of`.
"""

import functools
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf.agreement import (
    Probe,
    enlarged,
    enlargement,
    evaluating,
    first_that_agrees,
    forward_arguments,
    inner_model,
    make_probe,
    plain_logprobs,
    tolerance,
)
from rlhf.prefix import hidden_states
from rlhf.sequences import Sequences, side_by_side

# Logits held at once, in numbers: 64 MB of float32.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Reading:
    """How prompts with their answers are read for the log-probabilities of the answers."""

    body: str = ""
    """Name of the module whose hidden states are read; "": the model's own forward does all."""
    shares: bool = True
    """A beginning that all rows have is read once."""
    together: bool = True
    """Rows of several lengths are read together, padded on the right; else one by one."""

    @property
    def left_out(self) -> str:
        """Which short cuts are not taken, "" if all are."""
        if self.body:
            return "" if self.shares else "a shared beginning is read for every row"
        return "by its own forward, with more logits" + ("" if self.together else ", row by row")


_READINGS: weakref.WeakKeyDictionary[Any, dict[bool, Reading]] = weakref.WeakKeyDictionary()


def add_logprob_head(model: Any, temperature: float = 1.0, prompts: Sequence[Sequence[int]] = ()) -> None:
    """Lets `model(logprobs_of=sequences)` return the log-probabilities of their answers.

    Then `forward` returns, instead of its output, two float32 tensors (batch, longest answer): the
    log-probability of each token given what stands before it, and the entropy there (without gradient); 0
    behind an answer's end. Only hidden states that predict an answer's token meet the vocabulary, in blocks
    of at most `LOGITS_AT_ONCE` logits that are computed again in the backward pass. Being the model's own
    forward, it works below DDP and PEFT wrappers.

    Args:
        model: a transformers causal LM, wrapped or not.
        temperature: the logits are divided by it, as in sampling.
        prompts: some real ones, for `reading_of`.

    Raises:
        LabError: the model is not causal.
    """
    inner = inner_model(model)
    before = inner.forward
    reading = reading_of(model, prompts)

    @functools.wraps(type(inner).forward)
    def with_logprobs(self: Any, *args: Any, logprobs_of: Sequences | None = None, **kwargs: Any) -> Any:
        if logprobs_of is None:
            return before(*args, **kwargs)
        numbers = answer_logprobs(self, own_forward(self), logprobs_of, reading, temperature)
        return tuple(map(logprobs_of.rows.pad, numbers))

    inner.forward = types.MethodType(with_logprobs, inner)


def own_forward(inner: Any) -> Any:
    """The forward of a model's class, whatever a trainer has put in its place."""
    return functools.partial(type(inner).forward, inner)


def answer_logprobs(
    model: Any, forward: Any, of: Sequences, reading: Reading, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers' tokens, (answer tokens,), and entropies; `forward` is the model's."""
    if not reading.body:
        return _by_own_forward(model, forward, of, reading, temperature)
    of = of if reading.shares else replace(of, shared=0)
    body = model.get_submodule(reading.body)
    hidden = answer_states(body, model.config, of)

    def logits(hidden: Tensor) -> Tensor:
        return tail_logits(forward, body, hidden)

    return token_logprobs(hidden, logits, of.answers, temperature, model.config.get_text_config().vocab_size)


def answer_states(body: Any, config: Any, of: Sequences) -> Tensor:
    """Hidden states of a model without head that predict each answer's tokens, (answer tokens, width)."""
    read = [length - 1 for length in of.lengths]  # the last token predicts nothing that is asked for
    return hidden_states(body, config, of.ids, read, of.answer_lengths, of.shared)


class _Given(BaseModelOutputWithPast):
    """What a body returns, of which there are the hidden states alone."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def tail_logits(forward: Any, body: Any, hidden: Tensor) -> Tensor:
    """The logits (n, vocabulary) that a model's own forward makes of its body's hidden states (n, width)."""
    before = body.__dict__.get("forward")
    body.forward = lambda *_, **__: _Given(last_hidden_state=hidden[None])
    try:
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        return forward(input_ids=ids).logits[0]
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before


def token_logprobs(
    hidden: Tensor, logits: Any, tokens: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (n,) from hidden states (n, width) through `logits`, and entropies."""
    rows = max(1, LOGITS_AT_ONCE // vocab_size)
    parts = []
    for begin in range(0, len(tokens), rows):
        block = (hidden[begin : begin + rows], logits, tokens[begin : begin + rows], temperature)
        whole = len(tokens) <= rows  # one block fits in memory: nothing is gained by computing it twice
        parts.append(
            _block(*block)
            if whole or not torch.is_grad_enabled()
            else checkpoint(_block, *block, use_reentrant=False)
        )
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _block(hidden: Tensor, logits: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return _of_tokens(logits(hidden), tokens, temperature)


def _of_tokens(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    normalized = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(normalized.exp() * normalized).sum(-1)
    return normalized.gather(1, tokens[:, None]).squeeze(1), entropy


def _by_own_forward(
    model: Any, forward: Any, of: Sequences, reading: Reading, temperature: float
) -> tuple[Tensor, Tensor]:
    """In parts of so many rows that their logits are few, each computed again in the backward pass."""
    vocab_size, longest = model.config.get_text_config().vocab_size, of.rows.shape[1]
    fit = max(1, 4 * LOGITS_AT_ONCE // (vocab_size * longest)) if reading.together else 1
    numbers = []
    for begin in range(0, len(of.lengths), fit):
        part = of.part(range(begin, min(begin + fit, len(of.lengths))))
        whole = len(of.lengths) <= fit
        numbers.append(
            _rows_by_own_forward(model, forward, part, temperature)
            if whole or not torch.is_grad_enabled()
            else checkpoint(_rows_by_own_forward, model, forward, part, temperature, use_reentrant=False)
        )
    logprobs, entropies = zip(*numbers, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _rows_by_own_forward(
    model: Any, forward: Any, of: Sequences, temperature: float
) -> tuple[Tensor, Tensor]:
    first, last = min(of.prompt_lengths) - 1, max(of.lengths) - 1
    takes, device = forward_arguments(model), of.ids.device
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = torch.arange(first, last, device=device)
    logits = forward(input_ids=of.ids[:, : last + 1], **options).logits
    if "logits_to_keep" not in takes:
        logits = logits[:, first:last]
    columns = torch.arange(first, last, device=device)
    ends = torch.tensor(of.lengths, device=device)[:, None] - 1
    begins = torch.tensor(of.prompt_lengths, device=device)[:, None] - 1
    return _of_tokens(logits[(columns >= begins) & (columns < ends)], of.answers, temperature)


# ---- which short cuts a model allows ----


def reading_of(model: Any, prompts: Sequence[Sequence[int]] = ()) -> Reading:
    """How log-probabilities are computed, found once: the quickest way that agrees with the model's forward.

    The plainest way is that forward itself, a row at a time, so one agrees.

    Args:
        prompts: some real ones, of whose tokens the comparison is made.

    Raises:
        LabError: the model is not causal.
    """
    inner = inner_model(model)
    weight = next(model.parameters())
    body = next((name for name, module in inner.named_modules() if module is inner.base_model), "")
    if weight.device.type == "meta":
        return Reading(body)
    known = _READINGS.setdefault(inner, {})
    autocast = torch.is_autocast_enabled(weight.device.type)
    if autocast not in known:
        ways = [Reading(name, shares) for name in _bodies(inner) for shares in (True, False)]
        ways += [Reading(shares=False), Reading(shares=False, together=False)]
        probe = make_probe(inner.config, prompts)
        with torch.autocast(weight.device.type, enabled=False):
            if False not in known:
                known[False] = _find_reading(model, probe, ways)
        if autocast:
            known[True] = _find_reading(model, probe, [known[False], *ways[-2:]])
    return known[autocast]


def _bodies(inner: Any) -> list[str]:
    """Names of the modules that may be what a model has below its head."""
    wanted = [inner.base_model, inner.get_decoder(), *inner.children()]
    wanted = [module for module in wanted if isinstance(module, PreTrainedModel)]
    names = {id(module): name for name, module in inner.named_modules()}
    return list(dict.fromkeys(filter(None, (names.get(id(module)) for module in wanted))))


def _find_reading(model: Any, probe: Probe, ways: Sequence[Reading]) -> Reading:
    def compute(way: Reading) -> list[Tensor]:
        return read_probe(model, probe, way)

    with evaluating(model), torch.no_grad(), enlarged(model, enlargement(model, probe.rows[0])):
        whole = plain_logprobs(model, probe)
        truth = [
            logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])[:, 0]
            for logprobs, answer in zip(whole, probe.answers, strict=True)
        ]
        way, _ = first_that_agrees(ways, compute, truth, tolerance(model, whole))
    return way or ways[-1]


def read_probe(model: Any, probe: Probe, way: Reading) -> list[Tensor]:
    """Log-probabilities of the answers' tokens in a way, (answer,) of each."""
    inner = inner_model(model)
    device = next(model.parameters()).device
    packed = replace(side_by_side(probe.prompts, probe.answers, 0, device), shared=probe.shared)
    logprobs, _ = answer_logprobs(inner, own_forward(inner), packed, way, 1.0)
    return list(logprobs.split(packed.answer_lengths))
