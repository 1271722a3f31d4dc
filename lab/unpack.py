"""Files of data as people send them: packed or not, known by how they begin, never unpacked without end.

A file of a few kilobytes can unpack to more than there is memory. What grows to more than `MAX_RATIO` times
its size is refused while it is unpacked, or before where it says how large it will be: every reader of data
asks `require_growth`, or reads from `unpacked`, which does.
"""

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lab.errors import LabError, first_line
from lab.memory import require_memory

PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes of packed files. Whether one is packed, its first bytes say."""
FREELY = 64 * 2**20
MAX_RATIO = 200
"""Files may unpack to this many times their size, and to `FREELY` bytes in any case: text shrinks to a tenth,
frames of play to a sixtieth, and what unpacks to far more is made to fill a memory."""
DROPPINGS = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "ehthumbs.db")
"""Names, in lower case, of what macOS, Windows and Synology leave in folders, beside hidden files."""
_CHUNK = 2**20

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


def what_is(head: bytes) -> str | None:
    """What a file is, from its first 512 bytes; None: no binary format that is known."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    return "a tar archive" if head[257:262] == b"ustar" else None


def is_dropping(path: Path, root: Path) -> bool:
    """Whether a file or folder below `root` is hidden, or something that an operating system left there."""
    inside = path.relative_to(root).parts
    return any(name.startswith(".") or name.lower() in DROPPINGS for name in inside)


def bare_suffix(path: Path) -> str:
    """The suffix in lower case, not counting that of packing."""
    return Path(bare_name(path)).suffix.lower()


def bare_name(path: Path) -> str:
    """A file's name without the suffix of packing."""
    return path.name[: -len(path.suffix)] if path.suffix.lower() in PACKED else path.name


def stem(path: Path) -> str:
    """A file's name without suffixes."""
    return Path(bare_name(path)).stem


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """A file to be read piece by piece; one that is packed (gzip, zstandard, bzip2, xz) is unpacked.

    Raises:
        LabError: here or while it is read, it cannot be, is damaged, or unpacks to far more than its size.
    """
    with readable(path):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise LabError(f"{path}: is no ordinary file. Name another file.")
        with path.open("rb") as file:
            head = file.read(6)
            file.seek(0)
            opened = next((opened for magic, opened in _PACKERS.items() if head.startswith(magic)), None)
            if opened is None:
                yield file
                return
            with opened(file) as stream:
                yield _Limited(stream, path)  # type: ignore[misc]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a line about it.

    Raises:
        LabError: it cannot be read, or is damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise LabError(f"{path}: damaged: {first_line(error).rstrip('.')}. Get the file again.") from None
    except OSError as error:
        if error.errno is None:  # gzip, bz2 and pyarrow tell so of damage
            raise LabError(f"{path}: damaged: {first_line(error).rstrip('.')}. Get the file again.") from None
        raise LabError(f"{path}: cannot be read: {error.strerror or error}. Name another file.") from None


class _Limited:
    """A file being unpacked."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path, self._n = stream, path, 0
        self._packed = path.stat().st_size

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._n += len(data)
        require_growth(self._n, self._packed, self._path)
        return data


def require_growth(size: int, packed: int, what: str | Path) -> None:
    """Raises if `packed` bytes that unpack to `size` are made to fill a memory.

    Args:
        size: so far, or as they say themselves.
        packed: in the file.
        what: the file, for errors.

    Raises:
        LabError: they are.
    """
    if size > max(FREELY, MAX_RATIO * packed):
        raise LabError(
            f"{what}: unpacks to more than {MAX_RATIO} times its size, as hardly any data do. Unpack it "
            "yourself if it is data."
        )


def head_of(path: Path) -> bytes:
    """The first 512 bytes of a file, unpacked.

    Raises:
        LabError: it cannot be read, or is damaged.
    """
    with unpacked(path) as file:
        return file.read(512)


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked.

    Raises:
        LabError: it cannot be read, is damaged, unpacks to far more than its size, or to more than the memory
            that is free.
    """
    with unpacked(path) as file:
        require_memory(2 * path.stat().st_size, f"{path}: takes about", "Name a smaller file.")
        if not isinstance(file, _Limited):
            return file.read()
        pieces, n = [], 0
        while piece := file.read(_CHUNK):
            pieces.append(piece)
            n += len(piece)
            require_memory(n, f"{path}: unpacked so far, and its copy takes", "Name a smaller file.")
        return b"".join(pieces)


def parquet_batches(source: Any, path: Path) -> Iterator[Any]:
    """The rows of a Parquet file as `pyarrow.RecordBatch`es of a few hundred, the first of none.

    Args:
        source: the file, or its bytes in memory.
        path: of the file, for errors.

    Raises:
        LabError: it is damaged, or far larger in memory than on disk: a column that repeats one value takes
            next to no space there.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    size = path.stat().st_size
    try:
        with ParquetFile(source) as file:
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            require_growth(sum(group.total_byte_size for group in groups), size, path)
            yield pyarrow.RecordBatch.from_pylist([], schema=file.schema_arrow)
            n = 0
            for batch in file.iter_batches(256):
                n += batch.nbytes
                require_growth(n, size, path)
                yield batch
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LabError(f"{path}: not readable as Parquet: {first_line(error)}. Get it again.") from None


def require_arrow_growth(messages: Any, path: Path) -> None:
    """`require_growth` of a stream of Arrow, whose buffers may be compressed and then begin with their size.

    Args:
        messages: all of it, a `pyarrow.ipc.MessageReader`.
        path: of the file.

    Raises:
        LabError: they are made to fill a memory.
    """
    size, packed = 0, path.stat().st_size
    for message in messages:
        metadata, body = message.metadata.to_pybytes(), memoryview(message.body or b"")
        # A flatbuffer (format/Message.fbs of Arrow): Message.header, the third field, is a RecordBatch, whose
        # third is a list of places and lengths, and whose fourth is there if these are compressed.
        header = _field(metadata, _unsigned(metadata, 0), 2)
        buffers, compression = (header and _field(metadata, header, i) for i in (2, 3))
        if not (buffers and compression):
            continue
        for i in range(_unsigned(metadata, buffers)):
            at, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * i)
            if length >= 8:
                size += max(struct.unpack_from("<q", body, at)[0], 0)
        require_growth(size, packed, path)


def _unsigned(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def _field(data: bytes, table: int, number: int) -> int:
    """Where the table or list begins that is a field of a flatbuffer's table; 0: it lacks the field."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0]
    return offset and table + offset + _unsigned(data, table + offset)


def _zstd(file: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


_PACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
