"""W&B's artifacts of a run: its checkpoints and results, and what it started from.

They are sent by a thread of their own: no upload, and no server that does not answer, holds up training.
"""

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lab import checkpoint
from lab.errors import first_line

RESUMING = r"(?!manifest|optimizer|rng_state|trainer_state|training_args)"  # manifest.json lists all files
WEIGHTS = re.compile(RESUMING + r"(.*model.*\.safetensors|.*\.(json|jinja|txt|model))")
"""What is sent of a checkpoint: all that is needed to use it. What only resuming needs stays here."""
_HASH_LENGTH = 12


class Artifacts:
    """Sends what a run leaves to W&B, and tells it what the run started from.

    Args:
        run: the W&B run, online.
        scratch: a folder on the disk of the run folder, for what is on its way.
        warn: told of what W&B did not take, each thing once.
    """

    def __init__(self, run: Any, scratch: Path, warn: Callable[[str], None]) -> None:
        self._run, self._scratch, self._warn = run, scratch, warn
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._newest: dict[str, Path] = {}
        self._count = 0
        self._warned: set[str] = set()
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        self._thread = threading.Thread(target=self._work, name="artifacts", daemon=True)
        self._thread.start()

    def add(self, name: str, kind: str, path: Path, sha256: str) -> None:
        """Sends a file or folder that stays where it is."""
        self._put(
            f"W&B did not take {name}", f"it stays in {path}", lambda: self._log(name, kind, path, sha256)
        )

    def add_checkpoint(self, name: str, path: Path, aliases: Sequence[str]) -> None:
        """Sends the weights of a checkpoint, which may be pruned before their turn comes: links keep them.

        If the one before it under the same aliases still waits for its turn, it is left out.
        """
        self._count += 1
        links = self._scratch / str(self._count)
        key = " ".join(aliases)

        def send() -> None:
            try:
                if self._newest[key] is links:
                    # Until it has arrived the links must stay.
                    self._log(name, "model", links, sha256, aliases).wait()
            finally:
                shutil.rmtree(links, ignore_errors=True)

        lost, stays = f"W&B did not take the checkpoint {path.name}", f"it stays in {path}"
        with self._warning(lost, stays):
            links.mkdir(parents=True)
            for file in path.iterdir():
                if WEIGHTS.fullmatch(file.name):
                    _link(file, links / file.name)
            whole = (path / "model.safetensors").exists()  # else it is in parts, or an adapter
            sha256 = checkpoint.weights_hash(path) if whole else ""
            self._newest[key] = links
            self._put(lost, stays, send)

    def use(self, name: str, sha256: str) -> None:
        """Tells W&B what the run starts from: the version with this hash; without one, the newest."""
        alias = sha256[:_HASH_LENGTH] or "latest"
        self._put(  # made offline, or not sent yet
            f"W&B does not know {name}",
            "run.json names it by its hash",
            lambda: self._run.use_artifact(f"{artifact_name(name)}:{alias}"),
        )

    def finish(self, seconds: float) -> None:
        """Waits for what is on its way."""
        self._jobs.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"W&B did not take all checkpoints within {seconds:g} s; they stay in the run folder")
            self._warn = lambda _: None  # that says it for each of them

    def clear(self) -> None:
        """Removes the links, when W&B is done with them."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _put(self, lost: str, but: str, job: Callable[[], Any]) -> None:
        def careful() -> None:
            with self._warning(lost, but):
                job()

        self._jobs.put(careful)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()

    def _log(self, name: str, kind: str, path: Path, sha256: str, aliases: Sequence[str] = ()) -> Any:
        import wandb

        artifact = wandb.Artifact(artifact_name(name), kind, metadata={"sha256": sha256})
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), policy="immutable", skip_cache=True)
        known_as = ["latest", *aliases, *([sha256[:_HASH_LENGTH]] if sha256 else [])]
        return self._run.log_artifact(artifact, aliases=known_as)

    @contextlib.contextmanager
    def _warning(self, lost: str, but: str) -> Iterator[None]:
        """Says what W&B did not do, the first time."""
        try:
            yield
        except Exception as error:
            if lost not in self._warned:
                self._warned.add(lost)
                self._warn(f"{lost} ({type(error).__name__}: {first_line(error)[:160]}); {but}")


def artifact_name(name: str) -> str:
    """`name` with what W&B's artifacts may not be called replaced by dashes."""
    return re.sub(r"[^\w.-]", "-", name)[:128]


def _link(file: Path, place: Path) -> None:
    try:
        place.hardlink_to(file)
    except OSError:  # a file system without links
        shutil.copyfile(file, place)
