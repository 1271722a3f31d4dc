"""Eyes and a memory: what sees one frame at a time and has to remember the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from supervised import backbones
from supervised.backbones.recurrent import State

MEMORIES = ("lstm", "gru", "rnn")


class DRQN(nn.Module):
    """A convolutional network on each frame and a recurrent one on what it sees (arXiv 1507.06527, figure 2).

    Its defaults at 1x84x84 are the paper's: Nature's convolutions and an LSTM of 512 in place of the fully
    connected layer, 7,547,040 parameters.

    Args:
        in_chans: channels of a frame.
        img_size: height and width of a frame, pixels.
        memory: "lstm", "gru" or "rnn".
        hidden: units of the memory, `num_features`.
        n_layer: layers of the memory.
        eyes: any backbone for images.
        eyes_spec: its own arguments; None: Nature's without the fully connected layer.

    Raises:
        ValueError: an unknown memory.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 84,
        memory: str = "lstm",
        hidden: int = 512,
        n_layer: int = 1,
        eyes: str = "nature_cnn",
        eyes_spec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if memory not in MEMORIES:
            raise ValueError(f"memory {memory!r} is none of {MEMORIES}")
        spec = {"width": None} if eyes_spec is None and eyes == "nature_cnn" else dict(eyes_spec or {})
        self.eyes = backbones.build(eyes, in_chans=in_chans, img_size=img_size, **spec)
        self.memory: Any = backbones.build(
            memory, in_features=self.eyes.num_features, hidden=hidden, n_layer=n_layer
        )
        self.takes_bytes = getattr(self.eyes, "takes_bytes", False)
        self.num_features = hidden

    def forward(
        self, frames: Tensor, state: State | None = None, begins: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Features of every step.

        Args:
            frames: (batch, time, in_chans, height, width).
            state: what is remembered before the first step, tensors (batch, n_layer, hidden); None: nothing.
            begins: bool (batch, time), True where a game begins: all before is forgotten.

        Returns:
            (batch, time, hidden), and what is remembered behind the last step.
        """
        # A memory of many steps is kept in fp32: in bf16 what is added to it in small portions is lost.
        seen = self.eyes(frames.flatten(0, 1)).float().unflatten(0, frames.shape[:2])
        now: State = self.memory.initial_state(len(frames), seen) if state is None else state
        features = []
        for t in range(frames.shape[1]):
            if begins is not None:
                kept = (~begins[:, t]).to(seen.dtype)[:, None, None]
                now = tuple(tensor * kept for tensor in now)
            output, now = self.memory.step(seen[:, t], now)
            features.append(output)
        return torch.stack(features, 1), now
