"""Data sets: every format in, and every mistake one line that names its place."""

import gzip
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lab import config
from lab.config import ConfigError
from lab.errors import LabError
from supervised.data import DataSet, bundled, load, sources
from supervised.data.config import AugmentConfig, DataConfig

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path_factory.mktemp("cache")))


def read(source: object, **settings: Any) -> DataSet:
    return load(DataConfig(source=str(source), **settings))


def error(source: object, **settings: Any) -> str:
    with pytest.raises(LabError) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- by name ----


@pytest.mark.parametrize(
    ("name", "kind", "n_train", "n_test", "num_classes", "shape"),
    [
        ("digits", "images", 1438, 359, 10, (1, 8, 8)),
        ("iris", "table", 120, 30, 3, (4,)),
        ("wine", "table", 142, 36, 3, (13,)),
        ("breast_cancer", "table", 456, 113, 2, (30,)),
        ("diabetes", "table", 354, 88, 0, (10,)),
        ("photographs", "images", 360, 24, 0, (3, 64, 64)),
    ],
)
def test_what_comes_with_scikit_learn(
    name: str, kind: str, n_train: int, n_test: int, num_classes: int, shape: tuple[int, ...]
) -> None:
    data = read(name)
    assert (data.name, data.kind, data.num_classes) == (name, kind, num_classes)
    assert (len(data.train), len(data.test)) == (n_train, n_test)
    inputs = data.train.tensors["inputs"]
    assert inputs.shape[1:] == shape
    assert inputs.dtype == (torch.uint8 if kind == "images" else torch.float32)
    assert read(name).sha256 == data.sha256


def test_held_out_digits_are_a_fifth_of_each_class() -> None:
    from sklearn.datasets import load_digits

    theirs: Any = load_digits()
    data = read("digits")
    counts = torch.bincount(data.test.tensors["labels"])
    assert counts.tolist() == [round(n / 5) for n in np.bincount(theirs.target)]
    both = torch.cat([data.train.tensors["inputs"], data.test.tensors["inputs"]]).flatten(1)
    assert sorted(both.sum(1).tolist()) == sorted(np.rint(theirs.data * 255 / 16).sum(1).tolist())
    other = read("digits", split_seed=1)
    assert not torch.equal(other.test.tensors["inputs"], data.test.tensors["inputs"])
    assert other.sha256 != data.sha256


def test_patches_of_photographs_do_not_cross_the_border() -> None:
    data = read("photographs", img_size=40, held_out=0.25)
    assert data.test.tensors["inputs"].shape == (2 * 10 * 4, 3, 40, 40)  # 160 of 640 columns, 427 rows
    held_out = {bytes(patch.numpy()) for patch in data.test.tensors["inputs"].flatten(1)}
    assert not held_out & {bytes(patch.numpy()) for patch in data.train.tensors["inputs"].flatten(1)}
    assert "data.img_size = 200: no such patch fits" in error("photographs", img_size=200)


def test_digits_that_no_memory_holds() -> None:
    assert "digits: 1,797 images of 1 x 1000000 x 1000000 take" in error("digits", img_size=1_000_000)


def test_the_python_library_is_split_by_file() -> None:
    data = read("python_library", held_out=0.1, limit=200_000)
    assert data.kind == "text"
    whole = data.tokenizer.decode(data.train.ids.tolist())
    starts = data.train.documents.tolist()
    assert starts[0] == 0
    assert all(data.train.ids[start - 1] == data.tokenizer.eos_id for start in starts[1:])
    assert len(whole) == 200_000
    assert len(data.test.ids) >= 200_000  # bytes, of at most as many characters, and ends


def test_a_share_of_documents_is_held_out(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i:02}.txt", f"{i:02}" * 50)
    data = read(tmp_path, held_out=0.2)
    sides = [set(split.ids.view(-1, 101)[:, :2].flatten().tolist()) for split in (data.train, data.test)]
    texts = [split.ids.view(-1, 101)[:, :2].tolist() for split in (data.train, data.test)]
    assert sides[0]
    assert len(texts[0]) == 32
    assert len(texts[1]) == 8
    assert not {tuple(t) for t in texts[0]} & {tuple(t) for t in texts[1]}
    assert read(tmp_path, held_out=0.2).sha256 == data.sha256


def test_fashion_mnist_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_folder(tmp_path / "fashion_mnist", n_classes=10)
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    data = read("fashion_mnist")
    assert data.classes == bundled.FASHION
    assert data.train.tensors["inputs"].shape == (20, 1, 5, 4)


def test_fashion_mnist_of_debian() -> None:
    if not bundled.DEBIAN.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = read("fashion_mnist", limit=500)
    assert len(data.train) == len(data.test) == 500
    assert data.train.tensors["inputs"].shape[1:] == (1, 28, 28)
    assert data.num_classes == 10


