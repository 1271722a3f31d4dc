"""The commands of the Atari agents beside `lab train`: frames. Imports nothing heavy."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lab import checkpoint
from lab.arguments import count, probability
from lab.config import ConfigError
from lab.device import quiet_threads
from lab.errors import LabError
from lab.files import explain_write_errors
from lab.progress import Progress
from lab.run import Run
from rl import games
from rl.config import EnvConfig, check_seed

IMAGE_SIZE = 44
"""Side of the images of random play, pixels, unless --image_size says otherwise."""


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds these commands to `lab`; `command(name, do, help)` makes one."""
    frames = command(
        "frames",
        _frames,
        "Record play of an Atari game, frames and actions, for models that learn from it.",
        epilog="lab frames pong --run runs/demo --epsilon 0.3 --out runs/pong_play.npz",
    )
    frames.add_argument("game", metavar="GAME", help="one of `lab list games`")
    frames.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz to write")
    frames.add_argument("--run", type=Path, help="the run whose agent plays; by default play is random")
    frames.add_argument(
        "--checkpoint", default="best", help="best (default), latest, or a folder in the run's checkpoints/"
    )
    frames.add_argument(
        "--epsilon",
        type=probability,
        default=0.5,
        help="the agent's chance of a random action (0.5)",
    )
    frames.add_argument("--steps", type=count, default=50_000, help="agent steps in all (50,000)")
    frames.add_argument("--seed", type=_seed, default=0, help="seed of the first game (0)")
    frames.add_argument(
        "--image_size",
        type=count,
        help=f"side of the image, pixels; as in the run, else {IMAGE_SIZE}",
    )
    frames.add_argument("--n_envs", type=count, default=8, help="games played side by side (8)")
    frames.add_argument("--json", action="store_true", help="print one JSON object")


def _frames(options: argparse.Namespace) -> int:
    """Everything that can be wrong is found before torch is loaded."""
    out: Path = options.out
    if out.suffix != ".npz":
        raise LabError(f"--out {out}: frames are written as an .npz file. Name it so.")
    try:
        check_seed("--seed", options.seed, options.n_envs)
        for size in filter(None, (options.image_size, IMAGE_SIZE)):
            EnvConfig(game=options.game, n_envs=options.n_envs, image_size=size)
    except ConfigError as error:
        raise LabError(f"command line: {error}.") from None
    if out.exists():
        raise LabError(f"--out {out}: is there already. Name another file, or remove it.")
    with explain_write_errors(str(out), "Name another file."):
        out.parent.mkdir(parents=True, exist_ok=True)
    game = games.check(options.game)
    run = None if options.run is None else _run_of(options.run, game, options)
    size = options.image_size or IMAGE_SIZE
    env = EnvConfig(game=game, n_envs=options.n_envs, image_size=size) if run is None else None
    quiet_threads()
    from rl import frames
    from rl.evaluate import load_player

    player = None
    if run is not None:
        player, _, _ = load_player(run, options.checkpoint)
        env = replace(player.env, n_envs=options.n_envs)
    assert env is not None
    with Progress(options.steps) as progress:
        arrays = frames.record(
            env, player, options.steps, options.epsilon, options.seed, progress=progress.update
        )
    frames.save(out, arrays)
    result = {
        "path": str(out),
        "game": game,
        "steps": options.steps,
        "image_size": list(arrays["frames"].shape[1:]),
        "stretches": int(arrays["begins"].sum()),
        "mean_reward_per_step": float(arrays["rewards"].mean()),
        "run": None if run is None else str(run.folder),
        "epsilon": 1.0 if run is None else options.epsilon,
        "bytes": out.stat().st_size,
    }
    who = "random play" if run is None else f"{run.folder}, epsilon {options.epsilon:g}"
    print(
        json.dumps(result)
        if options.json
        else f"{out}: {options.steps:,} steps of {game} in {result['stretches']} stretches by {who}, "
        f"{'x'.join(map(str, result['image_size']))} pixels, {result['bytes'] / 1e6:.1f} MB"
    )
    return 0


def _run_of(folder: Path, game: str, options: argparse.Namespace) -> Run:
    """The run whose agent is to play `game`.

    Raises:
        LabError: it cannot.
    """
    run = Run.open(folder)
    if run.info["pipeline"] != "rl":
        raise LabError(f"--run {folder}: is a run of {run.info['pipeline']!r}. Name one that plays a game.")
    env = run.info["config"]["env"]
    if env["game"] != game:
        raise LabError(f"--run {folder}: its agent plays {env['game']}, not {game}. Name that game.")
    if options.image_size not in (None, env["image_size"]):
        raise LabError(
            f"--image_size {options.image_size}: the agent of {folder} sees {env['image_size']} pixels. "
            "Leave --image_size out."
        )
    checkpoint.load(run.find_checkpoint(options.checkpoint))
    return run


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)
