"""The parts of a data set as tensors: rows of equal shape, one long text, sequences of any length, play."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSplit:
    """Samples of equal shape, e.g. {"inputs": (n, channels, height, width) uint8, "labels": (n,) int64}."""

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            sizes = {name: len(tensor) for name, tensor in self.tensors.items()}
            raise ValueError(f"tensors of one split must be equally long, not {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, by name."""
        yield from self.tensors.items()


@dataclass(frozen=True)
class TokenSplit:
    """One text of many documents, each followed by the end-of-text token."""

    ids: Tensor
    """(tokens,) int32."""
    documents: Tensor
    """(documents,) int64: where each begins."""

    def __len__(self) -> int:
        return len(self.ids)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("ids", self.ids), ("documents", self.documents))


@dataclass(frozen=True)
class Ragged:
    """Sequences of any length, end to end; `group` of them in a row belong to one sample."""

    flat: Tensor
    """(tokens,) int32."""
    offsets: Tensor
    """(sequences + 1,) int64, on the CPU: where each begins, and the end."""
    group: int = 1

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | np.ndarray], group: int = 1) -> "Ragged":
        """Lays sequences end to end."""
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        flat = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for ids in sequences)])
        return cls(torch.from_numpy(flat), torch.from_numpy(np.concatenate(([0], lengths.cumsum()))), group)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.group

    def __getitem__(self, index: int) -> list[int]:
        """One sequence."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]].tolist()

    def longest(self) -> Tensor:
        """(samples,) int64: the longest sequence of each."""
        return self.offsets.diff().view(-1, self.group).amax(1)


@dataclass(frozen=True)
class SequenceSplit:
    """Samples of sequences of any length: pairs {"source", "target"}, or the texts of a task {"ids"}."""

    sequences: dict[str, Ragged]
    padding: int
    """The token that shorter sequences of a batch are filled up with."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What else a sample has, e.g. {"labels": (n,) int64}."""

    def __len__(self) -> int:
        return len(next(iter(self.sequences.values())))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for name, ragged in self.sequences.items():
            yield from ((name, ragged.flat), (f"{name}.offsets", ragged.offsets))
        yield from self.tensors.items()


@dataclass(frozen=True)
class FrameSplit:
    """Records of play end to end: step t + 1 follows step t unless begins[t + 1]."""

    frames: Tensor
    """(steps, height, width) uint8: what was seen before the action."""
    actions: Tensor
    """(steps,) int64."""
    begins: Tensor
    """(steps,) bool: the frame is the first of a stretch."""

    def __len__(self) -> int:
        return len(self.frames)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("frames", self.frames), ("actions", self.actions), ("begins", self.begins))

    def windows(self, length: int, apart: int = 1) -> Tensor:
        """(n,) int64: where windows of so many steps begin, none of which leaves its stretch.

        Args:
            length: steps of a window.
            apart: steps from one to the next of the same stretch.
        """
        starts = [*np.flatnonzero(self.begins.numpy()).tolist(), len(self)]
        stretches = pairwise(starts)
        return torch.cat(
            [torch.arange(start, max(end - length + 1, start), apart) for start, end in stretches]
        )


Split: TypeAlias = TensorSplit | TokenSplit | SequenceSplit | FrameSplit
