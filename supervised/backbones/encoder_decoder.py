"""The transformer of Vaswani et al. 2017, and its encoder and decoder each by itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from supervised.backbones.transformer import (
    INIT_STD,
    MLPS,
    NORM_POSITIONS,
    Attention,
    FeedForward,
    Rotation,
    attention_maps,
    default_mlp_width,
    look_up,
    rotary,
    rotate,
)

POSITIONS = ("sinusoidal", "learned", "rotary")
WAVELENGTH_BASE = 10_000.0

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-base": {"vocab_size": 37_000},
    "transformer-big": {"vocab_size": 37_000, "width": 1024, "n_head": 16, "dropout": 0.3},
}
"""The two of Vaswani et al. 2017, table 3 (English to German)."""

KeysValues = tuple[Tensor, Tensor]
"""(batch, heads, time, head_dim) each."""


class Memory(NamedTuple):
    """What a source leaves for the decoder; every tensor has the batch first."""

    keys_values: tuple[KeysValues, ...]
    """Of the source tokens, for every block of the decoder."""
    mask: Tensor | None
    """(batch, 1, 1, source_time), True for tokens to see."""


class MultiHeadAttention(Attention):
    """`Attention` of some tokens to the same or others, whose keys and values can be computed before."""

    def keys_values(self, x: Tensor, rotation: Rotation | None = None) -> KeysValues:
        k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.k, self.v))
        return (k if rotation is None else rotate(k, rotation)).transpose(1, 2), v.transpose(1, 2)

    def attend_to(
        self, x: Tensor, to: KeysValues, rotation: Rotation | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        q = (q if rotation is None else rotate(q, rotation)).transpose(1, 2)
        return self.out(self.attend(q, *to, mask, is_causal))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The options all blocks share; described at `Transformer`."""

    width: int
    n_head: int
    mlp_width: int | None
    mlp: str
    positions: str
    max_positions: int
    norm_position: str
    norm_eps: float
    dropout: float

    def __post_init__(self) -> None:
        for option, known in (
            ("positions", POSITIONS),
            ("norm_position", NORM_POSITIONS),
            ("mlp", MLPS),
        ):
            if getattr(self, option) not in known:
                raise ValueError(f"{option} {getattr(self, option)!r} is none of {known}")
        mlp_width = 1 if self.mlp_width is None else self.mlp_width
        if min(self.width, self.n_head, self.max_positions, mlp_width) < 1:
            raise ValueError("n_head, max_positions and all widths must be at least 1")
        if self.width % self.n_head:
            raise ValueError(f"width {self.width} must be divisible by n_head {self.n_head}")
        if self.positions == "rotary" and self.width // self.n_head % 2:
            raise ValueError(f"rotary positions need heads of even width, not {self.width} / {self.n_head}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"sinusoidal positions need an even width, not {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")

    def attention(self, layer: int) -> MultiHeadAttention:
        return MultiHeadAttention(self.width, self.n_head, self.n_head, True, self.dropout, layer, INIT_STD)

    def feed_forward(self) -> FeedForward:
        mlp_width = default_mlp_width(self.mlp, self.width) if self.mlp_width is None else self.mlp_width
        return FeedForward(self.mlp, self.width, mlp_width, True, INIT_STD)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.width, self.norm_eps)


class Block(nn.Module):
    """Self-attention, in a decoder attention to the source, then an MLP; each is added to the residual."""

    def __init__(self, shape: Shape, layer: int, cross: bool) -> None:
        super().__init__()
        self.attention, self.attention_norm = shape.attention(layer), shape.norm()
        self.cross = shape.attention(layer) if cross else None
        self.cross_norm = shape.norm() if cross else None
        self.mlp, self.mlp_norm = shape.feed_forward(), shape.norm()
        self.dropout = nn.Dropout(shape.dropout)
        self.post_norm = shape.norm_position == "post"

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | None,
        is_causal: bool,
        memory: KeysValues | None = None,
        memory_mask: Tensor | None = None,
        cache: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """The tokens behind this block, and the keys and values of all of them so far."""
        seen: list[KeysValues] = []

        def attend_to_itself(x: Tensor) -> Tensor:
            to = self.attention.keys_values(x, rotation)
            if cache is not None:
                to = torch.cat((cache[0], to[0]), dim=2), torch.cat((cache[1], to[1]), dim=2)
            seen.append(to)
            return self.attention.attend_to(x, to, rotation, mask, is_causal)

        x = self._add(x, self.attention_norm, attend_to_itself)
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            assert memory is not None
            x = self._add(x, self.cross_norm, lambda x: cross.attend_to(x, memory, None, memory_mask, False))
        return self._add(x, self.mlp_norm, self.mlp), seen[0]

    def _add(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.post_norm:
            return norm(x + self.dropout(layer(x)))
        return x + self.dropout(layer(norm(x)))


class Stack(nn.Module):
    """Positions and blocks: all of an encoder or a decoder but its tokens."""

    def __init__(self, shape: Shape, n_layer: int, causal: bool, cross: bool = False) -> None:
        super().__init__()
        if n_layer < 1:
            raise ValueError("there must be at least one layer")
        self.shape, self.causal = shape, causal
        learned = shape.positions == "learned"
        self.positions = nn.Embedding(shape.max_positions, shape.width) if learned else None
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, layer, cross) for layer in range(n_layer))
        self.norm = shape.norm() if shape.norm_position == "pre" else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        past: tuple[KeysValues, ...] = (),
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        """Features of token embeddings (batch, time, width), and all blocks' keys and values so far.

        With `past`, of as many tokens before them, `time` must be 1.
        """
        begin = past[0][0].shape[2] if past else 0
        position_ids = torch.arange(begin, begin + x.shape[1], device=x.device)[None]
        rotation = None
        if self.shape.positions == "rotary":
            rotation = rotary(position_ids, self.shape.width // self.shape.n_head, WAVELENGTH_BASE, x.dtype)
        elif self.positions is None:
            x = x + sinusoids(position_ids, self.shape.width).to(x.dtype)
        elif begin + x.shape[1] > self.shape.max_positions:
            raise ValueError(
                f"{begin + x.shape[1]} tokens are more than max_positions {self.shape.max_positions}"
            )
        else:
            x = x + self.positions(position_ids)
        x = self.dropout(x)
        is_causal = self.causal and not past and x.shape[1] > 1
        if is_causal and mask is not None:  # torch's attention takes either one or the other
            time = x.shape[1]
            mask, is_causal = mask & torch.ones(time, time, dtype=torch.bool, device=x.device).tril(), False
        seen = []
        for layer, block in enumerate(self.blocks):
            attended = (None, None) if memory is None else (memory.keys_values[layer], memory.mask)
            x, keys_values = block(x, rotation, mask, is_causal, *attended, past[layer] if past else None)
            seen.append(keys_values)
        return self.norm(x), tuple(seen)


class TransformerEncoder(nn.Module):
    """An encoder alone, as BERT's: every token sees all others. Arguments as `Transformer`."""

    spec: dict[str, Any]
    causal = False

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        n_layer: int = 6,
        n_head: int = 8,
        mlp_width: int | None = None,
        mlp: str = "relu",
        positions: str = "sinusoidal",
        max_positions: int = 512,
        norm_position: str = "post",
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        shape = Shape(
            width=width,
            n_head=n_head,
            mlp_width=mlp_width,
            mlp=mlp,
            positions=positions,
            max_positions=max_positions,
            norm_position=norm_position,
            norm_eps=norm_eps,
            dropout=dropout,
        )
        self.num_features = width
        self.tokens = embedding(vocab_size, width)
        self.stack = Stack(shape, n_layer, self.causal)
        self.apply(init_weights)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of every token.

        Args:
            ids: (batch, time).
            mask: (batch, time), True for tokens to see; None: all.

        Returns:
            (batch, time, width).
        """
        x = look_up(self.tokens, ids, "token ids") * math.sqrt(self.num_features)
        return self.stack(x, _for_attention(mask))[0]

    def attention_maps(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n_layer, batch, heads, time, time): where each token looked; arguments as `forward`."""
        return attention_maps(
            {"self": [block.attention for block in self.stack.blocks]}, lambda: self(ids, mask)
        )["self"]


class TransformerDecoder(TransformerEncoder):
    """A decoder alone: as `TransformerEncoder`, but a token sees no later one."""

    causal = True


class Transformer(nn.Module):
    """The encoder-decoder of Vaswani et al. 2017 (arXiv 1706.03762), to features of target tokens.

    Its defaults are the base model, `PRESETS` has the big one; with a vocabulary of 37,000 they have
    63,082,496 and 214,245,376 parameters. A head that shares `tokens.weight`, as published, adds none.

    Args:
        vocab_size: number of target tokens.
        source_vocab_size: number of source tokens; None: both sides share one vocabulary and its embeddings.
        width: features of a token, `num_features`.
        n_layer: blocks of the encoder.
        n_decoder_layer: blocks of the decoder; None: as many.
        n_head: attention heads of width / n_head features each.
        mlp_width: hidden units of a block's MLP; None: 4 * width (2/3 of that for "swiglu").
        mlp: "relu" as published, "gelu_tanh" or "swiglu".
        positions: "sinusoidal" (section 3.5) and "learned" are added to the tokens, "rotary" turns queries
            and keys of self-attention.
        max_positions: the longest sequence; a limit for learned positions only.
        norm_position: "post" normalises each sum with the residual, as published; "pre" what enters attention
            and MLP, and once more at the end, which trains without a warm-up (arXiv 2002.04745).
        norm_eps: added to the variance in norms.
        dropout: probability, on the embeddings, attention weights and what is added to the residual.

    Raises:
        ValueError: an option that does not exist, or numbers that do not divide.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        vocab_size: int,
        source_vocab_size: int | None = None,
        width: int = 512,
        n_layer: int = 6,
        n_decoder_layer: int | None = None,
        n_head: int = 8,
        mlp_width: int | None = None,
        mlp: str = "relu",
        positions: str = "sinusoidal",
        max_positions: int = 512,
        norm_position: str = "post",
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        shape = Shape(
            width=width,
            n_head=n_head,
            mlp_width=mlp_width,
            mlp=mlp,
            positions=positions,
            max_positions=max_positions,
            norm_position=norm_position,
            norm_eps=norm_eps,
            dropout=dropout,
        )
        self.num_features = width
        self.tokens = embedding(vocab_size, width)
        self.source_tokens = None if source_vocab_size is None else embedding(source_vocab_size, width)
        self.encoder = Stack(shape, n_layer, causal=False)
        n_decoder_layer = n_layer if n_decoder_layer is None else n_decoder_layer
        self.decoder = Stack(shape, n_decoder_layer, causal=True, cross=True)
        self.apply(init_weights)

    def forward(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Features of every target token, from which a head says the next one (teacher forcing).

        Args:
            source_ids: (batch, source_time).
            target_ids: (batch, target_time): what the decoder reads, i.e. the target behind a start token.
            source_mask: (batch, source_time), True for tokens to see; None: all.

        Returns:
            (batch, target_time, width).
        """
        memory = self.encode(source_ids, source_mask)
        return self.decoder(self._embedded(self.tokens, target_ids, "target ids"), memory=memory)[0]

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Memory:
        """Reads the source: its keys and values for every block of the decoder; arguments as `forward`."""
        mask = _for_attention(source_mask)
        x, _ = self.encoder(self._embedded(self.source_tokens or self.tokens, source_ids, "source ids"), mask)
        blocks: Any = self.decoder.blocks
        return Memory(tuple(block.cross.keys_values(x) for block in blocks), mask)

    def start(self, memory: Memory) -> tuple[KeysValues, ...]:
        """The decoder's state before the first token: no keys and values in any block."""
        return tuple((keys[:, :, :0], values[:, :, :0]) for keys, values in memory.keys_values)

    def step(
        self, memory: Memory, state: tuple[KeysValues, ...], tokens: Tensor
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        """Reads one more target token, (batch,): its features (batch, width), and the state behind it."""
        x = self._embedded(self.tokens, tokens[:, None], "target ids")
        features, state = self.decoder(x, memory=memory, past=state)
        return features[:, 0], state

    def attention_maps(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Where each token looked; arguments as `forward`.

        Returns:
            "encoder", "decoder" and "cross": (layers, batch, heads, queries, keys).
        """
        layers = {
            "encoder": [block.attention for block in self.encoder.blocks],
            "decoder": [block.attention for block in self.decoder.blocks],
            "cross": [block.cross for block in self.decoder.blocks],
        }
        return attention_maps(layers, lambda: self(source_ids, target_ids, source_mask))

    def _embedded(self, table: nn.Embedding, ids: Tensor, what: str) -> Tensor:
        return look_up(table, ids, what) * math.sqrt(self.num_features)  # section 3.4


def embedding(vocab_size: int, width: int) -> nn.Embedding:
    """A table of tokens, refused where it would be empty."""
    if vocab_size < 1:
        raise ValueError("a vocabulary must have at least 1 token")
    return nn.Embedding(vocab_size, width)


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Sine and cosine, in turn, of position / 10000^(2i / width) (section 3.5): (..., time, width).

    Computed in every forward pass, for the reason given at `rotary`.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    angles = position_ids[..., None] * (1.0 / WAVELENGTH_BASE**exponents)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def init_weights(module: nn.Module) -> None:
    """Xavier's uniform weights (Glorot and Bengio 2010) and no biases; embeddings, which are multiplied by
    sqrt(width), normal with 1 / sqrt(width)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def _for_attention(mask: Tensor | None) -> Tensor | None:
    """(batch, time) of tokens to see -> (batch, 1, 1, time), for all heads and queries."""
    return None if mask is None else mask[:, None, None]
