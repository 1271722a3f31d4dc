"""Where rows come from: files, folders of files, the Hub, and the tasks made up here.

A source is a file of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt; those of text also packed
as .gz, .zst, .bz2 or .xz), a folder of these, `hub:OWNER/NAME` (one split and configuration of it:
`hub:OWNER/NAME@SPLIT#CONFIG`), or a built-in task, `reviews` or `everyday`. Nothing in a source is ever run
as code, and what cannot be read is a `LabError` that names file and line.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import struct
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from lab.errors import LabError, did_you_mean
from lab.files import sha256_file, write_atomic
from lab.hub import hub_or_cache
from lab.unpack import (
    bare_suffix,
    is_dropping,
    parquet_batches,
    readable,
    require_arrow_growth,
    stem,
    unpacked,
    what_is,
)
from rlhf import everyday, reviews
from rlhf.reviews import Split

BUILT_IN: Mapping[str, Any] = {"reviews": reviews, "everyday": everyday}
_TEXTS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
_KNOWN = (
    "a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, also packed (.gz, .zst, .bz2, .xz), "
    "a folder of these, hub:OWNER/NAME, reviews or everyday"
)
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows."""

LONGEST_LINE = 256 * 2**20


class NotJSON(Exception):
    """Why a line is not JSON."""


Numbered: TypeAlias = tuple[int, Any]
"""The line of a row (or its number, from 1), and the row; a `NotJSON` for one that cannot be parsed."""


WORTH_KEEPING = 2**20
"""Bytes of files from which on hashes and rows are kept: smaller ones are read in no time."""


def cache_folder() -> Path:
    """Where hashes and parsed rows are kept: `rows` in this lab's folder of the user's caches.

    Nothing is lost if it is deleted.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "deep-rl-lab" / "rows"


@dataclass(frozen=True)
class Part:
    """Rows that lie together: those of a file, or of a split of the Hub."""

    name: str
    label: str
    """The `source` of rows that name none."""
    read: Callable[[], Iterable[Numbered]]
    """Raises a `LabError` where no more can be read."""
    unit: str = "line"
    """What rows are numbered by: line or row."""
    path: Path | None = None
    mark: str = ""
    """What the rows are known by where they are no file's; empty: by themselves."""

    def place(self, number: int) -> str:
        """Where a row stands, for errors."""
        return f"{self.name}, {self.unit} {number}"

    def sha256(self) -> str:
        """Of the file; of rows that are in none as lines of JSON."""
        if self.path is not None:
            return _sha256(self.path)
        if self.mark:
            return hashlib.sha256(self.mark.encode()).hexdigest()
        lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for _, row in self.read())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """Of a file; read once as long as it is not written again."""
    try:
        stat = path.stat()
        return _hashed(path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {_line(error)}. Restore it or name another.") from error


@lru_cache(maxsize=1024)
def _hashed(path: Path, *stat: int) -> str:
    """A file's hash; that of a large one is kept, by what changes when it is written, as in Git's index."""
    if stat[1] < WORTH_KEEPING:
        return sha256_file(path)
    note = cache_folder() / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.hash.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        noted = json.loads(note.read_text())
        if noted["stat"] == list(stat) and re.fullmatch("[0-9a-f]{64}", noted["sha256"]):
            return noted["sha256"]
    sha256 = sha256_file(path)
    # Within the clock's own grain a file may be written twice and look the same.
    if time.time() - max(stat[2:]) / 1e9 > 2:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, json.dumps({"stat": stat, "sha256": sha256}).encode())
    return sha256


_Splits: TypeAlias = dict[str, list[Callable[[], Part]]]
"""What makes the parts of each split, by the split's own name."""

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    # Validation comes before test: where there are both, the test is for the very end.
    "eval": ("validation", "valid", "val", "dev", "eval", "evaluation", "test"),
}


