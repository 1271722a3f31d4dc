"""Stage 1: supervised fine-tuning on demonstrations, by TRL's SFTTrainer."""

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft.utils.error import NoMatchingPeftModuleError
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lab.device import Compute
from lab.errors import LabError
from rlhf import heads, models
from rlhf.agreement import name_of
from rlhf.config import ModelConfig, RLHFRun
from rlhf.sft_loss import gives_balance_loss, settle_loss
from rlhf.stage import Stage, StageTrainer, train, training_arguments
from rlhf.tokenization import (
    BATCH,
    cut_left,
    prepare,
    rendered,
    rows_of_ids,
)


@dataclass(frozen=True)
class Fit:
    """How many demonstrations have more tokens than `data.max_length`, and what was done about it."""

    rows: int
    too_long: int = 0
    cut: int = 0
    """Of these, those whose prompt was cut off at its beginning; the others were left out."""
    last_turn_only: int = 0
    """Conversations of which the last answer alone is learned; see `tokenize_conversation`."""
    unlearned: int = 0
    """Conversations of which no answer is to be learned (`weight` 0): left out."""
    unlike_trl: int = 0
    """Of the first `COMPARED` rows, those that TRL's own trainer would tokenise in another way."""


COMPARED = 16
"""Rows that are tokenised by TRL as well."""


class _Trainer(StageTrainer, SFTTrainer):
    """SFTTrainer with the lab's checkpoints, and rows tokenised as in every other stage."""

    args: SFTConfig
    model: Any
    on_too_long: str = "error"

    def __init__(self, *, on_too_long: str, **kwargs: Any) -> None:
        self.on_too_long = on_too_long
        self.fits: dict[str, Fit] = {}
        """Of the data sets `train` and `eval`."""
        self.notes: list[str] = []
        """What was decided about the tokenizer and the loss."""
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
        """TRL's of rows that are tokenised already: it makes the labels, and packs."""
        max_length = args.max_length or sys.maxsize
        ours, fit = tokenized(dataset, processing_class, max_length, self.on_too_long, dataset_name)
        if dataset_name == "train":
            some = dataset.select(range(min(COMPARED, len(dataset))))
            fit = replace(fit, unlike_trl=self._unlike_trl(some, processing_class, args))
        self.fits[dataset_name] = fit
        return super()._prepare_dataset(ours, processing_class, args, packing, None, dataset_name)

    def _unlike_trl(self, dataset: Any, tokenizer: Any, args: SFTConfig) -> int:
        """How many rows TRL would tokenise in another way, up to the end token."""
        whole = copy.copy(args)
        whole.max_length, whole.assistant_only_loss = None, False
        try:
            theirs = super()._prepare_dataset(dataset, tokenizer, whole, False, None, "compared")
        except Exception:  # a row that its way fails on is one it does not tokenise as ours
            return len(dataset)
        ours = rows_of_ids(dataset.to_list(), tokenizer)
        return sum(
            their["input_ids"][: len(our)] != our for their, (our, *_) in zip(theirs, ours, strict=True)
        )


def tokenized(
    dataset: Any, tokenizer: Any, max_length: int, on_too_long: str, name: str = "train"
) -> tuple[Any, Fit]:
    """Demonstrations as TRL takes them when they are tokenised: `input_ids` and `completion_mask`.

    Args:
        on_too_long: what becomes of rows of more than `max_length` tokens; see `DataConfig.too_long`.
        name: train or eval.

    Raises:
        LabError: such a row where it is an error, or none that can be learned from.
    """
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    too_long = cut = last_only = unlearned = 0
    batches = (rows_of_ids(batch.to_list(), tokenizer) for batch in _batches(dataset))
    for number, (own, mask, every_turn) in enumerate(itertools.chain.from_iterable(batches), 1):
        last_only += not every_turn
        if 1 not in mask:
            unlearned += 1
            continue
        if len(own) > max_length:
            too_long += 1
            if on_too_long == "error":
                raise LabError(
                    f"data.max_length: {NAMES[name]} {number} has {len(own)} tokens, more than {max_length}. "
                    "Raise it, or set data.too_long to drop or truncate_prompt."
                )
            prompt = mask.index(1)
            room = max_length - (len(own) - prompt)
            if on_too_long == "drop" or prompt == 0 or room < 1:
                continue
            own = cut_left(own[:prompt], room, tokenizer) + own[prompt:]
            mask, cut = [0] * room + mask[prompt:], cut + 1
        ids.append(own)
        masks.append(mask)
    if unlearned == len(dataset):
        raise LabError(
            f"no answer of any {NAMES[name]} is to be learned: weight is 0. Set it to 1 where one is."
        )
    if not ids:
        raise LabError(
            f"data.max_length: no token of any {NAMES[name]} is an answer's within {max_length} tokens. "
            "Raise it, or shorten the prompts."
        )
    from datasets import Dataset

    fit = Fit(len(dataset), too_long, cut, last_only, unlearned)
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks}), fit


def _batches(dataset: Any) -> Iterator[Any]:
    for begin in range(0, len(dataset), BATCH):
        yield dataset.select(range(begin, min(begin + BATCH, len(dataset))))


NAMES = {"train": "demonstration", "eval": "held-out demonstration"}


