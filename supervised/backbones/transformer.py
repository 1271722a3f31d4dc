"""A decoder-only transformer of which GPT-1, GPT-2, GPT-3 and Llama are settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.ragged import Ragged, Tails

POSITIONS = ("rotary", "learned", "alibi")
NORM_POSITIONS = ("pre", "post")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu_tanh", "gelu", "relu")

INIT_STD = 0.02
"""Standard deviation of GPT-2's initial weights (Radford et al. 2019, section 2.3, and their code)."""

GPT2_OPTIONS: dict[str, Any] = {
    "vocab_size": 50257,
    "max_positions": 1024,
    "positions": "learned",
    "norm_position": "pre",
    "norm": "layer",
    "mlp": "gelu_tanh",
    "bias": True,
    "norm_eps": 1e-5,
}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2_OPTIONS, "n_layer": 12, "width": 768, "n_head": 12},
    "gpt2-medium": {**GPT2_OPTIONS, "n_layer": 24, "width": 1024, "n_head": 16},
    "gpt2-large": {**GPT2_OPTIONS, "n_layer": 36, "width": 1280, "n_head": 20},
    "gpt2-xl": {**GPT2_OPTIONS, "n_layer": 48, "width": 1600, "n_head": 25},
}
"""The four GPT-2s (Radford et al. 2019, table 2) by the names their checkpoints go under."""


class KVCache(Protocol):
    """Keeps keys and values between calls; every cache of transformers is one."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Appends (batch, n_kv_head, time, head_dim) to what `layer_idx` has seen, and returns all of it."""
        ...


Rotation = tuple[Tensor, Tensor]
"""What `rotate` needs: cosines and signed sines, each (batch, time, 1, head_dim)."""


