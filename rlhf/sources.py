"""Where rows come from: files, folders of files, the Hub, and the tasks made up here.

A source is a .jsonl, .json or .parquet file, a folder of these, `hub:OWNER/NAME` (one split and configuration
of it: `hub:OWNER/NAME@SPLIT#CONFIG`), or a built-in task, `reviews` or `everyday`. Nothing in a source is
ever run as code, and what cannot be read is a `LabError` that names file and line.
"""

import functools
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lab.errors import LabError, did_you_mean
from lab.files import sha256_file
from lab.hub import hub_or_cache
from rlhf import everyday, reviews
from rlhf.reviews import Split

BUILT_IN: Mapping[str, Any] = {"reviews": reviews, "everyday": everyday}
_SUFFIXES = (".jsonl", ".json", ".parquet")
_KNOWN = "a .jsonl, .json or .parquet file, a folder of these, hub:OWNER/NAME, reviews or everyday"


@dataclass(frozen=True)
class Part:
    """Rows that lie together: those of a file, or of a split of the Hub."""

    name: str
    label: str
    """The `source` of rows that name none."""
    rows: list[Any]
    numbers: Sequence[int] = ()
    """The line of each row; empty where there are no lines."""
    path: Path | None = None

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        where = f"line {self.numbers[index]}" if self.numbers else f"row {index + 1}"
        return f"{self.name}, {where}"

    def sha256(self) -> str:
        if self.path is not None:
            return sha256_file(self.path)
        lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for row in self.rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


_Splits: TypeAlias = dict[str, list[Callable[[], Part]]]
"""What reads the parts of each split, by the split's own name."""

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    # Validation comes before test: where there are both, the test is for the very end.
    "eval": ("validation", "valid", "val", "dev", "eval", "evaluation", "test"),
}


def read(source: str, split: Split) -> list[Part]:
    """The parts of a split.

    Raises:
        LabError: the source has no such split, or cannot be read.
    """
    splits = _splits(source)
    name = _choose(split, splits)
    if name is None:
        remedy = "Hold out some of its rows, or name data that has one."
        if split == "train":
            is_hub = source.startswith("hub:")
            remedy = "Name one as in hub:OWNER/NAME@SPLIT." if is_hub else "Name the file itself."
        raise LabError(f"{source}: has no {split} split, only {', '.join(sorted(splits))}. {remedy}")
    return [read_part() for read_part in splits[name]]


def has_eval(source: str) -> bool:
    """Whether the source comes with rows to evaluate on; if not, `data.hold_out` makes some of its others.

    Of the Hub, only loading the data can tell.

    Raises:
        LabError: there is no such source.
    """
    return _choose("eval", _splits(source)) is not None


def sha256(source: str) -> str:
    """The hash that `fingerprint` gives a source; files are not parsed for it."""
    return _whole([_hash_part(read_part) for split in _splits(source).values() for read_part in split])


def _hash_part(read_part: Any) -> str:
    if read_part.func is _read_file:
        (path,) = read_part.args
        stat = path.stat()
        return _hash_file(path, stat.st_mtime_ns, stat.st_size)
    return read_part().sha256()


@functools.lru_cache(maxsize=1_000)
def _hash_file(path: Path, mtime_ns: int, size: int) -> str:
    """Of a file that did not change since, so that stages which share one read it once."""
    return sha256_file(path)


