"""Sampling answers from a causal language model with a KV cache: many at once, or one token by token.

Both run the same loop, `_steps`. It is the plain one but for what showed in its profile on a CPU:

- A prompt is read once for all its answers.
- Keys and values go into room made for all of them, in the format attention computes in; transformers'
  cache copies everything it holds whenever a token is added.
- Rows that have ended are soon no longer computed.
- Under autocast a frozen weight is converted once, not for every token.

This changes what is drawn no more than another batch size does: by the rounding of sums. How much of it a
model allows is found by comparing with its own plain forward, before it is first sampled: see `decoding_of`.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lab.errors import LabError
from rlhf.agreement import (
    Probe,
    enlarged,
    enlargement,
    evaluating,
    first_that_agrees,
    forward_arguments,
    inner_model,
    make_probe,
    name_of,
    plain_logprobs,
    tolerance,
)
from rlhf.memory import rows_that_fit
from rlhf.tokenization import end_id

Choose = Callable[[Tensor, Tensor], Tensor]
"""`choose(logits, chance)`: a token per row, as `draw`."""

Observe = Callable[[int, Tensor, Tensor, Tensor], None]
"""`observe(step, rows, logits, tokens)`: what was drawn at a step for the answers still computed."""

DROP_ENDED = 0.25
"""Ended rows are dropped once they are this share of those computed: it copies the cache of the others."""


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    observe: Observe | None = None,
    rows_at_once: int = 0,
) -> list[list[int]]:
    """Samples one answer a prompt; an answer ends with the first end token, or is cut at the limit.

    Does what `model.generate(do_sample=True)` does for these options with less work around the model. What
    is drawn for a row depends on no other: each has a random number of its own at every step, ended or not,
    and however many rows are sampled at once.

    Args:
        model: a transformers causal LM that takes a cache.
        prompts: token ids; they are padded on the left, with a mask and positions of their own.
        max_new_tokens: of each answer, its end token included.
        eos_ids: tokens that end an answer.
        pad_id: what fills the space before short prompts; never read as anything else.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: 0, or sample among so many tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        generator: of the random numbers; by default torch's own.
        observe: is told the logits of every step and the tokens drawn from them.
        rows_at_once: answers sampled at the same time; 0: as many as fit the memory.

    Returns:
        The answers' token ids, their end token included.

    Raises:
        LabError: the model cannot be sampled, see `decoding_of`.
    """
    way = decoding_of(model, prompts)
    choose = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    device = next(model.parameters()).device
    # All of them first: so they are the same for a row in whatever part it is sampled.
    chances = torch.rand((max_new_tokens, len(prompts), 1), device=device, generator=generator)
    if not rows_at_once:
        rows_at_once = rows_that_fit(model, max(map(len, prompts)) + max_new_tokens)
    answers: list[list[int]] = [[]] * len(prompts)
    with _weights_converted_once(model):
        for part in _parts(prompts, rows_at_once, way):
            where = torch.tensor(part, device=device)
            told = functools.partial(_tell, observe, where) if observe is not None else None
            of_part = [prompts[row] for row in part]
            steps = [
                *_steps(model, of_part, max_new_tokens, eos_ids, pad_id, choose, chances[:, where], told, way)
            ]
            for row, answer in zip(part, _until_the_end(torch.stack(steps, dim=1), eos_ids), strict=True):
                answers[row] = answer
    return answers


def _parts(prompts: Sequence[Sequence[int]], rows_at_once: int, way: "Decoding") -> Iterator[list[int]]:
    """The rows that are sampled together: neighbours, or those with prompts of one length."""
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(0 if way.padded else len(prompt), []).append(row)
    for group in groups.values():
        for begin in range(0, len(group), rows_at_once):
            yield group[begin : begin + rows_at_once]


def _tell(observe: Observe, where: Tensor, step: int, rows: Tensor, logits: Tensor, tokens: Tensor) -> None:
    observe(step, where[rows], logits, tokens)


def _until_the_end(answers: Tensor, eos_ids: Collection[int]) -> list[list[int]]:
    stops = torch.isin(answers, _as_ids(eos_ids, answers.device))
    # After the first end token the row is padding; a pad token before it was sampled, and stays.
    counts = torch.where(stops.any(1), stops.int().argmax(1) + 1, answers.shape[1]).tolist()
    return [answer[:count] for answer, count in zip(answers.tolist(), counts, strict=True)]


def stream(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields the tokens of one answer as they are drawn, the end token included; see `sample`."""
    choose = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    device = next(model.parameters()).device
    chances = torch.rand((max_new_tokens, 1, 1), device=device, generator=generator)
    way = decoding_of(model, [prompt])
    for tokens in _steps(model, [prompt], max_new_tokens, eos_ids, 0, choose, chances, None, way):
        yield int(tokens)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's, the chat template's, and those the model declares."""
    declared = model.generation_config.eos_token_id
    more = [declared] if isinstance(declared, int) else (declared or [])
    turn_end = end_id(tokenizer, conversation=True)
    return {tokenizer.eos_token_id, *more} | ({turn_end} if turn_end is not None else set())


# ---- which short cuts a model allows ----


@dataclass(frozen=True)
class Decoding:
    """The short cuts taken in sampling; without any, every token is computed from all before it."""

    cached: bool = True
    """What was computed of the tokens before is kept: keys and values, or states."""
    room: bool = True
    """Keys and values go into room made for all of them."""
    made: bool = True
    """The cache is transformers' common one; else the model makes its own."""
    selects: bool = True
    """Rows are copied, for several answers to a prompt, and dropped, once they have ended."""
    padded: bool = True
    """Prompts of several lengths are read together."""

    @property
    def left_out(self) -> str:
        """What is not done, "" if all is."""
        if not self.cached:
            return "without a cache, which takes long"
        parts = (
            ("" if self.made else "with a cache that it makes itself"),
            ("" if self.room or not self.made else "keys and values are copied for every token"),
            ("" if self.selects else "no row is copied or dropped"),
            ("" if self.padded else "prompts of each length by themselves"),
        )
        return ", ".join(filter(None, parts))


