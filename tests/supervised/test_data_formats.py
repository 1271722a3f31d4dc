"""Files as people have them, and what is read of each: a table of both."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from lab.errors import LabError
from supervised.data import DataSet, load
from supervised.data.config import DataConfig
from supervised.data.files import read_text
from supervised.data.raw import Reading, folder_kind, part_kind
from tests.arrays import npy, npz

RNG = np.random.default_rng(0)
CLASSES, NUMBERS = Reading(predicts="classes"), Reading(predicts="numbers")
SEQUENCES = Reading(predicts="classes", sequences=True)
N = 40
TABLE = RNG.normal(size=(N, 3)).round(3)
KINDS = np.arange(N) % 2
IMAGES = RNG.integers(0, 256, (N, 6, 5), np.uint8)
NAMES = np.array(["cat", "dog"])[KINDS]


def read(path: Path, reading: Reading = CLASSES, **settings: Any) -> DataSet:
    return load(DataConfig(source=str(path), **settings), reading=reading)


def error(path: Path, reading: Reading = CLASSES, **settings: Any) -> str:
    with pytest.raises(LabError) as caught:
        read(path, reading, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# ---- the files ----


def rows(header: Sequence[str] | None = ("a", "b", "c", "label"), label: Any = KINDS) -> list[list[Any]]:
    body = [[*map(float, row), kind] for row, kind in zip(TABLE, label, strict=True)]
    return ([list(header)] if header else []) + body


def as_csv(table: Sequence[Sequence[Any]], **options: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(table)
    return text.getvalue().encode()


def records() -> list[dict[str, Any]]:
    return [dict(zip(rows()[0], [*r[:3], int(r[3])], strict=True)) for r in rows()[1:]]


def parquet(**columns: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet as arrow

    file = io.BytesIO()
    arrow.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def png(value: int = 200, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (6, 5), value if mode in "LP" else (value,) * len(mode)).save(file, kind)
    return file.getvalue()


def folders(*names: str, n: int = 5) -> dict[str, bytes]:
    return {f"{name}/{i}.png": png(40 * i) for name in names for i in range(n)}


@dataclass
class Case:
    """Files, what is asked for, and what they are read as."""

    files: dict[str, bytes]
    kind: str
    n_train: int
    n_test: int
    shape: tuple[int, ...] = ()
    classes: int = 2
    says: str = ""
    """Within a note."""
    reading: Reading = CLASSES
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    """Which of the files is named; empty: the only one, or their folder."""


def table(name: str, data: bytes, **more: Any) -> Case:
    return Case({name: data}, "table", 32, 8, **{"shape": (3,), **more})


def images(name: str, data: bytes, **more: Any) -> Case:
    return Case({name: data}, "images", 32, 8, **{"shape": (1, 6, 5), **more})


def named(
    column: str | None,
    label: str | None,
    form: str = "{}.png",
    of: Any = KINDS,
    n: int = N,
    more: Sequence[tuple[str, Any]] = (),
    **options: Any,
) -> bytes:
    """A table that names pictures 0.png and on; `more`: columns of one value, or a list again and again."""
    header = [] if column is None else [[column, label, *(name for name, _ in more)]]
    values = [[v] if isinstance(v, str) else v for _, v in more]
    body = [[form.format(i), of[i], *(v[i % len(v)] for v in values)] for i in range(n)]
    return as_csv([*header, *body], **options)


def pictured(
    tables: dict[str, bytes],
    at: str = "",
    sizes: tuple[int, int] = (32, 8),
    more: dict[str, bytes] | None = None,
    **rest: Any,
) -> Case:
    """Pictures 0.png and on in a folder, with tables beside them."""
    files = {f"{at}{i}.png": png(6 * i) for i in range(N)}
    return Case({**files, **tables, **(more or {})}, "images", *sizes, **{"shape": (3, 5, 6), **rest})


HEADLESS = as_csv(rows(None))
FLOATS = IMAGES / 255
SPLIT = {"X_train": TABLE[:30], "y_train": KINDS[:30], "X_test": TABLE[30:], "y_test": KINDS[30:]}

READ: dict[str, Case] = {
    # CSV
    "csv": table("a.csv", as_csv(rows()), says="label is the label, of 2 classes"),
    "csv of Excel, with a mark and CRLF": table("a.csv", b"\xef\xbb\xbf" + as_csv(rows())),
    "csv with unix line ends": table("a.csv", as_csv(rows(), lineterminator="\n")),
    "csv with quotes around everything": table("a.csv", as_csv(rows(), quoting=csv.QUOTE_ALL)),
    "csv with semicolons": table("a.csv", as_csv(rows(), delimiter=";")),
    "csv with decimal commas": table(
        "a.csv", as_csv(rows(), delimiter=";").replace(b".", b","), says="commas within numbers for decimal"
    ),
    "csv with tabs": table("a.csv", as_csv(rows(), delimiter="\t")),
    "csv with pipes": table("a.csv", as_csv(rows(), delimiter="|")),
    "csv in UTF-16": table("a.csv", as_csv(rows()).decode().encode("utf-16")),
    "csv.gz": table("a.csv.gz", gzip.compress(as_csv(rows()))),
    "csv.bz2": table("a.csv.bz2", bz2.compress(as_csv(rows()))),
    "csv.xz": table("a.csv.xz", lzma.compress(as_csv(rows()))),
    "csv.zst": table("a.csv.zst", zstd(as_csv(rows()))),
    "csv by pandas, with its index": table(
        "a.csv",
        as_csv([["", *rows()[0]], *([i, *r] for i, r in enumerate(rows()[1:]))]),
        says="numbers the rows",
    ),
    "csv by pandas, with the index of some rows": table(
        "a.csv",
        as_csv([["", *rows()[0]], *([7 * i % 90, *r] for i, r in enumerate(rows()[1:]))]),
        says="left out the column without a name, which only numbers the rows",
    ),
    "csv whose labels are codes": table("a.csv", as_csv(rows(label=np.array(["007", "7"])[KINDS]))),
    "csv whose labels are long numbers": table("a.csv", as_csv(rows(label=10**17 + KINDS))),
    "csv of Kaggle, with an Id": table(
        "a.csv",
        as_csv([["Id", "a", "b", "c", "Species"], *([i + 1, *r] for i, r in enumerate(rows(None, NAMES)))]),
        says="left out Id",
        settings={"label": "Species"},
    ),
    "csv without a header": table("a.csv", HEADLESS, settings={"label": -1}, says="names no columns"),
    "csv with pandas' numbers for names": table("a.csv", as_csv(rows("0123")), settings={"label": "3"}),
    "csv of scikit-learn": table(
        "iris.csv", as_csv([[N, 3, "setosa", "virginica"], *rows(None)]), says="numbers of rows and columns"
    ),
    "csv whose label is a name": table("a.csv", as_csv(rows(label=NAMES))),
    "csv whose label is a float": table("a.csv", as_csv(rows(label=KINDS.astype(float)))),
    "csv whose label is true or false": table("a.csv", as_csv(rows(label=KINDS.astype(bool)))),
    "csv with Class": table("a.csv", as_csv(rows(("a", "b", "c", "Class")))),
    "csv with a comma behind every line": table(
        "a.csv",
        as_csv([[*r, ""] for r in rows()]),
        says="left out a column without a name: without a value in any row",
    ),
    "csv with thousands": table(
        "a.csv",
        as_csv([[*r[:2], f"{1000 + i:,}", r[3]] if i else r for i, r in enumerate(rows())]),
        says="thousands",
    ),
    "csv with categories": table(
        "a.csv",
        as_csv([["size", *rows()[0]], *(["SML"[i % 3], *r] for i, r in enumerate(rows()[1:]))]),
        shape=(6,),
        says="one column of 0 and 1 for each text in size (3)",
    ),
    "csv with missing values, left out": Case(
        {"a.csv": as_csv([r if i % 10 else [*r[:2], "NA", r[3]] if i else r for i, r in enumerate(rows())])},
        "table",
        29,
        7,
        (3,),
        says="left out 4 of 40 rows of a.csv that lack a value (c in 4)",
        settings={"bad_rows": "skip"},
    ),
    "csv of pixels": Case(
        {
            "a.csv": as_csv([["label", *(f"pixel{i}" for i in range(25))]])
            + as_csv([[k, *i.flat] for k, i in zip(KINDS, IMAGES[:, :5], strict=True)])
        },
        "images",
        32,
        8,
        (1, 5, 5),
        settings={"img_size": 5},
    ),
    "csv of texts and labels": Case(
        {"a.csv": as_csv([["text", "label"], *([f"a film, {i} of them", n] for i, n in enumerate(NAMES))])},
        "tasks",
        32,
        8,
    ),
    "csv of reviews with a sentiment": Case(
        {
            "a.csv": as_csv(
                [["review", "sentiment"], *([f'"good"\n{i}', n] for i, n in enumerate([*NAMES, *NAMES]))]
            )
        },
        "tasks",
        64,
        16,
        settings={"label": "sentiment"},
        says="took review for texts",
    ),
    "csv of pairs": Case(
        {"a.csv": as_csv([["de", "en"], *([f"{i}, ja", f"{i}, yes"] for i in range(N))])},
        "pairs",
        32,
        8,
        classes=0,
        settings={"pair": ["de", "en"]},
        reading=Reading(),
    ),
    "csv to predict a number from": table(
        "a.csv", as_csv(rows(label=np.arange(N))), reading=NUMBERS, classes=0
    ),
    "csv of Kaggle, whose test part has no label": Case(
        {"train.csv": as_csv(rows()), "test.csv": as_csv([r[:3] for r in rows()])},
        "table",
        32,
        8,
        (3,),
        says="left out the part test: it has no 'label'",
    ),
    "csv of Kaggle with a sample of the answers": Case(
        {
            "train.csv": as_csv(rows()),
            "val.csv": as_csv(rows()[:11]),
            "sampleSubmission.csv": as_csv([["id", "label"], [1, 0]]),
        },
        "table",
        40,
        10,
        (3,),
        says="left out the file sampleSubmission",
    ),
    # TSV, JSON, Parquet
    "tsv": table("a.tsv", as_csv(rows(), delimiter="\t")),
    "tsv of pairs without names": Case(
        {"a.tsv": "".join(f'{chr(97 + i % 26)}\tA "quote\n' for i in range(N)).encode()},
        "pairs",
        32,
        8,
        classes=0,
        says="took the first two for source and target",
        reading=Reading(),
    ),
    "jsonl": table("a.jsonl", "\n".join(map(json.dumps, records())).encode()),
    "ndjson.gz": table("a.ndjson.gz", gzip.compress("\n".join(map(json.dumps, records())).encode())),
    "json": table("a.json", json.dumps(records(), indent=1).encode()),
    "json of columns": table(
        "a.json", json.dumps({k: [r[k] for r in records()] for k in records()[0]}).encode()
    ),
    "jsonl of texts in zst": Case(
        {"a.jsonl.zst": zstd(b"".join(b'{"text": "t%d", "label": %d}\n' % (i, i % 2) for i in range(N)))},
        "tasks",
        32,
        8,
    ),
    "parquet": table("a.parquet", parquet(a=TABLE[:, 0], b=TABLE[:, 1], c=TABLE[:, 2], label=KINDS)),
    "parquet under another name": table(
        "a", parquet(a=TABLE[:, 0], b=TABLE[:, 1], c=TABLE[:, 2], label=list(NAMES))
    ),
    "parquet of texts": Case(
        {"a.parquet": parquet(text=[f"t{i}" for i in range(N)], label=KINDS)}, "tasks", 32, 8
    ),
    "parquet in parts": Case(
        {
            "train-00000-of-00002.parquet": parquet(a=TABLE[:20, 0], label=KINDS[:20]),
            "train-00001-of-00002.parquet": parquet(a=TABLE[20:, 0], label=KINDS[20:]),
            "test-00000-of-00001.parquet": parquet(a=TABLE[:6, 0], label=KINDS[:6]),
        },
        "table",
        40,
        6,
        (1,),
    ),
    # numpy
    "npz as scikit-learn names it": table("a.npz", npz(X=TABLE, y=KINDS)),
    "npz of parts as scikit-learn names them": Case({"a.npz": npz(**SPLIT)}, "table", 30, 10, (3,)),
    "npz as Keras names it": Case(
        {"a.npz": npz(x_train=IMAGES[:30], y_train=KINDS[:30], x_test=IMAGES[30:], y_test=KINDS[30:])},
        "images",
        30,
        10,
        (1, 6, 5),
    ),
    "npz as MedMNIST names it": Case(
        {
            "a.npz": npz(
                train_images=IMAGES[:25],
                train_labels=KINDS[:25, None],
                val_images=IMAGES[25:30],
                val_labels=KINDS[25:30, None],
                test_images=IMAGES[30:],
                test_labels=KINDS[30:, None],
            )
        },
        "images",
        25,
        5,
        (1, 6, 5),
    ),
    "npz with data and target": table(
        "a.npz", npz(data=TABLE, target=KINDS, feature_names=["a"]), says="left out"
    ),
    "npz with trainX": table("a.npz", npz(trainX=TABLE, trainY=KINDS)),
    "npz whose label is named": table("a.npz", npz(arr_0=TABLE, arr_1=KINDS), settings={"label": "arr_1"}),
    "npz with true and false": table("a.npz", npz(X=TABLE, y=KINDS == 1)),
    "npz with names": table("a.npz", npz(X=TABLE, y=NAMES)),
    "npz with bytes for names": table("a.npz", npz(X=TABLE, y=NAMES.astype("S"))),
    "npz with one-hot labels": table(
        "a.npz", npz(X=TABLE, y=np.eye(2)[KINDS]), says="the column that is 1 of 2"
    ),
    "npz with whole floats for labels": table(
        "a.npz", npz(X=TABLE, y=KINDS.astype(float)), says="whole labels"
    ),
    "npz with whole numbers to predict": table("a.npz", npz(X=TABLE, y=KINDS), reading=NUMBERS, classes=0),
    "npz of a table of bools": table("a.npz", npz(X=TABLE > 0, y=KINDS)),
    "npz of images in 0..1": images(
        "a.npz", npz(X=FLOATS, y=KINDS), says="took 1 in X (float64 from 0 to 1)"
    ),
    "npz of images in half precision": images(
        "a.npz", npz(images=FLOATS[..., None].astype(np.float16), labels=KINDS)
    ),
    "npz of images as whole floats": images("a.npz", npz(X=IMAGES.astype(float), y=KINDS), says="as bytes"),
    "npz of images as int64": images("a.npz", npz(X=IMAGES.astype(int), y=KINDS), says="as bytes"),
    "npz of images of 16 bits": images(
        "a.npz", npz(X=IMAGES.astype(np.uint16) * 257, y=KINDS), says="divided by 257"
    ),
    "npz of black and white": images("a.npz", npz(X=IMAGES > 99, y=KINDS), says="took true in X for 255"),
    "npz of images, channels last": images(
        "a.npz", npz(X=np.stack([IMAGES] * 3, 3), y=KINDS), shape=(3, 6, 5)
    ),
    "npz of images of many channels": images(
        "a.npz", npz(X=np.stack([np.tile(IMAGES, (1, 2, 2))] * 7, 1), y=KINDS), shape=(7, 12, 10)
    ),
    "npz of series": Case(
        {"a.npz": npz(X=RNG.normal(size=(N, 7, 2)), y=KINDS)},
        "sequences",
        32,
        8,
        (7, 2),
        reading=SEQUENCES,
        says="for sequences of 7 steps",
    ),
    "npz of series to predict numbers from": Case(
        {"a.npz": npz(X=RNG.normal(size=(N, 7, 2)), y=TABLE)},
        "sequences",
        32,
        8,
        (7, 2),
        classes=0,
        reading=Reading(predicts="numbers", sequences=True),
    ),
    "npy of X and y": Case(
        {"X.npy": npy(TABLE), "y.npy": npy(KINDS)},
        "table",
        32,
        8,
        (3,),
        source="X.npy",
        says="y.npy, beside it",
    ),
    "npy in a folder": Case({"X.npy": npy(TABLE), "y.npy": npy(KINDS)}, "table", 32, 8, (3,)),
    "npy of parts": Case(
        {f"{name}.npy": npy(values) for name, values in SPLIT.items()}, "table", 30, 10, (3,)
    ),
    "npy alone": Case(
        {"pictures.npy": npy(IMAGES)}, "images", 32, 8, (1, 6, 5), classes=0, reading=Reading()
    ),
    "npy.gz": Case(
        {"X.npy.gz": gzip.compress(npy(TABLE)), "y.npy.gz": gzip.compress(npy(KINDS))}, "table", 32, 8, (3,)
    ),
    "npz a part": Case(
        {"train.npz": npz(x=TABLE[:30], y=KINDS[:30]), "test.npz": npz(x=TABLE[30:], y=KINDS[30:])},
        "table",
        30,
        10,
        (3,),
    ),
    # folders of pictures
    "folders of classes": Case(folders("cat", "dog"), "images", 8, 2, (3, 5, 6)),
    "folders of parts, in full": Case(
        folders(*(f"{p}/{c}" for p in ("training", "validation") for c in ("cat", "dog"))),
        "images",
        10,
        10,
        (3, 5, 6),
    ),
    "folders of parts, in capitals": Case(
        folders(*(f"{p}/{c}" for p in ("Train", "Val", "TEST") for c in ("cat", "dog"))),
        "images",
        10,
        10,
        (3, 5, 6),
    ),
    "folders as Kaggle's cats and dogs": Case(
        folders(*(f"{p}_set/{c}" for p in ("training", "test") for c in ("cats", "dogs"))),
        "images",
        10,
        10,
        (3, 5, 6),
    ),
    "folders as Intel's scenes": Case(
        folders(*(f"seg_{p}/seg_{p}/{c}" for p in ("train", "test") for c in ("sea", "street"))),
        "images",
        10,
        10,
        (3, 5, 6),
    ),
    "folders within one": Case(
        folders("PetImages/Cat", "PetImages/Dog"), "images", 8, 2, (3, 5, 6), says="looked in there"
    ),
    "folders from a Mac": Case(
        {
            **folders("a/cat", "a/dog"),
            "__MACOSX/a/cat/._0.png": b"Mac OS X",
            "a/.DS_Store": b"\0\0\0\1Bud1",
            "a/cat/._0.png": b"Mac OS X",
            "a/dog/Thumbs.db": b"\xd0\xcf",
            "a/dog/.thumbs/a.png": b"nothing",
        },
        "images",
        8,
        2,
        (3, 5, 6),
        says="passed over 5 hidden files",
    ),
    "folders with other files": Case(
        {**folders("cat", "dog"), "cat/notes.txt": b"x", "dog/0.heic": b"x"},
        "images",
        8,
        2,
        (3, 5, 6),
        says="left out 2 files",
    ),
    "folders whose test part has no classes": Case(
        {**folders("train/cat", "train/dog"), **folders("test")},
        "images",
        8,
        2,
        (3, 5, 6),
        says="left out 5 pictures of test",
    ),
    "folders that are numbers": Case(folders(*map(str, range(11))), "images", 44, 11, (3, 5, 6), classes=11),
    "folders with spaces and umlauts": Case(folders("grüne Äpfel", "rote Äpfel"), "images", 8, 2, (3, 5, 6)),
    # folders of pictures with tables
    "pictures and labels.csv": pictured(
        {"labels.csv": named("image", "label")}, says="image of labels.csv names"
    ),
    "pictures without suffixes in it": pictured({"labels.csv": named("id", "label", "{}")}),
    "pictures in a folder of their own": pictured({"labels.csv": named("filename", "class")}, at="images/"),
    "pictures by the folder they lie in": pictured(
        {"annotations.tsv": named("path", "target", "images/{}.png", delimiter="\t")}, at="images/"
    ),
    "pictures by places on another machine": pictured(
        {"labels.csv": named("image", "label", "C:\\data\\images\\{}.png")}, at="images/"
    ),
    "pictures and a table elsewhere": pictured(
        {"tables/labels.csv": named("image", "label", "../images/{}.png")}, at="images/"
    ),
    "pictures and a table without a header": pictured(
        {"labels.csv": named(None, None)}, settings={"label": -1}, says="names no columns"
    ),
    "pictures and a label that is named": pictured(
        {"labels.csv": named("id", "breed", "{}", of=NAMES)}, settings={"label": "breed"}
    ),
    "pictures with other columns": pictured(
        {"labels.csv": named("image", "label", more=[("width", "6"), ("author", "N. N.")])},
        says="left out of labels.csv: width, author",
    ),
    "pictures and a column that only looks like names": pictured(
        {"labels.csv": named("file", "label", more=[("age", "1")])},
        says="file of labels.csv names the pictures",
    ),
    "pictures without a row": pictured(
        {"labels.csv": named("image", "label"), "x.png": png()},
        says="left out 1 pictures that no row names (x.png)",
    ),
    "rows without a picture, left out": pictured(
        {"labels.csv": named("image", "label") + b"away.png,1\r\n"},
        settings={"bad_rows": "skip"},
        says="left out 1 of 41 rows of labels.csv that name no picture that is there (away.png)",
    ),
    "rows without a label, left out": pictured(
        {"labels.csv": named("image", "label") + b"x.png,\r\n", "x.png": png()},
        settings={"bad_rows": "skip"},
        says="that lack a value (label in 1)",
    ),
    "rows that are there twice": pictured(
        {"labels.csv": named("image", "label") + b"0.png,0\r\n"},
        says="left out 1 rows of labels.csv that name",
    ),
    "metadata.jsonl of the Hub": pictured(
        {
            f"{part}/metadata.jsonl": b"".join(
                b'{"file_name": "%d.png", "label": %d, "boxes": [[1, 2]]}\n' % (i, i % 2) for i in range(n)
            )
            for part, n in (("train", 30), ("test", 10))
        },
        at="train/",
        sizes=(30, 10),
        more={f"test/{i}.png": png() for i in range(10)},
        says="left out 10 pictures that no row names (train/30.png",
    ),
    "one metadata.csv for all parts": pictured(
        {"metadata.csv": named("file_name", "label", "train/{}.png") + b"val/0.png,0\r\nval/1.png,1\r\n"},
        at="train/",
        sizes=(40, 2),
        more={f"val/{i}.png": png() for i in range(2)},
    ),
    "a column that says the part": pictured(
        {"labels.csv": named("image", "label", more=[("split", ["train", "train", "test", "train"])])},
        sizes=(30, 10),
        says="split their part",
    ),
    "a table a part": pictured(
        {"train.csv": named("image", "label", n=30), "val_labels.csv": named("image", "label", n=10)},
        at="images/",
        sizes=(30, 10),
        says="10 pictures are in more than one of train, val",
    ),
    "pictures of Kaggle": pictured(
        {
            "trainLabels.csv": named("id", "label", "{}"),
            "test.csv": as_csv([["id", "width"], *([i, 6] for i in range(9))]),
            "sampleSubmission.csv": named("id", "label", "{}", n=9),
        },
        at="train/",
        more={f"test/{i}.png": png() for i in range(9)},
        says="left out test.csv: it has no 'label'",
    ),
    "pictures in folders whose table says otherwise": pictured(
        {"labels.csv": named("image", "label", "cat/{}.png", of=NAMES)},
        at="cat/",
        more=folders("dog", n=3),
        says="classes are what labels.csv says, not the folders",
    ),
    "pictures by their table": pictured(
        {"a.csv": named("image", "label"), "b.csv": b"image,label\n0.png,7\n"},
        source="a.csv",
    ),
    "pictures in parquet": pictured(
        {"labels.parquet": parquet(image=[f"{i}.png" for i in range(N)], label=KINDS)}
    ),
    "pictures that need no label": pictured(
        {"metadata.csv": named("file_name", "caption", of=[f"a cat, {i}" for i in range(N)])},
        reading=Reading(),
        classes=0,
        settings={"format": "image_folder"},
    ),
    "IDX": Case(
        {
            f"{name}-{part}-{column}-ubyte": idx(values)
            for name in ("emnist-letters",)
            for part in ("train", "test")
            for column, values in (("images-idx3", IMAGES), ("labels-idx1", KINDS.astype(np.uint8) + 1))
        },
        "images",
        40,
        40,
        (1, 6, 5),
        classes=3,
    ),
    # text
    "text": Case({"a.txt": b"one\ntwo\n" * 20}, "text", 0, 0, classes=0, reading=Reading()),
    "text in UTF-16": Case(
        {"a.txt": ("o\u00e9\n" * 20).encode("utf-16")}, "text", 0, 0, classes=0, reading=Reading()
    ),
    "text with other line ends": Case(
        {"a.md": b"one\r\ntwo\r\n" * 20}, "text", 0, 0, classes=0, reading=Reading()
    ),
    "text in Latin-1, as bytes": Case(
        {"a.txt": b"caf\xe9\n" * 20}, "text", 0, 0, classes=0, reading=Reading()
    ),
    "text, asked for": Case(
        {"a.bin": b"\x93NUMPY\0\0" * 20},
        "text",
        0,
        0,
        classes=0,
        settings={"format": "text"},
        reading=Reading(),
    ),
    "csv as text": Case(
        {"a.csv": as_csv(rows())}, "text", 0, 0, classes=0, settings={"format": "text"}, reading=Reading()
    ),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_what_is_read_of_a_file(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case.files)
    source = case.source or (next(iter(case.files)) if len(case.files) == 1 else "")
    data = read(tmp_path / source, case.reading, **case.settings)
    assert (data.kind, data.num_classes) == (case.kind, case.classes), data.notes
    if case.kind != "text":
        assert (len(data.train), len(data.test)) == (case.n_train, case.n_test), data.notes
    if case.shape:
        assert data.train.tensors["inputs"].shape[1:] == case.shape
        assert data.train.tensors["inputs"].dtype == (torch.uint8 if case.kind == "images" else torch.float32)
    assert case.says in " | ".join(data.notes), data.notes


GROUPED = [1250 + 375 * (i % 7) for i in range(N)]
"""Numbers that, with a comma or a point before the last three digits, are also ones about a thousandth."""


@pytest.mark.parametrize(
    ("columns", "separator", "wanted"),
    [
        ((GROUPED, "{:,}"), ",", 1),
        ((GROUPED, "{:,}.5"), ",", 1),
        ((GROUPED, "{:,}"), ";", 1e-3),
        ((GROUPED, "{:,}", "{:,}.25"), "\t", 1),
        ((GROUPED, "{:,}", "0,{}"), "\t", 1e-3),
        ((GROUPED, "{:.}", "0,{}"), ";", 1),
        ((GROUPED, "{:.},5"), ";", 1),
        ((GROUPED, "{:'}.5"), ",", 1),
        ((GROUPED, "{:\u202f},5"), ";", 1),
        ((GROUPED, "${:,}"), ",", 1),
        ((GROUPED, "{:.} \u20ac", "0,{}"), ";", 1),
        ((GROUPED, "{}%"), ",", 1),
        ((GROUPED, "\u2212{}"), ",", -1),
        ((GROUPED, "{}"), ",", 1),
        ((GROUPED, "{:.}", "0.{}"), ";", 1e-3),
        ((GROUPED, "+{:,}"), ";", 1e-3),
        ((GROUPED, "{:,}E+03", "0,{}"), ";", 1),
        ((GROUPED, "{:.}"), ";", 1e-3),
        ((GROUPED, "{:.}"), ",", 1e-3),
    ],
    ids=lambda value: ascii(value[1:]) if isinstance(value, tuple) else ascii(value),
)
def test_numbers_as_people_write_them(
    columns: tuple[list[int], str], separator: str, wanted: float, tmp_path: Path
) -> None:
    numbers, *forms = columns

    def cell(form: str, number: int) -> str:
        parted = next((mark for mark in (",", ".", "'", "\u202f") if f"{{:{mark}}}" in form), "")
        return form.replace(f"{{:{parted}}}", f"{number:,}".replace(",", parted)).replace("{}", str(number))

    body = [[*(cell(form, number) for form in forms), NAMES[i]] for i, number in enumerate(numbers)]
    header = [*(f"c{i}" for i in range(len(forms))), "label"]
    half = [body[:30], body[30:]]
    for name, part in zip(("train", "test"), half, strict=True):
        (tmp_path / f"{name}.csv").write_bytes(as_csv([header, *part], delimiter=separator))
    data = read(tmp_path)
    found = torch.cat([data.train.tensors["inputs"], data.test.tensors["inputs"]])[:, 0]
    more = 0.5 if forms[0].endswith("5") else 0
    assert torch.allclose(found, (torch.tensor(GROUPED).float() + more) * wanted)


def test_numbers_in_brackets_are_below_zero(tmp_path: Path) -> None:
    body = [[f"({n:,})" if i % 3 else f"{n:,}", i % 2] for i, n in enumerate(GROUPED)]
    (tmp_path / "a.csv").write_bytes(as_csv([["a", "label"], *body]))
    found = read(tmp_path / "a.csv").train.tensors["inputs"].flatten().tolist()
    assert set(found) <= {n * (-1 if i % 3 else 1) for i, n in enumerate(GROUPED)}
    assert min(found) < 0 < max(found)


def test_a_comma_means_the_same_in_all_parts_and_columns(tmp_path: Path) -> None:
    for part, weights in (("train", [f"{i},{i}50" for i in range(1, 9)]), ("test", ["1,5", "2,25"])):
        table = [["kg", "label"], *([w, i % 2] for i, w in enumerate(weights))]
        (tmp_path / f"{part}.csv").write_bytes(as_csv(table))
    data = read(tmp_path)
    assert data.train.tensors["inputs"].max() < 10
    assert data.test.tensors["inputs"].flatten().tolist() == [1.5, 2.25]


@pytest.mark.parametrize("mark", ["n.a.", "-", "None", "#DIV/0!", "#NV"])
def test_marks_where_a_number_is_missing(mark: str, tmp_path: Path) -> None:
    table = [["age", "label"], *([20 + i if i % 8 else mark, i % 2] for i in range(N))]
    (tmp_path / "a.csv").write_bytes(as_csv(table))
    assert "5 of 40 rows lack a value" in error(tmp_path / "a.csv")
    assert len(read(tmp_path / "a.csv", bad_rows="skip").train) == 28


def test_a_column_of_numbers_with_some_texts_is_no_column_of_categories(tmp_path: Path) -> None:
    def table(ages: int, odd: str) -> Path:
        body = [[odd if i % 9 == 0 else i % ages, i / 2, i % 2] for i in range(20 * N)]
        (tmp_path / "a.csv").write_bytes(as_csv([["age", "b", "label"], *body]))
        return tmp_path / "a.csv"

    said = error(table(60, "over 60"))
    assert "'age' holds numbers, but in 89 of 800 rows 'over 60'" in said
    assert read(table(4, "4+")).train.tensors["inputs"].shape[1] == 6
    notes = read(table(60, "-999")).notes
    assert any("age is -999 in 89 rows and else 0 to 59" in note for note in notes)


def test_all_columns_that_cannot_be_used_are_named_at_once(tmp_path: Path) -> None:
    body = [[f"name {i}", i / 2, f"ticket {i}", ["old", i][i % 30 > 0], i % 2] for i in range(3 * N)]
    (tmp_path / "a.csv").write_bytes(as_csv([["Name", "Fare", "Ticket", "Age", "label"], *body]))
    said = error(tmp_path / "a.csv")
    assert "'Name' holds texts, 120 different ones" in said
    assert "So with 'Ticket', 'Age': data.drop=[Name, Ticket, Age] leaves out all." in said
    assert read(tmp_path / "a.csv", drop=["Name", "Ticket", "Age"]).train.tensors["inputs"].shape[1] == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("form", ["table", "texts", "pairs"])
def test_a_column_of_parts_is_obeyed(form: str, kind: str, tmp_path: Path) -> None:
    parts = ["train", "train", "Test", "validation"]
    inside = {
        "table": lambda i: {"a": i / 2, "label": i % 2},
        "texts": lambda i: {"text": f"text {i}", "label": i % 2},
        "pairs": lambda i: {"source": f"one {i}", "target": f"eins {i}"},
    }[form]
    body = [{**inside(i), "split": parts[i % 4]} for i in range(N)]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_bytes(as_csv([[*body[0]], *([*row.values()] for row in body)]))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in body))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(body), path)
    data = read(path, Reading(predicts="classes" if form == "table" else ""))
    assert (len(data.train), len(data.test), data.part) == (20, 10, "validation")
    assert any("split names the parts: train (20), test (10), validation (10)" in n for n in data.notes)
    if form == "table":
        assert data.train.tensors["inputs"].shape[1] == 1
        assert data.train.tensors["inputs"].flatten().tolist()[:4] == [0, 0.5, 2, 2.5]
    assert len(load(DataConfig(source=str(path)), part="").test) == 10


def test_a_column_called_set_may_mean_other_things(tmp_path: Path) -> None:
    body = [[("train", "car")[i % 2], i, i // 2 % 2] for i in range(N)]
    (tmp_path / "a.csv").write_bytes(as_csv([["set", "a", "label"], *body]))
    assert read(tmp_path / "a.csv").train.tensors["inputs"].shape == (32, 3)


@pytest.mark.parametrize("name", ["PassengerId", "customer_id", "ID", "row index"])
def test_a_column_that_numbers_the_rows_is_left_out(name: str, tmp_path: Path) -> None:
    body = [[f"{7 * i}-x" if name == "customer_id" else i, i % 5, i % 2] for i in range(N)]
    (tmp_path / "a.csv").write_bytes(as_csv([[name, "a", "label"], *body]))
    data = read(tmp_path / "a.csv")
    assert data.train.tensors["inputs"].shape[1] == 1
    assert any(f"left out {name}, which only numbers the rows" in note for note in data.notes)


def test_categories_of_pandas_are_texts(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names = pyarrow.array(NAMES.tolist()).dictionary_encode()
    parquet.write_table(pyarrow.table({"a": names, "label": names}), tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    assert (data.classes, data.train.tensors["inputs"].shape[1]) == (("cat", "dog"), 2)


@pytest.mark.parametrize("kind", ["csv", "npz"])
@pytest.mark.parametrize("column", ["input", "target"])
def test_numbers_that_32_bits_cannot_tell_apart_are_refused(column: str, kind: str, tmp_path: Path) -> None:
    large, small = 1.7e12 + 1e4 * TABLE[:, :1], TABLE[:, 1:2]
    x, y = (large, small) if column == "input" else (small, large)
    if kind == "csv":
        (tmp_path / "a.csv").write_bytes(as_csv([["a", "target"], *np.hstack([x, y]).tolist()]))
    else:
        np.savez(tmp_path / "a.npz", x=x, y=y)
    said = error(tmp_path / f"a.{kind}", NUMBERS)
    assert "lie around 1.7e+12 and differ by" in said
    assert "Subtract a constant" in said


COLUMNS = {"a": TABLE[:, 0].tolist(), "b": TABLE[:, 1].tolist(), "label": KINDS.tolist()}
BODY = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
PER_ROW = {name: {str(i): v for i, v in enumerate(values)} for name, values in COLUMNS.items()}
JSON: dict[str, Any] = {
    "columns": COLUMNS,
    "records": BODY,
    "orient columns": PER_ROW,
    "orient index": {str(i): row for i, row in enumerate(BODY)},
    "orient split": {"columns": [*COLUMNS], "index": [*range(N)], "data": [[*row.values()] for row in BODY]},
    "orient table": {"schema": {"fields": [{"name": "a"}]}, "data": BODY},
    "under a key": {"version": "1.0", "data": BODY},
    "lists of inputs": {"x": TABLE[:, :2].tolist(), "y": KINDS.tolist()},
    "lists in rows": [{"features": [row["a"], row["b"]], "label": row["label"]} for row in BODY],
    "a list for the class": [
        {"a": row["a"], "b": row["b"], "label": [1 - row["label"], row["label"]]} for row in BODY
    ],
}


@pytest.mark.parametrize("form", JSON.values(), ids=JSON)
def test_json_in_all_forms_is_the_same_table(form: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(form))
    (tmp_path / "a.csv").write_bytes(as_csv([[*COLUMNS], *([*row.values()] for row in BODY)]))
    found, wanted = (read(tmp_path / name) for name in ("a.json", "a.csv"))
    assert found.classes == wanted.classes == ("0", "1")
    for name, tensor in wanted.train.parts():
        assert torch.equal(dict(found.train.parts())[name], tensor)


def one_hot(names: Sequence[str], spoil: bool = False) -> bytes:
    """A table of three classes, one column each, of which the last row may be of two."""
    body = [[i / 2, *(int(i % 3 == k) for k in range(3))] for i in range(N)]
    if spoil:
        body[-1][1:] = [1, 1, 0]
    return as_csv([["a", *names], *body])


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["label_cat", "label_dog", "label_owl"], None),
        (["Target.cat", "Target.dog", "Target.owl"], None),
        (["cat", "dog", "owl"], ["cat", "dog", "owl"]),
    ],
)
def test_a_column_a_class(names: list[str], label: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(one_hot(names))
    data = read(tmp_path / "a.csv", label=label)
    assert data.classes == ("cat", "dog", "owl")
    rows_ = (2 * data.train.tensors["inputs"][:, 0]).long()
    assert torch.equal(data.train.tensors["labels"], rows_ % 3)
    (tmp_path / "a.csv").write_bytes(one_hot(names, spoil=True))
    assert "1 of 40 rows are not of one class, the first of them row 40, of 2" in error(
        tmp_path / "a.csv", label=label
    )
    data = read(tmp_path / "a.csv", label=label, bad_rows="skip")
    assert len(data.train) + len(data.test) == N - 1


def test_a_column_a_class_beside_pictures(tmp_path: Path) -> None:
    body = [[f"{i}.png", int(i % 2 == 0), int(i % 2 == 1)] for i in range(N)]
    case = pictured({"train.csv": as_csv([["image", "sick", "well"], *body])})
    data = read(write(tmp_path, case.files), label=["sick", "well"])
    assert (data.kind, data.classes, len(data.train)) == ("images", ("sick", "well"), 32)


def test_several_numbers_to_predict(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv(rows()))
    data = read(tmp_path / "a.csv", NUMBERS, label=["c", "a"], drop=["label"])
    assert (data.train.tensors["inputs"].shape[1], data.train.tensors["targets"].shape[1]) == (1, 2)
    kept = {tuple(row) for row in TABLE.astype(np.float32)[:, [2, 0]].tolist()}
    assert {tuple(row) for row in data.train.tensors["targets"].tolist()} <= kept


@pytest.mark.parametrize(
    ("before", "separator"),
    [("sep=;\r\n", ";"), ("# of an instrument\n# 2024\n", ","), ("", "  ")],
    ids=["sep", "comments", "blanks"],
)
def test_what_stands_before_a_table_or_between_its_columns(
    before: str, separator: str, tmp_path: Path
) -> None:
    lines = ["a b label", *(f"{i / 2} {i} {i % 2}" for i in range(N))]
    (tmp_path / "a.csv").write_text(before + "\n".join(lines).replace(" ", separator) + "\n")
    data = read(tmp_path / "a.csv")
    assert (len(data.train), data.train.tensors["inputs"].shape[1]) == (32, 2)


def test_quotes_of_a_tsv_are_text_unless_a_writer_put_them(tmp_path: Path) -> None:
    texts = [f'She said "{i}"\nand left' if i % 2 else f"no {i}" for i in range(N)]
    table = [["text", "label"], *([text, i % 2] for i, text in enumerate(texts))]
    (tmp_path / "a.tsv").write_bytes(as_csv(table, delimiter="\t"))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts))
    )
    found, wanted = (read(tmp_path / name, Reading()) for name in ("a.tsv", "a.jsonl"))
    assert found.sha256 == wanted.sha256
    plain = "text\tlabel\n" + "".join(f'"quoted {i}" she said\t{i % 2}\n' for i in range(N))
    (tmp_path / "b.tsv").write_text(plain)
    data = read(tmp_path / "b.tsv", Reading())
    assert data.tokenizer.decode(data.train.sequences["ids"][0]).count('"') == 2


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_pictures_that_cannot_be_opened_are_counted_or_left_out(layout: str, tmp_path: Path) -> None:
    def place(i: int) -> Path:
        return tmp_path / (NAMES[i] if layout == "folders" else "") / f"{i}.png"

    for i in range(N):
        place(i).parent.mkdir(exist_ok=True)
        place(i).write_bytes(png(i))
    if layout == "table":
        table = [["image", "label"], *([f"{i}.png", NAMES[i]] for i in range(N))]
        (tmp_path / "labels.csv").write_bytes(as_csv(table))
    whole = read(tmp_path)
    for i in (0, 3, 11):
        place(i).write_bytes(b"no picture")
    said = error(tmp_path)
    assert "0.png: cannot be opened: no picture" in said
    assert "So are 3 of 40. data.bad_rows=skip" in said
    data = read(tmp_path, bad_rows="skip")
    assert len(data.train) + len(data.test) == N - 3
    assert any("left out 3 of 40 pictures" in note for note in data.notes)

    def labelled(data: DataSet) -> set[tuple[bytes, int]]:
        parts = [split.tensors for split in (data.train, data.test)]
        return {
            (x.numpy().tobytes(), int(y))
            for t in parts
            for x, y in zip(t["inputs"], t["labels"], strict=True)
        }

    assert labelled(data) < labelled(whole)


def test_pairs_by_language(tmp_path: Path) -> None:
    lines = [json.dumps({"translation": {"en": f"one {i}", "de": f"eins {i}"}}) for i in range(N)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl", Reading(), pair=["en", "de"]).kind == "pairs"
    assert "data.pair the two keys" in error(tmp_path / "a.jsonl", Reading())


def test_labels_of_minus_one_and_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=TABLE, y=2 * KINDS - 1)
    data = read(tmp_path / "a.npz")
    assert data.classes == ("-1", "1")
    assert data.train.tensors["labels"].unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", ["a.xlsx", "a.XLS", "a.dta"])
def test_files_of_programs_say_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4" + bytes(100))
    assert "Save it there as CSV" in error(tmp_path / name)


# ---- what is refused, and how ----


def other(data: bytes, name: str = "a.bin") -> dict[str, bytes]:
    return {name: data}


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "a pickle": (other(pickle.dumps({"x": 1})), "is a pickle, which is not read. Opening it would run code"),
    "a zip": (other(npz(x=TABLE)), "is a zip archive, which is not read. Unpack it"),
    "a picture": (other(png()), "is a picture, which is not read. Name a folder of pictures"),
    "a PDF": (other(b"%PDF-1.7\n"), "is a PDF"),
    "HDF5": (other(b"\x89HDF\r\n\x1a\n" + bytes(9)), "is HDF5, which is not read. Save its arrays as .npz"),
    "a MATLAB file": (other(b"MATLAB 5.0 MAT-file" + bytes(99), "a.mat"), "is a MATLAB file"),
    "bytes with zeros": (other(b"abc\0def"), "is no text: byte 4 is 0"),
    "zeros later on": (other(b"abc " * 200 + b"\0", "a.txt"), "is no text: byte 801 is 0"),
    "UTF-16 without a mark": (other("abc".encode("utf-16-le"), "a.txt"), "is no text: byte 2 is 0"),
    "a csv that is Excel's": (other(b"PK\3\4" + bytes(30), "a.csv"), "is a zip archive"),
    "a csv in Latin-1": (other(as_csv(rows()) + b"1,2,3,caf\xe9\n", "a.csv"), "line 42: not UTF-8"),
    "a csv of one column": (other(b"a\nb\nc\n", "a.csv"), "no separator (comma, semicolon, tab or |)"),
    "a csv with a short line": (other(as_csv([*rows(), [1, 2]]), "a.csv"), "line 42: has 2 columns"),
    "a csv with a long line": (
        other(as_csv([*rows()[:3], [1, 2, 3, 4, 5]]), "a.csv"),
        "line 4: has 5 columns",
    ),
    "an empty csv": (other(b"\n", "a.csv"), "has no rows"),
    "a csv with a header alone": (other(b"a,b,label\n", "a.csv"), "has no rows"),
    "a csv whose label is unknown": (
        other(as_csv(rows(("a", "b", "c", "d"))), "a.csv"),
        "which of its columns is the label? It has a, b, c, d. Set data.label",
    ),
    "a csv with two labels": (
        other(as_csv(rows(("a", "b", "y", "label"))), "a.csv"),
        "y and label could both",
    ),
    "a csv whose header is unclear": (
        other(as_csv([["a", "b"], ["c", "d"]]), "a.csv"),
        "Set data.header=true",
    ),
    "a csv whose header is there twice": (other(as_csv(rows(("a", "a", "b", "label"))), "a.csv"), "twice"),
    "a csv with missing values": (
        other(as_csv([*rows(), [1, "", "?", 1], ["", 1, 1, 0]]), "a.csv"),
        "2 of 42 rows lack a value, the first of them row 41 (a in 1, b in 1, c in 1). data.bad_rows=skip",
    ),
    "a csv with names of people": (
        other(as_csv([["name", *rows()[0]], *([f"N. {i}", *r] for i, r in enumerate(rows()[1:]))]), "a.csv"),
        "column 'name' holds texts, 40 different ones such as 'N. 0'. Correct it, or leave it out by",
    ),
    "a csv whose label is no class": (
        other(as_csv(rows(label=TABLE[:, 0])), "a.csv"),
        "is not whole, which no",
    ),
    "a csv of names of pictures": (
        other(as_csv([["image", "label"], *([f"{i}.jpg", i % 2] for i in range(60))]), "a.csv"),
        "'image' names pictures, none of which lies beside or below it. Put it into their folder",
    ),
    "rows without a picture": (
        {**pictured({"labels.csv": named("image", "label") + b"a.png,0\nb.png,1\n"}).files},
        "labels.csv: 2 of 42 rows name no picture that is there (a.png, b.png). Add them to",
    ),
    "a picture with two labels": (
        pictured({"labels.csv": named("image", "label") + b"0.png,1\n"}).files,
        "'0.png' is there twice, with label '0' and '1'. A picture has one label",
    ),
    "a picture that could be two": (
        pictured({"labels.csv": named("image", "label")}, at="images/", more=folders("masks", n=1)).files,
        "'0.png' may be images/0.png or masks/0.png. Write names with their folders",
    ),
    "pictures out of reach": (
        pictured({"labels.csv": named("image", "label") + b"../../etc/passwd.png,1\n"}).files,
        "1 of 41 rows name no picture that is there (../../etc/passwd.png)",
    ),
    "pictures whose label is unknown": (
        pictured({"labels.csv": named("image", "width")}).files,
        "labels.csv: which of its columns is the label? It has image, width. Set data.label",
    ),
    "pictures with two tables": (
        pictured({"a.csv": named("image", "label"), "b.csv": named("image", "label")}).files,
        "a.csv, b.csv all name its pictures. Name the one that is meant as data.source",
    ),
    "pictures of a class that is not learned": (
        pictured({"train.csv": named("image", "label"), "test.csv": b"image,label\n0.png,9\n"}).files,
        "test.csv: label '9', of 1 rows, is none of 0, 1, which are learned",
    ),
    "a damaged parquet": (other(b"PAR1" + bytes(50), "a.parquet"), "not readable as Parquet"),
    "a parquet that is none": (other(b"hello", "a.parquet"), "does not begin as Parquet does"),
    "json that is none": (other(b"{", "a.json"), "not JSON: Expecting"),
    "json of numbers": (other(b"[1, 2]", "a.json"), "row 1: is of type int, where a row is {...}"),
    "json of uneven columns": (other(b'{"a": [1], "b": [1, 2]}', "a.json"), "lists are of different lengths"),
    "json of other things": (other(b'{"name": "x"}', "a.json"), "has the keys name, where one of these"),
    "damaged gzip": (other(gzip.compress(b"hello" * 99)[:-9], "a.csv.gz"), "damaged"),
    "damaged zst": (other(zstd(b"hello" * 99)[:-9], "a.csv.zst"), "damaged"),
    "an npz of a pickle": (
        other(npz(x=np.array([{}], object)), "a.npz"),
        "are never loaded, for that runs code",
    ),
    "an npy of a pickle": (
        other(npy(np.array([{}], object)), "a.npy"),
        "are never loaded, for that runs code",
    ),
    "an npy that is cut off": (other(npy(TABLE)[:-9], "X.npy"), "not a readable .npy file"),
    "an npz with x twice": (
        other(npz(x=TABLE, X=TABLE, y=KINDS), "a.npz"),
        "x and X could both be the inputs",
    ),
    "an npz without names": (other(npz(arr_0=TABLE, arr_1=KINDS), "a.npz"), "arr_0 (40 x 3), arr_1 (40)"),
    "an npz of several labels": (
        other(npz(X=TABLE, y=np.ones((N, 3), int)), "a.npz"),
        "where each sample has one whole number, its class, or one column",
    ),
    "images that are standardised": (
        other(npz(images=RNG.normal(size=(N, 6, 5)), y=KINDS), "a.npz"),
        "does not say where black and white are",
    ),
    "images in 0..16": (
        other(npz(images=FLOATS * 16, y=KINDS), "a.npz"),
        "does not say where black and white",
    ),
    "images with two axes for channels": (
        other(npz(X=np.zeros((N, 3, 9, 3), np.uint8)), "a.npz"),
        "could be the",
    ),
    "labels that are no class": (other(npz(X=TABLE, y=TABLE[:, 0]), "a.npz"), "its labels are not whole"),
    "training and pictures": (
        folders("training/cat", "training/dog", "other/cat"),
        "holds the folders training and other: some are named after parts, others not",
    ),
    "a class called train": (folders("car", "plane", "train"), "holds the folders train and car, plane"),
    "no training part": (folders("val/a", "test/a"), "none of them is to train on"),
    "years of classes": (
        folders("2019/cat", "2019/dog", "2020/cat", "2020/dog"),
        "2019, 2020 each hold the folders cat, dog: which are the classes?",
    ),
    "two training parts": (folders("train/a", "train/b", "Training_set/a"), "two are one part"),
    "parts of different sizes": (
        {**folders("train/a", "train/b"), "val/a/0.png": IMAGES[:1].tobytes()},
        "cannot be opened: no picture",
    ),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_with_what_was_seen(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    source = tmp_path / next(iter(files)) if len(files) == 1 else tmp_path
    found = error(source)
    assert message in found
    assert str(tmp_path) in found


@pytest.mark.parametrize("kind", ["gz", "npz", "npy"])
def test_a_bomb_is_refused_before_it_is_unpacked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes more memory than there is, of which a test must not have much."""
    zeros = np.zeros(40_000_000, np.uint8)
    data = {
        "gz": lambda: gzip.compress(zeros.tobytes(), 1),
        "npz": lambda: npz(x=zeros),
        "npy": lambda: npy(zeros)[:200],
    }[kind]()
    path = write(tmp_path, {f"a.csv.{kind}" if kind == "gz" else f"a.{kind}": data})
    memory = psutil.virtual_memory()._replace(available=30_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert "GiB of memory, and 0.0 GiB are free" in error(next(path.iterdir()))


# ---- names of parts ----


@pytest.mark.parametrize(
    ("name", "kind", "of_a_folder"),
    [
        ("train", "train", "train"),
        ("Training", "train", "train"),
        ("VAL", "validation", "validation"),
        ("valid", "validation", "validation"),
        ("Validation", "validation", "validation"),
        ("dev", "validation", "validation"),
        ("test", "test", "test"),
        ("TESTING", "test", "test"),
        ("t10k", "test", "test"),
        ("test_2016_flickr", "test", None),
        ("train-00000-of-00002", "train", None),
        ("train2017", "train", "train"),
        ("training_set", "train", "train"),
        ("TestImages", "test", "test"),
        ("seg_train", None, "train"),
        ("newstest2014", "test", "test"),
        ("newsdev2016", "validation", "validation"),
        ("tst2013", "test", "test"),
        ("devtest", "test", "test"),
        ("train_station", "train", None),
        ("testament", None, None),
        ("trainer", None, None),
        ("devil", None, None),
        ("train_test", "train", None),
        ("cat", None, None),
        ("", None, None),
    ],
)
def test_parts_by_their_names(name: str, kind: str | None, of_a_folder: str | None) -> None:
    assert (part_kind(name), folder_kind(name)) == (kind, of_a_folder)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "real", folders("cat", "dog"))
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cat" / "again").symlink_to(tmp_path / "real" / "cat")
    assert read(tmp_path / "linked").classes == ("cat", "dog")
    assert len(read(tmp_path / "linked").train) == 8


