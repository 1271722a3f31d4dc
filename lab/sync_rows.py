"""Rows of a run, compared by what they say, wherever they were kept."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lab.records import flatten

Row = dict[str, Any]


def identity(row: Mapping[str, Any]) -> int:
    """What makes a row this row, however it was kept: its names and values, but W&B's own.

    Numbers count to 12 digits, as 0 also where they are -0, and beyond all floats as infinite. What W&B does
    not keep is as good as absent: None, an empty mapping, a value without a name. Of an image, film or table
    it counts that there is one.
    """
    flat = flatten(row)
    media = tuple(key.removesuffix("_type") for key in flat if key.endswith("._type"))
    return hash(
        frozenset(
            (_valid(key), _plain(value))
            for key, value in flat.items()
            if key
            and value is not None
            and value != {}
            and not key.startswith("_")
            and (key.endswith("._type") or not key.startswith(media))
        )
    )


def _plain(value: Any) -> str:
    """A value as text: not-a-number is equal to itself, a number within a list to what W&B makes of it."""
    if isinstance(value, Mapping):
        return json.dumps({_valid(str(key)): _plain(item) for key, item in value.items()}, sort_keys=True)
    if isinstance(value, list | tuple):
        return json.dumps([_plain(item) for item in value])
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return _valid(str(value))
    if isinstance(value, str) and math.isfinite(number):
        return f"text {value}"
    return f"{number or 0.0:.12g}"


def _valid(text: str) -> str:
    """A text as UTF-8 carries it: halves of a pair of surrogates are replaced, as W&B does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def without(rows: Iterable[Row], there: Counter[int]) -> list[Row]:
    """The rows that are not `there`, as often as they are; those found are taken out of it."""
    missing = []
    for row in rows:
        what = identity(row)
        if there[what] > 0:
            there[what] -= 1
        else:
            missing.append(row)
    return missing


def describe(rows: Sequence[Row]) -> str:
    """How many, and the last step."""
    steps = [row["global_step"] for row in rows if isinstance(row.get("global_step"), int | float)]
    return f"{count(len(rows))}{f', last step {steps[-1]}' if steps else ''}"


def count(rows: int) -> str:
    """`1 row` or `7 rows`."""
    return "1 row" if rows == 1 else f"{rows} rows"