def read(source: str, split: Split) -> list[Part]:
    """The parts of a split; their rows are read when they are asked for.

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
    return [make_part() for make_part in splits[name]]


def has_eval(source: str) -> bool:
    """Whether the source comes with rows to evaluate on; if not, `data.hold_out` makes some of its others.

    Of the Hub, only loading the data can tell.

    Raises:
        LabError: there is no such source.
    """
    return _choose("eval", _splits(source)) is not None


def fingerprint(source: str) -> dict[str, Any]:
    """Names the data that a run started from: its `source` and `sha256`, of all splits.

    The hash is that of the file, of several files or splits that of their hashes, one a line. Rows that come
    from no file of the user's are hashed as lines of JSON. No row of a file is parsed for it.
    """
    hashes = [make_part().sha256() for split in _splits(source).values() for make_part in split]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"source": source, "sha256": whole}


def sha256(source: str) -> str:
    """The hash of `fingerprint`."""
    return fingerprint(source)["sha256"]


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
    return Part(source, source, partial(_built_in_rows, source, split), "row")


def _built_in_rows(source: str, split: Split) -> Iterator[Numbered]:
    return enumerate(BUILT_IN[source].demonstrations(split=split), 1)


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
    mark = loaded._fingerprint if loaded.cache_files else ""  # datasets' own hash of what it downloaded
    return Part(source, name, lambda: enumerate(map(_as_meant, loaded), 1), "row", mark=mark)


def _is_data(path: Path) -> bool:
    return bare_suffix(path) in _TEXTS or path.suffix.lower() in (".parquet", ".arrow")


def _local_splits(source: str) -> _Splits:
    path = Path(source)
    if source and path.is_dir():
        files: dict[Path, Path] = {}
        for file in sorted(path.rglob("*")):
            if is_dropping(file, path) or not file.is_file() or not _is_data(file):
                continue
            if file.name in _NO_DATA or file.suffix == ".txt":  # texts beside data are a README or a licence
                continue
            twin = files.setdefault(file.parent / stem(file), file)
            if twin != file:
                raise LabError(
                    f"{source}: holds {twin.name} and {file.name}, which may be the same rows. Remove one, "
                    "or name the file itself."
                )
        splits: _Splits = {}
        for file in files.values():
            name = _split_in_name(file.relative_to(path)) or "train"
            splits.setdefault(name, []).append(partial(_file_part, file))
        if not splits:
            raise LabError(f"{source}: holds no file of rows. A source is {_KNOWN}.")
        return splits
    if not path.is_file():
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*nearby, *BUILT_IN])
        raise LabError(f"{source!r}: no such file or folder.{hint} A source is {_KNOWN}.")
    if not _is_data(path):
        raise LabError(f"{source}: not a kind of file that is known. A source is {_KNOWN}.")
    return {"train": [partial(_file_part, path)]}


def _split_in_name(path: Path) -> str | None:
    """The split that the file's name speaks of, or else the nearest folder's."""
    for name in (stem(path), *reversed(path.parent.parts)):
        for word in re.findall("[a-z]+", name.lower()):
            if any(word in known for known in _SPLIT_NAMES.values()):
                return word
    return None


# ---- files ----


def _file_part(path: Path) -> Part:
    # Where the file is called by its split alone, its folder's name tells more.
    name = stem(path)
    label = path.resolve().parent.name if name.lower() == _split_in_name(Path(name)) else name
    kind = bare_suffix(path)
    lines = kind in (".csv", ".tsv", ".txt") or (kind in _TEXTS and not _is_whole(path))
    read = _READERS.get(kind, _json_rows if not lines else _json_lines)
    return Part(str(path), label, partial(read, path), "line" if lines else "row", path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold anything, and their numbers."""
    number, rest = 0, b""
    with unpacked(path) as file:
        while chunk := file.read(1 << 20):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                number += 1
                if line and not line.isspace():
                    yield number, line
            if len(rest) > LONGEST_LINE:
                raise LabError(
                    f"{path}, line {number + 1}: has more than {LONGEST_LINE >> 20} MB. "
                    "A file holds one row a line."
                )
    if rest and not rest.isspace():
        yield number + 1, rest


