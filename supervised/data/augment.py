"""Data brought to mean 0 and variance 1, and images changed at random, in batches on the device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from supervised.data.config import AugmentConfig


class Normalize:
    """Subtracts the mean and divides by the standard deviation, of each channel, column or feature.

    Backbones never do this: whoever feeds them does.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)
        self._there: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, data: Tensor) -> "Normalize":
        """By the data themselves: images (n, channels, height, width), tables (n, columns) or sequences (n,
        time, features). A constant becomes 0, in whatever units the data are."""
        data = data.transpose(1, 2) if data.dim() == 3 else data
        n = data.numel() / data.shape[1]
        chunks = data.transpose(0, 1).flatten(1).split(2**20, dim=1)  # one at a time becomes float64
        zero = torch.zeros(data.shape[1], dtype=torch.float64)
        mean = sum((chunk.double().sum(1) for chunk in chunks), zero) / n
        squares = ((chunk.double() - mean[:, None]).square().sum(1) for chunk in chunks)
        std = (sum(squares, zero) / n).sqrt()
        varies = std > torch.clamp(1e-12 * mean.abs(), min=1e-37)  # of which float32 has the inverse
        return cls(mean.tolist(), torch.where(varies, std, 1.0).tolist())

    def like(self, spec: Any) -> "Normalize":
        """The one that a checkpoint's `spec` describes, for data of the same width.

        Raises:
            ValueError: it describes none.
        """
        try:
            mean, std = ([float(number) for number in spec[key]] for key in ("mean", "std"))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(error) from None
        if not len(mean) == len(std) == len(self.mean) or not all(map(math.isfinite, mean + std)) or 0 in std:
            raise ValueError("not as many numbers as there are channels, columns or features")
        return Normalize(mean, std)

    def __call__(self, data: Tensor) -> Tensor:
        mean, scale = self._on(data)
        return (data.float() - mean) * scale

    def undo(self, data: Tensor) -> Tensor:
        """Back to where the data came from."""
        mean, scale = self._on(data)
        return data / scale + mean

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild it, as JSON."""
        return {"mean": self.mean, "std": self.std}

    def _on(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std, on the data's device and in their shape."""
        key = (data.device, data.dim())
        if key not in self._there:
            shape = (-1,) if data.dim() == 3 else (-1, *[1] * (data.dim() - 2))
            mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
            self._there[key] = (mean.to(data.device), (1 / std).to(data.device))
        return self._there[key]


class Augment:
    """Changes normalised images at random, each otherwise.

    All is drawn on the CPU, from the generator given or torch's own, and carried to the device: so the draws
    are the same on every device, and nothing waits for it.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Shift, flip and cutout of (batch, channels, height, width)."""
        c, n, device = self.config, len(images), images.device
        if c.shift:
            moves = torch.randint(2 * c.shift + 1, (2, n), generator=generator)
            images = shift(images, c.shift, carry(moves, device))
        if c.flip:
            mirrored = carry(torch.rand(n, generator=generator) < 0.5, device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if c.cutout:
            height, width = images.shape[2:]
            centre = torch.rand(2, n, generator=generator) * torch.tensor([[height], [width]])
            sides = torch.full((2, n), float(c.cutout))
            images = images.masked_fill(carry(_boxes(centre.floor(), sides, height, width), device), 0)
        return images

    def mix(
        self, images: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixup or cutmix of images with others of the batch.

        Returns:
            The images, and the labels as probabilities (batch, num_classes); without either, both as they
            came, so that cross entropy takes what it is given.
        """
        alpha = self.config.mixup or self.config.cutmix
        if not alpha:
            return images, labels
        n, device = len(images), images.device
        partner = carry(torch.randperm(n, generator=generator), device)
        alphas = torch.full((2, n), float(alpha))
        # torch.distributions draws with this, too, but from the global generator alone.
        gammas = torch._standard_gamma(alphas, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        kept = gammas[0].clamp_min(1e-30) / gammas.clamp_min(1e-30).sum(0)
        if self.config.mixup:
            share = carry(kept, device)[:, None, None, None]
            mixed = images * share + images.index_select(0, partner) * (1 - share)
        else:
            height, width = images.shape[2:]
            size = torch.tensor([[height], [width]])
            centre = (torch.rand(2, n, generator=generator) * size).floor()
            boxes = _boxes(centre, (1 - kept).sqrt() * size, height, width)
            kept = 1 - boxes.flatten(1).float().mean(1)  # what lies outside the image does not count
            mixed = torch.where(carry(boxes, device), images.index_select(0, partner), images)
        share = carry(kept, device)[:, None]
        # Not F.one_hot: it asks the device for the largest label.
        target = (labels[:, None] == torch.arange(num_classes, device=device)).float()
        return mixed, target * share + target.index_select(0, partner) * (1 - share)


def shift(images: Tensor, padding: int, moves: Tensor) -> Tensor:
    """Crops of zero-padded images, as large as they were.

    Args:
        images: (batch, channels, height, width).
        padding: pixels on each side.
        moves: (2, batch), 0 to 2 * padding: where each crop begins, down and right.
    """
    height, width = images.shape[2:]
    return crop(F.pad(images, (padding,) * 4), height, width, moves)


def crop(images: Tensor, height: int, width: int, corners: Tensor) -> Tensor:
    """A piece of each image, (batch, channels, height, width).

    Args:
        images: (batch, channels, ...), of any type.
        corners: (2, batch): where each piece begins, down and right.
    """
    crops = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: all crops there are
    return crops[torch.arange(len(images), device=images.device), :, corners[0], corners[1]]


def _boxes(centre: Tensor, sides: Tensor, height: int, width: int) -> Tensor:
    """(batch, 1, height, width): True within rectangles, given as (2, batch) each, down and right."""
    first = (centre - sides / 2).round()
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= first[0, :, None]) & (y < (first[0] + sides[0].round())[:, None])
    columns = (x >= first[1, :, None]) & (x < (first[1] + sides[1].round())[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def carry(drawn: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
