"""What the readers of all formats hand on: columns of numpy arrays or lists, part by part. No torch here."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lab.errors import LabError
from lab.unpack import is_dropping

Columns: TypeAlias = dict[str, Any]
"""By name, arrays or lists of equal length: a row is a sample, or a document."""

PARTS = {
    "train": ("train", "training", "trn", "trainset"),
    "validation": (
        *("validation", "valid", "val", "dev", "eval", "evaluation", "valset", "devset"),
        "newsdev",  # of WMT, as newstest; devtest is of FLORES, tst of IWSLT
    ),
    "test": ("test", "testing", "tst", "t10k", "testset", "newstest", "devtest"),
}
"""Parts that models are trained with, chosen by and reported on, by the names they go by, in any case."""
_NEUTRAL = {"set", "data", "dataset", "split", "part", "seg", "images", "image", "imgs", "img", "folder"}
"""Words that may stand beside such a name in that of a folder: train_set is a part, train_station none."""
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
"""Suffixes of the pictures that are read, in lower case."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column of a table is to a network."""

    name: str
    categories: tuple[str, ...] | None = None
    """Texts, each of which becomes a number of its own, 0 or 1; None: the column holds numbers."""


def columns_of(values: Any) -> tuple[Column, ...]:
    """Columns from JSON, as a checkpoint describes them.

    Raises:
        ValueError: it describes none.
    """
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("no list of columns")
    found = []
    for value in values:
        name, categories = value.get("name"), value.get("categories")
        texts = [name] if categories is None else [name, *categories] if isinstance(categories, list) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("no column with a name and categories")
        found.append(Column(name=texts[0], categories=None if categories is None else tuple(texts[1:])))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the objective and the network want of data that could be taken in two ways."""

    predicts: str = ""
    """classes or numbers: what labels are that could be both; empty: by their type."""
    tasks: bool = False
    """Take folders of texts for the classes of what is in them, and not all for one text."""
    sequences: bool = False
    """Take arrays of three dimensions of floats for sequences (n, time, features) and not for images."""
    columns: tuple[Column, ...] = ()
    """Of a table, those that a finished run learned from: they are looked for by name. Empty: all."""
    classes: tuple[str, ...] = ()
    """Those that a finished run learned, in its order; empty: as the data have them."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A data set as it was read.

    Columns by kind: images {"inputs": (n, channels, height, width) uint8, "labels"}; table {"inputs": (n,
    columns) float32, "labels" int64 or "targets" float32}; sequences {"inputs": (n, time, features) float32,
    and as a table}; text {"text"}; pairs {"source", "target"}; tasks
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
    columns: tuple[Column, ...] = ()
    """Of a table whose columns have names, what became of them."""
    notes: list[str] = field(default_factory=list)
    """What was left out or converted, a sentence each."""


def part_kind(part: str) -> str | None:
    """train, validation or test, by a part's name, alone or with more behind it: test_2016 is a test,
    testament is not. None: none of them."""
    return _KINDS.get(_first_word(part))


def folder_kind(name: str) -> str | None:
    """As `part_kind`, of a folder, which may also be called after a class: nothing but a number or a word as
    `_NEUTRAL` may stand beside, as in seg_train and training_set."""
    words = [re.sub(r"\d+$", "", word) for word in words_of(name) if not word.isdecimal()]
    if name.lower() in _KINDS:
        return _KINDS[name.lower()]
    kinds = {_KINDS.get(word) for word in words if word not in _NEUTRAL}
    return kinds.pop() if len(kinds) == 1 else None


def part_word(name: str) -> str | None:
    """The word in a name, e.g. of a table, that a part goes by: val of val_labels and of labelsVal; None:
    there is none, or words of two parts."""
    found = {kind: word for word in words_of(name) if (kind := part_kind(word))}
    return next(iter(found.values())) if len(found) == 1 else None


def is_part(part: str, name: str) -> bool:
    """Whether a part is called so, in any case, or so with more behind it."""
    part, name = part.lower(), name.lower()
    return part == name or (part.startswith(name) and not part[len(name)].isalpha())


def is_evaluation(part: str) -> bool:
    """Whether a part is to be evaluated on, by its name."""
    return part_kind(part) in ("validation", "test")


_KINDS = {name: kind for kind, names in PARTS.items() for name in names}


def words_of(name: str) -> list[str]:
    """The words of a name, in lower case: of customerID as of customer_id."""
    return re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def _first_word(name: str) -> str:
    first = next(iter(words_of(name)), "")
    return first if first in _KINDS else re.sub(r"\d+$", "", first)


def n_rows(columns: Columns) -> int:
    """How many samples there are."""
    return len(next(iter(columns.values())))


def take(columns: Columns, rows: Sequence[int] | np.ndarray) -> Columns:
    """Some of the samples."""
    return {
        name: values[np.asarray(rows)] if isinstance(values, np.ndarray) else [values[i] for i in rows]
        for name, values in columns.items()
    }


def in_order(names: Iterable[str]) -> list[str]:
    """Classes in the order in which they are numbered: those that are whole numbers by these, then the
    others by name."""
    found = set(names)
    whole = {name: int(name) for name in found if name.isdecimal() and len(name) < 99}  # int() has a limit
    return sorted(found, key=lambda name: (whole.get(name, math.inf), name))


def visible(folder: Path, deep: bool = False) -> list[Path]:
    """What lies in a folder, or also below it, sorted, without droppings."""
    if not deep:
        return sorted(path for path in folder.iterdir() if not is_dropping(path, folder))
    found, seen, left = [], {folder.resolve()}, [folder]
    while left:  # links to folders are followed, but none into what was seen
        for path in visible(left.pop()):
            found.append(path)
            if path.is_dir() and (real := path.resolve()) not in seen:
                seen.add(real)
                left.append(path)
    return sorted(found)


def say_droppings(folder: Path) -> list[str]:
    """A sentence on the files below a folder that `visible` passes over, if there are any."""
    n = sum(path.is_file() and is_dropping(path, folder) for path in folder.rglob("*"))
    return (
        [f"passed over {n:,} hidden files or files of an operating system (._x, __MACOSX ...)"] if n else []
    )


def one_each(files: Iterable[tuple[Any, Path]]) -> dict[Any, Path]:
    """Each file by what it is to be; folders, and packed files that lie there unpacked, too, left out.

    Raises:
        LabError: two are to be the same.
    """
    found: dict[Any, Path] = {}
    for key, path in files:
        unpacked = path.suffix.lower() in (".gz", ".zst") and path.with_suffix("").is_file()
        if not path.is_dir() and not unpacked and found.setdefault(key, path) != path:
            raise LabError(f"{found[key]}: stands for the same as {path.name} beside it. Remove one of them.")
    return found


def some(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, and how many others there are."""
    shown, rest = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {rest:,} others" if rest > 0 else shown
