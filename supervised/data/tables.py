"""Tables of rows from CSV, TSV, JSON and Parquet: numbers to learn from, and a column that is learned.

One rule for all of them. The label is the column that `data.label` names, else the one called label, target,
class or y (in any case). Numbers, and true and false, are taken as they are; a column of a few texts becomes
one column of 0 and 1 for each; a column that only numbers the rows is left out, one called split says to
which part each row belongs. Whether a comma within numbers is a decimal point, all columns together tell. A
row that lacks a value is an error, or, with data.bad_rows=skip, left out. All this is said.
"""

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import LabError, did_you_mean, first_line
from lab.memory import require_memory
from lab.unpack import parquet_batches, read_bytes
from supervised.data.arrays import as_floats
from supervised.data.config import DataConfig
from supervised.data.files import read_text
from supervised.data.raw import (
    PICTURES,
    Column,
    Columns,
    Raw,
    Reading,
    in_order,
    is_evaluation,
    part_kind,
    some,
    words_of,
)

LABELS = ("label", "labels", "target", "targets", "class", "y")
_OF_A_CLASS = re.compile(rf"(?:{'|'.join(LABELS)})(?:[ _.:-]+|\[)(.+?)\]?$", re.IGNORECASE)
"""The name of a column of a class: label_cat, Target.dog, y[0]."""
MISSING = (
    *("", "na", "n/a", "n.a.", "nan", "-nan", "<na>", "nat", "null", "(null)", "?"),
    *("#n/a", "#nv", "#n/v", "#value!", "#wert!", "#div/0!", "#ref!", "#num!"),
)
"""What stands, in lower case, where a value is missing."""
NO_NUMBER = ("-", "--", "\u2013", ".", "none", "nil", "k.a.", "unknown", "missing")
"""What does where all other values of the column are numbers, many of them; else it may be a category."""
SENTINELS = (-99, -999, -9999, -99999)
"""Numbers by which some say that there is none."""
INDEX = ("id", "ids", "index", "rowid", "uuid", "guid")
"""Last words of names of columns that number the rows, if no value is there twice: PassengerId."""
SPLITS = ("split", "subset", "partition", "phase", "part", "set", "dataset", "data_set", "data set")
"""What columns of the names of parts are called, in lower case; those from part on may mean other things."""
MOST_CATEGORIES = 100
"""Different texts of a column that becomes numbers; one with more says something else of each row."""
MOST_AS_NUMBERS = 12
"""Different numbers of a column of categories (0, 1, 2, 3+); where there are more, it is one of numbers."""
_SIGNS = r"[$\x{20ac}\x{a3}\x{a5}\x{20b9}%]"
"""Of money and of percent: they say what numbers count, in front of them or behind."""
_PARTED = r"^[-+]?\d{1,3}(?:[' \x{2019}\x{a0}\x{202f}]\d{3})+(?:[.,]\d+)?$|^[-+]?\d+(?:[.,]\d+)?$"
"""Thousands parted as in Switzerland and France."""
_COMMA_PARTS = r"^[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?$|^[-+]?\d+(\.\d+)?$"
_DECIMAL_COMMA = r"^[-+]?\d+(,\d+)?([eE][-+]?\d+)?$"
_POINT_PARTS = rf"^[-+]?[1-9]\d{{0,2}}(\.\d{{3}})+(,\d+)?$|{_DECIMAL_COMMA}"
_IN_BRACKETS = r"^\(([^()]*\d[^()]*)\)$"
"""Below zero, as accountants write it."""
_SEPARATOR = b"separator"
"""Key of a table's metadata: what parts the columns of its file."""
_SEPARATORS = ("\t", ";", "|", ",")
"""The first that parts all lines alike: a comma may also be within numbers, the others hardly."""


@dataclass(frozen=True)
class _Commas:
    """What commas and points within the numbers of a table are, where they may be two things."""

    decimal: bool = False
    """1,250 is one and a quarter."""
    points_part: bool = False
    """1.250 is one thousand and a quarter of it."""


# ---- files ----


def read_csv(path: Path, config: DataConfig, known: Sequence[Sequence[str]]) -> tuple[Any, list[str]]:
    """A file of separated values as a `pyarrow.Table` of texts, and sentences on how it was read.

    Args:
        path: the file.
        config: the data's.
        known: sets of columns that mean something: a first line with one of them names the columns.

    Raises:
        LabError: lines differ in their number of columns, or whether the first names them is not clear.
    """
    import pyarrow
    from pyarrow import csv as arrow

    text = read_text(path)
    if not text.strip():
        raise LabError(f"{path}: has no rows. Name a file with some.")
    require_memory(8 * len(text), f"{path}: to read it takes about", "Name a smaller file.")
    said: list[str] = []
    text = _without_preamble(text, path, said)
    separator, first = _look_at(text, path)
    names, classes = _header(first, text, separator, path, config, known)
    options = arrow.ReadOptions(
        column_names=[f"c{i}" for i in range(len(first[0]))], skip_rows_after_names=int(names is not None)
    )
    texts = {f"c{i}": pyarrow.string() for i in range(len(first[0]))}
    try:
        table = arrow.read_csv(
            io.BytesIO(text.encode()),
            options,
            arrow.ParseOptions(delimiter=separator, newlines_in_values=True),
            arrow.ConvertOptions(column_types=texts, strings_can_be_null=False),
        )
    except pyarrow.ArrowInvalid as error:
        raise LabError(_uneven(text, separator, path) or f"{path}: {first_line(error)}") from None
    named = names or [f"column {i}" for i in range(1, len(first[0]) + 1)]
    table = table.rename_columns(named).replace_schema_metadata({_SEPARATOR: separator})
    if not classes:
        return table, [*said, *([] if names else [f"{path.name} names no columns: its first line is a row"])]
    labels = table.column(table.num_columns - 1).to_pylist()
    if table.num_rows != int(first[0][0]) or not set(labels) <= {str(i) for i in range(len(classes))}:
        raise _unclear(path, first[0])
    table = table.set_column(
        table.num_columns - 1, "label", pyarrow.array([classes[int(label)] for label in labels])
    )
    notes = [*said, f"{path.name} begins with its numbers of rows and columns and the classes' names"]
    return table, notes


