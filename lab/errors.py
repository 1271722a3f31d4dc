"""The one kind of error a user is meant to see."""

import difflib
from collections.abc import Iterable
from typing import Any


class LabError(Exception):
    """A mistake or mishap outside the code: one line that says what, where and what to do.

    The command `lab` prints it without a traceback and exits with code 2.
    """


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the nearest of `known`, or an empty string."""
    if len(wrong) > LONGEST_VALUE:  # difflib's time grows with the square
        return ""
    nearest = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


LONGEST_VALUE, LONGEST_LINE = 200, 1_000
"""Characters of a value in an error, and of the whole line."""


def brief(value: Any) -> str:
    """A value as an error repeats it: `repr`, the middle of a long one left out."""
    return cut(repr(value), LONGEST_VALUE)


def cut(text: str, length: int) -> str:
    """A text of at most this length: a longer one loses its middle, as its ends say what is wrong and what to
    do.
    """
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 5]} ... {text[-end:]}"


def first_line(error: Exception) -> str:
    """What an error says, shortly: the first line of its message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
