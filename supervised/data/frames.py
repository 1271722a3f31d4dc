"""Records of play: frames, actions, and where games begin, as `lab frames` writes them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lab.errors import LabError
from supervised.data.raw import Columns, Raw

COLUMNS = ("frames", "actions", "begins")


def is_record(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the arrays of an .npz are a record of play, or the most part of one."""
    return "frames" in arrays and ("actions" in arrays or "begins" in arrays)


def as_record(arrays: Mapping[str, np.ndarray], path: Path) -> Raw:
    """The arrays of an .npz as a record of play.

    Raises:
        LabError: one is missing, of another shape or type, or an action has no name.
    """
    if missing := [name for name in COLUMNS if name not in arrays]:
        raise LabError(f"{path}: a record of play without {missing[0]!r}. Make it anew with `lab frames`.")
    frames, actions, begins = (arrays[name] for name in COLUMNS)
    if frames.ndim != 3 or frames.dtype != np.uint8:
        shape = " x ".join(map(str, frames.shape))
        raise LabError(
            f"{path}: frames are {shape} of {frames.dtype}, where steps x height x width of uint8 are "
            "needed. Make it anew with `lab frames`."
        )
    n = len(frames)
    for name, array, kinds in (("actions", actions, "iu"), ("begins", begins, "b")):
        if array.shape != (n,) or array.dtype.kind not in kinds:
            raise LabError(
                f"{path}: {name} are {' x '.join(map(str, array.shape))} of {array.dtype}, for {n:,} frames. "
                "Make it anew with `lab frames`."
            )
    if not n:
        raise LabError(f"{path}: holds no frames. Record some with `lab frames`.")
    low, high = int(actions.min()), int(actions.max())
    names = tuple(map(str, arrays["action_meanings"])) if "action_meanings" in arrays else ()
    names = names or tuple(map(str, range(high + 1)))
    if low < 0 or high >= len(names):
        raise LabError(
            f"{path}: there is an action {low if low < 0 else high}, and {len(names)} have a name, from 0 "
            "on. Make it anew with `lab frames`."
        )
    begins = begins.copy()
    begins[0] = True
    columns: Columns = {"frames": frames, "actions": actions.astype(np.int64), "begins": begins}
    return Raw(kind="frames", parts={"train": columns}, classes=names)


def hold_out(columns: Columns, share: float) -> tuple[Columns, Columns]:
    """The record without its last stretches, and these: whole ones, about `share` of all frames and at least
    one. Of a single stretch the end is held out."""
    begins, n = np.flatnonzero(columns["begins"]), len(columns["frames"])
    wanted = n * (1 - share)
    inner = begins[1:]
    border = int(inner[np.abs(inner - wanted).argmin()]) if len(inner) else round(wanted)
    train, test = (
        {name: values[rows] for name, values in columns.items()}
        for rows in (slice(None, border), slice(border, None))
    )
    if len(test["begins"]):
        test["begins"] = test["begins"].copy()
        test["begins"][0] = True
    return train, test
