"""Is it real? How well generated images can be told from real ones, and how far apart their features are."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lab import checkpoint, config
from lab.device import Compute, DeviceConfig, autocast
from lab.errors import LabError
from lab.run import Run
from lab.statistics import Interval, wilson_interval
from supervised import backbones
from supervised.classifier import Classifier
from supervised.config import (
    ClassificationConfig,
    ClassificationRun,
    ModelConfig,
    OptimizerConfig,
    run_config_class,
)
from supervised.data import DataSet, TensorSplit
from supervised.data.augment import Normalize
from supervised.data.config import AugmentConfig, DataConfig
from supervised.models import make_backbone
from supervised.trainer import Trainer, part_of

BATCH = 500
POOLED = 8
"""Cells a side that pixels are averaged to where no classifier gives features."""
FLOOR_SEED = 0

DETECTOR = "resnet8"
DETECTOR_EPOCHS = 10.0


# ---- how far apart ----


class Judge(NamedTuple):
    """What images are compared by."""

    kind: str
    """"features" or "pixels"."""
    features: Callable[[Tensor], Tensor]
    """(batch, channels, height, width) uint8 -> (batch, numbers) float32."""
    classify: Callable[[Tensor], Tensor] | None = None
    """The same -> the classes they are taken for, (batch,) int64."""
    said: str = ""
    """What this is, for people."""
    sha256: str = ""
    """Of the classifier's weights, if there is one."""


def make_judge(folder: str | None, shape: Sequence[int], classes: Sequence[str] = ()) -> Judge:
    """The features of a run's classifier, or without a run the pixels, averaged to at most 8x8.

    Args:
        folder: of a finished run of classification on images of this shape.
        shape: (channels, height, width).
        classes: which it has to know; empty: whichever.

    Raises:
        LabError: the run is none of classification, or of images of another shape or other classes.
    """
    if folder is None:
        return Judge("pixels", _pooled, said=f"pixels averaged to {POOLED} x {POOLED} cells at most")
    net, normalize, said, sha256 = open_classifier(folder, shape, classes)

    # At full precision: the number is compared with others, from other machines.
    def features(images: Tensor) -> Tensor:
        with autocast(images.device.type, "fp32"):
            return net.to(images.device).backbone(normalize(images))

    def classify(images: Tensor) -> Tensor:
        return net.head(features(images)).argmax(1)

    return Judge("features", features, classify, said, sha256)


def open_classifier(
    folder: str, shape: Sequence[int], classes: Sequence[str] = (), any_size: bool = False
) -> tuple[Any, Normalize, str, str]:
    """The best classifier of the run that `objective.judge` names, frozen; what to do with images (0 to 255)
    before; what it is; and the hash of its weights.

    Args:
        any_size: its features are wanted, at whatever size it can look at, and not its verdict.

    Raises:
        LabError: the run is none of classification, or of images of another shape or other classes.
    """
    run = Run.named_by("objective.judge", Path(folder))
    values, source = run.info["config"], str(run.folder / "run.json")
    name = values.get("objective", {}).get("name")
    if name != "classification":
        raise LabError(
            f"objective.judge = {folder}: its objective is {name!r}. Name a run of classification."
        )
    settings = config.build(run_config_class(values, lambda _: source), values, {}, source)
    saved = checkpoint.load(run.find_checkpoint("best"))
    spec = saved.state["spec"]
    wrong = LabError(
        f"objective.judge = {folder}: its classifier does not know images of {' x '.join(map(str, shape))}, "
        "or not these classes. Name a run of classification on the same data."
    )
    channels = Normalize([0.0] * shape[0], [1.0] * shape[0])
    try:
        normalize = channels.like(spec)
    except ValueError:
        raise wrong from None
    known = [shape[0], *(shape[1:] if any_size else spec.get("shape", shape)[1:])]
    if known != list(shape) or (classes and list(classes) != spec["classes"]):
        raise wrong
    model = dataclasses.replace(settings.model, start_from=None)
    size = {"in_chans": shape[0], "img_size": list(shape[1:])}
    net: Any = Classifier(
        make_backbone(model, ["mlp", *backbones.image_names()], **size)[0], len(spec["classes"])
    )
    try:
        net.load_state_dict(part_of(saved.weights(), "model"))
    except RuntimeError:
        raise wrong from None
    sha256 = checkpoint.weights_hash(saved.path)
    n = net.backbone.num_features
    said = f"{n} features of {run.info['name']} ({settings.model.backbone}, weights {sha256})"
    return net.eval().requires_grad_(False), normalize, said, sha256


