"""Files that unpack to fill a memory are refused by every reader of data, and those that do not are read."""

import bz2
import gzip
import io
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lab import unpack
from lab.errors import LabError
from rlhf import data as rlhf_data
from supervised.data.config import DataConfig
from supervised.data.sources import read
from tests.arrays import npy, npz

LARGE = 24 * 2**20
SPACES = b" " * LARGE


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "FREELY", 2**20)


def zstd(raw: bytes) -> bytes:
    import pyarrow

    return pyarrow.Codec("zstd").compress(raw, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lambda raw: lzma.compress(raw, preset=0),
    ".bz2": bz2.compress,
}


def png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (3_000, 3_000)).save(file, "PNG")
    return file.getvalue()


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    table = pyarrow.table({"text": ["a" * 300] * 100_000, "label": [1] * 100_000})
    parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def arrow() -> bytes:
    import pyarrow

    file = io.BytesIO()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    table = pyarrow.table({"text": ["a" * 30_000] * 1_000})
    with pyarrow.ipc.new_file(file, table.schema, options=options) as out:
        out.write_table(table)
    return file.getvalue()


IDX = bytes((0, 0, 8, 3)) + np.array([LARGE // 64, 8, 8], ">u4").tobytes() + bytes(LARGE)
BOMBS: dict[str, Callable[[], bytes]] = {
    **{f"a.csv{suffix}": (lambda pack=pack: pack(SPACES)) for suffix, pack in PACKERS.items()},
    "a.csv": lambda: gzip.compress(SPACES),
    "a.npz": lambda: npz(x=np.zeros(LARGE, np.uint8)),
    "many.npz": lambda: npz(**{f"x{i}": np.zeros(LARGE // 16, np.uint8) for i in range(16)}),
    "a.npy": lambda: npy(np.zeros(LARGE, np.uint8))[:200],
    "a.npy.gz": lambda: gzip.compress(npy(np.zeros(LARGE, np.uint8))),
    "a.parquet": parquet,
    "0.png": png,
    "train-images-idx3-ubyte.gz": lambda: gzip.compress(IDX),
    "train-labels-idx1-ubyte": lambda: gzip.compress(IDX),
}
FOLDERS = ("0.png", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_bounded_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BOMBS[name]())
    if name.startswith("train"):
        for other in FOLDERS[1:]:
            if other != name:
                (tmp_path / other).write_bytes(IDX)
    tracemalloc.start()
    with pytest.raises(LabError, match="unpacks to more than 200 times its size") as caught:
        read(DataConfig(source=str(tmp_path if name in FOLDERS else tmp_path / name)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(str(tmp_path / name))
    assert peak < LARGE * 3 // 4 or name == "train-labels-idx1-ubyte"  # its images are in memory


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        *((f"a.jsonl{suffix}", lambda pack=pack: pack(SPACES)) for suffix, pack in PACKERS.items()),
        ("a.csv", lambda: gzip.compress(SPACES)),
        ("a.json", lambda: gzip.compress(SPACES)),
        ("a.txt", lambda: gzip.compress(SPACES)),
        ("a.parquet", parquet),
        ("a.arrow", arrow),
    ],
)
def test_a_bomb_among_the_rows_of_a_recipe(name: str, raw: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw())
    with pytest.raises(LabError, match="unpacks to more than 200 times its size"):
        rlhf_data.prompts(str(tmp_path / name))


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_packed_once_is_read(suffix: str, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 30, 3 * 2**20, np.uint8).tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKERS[suffix](raw))
    assert unpack.read_bytes(path) == raw
    assert unpack.head_of(path) == raw[:512]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.txt", "a.csv", "0.png"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        os.mkfifo(folder / name)
        with pytest.raises(LabError, match="no ordinary file"):
            read(DataConfig(source=str(folder)))