def is_table(text: str, config: DataConfig, forms: Mapping[str, Sequence[str]]) -> bool:
    """Whether lines of cells parted by tabs are a table: texts and pairs of texts have no column of a label
    alone, and no numbers."""
    records = [line.rstrip("\r").split("\t") for line in text[: 2**16].split("\n")[:20] if line.strip()]
    if not records or any(set(keys) <= set(records[0]) for keys in forms.values()):
        return False
    asked = config.label is not None or config.header is not None
    named = {cell.strip().lower() for cell in records[0]} & set(LABELS)
    return asked or bool(named) or any(map(_is_number, itertools.chain(*records[1:])))


def _without_preamble(text: str, path: Path, said: list[str]) -> str:
    """Lines of a table alone: without Excel's `sep=;` and comments in front of them, and with tabs for blanks
    where nothing else parts them."""
    first, _, rest = text.partition("\n")
    if re.fullmatch(r"\ufeff?\"?sep=.\"?\r?", first):
        return rest
    lines = text.split("\n")
    n_comments = next((i for i, line in enumerate(lines) if not line.startswith(("#", "%"))), 0)
    beginning = [line.strip() for line in lines[n_comments : n_comments + 100] if line.strip()]
    if n_comments and not _is_parted(lines[: n_comments + 20]):
        said.append(f"passed over {n_comments:,} lines of comments at the beginning of {path.name}")
        lines = lines[n_comments:]
    if (
        not _is_parted(lines[:20])
        and len({len(line.split()) for line in beginning}) == 1
        and " " in beginning[0]
    ):
        said.append(f"blanks part the columns of {path.name}")
        lines = ["\t".join(line.split()) for line in lines]
    return "\n".join(lines)


def _is_parted(lines: Sequence[str]) -> bool:
    """Whether a separator parts lines into as many cells."""
    records = [_records("\n".join(lines), separator, len(lines)) for separator in _SEPARATORS]
    return any(
        len({len(record) for record in found}) == 1 and len(found[0]) > 1 for found in records if found
    )


def _look_at(text: str, path: Path) -> tuple[str, list[list[str]]]:
    """The separator, and the first records."""
    beginning = text[: 2**20]
    for separator in ("\t",) if path.name.lower().removesuffix(".gz").endswith(".tsv") else _SEPARATORS:
        records = _records(beginning, separator, 21)
        whole = records[:-1] if len(beginning) < len(text) and len(records) > 1 else records
        if len({len(record) for record in whole}) == 1 and len(whole[0]) > 1:
            return separator, whole
    found = _uneven(text, ",", path) if len(_records(beginning, ",", 1)[0]) > 1 else None
    raise LabError(
        found
        or f"{path}: no separator (comma, semicolon, tab or |) parts its lines into columns alike. Correct "
        "the file, or set data.format=text to learn it as plain text."
    )


def _records(text: str, separator: str, most: int) -> list[list[str]]:
    try:
        found = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        return list(itertools.islice((record for record in found if record), most))
    except csv.Error:
        return [[]]


def _uneven(text: str, separator: str, path: Path) -> str | None:
    """What to say of the first line with other than the first one's number of columns."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    wanted = None
    try:
        for record in reader:
            if record and wanted is not None and len(record) != wanted:
                return (
                    f"{path}, line {reader.line_num}: has {len(record)} columns, and the first line "
                    f"has {wanted}. Correct the line (a separator within a text takes quotes around it)."
                )
            wanted = wanted or len(record)
    except csv.Error as error:
        return f"{path}, line {reader.line_num}: {error}. Correct the line."
    return None


def _header(
    first: list[list[str]],
    text: str,
    separator: str,
    path: Path,
    config: DataConfig,
    known: Sequence[Sequence[str]],
) -> tuple[list[str] | None, list[str]]:
    """The columns' names if the first line has them, and the classes' if it is one of scikit-learn's."""
    cells = [cell.strip() for cell in first[0]]
    lower = {cell.lower() for cell in cells}
    rows = first[1:]
    numbers = [_is_number(cell) for cell in cells]
    names: list[str] | None = cells
    asked = {*config.label} if isinstance(config.label, list) else {config.label}
    if config.header is not None:
        names = cells if config.header else None
    elif any(set(keys) <= set(cells) for keys in known) or asked <= set(cells) or lower & set(LABELS):
        pass
    elif any(cell.lower().endswith(PICTURES) for cell in cells):
        names = None  # the name of a picture is no name of a column
    elif _is_of_sklearn(cells, rows):
        return [*(f"column {i}" for i in range(1, len(cells))), "label"], cells[2:]
    elif [cell for cell in cells if cell][: len(rows[0]) if rows else 0] == [
        str(i) for i in range(sum(map(bool, cells)))
    ] and len(cells) > 2:
        pass  # pandas numbers columns without names
    elif (
        rows
        and any(numbers)
        and all(
            _is_number(cell) == number or cell.lower() in MISSING
            for row in rows
            for cell, number in zip(row, numbers, strict=True)
        )
    ):
        names = None
    elif not rows or any(numbers) or not any(map(_is_number, itertools.chain(*rows))):
        raise _unclear(path, cells)
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LabError(f"{path}: the column {twice!r} is there twice. Rename one.")
    return names, []