def _is_whole(path: Path) -> bool:
    """Whether a file of JSON is one value, a list of all rows or an object, rather than a row a line."""
    with unpacked(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"[" or re.match(rb'\{\s*"(data|rows|train|examples)"\s*:\s*\[', start) is not None:
        return True
    if bare_suffix(path) != ".json" or start[:1] != b"{":
        return False
    lines = _lines(path)
    _, first = next(lines)
    with contextlib.suppress(NotJSON):
        _parse(first.removeprefix(b"\xef\xbb\xbf"))
        return next(lines, None) is None
    return True  # an object over several lines


def _json_lines(path: Path) -> Iterator[Numbered]:
    """A row a line."""
    for number, line in _lines(path):
        try:
            yield number, _parse(line.removeprefix(b"\xef\xbb\xbf"))
        except NotJSON as error:
            yield number, error


def _json_rows(path: Path) -> Iterator[Numbered]:
    """All rows of one JSON value."""
    with unpacked(path) as file:
        data = b"".join(iter(lambda: file.read(1 << 20), b"")).removeprefix(b"\xef\xbb\xbf")
    try:
        value = _parse(data)
    except NotJSON as error:
        line = getattr(error, "line", 1)
        raise LabError(f"{path}, line {line}: {error}.") from None
    if isinstance(value, dict):
        parts = [name for name in value if value[name] and _are_rows(value[name])]
        if len(parts) > 1 and {*parts} & {*chain(*_SPLIT_NAMES.values())}:
            raise LabError(
                f"{path}: holds several lists of rows ({', '.join(parts[:5])}). Write each into a file of "
                f"its own in one folder ({parts[0]}.json), and name that."
            )
        value = _rows_of(value)
    yield from enumerate(value, 1)


def _rows_of(value: dict[str, Any]) -> Iterable[Any]:
    """The rows in one object: under a name for rows, as pandas writes a table, as columns, or itself."""
    columns, rows = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(rows, list):  # pandas' orient="split"
        return [dict(zip(map(str, columns), row, strict=False)) for row in rows if isinstance(row, list)]
    for name in ("data", "rows", "train", "examples"):
        if (rows := value.get(name)) and _are_rows(rows):
            return rows
    parts = [*value.values()]
    if parts and all(isinstance(part, dict) and part and all(map(str.isdecimal, part)) for part in parts):
        numbers = dict.fromkeys(chain.from_iterable(parts))  # pandas' own orient: a number for each row
        return [{name: part.get(number) for name, part in value.items()} for number in numbers]
    if value and all(map(str.isdecimal, value)) and all(isinstance(part, dict) for part in parts):
        return parts  # pandas' orient="index"
    if _are_columns(parts):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]
    return [value]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _are_columns(parts: list[Any]) -> bool:
    """Whether an object's values are columns: lists of one length, of which none is a conversation."""
    if not parts or not all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        return False
    return not any(
        isinstance(entry, dict) and {"role", "from", "input", "human"} & entry.keys()
        for part in parts
        for entry in part[:1]
    )


def _parse(data: bytes) -> Any:
    """A JSON value.

    Raises:
        NotJSON: it is none.
    """
    import orjson

    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass  # the standard library also takes NaN and half characters, and says better what is wrong
    try:
        # pandas writes NaN where there is nothing, in columns of text, too.
        return json.loads(
            data.decode("utf-8", "surrogatepass"),
            parse_constant=lambda name: None if name == "NaN" else float(name),
        )
    except (ValueError, RecursionError) as error:  # ValueError: also for bytes that are no UTF-8
        why = _line(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg} at column {error.colno}"
        problem = NotJSON(
            f"not JSON: {why}. A file holds one row a line, as in "
            '{"prompt": "...", "completion": "..."}, or one list of such rows'
        )
        problem.line = getattr(error, "lineno", 1)  # type: ignore[attr-defined]
        raise problem from None


