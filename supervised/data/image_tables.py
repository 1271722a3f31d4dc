"""Pictures with tables beside them that say of which class each is: labels.csv, metadata.jsonl.

A table is one of these if a column of it names pictures that lie below the folder, with or without suffix and
folders. The label is found as in `supervised.data.tables`. To which part a row belongs says its column
`split`, else the table's name or folder (train.csv, val/metadata.jsonl), else the folder of the picture.
Nothing but the pictures below the folder is ever opened, whatever a table names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lab.errors import LabError
from lab.unpack import bare_suffix, head_of, stem
from supervised.data import tables
from supervised.data.config import DataConfig
from supervised.data.images import pictures_below, read_pictures, require_one_size
from supervised.data.raw import (
    PICTURES,
    Columns,
    Raw,
    Reading,
    folder_kind,
    part_kind,
    part_word,
    say_droppings,
    some,
    take,
    visible,
)
from supervised.data.texts import ROWS, rows_of

NAMES = (
    *("file_name", "filename", "file", "image", "img", "picture", "image_name", "image_path", "img_path"),
    *("image_file", "image_id", "imageid", "filepath", "filepaths", "file_path", "path", "id_code", "id"),
)
"""What columns of names of pictures are called, in lower case: it decides if two hold such names."""
MOST_TABLES = 20
"""Files of rows in one folder; where there are more, each is about one picture."""
_LOOKED_AT = 500
"""Rows of a table that are looked at to find the column that names pictures."""


class _Pictures:
    """The pictures below a folder, by their names: paths from there, parted by slashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {path.relative_to(folder).as_posix(): path for path in pictures_below(folder)}
        self._by_name: dict[str, list[PurePosixPath]] = {}
        self._by_stem: dict[str, list[PurePosixPath]] = {}
        for path in map(PurePosixPath, self.paths):
            self._by_name.setdefault(path.stem + path.suffix.lower(), []).append(path)
            self._by_stem.setdefault(path.stem, []).append(path)

    def named(self, value: Any, table: Path, kind: str | None = None) -> list[str]:
        """The picture that a table's value means; none; or several that it may mean equally well.

        The folders in the value and those that the picture lies in must end alike, as far as both have any:
        tables name pictures from where they lie, from a folder of pictures, or from another machine's root.

        Args:
            value: of a row.
            table: where it stands.
            kind: of the part that the table is about.
        """
        words = [w for w in str(value).strip().replace("\\", "/").split("/") if w not in ("", ".", "..")]
        if not words:
            return []
        name, folders = PurePosixPath(words[-1]), tuple(words[:-1])
        whole = (*table.parent.relative_to(self.folder).parts, *folders)
        ranked: list[tuple[tuple[bool, int, bool], str]] = []
        for path in self._by_name.get(name.stem + name.suffix.lower()) or self._by_stem.get(name.name, []):
            inside = path.parts[:-1]
            n = min(len(inside), len(folders))
            if inside[len(inside) - n :] == folders[len(folders) - n :]:
                of_part = kind is not None and any(folder_kind(folder) == kind for folder in inside[:1])
                ranked.append(((inside == whole, n, of_part), str(path)))
        best = max((rank for rank, _ in ranked), default=None)
        return [path for rank, path in ranked if rank == best]


@dataclass(frozen=True)
class _Table:
    """A table, and which of its columns names pictures."""

    path: Path
    rows: Any
    """A `pyarrow.Table`."""
    names: str
    part: str | None
    """Which it is about, by its own name or its folder's."""
    notes: list[str]
    """On how it was read."""


