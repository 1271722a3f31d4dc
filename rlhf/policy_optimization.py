"""Stage 3: the policy against the reward model, by `rlhf.ppo`."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lab.device import Compute
from lab.errors import LabError
from lab.files import write_atomic
from rlhf import models
from rlhf.agreement import BF16_TOLERANCE, make_probe, tolerance
from rlhf.check import check_model
from rlhf.config import RLHFRun
from rlhf.labelers import Answer, Scorer
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.roles import AdapterClassifier
from rlhf.scoring import RewardScorer
from rlhf.sft import lora, tokenized
from rlhf.stage import Stage, StageTrainer, train, training_arguments
from rlhf.tokenization import fitting_prompts, rendered, room_for_prompts, tokenize_prompt, tokenize_prompts

# Tables of samples: so many answers, about so many tables a run.
SAMPLES, TABLES = 8, 20


class RewardOfIds:
    """The reward model as the trainer calls it: on the very token ids, end token included."""

    __name__ = "reward_model"

    def __init__(self, scorer: RewardScorer, batch_size: int) -> None:
        self.scorer, self.batch_size = scorer, batch_size

    def score_ids(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Any:
        """Scores, float32 (answers,)."""
        return self.scorer.score_ids(prompt_ids, completion_ids, self.batch_size)


class _Trainer(StageTrainer, PPOTrainer):
    """PPOTrainer with the lab's checkpoints, tables of samples, and the labeler's opinion beside."""

    gold: Scorer | None = None
    max_prompt: int | None = None
    """Tokens of a prompt that the policy reads, its last ones."""

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """As in every other stage; TRL's own may end a prompt with an end token."""
        return tokenize_prompts(prompts, self._tokenizer, self.max_prompt), None, {}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            episodes = self.state.global_step // self.stage.window + 1
            self._note("train", {"episode": episodes * self.args.generation_batch_size})
            if self.gold is not None:
                # The reward model never sees these: where they part from its scores, it is being gamed.
                texts = [c if isinstance(c, str) else c[-1]["content"] for c in self.rollout["completions"]]
                ended = self.rollout["ended"]
                answers = [Answer(text, end) for text, end in zip(texts, ended, strict=True)]
                scores = self.gold.scores(self.rollout["prompts"], answers)
                self.rollout["gold"] = scores
                self._note("train", {"objective/gold_scores": sum(scores) / len(scores)})
            if episodes == 1:
                self.stage.run.summarize(sft_answers=_spread(self.rollout))
            every = max(1, self.state.max_steps // self.stage.window // TABLES)
            if (episodes - 1) % every == 0:
                write_samples(self.stage, self.state.global_step, self.rollout)
        return output


def _spread(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of the scores of the first rollout, whose answers are the SFT policy's."""
    scores = {"proxy": rollout["scores"]} | ({"gold": rollout["gold"]} if "gold" in rollout else {})
    return {
        name: {"mean": float(np.mean(each)), "std": float(np.std(each)), "answers": len(each)}
        for name, each in scores.items()
    }


def write_samples(stage: Stage, step: int, rollout: dict[str, Any]) -> None:
    """A table of answers: in media/ as JSON lines, and in W&B."""
    columns = [name for name in ("prompts", "completions", "scores", "gold", "kl") if name in rollout]
    rows = list(itertools.islice(zip(*(rollout[name] for name in columns), strict=True), SAMPLES))
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    write_atomic(stage.run.media / f"samples_{step:08d}.jsonl", ("\n".join(lines) + "\n").encode())
    stage.tracker.log_table(step, "media/samples", columns, rows)


def train_policy(
    settings: RLHFRun,
    stage: Stage,
    compute: Compute,
    prompts: Any,
    demonstrations: Any,
    policy: Path,
    reward: Path,
    gold: Scorer | None,
) -> tuple[Any, Any] | None:
    """Trains the policy of stage 1 by PPO for the scores of stage 2's reward model.

    Args:
        prompts: data set with a `prompt` column.
        demonstrations: for `ppo.ptx_coef`.
        policy, reward: folders of the models of stages 1 and 2.
        gold: a labeler that scores; only watched, never trained on.

    Returns:
        The model and its tokenizer; None if training was interrupted.
    """
    config = settings.ppo
    model, tokenizer = models.open_policy(policy, models.keeps_frozen_format(settings.model, compute))
    models.check_chat_template(tokenizer, prompts, settings.data.prompts or settings.data.demonstrations)
    reward_model, reward_tokenizer = models.open_reward(reward)
    if reward_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise LabError(
            f"{reward}: the reward model has another tokenizer than the policy {policy}, so it cannot score "
            "the policy's tokens. Train both stages from one model."
        )
    source = settings.data.prompts or settings.data.demonstrations
    prompts = rendered("prompts", prompts, tokenizer, settings.data)
    prompts, too_long = fitting_prompts(prompts, tokenizer, settings.data, source)
    stage.run.summarize(prompts={"rows": len(prompts), "too_long": too_long})
    reward_model.to(compute.device).requires_grad_(False)
    scorer = RewardScorer(reward_model, tokenizer)
    _check_end_token(scorer, prompts, tokenizer)
    reward_of_ids = RewardOfIds(scorer, config.micro)

    def shared_critic(owner: Any) -> nn.Module:
        """The critic as an adapter of the policy; and so the reward model, whose own weights can go."""
        judge = AdapterClassifier(owner, "reward", reward).to(compute.device)
        judge.set_trainable(False)
        check_same_scores(reward_of_ids.scorer, RewardScorer(judge, tokenizer), reward)
        reward_of_ids.scorer = RewardScorer(judge, tokenizer)
        critic = AdapterClassifier(owner, "critic", reward).to(compute.device)
        critic.set_trainable(True)
        return in_reward_units(critic)

    if settings.model.lora_rank:
        critic: Any = shared_critic
    else:
        critic = in_reward_units(models.open_reward(reward)[0])
    del scorer, reward_model  # of which the shared critic, once it is made, needs no more
    trainer = _Trainer(
        model=model,
        reward_funcs=reward_of_ids,
        args=ppo_arguments(settings, compute, stage.run.folder),
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=lora(settings.model, "CAUSAL_LM", model),
        critic=critic,
        ptx_dataset=_ptx(demonstrations, tokenizer, settings) if config.ptx_coef else None,
    )
    for line in check_model(trainer.model, tokenizer):
        stage.progress.say(f"         {line}")
    trainer.gold = gold
    trainer.max_prompt = room_for_prompts(settings.data)
    done = train(
        trainer,
        stage,
        lambda row: (
            f"score {row['objective/scores']:.2f}  KL {row['objective/kl']:.2f}"
            if "objective/kl" in row
            else ""
        ),
    )
    return (trainer.accelerator.unwrap_model(trainer.model), tokenizer) if done else None


def in_reward_units(critic: Any) -> Any:
    """Scales a critic made of a reward model to the scores that PPO sees; it learns the shift at once."""
    with torch.no_grad():
        critic.score.weight.mul_(getattr(critic.config, "reward_scale", 1.0))
    return critic


def ppo_arguments(settings: RLHFRun, compute: Compute, folder: Path) -> PPOConfig:
    """The trainer's settings of a config."""
    config = settings.ppo
    arguments = training_arguments(config, compute, folder, settings.seed)
    arguments.pop("num_train_epochs")
    return PPOConfig(
        **arguments,
        num_rollouts=config.rollouts,
        num_ppo_epochs=int(config.epochs),
        num_mini_batches=config.rollout_size // config.batch_size,
        critic_learning_rate=config.critic_learning_rate,
        max_completion_length=settings.data.max_new_tokens,
        temperature=config.temperature,
        sampling_batch_size=config.sampling_batch_size,
        top_k=0,
        kl_coef=config.kl_coef,
        kl_target=config.kl_target,
        kl_horizon=config.kl_horizon,
        cliprange=config.clip,
        cliprange_value=config.clip_value,
        vf_coef=config.value_coef,
        gamma=config.gamma,
        lam=config.gae_lambda,
        missing_eos_penalty=config.missing_eos_penalty,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
        score_clip=config.score_clip,
        ptx_coef=config.ptx_coef,
        disable_dropout=True,
    )


def check_same_scores(merged: RewardScorer, shared: RewardScorer, folder: Path) -> None:
    """The reward model as an adapter of the policy must score as the one in its folder does.

    That one is merged, and rounded to the format of the base: of a base in bf16 it is as far off as bf16 is.
    """
    probe = make_probe(merged.config)
    ours, own = (scorer.score_ids(probe.prompts, probe.answers) for scorer in (shared, merged))
    apart, spread = float((ours - own).abs().max()), float(own.std(correction=0))
    within = tolerance(merged.model, [own]) * max(1.0, spread)
    if getattr(merged.model, "saved_format", torch.float32) != torch.float32:
        size = float((own + merged.shift * merged.scale).square().mean().sqrt())  # of what was rounded
        within = max(within, BF16_TOLERANCE * max(1.0, size))
    if not apart <= within:
        raise LabError(
            f"{folder}: as an adapter of the policy the reward model scores otherwise than by itself (by "
            f"{apart:.2g}). Train both stages from one model, or set model.lora_rank to 0."
        )


def _check_end_token(scorer: RewardScorer, prompts: Any, tokenizer: Any) -> None:
    """A reward model that ignores the end token cannot teach the policy to stop."""
    prompt = tokenize_prompt(prompts[0]["prompt"], tokenizer)
    some = prompt[-1:] * 3
    with_end, without = scorer.score_ids([prompt] * 2, [[*some, tokenizer.eos_token_id], some]).tolist()
    if with_end == without:
        raise LabError(
            "reward: scores an answer the same with and without its end token. It was trained on other "
            "tokens than it is asked about: train it again with --from reward."
        )


def _ptx(demonstrations: Any, tokenizer: Any, settings: RLHFRun) -> list[dict[str, Any]]:
    """Demonstrations as token ids for the language-model loss beside PPO's."""
    demonstrations = rendered("demonstrations", demonstrations, tokenizer, settings.data)
    rows, _ = tokenized(demonstrations, tokenizer, settings.data.max_length, settings.data.too_long)
    return rows.to_list()
