"""Data sets that are there by name: scikit-learn's, Fashion-MNIST where installed, Python's own library."""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import LabError
from supervised.data import made
from supervised.data.catch import catch
from supervised.data.config import DataConfig
from supervised.data.files import read_text
from supervised.data.images import check_memory, find_idx, open_picture, read_idx_folder
from supervised.data.library import library_files
from supervised.data.raw import Columns, Raw

FASHION = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PATCH = 64


def digits(config: DataConfig) -> Raw:
    """1,797 digits of 8 x 8 pixels (scikit-learn's, UCI's test part); `img_size` repeats pixels.

    Raises:
        LabError: they are too large for the memory.
    """
    data = _sklearn("load_digits")
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    if config.img_size:
        check_memory((len(images), 1, config.img_size, config.img_size), config)
        nearest = np.arange(config.img_size) * 8 // config.img_size
        images = images[:, :, nearest[:, None], nearest]
    parts: dict[str, Columns] = {"train": {"inputs": images, "labels": data.target.astype(np.int64)}}
    return Raw(kind="images", parts=parts, classes=tuple("0123456789"))


def photographs(config: DataConfig) -> Raw:
    """Square patches of scikit-learn's two photographs, 427 x 640 pixels; held out are the right-hand sides.

    Patches to learn from overlap by half, held-out ones do not overlap.

    Raises:
        LabError: `img_size` is too large for that.
    """
    side = config.img_size or PATCH
    train, test = [], []
    for photograph in _sklearn("load_sample_images").images:
        pixels = photograph.transpose(2, 0, 1)
        border = round(pixels.shape[2] * (1 - config.held_out))
        train += _patches(pixels[:, :, :border], side, max(1, side // 2))
        test += _patches(pixels[:, :, border:], side, side)
    if not train or not test:
        raise LabError(
            f"data.img_size = {side}: no such patch fits into the photographs' training and held-out sides. "
            "Make it smaller."
        )
    return Raw(
        kind="images", parts={"train": {"inputs": np.stack(train)}, "test": {"inputs": np.stack(test)}}
    )


def more_photographs(config: DataConfig) -> Raw:
    """Square patches of scikit-learn's and scikit-image's photographs in colour; two of them are held out.

    Patches to learn from overlap by half, held-out ones do not overlap.

    Raises:
        LabError: scikit-image is not installed, or `img_size` is too large.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise LabError(
            "data.source = 'more_photographs': most are scikit-image's. Run `pip install scikit-image`, "
            "or use photographs."
        )
    folder, side = Path(found.origin).parent / "data", config.img_size or PATCH
    china, flower = (image.transpose(2, 0, 1) for image in _sklearn("load_sample_images").images)
    astronaut, motorcycle, rocket, cat, coffee = (
        np.asarray(open_picture(folder / name).convert("RGB")).transpose(2, 0, 1)
        for name in ("astronaut.png", "motorcycle_left.png", "rocket.jpg", "chelsea.png", "coffee.png")
    )
    photographs = {"train": (china, flower, motorcycle, rocket, cat), "test": (astronaut, coffee)}
    parts: dict[str, Columns] = {}
    for part, step in (("train", max(1, side // 2)), ("test", side)):
        patches = [patch for pixels in photographs[part] for patch in _patches(pixels, side, step)]
        if not patches:
            raise LabError(f"data.img_size = {side}: no photograph is so large. Make it smaller.")
        parts[part] = {"inputs": np.stack(patches)}
    return Raw(kind="images", parts=parts)


def table(loader: str, config: DataConfig, **options: Any) -> Raw:
    """A table of scikit-learn, to classify or to predict numbers from."""
    data = _sklearn(loader, **options)
    columns: Columns = {"inputs": data.data.astype(np.float32)}
    names = tuple(map(str, data.get("target_names", ())))
    if names:
        columns["labels"] = data.target.astype(np.int64)
    else:
        columns["targets"] = data.target.astype(np.float32)[:, None]
    return Raw(kind="table", parts={"train": columns}, classes=names)


def swiss_roll(config: DataConfig) -> Raw:
    """10,000 points of a spiral in the plane: scikit-learn's roll from its end, as in arXiv 1503.03585."""
    points, _ = _sklearn("make_swiss_roll", n_samples=10_000, noise=0.5, random_state=0)
    return Raw(kind="table", parts={"train": {"inputs": points[:, [0, 2]].astype(np.float32)}})


def fashion_mnist(config: DataConfig) -> Raw:
    """70,000 pieces of clothing, 28 x 28 pixels, from Debian's package, $LAB_DATA or the Hub.

    Raises:
        LabError: it is in none of these places.
    """
    places = [Path(os.environ["LAB_DATA"]) / "fashion_mnist"] if os.environ.get("LAB_DATA") else []
    for folder in (*places, DEBIAN):
        if folder.is_dir() and find_idx(folder):
            return read_idx_folder(folder, config, classes=FASHION)
    from supervised.data.hub import read_hub

    try:
        return read_hub("zalando-datasets/fashion_mnist", config)
    except LabError:
        raise LabError(
            "data.source = 'fashion_mnist': not here, and the Hub does not answer. Get it by `apt install "
            "dataset-fashion-mnist`, or put its four .gz files into $LAB_DATA/fashion_mnist."
        ) from None


def python_library(config: DataConfig) -> Raw:
    """The sources of this Python's standard library, without its tests; a file is a document."""
    texts = [read_text(path) for path in library_files()[1]]
    return Raw(kind="text", parts={"train": {"text": [text for text in texts if text]}})


READERS: dict[str, Callable[[DataConfig], Raw]] = {
    "breast_cancer": partial(table, "load_breast_cancer"),
    "catch": catch,
    "diabetes": partial(table, "load_diabetes", scaled=False),
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "more_photographs": more_photographs,
    "iris": partial(table, "load_iris"),
    "number_words": made.number_words,
    "photographs": photographs,
    "python_library": python_library,
    "python_next_line": made.python_next_line,
    "python_origin": made.python_origin,
    "python_same_file": made.python_same_file,
    "swiss_roll": swiss_roll,
    "wine": partial(table, "load_wine"),
}


def _sklearn(loader: str, **options: Any) -> Any:
    from sklearn import datasets

    return getattr(datasets, loader)(**options)


def _patches(pixels: np.ndarray, side: int, step: int) -> list[np.ndarray]:
    _, height, width = pixels.shape
    return [
        pixels[:, y : y + side, x : x + side]
        for y in range(0, height - side + 1, step)
        for x in range(0, width - side + 1, step)
    ]