def test_pictures_of_all_modes_are_read_and_upright(tmp_path: Path) -> None:
    modes = {"png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "jpg": ("RGB", "L", "CMYK", "YCbCr")}
    for suffix, of in modes.items():
        for i, mode in enumerate(of):
            for name in ("a", "b"):
                (tmp_path / name).mkdir(exist_ok=True)
                Image.new(mode, (4, 3)).save(tmp_path / name / f"{i}.{suffix}")
    turned = Image.new("RGB", (3, 4))
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(tmp_path / "a" / "turned.jpg", exif=exif)
    assert read(tmp_path).train.tensors["inputs"].shape[1:] == (3, 3, 4)
    Image.new("LAB", (4, 3)).save(tmp_path / "a" / "x.tif")
    assert "x.tif: has colours in LAB. Save it in RGB or grey." in error(tmp_path, grayscale=True)


# ---- which part chooses, and classes that nobody evaluates ----


def arrays(folder: Path, **parts: int) -> Path:
    """An .npz of so many samples a part."""
    columns = {f"x_{part}": RNG.normal(size=(n, 2)) for part, n in parts.items()}
    labels = {f"y_{part}": np.arange(n) % 2 for part, n in parts.items()}
    np.savez(folder / "a.npz", **columns, **labels)  # type: ignore[arg-type]
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("parts", "settings", "chosen", "sizes", "reported"),
    [
        ({"train": 20}, {}, "held_out", (16, 4), "held_out"),
        ({"train": 20, "test": 6}, {}, "test", (20, 6), "test"),
        ({"train": 20, "val": 8, "test": 6}, {}, "val", (20, 8), "test"),
        ({"train": 20, "val": 8}, {}, "val", (20, 8), "val"),
        ({"train": 20, "val": 8, "test": 6}, {"evaluate_on": "test"}, "test", (20, 6), "test"),
        ({"train": 20, "test": 6}, {"evaluate_on": "held_out"}, "held_out", (16, 4), "test"),
        ({"train": 20, "val": 8, "test": 6}, {"evaluate_on": "Validation"}, "val", (20, 8), "test"),
    ],
)
def test_validation_chooses_and_test_is_reported(
    parts: dict[str, int],
    settings: dict[str, Any],
    chosen: str,
    sizes: tuple[int, int],
    reported: str,
    tmp_path: Path,
) -> None:
    config = DataConfig(source=str(arrays(tmp_path, **parts)), **settings)
    data = load(config)
    assert (data.chosen_by, data.part) == (chosen, chosen)
    assert (len(data.train), len(data.test)) == sizes
    assert any("no validation part" in note for note in data.choice) == (chosen == "test" and not settings)
    report = load(config, part="")
    assert (report.chosen_by, report.part) == (chosen, reported)
    assert report.train_sha256 == data.train_sha256
    again = load(config, part="train")
    assert again.part == "train"
    assert torch.equal(again.test.tensors["inputs"], data.train.tensors["inputs"])


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    config = DataConfig(source=str(arrays(tmp_path, train=20, test=6)))
    with pytest.raises(LabError, match=r"--part = 'val': .* has no such part, only test, train"):
        load(config, part="val")
    with pytest.raises(LabError, match="--part held_out: nothing was held out"):
        load(config, part="held_out")


