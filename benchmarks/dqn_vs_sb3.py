"""Stock Stable-Baselines3 DQN and ours, alternating: speed, memory, sampling, and where our time goes.

    python -m benchmarks.dqn_vs_sb3

Every measurement is made in a fresh process, one at a time. Results go to benchmarks/results/.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import dqn_jobs, machine
from benchmarks.dqn_jobs import Job

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "dqn_vs_sb3.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes the JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    base = Job(
        measure="speed",
        seconds=options.seconds,
        threads=options.threads,
        emulator_threads=options.emulator_threads,
        cores=options.cores,
        device=options.device,
    )
    if options.quick:
        base = replace(base, warmup_seconds=0.1, learning_starts=64, buffer_size=1_000)
    about_machine = machine.describe()
    rows = measure_speed(base, options.envs, options.precisions, options.rounds)
    rows += measure_replay(base)
    rows += measure_checkpoints(base, 10_000 if options.quick else dqn_jobs.NATURE_BUFFER_SIZE)
    profiles = measure_profiles(base, max(options.envs))
    results = {
        "machine": about_machine,
        "command": _command(arguments),
        "settings": _settings(base, options),
        "rows": rows,
        "profile": profiles,
    }
    print(table(results))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


def measure_speed(
    base: Job, n_envs_list: Sequence[int], precisions: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """SB3, ours, SB3, ours, ...: each of our measurements is held against SB3's just before it."""
    rows = []
    for n_envs in n_envs_list:
        job = replace(base, n_envs=n_envs)
        sb3: list[dict[str, Any]] = []
        ours: dict[str, list[dict[str, Any]]] = {precision: [] for precision in precisions}
        ratios: dict[str, list[float]] = {precision: [] for precision in precisions}
        for round_number in range(rounds):
            for precision in precisions:
                sb3.append(run(replace(job, side="sb3", seed=round_number)))
                ours[precision].append(run(replace(job, precision=precision, seed=round_number)))
                theirs, mine = sb3[-1], ours[precision][-1]
                if theirs["parameters"] != mine["parameters"]:
                    raise RuntimeError("the two networks differ in size; the comparison would be void")
                ratios[precision].append(mine["agent_steps_per_second"] / theirs["agent_steps_per_second"])
        sb3_row = _speed_row("sb3", n_envs, sb3)
        rows.append(sb3_row)
        for precision in precisions:
            row = _speed_row("ours", n_envs, ours[precision])
            per_cpu = "agent_steps_per_cpu_second"
            rows.append(
                row
                | {
                    "speed_ratio_to_sb3": median(ratios[precision]),
                    "speed_ratio_to_sb3_by_round": ratios[precision],
                    "cpu_speed_ratio_to_sb3": row[per_cpu] / sb3_row[per_cpu],
                }
            )
    return rows


def _speed_row(side: str, n_envs: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "measure": "speed",
        "side": side,
        "precision": results[0]["precision"],
        "n_envs": n_envs,
        "agent_steps_per_second": median(r["agent_steps_per_second"] for r in results),
        "agent_steps_per_second_by_round": [r["agent_steps_per_second"] for r in results],
        "agent_steps_per_cpu_second": median(r["agent_steps_per_cpu_second"] for r in results),
        "updates_per_agent_step": median(r["updates_per_agent_step"] for r in results),
        "parameters": results[0]["parameters"],
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in results),
    }


def measure_replay(base: Job) -> list[dict[str, Any]]:
    """Bytes per stored transition, and the time to sample a batch of 32."""
    result = run(replace(base, measure="replay"))
    rows: list[dict[str, Any]] = [
        {"measure": "memory", "side": side, "bytes_per_transition": bytes_per_transition}
        for side, bytes_per_transition in result["bytes_per_transition"].items()
    ]
    for side, seconds in result["sample_seconds"].items():
        row = {"measure": "sampling", "side": side, "milliseconds_per_batch": 1000 * seconds}
        if side == "ours":
            row["time_ratio_to_sb3"] = result["sample_time_ratio_ours_to_sb3"]
        rows.append(row)
    return rows


def measure_checkpoints(base: Job, buffer_size: int) -> list[dict[str, Any]]:
    """Seconds a checkpoint of ours takes with a full memory."""
    result = run(replace(base, measure="checkpoint", n_envs=8, buffer_size=buffer_size))
    return [
        {"measure": "checkpoint", "side": "ours", "transitions": result["transitions"]} | row
        for row in result["rows"]
    ]


def measure_profiles(base: Job, n_envs: int) -> dict[str, Any]:
    """The loop by parts, ours in the precision `auto` takes, and SB3's to read it against."""
    job = replace(base, measure="profile", n_envs=n_envs)
    return {"ours": run(job), "sb3": run(replace(job, side="sb3"))}


