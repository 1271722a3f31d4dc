"""Arrays from files: .npz and .npy, under the names that people give them."""

import io
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import LabError, first_line
from lab.memory import require_memory
from lab.unpack import PACKED, bare_suffix, read_bytes, require_growth, stem
from supervised.data import frames
from supervised.data.config import DataConfig
from supervised.data.raw import PARTS, Columns, Raw, Reading, in_order, one_each, some, visible

SUFFIXES = (".npz", ".npy")
_INPUTS = ("images", "imgs", "image", "inputs", "input", "x", "data", "features")
_LABELS = ("labels", "targets", "y", "label", "target", "classes")
_PICTURES = ("images", "imgs", "image")
LARGEST_LOSS = 1e-3
"""Rounding error of a column as 32-bit floats, in its standard deviations, that is borne."""
_PLACES = "images and labels, x and y, or x_train, y_train, x_test and y_test"


def find_arrays(folder: Path) -> list[Path]:
    """The files of arrays of a folder."""
    return [path for path in visible(folder) if path.is_file() and bare_suffix(path) in SUFFIXES]


def read_arrays(path: Path, config: DataConfig, reading: Reading) -> Raw:
    """Arrays of images, of a table (n, columns) or of sequences (n, time, features), and of labels.

    Names, in any case, are {images, labels}, {x, y} or {data, target}; of parts {x_train, y_train, x_test,
    ...} or {train_images, ...}; `data.label` names another array of labels, whose inputs are then the one
    array beside it. Of a folder, and of one .npy and those beside it, the files' names are the arrays'.

    Raises:
        LabError: one is damaged, is larger than the memory, or holds none of these.
    """
    arrays, notes = _load_all(path)
    if frames.is_record(arrays):
        return frames.as_record(arrays, path)
    found = _by_role(arrays, path, config)
    kinds, parts = set(), {}
    raw_labels: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for part, (inputs, labels) in found.items():
        used |= {name for name in (inputs, labels) if name is not None}
        values = arrays[inputs]
        if labels is not None and len(values) != len(arrays[labels]):
            raise LabError(
                f"{path}: {len(arrays[labels]):,} labels ({labels}) for {len(values):,} inputs ({inputs}) in "
                f"{part}. Make it again."
            )
        kind, columns = _as_inputs(values, inputs, f"{path}: {part}", reading, notes)
        kinds.add(kind)
        parts[part] = columns
        if labels is not None:
            raw_labels[part] = arrays[labels]
    if len(kinds) > 1:
        raise LabError(f"{path}: its parts are of several kinds, {' and '.join(sorted(kinds))}. Part them.")
    columns, classes = _as_labels(raw_labels, str(path), reading, notes)
    for part, labels in columns.items():
        parts[part] |= labels
    if left := sorted(arrays.keys() - used):
        notes.append(f"left out the arrays {some(left)}")
    return Raw(kind=kinds.pop(), parts=parts, classes=classes, notes=list(dict.fromkeys(notes)))


# ---- files ----


