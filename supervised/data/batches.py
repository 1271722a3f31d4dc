"""Batches of a split on the device, in an order that depends on the seed and the epoch alone.

What fits is kept on the device, and a batch is one `index_select` there: no worker processes, no copies, and
no waiting for the device. The rest comes from host memory, gathered by a thread while the step before it
computes. Both give the same batches, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lab.errors import LabError
from lab.memory import free_bytes
from lab.seeding import derive_seed
from supervised.data.splits import FrameSplit, Ragged, SequenceSplit, Split, TensorSplit, TokenSplit

BUDGET = 0.5
"""Share of the device's free memory that a data set may take."""

Batch = dict[str, Tensor]


class Batches:
    """The batches of one split, epoch by epoch.

    Args:
        split: the samples.
        batch_size: samples of a batch; 0, or more than there are: all.
        device: where the batches lie.
        seed: of the order.
        shuffle: False: in order, each sample exactly once, for evaluation.
        drop_last: leave out a last batch that is smaller (of a `SequenceSplit`, they differ anyway).
        context: tokens to predict in a window of a `TokenSplit`; steps of a window of a `FrameSplit`.
        batch_tokens: of a `SequenceSplit`: batches have as many samples as, padded, make so many tokens on
            either side; 0: `batch_size` samples.
        resident: keep the split on the device; None: if it fits.

    A batch is, by kind of split,
        `TensorSplit`: its tensors, (batch, ...);
        `TokenSplit`: "ids" (batch, context + 1) int64 and, unless shuffled, "mask" (batch, context), True for
            targets that count. Shuffled windows tile the text from an offset that every epoch draws anew;
            those in order hold every token but the first as a target once: the last one begins early enough
            to be full, and its mask leaves out what came before;
        `SequenceSplit`: its sequences, (batch, time) or, where `group` belong to a sample, (batch, group,
            time), int64, padded; its tensors; and "rows" (batch,), which samples of the split they are.
            Samples of similar length share a batch;
        `FrameSplit`: "frames" (batch, context, height, width) uint8 and "actions" (batch, context) int64, of
            windows that do not leave their stretch: all there are, or in order those that touch no other.

    Raises:
        LabError: a text is too short for `context`, or every stretch of frames.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        context: int = 0,
        batch_tokens: int = 0,
        resident: bool | None = None,
    ) -> None:
        self.device, self.seed, self.shuffle = torch.device(device), seed, shuffle
        n_bytes = sum(tensor.nbytes for _, tensor in split.parts())
        fits, why = _fits(n_bytes, self.device)
        self.resident = fits if resident is None else resident
        """Whether the split lies on the device."""
        self.why = why if resident is None else "as asked for"
        place = self.device if self.resident else torch.device("cpu")
        self._plan: _Plan
        if isinstance(split, TensorSplit):
            self._plan = _Rows(split, place, batch_size, shuffle and drop_last)
        elif isinstance(split, TokenSplit):
            self._plan = _Windows(split, place, batch_size, shuffle, drop_last, context)
        elif isinstance(split, FrameSplit):
            self._plan = _Stretches(split, place, batch_size, shuffle, drop_last, context)
        else:
            self._plan = _Sequences(split, place, batch_size, batch_tokens)

    def __len__(self) -> int:
        """Batches of an epoch; the same in each."""
        return self._plan.n_batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first `start`.

        Resuming within an epoch gives the batches that one never stopped would have given.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number)) if self.shuffle else None
        order = self._plan.order(generator)
        if self.resident:
            for index in range(start, len(self)):
                yield self._plan.gather(order, index)
            return
        # Of a copy from pinned memory nobody has to wait: the thread pins, the device fetches when it can.
        pin = self.device.type == "cuda"

        def prepare(index: int) -> Batch:
            batch = self._plan.gather(order, index)
            return {name: value.pin_memory() for name, value in batch.items()} if pin else batch

        with ThreadPoolExecutor(1, "batches") as pool:
            ahead = [pool.submit(prepare, index) for index in range(start, min(start + 2, len(self)))]
            for index in range(start, len(self)):
                batch = ahead.pop(0).result()
                if index + 2 < len(self):
                    ahead.append(pool.submit(prepare, index + 2))
                yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _fits(n_bytes: int, device: torch.device) -> tuple[bool, str]:
    """Whether so much data should lie on the device, and why."""
    if device.type in ("cpu", "meta"):
        return True, f"the data is in the memory of the {device.type} anyway"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = free_bytes()
    sizes = f"{n_bytes / 2**20:,.1f} MiB of data, {free / 2**20:,.0f} MiB free on {device}"
    fits = n_bytes <= BUDGET * free
    return fits, f"{sizes}: {'fits' if fits else 'does not fit'} into {BUDGET:.0%} of that"


class _Plan(ABC):
    """How the batches of one kind of split are made."""

    n_batches: int

    @abstractmethod
    def order(self, generator: torch.Generator | None) -> list[Tensor]:
        """What each batch of an epoch consists of; without a generator, in order."""

    @abstractmethod
    def gather(self, order: list[Tensor], index: int) -> Batch:
        """One batch."""


def _permutation(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(n) if generator is None else torch.randperm(n, generator=generator)


class _Rows(_Plan):
    def __init__(self, split: TensorSplit, place: torch.device, batch_size: int, drop_last: bool) -> None:
        self.n, self.place = len(split), place
        self.batch_size = min(batch_size or self.n, self.n)
        self.n_batches = self.n // self.batch_size if drop_last else math.ceil(self.n / self.batch_size)
        self.tensors = {name: tensor.to(place) for name, tensor in split.tensors.items()}

    def order(self, generator: torch.Generator | None) -> list[Tensor]:
        return list(_permutation(self.n, generator).to(self.place).split(self.batch_size))

    def gather(self, order: list[Tensor], index: int) -> Batch:
        # index_select copies whole rows: ten times as fast as indexing, on a CPU.
        return {name: tensor.index_select(0, order[index]) for name, tensor in self.tensors.items()}


class _Windows(_Plan):
    def __init__(
        self,
        split: TokenSplit,
        place: torch.device,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        context: int,
    ) -> None:
        n = len(split)
        if n < 2 or (shuffle and n <= context):
            raise LabError(
                f"data.context = {context}: the text has only {n:,} tokens. Make it smaller, or add text."
            )
        self.ids, self.place = split.ids.to(place), place
        self.n_targets, self.context = n - 1, min(context, n - 1)
        # Wherever in a window the first one begins, so many are full.
        self.phases = min(self.context, self.n_targets - self.context + 1)
        in_each = (self.n_targets - self.phases + 1) // self.context
        self.n_windows = in_each if shuffle else math.ceil(self.n_targets / self.context)
        self.batch_size = min(batch_size or self.n_windows, self.n_windows)
        drop_last = shuffle and drop_last
        whole, rest = divmod(self.n_windows, self.batch_size)
        self.n_batches = whole + (rest > 0 and not drop_last)
        self.steps = torch.arange(self.context + 1, device=place)
        self.masked = not shuffle

    def order(self, generator: torch.Generator | None) -> list[Tensor]:
        starts = _permutation(self.n_windows, generator) * self.context
        if generator is not None:
            starts += torch.randint(self.phases, (), generator=generator)
        return list(starts.to(self.place).split(self.batch_size))

    def gather(self, order: list[Tensor], index: int) -> Batch:
        wanted = order[index][:, None]
        starts = wanted.clamp(max=self.n_targets - self.context)
        at = starts + self.steps
        ids = self.ids.index_select(0, at.flatten()).view(at.shape).long()
        return {"ids": ids, "mask": at[:, :-1] >= wanted} if self.masked else {"ids": ids}


class _Stretches(_Plan):
    def __init__(
        self,
        split: FrameSplit,
        place: torch.device,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        context: int,
    ) -> None:
        self.starts = split.windows(context, apart=1 if shuffle else context)
        n = len(self.starts)
        if not n:
            longest = len(split) // max(int(split.begins.sum()), 1)
            raise LabError(
                f"data.source: no stretch of play has the {context} frames of a window (on average they have "
                f"{longest}). Record longer ones, or make objective.context or objective.rollout smaller."
            )
        self.frames, self.actions, self.place = split.frames.to(place), split.actions.to(place), place
        self.steps = torch.arange(context, device=place)
        self.batch_size = min(batch_size or n, n)
        self.n_batches = n // self.batch_size if shuffle and drop_last else math.ceil(n / self.batch_size)

    def order(self, generator: torch.Generator | None) -> list[Tensor]:
        rows = self.starts[_permutation(len(self.starts), generator)]
        return list(rows.to(self.place).split(self.batch_size))

    def gather(self, order: list[Tensor], index: int) -> Batch:
        at = order[index][:, None] + self.steps
        frames, actions = (t.index_select(0, at.flatten()) for t in (self.frames, self.actions))
        return {"frames": frames.view(*at.shape, *frames.shape[1:]), "actions": actions.view(at.shape)}


class _Sequences(_Plan):
    def __init__(self, split: SequenceSplit, place: torch.device, batch_size: int, batch_tokens: int) -> None:
        self.split, self.place = split, place
        self.flat = {name: ragged.flat.to(place) for name, ragged in split.sequences.items()}
        self.offsets = {name: ragged.offsets.to(place) for name, ragged in split.sequences.items()}
        self.lengths = {name: ragged.offsets.diff().numpy() for name, ragged in split.sequences.items()}
        self.tensors = {name: tensor.to(place) for name, tensor in split.tensors.items()}
        longest = [ragged.longest() * ragged.group for ragged in split.sequences.values()]
        self.size = torch.stack(longest).amax(0)
        # Only ties are broken at random, so that the batches of all epochs have the same sizes.
        self.bounds = _cut(self.size.sort().values.tolist(), batch_size or len(split), batch_tokens)
        self.n_batches = len(self.bounds) - 1

    def order(self, generator: torch.Generator | None) -> list[Tensor]:
        shuffled = _permutation(len(self.split), generator)
        by_size = shuffled[self.size[shuffled].sort(stable=True).indices]
        batches = by_size.tensor_split(self.bounds[1:-1])
        return [batches[i] for i in _permutation(self.n_batches, generator).tolist()]

    def gather(self, order: list[Tensor], index: int) -> Batch:
        rows = order[index]  # on the CPU, where the lengths are known without asking the device
        there = rows.to(self.place, non_blocking=True)
        batch = {name: self._pad(name, ragged, rows, there) for name, ragged in self.split.sequences.items()}
        tensors = {name: tensor.index_select(0, there) for name, tensor in self.tensors.items()}
        return batch | tensors | {"rows": there}

    def _pad(self, name: str, ragged: Ragged, rows: Tensor, there: Tensor) -> Tensor:
        group, offsets, flat = ragged.group, self.offsets[name], self.flat[name]
        time = int(self.lengths[name].reshape(-1, group)[rows.numpy()].max())
        which = (there[:, None] * group + torch.arange(group, device=there.device)).flatten()
        starts, ends = offsets.index_select(0, which)[:, None], offsets.index_select(0, which + 1)[:, None]
        at = starts + torch.arange(time, device=there.device)
        found = flat.index_select(0, at.clamp(max=len(flat) - 1).flatten()).view(at.shape).long()
        padded = torch.where(at < ends, found, self.split.padding)
        return padded.view(len(rows), group, time) if group > 1 else padded


def _cut(sizes: list[int], batch_size: int, batch_tokens: int) -> list[int]:
    """Where batches of samples of ascending size begin, and the end."""
    bounds = [0]
    for i, size in enumerate(sizes):
        samples = i - bounds[-1]
        full = (samples + 1) * size > batch_tokens if batch_tokens else samples == batch_size
        if full and samples:
            bounds.append(i)
    return [*bounds, len(sizes)]
