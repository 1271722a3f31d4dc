"""Residual networks (He et al. 2015, arXiv 1512.03385), those for ImageNet and those for small images."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.blocked import Blocked, Conv2d, leave
from supervised.backbones.layers import init_he, make_norm, require_positive
from supervised.backbones.mlp import image_size

SHORTCUTS = ("projection", "pad")

_SMALL = {"small_input": True, "width": 16}
PRESETS: dict[str, dict[str, Any]] = {
    # Table 1.
    "resnet18": {"block": "basic", "depths": (2, 2, 2, 2)},
    "resnet34": {"block": "basic", "depths": (3, 4, 6, 3)},
    "resnet50": {"block": "bottleneck", "depths": (3, 4, 6, 3)},
    "resnet101": {"block": "bottleneck", "depths": (3, 4, 23, 3)},
    "resnet152": {"block": "bottleneck", "depths": (3, 8, 36, 3)},
    # Section 4.2: 6n + 2 layers. The paper's begin at 20; the one of 8 is MLPerf Tiny's (arXiv 2106.07597).
    "resnet8": {**_SMALL, "depths": (1, 1, 1)},
    **{f"resnet{6 * n + 2}": {**_SMALL, "depths": (n, n, n), "shortcut": "pad"} for n in (3, 5, 7, 9, 18)},
}


class PadShortcut(nn.Module):
    """The identity at a lower resolution, new channels being zero: "option A" of section 3.3."""

    def __init__(self, new_chans: int, stride: int) -> None:
        super().__init__()
        self.new_chans, self.stride = new_chans, stride

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(leave(x)[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_chans))
        return padded.to_mkldnn() if x.is_mkldnn else padded


def _shortcut(kind: str, in_chans: int, out_chans: int, stride: int, norm: str) -> nn.Module:
    if stride == 1 and in_chans == out_chans:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(out_chans - in_chans, stride)
    return nn.Sequential(Conv2d(in_chans, out_chans, 1, stride, bias=False), make_norm(norm, out_chans))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, in_chans: int, chans: int, stride: int, shortcut: str, norm: str) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_chans, chans, 3, stride, 1, bias=False)
        self.bn1 = make_norm(norm, chans)
        self.conv2 = Conv2d(chans, chans, 3, 1, 1, bias=False)
        self.bn2 = make_norm(norm, chans)
        self.downsample = _shortcut(shortcut, in_chans, chans, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        residual = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(residual)).add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (figure 5, right).

    The stride is in the 3x3, as in everything published since 2016 ("v1.5"), not in the first 1x1.
    """

    expansion = 4

    def __init__(self, in_chans: int, chans: int, stride: int, shortcut: str, norm: str) -> None:
        super().__init__()
        out = chans * self.expansion
        self.conv1 = Conv2d(in_chans, chans, 1, bias=False)
        self.bn1 = make_norm(norm, chans)
        self.conv2 = Conv2d(chans, chans, 3, stride, 1, bias=False)
        self.bn2 = make_norm(norm, chans)
        self.conv3 = Conv2d(chans, out, 1, bias=False)
        self.bn3 = make_norm(norm, out)
        self.downsample = _shortcut(shortcut, in_chans, out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        residual = F.relu_(self.bn1(self.conv1(x)))
        residual = F.relu_(self.bn2(self.conv2(residual)))
        return F.relu_(self.bn3(self.conv3(residual)).add_(shortcut))


BLOCKS: dict[str, type[Basic] | type[Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}


class ResNet(Blocked):
    """Stages of residual blocks; from the second stage on, each halves the image and doubles the channels.

    Args:
        in_chans: input channels.
        img_size: unused, images may have any size.
        block: "basic" or "bottleneck".
        depths: blocks of each stage.
        width: channels of the first stage, before a bottleneck's factor of 4.
        small_input: begin with a 3x3 convolution (section 4.2) in place of 7x7 by 2 and max pooling by 2.
        small_stride: of that convolution; 2 makes everything behind it four times cheaper.
        shortcut: where the shape changes, "projection" by 1x1 or "pad" with zeros (section 3.3).
        norm: "batch", "group" or "frozen".
        zero_init_residual: let each block begin as its shortcut (arXiv 1706.02677, section 5.1).

    Shapes: (batch, in_chans, height, width) -> (batch, num_features), the mean over the image.

    Raises:
        ValueError: an unknown block, shortcut or norm.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^resnet\.(embedder|encoder)\.", ""),
        (r"^embedder\.", ""),
        (r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"^(stages\.\d+)\.layers", r"\1"),
        (r"\.shortcut\.convolution", ".downsample.0"),
        (r"\.shortcut\.normalization", ".downsample.1"),
        (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"^convolution", "conv1"),
        (r"^normalization", "bn1"),
        (r"^classifier\.1\.|^fc\.", "head."),
    )
    """torchvision and timm say layer1 and fc; the rest is transformers'."""

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        block: str = "basic",
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        small_input: bool = False,
        small_stride: int = 1,
        shortcut: str = "projection",
        norm: str = "batch",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        image_size(img_size)
        for name, value, known in (("block", block, tuple(BLOCKS)), ("shortcut", shortcut, SHORTCUTS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {known}")
        require_positive(in_chans=in_chans, depths=depths, width=width, small_stride=small_stride)
        if small_stride > 1 and not small_input:
            raise ValueError("small_stride is for small_input")
        stem = (3, small_stride, 1) if small_input else (7, 2, 3)
        self.conv1 = Conv2d(in_chans, width, *stem, bias=False)
        self.bn1 = make_norm(norm, width)
        self.pool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, 1)
        make, before = BLOCKS[block], width
        self.stages = nn.Sequential()
        for index, depth in enumerate(depths):
            chans = width * 2**index
            blocks: list[nn.Module] = []
            for number in range(depth):
                stride = 2 if index and not number else 1
                blocks.append(make(before, chans, stride, shortcut, norm))
                before = chans * make.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.num_features = before
        self.can_be_blocked = norm == "batch"
        init_he(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Basic | Bottleneck):
                    last = module.bn2 if isinstance(module, Basic) else module.bn3
                    nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(F.relu_(self.bn1(self.conv1(self.enter(x))))))
        if x.is_mkldnn:
            return leave(x).mean((2, 3))
        # Not mean((2, 3)): its gradient has not the memory layout, channels_last, of what it meets.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
