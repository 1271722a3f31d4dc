"""Which class an image, a row of a table or a sequence is of."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from lab.files import write_atomic
from supervised import backbones, figures
from supervised.backbones.vit import ViT
from supervised.classifier import Classifier
from supervised.config import ClassificationRun
from supervised.data import DataSet
from supervised.data.augment import Augment, Normalize
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, no_better_than_one_class, require_kind

SHOWN = 32
MOST_CONFUSED = 1000
"""Classes up to which there is a confusion matrix: its size is their square."""


class Classification(Objective):
    """Cross entropy, with label smoothing (arXiv 1512.00567, section 7) and auxiliary classifiers."""

    headline = "accuracy"
    higher_is_better = True

    def __init__(self, settings: ClassificationRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("images", "table", "sequences"), "classification", "labels")
        self.config = settings.objective
        shape = data.train.tensors["inputs"].shape[1:]
        if self.config.rows and data.kind != "images":
            raise LabError(f"objective.rows: is for images, and {data.name} holds {data.kind}. Leave it out.")
        self.normalize = Normalize.of(data.train.tensors["inputs"])
        self.augment = Augment(settings.data.augment)
        of_data: dict[str, Any] = {"in_features": shape[-1]}
        fitting: Sequence[str] = backbones.RECURRENT if data.kind == "sequences" else ["mlp"]
        if data.kind == "images":
            channels, height, width = shape
            of_data = {"in_chans": channels, "img_size": [height, width]}
            fitting = ["mlp", *backbones.image_names()]
            if self.config.rows:
                of_data, fitting = {"in_features": channels * width}, backbones.RECURRENT
        backbone, self.parents = make_backbone(settings.model, fitting, **of_data)
        self.players = {"model": Classifier(backbone, data.num_classes, settings.model.dropout)}

    def _shaped(self, inputs: Tensor) -> Tensor:
        """As the backbone takes them; as rows: (batch, height, channels * width)."""
        return inputs.transpose(1, 2).flatten(2) if self.config.rows else inputs

    def _logits(self, players: Players, inputs: Tensor) -> Tensor:
        return players["model"](self._shaped(self.normalize(inputs))).float()

    def loss(self, player: str, batch: Batch) -> Loss:
        labels, smoothing = batch["labels"], self.config.label_smoothing
        images = self.augment(self.normalize(batch["inputs"]))
        images, targets = self.augment.mix(images, labels, self.data.num_classes)
        logits, *aux = self.players[player](self._shaped(images), with_aux=True)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        metrics = {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}
        for other in aux:
            loss = loss + self.config.aux_weight * F.cross_entropy(other, targets, label_smoothing=smoothing)
        return Loss(loss, metrics)

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        right, loss, n = 0.0, 0.0, 0
        sums = []  # of each batch, which wait for the device once
        for batch in batches:
            logits, labels = self._logits(players, batch["inputs"]), batch["labels"]
            hits = (logits.argmax(1) == labels).sum()
            sums.append(torch.stack((hits.float(), F.cross_entropy(logits, labels, reduction="sum"))))
            n += len(labels)
        right, loss = torch.stack(sums).cpu().double().sum(0).tolist()
        return {"accuracy": right / n, "loss": loss / n}

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        return no_better_than_one_class(self.data, numbers["accuracy"])

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """The confusion matrix; of images also some, with what they were taken for, and the first kernels."""
        others = iter(batches)
        first = next(others)
        pairs = [
            torch.stack((batch["labels"], self._logits(players, batch["inputs"]).argmax(1))).cpu()
            for batch in chain([first], others)
        ]
        names = self.data.classes or tuple(map(str, range(self.data.num_classes)))
        yield from draw_confusion(torch.cat(pairs, 1), names, folder)
        if self.data.kind != "images":
            return
        images, labels = first["inputs"][:SHOWN], first["labels"][:SHOWN].tolist()
        found = self._logits(players, images).argmax(1).tolist()
        wrong = [a != b for a, b in zip(labels, found, strict=True)]
        titles = [
            names[b] if a == b else f"{names[b]} ({names[a]})" for a, b in zip(labels, found, strict=True)
        ]
        yield "samples", figures.image_grid(folder / "samples.png", images.cpu().numpy(), titles, wrong=wrong)
        looks = self._where_it_looks(players["model"], images)
        if looks is not None:
            yield "attention", figures.heat(folder / "attention.png", images.cpu().numpy(), looks)
        kernels = _first_kernels(players["model"])
        if kernels is not None:
            yield "filters", figures.filters(folder / "filters.png", kernels)

    def _where_it_looks(self, model: Any, images: Tensor) -> np.ndarray | None:
        """Of a ViT: how much each patch is attended to in the last block, (n, rows, columns)."""
        if not isinstance(model.backbone, ViT):
            return None
        maps = model.backbone.attention_maps(self.normalize(images))[:, -1].float().mean(1)
        rows, columns = (n // model.backbone.patches.stride[0] for n in images.shape[2:])
        looks = maps[:, 0, 1:] if model.backbone.class_token is not None else maps.mean(1)
        return looks.unflatten(1, (rows, columns)).cpu().numpy()

    def spec(self) -> dict[str, Any]:
        shape = list(self.data.train.tensors["inputs"].shape[1:])
        spec = {"classes": list(self.data.classes), "shape": shape, **self.normalize.spec()}
        return {**spec, **self.columns_spec()}

    def use_spec(self, spec: Mapping[str, Any]) -> None:
        self.normalize = self.normalize.like(spec)


def draw_confusion(
    pairs: Tensor, names: Sequence[str], folder: Path, most: int = MOST_CONFUSED
) -> Iterator[tuple[str, Path]]:
    """How often each class was taken for each: a matrix, of over `most` classes a table of those
    pairs of different classes that occur.

    Args:
        pairs: (2, n) int64: what samples are, and what they were taken for.
        names: of the classes.
        folder: for the figure.
        most: classes of a matrix, whose size is their square.
    """
    n = len(names)
    if n <= most:
        counts = (pairs[0] * n + pairs[1]).bincount(minlength=n * n).view(n, n)
        yield "confusion", figures.confusion(folder / "confusion.png", counts.numpy(), names)
        return
    found, counts = pairs[:, pairs[0] != pairs[1]].unique(dim=1, return_counts=True)
    rows = io.StringIO(newline="")
    writer = csv.writer(rows)
    writer.writerow(("is", "taken_for", "samples"))
    for i in counts.argsort(descending=True, stable=True).tolist():
        writer.writerow((names[int(found[0, i])], names[int(found[1, i])], int(counts[i])))
    write_atomic(folder / "confusion.csv", rows.getvalue().encode())
    yield "confusion", folder / "confusion.csv"


def _first_kernels(model: nn.Module) -> np.ndarray | None:
    """The kernels of the first convolution, at most 64, if they are large enough to show anything."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kernels = module.weight.detach()[:64]
            return kernels.float().cpu().numpy() if min(kernels.shape[2:]) >= 3 else None
    return None
