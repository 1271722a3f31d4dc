"""TRL 1.12's PPOTrainer, the last there was, and ours, alternating: speed, memory and learning curves.

    python -m benchmarks.ppo_vs_trl

TRL 1.12 is installed into a virtual environment of its own, kept for the next time. Every training is a
process of its own, one at a time; a round is a seed. Results go to benchmarks/results/, the curves as a PNG.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NoReturn

from benchmarks import machine
from benchmarks.ppo_jobs import Job
from lab.errors import LabError
from lab.files import explain_write_errors, write_json, written_aside
from rlhf import everyday, reviews

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "ppo_vs_trl.json"
DEFAULT_VENV = Path.home() / ".cache" / "lab" / "trl-1.12"
SHARED = ("torch", "transformers", "accelerate", "datasets", "numpy")
"""Packages of which both sides have the same version."""
FOLDERS = ("out", "venv", "tiny", "smollm2", "policy", "reward")
LORA_RANK = 16
FIXED_UPDATES = 10
"""Of the tiny model with answers of fixed length, whose curves nobody looks at."""
LAST = 10
"""Updates at the end of a curve whose mean is where it arrived."""
COLORS = {"trl": "#c0504d", "ours": "#2a6fbb"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the files; returns the exit code, 2 for anything the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        results = _measure(_parse(arguments), arguments)
    except LabError as error:
        print(f"ppo_vs_trl: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    about = machine.describe((*SHARED, "trl", "peft"))
    with explain_write_errors(str(options.out), "Name another file."):  # before hours are spent
        options.out.parent.mkdir(parents=True, exist_ok=True)
    python = peer(options.venv)
    tiny = tiny_job(options)
    fixed = replace(tiny, fixed_length=True, updates=min(tiny.updates, FIXED_UPDATES))
    cases = {
        "tiny": ({"trl": tiny, "ours": tiny}, options.rounds),
        "tiny, 24": ({"trl": fixed, "ours": fixed}, options.rounds),
    }
    with tempfile.TemporaryDirectory() as work:
        if not (options.smollm2 / "config.json").is_file():
            print(
                f"{options.smollm2}: no SmolLM2, left out. `lab fetch smollm2-135m` gets it.", file=sys.stderr
            )
        else:
            cases["smollm2"] = (smollm2_jobs(options, Path(work)), options.smollm2_rounds)
        ran = {case: alternate(case, jobs, rounds, python) for case, (jobs, rounds) in cases.items()}
    results = {
        "machine": about,
        "command": command(arguments),
        "settings": {
            case: {name: settings(job) for name, job in jobs.items()} for case, (jobs, _) in cases.items()
        },
        "rows": [row for case, by_name in ran.items() for row in compare(case, by_name)],
        "curves": curves(ran["tiny"]),
    }
    with explain_write_errors(str(options.out), "Free some space and try again."):
        write_json(options.out, results)
    draw(results["curves"], options.out.with_suffix(".png"))
    return results


def peer(venv: Path) -> Path:
    """The Python of a virtual environment with TRL 1.12; makes it if it is not there.

    Raises:
        LabError: it cannot be installed.
    """
    wanted = ["trl==1.12.0", *(f"{name}=={version(name).partition('+')[0]}" for name in SHARED)]
    python, done = venv / "bin" / "python", venv / "installed.txt"
    if done.is_file() and done.read_text().split() == wanted:
        return python
    print(f"{venv}: installing {' '.join(wanted)}", file=sys.stderr)
    for step in (
        (sys.executable, "-m", "venv", "--clear", venv),
        (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted),
    ):
        tried = subprocess.run(step, capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            why = [line for line in (tried.stdout + tried.stderr).splitlines() if line.strip()] or [
                "no reason given"
            ]
            raise LabError(f"{venv}: TRL 1.12 cannot be installed: {why[-1]} Is there a network?")
    done.write_text("\n".join(wanted))
    return python


def tiny_job(options: argparse.Namespace) -> Job:
    """PPO as in configs/rlhf/tiny.yaml, on the models of the stages before it, made if need be."""
    for stage in ("sft", "collect", "reward"):
        if not ((options.tiny / "sft" / "model").is_dir() and (options.tiny / "reward" / "model").is_dir()):
            print(f"{options.tiny}: {stage}", file=sys.stderr)
            lab = (sys.executable, "-m", "lab.cli", "rlhf", "configs/rlhf/tiny.yaml", "--stage", stage)
            done = subprocess.run(
                (*lab, "--out", options.tiny.absolute()),
                cwd=machine.ROOT,
                stdout=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode != 0:
                raise LabError(
                    f"{options.tiny}: stage {stage} of the tiny recipe failed; its message is above."
                )
    return Job(
        policy=str(options.tiny.absolute() / "sft" / "model"),
        reward=str(options.tiny.absolute() / "reward" / "model"),
        prompts=list(reviews.prompts()),
        answer_tokens=24,
        rollout=64,
        epochs=2,
        learning_rate=5e-4,
        kl_coef=0.1,
        updates=options.updates,
        warmup=2,
        threads=options.threads,
    )


def smollm2_jobs(options: argparse.Namespace, work: Path) -> dict[str, Job]:
    """TRL's full fine-tuning, and ours: the same, with LoRA, and in the format that `auto` chooses.

    Both sides get what the recipe's first two stages would leave, as folders below `work`.
    """
    from lab.device import DeviceConfig, resolve

    policy, reward = work / "policy", work / "reward"
    save_policy(options.smollm2, policy)
    make_reward(policy, reward)
    adapted = work / "adapted_reward"
    make_reward(options.smollm2, adapted, LORA_RANK)
    job = Job(
        policy=str(policy),
        reward=str(reward),
        prompts=[[{"role": "user", "content": prompt}] for prompt in everyday.prompts()],
        answer_tokens=16,
        fixed_length=True,  # without stage 1 hardly an answer ends so early
        rollout=8,
        epochs=4,
        learning_rate=1e-5,
        kl_coef=0.05,
        updates=options.smollm2_updates,
        threads=options.threads,
    )
    lora = replace(
        job,
        policy=str(options.smollm2.absolute()),
        reward=str(adapted),
        lora_rank=LORA_RANK,
        learning_rate=1e-4,
    )
    jobs = {"trl": job, "ours": job, "ours, LoRA": lora}
    precision = resolve(DeviceConfig(device="cpu", threads=options.threads)).precision
    if precision != job.precision:
        for name in ("ours", "ours, LoRA"):
            jobs[f"{name}, {precision}"] = replace(jobs[name], precision=precision)
    return jobs


def save_policy(base: Path, folder: Path) -> None:
    """The model as full fine-tuning would leave it, had it not moved a weight."""
    from rlhf import models
    from rlhf.config import ModelConfig
    from rlhf.stage import quiet_transformers

    with quiet_transformers(print):
        tokenizer = models.open_tokenizer(str(base))
        models.save(models.start(ModelConfig(path=str(base)), tokenizer, 0), tokenizer, folder)


def make_reward(base: Path, folder: Path, lora_rank: int = 0) -> None:
    """A reward model with a random score layer; with LoRA also as an adapter."""
    import peft
    import torch

    from rlhf import models
    from rlhf.config import ModelConfig
    from rlhf.sft import lora
    from rlhf.stage import quiet_transformers

    torch.manual_seed(0)
    with quiet_transformers(print):
        model, tokenizer = models.open_reward(base)
        if lora_rank:
            adapters: Any = lora(ModelConfig(lora_rank=lora_rank), "SEQ_CLS", model)
            model = peft.get_peft_model(model, adapters)
        models.save(model, tokenizer, folder)


def alternate(case: str, jobs: dict[str, Job], rounds: int, python: Path) -> dict[str, list[dict[str, Any]]]:
    """TRL, ours, TRL, ours, ...: what every round of every job gave, by the job's name."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for seed in range(rounds):
        for name, job in jobs.items():
            print(f"{case:8} {name:16} round {seed + 1} of {rounds}", file=sys.stderr, flush=True)
            job = replace(job, side=name.partition(",")[0], seed=seed)
            results[name].append(run(job, python if name == "trl" else Path(sys.executable)))
    return results


