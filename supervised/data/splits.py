"""The parts of a data set as tensors: rows of equal shape, one long text, or sequences of any length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from supervised.data.stacks import whole_stacks


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
class StackSplit:
    """Frames of games; a sample is `size` in a row, and each frame is kept once."""

    frames: Tensor
    """(frames, height, width) uint8."""
    starts: Tensor
    """(samples,) int64: the first frame of each."""
    size: int

    @classmethod
    def of(cls, frames: np.ndarray, begins: np.ndarray, size: int) -> "StackSplit":
        """All stacks of frames of one game, by where games begin, bool (frames,)."""
        kept = np.require(frames, requirements=["C", "W"])
        return cls(torch.from_numpy(kept), torch.from_numpy(whole_stacks(begins, size)), size)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample: (size, height, width)."""
        return (self.size, *self.frames.shape[1:])

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("frames", self.frames), ("starts", self.starts))


Split: TypeAlias = TensorSplit | TokenSplit | SequenceSplit | StackSplit