def test_fashion_mnist_that_is_nowhere_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*names: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.delenv("LAB_DATA", raising=False)
    monkeypatch.setattr(bundled, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "apt install dataset-fashion-mnist" in error("fashion_mnist")


def test_a_name_that_is_none(tmp_path: Path) -> None:
    message = error("fashion_mnits")
    assert "no such data set, file or folder. Did you mean 'fashion_mnist'?" in message
    assert "`lab frames GAME --out runs/pong.npz` makes one" in error("runs/pong.npz")
    assert "hub:OWNER/NAME" in message
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    assert "Did you mean" in error(tmp_path / "trian.jsonl")
    assert f"data.source = '{'x' * 80}': File name too long. Name another" in error("x" * 5000)
    assert "not understood. A data set on the Hub is" in error("hub:" + "x" * 5000)


def test_names_and_settings_are_known_without_torch() -> None:
    code = (
        "import sys; from supervised.data.config import DataConfig; from supervised.data import sources; "
        "sources.check(DataConfig(source='digits')); print('torch' in sys.modules, *sources.names())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", *sorted(bundled.READERS)]
    assert sources.names() == sorted(bundled.READERS)


# ---- IDX ----


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def idx_folder(folder: Path, n_classes: int = 3) -> dict[str, np.ndarray]:
    arrays = {}
    for part, n in (("train", 20), ("t10k", 10)):
        arrays[part] = RNG.integers(0, 256, (n, 5, 4), np.uint8)
        labels = (np.arange(n) % n_classes).astype(np.uint8)
        write(folder / f"{part}-images-idx3-ubyte.gz", idx(arrays[part]))
        write(folder / f"{part}-labels-idx1-ubyte", idx(labels))  # this one is not packed
    return arrays


def test_idx(tmp_path: Path) -> None:
    arrays = idx_folder(tmp_path)
    data = read(tmp_path)
    assert data.num_classes == 3
    assert torch.equal(data.train.tensors["inputs"][:, 0], torch.from_numpy(arrays["train"]))
    assert torch.equal(data.test.tensors["inputs"][:, 0], torch.from_numpy(arrays["t10k"]))
    assert data.test.tensors["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    small = read(tmp_path, limit=6)
    assert len(small.train) == len(small.test) == 6


def test_damaged_idx(tmp_path: Path) -> None:
    idx_folder(tmp_path)
    packed, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    good, good_labels = packed.read_bytes(), labels.read_bytes()

    packed.write_bytes(good[:-40])
    assert f"{packed}: damaged: " in error(tmp_path)
    packed.write_bytes(good[:60] + bytes(9) + good[69:])
    assert f"{packed}: damaged: " in error(tmp_path)
    packed.write_bytes(b"<html>404</html>")
    assert f"{packed}: begins with 3c68746d where 00000803 marks images" in error(tmp_path)
    packed.write_bytes(gzip.compress(gzip.decompress(good)[:-7]))
    assert f"{packed}: holds 393 bytes where its head says 20 x 5 x 4" in error(tmp_path)
    packed.write_bytes(good)
    labels.write_bytes(b"")
    assert f"{labels}: begins with nothing where 00000801 marks labels" in error(tmp_path)
    labels.write_bytes(bytes((0, 0, 8, 1, 0, 0)))
    assert f"{labels}: holds 0 bytes" in error(tmp_path)
    packed.write_bytes(gzip.compress(idx(np.zeros((20, 0, 4), np.uint8))))
    assert f"{packed}: holds 0 bytes where its head says 20 x 0 x 4" in error(tmp_path)
    packed.write_bytes(good)
    labels.write_bytes(idx(np.zeros(19, np.uint8)))
    assert f"{labels}: 19 labels for 20 images in train-images-idx3-ubyte.gz." in error(tmp_path)
    labels.unlink()
    assert f"{tmp_path}: no train labels" in error(tmp_path)
    labels.write_bytes(good_labels)
    write(tmp_path / "t10k-labels-idx1-ubyte", idx(np.array([0, 1, 2, 3, 0, 0, 0, 0, 0, 0], np.uint8)))
    assert "label 3 of sample 4 of the held-out part is none of the classes 0 to 2" in error(tmp_path)


def test_a_label_beyond_the_named_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idx_folder(tmp_path / "fashion_mnist", n_classes=11)
    monkeypatch.setenv("LAB_DATA", str(tmp_path))
    assert "train-labels-idx1-ubyte: label 11 is 10, and there are only 10 classes" in error("fashion_mnist")


# ---- folders of pictures ----


def picture(path: Path, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_a_class(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / "cats" / f"{i}.png")
        picture(tmp_path / "dogs" / f"{i}.jpg", colour=(0, 0, 0))
    data = read(tmp_path)
    assert data.classes == ("cats", "dogs")
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.train.tensors["inputs"].shape == (16, 3, 4, 6)
    for split in (data.train, data.test):
        cats = split.tensors["inputs"][split.tensors["labels"] == 0]
        assert (cats == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()
    assert read(tmp_path, grayscale=True).train.tensors["inputs"].shape == (16, 1, 4, 6)


def test_pictures_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    for i in range(10):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(shades).save(tmp_path / name / f"{i}.png")
    found = read(tmp_path, grayscale=True).train.tensors["inputs"][0, 0]
    assert found.tolist() == (shades // 257).tolist()
    for path in tmp_path.rglob("*.png"):
        write(path.with_suffix(".pgm"), b"P5 6 4 65535\n" + shades.astype(">u2").tobytes())
        path.unlink()
    again = read(tmp_path, grayscale=True).train.tensors["inputs"][0, 0]
    assert torch.equal(again, found)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pictures_of_32_bits_are_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 6), 200, kind)).save(path := tmp_path / "a" / "0.tif")
    assert f"{path}: has 32 bits a pixel, " in (message := error(tmp_path))
    assert "Save it with 8 or 16 bits." in message


def test_folders_of_parts_scaled_and_cropped(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png", (6, 4))
    picture(tmp_path / "train" / "b" / "0.png", (9, 9))
    picture(tmp_path / "val" / "b" / "0.png", (3, 5))
    assert "a/0.png is 6 x 4" not in (message := error(tmp_path))  # height comes first, as in img_size
    assert "is 9 x 9 pixels" in message
    assert "Set data.img_size" in message
    data = read(tmp_path, img_size=5)
    assert data.train.tensors["inputs"].shape == (2, 3, 5, 5)
    assert data.test.tensors["labels"].tolist() == [1]


def test_a_crop_is_central(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "0.png")
    picture(tmp_path / "test" / "a" / "0.png")
    assert (read(tmp_path, img_size=4).train.tensors["inputs"] == 200).all()


def test_bad_folders_of_pictures(tmp_path: Path) -> None:
    assert f"{tmp_path}: the folder is empty" in error(tmp_path)
    picture(tmp_path / "a" / "0.png")
    bad = write(tmp_path / "b" / "0.png", b"GIF89a no picture")
    assert f"{bad}: cannot be opened: no picture" in error(tmp_path)
    picture(bad, (400, 400))
    bad.write_bytes(bad.read_bytes()[:200])
    assert f"{bad}: cannot be opened: " in error(tmp_path)
    Image.new("RGB", (6, 4)).save(bad, exif=b"Exif\0\0no block of it")
    assert f"{bad}: cannot be opened: not a TIFF file" in error(tmp_path)
    Image.new("RGB", (6, 4)).save(bad, "tiff")
    bad.write_bytes(bad.read_bytes()[:60])  # Pillow warns, too
    assert f"{bad}: cannot be opened: no picture. Restore or remove it." in error(tmp_path)
    assert "images of 3 x 1000000 x 1000000 take" in error(tmp_path, img_size=1_000_000)
    bad.unlink()
    assert f"{tmp_path / 'b'}: holds no picture" in error(tmp_path)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "test" / "c" / "0.png")
    assert f"{tmp_path / 'test' / 'c'}: the class 'c' is not among those of" in error(tmp_path)


@pytest.mark.parametrize("beside", ["metadata.jsonl", "labels.tsv"])
def test_folders_of_classes_come_before_rows_about_them(tmp_path: Path, beside: str) -> None:
    for i in range(5):
        picture(tmp_path / "train" / "a" / f"{i}.png")
        picture(tmp_path / "train" / "b" / f"{i}.png")
        (tmp_path / "train" / "b" / f"{i}.gif").mkdir()  # nor is a folder a picture
    rows = tmp_path / beside
    jsonl(rows, {"text": "a cat", "label": 0}, {"text": "a dog", "label": 0})
    data = read(tmp_path)
    assert (data.kind, data.classes, len(data.train)) == ("images", ("a", "b"), 8)
    if rows.suffix == ".jsonl":
        assert read(tmp_path, format="rows", held_out=0.5).kind == "tasks"


def test_rows_beside_figures_are_rows(tmp_path: Path) -> None:
    picture(tmp_path / "figures" / "0.png")
    jsonl(tmp_path / "train.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 0})
    assert read(tmp_path, held_out=0.5).kind == "tasks"


# ---- .npz ----


def test_arrays_of_images(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (10, 5, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10).reshape(10, 1) % 2)
    data = read(tmp_path / "a.npz")
    assert data.kind == "images"
    assert (len(data.train), len(data.test)) == (8, 2)
    assert data.train.tensors["inputs"].shape == (8, 3, 5, 4)
    np.savez(tmp_path / "b.npz", x_train=images[..., 0], y_train=np.zeros(10, int), x_test=images[:3, ..., 0])
    assert "the training part has labels, the held-out part none" in error(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", train_images=images, test_images=images[:3])
    unlabelled = read(tmp_path / "c.npz")
    assert list(unlabelled.train.tensors) == ["inputs"]
    assert torch.equal(unlabelled.test.tensors["inputs"], torch.from_numpy(images[:3]).permute(0, 3, 1, 2))


def test_neither_limit_nor_held_out_part_decides_which_classes_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=RNG.normal(size=(401, 3)), y=np.append(np.arange(400) % 40, 40))  # 40 has one
    for settings in ({"limit": 10}, {"held_out": 0.6}, {"held_out": 0.6, "limit": 10}):
        assert read(path, **settings).num_classes == 41
    assert 40 in read(path, held_out=0.6).train.tensors["labels"]


def test_arrays_of_a_table(tmp_path: Path) -> None:
    x = RNG.normal(size=(20, 3))
    np.savez(tmp_path / "a.npz", x=x, y=x.sum(1))
    data = read(tmp_path / "a.npz")
    assert data.kind == "table"
    assert data.num_classes == 0
    assert data.train.tensors["targets"].shape == (16, 1)
    assert torch.allclose(data.test.tensors["inputs"].sum(1), data.test.tensors["targets"][:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.full((4, 5, 5), -1.0)},
            "(images, 4 x 5 x 5) are float64 from -1 to -1, which does not say",
        ),
        ({"a": np.zeros((4, 5)), "b": np.zeros(4)}, "holds a (4 x 5), b (4), where images and labels"),
        ({"x": np.zeros((4, 5)), "y": np.zeros(3)}, "3 labels (y) for 4 inputs (x) in train"),
        ({"x": np.zeros((4, 5)), "y": np.array([0, 1, -1, 0])}, "is none of the classes 0 to 1"),
        ({"x": np.zeros((4, 5)), "y": np.zeros(4, complex)}, "labels are 4 of complex128"),
        ({"x": np.array([[0.0], [np.nan], [1], [2]]), "y": np.zeros(4)}, "part is no finite number"),
        ({"x_train": np.zeros((4, 5)), "x_test": np.zeros((4, 6))}, "is inputs 5; a held-out one inputs 6."),
        ({"x": np.array([[{}]], dtype=object)}, "objects, which only pickle can read, are never loaded"),
        ({"x": np.float32(3), "y": np.float32(3)}, "inputs are 1 of float32, where images are"),
        ({"x": np.zeros((4, 5)), "y": np.float32(3)}, "1 labels (y) for 4 inputs (x)"),
        ({"x": np.zeros((4, 5)), "y": np.ones((4, 2), int)}, "labels are 4 x 2 of int64, where each sample"),
        ({"x": np.zeros((4, 5)), "y": np.zeros((4, 0))}, "labels are 4 x 0 of float64, where"),
        ({"x": np.zeros((4, 5)), "y": np.full(4, 10**12)}, "a label is 1,000,000,000,000: no class"),
        ({"x": np.zeros((0, 5))}, "part is empty"),
        ({"x": np.zeros((200, 0))}, "inputs are 200 x 0 of float64, where images are"),
        ({"x": np.zeros((4, 0, 5), np.uint8)}, "inputs are 4 x 0 x 5 of uint8, where images are"),
        ({"x": np.full((4, 5), 1e300)}, "inputs of sample 1 of the training part is no finite number"),
        ({"x": np.zeros((4, 5)), "y": np.full(4, 1e300)}, "targets of sample 1 of the training part is no"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert message in error(tmp_path / "a.npz", held_out=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4 no zip", ""),
        (b"hello", "begins with 68656c6c. Get it"),
        (b"", "begins with nothing. Get it"),
    ],
)
def test_a_damaged_npz(tmp_path: Path, content: bytes, message: str) -> None:
    assert f"not a readable .npz file: {message}" in error(write(tmp_path / "a.npz", content))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    assert "are never loaded" in error(write(tmp_path / "a.npz", pickle.dumps(Code())))
    np.savez(tmp_path / "b.npz", x=np.array([[Code()]], dtype=object))
    assert "are never loaded" in error(tmp_path / "b.npz")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_or_holds_no_idx_files(tmp_path: Path) -> None:
    assert "/dev/null: is neither a file nor a folder" in error(Path("/dev/null"))
    assert "no files such as train-images-idx3-ubyte" in error(tmp_path, format="idx")


# ---- text ----


def test_one_text_is_parted_at_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "book.txt.gz", "".join(f"line {i:02}\n" for i in range(50)))
    data = read(path, held_out=0.1)
    parts = [data.tokenizer.decode(split.ids.tolist()) for split in (data.train, data.test)]
    assert "".join(parts).splitlines() == [f"line {i:02}" for i in range(50)]
    assert parts[1].startswith("line 4")
    assert len(parts[1].splitlines()) in (4, 5)


def test_a_folder_of_text_with_parts(tmp_path: Path) -> None:
    for name in ("train/a.md", "train/b.md", "valid.md", "test.md", "train/c.txt", "train/.hidden.md"):
        write(tmp_path / name, name)
    data = read(tmp_path, suffix=".md")
    assert data.tokenizer.decode(data.train.ids.tolist()) == "train/a.mdtrain/b.md"
    assert data.tokenizer.decode(data.test.ids.tolist()) == "valid.md"
    other = read(tmp_path, suffix=".md", evaluate_on="test")
    assert other.tokenizer.decode(other.test.ids.tolist()) == "test.md"
    assert other.sha256 != data.sha256
    message = error(tmp_path, suffix=".md", evaluate_on="extra")
    assert "data.evaluate_on = 'extra'" in message
    assert "only test, train, validation" in message
    message = error(tmp_path, suffix=".rst")
    assert "no picture, no arrays, and no file that ends in .rst. Set data.suffix" in message
    assert "Set data.suffix (there are .md, .txt)" in message


@pytest.mark.parametrize(
    "names",
    [
        ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"),
        ("ptb_train_1.txt", "ptb_dev_1.txt", "ptb_test_1.txt", "ptb_train_2.txt"),
        ("Corpus-Train.txt.gz", "Corpus-Val.txt.gz", "Corpus-Test.txt.gz"),
    ],
    ids=["points", "numbered", "packed"],
)
def test_files_of_text_alike_but_for_the_name_of_a_part_are_parts(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    for name in names:
        write(tmp_path / name, name)
    data = read(tmp_path)
    train, held_out, test, *more = names
    assert data.tokenizer.decode(data.train.ids.tolist()) == "".join([train, *more])
    assert data.tokenizer.decode(data.test.ids.tolist()) == held_out
    assert f"took {held_out} for validation, by name" in data.notes
    assert f"took {test} for test, by name" in data.notes


def test_aligned_files_ask_for_their_pair(tmp_path: Path) -> None:
    for name in ("train.de", "train.en"):
        write(tmp_path / name, "a\nb\n")
    assert "set data.pair=[de, en] from the first to the second" in error(tmp_path)


def test_files_about_a_part_are_none(tmp_path: Path) -> None:
    for name in ("test_utils.txt", "valid-moves.txt", "model.txt", "train/test.txt"):
        write(tmp_path / name, name)
    data = read(tmp_path, held_out=0.5)
    assert data.part == "held_out"
    assert not data.notes


def test_text_that_is_no_utf8_is_bytes_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", b"caf\xe9\n" * 20)
    data = read(path)
    assert data.tokenizer.decode_bytes(data.train.ids.tolist()) == b"caf\xe9\n" * 16
    assert f"{path}, line 1: not UTF-8" in error(path, tokenizer="bpe")


def test_bpe_is_trained_on_the_training_part_and_used_again(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "abcd " * 100)
    write(tmp_path / "test.txt", "wxyz " * 100)
    settings: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300}
    data = read(tmp_path, **settings)
    assert len(data.train.ids) == 102  # " abcd" is one token
    assert len(data.test.ids) > 400
    (run := tmp_path / "run").mkdir()
    data.tokenizer.save(run)
    write(tmp_path / "train.txt", "efgh " * 100)
    again = load(DataConfig(source=str(tmp_path), **settings), run)
    assert len(again.train.ids) > 400
    assert again.sha256 != data.sha256


def test_an_empty_text(tmp_path: Path) -> None:
    assert "part is empty" in error(write(tmp_path / "a.txt", ""))
    for name in ("train/a", "test/a", "test/b"):
        write(tmp_path / "parts" / f"{name}.txt", "text" if name == "train/a" else "")
    assert "the test part is empty" in error(tmp_path / "parts")


@pytest.mark.parametrize("seed", range(8))
def test_a_large_document_is_not_held_out_whole(tmp_path: Path, seed: int) -> None:
    sizes = [120_000, 3000, 1000, 2000, 4000]
    for i, n in enumerate(sizes):
        write(tmp_path / f"{i}.txt", "".join(f"{i} {j:05}\n" for j in range(n // 8)))
    data = read(tmp_path, held_out=0.1, split_seed=seed)
    assert 0 < len(data.test.ids) <= 0.19 * sum(sizes)
    assert len(data.test.documents) == 4, "the small ones, as they are less than a tenth"
    write(tmp_path / "5.txt", "x\n" * 60_000)
    for i in range(1, 5):
        (tmp_path / f"{i}.txt").unlink()
    cut = read(tmp_path, held_out=0.1, split_seed=seed)
    whole = "".join((tmp_path / f"{i}.txt").read_text() for i in (0, 5))
    assert len(cut.test.ids) == 24_001, "neither fits, so the end of the first is held out"
    assert cut.tokenizer.decode(cut.test.ids.tolist()) == whole[96_000:120_000]
    assert len(cut.train.documents) == 2


# ---- pairs ----


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_aligned_files(tmp_path: Path, suffix: str) -> None:
    for part, n in (("train", 3), ("val", 2), ("test_2016_flickr", 1)):
        for side in ("de", "en"):
            write(tmp_path / f"{part}.{side}{suffix}", "".join(f"{side} {part} {i}\n" for i in range(n)))
    data = read(tmp_path, pair=["de", "en"])
    assert data.kind == "pairs"
    assert (len(data.train), len(data.test), data.part) == (3, 2, "val")
    source, target = data.train.sequences["source"][1], data.train.sequences["target"][1]
    assert data.tokenizer.decode(source) == "de train 1"
    assert data.tokenizer.decode(target) == "en train 1"
    assert source[-1] == target[-1] == data.tokenizer.eos_id
    assert target[0] == data.tokenizer.bos_id != source[0]
    assert data.tokenizer.decode(data.test.sequences["source"][0]) == "de val 0"
    other = read(tmp_path, pair=["en", "de"], evaluate_on="test")
    assert other.tokenizer.decode(other.test.sequences["source"][0]) == "en test_2016_flickr 0"
    assert "no two files such as train.en and train.fr" in error(
        tmp_path, pair=["en", "fr"], format="aligned"
    )
    write(tmp_path / f"train.en{suffix}", "one\ntwo\n")
    assert f"{tmp_path / 'train.de'}{suffix}: 3 lines, and train.en{suffix} has 2." in error(
        tmp_path, pair=["de", "en"]
    )


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "tsv with header"])
def test_pairs_from_rows(tmp_path: Path, kind: str) -> None:
    pairs = [(f"source {i}", f"target {i}") for i in range(10)]
    if kind == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", *({"source": s, "target": t, "more": 1} for s, t in pairs))
    else:
        head = "target\tsource\n" if kind.endswith("header") else ""
        lines = (f"{t}\t{s}\n" if head else f"{s}\t{t}\n" for s, t in pairs)
        path = write(tmp_path / "a.tsv", head + "".join(lines))
    data = read(path)
    assert data.kind == "pairs"
    assert (len(data.train), len(data.test)) == (8, 2)
    found = set()
    for split in (data.train, data.test):
        both = (split.sequences["source"], split.sequences["target"])
        found |= {tuple(data.tokenizer.decode(side[i]) for side in both) for i in range(len(split))}
    assert found == set(pairs)


def test_pairs_too_long_or_empty_are_left_out_of_training_alone(tmp_path: Path) -> None:
    rows = [{"source": "a" * n, "target": "b"} for n in (0, 1, 7, 8, 50)]
    jsonl(tmp_path / "train.jsonl", *rows)
    jsonl(tmp_path / "test.jsonl", *rows)
    data = read(tmp_path, context=8)
    assert (len(data.train), len(data.test)) == (2, 5)
    assert data.notes == ("left out 3 empty pairs or pairs of over 8 tokens",)
    assert "no training sample has at most data.context = 2 tokens" in error(tmp_path, context=2)


# ---- tasks ----


def texts_of(data: DataSet, sample: int) -> list[str]:
    """The sequences of a training sample, special tokens as signs."""
    tokenizer, ids = data.tokenizer, data.train.sequences["ids"]
    signs = {tokenizer.bos_id: "^", tokenizer.delim_id: "|", tokenizer.extract_id: "$"}
    found = [ids[sample * ids.group + i] for i in range(ids.group)]
    return ["".join(signs.get(i) or chr(i) for i in sequence) for sequence in found]


def similarity(path: Path, *labels: str) -> Path:
    """Rows with labels as they are written."""
    if path.suffix == ".tsv":
        return write(path, "first\tsecond\tlabel\n" + "".join(f"a\tb\t{label}\n" for label in labels))
    return write(path, "".join(f'{{"first": "a", "second": "b", "label": {label}}}\n' for label in labels))


@pytest.mark.parametrize(
    ("form", "row", "classes", "sequences"),
    [
        ("classification", {"text": "fine", "label": "good"}, ("bad", "good"), ["^fine$"]),
        (
            "entailment",
            {"premise": "p", "hypothesis": "h", "label": "yes"},
            ("no", "yes"),
            ["^p|h$"],
        ),
        ("similarity", {"first": "a", "second": "b", "label": 1}, ("0", "1"), ["^a|b$", "^b|a$"]),
        ("choice", {"context": "c", "choices": ["x", "y"], "answer": 1}, ("0", "1"), ["^c|x$", "^c|y$"]),
    ],
)
def test_the_four_task_forms(
    tmp_path: Path, form: str, row: dict[str, Any], classes: tuple[str, ...], sequences: list[str]
) -> None:
    key = "answer" if form == "choice" else "label"
    other = row | {key: 0 if isinstance(row[key], int) else classes[0]}
    jsonl(tmp_path / "train.jsonl", row, other)
    jsonl(tmp_path / "test.jsonl", other)
    data = read(tmp_path)
    assert (data.kind, data.form, data.classes) == ("tasks", form, classes)
    assert texts_of(data, 0) == sequences
    assert data.train.tensors["labels"].tolist() == [1, 0]
    assert data.test.tensors["labels"].tolist() == [0]


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
@pytest.mark.parametrize("labels", ["2.5 4 0", "3.0 -1 1e-1", "0.000 3.250 5.000"])
def test_similarity_as_a_number(tmp_path: Path, suffix: str, labels: str) -> None:
    path = similarity(tmp_path / f"a{suffix}", *labels.split())
    data = read(path, held_out=0.4)
    assert data.num_classes == 0
    both = torch.cat([data.train.tensors["targets"], data.test.tensors["targets"]])
    wanted = torch.tensor(sorted(map(float, labels.split())))
    assert torch.equal(both.flatten().sort().values, wanted)
    path = similarity(path, "2.5", "1" + 60 * "0" if suffix == ".tsv" else '"x"')
    assert "is no number, as other rows have" in error(path)
    assert f"{path}, line " in error(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
def test_similarity_as_whole_numbers_is_classes(tmp_path: Path, suffix: str) -> None:
    path = similarity(tmp_path / f"a{suffix}", *["10", "-1", "2"] * 2)
    assert read(path, held_out=0.5).classes == ("2", "10", "-1")


def test_classes_with_numbers_are_in_their_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": "t", "label": i % 11} for i in range(44)))
    assert read(path).classes == tuple(map(str, range(11)))
    long = "7" * 5001  # more digits than int() takes
    jsonl(path, *({"text": "t", "label": label} for label in (long, "b", 2) * 2))
    assert read(path, held_out=0.5).classes == ("2", long, "b")


def test_files_of_one_part_may_have_other_classes(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", {"text": "a", "label": "x"})
    jsonl(tmp_path / "train-1.jsonl", {"text": "a", "label": "y"})
    jsonl(tmp_path / "train-2.jsonl", {"text": "a", "label": "x"})
    data = read(tmp_path)
    assert data.classes == ("x", "y")
    assert (len(data.train), len(data.test)) == (2, 1)


@pytest.mark.parametrize(
    ("premise", "hypothesis", "context", "found"),
    [
        ("0123456", "abc", 13, "^0123456|abc$"),
        ("0123456789", "abc", 10, "^0123|abc$"),
        ("01", "abcdefghij", 10, "^01|abcde$"),
        ("0123456789", "abcdefghij", 10, "^012|abcd$"),
        ("0123456789", "abc", 4, "^|a$"),
        # However short: the token that the answer is read off stays.
        ("0", "a", 2, "^$"),
        ("0", "a", 1, "$"),
    ],
)
def test_of_two_texts_the_longer_one_is_cut(
    tmp_path: Path, premise: str, hypothesis: str, context: int, found: str
) -> None:
    row = {"premise": premise, "hypothesis": hypothesis, "label": 0}
    short = {"premise": "", "hypothesis": "", "label": 1}
    jsonl(tmp_path / "train.jsonl", row, short)
    jsonl(tmp_path / "test.jsonl", row)
    data = read(tmp_path, context=context)
    assert texts_of(data, 0) == [found]
    fits = found == f"^{premise}|{hypothesis}$"
    n_cut = 0 if fits else 2 + (context < 3)
    assert data.notes == (
        (f"cut the texts of {n_cut} samples, held-out ones too, to {context} tokens",) * bool(n_cut)
    )


def test_a_context_keeps_the_end_that_its_answers_follow(tmp_path: Path) -> None:
    row = {"context": "0123456789", "choices": ["abc", "d"], "answer": 0}
    path = jsonl(tmp_path / "a.jsonl", row, row)
    data = read(path, context=10, held_out=0.5)
    assert texts_of(data, 0) == ["^6789|abc$", "^456789|d$"]
    assert data.notes == ("cut the texts of 2 samples, held-out ones too, to 10 tokens",)
    data = read(path, context=4, held_out=0.5)
    assert texts_of(data, 0) == ["^|a$", "^|d$"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a", "label": 0}', "", '{"text": "b"'], "line 3: not JSON: Expecting ',' delimiter"),
        (['{"text": "a", "label": 0}', '["b"]'], "line 2: is a list, where a row is {...}"),
        (
            ['{"text": "a", "label": 0}', '{"text": "b", "labl": 1}'],
            "line 2: has no 'label'. Did you mean 'labl'? A row here has text, label.",
        ),
        (['{"text": "a", "label": 0}', '{"text": 5, "label": 1}'], "line 2: 'text' is 5, not a text"),
        (['{"sorce": "a", "target": "b"}'], "line 1: has the keys sorce, target, where one of these sets"),
        (['{"sorce": "a", "target": "b"}'], "Did you mean 'source'?"),
        (['{"context": "a", "choices": ["b"], "answer": 0}'], "'choices' is [\"b\"], not a list of two"),
        (['{"context": "a", "choices": ["b", "c"], "answer": 2}'], "line 1: answer 2 is none of 0, 1."),
        (
            [
                '{"context": "a", "choices": ["b", "c"], "answer": 0}',
                '{"context": "a", "choices": ["b", "c", "d"], "answer": 1}',
            ],
            "line 2: has 3 choices, and the first row has 2",
        ),
        (
            ['{"first": "a", "second": "b", "label": 0.5}', '{"first": "a", "second": "b", "label": "x"}'],
            "line 2: label 'x' is no number",
        ),
        (['{"first": "a", "second": "b", "label": NaN}'], "line 1: 'label' is NaN, not a name or a number"),
        (['{"text": "a", "label": 1' + "0" * 400 + "}"], "not a name or a number of at most 1e+38. Correct"),
        (['{"first": "a", "second": "b", "label": -1e39}'], "line 1: 'label' is -1e+39, not a name or"),
        ([""], "has no rows"),
        (['{"text": "a\\ud800", "label": 0}'], "line 1: 'text' is no valid Unicode"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    assert (found := error(path)).startswith(str(path))
    assert message in found


def test_a_label_that_training_does_not_know(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "a", "label": "good"}, {"text": "b", "label": "bad"})
    path = jsonl(tmp_path / "test.jsonl", {"text": "a", "label": "godo"})
    assert f"{path}, line 1: label 'godo' is none of bad, good. Did you mean 'good'?" in error(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = "".join(f"zwei {i}\ttwo {i}\n" for i in range(10))
    (tmp_path / "a.tsv").write_text("de\ten\n" + lines, encoding="utf-8-sig")
    data = read(tmp_path / "a.tsv", tokenizer="bytes", pair=("de", "en"))
    assert len(data.train) + len(data.test) == 10


def test_a_tsv_line_without_a_tab(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "a\tb\nc d\n")
    assert f"{path}, line 2: has 1 of 2 columns parted by tabs" in error(path)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("train.jsonl", "train.tsv"), ("train.jsonl", "train.tsv")),
        (("train.jsonl", "train.tsv.gz"), ("train.jsonl", "train.tsv.gz")),
        (
            ("train-images-idx3-ubyte", "train-images.idx3-ubyte.gz"),
            ("train-images-idx3-ubyte", "train-images.idx3-ubyte.gz"),
        ),
    ],
)
def test_a_part_that_is_there_twice(tmp_path: Path, names: tuple[str, ...], wrong: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name, "a\n")
    message = error(tmp_path, pair=["de", "en"])
    assert f"{tmp_path / wrong[0]}: stands for the same as {wrong[1]} beside it." in message


def test_a_file_may_lie_beside_its_packed_self(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.jsonl.gz"):  # as gunzip -k leaves them
        write(tmp_path / name, "".join(f'{{"text": "{i}", "label": {i % 2}}}\n' for i in range(20)))
    assert len(load(DataConfig(source=str(tmp_path), held_out=0.5)).train) == 10


@pytest.mark.parametrize("name", ["sub.txt", "test.tsv", "test.de", "test-images-idx3-ubyte"])
def test_a_folder_is_no_file_whatever_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "a.txt", "one\ntwo\n")
    write(tmp_path / "b.txt", "three\nfour\n")
    write(tmp_path / "test.en", "")
    data = read(tmp_path, pair=["de", "en"], held_out=0.5)
    assert (data.kind, len(data.train.documents)) == ("text", 1)


# ---- the Hub ----


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("hub_cache")
def test_images_in_the_format_of_the_hub(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    folder = tmp_path / "owner" / "pets"
    (folder / "data").mkdir(parents=True)
    for part, n in (("train", 4), ("test", 2)):
        arrays = [np.full((5, 4), 10 * i, np.uint8) for i in range(n)]
        rows = {"image": [Image.fromarray(a) for a in arrays], "label": [i % 2 for i in range(n)]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(
            folder / "data" / f"{part}-00000-of-00001.parquet"
        )
    data = read(f"hub:{folder}")
    assert (data.name, data.kind, data.classes) == ("pets", "images", ("cat", "dog"))
    assert data.train.tensors["inputs"].shape == (4, 1, 5, 4)  # grey as they are
    assert data.train.tensors["inputs"][:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert data.test.tensors["labels"].tolist() == [0, 1]


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("row", [3, 16])  # of the first few the colours are looked at before
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", None, "has no 'image'. Fill it in, or remove the row."),
        ("image", {"bytes": b"junk"}, "cannot be opened: no picture. Restore or remove it."),
        ("label", None, "has no 'label'. Fill it in, or remove the row."),
    ],
)
def test_holes_in_images_of_the_hub(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], row: int, column: str, value: Any, message: str
) -> None:
    import datasets

    picture(tmp_path / "0.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = [{"image": {"bytes": (tmp_path / "0.png").read_bytes()}, "label": 0} for _ in range(20)]
    rows[row - 1][column] = value
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "pets" / "train.parquet")
    datasets.enable_progress_bars()
    assert error(source := f"hub:{tmp_path / 'pets'}").startswith(f"{source}, train, row {row}: {message}")
    assert "Generating" not in capfd.readouterr().err


@pytest.mark.usefixtures("hub_cache")
def test_texts_in_the_format_of_the_hub(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "books" / "train.jsonl",
        *({"translation": {"de": f"d{i}", "en": f"e{i}"}} for i in range(5)),
    )
    jsonl(tmp_path / "books" / "validation.jsonl", {"translation": {"de": "dv", "en": "ev"}})
    data = read(f"hub:{tmp_path / 'books'}", pair=["en", "de"])
    assert (data.kind, len(data.train), len(data.test)) == ("pairs", 5, 1)
    assert data.tokenizer.decode(data.test.sequences["target"][0]) == "dv"
    assert "train, row 1: has the keys translation, de, en" in error(f"hub:{tmp_path / 'books'}")


@pytest.mark.parametrize("source", ["hub:sums", "hub:", "hub:../x/y"])
def test_a_name_the_hub_cannot_have(source: str) -> None:
    assert f"{source}: not understood. A data set on the Hub is hub:OWNER/NAME" in error(source)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*names: Any) -> None:
        raise ConnectionError("Couldn't reach it.\nSee above")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert error("hub:me/sums") == (
        "hub:me/sums: cannot be loaded: Couldn't reach it. Check the name and the network, or name a file."
    )


# ---- settings ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": ""}, "data.source: must name"),
        ({"format": "csv"}, "data.format: 'csv' is none of auto, idx"),
        ({"held_out": 1.0}, "data.held_out: 1.0 must lie between"),
        ({"limit": 1}, "data.limit: must be at least 2"),
        ({"pair": ["de"]}, "data.pair"),
        ({"pair": ["de", "de"]}, "data.pair"),
        ({"vocab_size": 256}, "data.vocab_size"),
        ({"context": 0}, "data.context"),
        ({"img_size": 0}, "data.img_size"),
        ({"batch_tokens": -1}, "data.batch_tokens"),
        ({"split_seed": -1}, "data.split_seed"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**({"source": "digits"} | values))  # type: ignore[arg-type]


def test_settings_stand_in_yaml() -> None:
    values = {"source": "digits", "limit": 1e2, "augment": {"shift": 2}, "pair": ["de", "en"]}
    settings = config.build(DataConfig, values, {"augment.flip": True}, "a.yaml")
    assert settings.limit == 100
    assert settings.augment == AugmentConfig(shift=2, flip=True)
    with pytest.raises(LabError, match=r"unknown key 'augment.flop'. Did you mean 'augment.flip'"):
        config.build(DataConfig, {"source": "digits", "augment": {"flop": True}}, {}, "a.yaml")


def test_settings_that_do_not_fit_the_data(tmp_path: Path) -> None:
    assert "data.augment: is for images, and iris holds table" in error(
        "iris", augment=AugmentConfig(flip=True)
    )
    assert "data.batch_tokens: is for pairs and tasks, and iris holds table" in error("iris", batch_tokens=9)
    assert "data.format = 'idx': is for files and folders" in error("iris", format="idx")
    path = write(tmp_path / "a.txt", "text")
    assert "data.format = 'idx' is of a folder" in error(path, format="idx")
    assert f"{tmp_path}: holds no .npy or .npz file" in error(tmp_path, format="npz")