def _pooled(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    cells = (min(height, POOLED), min(width, POOLED))
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, cells).flatten(1)


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """What a function makes of images, a batch at a time on the device; the results are on the CPU."""
    return torch.cat([function(part.to(device)).cpu() for part in images.split(BATCH)])


def some(images: Tensor, n: int, seed: int = FLOOR_SEED) -> Tensor:
    """At most `n` of the images, at random, always the same ones."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n]]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features, (n, numbers) each.

    The squared Wasserstein distance of two normal distributions (Dowson & Landau 1982); of features of
    Inception-v3 it is called FID (arXiv 1706.08500). It shrinks with more samples: compare like with like.
    """
    a, b = a.double(), b.double()
    of_a, of_b = (features.T.cov().reshape(2 * features.shape[1:]) for features in (a, b))
    root = _square_root(of_a)
    both = torch.linalg.eigvalsh(root @ of_b @ root).clamp(min=0).sqrt().sum()
    spread = a.var(0).sum() + b.var(0).sum() - 2 * both
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


# ---- a classifier two-sample test ----


def real_versus_generated(real: DataSet, generate: Callable[[int, int], Tensor], samples: int) -> DataSet:
    """A data set of two classes, of equal size in both of its parts: images of a generator, and real ones.

    Args:
        real: its held-out images are what the held-out generated ones are to be told from.
        generate: makes n images (n, channels, height, width) uint8 from a seed.
        samples: of each class and part, at most.
    """
    parts = []
    for seed, split in enumerate((real.train, real.test), start=1):
        true = some(split.tensors["inputs"], samples)
        made = generate(len(true), seed).cpu()
        labels = torch.arange(2).repeat_interleave(len(true))
        parts.append(TensorSplit({"inputs": torch.cat((made, true)), "labels": labels}))
    return dataclasses.replace(
        real, kind="images", train=parts[0], test=parts[1], classes=("generated", "real")
    )


def two_sample_test(data: DataSet, compute: Compute) -> Interval:
    """How many held-out images a small classifier calls rightly real or generated (arXiv 1610.06545).

    0.5 is as good as tossing a coin: then it cannot tell them apart. The classifier, a ResNet-8, and how it
    is trained are always the same, so that generators can be compared.

    Args:
        data: of `real_versus_generated`.
        compute: where.

    Returns:
        The share, with its 95% interval.
    """
    from supervised.objectives.classification import Classification

    settings = ClassificationRun(
        objective=ClassificationConfig(),
        data=DataConfig(source=data.name, augment=AugmentConfig(shift=1, flip=True)),
        model=ModelConfig(backbone=DETECTOR),
        epochs=DETECTOR_EPOCHS,
        ema_decay=0.99,
        optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=5e-2, warmup_steps=50),
        device=DeviceConfig(),
    )
    torch.manual_seed(settings.seed)
    objective = Classification(settings, data)
    trainer = Trainer(objective, objective.batches("train", compute.device), settings, compute)
    for _ in trainer.iterate():
        pass
    with trainer.judged() as players:
        numbers = objective.evaluate(players, objective.batches("test", compute.device).epoch(0))
    n = len(data.test)
    return wilson_interval(round(numbers["accuracy"] * n), n)
