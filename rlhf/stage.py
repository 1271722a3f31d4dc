"""What every stage has in common: a run folder, and a transformers Trainer that keeps to it."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lab import checkpoint
from lab.device import Compute, attention_to_learn
from lab.interrupt import StopRequest
from lab.progress import Progress
from lab.run import Run
from lab.tracking import Tracker
from rlhf import checkpoints
from rlhf.config import TrainingConfig
from rlhf.health import Health, check_weights, warn

# Nobody is told what is trained here, and no tokenizer starts threads of its own.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class Stage:
    """An open stage: its run folder and who listens to it."""

    run: Run
    tracker: Tracker
    progress: Progress
    stop: StopRequest
    keep: int
    """Checkpoints that stay."""
    save_every_steps: int
    window: int = 1
    """Optimiser steps that belong together (a rollout of PPO): saved and stopped only between them."""


def training_arguments(config: TrainingConfig, compute: Compute, folder: Path, seed: int) -> dict[str, Any]:
    """Keyword arguments for any TRL config: ours on the left, transformers' on the right."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": config.micro,
        "per_device_eval_batch_size": config.micro,
        "gradient_accumulation_steps": config.batch_size // config.micro,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_epsilon": 1e-5,  # arXiv 2403.17031: transformers' 1e-8 makes the first updates too large
        "max_grad_norm": config.max_grad_norm,
        "activation_checkpointing": config.gradient_checkpointing,
        "optim": "adamw_torch_fused",
        "bf16": compute.precision == "bf16",
        "use_cpu": compute.device.type == "cpu",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # `KeepToTheStage` asks for checkpoints
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": compute.device.type == "cuda",
    }


class KeepToTheStage(TrainerCallback):
    """Hands numbers to the tracker, shows progress, asks for checkpoints, and heeds SIGINT and SIGTERM."""

    def __init__(self, stage: Stage, note: Callable[[Mapping[str, float]], str]) -> None:
        self.stage, self.note = stage, note

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stage.progress.begin(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        row = renamed(logs or {})
        if row:
            self.stage.tracker.log(state.global_step, row)
            self.stage.progress.update(state.global_step, self.note(row) or None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stage, step = self.stage, state.global_step
        stage.progress.update(step)
        if step % stage.window:
            return
        last = step >= state.max_steps
        due = step // stage.save_every_steps > (step - stage.window) // stage.save_every_steps
        if stage.stop and not last:
            control.should_training_stop = True
            due = True
        control.should_save = due or last


def renamed(logs: Mapping[str, Any]) -> dict[str, float]:
    """A Trainer's numbers under the lab's names: train/..., eval/..., or as they are if they have a group."""
    row: dict[str, float] = {}
    for key, value in logs.items():
        if not isinstance(value, int | float) or key.startswith(("train_", "total_flos")):
            continue
        if "/" in key or key == "episode":
            row[key] = value
        elif key.startswith("eval_"):
            row[f"eval/{key.removeprefix('eval_')}"] = value
        else:
            row[f"train/{key}"] = value
    return row


class StageTrainer(checkpoints.PlainCheckpoints):
    """Mixed in before a transformers Trainer: its checkpoints become the lab's.

    The Trainer writes aside; the folder is hashed, synced and renamed, so that it is there whole or not at
    all, and `Trainer.train(resume_from_checkpoint=...)` opens it.
    """

    stage: Stage
    _aside: Path | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        a, ids = self.args, inputs.get("input_ids")  # type: ignore[attr-defined]
        n_tokens = ids.shape[-1] if ids is not None else sys.maxsize
        precision = "bf16" if a.bf16 else "fp32"
        with attention_to_learn(a.device.type, precision, n_tokens, a.gradient_checkpointing):
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, step = self.stage.run, self.state.global_step  # type: ignore[attr-defined]
        name = checkpoint.step_name(step)
        with checkpoint.written(run.checkpoints, name) as aside:
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._aside = None
            inner = aside / f"checkpoint-{step}"
            for path in inner.iterdir():
                path.rename(aside / path.name)
            inner.rmdir()
            state = {
                "step": step,
                "metrics_bytes": self.stage.tracker.sync(),
                "train_tokens": getattr(self, "_total_train_tokens", 0),  # TRL begins to count anew
            }
            (aside / "state.json").write_text(json.dumps(state))
        checkpoint.point(run.checkpoints, "latest", name)
        self.stage.tracker.log_checkpoint(run.checkpoints / name)
        checkpoint.prune(run.checkpoints, self.stage.keep)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run folder says more, and a README in it would be a stranger's."""


def train(trainer: Any, stage: Stage, note: Callable[[Mapping[str, float]], str]) -> bool:
    """Trains to the end or until asked to stop; returns whether the end was reached."""
    trainer.stage = stage
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(KeepToTheStage(stage, note))
    health = Health(stage.run.folder.name)
    trainer.add_callback(health)  # behind the other, which says whether there will be a checkpoint
    latest = checkpoint.find(stage.run.checkpoints)
    if latest:
        state = checkpoint.load(latest).state
        checkpoints.check_format(latest)
        checkpoints.check_step(latest, state["step"])
        trainer._total_train_tokens = state["train_tokens"]
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)
    done = trainer.state.global_step >= trainer.state.max_steps
    for model in (trainer.model, getattr(trainer, "critic_model", None)) if done else ():
        if model is not None:
            check_weights(model, health.stage)
    warn(stage, *(health.warnings(trainer.state) if done else ()))
    return done


_NOISE = re.compile(
    r"deprecated|will be removed in"  # names that TRL, PEFT and transformers still use of one another
    r"|LOAD REPORT"  # `rlhf.models` refuses weights that are missing, and names those that are not used
    r"|will be initialized from a multivariate normal distribution"  # an embedding for a padding token
)


@contextmanager
def quiet_transformers(say: Callable[[str], None]) -> Iterator[None]:
    """Silences transformers' progress bars and advice; what it says of the user's model and data is one line.

    Args:
        say: told of each warning, once.
    """
    import datasets
    import transformers

    said = set[str]()

    def tell(message: str) -> None:
        line = " ".join(message.split())
        if not _NOISE.search(line) and line not in said:
            said.add(line)
            say(f"         warning: {line[:400]}")

    handler, library = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: tell(record.getMessage())
    verbosity = transformers.logging.get_verbosity()  # which also gives the library its own handler
    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_default_handler()
    library.addHandler(handler)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: tell(str(message))
            # TRL and PEFT still use names that transformers has since changed.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        library.removeHandler(handler)
        transformers.logging.enable_default_handler()
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()
