"""Images from files: IDX, folders of pictures."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.errors import LabError, first_line
from lab.memory import require_memory
from lab.unpack import read_bytes, require_growth
from supervised.data.config import DataConfig
from supervised.data.raw import (
    PICTURES,
    Columns,
    Raw,
    Reading,
    folder_kind,
    in_order,
    one_each,
    part_kind,
    say_droppings,
    some,
    visible,
)

if TYPE_CHECKING:
    from PIL.Image import Image


# ---- IDX, the format of MNIST (http://yann.lecun.com/exdb/mnist) ----


def find_idx(folder: Path) -> dict[str, dict[str, Path]]:
    """The IDX files of a folder: part -> "inputs" and "labels" -> file.

    Raises:
        LabError: there are two of one.
    """
    files: list[tuple[tuple[str, str], Path]] = []
    for path in visible(folder):
        name = path.name.lower()
        column = "inputs" if "idx3" in name else "labels" if "idx1" in name else None
        # emnist-letters-train-images-idx3-ubyte has its part within.
        part = next((word for word in name.split("-") if part_kind(word)), None)
        if column and part:
            files.append(((part, column), path))
    found: dict[str, dict[str, Path]] = {}
    for (part, column), path in one_each(files).items():
        found.setdefault(part, {})[column] = path
    return found


def read_idx_folder(
    folder: Path, config: DataConfig, reading: Reading | None = None, classes: tuple[str, ...] = ()
) -> Raw:
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
    return Raw(kind="images", parts=parts, classes=classes, notes=say_droppings(folder))


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
    return bool(pictures_below(folder))


def holds_classes(folder: Path) -> bool:
    """Whether there are pictures in two or more folders below a folder."""
    return len({path.parent for path in pictures_below(folder)} - {folder}) > 1


def read_image_folder(folder: Path, config: DataConfig, reading: Reading | None = None) -> Raw:
    """Pictures in a folder per class, these in folders train, validation, test (as `PARTS` has them) or all
    in one. What lies deeper belongs to the class, as torchvision's ImageFolder has it.

    Raises:
        LabError: the layout is not clear, there is no picture, one cannot be opened, or they differ in size
            and `img_size` is not set.
    """
    notes = say_droppings(folder)
    roots = _parts_of(folder, notes)
    lead = next(part for part in roots if part_kind(part) == "train")
    classes = tuple(in_order(path.name for path in _folders(roots[lead])))
    listed = {part: _files_of(root, classes, roots[lead], notes) for part, root in roots.items()}
    if classes:
        for part in [part for part, (_, labels) in listed.items() if not labels]:
            n = len(listed.pop(part)[0])
            notes.append(f"left out {n:,} pictures of {part}, which are of no class")
    parts: dict[str, Columns] = {}
    for part, (files, labels) in listed.items():
        inputs, kept = read_pictures(files, config, notes)
        parts[part] = {"inputs": inputs} | ({"labels": np.array(labels, np.int64)[kept]} if labels else {})
    require_one_size(folder, parts)
    return Raw(kind="images", parts=parts, classes=classes, notes=list(dict.fromkeys(notes)))


def _parts_of(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Part -> the folder that holds its classes, or its pictures.

    Raises:
        LabError: some folders are named after parts and others not, or none of them is for training.
    """
    inside = [path for path in _folders(folder) if pictures_below(path)]
    loose = pictures_below(folder, deep=False)
    if len(inside) == 1 and not loose and folder_kind(inside[0].name) is None and _folders(inside[0]):
        notes.append(f"{folder.name} holds nothing but {inside[0].name}: looked in there")
        return _parts_of(inside[0], notes)
    kinds = {path: folder_kind(path.name) for path in inside}
    named = [path for path, kind in kinds.items() if kind]
    if not named:
        _refuse_the_same_in_each(inside, folder)
        if loose and inside:
            notes.append(f"left out {len(loose):,} pictures beside the folders of the classes")
        return {"train": folder}
    others = [path.name for path, kind in kinds.items() if not kind]
    if others or not any(kind == "train" for kind in kinds.values()):
        seen = some([path.name for path in named]) + (f" and {some(others)}" if others else "")
        why = "some are named after parts, others not" if others else "none of them is to train on"
        raise LabError(
            f"{folder}: holds the folders {seen}: {why}. Parts are called train, val and test and hold the "
            "classes' folders; if these here are classes, put them all into one folder called train."
        )
    if loose:
        notes.append(f"left out {len(loose):,} pictures beside the folders of the parts")
    roots = {_part_name(path.name, kinds[path] or ""): _unwrapped(path) for path in named}
    to_train = [path for path in named if kinds[path] == "train"]
    if len(roots) < len(named) or len(to_train) > 1:
        raise LabError(
            f"{folder}: of {some([path.name for path in named])}, two are one part. Merge or rename them."
        )
    return roots


