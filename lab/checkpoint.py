"""Checkpoints: atomic, hashed, self-describing and safe to load.

    checkpoints/
      step_000100000/     manifest.json  state.json  model.safetensors  ...
      latest -> step_000100000
      best/               weights with the highest evaluation so far
      shared/             files several checkpoints use, e.g. segments of the replay memory

A checkpoint is written into a folder aside, synced, and renamed: it is there whole or not at all. Its
manifest holds the size and SHA-256 of every file it needs, its own and the shared ones; all are checked
before anything is loaded. Tensors are safetensors, all else is JSON: loading one runs no code.
"""

import contextlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError, first_line
from lab.files import (
    MOST_JSON_BYTES,
    explain_write_errors,
    open_own,
    read_json,
    safetensors_errors,
    sha256_file,
    sync_folder,
)

if TYPE_CHECKING:
    import torch

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, "torch.Tensor"]:
        """The tensors of `name`.safetensors, on the CPU.

        Raises:
            LabError: it is not there, or no such file: a hash vouches for nothing but its bytes.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise LabError(f"{file}: {first_line(error).rstrip('.')}. Restore it from a copy.") from None

    def weights(self, name: str = "model") -> dict[str, "torch.Tensor"]:
        """The tensors of `name`.safetensors, to compute with.

        Raises:
            LabError: as `tensors`, or one is not finite, of which every result would be without meaning.
        """
        found = self.tensors(name)
        for key, tensor in found.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise LabError(
                    f"{self.path / name}.safetensors: {key} is not finite: the run diverged, or it was "
                    "changed. Name another checkpoint."
                )
        return found

    @contextlib.contextmanager
    def restoring(self, captured: Callable[[], Mapping[str, Mapping[str, "torch.Tensor"]]]) -> Iterator[None]:
        """Within, a run goes back to this checkpoint; what does not fit it is refused, and so is what it
        would not write itself: every file whole and of the right hash may still be another run's.

        Args:
            captured: what would now be written, by file and name; called when the block has ended.

        Raises:
            LabError: something is missing, too much, or of another kind or size.
        """
        try:
            yield
            for stem, tensors in captured().items():
                there = {key: (value.shape, value.dtype) for key, value in self.tensors(stem).items()}
                here = {key: (value.shape, value.dtype) for key, value in tensors.items()}
                for key in {**there, **here}:
                    if there.get(key) != here.get(key):
                        raise ValueError(f"{key} in {stem}.safetensors")
        except _misfits() as error:
            raise LabError(
                f"{self.path}: does not fit this run ({type(error).__name__}: {first_line(error)[:160]}). "
                "Restore it from a copy, or delete it to go back to an earlier one."
            ) from error


def _misfits() -> tuple[type[Exception], ...]:
    """What torch, numpy and the parts of a run make of values and tensors that are not theirs."""
    from safetensors import SafetensorError

    of_values = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError)
    return (*of_values, RuntimeError, MemoryError, OSError, zlib.error, SafetensorError)


def step_name(step: int) -> str:
    """The folder name of the checkpoint at `step`; names sort as steps do."""
    return f"step_{step:012d}"


@contextlib.contextmanager
def written(root: Path, name: str, shared: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields an empty folder; what is put into it becomes the checkpoint `name` when the block ends.

    Args:
        root: the run's `checkpoints/` folder.
        name: folder name, e.g. `step_name(step)` or "best"; replaces one of that name.
        shared: files under `root` that this checkpoint also needs, already written and synced.

    The block must leave a state.json. If it raises, there is no new checkpoint and the old ones are as
    they were.

    Raises:
        LabError: it cannot be written (disk full, no permission).
    """
    aside = root / f".writing-{name}"
    with explain_write_errors(
        str(root / name), f"{_kept(root)} Free some space, then continue with --resume."
    ):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            with safetensors_errors():
                yield aside
            inside = sorted(path for path in aside.rglob("*") if path.is_file())
            files = {path.relative_to(aside).as_posix(): _fingerprint(path) for path in inside}
            files |= {os.path.relpath(file, root / name): _fingerprint(file) for file in shared}
            manifest = aside / "manifest.json"
            manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
            mode = stat.S_IMODE(manifest.stat().st_mode)
            for path in (*inside, manifest):
                path.chmod(mode)  # safetensors gives its files to their owner alone
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
            for folder in {path.parent for path in (*inside, manifest)}:
                sync_folder(folder)
            if (root / name).exists():
                old = root / f".replaced-{name}"
                shutil.rmtree(old, ignore_errors=True)
                (root / name).rename(old)
                aside.rename(root / name)
                shutil.rmtree(old, ignore_errors=True)
            else:
                aside.rename(root / name)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def save(
    root: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, "torch.Tensor"]],
    state: Mapping[str, Any],
    shared: Sequence[Path] = (),
) -> Path:
    """Writes the checkpoint `name` under `root` (see `written`) and returns its folder.

    Args:
        root, name, shared: as of `written`.
        tensors: file stem -> tensor name -> tensor.
        state: JSON values.
    """
    from safetensors.torch import save_file

    with written(root, name, shared) as folder:
        for stem, group in tensors.items():
            flat = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(flat, folder / f"{stem}.safetensors")
        (folder / "state.json").write_text(json.dumps(state, allow_nan=False))
    return root / name


