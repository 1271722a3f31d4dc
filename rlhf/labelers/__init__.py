"""Who ranks answers: a program, a reward model, a language model as judge, or a person.

    make("vader")                                          sentiment of the text
    make({"name": "python:score.py:score", "batch": True}) any function of yours
    make("reward:runs/mine/reward/model")                  a reward model's folder
    make({"name": "judge:http://host/v1", "model": "m"})   an OpenAI-compatible service
    make("human")                                          whoever sits at the terminal

Imports nothing heavy: what a labeler needs is loaded by its `prepare`.
"""

from collections.abc import Mapping
from typing import Any

from lab import config
from lab.errors import LabError, did_you_mean
from rlhf.labelers.base import (
    Answer,
    Configured,
    Labeler,
    Prompt,
    Quit,
    Ranking,
    Scorer,
    Skip,
    Undo,
    completion,
)
from rlhf.labelers.human import Human
from rlhf.labelers.judge import Judge
from rlhf.labelers.programs import Function, RewardModel, Vader

__all__ = [
    "Answer",
    "Labeler",
    "Prompt",
    "Quit",
    "Ranking",
    "Scorer",
    "Skip",
    "Undo",
    "code_of",
    "completion",
    "make",
    "names",
]

KINDS: dict[str, type[Configured]] = {
    made.kind: made for made in (Vader, Function, RewardModel, Judge, Human)
}


def names() -> list[str]:
    """How the labelers are called in a config."""
    return [f"{kind}:{made.target.upper()}" if made.target else kind for kind, made in KINDS.items()]


def make(spec: str | Mapping[str, Any], source: str = "labeler") -> Labeler:
    """Builds a labeler and loads what it needs.

    Args:
        spec: one of `names`, or a mapping of `name` and the options of its class,
            e.g. {"name": "vader", "min_words": 4}.
        source: where the spec stands, for errors.

    Raises:
        LabError: no such labeler or option, it cannot be loaded, or it runs what the command line does not
            trust (see `lab.trust`).
    """
    labeler = _configured(spec, source)
    labeler.require_consent(source)
    labeler.prepare()
    return labeler


def code_of(spec: str | Mapping[str, Any], source: str = "labeler") -> dict[str, str] | None:
    """The user's code that a labeler runs, as the record of a run has it; nothing is loaded."""
    return _configured(spec, source).code()


def _configured(spec: str | Mapping[str, Any], source: str) -> Configured:
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind, colon, target = str(options.pop("name", "")).partition(":")
    if kind not in KINDS:
        raise LabError(
            f"{source}: no labeler {kind!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(names())}."
        )
    made = KINDS[kind]
    if colon and not made.target:
        raise LabError(f"{source}: {kind} takes nothing behind a colon. Give options by their names.")
    if colon:
        options[made.target] = target
    return config.build(made, options, {}, source)
