"""Which rows the stages learn from, and which prompts none of them has seen.

A tenth of the prompts is held out by a hash of each, the same in demonstrations, comparisons and prompts,
unless the data come with a part to evaluate on, or `data.eval_prompts` names one. Whatever a stage trains on
is not unseen: it is taken out of what is evaluated, and counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab.errors import LabError
from rlhf import data, sources
from rlhf.config import RLHFRun

UNSEEN = 0.1
"""Share of the prompts that are held out where nothing else is."""


@dataclass(frozen=True)
class Parts:
    """Rows to train on and rows to evaluate on."""

    train: Any
    held_out: Any
    seen: int = 0
    """Rows that were taken out of the held-out ones, because their prompt is trained on as well."""


def demonstrations(settings: RLHFRun) -> Parts:
    """Demonstrations: those of the source's own part to evaluate on are held out, or a tenth.

    Raises:
        LabError: the data cannot be used, or nothing is left to evaluate on.
    """
    source, strict = settings.data.demonstrations, settings.data.bad_rows == "error"
    rows = data.load("demonstrations", source, strict=strict).rows
    if not sources.has_eval(source):
        return Parts(*data.hold_out(rows, UNSEEN, settings.seed))
    held_out = data.load("demonstrations", source, "eval", strict=strict).rows
    known = set(asked(rows))
    kept = [i for i, keys in enumerate(_asked_by_row(held_out)) if not known.intersection(keys)]
    if not kept:
        raise LabError(
            f"{source}: every prompt of its part to evaluate on is one it trains on, too. Name the training "
            "file itself: a tenth of it is held out then."
        )
    seen = len(held_out) - len(kept)
    return Parts(rows, held_out.select(kept) if seen else held_out, seen)


def comparisons(settings: RLHFRun, source: str) -> Parts:
    """Comparisons, of which `reward.held_out` of the prompts are held out, and no fewer than are unseen.

    Raises:
        LabError: the data cannot be used.
    """
    strict = settings.data.bad_rows == "error"
    rows = data.load("comparisons", source, strict=strict).rows
    # Where comparisons are collected, unseen prompts were never asked.
    least = UNSEEN if settings.data.comparisons != "collect" else 0.0
    return Parts(*data.hold_out(rows, max(settings.reward.held_out, least), settings.seed))


def prompts(settings: RLHFRun) -> Parts:
    """What PPO and collection ask, and the prompts that nothing was trained on.

    Raises:
        LabError: the data cannot be used, or every prompt to evaluate on is trained on.
    """
    d = settings.data
    source, strict = d.prompts or d.demonstrations, d.bad_rows == "error"
    rows = data.load("prompts", source, strict=strict).rows
    if d.eval_prompts:
        unseen = data.load("prompts", d.eval_prompts, strict=strict).rows
    elif sources.has_eval(source):
        unseen = data.load("prompts", source, "eval", strict=strict).rows
    else:
        rows, unseen = data.hold_out(rows, UNSEEN, settings.seed)
    known = {*asked(rows), *asked(demonstrations(settings).train)}
    if d.comparisons != "collect":
        known.update(asked(comparisons(settings, d.comparisons).train))
    kept = [i for i, (key,) in enumerate(_asked_by_row(unseen)) if key not in known]
    if not kept:
        raise LabError(
            f"{d.eval_prompts or source}: all {len(unseen)} prompts to evaluate on are trained on, too. "
            "Name others in data.eval_prompts, or leave it empty and name one file: a tenth is held out then."
        )
    seen = len(unseen) - len(kept)
    return Parts(rows, unseen.select(kept) if seen else unseen, seen)


def converses(settings: RLHFRun) -> bool:
    """Whether any of the data are conversations, so that the end of a turn ends an answer."""
    d = settings.data
    named = [("demonstrations", d.demonstrations), ("prompts", d.prompts), ("prompts", d.eval_prompts)]
    named += [("comparisons", d.comparisons)] if d.comparisons != "collect" else []
    return any(
        not isinstance(next(iter(data.load(kind, source, strict=False).rows[0].values())), str)
        for kind, source in named
        if source
    )


def asked(dataset: Any) -> Iterator[str]:
    """Keys of all prompts that rows teach an answer to; of a conversation, one for each answer."""
    for keys in _asked_by_row(dataset):
        yield from keys


def _asked_by_row(dataset: Any) -> Iterator[list[str]]:
    if "prompt" in dataset.column_names:
        for prompt in dataset["prompt"][:]:
            yield [data.key_of(prompt)]
    elif "messages" in dataset.column_names:
        for turns in dataset["messages"][:]:
            answers = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
            yield [data.key_of(turns[:i]) for i in answers]
    else:
        for text in dataset["text"][:]:
            yield [data.key_of(text)]