def point(root: Path, link: str, name: str) -> None:
    """Makes the relative link `root/link` point at `name`, atomically."""
    aside = root / f".{link}.tmp"
    with explain_write_errors(str(root / link), "Free some space, then continue with --resume."):
        aside.unlink(missing_ok=True)
        aside.symlink_to(name, target_is_directory=True)
        aside.replace(root / link)
        sync_folder(root)


def steps(root: Path) -> list[Path]:
    """The complete step checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / "manifest.json").exists())


def prune(root: Path, keep: int) -> None:
    """Removes all but the `keep` newest step checkpoints, and shared files none of the rest needs.

    A run that was killed leaves shared files that no checkpoint ever named; so all that lie in shared/ itself
    may go, but no link is followed, and no folder in it is the lab's.
    """
    for old in steps(root)[:-keep]:
        doomed = root / f".deleting-{old.name}"
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    needed: set[Path] = set()
    try:
        for path in steps(root):
            needed |= {Path(os.path.normpath(path / file)) for file in _manifest(path)["files"]}
    except LabError:
        return  # a damaged manifest may need any shared file: leave them all, and let training go on
    shared = root / "shared"
    for file in shared.iterdir() if shared.is_dir() and not shared.is_symlink() else ():
        if file not in needed and file.is_file() and not file.is_symlink():
            file.unlink(missing_ok=True)


def clear(root: Path) -> None:
    """Removes all step checkpoints, as a run does that is finished and keeps what it made elsewhere."""
    for old in root.glob("step_*"):
        doomed = root / f".deleting-{old.name}"
        with contextlib.suppress(OSError):  # on a read-only disk they stay
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    if (root / "latest").is_symlink():
        with contextlib.suppress(OSError):
            (root / "latest").unlink()
    clean_up(root)


def clean_up(root: Path) -> None:
    """Removes what an interrupted save or prune left behind."""
    for path in root.glob(".*"):
        if path.name.startswith((".writing-", ".replaced-", ".deleting-")):
            replaced = root / path.name.removeprefix(".replaced-")
            if path.name.startswith(".replaced-") and not replaced.exists():
                path.rename(replaced)  # killed between the two renames: the old one is still the one
            else:
                shutil.rmtree(path, ignore_errors=True)


def find(root: Path, which: str = "latest") -> Path | None:
    """The folder of checkpoint `which`: a name, "best", or "latest" (the newest complete step)."""
    if which == "latest":
        return next(iter(reversed(steps(root))), None)
    path = root / which
    return path if path.parent == root and which != ".." and path.exists() else None


def load(path: Path) -> Checkpoint:
    """Verifies a checkpoint folder, every file against its hash, and reads its state.

    Raises:
        LabError: something is missing, truncated or altered.
    """
    others = [other.name for other in steps(path.parent) if other.name != path.name]
    remedy = (
        f"Delete {path} to go back to {others[-1]}."
        if others and path.name.startswith("step_")
        else "Train again, or restore the file from a copy."
    )
    if not path.is_dir():
        raise LabError(f"{path}: no such checkpoint. {remedy}")
    listed = _manifest(path, remedy)["files"]
    for file in sorted(path.rglob("*.safetensors")):
        if file.relative_to(path).as_posix() not in listed:
            raise LabError(f"{file}: altered: manifest.json does not list it. {remedy}")
    for file, expected in listed.items():
        target = path / file
        if not target.is_file():
            raise LabError(f"{target}: missing from the checkpoint. {remedy}")
        size = target.stat().st_size
        if size != expected["bytes"]:
            raise LabError(f"{target}: truncated: {size} of {expected['bytes']} bytes. {remedy}")
        if sha256_file(target) != expected["sha256"]:
            raise LabError(f"{target}: altered: its SHA-256 is not the one in manifest.json. {remedy}")
    state = read_json(path / "state.json", "a checkpoint's state")
    length = state.get("metrics_bytes", 0) if isinstance(state, dict) else None
    if not isinstance(length, int) or not 0 <= length < 2**63:
        raise LabError(f"{path / 'state.json'}: damaged: not what the lab writes. {remedy}")
    return Checkpoint(path, state)


def weights_hash(path: Path) -> str:
    """SHA-256 of the weights in a checkpoint, as its manifest has it: how a later run names its parent."""
    return _manifest(path)["files"]["model.safetensors"]["sha256"]


def _manifest(path: Path, remedy: str = "Restore it from a copy.") -> dict[str, Any]:
    try:
        with open_own(path / "manifest.json", "rb") as file:
            if os.fstat(file.fileno()).st_size > MOST_JSON_BYTES:
                raise ValueError
            manifest = json.loads(file.read())
        if manifest["format"] != FORMAT:
            raise LabError(
                f"{path}: written in checkpoint format {manifest['format']}, this version reads {FORMAT}. "
                "Use the version of the lab named in run.json."
            )
        files = manifest["files"]
        if "state.json" not in files or any({"bytes", "sha256"} - file.keys() for file in files.values()):
            raise KeyError
        if not all(isinstance(file["bytes"], int) and "\0" not in name for name, file in files.items()):
            raise ValueError
        return manifest
    except FileNotFoundError:
        raise LabError(f"{path}: no checkpoint: it has no manifest.json. {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LabError(f"{path / 'manifest.json'}: damaged. {remedy}") from None


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _kept(root: Path) -> str:
    newest = find(root)
    return f"The checkpoint {newest.name} is whole." if newest else "No earlier checkpoint was harmed."
