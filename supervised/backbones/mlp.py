"""Fully connected nets."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between and behind them, over a flattened input.

    Args:
        in_features: length of a flat input; or leave it out and give in_chans and img_size.
        in_chans: channels of an image input.
        img_size: height and width of an image input, pixels.
        hidden: widths of the layers; the last one is `num_features`.

    Shapes: (batch, ...) -> (batch, hidden[-1]).
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_features: int | None = None,
        in_chans: int | None = None,
        img_size: int | Sequence[int] | None = None,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        if in_features is None:
            if in_chans is None or img_size is None:
                raise ValueError("give in_features, or in_chans and img_size")
            in_features = in_chans * math.prod(image_size(img_size))
        if not hidden:
            raise ValueError("hidden must name at least one layer width")
        widths = [in_features, *hidden]
        if min(widths) < 1:
            raise ValueError(f"in_features {in_features} and hidden {list(hidden)} must be positive")
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels from either one side of a square or both."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"img_size {size} must be one side, or height and width")
    height, width = sides
    if height < 1 or width < 1:
        raise ValueError(f"img_size {size} must be positive")
    return height, width
