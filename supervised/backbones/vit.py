"""The vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.layers import StochasticDepth, require_positive
from supervised.backbones.mlp import image_size

EPS = 1e-6
POOLS = ("token", "mean")

PRESETS: dict[str, dict[str, Any]] = {
    # Table 1, and table 1 of DeiT (arXiv 2012.12877) for the small ones.
    "vit_tiny": {"n_layer": 12, "width": 192, "n_head": 3},
    "vit_small": {"n_layer": 12, "width": 384, "n_head": 6},
    "vit_base": {"n_layer": 12, "width": 768, "n_head": 12},
    "vit_large": {"n_layer": 24, "width": 1024, "n_head": 16},
}


class Attention(nn.Module):
    """Self-attention of all tokens; queries, keys and values have a matrix each, as in the lab's GPT."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (batch, head, token, width / head)."""
        return tuple(
            layer(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (third) attends to each (fourth): (batch, head, token, token)."""
        q, k, _ = self._heads(x)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)


class Block(nn.Module):
    """Attention and an MLP, each behind a layer normalisation and beside a shortcut (equations 2 and 3)."""

    def __init__(self, width: int, n_head: int, mlp_width: int, dropout: float, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, n_head)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.dropout(self.attn(self.norm1(x))))
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(x))))
        return x + self.drop(self.dropout(self.fc2(hidden)))

    def attention_weights(self, x: Tensor) -> Tensor:
        return self.attn.weights(self.norm1(x))


def waves(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): sines and cosines of the column, then of the row, of wavelengths from 2 pi to
    20,000 pi (arXiv 1706.03762, section 3.5, in two dimensions). What 4 does not divide of the width stays 0.
    """
    n = width // 4
    frequencies = 10_000 ** -(torch.arange(n) / max(n - 1, 1))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    found = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    return F.pad(found, (0, width - 4 * n))


class ViT(nn.Module):
    """A transformer over the patches of an image, with learned positions.

    Args:
        in_chans: input channels.
        img_size: height and width, pixels, multiples of `patch_size`.
        patch_size: pixels a side of what becomes a token.
        n_layer, width, n_head: of the transformer; `width` is `num_features`.
        mlp_width: of the MLP in each block; None: 4 times `width`.
        pool: what the features are: "token", the one put before the patches for that, or "mean" of the
            patches', without such a token.
        dropout: probability, behind the embeddings and in the residual branches (table 3).
        stochastic_depth: probability to drop the last block's residual branches while training; the others'
            fall linearly to the first one's 0.
        patch_norm: layer normalisation in front of and behind the patches' projection (arXiv 2302.01327):
            what is small in a patch, e.g. a ball, is then not lost beside its position.

    Shapes: (batch, in_chans, height, width) -> (batch, width).

    Raises:
        ValueError: patches that do not cover the image, heads that do not share `width`, or unknown pool.
    """

    spec: dict[str, Any]
    published_names: ClassVar = (
        (r"^vit\.", ""),
        (r"^(embeddings\.)?cls_token$", "class_token"),
        (r"^pos_embed$|^embeddings\.position_embeddings$", "positions"),
        (r"^patch_embed\.proj\.|^embeddings\.patch_embeddings\.projection\.", "patches."),
        (r"^layers\.(\d+)\.", r"blocks.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.mlp\.", "."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    )
    """timm's and transformers'."""

    def __init__(
        self,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        n_layer: int = 12,
        width: int = 192,
        n_head: int = 3,
        mlp_width: int | None = None,
        pool: str = "token",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        patch_norm: bool = False,
    ) -> None:
        super().__init__()
        require_positive(
            in_chans=in_chans, patch_size=patch_size, n_layer=n_layer, width=width, n_head=n_head
        )
        high, wide = image_size(img_size)
        if high % patch_size or wide % patch_size:
            fitting = [side for side in range(1, min(high, wide) + 1) if not (high % side or wide % side)]
            raise ValueError(
                f"patch_size {patch_size} does not divide img_size {img_size}: use one of {fitting}"
            )
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r} is none of {POOLS}")
        if width % n_head:
            raise ValueError(f"width {width} is no multiple of n_head {n_head}")
        self.patch_size = patch_size
        self.patches = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.patch_norms = nn.ModuleList()
        if patch_norm:
            self.patch_norms.extend([nn.LayerNorm(in_chans * patch_size**2), nn.LayerNorm(width)])
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if pool == "token" else None
        self.grid = high // patch_size, wide // patch_size
        n_tokens = self.grid[0] * self.grid[1] + (pool == "token")
        self.positions = nn.Parameter(torch.empty(1, n_tokens, width))
        self.dropout = nn.Dropout(dropout)
        rates = torch.linspace(0, stochastic_depth, n_layer, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(width, n_head, mlp_width or 4 * width, dropout, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.num_features = width
        self._init_weights()

    def _init_weights(self) -> None:
        """As the paper's code begins, but for positions, which begin as waves in both directions (arXiv
        2205.01580): drawn at random they are lost beside the patches, and learning is slow."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patches.weight, std=self.patches.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.positions.zero_()
            self.positions[0, -self.grid[0] * self.grid[1] :] = waves(*self.grid, self.num_features)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (batch, token, width) of the patches, row by row (equation 1)."""
        if self.patch_norms:
            before, behind = self.patch_norms
            x = before(F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2))
            x = behind(F.linear(x, self.patches.weight.flatten(1), self.patches.bias))
        else:
            x = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1)
        return self.dropout(x + self.positions)

    def forward(self, x: Tensor) -> Tensor:
        x = self._embed(x)
        for block in self.blocks:
            x = block(x)
        # Normalisation is for each token, so that those that are not read need none.
        return self.norm(x[:, 0]) if self.class_token is not None else self.norm(x).mean(1)

    def attention_maps(self, images: Tensor) -> Tensor:
        """How much each token attends to each: (batch, layer, head, token, token), rows summing to 1.

        With pool="token", token 0 is the class token; the others are patches, row by row.
        """
        x, maps = self._embed(images), []
        for block in self.blocks:
            maps.append(block.attention_weights(x))  # type: ignore[operator]
            x = block(x)
        return torch.stack(maps, 1)
