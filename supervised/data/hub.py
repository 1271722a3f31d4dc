"""Data sets of the Hub, or in a local folder in its format, by the library `datasets`."""

import dataclasses
import io
import os
import re
import warnings
from contextlib import suppress
from typing import Any

import numpy as np

from lab.errors import LabError, first_line
from lab.hub import hub_or_cache
from supervised.data.config import DataConfig
from supervised.data.images import open_picture, read_pictures
from supervised.data.raw import Columns, Raw
from supervised.data.texts import assemble, by_language


def read_hub(name: str, config: DataConfig) -> Raw:
    """All splits of OWNER/NAME or OWNER/NAME#CONFIG; what they hold decides the kind of data set.

    Images need a column of pictures, and one of classes to have labels. Texts, pairs (also a column
    `translation` by language) and tasks have the keys that rows of JSONL have.

    Raises:
        LabError: it cannot be loaded, holds nothing that is known, or lacks a picture or a label in some row.
    """
    path, _, subset = name.partition("#")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.isdir(path):  # noqa: PTH112 (of any length)
        raise LabError(f"hub:{name}: not understood. A data set on the Hub is hub:OWNER/NAME[#CONFIG].")

    import datasets

    datasets.disable_progress_bars()  # they would stand before the one line of an error
    try:
        with hub_or_cache(path):
            splits = datasets.load_dataset(path, subset or None)
    except Exception as error:  # each mishap with network, name, configuration or files has its class
        raise LabError(
            f"hub:{name}: cannot be loaded: {first_line(error).rstrip('.')}. Check the name and the "
            "network, or name a file."
        ) from None
    features = next(iter(splits.values())).features
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if pictures:
        labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        classes = tuple(features[labels[0]].names) if labels else ()
        parts: dict[str, Columns] = {}
        notes: list[str] = []
        for part, rows in splits.items():
            where = f"hub:{name}, {part}"
            for key in (pictures[0], *labels[:1]):
                if True in (missing := rows.data.column(key).is_null().to_pylist()):
                    row = missing.index(True) + 1
                    raise LabError(f"{where}, row {row}: has no {key!r}. Fill it in, or remove the row.")
            inputs, kept = _images(rows, pictures[0], config, where, notes)
            columns: Columns = {"inputs": inputs}
            if labels:
                columns["labels"] = np.array(rows[labels[0]], np.int64)[kept]
            parts[str(part)] = columns
        return Raw(kind="images", parts=parts, classes=classes, notes=notes)
    names = {key: kind for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    located = {
        str(part): [
            (f"hub:{name}, {part}, row {i}", _flat(row, names)) for i, row in enumerate(rows.to_list(), 1)
        ]
        for part, rows in splits.items()
    }
    return assemble(located, config)


def _images(
    rows: Any, column: str, config: DataConfig, where: str, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a column, each decoded when it is its turn, and the numbers of their rows."""

    import datasets
    from PIL import Image

    rows = rows.cast_column(column, datasets.Image(decode=False))  # `datasets` asks for no size

    def opened(index: int) -> Any:
        picture = rows[index][column]
        return Image.open(picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"]))

    def name(index: int) -> str:
        return f"{where}, row {index + 1}"

    def is_grey(index: int) -> bool:
        with suppress(LabError):  # which is said when it is read
            return open_picture(index, opened, name).mode in ("L", "1")
        return True

    with warnings.catch_warnings(action="ignore"):  # of damage, which an error tells
        grey = all(map(is_grey, range(min(len(rows), 8))))
    # Three equal channels would be a waste.
    config = dataclasses.replace(config, grayscale=config.grayscale or grey)
    return read_pictures(range(len(rows)), config, notes, opened, name)


def _flat(row: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """A row with languages as its own keys, and classes by name."""
    return {
        key: names[key].int2str(v) if key in names and v is not None and v >= 0 else v
        for key, v in by_language(row).items()
    }
