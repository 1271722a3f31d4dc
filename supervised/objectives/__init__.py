"""The learning problems, by the name that `objective.name` gives them."""

import importlib

from supervised.config import SupervisedRun
from supervised.data import DataSet
from supervised.objectives.base import Objective

_CLASSES = {
    "classification": ("supervised.objectives.classification", "Classification"),
    "language_model": ("supervised.objectives.language_model", "LanguageModelling"),
    "regression": ("supervised.objectives.regression", "Regression"),
    "text_task": ("supervised.objectives.text_task", "TextTask"),
    "translation": ("supervised.objectives.translation", "Translation"),
}


def make(settings: SupervisedRun, data: DataSet) -> Objective:
    """The objective of a config on a data set, its weights drawn from torch's random state.

    Raises:
        LabError: the data is not of the kind it learns from.
    """
    module, cls = _CLASSES[settings.objective.name]
    return getattr(importlib.import_module(module), cls)(settings, data)
