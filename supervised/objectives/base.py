"""What a learning problem is to the loop: players that learn in turns, their losses, and a verdict."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lab.device import Compute
from lab.errors import LabError
from supervised.config import SupervisedRun
from supervised.data import Batches, DataSet

Batch = dict[str, Tensor]
Players = Mapping[str, nn.Module]


class Loss(NamedTuple):
    """What a player has to make smaller, and numbers for the record."""

    value: Tensor
    metrics: dict[str, Tensor]
    """Detached scalars; nothing here waits for the device."""


class Objective(ABC):
    """One learning problem.

    The loop knows nothing of it but this: in every step each of `turns` is asked for its `loss` on the
    batch, and the weights of that player move. A classifier is one player; a GAN is two with a loss and an
    optimiser each; a diffusion model is one whose batches get their noise in `loss`. Whatever is drawn
    there comes from torch's global generators, which the loop seeds anew in every step: so a resumed run
    draws what one never stopped would have drawn.
    """

    headline: str
    """The number of `evaluate` that says which weights are best, e.g. "accuracy"."""
    higher_is_better: bool

    players: dict[str, nn.Module]
    """The modules that learn, by name. The loop may wrap them; `loss` must call these."""

    parents: Sequence[dict[str, str]] = ()
    """The runs whose weights this one begins with, as run.json names them."""

    longest_attention = 0
    """Tokens a row of attention may have; 0: few."""

    def __init__(self, settings: SupervisedRun, data: DataSet) -> None:
        self.settings, self.data = settings, data

    def batches(self, part: str, device: torch.device) -> Batches:
        """The batches of "train", shuffled, or of "test", in order."""
        s, train = self.settings, part == "train"
        return Batches(
            self.data.train if train else self.data.test,
            s.batch_size if train else s.eval.batch_size or s.batch_size,
            device,
            seed=s.seed,
            shuffle=train,
            drop_last=train,
            context=self.window(train),
            batch_tokens=s.data.batch_tokens,
        )

    def window(self, train: bool) -> int:
        """Tokens or frames of a sample, where the data are longer texts or play."""
        return self.settings.data.context

    def share(self, part: Batch, batch: Batch) -> float | Tensor:
        """How much the loss of a part counts in that of the whole batch: all parts' shares sum to 1."""
        return samples_in(part) / samples_in(batch)

    def turns(self, step: int) -> Sequence[str]:
        """The players whose weights move in this step, one after the other."""
        return tuple(self.players)

    @abstractmethod
    def loss(self, player: str, batch: Batch) -> Loss:
        """A mean over the batch's samples, or what else `share` weighs, with gradients for this player's
        weights."""

    @abstractmethod
    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        """Numbers on held-out batches, `headline` among them, by these players: those that are averaged, or
        those that learn. Each sample counts once."""

    def examine(self, players: Players, compute: Compute) -> tuple[dict[str, float], list[str]]:
        """Numbers that take too long for every evaluation, for `lab evaluate`, and a sentence on each."""
        return {}, []

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Draws figures into the folder; yields (name, file) of each."""
        return iter(())

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        """What makes the result of an evaluation worth nothing, a sentence each."""
        return []

    def spec(self) -> dict[str, Any]:
        """Facts found in the data that a checkpoint must carry to be used without it, as JSON."""
        return {}

    def columns_spec(self) -> dict[str, Any]:
        """Of a table whose columns have names, what became of them, as `columns_of` reads it."""
        return {"columns": [asdict(column) for column in self.data.columns]} if self.data.columns else {}

    def use_spec(self, spec: Mapping[str, Any]) -> None:  # noqa: B027 (most have nothing to take)
        """Takes from a checkpoint's `spec` what its weights were learned with, whatever the data give now.

        Raises:
            ValueError: it does not say.
        """


def samples_in(batch: Batch) -> int:
    """How many samples a batch has."""
    return len(next(iter(batch.values())))


def no_better_than_one_class(data: DataSet, accuracy: float) -> list[str]:
    """What to say of an accuracy that naming the most frequent class would reach, of a data set's `test`."""
    counts = data.test.tensors["labels"].bincount(minlength=data.num_classes)
    most = float(counts.max() / counts.sum())
    if round(accuracy * int(counts.sum())) > int(counts.max()):
        return []
    name = data.classes[int(counts.argmax())]
    return [
        f"accuracy {accuracy:.4g} is no better than always naming {name!r}, the most frequent class "
        f"of {data.part} ({most:.4g})"
    ]


def require_kind(data: DataSet, kinds: Sequence[str], objective: str, column: str = "") -> None:
    """Raises unless the data are of one of these kinds, and have the column that is learned."""
    if data.kind not in kinds:
        hint = " (data.format=text learns a file as plain text.)" if tuple(kinds) == ("text",) else ""
        if data.kind == "text" and "table" in kinds:
            hint = " (data.format=rows takes its lines for a table.)"
        raise LabError(
            f"data.source = {data.name!r}: holds {data.kind}, and {objective} learns from "
            f"{' or '.join(kinds)}. Name another data set, or another objective.name." + hint
        )
    if column and column not in data.train.tensors:
        raise LabError(
            f"data.source = {data.name!r}: has no {column}, which {objective} learns. Name another data set, "
            "or another objective.name."
        )
    if column == "labels" and data.num_classes < 2:
        raise LabError(
            f"data.source = {data.name!r}: has only the class {data.classes[0]!r}, and there is nothing to "
            "tell apart. Add samples of another."
        )
    if column == "targets" and (targets := data.train.tensors[column]).eq(targets[0]).all():
        raise LabError(
            f"data.source = {data.name!r}: the numbers to predict are all {targets[0].tolist()}, so "
            "nothing can be learned. Set data.label to another column."
        )
