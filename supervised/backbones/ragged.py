"""Rows of different lengths without padding, for everything but what needs a rectangle."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ragged:
    """Where the entries of rows of different lengths lie: in one flat row, one behind the other, and in a
    rectangle (rows, longest), each row from the left.

    Args:
        lengths: of the rows, each at least 1. They come from the host, so that nothing asks the device.
        lead: entries before the first row's in the flat row, which are in no rectangle.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str | None = None, lead: int = 0
    ) -> None:
        self.lengths, self.device, self.lead = tuple(lengths), device, lead
        self.shape = len(lengths), max(lengths)
        counts, n_entries = torch.tensor(lengths), sum(lengths)
        self._ends = counts.cumsum(0)
        shifts = torch.arange(len(lengths)) * self.shape[1] - (self._ends - counts)
        at = torch.arange(n_entries) + shifts.repeat_interleave(counts, output_size=n_entries)
        self.counts = counts.to(device)
        """int64 (rows,): the lengths, on the device."""
        self.at = at.to(device)
        """int64 (entries,): where each lies in the flattened rectangle."""

    @property
    def mask(self) -> Tensor:
        """bool (rows, longest): where the rectangle has entries."""
        return torch.arange(self.shape[1], device=self.device) < self.counts[:, None]

    @property
    def columns(self) -> Tensor:
        """int64 (entries,): each one's place in its row."""
        return self.at % self.shape[1]

    def pad(self, flat: Tensor) -> Tensor:
        """(lead + entries, ...) -> (rows, longest, ...), zeros where no entry lies."""
        return _Pad.apply(flat[self.lead :], self.at, self.shape)  # type: ignore[return-value]

    def unpad(self, rectangle: Tensor) -> Tensor:
        """(rows, longest, ...) -> (entries, ...)."""
        return _Unpad.apply(rectangle, self.at)  # type: ignore[return-value]

    def tails(self, lengths: Sequence[int]) -> "Tails":
        """The last so many entries of each row, at least 1."""
        rows, n_entries = Ragged(lengths, self.device), sum(lengths)
        shifts = self.lead + self._ends - rows._ends
        shifts = shifts.repeat_interleave(torch.tensor(lengths), output_size=n_entries)
        at = (torch.arange(n_entries) + shifts).to(self.device)
        firsts = self.counts - rows.counts
        return Tails(rows, at, firsts[:, None] + torch.arange(rows.shape[1], device=self.device))


class Tails(NamedTuple):
    """The last entries of some rows, which are ragged rows themselves."""

    rows: Ragged
    at: Tensor
    """int64 (entries,): where each lies in the flat row of the whole rows, its lead included."""
    columns: Tensor
    """int64 (rows, longest): each one's place in its whole row; behind a row's end it goes on counting."""

    def take(self, flat: Tensor) -> Tensor:
        """(1, lead + entries of the whole rows, ...) -> (1, entries, ...)."""
        return _Unpad.apply(flat, self.at)[None]  # type: ignore[index]


def _fill(flat: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    return flat.new_zeros(shape[0] * shape[1], *flat.shape[1:]).index_copy_(0, at, flat).unflatten(0, shape)


def _pick(rectangle: Tensor, at: Tensor) -> Tensor:
    return rectangle.flatten(0, 1).index_select(0, at)


# Each is the other's derivative. Autograd by itself would add up the picked entries one at a time, for it
# does not know that none is picked twice.


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(at)
        return _fill(flat, at, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return _pick(gradients[0], at), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rectangle: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.shape = rectangle.shape[:2]
        return _pick(rectangle, at)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return _fill(gradients[0], at, ctx.shape), None
