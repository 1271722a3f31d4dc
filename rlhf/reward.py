"""Stage 2: a reward model from ranked comparisons."""

from pathlib import Path
from typing import Any

from trl.trainer.reward_config import RewardConfig

from lab.device import Compute
from lab.errors import LabError
from rlhf import models
from rlhf.config import RLHFRun
from rlhf.data import drawn
from rlhf.health import warn
from rlhf.ranking import RankingTrainer, center, init_head
from rlhf.scoring import RewardScorer, calibration_plot, held_out_report, sequence_classifier
from rlhf.sft import lora
from rlhf.stage import Stage, StageTrainer, train, training_arguments
from rlhf.tokenization import fitting_answers, rendered, tokenize_rows

# Demonstrations the scores are centred on, and held-out comparisons they are scaled by, at most.
AT_MOST = 512


class _Trainer(StageTrainer, RankingTrainer):
    """RankingTrainer with the lab's checkpoints."""


def train_reward(
    settings: RLHFRun,
    stage: Stage,
    compute: Compute,
    training: Any,
    held_out: Any,
    demonstrations: Any,
    policy: Path,
) -> tuple[Any, Any] | None:
    """Trains a reward model, started from the policy of stage 1, to rank answers as the labeler did.

    Demonstrations score 0 on average, and held-out answers have variance 1, so that `ppo.kl_coef` means the
    same whatever the reward model.

    Args:
        training, held_out: comparisons, as `data.comparisons` returns them.
        demonstrations: as `data.demonstrations` does.
        policy: the folder of stage 1's model.

    Returns:
        The model and its tokenizer; None if training was interrupted.
    """
    config = settings.reward
    model, tokenizer = models.open_reward(policy, models.keeps_frozen_format(settings.model, compute))
    training, held_out = (
        rendered("comparisons", rows, tokenizer, settings.data) for rows in (training, held_out)
    )
    init_head(model, settings.seed)
    trainer = _Trainer(
        model=model,
        args=RewardConfig(
            **training_arguments(config, compute, stage.run.folder, settings.seed),
            max_length=settings.data.max_length,
            center_rewards_coefficient=config.center_coef or None,
        ),
        train_dataset=training,
        eval_dataset=held_out,
        loss=config.loss,  # type: ignore[arg-type]
        on_too_long=settings.data.too_long,  # type: ignore[arg-type]
        processing_class=tokenizer,
        peft_config=lora(settings.model, "SEQ_CLS", model),
    )
    done = train(
        trainer, stage, lambda row: f"accuracy {row['train/accuracy']:.2f}" if "train/accuracy" in row else ""
    )
    if not done:
        return None
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if demonstrations is not None:
        demonstrations = rendered("demonstrations", demonstrations, tokenizer, settings.data)
        center(trained, tokenizer, some_that_fit(demonstrations, tokenizer, settings))
    # Scored whole, whatever training does about those that are too long.
    fitting = fitting_answers(held_out.to_list(), tokenizer, settings.data.max_length)
    if not fitting:
        raise LabError(
            f"data.max_length: no held-out comparison has two answers within {settings.data.max_length} "
            "tokens. Raise it."
        )
    _scale(trained, tokenizer, fitting)
    report = held_out_report(RewardScorer(trained, tokenizer), fitting)
    stage.tracker.log(trainer.state.global_step, {"eval/accuracy": report["accuracy"]})
    low, high = report["accuracy_low"], report["accuracy_high"]
    stage.run.summarize(
        **{
            "eval/accuracy": report["accuracy"],
            "accuracy_low": low,
            "accuracy_high": high,
            "held_out": report,
        }
    )
    stage.progress.say(
        f"         {report['accuracy']:.1%} ({low:.1%} to {high:.1%}) of {report['pairs']} held-out pairs in "
        "the right order"
    )
    if low <= 0.5 <= high:
        warn(
            stage,
            f"the reward model may be guessing: its accuracy on held-out pairs is {low:.0%} to {high:.0%}, "
            "which includes 50%. Give it more comparisons or epochs before trusting what PPO makes of it",
        )
    plot = stage.run.media / "calibration.png"
    calibration_plot(report, plot)
    stage.tracker.log_media(trainer.state.global_step, "media/calibration", plot)
    return trained, tokenizer


def some_that_fit(demonstrations: Any, tokenizer: Any, settings: RLHFRun) -> list[Any]:
    """At most `AT_MOST` demonstrations, chosen by the seed, of those that are not too long."""
    some: list[Any] = []
    shuffled = demonstrations.shuffle(seed=settings.seed)
    for begin in range(0, len(shuffled), AT_MOST):
        part = shuffled.select(range(begin, min(begin + AT_MOST, len(shuffled))))
        rows = [_answered(row) for row in part.to_list()]
        counted = tokenize_rows([(row["prompt"], row["completion"], True) for row in rows], tokenizer)
        some += [
            row
            for row, (prompt, answer) in zip(rows, counted, strict=True)
            if len(prompt) + len(answer) <= settings.data.max_length
        ]
        if len(some) >= AT_MOST:
            break
    return some[:AT_MOST]


def _answered(row: Any) -> Any:
    """A demonstration as prompt and completion: of a conversation its last answer, of a text all of it."""
    if "messages" in row:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    return {"prompt": "", "completion": row["text"]} if "text" in row else row


def _scale(model: Any, tokenizer: Any, held_out: list[Any]) -> None:
    """Puts into the model's config what gives held-out answers scores of variance 1."""
    rows = [held_out[i] for i in drawn([row["prompt"] for row in held_out], AT_MOST)]
    scores = RewardScorer(model, tokenizer, shift=0.0, scale=1.0).score_texts(
        [row["prompt"] for row in rows for _ in row["completions"]],
        [completion for row in rows for completion in row["completions"]],
        [finished for row in rows for finished in row["finished"]],
    )
    spread = float(scores.std())
    if not spread > 0:
        raise LabError(
            "reward: the model gives all held-out answers one score. Train it longer, or look at the "
            "comparisons."
        )
    sequence_classifier(model).config.reward_scale = 1 / spread
