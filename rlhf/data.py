"""Data for the three stages of the ChatGPT recipe: demonstrations, comparisons and prompts.

Where the rows come from is said in `rlhf.sources`, in which forms they may come in `rlhf.forms`. Whatever
cannot be used is a `LabError` that names file and line, and nothing heavy is imported before it is needed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from lab.errors import LabError
from rlhf import forms, sources
from rlhf.forms import Row, Text
from rlhf.reviews import Split

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Dropped:
    """What was left out while reading. Who passes none to be filled finds it in the log."""

    ties: int = 0
    """Rankings without two different ranks, from which nothing can be learned."""
    bad_rows: int = 0
    """Rows that cannot be used, where `strict` is False."""
    first: str = ""
    """What is wrong with the first bad row, and where it stands."""

    def __str__(self) -> str:
        first = f" (the first: {self.first})" if self.first else ""
        return f"left out {self.ties} ties and {self.bad_rows} rows that cannot be used{first}"


def demonstrations(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """Texts to imitate, in TRL's formats for supervised fine-tuning.

    Args:
        source: see `rlhf.sources`. Of a comparison, the best completion is the demonstration.
        split: "train", or "eval" where the source has it (`sources.has_eval`).
        strict: a row that cannot be used is an error; else it is left out and counted.
        dropped: is told what was left out.

    Returns:
        Columns `prompt` and `completion`, or `messages`, or `text`: what the source has.

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    rows, left_out = _load(source, split, forms.DEMONSTRATIONS, strict)
    _tell(source, left_out, dropped)
    return _dataset(rows)


def comparisons(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """Rankings of two or more completions of one prompt; a pair is a ranking of two.

    Args:
        source, split, strict, dropped: as for `demonstrations`. Rows in which all tie are always left out.

    Returns:
        Columns `prompt` (text or messages), `completions` (a list of such), `ranks` (of int; 1 is the best,
        equal ranks are a tie), `finished` (of bool; False: cut off at a length limit, so that no end-of-text
        token belongs behind it), `source` (text) and, where any row has them, `scores` (of float).

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    if source in sources.BUILT_IN:
        raise LabError(
            f"{source}: has no comparisons. Let a labeler rank what a fine-tuned model answers to its "
            "prompts, or name a file of comparisons."
        )
    rows, left_out = _load(source, split, forms.COMPARISONS, strict)
    untied = [row for row in rows if len(set(row["ranks"])) > 1]
    if not untied:
        raise LabError(f"{source}: all completions tie in each of its rankings. Name data with preferences.")
    left_out.ties = len(rows) - len(untied)
    _tell(source, left_out, dropped)
    return _dataset(untied)


def prompts(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """What to answer: the prompts of rows of any form but whole texts.

    Args:
        source, split, strict, dropped: as for `demonstrations`.

    Returns:
        Column `prompt` (text or messages): each prompt once, in the order of the source.

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    rows, left_out = _load(source, split, forms.PROMPTS, strict)
    _tell(source, left_out, dropped)
    unique = {_key(row["prompt"]): row["prompt"] for row in rows}
    return _dataset([{"prompt": prompt} for prompt in unique.values()])


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Indices (better, worse) of all pairs of answers whose ranks differ; the smaller rank is the better."""
    return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def pairs_of(row: Row) -> Iterator[Row]:
    """All pairs of different rank in a ranking (a row of `comparisons`), as TRL's preference rows."""
    for better, worse in ordered_pairs(row["ranks"]):
        yield {
            "prompt": row["prompt"],
            "chosen": row["completions"][better],
            "rejected": row["completions"][worse],
            "chosen_finished": row["finished"][better],
            "rejected_finished": row["finished"][worse],
            "source": row["source"],
        }


def prompt_keys(dataset: "Dataset") -> list[str]:
    """A key of each row's prompt, equal for equal ones; of a conversation, of all but its last message."""
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    return [_key(value[:-1] if column == "messages" else value) for value in dataset[column]]


def hold_out(dataset: "Dataset", fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Splits by prompt: none is on both sides.

    A hash of the prompt decides, so one seed holds out the same prompts of demonstrations, comparisons and
    prompts, whatever else is in these. The price is that `fraction` of the prompts is only roughly met; but
    at least one prompt is on either side.

    Args:
        dataset: as the functions above return it.
        fraction: share of the prompts, between 0 and 1.
        seed: another seed holds out others.

    Returns:
        The rows to train on and those held out, both in their order.

    Raises:
        LabError: all rows have one and the same prompt.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    keys = prompt_keys(dataset)
    chances = {key: _uniform(f"{seed} {key}") for key in set(keys)}
    if len(chances) < 2:
        raise LabError("data: no two rows have different prompts, so none can be held out. Name more data.")
    at_least_one = math.nextafter(min(chances.values()), 1)
    threshold = min(max(fraction, at_least_one), max(chances.values()))
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        sides[chances[key] < threshold].append(i)
    train, held_out = sides
    return dataset.select(train), dataset.select(held_out)


def _load(source: str, split: Split, parsers: forms.Parsers, strict: bool) -> tuple[list[Row], Dropped]:
    """The rows of a split, all of one form and kind, and what was left out."""
    rows: list[Row] = []
    dropped = Dropped()
    form = first = ""
    for part in sources.read(source, split):
        parse = None
        for i, raw in enumerate(part.rows):
            try:
                raw = forms.as_row(raw)
                parse = parse or forms.choose_parser(raw, parsers, part.place(i))
                row = parse(raw)
                if not form:
                    form, first = forms.form_of(row), part.place(i)
                elif forms.form_of(row) != form:
                    raise forms.BadRow(f"has {forms.form_of(row)}, while {first} has {form}")
            except forms.BadRow as bad:
                problem = f"{part.place(i)}: {bad}"
                if strict:
                    raise LabError(problem) from None
                dropped.bad_rows += 1
                dropped.first = dropped.first or problem
                continue
            if "source" in row:
                row["source"] = row["source"] or part.label
            rows.append(row)
    if not rows:
        raise LabError(dropped.first or f"{source}: is empty. Name data with rows in it.")
    return rows, dropped


def _tell(source: str, left_out: Dropped, dropped: Dropped | None) -> None:
    if dropped is not None:
        dropped.ties += left_out.ties
        dropped.bad_rows += left_out.bad_rows
        dropped.first = dropped.first or left_out.first
    elif left_out.ties or left_out.bad_rows:
        logging.getLogger(__name__).warning("%s: %s", source, left_out)


def _dataset(rows: list[Row]) -> "Dataset":
    """The rows as a data set, without columns in which there is nothing."""
    from datasets import Dataset

    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _key(prompt: Text) -> str:
    """Equal for equal prompts."""
    return json.dumps(prompt, sort_keys=True)


def _uniform(text: str) -> float:
    """A number in [0, 1], evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