def _part_name(name: str, kind: str) -> str:
    """A part's name, which `part_kind` must know: seg_train becomes train."""
    return name.lower() if part_kind(name) == kind else kind


def _unwrapped(root: Path) -> Path:
    """Of seg_train/seg_train/buildings the inner folder: a part within a folder of its name."""
    inside = _folders(root)
    same = len(inside) == 1 and folder_kind(inside[0].name) == folder_kind(root.name)
    return inside[0] if same and not pictures_below(root, deep=False) else root


def _refuse_the_same_in_each(folders: list[Path], root: Path) -> None:
    """Raises if two folders hold folders of the same names: these, it seems, are the classes."""
    inside = [{path.name for path in _folders(folder) if pictures_below(path)} for folder in folders]
    if len(folders) > 1 and len(set.union(*inside)) > 1 and all(names == inside[0] for names in inside):
        raise LabError(
            f"{root}: {some([path.name for path in folders])} each hold the folders "
            f"{some(sorted(inside[0]))}: which are the classes? "
            "Name the parts train, val and test, or put each class into one folder."
        )


def _files_of(
    root: Path, classes: tuple[str, ...], lead: Path, notes: list[str]
) -> tuple[list[Path], list[int]]:
    """The pictures of a part and, unless they lie there without, their classes."""
    files: list[Path] = []
    labels: list[int] = []
    for path in _folders(root):
        if path.name not in classes:
            raise LabError(f"{path}: the class {path.name!r} is not among those of {lead}. Move it.")
        pictures = pictures_below(path)
        if not pictures:
            raise LabError(f"{path}: holds no picture ({', '.join(PICTURES)}). Fill or remove the folder.")
        files += pictures
        labels += [classes.index(path.name)] * len(pictures)
    if not files:  # without classes, for what learns from the images alone
        files = pictures_below(root, deep=False)
    if not files:
        raise LabError(f"{root}: holds no picture ({', '.join(PICTURES)}). Name another folder.")
    taken = set(files)
    others = [path for path in visible(root, deep=True) if path.is_file() and path not in taken]
    others = [path for path in others if not labels or path.parent != root]
    if others:
        kinds = sorted({path.suffix.lower() or path.name for path in others})
        notes.append(f"left out {len(others):,} files of {root.name} that are no pictures ({some(kinds)})")
    return files, labels


