"""Networks that say what in a sample is noise: the U-Net of Ho et al. 2020 (arXiv 2006.11239), and an MLP.

Both read (samples, times) and answer in the samples' shape. Times are numbers, of whatever process: a sine
and a cosine of each of many frequencies tell them apart (arXiv 1706.03762, section 3.5). With classes, a
learned vector of the class is added to that of the time (arXiv 2102.09672); one more class, the last, means
"none", for guidance without a classifier (arXiv 2207.12598).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised.backbones.layers import require_positive
from supervised.backbones.mlp import image_size

EPS = 1e-6
PERIOD = 10_000

PRESETS: dict[str, dict[str, Any]] = {
    # Appendix B.
    "ddpm_cifar10": {"width": 128, "mults": (1, 2, 2, 2), "attention": (16,), "dropout": 0.1},
    "ddpm_256": {"img_size": 256, "width": 128, "mults": (1, 1, 2, 2, 4, 4), "attention": (16,)},
}


def sinusoids(times: Tensor, width: int) -> Tensor:
    """(batch,) -> (batch, width): sines, then cosines, of frequencies from 1 down to 1 / 10,000."""
    exponents = torch.arange(width // 2, device=times.device) / (width // 2 - 1)
    angles = times.float()[:, None] * torch.exp(-math.log(PERIOD) * exponents)
    return torch.cat((angles.sin(), angles.cos()), 1)


class Condition(nn.Module):
    """What the layers are told of a sample beside itself: the time, and its class.

    Args:
        width: of the sinusoids, even and at least 4.
        hidden: of what comes out.
        num_classes: 0: none.

    Shapes: times (batch,), or (1,) for all alike; labels (batch,), several a sample (batch, n), whose vectors
    are added up, or None for "none" -> (batch or 1, hidden).
    """

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"width {width} must be even and at least 4")
        self.width = width
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, hidden)
        self.classes = nn.Embedding(num_classes + 1, hidden) if num_classes else None

    def forward(self, times: Tensor, labels: Tensor | None) -> Tensor:
        x = self.linear2(F.silu(self.linear1(sinusoids(times, self.width))))
        if self.classes is None:
            return F.silu(x)
        of_class = self.classes.weight[-1:] if labels is None else self.classes(labels)
        return F.silu(x + (of_class.sum(1) if of_class.dim() == 3 else of_class))


def _silu(x: Tensor) -> Tensor:
    """Of what nobody else needs: in place, where no gradient will ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the condition is added between them."""

    def __init__(self, in_chans: int, out_chans: int, hidden: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_chans, EPS)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.condition = nn.Linear(hidden, out_chans)
        self.norm2 = nn.GroupNorm(groups, out_chans, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1)
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1) if in_chans != out_chans else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # What a convolution gives is ours alone: adding in place spares memory and time.
        h = self.conv1(_silu(self.norm1(x))).add_(self.condition(condition)[:, :, None, None])
        return self.conv2(self.dropout(_silu(self.norm2(h)))).add_(self.shortcut(x))


class SelfAttention(nn.Module):
    """Every pixel looks at every other, with one head, beside a shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(pixels)[:, None] for layer in (self.q, self.k, self.v))
        found = self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + found.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Half as many pixels a side, by a convolution of stride 2 that is padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice as many pixels a side: each four times, then a convolution.

    Both are computed as one transposed convolution of stride 2, whose kernel is the convolution's spread over
    2 x 2 pixels: 4 x 4 instead of 4 * 3 x 3 products for every pixel that comes in.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.pad(self.conv.weight, (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        kernel = kernel[:, :, :, 1:] + kernel[:, :, :, :-1]
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The blocks that work at one size of the image, and what leads to the next size."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], resample: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample: nn.Module | None = resample


class UNet(nn.Module):
    """Down to few pixels with many channels and up again; what was seen on the way down is handed across.

    Ho et al. 2020, appendix B, and their published code. The last layer is part of it, and begins at 0;
    `num_features` is its channels.

    Args:
        in_chans: channels of the images.
        img_size: height and width, pixels, halved from each level to the next.
        width: channels at full size.
        mults: of each level's channels, times `width`.
        attention: heights of the image, in pixels, at which blocks are followed by attention; in the middle
            there is always one.
        n_res: residual blocks of a level on the way down; on the way up there is one more.
        dropout: probability, within the blocks.
        groups: of the group normalisations.
        num_classes: 0: samples have no class.
        out_chans: channels of the answer; 0: as many as the images have. Fewer, where some channels are only
            there to be looked at.

    Shapes: images (batch, in_chans, height, width), times and labels as in `Condition` -> (batch, out_chans,
    height, width).

    Raises:
        ValueError: sizes that cannot be halved, groups that do not share the channels, or unknown sizes.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^conv_in\.", "stem."),
        (r"^time_embedding\.linear_(\d)\.", r"condition.linear\1."),
        (r"^class_embedding\.", "condition.classes."),
        (r"^(down|up)_blocks\.", r"\1."),
        (r"^mid_block\.", "middle."),
        (r"\.(down|up)samplers\.0\.", ".resample."),
        (r"\.resnets\.", ".blocks."),
        (r"\.time_emb_proj\.", ".condition."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj."),
        (r"^conv_norm_out\.", "norm."),
        (r"^conv_out\.", "head."),
    )
    """Those of diffusers' UNet2DModel."""

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 32,
        width: int = 64,
        mults: Sequence[int] = (1, 2, 2),
        attention: Sequence[int] = (),
        n_res: int = 2,
        dropout: float = 0.0,
        groups: int = 32,
        num_classes: int = 0,
        out_chans: int = 0,
    ) -> None:
        super().__init__()
        out_chans = out_chans or in_chans
        require_positive(in_chans=in_chans, width=width, mults=mults, n_res=n_res, groups=groups)
        sizes = _halvings(img_size, len(mults))
        if width % groups:
            raise ValueError(f"groups {groups} do not divide width {width}")
        if unknown := set(attention) - {height for height, _ in sizes}:
            raise ValueError(
                f"attention {sorted(unknown)}: there is no such level, only {[height for height, _ in sizes]}"
            )
        hidden = 4 * width
        widths = [width * mult for mult in mults]
        self.attention_tokens = max(h * w for h, w in sizes if h in (*attention, sizes[-1][0]))
        """Pixels that look at one another, at most."""
        self.condition = Condition(width, hidden, num_classes)
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1)

        def level(ins: Sequence[int], out: int, height: int, resample: nn.Module | None) -> Level:
            look = height in attention
            return Level(
                [ResBlock(before, out, hidden, groups, dropout) for before in ins],
                [SelfAttention(out, groups) if look else nn.Identity() for _ in ins],
                resample,
            )

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        handed = [width]
        now = width
        for i, (out, (height, _)) in enumerate(zip(widths, sizes, strict=True)):
            last = i == len(widths) - 1
            self.down.append(
                level([now, *[out] * (n_res - 1)], out, height, None if last else Downsample(out))
            )
            handed += [out] * (n_res + (not last))
            now = out
        self.middle = Level(
            [ResBlock(now, now, hidden, groups, dropout) for _ in range(2)],
            [SelfAttention(now, groups)],
            None,
        )
        for i, (out, (height, _)) in reversed(list(enumerate(zip(widths, sizes, strict=True)))):
            ins = [(now if block == 0 else out) + handed.pop() for block in range(n_res + 1)]
            self.up.append(level(ins, out, height, Upsample(out) if i else None))
            now = out
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.head = nn.Conv2d(width, out_chans, 3, padding=1)
        self.num_features = out_chans
        self.shape = (in_chans, *sizes[0])
        _init(self)

    def example(self) -> tuple[Tensor, Tensor]:
        """What it takes, of one sample."""
        weight = self.stem.weight
        return weight.new_zeros(1, *self.shape), weight.new_zeros(1)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = self.condition(times, labels)
        h = self.stem(x)
        handed = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):  # type: ignore[arg-type]
                h = attention(block(h, condition))
                handed.append(h)
            if level.resample is not None:
                h = level.resample(h)  # type: ignore[operator]
                handed.append(h)
        before, after = self.middle.blocks
        h = after(self.middle.attentions[0](before(h, condition)), condition)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):  # type: ignore[arg-type]
                h = attention(block(torch.cat((h, handed.pop()), 1), condition))
            if level.resample is not None:
                h = level.resample(h)  # type: ignore[operator]
        return self.head(_silu(self.norm(h)))


