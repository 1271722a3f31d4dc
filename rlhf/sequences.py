"""Prompts with their answers, as the models of PPO read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlhf.prefix import shared_prefix
from supervised.backbones.ragged import Ragged


@dataclass(frozen=True)
class Sequences:
    """Prompts and answers side by side, padded on the right."""

    ids: Tensor
    """int64 (batch, prompt + answer + padding)."""
    prompt_lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    """End token included; at least 1."""
    shared: int
    """Tokens with which every row begins, and which are worth reading but once; see `rlhf.prefix`."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of prompt and answer together."""
        return tuple(map(sum, zip(self.prompt_lengths, self.answer_lengths, strict=True)))

    @cached_property
    def rows(self) -> Ragged:
        """The answers; everything there is per token is (batch, tokens of the longest)."""
        return Ragged(self.answer_lengths, self.ids.device)

    @cached_property
    def mask(self) -> Tensor:
        """bool (batch, width): which answer tokens are real."""
        return self.rows.mask

    @cached_property
    def answers(self) -> Tensor:
        """int64 (answer tokens,): those of all answers, one behind the other."""
        whole = Ragged(self.lengths, self.ids.device)
        return whole.tails(self.answer_lengths).take(whole.unpad(self.ids[:, : whole.shape[1]])[None])[0]

    def part(self, rows: Sequence[int]) -> "Sequences":
        """Some of them, cut to the longest."""
        lengths = self.lengths
        return Sequences(
            self.ids[torch.tensor(rows, device=self.ids.device), : max(lengths[row] for row in rows)],
            tuple(self.prompt_lengths[row] for row in rows),
            tuple(self.answer_lengths[row] for row in rows),
            self.shared,
        )


def side_by_side(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Sequences:
    """Packs token ids of prompts and answers."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    return Sequences(
        torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device),
        tuple(map(len, prompts)),
        tuple(map(len, answers)),
        shared_prefix(prompts, sum(map(len, rows))),
    )
