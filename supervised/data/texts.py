"""Texts, pairs of texts and tasks from files: plain text, aligned lines, JSONL, TSV."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import LabError, did_you_mean
from supervised.data.config import DataConfig
from supervised.data.raw import EVALUATION, Columns, Raw, bare_suffix, is_evaluation, one_each, read_text

ROWS = (".jsonl", ".tsv")
TASKS: dict[str, tuple[str, ...]] = {
    "entailment": ("premise", "hypothesis", "label"),
    "similarity": ("first", "second", "label"),
    "choice": ("context", "choices", "answer"),
    "classification": ("text", "label"),
}
"""The four task forms of GPT-1 (section 3.3), and the keys of their rows."""
LARGEST = 1e38
"""The largest label that float32 is sure to have."""


# ---- plain text ----


def read_texts(path: Path, config: DataConfig) -> Raw:
    """A text file, or the files below a folder that end in `suffix`; a file is a document.

    Raises:
        LabError: there is none, or one is no text.
    """
    files = [path]
    if path.is_dir():
        shown = (p for p in path.rglob("*") if not p.is_dir() and not _hidden(p, path))
        files = sorted(p for p in shown if bare_suffix(p) == config.suffix)
        if not files:
            kinds = sorted({p.suffix for p in path.rglob("*") if p.is_file() and p.suffix})
            raise LabError(
                f"{path}: holds no rows ({', '.join(ROWS)}), no picture, and no file that ends in "
                f"{config.suffix}. Set data.suffix"
                + (f" (there are {', '.join(kinds[:6])})." if kinds else ", or name another folder.")
            )
    parts: dict[str, Columns] = {}
    for file in files:
        inside = file.relative_to(path) if path.is_dir() else Path("train")
        named = [name for name in (inside.parts[0], inside.name.partition(".")[0]) if name in EVALUATION]
        parts.setdefault(named[0] if named else "train", {"text": []})["text"].append(_document(file, config))
    return Raw(kind="text", parts=parts)


def _document(path: Path, config: DataConfig) -> str:
    return read_text(path, "surrogateescape" if config.tokenizer == "bytes" else "strict")


def _hidden(path: Path, root: Path) -> bool:
    return any(name.startswith(".") for name in path.relative_to(root).parts)


# ---- aligned files: train.de and train.en hold the same sentences ----


def find_aligned(folder: Path, pair: list[str]) -> dict[str, tuple[Path, Path]]:
    """Part -> the two files of it.

    Raises:
        LabError: a part has two of one language.
    """
    files = sorted(folder.iterdir())
    sides = [one_each((_stem(p), p) for p in files if bare_suffix(p) == f".{side}") for side in pair]
    return {stem: (path, sides[1][stem]) for stem, path in sides[0].items() if stem in sides[1]}


def read_aligned(folder: Path, config: DataConfig) -> Raw:
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


# ---- rows: JSONL and TSV ----


def find_rows(path: Path) -> dict[str, Path]:
    """Part -> file of rows.

    Raises:
        LabError: a part has two.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return one_each((_stem(p) if path.is_dir() else "train", p) for p in files if bare_suffix(p) in ROWS)


def read_rows(path: Path, config: DataConfig) -> Raw:
    """JSONL or TSV: pairs, texts, or one of `TASKS`; the keys of the first row decide.

    Raises:
        LabError: a row is no JSON or lacks a key; it names file and line.
    """
    located = {part: list(_rows_of(file, config)) for part, file in find_rows(path).items()}
    if not any(located.values()):
        raise LabError(f"{path}: has no rows. Name {' or '.join(ROWS)} files with some.")
    return assemble(located, config)


def assemble(located: dict[str, list[tuple[str, dict[str, Any]]]], config: DataConfig) -> Raw:
    """Pairs, texts or a task from rows, each with its place for errors."""
    place, first = next(row for rows in located.values() for row in rows)
    forms = {"pairs": tuple(config.pair), **TASKS, "text": ("text",)}
    form = next((form for form, keys in forms.items() if all(key in first for key in keys)), None)
    if form is None:
        known = "; ".join(", ".join(keys) for keys in forms.values())
        hint = did_you_mean(next(iter(first), ""), [*config.pair, "text", "premise", "first", "context"])
        raise LabError(
            f"{place}: has the keys {', '.join(first) or 'none'}, where one of these sets "
            f"is known: {known}.{hint}"
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


def _rows_of(path: Path, config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place."""
    lines = read_text(path).split("\n")
    header = None
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        if bare_suffix(path) == ".tsv":
            cells = line.rstrip("\r").split("\t")
            if header is None:
                named = set(config.pair) <= set(cells) or any(
                    set(keys) <= set(cells) for keys in TASKS.values()
                )
                header = cells if named else list(config.pair)
                if named:
                    continue
            if len(cells) < len(header):
                raise LabError(
                    f"{place}: has {len(cells)} of {len(header)} columns parted by tabs. Complete the line."
                )
            row: dict[str, Any] = dict(zip(header, cells, strict=False))
            if set(TASKS["similarity"]) <= set(row):
                row["label"] = _score(row["label"])
            yield place, row
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise LabError(f"{place}: not JSON: {why}. A line is one row, as in {{...}}.") from None
        if not isinstance(row, dict):
            raise LabError(f"{place}: is a {type(row).__name__}, where a row is {{...}}. Correct the line.")
        yield place, row


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
    found = {str(row[key]) for _, row in rows}
    whole = {name: int(name) for name in found if name.isdecimal() and len(name) < 99}  # int() has a limit
    return tuple(sorted(found, key=lambda name: (whole.get(name, math.inf), name)))


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


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem
