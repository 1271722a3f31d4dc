"""Sampling answers from a causal language model with a KV cache: many at once, or one token by token.

Both run the same loop, `_steps`. It is the plain one but for what showed in its profile on a CPU:

- A prompt is read once for all its answers.
- Keys and values go into room made for all of them, in the format attention computes in; transformers'
  cache copies everything it holds whenever a token is added.
- Rows that have ended are soon no longer computed.
- Under autocast a frozen weight is converted once, not for every token.

This changes what is drawn no more than another batch size does: by the rounding of sums.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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
) -> list[list[int]]:
    """Samples one answer a prompt; an answer ends with the first end token, or is cut at the limit.

    Does what `model.generate(do_sample=True)` does for these options with less work around the model. What
    is drawn for a row depends on no other: each has a random number of its own at every step, ended or not.

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

    Returns:
        The answers' token ids, their end token included.
    """
    choose = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    with _weights_converted_once(model):
        steps = list(_steps(model, prompts, max_new_tokens, eos_ids, pad_id, choose, generator, observe))
    answers = torch.stack(steps, dim=1)
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
    for tokens in _steps(model, [prompt], max_new_tokens, eos_ids, 0, choose, generator):
        yield int(tokens)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's, the chat template's, and those the model declares."""
    declared = model.generation_config.eos_token_id
    more = [declared] if isinstance(declared, int) else (declared or [])
    turn_end = end_id(tokenizer, conversation=True)
    return {tokenizer.eos_token_id, *more} | ({turn_end} if turn_end is not None else set())


@torch.no_grad()
def _steps(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    choose: Choose,
    generator: torch.Generator | None,
    observe: Observe | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every answer (batch,), `pad_id` where it has ended, until all have."""
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    longest = max(map(len, distinct))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in distinct], device=device)
    padding = torch.tensor([longest - len(p) for p in distinct], device=device)[:, None]
    padded = any(len(p) < longest for p in distinct)
    columns = torch.arange(longest + max_new_tokens, device=device)
    cache = _cache(model, len(columns))
    eos = _as_ids(eos_ids, device)

    def next_logits(ids: Tensor, begin: int, end: int) -> Tensor:
        output = model(
            input_ids=ids,
            attention_mask=(columns[:end] >= padding).long() if padded else None,
            position_ids=(columns[begin:end] - padding).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    logits = next_logits(ids, 0, longest)
    if len(distinct) < len(prompts):
        number = {prompt: row for row, prompt in enumerate(distinct)}
        copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        logits, padding = logits[copies], padding[copies]
        cache.batch_select_indices(copies)

    rows = torch.arange(len(prompts), device=device)  # the answers still computed ...
    ended = torch.zeros_like(rows, dtype=torch.bool)  # ... and which of them have ended already
    for step in range(max_new_tokens):
        chance = torch.rand((len(prompts), 1), device=device, generator=generator)
        token = torch.where(ended, pad_id, choose(logits, chance[rows]))
        if observe is not None:
            observe(step, rows, logits, token)
        yield torch.full((len(prompts),), pad_id, device=device).index_copy_(0, rows, token)
        ended |= torch.isin(token, eos)
        left = len(rows) - int(ended.sum())
        if left == 0 or step + 1 == max_new_tokens:
            return
        if left <= (1 - DROP_ENDED) * len(rows):
            going = (~ended).nonzero()[:, 0]
            rows, token, padding, ended = rows[going], token[going], padding[going], ended[going]
            cache.batch_select_indices(going)
        logits = next_logits(token[:, None], longest + step, longest + step + 1)


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

    def batch_select_indices(self, indices: Tensor) -> None:
        self._all = [kept[indices] for kept in self._all]
        self._show(self.get_seq_length())

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (kept[:, :, :end] for kept in self._all)
        return self.keys, self.values


def _cache(model: Any, room: int) -> DynamicCache:
    """A cache for `room` tokens; layers of special kinds (sliding windows, states) are transformers' own."""
    cache = DynamicCache(config=model.config)
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
