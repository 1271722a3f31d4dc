"""Keeps the results of finished recipes: `python -m benchmarks.record_rlhf tiny runs/tiny_s0 runs/tiny_s1`.

Writes benchmarks/results/rlhf_NAME.json (numbers of every run, config, machine) and, of the first run,
rlhf_NAME.png: proxy and gold scores against KL over PPO.
"""

import argparse
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import machine
from lab.errors import LabError
from lab.files import write_json
from lab.run import Run
from rlhf.config import STAGES

RESULTS = Path(__file__).parent / "results"
SAMPLES = 5


def record(name: str, folders: list[Path], results: Path = RESULTS) -> dict[str, Any]:
    """Gathers the runs of one config that differ in their seeds; returns what the JSON holds.

    Raises:
        LabError: a run is not finished.
    """
    runs = [_one(folder) for folder in folders]
    info = Run.open(folders[0] / "sft").info
    result = {
        "command": f"lab rlhf configs/rlhf/{name}.yaml --seed=SEED",
        "recorded_by": f"python -m benchmarks.record_rlhf {name} " + " ".join(map(str, folders)),
        "runs": runs,
        "config": info["config"],
        "compute": info["compute"],
        "machine": machine.describe(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"rlhf_{name}.json", result)
    shutil.copyfile(folders[0] / "ppo" / "media" / "overoptimization.png", results / f"rlhf_{name}.png")
    return result


def _one(folder: Path) -> dict[str, Any]:
    stages = {stage: Run.open(folder / stage).info for stage in STAGES if (folder / stage).exists()}
    for stage, info in stages.items():
        if info["state"] != "finished":
            raise LabError(f"{folder / stage}: is {info['state']}. Finish it first: lab rlhf CONFIG.")
    samples = (folder / "eval" / "media" / "samples.jsonl").read_text().splitlines()
    return {
        "seed": stages["sft"]["seed"],
        "git": {stage: info["git"] for stage, info in stages.items()},
        "seconds": {stage: _seconds(info) for stage, info in stages.items()},
        "reward_accuracy_on_held_out_pairs": stages["reward"]["summary"]["eval/accuracy"],
        "evaluation": json.loads((folder / "eval" / "evaluation.json").read_text()),
        "samples": [json.loads(line) for line in samples[:SAMPLES]],
    }


def _seconds(info: dict[str, Any]) -> float:
    """Wall time of a stage's sessions."""
    time = datetime.datetime.fromisoformat
    return sum((time(s["ended"]) - time(s["started"])).total_seconds() for s in info["sessions"])


def table(result: dict[str, Any]) -> str:
    """The runs for people."""
    lines = ["seed  minutes  reward accuracy  win rate vs SFT        KL  length  best-of-n  distinct-2 (SFT)"]
    for run in result["runs"]:
        e = run["evaluation"]
        p, rate = e["policy"], e["policy"]["win_rate"]
        best = e.get("best_of", {}).get("win_rate", {}).get("mean", float("nan"))
        lines.append(
            f"{run['seed']:4}  {sum(run['seconds'].values()) / 60:7.1f}"
            f"  {run['reward_accuracy_on_held_out_pairs']:15.1%}"
            f"  {rate['mean']:6.1%} ({rate['low']:.1%}-{rate['high']:.1%})  {p['kl_nats']:4.2f}"
            f"  {p['length_ratio']:6.2f}  {best:9.1%}"
            f"  {p['distinct_2']:.3f} ({e['baseline']['distinct_2']:.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="name of the config")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `lab rlhf`")
    options = parser.parse_args()
    print(table(record(options.name, options.runs)))


if __name__ == "__main__":
    main()
