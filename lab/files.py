"""Writing files so that a crash, a full disk or a power cut never leaves half of one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import LabError


@contextlib.contextmanager
def explain_write_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns an `OSError` while writing `what` into one clear line that ends with `remedy`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise LabError(f"{what}: cannot be written: {reason}. {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable (no effect where folders cannot be synced)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a file to write beside `path`, then syncs and renames it: readers see the old or the new one.

    An exception within leaves `path` as it was, and nothing else.
    """
    aside = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def safetensors_errors() -> Iterator[None]:
    """Turns what safetensors raises while writing, a class of its own, into the `OSError` it stands for."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(0, str(error)) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file `written_aside`."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinity are refused, JSON has none."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Reads JSON; `what` says in the error what the file is."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"{path}: missing; it is {what}. Name a run folder that has it.") from None
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: damaged ({error}); it is {what}. Restore it from a copy.") from None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
