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

    Numbers count to 12 digits. Nothing (None) is as good as absent. Of an image, film or table it counts
    that there is one.
    """
    flat = flatten(row)
    media = tuple(key.removesuffix("_type") for key in flat if key.endswith("._type"))
    return hash(
        frozenset(
            (key, _plain(value))
            for key, value in flat.items()
            if value is not None
            and not key.startswith("_")
            and (key.endswith("._type") or not key.startswith(media))
        )
    )


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, sort_keys=True)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return str(value)
    if isinstance(value, str) and math.isfinite(number):
        return f"text {value}"
    return f"{number:.12g}"  # as text: not-a-number is equal to itself


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
