"""GPT-1's way of answering questions about texts (Radford et al. 2018, section 3.2 and figure 1).

A task becomes one or several texts that end in a token where the answer is read off: a text to classify; a
premise, a delimiter and a hypothesis; two texts to compare, in both orders, whose features are added; a
context with each of the answers to choose from, each scored by itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised import backbones, figures
from supervised.config import TextTaskRun
from supervised.data import DataSet
from supervised.models import make_backbone, token_weights
from supervised.objectives.base import Batch, Loss, Objective, Players, no_better_than_one_class, require_kind
from supervised.objectives.classification import draw_confusion


class TaskModel(nn.Module):
    """A decoder with a linear layer on the features of each text's last token.

    Shapes: ids (batch, group, time) padded, last (batch, group) -> logits (batch, classes), and the features
    of all tokens (batch * group, time, width).
    """

    def __init__(self, backbone: Any, form: str, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.backbone, self.form = backbone, form
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.num_features, 1 if form == "choice" else num_classes)

    def forward(self, ids: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        batch, group = last.shape
        hidden = self.backbone(ids.flatten(0, 1))
        at = last.flatten()[:, None, None].expand(-1, 1, hidden.shape[-1])
        features = self.dropout(hidden.gather(1, at).view(batch, group, -1))
        if self.form == "choice":
            return self.head(features).squeeze(-1), hidden
        return self.head(features.sum(1)), hidden


class TextTask(Objective):
    """Cross entropy of the right answer (of a similarity in numbers: squared error), and if asked for that of
    the texts themselves."""

    higher_is_better = True

    def __init__(self, settings: TextTaskRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("tasks",), "text_task", "labels" if data.classes else "targets")
        self.config, self.padding = settings.objective, data.tokenizer.pad_id
        self.longest_attention = settings.data.context
        tokens = data.tokenizer
        backbone, self.parents = make_backbone(
            settings.model,
            backbones.CAUSAL,
            tokenizer=tokens,
            new_tokens=sorted({tokens.bos_id, tokens.delim_id, tokens.extract_id}),
            vocab_size=tokens.vocab_size,
            max_positions=settings.data.context,
        )
        self.headline = "accuracy" if data.classes else "pearson"
        model = TaskModel(backbone, data.form, data.num_classes or 1, settings.model.dropout)
        self.players: dict[str, nn.Module] = {"model": model}

    def spec(self) -> dict[str, Any]:
        return {"classes": list(self.data.classes)} if self.data.classes else {}

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ids (batch, group, time), and the place of each text's last token (batch, group)."""
        ids = batch["ids"] if batch["ids"].dim() == 3 else batch["ids"][:, None]
        return ids, (ids != self.padding).sum(2) - 1

    def loss(self, player: str, batch: Batch) -> Loss:
        ids, last = self._asked(batch)
        logits, hidden = self.players[player](ids, last)
        if "targets" in batch:
            loss = F.mse_loss(logits.float(), batch["targets"])
            metrics = {"loss": loss}
        else:
            loss = F.cross_entropy(logits, batch["labels"])
            metrics = {"loss": loss, "accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}
        if self.config.language_model_weight:
            model: Any = self.players[player]
            next_tokens = F.linear(hidden[:, :-1], token_weights(model.backbone))
            targets = ids.flatten(0, 1)[:, 1:]
            nats = F.cross_entropy(
                next_tokens.transpose(1, 2), targets, ignore_index=self.padding, reduction="none"
            )
            # Each text counts alike, as in the task's loss, so that parts of a batch add up to it.
            text_loss = (nats.sum(1) / (targets != self.padding).sum(1).clamp(min=1)).mean()
            loss = loss + self.config.language_model_weight * text_loss
            metrics["text_loss"] = text_loss
        return Loss(loss, metrics)

    def _answers(self, players: Players, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Logits (n, outputs), and the labels (n,) or targets (n, 1) they should have led to."""
        key = "labels" if self.data.classes else "targets"
        pairs = [(players["model"](*self._asked(batch))[0].float(), batch[key]) for batch in batches]
        logits, wanted = (torch.cat(column) for column in zip(*pairs, strict=True))
        return logits, wanted

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        logits, wanted = self._answers(players, batches)
        if self.data.classes:
            right = (logits.argmax(1) == wanted).float().mean()
            return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, wanted))}
        found, wanted = (
            column[:, 0].double().cpu() for column in (logits, wanted)
        )  # autocast spares doubles
        pearson = torch.corrcoef(torch.stack((found, wanted)))[0, 1]
        pearson = pearson.nan_to_num()  # where all answers are alike, there is none
        return {"pearson": float(pearson), "loss": float((found - wanted).square().mean())}

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        return no_better_than_one_class(self.data, numbers["accuracy"]) if self.data.classes else []

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """What was taken for what; of a similarity in numbers, found against wanted."""
        logits, wanted = self._answers(players, batches)
        if names := self.data.classes:
            yield from draw_confusion(torch.stack((wanted, logits.argmax(1))).cpu(), names, folder)
        else:
            path, found = folder / "similarity.png", logits[:, 0]
            yield "similarity", figures.scatter(path, wanted.flatten().cpu().numpy(), found.cpu().numpy())
