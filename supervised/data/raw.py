"""What the readers of all formats hand on: columns of numpy arrays or lists, part by part. No torch here."""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lab.errors import LabError, first_line

Columns: TypeAlias = dict[str, Any]
"""By name, arrays or lists of equal length: a row is a sample, or a document."""

EVALUATION = ("test", "t10k", "validation", "valid", "val", "dev", "eval")
"""Names of parts that are evaluated on; the first that there is counts."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A data set as it was read.

    Columns by kind: images {"inputs": (n, channels, height, width) uint8, "labels"}; table {"inputs": (n,
    columns) float32, "labels" int64 or "targets" float32}; text {"text"}; pairs {"source", "target"}; tasks
    {"texts": the sequences of a sample, each a list of texts; "labels" int64, or float32 to be predicted as
    a number}; frames {"frames": (steps, height, width) uint8, "actions" int64, "begins" bool: see
    `rl.frames`}, whose classes are the actions' names.
    """

    kind: str
    parts: dict[str, Columns]
    classes: tuple[str, ...] = ()
    """The classes' names, where they are known."""
    form: str = ""
    """Of tasks: classification, entailment, similarity or choice."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and the like."""


def is_part(part: str, name: str) -> bool:
    """Whether a part is called so, or so with more behind it: test_2016 is a test, testament is not."""
    return part == name or (part.startswith(name) and not part[len(name)].isalpha())


def is_evaluation(part: str) -> bool:
    """Whether a part is to be evaluated on, by its name."""
    return any(is_part(part, name) for name in EVALUATION)


def n_rows(columns: Columns) -> int:
    """How many samples there are."""
    return len(next(iter(columns.values())))


def take(columns: Columns, rows: Sequence[int] | np.ndarray) -> Columns:
    """Some of the samples."""
    return {
        name: values[np.asarray(rows)] if isinstance(values, np.ndarray) else [values[i] for i in rows]
        for name, values in columns.items()
    }


def one_each(files: Iterable[tuple[Any, Path]]) -> dict[Any, Path]:
    """Each file by what it is to be; folders, and packed files that lie there unpacked, too, left out.

    Raises:
        LabError: two are to be the same.
    """
    found: dict[Any, Path] = {}
    for key, path in files:
        unpacked = path.suffix == ".gz" and path.with_suffix("").is_file()
        if not path.is_dir() and not unpacked and found.setdefault(key, path) != path:
            raise LabError(f"{found[key]}: stands for the same as {path.name} beside it. Remove one of them.")
    return found


def read_bytes(path: Path) -> bytes:
    """A file's bytes; one that is packed with gzip is unpacked.

    Raises:
        LabError: it cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LabError(f"{path}: damaged: {first_line(error).rstrip('.')}. Get the file again.") from None
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {error.strerror or error}. Name another file.") from None


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text in UTF-8, with or without a byte order mark; a file packed with gzip is unpacked.

    Raises:
        LabError: it cannot be read, or is no UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabError(f"{path}, line {line}: not UTF-8 ({error.reason}). Convert the file.") from None


def bare_suffix(path: Path) -> str:
    """The suffix, not counting .gz."""
    return Path(path.name.removesuffix(".gz")).suffix
