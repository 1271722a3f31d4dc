"""Texts, pairs of texts and tasks from files: plain text, aligned lines, rows of JSON, CSV, TSV, Parquet."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lab.errors import LabError, did_you_mean
from lab.memory import require_memory
from lab.unpack import bare_suffix, head_of, stem
from supervised.data import tables
from supervised.data.config import DataConfig
from supervised.data.files import read_text
from supervised.data.raw import (
    Columns,
    Raw,
    Reading,
    folder_kind,
    in_order,
    is_evaluation,
    one_each,
    part_kind,
    part_word,
    say_droppings,
    some,
    visible,
)

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".pq")
TASKS: dict[str, tuple[str, ...]] = {
    "entailment": ("premise", "hypothesis", "label"),
    "similarity": ("first", "second", "label"),
    "choice": ("context", "choices", "answer"),
    "classification": ("text", "label"),
}
"""The four task forms of GPT-1 (section 3.3), and the keys of their rows."""
UNLABELLED = ("unsup", "unsupervised", "unlabeled", "unlabelled")
"""Folders beside those of classes that are none."""
Located: TypeAlias = tuple[str, dict[str, Any]]
"""A row, behind its place for errors."""
LARGEST = 1e38
"""The largest label that float32 is sure to have."""


# ---- plain text ----


def read_texts(path: Path, config: DataConfig, reading: Reading) -> Raw:
    """A text file, or the files below a folder that end in `suffix`; a file is a document.

    Raises:
        LabError: there is none, or one is no text.
    """
    if reading.tasks and path.is_dir() and (raw := _read_text_folders(path, config)) is not None:
        return raw
    files, notes = [path], []
    if path.is_dir():
        shown = [p for p in visible(path, deep=True) if not p.is_dir()]
        files = [p for p in shown if bare_suffix(p) == config.suffix.lower()]
        notes = say_droppings(path)
        if not files:
            kinds = sorted({bare_suffix(p) for p in shown if bare_suffix(p)})
            if len(kinds) == 2 and {*kinds} <= {bare_suffix(p) for p in shown if stem(p) == stem(shown[0])}:
                pair = ", ".join(kind[1:] for kind in kinds)
                raise LabError(
                    f"{path}: holds files that end in {kinds[0]} and {kinds[1]}. Are they the same in two "
                    f"languages, set data.pair=[{pair}] from the first to the second; else set data.suffix."
                )
            raise LabError(
                f"{path}: holds no rows ({', '.join(ROWS)}), no picture, no arrays, and no file that ends in "
                f"{config.suffix}. Set data.suffix"
                + (f" (there are {', '.join(kinds[:6])})." if kinds else ", or name another folder.")
            )
    parts: dict[str, Columns] = {}
    inside = {file: file.relative_to(path).parts for file in files if path.is_dir()}
    by_folder = {file: kind for file, (top, *below) in inside.items() if below and (kind := folder_kind(top))}
    by_name = _parts_by_name([file for file in inside if file not in by_folder])
    for file in files:
        part = by_folder.get(file) or by_name.get(file, "train")
        parts.setdefault(part, {"text": []})["text"].append(_document(file, config))
    notes += [
        f"took {some([file.name for file in files if by_name.get(file) == part])} for {part}, by name"
        for part in sorted({*by_name.values()} - {"train"})
    ]
    return Raw(kind="text", parts=parts, notes=notes)


def _parts_by_name(files: Sequence[Path]) -> dict[Path, str]:
    """The parts of files of text whose names say them: test.txt, and wiki.test.tokens where wiki.train.tokens
    lies beside it. Of test_utils.py without train_utils.py it is what the document is about."""
    alike: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    for file in files:
        name = file.name.lower()
        if word := part_word(stem(file)):
            rest = file.parent, re.sub(rf"(?<![a-z0-9]){word}(?![a-z])", "*", name, count=1)
            alike.setdefault(rest, {}).setdefault(part_kind(word) or "", []).append(file)
    return {
        file: part
        for found in alike.values()
        for part, of_part in found.items()
        for file in of_part
        if (len(found) > 1 and "train" in found)
        or (file.name.partition(".")[0].isalpha() and part_kind(file.name))
    }


def _read_text_folders(root: Path, config: DataConfig) -> Raw | None:
    """Texts in a folder per class, these in folders train, validation, test or all in one, as aclImdb has
    them; None: there are not two classes.

    Raises:
        LabError: a class is not among those to train on.
    """
    folders = [path for path in visible(root) if path.is_dir()]
    roots = {path.name.lower(): path for path in folders if folder_kind(path.name)} or {"train": root}
    notes, found = say_droppings(root), {}
    for part, place in roots.items():
        files = found.setdefault(part, {})
        for folder in [path for path in visible(place) if path.is_dir()]:
            inside = [p for p in visible(folder, deep=True) if p.is_file()]
            texts = [p for p in inside if bare_suffix(p) == config.suffix.lower()]
            if folder.name.lower() in UNLABELLED:
                notes.append(f"left out {len(texts):,} texts of {part}/{folder.name}, which are of no class")
            elif texts:
                files[folder.name] = texts
    lead = next((part for part in roots if folder_kind(part) == "train"), None)
    classes = in_order(found[lead]) if lead else []
    if len(classes) < 2:
        return None
    parts: dict[str, Columns] = {}
    for part, files in found.items():
        if other := next((name for name in files if name not in classes), None):
            raise LabError(f"{roots[part]}/{other}: this class is not among those of {lead}. Move it.")
        if files:
            parts[part] = {
                "texts": [[[_document(path, config)]] for name in files for path in files[name]],
                "labels": np.repeat([classes.index(name) for name in files], [*map(len, files.values())]),
            }
    notes.append(f"took the folders {some(classes)} for classes of the texts in them")
    return Raw(kind="tasks", parts=parts, classes=tuple(classes), form="classification", notes=notes)


def _document(path: Path, config: DataConfig) -> str:
    errors = "surrogateescape" if config.tokenizer == "bytes" else "strict"
    return read_text(path, errors, asked=config.format == "text")


# ---- aligned files: train.de and train.en hold the same sentences ----


def find_aligned(folder: Path, pair: list[str]) -> dict[str, tuple[Path, Path]]:
    """Part -> the two files of it.

    Raises:
        LabError: a part has two of one language.
    """
    files = visible(folder)
    sides = [one_each((stem(p), p) for p in files if bare_suffix(p) == f".{side}") for side in pair]
    return {part: (path, sides[1][part]) for part, path in sides[0].items() if part in sides[1]}


def read_aligned(folder: Path, config: DataConfig, reading: Reading) -> Raw:
    """Two files a part, with as many lines.

    Raises:
        LabError: there are none, or they differ in length.
    """
    found = find_aligned(folder, config.pair) if folder.is_dir() else {}
    if not found:
        a, b = config.pair
        raise LabError(
            f"{folder}: no two files such as train.{a} and train.{b}. Set data.pair to their suffixes."
        )
    parts: dict[str, Columns] = {}
    for part, paths in found.items():
        source, target = (read_text(path).removesuffix("\n").split("\n") for path in paths)
        if len(source) != len(target):
            raise LabError(
                f"{paths[0]}: {len(source):,} lines, and {paths[1].name} has {len(target):,}. "
                "Line must match line."
            )
        parts[part] = {"source": [s.strip() for s in source], "target": [t.strip() for t in target]}
    return Raw(kind="pairs", parts=parts)


# ---- rows: JSON, CSV, TSV, Parquet ----


def find_rows(path: Path) -> dict[str, Path]:
    """Part -> file of rows.

    Raises:
        LabError: a part has two.
    """
    if not path.is_dir():
        return {"train": path}
    return one_each((stem(p), p) for p in visible(path) if bare_suffix(p) in ROWS)


def read_rows(path: Path, config: DataConfig, reading: Reading) -> Raw:
    """Rows of texts, pairs, one of `TASKS` or, as `supervised.data.tables` says, of numbers; the keys of the
    first row decide.

    Raises:
        LabError: a row cannot be read or lacks a key; it names file and line.
    """
    files, notes = find_rows(path), say_droppings(path) if path.is_dir() else []
    if any(part_kind(part) == "train" for part in files):
        if left := [file.name for part, file in files.items() if part_kind(part) is None]:
            notes.append(f"left out the file {some(left)}: named neither train nor val nor test")
        files = {part: file for part, file in files.items() if part_kind(part)}
    located: dict[str, list[Located]] = {}
    columns: dict[str, Any] = {}
    for part, file in files.items():
        found = rows_of(file, config, notes)
        if isinstance(found, list):
            located[part] = [(place, by_language(row)) for place, row in found]
        else:
            columns[part] = found
    if not any(located.values()) and not any(table.num_rows for table in columns.values()):
        raise LabError(f"{path}: has no rows. Name {' or '.join(ROWS)} files with some.")
    of_texts = form_of([*next((rows[0][1] for rows in located.values() if rows), {})], config) or next(
        (form for table in columns.values() if (form := form_of(table.column_names, config))), None
    )
    if of_texts is None:
        for part, rows in located.items():
            if columns or config.label is not None or _are_numbers(rows):
                columns[part] = tables.of_rows([row for _, row in rows], files[part])
        if columns and len(columns) == len(files):
            columns = {part: table for part, table in columns.items() if table.num_rows}
            return tables.assemble(columns, files, config, reading, notes)
    for part, table in columns.items():
        located[part] = [
            (f"{files[part]}, row {i}", row) for i, row in enumerate(_as_texts(table.to_pylist()), 1)
        ]
    raw = assemble(_by_split(located, config, notes), config)
    raw.notes.extend(notes)
    return raw


def by_language(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose sentences stand under `translation`, as on the Hub, with the languages as its own keys."""
    inside = row.get("translation")
    return {**row, **inside} if isinstance(inside, dict) else row


