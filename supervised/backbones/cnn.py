"""Convolutional backbones. Here: the two that deep RL on Atari is built on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.layers import require_positive
from supervised.backbones.mlp import image_size

NORMS = (None, "layer")


class PixelConv2d(nn.Conv2d):
    """A first convolution that also takes bytes: uint8 0..255 gives what float 0..1 would.

    From bytes it is quicker: 255 is divided out of the few weights instead of out of every pixel, and where
    the stride allows, each 4x4 block of pixels becomes 16 channels (space to depth). That is the same sum
    of products, on 64 channels and a 2x2 kernel instead of Atari's 4 channels and 8x8, which is what
    matrix units like: forward and backward of the Nature CNN together take 0.9 of the time.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.uint8:
            return super().forward(input)
        device = input.device.type
        amp = device != "meta" and torch.is_autocast_enabled(device)  # the meta device has no autocast
        dtype = torch.get_autocast_dtype(device) if amp else self.weight.dtype
        weight = self.weight * (1 / 255)
        block, (height, width) = 4, self.kernel_size
        if (
            self.stride == (block, block)
            and self.padding == (0, 0)
            and not (height % block or width % block or input.shape[2] % block or input.shape[3] % block)
        ):
            out, channels = weight.shape[:2]
            weight = weight.reshape(out, channels, height // block, block, width // block, block)
            weight = weight.permute(0, 1, 3, 5, 2, 4)
            weight = weight.reshape(out, channels * block**2, height // block, width // block)
            return F.conv2d(_blocks_of_four(input).to(dtype), weight, self.bias)
        # channels_last, too, is for the matrix units; reordering bytes is the cheapest way there.
        pixels = input.contiguous(memory_format=torch.channels_last).to(dtype)
        return F.conv2d(pixels, weight, self.bias, self.stride, self.padding)


def _blocks_of_four(x: Tensor) -> Tensor:
    """Space to depth: uint8 (batch, chans, height, width) -> (batch, chans*4*4, height/4, width/4).

    Four bytes side by side move as one int32, several times faster than `F.pixel_unshuffle`; the result is
    channels_last.
    """
    batch, chans, height, width = x.shape
    words = x.contiguous().view(torch.int32).view(batch, chans, height // 4, 4, width // 4)
    blocks = words.permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)
    return blocks.view(batch, height // 4, width // 4, chans * 16).permute(0, 3, 1, 2)


class NatureCNN(nn.Module):
    """The network of Mnih et al. 2015 (Nature 518, Methods, "Model architecture") without its last layer.

    Its defaults at 4x84x84 have 1,684,128 parameters. Images too small for the three strides are padded
    with zeros to the smallest size that fits.

    Args:
        in_chans: input channels (stacked frames).
        img_size: input height and width, pixels.
        channels, kernels, strides, paddings: one entry per convolution.
        width: units of the fully connected layer, `num_features`; None: no such layer, the features are all
            that the convolutions leave.
        norm: None as in 2015, or "layer" for layer normalisation behind every layer (what PQN,
            arXiv 2407.04811, needs in place of a target network).

    Shapes: float 0..1 or uint8 0..255 (batch, in_chans, height, width) -> (batch, width).
    """

    takes_bytes = True
    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int,
        img_size: int | Sequence[int],
        channels: Sequence[int] = (32, 64, 64),
        kernels: Sequence[int] = (8, 4, 3),
        strides: Sequence[int] = (4, 2, 1),
        paddings: Sequence[int] = (0, 0, 0),
        width: int | None = 512,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is none of {NORMS}")
        if not len(channels) == len(kernels) == len(strides) == len(paddings):
            raise ValueError("channels, kernels, strides and paddings must be equally long")
        require_positive(
            channels=channels, kernels=kernels, strides=strides, width=1 if width is None else width
        )
        least = _least_input(kernels, strides, paddings)
        self.pad = padding_to(image_size(img_size), least)
        layers: list[nn.Module] = []
        before = in_chans
        for out, kernel, stride, padding in zip(channels, kernels, strides, paddings, strict=True):
            conv = nn.Conv2d if layers else PixelConv2d
            layers.append(conv(before, out, kernel, stride, padding))
            if norm == "layer":
                layers.append(nn.GroupNorm(1, out))
            layers.append(nn.ReLU())
            before = out
        self.convs = nn.Sequential(*layers)
        self.num_features = _flat_features(self, in_chans, img_size)
        self.fc: nn.Linear | None = None
        if width is not None:
            self.fc = nn.Linear(self.num_features, width)
            self.num_features = width
        self.fc_norm = nn.LayerNorm(self.num_features) if norm == "layer" and width else nn.Identity()

    def convolve(self, x: Tensor) -> Tensor:
        return self.convs(F.pad(x, self.pad) if any(self.pad) else x)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convolve(x).flatten(1)
        return features if self.fc is None else F.relu(self.fc_norm(self.fc(features)))


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 3x3 convolution, added to the input (IMPALA, figure 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The deep residual network of Espeholt et al. 2018 (arXiv 1802.01561, figure 3, right).

    At 4x84x84 its convolutions have 97,744 parameters, 1,089,232 with the 256-wide layer.

    Args:
        in_chans: input channels.
        img_size: input height and width, pixels; any size.
        channels: channels of each section (convolution, max-pool by 2, two residual blocks).
        width: units of the fully connected layer, `num_features`.

    Shapes: (batch, in_chans, height, width) -> (batch, width).
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int,
        img_size: int | Sequence[int],
        channels: Sequence[int] = (16, 32, 32),
        width: int = 256,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, width=width)
        sections: list[nn.Module] = []
        before = in_chans
        for out in channels:
            sections += [
                nn.Conv2d(before, out, 3, padding=1),
                nn.MaxPool2d(3, stride=2, padding=1),
                ResidualBlock(out),
                ResidualBlock(out),
            ]
            before = out
        self.convs = nn.Sequential(*sections, nn.ReLU())
        self.fc = nn.Linear(_flat_features(self, in_chans, img_size), width)
        self.num_features = width

    def convolve(self, x: Tensor) -> Tensor:
        return self.convs(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(self.convolve(x).flatten(1)))


def _flat_features(net: NatureCNN | ImpalaCNN, in_chans: int, img_size: int | Sequence[int]) -> int:
    """How many features the convolutions leave, found by sending one empty image through them."""
    with torch.no_grad():
        device = next(net.parameters()).device
        return net.convolve(torch.zeros(1, in_chans, *image_size(img_size), device=device)).numel()


def _least_input(kernels: Sequence[int], strides: Sequence[int], paddings: Sequence[int]) -> int:
    """The smallest side that leaves one pixel behind the last convolution."""
    side = 1
    for kernel, stride, padding in zip(reversed(kernels), reversed(strides), reversed(paddings), strict=True):
        side = max((side - 1) * stride + kernel - 2 * padding, 1)
    return side


def padding_to(size: tuple[int, int], least: int) -> tuple[int, int, int, int]:
    """Zero padding (left, right, top, bottom) that brings each side to at least `least`."""
    (height, width) = size
    vertical, horizontal = max(least - height, 0), max(least - width, 0)
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2
