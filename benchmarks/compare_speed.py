"""How long `lab compare` takes, and in how much memory, from few runs to many.

    python -m benchmarks.compare_speed

Makes run folders of 10,000 rows each and compares them in a process of its own; results go to
benchmarks/results/compare_speed.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from lab.files import write_json
from lab.run import Run

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "compare_speed.json"
METRIC = "rollout/ep_rew_mean"
SEEDS = 5


def make_runs(folder: Path, n_runs: int, n_rows: int) -> None:
    """Writes finished runs with rows as training logs them: ten numbers, one of them compared."""
    for number in range(n_runs):
        setting, seed = divmod(number, SEEDS)
        run = Run.create(
            folder / f"{setting:04d}__s{seed}",
            config={"seed": seed, "agent": {"learning_rate": 1e-4 * (setting + 1)}, "env": {"game": "pong"}},
            pipeline="rl",
            job_type="train",
            name=f"{setting}__s{seed}",
            group=str(setting),
            x_axis="agent_steps",
            compute={},
        )
        numbers = random.Random(number)
        rows = []
        for row in range(n_rows):
            values = {f"train/metric_{i}": numbers.random() for i in range(7)}
            values |= {
                METRIC: setting + row / n_rows + numbers.gauss(0, 1),
                "time/elapsed_seconds": row * 0.5,
            }
            rows.append(json.dumps({"global_step": row * 128, **values, "_time": 1.7e9 + row}))
        run.metrics.write_text("\n".join(rows) + "\n")
        with run.recording_its_end():
            run.end("finished")


def measure(folder: Path) -> dict[str, float]:
    """Wall seconds and peak memory, workers included, of one comparison with everything written."""
    arguments = ["compare", str(folder), "--metric", METRIC, "--out", f"{folder}-out"]
    code = (
        "import json, resource, sys, time\n"
        "from lab import cli\n"
        "began = time.perf_counter()\n"
        f"code = cli.main({arguments!r})\n"
        "took = time.perf_counter() - began\n"
        "own, workers = (resource.getrusage(who).ru_maxrss * 1024\n"
        "                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))\n"
        "print(json.dumps({'code': code, 'seconds': took, 'peak_rss_bytes': own,\n"
        "                  'peak_rss_bytes_of_the_largest_worker': workers}), file=sys.stderr)\n"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
    result = json.loads(done.stderr.splitlines()[-1])
    if result.pop("code"):
        raise RuntimeError(done.stderr)
    return result


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000], help="numbers of runs")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about = machine.describe(("orjson", "numpy", "matplotlib"))
    for n_runs in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            make_runs(Path(folder) / "runs", n_runs, options.rows)
            made = time.perf_counter() - began
            size = sum(path.stat().st_size for path in Path(folder).rglob("metrics.jsonl"))
            rows.append(
                {"runs": n_runs, "rows": options.rows, "bytes": size, **measure(Path(folder) / "runs")}
            )
        last = rows[-1]
        print(
            f"{n_runs:5} runs of {options.rows:,} rows ({size / 1e6:,.0f} MB, made in {made:.0f} s): "
            f"{last['seconds']:.1f} s, {last['peak_rss_bytes'] / 1e6:,.0f} MB "
            f"and {last['peak_rss_bytes_of_the_largest_worker'] / 1e6:,.0f} MB in a worker"
        )
    write_json(options.out, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
