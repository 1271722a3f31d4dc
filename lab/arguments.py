"""What arguments of commands may be: types for argparse, whose messages it passes on."""

import argparse
import contextlib

from lab.errors import brief

MOST = 10**9
"""Of anything that is counted on a command line."""
MOST_SEED = 2**31 - 1 - 10**6
"""Seeds are 32 bits with a sign, and a seed grows by the number of the game."""


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"{brief(text)} is no whole number of at least 1")
    if len(text) > 12 or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{brief(text)} is more than {MOST:,}")
    return int(text)


def seed(text: str) -> int:
    """A whole number of at least 0 that every library takes, also with the number of a game added."""
    if not text.isdecimal() or len(text) > 10 or int(text) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"{brief(text)} is no whole number from 0 to {MOST_SEED:,}")
    return int(text)


def probability(text: str) -> float:
    """A number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no probability between 0 and 1")