def _by_split(
    located: dict[str, list[Located]], config: DataConfig, notes: list[str]
) -> dict[str, list[Located]]:
    """Rows that are all of one part, by a column of theirs that names the parts, if there is one."""
    if len(located) > 1 or not (rows := next(iter(located.values()))):
        return located
    form = form_of([*rows[0][1]], config)
    used = _forms(config)[form] if form else ()
    split = tables.split_column([*rows[0][1]], lambda key: {str(row.get(key)) for _, row in rows}, used)
    if split is None:
        return located
    parts = tables.by_split([row.get(split) for _, row in rows], split, notes)
    return {part: [rows[i] for i in at] for part, at in parts.items()}


def form_of(keys: Sequence[str], config: DataConfig) -> str | None:
    """What rows with these keys are: pairs, one of `TASKS` or text; None: none of them."""
    return next((form for form, wanted in _forms(config).items() if set(wanted) <= set(keys)), None)


def _forms(config: DataConfig) -> dict[str, tuple[str, ...]]:
    return {"pairs": tuple(config.pair), **TASKS, "text": ("text",)}


def _are_numbers(rows: list[Located]) -> bool:
    """Whether rows are those of a table: the first has numbers, or lists of them, and nothing else nested."""
    values = [*rows[0][1].values()] if rows else []
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return any(isinstance(v, int | float) for v in flat) and not any(isinstance(v, dict | list) for v in flat)


