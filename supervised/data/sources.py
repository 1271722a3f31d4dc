"""Where data sets are found: by name, as a file or folder, on the Hub."""

from collections.abc import Callable
from pathlib import Path

from lab.errors import LabError, did_you_mean
from lab.unpack import bare_suffix, head_of, what_is
from supervised.data import arrays, bundled, image_tables, images, texts
from supervised.data.config import DataConfig
from supervised.data.files import require_text
from supervised.data.raw import Raw, Reading, visible

_READERS: dict[str, Callable[[Path, DataConfig, Reading], Raw]] = {
    "idx": images.read_idx_folder,
    "image_folder": images.read_image_folder,
    "npz": arrays.read_arrays,
    "text": texts.read_texts,
    "aligned": texts.read_aligned,
    "rows": texts.read_rows,
}


def names() -> list[str]:
    """The data sets that are there by name."""
    return sorted(bundled.READERS)


def check(config: DataConfig) -> None:
    """Sees that there is such a source, before anything heavy is loaded.

    Raises:
        LabError: there is none, or it may not be looked for.
    """
    if config.source in bundled.READERS or config.source.startswith("hub:"):
        if config.format != "auto":
            raise LabError(
                f"data.format = {config.format!r}: is for files and folders, and {config.source} is found by "
                "name. Leave it out."
            )
        return
    path = Path(config.source)
    try:
        if path.exists():
            return
        nearby = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:  # too long a name, or a folder that is closed
        raise LabError(
            f"data.source = {config.source[:80]!r}: {error.strerror}. Name another file or folder."
        ) from None
    hint = did_you_mean(config.source, [*names(), *nearby])
    if not hint and path.suffix == ".npz":
        hint = f" Is it a record of play? `lab frames GAME --out {path}` makes one."
    raise LabError(
        f"data.source = {config.source!r}: no such data set, file or folder.{hint} By name there are "
        f"{', '.join(names())}; on the Hub, hub:OWNER/NAME."
    )


def read(config: DataConfig, reading: Reading | None = None) -> Raw:
    """What a config names, as it is there.

    Args:
        config: the data's.
        reading: what the objective wants of data that could be taken in two ways.

    Raises:
        LabError: it is not there, or cannot be used.
    """
    check(config)
    if config.source in bundled.READERS:
        return bundled.READERS[config.source](config)
    if config.source.startswith("hub:"):
        from supervised.data.hub import read_hub

        return read_hub(config.source.removeprefix("hub:"), config)
    path = Path(config.source)
    try:
        if config.format in ("auto", "rows") and not (reading or Reading()).tasks:
            raw = image_tables.read_image_tables(path, config, reading or Reading())
            if raw is not None:
                return raw
        form = config.format if config.format != "auto" else _recognise(path, config)
        if form in ("idx", "image_folder", "aligned") and not path.is_dir():
            raise LabError(f"{path}: data.format = {form!r} is of a folder. Name one.")
        return _READERS[form](path, config, reading or Reading())
    except OSError as error:  # a folder that is closed, a link to itself
        where = error.filename or path
        raise LabError(f"{where}: cannot be read: {error.strerror or error}. Open or remove it.") from None


def _recognise(path: Path, config: DataConfig) -> str:
    """The format of a file by its suffix or by how it begins, of a folder by what lies in it.

    Raises:
        LabError: the file is of none that is read, or nothing in the folder is.
    """
    if path.is_file():
        suffix = bare_suffix(path)
        if suffix in arrays.SUFFIXES:
            return "npz"
        if suffix in texts.ROWS:
            return "rows"
        head = head_of(path)
        if (found := what_is(head)) in ("a numpy array", "Parquet"):
            return "rows" if found == "Parquet" else "npz"
        require_text(head if not head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) else b"", path)
        return "text"
    if not path.is_dir():
        raise LabError(f"{path}: is neither a file nor a folder. Name one.")
    if not visible(path):
        raise LabError(f"{path}: the folder is empty. Name another.")
    if images.find_idx(path):
        return "idx"
    if texts.find_aligned(path, config.pair):
        return "aligned"
    if texts.find_rows(path) and not images.holds_classes(path):  # such rows are about the pictures
        return "rows"
    if arrays.find_arrays(path) and not images.holds_classes(path):
        return "npz"
    if images.holds_pictures(path):
        return "image_folder"
    return "text"