@pytest.mark.parametrize("counts", [(60, 2), (60, 1), (5, 4, 3, 2, 1), (2, 2), (3, 3, 3)])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_of_each_class_some_are_held_out_and_some_are_not(
    counts: tuple[int, ...], share: float, tmp_path: Path
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    np.savez(tmp_path / "a.npz", x=RNG.normal(size=(len(labels), 2)), y=labels)
    data = read(tmp_path / "a.npz", held_out=share)
    found = [np.bincount(s.tensors["labels"], minlength=len(counts)) for s in (data.train, data.test)]
    assert (found[0] + found[1]).tolist() == list(counts)
    assert (found[0] >= 1).all()
    assert [n > 0 for n in found[1]] == [n > 1 for n in counts]
    alone = [str(i) for i, n in enumerate(counts) if n == 1]
    said = f"1 class has no sample in held_out, so not evaluated: {alone[0]} (1)" if alone else ""
    assert data.coverage == ((said,) if said else ())


def test_classes_without_samples_are_said(tmp_path: Path) -> None:
    labels = np.array([0, 5] * 10)
    np.savez(tmp_path / "a.npz", x=RNG.normal(size=(20, 2)), y=labels)
    assert read(tmp_path / "a.npz").coverage == ("of 6 classes 4 have no sample: 1, 2, 3, 4",)
    np.savez(tmp_path / "b.npz", x_train=np.eye(4), y_train=[0, 1, 2, 2], x_test=np.eye(4)[:2], y_test=[0, 2])
    assert read(tmp_path / "b.npz").coverage == ("1 class has no sample in test, so not evaluated: 1 (1)",)
    np.savez(tmp_path / "c.npz", x_train=np.eye(4), y_train=[0, 1, 3, 3], x_test=np.eye(4)[:2], y_test=[0, 2])
    assert read(tmp_path / "c.npz").coverage == (
        "2 classes have no sample in test, so not evaluated: 1 (1), 3 (2)",
        "1 class has no sample to learn from: 2 (1)",
    )


@pytest.mark.parametrize("kind", ["table", "images", "pairs", "tasks"])
def test_samples_that_are_learned_from_and_evaluated_are_counted(kind: str, tmp_path: Path) -> None:
    """Rows 0 to 29 are to learn from; of those to evaluate three are among them."""
    for part, at in (("train", [*range(30)]), ("test", [*range(27, 40)])):
        if kind in ("table", "images"):
            inputs = TABLE if kind == "table" else IMAGES
            np.savez(tmp_path / f"{part}.npz", x=inputs[at], y=KINDS[at])
        else:
            keys = ("source", "target") if kind == "pairs" else ("text", "label")
            lines = [json.dumps(dict(zip(keys, (f"text {i}", str(i % 2)), strict=True))) for i in at]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    said = "3 of 13 samples of test are also learned from, with the same input"
    assert read(tmp_path, CLASSES if kind in ("table", "images") else Reading()).shared == (said,)
    assert load(DataConfig(source=str(tmp_path)), part="train").shared == ()


def test_documents_that_are_learned_from_and_evaluated_are_counted(tmp_path: Path) -> None:
    for part, texts in (("train", ["a b", "c d", "", "e"]), ("test", ["c d", "", "c d e"])):
        (tmp_path / part).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / part / f"{i}.txt").write_text(text)
    said = "1 of 2 documents of test are also learned from, with the same input"
    assert load(DataConfig(source=str(tmp_path), format="text")).shared == (said,)


