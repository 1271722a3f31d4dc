"""Consent: what a file names runs as code only if the command line says `--trust`.

    lab rlhf mine.yaml --trust                          all that the command's files name, shown with its hash
    lab rlhf mine.yaml --trust=python:score.py:score    this alone

It is about code (a labeler in Python, the modules of a model's folder), about hosts that the record of a
run names, and about keys in environment variables. A program that calls the lab's functions names things
itself, and is asked about the code of model folders alone.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lab.errors import LabError, did_you_mean
from lab.files import sha256_file


class _Consent:
    """What one command may run, and what it was asked for."""

    def __init__(self, names: Iterable[str], record: Path | None) -> None:
        self.names, self.record = frozenset(names), record
        self.asked: set[str] = set()


_consent: _Consent | None = None
"""None: no command line, a program calls."""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust` to a command that opens what others may have made."""
    parser.add_argument(
        "--trust",
        action="append",
        metavar="NAME",
        help="run code that its files name: --trust all, shown with its SHA-256; --trust=NAME only this",
    )


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--trust` as `--trust=`: argparse would take the word behind it for its value."""
    return ["--trust=" if argument == "--trust" else argument for argument in arguments]


@contextlib.contextmanager
def given(names: Iterable[str], record: Path | None = None) -> Iterator[None]:
    """Within, only these names are trusted; an empty one stands for all.

    Args:
        names: as `--trust` had them.
        record: the run folder that is opened, where it is none of a config.
    """
    global _consent
    before, _consent = _consent, _Consent(names, record)
    try:
        yield
        for name in sorted(_consent.names - _consent.asked - {""}):
            hint = did_you_mean(name, _consent.asked)
            print(f"lab: --trust={name}: nothing of that name was to be run.{hint}", file=sys.stderr)
    finally:
        _consent = before


def arguments() -> list[str]:
    """The consent of this command, as arguments for another one."""
    return [f"--trust={name}" if name else "--trust" for name in sorted(_consent.names)] if _consent else []


def from_record() -> bool:
    """Whether this command opens the record of a run, which somebody else may have written."""
    return _consent is not None and _consent.record is not None


def allows(name: str) -> bool:
    """Whether the command line trusts this name."""
    return _consent is not None and not {name, ""}.isdisjoint(_consent.names)


def require(name: str, what: str, where: str, files: Sequence[Path] = ()) -> None:
    """Raises unless the command line trusts `name`; shows it, the first time, if it does.

    Args:
        name: of what would run, as `--trust=NAME` takes it.
        what: it would do, for the error.
        where: the name stands.
        files: the code, whose hashes are shown.

    Raises:
        LabError: no consent was given.
    """
    if _consent is None:
        return
    if not allows(name):
        place = f"{_consent.record}: {where}" if _consent.record else where
        raise LabError(f"{place}: {what}. If you trust it, add --trust={shlex.quote(name)}")
    if name not in _consent.asked:
        hashes = "".join(f"\n         {file}  SHA-256 {sha256_file(file)}" for file in files)
        print(f"trusted  {name}: {what}{hashes}", file=sys.stderr, flush=True)
    _consent.asked.add(name)
