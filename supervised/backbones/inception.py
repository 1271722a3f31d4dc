"""Inception networks: GoogLeNet (2014), with batch normalisation (2015), and version 3 (2015)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.layers import ConvNorm, MaxPoolSame, init_he, require_least, require_positive
from supervised.backbones.mlp import image_size

PRESETS: dict[str, dict[str, Any]] = {"googlenet_bn": {"norm": "batch", "torchvision": True}}


class Branches(nn.ModuleDict):
    """Modules side by side, their outputs behind one another as channels."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], 1)


class GoogLeNetAux(nn.Module):
    """GoogLeNet's auxiliary classifier (section 5) without its last layer."""

    num_features = 1024

    def __init__(self, conv: ConvNorm, adaptive: bool, dropout: float) -> None:
        super().__init__()
        self.conv, self.adaptive = conv, adaptive
        self.fc1 = nn.Linear(128 * 4 * 4, self.num_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # Both make 4x4 of the 14x14 that images of 224 leave here.
        x = F.adaptive_avg_pool2d(x, 4) if self.adaptive else F.avg_pool2d(x, 5, 3)
        return self.dropout(F.relu(self.fc1(self.conv(x).flatten(1))))


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842, table 1 and section 5).

    Args:
        in_chans: input channels.
        img_size: height and width, pixels; any.
        norm: None as published, or "batch", "group" or "frozen".
        aux: two auxiliary classifiers, for training.
        dropout: probability, on the features.
        aux_dropout: probability, on the features of the auxiliary classifiers.
        torchvision: be what torchvision's weights are for: 3x3 kernels in the 5x5 branches, no response
            normalisation, another last pooling.

    Shapes: (batch, in_chans, height, width) -> (batch, 1024), the mean over the image.

    Raises:
        ValueError: an unknown norm.
    """

    spec: dict[str, Any]
    num_features = 1024
    published_names: ClassVar = (
        (r"^aux(\d)\.fc2\.", lambda m: f"aux_heads.{int(m[1]) - 1}."),
        (r"^aux(\d)\.", lambda m: f"aux.{int(m[1]) - 1}."),
        (r"^fc\.", "head."),
    )

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        norm: str | None = None,
        aux: bool = False,
        dropout: float = 0.4,
        aux_dropout: float = 0.7,
        torchvision: bool = False,
    ) -> None:
        super().__init__()
        size = image_size(img_size)
        require_positive(in_chans=in_chans)
        conv = partial(ConvNorm, norm=norm, eps=1e-3 if torchvision else 1e-5)
        wide = 3 if torchvision else 5

        def mix(before: int, c1: int, r3: int, c3: int, r5: int, c5: int, proj: int) -> Branches:
            """Figure 2b, with a row of table 1."""
            return Branches(
                branch1=conv(before, c1, 1),
                branch2=nn.Sequential(conv(before, r3, 1), conv(r3, c3, 3, padding=1)),
                branch3=nn.Sequential(conv(before, r5, 1), conv(r5, c5, wide, padding=wide // 2)),
                branch4=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(before, proj, 1)),
            )

        self.conv1 = conv(in_chans, 64, 7, 2, 3)
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.inception3a = mix(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = mix(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = mix(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = mix(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = mix(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = mix(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = mix(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = mix(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = mix(832, 384, 192, 384, 48, 128, 128)
        self.pool = MaxPoolSame()
        self.last_pool = nn.MaxPool2d(2, ceil_mode=True) if torchvision else MaxPoolSame()
        # The paper does not give its numbers; these are those of Caffe's copy.
        self.lrn = nn.Identity() if torchvision else nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.dropout = nn.Dropout(dropout)
        self.aux_num_features: tuple[int, ...] = ()
        if aux:
            # Other images than the paper's leave other maps, which are then pooled as torchvision does.
            adaptive = torchvision or size != (224, 224)
            self.aux = nn.ModuleList(
                GoogLeNetAux(conv(chans, 128, 1), adaptive, aux_dropout) for chans in (512, 528)
            )
            self.aux_num_features = (GoogLeNetAux.num_features,) * 2
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)[0]

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and those of each auxiliary classifier."""
        features, *maps = self._forward(x)
        aux = (
            [branch(each) for branch, each in zip(self.aux, maps, strict=True)]
            if self.aux_num_features
            else []
        )
        return features, aux

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The features, and the maps that auxiliary classifiers read."""
        x = self.lrn(self.pool(self.conv1(x)))
        x = self.pool(self.lrn(self.conv3(self.conv2(x))))
        x = self.pool(self.inception3b(self.inception3a(x)))
        a = self.inception4a(x)
        d = self.inception4d(self.inception4c(self.inception4b(a)))
        x = self.last_pool(self.inception4e(d))
        x = self.inception5b(self.inception5a(x))
        return self.dropout(x.mean((2, 3))), a, d


class InceptionBN(nn.Module):
    """Inception with batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167, figure 5).

    As released for Caffe: the projections of 4c and 4d are 128 wide, not 96, and 608 channels leave them.

    Args:
        in_chans: input channels.
        img_size: unused, images may have any size.
        norm: "batch", "group" or "frozen".

    Shapes: (batch, in_chans, height, width) -> (batch, 1024), the mean over the image.

    Raises:
        ValueError: an unknown norm.
    """

    spec: dict[str, Any]
    num_features = 1024

    def __init__(self, in_chans: int = 3, img_size: int | Sequence[int] = 224, norm: str = "batch") -> None:
        super().__init__()
        image_size(img_size)
        require_positive(in_chans=in_chans)
        conv = partial(ConvNorm, norm=norm)

        def mix(before: int, c1: int, r3: int, c3: int, rd: int, cd: int, proj: int, pool: str) -> Branches:
            """A row of figure 5; without 1x1 and projection, one that halves the image."""
            stride = 1 if c1 else 2
            branches = {
                "branch3x3": nn.Sequential(conv(before, r3, 1), conv(r3, c3, 3, stride, 1)),
                "branch3x3dbl": nn.Sequential(
                    conv(before, rd, 1), conv(rd, cd, 3, 1, 1), conv(cd, cd, 3, stride, 1)
                ),
            }
            if not c1:
                return Branches(**branches, branch_pool=MaxPoolSame())
            pooling = nn.AvgPool2d(3, 1, 1) if pool == "avg" else nn.MaxPool2d(3, 1, 1)
            projection = nn.Sequential(pooling, conv(before, proj, 1))
            return Branches(branch1x1=conv(before, c1, 1), **branches, branch_pool=projection)

        self.layers = nn.Sequential(
            conv(in_chans, 64, 7, 2, 3),
            MaxPoolSame(),
            conv(64, 64, 1),
            conv(64, 192, 3, padding=1),
            MaxPoolSame(),
            mix(192, 64, 64, 64, 64, 96, 32, "avg"),  # 3a
            mix(256, 64, 64, 96, 64, 96, 64, "avg"),
            mix(320, 0, 128, 160, 64, 96, 0, "max"),
            mix(576, 224, 64, 96, 96, 128, 128, "avg"),  # 4a
            mix(576, 192, 96, 128, 96, 128, 128, "avg"),
            mix(576, 160, 128, 160, 128, 160, 128, "avg"),
            mix(608, 96, 128, 192, 160, 192, 128, "avg"),
            mix(608, 0, 128, 192, 192, 256, 0, "max"),
            mix(1056, 352, 192, 320, 160, 224, 128, "avg"),  # 5a
            mix(1024, 352, 192, 320, 192, 224, 128, "max"),
        )
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class InceptionV3(nn.Module):
    """Inception version 3 (Szegedy et al. 2015, arXiv 1512.00567, table 1), as torchvision has it.

    Args:
        in_chans: input channels.
        img_size: height and width, pixels: 75 or more, and with `aux` 299 or more.
        norm: "batch", "group" or "frozen".
        aux: an auxiliary classifier (section 4), for training.
        dropout: probability, on the features.

    Shapes: (batch, in_chans, height, width) -> (batch, 2048), the mean over the image.

    Raises:
        ValueError: an unknown norm, or images too small.
    """

    spec: dict[str, Any]
    num_features = 2048
    published_names: ClassVar = (
        (r"^Conv2d_(\d\w)_\dx\d", r"conv\1"),
        (r"^Mixed_", "mixed"),
        (r"\.branch_pool\.", ".branch_pool.1."),
        (r"\.(branch\w+)_(\d)([ab]?)\.", lambda m: f".{m[1]}.{int(m[2]) - 1}.{m[3] and m[3] + '.'}"),
        (r"^AuxLogits\.fc\.", "aux_heads.0."),
        (r"^AuxLogits\.conv(\d)", lambda m: f"aux.{int(m[1]) + 1}"),
        (r"^fc\.", "head."),
    )

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 299,
        norm: str = "batch",
        aux: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans)
        require_least(img_size, 299 if aux else 75, "; without aux, 75" if aux else "")
        conv = partial(ConvNorm, norm=norm, eps=1e-3)
        across, along = (
            partial(conv, kernel=(1, 7), padding=(0, 3)),
            partial(conv, kernel=(7, 1), padding=(3, 0)),
        )

        def pooled(before: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(before, out, 1))

        def figure5(before: int, proj: int) -> Branches:
            return Branches(
                branch1x1=conv(before, 64, 1),
                branch5x5=nn.Sequential(conv(before, 48, 1), conv(48, 64, 5, padding=2)),
                branch3x3dbl=nn.Sequential(
                    conv(before, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)
                ),
                branch_pool=pooled(before, proj),
            )

        def figure6(c7: int) -> Branches:
            return Branches(
                branch1x1=conv(768, 192, 1),
                branch7x7=nn.Sequential(conv(768, c7, 1), across(c7, c7), along(c7, 192)),
                branch7x7dbl=nn.Sequential(
                    conv(768, c7, 1), along(c7, c7), across(c7, c7), along(c7, c7), across(c7, 192)
                ),
                branch_pool=pooled(768, 192),
            )

        def figure7(before: int) -> Branches:
            def split() -> Branches:
                return Branches(a=conv(384, 384, (1, 3), 1, (0, 1)), b=conv(384, 384, (3, 1), 1, (1, 0)))

            return Branches(
                branch1x1=conv(before, 320, 1),
                branch3x3=nn.Sequential(conv(before, 384, 1), split()),
                branch3x3dbl=nn.Sequential(conv(before, 448, 1), conv(448, 384, 3, padding=1), split()),
                branch_pool=pooled(before, 192),
            )

        self.conv1a = conv(in_chans, 32, 3, 2)
        self.conv2a = conv(32, 32, 3)
        self.conv2b = conv(32, 64, 3, padding=1)
        self.conv3b = conv(64, 80, 1)
        self.conv4a = conv(80, 192, 3)
        self.mixed5b = figure5(192, 32)
        self.mixed5c = figure5(256, 64)
        self.mixed5d = figure5(288, 64)
        self.mixed6a = Branches(
            branch3x3=conv(288, 384, 3, 2),
            branch3x3dbl=nn.Sequential(conv(288, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, 2)),
            branch_pool=nn.MaxPool2d(3, 2),
        )
        self.mixed6b = figure6(128)
        self.mixed6c = figure6(160)
        self.mixed6d = figure6(160)
        self.mixed6e = figure6(192)
        self.mixed7a = Branches(
            branch3x3=nn.Sequential(conv(768, 192, 1), conv(192, 320, 3, 2)),
            branch7x7x3=nn.Sequential(
                conv(768, 192, 1), across(192, 192), along(192, 192), conv(192, 192, 3, 2)
            ),
            branch_pool=nn.MaxPool2d(3, 2),
        )
        self.mixed7b = figure7(1280)
        self.mixed7c = figure7(2048)
        self.dropout = nn.Dropout(dropout)
        self.aux_num_features: tuple[int, ...] = ()
        if aux:
            self.aux = nn.Sequential(nn.AvgPool2d(5, 3), conv(768, 128, 1), conv(128, 768, 5))
            self.aux_num_features = (768,)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._last(self._first(x))

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and those of the auxiliary classifier."""
        x = self._first(x)
        return self._last(x), [self.aux(x).mean((2, 3))] if self.aux_num_features else []

    def _first(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2b(self.conv2a(self.conv1a(x))), 3, 2)
        x = F.max_pool2d(self.conv4a(self.conv3b(x)), 3, 2)
        x = self.mixed6a(self.mixed5d(self.mixed5c(self.mixed5b(x))))
        return self.mixed6e(self.mixed6d(self.mixed6c(self.mixed6b(x))))

    def _last(self, x: Tensor) -> Tensor:
        return self.dropout(self.mixed7c(self.mixed7b(self.mixed7a(x))).mean((2, 3)))
