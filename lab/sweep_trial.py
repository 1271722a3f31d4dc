"""A look at what the runs of a sweep will log, before the first of them is trained for hours."""

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from lab import config, pipeline
from lab.errors import LabError, did_you_mean
from lab.sweep_file import Sweep
from lab.sweep_record import runs_of
from lab.tracking import read_metrics

SECONDS = 300
"""Longer than any `--smoke` takes on a busy laptop."""


def check_metric(sweep: Sweep) -> str:
    """Trains the sweep's first setting for a few steps, as `--smoke` does, and looks for the metric.

    Returns:
        Why it could not be tried; empty if it was, and the metric is there.

    Raises:
        LabError: the metric is not there.
    """
    with tempfile.TemporaryDirectory(prefix="lab_sweep_") as passing:
        folder = Path(passing) / "run"
        problem = _train(sweep, folder)
        if problem:
            return problem
        rows = [row for run in runs_of(folder) for row in read_metrics(run / "metrics.jsonl")]
    chosen, _ = pipeline.configured(sweep.values, sweep.overrides, str(sweep.config))
    later: tuple[str, ...] = getattr(chosen, "late_metrics", ())
    names = {name for row in rows for name in row} - {"_time"}
    if sweep.metric in (*names, *later):
        return ""
    raise LabError(
        f"{sweep.file}: metric.name = {sweep.metric!r}: a few steps of the first setting logged no such "
        f"metric.{did_you_mean(sweep.metric, names)} They logged {', '.join(sorted(names))}. Correct it, or "
        "add --skip-trial if it comes later in a run."
    )


def _train(sweep: Sweep, folder: Path) -> str:
    """A few steps of the first setting; returns why it could not be done."""
    asked = {**sweep.overrides, **(sweep.ask([]) or {})}
    try:
        chosen, _ = pipeline.configured(sweep.values, sweep.overrides, str(sweep.config))
        values = chosen.smoke(sweep.values)
        # The sizes of a smoke test are kept; all else is as the first run will have it.
        small = config.differences(sweep.values, values)
        kept = {key: value for key, value in asked.items() if key not in small}
        merged = config.merge(values, config.nest({**kept, "tracking.wandb": "disabled"}))
        pipeline.configured(merged, {}, str(sweep.config))
    except LabError as error:
        return str(error)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lab.cli", "train", str(file), "--out", str(folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {SECONDS} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""