def _unclear(path: Path, cells: Sequence[str]) -> LabError:
    return LabError(
        f"{path}: whether its first line ({some(cells)}) names the columns is not clear. Set "
        "data.header=true or data.header=false."
    )


def _is_of_sklearn(cells: list[str], rows: list[list[str]]) -> bool:
    """Whether a first line holds the numbers of rows and of columns and then the classes' names."""
    n_classes = len(cells) - 2
    return (
        n_classes > 1
        and cells[0].isdecimal()
        and cells[1].isdecimal()
        and not any(map(_is_number, cells[2:]))
        and bool(rows)
    )


def read_parquet(path: Path) -> Any:
    """A Parquet file as a `pyarrow.Table`.

    Raises:
        LabError: it is damaged, or takes more memory than is free.
    """
    import pyarrow

    batches, n = [], 0
    for batch in parquet_batches(io.BytesIO(read_bytes(path)), path):
        batches.append(batch)
        n += batch.nbytes
        require_memory(3 * n, f"{path}: read so far, and its columns take", "Name a smaller file.")
    table = pyarrow.Table.from_batches(batches).combine_chunks()
    for i, column in enumerate(table.schema):
        if pyarrow.types.is_dictionary(column.type):  # pandas' categories
            table = table.set_column(i, column.name, table.column(i).cast(column.type.value_type))
    return table


def of_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Any:
    """Rows of JSON as a `pyarrow.Table`.

    Raises:
        LabError: a column holds values of several kinds.
    """
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, ValueError) as error:
            raise LabError(
                f"{path}: {name!r} holds values of several kinds ({first_line(error)}). Correct it, or leave "
                f"it out by data.drop=[{name}]."
            ) from None
    return pyarrow.table(columns)


# ---- meaning ----


def assemble(
    tables: Mapping[str, Any],
    paths: Mapping[str, Path],
    config: DataConfig,
    reading: Reading,
    notes: list[str],
) -> Raw:
    """Tables by part as numbers to learn from, and classes or numbers that are learned.

    Raises:
        LabError: columns differ between parts, one cannot be used, or no column is known for the label.
    """
    lead = next((part for part in tables if not is_evaluation(part)), next(iter(tables)))
    tables = {part: _spread(table, paths[part], config) for part, table in tables.items()}
    if isinstance(config.label, list) and reading.predicts == "numbers":
        return _of_several(tables, paths, config, reading, notes)
    of_classes = label_columns(tables[lead], config, reading)
    tables = {part: of_one_column(t, of_classes, paths[part], config, notes) for part, t in tables.items()}
    config = replace(config, label=ONE_LABEL) if of_classes else config
    names = tables[lead].column_names
    label = find_label(names, config, paths[lead])
    split = len(tables) == 1 and split_column(
        names, lambda name: tables[lead].column(name).unique().to_pylist(), [label, *config.drop]
    )
    if split:
        rows = by_split(tables[lead].column(split).to_pylist(), split, notes)
        rest = tables[lead].drop_columns([split])
        paths = dict.fromkeys(rows, paths[lead])
        tables = {part: rest.take(at) for part, at in rows.items()}
        lead = next(part for part in tables if part_kind(part) == "train")
        names = rest.column_names
    if label is None and reading.predicts:
        raise no_label(names, paths[lead])
    if reading.columns:
        kept = _kept_as_learned(names, label, reading.columns, paths[lead], config, notes)
    else:
        check_dropped(names, config, paths[lead])
        kept = _kept(tables[lead], label, config, notes)
    wanted: dict[str, list[str]] = {}
    for part, table in tables.items():
        columns = [*kept, *([label] if label is not None else [])]
        lacking = [name for name in columns if name not in table.column_names]
        if lacking == [label] and part != lead:
            notes.append(f"left out the part {part}: it has no {label!r}")
            continue
        if lacking:
            raise LabError(
                f"{paths[part]}: has no column {lacking[0]!r}, and {paths[lead].name} has. All parts need "
                "the same."
            )
        wanted[part] = columns
    whole = {part: complete(tables[part].select(c), paths[part], config, notes) for part, c in wanted.items()}
    if not kept:
        raise LabError(f"{paths[lead]}: has no column but the label. Name a file with more.")
    for name in kept:
        first = whole[lead].column(name)[:20].to_pylist()
        if all(isinstance(value, str) and value.lower().endswith(PICTURES) for value in first):
            raise LabError(
                f"{paths[lead]}: {name!r} names pictures, none of which lies beside or below it. Put it into "
                f"their folder, or leave the column out by data.drop=[{name}]."
            )
    texts = _texts_alone(kept, label, whole[lead])
    if texts is not None:
        return _classify_texts(whole, label or "", texts, notes)
    commas = _commas_of(whole)
    inputs, columns = _inputs(kept, whole, paths, notes, commas, reading.columns)
    labels: dict[str, Columns] = {part: {} for part in whole}
    classes: tuple[str, ...] = ()
    if label is not None:
        labels, classes = targets_of(label, whole, paths, reading, notes, commas)
    parts: dict[str, Columns] = {part: {"inputs": inputs[part], **labels[part]} for part in whole}
    return Raw(kind="table", parts=parts, classes=classes, columns=columns, notes=list(dict.fromkeys(notes)))