def run(job: Job) -> dict[str, Any]:
    """Does a job in a process of its own.

    Raises:
        RuntimeError: it failed; its own messages are on stderr.
    """
    side = "sb3" if job.side == "sb3" else f"ours {job.precision}"
    print(f"{job.measure:8} {side:10} {job.n_envs} environments", file=sys.stderr, flush=True)
    done = subprocess.run(
        (sys.executable, "-m", "benchmarks.dqn_jobs", json.dumps(asdict(job))),
        cwd=machine.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"a measurement failed with exit code {done.returncode}: {job}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    about, settings = results["machine"], results["settings"]
    lines = [
        f"{about['cpu']}, {about['cores_usable']} cores, {settings['threads']} torch thread(s), "
        f"load {about['load_average_1_minute']} at the start",
        "",
        f"{'':14}{'envs':>5}{'steps/s':>10}{'ratio':>8}{'steps/CPU-s':>13}{'ratio':>8}{'peak RSS':>12}",
    ]
    for row in results["rows"]:
        if row["measure"] == "speed":
            name = f"{row['side']} {row['precision']}"
            lines.append(
                f"{name:14}{row['n_envs']:>5}{row['agent_steps_per_second']:>10.1f}"
                f"{row.get('speed_ratio_to_sb3', 1):>8.2f}{row['agent_steps_per_cpu_second']:>13.1f}"
                f"{row.get('cpu_speed_ratio_to_sb3', 1):>8.2f}{row['peak_rss_bytes'] / 1e6:>9.0f} MB"
            )
    lines.append("")
    for row in results["rows"]:
        if row["measure"] == "memory":
            lines.append(f"{row['side']:28}{row['bytes_per_transition']:>10,.0f} bytes a transition")
        elif row["measure"] == "sampling":
            ratio = f"  ({row['time_ratio_to_sb3']:.2f} of SB3's)" if "time_ratio_to_sb3" in row else ""
            lines.append(f"{row['side']:28}{row['milliseconds_per_batch']:>10.3f} ms to sample 32{ratio}")
        elif row["measure"] == "checkpoint":
            lines.append(
                f"{row['side']:28}{row['seconds']:>10.2f} s for a checkpoint at {row['transitions']:,} "
                f"transitions, {row['new_transitions']:,} of them new"
            )
    for side, profile in results["profile"].items():
        lines += [
            "",
            f"{side} {profile['precision']}, {profile['n_envs']} environments: "
            f"{profile['ms_per_update']:.2f} ms per {profile['agent_steps_per_update']} agent steps",
        ]
        lines += [f"  {p['part']:20}{p['share']:>7.1%}{p['ms']:>9.3f} ms" for p in profile["parts"]]
    return "\n".join(lines)


def _settings(base: Job, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "game": dqn_jobs.GAME,
        "image_size": dqn_jobs.IMAGE_SIZE,
        "batch_size": dqn_jobs.BATCH_SIZE,
        "agent_steps_per_update": dqn_jobs.TRAIN_FREQ,
        "learning_rate": dqn_jobs.LEARNING_RATE,
        "epsilon": dqn_jobs.EPSILON,
        "target_update_steps": dqn_jobs.TARGET_UPDATE_STEPS,
        "learning_starts": base.learning_starts,
        "buffer_size": base.buffer_size,
        "rounds": options.rounds,
        "seconds": base.seconds,
        "warmup_seconds": base.warmup_seconds,
        "envs": options.envs,
        "precisions": options.precisions,
        "device": base.device,
        "threads": base.threads,
        "emulator_threads_ours": base.emulator_threads or "one per core",
        "cores": base.cores or "all",
        "quick": options.quick,
    }


def _command(arguments: Sequence[str]) -> str:
    """The command line without --out, which changes no number."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
    return shlex.join(["python", "-m", "benchmarks.dqn_vs_sb3", *kept])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dqn_vs_sb3", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--rounds", type=int, help="measurements of each side and setting (3)")
    parser.add_argument("--seconds", type=float, help="length of each, after warming up (15)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (1)")
    parser.add_argument(
        "--emulator_threads", type=int, default=0, help="of our emulators; 0, the default, is one per core"
    )
    parser.add_argument(
        "--cores", type=int, default=0, help="cores a process may use; 0, the default, is all"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda, for both sides")
    parser.add_argument(
        "--envs",
        type=_list_of(int),
        default=[1, 8],
        help="numbers of environments, separated by commas (1,8)",
    )
    parser.add_argument(
        "--precisions", type=_list_of(str), default=["fp32", "bf16"], help="of our side (fp32,bf16)"
    )
    parser.add_argument("--quick", action="store_true", help="only show that it works: 1 round of 1 second")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON file to write")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.seconds = options.seconds or (1.0 if options.quick else 15.0)
    return options


def _list_of(kind: type) -> Any:
    return lambda text: [kind(item) for item in text.split(",")]


if __name__ == "__main__":
    main()
