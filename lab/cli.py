"""The command `lab`.

Imports here are light: help and every error come within a second, torch is loaded when it is needed.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lab import comparing, sweep, sync, trust
from lab.arguments import count, probability, seed
from lab.errors import LONGEST_LINE, LabError, brief, cut, did_you_mean, first_line
from lab.escape import harmless, harmless_warnings
from lab.interrupt import heard

KINDS = ("algorithms", "backbones", "configs", "datasets", "games", "labelers", "objectives")


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `LabError`s."""

    def error(self, message: str) -> NoReturn:
        raise LabError(f"command line: {message}. See `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or "/".join(action.option_strings)).lower()
            known = [*map(str, action.choices)]
            hint = did_you_mean(str(value), known)
            raise LabError(f"command line: no {what} {brief(value)}.{hint} Known: {', '.join(known)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for anything the user can mend."""
    arguments = trust.spelled_out(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name need not be text in this terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        with heard(), harmless_warnings():
            code = _run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # where a full disk is noticed
            return code
    except LabError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as error:
        advice = {
            "train": " Continue the run with --resume.",
            "rlhf": " The same command goes on where it stopped.",
            "sweep": " The same command goes on where it stopped.",
            "sync": " The same command goes on where it stopped: no row is sent twice.",
        }.get(next(iter(arguments), ""), "")
        _refuse(f"stopped at once.{advice}")
        return 128 + getattr(signal, str(error), signal.SIGINT)
    except BrokenPipeError:  # `lab list | head`
        _discard_output()
        return 0
    except OSError as error:  # of the machine: a full disk, no permission, a name that is too long
        place = f"{error.filename}: " if error.filename else ""
        code = _refuse(
            f"{place}{error.strerror or error}. Free some space, or check the name and permissions."
        )
        _discard_output()
        return code
    except RecursionError:
        return _refuse("a file is nested too deeply to be read. Restore it from a copy.")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return _refuse(f"not enough memory ({first_line(error)}). Make sizes in the config smaller.")
        raise


_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|not enough memory|invalid buffer size", re.IGNORECASE
)
"""How torch's errors say it."""


def _refuse(why: str) -> int:
    """Says in a line why a command ends; returns its exit code."""
    with contextlib.suppress(OSError):  # stderr on a full disk
        lines = (cut(harmless(line), LONGEST_LINE) for line in why.splitlines())
        print("lab: " + "\n".join(lines), file=sys.stderr, flush=True)
    return 2


def _discard_output() -> None:
    """Lets what is still to be printed go nowhere: at exit Python would complain of it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    parser = _build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not options.takes_overrides:
        raise LabError(
            f"command line: unknown argument {overrides[0]!r}. See `lab {options.command} --help`."
        )
    options.overrides = overrides
    with trust.given(getattr(options, "trust", None) or (), _record(options)):
        return options.do(options)


def _record(options: argparse.Namespace) -> Path | None:
    """The run folder that a command opens, if it is not given a config."""
    place: Path | None = getattr(options, "run", None) or getattr(options, "config", None)
    return place if place is not None and place.is_dir() else None


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="lab",
        description="Train and evaluate agents and language models. Every run is a folder below runs/.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, do: Any, text: str, **kwargs: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **kwargs)
        sub.set_defaults(do=do, takes_overrides=False)
        return sub

    def run_argument(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run", type=Path, metavar="RUN", help="a run folder, e.g. runs/pong")
        sub.add_argument("--checkpoint", help="best (default), latest, or a folder in checkpoints/")
        trust.add_argument(sub)

    train = command(
        "train",
        _train,
        "Train what a config describes.",
        usage="lab train CONFIG [--out DIR] [--resume] [--smoke] [--print_config] [--trust[=NAME]] "
        "[--KEY=VALUE ...]",
        epilog="Any key of the config can be overridden: lab train configs/rl/pong.yaml --agent.n_step=3 "
        "--seed=1. `lab train CONFIG --print_config` shows them all.",
    )
    train.set_defaults(takes_overrides=True)
    train.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, or a run folder to resume")
    train.add_argument("--out", type=Path, metavar="DIR", help="the run folder; default runs/<name>")
    train.add_argument("--resume", action="store_true", help="continue the run in the run folder")
    train.add_argument("--print_config", action="store_true", help="show the resolved config and stop")
    trust.add_argument(train)
    train.add_argument(
        "--smoke",
        action="store_true",
        help="does it all work? Seconds instead of hours, on data that is there, and nothing is kept",
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "Evaluate a run: whole games of an agent and raw scores; of a language model the win rate against "
        "what it started from, and its cost.",
    )
    run_argument(evaluate)
    evaluate.add_argument("--episodes", type=count, help="games to play; default as in the run's config")
    evaluate.add_argument("--prompts", type=count, help="unseen prompts; default as in the run's config")
    evaluate.add_argument("--samples", type=count, help="answers per prompt; default as in the run's config")
    evaluate.add_argument(
        "--epsilon",
        type=probability,
        help="probability of a random action, e.g. 0.05 as Mnih et al. 2015",
    )
    evaluate.add_argument(
        "--seed", type=seed, help="seed of the first game (game i has seed + i) or of sampling"
    )
    evaluate.add_argument(
        "--part", help="of a model's data: train, held_out or one by its name; default the test part, if any"
    )
    evaluate.add_argument(
        "--data.source", metavar="SOURCE", help="where the data are now that a model learned from"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    play = command(
        "play",
        _play,
        "Film a trained agent, its Q-values drawn beside the screen; or play by hand in a world model.",
    )
    run_argument(play)
    play.add_argument("--out", type=Path, help="the mp4; default media/play.mp4 in the run folder")
    play.add_argument("--seed", type=seed, help="seed of the game (0)")
    play.add_argument("--epsilon", type=probability, help="chance of a random action (0.001)")
    play.add_argument("--max_steps", type=count, help="agent steps at most (the whole game)")
    play.add_argument(
        "--world-model",
        action="store_true",
        help="RUN is a world model: play in what it dreams, here in the terminal, with arrows and space",
    )

    export = command("export", _export, "Write a trained agent for another library.")
    run_argument(export)
    export.add_argument(
        "--format", choices=["sb3"], default="sb3", help="sb3: a zip for stable_baselines3.DQN.load"
    )
    export.add_argument("--out", type=Path, help="the file; default <run>/agent_sb3.zip")

    comparing.add_arguments(
        command(
            "compare",
            comparing.do,
            "Compare runs: which is better, by how much, how sure, and what was different.",
            epilog="lab compare runs --metric=eval/mean_reward --by=agent.algorithm --baseline=dqn --open",
        )
    )

    sweep.add_arguments(
        command(
            "sweep", sweep.do, "Train a config with many settings and seeds: grid, random or Bayesian search."
        )
    )

    sync.add_arguments(
        command(
            "sync", sync.do, "Send offline runs to Weights & Biases, and read back that every row is there."
        )
    )

    for point in importlib.metadata.entry_points(group="lab.commands"):
        point.load()(command)

    listing = command("list", _list, "Show the configs, backbones, games and algorithms there are.")
    listing.add_argument(
        "kind", nargs="?", choices=KINDS, metavar="KIND", help=f"only one of {', '.join(KINDS)}"
    )
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _train(options: argparse.Namespace) -> int:
    from lab import config, pipeline

    folder: Path | None = options.out
    if (options.config / "run.json").exists():
        from lab.run import Run

        if not options.resume:
            raise LabError(f"{options.config}: is a run. Add --resume to continue it, or name a .yaml file.")
        folder = folder or options.config
        source = str(options.config / "run.json")
        values = dict(Run.open(options.config).info["config"])
    else:
        if options.resume and options.config.suffix not in (".yaml", ".yml") and not options.config.is_file():
            from lab.run import Run

            Run.resume(options.config)  # says that there is none, and which is near
        source = str(options.config)
        values = config.read_yaml(options.config)
    overrides = config.split_overrides(options.overrides)
    chosen, resolved = pipeline.configured(values, overrides, source)
    if options.smoke:
        _, resolved = pipeline.configured(chosen.smoke(values), overrides, source)
    if options.print_config:
        print(config.to_yaml(resolved), end="")
    elif options.smoke and folder is None:
        with tempfile.TemporaryDirectory(prefix="lab_smoke_") as passing:
            chosen.train(resolved, Path(passing) / "run", resume=False)
        print(f"{source}: works.")
    else:
        chosen.train(resolved, folder, options.resume)
    return 0


def _pipeline_of(folder: Path) -> Any:
    from lab import pipeline
    from lab.run import Run

    stages = sorted(folder.glob("*/run.json"))  # a recipe's folder holds one run a stage
    place = folder if (folder / "run.json").exists() or not stages else stages[0].parent
    return pipeline.find(Run.open(place).info["pipeline"], str(place / "run.json"))


def _fill_in(options: argparse.Namespace, **defaults: Any) -> None:
    """Puts in what was not given."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _evaluate(options: argparse.Namespace) -> int:
    chosen = _pipeline_of(options.run)
    result = chosen.evaluate(options.run, options)
    print(json.dumps(result) if options.json else chosen.describe_evaluation(result))
    return 0


def _play(options: argparse.Namespace) -> int:
    _fill_in(options, checkpoint="best", seed=0, max_steps=27_000)
    result = _pipeline_of(options.run).play(options.run, options)
    if options.world_model:
        print(f"{result['run']}: {result['steps']} frames, {result['frames_per_second']:g} a second")
        return 0
    end = "game over" if result["ended"] else "film ended before the game"
    print(f"{result['path']}: score {result['return']:g} in {result['steps']} agent steps ({end})")
    return 0


def _export(options: argparse.Namespace) -> int:
    _fill_in(options, checkpoint="best")
    print(_pipeline_of(options.run).export(options.run, options))
    return 0


def _list(options: argparse.Namespace) -> int:
    from lab.pipeline import catalogue

    kinds = [options.kind] if options.kind else list(KINDS)
    found = {kind: _configs() if kind == "configs" else catalogue(kind) for kind in kinds}
    if options.json:
        print(json.dumps(found))
        return 0
    from rich.columns import Columns
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for kind, names in found.items():
        console.print(f"{kind} ({len(names)})", style="bold")
        if kind == "configs":
            for name in names:
                console.print(f"  {name:<34} {_first_comment(Path(name))}", soft_wrap=True)
        else:
            console.print(Columns([f"  {name}" for name in names], column_first=True))
    return 0


def _configs() -> list[str]:
    """The configs below ./configs, else those that came with the lab."""
    folder = Path("configs")
    if not folder.is_dir():
        folder = Path(__file__).resolve().parent.parent / "configs"
    return [str(path) for path in sorted(folder.rglob("*.yaml"))]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[:1]
    return first[0].lstrip("# ") if first and first[0].startswith("#") else ""


if __name__ == "__main__":
    sys.exit(main())