def read_image_tables(source: Path, config: DataConfig, reading: Reading) -> Raw | None:
    """Pictures, and their classes or numbers from tables.

    Args:
        source: the folder of both, or a table, whose folder it is then.
        config: the data's.
        reading: without `predicts`, pictures need no label.

    Returns:
        None: there is no such table, or none has a label and pictures can do without, or have folders for it.

    Raises:
        LabError: a table names pictures that are not there, one of two classes, or no label; or a picture
            cannot be read.
    """
    folder = source if source.is_dir() else source.parent
    files = _files_of_rows(source)
    pictures = _Pictures(folder) if files else None
    if pictures is None or not pictures.paths:
        return None
    notes = say_droppings(folder)
    found = [table for path in files if (table := _naming_pictures(path, pictures, config)) is not None]
    chosen = _one_a_part(found, folder, config, notes)
    lead = chosen.get("train")
    if lead is None:
        return None
    if of_classes := tables.label_columns(lead.rows, config, reading):
        chosen = {
            part: replace(t, rows=tables.of_one_column(t.rows, of_classes, t.path, config, notes))
            for part, t in chosen.items()
        }
        lead, config = chosen["train"], replace(config, label=tables.ONE_LABEL)
    in_classes = source.is_dir() and _lie_in_classes(pictures.paths)
    label = tables.find_label(lead.rows.column_names, config, lead.path)
    if label is None:
        if in_classes or not reading.predicts:
            return None
        raise tables.no_label(lead.rows.column_names, lead.path)
    tables.check_dropped(lead.rows.column_names, config, lead.path)
    if in_classes:
        notes.append(
            f"classes are what {lead.path.name} says, not the folders of the pictures, which "
            "data.format=image_folder takes"
        )
    paths: dict[str, Path] = {}
    files_of: dict[str, list[str]] = {}
    rows: dict[str, Any] = {}
    for part, table in chosen.items():
        if label not in table.rows.column_names:
            notes.append(f"left out {table.path.name}: it has no {label!r}")
            continue
        whole = _with_pictures(table, label, pictures, config, notes)
        for name, at in whole.by_part(part if table.part else None).items():
            if name in paths:
                raise LabError(
                    f"{table.path}: has rows of {name}, and so has {paths[name].name}. Merge them."
                )
            paths[name], files_of[name] = table.path, [whole.pictures[i] for i in at]
            rows[name] = whole.labels.take(at)
    if not paths:
        raise LabError(f"{lead.path}: no row has both a picture and a label. Name another table.")
    _say_overlaps(files_of, pictures, folder, notes)
    learned, classes = tables.targets_of(label, rows, paths, reading, notes)
    parts = {
        part: _with_labels(read_pictures([pictures.paths[f] for f in of], config, notes), learned[part])
        for part, of in files_of.items()
    }
    require_one_size(folder, parts)
    return Raw(kind="images", parts=parts, classes=classes, notes=list(dict.fromkeys(notes)))


def _with_labels(read: tuple[np.ndarray, np.ndarray], labels: Columns) -> Columns:
    """Pictures with the labels of those items that they are."""
    return {"inputs": read[0], **take(labels, read[1])}


def _files_of_rows(source: Path) -> list[Path]:
    """A table that names files of pictures; of a folder those in it and in the folders in it."""
    if not source.is_dir():
        plain = bare_suffix(source) in ROWS and _PICTURE.search(head_of(source).lower())
        return [source] if plain else []
    places = [source, *(path for path in visible(source) if path.is_dir())]
    inside = ([p for p in visible(place) if bare_suffix(p) in ROWS and p.is_file()] for place in places)
    return [path for files in inside if len(files) <= MOST_TABLES for path in files]


def _naming_pictures(path: Path, pictures: _Pictures, config: DataConfig) -> _Table | None:
    """The table of a file, if a column of it names pictures."""
    notes: list[str] = []
    try:
        rows = rows_of(path, config, notes, [(name,) for name in NAMES])
        if isinstance(rows, list):
            rows = tables.of_rows([row for _, row in rows], path)
    except LabError:  # it may be about other things; if it is all there is, it is read again as a table
        return None
    if not rows.num_rows:
        return None
    best, names = (0, False, 0, 0), None
    looked_at = rows.take(np.unique(np.linspace(0, rows.num_rows - 1, _LOOKED_AT).astype(int)))
    for i, name in enumerate(rows.column_names):
        values = looked_at.column(name)
        by_number = isinstance(config.label, int) and i == config.label % rows.num_columns
        label = by_number or name == config.label or name.strip().lower() in tables.LABELS
        if not label and name not in config.drop and tables.is_text_or_whole(values):
            n = sum(bool(pictures.named(value, path)) for value in values.to_pylist())
            rank = (n, name.strip().lower() in NAMES, len(values.unique()), -i)
            if n and rank > best:
                best, names = rank, name
    if names is None or (best[0] < looked_at.num_rows / 2 and not best[1]):
        return None
    beside = path.parent.relative_to(pictures.folder).parts
    part = next((folder.lower() for folder in beside if folder_kind(folder)), None) or part_word(stem(path))
    return _Table(path, rows, names, part, notes)


def _one_a_part(found: list[_Table], folder: Path, config: DataConfig, notes: list[str]) -> dict[str, _Table]:
    """The tables by part, that to train on as "train".

    Raises:
        LabError: several could be that of a part.
    """
    by_part: dict[str, list[_Table]] = {}
    for table in found:
        kind = part_kind(table.part or "")
        by_part.setdefault("train" if kind == "train" else table.part or "", []).append(table)
    if other := by_part.pop("", None):
        if "train" in by_part:
            said = some([table.path.name for table in other])
            notes.append(f"left out {said}: named neither train nor val nor test")
        else:
            by_part["train"] = other
    chosen: dict[str, _Table] = {}
    for part, several in by_part.items():
        labelled = [table for table in several if _has_label(table, config)]
        if len(several) > 1 and len(labelled) != 1:
            raise LabError(
                f"{folder}: {some([str(t.path.relative_to(folder)) for t in several])} all name its "
                "pictures. Name the one that is meant as data.source, or the label by data.label."
            )
        chosen[part] = labelled[0] if len(several) > 1 else several[0]
    return chosen


