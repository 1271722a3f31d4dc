"""The next token of a text, from those before it."""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.files import write_atomic
from supervised import backbones
from supervised.config import SupervisedRun
from supervised.data import DataSet
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind

SAMPLE_TOKENS = 400


class LanguageModel(nn.Module):
    """A backbone from tokens to features, and logits by its own embedding (arXiv 1608.05859).

    Shapes: token ids (batch, time) -> (batch, time, vocab_size).
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.backbone(ids), self.backbone.tokens.weight)


class LanguageModelling(Objective):
    """Cross entropy of the next token; judged in bits per byte of the held-out text, whatever the tokens."""

    headline = "bits_per_byte"
    higher_is_better = False

    def __init__(self, settings: SupervisedRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("text",), "language_model")
        self.longest_attention = context = settings.data.context
        sizes = {"vocab_size": data.tokenizer.vocab_size, "max_positions": context}
        backbone, self.parents = make_backbone(
            settings.model, backbones.CAUSAL, tokenizer=data.tokenizer, **sizes
        )
        self.players: dict[str, nn.Module] = {"model": LanguageModel(backbone)}

    def loss(self, player: str, batch: Batch) -> Loss:
        ids = batch["ids"]
        logits = self.players[player](ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return Loss(loss, {"loss": loss})

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        sums = []  # of each batch; added up as doubles on the CPU, for not every device has them
        for batch in batches:
            ids, counts = batch["ids"], batch["mask"].flatten()
            logits = players["model"](ids[:, :-1]).float()
            each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            sums.append((each * counts).sum())
        loss = float(torch.stack(sums).cpu().double().sum()) / (len(self.data.test) - 1)
        # Nothing predicts the very first token: it is taken to be as hard as the others.
        bits = loss * len(self.data.test) / math.log(2) / len(self._held_out)
        return {
            "bits_per_byte": bits,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            **self._compressors,
        }

    @cached_property
    def _held_out(self) -> bytes:
        """As it was before tokenisation, which may have lost some of it."""
        return "".join(self.data.held_out["text"]).encode("utf-8", "surrogateescape")

    @cached_property
    def _compressors(self) -> dict[str, float]:
        """What general compressors make of the held-out text, in bits per byte."""
        text = self._held_out
        packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
        return {f"{name}_bits_per_byte": 8 * len(result) / len(text) for name, result in packed.items()}

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """A held-out beginning as the model goes on with it, at temperature 0.8."""
        model, tokenizer = players["model"], self.data.tokenizer
        beginning = self.data.test.ids[: max(1, self.settings.data.context // 4)].tolist()
        ids = torch.tensor([beginning], device=next(model.parameters()).device)
        torch.manual_seed(0)
        for _ in range(SAMPLE_TOKENS):
            logits = model(ids[:, -self.settings.data.context :])[:, -1].float()
            ids = torch.cat((ids, (logits / 0.8).softmax(-1).multinomial(1)), 1)
        text = tokenizer.decode(beginning) + "\n---- the model goes on ----\n"
        text += tokenizer.decode(ids[0, len(beginning) :].tolist()) + "\n"
        write_atomic(folder / "sample.txt", text.encode())
        yield "sample", folder / "sample.txt"
