"""Run folders as accidents and strangers leave them: every one from a seed."""

import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.mutants import VALUES

Draw = random.Random


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file() and not path.is_symlink())


def _resign(path: Path) -> None:
    """Makes the manifests of a folder agree with a changed file again, as somebody who means harm would."""
    for folder in (path.parent, path.parent.parent, *path.parent.parent.glob("*")):
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            continue
        try:
            listed = json.loads(manifest.read_text())
            for name, entry in listed["files"].items():
                file = folder / name
                if file.is_file():
                    entry |= {
                        "bytes": file.stat().st_size,
                        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    }
            manifest.write_text(json.dumps(listed))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in pairs:
        found += [(*above, key), *_places(item, (*above, key))]
    return found


def cut_off(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice(_files(folder))
    os.truncate(path, draw.randrange(path.stat().st_size + 1))
    return f"cut off {path.name}"


def flip(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice([path for path in _files(folder) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    if draw.random() < 0.5:
        _resign(path)
    return f"flipped bytes of {path.name}"


def lose(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice(sorted(folder.rglob("*")))
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return f"lost {path.name}"


def replace(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice(_files(folder))
    texts = (
        "",
        "{}",
        "[]",
        "null",
        "NaN",
        "[" * 100_000,
        '{"a":' * 50_000,
        "9" * 6_000,
        "\x00" * 100,
        '"\\ud800"',
    )
    text = draw.choice(
        [*texts, path.read_text(errors="replace") * 2, "{}\n" * 50, '{"global_step": "x"}\n' * 9]
    )
    path.write_text(text)
    if draw.random() < 0.5:
        _resign(path)
    return f"{path.name} replaced by {text[:12]!r}"


def link_out(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice(
        [*sorted(folder.rglob("*")), folder / ".lock", folder / "evaluations.jsonl", folder / "new"]
    )
    target = draw.choice(
        [outside / "file", outside, outside / "below", outside / "missing", Path("/etc/passwd")]
    )
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.symlink_to(draw.choice([target, Path(os.path.relpath(target, path.parent))]))
    return f"{path.name} a link to {target}"


def link_within(draw: Draw, folder: Path, outside: Path) -> str:
    one, other = draw.choice(sorted(folder.rglob("*"))), draw.choice([folder, *sorted(folder.rglob("*"))])
    shutil.rmtree(one) if one.is_dir() and not one.is_symlink() else one.unlink()
    one.symlink_to(os.path.relpath(other, one.parent))
    return f"{one.name} a link to {other.name}"


def no_file(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice([*_files(folder), folder / "evaluations.jsonl"])
    path.unlink(missing_ok=True)
    os.mkfifo(path) if draw.random() < 0.5 else path.mkdir()
    return f"{path.name} a pipe or a folder"


def other_json(draw: Draw, folder: Path, outside: Path) -> str:
    """One value in a record or a state changed, hashes corrected: what a stranger would do."""
    path = draw.choice(
        [path for path in _files(folder, "*.json") if path.name != "manifest.json"] or _files(folder)
    )
    try:
        whole = value = json.loads(path.read_text())
        where = draw.choice(_places(value))
    except (ValueError, IndexError):
        return cut_off(draw, folder, outside)
    for key in where[:-1]:
        value = value[key]
    chosen = draw.choice(VALUES)
    if draw.random() < 0.15:
        del value[where[-1]]
    else:
        value[where[-1]] = chosen
    path.write_text(json.dumps(whole))
    _resign(path)
    return f"{path.name}: {'.'.join(map(str, where))} = {str(chosen)[:40]!r}"


def other_manifest(draw: Draw, folder: Path, outside: Path) -> str:
    manifests = _files(folder, "manifest.json")
    if not manifests:
        return lose(draw, folder, outside)
    path = draw.choice(manifests)
    listed = json.loads(path.read_text())
    name = draw.choice(sorted(listed["files"]))
    if draw.random() < 0.4:
        entry = listed["files"].pop(name)
        listed["files"][
            draw.choice(["../../../../elsewhere/file", "/etc/passwd", "a\0b", "", ".", "x" * 300])
        ] = entry
    elif draw.random() < 0.5:
        listed["files"][name] = draw.choice([*VALUES[:40], {"bytes": -1, "sha256": ""}])
    else:
        listed[draw.choice(["format", "files"])] = draw.choice(VALUES)
    path.write_text(json.dumps(listed))
    return f"manifest of {path.parent.name}: {name}"


def other_tensors(draw: Draw, folder: Path, outside: Path) -> str:
    """Tensors missing, too many, renamed, of other sizes or kinds, not numbers; hashes corrected."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    files = _files(folder, "*.safetensors")
    if not files:
        return replace(draw, folder, outside)
    path = draw.choice(files)
    try:
        tensors = load_file(path)
    except Exception:
        return cut_off(draw, folder, outside)
    if not tensors:
        return cut_off(draw, folder, outside)
    name = draw.choice(sorted(tensors))
    value = tensors.pop(name)
    how = draw.choice(["lost", "renamed", "added", "longer", "flat", "float16", "nan", "empty", "int"])
    changed = {
        "lost": {},
        "renamed": {f"{name}x": value},
        "added": {name: value, "more": value},
        "longer": {name: value.repeat(2, axis=-1) if value.ndim else value.reshape(1)},
        "flat": {name: value.reshape(-1)},
        "float16": {name: value.astype("float16")},
        "nan": {name: value.astype("float32") * float("nan")},
        "empty": {name: value.reshape(-1)[:0]},
        "int": {name: value.astype("int64")},
    }[how]
    save_file({key: np.array(tensor) for key, tensor in (tensors | changed).items()}, path)
    _resign(path)
    return f"{path.parent.name}/{path.name}: {name} {how}"


def bomb(draw: Draw, folder: Path, outside: Path) -> str:
    path = draw.choice(_files(folder))
    path.write_bytes(gzip.compress(b"\0" * 2**26))
    return f"{path.name} a bomb"


def hostile_names(draw: Draw, folder: Path, outside: Path) -> str:
    """Names that a terminal, a table, a plot or a page may obey."""
    path = folder / "run.json"
    if not path.is_file():
        return lose(draw, folder, outside)
    info = json.loads(path.read_text())
    for key in ("name", "group", "id", "job_type", "x_axis"):
        info[key] = draw.choice(
            [
                "\x1b]0;title\x07",
                "\u202etxt",
                "=HYPERLINK(1)",
                "$\\foo$",
                "<!--<script>",
                "</script>",
                "a\nb",
                "%n",
                "[red]x",
            ]
        )
    path.write_text(json.dumps(info))
    return "hostile names"


DAMAGES: tuple[Callable[[Draw, Path, Path], str], ...] = (
    *(cut_off, flip, lose, replace, link_out, link_out, link_within, no_file, bomb, hostile_names),
    *(other_json, other_json, other_json, other_manifest, other_tensors, other_tensors),
)
