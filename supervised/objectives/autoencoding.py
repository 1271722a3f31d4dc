"""What an image was, from a corrupted one, by way of a backbone's features (Vincent et al. 2008, denoising
autoencoders): a backbone learns to see where nobody says what there is to see."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import LabError, first_line
from supervised import backbones, figures
from supervised.backbones.gan import grow
from supervised.config import AutoencodingRun
from supervised.data import DataSet, FrameSplit
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind
from supervised.objectives.generative import to_bytes

SHOWN = 10


class Autoencoder(nn.Module):
    """A backbone, and a decoder that restores from its features each pixel in units of its own deviation.

    Images of a game are nearly alike, and so are their features at first: only centred and stretched over the
    batch do they tell the decoder anything. Without that Pong's paddles take twice as many steps.

    Args:
        backbone, decoder: images 0..1 -> (batch, features) -> (batch, channels, height, width).
        mean, std: of each pixel over the data, (channels, height, width), 0..1.
    """

    def __init__(self, backbone: Any, decoder: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.stretch = nn.BatchNorm1d(backbone.num_features, affine=False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stretch(self.backbone(images).float())
        return self.decoder(features[:, :, None, None]).float()


class Autoencoding(Objective):
    """Mean squared error of pixels, each in units of its own standard deviation over the data.

    The trap of plain pixels: what matters in a game may be one pixel of thousands, as Pong's ball is, whose
    loss costs less than a blurred edge does. Where hardly ever anything is, little deviates: in its own units
    the ball there is as large as can be, and what never changes costs nothing.

    Judged on held-out images, corrupted too, by `r2`: which share of the deviation from the mean image is
    restored. Backbones see pixels of 0..1, as those of agents do.
    """

    headline = "r2"
    higher_is_better = True

    def __init__(self, settings: AutoencodingRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("images", "frames"), "autoencoding")
        if settings.data.augment.any:
            raise LabError("data.augment: what is shown is what is to be restored. Leave it out.")
        self.config = c = settings.objective
        split = data.train
        n = min(settings.batch_size or len(split), len(split))
        if n < 2 * settings.accumulate:
            raise LabError(
                f"batch_size: features are compared over a batch, and {n} images in {settings.accumulate} "
                "parts leave none to compare with. Make it larger, or accumulate smaller."
            )
        self.of_play = isinstance(split, FrameSplit)
        if c.foretell and not self.of_play:
            raise LabError(
                f"objective.foretell = {c.foretell}: is for frames of a game, and {data.name} holds "
                f"{data.kind}. Leave it out."
            )
        images = split.frames[:, None] if self.of_play else split.tensors["inputs"]
        height, width = images.shape[2:]
        self.seen = c.frames if self.of_play else images.shape[1]
        """Channels that the backbone sees; those behind them are foretold."""
        channels = self.seen + c.foretell
        backbone, self.parents = make_backbone(
            settings.model, backbones.image_names(), in_chans=self.seen, img_size=[height, width]
        )
        try:
            decoder = grow(backbone.num_features, (height, width), c.decoder_width, channels, "group")  # type: ignore[arg-type]
        except ValueError as error:
            raise LabError(f"data.source = {data.name!r}: {first_line(error)}. Use larger images.") from None
        mean, std = pixel_statistics(images)
        shape = (channels, height, width)
        mean, std = mean.expand(shape).clone(), std.clamp(min=c.least_std).expand(shape).clone()
        self.players = {"model": Autoencoder(backbone, decoder, mean, std)}

    def window(self, train: bool) -> int:
        return self.seen + self.config.foretell

    def _parts(
        self, model: Any, batch: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What was shown, 0..1; what of it was to be restored and what was, in units of deviations."""
        images = batch["frames" if self.of_play else "inputs"].float() / 255
        shown = self._corrupted(images[:, : self.seen], model.mean[: self.seen], generator)
        return shown, (images - model.mean) / model.std, model(shown)

    def _corrupted(self, images: Tensor, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Images with noise, and squares of them, of each channel others, put back to the mean image.

        With a generator, which is the CPU's, the same on all devices.
        """
        c, device = self.config, images.device
        n, channels, height, width = images.shape
        drawn_on = device if generator is None else torch.device("cpu")
        if c.noise:
            noise = torch.randn(images.shape, device=drawn_on, generator=generator)
            images = images + c.noise * noise.to(device)
        if not c.mask:
            return images
        rows, columns = (-(-side // c.patch) for side in (height, width))
        wiped = torch.rand(n, channels, rows, 1, columns, 1, device=drawn_on, generator=generator) < c.mask
        wiped = wiped.to(device).expand(-1, -1, -1, c.patch, -1, c.patch).flatten(4).flatten(2, 3)
        return torch.where(wiped[:, :, :height, :width], mean, images)

    def loss(self, player: str, batch: Batch) -> Loss:
        _, wanted, found = self._parts(self.players[player], batch)
        loss = (found - wanted).square().mean()
        return Loss(loss, {"loss": loss.detach()})

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss`; `r2`, and that of plain pixels; of frames not seen `r2_foretold`."""
        model: Any = players["model"]
        device = model.mean.device
        # Of each pixel: the squares of what was lost, and of what there was.
        lost, there = torch.zeros(2, *model.mean.shape, dtype=torch.float64, device=device)
        n = 0
        for number, batch in enumerate(batches):
            _, wanted, found = self._parts(model, batch, torch.Generator().manual_seed(number))
            lost += (found - wanted).square().sum(0, dtype=torch.float64)
            there += wanted.square().sum(0, dtype=torch.float64)
            n += len(wanted)

        def r2(weight: Any = 1.0, start: int = 0) -> float:
            parts = ((weight * squares)[start:].sum() for squares in (lost, there))
            left, whole = map(float, parts)
            return 1 - left / max(whole, 1e-12)

        numbers = {"r2": r2(), "loss": float(lost.mean()) / n, "r2_pixels": r2(model.std.double().square())}
        return numbers | ({"r2_foretold": r2(start=self.seen)} if self.config.foretell else {})

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Held-out images: as they were, as they were shown, as they were restored."""
        model: Any = players["model"]
        key = "frames" if self.of_play else "inputs"
        images = torch.cat([batch[key] for batch in batches])
        images = images[torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()]
        shown, wanted, found = self._parts(model, {key: images}, torch.Generator().manual_seed(0))
        wanted, found = (to_bytes(x * model.std + model.mean) for x in (wanted, found))
        # Of frames one behind the other the newest stands for all.
        newest = slice(self.seen - 1, self.seen) if self.of_play else slice(None)
        rows = [wanted[:, newest], to_bytes(shown)[:, newest], found[:, newest]]
        names = ["held out", "as shown", "restored"]
        if self.config.foretell:
            rows += [wanted[:, -1:], found[:, -1:]]
            names += ["later", "foretold"]
        path = folder / "restored.png"
        yield "restored", figures.mosaic(path, torch.stack(rows).cpu().numpy(), row_names=names)

    def spec(self) -> dict[str, Any]:
        """What the backbone is, for those who begin with it."""
        model: Any = self.players["model"]
        return {"backbone": self.settings.model.backbone, "backbone_spec": model.backbone.spec}


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each pixel, 0..1, over bytes (n, ...)."""
    total, squares = torch.zeros(2, *images.shape[1:], dtype=torch.float64)
    for chunk in images.split(1024):  # one at a time becomes float64
        values = chunk.double() / 255
        total += values.sum(0)
        squares += values.square().sum(0)
    mean = total / len(images)
    return mean.float(), (squares / len(images) - mean.square()).clamp(min=0).sqrt().float()
