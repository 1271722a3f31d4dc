"""Pairs of a generator and a discriminator: DCGAN's (Radford et al. 2015, arXiv 1511.06434) and SRGAN's
(Ledig et al. 2016, arXiv 1609.04802).

Where nothing but single samples may be looked at, as under a penalty on the gradient of each sample, the
discriminators take `norm=None`, "group" or "spectral" in place of "batch".
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from supervised.backbones.layers import make_norm, require_least, require_positive

SLOPE = 0.2
"""Of the discriminators' leaky ReLUs, for both papers."""
LEAST = 8
PIECE = 96
"""Side of what SRGAN learned from (section 3.2), pixels."""


def halvings(img_size: int | Sequence[int]) -> list[tuple[int, int]]:
    """The sizes (height, width) of an image halved again and again, itself first, down to 4 to 7 pixels.

    Odd sizes are rounded down: 28, 14, 7; 64, 32, 16, 8, 4; 84, 42, 21, 10, 5.

    Raises:
        ValueError: the image has less than 8 pixels a side.
    """
    sizes = [require_least(img_size, LEAST)]
    while min(sizes[-1]) >= LEAST:
        height, width = sizes[-1]
        sizes.append((height // 2, width // 2))
    return sizes


class _Conv(nn.Sequential):
    """A convolution and what follows it."""

    def __init__(self, conv: nn.Module, norm: str | None, channels: int, activation: nn.Module) -> None:
        if norm == "spectral":  # arXiv 1802.05957
            super().__init__(spectral_norm(conv), activation)
        else:
            super().__init__(conv, make_norm(norm, channels), activation)


class Residual(nn.Module):
    """Two convolutions of 3x3 beside the identity, nothing behind the sum (SRGAN, figure 4)."""

    def __init__(self, width: int, norm: str | None, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(_conv3(width, width), norm, width, activation),
            _Conv(_conv3(width, width), norm, width, nn.Identity()),
        )

    def silence(self) -> None:
        """Lets it begin as the identity, so that sums over many blocks begin no larger than one."""
        last: Any = self.layers[-1]
        conv, norm, _ = last
        nn.init.zeros_(getattr(norm, "weight", conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1)


def shrink(
    in_chans: int,
    img_size: int | Sequence[int],
    width: int,
    num_outputs: int,
    norm: str | None,
    depth: int = 0,
) -> nn.Sequential:
    """Images to vectors: (batch, in_chans, height, width) -> (batch, num_outputs, 1, 1).

    Each convolution of 4x4 by 2 halves the image and doubles the channels, with `depth` residual blocks
    behind it; the last one sees it all.
    """
    sizes, layers, before = halvings(img_size), nn.Sequential(), in_chans
    bias = norm in (None, "spectral")
    for stage in range(len(sizes) - 1):
        after = width * 2**stage
        conv = nn.Conv2d(before, after, 4, 2, 1, bias=bias)
        # The first layer is not normalised (section 3).
        kind = None if stage == 0 and norm != "spectral" else norm
        layers.append(_Conv(conv, kind, after, nn.LeakyReLU(SLOPE)))
        layers.extend(Residual(after, norm, nn.LeakyReLU(SLOPE)) for _ in range(depth))
        before = after
    last = nn.Conv2d(before, num_outputs, sizes[-1], bias=bias)
    layers.append(spectral_norm(last) if norm == "spectral" else last)
    return layers


def grow(
    latent: int, img_size: int | Sequence[int], width: int, out_chans: int, norm: str | None, depth: int = 0
) -> nn.Sequential:
    """Vectors to images, the other way round: (batch, latent, 1, 1) -> (batch, out_chans, height, width)."""
    if norm == "spectral":
        raise ValueError("norm 'spectral' is of discriminators: use 'batch', 'group' or None")
    sizes = halvings(img_size)[::-1]
    widths = [width * 2**stage for stage in range(len(sizes) - 1)][::-1]
    bias = norm is None
    layers = nn.Sequential()
    conv = nn.ConvTranspose2d(latent, widths[0], sizes[0], bias=bias)
    for (before, after), (height, side) in zip(
        itertools.pairwise([*widths, out_chans]), sizes[1:], strict=True
    ):
        layers.append(_Conv(conv, norm, before, nn.ReLU()))
        layers.extend(Residual(before, norm, nn.ReLU()) for _ in range(depth))
        odd = (height % 2, side % 2)
        conv = nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=odd, bias=bias)
    layers.append(conv)
    return layers


def init_dcgan(net: nn.Module) -> None:
    """Initial weights of standard deviation 0.02 (section 4), those of batch norms around 1."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)


class DCGANGenerator(nn.Module):
    """Images from noise: transposed convolutions of 4x4 by 2, from 4 to 7 pixels a side upwards.

    Args:
        in_chans: channels of the images.
        img_size: height and width of the images, at least 8; the number of stages follows.
        latent: numbers an image is made from.
        width: channels of the last stage but one; each stage before has twice as many.
        norm: "batch", "group", "frozen" or None.

    Shapes: (batch, latent) -> (batch, in_chans, height, width), from -1 to 1.

    Raises:
        ValueError: too small an image, or an unknown norm.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 64,
        latent: int = 100,
        width: int = 64,
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, latent=latent, width=width)
        self.latent = latent
        self.layers = grow(latent, img_size, width, in_chans, norm)
        self.num_features = in_chans * math.prod(halvings(img_size)[0])
        init_dcgan(self)

    def example(self) -> tuple[Tensor]:
        return (next(self.parameters()).new_zeros(1, self.latent),)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents[:, :, None, None]).tanh()


