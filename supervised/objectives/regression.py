"""Numbers from numbers, by least squares."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised import backbones
from supervised.classifier import Classifier
from supervised.config import SupervisedRun
from supervised.data import DataSet
from supervised.data.augment import Normalize
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind


class Regression(Objective):
    """Mean squared error, of targets in their standard deviations; judged by the share of the variance that
    is explained, R^2.

    Of several targets it is the mean of each one's, as scikit-learn's `r2_score` has it. Of a single one the
    errors `rmse` and `mae` are in its own unit.
    """

    headline = "r2"
    higher_is_better = True

    def __init__(self, settings: SupervisedRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("table", "sequences"), "regression", "targets")
        inputs = data.train.tensors["inputs"]
        fitting = backbones.RECURRENT if data.kind == "sequences" else ["mlp"]
        backbone, self.parents = make_backbone(settings.model, fitting, in_features=inputs.shape[-1])
        targets = data.train.tensors["targets"]
        self.inputs = Normalize.of(inputs)
        self.targets = Normalize.of(targets)
        self.players: dict[str, nn.Module] = {
            "model": Classifier(backbone, targets.shape[1], settings.model.dropout)
        }

    def loss(self, player: str, batch: Batch) -> Loss:
        loss = F.mse_loss(*self._pair(self.players[player], batch))
        return Loss(loss, {"loss": loss})

    def _pair(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the model says and what it should say, both in standard deviations from the mean."""
        return model(self.inputs(batch["inputs"])).float(), self.targets(batch["targets"])

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        pairs = [self._pair(players["model"], batch) for batch in batches]
        found, targets = (torch.cat(column) for column in zip(*pairs, strict=True))
        found, targets = found.double().cpu(), targets.double().cpu()
        error = (found - targets).square().mean(0)
        variance = (targets - targets.mean(0)).square().mean(0)
        # Of targets that are all alike nothing can be explained, and the logs take finite numbers only.
        varies = variance > 1e-12 if bool((variance > 1e-12).any()) else torch.ones_like(variance).bool()
        r2 = (1 - error / variance.clamp_min(1e-12))[varies].mean()
        numbers = {"r2": float(r2), "loss": float(error.mean())}
        if len(error) == 1:
            unit = self.targets.std[0]
            numbers["rmse"] = float(error[0].sqrt()) * unit
            numbers["mae"] = float((found - targets).abs().mean()) * unit
        return numbers

    def warnings(self, numbers: Mapping[str, float]) -> list[str]:
        if numbers["r2"] > 0:
            return []
        if (targets := self.data.test.tensors["targets"]).eq(targets[0]).all():
            return [f"all numbers of {self.data.part} are alike: r2 says nothing, only the loss does"]
        return [f"r2 {numbers['r2']:.4g} is no better than always naming the mean of {self.data.part}"]

    def spec(self) -> dict[str, Any]:
        return {"inputs": self.inputs.spec(), "targets": self.targets.spec(), **self.columns_spec()}

    def use_spec(self, spec: Mapping[str, Any]) -> None:
        self.inputs, self.targets = (
            had.like(spec.get(name)) for name, had in (("inputs", self.inputs), ("targets", self.targets))
        )
