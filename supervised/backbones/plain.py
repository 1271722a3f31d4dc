"""Convolutional networks without branches or shortcuts: LeNet, AlexNet, VGG."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.cnn import padding_to
from supervised.backbones.layers import init_he, make_norm, probe, require_least, require_positive
from supervised.backbones.mlp import image_size


class QuickTanh(torch.autograd.Function):
    """tanh x = 2 sigmoid(2x) - 1 in fp32: a quarter of `torch.tanh`'s time on a CPU, and off by 2e-7."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.to(torch.float32, copy=True).mul_(2).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, y).to(ctx.dtype)


class Tanh(nn.Module):
    """tanh in fp32: with it a step of LeNet-5 in bf16 takes 0.9 of the time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return QuickTanh.apply(x) if x.device.type == "cpu" else x.float().tanh()  # type: ignore[return-value]


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU}
POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}

_VGG_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
PRESETS: dict[str, dict[str, Any]] = {
    "lenet1": {"channels": (4, 12), "hidden": (), "least": 28},
    "lenet4": {"channels": (4, 16), "hidden": (120,), "least": 32},
    "lenet5": {"channels": (6, 16), "hidden": (120, 84), "least": 32},
    **{f"vgg{n}": {"depths": depths} for n, depths in _VGG_DEPTHS.items()},
    **{f"vgg{n}_bn": {"depths": depths, "norm": "batch"} for n, depths in _VGG_DEPTHS.items()},
}


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998, section II.B), and LeNet-1 and LeNet-4 (LeCun et al. 1995, section 3).

    As built today: each map is connected to all before it, pooling has no weights, tanh is not scaled.
    LeNet-5's third convolution covers all that is left of 32x32 pixels and is therefore a linear layer here,
    which makes larger images possible.

    Args:
        in_chans: input channels.
        img_size: height and width, pixels; smaller images than `least` are padded with zeros to that, as the
            papers did with their digits.
        channels: of each 5x5 convolution, behind which pooling halves the image.
        hidden: widths of the layers behind; the last one, or else all that the convolutions leave, is
            `num_features`.
        activation: "tanh" as published, or "relu".
        pool: "avg" as published, or "max".
        least: smallest side of an image without padding, pixels.

    Shapes: (batch, in_chans, height, width) -> (batch, num_features).

    Raises:
        ValueError: an unknown activation or pool, or convolutions too many for `least`.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 32,
        channels: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        activation: str = "tanh",
        pool: str = "avg",
        least: int = 32,
    ) -> None:
        super().__init__()
        for name, value, known in (("activation", activation, ACTIVATIONS), ("pool", pool, POOLS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {tuple(known)}")
        require_positive(in_chans=in_chans, channels=channels, least=least)
        size = image_size(img_size)
        self.pad = padding_to(size, least)
        left, layers, before = [max(side, least) for side in size], [], in_chans
        for out in channels:
            layers += [nn.Conv2d(before, out, 5), ACTIVATIONS[activation](), POOLS[pool](2)]
            left, before = [(side - 4) // 2 for side in left], out
        if min(left) < 1:
            raise ValueError(f"{len(channels)} convolutions leave nothing of {least} pixels")
        self.convs = nn.Sequential(*layers)
        layers, before = [], before * left[0] * left[1]
        for width in hidden:
            layers += [nn.Linear(before, width), ACTIVATIONS[activation]()]
            before = width
        self.hidden = nn.Sequential(*layers)
        self.num_features = before

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.convs(F.pad(x, self.pad) if any(self.pad) else x).flatten(1))


class AlexNet(nn.Module):
    """AlexNet on one device (Krizhevsky 2014, arXiv 1404.5997, section 5), as torchvision builds it.

    Args:
        in_chans: input channels.
        img_size: height and width, pixels.
        stride: of the first convolution; 1 for small images.
        width: units of both fully connected layers, `num_features`.
        dropout: probability, before both.
        lrn: local response normalisation behind the first two convolutions, as in 2012 (section 3.3).

    Shapes: (batch, in_chans, height, width) -> (batch, width).

    Raises:
        ValueError: images too small for the stride.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^classifier\.1\.", "fc1."),
        (r"^classifier\.4\.", "fc2."),
        (r"^classifier\.6\.", "head."),
    )

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        stride: int = 4,
        width: int = 4096,
        dropout: float = 0.5,
        lrn: bool = False,
    ) -> None:
        super().__init__()
        # The three poolings need 15 pixels of what the first convolution makes.
        require_positive(in_chans=in_chans, stride=stride, width=width)
        size = require_least(img_size, 14 * stride + 7, "; with stride=1, 21" if stride > 1 else "")
        layers: list[nn.Module] = []
        before = in_chans
        for out, kernel, step, padding, pool in (
            (64, 11, stride, 2, True),
            (192, 5, 1, 2, True),
            (384, 3, 1, 1, False),
            (256, 3, 1, 1, False),
            (256, 3, 1, 1, True),
        ):
            layers += [nn.Conv2d(before, out, kernel, step, padding), nn.ReLU()]
            if lrn and kernel > 3:
                layers.append(alexnet_lrn())
            if pool:
                layers.append(nn.MaxPool2d(3, 2))
            before = out
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(probe(self.features, in_chans, size).numel(), width)
        self.fc2 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.num_features = width
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return F.relu(self.fc2(self.dropout(F.relu(self.fc1(self.dropout(x))))))


def alexnet_lrn() -> nn.LocalResponseNorm:
    """b_i = a_i / (2 + 1e-4 * sum of a_j^2 over 5 channels)^0.75; torch's alpha is 5 times the paper's."""
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1: A, B, D and E).

    Args:
        in_chans: input channels.
        img_size: height and width, pixels; any. What pooling leaves of it, 7x7 of 224x224, goes into the
            first fully connected layer.
        depths: 3x3 convolutions of each stage, behind which pooling halves the image.
        norm: None as published, or "batch", "group" or "frozen".
        width: units of both fully connected layers, `num_features`.
        dropout: probability, behind both.

    Shapes: (batch, in_chans, height, width) -> (batch, width).

    Raises:
        ValueError: an unknown norm.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^classifier\.0\.", "fc1."),
        (r"^classifier\.3\.", "fc2."),
        (r"^classifier\.6\.", "head."),
    )

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        depths: Sequence[int] = (2, 2, 3, 3, 3),
        norm: str | None = None,
        width: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, depths=depths, width=width)
        height, wide = image_size(img_size)
        layers: list[nn.Module] = []
        before = in_chans
        for stage, depth in enumerate(depths):
            out = min(64 * 2**stage, 512)
            for _ in range(depth):
                layers.append(nn.Conv2d(before, out, 3, padding=1))
                if norm is not None:
                    layers.append(make_norm(norm, out))
                layers.append(nn.ReLU())
                before = out
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            height, wide = -(-height // 2), -(-wide // 2)
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(before * height * wide, width)
        self.fc2 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.num_features = width
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc1(self.features(x).flatten(1))))
        return self.dropout(F.relu(self.fc2(x)))
