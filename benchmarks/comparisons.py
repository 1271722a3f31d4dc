"""Comparisons of kept runs: `python -m benchmarks.comparisons` makes their pages anew.

A kept run is its run.json and metrics.jsonl, in benchmarks/results/NAME/kept; what `lab compare` writes of
all of them lies in benchmarks/results/NAME. `python -m benchmarks.comparisons NAME --keep RUN...` keeps
finished runs, or recipes of several stages, first.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lab import cli
from lab.errors import LabError
from lab.files import explain_write_errors, read_json, write_atomic, write_json

RESULTS = Path(__file__).parent / "results"
QUESTIONS = {
    "pong_dqn_vs_pqn": (
        "--metric=eval/mean_reward",
        "--by=agent.algorithm",
        "--baseline=pqn",
        "--threshold=15",
    ),
    "pong_pretrained": (
        "--metric=eval/mean_reward",
        "--metric=rollout/ep_rew_mean",
        "--by=agent.start_from",
        "--baseline=null",
        "--threshold=0",
    ),
    "tiny_two_betas": (
        "--metric=eval/win_rate",
        "--metric=objective/scores",
        "--metric=objective/kl",
        "--by=ppo.kl_coef",
        "--baseline=0.1",
    ),
}
"""What is asked of the kept runs, by name."""


def keep(run: Path, folder: Path) -> list[Path]:
    """Copies what a comparison needs of a run, or of each stage of a recipe, without paths of this machine.

    Returns:
        The kept runs' folders.

    Raises:
        LabError: no finished run is there.
    """
    found = sorted(run.rglob("run.json"))
    if not found:
        raise LabError(f"{run}: holds no run.json. Name a run folder.")
    kept = []
    for file in found:
        info: dict[str, Any] = read_json(file, "a run's description")
        if info["state"] != "finished":
            raise LabError(f"{file.parent}: is {info['state']}. Finish it before it is kept.")
        info["sessions"] = [{"started": session["started"]} for session in info["sessions"]]
        text = json.dumps(info).replace(str(run.absolute().parent) + "/", "")
        to = folder / run.name / file.parent.relative_to(run)
        with explain_write_errors(str(to), "Free some space."):
            to.mkdir(parents=True, exist_ok=True)
            write_json(to / "run.json", json.loads(text))
            write_atomic(to / "metrics.jsonl", (file.parent / "metrics.jsonl").read_bytes())
        kept.append(to)
    return kept


def make_page(name: str, results: Path = RESULTS) -> None:
    """Compares the kept runs of that name as `QUESTIONS` says."""
    folder = Path(os.path.relpath(results / name))  # the page shows the command
    runs = str(folder / "kept")
    if cli.main(["compare", runs, *QUESTIONS[name], f"--out={folder}"]):
        raise LabError(f"{runs}: could not be compared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", choices=QUESTIONS, help="default: all")
    parser.add_argument("--keep", type=Path, nargs="+", metavar="RUN", default=[])
    options = parser.parse_args()
    if options.keep and options.name is None:
        parser.error("name the comparison the runs are kept for")
    for run in options.keep:
        keep(run, RESULTS / options.name / "kept")
    for name in [options.name] if options.name else QUESTIONS:
        make_page(name)


if __name__ == "__main__":
    main()