def _of_several(
    tables: Mapping[str, Any],
    paths: Mapping[str, Path],
    config: DataConfig,
    reading: Reading,
    notes: list[str],
) -> Raw:
    """As `assemble`, of several columns of numbers to predict: the others are left out for each in turn."""
    assert isinstance(config.label, list)
    for path, table in ((paths[part], table) for part, table in tables.items()):
        if lacking := [name for name in config.label if name not in table.column_names]:
            hint = did_you_mean(lacking[0], table.column_names)
            raise LabError(
                f"data.label: {path} has no column {lacking[0]!r}.{hint} Name some that are there."
            )
    rows = {part: complete(table, paths[part], config, notes) for part, table in tables.items()}
    each = []
    for name in config.label:
        others = [*config.drop, *(other for other in config.label if other != name)]
        one = replace(config, label=name, drop=others)
        each.append(assemble(rows, paths, one, reading, notes))
    parts = {
        part: {**columns, "targets": np.hstack([raw.parts[part]["targets"] for raw in each])}
        for part, columns in each[0].parts.items()
    }
    return replace(each[0], parts=parts, notes=list(dict.fromkeys(notes)))


# ---- one column a class ----

ONE_LABEL = "label"
"""What the column is called that columns of classes become."""


def label_columns(table: Any, config: DataConfig, reading: Reading) -> dict[str, str]:
    """The class by its column, where each class has a column of 0 and 1: those that `data.label` lists, or
    whose names begin with one of a label; none, where one column is the label."""
    if isinstance(config.label, list):
        return {name: name for name in config.label}
    names = table.column_names
    if config.label is not None or reading.predicts == "numbers":
        return {}
    if any(name.strip().lower() in LABELS for name in names):
        return {}
    found = {name: match[1] for name in names if (match := _OF_A_CLASS.match(name.strip()))}
    numbers = {name: _as_number(table.column(name)) for name in found}
    return found if len(found) > 1 and all(_is_0_or_1(v) for v in numbers.values()) else {}


def of_one_column(
    table: Any, classes: Mapping[str, str], path: Path, config: DataConfig, notes: list[str]
) -> Any:
    """A table with one column of names in place of the columns of classes.

    Raises:
        LabError: a column is not there or not of 0 and 1, or a row is of several classes or of none.
    """
    import pyarrow

    there = [name for name in classes if name in table.column_names]
    if not there:
        return table
    if lacking := [name for name in classes if name not in there]:
        raise LabError(
            f"{path}: has no column {lacking[0]!r}, of a class."
            f"{did_you_mean(lacking[0], table.column_names)} Name those that are there by data.label."
        )
    columns = [_as_number(table.column(name)) for name in there]
    for name, values in zip(there, columns, strict=True):
        if not _is_0_or_1(values):
            raise LabError(f"{path}: column {name!r} of a class is not 0 or 1 in all rows. Correct it.")
    numbers = np.array(columns).T
    odd = np.flatnonzero(numbers.sum(1) != 1)
    if len(odd) and config.bad_rows == "error":
        n = int(numbers[odd[0]].sum())
        raise LabError(
            f"{path}: {len(odd):,} of {len(numbers):,} rows are not of one class, the first of them row "
            f"{int(odd[0]) + 1}, of {n} ({some(list(classes.values()))}). data.bad_rows=skip leaves "
            "them out; several classes of one sample are not learned."
        )
    if len(odd):
        notes.append(
            f"left out {len(odd):,} of {len(numbers):,} rows of {path.name} that are not of one class"
        )
    notes.append(f"took the column that is 1 of {some(there)} for the class of each row")
    names = [*classes.values()]
    found = pyarrow.array([names[i] for i in numbers.argmax(1).tolist()], pyarrow.string())
    table = table.drop_columns(there).append_column(ONE_LABEL, found)
    return table.filter(pyarrow.array(numbers.sum(1) == 1))


def _is_0_or_1(values: np.ndarray | None) -> bool:
    return values is not None and bool(np.isin(values, (0, 1)).all())


def _spread(table: Any, path: Path, config: DataConfig) -> Any:
    """A table with one column for each number of a column of lists.

    Raises:
        LabError: the lists are of different lengths.
    """
    import pyarrow
    from pyarrow import compute

    for name in table.column_names:
        values = table.column(name)
        kind = values.type
        lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        lists = lists or pyarrow.types.is_fixed_size_list(kind)
        if not lists or not len(values) or name in config.drop:
            continue
        inner = kind.value_type
        numbers = pyarrow.types.is_integer(inner) or pyarrow.types.is_floating(inner)
        lengths = compute.call_function("list_value_length", [values]).unique().to_pylist()
        if not numbers or len(lengths) != 1 or not lengths[0]:
            what = f"of {some([*map(str, lengths)], 3)} values" if numbers else f"of {inner}"
            raise LabError(
                f"{path}: column {name!r} holds lists {what}, and only lists of equally many numbers are "
                f"read. Correct it, or leave it out by data.drop=[{name}]."
            )
        flat = compute.call_function("list_flatten", [values]).to_numpy().reshape(len(values), -1)
        table = table.drop_columns([name])
        for i, column in enumerate(flat.T):
            table = table.append_column(f"{name}[{i}]", pyarrow.array(column))
    return table


# ---- columns ----


