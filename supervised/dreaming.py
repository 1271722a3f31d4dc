"""A world model's dream: the next frame from the last few and the actions, again and again from its own.

Diffusion as in DIAMOND (Alonso et al. 2024, arXiv 2405.12399, section 3): the past frames are further
channels of the noisy one, and the actions are told beside the time. The way to a frame is a straight line
(flow matching), and may begin at the frame before instead of at noise: then the network learns what changes,
and a ball of one pixel is no detail that few steps leave out.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised import flow_matching

TIME_SCALE = 1000.0
"""Times go from 0 to 1, and the network's sinusoids are made for steps up to about this."""

Network = Callable[..., Tensor]


class Dreamer(nn.Module):
    """A U-Net that says the velocity of a frame on its way.

    Args:
        backbone: with `patch`^2 channels for each frame, one class for each action at each place.
        patch: side of the squares of pixels that are channels of one place (arXiv 1609.05158's shuffle,
            backwards): at full size a convolution would cost four times as much for twos.
        n_actions: of the game.
        starts, start_actions: real frames uint8 (n, context, height, width) and actions int64 (n, context)
            that dreams may begin with: kept with the weights, so that they need no data.

    Shapes: x (batch, 1, height, width) on its way, past (batch, context, height, width), both -1..1, times
    (batch,) or (1,), actions (batch, context), each taken at its frame -> (batch, 1, height, width).
    """

    starts: Tensor
    start_actions: Tensor
    places: Tensor

    def __init__(
        self, backbone: nn.Module, patch: int, n_actions: int, starts: Tensor, start_actions: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.patch = backbone, patch
        self.register_buffer("starts", starts)
        self.register_buffer("start_actions", start_actions)
        self.register_buffer("places", torch.arange(starts.shape[1]) * n_actions, persistent=False)

    def forward(self, x: Tensor, past: Tensor, times: Tensor, actions: Tensor) -> Tensor:
        seen = F.pixel_unshuffle(torch.cat((past, x), 1), self.patch)
        labels = actions + self.places
        return F.pixel_shuffle(self.backbone(seen, TIME_SCALE * times, labels).float(), self.patch)


def network_shape(context: int, patch: int, n_actions: int, image: Sequence[int]) -> dict[str, Any]:
    """The arguments of a Dreamer's backbone that follow from the data; `image` is (height, width)."""
    return {
        "in_chans": (context + 1) * patch**2,
        "out_chans": patch**2,
        "img_size": [side // patch for side in image],
        "num_classes": context * n_actions,
    }


def scaled(frames: Tensor) -> Tensor:
    """Bytes as -1..1."""
    return frames.float() * (2 / 255) - 1


def unscaled(frames: Tensor) -> Tensor:
    """-1..1 as bytes."""
    return ((frames + 1) * (255 / 2)).round().clamp(0, 255).to(torch.uint8)


def start_of(past: Tensor, noise: float | None, generator: torch.Generator | None = None) -> Tensor:
    """Where the way to the next frame begins, (batch, 1, height, width).

    Args:
        past: frames (batch, context, height, width).
        noise: standard deviation of what is put on the last of them; None: unit noise instead of a frame.
        generator: what is drawn from; None: torch's global one.
    """
    last = past[:, -1:]
    if noise == 0:
        return last
    drawn = torch.randn(last.shape, device=past.device, generator=generator)
    return drawn if noise is None else last + noise * drawn


def next_frame(
    network: Network,
    past: Tensor,
    actions: Tensor,
    *,
    n_steps: int,
    noise: float | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(batch, 1, height, width) in -1..1: the frame after the past ones (batch, context, height, width).

    Args:
        network: a `Dreamer`.
        actions: (batch, context), the last of which is taken now.
        n_steps: of the way.
        noise, generator: as in `start_of`.
    """
    x = start_of(past, noise, generator)

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        return network(x, past, times, actions)

    ((_, made),) = deque(flow_matching.solve(velocity, x, n_steps=n_steps), maxlen=1)
    return made.clamp(-1, 1)


def dream(
    network: Network,
    past: Tensor,
    actions: Tensor,
    *,
    n_steps: int,
    noise: float | None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields frame after frame, each fed to the next, (batch, 1, height, width) in -1..1.

    Args:
        past: real frames to begin with, (batch, context, height, width) in -1..1.
        actions: (batch, context - 1 + frames): as many frames are dreamed as there are actions for.
    """
    context = past.shape[1]
    for step in range(actions.shape[1] - context + 1):
        taken = actions[:, step : step + context]
        x = next_frame(network, past, taken, n_steps=n_steps, noise=noise, generator=generator)
        past = torch.cat((past[:, 1:], x), 1)
        yield x