def test_a_context_that_cuts_is_counted_once_where_all_is_evaluated(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "long " * i, "label": str(i % 2)}) for i in range(N)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), context=52)
    assert any("cut the texts of 29 samples" in note for note in load(config, part="all").notes)
    lines = [json.dumps({"source": "long " * i, "target": "a"}) for i in range(1, N)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = load(config, part="all")
    assert (len(data.test), data.notes) == (N - 1, ())


def test_classes_are_numbered_alike_in_folders_rows_and_arrays(tmp_path: Path) -> None:
    names = [*map(str, range(12)), "a"]
    write(tmp_path / "folders", folders(*names, n=2))
    table = [["x", "label"], *([i, name] for i in range(2) for name in names)]
    write(tmp_path / "rows", {"a.csv": as_csv([[r[0], r[1]] for r in table])})
    np.savez(tmp_path / "a.npz", x=RNG.normal(size=(26, 2)), y=np.array([*names, *names]))
    found = [read(tmp_path / name).classes for name in ("folders", "rows/a.csv", "a.npz")]
    assert found == [tuple(names)] * 3


def test_a_text_is_the_same_in_every_encoding_it_says_it_is_in(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("caf\u00e9 \U0001f600\r\n".encode(encoding))
        assert read_text(tmp_path / "a.txt") == "caf\u00e9 \U0001f600\r\n"


def test_texts_in_folders_of_classes(tmp_path: Path) -> None:
    """As aclImdb has them: parts, classes, texts of no class, and files beside them."""
    text = b"a film that %d people saw"
    places = [f"{part}/{name}" for part in ("train", "test") for name in ("pos", "neg")]
    files = {f"{place}/{i}_9.txt": text % i for place in places for i in range(4)}
    more = {f"train/unsup/{i}_0.txt": text % i for i in range(5)}
    beside = ("README", "imdb.vocab", "imdbEr.txt", "train/urls_pos.txt", "train/labeledBow.feat")
    others = dict.fromkeys(beside, b"x")
    write(tmp_path, {**files, **more, **others})
    data = read(tmp_path, Reading(tasks=True))
    assert (data.kind, data.form, data.classes, data.part) == (
        "tasks",
        "classification",
        ("neg", "pos"),
        "test",
    )
    assert (len(data.train), len(data.test)) == (8, 8)
    assert data.train.tensors["labels"].tolist() == [0] * 4 + [1] * 4
    assert any("left out 5 texts of train/unsup" in note for note in data.notes)
    assert read(tmp_path, Reading()).kind == "text"
    write(tmp_path, {"test/meh/0.txt": b"x"})
    with pytest.raises(LabError, match="this class is not among those of train"):
        read(tmp_path, Reading(tasks=True))


def test_each_picture_has_the_label_of_its_row(tmp_path: Path) -> None:
    """Whatever order rows and files are in: here the label is the picture's colour."""
    labels = RNG.integers(0, 4, N).tolist()
    write(tmp_path, {f"p{i}.PNG": png(60 * label) for i, label in enumerate(labels)})
    rows = [(f"p{i}", labels[i], ["train", "test"][i % 2]) for i in RNG.permutation(N).tolist()]
    write(tmp_path, {"labels.csv": as_csv([("id", "shade", "split"), *rows])})
    data = read(tmp_path, label="shade")
    for split, of in ((data.train, "train"), (data.test, "test")):
        seen = split.tensors["inputs"][:, 0, 0, 0].tolist()
        assert seen == [60 * int(data.classes[label]) for label in split.tensors["labels"].tolist()]
        assert seen == [60 * label for _, label, part in rows if part == of]


def test_a_table_names_no_picture_outside_its_folder(tmp_path: Path) -> None:
    outside = {f"other/{i}.png": png() for i in range(N)}
    write(tmp_path, outside | {"data/labels.csv": named("image", "label", f"{tmp_path}/other/{{}}.png")})
    write(tmp_path, {"data/x.png": png()})
    assert "'image' names pictures, none of which lies beside or below it" in error(tmp_path / "data")