def _as_texts(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a table as those of JSON: what is a number there may be one here."""
    for row in rows:
        if set(TASKS["similarity"]) <= row.keys() and isinstance(row["label"], str):
            row["label"] = _score(row["label"])
        yield row


def assemble(located: dict[str, list[tuple[str, dict[str, Any]]]], config: DataConfig) -> Raw:
    """Pairs, texts or a task from rows, each with its place for errors."""
    place, first = next(row for rows in located.values() for row in rows)
    forms, form = _forms(config), form_of(list(first), config)
    if form is None:
        known = "; ".join(", ".join(keys) for keys in forms.values())
        hint = did_you_mean(next(iter(first), ""), [*config.pair, "text", "premise", "first", "context"])
        raise LabError(
            f"{place}: has the keys {', '.join(first) or 'none'}, where one of these sets "
            f"is known: {known}.{hint} Of a table, data.label names the column to learn; of pairs, data.pair "
            "the two keys."
        )
    for rows in located.values():
        for place, row in rows:
            _check(row, forms[form], place)
    if form == "text":
        return Raw(
            kind="text",
            parts={part: {"text": [r["text"] for _, r in rows]} for part, rows in located.items()},
        )
    if form == "pairs":
        a, b = config.pair
        pairs = {
            part: {"source": [r[a].strip() for _, r in rows], "target": [r[b].strip() for _, r in rows]}
            for part, rows in located.items()
        }
        return Raw(kind="pairs", parts=pairs)
    return _task(form, located)


def rows_of(
    path: Path, config: DataConfig, notes: list[str], known: Sequence[Sequence[str]] = ()
) -> list[Located] | Any:
    """The rows of a file: a list of them, each with its place, or a `pyarrow.Table`.

    Args:
        path: the file.
        config: the data's.
        notes: takes sentences on how it was read.
        known: sets of columns that mean something, beside those of texts.

    Raises:
        LabError: it cannot be read, or its rows are not alike.
    """
    suffix = bare_suffix(path)
    head = head_of(path)
    if head.startswith(b"PAR1"):
        table = tables.read_parquet(path)
        pictures = [field.name for field in table.schema if str(field.type).startswith("struct<bytes")]
        if pictures:
            raise LabError(
                f"{path}: {pictures[0]!r} holds pictures. Put the file into a folder, and name that as "
                "data.source=hub:FOLDER."
            )
        return table
    if suffix in (".parquet", ".pq"):
        raise LabError(f"{path}: does not begin as Parquet does. Get the file again.")
    if suffix == ".tsv" and (text := read_text(path)) and not tables.is_table(text, config, _forms(config)):
        return list(_tsv(path, text, config, notes))
    if suffix in (".jsonl", ".ndjson", ".json") or head.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    table, said = tables.read_csv(path, config, [*_forms(config).values(), *known])
    notes += said
    return table


def _json(path: Path) -> list[Located]:
    """One row a line, or all in one list, or a list for each key."""
    text = read_text(path)
    require_memory(10 * len(text), f"{path}: to read it takes about", "Name a smaller file.")
    if bare_suffix(path) == ".json" or text.lstrip()[:1] == "[":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if "Extra data" not in str(error):  # else lines of JSON under another name
                raise LabError(
                    f"{path}: not JSON: {_why(error)}. Correct it, or set data.format=text."
                ) from None
        else:
            return _unfolded(whole, path)
    return list(_jsonl(path, text))


def _unfolded(whole: Any, path: Path) -> list[Located]:
    """The rows of a JSON value: a list of them, one alone, a list for each column, or a form of pandas'."""
    if isinstance(whole, dict):
        whole = _rows_of_object(whole, path)
    if isinstance(whole, list) and whole and all(isinstance(row, list) for row in whole):
        whole = [{f"column {i}": value for i, value in enumerate(row, 1)} for row in whole]
    if not isinstance(whole, list):
        raise LabError(
            f"{path}: is of type {type(whole).__name__}, where a list of rows is wanted. Correct it."
        )
    for i, row in enumerate(whole, 1):
        if not isinstance(row, dict):
            raise LabError(
                f"{path}, row {i}: is of type {type(row).__name__}, where a row is {{...}}. Correct it, or "
                "set data.format=text."
            )
    return [(f"{path}, row {i}", row) for i, row in enumerate(whole, 1)]


def _rows_of_object(whole: dict[str, Any], path: Path) -> list[Any]:
    """What an object of JSON holds: a list for each column; rows under one of its keys; columns or rows by
    their names, as pandas' `to_json` writes them (orient columns, index, split, table); or it is a row."""
    values = [*whole.values()]
    names, data = whole.get("columns"), whole.get("data")
    if (
        isinstance(names, list)
        and isinstance(data, list)
        and all(isinstance(row, list) and len(row) == len(names) for row in data)
    ):
        return [dict(zip(map(str, names), row, strict=True)) for row in data]
    if len(whole) > 1 and all(isinstance(v, list) for v in values):
        if len({len(v) for v in values}) > 1:
            raise LabError(f"{path}: its lists are of different lengths, and are no columns. Correct it.")
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    of_rows = [v for v in values if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    if len(of_rows) == 1:
        return of_rows[0]
    alike = len({frozenset(v) if isinstance(v, dict) else None for v in values}) == 1
    if alike and len(whole) > 1 and isinstance(values[0], dict) and values[0]:
        if all(key.isdecimal() for key in values[0]):  # a number for each row
            return [{name: column[row] for name, column in whole.items()} for row in values[0]]
        return values
    return [whole]


def _jsonl(path: Path, text: str) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LabError(f"{place}: not JSON: {_why(error)}. A line is one row, as in {{...}}.") from None
        if not isinstance(row, dict):
            raise LabError(f"{place}: is a {type(row).__name__}, where a row is {{...}}. Correct the line.")
        yield place, row


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _tsv(path: Path, text: str, config: DataConfig, notes: list[str]) -> Iterator[Located]:
    """Rows of cells parted by tabs. The first line names them, or there are pairs."""
    header: list[str] | None = None
    for number, cells in _cells(text):
        place = f"{path}, line {number}"
        if header is None:
            named = form_of(cells, config) is not None
            header = cells if named else list(config.pair)
            if named:
                continue
            notes.append(f"{path.name} names no columns: took the first two for {' and '.join(header)}")
        if len(cells) < len(header):
            raise LabError(
                f"{place}: has {len(cells)} of {len(header)} columns parted by tabs. Complete the line."
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=False))
        if set(TASKS["similarity"]) <= set(row):
            row["label"] = _score(row["label"])
        yield place, row


def _cells(text: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, behind its number.

    Quotes are part of the text, unless all of them stand where a writer of CSV puts them: where what it would
    write is the text as it is.
    """
    if '"' in text:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        with suppress(csv.Error):
            found = [(reader.line_num, record) for record in reader]
            again = io.StringIO(newline="")
            csv.writer(again, delimiter="\t", lineterminator="\n").writerows(record for _, record in found)
            if again.getvalue().rstrip("\n") == text.replace("\r\n", "\n").rstrip("\n"):
                yield from ((number, record) for number, record in found if record)
                return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r").split("\t")


def _score(cell: str) -> str | float:
    """A float as such, as JSONL tells it from a class; whole numbers may be either."""
    with suppress(ValueError):
        return cell if cell.strip(" +-").isdecimal() else float(cell)
    return cell


def _check(row: dict[str, Any], keys: tuple[str, ...], place: str) -> None:
    """Raises for a key that a row lacks, or whose value is of another kind than it must be."""
    for key in keys:
        value = row.get(key)
        if value is None:
            others = [name for name in row if name not in keys]
            raise LabError(
                f"{place}: has no {key!r}.{did_you_mean(key, others)} A row here has {', '.join(keys)}."
            )
        if key in ("label", "answer"):
            number = isinstance(value, int | float) and abs(value) <= LARGEST
            good, wanted = number or isinstance(value, str), f"a name or a number of at most {LARGEST:.0e}"
        elif key == "choices":
            good = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)
            wanted = "a list of two or more texts"
        else:
            good, wanted = isinstance(value, str), "a text"
        if not good:
            raise LabError(f"{place}: {key!r} is {json.dumps(value)[:40]}, not {wanted}. Correct the line.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
                raise LabError(f"{place}: {key!r} is no valid Unicode (half of a pair). Correct the line.")


def _task(form: str, located: dict[str, list[tuple[str, dict[str, Any]]]]) -> Raw:
    key = TASKS[form][-1]
    every = [row[key] for rows in located.values() for _, row in rows]
    as_number = form == "similarity" and any(isinstance(label, float) for label in every)
    to_learn = [row for part, rows in located.items() if not is_evaluation(part) for row in rows]
    to_learn = to_learn or [row for rows in located.values() for row in rows]
    classes = () if as_number else _classes(form, to_learn, key)
    parts: dict[str, Columns] = {}
    for part, rows in located.items():
        columns: Columns = {"texts": [_sequences(form, row) for _, row in rows]}
        if as_number:
            columns["targets"] = np.array([[_number(place, row)] for place, row in rows], np.float32)
        else:
            index = {name: i for i, name in enumerate(classes)}
            columns["labels"] = np.array(
                [_label(place, row[key], key, index) for place, row in rows], np.int64
            )
        parts[part] = columns
    if form == "choice":
        for place, row in (row for rows in located.values() for row in rows):
            if len(row["choices"]) != len(classes):
                raise LabError(
                    f"{place}: has {len(row['choices'])} choices, and the first row has {len(classes)}. "
                    "All must have as many."
                )
    return Raw(kind="tasks", parts=parts, classes=classes, form=form)


def _sequences(form: str, row: dict[str, Any]) -> list[list[str]]:
    """What is read of a row: sequences of one text, or of two with a delimiter between them."""
    if form == "classification":
        return [[row["text"]]]
    if form == "entailment":
        return [[row["premise"], row["hypothesis"]]]
    if form == "similarity":  # neither comes first by nature, so both orders are read
        return [[row["first"], row["second"]], [row["second"], row["first"]]]
    return [[row["context"], choice] for choice in row["choices"]]


def _classes(form: str, rows: list[tuple[str, dict[str, Any]]], key: str) -> tuple[str, ...]:
    if form == "choice" and rows:
        return tuple(str(i) for i in range(len(rows[0][1]["choices"])))
    return tuple(in_order(str(row[key]) for _, row in rows))


def _label(place: str, value: Any, key: str, index: dict[str, int]) -> int:
    if str(value) not in index:
        known = ", ".join(list(index)[:12])
        raise LabError(
            f"{place}: {key} {value!r} is none of {known}.{did_you_mean(str(value), index)} Correct it."
        )
    return index[str(value)]


def _number(place: str, row: dict[str, Any]) -> float:
    with suppress(ValueError):
        if abs(number := float(row["label"])) <= LARGEST:
            return number
    raise LabError(f"{place}: label {row['label']!r} is no number, as other rows have. Correct it.")