def _whole(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def fingerprint(source: str) -> dict[str, Any]:
    """Names the data that a run started from: its `source`, `sha256` and number of `rows`, of all splits.

    The hash is that of the file, of several files or splits that of their hashes, one a line. Rows that come
    from no file of the user's are hashed as lines of JSON.
    """
    parts = [read_part() for split in _splits(source).values() for read_part in split]
    whole = _whole([part.sha256() for part in parts])
    return {"source": source, "sha256": whole, "rows": sum(len(part.rows) for part in parts)}


def _choose(split: Split, names: Iterable[str]) -> str | None:
    return next((name for name in _SPLIT_NAMES[split] if name in names), None)


def _splits(source: str) -> _Splits:
    if source in BUILT_IN:
        return {split: [partial(_read_built_in, source, split)] for split in _SPLIT_NAMES}
    if source.startswith("hub:"):
        return _hub_splits(source)
    try:
        return _local_splits(source)
    except OSError as error:
        raise LabError(f"{source}: cannot be read: {_line(error)}. Name another source.") from error


def _read_built_in(source: str, split: Split) -> Part:
    return Part(source, source, BUILT_IN[source].demonstrations(split=split))


def _hub_splits(source: str) -> _Splits:
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([^@#]+)|#([^@#]+))*", source)
    if not match:
        raise LabError(f"{source}: not understood. A data set on the Hub is hub:OWNER/NAME[@SPLIT][#CONFIG].")
    name, split, config = match.groups()

    import datasets

    try:
        with hub_or_cache(name):
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # each mishap with network, name, split, configuration or files has its class
        raise LabError(
            f"{source}: cannot be loaded: {_line(error)}. Check its name and the network, or name a file."
        ) from error
    by_split = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return {str(split): [partial(_read_loaded, source, name, rows)] for split, rows in by_split.items()}


def _read_loaded(source: str, name: str, loaded: Any) -> Part:
    return Part(source, name, loaded.to_list())


def _local_splits(source: str) -> _Splits:
    path = Path(source)
    if source and path.is_dir():
        splits: _Splits = {}
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.suffix in _SUFFIXES and not any(name.startswith(".") for name in inside.parts):
                splits.setdefault(_split_in_name(inside) or "train", []).append(partial(_read_file, file))
        if not splits:
            raise LabError(f"{source}: holds no {' or '.join(_SUFFIXES)} file. A source is {_KNOWN}.")
        return splits
    if not path.is_file():
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*nearby, *BUILT_IN])
        raise LabError(f"{source!r}: no such file or folder.{hint} A source is {_KNOWN}.")
    if path.suffix not in _SUFFIXES:
        raise LabError(f"{source}: not a kind of file that is known. A source is {_KNOWN}.")
    return {"train": [partial(_read_file, path)]}


def _split_in_name(path: Path) -> str | None:
    """The split that the file's name speaks of, or else the nearest folder's."""
    for name in (path.stem, *reversed(path.parent.parts)):
        for word in re.findall("[a-z]+", name.lower()):
            if any(word in known for known in _SPLIT_NAMES.values()):
                return word
    return None


def _read_file(path: Path) -> Part:
    # Where the file is called by its split alone, its folder's name tells more.
    label = path.resolve().parent.name if path.stem.lower() == _split_in_name(Path(path.stem)) else path.stem
    try:
        if path.suffix == ".parquet":
            return Part(str(path), label, _read_parquet(path), path=path)
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {_line(error)}. Restore it or name another.") from error
    if data.lstrip().startswith(b"["):  # one list of all rows
        return Part(str(path), label, _parse(data, path), path=path)
    lines = {number: line for number, line in enumerate(data.splitlines(), 1) if line and not line.isspace()}
    rows = [_parse(line, path, number) for number, line in lines.items()]
    return Part(str(path), label, rows, list(lines), path)


def _parse(data: bytes, path: Path, line: int | None = None) -> Any:
    """Parses one line of a file, or all of it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: also for bytes that are no UTF-8
        why = _line(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg} at column {error.colno}"
            line = line or error.lineno
        raise LabError(
            f"{path}, line {line or 1}: not JSON: {why}. A file holds one row a line, as in "
            '{"prompt": "...", "completion": "..."}, or one list of such rows.'
        ) from None


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise LabError(f"{path}: not a readable parquet file: {_line(error)}. Restore it.") from error


def _line(error: BaseException) -> str:
    """An error in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" ...").rstrip(".")