def _has_label(table: _Table, config: DataConfig) -> bool:
    names = table.rows.column_names
    if config.label is not None:
        asked = {*config.label} if isinstance(config.label, list) else {config.label}
        return asked <= {*names} or isinstance(config.label, int)
    return any(name.strip().lower() in tables.LABELS for name in names)


def _lie_in_classes(paths: Iterable[str]) -> bool:
    """Whether pictures lie in two folders or more, parts not counted."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    return len({inside[bool(folder_kind(inside[0])) :] for inside in folders if inside} - {()}) > 1


@dataclass(frozen=True)
class _Rows:
    """Rows of a table whose pictures are there."""

    pictures: list[str]
    labels: Any
    """A `pyarrow.Table` of the label alone."""
    splits: list[str] | None

    def by_part(self, part: str | None) -> dict[str, list[int]]:
        """The numbers of the rows of each part: by their `split`, else `part`, else the picture's folder."""
        found: dict[str, list[int]] = {}
        for i, path in enumerate(self.pictures):
            first, *inside = PurePosixPath(path).parts
            of_folder = first.lower() if inside and part_kind(first) and folder_kind(first) else "train"
            found.setdefault(self.splits[i] if self.splits else part or of_folder, []).append(i)
        return found


def _with_pictures(
    table: _Table, label: str, pictures: _Pictures, config: DataConfig, notes: list[str]
) -> _Rows:
    """A table's rows without those that lack a value or a picture, or name a picture again.

    Raises:
        LabError: some lack one, unless data.bad_rows=skip, or a picture has two labels or may be one of two.
    """
    name = table.path.name
    split = tables.split_column(
        table.rows.column_names,
        lambda column: table.rows.column(column).unique().to_pylist(),
        (table.names, label),
    )
    used = [table.names, label, *([split] if split else [])]
    if others := [column for column in table.rows.column_names if column not in used]:
        notes.append(f"left out of {name}: {some(others)}")
    notes += table.notes
    notes.append(f"{table.names} of {name} names the pictures" + (f", {split} their part" if split else ""))
    rows = tables.complete(table.rows.select(used), table.path, config, notes)
    kind = part_kind(table.part or "")
    kept: dict[str, int] = {}
    lacking: list[str] = []
    again = 0
    labels = rows.column(label).to_pylist()
    for i, value in enumerate(rows.column(table.names).to_pylist()):
        found = pictures.named(value, table.path, kind)
        if len(found) > 1:
            raise LabError(
                f"{table.path}: {value!r} may be {' or '.join(found[:2])}. Write names with their folders."
            )
        if not found:
            lacking.append(str(value))
        elif labels[kept.setdefault(found[0], i)] != labels[i]:
            raise LabError(
                f"{table.path}: {value!r} is there twice, with {label} {labels[kept[found[0]]]!r} and "
                f"{labels[i]!r}. A picture has one label: remove one of the rows."
            )
        else:
            again += kept[found[0]] != i
    if lacking:
        n, why = (
            f"{len(lacking):,} of {rows.num_rows:,} rows",
            f"name no picture that is there ({some(lacking)})",
        )
        if config.bad_rows == "error":
            raise LabError(
                f"{table.path}: {n} {why}. Add them to {pictures.folder}; data.bad_rows=skip leaves such "
                "rows out."
            )
        notes.append(f"left out {n} of {name} that {why}")
    if again:
        notes.append(f"left out {again:,} rows of {name} that name a picture again, with the same {label}")
    rows = rows.take([*kept.values()])
    splits = [str(value).strip() for value in rows.column(split).to_pylist()] if split else None
    return _Rows([*kept], rows.select([label]), splits)


def _say_overlaps(
    files_of: dict[str, list[str]], pictures: _Pictures, folder: Path, notes: list[str]
) -> None:
    """Notes what no row names, and what parts share."""
    named = {path for files in files_of.values() for path in files}
    if left := sorted(pictures.paths.keys() - named):
        notes.append(f"left out {len(left):,} pictures that no row names ({some(left)})")
    if shared := sum(map(len, files_of.values())) - len(named):
        notes.append(f"{shared:,} pictures are in more than one of {some([*files_of])}")


_PICTURE = re.compile(rb"\.(" + "|".join(suffix[1:] for suffix in PICTURES).encode() + rb")\b")
