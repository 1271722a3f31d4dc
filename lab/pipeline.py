"""What a kind of training offers the command line, and how the command line finds it.

Pipelines register themselves as entry points (`lab.pipelines` in pyproject.toml), so that the floor
imports none of the rooms above it.
"""

import importlib.metadata
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lab import config
from lab.errors import LabError, did_you_mean


class Pipeline(Protocol):
    """One kind of training. Its methods import what is heavy only when called."""

    def config_class(self, values: Mapping[str, Any], source_of: Callable[[str], str]) -> type:
        """The frozen dataclass for these raw config values; `source_of` says where a key was set."""
        ...

    def smoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """These raw config values changed into those of a run of seconds, on data that every machine has."""
        ...

    def train(self, config: Any, folder: Path | None, resume: bool) -> None:
        """Trains into `folder`; None takes runs/<name of the config>."""
        ...

    def evaluate(self, folder: Path, options: Namespace) -> dict[str, Any]:
        """Evaluates a run; returns one JSON object.

        Options that were not given are None; one that does nothing here is refused.
        """
        ...

    def describe_evaluation(self, result: Mapping[str, Any]) -> str:
        """The result of `evaluate` for people."""
        ...

    def play(self, folder: Path, options: Namespace) -> dict[str, Any]:
        """Films a run's agent; returns one JSON object with the film's `path`. With `world_model`, plays in
        what the run dreams."""
        ...

    def export(self, folder: Path, options: Namespace) -> Path:
        """Writes a run's agent for another library."""
        ...


def refuse_options(options: Namespace, names: Sequence[str], why: str) -> None:
    """Raises a `LabError` if an option was given that means nothing here."""
    for name in names:
        if getattr(options, name, None) is not None:
            raise LabError(f"command line: --{name} {why}. Leave it out.")


def find(name: Any, source: str) -> Pipeline:
    """The pipeline called `name`, the value of the config's `pipeline` key.

    Raises:
        LabError: there is none; `source` says where the name stood.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group="lab.pipelines")}
    if not isinstance(name, str) or name not in points:
        raise LabError(
            f"{source}: pipeline = {name!r}: no such pipeline.{did_you_mean(str(name), points)} "
            f"Known: {', '.join(sorted(points))}."
        )
    return points[name].load()


def configured(values: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> tuple[Pipeline, Any]:
    """The pipeline a config is for, and the config resolved.

    Args:
        values: what the file says.
        overrides: dotted keys, as `config.split_overrides` returns them.
        source: the file's name, for errors.
    """
    merged = config.merge(values, config.nest(overrides))

    def source_of(key: str) -> str:
        return "command line" if key in overrides else source

    chosen = find(merged.get("pipeline", "rl"), source_of("pipeline"))
    return chosen, config.build(chosen.config_class(merged, source_of), values, overrides, source)


def catalogue(kind: str) -> list[str]:
    """What `lab list KIND` shows, from the entry points of the group `lab.catalogue`."""
    for point in importlib.metadata.entry_points(group="lab.catalogue"):
        if point.name == kind:
            return list(point.load()())
    return []
