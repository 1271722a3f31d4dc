"""The command `lab sweep`: many runs of one config, with the settings that a search asks for.

The search is the lab's own, online and offline: the same file tries the same settings with or without W&B.
Online, the sweep is registered with W&B besides and every run belongs to it, so that it has a page there. No
agent of W&B's takes part: it could neither try each setting with several seeds nor resume a run.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml

from lab import config, trust
from lab.arguments import count
from lab.errors import LabError, first_line
from lab.files import explain_write_errors
from lab.run import folder_name
from lab.sweep_file import Sweep, read_sweep, short_names, word
from lab.sweep_record import Candidate, Record
from lab.sweep_runs import Runner, locked, threads_each, train_arguments
from lab.sweep_trial import check_metric
from lab.tracking import choose_mode

WANDB_SECONDS = 60
"""How long W&B may take to make or close a sweep."""
SHOWN = 10
"""Settings in the table at the end."""


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab sweep`."""
    parser.usage = (
        "lab sweep SWEEP [--out DIR] [--jobs N] [--count N] [--retry] [--skip-trial] [--local] "
        "[--trust[=NAME]] [--KEY=VALUE ...]"
    )
    parser.epilog = (
        "The same command goes on where it stopped, also with more seeds, values or a larger count. Any key "
        "of the config can be overridden for all runs: lab sweep configs/sweeps/pong_dqn.yaml "
        "--total_steps=200_000."
    )
    parser.set_defaults(takes_overrides=True)
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP", help="a YAML file, e.g. configs/sweeps/pong_dqn.yaml")
    add("--out", type=Path, metavar="DIR", help="the folder of its runs; default runs/<name of the sweep>")
    add("--jobs", type=count, default=1, metavar="N", help="runs at once (1)")
    add("--count", type=count, metavar="N", help="settings to try; default as in the file")
    add("--retry", action="store_true", help="do failed runs again")
    add(
        "--skip-trial",
        action="store_true",
        help="do not try the metric first, in a few steps",
    )
    add("--local", action="store_true", help="make no sweep at W&B; its runs are tracked all the same")
    trust.add_argument(parser)


def do(options: argparse.Namespace) -> int:
    """Runs `lab sweep`."""
    if "--resume" in options.overrides:
        raise LabError("command line: --resume is not needed: the same command goes on where it stopped.")
    sweep = read_sweep(options.sweep, config.split_overrides(options.overrides), options.count)
    folder: Path = options.out or Path("runs") / folder_name(sweep.name)
    record = Record.open(folder, sweep)  # refuses before anything is written
    if not options.skip_trial and not any(trial.value is not None for trial in record.trials):
        problem = check_metric(sweep)
        if problem:
            print(f"note    whether runs will have {sweep.metric!r} is not known: {problem}", file=sys.stderr)
    mode, why = choose_mode(str(sweep.tracking.get("wandb", "disabled")))
    with locked(folder):
        record = Record.open(folder, sweep)
        for name in record.revive(sweep.metric, options.retry):
            print(f"{name}: its folder is gone; it is run again", file=sys.stderr)
        record.save()
        unfinished = len(record.candidates) < sweep.count or any(one.pending for one in record.candidates)
        if mode == "online" and not options.local and record.wandb is None and unfinished:
            record.wandb = register(sweep, folder)
        record.save()
        _announce(sweep, record, options, mode, why)
        runner = Runner(sweep, record, options.jobs)
        runner.run()
        left = any(candidate.pending for candidate in record.candidates) or runner.stopped
        if not left and unfinished and record.wandb:
            close(record.wandb)
        return _conclude(sweep, record, left, _command(options))