def _table_lines(path: Path, delimiter: str) -> Iterator[Numbered]:
    """The rows of a table in text, by the names in its first line; what a text means is for `forms`."""
    csv.field_size_limit(LONGEST_LINE)
    lines = _decoded(path)
    head = next(lines, "")
    if delimiter == "," and ";" in head and "," not in head:
        delimiter = ";"  # as Excel writes it where the comma stands in numbers
    try:
        rows = csv.reader(chain([head], lines), delimiter=delimiter, strict=True)
        names = next(rows, [])
        while names and not names[-1].strip():  # a spreadsheet's columns beyond the last
            names.pop()
        if names and not names[0].strip():
            names[0] = "Unnamed: 0"  # pandas' index, as pandas calls it
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise LabError(f"{path}, line 1: names of columns must be there, and differ: {', '.join(names)}.")
        for cells in rows:
            if not any(cells):
                continue
            spare = cells[len(names) :]
            if len(cells) < len(names) or any(spare):
                yield rows.line_num, NotJSON(f"has {len(cells)} cells for {len(names)} columns")
            else:
                pairs = zip(names, cells[: len(names)], strict=True)
                yield rows.line_num, {name: value or None for name, value in pairs}
    except csv.Error as error:
        raise LabError(f"{path}: not a table in text: {_line(error)}. Restore it.") from None


_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
"""Not `str.splitlines`, which also parts texts at U+2028 and form feeds."""


def _decoded(path: Path) -> Iterator[str]:
    number = 0
    with unpacked(path) as file:
        import codecs

        decoder, rest = codecs.getincrementaldecoder("utf-8-sig")(), ""
        while True:
            chunk = file.read(1 << 20)
            try:
                rest += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                what = what_is(error.object[:512]) if not number and not rest else None
                number += 1 + rest.count("\n") + error.object[: error.start].count(b"\n")
                why = f"is {what}, no UTF-8 text" if what else f"no UTF-8 text: {_line(error)}"
                raise LabError(f"{path}, line {number}: {why}. Save it as UTF-8.") from None
            *whole, rest = [*_LINE.findall(rest), ""] if not chunk else _LINE.findall(rest) or [""]
            if not whole and len(rest) > LONGEST_LINE:
                raise LabError(f"{path}, line {number + 1}: has more than {LONGEST_LINE >> 20} MB.")
            number += len(whole)
            yield from (line for line in whole if line)
            if not chunk:
                return


def _text_lines(path: Path) -> Iterator[Numbered]:
    """A prompt a line."""
    for number, line in enumerate(_decoded(path), 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _parquet_rows(path: Path) -> Iterator[Numbered]:
    rows = (row for batch in parquet_batches(path, path) for row in batch.to_pylist())
    yield from enumerate(map(_as_meant, rows), 1)


def _as_meant(value: Any, in_tools: bool = False) -> Any:
    """Rows of Arrow without the nulls in tools and calls of them: all have the fields that any of them has.

    Else each call would be learned with the arguments of all other tools, as null.
    """
    if isinstance(value, dict):
        return {
            key: _as_meant(part, in_tools or key in ("tools", "tool_calls", "function_call"))
            for key, part in value.items()
            if part is not None or not in_tools
        }
    return [_as_meant(part, in_tools) for part in value] if isinstance(value, list) else value


def _arrow_rows(path: Path) -> Iterator[Numbered]:
    """What `Dataset.save_to_disk` writes: a stream of Arrow; or an Arrow file."""
    import pyarrow

    try:
        with readable(path), pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(8 * is_file)  # a file is a stream between a head and a foot
            require_arrow_growth(pyarrow.ipc.MessageReader.open_stream(source), path)
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, _as_meant(row)
    except (pyarrow.ArrowException, ValueError, struct.error) as error:
        raise LabError(f"{path}: not a readable Arrow file: {_line(error)}. Restore it.") from error


_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".csv": partial(_table_lines, delimiter=","),
    ".tsv": partial(_table_lines, delimiter="\t"),
    ".txt": _text_lines,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _line(error: BaseException) -> str:
    """An error in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" ...").rstrip(".")