def describe_fits(fits: Mapping[str, Fit], max_length: int) -> list[str]:
    """What is to be said about rows that are not learned as they are; a line each, none where all are."""
    lines = []
    told = [
        f"{fit.too_long:,} of {fit.rows:,} {NAMES[name]}s ({fit.cut:,} with their prompt cut, "
        f"{fit.too_long - fit.cut:,} left out)"
        for name, fit in fits.items()
        if fit.too_long
    ]
    if told:
        lines.append(f"more than data.max_length {max_length:,} tokens: {', '.join(told)}")
    if only := fits["train"].last_turn_only:
        lines.append(
            f"the chat template renders {only:,} conversations in another way as they grow: of these the "
            "last answer alone is learned"
        )
    if unlearned := sum(fit.unlearned for fit in fits.values()):
        lines.append(f"{unlearned:,} conversations left out, of which no answer is to be learned (weight 0)")
    if unlike := fits["train"].unlike_trl:
        lines.append(
            f"TRL by itself would tokenise {unlike} of the first {min(COMPARED, fits['train'].rows)} "
            "demonstrations in another way; what is learned here is what later stages sample and score"
        )
    return lines


def train_sft(
    settings: RLHFRun,
    stage: Stage,
    compute: Compute,
    demonstrations: Any,
    held_out: Any,
    converses: bool = False,
) -> tuple[Any, Any] | None:
    """Trains the policy to imitate demonstrations; the loss is on the answers only.

    Of a conversation all turns of the assistant are answers.

    Args:
        demonstrations, held_out: data sets in TRL's formats.
        converses: whether other data of the recipe are conversations, even if these are not.

    Returns:
        The model and its tokenizer; None if training was interrupted.
    """
    trainer = make_trainer(settings, compute, stage.run.folder, demonstrations, held_out, converses)
    stage.run.summarize(demonstrations={name: asdict(fit) for name, fit in trainer.fits.items()})
    for line in [*trainer.notes, *describe_fits(trainer.fits, settings.data.max_length)]:
        stage.progress.say(f"         {line}")
    if settings.sft.epochs:
        done = train(
            trainer, stage, lambda row: f"loss {row['train/loss']:.3f}" if "train/loss" in row else ""
        )
        if not done:
            return None
    else:
        stage.progress.say("         sft.epochs is 0: the model is taken as it is")
    metrics = trainer.evaluate()
    stage.run.summarize(**{"eval/loss": metrics["eval_loss"]})
    return trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class


def make_trainer(
    settings: RLHFRun,
    compute: Compute,
    folder: Path,
    demonstrations: Any,
    held_out: Any,
    converses: bool = False,
) -> _Trainer:
    """TRL's trainer with model and data, of which the first batch has been looked at.

    Args:
        converses: whether other data of the recipe are conversations, even if these are not.

    Raises:
        LabError: nothing can be learned from the data, or by the model.
    """
    config, source = settings.sft, settings.data.demonstrations
    frozen = models.keeps_frozen_format(settings.model, compute)
    tokenizer = models.start_tokenizer(settings.model, demonstrations, source)
    notes = prepare(tokenizer, settings.model, converses or holds_conversations(demonstrations), source)
    model = models.start(settings.model, tokenizer, settings.seed, frozen)
    models.declare_end(model, tokenizer)
    demonstrations, held_out = (
        rendered("demonstrations", rows, tokenizer, settings.data) for rows in (demonstrations, held_out)
    )
    _check_positions(model, settings.data.max_length)
    try:
        trainer = _Trainer(
            model=model,
            args=SFTConfig(
                **training_arguments(config, compute, folder, settings.seed),
                max_length=settings.data.max_length,
                packing=config.packing,
                completion_only_loss=True,  # of the rows' own mask
            ),
            on_too_long=settings.data.too_long,
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
    except ValueError as error:
        if "[PEFT" not in str(error):
            raise
        reason = str(error).rpartition("] ")[2].partition(". ")[0]
        raise LabError(f"model.lora_targets: {reason}. Name others, or set model.lora_rank to 0.") from None
    _check_first_batch(trainer, tokenizer, source)
    if trainer.aux_loss_enabled and not gives_balance_loss(trainer.model):
        trainer.aux_loss_enabled = False
        trainer.model.config.get_text_config().output_router_logits = False
        notes.append(f"{name_of(trainer.model)} gives no loss that balances its experts: none is added")
    with trainer.accelerator.autocast():
        learned: Any = trainer.train_dataset
        rows = learned[: min(64, len(learned))]["input_ids"]
        why = settle_loss(trainer.model, trainer.data_collator, rows, config.packing)
    if why:
        notes.append(
            f"TRL's way to the loss is not that of {name_of(trainer.model)} ({why}): its own forward is "
            "taken, which needs more memory"
        )
    trainer.notes = notes
    return trainer


def holds_conversations(dataset: Any) -> bool:
    """Whether the rows are conversations rather than texts."""
    return not isinstance(next(iter(dataset[0].values())), str)


def _check_positions(model: Any, max_length: int) -> None:
    positions = heads.positions(model.config)
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
    """Stops a doomed run before its first step: nothing to train, or no end to learn."""
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise LabError("sft: no parameter is trainable. Check model.lora_targets.")
    example = next(iter(trainer.get_train_dataloader()))
    learned = example["labels"] != -100
    if not (example["labels"][learned] == tokenizer.eos_token_id).any():
        raise LabError(
            f"{source}: no answer of the first batch ends with {tokenizer.eos_token!r}, so the policy would "
            "never learn to stop. Name the token that ends an answer in model.eos_token."
        )
