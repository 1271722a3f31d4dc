"""Which rows a recipe trains on and which it evaluates on: no unseen prompt is trained on.

A tenth of the prompts is held out wherever the data has no part of its own for that, by a hash of the prompt,
so the same ones in demonstrations, comparisons and prompts; also where data.eval_prompts names others, for
what a stage trains on must not depend on how it is evaluated.
"""

from typing import TYPE_CHECKING

from lab.errors import LabError
from rlhf import data, sources
from rlhf.config import RLHFRun

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 0.1
"""Fraction of the prompts that no stage trains on."""


def demonstrations(settings: RLHFRun) -> "tuple[Dataset, Dataset]":
    """Demonstrations to train on, and held-out ones."""
    source = settings.data.demonstrations
    rows = data.demonstrations(source)
    if sources.has_eval(source):
        return rows, data.demonstrations(source, "eval")
    return data.hold_out(rows, HELD_OUT, settings.seed)


def training_prompts(settings: RLHFRun) -> "Dataset":
    """What collection and PPO ask."""
    source = settings.data.prompts or settings.data.demonstrations
    rows = data.prompts(source)
    return rows if sources.has_eval(source) else data.hold_out(rows, HELD_OUT, settings.seed)[0]


def unseen_prompts(settings: RLHFRun) -> "tuple[Dataset, int]":
    """What the evaluation asks, and how many prompts were left out of it because a stage trains on them.

    Raises:
        LabError: every one of them is trained on.
    """
    d = settings.data
    source = d.prompts or d.demonstrations
    if d.eval_prompts:
        rows = data.prompts(d.eval_prompts)
    elif sources.has_eval(source):
        rows = data.prompts(source, "eval")
    else:
        rows = data.hold_out(data.prompts(source), HELD_OUT, settings.seed)[1]
    seen = {*data.prompt_keys(demonstrations(settings)[0]), *data.prompt_keys(training_prompts(settings))}
    if d.comparisons != "collect":
        seen |= {*data.prompt_keys(training_comparisons(settings, data.comparisons(d.comparisons))[0])}
    kept = [index for index, key in enumerate(data.prompt_keys(rows)) if key not in seen]
    if not kept:
        key = "data.eval_prompts" if d.eval_prompts else "data.prompts"
        raise LabError(
            f"{key}: all {len(rows)} prompts of {d.eval_prompts or source} to evaluate on are among those "
            "that are trained on. Name others in data.eval_prompts."
        )
    return rows.select(kept), len(rows) - len(kept)


def training_comparisons(settings: RLHFRun, rows: "Dataset") -> "tuple[Dataset, Dataset]":
    """Comparisons to train the reward model on, and those that measure its accuracy.

    Both leave the unseen prompts out of training: where reward.held_out is less than a tenth, the rest of the
    tenth is used for neither.
    """
    fraction = settings.reward.held_out
    held_out = data.hold_out(rows, fraction, settings.seed)[1]
    return data.hold_out(rows, max(fraction, HELD_OUT), settings.seed)[0], held_out
