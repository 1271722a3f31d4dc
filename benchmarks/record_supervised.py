"""Keeps the result of finished runs: `python -m benchmarks.record_supervised lenet5_fashion runs/lenet5`.

Judges the weights each run ended with (none is chosen by the data that judges it) on the test part of the
data, else on what was held out, or on --part. Writes benchmarks/results/NAME.json (numbers, config, curve,
machine) and the first run's figures to benchmarks/results/NAME/. NAME is that of the config; further runs
differ in seed, or in what is set on the command line.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks import machine
from lab import checkpoint, config
from lab.device import quiet_threads
from lab.errors import LabError
from lab.files import write_json
from lab.run import Run
from lab.tracking import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
ELSEWHERE = ("data.source", "data.tokenizer", "model.start_from", "objective.judge", "objective.generator")
"""Keys that name folders of the machine: a record keeps their last names."""
UNIMPORTANT = ("device.", "tracking.", "name", "seed")


def record(name: str, folders: list[Path], part: str | None, results: Path = RESULTS) -> dict[str, Any]:
    """Evaluates finished runs of one config and writes the result files; returns what the JSON holds.

    Raises:
        LabError: a run is not finished, or there is no such config.
    """
    quiet_threads()
    path = ROOT / "configs" / "supervised" / f"{name}.yaml"
    file_values = config.read_yaml(path)
    runs = [_one(folder, file_values, part) for folder in folders]
    result = {
        "command": f"lab train configs/supervised/{name}.yaml",
        "recorded_by": f"python -m benchmarks.record_supervised {name} "
        + " ".join(folder.name for folder in folders)
        + (f" --part {part}" if part else ""),
        "runs": runs,
        "config": file_values,
        "machine": machine.describe(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{name}.json", result)
    kept = results / name
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folders[0] / "media", kept)
    return result


def _one(folder: Path, file_values: dict[str, Any], part: str | None) -> dict[str, Any]:
    from supervised.evaluate import evaluate_run, run_config

    run = Run.open(folder)
    if run.info["state"] != "finished":
        raise LabError(f"{folder}: is {run.info['state']}. Finish it first: lab train {folder} --resume.")
    saved = checkpoint.load(run.find_checkpoint("latest"))
    found = evaluate_run(run, saved, part)
    weights = saved.tensors("model")
    learned = config.build(type(run_config(run)), file_values, {}, "the config")
    changed = config.differences(config.to_dict(learned), run.info["config"])
    return {
        "seed": run.info["seed"],
        "set_on_the_command_line": {
            key: _last_name(now) if key in ELSEWHERE else now
            for key, (_, now) in changed.items()
            if not key.startswith(UNIMPORTANT)
        },
        "evaluation": {"part": found["part"], "step": found["step"], **found["eval"]},
        **({"notes": found["notes"]} if found["notes"] else {}),
        "data_sha256": found["data_sha256"],
        "numbers_in_checkpoint": sum(value.numel() for value in weights.values()),
        "training_seconds": run.info["summary"]["time/elapsed_seconds"],
        "evaluations_during_training": [
            {key: value for key, value in row.items() if key.startswith(("eval/", "global_step"))}
            for row in read_metrics(run.metrics)
            if any(key.startswith("eval/") for key in row)
        ],
        "compute": run.info["compute"],
        "git": run.info["git"],
        "sessions": len(run.info["sessions"]),
    }


def _last_name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="name of the config")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--part", help="of the data, e.g. test_2016_flickr")
    options = parser.parse_args()
    for run in record(options.name, options.runs, options.part)["runs"]:
        numbers = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in run["evaluation"].items()
        )
        print(f"seed {run['seed']}  {run['set_on_the_command_line'] or ''}  {numbers}")


if __name__ == "__main__":
    main()
