"""What `lab train`, `evaluate`, `play` and `export` do for an Atari run."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import checkpoint, config, tracking
from lab.config import ConfigError
from lab.device import check_without_torch, quiet_threads
from lab.errors import LabError, did_you_mean
from lab.pipeline import refuse_options
from lab.run import Run, folder_name
from rl import games, pretrained
from rl.config import (
    MOST_EPISODES,
    DRQNConfig,
    RunConfig,
    check_seed,
    run_config_class,
    unseen_seed,
)
from supervised import backbones

MAY_CHANGE = (
    *(
        "total_steps",
        "eval.stop_at",
        "eval.every_steps",
        "log_every_steps",
        "tracking.",
        "checkpoint.",
        "film.",
    ),
    *("env.num_threads", "device.device", "device.threads", "name"),
)
"""What may change between the sessions of one run: none of it alters what is learned.

Another device or thread count computes the same up to rounding. eval.episodes, epsilon and seed may not
change: scores before and after could not be compared, and the best checkpoint is chosen by comparing them."""

EPSILON = 0.001
"""Of an agent that is filmed."""


class RLPipeline:
    """Deep Q-learning on Atari."""

    late_metrics = ("rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/ep_clipped_rew_mean")
    """Logged once games of training have ended, which a smoke test's do not."""

    def config_class(self, values: Mapping[str, Any], source_of: Callable[[str], str]) -> type:
        return run_config_class(values, source_of)

    def smoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        never = 10**9
        changed: dict[str, Any] = {
            **{"name": "smoke", "total_steps": 192, "log_every_steps": 64},
            "env": {"n_envs": 4, "num_threads": 1, "max_episode_frames": 400},
            "eval": {"every_steps": never, "episodes": 1, "stop_at": None},
            "checkpoint": {"every_steps": never},
            "film": {"every_steps": 0, "max_steps": 20},
            "tracking": {"wandb": "disabled"},
        }
        if (values.get("agent") or {}).get("algorithm", "dqn") == "pqn":
            changed["agent"] = {"rollout_steps": 8, "minibatch_size": 32, "epochs": 1}
        else:
            changed["agent"] = {
                "learning_starts": 96,
                "buffer_size": 1_000,
                "batch_size": 8,
                "train_freq": 32,
            }
        changed["agent"] |= {"start_from": None}
        return config.merge(values, changed)

    def train(self, config_: RunConfig, folder: Path | None, resume: bool) -> None:
        """Everything that can be wrong is found before torch is loaded or anything is written."""
        settings = replace(config_, env=replace(config_.env, game=games.check(config_.env.game)))
        name, fitting = settings.agent.backbone, [*backbones.image_names(), *backbones.RECURRENT]
        if name not in fitting or (
            name in backbones.RECURRENT and not isinstance(settings.agent, DRQNConfig)
        ):
            raise LabError(
                f"agent.backbone = {name!r}: "
                + ("not for the images of a game." if name in backbones.names() else "no such backbone.")
                + f"{did_you_mean(name, fitting)} There are {', '.join(backbones.image_names())}; with "
                f"{', '.join(backbones.RECURRENT)} dqn remembers."
            )
        meant, found = games.sticky_actions_of(config_.env.game), settings.env.sticky_actions
        if meant not in (None, found):
            print(
                f"note    {config_.env.game} elsewhere has sticky actions of {meant:g}; here "
                f"env.sticky_actions = {found:g} holds",
                file=sys.stderr,
            )
        folder = folder or Path("runs") / folder_name(settings.run_name)
        values = config.to_dict(settings)
        if resume:
            run = Run.resume(folder)
            latest = checkpoint.find(run.checkpoints)
            saved = checkpoint.load(latest) if latest is not None else None
            if saved is not None and "due" not in saved.state:
                run.refuse(
                    "its checkpoints are of an earlier version of the lab and cannot be continued. Begin "
                    f"another run with its weights: --agent.start_from={folder} --out DIR"
                )
            run.refuse_other_config(settings, MAY_CHANGE)
            run.info["config"] = tracking.scrub(values)
        else:
            run, saved = None, None
            Run.check_new(folder)
        if saved is None and settings.agent.start_from is not None:
            pretrained.find(settings.agent.start_from)
        check_without_torch(settings.device)
        mode, why = tracking.choose_mode(settings.tracking.wandb)

        quiet_threads()
        from rl.train import train

        train(settings, folder, run, saved, mode, why)

    def evaluate(self, folder: Path, options: Namespace) -> dict[str, Any]:
        refuse_options(
            options,
            ("prompts", "samples", "part", "data.source"),
            "is for models of data and text; this run plays games",
        )
        if options.episodes is not None and options.episodes > MOST_EPISODES:
            raise LabError(f"--episodes {options.episodes}: at most {MOST_EPISODES:,}. Ask for fewer.")
        _check_seed(options.seed, options.episodes or 1)
        run, which = Run.open(folder), options.checkpoint or "best"
        checkpoint.load(run.find_checkpoint(which))  # damage is found before torch is loaded
        quiet_threads()
        from rl.evaluate import evaluate_run, run_config

        e = run_config(run).eval
        episodes = e.episodes if options.episodes is None else options.episodes
        epsilon = e.epsilon if options.epsilon is None else options.epsilon
        seed = unseen_seed(e, episodes) if options.seed is None else options.seed
        result = evaluate_run(run, which, episodes, epsilon, seed)
        run.keep_evaluation(result)
        return result

    def describe_evaluation(self, result: Mapping[str, Any]) -> str:
        width = max(len(who) for who in result["scores"])
        lines = [
            f"{result['game']}: {result['episodes']} games, epsilon {result['epsilon']:g}, "
            f"seeds from {result['seed']} ("
            + ("unseen" if result["unseen"] else "some of them chose the best checkpoint")
            + f"), checkpoint {result['checkpoint']}",
            *(
                f"  {who:<{width}}  {score:>9.1f}"
                + (f"  +- {result['std_reward']:.1f}" if who == "this agent" else "")
                for who, score in result["scores"].items()
            ),
        ]
        if result["human_normalized"] is not None:
            lines.append(f"  human-normalised {result['human_normalized']:.0%} ({result['human_table']})")
        if cut := result["truncated"]:
            limit = result["max_episode_frames"]
            which = f"{cut} of the games were" if cut < result["episodes"] else "every game was"
            lines.append(
                f"  {which} cut off by the time limit, env.max_episode_frames = {limit:,}"
                + (": not comparable with published scores" if limit < games.PUBLISHED_MAX_FRAMES else "")
            )
        return "\n".join(lines)

    def play(self, folder: Path, options: Namespace) -> dict[str, Any]:
        run = Run.open(folder)
        if options.world_model:
            raise LabError(f"{folder}: is an agent, no world model. Film it without --world-model.")
        _check_seed(options.seed, 1)
        epsilon = EPSILON if options.epsilon is None else options.epsilon
        checkpoint.load(run.find_checkpoint(options.checkpoint))  # damage is found before torch is loaded
        path = options.out or run.media / "play.mp4"
        if path.suffix != ".mp4":
            raise LabError(f"--out {path}: a film is an .mp4 file. Name it so.")
        if not path.parent.is_dir():
            raise LabError(f"--out {path}: there is no folder {path.parent}. Make it first.")
        quiet_threads()
        from rl.evaluate import load_player
        from rl.film import film

        player, _, _ = load_player(run, options.checkpoint)
        return film(player, path, options.seed, epsilon, options.max_steps)

    def export(self, folder: Path, options: Namespace) -> Path:
        run = Run.open(folder)
        checkpoint.load(run.find_checkpoint(options.checkpoint))  # damage is found before torch is loaded
        path = options.out or folder / "agent_sb3.zip"
        if path.suffix != ".zip":
            raise LabError(f"--out {path}: Stable-Baselines3 saves a .zip file. Name it so.")
        quiet_threads()
        from rl.export import export_sb3

        return export_sb3(run, options.checkpoint, path)


def _check_seed(seed: int | None, games: int) -> None:
    """Refuses a --seed that an evaluation cannot have."""
    if seed is not None:
        try:
            check_seed("--seed", seed, games)
        except ConfigError as error:
            raise LabError(f"command line: {error}. Choose such a seed.") from None


PIPELINE = RLPipeline()
