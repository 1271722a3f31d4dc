"""Files as bytes and as text: unpacked, recognised by how they begin, and refused rather than guessed at."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lab.errors import LabError, first_line

PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of files that are unpacked as they are read."""
_CHUNK = 2**24

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "a numpy array"),
    (b"PK\3\4", "a zip archive"),
    (b"PK\5\6", "a zip archive"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"%PDF", "a PDF"),
    (b"\x89HDF", "HDF5"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"RIFF", "a picture, sound or film"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"SQLite format 3", "a SQLite database"),
    (b"\x7fELF", "a program"),
)
PICKLE = "a pickle"
_REMEDIES = {
    "a zip archive": "Unpack it, and name what was in it.",
    "a 7z archive": "Unpack it, and name what was in it.",
    "a tar archive": "Unpack it, and name what was in it.",
    "a picture": "Name a folder of pictures.",
    "HDF5": "Save its arrays as .npz.",
    "a MATLAB file": "Save its arrays as .npz.",
    "Arrow": "Save it as Parquet.",
    PICKLE: "Opening it would run code, so it is never loaded. Save its arrays as .npz, or its rows as .csv.",
}
"""What to do with a file that is not read, by what it is."""


def what_is(head: bytes) -> str | None:
    """What a file is, from its first 512 bytes; None: no binary format that is known."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    return "a tar archive" if head[257:262] == b"ustar" else None


def head_of(path: Path) -> bytes:
    """The first 512 bytes of a file, unpacked.

    Raises:
        LabError: it cannot be read, or is damaged.
    """
    return _read(path, 512)


def read_bytes(path: Path) -> bytes:
    """A file's bytes; one that is packed (gzip, zstandard, bzip2, xz) is unpacked.

    Raises:
        LabError: it cannot be read, is damaged, or is larger than the memory that is free.
    """
    return _read(path, None)


def read_text(path: Path, errors: str = "strict", *, asked: bool = False) -> str:
    """A file's text, without a byte order mark: UTF-8, or UTF-16 or 32 if it begins with their mark.

    Args:
        path: the file; a packed one is unpacked.
        errors: what becomes of bytes that are no UTF-8, as `bytes.decode` takes it.
        asked: it was asked for as text, so nothing is known better.

    Raises:
        LabError: it cannot be read, is in another encoding, or looks like no text at all.
    """
    data = read_bytes(path)
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise LabError(
                    f"{path}: begins as {encoding.upper()}, but is not ({error.reason}). Save it as UTF-8."
                ) from None
    if not asked:
        require_text(data, path)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Convert the file, e.g. with `iconv -f latin1 "
            "-t utf-8`."
        ) from None


def require_text(data: bytes, path: Path) -> None:
    """Raises if these bytes, a file's, are of a known binary format or hold a zero byte, as no text does.

    Raises:
        LabError: they do.
    """
    name = what_is(data[:512])
    if name is None and (at := data.find(b"\0")) >= 0:
        raise LabError(
            f"{path}: is no text: byte {at + 1:,} is 0. Name a file of a kind that is read, or set "
            "data.format=text to learn its bytes as they are."
        )
    if name is not None:
        raise LabError(
            f"{path}: is {name}, which is not read. "
            + _REMEDIES.get(name, "Name a file of a kind that is read.")
            + ("" if name == PICKLE else " data.format=text learns its bytes as they are.")
        )


def bare_suffix(path: Path) -> str:
    """The suffix in lower case, not counting that of packing."""
    return Path(bare_name(path)).suffix.lower()


def bare_name(path: Path) -> str:
    """A file's name without the suffix of packing."""
    return path.name[: -len(path.suffix)] if path.suffix.lower() in PACKED else path.name


def stem(path: Path) -> str:
    """A file's name without suffixes."""
    return Path(bare_name(path)).stem


def require_memory(needed: float, what: str, remedy: str) -> None:
    """Raises unless so many bytes are free.

    Raises:
        LabError: they are not; `what` begins the line, `remedy` ends it.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise LabError(
            f"{what} {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free. {remedy}"
        )


def _read(path: Path, most: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(6)
        size = path.stat().st_size
        if most is None:
            require_memory(2 * size, f"{path}: takes about", "Name a smaller file.")
        for magic, opened in _PACKERS.items():
            if head.startswith(magic):
                with opened(path) as stream:
                    return _unpacked(stream, path, most)
        with path.open("rb") as file:
            return file.read(-1 if most is None else most)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise LabError(f"{path}: damaged: {first_line(error).rstrip('.')}. Get the file again.") from None
    except OSError as error:
        if error.errno is None:  # bz2 and pyarrow tell so of damage
            raise LabError(f"{path}: damaged: {first_line(error).rstrip('.')}. Get the file again.") from None
        raise LabError(f"{path}: cannot be read: {error.strerror or error}. Name another file.") from None


def _unpacked(stream: Any, path: Path, most: int | None) -> bytes:
    """Unpacks piece by piece: a small file may hold more than there is memory."""
    if most is not None:
        return stream.read(most)
    pieces, n = [], 0
    while piece := stream.read(_CHUNK):
        pieces.append(piece)
        n += len(piece)
        require_memory(n, f"{path}: unpacked so far, and its copy takes", "Name a smaller file.")
    return b"".join(pieces)


def _zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


_PACKERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
