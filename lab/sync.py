"""`lab sync`: what was tracked without W&B goes to W&B, and is read back before anybody calls it done."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab sync`."""
    parser.epilog = "The same command goes on where it stopped: no row is sent twice."
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a run folder, or a folder of them; default: runs",
    )
    parser.add_argument(
        "--force", action="store_true", help="ask W&B also about runs that were verified and did not change"
    )
    parser.add_argument(
        "--disabled", action="store_true", help="send also runs made with tracking.wandb=disabled"
    )


def do(options: argparse.Namespace) -> int:
    """Runs `lab sync`; returns 2 unless W&B has all rows of all runs."""
    from lab.sync_verify import sync

    outcomes = []
    for outcome in sync(options.runs or [Path("runs")], force=options.force, disabled=options.disabled):
        print(f"{outcome.place}: {outcome.text}", flush=True)
        outcomes.append(outcome)
    missing = sum(not outcome.verified for outcome in outcomes)
    if len(outcomes) > 1:
        print(f"{len(outcomes)} runs: {len(outcomes) - missing} in order, {missing} not")
    return 2 if missing else 0
