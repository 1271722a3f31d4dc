"""A sentence in one language from one in another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.files import write_atomic
from supervised import backbones, figures
from supervised.config import TranslationRun
from supervised.data import DataSet
from supervised.decoding import beam_search, greedy
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind

SHOWN = 40
MOST_WORDS = 4
"""In a row, that BLEU counts (Papineni et al. 2002)."""
THE_ANIMAL = "The animal didn't cross the street because it was too tired"
"""The sentence whose "it" everybody asks about."""


class Translator(nn.Module):
    """An encoder-decoder, and logits by the embedding of its target tokens (arXiv 1608.05859).

    Shapes: source ids (batch, time), target ids (batch, target_time) -> (batch, target_time, vocab_size).
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        return self.head(self.backbone(source, target, source_mask))

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., vocab_size) of features (..., num_features)."""
        return F.linear(features, self.backbone.tokens.weight)


class Translation(Objective):
    """Cross entropy of the next target token with label smoothing; judged by BLEU of whole sentences.

    BLEU is sacrebleu's, on text as it was before tokenisation (arXiv 1804.08771); see `bleu`.
    """

    headline = "bleu"
    higher_is_better = True

    def __init__(self, settings: TranslationRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("pairs",), "translation")
        self.config, self.tokens = settings.objective, data.tokenizer
        the_animal = len(self._ids(THE_ANIMAL))
        longest = max(settings.data.context + 1, data.longest, the_animal)
        backbone, self.parents = make_backbone(
            settings.model,
            backbones.TRANSLATORS,
            tokenizer=data.tokenizer,
            vocab_size=data.tokenizer.vocab_size,
            max_positions=longest,
        )
        self.players: dict[str, nn.Module] = {"model": Translator(backbone)}

    def loss(self, player: str, batch: Batch) -> Loss:
        logits, targets = self._logits(self.players[player], batch)
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, targets, ignore_index=self.tokens.pad_id, label_smoothing=smoothing)
        return Loss(loss, {"loss": loss})

    def share(self, part: Batch, batch: Batch) -> Tensor:
        """By tokens, of which parts with as many sentences have more or less."""
        counts = [(each["target"][:, 1:] != self.tokens.pad_id).sum() for each in (part, batch)]
        return counts[0] / counts[1]

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (tokens, vocab_size) and the tokens they are for, padding included."""
        source, target = batch["source"], batch["target"]
        logits = model(source, target[:, :-1], source != self.tokens.pad_id)
        return logits.flatten(0, 1), target[:, 1:].flatten()

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        sums = []  # of each batch; added up as doubles on the CPU, for not every device has them
        found: list[str] = []
        wanted: list[str] = []
        for batch in batches:
            logits, targets = self._logits(players["model"], batch)
            real = targets != self.tokens.pad_id
            loss = F.cross_entropy(logits.float(), targets, reduction="none") * real
            sums.append(torch.stack((loss.sum(), real.sum())))
            found += map(self.tokens.decode, self._translate(players, batch["source"]))
            wanted += [self.data.held_out["target"][row] for row in batch["rows"].tolist()]
        nats, n_tokens = torch.stack(sums).cpu().double().sum(0)
        return {"bleu": bleu(found, wanted), "loss": float(nats / n_tokens)}

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        n = bleu_order(self.data.held_out["target"])
        if n == MOST_WORDS:
            return []
        few = "single words" if n == 1 else f"up to {n} words in a row, not {MOST_WORDS}"
        return [f"bleu is of {few}: no translation of {self.data.part} has more"]

    def _translate(self, players: Players, source: Tensor) -> list[list[int]]:
        model: Any = players["model"]
        c, tokens = self.config, self.tokens
        ends = {"bos_id": tokens.bos_id, "eos_id": tokens.eos_id}
        longest = min(self.settings.data.context, self._longest_from(source.shape[1]))
        asked = (model.backbone, model.head, source, source != tokens.pad_id)
        if c.beam == 1:
            return greedy(*asked, **ends, max_length=longest)
        return beam_search(*asked, **ends, max_length=longest, beam=c.beam, alpha=c.length_penalty)

    def _longest_from(self, length: int) -> int:
        """Tokens at which a translation of a source of so many is cut, lest a model that has not learned to
        end goes on: 2 for each and 10, or more where translations of no longer sources have more in the
        training part, as those of 7777 into words."""
        sources, targets = (self.data.train.sequences[side].longest() for side in ("source", "target"))
        learned = targets[sources <= length]
        return max(2 * length + 10, int(learned.max()) if len(learned) else 0)

    def _ids(self, text: str) -> list[int]:
        """Of a source: with its end."""
        return [*self.tokens.encode(text), self.tokens.eos_id]

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Translations beside their references, and where the decoder looks."""
        device = next(players["model"].parameters()).device
        texts, sources = self.data.held_out, self.data.test.sequences["source"]
        n = len(sources)
        rows = torch.linspace(0, n - 1, min(n, SHOWN), dtype=torch.double).round().long().tolist()
        shown = [torch.tensor(sources[row], device=device) for row in rows]
        padded = nn.utils.rnn.pad_sequence(shown, batch_first=True, padding_value=self.tokens.pad_id)
        lines = []
        for row, found in zip(rows, self._translate(players, padded), strict=True):
            lines += [
                f"source    {texts['source'][row]}",
                f"ours      {self.tokens.decode(found)}",
                f"reference {texts['target'][row]}",
                "",
            ]
        write_atomic(folder / "translations.txt", "\n".join(lines).encode())
        yield "translations", folder / "translations.txt"
        median = sources[int(sources.longest().argsort(stable=True)[n // 2])]
        for name, ids in (("attention", median), ("attention_the_animal", self._ids(THE_ANIMAL))):
            yield from self._draw_attention(players, torch.tensor([ids], device=device), folder, name)

    def _draw_attention(
        self, players: Players, source: Tensor, folder: Path, name: str
    ) -> Iterator[tuple[str, Path]]:
        """Of the last layer, all heads together: from target to source, and within the source."""
        model: Any = players["model"]
        target = torch.tensor(
            [[self.tokens.bos_id, *self._translate(players, source)[0]]], device=source.device
        )
        maps = model.backbone.attention_maps(source, target)
        labels = {
            "source": [self.tokens.decode([i]) or "<end>" for i in source[0].tolist()],
            "target": [
                self.tokens.decode([i]) or "<end>" for i in [*target[0, 1:].tolist(), self.tokens.eos_id]
            ],
        }
        for kind, rows in (("cross", "target"), ("encoder", "source")):
            if kind in maps:
                weights = maps[kind][-1, 0].float().mean(0).cpu().numpy()
                path = folder / f"{name}_{kind}.png"
                yield f"{name}_{kind}", figures.attention(path, weights, labels["source"], labels[rows])


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, of translations and their references, counted in rows of up to four words, or of
    as many as the longest reference has: where there is no row of four, the best there can be would be 0."""
    import sacrebleu

    metric = sacrebleu.BLEU(max_ngram_order=bleu_order(wanted))
    return metric.corpus_score(list(found), [list(wanted)]).score


def bleu_order(wanted: Iterable[str]) -> int:
    """Words in a row that BLEU can count in these references, 1 to 4, by sacrebleu's tokens."""
    import sacrebleu

    words, most = sacrebleu.BLEU().tokenizer, 1
    for text in wanted:
        most = max(most, len(words(text).split()))
        if most >= MOST_WORDS:
            break
    return min(most, MOST_WORDS)
