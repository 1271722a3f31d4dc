"""Images from files: IDX, folders of pictures, .npz."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from lab.errors import LabError, first_line
from supervised.data import frames
from supervised.data.config import DataConfig
from supervised.data.raw import EVALUATION, Columns, Raw, one_each, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


# ---- IDX, the format of MNIST (http://yann.lecun.com/exdb/mnist) ----


def find_idx(folder: Path) -> dict[str, dict[str, Path]]:
    """The IDX files of a folder: part -> "inputs" and "labels" -> file.

    Raises:
        LabError: there are two of one.
    """
    files: list[tuple[tuple[str, str], Path]] = []
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        column = "inputs" if "idx3" in name else "labels" if "idx1" in name else None
        part = next((part for part in ("train", *EVALUATION) if part in name), None)
        if column and part:
            files.append(((part, column), path))
    found: dict[str, dict[str, Path]] = {}
    for (part, column), path in one_each(files).items():
        found.setdefault(part, {})[column] = path
    return found


def read_idx_folder(folder: Path, config: DataConfig, classes: tuple[str, ...] = ()) -> Raw:
    """Images and labels by MNIST's file names, packed or not.

    Raises:
        LabError: a file is missing, damaged, or does not fit its neighbour.
    """
    parts: dict[str, Columns] = {}
    for part, files in find_idx(folder).items():
        for column, number in (("inputs", 3), ("labels", 1)):
            if column not in files:
                raise LabError(f"{folder}: no {part} {column} (a file {part}-*-idx{number}-ubyte). Add it.")
        images, labels = read_idx(files["inputs"], 3), read_idx(files["labels"], 1)
        if len(images) != len(labels):
            raise LabError(
                f"{files['labels']}: {len(labels):,} labels for {len(images):,} images in "
                f"{files['inputs'].name}. Get both files anew."
            )
        if classes and labels.max(initial=0) >= len(classes):
            where = int(labels.argmax())
            raise LabError(
                f"{files['labels']}: label {where + 1} is {labels[where]}, and there are only {len(classes)} "
                "classes. Get the file again."
            )
        parts[part] = {"inputs": images[:, None], "labels": labels.astype(np.int64)}
    if not parts:
        raise LabError(f"{folder}: no files such as train-images-idx3-ubyte. Name another, or data.format.")
    return Raw(kind="images", parts=parts, classes=classes)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes.

    Raises:
        LabError: it is none, or not of so many dimensions, or cut off.
    """
    data = read_bytes(path)
    wanted = bytes((0, 0, 8, dimensions))
    if data[:4] != wanted:
        raise LabError(
            f"{path}: begins with {data[:4].hex() or 'nothing'} where {wanted.hex()} marks "
            f"{'images' if dimensions == 3 else 'labels'} in the IDX format. Name the right file."
        )
    head = 4 + 4 * dimensions
    shape = np.frombuffer(data[:head].ljust(head, b"\0"), ">u4")[1:].tolist()
    there = len(data) - head
    if there != math.prod(shape) or 0 in shape[1:]:
        raise LabError(
            f"{path}: holds {max(there, 0):,} bytes where its head says {' x '.join(map(str, shape))}. "
            "Get the file again."
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


# ---- folders of pictures ----


def holds_pictures(folder: Path) -> bool:
    """Whether there is a picture somewhere below a folder."""
    return any(_pictures(folder.rglob("*")))


def holds_classes(folder: Path) -> bool:
    """Whether there are pictures in two or more folders below a folder."""
    return len({path.parent for path in _pictures(folder.rglob("*"))} - {folder}) > 1


def read_image_folder(folder: Path, config: DataConfig) -> Raw:
    """Pictures in a folder per class, these in folders train, test ... or all in one.

    Raises:
        LabError: there is no picture, one cannot be opened, or they differ in size and `img_size` is not set.
    """
    inside = _folders(folder)
    roots = {path.name.lower(): path for path in inside if path.name.lower() in ("train", *EVALUATION)}
    roots = roots if "train" in roots else {"train": folder}
    classes = tuple(path.name for path in _folders(roots["train"]))
    parts: dict[str, Columns] = {}
    for part, root in roots.items():
        files: list[Path] = []
        labels: list[int] = []
        for path in _folders(root):
            if path.name not in classes:
                raise LabError(
                    f"{path}: the class {path.name!r} is not among those of {roots['train']}. Move it."
                )
            pictures = sorted(_pictures(path.rglob("*")))
            if not pictures:
                raise LabError(
                    f"{path}: holds no picture ({', '.join(PICTURES)}). Fill or remove the folder."
                )
            files += pictures
            labels += [classes.index(path.name)] * len(pictures)
        if not files:  # without classes, for what learns from the images alone
            files = sorted(_pictures(root.iterdir()))
        if not files:
            raise LabError(f"{root}: holds no picture ({', '.join(PICTURES)}). Name another folder.")
        columns: Columns = {"inputs": read_pictures(files, config)}
        parts[part] = columns | ({"labels": np.array(labels, np.int64)} if labels else {})
    return Raw(kind="images", parts=parts, classes=classes)


def read_pictures(
    items: Iterable[Any],
    config: DataConfig,
    opened: Callable[[Any], "Image"] | None = None,
    name: Callable[[Any], str] = str,
) -> np.ndarray:
    """Pictures as (n, channels, height, width) uint8, scaled and cropped to `img_size` if that is set.

    Raises:
        LabError: one cannot be opened, they differ in size, or are too many for the memory.
    """
    items = list(items)

    def read(item: Any) -> np.ndarray:
        return _pixels(open_picture(item, opened, name), config)

    # Pillow lets go of the interpreter while it decodes. What it warns of, an error tells.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        if config.img_size:
            check_memory((len(items), 1 if config.grayscale else 3, config.img_size, config.img_size), config)
        first = read(items[0])
        check_memory((len(items), *first.shape), config)
        images = np.empty((len(items), *first.shape), np.uint8)
        for i, pixels in enumerate(pool.map(read, items)):
            if pixels.shape != first.shape:
                sizes = [" x ".join(map(str, a.shape[1:])) for a in (pixels, first)]
                raise LabError(
                    f"{name(items[i])}: is {sizes[0]} pixels, and {name(items[0])} is {sizes[1]}. "
                    "Set data.img_size to bring all to one size."
                )
            images[i] = pixels
    return images


def check_memory(shape: tuple[int, ...], config: DataConfig) -> None:
    """Of images as (n, channels, height, width) uint8.

    Raises:
        LabError: they are too many or too large for what is free.
    """
    needed, free = math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise LabError(
            f"{config.source}: {shape[0]:,} images of {' x '.join(map(str, shape[1:]))} take "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free. Make data.img_size smaller."
        )


def open_picture(
    item: Any, opened: Callable[[Any], "Image"] | None = None, name: Callable[[Any], str] = str
) -> "Image":
    """A picture, decoded and upright: a file, or what `opened` makes of an item.

    Raises:
        LabError: it cannot be opened, or has 32 bits a pixel.
    """
    from PIL import Image, ImageOps

    try:
        with (opened or Image.open)(item) as picture:
            upright = ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's formats and pyarrow: each has its own
        reason = "no picture" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        raise LabError(
            f"{name(item)}: cannot be opened: {reason.rstrip('.')}. Restore or remove it."
        ) from None
    # Of a PNG or PGM, "I" are 16 bits.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        raise LabError(
            f"{name(item)}: has 32 bits a pixel, which do not say where white is. Save it with 8 or 16 bits."
        )
    return upright


