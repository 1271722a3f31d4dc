"""Whether an image is real, or made by the generator of another run."""

from collections.abc import Iterable
from pathlib import Path

import torch

from lab import checkpoint
from lab.errors import LabError
from lab.run import Run
from lab.statistics import wilson_interval
from supervised.config import DetectionRun
from supervised.data import DataSet
from supervised.detection import real_versus_generated
from supervised.objectives.base import Batch, Players, require_kind
from supervised.objectives.classification import Classification
from supervised.objectives.generative import Generative


class Detection(Classification):
    """A classifier two-sample test (arXiv 1610.06545): 50% right means that nothing gives them away."""

    def __init__(self, settings: DetectionRun, data: DataSet) -> None:
        require_kind(data, ("images",), "detection")
        from supervised.evaluate import open_objective

        folder = Path(settings.objective.generator)
        run = Run.named_by("objective.generator", folder)
        saved = checkpoint.load(run.find_checkpoint("best"))
        maker = open_objective(run, saved, torch.device("cpu"))
        if not isinstance(maker, Generative):
            raise LabError(
                f"objective.generator = {folder}: its objective is {maker.settings.objective.name!r}, which "
                "makes no images. Name the run of a generator."
            )
        shapes = [tuple(d.train.tensors["inputs"].shape[1:]) for d in (data, maker.data)]
        if shapes[0] != shapes[1]:
            ours, theirs = (" x ".join(map(str, shape)) for shape in shapes)
            raise LabError(
                f"objective.generator = {folder}: makes images of {theirs}, and those of {data.name} are "
                f"{ours}. Name the data it learned from."
            )
        mixed = real_versus_generated(
            data, lambda n, seed: maker.generate(maker.players, n, seed), settings.objective.samples
        )
        super().__init__(settings, mixed)
        weights = checkpoint.weights_hash(saved.path)
        self.parents = [
            *self.parents,
            {"run_id": run.info["id"], "stage": "generator", "sha256": weights},
        ]

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        numbers = super().evaluate(players, batches)
        n = len(self.data.test)
        share = wilson_interval(round(numbers["accuracy"] * n), n)
        return {**numbers, "accuracy_low": share.low, "accuracy_high": share.high}
