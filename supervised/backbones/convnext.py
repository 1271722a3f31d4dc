"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545): a convolutional network with a transformer's manners."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.layers import StochasticDepth, init_small, require_least, require_positive

EPS = 1e-6

PRESETS: dict[str, dict[str, Any]] = {
    # Section 3, "ConvNeXt-T/S/B/L/XL".
    "convnext_tiny": {"depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "convnext_large": {"depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
    "convnext_xlarge": {"depths": (3, 3, 27, 3), "widths": (256, 512, 1024, 2048)},
}


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of each pixel's channels: (batch, channels, height, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """7x7 convolution of each channel, layer normalisation, an MLP for each pixel (figure 4, right).

    Args:
        width: channels.
        layer_scale: initial factor of the residual branch, one for each channel; None: no factors.
        drop_rate: of stochastic depth.
    """

    def __init__(self, width: int, layer_scale: float | None, drop_rate: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        residual = self.fc2(F.gelu(self.fc1(residual)))
        if self.gamma is not None:
            residual = residual * self.gamma
        return x + self.drop(residual.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """ConvNeXt, which normalises each pixel, never the batch, and so suits a Q-network as it is.

    Args:
        in_chans: input channels.
        img_size: height and width, pixels: `patch_size` times 2 for each stage but the first, or more.
        depths, widths: blocks and channels of each stage.
        patch_size: pixels a side that the first convolution makes one of; 1 or 2 for small images.
        layer_scale: initial factor of the residual branches (section A.1); None: no factors.
        stochastic_depth: probability to drop the last block's residual branch while training; the others'
            fall linearly to the first one's 0. The paper's are 0.1 for tiny to 0.5 for large.

    Shapes: (batch, in_chans, height, width) -> (batch, widths[-1]), the normalised mean over the image.

    Raises:
        ValueError: images too small, or depths and widths that do not fit.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^convnext\.(encoder\.)?", ""),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)", r"stages.\1.downsample"),
        (r"^embeddings\.patch_embeddings", "stem.0"),
        (r"^embeddings\.layernorm", "stem.1"),
        (r"\.downsampling_layer\.", ".downsample."),
        (r"^(stages\.\d+)(\.layers|\.blocks)?\.(\d+)", r"\1.blocks.\3"),
        (r"\.layer_scale_parameter$", ".gamma"),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.layernorm\.", ".norm."),
        (r"\.(pwconv|mlp\.fc)(\d)\.", r".fc\2."),
        (r"^(layernorm|head\.norm)\.", "norm."),
        (r"^(classifier|head\.fc)\.", "head."),
    )
    """The authors', timm's and transformers'."""

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        patch_size: int = 4,
        layer_scale: float | None = 1e-6,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths:
            raise ValueError("depths and widths must be equally long")
        require_positive(in_chans=in_chans, patch_size=patch_size, depths=depths, widths=widths)
        halvings = 2 ** (len(depths) - 1)
        else_use = f"; with patch_size=1, {halvings}" if patch_size > 1 else ""
        require_least(img_size, patch_size * halvings, else_use)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], patch_size, patch_size), LayerNorm2d(widths[0], eps=EPS)
        )
        rates = iter(torch.linspace(0, stochastic_depth, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        before = widths[0]
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            if index:
                stage.add_module(
                    "downsample", nn.Sequential(LayerNorm2d(before, eps=EPS), nn.Conv2d(before, width, 2, 2))
                )
            blocks = [Block(width, layer_scale, next(rates)) for _ in range(depth)]
            stage.add_module("blocks", nn.Sequential(*blocks))
            self.stages.append(stage)
            before = width
        self.norm = nn.LayerNorm(before, eps=EPS)
        self.num_features = before
        init_small(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean((2, 3)))
