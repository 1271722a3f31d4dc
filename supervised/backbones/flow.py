"""A normalizing flow: RealNVP (Dinh et al. 2016, arXiv 1605.08803) with the layers of Glow (Kingma & Dhariwal
2018, arXiv 1807.03039).

Every layer maps its input to as many numbers, can be undone, and knows the logarithm of its determinant: so
the density of an image is that of standard normal noise, times the product of the determinants.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.device import autocast
from supervised.backbones.layers import require_least, require_positive

LARGEST_LOG_SCALE = 2.0


class Logit(nn.Module):
    """From (0, 1) to all real numbers, by logit(edge + (1 - 2 edge) x) (RealNVP, section 4.1)."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.edge + (1 - 2 * self.edge) * x
        # d logit(p) / dp = 1 / (p (1 - p))
        log_det = math.log(1 - 2 * self.edge) - p.log() - (1 - p).log()
        return p.logit(), log_det.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.edge) / (1 - 2 * self.edge)


class Squeeze(nn.Module):
    """Blocks of 2x2 pixels become four channels (RealNVP, section 3.6)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, 2)


class ActNorm(nn.Module):
    """A scale and a shift for each channel, which begin such that the first batch comes out as mean 0 and
    variance 1 (Glow, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
        self.log_scale.copy_(-(std + 1e-6).log()[:, None, None])
        self.shift.copy_(-mean[:, None, None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        return (x + self.shift) * self.log_scale.exp(), (pixels * self.log_scale.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.shift


class Mix(nn.Module):
    """A 1x1 convolution that begins as a random rotation of the channels; its matrix is kept as
    P L (U + diag s), of which the determinant is the product of s (Glow, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.permutation: Tensor
        self.sign: Tensor
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())

    def _factors(self) -> tuple[Tensor, Tensor]:
        one = torch.eye(len(self.log_s), device=self.log_s.device)
        return self.lower.tril(-1) + one, self.upper.triu(1) + (self.sign * self.log_s.exp()).diag()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        with autocast(x.device.type, "fp32"):  # what is lost here, the inverse cannot give back
            lower, upper = self._factors()
            mixed = F.conv2d(x, (self.permutation @ lower @ upper)[:, :, None, None])
        return mixed, (pixels * self.log_s.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        solve = torch.linalg.solve_triangular
        with autocast(y.device.type, "fp32"):
            lower, upper = self._factors()
            matrix = solve(lower, self.permutation.T, upper=False, unitriangular=True)
            return F.conv2d(y, solve(upper, matrix, upper=True)[:, :, None, None])


def _bounded(log_scale: Tensor) -> Tensor:
    """Between `LARGEST_LOG_SCALE` and its negative; small ones as they are."""
    return LARGEST_LOG_SCALE * (log_scale / LARGEST_LOG_SCALE).tanh()


class Coupling(nn.Module):
    """Half of the channels, scaled and shifted by what a net says of the others (RealNVP, section 3.2).

    The net's last layer begins at zero, so the layer begins as the identity (Glow, section 3.3). Of classes,
    the net is told by a vector that is added to what its first layer says.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int = 0, kernel_size: int = 3) -> None:
        super().__init__()
        self.kept, around = channels - channels // 2, kernel_size // 2
        self.net = nn.Sequential(
            nn.Conv2d(self.kept, hidden, kernel_size, padding=around),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 2 * (channels - self.kept), kernel_size, padding=around),
        )
        self.of_class = nn.Embedding(num_classes, hidden) if num_classes else None
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def _told(self, kept: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.net[0](kept)
        if self.of_class is not None and labels is not None:
            x = x + self.of_class(labels)[:, :, None, None].to(x.dtype)
        log_scale, shift = self.net[1:](x).to(kept.dtype).chunk(2, 1)
        return _bounded(log_scale), shift

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self._told(kept, labels)
        changed = (changed + shift) * log_scale.exp()
        return torch.cat((kept, changed), 1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        kept, changed = y[:, : self.kept], y[:, self.kept :]
        log_scale, shift = self._told(kept, labels)
        return torch.cat((kept, changed * (-log_scale).exp() - shift), 1)


class ClassNormal(nn.Module):
    """A scale and a shift of each number for each class: the noise of a class is a normal distribution of its
    own (Glow, its published code's `learn_top` and `ycond`)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.of_class = nn.Embedding(num_classes, 2 * features)
        nn.init.zeros_(self.of_class.weight)

    def _told(self, labels: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        log_scale, mean = (part.reshape(shape) for part in self.of_class(labels).chunk(2, 1))
        return _bounded(log_scale), mean

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, mean = self._told(labels, x.shape)
        return (x - mean) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, labels: Tensor) -> Tensor:
        log_scale, mean = self._told(labels, y.shape)
        return y * log_scale.exp() + mean


KNOW_CLASSES: tuple[type[Any], ...] = (Coupling, ClassNormal)


class Steps(nn.ModuleList):
    """Layers one behind the other; those that know classes are told which it is."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for layer in self:
            x, more = layer(x, labels) if isinstance(layer, KNOW_CLASSES) else layer(x)
            log_det = log_det + more
        return x, log_det

    def inverse(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        layers: list[Any] = list(self)
        for layer in reversed(layers):
            y = layer.inverse(y, labels) if isinstance(layer, KNOW_CLASSES) else layer.inverse(y)
        return y


def steps(
    channels: int, depth: int, hidden: int, num_classes: int = 0, kernel_size: int = 3
) -> Iterator[nn.Module]:
    """`depth` times a scale and shift, a mixing of the channels and a coupling (Glow, figure 2a)."""
    for _ in range(depth):
        yield from (ActNorm(channels), Mix(channels), Coupling(channels, hidden, num_classes, kernel_size))


class Flow(nn.Module):
    """Images to noise and back.

    Each level makes four channels of every 2x2 pixels, and takes them through some times a scale and
    shift, a mixing of channels and a coupling. Behind each level but the last, half of the channels are
    finished: what is left of them beyond what the other half says (a coupling) is noise (RealNVP, section
    3.6; Glow, figure 2b).

    Args:
        in_chans: channels of the images.
        img_size: height and width of the images, divisible by 2 ** levels.
        levels: how often the image is halved.
        depth: steps of each level, or of every level.
        hidden: width of the nets in the couplings.
        edge: how far pixels stay from 0 and 1 in front of the logit. Where many pixels are black (MNIST's
            kind), a small one, e.g. 1e-3, spreads what is alike to rounding.
        num_classes: that images are of; 0: they have no labels.

    Shapes: images (batch, in_chans, height, width), 0 to 1, and with classes labels (batch,) -> noise (batch,
    in_chans * height * width), and the logarithm of the determinant (batch,).

    Raises:
        ValueError: an image that cannot be halved so often.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        levels: int = 2,
        depth: int | Sequence[int] = 8,
        hidden: int = 64,
        edge: float = 0.05,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        depths = [depth] * levels if isinstance(depth, int) else list(depth)
        require_positive(in_chans=in_chans, levels=levels, depth=depths, hidden=hidden)
        if len(depths) != levels:
            raise ValueError(f"depth {depths} has no number for each of {levels} levels")
        if not 0 < edge < 0.5:
            raise ValueError(f"edge {edge} must be above 0 and below 0.5")
        height, width = require_least(img_size, 2**levels)
        if height % 2**levels or width % 2**levels:
            raise ValueError(f"img_size {img_size} cannot be halved {levels} times: use fewer levels")
        self.shape = (in_chans, height, width)
        self.logit = Logit(edge)
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList()
        self.shapes: list[tuple[int, int, int]] = []
        """Of what is finished behind each level, (channels, height, width)."""
        channels = in_chans
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            self.levels.append(Steps([Squeeze(), *steps(channels, depths[level], hidden, num_classes)]))
            if level < levels - 1:
                self.splits.append(Coupling(channels, hidden, num_classes))
                channels //= 2
            self.shapes.append((channels, height, width))
        self.num_features = sum(map(math.prod, self.shapes))
        self.num_classes = num_classes
        self.prior = Steps([ClassNormal(self.num_features, num_classes)] if num_classes else [])

    def example(self) -> tuple[Tensor, ...]:
        weight = next(self.parameters())
        images = weight.new_zeros(1, *self.shape)
        return (images, weight.new_zeros(1, dtype=torch.long)) if self.num_classes else (images,)

    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Sets scales and shifts by a batch, layer after layer; once, before training."""

        def by_what_comes_in(layer: Any, inputs: tuple[Tensor]) -> None:
            layer.initialize(*inputs)

        hooks = [
            module.register_forward_pre_hook(by_what_comes_in)
            for module in self.modules()
            if isinstance(module, ActNorm)
        ]
        with torch.no_grad():
            self(images, labels)
        for hook in hooks:
            hook.remove()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.logit(images)
        finished = []
        for level, layers in enumerate(self.levels):
            x, more = layers(x, labels)
            log_det = log_det + more
            if level < len(self.splits):
                x, more = self.splits[level](x, labels)
                log_det = log_det + more
                x, noise = x.chunk(2, 1)
                finished.append(noise.flatten(1))
        noise, more = self.prior(torch.cat([*finished, x.flatten(1)], 1), labels)
        return noise, log_det + more

    def inverse(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The images that noise (batch, in_chans * height * width) stands for."""
        noise = self.prior.inverse(noise, labels)
        parts = [
            part.unflatten(1, shape)
            for part, shape in zip(noise.split([*map(math.prod, self.shapes)], 1), self.shapes, strict=True)
        ]
        x = parts.pop()
        for level in reversed(range(len(self.levels))):
            if level < len(self.splits):
                split: Any = self.splits[level]
                x = split.inverse(torch.cat((x, parts.pop()), 1), labels)
            layers: Any = self.levels[level]
            x = layers.inverse(x, labels)
        return self.logit.inverse(x)

    def log_density(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Nats, (batch,): of the density over (0, 1) to the power of the number of pixels and channels."""
        return log_density(*self(images, labels))


def log_density(noise: Tensor, log_det: Tensor) -> Tensor:
    """Nats, (batch,), of what a flow returned: the noise's under a standard normal, and the determinant's."""
    return log_det - 0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