def _kept(table: Any, label: str | None, config: DataConfig, notes: list[str]) -> list[str]:
    """The columns that are learned from: those that are not the label and say something of a row."""
    kept = [name for name in table.column_names if name not in config.drop and name != label]
    empty = [
        name
        for name in kept
        if table.num_rows
        and _is_missing(table.column(name)[:1]).all()
        and _is_missing(table.column(name)).all()
    ]
    if empty:  # of a comma behind every line, or of a table that was once wider
        named = [name or "a column without a name" for name in empty]
        notes.append(f"left out {some(named)}: without a value in any row")
    index = [name for name in kept if name not in empty and _numbers_rows(name, table)]
    if index:
        named = [name or "the column without a name" for name in index]
        notes.append(f"left out {some(named)}, which only numbers the rows")
    return [name for name in kept if name not in (*empty, *index)]


def _kept_as_learned(
    names: Sequence[str],
    label: str | None,
    learned: Sequence[Column],
    path: Path,
    config: DataConfig,
    notes: list[str],
) -> list[str]:
    """The columns that a run learned from, in its order, wherever they stand.

    Raises:
        LabError: one is not there.
    """
    wanted = [column.name for column in learned]
    if lacking := [name for name in wanted if name not in names]:
        raise LabError(
            f"{path}: has no column {lacking[0]!r}, from which the run learned."
            f"{did_you_mean(lacking[0], names)} Name the columns as its data do: {some(wanted, 12)}."
        )
    if others := [name for name in names if name not in (*wanted, *config.drop, label)]:
        named = [name or "a column without a name" for name in others]
        notes.append(f"left out {some(named)}, from which the run did not learn")
    return wanted


def split_column(
    names: Sequence[str], values_of: Callable[[str], Iterable[Any]], but: Sequence[Any]
) -> str | None:
    """The column that says to which part each row belongs, if there is one: it is called so, and some rows
    are to train on (and, where its name may mean other things, others to be evaluated on).

    Args:
        names: of the columns.
        values_of: a column's different values.
        but: columns that are something else.
    """
    for name in names:
        plain = name.strip().lower()
        if plain in SPLITS and name not in but:
            kinds = {part_kind(str(value)) for value in values_of(name)}
            sure = SPLITS.index(plain) < SPLITS.index("part") or kinds & {"validation", "test"}
            if "train" in kinds and sure:
                return name
    return None


def by_split(values: Sequence[Any], name: str, notes: list[str]) -> dict[str, list[int]]:
    """The numbers of the rows of each part that a column names."""
    found: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(str(value).strip().lower(), []).append(i)
    notes.append(f"{name} names the parts: {some([f'{part} ({len(at):,})' for part, at in found.items()])}")
    return found


def find_label(names: Sequence[str], config: DataConfig, path: Path) -> str | None:
    """The column that is learned; None: none is known.

    Raises:
        LabError: `data.label` names none, or several could be it.
    """
    if isinstance(config.label, int):
        if not -len(names) <= config.label < len(names):
            raise LabError(f"data.label = {config.label}: {path} has {len(names)} columns. Count from 0.")
        return names[config.label]
    if config.label is not None:
        assert isinstance(config.label, str), "several are one by now"
        if config.label in names:
            return config.label
        raise LabError(
            f"data.label = {config.label!r}: {path} has no such column.{did_you_mean(config.label, names)} "
            f"It has {some(names, 12)}."
        )
    found = [name for name in names if name.strip().lower() in LABELS]
    if len(found) > 1:
        raise LabError(f"{path}: {' and '.join(found)} could both be the label. Set data.label to one.")
    return found[0] if found else None


def check_dropped(names: Sequence[str], config: DataConfig, path: Path) -> None:
    """Sees that the columns of `data.drop` are there.

    Raises:
        LabError: one is not.
    """
    if unknown := [name for name in config.drop if name not in names]:
        raise LabError(
            f"data.drop: {path} has no column {unknown[0]!r}.{did_you_mean(unknown[0], names)} It has "
            f"{some(names, 12)}."
        )


def no_label(names: Sequence[str], path: Path) -> LabError:
    """What to say of a table none of whose columns is known for the label."""
    return LabError(
        f"{path}: which of its columns is the label? It has {some(names, 12)}. Set data.label to "
        "a name, or to a number (0: the first, -1: the last)."
    )


def _numbers_rows(name: str, table: Any) -> bool:
    """Whether a column only numbers the rows and has no value twice: one called id, customerID or the like,
    or one without a name and of whole numbers, as pandas writes its index, also of some of the rows."""
    import pyarrow

    values = table.column(name)
    if not table.num_rows:
        return False
    plain = name.strip().lower()
    if plain in ("", "unnamed: 0", "__index_level_0__"):
        whole = all(str(value).strip().isdecimal() for value in values.to_pylist())
        return whole and len(values.unique()) == table.num_rows
    floats = pyarrow.types.is_floating(values.type)
    named = next(reversed(words_of(name)), "") in INDEX
    return named and not floats and len(values.unique()) == table.num_rows


def complete(table: Any, path: Path, config: DataConfig, notes: list[str]) -> Any:
    """The table without rows that lack a value.

    Raises:
        LabError: there are some, and they are not to be skipped.
    """
    lacking = np.zeros(table.num_rows, bool)
    by_column: dict[str, int] = {}
    for name in table.column_names:
        missing = _is_missing(table.column(name))
        if n := int(missing.sum()):
            by_column[name] = n
            lacking |= missing
    n = int(lacking.sum())
    if not n:
        return table
    counts = some([f"{name} in {count:,}" for name, count in by_column.items()])
    if config.bad_rows == "skip":
        notes.append(f"left out {n:,} of {table.num_rows:,} rows of {path.name} that lack a value ({counts})")
        import pyarrow

        return table.filter(pyarrow.array(~lacking))
    raise LabError(
        f"{path}: {n:,} of {table.num_rows:,} rows lack a value, the first of them row "
        f"{int(lacking.argmax()) + 1} ({counts}). data.bad_rows=skip leaves such rows out, data.drop columns."
    )


