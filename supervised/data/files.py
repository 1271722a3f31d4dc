"""Files as text: in the encoding they say they are in, and refused rather than guessed at."""

from pathlib import Path

from lab.errors import LabError
from lab.unpack import PICKLE, bare_suffix, read_bytes, what_is

_REMEDIES = {
    "a zip archive": "Unpack it, and name what was in it.",
    "a 7z archive": "Unpack it, and name what was in it.",
    "a tar archive": "Unpack it, and name what was in it.",
    "a picture": "Name a folder of pictures.",
    "HDF5": "Save its arrays as .npz.",
    "a MATLAB file": "Save its arrays as .npz.",
    "Arrow": "Save it as Parquet.",
    PICKLE: "Opening it would run code, so it is never loaded. Save its arrays as .npz, or its rows as .csv.",
}
"""What to do with a file that is not read, by what it is."""
_PROGRAMS = {
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), "Excel or the like"),
    **{".dta": "Stata", ".sav": "SPSS", ".sas7bdat": "SAS", ".rds": "R", ".rdata": "R"},
}
"""Whose files of a suffix are, where they are tables that their program can write as CSV."""


def read_text(path: Path, errors: str = "strict", *, asked: bool = False) -> str:
    """A file's text, without a byte order mark: UTF-8, or UTF-16 or 32 if it begins with their mark.

    Args:
        path: the file; a packed one is unpacked.
        errors: what becomes of bytes that are no UTF-8, as `bytes.decode` takes it.
        asked: it was asked for as text, so nothing is known better.

    Raises:
        LabError: it cannot be read, is in another encoding, or looks like no text at all.
    """
    data = read_bytes(path)
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError as error:
                raise LabError(
                    f"{path}: begins as {encoding.upper()}, but is not ({error.reason}). Save it as UTF-8."
                ) from None
    if not asked:
        require_text(data, path)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LabError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Convert the file, e.g. with `iconv -f latin1 "
            "-t utf-8`."
        ) from None


def require_text(data: bytes, path: Path) -> None:
    """Raises if these bytes, a file's, are of a known binary format or hold a zero byte, as no text does.

    Raises:
        LabError: they do.
    """
    name = what_is(data[:512])
    if program := _PROGRAMS.get(bare_suffix(path)):
        raise LabError(f"{path}: is a file of {program}, which is not read. Save it there as CSV (UTF-8).")
    if name is None and (at := data.find(b"\0")) >= 0:
        raise LabError(
            f"{path}: is no text: byte {at + 1:,} is 0. Name a file of a kind that is read, or set "
            "data.format=text to learn its bytes as they are."
        )
    if name is not None:
        raise LabError(
            f"{path}: is {name}, which is not read. "
            + _REMEDIES.get(name, "Name a file of a kind that is read.")
            + ("" if name == PICKLE else " data.format=text learns its bytes as they are.")
        )
