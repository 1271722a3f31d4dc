"""The commands of supervised learning beside `lab train`: estimate. Imports nothing heavy."""

import argparse
import json
from collections.abc import Callable

from lab import config
from lab.arguments import count


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds these commands to `lab`; `command(name, do, help)` makes one."""
    estimate = command(
        "estimate",
        _estimate,
        "Parameters of a model, memory to hold and to train it, and the time and price of training it.",
        usage="lab estimate MODEL [--tokens N] [--gpu GPU] [--price P] [--json] [...] [--KEY=VALUE ...]",
        epilog="MODEL is a published one, e.g. gpt3-175b, or a backbone of `lab list backbones` with its "
        "options: lab estimate gpt --vocab_size=50257 --n_layer=12 --width=768 --n_head=12.",
    )
    estimate.set_defaults(takes_overrides=True)
    estimate.add_argument("model", metavar="MODEL", help="a published model or a backbone")
    estimate.add_argument(
        "--tokens",
        "--images",
        "--samples",
        dest="samples",
        type=_positive,
        metavar="N",
        help="how much it is trained on: tokens, images or else inputs, e.g. 300e9; by default as published, "
        "else 20 tokens a parameter, or 90 epochs of ImageNet",
    )
    estimate.add_argument("--classes", type=count, help="outputs of a classifier; of an image model 1000")
    estimate.add_argument("--gpu", help="only this one, e.g. A100")
    estimate.add_argument("--gpus", type=count, default=1, help="how many share the work (1)")
    estimate.add_argument(
        "--utilisation", type=_share, help="share of its peak that the GPU reaches in training, e.g. 0.4"
    )
    estimate.add_argument("--price", type=_positive, help="US dollars per hour of one GPU")
    estimate.add_argument("--json", action="store_true", help="print one JSON object")


def _estimate(options: argparse.Namespace) -> int:
    spec = config.split_overrides(options.overrides)
    from supervised import estimate

    result = estimate.estimate(
        options.model,
        spec,
        samples=options.samples,
        classes=options.classes,
        gpu=options.gpu,
        gpus=options.gpus,
        utilisation=options.utilisation,
        price=options.price,
    )
    print(json.dumps(result) if options.json else estimate.describe(result))
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and at most 1")
    return value
