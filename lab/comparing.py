"""The command `lab compare`: what was asked, where the runs are, and where the answer goes."""

import argparse
import json
import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError, did_you_mean

if TYPE_CHECKING:
    from lab.records import Found

USUAL_METRICS = ("eval/mean_reward", "eval/win_rate", "eval/accuracy", "eval/loss", "train/loss")
"""The first that a run has is compared if none is named."""
DEFAULT_FOLDER = Path("runs/comparison")
_REPEATED = ("metric", "where", "goal")
WIDTH_OF_A_FILE = 160
"""Of the tables, in columns, where no terminal says how many it has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab compare`."""
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a run folder, a folder or glob of them, a W&B offline folder, or wandb:entity/project?filters",
    )
    add(
        "--metric",
        action="append",
        metavar="NAME",
        help="e.g. eval/mean_reward; evaluate/NAME (by `lab evaluate`), summary/NAME; may be repeated",
    )
    add("--by", metavar="KEY[,KEY]", help="config keys that make the groups; default: all but the seed")
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs whose config has it (VALUE,VALUE: either); may be given several times",
    )
    add(
        "--baseline",
        default="",
        metavar="GROUP",
        help="what the others are compared with; default: the first by name",
    )
    add(
        "--score",
        default="final",
        metavar="HOW",
        help="of a run: final (mean of the last tenth), last, best, auc",
    )
    add(
        "--goal",
        action="append",
        default=[],
        metavar="[METRIC=]GOAL",
        help="maximize or minimize; default: as W&B was told, else by the metric's name",
    )
    add(
        "--until",
        default="",
        metavar="STEP",
        help="compare up to a step, or `end`: each run to its own; default: the largest all reached",
    )
    add("--at", default="", metavar="STEP", help="compare the values at a step: --until STEP --score last")
    add("--paired", default="auto", metavar="HOW", help="by seed: auto (where the same), on, off")
    add("--normalize", default="auto", metavar="HOW", help="scores of several tasks: auto, range, none")
    add("--axis", default="step", metavar="AXIS", help="of the curves: step, frames, tokens, episodes, time")
    add("--threshold", type=float, metavar="VALUE", help="show how long it took to come so far")
    add("--task", default="", metavar="KEY", help="config key of the task; default: the game or data set")
    add("--gamma", type=float, default=1.0, metavar="VALUE", help="goal of the optimality gap (1)")
    add("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (0.95)")
    add("--out", type=Path, metavar="DIR", help="write the page, plots, tables and CSV files to a folder")
    add("--json", action="store_true", help="print the answer as JSON, for programs")
    add("--open", action="store_true", help=f"show the page; without --out it is written to {DEFAULT_FOLDER}")
    add("--publish", action="store_true", help="make a report and a saved view of the runs at W&B")


def do(options: argparse.Namespace) -> int:
    """Runs `lab compare`."""
    from rich.console import Console

    from lab import compare, report

    questions, found = _ask(options)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_A_FILE
    comparisons = [compare.compare(found.records, question, found.notes) for question in questions]
    if options.json:
        print(json.dumps(report.as_json(comparisons), indent=2, allow_nan=False))
        console.file = sys.stderr
    for number, comparison in enumerate(() if options.json else comparisons):
        if number:
            console.print()
        report.show(comparison, console)
    folder: Path | None = options.out or (DEFAULT_FOLDER if options.open else None)
    if folder is not None:
        title = " and ".join(question.metric for question in questions)
        page = report.write(comparisons, folder, title, command(options))
        console.print(f"written: {page}", highlight=False, markup=False, soft_wrap=True)
        if options.open and not webbrowser.open(page.absolute().as_uri()):
            console.print("no browser here: open the file yourself", highlight=False)
    if options.publish:
        from lab.publish import publish

        published = publish(comparisons, command(options))
        for note in published.notes:
            console.print(f"note: {note}", style="dim", highlight=False, markup=False, soft_wrap=True)
        for what, address in (("published", published.report), ("view of the runs", published.view)):
            console.print(f"{what}: {address}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _ask(options: argparse.Namespace) -> "tuple[list[Any], Found]":
    """The questions, one a metric, and the runs to answer them with."""
    from lab import compare, records

    wishes: dict[str, str] = {}
    for source in options.sources:
        if source.startswith("wandb:"):
            wishes |= records.parse_query(source).wishes
    metrics = options.metric or ([wishes["metric"]] if "metric" in wishes else list(USUAL_METRICS))
    by = options.by if options.by is not None else wishes.get("by", "")
    if options.at and options.until:
        raise LabError("command line: --at and --until both name the last step. Give one of them.")
    if options.at and options.score not in ("final", "last"):
        raise LabError(
            f"command line: --at takes the value at a step, --score {options.score} another. Use --until."
        )
    goals = _goals(options.goal, metrics)
    question = compare.Question(
        metric=metrics[0],
        by=tuple(key.strip() for key in by.split(",") if key.strip()),
        where=tuple(options.where),
        baseline=options.baseline,
        score="last" if options.at else options.score,
        until=options.at or options.until,
        paired=options.paired,
        normalize=options.normalize,
        axis=options.axis,
        threshold=options.threshold,
        task=options.task or wishes.get("task", ""),
        gamma=options.gamma,
        confidence=options.confidence,
    )
    questions = [
        replace(question, metric=metric, goal=goals.get(metric, goals.get("", "")))
        for metric in dict.fromkeys(metrics)
    ]
    found = records.load(options.sources, compare.wanted_metrics(questions))
    if options.metric is None and "metric" not in wishes:
        there = [q for q in questions if any(q.metric in record.series for record in found.records)]
        if not there:
            known = sorted({name for record in found.records for name in record.metrics | record.said})
            raise LabError(
                f"command line: name a --metric. The runs have {', '.join(known[:12]) or 'none'}"
                f"{' ...' if len(known) > 12 else ''}."
            )
        questions = there[:1]
    return questions, found


def _goals(given: list[str], metrics: Sequence[str]) -> dict[str, str]:
    """By metric, and for all others by the empty name.

    Raises:
        LabError: a goal of a metric that is not asked for.
    """
    goals = {}
    for text in given:
        metric, equals, goal = text.rpartition("=")
        if equals and metric not in metrics:
            raise LabError(f"--goal {text}: {metric} is not asked for.{did_you_mean(metric, metrics)}")
        goals[metric] = goal
    return goals


def command(options: argparse.Namespace) -> str:
    """The command line that asks the same again."""
    words = ["lab", "compare", *options.sources]
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    for name, value in vars(options).items():
        if name in ("sources", "out", "open", "publish", "json", *_REPEATED) or not hasattr(options, name):
            continue
        if name in vars(defaults.parse_args(["x"])) and value != defaults.get_default(name):
            words.append(f"--{name}={value}")
    words += [f"--{name}={value}" for name in _REPEATED for value in getattr(options, name) or ()]
    return shlex.join(words)