def _load_all(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    if path.is_dir():
        files = find_arrays(path)
    elif bare_suffix(path) == ".npy" or _is_npy(path):
        role = _role(stem(path))
        beside = one_each((stem(p), p) for p in find_arrays(path.parent) if bare_suffix(p) == ".npy")
        # Of X.npy its labels are y.npy; of x_train.npy there is more, by which parts are told apart.
        same = {name: p for name, p in beside.items() if role and _role(name)}
        files = list(same.values()) if role else [path]
    else:
        files = [path]
    if not files:
        raise LabError(f"{path}: holds no .npy or .npz file. Name another, or data.format.")
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        for name, values in _load(file).items():
            key = stem(file) if not name else f"{stem(file)}_{name}" if len(files) > 1 else name
            if key in arrays:
                raise LabError(f"{file}: {key} is there twice. Remove or rename one.")
            arrays[key] = values
    others = [file.name for file in files if file != path]
    notes = [f"with {path.name} read {some(others)}, beside it"] if others and path.is_file() else []
    return {name: np.atleast_1d(values) for name, values in arrays.items()}, notes


def _is_npy(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(6) == b"\x93NUMPY"
    except OSError:
        return False


def _load(path: Path) -> dict[str, np.ndarray]:
    """A file's arrays by name; of an .npy the one without."""
    try:
        packed = path.suffix.lower() in PACKED
        with io.BytesIO(read_bytes(path)) if packed else path.open("rb") as opened:
            if not (head := opened.read(6)).startswith((b"PK\3\4", b"PK\5\6", b"\x93NUMPY", b"\x80")):
                raise LabError(f"begins with {head[:4].hex() or 'nothing'}")  # numpy would call it a pickle
            opened.seek(0)
            if head.startswith(b"\x80"):
                raise LabError("pickle")
            _require_room(opened, head, path)
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                return {"": file}
            return {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib, numpy: each has its own
        if isinstance(error, LabError) and str(error).startswith(str(path)):
            raise
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise LabError(
                f"{path}: not a file of plain arrays: objects, which only pickle can read, are never "
                "loaded, for that runs code. Save its arrays as numbers."
            ) from None
        suffix = ".npy" if bare_suffix(path) == ".npy" else ".npz"
        raise LabError(f"{path}: not a readable {suffix} file: {first_line(error)}. Get it again.") from None


def _require_room(opened: Any, head: bytes, path: Path) -> None:
    """Sees that what the file's head says it holds fits into the memory: a bomb is small until unpacked."""
    if head.startswith(b"\x93"):
        needed = _size_of(opened)
    else:
        with zipfile.ZipFile(opened) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
    packed = opened.seek(0, 2)
    opened.seek(0)
    require_growth(needed, packed, path)
    require_memory(2 * needed, f"{path}: its arrays take about", "Name a smaller file.")


def _size_of(opened: Any) -> int:
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(opened)
    return math.prod(shape) * kind.itemsize


# ---- names ----


def _role(name: str) -> tuple[str, str] | None:
    """inputs or labels, and of which part, by an array's name: X_train, trainX and train_images are inputs of
    train."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for role, names in (("inputs", _INPUTS), ("labels", _LABELS)):
        if plain in names:
            return role, "train"
        for kinds in PARTS.values():
            for part in kinds:
                if any(plain in (part + word, word + part) for word in names):
                    return role, part
    return None


def _by_role(
    arrays: Mapping[str, np.ndarray], path: Path, config: DataConfig
) -> dict[str, tuple[str, str | None]]:
    """The names of inputs and, if there are any, labels by part."""
    roles: dict[tuple[str, str], str] = {}
    if isinstance(config.label, list):
        raise LabError(
            f"data.label = {config.label}: {path} holds arrays, of which one is the label. Name it."
        )
    if config.label is not None:
        if str(config.label) not in arrays:
            raise LabError(
                f"data.label = {config.label!r}: {path} has no such array, only {some(list(arrays))}."
            )
        roles["labels", "train"] = str(config.label)
        others = [name for name in arrays if name != config.label]
        if len(others) == 1:
            roles["inputs", "train"] = others[0]
    for name in arrays:
        role = _role(name)
        if role is None or name == config.label or (config.label is not None and role == ("labels", "train")):
            continue
        if roles.setdefault(role, name) != name:
            raise LabError(
                f"{path}: {roles[role]} and {name} could both be the {role[0]} of {role[1]}. Rename one."
            )
    if len(arrays) == 1 and not any(role == "inputs" for role, _ in roles):
        roles["inputs", "train"] = next(iter(arrays))  # one array alone: samples without labels
    found = {
        part: (name, roles.get(("labels", part))) for (role, part), name in roles.items() if role == "inputs"
    }
    if not found:
        shapes = [f"{name} ({_shape(values)})" for name, values in arrays.items()]
        raise LabError(
            f"{path}: holds {some(shapes) or 'nothing'}, where {_PLACES} are looked for. Rename its arrays, "
            "or name that of the labels by data.label."
        )
    return found


# ---- values ----


def _as_inputs(
    values: np.ndarray, name: str, what: str, reading: Reading, notes: list[str]
) -> tuple[str, Columns]:
    """The kind of data that an array is, and it as the column "inputs"."""
    shape, kind = _shape(values), values.dtype.kind
    if 0 not in values.shape[1:] and kind in "biuf":
        if values.ndim == 2:
            inputs = as_floats(values, f"{what}, {name}")
            if reading.sequences:  # a recurrent network reads no table
                notes.append(f"took {name} ({shape}) for sequences of {values.shape[1]} steps, a number each")
                return "sequences", {"inputs": inputs[:, :, None]}
            return "table", {"inputs": inputs}
        floats = values.ndim == 3 and values.dtype != np.uint8
        if floats and reading.sequences:
            notes.append(f"took {name} ({shape}) for sequences of {values.shape[1]} steps")
            return "sequences", {"inputs": as_floats(values, f"{what}, {name}")}
        if values.ndim in (3, 4):
            return "images", {"inputs": as_images(values, what, name, notes)}
    raise LabError(
        f"{what} inputs are {shape} of {values.dtype}, where images are n x height x width (x channels), "
        "tables n x columns, and sequences n x time x features, of numbers. Convert them."
    )


@np.errstate(over="ignore", invalid="ignore")  # what becomes infinite is named later on
def as_floats(values: np.ndarray, where: str, names: Sequence[str] = ()) -> np.ndarray:
    """float32.

    Args:
        values: (n, ...) of numbers.
        where: they are from, for errors.
        names: of the columns, where `values` is (n, columns) and they have any.

    Raises:
        LabError: the numbers of a column differ by less than float32 can tell, as milliseconds since 1970 do.
    """
    floats = values.astype(np.float32)
    if values.dtype.itemsize > 4 and values.ndim > 1 and len(values):
        rows = values.reshape(-1, values.shape[-1])
        for i in range(rows.shape[1]):  # one at a time becomes float64
            exact = rows[:, i].astype(np.float64)
            lost, spread = exact - floats.reshape(rows.shape)[:, i], exact.std()
            if 0 < LARGEST_LOSS * spread < np.sqrt(np.square(lost).mean()) < np.inf:
                name = repr(names[i]) if names else f"column {i + 1}"
                raise LabError(
                    f"{where}: the numbers of {name} lie around {exact.mean():.6g} and differ by {spread:.3g}"
                    ", too little for 32 bits. Subtract a constant from them, or leave them out."
                )
    return floats


def as_images(values: np.ndarray, what: str, name: str, notes: list[str]) -> np.ndarray:
    """Images as (n, channels, height, width) uint8, whatever they were; `notes` get a sentence on it.

    Raises:
        LabError: where white is, or which axis the channels are, cannot be told.
    """
    pixels = _as_bytes(values, what, name, notes)
    if pixels.ndim == 3:
        return pixels[:, None]
    first, height, last = pixels.shape[1:]
    few = [n in (1, 2, 3, 4) for n in (first, last)]
    if few[0] == few[1]:  # neither, or both: then the channels are fewer than rows and columns
        few = [first < min(height, last), last < min(height, first)]
    if few[0] == few[1]:
        raise LabError(
            f"{what} inputs are {_shape(values)}: the second or the last axis could be the channels. Leave "
            "out an axis of length 1, or name a folder of pictures."
        )
    return pixels if few[0] else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _as_bytes(values: np.ndarray, what: str, name: str, notes: list[str]) -> np.ndarray:
    """0 is black and 255 white."""
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8, copy=False)
    if values.dtype == bool:
        notes.append(f"took true in {name} for 255, false for 0")
        return values.astype(np.uint8) * 255
    low, high = values.min(), values.max()
    if not np.isfinite(low) or not np.isfinite(high):
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise LabError(
            f"{what}: inputs of sample {row + 1} of the part is no finite number. Correct or remove it."
        )
    span = f"{values.dtype} from {low:g} to {high:g}"
    if low >= 0 and high <= 255 and (values.dtype.kind in "iu" or (high > 1 and (values % 1 == 0).all())):
        notes.append(f"took {name} ({span}) as bytes, none of them changed")
        return values.astype(np.uint8)
    if values.dtype == np.uint16:
        notes.append(f"took {name} ({span}) for 16 bits a pixel: divided by 257, 65,535 is white")
        return (values // 257).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        notes.append(f"took 1 in {name} ({span}) for white: multiplied by 255 and rounded to bytes")
        return np.rint(values.astype(np.float32, copy=False) * 255).astype(np.uint8)
    raise LabError(
        f"{what} inputs ({name}, {_shape(values)}) are {span}, which does not say where black and white are. "
        "Scale them to 0..1 or, as uint8, to 0..255. (Sequences are for recurrent backbones.)"
    )


def _as_labels(
    found: Mapping[str, np.ndarray], what: str, reading: Reading, notes: list[str]
) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """Labels by part, as classes or as numbers to predict, and the classes' names where these are known.

    Whole numbers, true and false, names, and rows of which one column is 1 are classes, other floats are
    numbers to predict; `reading.predicts` says otherwise where both are possible.
    """
    if not found:
        return {}, ()
    shaped = {part: _plain(values, f"{what}: {part}", notes) for part, values in found.items()}
    numbers = reading.predicts == "numbers"
    every = list(shaped.values())
    if numbers and any(v.dtype.kind not in "biuf" for v in every):
        raise LabError(f"{what}: its labels are texts, and regression predicts numbers. Name another.")
    wide = any(v.ndim > 1 and v.shape[1] > 1 for v in every)
    if not numbers and wide and all(_is_one_hot(v) for v in every):
        notes.append(f"took the column that is 1 of {every[0].shape[1]} for the class of each sample")
        return {part: {"labels": v.argmax(1).astype(np.int64)} for part, v in shaped.items()}, ()
    if wide:
        if all(v.dtype.kind == "f" for v in every) and reading.predicts != "classes":
            numbers = True
        elif not numbers:
            raise LabError(
                f"{what} labels are {_shape(every[0])} of {every[0].dtype}, where each sample has one whole "
                "number, its class, or one column of several that is 1. Convert them."
            )
    if numbers:
        return {
            p: {"targets": as_floats(v.reshape(len(v), -1), f"{what}: labels")} for p, v in shaped.items()
        }, ()
    flat = {part: v.reshape(-1) for part, v in shaped.items()}
    if any(v.dtype.kind in "US" for v in flat.values()):
        texts = {part: [_text(value) for value in v] for part, v in flat.items()}
        classes = tuple(in_order({text for part in texts.values() for text in part}))
        index = {name: i for i, name in enumerate(classes)}
        return {
            part: {"labels": np.array([index[t] for t in v], np.int64)} for part, v in texts.items()
        }, classes
    if all(v.dtype == bool for v in flat.values()):
        return {part: {"labels": v.astype(np.int64)} for part, v in flat.items()}, ("false", "true")
    if any(v.dtype.kind == "f" for v in flat.values()):
        with np.errstate(invalid="ignore"):
            whole = all((v % 1 == 0).all() for v in flat.values())
        if reading.predicts != "classes":
            return {p: {"targets": as_floats(v[:, None], f"{what}: labels")} for p, v in flat.items()}, ()
        if not whole:
            raise LabError(
                f"{what}: its labels are not whole, which no class is. Name others, or learn them with "
                "objective.name=regression."
            )
        notes.append("took whole labels that are stored as floats for classes")
    if {int(value) for v in flat.values() for value in np.unique(v)} == {-1, 1}:  # of support vector machines
        notes.append("took the labels -1 and 1 for names of classes")
        return {part: {"labels": (v == 1).astype(np.int64)} for part, v in flat.items()}, ("-1", "1")
    return {part: {"labels": v.astype(np.int64)} for part, v in flat.items()}, ()


def _plain(values: np.ndarray, what: str, notes: list[str]) -> np.ndarray:
    """Labels (n,) or (n, columns)."""
    if values.ndim > 2 or values.dtype.kind not in "biufUS" or (not values[:1].size and len(values)):
        raise LabError(
            f"{what} labels are {_shape(values)} of {values.dtype}, where each sample has one whole number "
            "or name, its class, or floats. Convert them."
        )
    return values


def _is_one_hot(values: np.ndarray) -> bool:
    return values.dtype.kind in "biuf" and bool(
        (((values == 0) | (values == 1)).all(1) & (values.sum(1) == 1)).all()
    )


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _shape(values: np.ndarray) -> str:
    return " x ".join(map(str, values.shape))
