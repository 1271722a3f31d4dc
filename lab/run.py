"""A run is a folder: everything needed to know, resume, compare or publish it lies inside.

runs/pong/
  run.json          what ran, from what, on what, in which state, and how it ended
  metrics.jsonl     every number, one JSON row a line
  checkpoints/      see lab.checkpoint
  media/            curves and films
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from lab import checkpoint, locks
from lab.config import differences, to_dict, with_defaults
from lab.errors import LabError, brief, did_you_mean
from lab.files import check_contained, explain_write_errors, open_own, read_json, write_json
from lab.tracking import Tracker, rewind, scrub, scrub_argv

PACKAGES = ("torch", "numpy", "gymnasium", "stable-baselines3", "ale-py", "wandb", "safetensors")
STATES = ("running", "finished", "failed", "interrupted")
# What the rest of the lab reads of a run.json; without any of it the file is damaged.
_NEEDED = {
    **dict.fromkeys(("id", "name", "group", "pipeline", "job_type", "x_axis", "state"), str),
    **dict.fromkeys(("config", "compute", "summary"), dict),
    **dict.fromkeys(("parents", "sessions"), list),
}


class Run:
    """An open run folder. Create one with `Run.create` or `Run.resume`."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder, self.info = folder, info
        self._lock: IO[str] | None = None

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:  # it was refused before it went on
            self._release_lock()

    @staticmethod
    def check_new(folder: Path) -> None:
        """Raises a `LabError` unless a new run may be created in `folder`."""
        if (folder / "run.json").exists():
            raise LabError(
                f"{folder}: already holds a run. Continue it with --resume, or choose another folder "
                "with --out."
            )
        if folder.exists() and not folder.is_dir():
            raise LabError(f"{folder}: is a file. Choose another folder with --out.")
        check_contained(folder)
        # Empty folders are what a run leaves that was killed in its first moment.
        if folder.is_dir() and any(path.is_file() and path.name != ".lock" for path in folder.rglob("*")):
            raise LabError(f"{folder}: is not empty and no run. Choose another folder with --out.")

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        pipeline: str,
        job_type: str,
        name: str,
        group: str,
        x_axis: str,
        compute: Mapping[str, Any],
        parents: Iterable[Mapping[str, str]] = (),
    ) -> "Run":
        """Starts a new run in `folder`.

        Raises:
            LabError: the folder already holds a run or other files, or cannot be written.
        """
        cls.check_new(folder)
        info = {
            "id": secrets.token_hex(4),
            "name": name,
            "group": group,
            "pipeline": pipeline,
            "job_type": job_type,
            "x_axis": x_axis,
            "state": "running",
            "seed": config.get("seed"),
            "config": scrub(dict(config)),
            "compute": dict(compute),
            "parents": [dict(parent) for parent in parents],
            "git": git_state(),
            "packages": package_versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "sessions": [],
            "summary": {},
        }
        run = cls(folder, info)
        with explain_write_errors(str(folder), "Choose a folder you may write to with --out."):
            for part in ("checkpoints", "media"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            run._take_lock()
            run._begin_session()
        return run

    @classmethod
    def resume(cls, folder: Path) -> "Run":
        """Opens the run in `folder` to continue it.

        Raises:
            LabError: there is no run, or another process is running it.
        """
        if not (folder / "run.json").exists():
            raise LabError(
                f"{folder}: no run to resume. Leave --resume out to start one.{_nearest_run(folder)}"
            )
        run = cls(folder, _read_info(folder))
        with explain_write_errors(str(folder), "A run can only be continued where you may write."):
            run._take_lock()
            run.info = _read_info(folder)  # what the process before this one wrote last
            checkpoint.clean_up(run.checkpoints)
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Opens a run to read it: nothing is written or locked."""
        if not (folder / "run.json").exists():
            raise LabError(f"{folder}: no run: there is no run.json in it.{_nearest_run(folder)}")
        return cls(folder, _read_info(folder))

    @classmethod
    def named_by(cls, key: str, folder: Path) -> "Run":
        """Opens the run that a config's `key` names, to begin with it or to judge by it."""
        if not (folder / "run.json").exists():
            raise LabError(
                f"{key} = {str(folder)!r}: no run: there is no run.json in it.{_nearest_run(folder)} "
                "Train it first, or name another."
            )
        return cls.open(folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def media(self) -> Path:
        return self.folder / "media"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def find_checkpoint(self, which: str) -> Path:
        """The folder of a checkpoint; "best" falls back to "latest" while no evaluation was made.

        Raises:
            LabError: there is none.
        """
        path = checkpoint.find(self.checkpoints, which)
        if path is None and which == "best":
            path = checkpoint.find(self.checkpoints, "latest")
        if path is None:
            names = [
                name for name in ("best", "latest") if checkpoint.find(self.checkpoints, name) is not None
            ]
            names += [step.name for step in checkpoint.steps(self.checkpoints)]
            there = f"It has {', '.join(names)}." if names else "It has none yet: let it train further."
            raise LabError(f"{self.folder}: no checkpoint {which!r}. {there}")
        return path

    def refuse_other_config(self, settings: Any, may_change: tuple[str, ...]) -> None:
        """Raises a `LabError` if the run was started with another config, but for keys that begin so; a key
        that there was not yet had its default."""
        old, new = with_defaults(self.info["config"], settings), scrub(to_dict(settings))
        for key, (before, now) in differences(old, new).items():
            if not key.startswith(may_change):
                self.refuse(
                    f"was started with {key} = {before!r}, now it is {now!r}. Resume with the same config, "
                    "or start another run with --out."
                )

    def refuse(self, why: str) -> NoReturn:
        """Raises a `LabError` that says why the run is not continued; the run stays as it was."""
        self._release_lock()
        raise LabError(f"{self.folder}: {why}")

    def continue_from(self, metrics_bytes: int) -> None:
        """Marks the run as running again, its metrics cut back to where the checkpoint was taken."""
        rewind(self.metrics, metrics_bytes)
        with explain_write_errors(str(self.folder / "run.json"), "Free some space and try again."):
            self._begin_session()

    def tracker(
        self, mode: str, why: str, project: str, entity: str | None, tags: list[str] | None
    ) -> Tracker:
        """The tracker of this session, its W&B mode recorded."""
        identity = {
            "project": project,
            "entity": entity,
            "id": self.info["id"],
            "name": self.info["name"],
            "group": self.info["group"],
            "job_type": self.info["job_type"],
            "tags": tags or [],
        }
        config = {
            **self.info["config"],
            "x_axis": self.info["x_axis"],
            "parents": self.info["parents"],
            "compute": self.info["compute"],
        }
        tracker = Tracker(self.folder, config, mode, identity)
        why = tracker.problem or why
        self.update(wandb={"mode": tracker.mode, "why": why, "project": project, "entity": entity})
        return tracker

    def keep_evaluation(self, result: Mapping[str, Any]) -> None:
        """Adds a result to evaluations.jsonl, or says why it cannot: the run may be somebody else's."""
        path = self.folder / "evaluations.jsonl"
        line = json.dumps({**result, "_time": time.time()}) + "\n"
        try:
            with open_own(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            print(f"note: {path}: not kept there: {error.strerror or error}.", file=sys.stderr)

    def update(self, **fields: Any) -> None:
        """Changes fields of run.json, atomically."""
        self.info |= fields
        write_json(self.folder / "run.json", self.info)

    def summarize(self, **values: Any) -> None:
        """Adds values to the summary in run.json.

        Raises:
            LabError: it cannot be written.
        """
        remedy = "Free some space, then continue with --resume."
        with explain_write_errors(str(self.folder / "run.json"), remedy):
            self.update(summary={**self.info["summary"], **values})

    @contextlib.contextmanager
    def recording_its_end(self) -> Iterator[None]:
        """Writes the state `failed` and the reason if the block raises; the block sets all other ends."""
        try:
            yield
        except BaseException as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            # On a full disk even this may fail: the run then stays `running`, and can be resumed.
            with contextlib.suppress(OSError):
                self.end("failed", error=f"{type(error).__name__}: {line}")
            raise
        finally:
            self._release_lock()

    def end(self, state: str, **fields: Any) -> None:
        """Records how this session ended."""
        assert state in STATES
        self.info["sessions"][-1] |= {"ended": _now(), "state": state, **fields}
        self.update(state=state)

    def _begin_session(self) -> None:
        self.info["sessions"].append(
            {
                "started": _now(),
                "argv": scrub_argv(sys.argv),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )
        self.update(state="running")

    def _take_lock(self) -> None:
        self._lock = open_own(self.folder / ".lock", "a", alone=False)
        if not locks.lock(self._lock):
            self._release_lock()
            pid = (self.info["sessions"] or [{}])[-1].get("pid", "?")
            raise LabError(
                f"{self.folder}: is running just now (process {pid}). Wait for it, or stop it first."
            )

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()  # closing releases it; a killed process releases it too
            self._lock = None


def is_plain_name(name: Any) -> bool:
    """Whether a name from a file is one, and no path that leads elsewhere."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name


def folder_name(name: str) -> str:
    """A run name as a folder name."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "run"


def _read_info(folder: Path) -> dict[str, Any]:
    check_contained(folder)
    info = read_json(folder / "run.json", "the record of the run")
    missing = [key for key in _NEEDED if not isinstance(info, dict) or key not in info]
    if missing:
        raise LabError(f"{folder / 'run.json'}: damaged: it lacks {missing[0]!r}. Restore it from a copy.")
    for key, kind in _NEEDED.items():
        # Names of files are made of the id.
        if not isinstance(info[key], kind) or (key == "id" and not re.fullmatch(r"[\w.-]+", info[key])):
            raise LabError(
                f"{folder / 'run.json'}: damaged: {key} = {brief(info[key])} is not what the lab writes. "
                "Restore it from a copy."
            )
    if not all(isinstance(one, dict) for key in ("parents", "sessions") for one in info[key]):
        raise LabError(f"{folder / 'run.json'}: damaged: its sessions or parents are no records.")
    return info


def _nearest_run(folder: Path) -> str:
    if around := next((path for path in folder.parents if (path / "run.json").exists()), None):
        return f" It is within a run: name that, {around}."
    if folder.is_file():
        return " It is a file, and a run is a folder."
    runs = sorted(str(path.parent) for path in folder.parent.glob("*/run.json"))
    return did_you_mean(str(folder), runs) if runs else ""


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed versions of those `packages` that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_state(*pathspecs: str) -> dict[str, Any]:
    """The commit of the lab's own code, and whether it was changed since (within `pathspecs`)."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(root), *arguments), capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *pathspecs)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
