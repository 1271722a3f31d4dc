"""What `lab train`, `evaluate`, `play` and `export` do for an Atari run."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import checkpoint, config, tracking
from lab.device import check_without_torch, quiet_threads
from lab.errors import LabError, did_you_mean
from lab.pipeline import refuse_options
from lab.run import Run, folder_name
from rl import games, pretrained
from rl.config import DRQNConfig, RunConfig, run_config_class
from supervised import backbones

# What may change between the sessions of one run: none of it alters what was computed so far.
MAY_CHANGE = ("total_steps", "eval.stop_at", "tracking.", "checkpoint.keep", "film.", "name")

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
        folder = folder or Path("runs") / folder_name(settings.run_name)
        values = config.to_dict(settings)
        if resume:
            run = Run.resume(folder)
            run.refuse_other_config(values, MAY_CHANGE)
            run.info["config"] = tracking.scrub(values)
            latest = checkpoint.find(run.checkpoints)
            saved = checkpoint.load(latest) if latest is not None else None
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
            options, ("prompts", "samples", "part"), "is for models of data and text; this run plays games"
        )
        run = Run.open(folder)
        checkpoint.load(run.find_checkpoint(options.checkpoint))  # damage is found before torch is loaded
        quiet_threads()
        from rl.evaluate import evaluate_run, run_config

        chosen = {
            key: getattr(options, key)
            for key in ("episodes", "epsilon", "seed")
            if getattr(options, key) is not None
        }
        result = evaluate_run(run, options.checkpoint, replace(run_config(run).eval, **chosen))
        run.keep_evaluation(result)
        return result

    def describe_evaluation(self, result: Mapping[str, Any]) -> str:
        width = max(len(who) for who in result["scores"])
        lines = [
            f"{result['game']}: {result['episodes']} whole games, epsilon {result['epsilon']:g}, "
            f"seeds from {result['seed']}, checkpoint {result['checkpoint']}",
            *(
                f"  {who:<{width}}  {score:>9.1f}"
                + (f"  +- {result['std_reward']:.1f}" if who == "this agent" else "")
                for who, score in result["scores"].items()
            ),
        ]
        if result["human_normalized"] is not None:
            lines.append(f"  human-normalised {result['human_normalized']:.0%} ({result['human_table']})")
        return "\n".join(lines)

    def play(self, folder: Path, options: Namespace) -> dict[str, Any]:
        run = Run.open(folder)
        if options.world_model:
            raise LabError(f"{folder}: is an agent, no world model. Film it without --world-model.")
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
        quiet_threads()
        from rl.export import export_sb3

        return export_sb3(run, options.checkpoint, options.out or folder / "agent_sb3.zip")


PIPELINE = RLPipeline()
