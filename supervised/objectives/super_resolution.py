"""Images of more pixels from images of few (Ledig et al. 2016, arXiv 1609.04802)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.device import autocast
from lab.errors import LabError
from supervised import detection, figures
from supervised.config import SuperResolutionRun
from supervised.data import DataSet
from supervised.data.augment import Augment, carry, crop
from supervised.data.config import AugmentConfig
from supervised.models import make_backbone
from supervised.objectives.adversarial import critic_loss, frozen, generator_loss, make_critic, penalty_of
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind
from supervised.objectives.generative import to_bytes

SHOWN = 4
SSIM_WINDOW = 11
"""Side, pixels."""
LUMA = (65.481, 128.553, 24.966)
"""Of red, green and blue (ITU-R BT.601), which with 16 below them reach from 16 to 235."""


class Upscaler(nn.Module):
    """A backbone between images from 0 to 1, which it sees and makes as -1 to 1; or it makes what is added
    to a bicubic interpolation."""

    def __init__(self, backbone: Any, residual: bool) -> None:
        super().__init__()
        self.backbone, self.residual = backbone, residual

    def forward(self, images: Tensor) -> Tensor:
        made = self.backbone(2 * images - 1).float()
        if not self.residual:
            return (made + 1) / 2
        return made / 2 + F.interpolate(images, scale_factor=self.backbone.scale, mode="bicubic")


class SuperResolution(Objective):
    """By the pixels alone, judged by PSNR; or adversarially, from there on, judged by how the spectrum of its
    images differs from that of photographs, since the errors of pixels then grow.

    PSNR and SSIM are of the luma, without a border as wide as the scale (section 3.1).
    """

    def __init__(self, settings: SuperResolutionRun, data: DataSet) -> None:
        super().__init__(settings, data)
        self.config = c = settings.objective
        require_kind(data, ("images",), "super_resolution")
        if settings.data.augment != AugmentConfig(flip=settings.data.augment.flip):
            raise LabError("data.augment: super_resolution takes nothing but flip. Leave the rest out.")
        self.augment = Augment(settings.data.augment)
        channels, *sides = data.train.tensors["inputs"].shape[1:]
        backbone, self.parents = make_backbone(settings.model, ["srresnet"], in_chans=channels)
        self.scale = int(backbone.scale)  # type: ignore[arg-type]
        if c.patch % self.scale or c.patch > min(sides):
            raise LabError(
                f"objective.patch = {c.patch}: must be divisible by {self.scale}, and the images have "
                f"{' x '.join(map(str, sides))} pixels. Make it smaller, or data.img_size larger."
            )
        judged = [side - side % self.scale - 2 * self.scale for side in sides]
        if min(judged) < SSIM_WINDOW:
            raise LabError(
                f"data.img_size: of {' x '.join(map(str, sides))} pixels {' x '.join(map(str, judged))} are "
                f"judged, and SSIM needs {SSIM_WINDOW} a side. Make it larger."
            )
        self.players: dict[str, nn.Module] = {"generator": Upscaler(backbone, c.residual)}
        if c.adversarial_weight:
            size = {"in_chans": channels, "img_size": [c.patch, c.patch]}
            self.players["critic"] = make_critic(c.critic, c.loss, **size)
            # What it began with, for comparison: never moved, so that it needs no other run to be there.
            before, _ = make_backbone(settings.model, ["srresnet"], in_chans=channels)
            before.load_state_dict(backbone.state_dict())
            self.players["before"] = Upscaler(before, c.residual)
        self.headline = "spectral_distance" if c.adversarial_weight else "psnr"
        self.higher_is_better = not c.adversarial_weight
        self.perceive = Perception(c.judge, (channels, c.patch, c.patch)) if c.judge else None

    def turns(self, step: int) -> Sequence[str]:
        return ("critic", "generator") if "critic" in self.players else ("generator",)

    def _pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces of the images, small and large, from 0 to 1."""
        patch, n = self.config.patch, len(images)
        height, width = images.shape[2:]
        most = torch.tensor([[height - patch + 1], [width - patch + 1]])
        corners = (torch.rand(2, n) * most).long()
        pieces = crop(images, patch, patch, carry(corners, images.device)).float() / 255
        large = self.augment(pieces)
        return downscaled(large, self.scale), large

    def loss(self, player: str, batch: Batch) -> Loss:
        c = self.config
        small, large = self._pair(batch["inputs"])
        generator = self.players["generator"]
        if player == "critic":
            with torch.no_grad():
                made = generator(small)
            real, fake = 2 * large - 1, 2 * made - 1
            found = critic_loss(self.players["critic"], real, fake, c.loss, penalty_of(c))
            return Loss(found.value, {f"critic_{name}": value for name, value in found.metrics.items()})
        made = generator(small)
        difference = made - large
        pixels = difference.abs().mean() if c.pixel_loss == "l1" else difference.square().mean()
        metrics = {"loss": pixels.detach()}
        value = c.pixel_weight * pixels
        if self.perceive is not None:
            features = F.mse_loss(self.perceive(made), self.perceive(large))
            value = value + c.perceptual_weight * features
            metrics["perceptual_loss"] = features.detach()
        if "critic" in self.players:
            critic = self.players["critic"]
            with frozen(critic):
                verdict = generator_loss(critic, 2 * large - 1, 2 * made - 1, c.loss)
            value = value + c.adversarial_weight * verdict
            metrics["generator_loss"] = verdict.detach()
        return Loss(value, metrics)

    # ---- how good it is ----

    def _versions(self, players: Players, images: Tensor) -> dict[str, Tensor]:
        """Whole images by all means there are, and as they were, as bytes."""
        height, width = (side - side % self.scale for side in images.shape[2:])
        original = images[:, :, :height, :width]
        small = downscaled(original.float() / 255, self.scale)
        versions = {"bicubic": F.interpolate(small, scale_factor=self.scale, mode="bicubic")}
        versions |= {name: players[name](small) for name in ("before", "generator") if name in players}
        return {name: to_bytes(version) for name, version in versions.items()} | {"original": original}

    def _measured(self, versions: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Of each version but the original: how like that it is, by each measure, (batch,)."""
        bright = {name: _inside(luma(images), self.scale) for name, images in versions.items()}
        original = bright.pop("original")
        return {
            version: {name: measure(made, original) for name, measure in MEASURES.items()}
            for version, made in bright.items()
        }

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over the images; what stands for itself is the generator's."""
        found: dict[str, list[Tensor]] = {}
        for batch in batches:
            for version, numbers in self._measured(self._versions(players, batch["inputs"])).items():
                start = "" if version == "generator" else f"{version}_"
                for name, values in numbers.items():
                    found.setdefault(start + name, []).append(values)
        means = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        return dict(sorted(means.items(), key=lambda item: item[0].count("_")))

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """The held-out images hardest to interpolate, by all means there are, the numbers of each below."""
        images = torch.cat([batch["inputs"] for batch in batches])
        small = downscaled(images.float() / 255, self.scale)
        lost = F.interpolate(small, images.shape[2:], mode="bicubic") - images.float() / 255
        images = images[lost.square().flatten(1).mean(1).argsort(descending=True)[:SHOWN]]
        versions = self._versions(players, images)
        measured = self._measured(versions)
        learned = "by pixels and a discriminator" if "critic" in self.players else "by pixels"
        titles = {"before": "as it began", "generator": f"{self.settings.model.backbone}, {learned}"}
        columns = []
        for name, made in versions.items():
            numbers = measured.get(name)
            below = [""] * len(made)
            if numbers is not None:
                pairs = zip(numbers["psnr"].tolist(), numbers["ssim"].tolist(), strict=True)
                below = [f"{db:.2f} dB, SSIM {similar:.3f}" for db, similar in pairs]
            columns.append((titles.get(name, name), made.cpu().numpy(), below))
        yield "comparison", figures.side_by_side(folder / "comparison.png", columns)


class Perception:
    """What the last convolution of a run's classifier sees in images from 0 to 1 (section 2.2.1)."""

    def __init__(self, folder: str, shape: Sequence[int]) -> None:
        self.net, self.normalize, *_ = detection.open_classifier(folder, shape, any_size=True)
        self.seen: list[Tensor] = []
        convolutions = [m for m in self.net.backbone.modules() if isinstance(m, nn.Conv2d)]
        if not convolutions:
            raise LabError(f"objective.judge = {folder}: its backbone has no convolutions. Name another run.")
        computed: list[nn.Module] = []  # in the order of computation, auxiliary classifiers left out
        hooks = [m.register_forward_hook(lambda module, *_: computed.append(module)) for m in convolutions]
        with torch.no_grad():
            self.net.backbone(self.normalize(torch.zeros(1, *shape)))
        for hook in hooks:
            hook.remove()
        computed[-1].register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seen.append(output)

    def __call__(self, images: Tensor) -> Tensor:
        self.net.to(images.device).backbone(self.normalize(255 * images))
        return self.seen.pop().float()


def downscaled(images: Tensor, scale: int) -> Tensor:
    """Images from 0 to 1, `scale` times as small, bicubic with anti-aliasing; rounded to what bytes hold."""
    small = F.interpolate(images, scale_factor=1 / scale, mode="bicubic", antialias=True)
    return (small.clamp(0, 1) * 255).round() / 255


def luma(images: Tensor) -> Tensor:
    """How bright bytes are, (batch, 1, height, width) from 16 to 235; of one channel, that itself."""
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True)
    weights = torch.tensor(LUMA, device=images.device)[:, None, None] / 255
    return 16 + (images.float() * weights).sum(1, keepdim=True)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(255^2 / mean squared error), in dB, (batch,)."""
    error = (a - b).square().flatten(1).mean(1)
    return 10 * (255**2 / error.clamp(min=1e-10)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), (batch,), of one channel from 0 to 255.

    Means, variances and the covariance are of windows of 11 x 11 pixels, weighted by a Gaussian of standard
    deviation 1.5, that lie within the image.
    """
    a, b = a.double(), b.double()
    places = torch.arange(SSIM_WINDOW, device=a.device, dtype=a.dtype) - SSIM_WINDOW // 2
    bell = torch.exp(-(places**2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    with autocast(a.device.type, "fp32"):
        mean_a, mean_b, aa, bb, ab = F.conv2d(torch.cat((a, b, a * a, b * b, a * b)), window).chunk(5)
    var_a, var_b, covariance = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def spectral_distance(a: Tensor, b: Tensor) -> Tensor:
    """By how many dB images differ in the power of their frequencies, root mean square, (batch,).

    Blurred images lack high frequencies; texture at the wrong place, unlike with PSNR, is no fault.
    """
    difference = 10 * (_power(a) / _power(b)).log10()
    return difference.square().mean(1).sqrt()


MEASURES = {"psnr": psnr, "ssim": ssim, "spectral_distance": spectral_distance}


def _power(images: Tensor) -> Tensor:
    """(batch, bins): the mean power at each distance from frequency 0, itself left out."""
    height, width = images.shape[2:]
    window = torch.outer(torch.hann_window(height, False), torch.hann_window(width, False))
    spectrum = torch.fft.rfft2(images[:, 0] * window.to(images.device)).abs().square()
    distance = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    n_bins = min(height, width) // 2
    of_bin = (distance * 2 * n_bins).round() == torch.arange(1, n_bins + 1)[:, None, None]
    of_bin = of_bin.flatten(1).float().to(images.device)
    with autocast(images.device.type, "fp32"):
        return spectrum.flatten(1) @ (of_bin / of_bin.sum(1, keepdim=True)).T + 1e-3


def _inside(images: Tensor, border: int) -> Tensor:
    height, width = images.shape[2:]
    return images[:, :, border : height - border, border : width - border]
