"""Frames of a game, each of them once; samples are so many in a row as an agent sees at once."""

from pathlib import Path

import numpy as np

from lab.errors import LabError
from supervised.data.config import DataConfig
from supervised.data.raw import Raw


def read_stacks(arrays: dict[str, np.ndarray], path: Path, config: DataConfig) -> Raw:
    """What a file of frames holds; the end of it is held out, since frames that follow each other are alike.

    Args:
        arrays: "frames" uint8 (steps, height, width) and, if there is more than one game, "begins" bool
            (steps,): True where a frame does not follow the one before it.
        path: of the file, for errors.
        config: says which share is held out, and how many frames there are at most.

    Raises:
        LabError: they are something else, or too few.
    """
    frames = arrays["frames"]
    begins = arrays.get("begins", np.zeros(len(frames), bool))
    if frames.dtype != np.uint8 or frames.ndim != 3:
        raise LabError(
            f"{path}: frames are {' x '.join(map(str, frames.shape))} of {frames.dtype}, where steps x "
            "height x width of uint8 are needed. Record them anew."
        )
    if begins.dtype != bool or begins.shape != frames.shape[:1]:
        raise LabError(
            f"{path}: begins is {' x '.join(map(str, begins.shape))} of {begins.dtype}, where it says of "
            f"each of {len(frames):,} frames, true or false, whether a game begins. Record them anew."
        )
    border = round(len(frames) * (1 - config.held_out))
    parts = {}
    for part, rows in (("train", slice(0, border)), ("test", slice(border, None))):
        columns = {"frames": frames[rows][: config.limit], "begins": begins[rows][: config.limit]}
        if not len(whole_stacks(columns["begins"], config.stack)):
            raise LabError(
                f"{path}: the {'training' if part == 'train' else 'held-out'} part has "
                f"{len(columns['frames']):,} frames, nowhere {config.stack} of one game in a row. Record "
                "more, or make data.stack smaller."
            )
        parts[part] = columns
    return Raw(kind="stacks", parts=parts)


def whole_stacks(begins: np.ndarray, size: int) -> np.ndarray:
    """Where `size` frames in a row are of one game: the first of each, int64, by (frames,) bool."""
    count = np.cumsum(begins)  # equal at both ends: no game began between them
    last = len(begins) - size + 1
    return np.flatnonzero(count[:last] == count[size - 1 :]) if last > 0 else np.empty(0, np.int64)