DECODINGS = (
    *(
        Decoding(room=room, made=made, padded=padded, selects=selects)
        for padded, selects in ((True, True), (True, False), (False, True), (False, False))
        for room, made in ((True, True), (False, True), (False, False))
    ),
    Decoding(cached=False, room=False, padded=False),
)

CACHES = "past_key_values", "cache_params", "state"
"""Under which name a model takes and returns its cache."""

_DECODINGS: weakref.WeakKeyDictionary[Any, dict[bool, Decoding]] = weakref.WeakKeyDictionary()


def decoding_of(model: Any, prompts: Sequence[Sequence[int]] = ()) -> Decoding:
    """How a model is sampled, found once: the quickest way that gives the log-probabilities of its own
    forward.

    Args:
        prompts: some real ones, of whose tokens the comparison is made.

    Raises:
        LabError: no way does, or the model is not causal.
    """
    inner = inner_model(model)
    weight = next(model.parameters())
    if weight.device.type == "meta":
        return DECODINGS[0]
    known = _DECODINGS.setdefault(inner, {})
    autocast = torch.is_autocast_enabled(weight.device.type)
    if autocast not in known:
        probe = make_probe(inner.config, prompts)
        with torch.autocast(weight.device.type, enabled=False):
            if False not in known:
                known[False] = _find_decoding(model, probe, DECODINGS)
        if autocast:
            known[True] = _find_decoding(model, probe, [known[False]])
    return known[autocast]