class ScaledLinear(nn.Linear):
    """A linear layer that starts with a standard deviation of its own; `init_weights` finds it here."""

    def __init__(self, in_features: int, out_features: int, bias: bool, init_std: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_std = init_std


class Attention(nn.Module):
    """Causal self-attention.

    Queries, keys and values have a matrix each: to cut them out of one product costs more on a CPU, in the
    backward pass, than the larger product saves.
    """

    def __init__(
        self,
        width: int,
        n_head: int,
        n_kv_head: int,
        bias: bool,
        dropout: float,
        layer: int,
        out_std: float,
        alibi: bool = False,
    ) -> None:
        super().__init__()
        self.alibi = alibi
        self.head_dim = width // n_head
        self.group = n_head // n_kv_head
        self.dropout = dropout
        self.layer = layer
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, n_kv_head * self.head_dim, bias=bias)
        self.v = nn.Linear(width, n_kv_head * self.head_dim, bias=bias)
        self.out = ScaledLinear(width, width, bias, out_std)
        self.kept: list[Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | None,
        cache: KVCache | None,
        documents: Ragged | None = None,
        wanted: Tails | None = None,
    ) -> Tensor:
        queries = x if wanted is None else wanted.take(x)
        q = self.q(queries).unflatten(-1, (-1, self.head_dim))
        k = self.k(x).unflatten(-1, (-1, self.head_dim))
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            cos, sin = rotation
            q = rotate(q, rotation if wanted is None else (wanted.take(cos), wanted.take(sin)))
            k = rotate(k, rotation)
        if documents is not None:
            return self.out(self._attend_in_documents(q[0], k[0], v[0], documents, wanted)[None])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if mask is None and x.shape[1] > 1 and k.shape[2] != x.shape[1]:
            raise ValueError("several tokens behind a filled cache need an attention_mask")
        at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=x.device)[None]
        return self.out(self.attend_causally(q, k, v, mask, at))

    def _attend_in_documents(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Ragged, wanted: Tails | None
    ) -> Tensor:
        """(tokens, heads, head_dim) of a single row each -> (tokens of q, width)."""
        lead, (n, longest) = documents.lead, documents.shape
        rows = wanted.rows if wanted else documents
        queries, keys, values = rows.pad(q), documents.pad(k), documents.pad(v)
        if lead:
            keys = torch.cat((k[:lead].expand(n, -1, -1, -1), keys), 1)
            values = torch.cat((v[:lead].expand(n, -1, -1, -1), values), 1)
        places = torch.arange(lead + longest, device=q.device)
        at = lead + wanted.columns if wanted else places[None, lead:]
        mask = (places <= at[..., None])[:, None] if lead or wanted else None
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        attended = rows.unpad(self.attend_causally(queries, keys, values, mask, at))
        if not lead or wanted:
            return attended
        q, k, v = (x[None, :lead].transpose(1, 2) for x in (q, k, v))
        return torch.cat((self.attend_causally(q, k, v, None, places[None, :lead])[0], attended))

    def attend_causally(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
        """`attend`, causal unless the mask says more; `at` (batch or 1, time of q): places among the keys."""
        if self.alibi:
            mask = linear_biases(mask, at, q.shape[1], k.shape[2]).to(q.dtype)
        return self.attend(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Values weighted by attention: (batch, heads, time, head_dim) each -> (batch, time of q, width)."""
        if self.kept is not None:
            self.kept.append(attention_weights(q, repeat_heads(k, self.group), mask, is_causal))
        grouped = self.group > 1
        if grouped and mask is not None and q.device.type != "cpu":
            # CUDA's fast kernels know groups only without a mask; the CPU's knows both.
            k, v = repeat_heads(k, self.group), repeat_heads(v, self.group)
            grouped = False
        x = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=grouped,
        )
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """The MLP of a block: W_out (silu(W_gate x) * W_up x), or W_out f(W_up x) with f a GELU or ReLU."""

    def __init__(self, kind: str, width: int, mlp_width: int, bias: bool, out_std: float) -> None:
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(width, mlp_width, bias=bias) if kind == "swiglu" else None
        self.up = nn.Linear(width, mlp_width, bias=bias)
        self.out = ScaledLinear(mlp_width, width, bias, out_std)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.out(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "relu":
            return self.out(F.relu(self.up(x)))
        return self.out(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream."""

    def __init__(
        self,
        attention: Attention,
        mlp: FeedForward,
        attention_norm: nn.Module,
        mlp_norm: nn.Module,
        norm_position: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.mlp, self.mlp_norm = mlp, mlp_norm
        self.dropout = nn.Dropout(dropout)
        self.post_norm = norm_position == "post"

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        mask: Tensor | None,
        past_key_values: KVCache | None = None,  # the name by which gradient checkpointing takes it away
        documents: Ragged | None = None,
        wanted: Tails | None = None,
    ) -> Tensor:
        inputs = x if self.post_norm else self.attention_norm(x)
        attended = self.attention(inputs, rotation, mask, past_key_values, documents, wanted)
        x = self.dropout(attended) + (x if wanted is None else wanted.take(x))
        if self.post_norm:
            x = self.attention_norm(x)
            return self.mlp_norm(x + self.dropout(self.mlp(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class LabGPT(nn.Module):
    """A decoder-only transformer, from token ids to features of every token; heads are other modules' work.

    Its settings cover Llama (the defaults; arXiv 2302.13971), GPT-2 (`PRESETS`; Radford et al. 2019), GPT-3
    but for its sparse attention (arXiv 2005.14165), BLOOM by "alibi" and `embedding_norm` (arXiv 2211.05100)
    and, with post-norm, GPT-1 (Radford et al. 2018). Weights start as GPT-2's do.

    Args:
        vocab_size: number of tokens.
        width: features of a token, `num_features`.
        n_layer: blocks.
        n_head: attention heads of width / n_head features each.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads of queries (grouped-query
            attention, arXiv 2305.13245); None: n_head.
        mlp_width: hidden units of a block's MLP; None: `default_mlp_width`.
        max_positions: the longest sequence. With learned positions this is a hard limit; others go on
            beyond it, untrained.
        positions: "rotary" (arXiv 2104.09864, in Llama's layout), "learned" (a table added to the tokens) or
            "alibi" (attention falls with the distance; arXiv 2108.12409).
        norm_position: "pre" normalises what enters attention and MLP, and once more at the end; "post"
            normalises each sum with the residual (Vaswani et al. 2017), the last of which is the end.
        norm: "rms" (arXiv 1910.07467) or "layer".
        mlp: "swiglu" (arXiv 2002.05202), "gelu_tanh" (GPT-2's "gelu_new"), "gelu" or "relu".
        bias: whether linear layers and layer norms have biases.
        rope_theta: base of the rotary wavelengths.
        norm_eps: added to the variance in norms.
        dropout: probability, on the embeddings, attention weights and what is added to the residual.
        embedding_norm: whether the embeddings are normalised, too.

    Raises:
        ValueError: an option that does not exist, or numbers that do not divide.
    """

    spec: dict[str, Any]
    block_class = Block  # a wrapper may add to it, e.g. gradient checkpointing

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        n_layer: int = 4,
        n_head: int = 4,
        n_kv_head: int | None = None,
        mlp_width: int | None = None,
        max_positions: int = 512,
        positions: str = "rotary",
        norm_position: str = "pre",
        norm: str = "rms",
        mlp: str = "swiglu",
        bias: bool = False,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        mlp_width = default_mlp_width(mlp, width) if mlp_width is None else mlp_width
        for option, value, known in (
            ("positions", positions, POSITIONS),
            ("norm_position", norm_position, NORM_POSITIONS),
            ("norm", norm, NORMS),
            ("mlp", mlp, MLPS),
        ):
            if value not in known:
                raise ValueError(f"{option} {value!r} is none of {known}")
        if min(vocab_size, width, n_layer, n_head, n_kv_head, mlp_width, max_positions) < 1:
            raise ValueError("vocab_size, max_positions, n_layer and all widths and heads must be at least 1")
        if width % n_head:
            raise ValueError(f"width {width} must be divisible by n_head {n_head}")
        if n_head % n_kv_head:
            raise ValueError(f"n_head {n_head} must be divisible by n_kv_head {n_kv_head}")
        if positions == "rotary" and width // n_head % 2:
            raise ValueError(f"rotary positions need heads of even width, not {width} / {n_head}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} must be at least 0 and below 1")

        # What ends on the residual stream starts smaller, because 2 n_layer of it are summed there
        # (Radford et al. 2019, section 2.3).
        out_std = INIT_STD / math.sqrt(2 * n_layer)

        def make_norm() -> nn.Module:
            return nn.RMSNorm(width, norm_eps) if norm == "rms" else nn.LayerNorm(width, norm_eps, bias=bias)

        self.num_features = width
        self.max_positions = max_positions
        self.head_dim = width // n_head
        self.rope_theta = rope_theta
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_positions, width) if positions == "learned" else None
        self.rotary = positions == "rotary"
        self.embedding_norm = make_norm() if embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            self.block_class(
                Attention(width, n_head, n_kv_head, bias, dropout, layer, out_std, positions == "alibi"),
                FeedForward(mlp, width, mlp_width, bias, out_std),
                make_norm(),
                make_norm(),
                norm_position,
                dropout,
            )
            for layer in range(n_layer)
        )
        self.norm = make_norm() if norm_position == "pre" else nn.Identity()
        self.apply(init_weights)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """One of `PRESETS`, e.g. "gpt2-medium", with single options changed.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is none of {tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        documents: Ragged | None = None,
        wanted: Tails | None = None,
    ) -> Tensor:
        """Features of every token: it sees itself and what stands before it.

        Args:
            ids: (batch, time) token ids.
            inputs_embeds: (batch, time, width) in their place.
            position_ids: (batch or 1, time); None: 0, 1, 2 ... Required with a cache. Of no account to ALiBi,
                which knows distances alone.
            attention_mask: (batch or 1, 1, time, keys), added to the attention scores, or boolean with True
                for keys to see; it must be causal itself. None: causal attention to all.
            past_key_values: a cache, whose keys and values stand before the new ones. None of its layers may
                hold any when `attention_mask` is None and time > 1.
            documents: the input is a single row, and in it documents of these lengths stand one behind the
                other; none sees another, and their lead, if any, stands before each of them. Unlike a padded
                batch this costs no more than the tokens there are. Positions count from 0, and there is
                neither attention_mask nor cache.
            wanted: `documents.tails(...)`: the features of these tokens alone. The last block then computes
                nothing but keys and values for the others.

        Returns:
            (batch, time, width), or (1, tokens wanted, width), normalised.

        Raises:
            ValueError: an input is missing, ambiguous, too long or of the wrong shape.
        """
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("give either ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ValueError(
                f"attention_mask must be (batch, 1, time, keys), not {tuple(attention_mask.shape)}"
            )
        x = inputs_embeds if ids is None else look_up(self.tokens, ids, "token ids")
        assert x is not None
        if documents is None and wanted is not None:
            raise ValueError("wanted needs documents")
        if documents is not None:
            n_tokens = documents.lead + len(documents.at)
            if x.shape[:2] != (1, n_tokens):
                raise ValueError(f"documents of {n_tokens} tokens need an input of (1, so many)")
            if attention_mask is not None or past_key_values is not None or position_ids is not None:
                raise ValueError("documents say themselves who sees whom: no mask, cache or position_ids")
        if position_ids is None:
            if past_key_values is not None:
                raise ValueError("give position_ids with a cache: it does not say how much it holds")
            longest = x.shape[1] if documents is None else documents.lead + documents.shape[1]
            if self.positions is not None and longest > self.max_positions:
                raise ValueError(f"{longest} tokens are more than max_positions {self.max_positions}")
            position_ids = torch.arange(longest, device=x.device)[None]
            if documents is not None:
                lead = position_ids[0, : documents.lead]
                position_ids = torch.cat((lead, documents.lead + documents.columns))[None]
        rotation = None
        if self.rotary:
            rotation = rotary(position_ids, self.head_dim, self.rope_theta, x.dtype)
        elif self.positions is not None:
            x = x + look_up(self.positions, position_ids, "position ids")
        x = self.dropout(self.embedding_norm(x))
        shared: dict[str, Any] = {"past_key_values": past_key_values, "documents": documents}
        for block in self.blocks[:-1]:
            x = block(x, rotation, attention_mask, **shared)
        return self.norm(self.blocks[-1](x, rotation, attention_mask, **shared, wanted=wanted))

    def attention_maps(self, ids: Tensor) -> Tensor:
        """Where each token of ids (batch, time) looked: (n_layer, batch, n_head, time, time)."""
        blocks: Any = self.blocks
        return attention_maps({"self": [block.attention for block in blocks]}, lambda: self(ids))["self"]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k / sqrt(head_dim)), which torch's fused attention does not tell."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def attention_maps(layers: Mapping[str, Sequence[Any]], run: Callable[[], Any]) -> dict[str, Tensor]:
    """The weights of `Attention`s while `run` runs: by name (layers, batch, heads, queries, keys)."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    every = [(name, layer) for name, named in layers.items() for layer in named]
    try:
        for name, layer in every:
            layer.kept = kept[name]
        with torch.no_grad():
            run()
    finally:
        for _, layer in every:
            layer.kept = None
    return {name: torch.stack(weights) for name, weights in kept.items()}


def linear_biases(mask: Tensor | None, at: Tensor, n_head: int, n_keys: int) -> Tensor:
    """Adds to a mask what ALiBi adds to attention scores: -slope * distance (arXiv 2108.12409, section 3).

    A distance that is wrong by the same for all keys of a query changes nothing but the rounding, so that
    places among the keys do, whatever of them is padding.

    Args:
        mask: as `LabGPT.forward`'s attention_mask; None: causal attention.
        at: (rows or 1, queries), the place of each query among the keys.
        n_head: heads, each of which has its slope.
        n_keys: keys.

    Returns:
        (rows or 1, n_head, queries, n_keys), to be added to the scores.
    """
    distances = (torch.arange(n_keys, device=at.device) - at[..., None])[:, None]
    biases = alibi_slopes(n_head, at.device)[:, None, None] * distances
    mask = distances <= 0 if mask is None else mask
    return biases.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else biases + mask


def alibi_slopes(n_head: int, device: torch.device | str | None = None) -> Tensor:
    """2^(-8 i / n_head) for i = 1 ... n_head, if that is a power of two (arXiv 2108.12409, section 3); else
    those of the next lower power, and every other one of the next higher (the paper's code)."""
    power = 2 ** (n_head.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1, device=device))
    others = 2.0 ** (-4 / power * torch.arange(1, 2 * power, 2, device=device))
    return torch.cat((slopes, others[: n_head - power]))


def look_up(table: nn.Embedding, ids: Tensor, what: str) -> Tensor:
    """`table(ids)`; an id it has not is a ValueError on the CPU (to ask a GPU first would stall it)."""
    try:
        return table(ids)
    except IndexError:
        raise ValueError(f"{what} must lie between 0 and {table.num_embeddings - 1}") from None


def rotary(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and signed sines of the angles position * theta^(-2i / head_dim) (arXiv 2104.09864, eq. 15).

    Feature i turns with feature i + head_dim / 2, as in Llama's checkpoints, where the paper pairs 2i with
    2i + 1. Computed in every forward pass, which costs microseconds: a stored table would be a buffer outside
    the checkpoint, and those come back from some loaders as uninitialised memory.

    Shapes: (batch or 1, time) -> two of (batch or 1, time, 1, head_dim).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None, None] * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of features (i, i + half) by its angle; (batch, time, heads, head_dim) as it came.

    (a, b) becomes (a cos - b sin, b cos + a sin): rolling by half swaps a and b, the signs are in the sines.
    """
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(batch, heads, time, head_dim) with each head `times` times in a row: a head for every query head."""
    return x.repeat_interleave(times, dim=1)


def default_mlp_width(mlp: str, width: int) -> int:
    """4 * width, or for SwiGLU, which has three matrices for two, 2/3 of that (arXiv 2002.05202, section 2),
    rounded up to a multiple of 32."""
    return math.ceil(8 * width / 3 / 32) * 32 if mlp == "swiglu" else 4 * width


def init_weights(module: nn.Module) -> None:
    """GPT-2's initial weights of one layer: normal with `INIT_STD` (`ScaledLinear`: its own), biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        std = module.init_std if isinstance(module, ScaledLinear) else INIT_STD
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)