def _pixels(picture: "Image", config: DataConfig) -> np.ndarray:
    """(channels, height, width) uint8."""
    from PIL import Image, ImageOps

    if picture.mode.startswith("I"):  # 16 bits, all of which but the lowest 255 Pillow would call white
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    picture = picture.convert("L" if config.grayscale else "RGB")
    if config.img_size:
        picture = ImageOps.fit(picture, (config.img_size, config.img_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if config.grayscale else pixels.transpose(2, 0, 1)


def _pictures(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.suffix.lower() in PICTURES and not path.is_dir())


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


# ---- .npz ----

_INPUTS, _LABELS = ("images", "inputs", "x", "data"), ("labels", "targets", "y", "label", "target")


@np.errstate(over="ignore")  # to float32: what becomes infinite is named later on
def read_npz(path: Path, config: DataConfig) -> Raw:
    """Arrays of images (uint8, channels first or last, or none) or of a table (a sample is one row).

    Names are {images, labels} or {x, y}; of parts {x_train, y_train, x_test, ...} or {train_images, ...}.

    Raises:
        LabError: it is damaged, or holds none of these.
    """
    try:
        with path.open("rb") as opened:
            if not (head := opened.read(4)).startswith((b"PK\3\4", b"PK\5\6", b"\x93NUM", b"\x80")):
                raise LabError(f"begins with {head.hex() or 'nothing'}")  # numpy would call it a pickle
            opened.seek(0)
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise LabError("one array without a name (save it with np.savez)")
            arrays = {name: np.atleast_1d(file[name]) for name in file.files}
    except Exception as error:  # zip, zlib, numpy: each has its own
        if "pickle" in str(error):
            raise LabError(
                f"{path}: not an .npz file of plain arrays: objects, which only pickle can read, are never "
                "loaded, for that runs code. Save its arrays as numbers."
            ) from None
        raise LabError(f"{path}: not a readable .npz file: {first_line(error)}. Get it again.") from None
    if frames.is_record(arrays):
        return frames.as_record(arrays, path)
    parts: dict[str, Columns] = {}
    kinds = set()
    for part in ("train", *EVALUATION):
        inputs, labels = (_named(arrays, part, names) for names in (_INPUTS, _LABELS))
        if inputs is None:
            continue
        if labels is not None and len(inputs) != len(labels):
            raise LabError(
                f"{path}: {len(labels):,} labels for {len(inputs):,} inputs in {part}. Make it anew."
            )
        kinds.add("table" if inputs.ndim == 2 else "images")
        parts[part] = {"inputs": _as_inputs(inputs, f"{path}: {part}")} | _as_labels(
            labels, f"{path}: {part}"
        )
    if not parts or len(kinds) > 1:
        raise LabError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}, where images and labels, x and y, or "
            "x_train, y_train, x_test and y_test are looked for. Rename its arrays."
        )
    return Raw(kind=kinds.pop(), parts=parts)


