"""A finished or running run judged again on the held-out data."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab import config
from lab.checkpoint import Checkpoint
from lab.device import resolve
from lab.errors import LabError
from lab.run import Run
from supervised import objectives
from supervised.backbones import blocked
from supervised.config import SupervisedRun, run_config_class
from supervised.data import DataSet
from supervised.data.dataset import ALL, HELD_OUT
from supervised.data.raw import columns_of, some
from supervised.objectives.base import Objective
from supervised.trainer import UNFIT, part_of

UNITS = {"text": "tokens", "frames": "frames", "pairs": "pairs"}
"""What the length of a part counts, by the kind of data; else samples."""


def run_config(run: Run) -> SupervisedRun:
    """The config of a run."""
    values, source = run.info["config"], str(run.folder / "run.json")
    return config.build(run_config_class(values, lambda _: source), values, {}, source)


def open_objective(
    run: Run, saved: Checkpoint, device: torch.device, part: str | None = None, source: str | None = None
) -> Objective:
    """The objective of a run with a checkpoint's weights: averaged, where there is an average.

    `part` of the data is to be the one to judge by, as `supervised.data.load` takes it; None: the one that
    chose the weights. `source` is where the data are now, or other data; None: where they were. Columns of a
    table and classes are those that the run learned from, by their names.

    Raises:
        LabError: the data are gone, of another kind or shape, or of other classes.
    """
    settings = run_config(run)
    settings = replace(settings, model=replace(settings.model, start_from=None))  # a checkpoint has it all
    if source is not None:
        settings = replace(settings, data=replace(settings.data, source=source))
    spec = saved.state.get("spec", {})
    try:
        columns = columns_of(spec.get("columns", []))
    except (AttributeError, ValueError):
        raise LabError(f"{saved.path}: does not say what it learned from. Restore it from a copy.") from None
    learned: list[str] = spec.get("classes") or []
    known = (columns, tuple(map(str, learned)))
    data = objectives.read(settings, run.folder, part, *known)
    if source is not None and part == "" and data.part == HELD_OUT and is_other(data, saved):
        data = objectives.read(settings, run.folder, ALL, *known)  # none of it was learned from
    objective = objectives.make(settings, data)
    if learned and learned != list(objective.data.classes):
        raise LabError(
            f"{settings.data.source}: has the classes {some(objective.data.classes)}, and {run.folder} "
            f"learned {some(learned)}. Name data of the same classes by --data.source."
        )
    weights = judged_weights(saved)
    for name, module in objective.players.items():
        try:
            module.load_state_dict(part_of(weights, name))
        except UNFIT:
            raise LabError(
                f"{run.folder}: its weights do not fit {objective.data.name} as the data are now. Put back "
                "what it learned from, or name it by --data.source."
            ) from None
        module.to(device).eval()
        blocked.use(module, device)
    try:
        objective.use_spec(saved.state.get("spec", {}))
    except ValueError:
        raise LabError(
            f"{saved.path}: does not say how its inputs were scaled. Restore it from a copy."
        ) from None
    return objective


def is_other(data: DataSet, saved: Checkpoint) -> bool:
    """Whether a data set is not what a checkpoint's run learned from, or was judged by."""
    both = {"data_sha256": data.sha256} if data.part == data.chosen_by else {}
    now = {"train_sha256": data.train_sha256, **both}
    return any(saved.state.get(key, value) != value for key, value in now.items())


def judged_weights(saved: Checkpoint) -> dict[str, Tensor]:
    """All players' weights by "player.name": averaged, where there is an average."""
    files = {path.stem for path in saved.path.glob("*.safetensors")}
    return saved.weights("average" if "average" in files else "model")


def evaluate_run(
    run: Run, saved: Checkpoint, part: str | None = None, source: str | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint on a part of the run's data; returns one JSON object.

    Args:
        run: the run.
        saved: its checkpoint, verified.
        part: one of the source, train, held_out or all; None: the source's test part, where it has one, else
            the part that chose the weights; of other data by `source`, which hold no such part, all.
        source: where the data are now, or other data, as `data.source` takes it; None: where they were.

    Raises:
        LabError: there is no such part, or the data are gone.
    """
    compute = resolve(run_config(run).device, elsewhere=True)
    objective = open_objective(run, saved, compute.device, part or "", source)
    with torch.inference_mode(), compute.autocast():
        numbers = objective.evaluate(objective.players, objective.batches("test", compute.device).epoch(0))
    examined, notes = objective.examine(objective.players, compute)
    data = objective.data
    notes = [*notes, *data.coverage, *objective.warnings(numbers)]
    if is_other(data, saved):
        judged = (
            f": all of it is judged, {len(data.test):,} {UNITS.get(data.kind, 'samples')}"
            if data.part == ALL
            else ""
        )
        notes += [f"{data.name} is not what it was when the run learned from it{judged}", *data.notes]
        there = list(data.test.tensors["inputs"].shape[1:]) if data.kind == "images" else None
        learned = saved.state.get("spec", {}).get("shape", there)
        if there is not None and isinstance(learned, list) and there != learned:
            sizes = [" x ".join(map(str, shape)) for shape in (there, learned)]
            notes.append(
                f"its images are {sizes[0]}, and the run learned from {sizes[1]}: set them to one size"
            )
    else:
        notes += data.shared
    if not is_other(data, saved) and data.part == data.chosen_by and saved.path.name == "best":
        notes.append(
            f"{data.part} also chose this checkpoint among the run's: on other data it may do a little worse"
        )
    return {
        "run": str(run.folder),
        "data": data.name,
        "part": data.part,
        "data_sha256": data.sha256,
        "checkpoint": saved.path.name,
        "step": saved.state.get("step", saved.state.get("trainer", {}).get("step")),
        "eval": {**numbers, **examined},
        "notes": notes,
    }
