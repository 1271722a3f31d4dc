"""PPO for language models with a learned critic, on current TRL: `PPOTrainer` is a `GRPOTrainer`.

What TRL had until 1.12 and dropped in 1.13, rebuilt on what it still has: the trainer loop, prompts and
chat templates, vLLM, callable rewards and LoRA come from `GRPOTrainer`; rollouts, critic, GAE, the losses
and exact resume are here. Following "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031)
and InstructGPT (arXiv 2203.02155).

One layout serves every model: prompt and answer side by side, padding on the right only. Under a causal
mask no real token sees it, so no model needs an attention mask, and learned positions are right by
themselves. Masks come from lengths, never from token ids: the padding token may be the end token.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from lab.device import attention_to_learn
from lab.errors import LabError
from lab.hub import from_pretrained
from rlhf import checkpoints
from rlhf.agreement import SAMPLED_TOLERANCE, check_training_mode, evaluating, name_of, plain_logits
from rlhf.decode import DrawnLogprobs, decoding_of, sample
from rlhf.logprobs import add_logprob_head
from rlhf.memory import rows_that_fit
from rlhf.randomness import switch_off_randomness
from rlhf.roles import AdapterClassifier, keeping_what_is_trained, own_parameters
from rlhf.scoring import score_reading_of, scores_of_last
from rlhf.sequences import Sequences, side_by_side
from rlhf.tokenization import tokenize_prompts


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with PPO's settings, under the names TRL's own `PPOConfig` had.

    A rollout is per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches answers; every
    epoch goes over it in `num_mini_batches` optimiser steps.
    """

    num_rollouts: int = field(default=0, metadata={"help": "Rollouts to train for; 0 leaves max_steps."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps per pass."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the per-token KL in the reward."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL a sequence in nats that kl_coef is steered to; None: fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef adapts."})
    cliprange: float = field(default=0.2, metadata={"help": "Of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Of the change in value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale per-token rewards to variance 1; their mean stays."}
    )
    whiten_advantages: bool = field(default=True, metadata={"help": "Shift and scale to mean 0, variance 1."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the score of an answer that did not end."}
    )
    missing_eos_score: float | None = field(
        default=None, metadata={"help": "Replaces the score of an answer that did not end (paper: -1)."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Scores are kept within +- this."})
    critic_learning_rate: float | None = field(default=None, metadata={"help": "None: learning_rate."})
    ptx_coef: float = field(
        default=0.0, metadata={"help": "Weight of the language-model loss on ptx data (paper: 27.8)."}
    )
    ptx_batch_size: int | None = field(
        default=None, metadata={"help": "ptx examples a micro-batch; None: per_device_train_batch_size."}
    )
    sampling_batch_size: int = field(
        default=0, metadata={"help": "Answers sampled at once; 0: as many as fit the memory."}
    )
    check_first_update: bool = field(
        default=True,
        metadata={"help": "Stop if the first update does not begin at the probabilities of sampling."},
    )

    def __post_init__(self) -> None:
        self.steps_per_generation = self.num_mini_batches * self.gradient_accumulation_steps
        self.num_iterations = self.num_ppo_epochs
        self.epsilon = self.cliprange
        # The KL is measured even where it costs nothing: any beta but 0 makes GRPOTrainer keep a reference.
        self.beta = self.kl_coef or 1e-12
        self.scale_rewards, self.loss_type = "none", "bnpo"
        if self.num_rollouts:
            self.max_steps = self.num_rollouts * self.num_ppo_epochs * self.num_mini_batches
        if self.ddp_find_unused_parameters is None:
            # There are none; and DDP would take a critic's adapter, which it meets in the backward pass
            # only, for unused.
            self.ddp_find_unused_parameters = False
        if self.max_steps <= 0:
            raise ValueError("give num_rollouts (or max_steps): PPO has no epochs over its prompts")
        # GRPO insists on groups of at least two answers; PPO has a critic instead, and takes one.
        self.num_generations, self.per_device_train_batch_size = 2, 2 * self.per_device_train_batch_size
        super().__post_init__()
        self.num_generations, self.per_device_train_batch_size = 1, self.per_device_train_batch_size // 2
        assert self.generation_batch_size is not None
        self.generation_batch_size //= 2


_PER_TOKEN = "old_logps", "sampled_logps", "values", "advantages", "returns"


class Critic(nn.Module):
    """A value per answer token from a transformers sequence classifier with one label.

    Called through the accelerator's wrapper, so that its gradients are synchronised; kept out of the
    policy, so that the policy's weights stay a plain language model's.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, of: Sequences) -> Tensor:
        """Values before each answer token, float32 (batch, longest answer); 0 behind an answer's end."""
        read = [length - 1 for length in of.lengths]
        values = scores_of_last(self.model, of.ids, read, of.answer_lengths, of.shared)
        return of.rows.pad(values.squeeze(-1).float())


# ---- the arithmetic, all on tensors (batch, width) ----


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """Minus `kl_coef` times each token's KL, plus the answer's score (batch,) at its last token."""
    rewards = -kl_coef * kl
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores[:, None].to(rewards.dtype))


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t (GAE, arXiv 1506.02438, eq. 16).

    Nothing follows an answer's last token; the result is 0 where `mask` is.
    """
    real = mask.to(values.dtype)
    values = values * real
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * real[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask`."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift: bool = True, sums: Any = None) -> Tensor:
    """Scales `x` where `mask` to variance 1 and, if `shift`, to mean 0; 0 elsewhere.

    `sums` adds the tensor of sums up over all processes.
    """
    real = mask.to(x.dtype)
    total = torch.stack([(x * real).sum(), (x.square() * real).sum(), real.sum()])
    total = total if sums is None else sums(total)
    mean = total[0] / total[2].clamp(min=1)
    variance = (total[1] / total[2].clamp(min=1) - mean.square()).clamp(min=0)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (scaled if shift else scaled + mean) * real


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2)."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


class _ByIds:
    """A reward that scores token ids alone, as GRPOTrainer asks for it: with a name, and callable."""

    def __init__(self, reward: Any) -> None:
        self.score_ids = reward.score_ids
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, **_: Any) -> list[float]:
        raise LabError(f"{self.__name__}: scores token ids, not text")


class PPOTrainer(checkpoints.PlainCheckpoints, GRPOTrainer):
    """PPO on TRL's `GRPOTrainer`.

    Args:
        critic: a transformers sequence classifier with one label, or its folder; in the paper, and best,
            the reward model. It is trained beside the policy. A callable is given the policy once it has its
            adapters and returns the critic (see `rlhf.roles`).
        ptx_dataset: rows of `input_ids` and `completion_mask` for the `ptx_coef` language-model loss.
        reward_funcs: one or a list of callables as GRPO's, or of objects with `score_ids(prompt_ids,
            completion_ids)`, which get the very token ids, end token included, and need not be callable.

    All other arguments are `GRPOTrainer`'s.
    """

    _tag_names = ("trl", "ppo")
    _name = "PPO"
    _paper = {  # noqa: RUF012  (as the parent has it)
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": None,
    }
    args: Any
    model: Any
    reward_funcs: Any
    train_dataset: Any
    accelerator: Any
    state: Any
    processing_class: Any
    _tokenizer: Any
    max_completion_length: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        *args: Any,
        critic: nn.Module | str | Path | Callable[[Any], nn.Module],
        ptx_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        functions: list[Any] = [
            _ByIds(one) if hasattr(one, "score_ids") and not callable(one) else one
            for one in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])
            if one is not None
        ]
        super().__init__(model, functions, *args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise LabError("PPOTrainer: a separate critic works on one process or with DDP, not when sharded")
        if self.ref_model is not None:
            # GRPOTrainer reads its own from the policy's folder, maybe as another class or other weights.
            reference = copy.deepcopy(self.accelerator.unwrap_model(self.model)).requires_grad_(False)
            # What TRL has put in the place of the policy's forward would, in the copy, still be the policy's.
            reference.__dict__.pop("forward", None)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.ptx_coef and ptx_dataset is None:
            raise LabError("PPOTrainer: ptx_coef needs ptx_dataset. Give it, or set ptx_coef to 0.")
        if isinstance(critic, str | Path):
            from transformers import AutoModelForSequenceClassification

            made = from_pretrained(
                AutoModelForSequenceClassification, critic, num_labels=1, dtype=self.model.dtype
            )
        else:
            made = critic if isinstance(critic, nn.Module) else critic(self.model)
        if isinstance(made, AdapterClassifier) and self.args.activation_checkpointing:
            raise LabError(
                "PPOTrainer: where the critic is an adapter of the policy, its activations would be computed "
                "again under the policy's. Please set gradient_checkpointing=False (TRL's default is True)."
            )
        for model in (self.model, self.ref_model, made):
            if isinstance(model, nn.Module):
                switch_off_randomness(model)
        if isinstance(self.ref_model, nn.Module):
            self.ref_model.eval()
        if self.args.activation_checkpointing:
            cast(Any, made).gradient_checkpointing_enable()
        self.critic_model: nn.Module = made.eval()
        self.critic = self.accelerator.prepare_model(Critic(made))
        self.ptx_dataset = ptx_dataset
        self.kl_coef = self.args.kl_coef
        self.rollout: dict[str, Any] = {}
        """What the last rollout was, for tables of samples: prompts, completions, scores, kl."""
        self._prompt_ids: list[list[int]] = []
        self._drawn: list[DrawnLogprobs | None] = []
        self._rows_at_once = self.args.sampling_batch_size
        self._critic_in_optimizer = False
        self._updated = False
        self._check_models()

    def _check_models(self) -> None:
        """How each model is computed is found before anything is trained, in this run's number format."""
        tokenizer, rows = (
            self.processing_class,
            self.train_dataset[: min(64, len(self.train_dataset))]["prompt"],
        )
        prompts = tokenize_prompts(rows, tokenizer)
        calm = [model for model in (self.model, self.ref_model) if model is not None]
        for model in calm:
            model.to(self.accelerator.device)
        with self.accelerator.autocast():
            for model in calm:
                add_logprob_head(model, self.temperature, prompts)
            if not self.use_vllm:
                decoding_of(self.model, prompts)
            if not isinstance(self.critic_model, AdapterClassifier):
                score_reading_of(self.critic_model)
        if self.args.activation_checkpointing:
            for model in (self.model, self.critic_model):
                check_training_mode(model)

    # ---- prompts ----

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return PromptStream(
            len(dataset if dataset is not None else self.train_dataset),
            batch_size=self.args.generation_batch_size,
            repeats=self.num_iterations * self.args.steps_per_generation,
            batches=math.ceil(
                self.args.max_steps
                * self.args.gradient_accumulation_steps
                / (self.num_iterations * self.args.steps_per_generation)
            ),
            seed=self.args.seed,
        )

    # ---- rollouts ----

    def _generate(self, prompts: list[Any]) -> Any:
        self._drawn = []
        output = super()._generate(prompts)
        self._prompt_ids = output[0]
        return output

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """GRPO's, but for the plain case our own sampler."""
        plain = not (self.use_vllm or self.use_transformers_continuous_batching or multimodal_fields)
        if not plain or self.args.generation_kwargs or self.min_p or self.repetition_penalty != 1:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *rest, **more
            )
        model = self.accelerator.unwrap_model(self.model_wrapped)
        drawn = None
        if self.accelerator.mixed_precision == "no" or not self._updated:
            drawn = DrawnLogprobs(
                len(prompt_ids), self.max_completion_length, self.temperature, self.accelerator.device
            )
        with self.accelerator.autocast():
            answers = sample(
                model,
                prompt_ids,
                observe=drawn,
                max_new_tokens=self.max_completion_length,
                eos_ids=self.eos_token_ids,
                pad_id=self._tokenizer.pad_token_id,
                temperature=self.temperature,
                top_k=self.top_k or 0,
                top_p=self.top_p,
                rows_at_once=self._sampled_at_once(prompt_ids),
            )
        self._drawn.append(drawn)
        return answers, None

    def _sampled_at_once(self, prompt_ids: Sequence[Sequence[int]]) -> int:
        """How many answers are sampled at once: what is set, or what fits beside gradients and moments.

        Found once, so that a run that goes on with other memory free computes what it would have.
        """
        if not self._rows_at_once:
            trained = {id(p): p for m in (self.model, self.critic_model) for p in m.parameters()}
            known: Any = getattr(self.optimizer, "state", {})
            to_come = sum(3 * 4 * p.numel() for p in trained.values() if p.requires_grad and p not in known)
            n_tokens = max(map(len, prompt_ids)) + self.max_completion_length
            self._rows_at_once = rows_that_fit(self.model, n_tokens, to_come)
        return self._rows_at_once

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        """As GRPO's; rewards that can, score token ids: text would lose the end token (and its meaning)."""
        functions = self.reward_funcs
        by_ids = [hasattr(function, "score_ids") for function in functions]
        if not any(by_ids):
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

        def filler(completions: list[Any], **_: Any) -> list[float]:
            return [0.0] * len(completions)

        self.reward_funcs = [filler if own else f for own, f in zip(by_ids, functions, strict=True)]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        for column, (own, function) in enumerate(zip(by_ids, functions, strict=True)):
            if own:
                scores = torch.as_tensor(function.score_ids(self._prompt_ids, completion_ids_list))
                rewards[:, column] = self.accelerator.gather(scores.to(rewards.device))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, answer_ids, _, completions, *_ = self._generate(prompts)
        packed = self._pack(prompt_ids, answer_ids)
        mask = packed.mask
        with torch.no_grad():
            drawn = self._drawn[0] if len(self._drawn) == 1 else None
            sampled = drawn.logprobs[:, : mask.shape[1]] * mask if drawn is not None else None
            if drawn is not None and self.accelerator.mixed_precision == "no":  # exactly what is wanted
                logps = drawn.logprobs[:, : mask.shape[1]] * mask
                entropies = drawn.entropies[:, : mask.shape[1]] * mask
            else:
                logps, entropies = self._in_parts(lambda part: self._policy(self.model, part), packed)
            reference, _ = self._in_parts(self._reference, packed)
            (values,) = self._in_parts(lambda part: (self._values(part),), packed)
            scores = self._calculate_rewards(inputs, prompts, completions, answer_ids)
            scores = (scores * self.reward_weights.to(scores.device)).nansum(1)
            first = self.accelerator.process_index * len(prompts)
            scores = raw_scores = scores[first : first + len(prompts)]

            a = self.args
            ended = torch.tensor([ids[-1] in self.eos_token_ids for ids in answer_ids], device=mask.device)
            if a.score_clip is not None:
                scores = scores.clamp(-a.score_clip, a.score_clip)
            if a.missing_eos_score is not None:
                scores = torch.where(ended, scores, a.missing_eos_score)
            if a.missing_eos_penalty is not None:
                scores = scores - a.missing_eos_penalty * (~ended).float()
            kl = (logps - reference) * mask
            rewards = token_rewards(scores, kl, packed.rows.counts, self.kl_coef)
            if a.whiten_rewards:
                rewards = whiten(rewards, mask, shift=False, sums=self._sum)
            advantages = generalized_advantages(rewards, values, mask, a.gamma, a.lam)
            returns = advantages + values * mask
            if a.whiten_advantages:
                advantages = whiten(advantages, mask, sums=self._sum)

            sequence_kl = self.accelerator.gather(kl.sum(1)).mean()
            n = len(self.accelerator.gather(scores))
            non_score = -self.kl_coef * sequence_kl
            residual, total = (returns - values) * mask, returns * mask
            explained = 1 - masked_variance(residual, mask) / masked_variance(total, mask).clamp(min=1e-8)
            self._note(
                mode,
                {
                    "objective/kl": sequence_kl,
                    "objective/kl_coef": self.kl_coef,
                    "objective/entropy": masked_mean(entropies, mask),
                    "objective/non_score_reward": non_score,
                    "objective/rlhf_reward": self.accelerator.gather(scores).mean() + non_score,
                    "objective/scores": self.accelerator.gather(raw_scores).mean(),
                    "val/explained_variance": explained,
                    "val/num_eos_tokens": self.accelerator.gather(ended.float()).mean(),
                    "val/answer_tokens": self.accelerator.gather(packed.rows.counts.float()).mean(),
                },
            )
        self.rollout = {
            "prompts": prompts,
            "completions": completions,
            "scores": raw_scores.tolist(),
            "kl": kl.sum(1).tolist(),
            "ended": ended.tolist(),
        }
        if a.kl_target is not None and mode == "train":
            self.kl_coef = adapt_kl_coef(self.kl_coef, float(sequence_kl), a.kl_target, n, a.kl_horizon)
        return {
            "packed": packed,
            "sampled_logps": logps if sampled is None else sampled,
            "old_logps": logps,
            "values": values,
            "advantages": advantages,
            "returns": returns,
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The micro-batch of this step; at the start of a rollout, generates it.

        Every epoch shuffles the rollout anew into mini-batches; within one, micro-batches take sequences of
        like length and are cut to their longest.
        """
        training = self.model.training
        self._eval_mode()
        if not training:
            rollout = self._generate_and_score_completions(generation_batch)
            return self._micro_batch(rollout, list(range(len(rollout["values"]))), 1.0)
        per_epoch = self.args.steps_per_generation
        position = self._step % (per_epoch * self.num_iterations)
        if position == 0:
            self._buffered_inputs = self._generate_and_score_completions(generation_batch)
        rollout = self._buffered_inputs
        if position % per_epoch == 0:
            self._schedule = self._epoch_order(rollout, seed=self.args.seed + self._rows_seen())
        rows, n_tokens = self._schedule[position % per_epoch]
        return self._micro_batch(rollout, rows, n_tokens)

    def _eval_mode(self) -> None:
        """Eval mode for all that computes; the policy itself stays marked, as TRL tells training by it."""
        training = self.model.training
        self.model.eval()
        self.model.training = training

    def _epoch_order(self, rollout: dict[str, Any], seed: int) -> list[tuple[list[int], float]]:
        """Rows of every micro-batch of an epoch, and the answer tokens of the mini-batch each belongs to."""
        packed: Sequences = rollout["packed"]
        lengths, generator = packed.lengths, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        micro, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        schedule: list[tuple[list[int], float]] = []
        for begin in range(0, len(order), micro * accumulation):
            batch = order[begin : begin + micro * accumulation]
            n_tokens = float(sum(packed.answer_lengths[row] for row in batch))
            batch.sort(key=lengths.__getitem__)
            schedule += [(batch[i : i + micro], n_tokens) for i in range(0, len(batch), micro)]
        return schedule

    def _pack(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Sequences:
        packed = side_by_side(prompts, answers, self._tokenizer.pad_token_id, self.accelerator.device)
        # With gradient checkpointing models ignore the cache that a shared beginning is kept in.
        return replace(packed, shared=0) if self.args.activation_checkpointing else packed

    def _rows_seen(self) -> int:
        """A number that differs between the epochs of a run and is the same after a resume."""
        return self.state.global_step * 7919 + self.accelerator.process_index

    def _micro_batch(self, rollout: dict[str, Any], rows: list[int], n_tokens: float) -> dict[str, Any]:
        packed: Sequences = rollout["packed"].part(rows)
        at, width = torch.tensor(rows, device=packed.ids.device), packed.rows.shape[1]
        part = {name: rollout[name][at, :width] for name in _PER_TOKEN}
        return {**part, "packed": packed, "n_tokens": n_tokens}

    def _in_parts(self, function: Any, packed: Sequences) -> tuple[Tensor, ...]:
        """Calls `function` on micro-batches of like length; its results (batch, width) in the old order."""
        order = sorted(range(len(packed.lengths)), key=packed.lengths.__getitem__)
        size = self.args.per_device_train_batch_size
        results: list[Tensor] = []
        for begin in range(0, len(order), size):
            rows = order[begin : begin + size]
            values = function(packed.part(rows))
            if not results:
                results = [value.new_zeros(packed.rows.shape) for value in values]
            for result, value in zip(results, values, strict=True):
                result[rows, : value.shape[1]] = value
        return tuple(results)

    # ---- the models ----

    def _policy(self, model: Any, packed: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the answer tokens and entropies, float32 (batch, width)."""
        with self._computing(packed):
            return model(logprobs_of=packed)

    def _reference(self, packed: Sequences) -> tuple[Tensor, Tensor]:
        if self.ref_model is not None:
            return self._policy(self.ref_model, packed)
        model = self.accelerator.unwrap_model(self.model)
        adapter = "ref" if "ref" in model.peft_config else None
        from trl.trainer.utils import use_adapter

        # PEFT's switch would leave the critic's adapter untrained.
        with keeping_what_is_trained(model), use_adapter(model, adapter_name=adapter):
            return self._policy(self.model, packed)

    def _values(self, packed: Sequences) -> Tensor:
        self.critic_model.train(self.args.activation_checkpointing and torch.is_grad_enabled())
        with self._computing(packed):
            return self.critic(packed)

    @contextmanager
    def _computing(self, packed: Sequences) -> Iterator[None]:
        """Number format and attention for a forward pass."""
        precision = "bf16" if self.args.bf16 and torch.is_grad_enabled() else "fp32"
        n_tokens, checkpointed = packed.ids.shape[1], self.args.gradient_checkpointing
        attention = attention_to_learn(packed.ids.device.type, precision, n_tokens, checkpointed)
        with self.accelerator.autocast(), attention:
            yield

    # ---- the losses ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Clipped losses of policy and value (PPO, arXiv 1707.06347, eq. 7), means over a mini-batch."""
        mode = "train" if self.model.training else "eval"
        if self.args.activation_checkpointing:
            self.model.train(mode == "train")  # transformers computes activations again in this mode alone
        a, packed = self.args, inputs["packed"]
        mask = packed.mask
        n_tokens = inputs["n_tokens"] if mode == "train" else mask.sum().clamp(min=1)
        logps, entropies = self._policy(model, packed)
        log_ratio = (logps - inputs["old_logps"]) * mask
        ratio = log_ratio.exp()
        advantages = inputs["advantages"]
        clipped = ratio.clamp(1 - a.cliprange, 1 + a.cliprange)
        policy_losses = torch.maximum(-advantages * ratio, -advantages * clipped)
        policy_loss = (policy_losses * mask).sum() / n_tokens

        values = self._values(packed)
        old, returns = inputs["values"], inputs["returns"]
        near = old + (values - old).clamp(-a.cliprange_value, a.cliprange_value)
        far_losses, near_losses = (values - returns).square(), (near - returns).square()
        value_loss = 0.5 * (torch.maximum(far_losses, near_losses) * mask).sum() / n_tokens
        loss = policy_loss + a.vf_coef * value_loss
        if a.ptx_coef and mode == "train":
            ptx_loss = self._ptx_loss(model) / self.current_gradient_accumulation_steps
            loss = loss + a.ptx_coef * ptx_loss
            self._note(mode, {"loss/ptx_avg": ptx_loss.detach() * self.current_gradient_accumulation_steps})

        with torch.no_grad():
            share = (
                mask.sum() / n_tokens * self.current_gradient_accumulation_steps if mode == "train" else 1.0
            )
            numbers = {
                # (r - 1) - log r: unbiased, never negative (Schulman, "Approximating KL divergence")
                "policy/approxkl_avg": masked_mean(ratio - 1 - log_ratio, mask),
                "policy/clipfrac_avg": masked_mean((clipped != ratio).float(), mask),
                "policy/entropy_avg": masked_mean(entropies, mask),
                "val/ratio": masked_mean(ratio, mask),
                "val/clipfrac_avg": masked_mean((near_losses > far_losses).float(), mask),
            }
            accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
            self._note(
                mode,
                {name: number * share for name, number in numbers.items()}
                | {
                    "loss/policy_avg": policy_loss.detach() * accumulation,
                    "loss/value_avg": value_loss.detach() * accumulation,
                },
            )
            if mode == "train" and not self._updated and a.check_first_update:
                self._check_first_update(logps, inputs)
        return loss

    def _check_first_update(self, logps: Tensor, inputs: dict[str, Any]) -> None:
        """Before any update, training gives the tokens the probabilities they were sampled with."""
        self._updated = True
        packed: Sequences = inputs["packed"]
        mask, sampled = packed.mask, inputs["sampled_logps"]
        precision = "fp32" if self.accelerator.mixed_precision == "no" else "bf16"
        apart, allowed = float(masked_mean((logps - sampled).abs(), mask)), SAMPLED_TOLERANCE[precision]
        if apart <= allowed:
            return
        model, row = self.model, 0
        begin, end = packed.prompt_lengths[row], packed.lengths[row]
        with self.accelerator.autocast(), evaluating(model):
            own = plain_logits(model, packed.ids[row, :end].tolist())[begin - 1 : -1] / self.temperature
        own = own.log_softmax(-1).gather(1, packed.ids[row, begin:end, None])[:, 0]
        n = end - begin
        of_sampler, of_training = (float((x[row, :n] - own).abs().mean()) for x in (sampled, logps))
        raise LabError(
            f"PPO: {name_of(model)} in training differs from itself in sampling by {apart:.2g} nats a token "
            f"before its first update; {allowed:g} are allowed in {precision}. From its plain forward the "
            f"sampler is {of_sampler:.2g} off, training {of_training:.2g}. Please report it, it is a fault; "
            "check_first_update=False trains all the same, on wrong ratios."
        )

    def _ptx_loss(self, model: Any) -> Tensor:
        """Minus the mean log-probability of completions from the ptx data (InstructGPT, section 3.5)."""
        size = self.args.ptx_batch_size or self.args.per_device_train_batch_size
        generator = torch.Generator().manual_seed(self.args.seed + self._rows_seen() + self._step + 1)
        rows = torch.randint(len(self.ptx_dataset), (size,), generator=generator).tolist()
        examples = [self.ptx_dataset[row] for row in rows]
        prompts, answers = zip(
            *(split_completion(e["input_ids"], e.get("completion_mask")) for e in examples), strict=True
        )
        packed = self._pack(prompts, answers)
        logps, _ = self._policy(model, packed)
        return -masked_mean(logps, packed.mask)

    # ---- what the Trainer must know of the critic ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        own = [p for p in own_parameters(self.critic_model).values() if p.requires_grad]
        for parameter in own:  # an adapter's are the policy model's too, and have a rate of their own
            parameter.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for parameter in own:
            parameter.requires_grad_(True)
        if not self._critic_in_optimizer:
            rate = self.args.critic_learning_rate
            optimizer.add_param_group(
                {
                    "params": own,
                    "lr": self.args.learning_rate if rate is None else rate,
                    "weight_decay": 0.0,
                }
            )
            self._critic_in_optimizer = True
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.critic.zero_grad()  # the Trainer zeroes the gradients of `model` only
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips the critic's and the policy's gradients, each by a norm of its own."""
        critic = list(own_parameters(self.critic_model).values())
        norm = self.accelerator.clip_grad_norm_(critic, self.args.max_grad_norm)
        self._note("train", {"val/critic_grad_norm": norm})
        known = {id(parameter) for parameter in critic}
        policy = [parameter for parameter in model.parameters() if id(parameter) not in known]
        return self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)

    def named_parameters_of_optimizer(self) -> dict[str, Tensor]:
        critic = {f"critic.{name}": p for name, p in own_parameters(self.critic_model).items()}
        return critic | super().named_parameters_of_optimizer()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            weights = own_parameters(self.critic_model).items()
            save_file({name: p.detach().contiguous() for name, p in weights}, folder / "critic.safetensors")
            (folder / "ppo_state.json").write_text(
                json.dumps({"kl_coef": self.kl_coef, "rows_at_once": self._rows_at_once})
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with keeping_what_is_trained(self.model):  # PEFT's loading switches adapters, too
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        weights, own = (
            checkpoints.read_tensors(folder / "critic.safetensors"),
            own_parameters(self.critic_model),
        )
        checkpoints.compare(folder / "critic.safetensors", weights, own)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        state = checkpoints.read(folder / "ppo_state.json")
        with checkpoints.damage(folder / "ppo_state.json"):
            self.kl_coef, self._rows_at_once = float(state["kl_coef"]), int(state.get("rows_at_once", 0))
        self._updated = True

    # ---- numbers ----

    def _note(self, mode: str, numbers: dict[str, Any]) -> None:
        """Keeps numbers for the next row, as tensors: nothing waits for the device here."""
        for name, number in numbers.items():
            self._metrics[mode][name].append(number)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, numbers in metrics.items():
            metrics[name] = [float(number) for number in numbers]
        for name in ("frac_reward_zero_std", "reward_std"):  # of groups of one: always 1 and 0
            metrics.pop(name, None)
        super().log(logs, start_time)

    def _sum(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "sum")


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Variance of `x` where `mask`."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def split_completion(
    ids: Sequence[int], completion_mask: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """An example's prompt and completion; without a mask, all but the first token is completion."""
    first = completion_mask.index(1) if completion_mask is not None else 1
    return list(ids[:first]), list(ids[first:])


class PromptStream(Sampler[int]):
    """Prompts for a whole run as one epoch: shuffled passes over the data, one after the other.

    The Trainer re-seeds samplers where an epoch begins, which a resumed run would do elsewhere than one
    never stopped; this stream has no such place. Each batch of prompts is repeated for as many steps as its
    rollout serves, since the loop draws one batch a step.
    """

    def __init__(self, n_prompts: int, *, batch_size: int, repeats: int, batches: int, seed: int) -> None:
        self.n_prompts, self.batch_size = n_prompts, batch_size
        self.repeats, self.batches, self.seed = repeats, batches, seed

    def __iter__(self) -> Iterator[int]:
        drawn = self._endless()
        for _ in range(self.batches):
            batch = [next(drawn) for _ in range(self.batch_size)]
            for _ in range(self.repeats):
                yield from batch

    def __len__(self) -> int:
        return self.batches * self.batch_size * self.repeats

    def _endless(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.n_prompts, generator=generator).tolist()