def run(job: Job, python: Path) -> dict[str, Any]:
    """Does a job in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as work:
        files = Path(work) / "job.json", Path(work) / "result.json"
        files[0].write_text(json.dumps(asdict(job)))
        done = subprocess.run(
            (python, "-W", "ignore", "-m", "benchmarks.ppo_jobs", *files),
            cwd=machine.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads), "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"a measurement of {job.side} failed:\n{done.stderr}")
        return json.loads(files[1].read_text())


def compare(case: str, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for every job; ours are held against TRL's of the same round.

    Raises:
        RuntimeError: without LoRA, the two sides do not train as many parameters.
    """
    rows = []
    sizes = {rounds[0]["trainable_parameters"] for name, rounds in results.items() if "LoRA" not in name}
    if len(sizes) > 1:
        raise RuntimeError("the models of the two sides differ in size; the comparison would be void")
    for name, rounds in results.items():
        row: dict[str, Any] = {"case": case, "name": name}
        for clock in ("seconds_per_update", "cpu_seconds_per_update"):
            ours, theirs = ([median(r[clock]) for r in some] for some in (rounds, results["trl"]))
            ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
            row |= {clock: median(ours), f"{clock}_by_round": ours}
            row |= {f"trl_{clock}_over_these": median(ratios), f"trl_{clock}_over_these_by_round": ratios}
        row["peak_rss_bytes"] = max(r["peak_rss_bytes"] for r in rounds)
        row["peak_rss_over_trl"] = row["peak_rss_bytes"] / max(r["peak_rss_bytes"] for r in results["trl"])
        row |= {key: rounds[0][key] for key in ("trainable_parameters", "parts", "versions")}
        rows.append(row)
    return rows