def _find_decoding(model: Any, probe: Probe, ways: Sequence[Decoding]) -> Decoding:
    with evaluating(model), torch.no_grad(), enlarged(model, enlargement(model, probe.rows[0])):
        truth = plain_logprobs(model, probe)
        within = tolerance(model, truth)
        way, refused = first_that_agrees(ways, lambda way: forced(model, probe, way), truth, within)
    if way is None:
        number_format = "bf16" if torch.is_autocast_enabled(next(model.parameters()).device.type) else "fp32"
        raise LabError(
            f"{name_of(model)}: cannot be sampled so that probabilities are those of its own forward in "
            f"{number_format} ({refused[-1][1]}; {within:.2g} are allowed). "
            + ("Set device.precision to fp32, or name" if number_format == "bf16" else "Name")
            + " another model."
        )
    return way


def forced(model: Any, probe: Probe, way: Decoding) -> list[Tensor]:
    """Log-probabilities where the tokens of given answers are drawn, (answer, vocabulary) of each, by the
    sampler.

    The answers are those of the probe, so that nothing is left to chance: they end one after the other.
    """
    device = next(model.parameters()).device
    longest = max(map(len, probe.answers))
    end = next(i for i in range(2**24) if all(i not in answer for answer in probe.answers))
    numbers = [[torch.empty(0)] * len(answer) for answer in probe.answers]
    for part in _parts(probe.prompts, len(probe.prompts), way):
        # In the place of chances stand the tokens that are to be drawn; then the end.
        plan = torch.full((longest + 1, len(part), 1), float(end))
        for row, own in enumerate(part):
            plan[: len(probe.answers[own]), row, 0] = torch.tensor(probe.answers[own], dtype=torch.float32)

        def observe(step: int, rows: Tensor, logits: Tensor, tokens: Tensor, part: list[int] = part) -> None:
            for row, logprobs in zip(rows.tolist(), logits.log_softmax(-1), strict=True):
                if step < len(numbers[part[row]]):
                    numbers[part[row]][step] = logprobs

        prompts = [probe.prompts[row] for row in part]
        steps = _steps(model, prompts, longest + 1, [end], 0, _as_planned, plan.to(device), observe, way)
        for _ in steps:
            pass
    return [torch.stack(own) for own in numbers]


def _as_planned(logits: Tensor, plan: Tensor) -> Tensor:
    return plan[:, 0].long()