def _is_missing(values: Any) -> np.ndarray:
    import pyarrow
    from pyarrow import compute

    missing = values.is_null(nan_is_null=True)
    if _is_text(values):
        plain = compute.call_function("utf8_lower", [compute.call_function("utf8_trim_whitespace", [values])])
        there = set(plain.unique().to_pylist()) - {None, *MISSING}
        words = there & set(NO_NUMBER)
        others = pyarrow.chunked_array([list(there - words)], pyarrow.string())
        many = len(others) > MOST_AS_NUMBERS and _of_texts(others) is not None
        marks = [*MISSING, *words] if words and many else [*MISSING]
        known = compute.SetLookupOptions(pyarrow.array(marks, plain.type))
        empty = compute.call_function("is_in", [plain], known)
        missing = compute.call_function("or", [missing, compute.call_function("coalesce", [empty, False])])
    return missing.to_numpy().astype(bool)


def _is_text(values: Any) -> bool:
    import pyarrow

    kind = values.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def is_text_or_whole(values: Any) -> bool:
    """Whether a column's type is that of texts or of whole numbers."""
    import pyarrow

    return _is_text(values) or pyarrow.types.is_integer(values.type)


def _texts_alone(kept: list[str], label: str | None, table: Any) -> str | None:
    """The only column beside the label, if it holds texts that are no categories."""
    if len(kept) != 1 or label is None or not _is_text(table.column(kept[0])):
        return None
    values = table.column(kept[0])
    return kept[0] if _as_number(values) is None and len(values.unique()) > MOST_CATEGORIES // 2 else None


def _classify_texts(tables: Mapping[str, Any], label: str, text: str, notes: list[str]) -> Raw:
    """The task form classification."""
    values = {part: table.column(text).to_pylist() for part, table in tables.items()}
    labels = {part: [str(v) for v in table.column(label).to_pylist()] for part, table in tables.items()}
    classes = tuple(in_order(value for part in labels.values() for value in part))
    index = {name: i for i, name in enumerate(classes)}
    parts: dict[str, Columns] = {
        part: {
            "texts": [[[value]] for value in values[part]],
            "labels": np.array([index[name] for name in labels[part]], np.int64),
        }
        for part in tables
    }
    return Raw(
        kind="tasks",
        parts=parts,
        classes=classes,
        form="classification",
        notes=[*notes, f"took {text} for texts, {label} for their classes"],
    )


def _inputs(
    kept: list[str],
    tables: Mapping[str, Any],
    paths: Mapping[str, Path],
    notes: list[str],
    commas: _Commas,
    learned: Sequence[Column] = (),
) -> tuple[dict[str, np.ndarray], tuple[Column, ...]]:
    """(n, width) float32 by part, and what became of each column: as in `learned`, if a run learned so."""
    arrays: dict[str, list[np.ndarray]] = {part: [] for part in tables}
    columns: list[Column] = []
    known = {column.name: column for column in learned}
    refused: dict[str, str] = {}
    path = next(iter(paths.values()))
    for name in kept:
        values = {part: table.column(name) for part, table in tables.items()}
        numbers = _as_numbers(values, commas, notes)
        categories = known[name].categories if name in known else None
        if numbers is not None and categories is None:
            _say_sentinel(name, np.concatenate(list(numbers.values())), notes)
            for part, found in numbers.items():
                arrays[part].append(as_floats(found[:, None], str(paths[part]), [name]))
            columns.append(Column(name=name))
            continue
        if name in known and categories is None:
            raise LabError(
                f"{path}: column {name!r} holds texts, and the run learned from numbers. Correct it."
            )
        texts = {part: np.array([str(v).strip() for v in c.to_pylist()]) for part, c in values.items()}
        if categories is None:
            try:
                categories = _categories(name, values, texts, path)
            except LabError as error:  # all that are not to be used are named at once
                refused[name] = str(error)
                continue
        every = np.concatenate(list(texts.values()))
        if n_new := int((~np.isin(every, categories)).sum()):
            new = in_order(set(every.tolist()) - set(categories))
            notes.append(f"{name} is {some(new)} in {n_new:,} rows, which the run has not seen: all 0 there")
        for part, found in texts.items():
            arrays[part].append((found[:, None] == np.array(categories)).astype(np.float32))
        columns.append(Column(name=name, categories=tuple(categories)))
    if refused:
        why, others = next(iter(refused.values())), [repr(name) for name in refused][1:]
        more = f" So with {some(others)}: data.drop=[{', '.join(refused)}] leaves out all." if others else ""
        raise LabError(why + more)
    if spread := [f"{c.name} ({len(c.categories)})" for c in columns if c.categories is not None]:
        notes.append(f"made one column of 0 and 1 for each text in {some(spread)}")
    return {part: np.concatenate(found, 1) for part, found in arrays.items()}, tuple(columns)