class DiffusionMLP(nn.Module):
    """Fully connected layers that know the time, for samples that are rows of numbers.

    Args:
        in_features: numbers of a sample; `num_features` is the same.
        width: of the layers.
        n_layer: residual blocks of two layers.
        num_classes: 0: samples have no class.

    Shapes: (batch, in_features), times and labels as in `Condition` -> (batch, in_features).
    """

    spec: dict[str, Any]
    attention_tokens = 0

    def __init__(
        self, in_features: int = 2, width: int = 128, n_layer: int = 3, num_classes: int = 0
    ) -> None:
        super().__init__()
        require_positive(in_features=in_features, width=width, n_layer=n_layer)
        self.condition = Condition(width, width, num_classes)
        self.stem = nn.Linear(in_features, width)
        self.conditions = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layer))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layer))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layer))
        self.head = nn.Linear(width, in_features)
        self.num_features = in_features
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def example(self) -> tuple[Tensor, Tensor]:
        """What it takes, of one sample."""
        return self.head.bias.new_zeros(1, self.num_features), self.head.bias.new_zeros(1)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = self.condition(times, labels)
        h = self.stem(x)
        for to_hidden, first, second in zip(self.conditions, self.first, self.second, strict=True):
            h = h + second(F.silu(first(F.silu(h)) + to_hidden(condition)))
        return self.head(F.silu(h))


def load_published(unet: UNet, state: Mapping[str, Tensor]) -> None:
    """Gives a U-Net the weights of a `UNet2DModel` of diffusers of the same configuration.

    Raises:
        LabError: a weight is lacking, left over or of another shape.
    """
    found = {}
    for key, value in state.items():
        for pattern, replacement in UNet.published_names:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    own = unet.state_dict()
    for key in sorted(own.keys() | found.keys()):
        ours, theirs = (tuple(tensors[key].shape) if key in tensors else "none" for tensors in (own, found))
        if ours != theirs:
            raise LabError(f"UNet: the published weights do not fit: {key} is {theirs}, not {ours}.")
    unet.load_state_dict(found)


def _halvings(img_size: int | Sequence[int], n_levels: int) -> list[tuple[int, int]]:
    """(height, width) at each level."""
    high, wide = image_size(img_size)
    least = 2 ** (n_levels - 1)
    if high % least or wide % least:
        raise ValueError(
            f"img_size {img_size} cannot be halved {n_levels - 1} times: with fewer mults, or images whose "
            f"sides are multiples of {least}, it can"
        )
    return [(high >> i, wide >> i) for i in range(n_levels)]


def _init(net: UNet) -> None:
    """Glorot's uniform weights, biases of 0, and last layers of residual branches that begin at 0, as in the
    published code."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.proj.weight)
    nn.init.zeros_(net.head.weight)
