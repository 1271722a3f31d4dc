"""Parts that several vision backbones are made of."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised.backbones.mlp import image_size

NORMS = ("batch", "group", "frozen")


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that says what to do about a batch of a single value."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            raise LabError(
                "batch norm: cannot learn from one value a channel, which is all that one image of this size "
                "leaves. Use a larger batch_size (or fewer parts), larger images, or model.spec.norm=group."
            )
        return super().forward(input)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics stay what was loaded, or else 0 and 1; scale and shift learn.

    In a network whose inputs or targets move, as a Q-network's do, statistics of the batch do harm.
    """

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, training=False, eps=self.eps)


def make_norm(kind: str | None, channels: int, eps: float = 1e-5) -> nn.Module:
    """Normalisation of (batch, channels, height, width); None: none.

    Groups have 16 channels, the best of arXiv 1803.08494 (table 3), or else the largest power of 2 that fits.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is None:
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 16), channels, eps)
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is none of {NORMS}")
    return (BatchNorm2d if kind == "batch" else FrozenBatchNorm2d)(channels, eps)


class ConvNorm(nn.Module):
    """Convolution, normalisation, ReLU. The convolution has biases only where nothing is normalised."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        *,
        norm: str | None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, bias=norm is None)
        self.bn = make_norm(norm, out_chans, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MaxPoolSame(nn.Module):
    """Max pooling 3x3 by 2 that turns n pixels into ceil(n / 2), so that any image is large enough.

    At the even sizes of the published networks this is their pooling, whose last window hangs over the edge.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


class StochasticDepth(nn.Module):
    """Drops a residual branch for some samples while training (arXiv 1603.09382), and scales the others up.

    Args:
        rate: probability to drop.

    Raises:
        ValueError: an impossible rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"stochastic_depth {rate:g} must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


def require_positive(**numbers: int | Sequence[int]) -> None:
    """Raises ValueError unless all numbers are at least 1, and there is at least one of each name."""
    for name, value in numbers.items():
        if min((value,) if isinstance(value, int) else value, default=0) < 1:
            raise ValueError(f"{name} {value} must be positive")


def require_least(img_size: int | Sequence[int], least: int, else_use: str = "") -> tuple[int, int]:
    """(height, width) of images that must have at least `least` pixels a side.

    Raises:
        ValueError: they have not; the message ends with `else_use`.
    """
    height, width = image_size(img_size)
    if min(height, width) < least:
        raise ValueError(f"img_size {img_size} is too small: the smallest is {least}{else_use}")
    return height, width


def init_he(net: nn.Module) -> None:
    """He's initial weights for ReLUs (arXiv 1502.01852, section 2.2), and biases of 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def init_small(net: nn.Module) -> None:
    """Normal initial weights of standard deviation 0.02, cut off at 2.0, and biases of 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def probe(net: nn.Module, in_chans: int, size: tuple[int, int]) -> torch.Size:
    """The shape (channels, height, width) that `net` makes of an image."""
    device = next(net.parameters()).device
    return net(torch.zeros(1, in_chans, *size, device=device)).shape[1:]