@torch.no_grad()
def _steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    choose: Choose,
    chances: Tensor,
    observe: Observe | None,
    way: Decoding,
) -> Iterator[Tensor]:
    """Yields the next token of every answer (batch,), `pad_id` where it has ended, until all have.

    `chances` (steps, batch, ...) are what `choose` gets; without padding all prompts are of one length.
    """
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts))) if way.selects else list(map(tuple, prompts))
    longest = max(map(len, distinct))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in distinct], device=device)
    padding = torch.tensor([longest - len(p) for p in distinct], device=device)[:, None]
    padded = any(len(p) < longest for p in distinct)
    columns = torch.arange(longest + max_new_tokens, device=device)
    eos = _as_ids(eos_ids, device)
    takes = forward_arguments(model)
    holds = next((name for name in CACHES if name in takes), CACHES[0])
    cache = _cache(model, len(columns), way) if way.cached and way.made else None
    fixed: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    if "use_cache" in takes:
        fixed["use_cache"] = way.cached

    def next_logits(ids: Tensor, begin: int, end: int) -> Tensor:
        nonlocal cache
        own = dict(fixed)
        if cache is not None:
            own[holds] = cache
        if padded:  # else a model counts by itself, and not every one from 0
            own["attention_mask"] = (columns[:end] >= padding).long()
            if "position_ids" in takes:
                own["position_ids"] = (columns[begin:end] - padding).clamp(min=0)
        output = model(input_ids=ids, **own)
        cache = output[holds] if way.cached and not way.made else cache
        return output.logits[:, -1].float()

    logits = next_logits(ids, 0, longest)
    if len(distinct) < len(prompts):
        number = {prompt: row for row, prompt in enumerate(distinct)}
        copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        logits, padding, ids = logits[copies], padding[copies], ids[copies]
        select_rows(cache, copies)

    rows = torch.arange(len(prompts), device=device)  # the answers still computed ...
    ended = torch.zeros_like(rows, dtype=torch.bool)  # ... and which of them have ended already
    for step in range(max_new_tokens):
        token = torch.where(ended, pad_id, choose(logits, chances[step, rows]))
        if observe is not None:
            observe(step, rows, logits, token)
        yield torch.full((len(prompts),), pad_id, device=device).index_copy_(0, rows, token)
        ended |= torch.isin(token, eos)
        left = len(rows) - int(ended.sum())
        if left == 0 or step + 1 == max_new_tokens:
            return
        if way.selects and left <= (1 - DROP_ENDED) * len(rows):
            going = (~ended).nonzero()[:, 0]
            rows, token, padding, ended, ids = (x[going] for x in (rows, token, padding, ended, ids))
            select_rows(cache, going)
        if way.cached:
            logits = next_logits(token[:, None], longest + step, longest + step + 1)
        else:
            ids = torch.cat((ids, token[:, None]), 1)
            logits = next_logits(ids, 0, longest + step + 1)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Copies, drops and reorders the rows of a cache, whatever its layers hold.

    By what beam search uses: layers of every kind have it, also where states stand beside keys and values.
    """
    if cache is not None:
        cache.reorder_cache(rows)


def draw(
    logits: Tensor, chance: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token per row, by inverting the distribution function.

    Args:
        logits: (batch, vocab), float32.
        chance: (batch, 1), uniform in [0, 1).
        temperature, top_k, top_p: as of `sample`.

    Returns:
        int64 (batch,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    reached = logits.softmax(-1).cumsum_(-1)
    # right=True: a token of probability 0 is never drawn, even if the chance is exactly 0.
    token = torch.searchsorted(reached, chance * reached[:, -1:], right=True)
    return token.clamp_(max=logits.shape[-1] - 1)[:, 0]


class DrawnLogprobs:
    """Observes `sample`: log-probabilities of the tokens drawn, and entropies, whatever top_k and top_p are.

    Without autocast they are, to rounding, what a forward pass over prompts and answers would give.

    Attributes:
        logprobs, entropies: float32 (batch, max_new_tokens); anything behind an answer's end.
    """

    def __init__(self, batch: int, max_new_tokens: int, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.logprobs, self.entropies = torch.zeros((2, batch, max_new_tokens), device=device)

    def __call__(self, step: int, rows: Tensor, logits: Tensor, tokens: Tensor) -> None:
        normalized = (logits / self.temperature).log_softmax(-1)
        self.logprobs[rows, step] = normalized.gather(1, tokens[:, None])[:, 0]
        self.entropies[rows, step] = -(normalized.exp() * normalized).sum(-1)


class _RoomyLayer(DynamicLayer):
    """A layer of the cache with room for all tokens from the start."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            # What attention would convert all of them to, at every token.
            self.dtype = torch.get_autocast_dtype(kind)
        self._all = [
            new.new_empty((*new.shape[:2], self._room, new.shape[-1]), dtype=self.dtype)
            for new in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for kept, new in zip(self._all, (key_states, value_states), strict=True):
            kept[:, :, begin:end] = new
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._all = [kept[beam_idx] for kept in self._all]
            self._show(self.get_seq_length())

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (kept[:, :, :end] for kept in self._all)
        return self.keys, self.values


def _cache(model: Any, room: int, way: Decoding) -> DynamicCache:
    """A cache for `room` tokens; layers of special kinds (sliding windows, states) are transformers' own."""
    cache = DynamicCache(config=model.config)
    if way.room:
        cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextlib.contextmanager
def _weights_converted_once(model: Any) -> Iterator[None]:
    """Has autocast keep its copies of frozen weights, too; by itself it keeps those of trainable ones."""
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    autocast = torch.is_autocast_enabled(weights[0].device.type)
    for weight in frozen if autocast else ():
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _as_ids(ids: Collection[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.int64, device=device)