def curves(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean score and KL of every rollout by side and seed, and where the curves arrive."""
    sides: dict[str, Any] = {}
    for name, rounds in results.items():
        side: dict[str, Any] = {key: [r[key] for r in rounds] for key in ("scores", "kl")}
        ends = [mean(scores[-LAST:]) for scores in side["scores"]]
        error = stdev(ends) / len(ends) ** 0.5 if len(ends) > 1 else None
        sides[name] = side | {"end_score": mean(ends), "end_score_by_seed": ends, "end_score_error": error}
    return sides


def draw(sides: dict[str, Any], path: Path) -> None:
    """The curves, a thin line for each seed and a thick one for their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("scores", "kl"),
        ("mean score of a rollout", "KL to the SFT policy, nats"),
        strict=True,
    ):
        for name, color in COLORS.items():
            for seed in sides[name][key]:
                axes.plot(seed, color=color, linewidth=0.6, alpha=0.4)
            means = [mean(values) for values in zip(*sides[name][key], strict=True)]
            axes.plot(means, color=color, label={"trl": "TRL 1.12", "ours": "ours"}[name])
        axes.set(xlabel="update", ylabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        figure.savefig(aside, format="png")


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    about = results["machine"]
    threads = results["settings"]["tiny"]["ours"]["threads"]
    lines = [
        f"{about['cpu']}, {about['cores_usable']} cores, {threads} torch thread(s), "
        f"load {about['load_average_1_minute']} at the start",
        "",
        f"{'':26}{'s/update':>9}{'faster':>8}{'CPU-s/update':>14}{'faster':>8}{'peak RSS':>11}{'of TRL':>8}",
    ]
    for row in results["rows"]:
        lines.append(
            f"{row['case']:9}{row['name']:17}{row['seconds_per_update']:>9.2f}"
            f"{row['trl_seconds_per_update_over_these']:>7.2f}x{row['cpu_seconds_per_update']:>14.2f}"
            f"{row['trl_cpu_seconds_per_update_over_these']:>7.2f}x{row['peak_rss_bytes'] / 1e6:>8,.0f} MB"
            f"{row['peak_rss_over_trl']:>8.2f}"
        )
        lines.append("           " + ", ".join(f"{p['part']} {p['share']:.0%}" for p in row["parts"]))
    lines.append("")
    for name, side in results["curves"].items():
        error = "" if side["end_score_error"] is None else f" +- {side['end_score_error']:.2f}"
        seeds = len(side["end_score_by_seed"])
        lines.append(
            f"tiny     {name:17}mean score of the last {LAST} updates, {seeds} seed(s): "
            f"{side['end_score']:.2f}{error}"
        )
    return "\n".join(lines)


def settings(job: Job) -> dict[str, Any]:
    """What the JSON keeps of a job: all but the folders and what differs between its runs."""
    kept = {name: value for name, value in asdict(job).items() if name not in (*FOLDERS, "side", "seed")}
    return kept | {"prompts": len(job.prompts)}


def command(arguments: Sequence[str]) -> str:
    """The command line without folders, which change no number."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name not in FOLDERS:
            kept.append(word)
        elif not value:
            next(words, None)
    return shlex.join(["python", "-m", "benchmarks.ppo_vs_trl", *kept])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LabError(f"command line: {message}. See --help.")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks.ppo_vs_trl", description=(__doc__ or "").splitlines()[0])

    def count(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=_count, default=default, help=f"{text} ({default})")

    count("--rounds", 3, "rounds of the tiny model, each with a seed of its own")
    count("--updates", 60, "measured updates in each")
    count("--smollm2_rounds", 2, "rounds of SmolLM2-135M")
    count("--smollm2_updates", 2, "measured updates in each")
    count("--threads", 1, "torch threads of both sides")
    parser.add_argument(
        "--tiny", type=Path, default=Path("runs/tiny"), help="run of configs/rlhf/tiny.yaml (runs/tiny)"
    )
    parser.add_argument(
        "--smollm2", type=Path, default=Path("models/smollm2-135m"), help="its folder (models/smollm2-135m)"
    )
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="where TRL 1.12 is kept")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="the JSON file to write; the PNG lies beside"
    )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".json":
        raise LabError(f"--out {options.out}: must end in .json.")
    return options


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