def _categories(
    name: str, values: Mapping[str, Any], texts: Mapping[str, np.ndarray], path: Path
) -> tuple[str, ...]:
    """The different texts of a column.

    Raises:
        LabError: it holds no texts, or so many that each says something else of a row, or rather numbers.
    """
    if not all(_is_text(v) for v in values.values()):
        raise LabError(
            f"{path}: column {name!r} holds {next(iter(values.values())).type}, neither numbers nor "
            f"texts throughout. Leave it out by data.drop=[{name}]."
        )
    every = np.concatenate(list(texts.values()))
    categories = in_order(np.unique(every).tolist())
    others = [text for text in categories if not _is_number(text)]
    if len(others) <= min(3, len(categories) - 1) and len(categories) - len(others) > MOST_AS_NUMBERS:
        n = int(np.isin(every, others).sum())
        raise LabError(
            f"{path}: column {name!r} holds numbers, but in {n:,} of {len(every):,} rows "
            f"{some([repr(text[:40]) for text in others])}. Leave these cells empty (data.bad_rows=skip then "
            f"leaves the rows out), or the column by data.drop=[{name}]."
        )
    if len(categories) > min(MOST_CATEGORIES, max(len(every) // 2, 2)):
        odd = next((v for v in categories if not _is_number(v)), categories[0])
        raise LabError(
            f"{path}: column {name!r} holds texts, {len(categories):,} different ones such as "
            f"{odd[:40]!r}. Correct it, or leave it out by data.drop=[{name}]."
        )
    return tuple(categories)


def targets_of(
    label: str,
    tables: Mapping[str, Any],
    paths: Mapping[str, Path],
    reading: Reading,
    notes: list[str],
    commas: _Commas | None = None,
) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """The label's column by part, as "labels" or "targets", and the classes' names.

    Raises:
        LabError: it is not what is to be predicted, or holds a class that is not learned.
    """
    values = {part: table.column(label) for part, table in tables.items()}
    numbers = _as_numbers(values, commas or _commas_of(tables), notes)
    path = next(iter(paths.values()))
    whole = numbers is not None and all((v % 1 == 0).all() for v in numbers.values())
    if reading.predicts == "numbers" or (not reading.predicts and numbers is not None and not whole):
        if numbers is None:
            texts = {str(v) for column in values.values() for v in column.unique().to_pylist()}
            odd = in_order(text for text in texts if not _is_number(text))
            raise LabError(
                f"{path}: the label {label!r} holds texts, and regression predicts numbers: "
                f"{some([repr(text[:40]) for text in odd], 3)}. Correct it, or set data.label to another."
            )
        _say_sentinel(label, np.concatenate(list(numbers.values())), notes)
        return {
            part: {"targets": as_floats(v[:, None], str(paths[part]), [label])} for part, v in numbers.items()
        }, ()
    if numbers is not None and not whole:
        raise LabError(
            f"{path}: the label {label!r} is not whole, which no class is. Set data.label to another, or "
            "objective.name=regression."
        )
    if numbers is not None:
        texts = {part: _as_written(values[part]) or [f"{int(n)}" for n in v] for part, v in numbers.items()}
    else:
        texts = {part: [str(v).strip() for v in column.to_pylist()] for part, column in values.items()}
    learned = set(reading.classes)
    learned = learned or {text for part, found in texts.items() if not is_evaluation(part) for text in found}
    learned = learned or {text for found in texts.values() for text in found}
    classes = tuple(in_order(learned))
    index = {name: i for i, name in enumerate(classes)}
    for part, found in texts.items():
        if (text := next((text for text in found if text not in index), None)) is not None:
            raise LabError(
                f"{paths[part]}: label {text!r}, of {found.count(text):,} rows, is none of "
                f"{some(classes, 12)}, which are learned. Correct it, or add such rows to learn from."
            )
    notes.append(f"{label} is the label, of {len(classes):,} classes")
    return {
        part: {"labels": np.array([index[t] for t in found], np.int64)} for part, found in texts.items()
    }, classes


def _as_written(values: Any) -> list[str] | None:
    """Whole numbers with all their digits, of which float64 keeps 15: 007 is another class than 7. None: some
    have another form, as 1.0."""
    if not is_text_or_whole(values):
        return None
    texts = [str(value).strip() for value in values.to_pylist()]
    return texts if all(text.removeprefix("-").isdecimal() for text in texts) else None


def _as_numbers(
    values: Mapping[str, Any], commas: _Commas, notes: list[str] | None = None
) -> dict[str, np.ndarray] | None:
    """float64 by part, if all values of a column are numbers, or true and false; read alike in all parts.

    Args:
        values: the column by part.
        commas: what commas and points within its numbers are, where they may be two things.
        notes: takes sentences on how they were read.
    """
    import pyarrow

    if all(_is_text(v) for v in values.values()):
        chunks = [chunk.cast(pyarrow.string()) for v in values.values() for chunk in v.chunks]
        together = _of_texts(pyarrow.chunked_array(chunks, pyarrow.string()), commas, notes)
        if together is None:
            return None
        ends = np.cumsum([len(v) for v in values.values()])
        return dict(zip(values, np.split(together, ends[:-1]), strict=True))
    found = {part: _as_number(v, commas, notes) for part, v in values.items()}
    known = {part: v for part, v in found.items() if v is not None}
    return known if len(known) == len(found) else None


def _as_number(values: Any, commas: _Commas = _Commas(), notes: list[str] | None = None) -> np.ndarray | None:
    import pyarrow

    kind = values.type
    if pyarrow.types.is_boolean(kind) or pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind):
        return values.cast(pyarrow.float64(), safe=False).to_numpy()
    if pyarrow.types.is_decimal(kind):
        return values.cast(pyarrow.float64()).to_numpy()
    return _of_texts(values, commas, notes) if _is_text(values) else None


def _of_texts(values: Any, commas: _Commas = _Commas(), notes: list[str] | None = None) -> np.ndarray | None:
    """float64 of texts that all are numbers, true and false among them."""
    import pyarrow
    from pyarrow import compute

    plain = compute.call_function("utf8_trim_whitespace", [values])
    lower = compute.call_function("utf8_lower", [plain])
    words = set(lower.unique().to_pylist()[:3])
    if words and words <= {"true", "false"}:
        return compute.call_function("equal", [lower, "true"]).to_numpy().astype(np.float64)
    said: list[str] = []
    points_part = commas.points_part and _fits(plain, _POINT_PARTS)
    with suppress(pyarrow.ArrowInvalid):
        if not points_part:
            return plain.cast(pyarrow.float64()).to_numpy()
    if _has(plain, "(") and not _fits(plain, _IN_BRACKETS):
        plain = _replaced(plain, _IN_BRACKETS, r"-\1")
        said.append("took numbers in brackets for ones below zero")
    plain = _without_signs(_replaced(plain, r"\x{2212}", "-"), said)
    if _fits(plain, _PARTED) and not _fits(plain, r"^[-+\d.,]*$"):
        plain = _replaced(plain, r"[^-+\d.,]", "")
        said.append("took what parts digits within numbers for thousands")
    if commas.points_part and _fits(plain, _POINT_PARTS) and _has(plain, "."):
        plain = _replaced(plain, r"\.", "")
        said.append("took points within numbers for thousands")
    if _has(plain, ","):
        if not commas.decimal and _fits(plain, _COMMA_PARTS):
            plain = _replaced(plain, ",", "")
            said.append("took commas within numbers for thousands")
        elif _fits(plain, _DECIMAL_COMMA):
            plain = _replaced(plain, ",", ".")
            said.append("took commas within numbers for decimal points")
        elif _fits(plain, _POINT_PARTS):
            plain = _replaced(_replaced(plain, r"\.", ""), ",", ".")
            said.append("took commas within numbers for decimal points, points for thousands")
    with suppress(pyarrow.ArrowInvalid):
        found = plain.cast(pyarrow.float64()).to_numpy()
        if notes is not None:
            notes += said
        return found
    return None


def _fits(texts: Any, pattern: str) -> bool:
    """Whether a pattern finds something in every text."""
    from pyarrow import compute

    found = compute.call_function("match_substring_regex", [texts], compute.MatchSubstringOptions(pattern))
    return bool(compute.call_function("all", [found]).as_py())


def _has(texts: Any, part: str) -> bool:
    """Whether some text has this within."""
    from pyarrow import compute

    found = compute.call_function("match_substring", [texts], compute.MatchSubstringOptions(part))
    return bool(compute.call_function("any", [found]).as_py())


def _replaced(texts: Any, pattern: str, by: str) -> Any:
    from pyarrow import compute

    options = compute.ReplaceSubstringOptions(pattern, by)
    return compute.call_function("replace_substring_regex", [texts], options)


def _without_signs(texts: Any, said: list[str]) -> Any:
    """Texts without a sign of money or percent, if all have the same one."""
    if not _fits(texts, rf"^-? ?{_SIGNS}[ \x{{a0}}]?-?\d|\d[ \x{{a0}}\x{{202f}}]?{_SIGNS}$"):
        return texts
    signs = {
        sign for text in texts.unique().to_pylist() for sign in re.findall(r"[$\u20ac\xa3\xa5\u20b9%]", text)
    }
    if len(signs) != 1:
        return texts
    said.append(f"left out the sign {signs.pop()} of numbers")
    return _replaced(texts, rf"[ \x{{a0}}\x{{202f}}]?{_SIGNS}[ \x{{a0}}]?", "")


def _commas_of(tables: Mapping[str, Any]) -> _Commas:
    """What they are in these tables: a column that can only be read in one way tells, or semicolons do that
    part the columns, as programs write them where the comma is a decimal point."""
    import pyarrow

    texts_of: dict[str, Any] = {}
    for name in dict.fromkeys(name for table in tables.values() for name in table.column_names):
        there = [table.column(name) for table in tables.values() if name in table.column_names]
        if all(_is_text(values) for values in there):
            chunks = [chunk.cast(pyarrow.string()) for values in there for chunk in values.chunks]
            texts_of[name] = pyarrow.chunked_array(chunks, pyarrow.string())
    if not any(_has(texts, ",") for texts in texts_of.values()):
        return _Commas()
    separators = {(table.schema.metadata or {}).get(_SEPARATOR) for table in tables.values()}
    told: bool | None = None
    some_commas = decimal_points = False
    for texts in texts_of.values():
        plain = _replaced(_replaced(texts, r"^\s+|\s+$", ""), _IN_BRACKETS, r"-\1")
        plain = _without_signs(plain, [])
        parts, points = _fits(plain, _COMMA_PARTS), _fits(plain, _POINT_PARTS)
        if not _has(plain, ","):
            decimal_points |= parts and not points
        elif parts or points:
            some_commas = True
            if told is None and parts != points:
                told = points
    decimal = separators == {b";"} if told is None else told
    return _Commas(decimal, points_part=decimal and some_commas and not decimal_points)


def _say_sentinel(name: str, numbers: np.ndarray, notes: list[str]) -> None:
    """Notes a number that may say that there is none."""
    for sentinel in SENTINELS:
        others = numbers[numbers != sentinel]
        if 0 < len(others) < len(numbers) and others.min() >= 0:
            n = len(numbers) - len(others)
            notes.append(
                f"{name} is {sentinel} in {n:,} rows and else {others.min():g} to {others.max():g}: if that "
                "stands for no value, leave the cells empty"
            )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell and cell.strip().lower() not in MISSING
