"""Writing files so that a crash, a full disk or a power cut never leaves half of one, and reading those that
somebody else may have made: a run folder comes by tar and git, and both carry symbolic links.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lab.errors import LONGEST_VALUE, LabError, cut


@contextlib.contextmanager
def explain_write_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns an `OSError` while writing `what` into one clear line that ends with `remedy`, or with what helps
    where a folder is missing."""
    try:
        yield
    except OSError as error:
        folder = Path(what).parent
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
            remedy = f"There is no folder {folder}. Make it first, or name another."
        reason = error.strerror or str(error)
        raise LabError(f"{what}: cannot be written: {reason}. {remedy}") from error


def check_contained(folder: Path) -> None:
    """Raises for anything in a folder that leads out of it, or is no file: what is written or read below it
    then stays there. Its own links, such as checkpoints/latest, may be links.

    Raises:
        LabError: a symbolic link leads elsewhere; or there is a pipe, a device or a socket.
    """
    inside = os.path.realpath(folder)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            kind = path.lstat().st_mode
            if stat.S_ISLNK(kind):
                target = os.path.realpath(path)
                # W&B's client links its logs, which are in its cache. Nothing reads or writes them here.
                is_log = path.match("wandb/*/logs/*.log")
                if not is_log and not Path(target).is_relative_to(inside):
                    raise LabError(
                        f"{path}: is a link to {target}, outside of the folder; nothing was read or written. "
                        "Remove it, or put what it means in its place."
                    )
            elif not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise LabError(f"{path}: is a pipe, a device or a socket, which no run has. Remove it.")


def open_own(path: Path, mode: str, *, alone: bool = True, **options: Any) -> IO[Any]:
    """`path.open(mode)` for files of the lab's own in folders that may be a stranger's: follows no link, and
    waits for no pipe.

    Args:
        path, mode, options: as of `open`.
        alone: before a file is written that has other names, too (hard links, as `cp -al` makes them), this
            name gets a copy, so that the others keep what they have. Not for locks, which are one for all.

    Raises:
        OSError: as `open` does; or it is a link, or no file.
    """
    if alone and mode not in ("r", "rb"):
        with contextlib.suppress(FileNotFoundError):
            there = path.lstat()
            if stat.S_ISREG(there.st_mode) and there.st_nlink > 1:
                with written_aside(path) as aside:
                    shutil.copyfile(path, aside)
                path.chmod(stat.S_IMODE(there.st_mode))

    def opener(name: str, flags: int) -> int:
        # Windows has neither flag, nor does it make links for everybody.
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            handle = os.open(name, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "is a symbolic link", name) from None
            raise
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "is no ordinary file", name)
        return handle

    return open(path, mode, opener=opener, **options)


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
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)
        yield aside
        aside.chmod(mode)  # safetensors gives its files to their owner alone
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


MOST_JSON_BYTES = 2**28
"""Of a record or a state; the largest ever seen has a thousandth."""


def read_json(path: Path, what: str) -> Any:
    """Reads JSON; `what` says in the error what the file is.

    Raises:
        LabError: it is missing, no file, or not JSON: so it is, too, if a text in it is none, or if it is too
            long or nested too deeply to be a record of the lab.
    """
    try:
        if not stat.S_ISREG(
            path.stat().st_mode
        ):  # a link is one of transformers' cache, or was refused before
            raise OSError(errno.EINVAL, "is no ordinary file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MOST_JSON_BYTES:
                raise ValueError(f"longer than {MOST_JSON_BYTES:,} bytes")
            data = file.read()
        text = data.decode()
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a pair is no character, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileNotFoundError:
        raise LabError(f"{path}: missing; it is {what}. Name a run folder that has it.") from None
    except RecursionError:
        raise LabError(
            f"{path}: damaged (nested too deeply); it is {what}. Restore it from a copy."
        ) from None
    except (OSError, ValueError) as error:
        why = cut(str(error), LONGEST_VALUE)
        raise LabError(f"{path}: damaged ({why}); it is {what}. Restore it from a copy.") from None


LONGEST_ROW = 2**24
"""Bytes of a row; those of a run with thousands of metrics have a hundredth."""


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows with their newlines, one after the other: a file may be larger than memory.

    One that is too long for a row comes as a byte that is none.

    Raises:
        OSError: as `open` does; or it is a link, or no file.
    """
    with open_own(path, "rb") as file:
        while line := file.readline(LONGEST_ROW):
            end = line[-1:]
            if len(line) == LONGEST_ROW and end != b"\n":
                while end != b"\n" and (more := file.readline(LONGEST_ROW)):
                    end = more[-1:]
                line = b"\0\n" if end == b"\n" else b"\0"
            yield line


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