def _named(arrays: dict[str, np.ndarray], part: str, names: tuple[str, ...]) -> np.ndarray | None:
    for name in names:
        for key in (f"{part}_{name}", f"{name}_{part}", *([name] if part == "train" else [])):
            if key in arrays:
                return arrays[key]
    return None


def _as_inputs(values: np.ndarray, what: str) -> np.ndarray:
    filled = 0 not in values.shape[1:]
    if filled and values.ndim == 2 and values.dtype.kind in "fiu":
        return values.astype(np.float32)
    if filled and values.ndim == 3 and values.dtype == np.uint8:
        return values[:, None]
    if filled and values.ndim == 4 and values.dtype == np.uint8:
        return values if values.shape[1] in (1, 3, 4) else np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    shape = " x ".join(map(str, values.shape))
    raise LabError(
        f"{what} inputs are {shape} of {values.dtype}, where images are n x height x width (x channels) of "
        "uint8, and tables n x columns of numbers. Convert them."
    )


def _as_labels(values: np.ndarray | None, what: str) -> Columns:
    """Whole numbers are classes, others are numbers to predict."""
    if values is None:
        return {}
    if values.dtype.kind in "iu" and values.size == len(values):
        return {"labels": values.reshape(-1).astype(np.int64)}
    if values.dtype.kind == "f" and values.ndim <= 2 and values.size:
        return {"targets": values.reshape(len(values), -1).astype(np.float32)}
    shape = " x ".join(map(str, values.shape))
    raise LabError(
        f"{what} labels are {shape} of {values.dtype}, where each sample has one whole number, its class, or "
        "floats. Convert them."
    )
