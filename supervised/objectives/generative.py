"""What all objectives have in common that learn to make images."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.device import Compute
from lab.errors import LabError
from supervised import detection, figures
from supervised.data import DataSet
from supervised.objectives.base import Batch, Objective, Players, require_kind

SHOWN, COLUMNS = 80, 10
WALKS, WALK_STEPS = 6, 10


class Generative(Objective):
    """Makes samples. How good images are is measured in the same way, whatever makes them."""

    def __init__(self, settings: Any, data: DataSet) -> None:
        super().__init__(settings, data)
        c = settings.objective
        self.shape = data.train.tensors["inputs"].shape[1:]
        """Of a sample; of images (channels, height, width)."""
        self.samples: int = c.samples
        if c.conditional and not data.num_classes:
            raise LabError(f"objective.conditional: {data.name} has no labels. Leave it out.")
        self.classes_made = data.num_classes if c.conditional else 0
        """Classes that can be asked for; 0: none."""
        classes = data.classes if c.conditional else ()
        self.judge = detection.make_judge(c.judge, self.shape, classes)

    @abstractmethod
    def generate(self, players: Players, n: int, seed: int = 0) -> Tensor:
        """Samples in the form of the data's inputs, (n, ...), on the CPU; with classes, these in turn."""

    def labels(self, n: int) -> Tensor | None:
        """The classes in turn, (n,), if classes can be asked for."""
        return torch.arange(n) % self.classes_made if self.classes_made else None

    def spec(self) -> dict[str, Any]:
        return {"judge_sha256": self.judge.sha256} if self.judge.sha256 else {}

    # ---- how good they are ----

    @property
    def distance_name(self) -> str:
        """What the distance from real images is called: by what it is measured."""
        return f"frechet_{self.judge.kind}"

    def distance(self, players: Players) -> dict[str, float]:
        """How far generated images are from those learned from, by features."""
        return self.judged(self.generate(players, self.samples))

    def judged(self, images: Tensor) -> dict[str, float]:
        """How far these, by `generate`, are from images learned from, by features; and `recognised`."""
        device = device_of(self.players)
        made = detection.in_batches(self.judge.features, images, device)
        numbers = {self.distance_name: detection.frechet_distance(self._real[0], made)}
        return numbers | self.recognised(images, device)

    def recognised(self, images: Tensor, device: torch.device) -> dict[str, float]:
        """Of images by `generate`: which share the judge takes for the class that was asked for."""
        labels = self.labels(len(images))
        if labels is None or self.judge.classify is None:
            return {}
        found = detection.in_batches(self.judge.classify, images, device)
        return {"recognised": float((found == labels).float().mean())}

    @cached_property
    def _real(self) -> tuple[Tensor, Tensor]:
        """Features of images learned from, and of as many held-out ones as there are."""
        splits, device = (self.data.train, self.data.test), device_of(self.players)
        images = [detection.some(split.tensors["inputs"], self.samples) for split in splits]
        train, test = (detection.in_batches(self.judge.features, part, device) for part in images)
        return train, test

    def examine(self, players: Players, compute: Compute) -> tuple[dict[str, float], list[str]]:
        if self.data.kind != "images":
            return {}, []
        with torch.no_grad(), compute.autocast():
            began = time.perf_counter()
            images = self.generate(players, self.samples)
            seconds = time.perf_counter() - began
            numbers = self.judged(images)
            numbers["ms_to_sample_one"] = 1000 * seconds / self.samples
            numbers[f"{self.distance_name}_floor"] = detection.frechet_distance(*self._real)
            data = detection.real_versus_generated(
                self.data, lambda n, seed: self.generate(players, n, seed), self.samples
            )
        told = detection.two_sample_test(data, compute)
        numbers |= {
            "detector_accuracy": told.point,
            "detector_accuracy_low": told.low,
            "detector_accuracy_high": told.high,
        }
        n_real, n_held_out = (len(features) for features in self._real)
        return numbers, [
            f"{self.distance_name}: {self.samples:,} generated images and {n_real:,} learned from, by "
            f"{self.judge.said}; its floor: {n_held_out:,} held-out images and the same",
            f"detector_accuracy: of a {detection.DETECTOR} on {len(data.test):,} held-out images, half of "
            f"them generated, after {detection.DETECTOR_EPOCHS:g} epochs on {len(data.train):,} (chance 0.5)",
        ]


class Decoder(Generative):
    """Makes images of rows of noise, at once."""

    latent: int
    """Numbers of noise an image is made from."""

    def __init__(self, settings: Any, data: DataSet) -> None:
        require_kind(data, ("images",), settings.objective.name)
        if settings.data.augment.any:
            raise LabError("data.augment: what is learned from is what will be made. Leave it out.")
        super().__init__(settings, data)

    @abstractmethod
    def decode(self, players: Players, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Images (batch, channels, height, width), 0 to 1, of noise (batch, latent).

        `labels` (batch,) say of which class, where `classes_made` is not 0.
        """

    def noise(self, n: int, seed: int) -> Tensor:
        """(n, latent) of a standard normal, the same on every device."""
        return torch.randn(n, self.latent, generator=torch.Generator().manual_seed(seed))

    def generate(self, players: Players, n: int, seed: int = 0) -> Tensor:
        return self._made(players, self.noise(n, seed), self.labels(n))

    @torch.no_grad()
    def _made(self, players: Players, latents: Tensor, labels: Tensor | None) -> Tensor:
        made, device = [], device_of(players)
        for start in range(0, len(latents), detection.BATCH):
            rows = slice(start, start + detection.BATCH)
            wanted = None if labels is None else labels[rows].to(device)
            made.append(to_bytes(self.decode(players, latents[rows].to(device), wanted)).cpu())
        return torch.cat(made)

    # ---- pictures ----

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Images made, and images on the way from one noise to another."""
        images = self.generate(players, SHOWN).unflatten(0, (-1, COLUMNS)).numpy()
        yield "samples", figures.mosaic(folder / "samples.png", images)
        ends = self.noise(2 * WALKS, seed=1)
        steps = torch.linspace(0, 1, WALK_STEPS)
        walk = torch.cat([_between(a, b, steps) for a, b in ends.split(2)])
        labels = None
        if self.classes_made:
            labels = (torch.arange(WALKS) % self.classes_made).repeat_interleave(WALK_STEPS)
        images = self._made(players, walk, labels).unflatten(0, (-1, WALK_STEPS)).numpy()
        yield "interpolation", figures.mosaic(folder / "interpolation.png", images)


def device_of(players: Players) -> torch.device:
    """Where the players are."""
    return next(next(iter(players.values())).parameters()).device


def to_bytes(images: Tensor) -> Tensor:
    """0 to 1 as uint8."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _between(a: Tensor, b: Tensor, steps: Tensor) -> Tensor:
    """From a to b along an arc, (steps, latent): on a straight line the noise would become too small
    (arXiv 1609.04468, section 2.1)."""
    # No matrix products, which autocast would round.
    angle = torch.arccos(((a * b).sum() / a.norm() / b.norm()).clamp(-1, 1))
    shares = torch.sin(torch.stack((1 - steps, steps), 1) * angle) / angle.sin()
    return shares[:, :1] * a + shares[:, 1:] * b