def read_pictures(
    items: Iterable[Any],
    config: DataConfig,
    notes: list[str],
    opened: Callable[[Any], "Image"] | None = None,
    name: Callable[[Any], str] = str,
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures as (n, channels, height, width) uint8, scaled and cropped to `img_size` if that is set, and
    the numbers (n,) of the items that they are: all, or with data.bad_rows=skip those that can be opened.

    Raises:
        LabError: some cannot be opened, they differ in size, or are too many for the memory.
    """
    items = list(items)

    def read(item: Any) -> np.ndarray | LabError:
        try:
            picture = open_picture(item, opened, name)
        except LabError as error:
            return error
        try:
            return _pixels(picture, config)
        except ValueError:  # Pillow has no way from such colours to these
            return LabError(f"{name(item)}: has colours in {picture.mode}. Save it in RGB or grey.")

    kept: list[int] = []
    bad: list[LabError] = []
    # Pillow lets go of the interpreter while it decodes. What it warns of, an error tells.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        if config.img_size:
            check_memory((len(items), 1 if config.grayscale else 3, config.img_size, config.img_size), config)
        first = next((pixels for item in items if not isinstance(pixels := read(item), LabError)), None)
        shape = (0, 0, 0) if first is None else first.shape
        check_memory((len(items), *shape), config)
        images = np.empty((len(items), *shape), np.uint8)
        for i, pixels in enumerate(pool.map(read, items)):
            if isinstance(pixels, LabError):
                bad.append(pixels)
                continue
            if pixels.shape != images.shape[1:]:
                sizes = [" x ".join(map(str, shape[1:])) for shape in (pixels.shape, images.shape[1:])]
                raise LabError(
                    f"{name(items[i])}: is {sizes[0]} pixels, and {name(items[kept[0]])} is {sizes[1]}. "
                    "Set data.img_size to bring all to one size."
                )
            images[len(kept)] = pixels
            kept.append(i)
    if bad and (config.bad_rows == "error" or not kept):
        n = f" So are {len(bad):,} of {len(items):,}." if len(bad) > 1 else ""
        raise LabError(f"{bad[0]}{n} data.bad_rows=skip leaves out what cannot be read.")
    if bad:
        notes.append(f"left out {len(bad):,} of {len(items):,} pictures, the first for: {bad[0]}")
    return images[: len(kept)], np.array(kept, np.int64)


def require_one_size(folder: Path, parts: Mapping[str, Columns]) -> None:
    """Raises unless the pictures of all parts are of one size.

    Raises:
        LabError: they are not.
    """
    sizes = {shape: part for part, columns in parts.items() if (shape := columns["inputs"].shape[1:])}
    if len(sizes) > 1:
        raise LabError(
            f"{folder}: its parts differ in size: "
            + "; ".join(f"{part} {' x '.join(map(str, shape[1:]))}" for shape, part in sizes.items())
            + ". Set data.img_size to bring all to one size."
        )


def check_memory(shape: tuple[int, ...], config: DataConfig) -> None:
    """Of images as (n, channels, height, width) uint8.

    Raises:
        LabError: they are too many or too large for what is free.
    """
    require_memory(
        2 * math.prod(shape),  # once more while parts are held out
        f"{config.source}: {shape[0]:,} images of {' x '.join(map(str, shape[1:]))} take",
        "Make data.img_size smaller.",
    )


def open_picture(
    item: Any, opened: Callable[[Any], "Image"] | None = None, name: Callable[[Any], str] = str
) -> "Image":
    """A picture, decoded and upright: a file, or what `opened` makes of an item.

    Raises:
        LabError: it cannot be opened, says that it is far larger than its file, or has 32 bits a pixel.
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(item, Path) and item.exists() and not item.is_file():  # a pipe would be waited for
            raise OSError("no ordinary file")
        with (opened or Image.open)(item) as picture:
            if (file := getattr(picture, "fp", None)) is not None:  # not decoded so far
                at, packed = file.tell(), file.seek(0, 2)
                file.seek(at)
                require_growth(math.prod(picture.size) * len(picture.getbands()), packed, name(item))
            upright = ImageOps.exif_transpose(picture)
    except LabError:
        raise
    except Exception as error:  # Pillow's formats and pyarrow: each has its own
        reason = "no picture" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
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


def pictures_below(folder: Path, deep: bool = True) -> list[Path]:
    """The pictures in a folder, by their suffix, and those in the folders in it; sorted."""
    return [path for path in visible(folder, deep) if path.suffix.lower() in PICTURES and not path.is_dir()]


def _folders(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.is_dir()]