class DCGANDiscriminator(nn.Module):
    """What is told of images by convolutions of 4x4 by 2: whether they are real.

    Args:
        in_chans: channels of the images.
        img_size: height and width of the images, at least 8; the number of stages follows.
        width: channels of the first stage; each stage has twice as many as the one before.
        num_outputs: numbers told of each image, e.g. one for each class it could be of.
        norm: "batch", "group", "frozen", "spectral" or None.

    Shapes: (batch, in_chans, height, width) -> (batch, num_outputs).

    Raises:
        ValueError: too small an image, or an unknown norm.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 64,
        width: int = 64,
        num_outputs: int = 1,
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, width=width, num_outputs=num_outputs)
        self.layers = shrink(in_chans, img_size, width, num_outputs, norm)
        self.num_features = num_outputs
        self.shape = (in_chans, *halvings(img_size)[0])
        if norm != "spectral":  # which would divide by that scale anyway
            init_dcgan(self)

    def example(self) -> tuple[Tensor]:
        return (next(self.parameters()).new_zeros(1, *self.shape),)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class SRResNet(nn.Module):
    """Images of more pixels from images of few: SRResNet, the generator of SRGAN (figure 4).

    Args:
        in_chans: channels of the images.
        depth: residual blocks.
        width: channels.
        scale: how many times as high and wide the images become: a power of 2.
        norm: "batch" as published, "group", "frozen" or None.

    Shapes: (batch, in_chans, height, width) -> (batch, in_chans, scale * height, scale * width).

    Raises:
        ValueError: a scale that is no power of 2, or an unknown norm.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 3,
        depth: int = 16,
        width: int = 64,
        scale: int = 4,
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, depth=depth, width=width)
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale {scale} is no power of 2 above 1")
        self.scale = scale
        self.first = nn.Sequential(nn.Conv2d(in_chans, width, 9, 1, 4), nn.PReLU())
        self.blocks = nn.Sequential(*(Residual(width, norm, nn.PReLU()) for _ in range(depth)))
        self.behind = _Conv(_conv3(width, width), norm, width, nn.Identity())
        self.upwards = nn.Sequential()
        for _ in range(scale.bit_length() - 1):
            self.upwards.extend([_conv3(width, 4 * width), nn.PixelShuffle(2), nn.PReLU()])
        self.last = nn.Conv2d(width, in_chans, 9, 1, 4)
        self.num_features = in_chans

    def example(self) -> tuple[Tensor]:
        side = PIECE // self.scale
        return (self.last.weight.new_zeros(1, self.num_features, side, side),)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(self.upwards(x + self.behind(self.blocks(x))))


class SRGANDiscriminator(nn.Module):
    """Whether an image, or a piece of one, is a photograph or was made of fewer pixels (figure 4).

    Args:
        in_chans: channels of the images.
        width: channels of the first two of eight convolutions; the last two have eight times as many.
        pool: cells a side that the last map is averaged to, so that pieces may have any size. With 6, pieces
            of 96 pixels are judged as published.
        hidden: width of the layer behind.
        norm: "batch", "group", "frozen", "spectral" or None.

    Shapes: (batch, in_chans, height, width) -> (batch, 1).

    Raises:
        ValueError: an unknown norm.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 3,
        width: int = 64,
        pool: int = 6,
        hidden: int = 1024,
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, width=width, pool=pool, hidden=hidden)
        self.in_chans = in_chans
        self.convs, before = nn.Sequential(), in_chans
        for stage, stride in itertools.product(range(4), (1, 2)):
            after = width * 2**stage
            kind = None if (stage, stride) == (0, 1) and norm != "spectral" else norm
            self.convs.append(_Conv(_conv3(before, after, stride), kind, after, nn.LeakyReLU(SLOPE)))
            before = after
        self.pool = nn.AdaptiveAvgPool2d(pool)
        dense, last = nn.Linear(before * pool**2, hidden), nn.Linear(hidden, 1)
        self.dense, self.last = (
            (spectral_norm(dense), spectral_norm(last)) if norm == "spectral" else (dense, last)
        )
        self.num_features = 1

    def example(self) -> tuple[Tensor]:
        return (next(self.parameters()).new_zeros(1, self.in_chans, PIECE, PIECE),)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.convs(images)).flatten(1)
        return self.last(F.leaky_relu(self.dense(features), SLOPE))
