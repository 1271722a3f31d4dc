"""Training steps a second: our loop beside transformers' Trainer, a DataLoader loop and nanoGPT's model.

    python -m benchmarks.supervised_speed --nanogpt PATH

All sides of a case have the same network, batch size, optimiser and number of torch's threads: by default
one, then all cores, which is what everybody's torch takes. Each lives in a process of its own, as it would
elsewhere; they take turns, and are compared round by round: a ratio is the median over rounds. Of the peers
of the image networks one Trainer is fed as transformers' own image-classification example feeds it, PNGs
from a `datasets.Dataset` through a transform, and one as the documentation of `datasets` begins, arrays with
`with_format("torch")`; the others get tensors from a Dataset that normalises each image, the quickest form.
The images are Fashion-MNIST, or scikit-learn's digits where it is not installed. PATH is a checkout of
github.com/karpathy/nanoGPT, whose model.py is used as it is. The share of the machine's peak is a step's
FLOPs over what the best of some matrix products reaches.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from lab.device import usable_cores
from lab.errors import LabError
from lab.files import explain_write_errors, write_json
from supervised.data.bundled import DEBIAN
from supervised.data.config import DataConfig

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "supervised_speed.json"
LEARNING_RATE = 1e-3
IMAGE_BATCH = 128
WARM_STEPS = 3
"""Steps at the start of each turn that are not timed."""
IMAGE_STEPS = {"lenet5": 60, "resnet8": 20}
"""Timed steps of a turn, by backbone."""
GPT_STEPS = 5
GPT_SHAPES = {
    "gpt 4x128": {"n_layer": 4, "n_head": 4, "width": 128, "context": 128, "batch_size": 32},
    "gpt 6x384": {"n_layer": 6, "n_head": 6, "width": 384, "context": 256, "batch_size": 8},
}
IMAGE_SIDES = (
    ("ours", "bf16"),
    ("ours", "fp32"),
    ("Trainer on PNGs", "fp32"),
    ("Trainer on arrays", "fp32"),
    ("Trainer on tensors", "fp32"),
    ("Trainer on tensors", "bf16"),
    ("DataLoader loop", "fp32"),
)
GPT_SIDES = tuple((side, precision) for precision in ("bf16", "fp32") for side in ("ours", "nanoGPT"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does."""

    case: str
    """What is done: an image backbone, or a key of `GPT_SHAPES`."""
    side: str
    precision: str
    threads: int
    nanogpt: str | None = None
    """Path of its checkout."""


