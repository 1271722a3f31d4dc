"""Which rows a recipe trains on and which it evaluates on: no unseen prompt is trained on.

A tenth of the prompts is held out wherever the data has no part of its own for that, by a hash of the prompt,
so the same ones in demonstrations, comparisons and prompts; also where data.eval_prompts names others, for
what a stage trains on must not depend on how it is evaluated. All rows are read as `data.bad_rows` says.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lab.errors import LabError
from rlhf import data, sources
from rlhf.config import RLHFRun
from rlhf.forms import Text
from rlhf.reviews import Split

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 0.1
"""Fraction of the prompts that no stage trains on."""


def load(settings: RLHFRun, kind: str, source: str, split: Split = "train") -> data.Loaded:
    """`data.load` as `data.bad_rows` says."""
    return data.load(kind, source, split, strict=settings.data.bad_rows == "error")


def demonstrations(settings: RLHFRun) -> "tuple[Dataset, Dataset]":
    """Demonstrations to train on, and held-out ones of which no prompt is trained on.

    Raises:
        LabError: the data cannot be used, or every held-out prompt is trained on.
    """
    source = settings.data.demonstrations
    rows = load(settings, "demonstrations", source).rows
    if not sources.has_eval(source):
        return data.hold_out(rows, HELD_OUT, settings.seed)
    held_out = load(settings, "demonstrations", source, "eval").rows
    seen = set(prompt_keys(rows))
    kept = [i for i, keys in enumerate(_keys_by_row(held_out)) if not seen.intersection(keys)]
    if not kept:
        raise LabError(
            f"{source}: every prompt of its part to evaluate on is one it trains on, too. Name the training "
            "file itself: a tenth of it is held out then."
        )
    return rows, held_out if len(kept) == len(held_out) else held_out.select(kept)


def training_prompts(settings: RLHFRun) -> "Dataset":
    """What collection and PPO ask."""
    source = settings.data.prompts or settings.data.demonstrations
    rows = load(settings, "prompts", source).rows
    return rows if sources.has_eval(source) else data.hold_out(rows, HELD_OUT, settings.seed)[0]


def unseen_prompts(settings: RLHFRun) -> "tuple[Dataset, int]":
    """What the evaluation asks, and how many prompts were left out of it because a stage trains on them.

    Raises:
        LabError: every one of them is trained on.
    """
    d = settings.data
    source = d.prompts or d.demonstrations
    if d.eval_prompts:
        rows = load(settings, "prompts", d.eval_prompts).rows
    elif sources.has_eval(source):
        rows = load(settings, "prompts", source, "eval").rows
    else:
        rows = data.hold_out(load(settings, "prompts", source).rows, HELD_OUT, settings.seed)[1]
    seen = {*prompt_keys(demonstrations(settings)[0]), *prompt_keys(training_prompts(settings))}
    if d.comparisons != "collect":
        compared = load(settings, "comparisons", d.comparisons).rows
        seen |= {*prompt_keys(training_comparisons(settings, compared)[0])}
    kept = [i for i, keys in enumerate(_keys_by_row(rows)) if not seen.intersection(keys)]
    if not kept:
        key = "data.eval_prompts" if d.eval_prompts else "data.prompts"
        raise LabError(
            f"{key}: all {len(rows)} prompts of {d.eval_prompts or source} to evaluate on are among those "
            "that are trained on. Name others in data.eval_prompts."
        )
    return rows if len(kept) == len(rows) else rows.select(kept), len(rows) - len(kept)


def some(prompts: Sequence[Text], at_most: int | None, source: str) -> list[Text]:
    """At most so many of a source's prompts, drawn (see `data.drawn`); those of a built-in task, which were
    shuffled when they were made, from the first."""
    if source in sources.BUILT_IN:
        return list(prompts[:at_most])
    return [prompts[i] for i in data.drawn(prompts, at_most)]


def training_comparisons(settings: RLHFRun, rows: "Dataset") -> "tuple[Dataset, Dataset]":
    """Comparisons to train the reward model on, and those that measure its accuracy.

    Both leave the unseen prompts out of training: where reward.held_out is less than a tenth, the rest of the
    tenth is used for neither.
    """
    fraction = settings.reward.held_out
    train, held_out = data.hold_out(rows, fraction, settings.seed)
    if settings.data.comparisons != "collect" and fraction < HELD_OUT:  # else collected for training prompts
        train = data.hold_out(rows, HELD_OUT, settings.seed)[0]
    return train, held_out


def converses(settings: RLHFRun) -> bool:
    """Whether any of the data are conversations, so that the end of a turn ends an answer."""
    d = settings.data
    named = [("demonstrations", d.demonstrations), ("prompts", d.prompts)]
    named += [("comparisons", d.comparisons)] if d.comparisons != "collect" else []
    return any(
        not isinstance(next(iter(load(settings, kind, source).rows[0].values())), str)
        for kind, source in named
        if source
    )


def prompt_keys(dataset: "Dataset") -> Iterator[str]:
    """Keys of all prompts that rows teach an answer to; of a conversation, one for each answer."""
    for keys in _keys_by_row(dataset):
        yield from keys


def _keys_by_row(dataset: "Dataset") -> Iterator[list[str]]:
    if "prompt" in dataset.column_names:
        for prompt in dataset["prompt"][:]:
            yield [_key(prompt)]
    elif "messages" in dataset.column_names:
        for turns in dataset["messages"][:]:
            answers = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
            yield [_key(turns[:i]) for i in answers]
    else:
        for text in dataset["text"][:]:
            yield [_key(text)]


def _key(prompt: Text) -> str:
    """Equal for prompts that ask the same: a text, or a user who says just that, whatever is learned."""
    if isinstance(prompt, str):
        return data.key_of(prompt)
    if len(prompt) == 1 and prompt[0]["role"] == "user" and not prompt[0].get("tools"):
        return data.key_of(prompt[0]["content"])
    return data.key_of([{key: value for key, value in turn.items() if key != "weight"} for turn in prompt])
