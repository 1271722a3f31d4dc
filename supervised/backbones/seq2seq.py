"""An LSTM that reads a sentence and one that writes another, with attention between them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from supervised.backbones.recurrent import LSTM
from supervised.backbones.transformer import look_up

SCORES = ("general", "dot", "additive")


class Memory(NamedTuple):
    """What a source leaves for the decoder; every tensor has the batch first."""

    values: Tensor
    """(batch, source_time, width): the encoder's outputs."""
    keys: Tensor
    """(batch, source_time, width): what queries are compared with."""
    mask: Tensor | None
    """(batch, source_time), True for tokens to see."""
    hidden: Tensor
    cell: Tensor
    """(batch, n_layer, width): the encoder's last state, the decoder's first."""


class DecoderState(NamedTuple):
    """What the decoder remembers between steps."""

    hidden: Tensor
    cell: Tensor
    """(batch, n_layer, width) each."""
    fed: Tensor
    """(batch, width): the features of the step before, an input of this one if `input_feeding`."""


class Alignment(nn.Module):
    """Attention weights of each query on a source: the softmax of a score.

    With query q and encoder output m the score is q.m ("dot"), q.Wm ("general"; both arXiv 1508.04025,
    section 3.1) or v.tanh(Uq + Wm) ("additive"; arXiv 1409.0473, appendix A.1.2).
    """

    def __init__(self, score: str, width: int) -> None:
        super().__init__()
        self.keys = nn.Identity() if score == "dot" else nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width) if score == "additive" else None
        self.v = nn.Linear(width, 1, bias=False) if score == "additive" else None

    def forward(self, query: Tensor, memory: Memory) -> Tensor:
        """(batch, time, width) -> (batch, time, source_time), rows that sum to 1."""
        if self.query is not None and self.v is not None:
            scores = self.v(torch.tanh(self.query(query)[:, :, None] + memory.keys[:, None])).squeeze(-1)
        else:
            scores = query @ memory.keys.transpose(1, 2)
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask[:, None], float("-inf"))
        return scores.softmax(-1)


class Seq2Seq(nn.Module):
    """Translation by LSTMs with attention (arXiv 1508.04025), up to features of target tokens.

    The decoder's output h looks for what it needs in the encoder's outputs, c, and the features are
    tanh(W [c; h]) (equation 5). "additive" is Bahdanau's score in this order of things: in arXiv 1409.0473
    the state before the step is what looks.

    Args:
        vocab_size: number of target tokens.
        source_vocab_size: number of source tokens; None: both sides share one vocabulary and its embeddings.
        width: features of a token, `num_features`.
        n_layer: layers of the encoder, and of the decoder.
        bidirectional: the encoder reads both ways, half the width each.
        score: how well a query and a source token agree: "general", "dot" or "additive".
        input_feeding: the features of a step are an input of the next (section 3.3), so that it knows what
            was attended to. Training then goes step by step, which takes half as long again and more.
        dropout: probability, on the embeddings, between layers and on the features.

    Raises:
        ValueError: an option that does not exist, or an impossible number.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        vocab_size: int,
        source_vocab_size: int | None = None,
        width: int = 256,
        n_layer: int = 1,
        bidirectional: bool = True,
        score: str = "general",
        input_feeding: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score {score!r} is none of {SCORES}")
        if min(vocab_size, width) < 1 or (source_vocab_size is not None and source_vocab_size < 1):
            raise ValueError("vocabularies and width must be at least 1")
        if bidirectional and width % 2:
            raise ValueError(f"width {width} must be even, to be shared by the encoder's two directions")
        self.num_features = width
        self.input_feeding = input_feeding
        self.tokens = nn.Embedding(vocab_size, width)
        self.source_tokens = None if source_vocab_size is None else nn.Embedding(source_vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        hidden = width // 2 if bidirectional else width
        self.encoder = LSTM(width, hidden, n_layer, bidirectional, dropout)
        self.decoder = LSTM(width * (2 if input_feeding else 1), width, n_layer, dropout=dropout)
        self.alignment = Alignment(score, width)
        self.combine = nn.Linear(2 * width, width, bias=False)
        for table in (self.tokens, self.source_tokens):
            if table is not None:
                nn.init.uniform_(table.weight, -0.1, 0.1)  # as all of arXiv 1508.04025, section 4.1

    def forward(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Features of every target token, from which a head says the next one (teacher forcing).

        Args:
            source_ids: (batch, source_time).
            target_ids: (batch, target_time): what the decoder reads, i.e. the target behind a start token.
            source_mask: (batch, source_time), True for tokens; padding stands on the right. None: no padding.

        Returns:
            (batch, target_time, width).
        """
        memory = self.encode(source_ids, source_mask)
        return self._decode(memory, self.start(memory), target_ids)[0]

    def encode(self, source_ids: Tensor, source_mask: Tensor | None = None) -> Memory:
        """Reads the source; arguments as `forward`."""
        x = self.dropout(look_up(self.source_tokens or self.tokens, source_ids, "source ids"))
        lengths = None if source_mask is None else source_mask.sum(1)
        values, (hidden, cell) = self.encoder.outputs(x, lengths=lengths)
        # Both directions' halves of a layer lie beside each other: together they are a layer's width.
        width = (len(x), -1, self.num_features)
        return Memory(
            values, self.alignment.keys(values), source_mask, hidden.reshape(width), cell.reshape(width)
        )

    def start(self, memory: Memory) -> DecoderState:
        """The decoder's state before the first token."""
        return DecoderState(memory.hidden, memory.cell, torch.zeros_like(memory.hidden[:, 0]))

    def step(self, memory: Memory, state: DecoderState, tokens: Tensor) -> tuple[Tensor, DecoderState]:
        """Reads one more target token, (batch,): its features (batch, width), and the state behind it."""
        features, _, state = self._decode(memory, state, tokens[:, None])
        return features[:, 0], state

    @torch.no_grad()
    def attention_maps(
        self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Where each target token looked; arguments as `forward`.

        Returns:
            "cross": (layers, batch, heads, target_time, source_time), here of one layer and one head.
        """
        memory = self.encode(source_ids, source_mask)
        return {"cross": self._decode(memory, self.start(memory), target_ids)[1][None, :, None]}

    def _decode(
        self, memory: Memory, state: DecoderState, target_ids: Tensor
    ) -> tuple[Tensor, Tensor, DecoderState]:
        """Features (batch, time, width), weights (batch, time, source_time), and the state behind them."""
        x = self.dropout(look_up(self.tokens, target_ids, "target ids"))
        if not self.input_feeding:
            outputs, (hidden, cell) = self.decoder.outputs(x, (state.hidden, state.cell))
            features, weights = self._attend(outputs, memory)
            return features, weights, DecoderState(hidden, cell, features[:, -1])
        steps = []
        for token in x.unbind(1):
            inputs = torch.cat((token, state.fed), dim=1)
            output, (hidden, cell) = self.decoder.step(inputs, (state.hidden, state.cell))
            features, weights = self._attend(output[:, None], memory)
            state = DecoderState(hidden, cell, features[:, 0])
            steps.append((features, weights))
        every_features, every_weights = zip(*steps, strict=True)
        return torch.cat(every_features, dim=1), torch.cat(every_weights, dim=1), state

    def _attend(self, outputs: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        weights = self.alignment(outputs, memory)
        context = weights.to(memory.values.dtype) @ memory.values
        return self.dropout(torch.tanh(self.combine(torch.cat((context, outputs), dim=2)))), weights
