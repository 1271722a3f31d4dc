"""Keeps the result of a finished run: `python -m benchmarks.record_run runs/demo pong_cpu`.

Plays whole games that neither training nor the choice of the best checkpoint has seen, and writes
benchmarks/results/NAME.json (config, numbers, machine), NAME.png (the learning curve) and NAME_film.png
(one frame of a film of the best agent). NAME is that of the config, or CONFIG__ANYTHING for a further run
of it, e.g. of another seed, which leaves the JSON only.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from lab.device import quiet_threads
from lab.errors import LabError
from lab.files import write_json
from lab.run import Run
from lab.tracking import read_metrics
from rl.config import unseen_seed

RESULTS = Path(__file__).parent / "results"


def record(folder: Path, name: str, episodes: int, results: Path = RESULTS) -> dict[str, Any]:
    """Evaluates a finished run on unseen games and writes its result files; returns what the JSON holds.

    Raises:
        LabError: the run is not finished.
    """
    run = Run.open(folder)
    if run.info["state"] != "finished":
        raise LabError(f"{folder}: is {run.info['state']}. Finish it first: lab train {folder} --resume.")
    quiet_threads()
    from rl.evaluate import evaluate_run, run_config

    e = run_config(run).eval
    unseen = evaluate_run(run, "best", episodes, e.epsilon, unseen_seed(e, episodes))
    rows = read_metrics(run.metrics)
    seconds = {r["global_step"]: r["time/elapsed_seconds"] for r in rows if "time/elapsed_seconds" in r}
    curve = [
        {
            "agent_steps": row["global_step"],
            "seconds": seconds.get(row["global_step"]),
            "mean_reward": row["eval/mean_reward"],
            "std_reward": row["eval/std_reward"],
        }
        for row in rows
        if "eval/mean_reward" in row
    ]
    of_config, further, _ = name.partition("__")
    seed = run.info["seed"]
    result = {
        "command": f"lab train configs/rl/{of_config}.yaml" + (f" --seed={seed}" if seed else ""),
        "recorded_by": f"python -m benchmarks.record_run {folder} {name}",
        "evaluation_on_unseen_games": {key: unseen[key] for key in unseen if key not in ("run", "compute")},
        "training_seconds": run.info["summary"]["time/elapsed_seconds"],
        "evaluations_during_training": curve,
        "config": run.info["config"],
        "compute": run.info["compute"],
        "git": run.info["git"],
        "packages": run.info["packages"],
        "machine": machine.describe(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"{name}.json", result)
    if further:
        return result
    shutil.copyfile(run.media / "learning_curve.png", results / f"{name}.png")
    _save_film_frame(run, results / f"{name}_film.png")
    return result


def _save_film_frame(run: Run, path: Path) -> None:
    """One frame from the middle of a film of the best agent."""
    import imageio_ffmpeg
    from PIL import Image

    from rl.evaluate import load_player, run_config
    from rl.film import film

    player, _, _ = load_player(run, "best")
    with tempfile.TemporaryDirectory() as scratch:
        movie = Path(scratch) / "film.mp4"
        film(player, movie, unseen_seed(run_config(run).eval, 1), 0.001, max_steps=400)
        reader = imageio_ffmpeg.read_frames(str(movie))
        width, height = next(reader)["size"]  # type: ignore[index]
        frames = list(reader)
        Image.frombytes("RGB", (width, height), frames[len(frames) * 3 // 4]).save(path)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("name", help="name of the result, that of the config")
    parser.add_argument("--episodes", type=int, default=10)
    options = parser.parse_args()
    result = record(options.run, options.name, options.episodes)
    print(json.dumps(result["evaluation_on_unseen_games"], indent=2))


if __name__ == "__main__":
    main()