class Side:
    """A process of `module` that trains when it is its turn.

    Raises:
        LabError: it ended; the message has its last line.
    """

    def __init__(self, job: Job, stack: ExitStack, module: str = "benchmarks.supervised_jobs") -> None:
        self.job = job
        self.errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115  the stack closes it
        command = (sys.executable, "-m", module, json.dumps(dataclasses.asdict(job)))
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        stack.callback(self._end)

    @cached_property
    def facts(self) -> Any:
        """What it says of itself once it is ready for turns."""
        return self._answer()

    def turn(self, n_steps: int) -> float:
        """Seconds a step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n_steps}\n")
        self.process.stdin.flush()
        return self._answer() / n_steps

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        why = self.errors.read().strip().splitlines() or ["it said nothing"]
        raise LabError(f"{self.job.case}, {self.job.side}: its process ended: {why[-1]}")

    def _end(self) -> None:
        self.process.communicate()


def measure(
    jobs: Sequence[Job],
    n_steps: int,
    rounds: int,
    peaks: dict[str, float],
    module: str = "benchmarks.supervised_jobs",
) -> list[dict[str, Any]]:
    """All sides of a case in turn, `rounds` times; a row for each."""
    with ExitStack() as stack:
        sides = [Side(job, stack, module) for job in jobs]  # they get ready side by side
        facts = [side.facts for side in sides]
        seconds: list[list[float]] = [[] for _ in sides]
        for number in range(rounds):
            order = list(zip(sides, seconds, strict=True))
            for side, spent in order if number % 2 == 0 else reversed(order):
                spent.append(side.turn(n_steps))
    flops = next(said["flops"] for said in facts if "flops" in said)
    ours = {s.job.precision: spent for s, spent in zip(sides, seconds, strict=True) if s.job.side == "ours"}
    return [
        {
            "case": side.job.case,
            "threads": side.job.threads,
            "side": side.job.side,
            "precision": side.job.precision,
            "parameters": side.facts["parameters"],
            "ms_a_step_by_round": [round(1000 * s, 3) for s in spent],
            "ours_is_so_many_times_as_fast": {
                precision: round(median(b / a for a, b in zip(mine, spent, strict=True)), 2)
                for precision, mine in ours.items()
                if mine is not spent
            },
            "share_of_matmul_peak": round(flops / median(spent) / peaks[side.job.precision], 3),
        }
        for side, spent in zip(sides, seconds, strict=True)
    ]


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures all cases and writes the results."""
    about = machine.describe(("torch", "transformers", "accelerate", "numpy"))
    with explain_write_errors(str(options.out), "Name another file."):
        options.out.parent.mkdir(parents=True, exist_ok=True)
    nanogpt = options.nanogpt
    if nanogpt is None:
        print("nanoGPT left out: --nanogpt PATH, a clone of github.com/karpathy/nanoGPT", file=sys.stderr)
    elif not (nanogpt / "model.py").is_file():
        raise LabError(f"{nanogpt}: has no model.py. --nanogpt is a clone of github.com/karpathy/nanoGPT.")
    rows: list[dict[str, Any]] = []
    peaks: dict[int, dict[str, float]] = {}
    for threads in options.threads or sorted({1, usable_cores()}):
        with ExitStack() as stack:
            peaks[threads] = Side(Job(case="", side="peak", precision="", threads=threads), stack).facts
        for jobs, n_steps in _cases(threads, nanogpt):
            if options.cases and jobs[0].case not in options.cases:
                continue
            rows += measure(jobs, 2 if options.quick else n_steps, options.rounds, peaks[threads])
    results = {
        "machine": about,
        "command": shlex.join(["python", "-m", "benchmarks.supervised_speed", *_public(arguments)]),
        "settings": {
            "rounds": options.rounds,
            "images": images().source,
            "batch_size": IMAGE_BATCH,
            "gpt": GPT_SHAPES,
        },
        "matmul_peak_gflops": {
            threads: {name: round(peak / 1e9, 1) for name, peak in found.items()}
            for threads, found in peaks.items()
        },
        "rows": rows,
    }
    with explain_write_errors(str(options.out), "Free some space and try again."):
        write_json(options.out, results)
    return results


def _cases(threads: int, nanogpt: Path | None) -> Iterator[tuple[list[Job], int]]:
    """The sides of each case, and how many steps a turn has."""
    for backbone, n_steps in IMAGE_STEPS.items():
        yield [Job(case=backbone, side=s, precision=p, threads=threads) for s, p in IMAGE_SIDES], n_steps
    for shape in GPT_SHAPES if nanogpt is not None else ():
        path = str(nanogpt.absolute()) if nanogpt is not None else None
        yield (
            [Job(case=shape, side=s, precision=p, threads=threads, nanogpt=path) for s, p in GPT_SIDES],
            GPT_STEPS,
        )


def _public(arguments: Sequence[str]) -> list[str]:
    """Without folders of this machine."""
    return [
        "PATH" if before == "--nanogpt" else word for before, word in itertools.pairwise(["", *arguments])
    ]


def images() -> DataConfig:
    """Fashion-MNIST where it is installed, else scikit-learn's digits."""
    if DEBIAN.is_dir():
        return DataConfig(source="fashion_mnist")
    return DataConfig(source="digits", img_size=28)


def table(results: dict[str, Any]) -> str:
    """The rows for people."""
    lines = [
        f"matmul peak by threads: {results['matmul_peak_gflops']} GFLOP/s",
        f"{'case':10} {'threads':>7}  {'side':26} {'ms a step':>10} {'of peak':>8}  "
        "ours is so many times as fast",
    ]
    for row in results["rows"]:
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in row["ours_is_so_many_times_as_fast"].items())
        spent, side = median(row["ms_a_step_by_round"]), f"{row['side']}, {row['precision']}"
        lines.append(
            f"{row['case']:10} {row['threads']:>7}  {side:26} {spent:>10.2f} "
            f"{row['share_of_matmul_peak']:>8.1%}  {ratios}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the file; returns the exit code, 2 for anything the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    known = [*IMAGE_STEPS, *GPT_SHAPES]
    parser.add_argument("--cases", nargs="+", choices=known, help="only these", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    parser.add_argument("--threads", type=int, nargs="+", help="of torch (1, then all cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work?")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON")
    try:
        results = run(parser.parse_args(arguments), arguments)
    except LabError as error:
        print(f"supervised_speed: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
