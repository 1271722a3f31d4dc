"""Writes docs/gallery.md, every figure and number of benchmarks/results: `python -m benchmarks.gallery`."""

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gallery.md"
TEXT_LINES = 24
HEADLINES = (
    "accuracy",
    "bleu",
    "bits_per_byte",
    "bits_per_dim",
    "psnr",
    "frechet_features",
    "rollout_mse",
    "r2",
    "pearson",
)
PERCENT = ("accuracy",)


def page(results: Path = RESULTS, place: Path = PAGE.parent) -> str:
    """The page as Markdown, with links as they are from the folder `place`."""
    found = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    learned = {p: r for p, r in found.items() if "configs/supervised/" in str(r.get("command", ""))}
    lines = [
        "# Gallery",
        "",
        "Every result of `supervised/` with its figures, then the curves of agents and of language models",
        "learned from preferences. Written by `python -m benchmarks.gallery` from the files in",
        "benchmarks/results/, which hold config, numbers, curve, commit and machine. Numbers are of the",
        "weights a run ended with, on data it did not learn from.",
        "",
        "| config | result | training |",
        "|---|---|---|",
    ]
    for path, result in learned.items():
        lines += [f"| {_label(path, run)} | {_headline(run)} | {minutes(run)} |" for run in result["runs"]]
    for path, result in learned.items():
        lines += ["", f"## {path.stem}", "", _purpose(path.stem), "", f"`{result['command']}`", ""]
        lines += _numbers(path, result["runs"])
        for figure in sorted((results / path.stem).glob("*")):
            lines += _figure(figure, place)
    lines += _adaptation(learned)
    lines += ["", "## Agents, language models from preferences, speed"]
    for path, result in found.items():
        if path not in learned:
            file = f"[{path.name}]({_link(path, place)})"
            command = result.get("command", f"python -m benchmarks.{path.stem}")
            lines += ["", f"### {path.stem}", "", f"{file}, by `{command}`"]
            for picture in sorted(
                {*results.glob(f"{path.stem}.png"), *results.glob(f"{path.stem}_film.png")}
            ):
                lines += _figure(picture, place)
    return "\n".join(lines) + "\n"


def _adaptation(learned: dict[Path, dict[str, Any]]) -> list[str]:
    """One GPT adapted to several tasks: what learns, side by side; of several runs of a kind the best."""
    rows = []
    for path, result in learned.items():
        if path.stem.startswith("adapt_gpt_"):
            adapted, best = result["config"]["model"]["adapt"], {}
            for run in sorted(result["runs"], key=lambda run: run["evaluation"]["accuracy"]):
                best[run["set_on_the_command_line"].get("model.adapt", adapted)] = _headline(run)
            rows.append(f"| [{path.stem}](#{path.stem}) | {best.get('lora', '')} | {best.get('full', '')} |")
    if not rows:
        return []
    return [
        "",
        "## One GPT, several tasks",
        "",
        "Each begins with the GPT of gpt_text.yaml, whose own held-out files are others: as text, without "
        "labels, it has read nearly all that is held out here.",
        "",
        "| task | adapters beside frozen weights | all weights |",
        "|---|---|---|",
        *rows,
    ]


def _label(path: Path, run: dict[str, Any]) -> str:
    changed = {k: v for k, v in run["set_on_the_command_line"].items() if k != "data.source"}
    more = [f"{k.rpartition('.')[2]}={v}" for k, v in changed.items()]
    seed = [f"seed {run['seed']}"] if run["seed"] else []
    return f"[{path.stem}](#{path.stem})" + (f" ({', '.join(more + seed)})" if more + seed else "")


def _headline(run: dict[str, Any]) -> str:
    key = next(key for key in HEADLINES if key in run["evaluation"])
    value = run["evaluation"][key]
    shown = f"{value:.2%}" if key in PERCENT else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{key.replace('_', ' ')} **{shown}** on {run['evaluation']['part']}"


def minutes(run: dict[str, Any]) -> str:
    """How long a recorded run took, on what."""
    minutes, seconds = divmod(round(run["training_seconds"]), 60)
    return f"{minutes}m{seconds:02}s on {run['compute']['threads']} thread(s), {run['compute']['precision']}"


def _purpose(name: str) -> str:
    """The comment a config begins with."""
    text = (ROOT / "configs" / "supervised" / f"{name}.yaml").read_text()
    comment = re.match(r"(#.*\n)*", text)
    return " ".join(line.removeprefix("#").strip() for line in (comment[0] if comment else "").splitlines())


def _numbers(path: Path, runs: list[dict[str, Any]]) -> list[str]:
    keys = [key for key in runs[0]["evaluation"] if "_step_" not in key]  # those are drawn
    rows = ["| run | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    for run in runs:
        cells = [_label(path, run), *(run["evaluation"].get(key, "") for key in keys)]
        rows.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else f"{c}" for c in cells) + " |")
    return rows


def _figure(path: Path, place: Path) -> list[str]:
    """A picture, or the beginning of a text."""
    title = path.stem.replace("_", " ")
    if path.suffix == ".png":
        return ["", f"![{title}]({_link(path, place)})"]
    text = path.read_text().splitlines()[:TEXT_LINES]
    return [
        "",
        f"[{path.name}]({_link(path, place)}) begins:",
        "",
        *(f"    {line}".rstrip() for line in text),
    ]


def _link(path: Path, place: Path) -> str:
    return Path(os.path.relpath(path, place)).as_posix()


def main() -> None:
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
