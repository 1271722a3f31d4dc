"""The one kind of error a user is meant to see."""

import difflib
from collections.abc import Iterable


class LabError(Exception):
    """A mistake or mishap outside the code: one line that says what, where and what to do.

    The command `lab` prints it without a traceback and exits with code 2.
    """


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the nearest of `known`, or an empty string."""
    nearest = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: Exception) -> str:
    """What an error says, shortly: the first line of its message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
