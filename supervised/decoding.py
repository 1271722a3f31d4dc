"""From a model that encodes a source and steps through a target to the target: greedy and beam search."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class StepDecoder(Protocol):
    """What both kinds of translators offer.

    A memory or a state is a tensor with the batch first, None, or a (named) tuple of these.
    """

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Any:
        """What the decoder may look at, from source tokens (batch, source_time)."""
        ...

    def start(self, memory: Any) -> Any:
        """The state before the first token."""
        ...

    def step(self, memory: Any, state: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """Features (batch, num_features) of the next tokens (batch,), and the state behind them."""
        ...


Head = Callable[[Tensor], Tensor]
"""Logits (..., vocab_size) of features (..., num_features)."""


@torch.no_grad()
def greedy(
    model: StepDecoder,
    head: Head,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    bos_id: int,
    eos_id: int,
    max_length: int,
) -> list[list[int]]:
    """Takes the likeliest token at every step.

    Args:
        model: a translator, in evaluation mode.
        head: its vocabulary head.
        source_ids: (batch, source_time).
        source_mask: (batch, source_time), True for tokens; None: no padding.
        bos_id: the token a target starts with.
        eos_id: the token it ends with.
        max_length: of a target, its end token included; longer ones are cut.

    Returns:
        A target per source, without start and end token.
    """
    memory = model.encode(source_ids, source_mask)
    state = model.start(memory)
    tokens = source_ids.new_full((len(source_ids),), bos_id)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    targets = []
    for _ in range(max_length):
        features, state = model.step(memory, state, tokens)
        tokens = head(features).argmax(-1)
        ended |= tokens == eos_id
        targets.append(tokens.masked_fill(ended, eos_id))
        if ended.all():
            break
    return _without_end(torch.stack(targets, dim=1), eos_id)


@torch.no_grad()
def beam_search(
    model: StepDecoder,
    head: Head,
    source_ids: Tensor,
    source_mask: Tensor | None = None,
    *,
    bos_id: int,
    eos_id: int,
    max_length: int,
    beam: int = 4,
    alpha: float = 0.6,
) -> list[list[int]]:
    """Looks for the target of the highest log-probability divided by `length_penalty`.

    Keeps the `beam` likeliest unfinished targets of every source. A target is finished when its end token is
    among the `beam` likeliest ways to go on, and the search stops when no unfinished one could still become
    better than the best finished one. A source without a finished target gets the likeliest unfinished one.

    Args:
        beam: targets kept; 1 with `alpha` 0 is `greedy`.
        alpha: how much longer targets are favoured, at least 0 (0.6 in Vaswani et al. 2017).
        others: as `greedy`.

    Returns:
        A target per source, without start and end token.

    Raises:
        ValueError: `beam` below 1 or `alpha` below 0.
    """
    if beam < 1 or alpha < 0:
        raise ValueError(f"beam {beam} must be at least 1 and alpha {alpha} at least 0")
    batch, device = len(source_ids), source_ids.device
    first_rows = torch.arange(batch, device=device)[:, None] * beam
    sources = torch.arange(batch, device=device).repeat_interleave(beam)
    memory = take_rows(model.encode(source_ids, source_mask), sources)
    state = model.start(memory)
    targets = source_ids.new_full((batch * beam, 1), bos_id)
    scores = torch.full((batch, beam), -torch.inf, device=device)
    scores[:, 0] = 0  # at first all targets of a source are the same one
    best = targets.new_full((batch, max_length), eos_id)
    best_score = scores.new_full((batch,), -torch.inf)
    for length in range(1, max_length + 1):
        features, state = model.step(memory, state, targets[:, -1])
        log_probs = head(features).float().log_softmax(-1)
        vocab_size = log_probs.shape[-1]
        candidates = scores[:, :, None] + log_probs.view(batch, beam, vocab_size)
        # At most `beam` of them end, so that as many go on.
        candidate_scores, at = candidates.flatten(1).topk(min(2 * beam, beam * vocab_size))
        rows, tokens = first_rows + at // vocab_size, at % vocab_size
        ends = tokens == eos_id

        ended = candidate_scores[:, :beam].masked_fill(~ends[:, :beam], -torch.inf)
        score, which = (ended / length_penalty(length, alpha)).max(1)
        better = score > best_score
        finished = targets[rows.gather(1, which[:, None])[:, 0], 1:]
        finished = torch.nn.functional.pad(finished, (0, max_length - finished.shape[1]), value=eos_id)
        best = torch.where(better[:, None], finished, best)
        best_score = torch.where(better, score, best_score)

        scores, which = candidate_scores.masked_fill(ends, -torch.inf).topk(beam)
        rows, tokens = rows.gather(1, which).flatten(), tokens.gather(1, which).flatten()
        targets = torch.cat((targets[rows], tokens[:, None]), dim=1)
        state = take_rows(state, rows)
        # A score only falls, and no target is longer than max_length.
        if (scores[:, 0] / length_penalty(max_length, alpha) <= best_score).all():
            break
    else:
        unfinished = targets.view(batch, beam, -1)[:, 0, 1:]
        best = torch.where((best_score == -torch.inf)[:, None], unfinished, best)
    return _without_end(best, eos_id)


def length_penalty(length: int, alpha: float) -> float:
    """((5 + length) / 6)^alpha (arXiv 1609.08144, equation 14); the end token counts."""
    return ((5 + length) / 6) ** alpha


def take_rows(tree: Any, rows: Tensor) -> Any:
    """A memory or state of the rows (n,) of another."""
    if isinstance(tree, Tensor):
        return tree.index_select(0, rows)
    if isinstance(tree, tuple):
        taken = [take_rows(branch, rows) for branch in tree]
        return type(tree)(*taken) if hasattr(tree, "_fields") else tuple(taken)
    return tree


def _without_end(targets: Tensor, eos_id: int) -> list[list[int]]:
    return [row[: row.index(eos_id)] if eos_id in row else row for row in targets.tolist()]