def _announce(sweep: Sweep, record: Record, options: argparse.Namespace, mode: str, why: str) -> None:
    keys = ", ".join(parameter.key for parameter in sweep.parameters) or "seed"
    size = [(sweep.count, "setting"), (len(sweep.seeds) or 1, "seed"), (record.total(sweep), "run")]
    settings, seeds, runs = (f"{n} {what}{'s' * (n > 1)}" for n, what in size)
    lines = [
        f"{sweep.name}: {sweep.method} over {keys}: {settings} x {seeds} = {runs}",
        f"runs    {record.folder}",
    ]
    if options.jobs > 1:
        each = os.environ.get("OMP_NUM_THREADS") or threads_each(options.jobs)
        lines.append(f"jobs    {options.jobs} at once, CPU threads each: {each}")
    page = record.wandb and (record.wandb["url"] or record.wandb["path"])
    lines.append(f"W&B     {page or f'{mode} ({why})'}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _command(options: argparse.Namespace) -> str:
    """The command line that goes on with the sweep."""
    words = ["lab", "sweep", str(options.sweep)]
    words += [f"--{name}={value}" for name in ("out", "count") if (value := getattr(options, name))]
    words += [f"--{name}" for name in ("local", "skip-trial") if getattr(options, name.replace("-", "_"))]
    words += trust.arguments()
    return shlex.join([*words, *options.overrides])


def _conclude(sweep: Sweep, record: Record, left: bool, again: str) -> int:
    """Shows the best settings, and what to do next.

    Args:
        sweep, record: which sweep.
        left: whether it is to be continued.
        again: the command line that does.

    Raises:
        LabError: all runs have ended, and none finished.
    """
    states = [trial.state for trial in record.trials]
    failed = [trial for trial in record.trials if trial.state == "failed"]
    worst = record.worst(sweep.goal)
    means = [(value, one) for one in record.candidates if (value := one.mean(worst)) is not None]
    means.sort(key=lambda pair: pair[0], reverse=sweep.goal == "maximize")
    scored = [candidate for _, candidate in means]
    if not scored and not left:
        raise LabError(f"{record.folder}: none of {len(states)} runs finished. The first: {failed[0].error}")
    if scored:
        _show(sweep, means, worst)
    print(
        f"{states.count('finished')} of {record.total(sweep)} runs finished"
        + (f", {len(failed)} failed: {again} --retry does them again" if failed else "")
        + (f". Continue with: {again}" if left else "")
    )
    if scored:
        best = train_arguments(sweep, {**sweep.overrides, **scored[0].setting})
        print(f"best     lab {shlex.join(best)}")
        words = [str(record.folder), f"--metric={sweep.metric}", "--score=last", f"--goal={sweep.goal}"]
        print(f"compare  lab compare {shlex.join(words)}")
    return 0


def _show(sweep: Sweep, scored: Sequence[tuple[float, Candidate]], worst: float) -> None:
    from rich.console import Console
    from rich.table import Table

    varying = [parameter.key for parameter in sweep.parameters if len(parameter.values) != 1]
    some_failed = any(candidate.failed for _, candidate in scored)
    table = Table(box=None, pad_edge=False, header_style="dim")
    heads = ["", "mean", "std", "n", *["failed"] * some_failed, *short_names(varying).values()]
    for title in heads:
        table.add_column(title, justify="right", overflow="fold")
    for rank, (value, candidate) in enumerate(scored[:SHOWN], 1):
        values = [*candidate.scores, *[worst] * candidate.failed]
        spread = f"{stdev(values):.4g}" if len(values) > 1 else "-"
        counts = [str(len(values)), *[str(candidate.failed)] * some_failed]
        settings = [word(candidate.setting[key]) for key in varying]
        table.add_row(str(rank), f"{value:.6g}", spread, *counts, *settings)
    console = Console(highlight=False, markup=False)
    console.print(f"{sweep.metric} (last value of each run, {sweep.goal}d)", style="bold")
    console.print(table)
    if some_failed:
        print(f"A run that failed counts with the worst value of all, {worst:.6g}.")
    if len(scored) > SHOWN:
        print(f"and {len(scored) - SHOWN} more in sweep.json")
    if len(scored) > 1:
        print("The best of several looks better than it is: train it with other seeds before you trust it.")


# ---- its page at W&B ----


def wandb_config(sweep: Sweep) -> dict[str, Any]:
    """The sweep as W&B's servers take it: parameters nested as the config is, seeds as one of them."""
    nested: dict[str, Any] = {}
    specs = {parameter.key: parameter.as_wandb() for parameter in sweep.parameters}
    if sweep.seeds:
        specs["seed"] = {"values": list(sweep.seeds)}
    for key, spec in specs.items():
        *groups, leaf = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {"parameters": {}})["parameters"]
        node[leaf] = spec
    return {
        "name": sweep.name,
        "description": f"`lab sweep {sweep.file.name}` chooses the settings itself; it needs no agents.",
        "program": "lab",
        "method": sweep.method,
        "metric": {"name": sweep.metric, "goal": sweep.goal},
        "run_cap": sweep.count * (len(sweep.seeds) or 1),
        "parameters": nested,
    }


def register(sweep: Sweep, folder: Path) -> dict[str, str] | None:
    """Makes a sweep at W&B; None, after a line that says why, if W&B does not take it."""
    file = folder / "wandb_sweep.yaml"
    with explain_write_errors(str(file), "Free some space and try again."):
        file.write_text(yaml.safe_dump(wandb_config(sweep), sort_keys=False), encoding="utf-8")
    place = ["--project", str(sweep.tracking["project"])]
    if sweep.tracking.get("entity"):
        place += ["--entity", str(sweep.tracking["entity"])]
    said, problem = _wandb("sweep", *place, str(file))
    made, url = re.search(r"sweep with ID: (\S+)", said), re.search(r"View sweep at: (\S+)", said)
    agent = re.search(r"wandb agent (\S+)", said)
    if problem or not made or not agent:
        print(
            f"lab: W&B made no sweep ({problem or 'its answer was not understood'}); the search goes on here",
            file=sys.stderr,
        )
        return None
    # The address has the entity even where W&B chose it.
    where = re.search(r"/([^/]+)/([^/]+)/sweeps/", url[1] if url else "")
    path = f"{where[1]}/{where[2]}/{made[1]}" if where else agent[1]
    return {"id": made[1], "path": path, "url": url[1] if url else ""}


def close(place: Mapping[str, str]) -> None:
    """Tells W&B that a sweep is finished."""
    _, problem = _wandb("sweep", "--stop", place["path"])
    if problem:
        print(f"lab: W&B still shows the sweep as running ({problem})", file=sys.stderr)


def _wandb(*arguments: str) -> tuple[str, str]:
    """What W&B's command line said, without colours; and why it failed, if it did."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "wandb", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WANDB_SECONDS,
            check=False,
            process_group=0,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {WANDB_SECONDS} s"
    except OSError as error:
        return "", first_line(error)
    said = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    lines = [
        line.removeprefix("wandb: ").removeprefix("ERROR ") for line in said.splitlines() if line.strip()
    ]
    return said, (lines or ["no answer"])[-1] if result.returncode else ""
