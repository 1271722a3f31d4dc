"""Stage 1: supervised fine-tuning on demonstrations, by TRL's SFTTrainer."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft.utils.error import NoMatchingPeftModuleError
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lab.device import Compute
from lab.errors import LabError
from rlhf import models
from rlhf.checkpoints import PlainCheckpoints
from rlhf.config import ModelConfig, RLHFRun
from rlhf.stage import Stage, StageTrainer, train, training_arguments


@dataclass(frozen=True)
class Fit:
    """How many demonstrations are longer than `data.max_length`, which TRL makes fit without a word."""

    rows: int
    cut_off: int
    """Without their end, and so without the end token; what is left of the answer is learned."""
    left_out: int
    """No token of an answer was within the length, so nothing is learned of them."""


class _Trainer(StageTrainer, PlainCheckpoints, SFTTrainer):
    """SFTTrainer with the lab's checkpoints, and an eye on what is cut off."""

    args: SFTConfig
    model: Any

    def __init__(self, **kwargs: Any) -> None:
        self.fits: dict[str, Fit] = {}
        """Of the data sets `train` and `eval`."""
        super().__init__(**kwargs)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """TRL's in two steps, its own second one being to cut and pack; between them lengths can be seen."""
        whole = copy.copy(args)
        whole.max_length = None
        tokenized = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        if args.max_length is not None:
            self.fits[dataset_name] = _fit(tokenized, args.max_length)
        return super()._prepare_dataset(
            tokenized, processing_class, args, packing, formatting_func, dataset_name
        )


def _fit(tokenized: Any, max_length: int) -> Fit:
    cut_off = left_out = 0
    for row in tokenized.select_columns(["input_ids", "labels"]):
        if len(row["input_ids"]) > max_length:
            learned = any(label != -100 for label in row["labels"][:max_length])
            cut_off, left_out = cut_off + learned, left_out + (not learned)
    return Fit(len(tokenized), cut_off, left_out)


def describe_fits(fits: Mapping[str, Fit], max_length: int) -> str:
    """One line about what is cut off and left out, "" where all fits."""
    names = {"train": "demonstrations", "eval": "held-out demonstrations"}
    told = [
        f"of {fit.rows:,} {names[name]} {fit.cut_off:,} {'is' if fit.cut_off == 1 else 'are'} cut off "
        f"and {fit.left_out:,} left out"
        for name, fit in fits.items()
        if fit.cut_off or fit.left_out
    ]
    return f"data.max_length {max_length:,}: {'; '.join(told)}" if told else ""


def train_sft(
    settings: RLHFRun, stage: Stage, compute: Compute, demonstrations: Any, held_out: Any
) -> tuple[Any, Any] | None:
    """Trains the policy to imitate demonstrations; the loss is on the answers only.

    Args:
        demonstrations, held_out: data sets in TRL's formats.

    Returns:
        The model and its tokenizer; None if training was interrupted.
    """
    trainer = make_trainer(settings, compute, stage.run.folder, demonstrations, held_out)
    stage.run.summarize(demonstrations={name: asdict(fit) for name, fit in trainer.fits.items()})
    if too_long := describe_fits(trainer.fits, settings.data.max_length):
        stage.progress.say(f"         {too_long}")
    done = train(trainer, stage, lambda row: f"loss {row['train/loss']:.3f}" if "train/loss" in row else "")
    if not done:
        return None
    metrics = trainer.evaluate()
    stage.run.summarize(**{"eval/loss": metrics["eval_loss"]})
    return trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class


def make_trainer(
    settings: RLHFRun, compute: Compute, folder: Path, demonstrations: Any, held_out: Any
) -> _Trainer:
    """TRL's trainer with model and data, of which the first batch has been looked at.

    Raises:
        LabError: nothing can be learned from the data, or by the model.
    """
    config, source = settings.sft, settings.data.demonstrations
    model, tokenizer = models.start(settings.model, demonstrations, source, settings.seed)
    models.check_chat_template(tokenizer, demonstrations, source)
    _check_positions(model, settings.data.max_length)
    try:
        trainer = _Trainer(
            model=model,
            args=SFTConfig(
                **training_arguments(config, compute, folder, settings.seed),
                max_length=settings.data.max_length,
                packing=config.packing,
                # Prompts and answers as such have a mask of their own; of whole conversations, assistants'
                # turns are marked by the template, if it can.
                assistant_only_loss="messages" in demonstrations.column_names,
            ),
            train_dataset=demonstrations,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=lora(settings.model, "CAUSAL_LM", model),
        )
    except NoMatchingPeftModuleError:
        raise LabError(
            f"model.lora_targets: the model has no module {settings.model.lora_targets}. Name some it has, "
            "or all-linear."
        ) from None
    _check_first_batch(trainer, tokenizer, source)
    return trainer


def _check_positions(model: Any, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise LabError(
            f"data.max_length: {max_length} is more than the model's {positions} positions. Lower it."
        )


def lora(config: ModelConfig, task: str, model: Any) -> Any:
    """PEFT's configuration of the adapters for a model, or None."""
    if not config.lora_rank:
        return None
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=config.lora_targets,
        # GPT-2's layers keep their weights the other way round: (in, out).
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def _check_first_batch(trainer: _Trainer, tokenizer: Any, source: str) -> None:
    """Stops a doomed run before its first step: nothing to train, to learn from, or no end to learn."""
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise LabError("sft: no parameter is trainable. Check model.lora_targets.")
    prepared: dict[str, Any] = {
        "demonstration": trainer.train_dataset,
        "held-out demonstration": trainer.eval_dataset,
    }
    for what, rows in prepared.items():
        if not len(rows):  # TRL leaves out those of which only the prompt fits
            raise LabError(
                f"{source}: no token of any {what} is an answer's within data.max_length "
                f"{trainer.args.max_length}. Raise it, or shorten the prompts."
            )
    example = next(iter(trainer.get_train_dataloader()))
    learned = example["labels"] != -100
    if not learned.any():
        raise LabError(
            f"{source}: no token of the first batch is an answer's within data.max_length "
            f"{trainer.args.max_length}. Raise it, or shorten the prompts."
        )
    if not (example["labels"][learned] == tokenizer.eos_token_id).any():
        raise LabError(
            f"{source}: no answer of the first batch ends with {tokenizer.eos_token!r} within "
            f"data.max_length {trainer.args.max_length}, so the policy would never learn to stop. Raise it."
        )
