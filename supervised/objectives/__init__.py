"""The learning problems, by the name that `objective.name` gives them."""

import importlib
from pathlib import Path

from lab.errors import LabError
from supervised import backbones
from supervised.config import SupervisedRun
from supervised.data import DataSet, load
from supervised.data.raw import Column, Reading
from supervised.objectives.base import Objective

_CLASSES = {
    "adversarial": ("supervised.objectives.adversarial", "Adversarial"),
    "autoencoding": ("supervised.objectives.autoencoding", "Autoencoding"),
    "classification": ("supervised.objectives.classification", "Classification"),
    "denoising": ("supervised.objectives.denoising", "Denoising"),
    "detection": ("supervised.objectives.detection", "Detection"),
    "flow": ("supervised.objectives.likelihood", "NormalizingFlow"),
    "language_model": ("supervised.objectives.language_model", "LanguageModelling"),
    "regression": ("supervised.objectives.regression", "Regression"),
    "super_resolution": ("supervised.objectives.super_resolution", "SuperResolution"),
    "text_task": ("supervised.objectives.text_task", "TextTask"),
    "translation": ("supervised.objectives.translation", "Translation"),
    "variational": ("supervised.objectives.likelihood", "Variational"),
    "world_model": ("supervised.objectives.world_model", "WorldModel"),
}


PREDICTS = {"classification": "classes", "regression": "numbers"}
"""What labels are to an objective that could be both."""


def read(
    settings: SupervisedRun,
    folder: Path | None = None,
    part: str | None = None,
    columns: tuple[Column, ...] = (),
    classes: tuple[str, ...] = (),
) -> DataSet:
    """The data of a config, taken as its objective and its backbone take them; see `supervised.data.load`,
    and for what a finished run learned, `Reading`."""
    rows = getattr(settings.objective, "rows", False)
    sequences = settings.model.backbone in backbones.RECURRENT and not rows
    name = settings.objective.name
    reading = Reading(
        predicts=PREDICTS.get(name, ""),
        tasks=name == "text_task",
        sequences=sequences,
        columns=columns,
        classes=classes,
    )
    return load(settings.data, folder, reading, part)


def make(settings: SupervisedRun, data: DataSet) -> Objective:
    """The objective of a config on a data set, its weights drawn from torch's random state.

    Raises:
        LabError: the data is not of the kind it learns from, or nothing is left to learn.
    """
    name, adapt = settings.objective.name, settings.model.adapt
    module, cls = _CLASSES[name]
    objective: Objective = getattr(importlib.import_module(module), cls)(settings, data)
    for player in objective.players.values():
        if not any(parameter.requires_grad for parameter in player.parameters()):
            raise LabError(
                f"model.adapt = {adapt!r}: leaves nothing to learn: {name} has no weights but the "
                "backbone's. Use lora or full."
            )
    return objective
