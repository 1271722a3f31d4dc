"""What `lab sync` finds in a run folder: the rows it kept, and what was verified of them before."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lab import locks, records
from lab.errors import LabError, did_you_mean
from lab.files import explain_write_errors, lines_of, open_own, sha256_file
from lab.sync_rows import Row, identity, without
from lab.tracking import _server_url


class Part(NamedTuple):
    """Rows that were kept in one place."""

    file: Path | None
    """A W&B file; None: metrics.jsonl."""
    rows: list[Row]
    is_cut: bool = False
    """Whether the file does not say that its session ended."""
    entity: str = ""
    """Whose run the file says it is."""


@dataclass(frozen=True)
class Source:
    """A run folder to be sent."""

    folder: Path
    info: dict[str, Any]
    """Its run.json."""

    @property
    def files(self) -> list[Path]:
        """W&B's files, one a session, the first one first; those of online sessions may not have arrived."""
        found = self.folder.glob(f"wandb/*run-*/run-{self.info['id']}.wandb")
        sessions = [path for path in found if not path.parent.is_symlink()]  # W&B's latest-run is one
        return sorted(sessions, key=lambda path: path.parent.name.removeprefix("offline-"))

    @property
    def record(self) -> Path:
        """Where it is noted what was verified."""
        return self.folder / "wandb" / "synced.json"

    @property
    def made_without(self) -> bool:
        """Whether whoever started it wanted no W&B."""
        tracked = self.info.get("wandb") or {}
        return tracked.get("mode") == "disabled" and tracked.get("why") == "asked for" and not self.files

    def metrics(self, name: str) -> tuple[list[Row], int]:
        """The rows of one of the folder's files as W&B knows them, and how many lines are damaged."""
        rows: list[Row] = []
        damaged = 0
        with contextlib.suppress(FileNotFoundError):
            for line in lines_of(self.folder / name):
                if not line.endswith(b"\n"):  # half a row, after a kill
                    break
                try:
                    row = json.loads(line)
                    rows.append({"_timestamp" if key == "_time" else key: x for key, x in row.items()})
                except (ValueError, AttributeError, RecursionError):
                    damaged += 1
        return rows, damaged

    def parts(self) -> tuple[list[Part], int]:
        """Everything that belongs on the server, in the order of logging; how many lines are damaged."""
        parts = []
        for file in self.files:
            read = records._read_fragment(file)
            if isinstance(read, str):
                parts.append(Part(file, [], is_cut=True))
            else:
                entity = read.info.get("entity", "")
                parts.append(Part(file, read.rows, is_cut=read.exit_code is None, entity=entity))
        mirrored = Counter(identity(row) for part in parts for row in part.rows)
        rows, damaged = self.metrics("metrics.jsonl")
        return [*parts, Part(None, without(rows, mirrored))], damaged

    def state(self) -> dict[str, str]:
        """The hash of everything that rows come from."""
        paths = [path for path in (*self.files, self.folder / "metrics.jsonl") if path.exists()]
        return {str(path.relative_to(self.folder)): sha256_file(path) for path in paths}

    def verified(self, state: Mapping[str, str]) -> dict[str, Any] | None:
        """What was verified, if it was this, on this server."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self.record.read_text(encoding="utf-8"))
            if record["files"] == state and record["server"] == _server_url() and record["rows"]:
                return record
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[int, ...] | None]:
    """Locks a run; yields what a process must inherit to hold the lock too, or None if it is taken."""
    path = folder / ".lock"
    with explain_write_errors(str(path), "lab sync must be able to lock a run: send a copy of it."):
        file = open_own(path, "ab", alone=False)
    with file:
        yield (file.fileno(),) if locks.lock(file) else None


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders in `paths`, or around them, each once.

    Raises:
        LabError: a path is not there, or there is no run in it.
    """
    runs: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
            raise LabError(f"{path}: not there.{near} Name a run folder or a folder of them.")
        found, _ = records._find(path)
        # W&B's folders and files within a run folder stand for the run.
        found = found or [above for above in path.parents if (above / "run.json").exists()][:1]
        if not found:
            raise LabError(
                f"{path}: no run folder in it. Name one, e.g. runs/pong. W&B's own folders, without "
                "a run's, are for `wandb sync`."
            )
        runs |= {folder.resolve(): folder for folder in found}
    return list(runs.values())
