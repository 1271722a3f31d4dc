"""Stages that a recipe takes from another one: `start_from`, so that only what differs is trained.

A stage of the same keys (`rlhf.stage_keys`), the same data and the same parents, by their hashes, computes
the same. It is then referenced, not copied: runs/b/taken.json says where it is and which result it has, and
the stages after it name it among their parents, by its hash. A result that was altered since, or a folder
that is gone, is refused in one line.

    {"format": 1, "stages": {"sft": {"folder": "../a/sft", "sha256": "..."}}, "own": []}

Folders are relative to the recipe's. `own` are stages that `--from` made the recipe's own for good.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import checkpoint, config, locks
from lab.errors import LabError, did_you_mean
from lab.files import explain_write_errors, read_json, sha256_file, write_json
from lab.run import Run
from rlhf import labelers, sources
from rlhf.config import STAGES
from rlhf.stage_keys import relevant

if TYPE_CHECKING:
    from rlhf.pipeline import Recipe

SHARED = ("sft", "collect", "reward")
"""What can be taken."""
SIBLINGS = "siblings"
FILE = "taken.json"
FORMAT = 1
POLL_SECONDS = 0.5

RESULTS = {"collect": "rankings.jsonl", "eval": "evaluation.json"}
"""What a stage leaves; all others leave model/."""


@dataclass(frozen=True)
class Taken:
    """A finished stage of another recipe."""

    folder: Path
    sha256: str
    """Of what it left."""


@dataclass
class Found:
    """The stages that a recipe takes, and why it takes no others."""

    stages: dict[str, Taken]
    own: list[str]
    said: list[str] = field(default_factory=list)


def fingerprint(path: Path) -> str | None:
    """SHA-256 of a stage's result, None if it is not there; a model's files are all verified."""
    if path.is_file():
        return sha256_file(path)
    if not (path / "manifest.json").exists():
        return None
    try:
        checkpoint.load(path)
    except LabError:
        return "altered"
    return sha256_file(path / "manifest.json")


def read(folder: Path) -> Found:
    """What the taken.json of a recipe's folder says; nothing is taken where there is none.

    Raises:
        LabError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return Found({}, [])
    values = read_json(path, "the list of stages taken from another recipe")
    try:
        stages = {
            stage: Taken(Path(os.path.normpath(folder / entry["folder"])), entry["sha256"])
            for stage, entry in values["stages"].items()
        }
        own = values["own"]
        if values["format"] != FORMAT or not {*stages, *own} <= {*STAGES}:
            raise ValueError
        if not all(isinstance(taken.sha256, str) for taken in stages.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise LabError(f"{path}: damaged. Restore it from a copy.") from None
    return Found(stages, own)


def write(folder: Path, found: Found) -> None:
    """Writes taken.json; nothing where nothing is taken and none was there."""
    path = folder / FILE
    if not (found.stages or found.own or path.exists()):
        return
    stages = {
        stage: {"folder": os.path.relpath(taken.folder, folder), "sha256": taken.sha256}
        for stage, taken in found.stages.items()
    }
    with explain_write_errors(str(path), "Choose a folder you may write to with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "stages": stages, "own": found.own})


def info(recipe: Path, stage: str, taken: Taken) -> dict[str, Any]:
    """The record of a taken stage.

    Raises:
        LabError: it is not there any more, or has another result.
    """
    with contextlib.suppress(LabError):
        found = Run.open(taken.folder).info
        if found["state"] == "finished" and found["summary"].get("result", {}).get("sha256") == taken.sha256:
            return found
    raise LabError(
        f"{recipe}: its {stage} stage is that of {taken.folder}, which was deleted, moved or made again. "
        f"Restore it, name the recipe that has it now with --start_from, or use --from {stage}."
    )


def find(recipe: "Recipe", kept: Sequence[str]) -> Found:
    """The stages that a recipe takes: those it took before, and more where `start_from` names some.

    Args:
        recipe: for which.
        kept: its stages that are not to be done again.

    Raises:
        LabError: `start_from` names no recipe, or one of which nothing can be taken.
    """
    before = read(recipe.folder)
    found = Found({}, [*before.own])
    places = list(_places(recipe))
    reasons: dict[str, str] = {}
    for stage in [stage for stage in SHARED if stage in recipe.stages and stage in kept]:
        if recipe.owns(stage) or stage in before.own:
            continue
        taken, reason = before.stages.get(stage), ""
        if taken and (not places or _is_there(recipe, stage, taken)):
            found.stages[stage] = taken
            continue
        for place in places:
            taken, other = _match(recipe, found, stage, place)
            reason = reason or f"{other} (in {place})"
            if taken:
                found.stages[stage] = taken
                found.said.append(f"{stage:8} taken from {taken.folder}: the same config, data and parents")
                break
        else:
            if stage in before.stages:
                found.stages[stage] = before.stages[stage]  # gone, which `info` says
            elif places:
                reasons[stage] = reason
    said = [f"{stage:8} not taken: {reason}" for stage, reason in reasons.items()]
    if recipe.settings.start_from not in ("", SIBLINGS):
        if not found.stages and not any(recipe.owns(stage) for stage in SHARED) and reasons:
            stage, reason = next(iter(reasons.items()))
            raise LabError(
                f"start_from = {recipe.settings.start_from!r}: none of its stages is one of this config: "
                f"{stage}: {reason}. Make them the same, or leave start_from out."
            )
        found.said += said
    return found


def claim(recipe: "Recipe", stage: str, run: Callable[[], bool]) -> bool:
    """Runs a stage or, among siblings, takes it from the one that was quicker; whether it is finished.

    Of several processes that are about to train the same, one does and the others wait for it.
    """
    if recipe.settings.start_from != SIBLINGS or stage not in SHARED:
        return run()
    with _alone(recipe, stage):
        if not recipe.owns(stage):
            found = find(recipe, [name for name in recipe.stages if recipe.state(name)] + [stage])
            if stage in found.stages:
                recipe.taken.update(found.stages)
                recipe.result(stage)
                write(recipe.folder, found)
                print(found.said[-1], flush=True)
                return True
        return run()


def _places(recipe: "Recipe") -> Iterator[Path]:
    """The folders of the recipes that `start_from` names."""
    named, here = recipe.settings.start_from, recipe.folder.resolve()
    if not named:
        return
    if named == SIBLINGS:
        around = recipe.folder.parent
        yield from (path for path in _recipes_in(around) if path.resolve() != here)
        return
    path = Path(named)
    if path.name in STAGES and (path / "run.json").exists():
        path = path.parent
    if path.resolve() == here:
        raise LabError(f"start_from = {named!r}: is this recipe itself. Name another, or leave it out.")
    if _is_recipe(path):
        yield path
        return
    inside = _recipes_in(path)
    if not inside:
        hint = did_you_mean(str(path), map(str, _recipes_in(path.parent)))
        raise LabError(f"start_from = {named!r}: holds no run of `lab rlhf`.{hint} Name its folder.")
    yield from (path for path in inside if path.resolve() != here)


def _is_recipe(path: Path) -> bool:
    return (path / FILE).exists() or any((path / stage / "run.json").exists() for stage in STAGES)


def _recipes_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_recipe(path)] if folder.is_dir() else []


def _is_there(recipe: "Recipe", stage: str, taken: Taken) -> bool:
    try:
        info(recipe.folder, stage, taken)
    except LabError:
        return False
    return True


def _match(recipe: "Recipe", found: Found, stage: str, place: Path) -> tuple[Taken | None, str]:
    """A stage of the recipe in `place` if it is what ours would be, and else why it is not."""
    there = read(place).stages
    folder = place / stage
    if stage in there and not (folder / "run.json").exists():
        folder = there[stage].folder
    if not (folder / "run.json").exists():
        return None, "it has none"
    record = Run.open(folder).info
    if record["pipeline"] != "rlhf" or record["state"] != "finished":
        return None, f"it is {record['state']}"
    changed = config.differences(relevant(record["config"], stage), relevant(recipe.settings, stage))
    if changed:
        key, (was, now) = next(iter(changed.items()))
        return None, f"{key} is {now!r} here and {was!r} there"
    for parent in record["parents"]:
        name = parent.get("stage")
        code = labelers.code_of(recipe.settings.collect.labeler) if "code" in parent else None
        if code and code["sha256"] != parent["sha256"]:
            return None, f"it was made with other code in {parent['path']} than there is now"
        if "data" in parent and sources.sha256(parent["data"]) != parent["sha256"]:
            return None, f"it was made from other rows in {parent['data']} than there are now"
        if name in found.stages and found.stages[name].sha256 == parent["sha256"]:
            continue
        if name is not None:
            finished = recipe.owns(name) and recipe.state(name) == "finished"
            if not finished or recipe.sha256(name) != parent["sha256"]:
                return None, f"it was made from another {name} stage"
    return Taken(folder, str(record["summary"]["result"]["sha256"])), ""


@contextlib.contextmanager
def _alone(recipe: "Recipe", stage: str) -> Iterator[None]:
    """Waits until no sibling does the same stage, and keeps others from it meanwhile."""
    parents = {name: recipe.sha256(name) for name in recipe.parents(stage)}
    what = json.dumps([stage, relevant(recipe.settings, stage), parents], sort_keys=True)
    name = f"{stage}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.lock"
    folder = recipe.folder.parent / ".shared"
    with explain_write_errors(str(folder), "Choose a folder you may write to with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a")
    with file:
        told = False
        while not locks.lock(file):
            if not told:
                print(f"{stage:8} waiting for another run that is doing the same", flush=True)
                told = True
            time.sleep(POLL_SECONDS)
        yield
