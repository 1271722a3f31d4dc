"""What `lab train`, `evaluate` and the rest do for a supervised run."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab import checkpoint, terminal, tracking
from lab.device import check_without_torch, quiet_threads
from lab.errors import LabError, did_you_mean
from lab.pipeline import refuse_options
from lab.run import Run, folder_name
from supervised import backbones, smoke
from supervised.config import SupervisedRun, run_config_class

# What may change between the sessions of one run: none of it alters what was computed so far. With another
# number of updates a learning rate that falls goes on as the schedule of that many has it.
# Where it is computed, how often it is logged, evaluated and saved, and where the data lie (which are known
# by their hash) are no part of what is learned.
MAY_CHANGE = (
    *("epochs", "max_steps", "eval.", "tracking.", "checkpoint.", "device.", "log_every_steps", "name"),
    *("data.source", "model.start_from"),
)
HOW_IT_SAMPLES = {
    "denoising": ("objective.sampling_steps", "objective.eta", "objective.guidance", "objective.solver"),
    "flow": ("objective.temperature",),
    "variational": ("objective.temperature",),
}
"""By objective what may also change, as nothing that is learned and no choice of weights depends on it."""


class SupervisedPipeline:
    """Learning from data sets."""

    def config_class(self, values: Mapping[str, Any], source_of: Callable[[str], str]) -> type:
        return run_config_class(values, source_of)

    def smoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return smoke.smoke(values)

    def train(self, config_: SupervisedRun, folder: Path | None, resume: bool) -> None:
        """Everything that can be wrong is found before torch is loaded or anything is written."""
        name = config_.model.backbone
        if name not in backbones.names():
            raise LabError(
                f"model.backbone = {name!r}: no such backbone.{did_you_mean(name, backbones.names())} "
                "`lab list backbones` shows them all."
            )
        check_without_torch(config_.device)
        folder = folder or Path("runs") / folder_name(config_.run_name)
        run, saved = None, None
        if resume:
            run = Run.resume(folder)
            run.refuse_other_config(config_, MAY_CHANGE + HOW_IT_SAMPLES.get(config_.objective.name, ()))
            latest = checkpoint.find(run.checkpoints)
            saved = checkpoint.load(latest) if latest is not None else None
        else:
            Run.check_new(folder)
        mode, why = tracking.choose_mode(config_.tracking.wandb)

        quiet_threads()
        from supervised.train import train

        train(config_, folder, run, saved, mode, why)

    def evaluate(self, folder: Path, options: Namespace) -> dict[str, Any]:
        only_elsewhere = ("prompts", "samples", "episodes", "epsilon", "seed")
        refuse_options(
            options,
            only_elsewhere,
            "is for agents and chats, and means nothing here: this run learned from a data set",
        )
        run = Run.open(folder)
        saved = checkpoint.load(run.find_checkpoint(options.checkpoint or "best"))
        quiet_threads()
        from supervised.evaluate import evaluate_run

        result = evaluate_run(run, saved, options.part, getattr(options, "data.source", None))
        run.keep_evaluation(result)
        return result

    def describe_evaluation(self, result: Mapping[str, Any]) -> str:
        width = max(map(len, result["eval"]))
        return "\n".join(
            [
                f"{result['data']}, {result['part']}: checkpoint {result['checkpoint']}",
                *(f"  {name:<{width}}  {value:>10.4g}" for name, value in result["eval"].items()),
                *result["notes"],
            ]
        )

    def play(self, folder: Path, options: Namespace) -> dict[str, Any]:
        run = Run.open(folder)
        is_world_model = run.info["config"]["objective"]["name"] == "world_model"
        if not options.world_model:
            raise LabError(
                f"{folder}: is a world model. Play in it: lab play {folder} --world-model"
                if is_world_model
                else f"{folder}: learned from a data set and plays no game. Its pictures are in media/."
            )
        if not is_world_model:
            raise LabError(f"{folder}: is no world model. Its pictures are in media/.")
        refuse_options(options, ("out", "epsilon"), "is for films of agents; a world model is played by hand")
        terminal.require_terminal("--world-model")
        saved = checkpoint.load(run.find_checkpoint(options.checkpoint))
        quiet_threads()
        from supervised.play import play_run

        return play_run(run, saved, options.seed, options.max_steps)

    def export(self, folder: Path, options: Namespace) -> Path:
        raise LabError(
            f"{folder}: no agent for Stable-Baselines3. Its weights are checkpoints/best/model.safetensors, "
            "and model.start_from trains on from them."
        )


PIPELINE = SupervisedPipeline()
