"""Run folders as training leaves them, made in no time, for what only reads runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lab.run import Run
from lab.tracking import Tracker


def make_run(
    folder: Path,
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    *,
    config: Mapping[str, Any],
    state: str = "finished",
    job_type: str = "train",
    x_axis: str = "agent_steps",
    parents: Iterable[Mapping[str, str]] = (),
    wandb: str = "disabled",
) -> Run:
    """A run with these rows of metrics, by the lab's own classes.

    Args:
        rows: (step, metrics).
        state: how it ended; "running" leaves it as a kill does.
        wandb: disabled or offline.
    """
    run = Run.create(
        folder,
        config=config,
        pipeline="rl",
        job_type=job_type,
        name=folder.name,
        group="group",
        x_axis=x_axis,
        compute={},
        parents=parents,
    )
    with run.recording_its_end():
        tracker = run.tracker(wandb, "asked for", "lab-tests", None, None)
        log(tracker, rows)
        tracker.finish(0 if state == "finished" else 1)
        if state != "running":
            run.end(state)
    return run


def log(tracker: Tracker, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Logs rows of (step, metrics)."""
    for step, values in rows:
        tracker.log(step, values)
