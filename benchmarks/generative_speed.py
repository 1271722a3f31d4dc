"""Steps of diffusion a second: our U-Net in our loop beside diffusers' UNet2DModel, and DDIM beside DDPM.

    python -m benchmarks.generative_speed [--run RUN]

Both sides of a case have the same configuration, weights, batch size, optimiser and one thread. Each lives in
a process of its own; they take turns, and are compared round by round: a ratio is the median over rounds.
diffusers is trained as its own train_unconditional.py does (DDPMScheduler, AdamW, gradients clipped at 1) on
a DataLoader of tensors, and samples by DDPMScheduler.step; bf16 is autocast on either side. RUN is a finished
run of denoising whose weights DDIM and DDPM sample with, judged by its `objective.judge` if it has one;
without it, untrained ones do, for the time.
"""

import argparse
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.supervised_speed import Job, Side, measure
from benchmarks.supervised_speed import images as clothes
from lab.device import quiet_threads
from lab.errors import LabError
from lab.files import explain_write_errors, write_json
from supervised.data.config import DataConfig

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "generative_speed.json"
SIDES = tuple((side, precision) for precision in ("bf16", "fp32") for side in ("ours", "diffusers"))
SHAPES: dict[str, dict[str, Any]] = {
    "ddpm_cifar10": {
        **{"width": 128, "mults": [1, 2, 2, 2], "attention": [16], "n_res": 2, "groups": 32},
        **{"batch_size": 8, "n_steps": 2, "img_size": 32},
    },
    "ddpm_fashion": {
        **{"width": 16, "mults": [1, 3, 4], "attention": [7], "n_res": 1, "groups": 8},
        **{"batch_size": 64, "n_steps": 4, "img_size": 28},
    },
}


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures all cases and writes the results."""
    if importlib.util.find_spec("diffusers") is None:
        raise LabError("diffusers is not installed. Get it by: pip install -e '.[dev]'")
    quiet_threads()
    from benchmarks.generative_jobs import samplers

    about = machine.describe(("torch", "diffusers", "accelerate", "numpy"))
    quick, rounds = options.quick, 1 if options.quick else options.rounds
    with explain_write_errors(str(options.out), "Name another file."):
        options.out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        peaks = Side(Job(case="", side="peak", precision="", threads=1), stack).facts
    rows: list[dict[str, Any]] = []
    for name, what in itertools.product(("ddpm_fashion",) if quick else SHAPES, ("training", "sampling")):
        jobs = [Job(case=f"{name}, {what}", side=s, precision=p, threads=1) for s, p in SIDES]
        n_steps = 1 if quick else SHAPES[name]["n_steps"]
        rows += measure(jobs, n_steps, rounds, peaks, "benchmarks.generative_jobs")
    results = {
        "machine": about,
        "command": shlex.join(["python", "-m", "benchmarks.generative_speed", *_public(arguments)]),
        "settings": {"threads": 1, "rounds": rounds, "shapes": SHAPES},
        "matmul_peak_gflops": {name: round(peak / 1e9, 1) for name, peak in peaks.items()},
        "rows": rows,
        "samplers": samplers(options.run, quick),
    }
    with explain_write_errors(str(options.out), "Free some space and try again."):
        write_json(options.out, results)
    return results


def _public(arguments: Sequence[str]) -> list[str]:
    """Without folders of this machine."""
    return ["RUN" if i and arguments[i - 1] == "--run" else word for i, word in enumerate(arguments)]


def images(name: str) -> DataConfig:
    """Coloured photographs for CIFAR's shape, else clothes, or digits where there are none."""
    return DataConfig(source="photographs", img_size=32) if name == "ddpm_cifar10" else clothes()


def table(results: dict[str, Any]) -> str:
    """The rows for people."""
    lines = [
        f"matmul peak, one thread: {results['matmul_peak_gflops']} GFLOP/s",
        f"{'case':24} {'side':18} {'ms a step':>10} {'of peak':>8}  ours is so many times as fast",
    ]
    for row in results["rows"]:
        ratios = ", ".join(f"{k} {v}" for k, v in row["ours_is_so_many_times_as_fast"].items())
        spent, side = median(row["ms_a_step_by_round"]), f"{row['side']}, {row['precision']}"
        lines.append(
            f"{row['case']:24} {side:18} {spent:>10.1f} {row['share_of_matmul_peak']:>8.1%}  {ratios}"
        )
    for row in results["samplers"]:
        judged = f", {row['recognised']:.0%} recognised" if "recognised" in row else ""
        judged += "".join(f", {name} {row[name]:.3g}" for name in row if name.startswith("frechet_"))
        drawn = f"{row['samples']} samples by {row['sampler']} in {row['steps']} steps"
        lines.append(f"{drawn}: {row['seconds']} s{judged}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the file; returns the exit code, 2 for anything the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run of diffusion to sample with")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--quick", action="store_true", help="a step of each: does it work?")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON")
    try:
        results = run(parser.parse_args(arguments), arguments)
    except LabError as error:
        print(f"generative_speed: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
