"""One measurement of PPO, made in a process of its own: `python -m benchmarks.ppo_jobs JOB.json RESULT.json`.

`benchmarks.ppo_vs_trl` starts these: ours with our Python, the peer's with that of a virtual environment with
TRL 1.12, the last that has a PPOTrainer. Both get the same folders, prompts and settings, by the same names.
"""

import gc
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.dqn_jobs import peak_rss_bytes
from benchmarks.stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process trains and measures."""

    side: str = "ours"
    """ours or trl."""
    policy: str
    """Folder of the language model, policy and reference."""
    reward: str
    """Folder of a stock sequence classifier with one label; the critic starts from it, too."""
    prompts: list[Any]
    """Texts, or conversations for the tokenizer's chat template."""
    answer_tokens: int
    """Of an answer at most."""
    fixed_length: bool = False
    """No end token ends an answer, so that both sides compute as many tokens. Else TRL's samples and computes
    on to the limit and ignores what stands behind the end; ours stops there."""
    rollout: int
    """Answers per update."""
    mini_batches: int = 1
    """Optimiser steps per epoch."""
    micro_batch: int = 0
    """Answers computed at once, on our side, which sorts them by length; 0: a mini-batch. With fewer than a
    mini-batch TRL's takes one step an epoch however many mini-batches there are, so it gets all at once."""
    epochs: int
    learning_rate: float
    kl_coef: float
    updates: int
    """Those measured."""
    warmup: int = 1
    """Updates before."""
    precision: str = "fp32"
    """Of our side; TRL's computes in fp32 here."""
    lora_rank: int = 0
    """Of the policy's adapters, on our side of all roles'; 0 trains all weights."""
    lora_alpha: int = 32
    threads: int = 1
    """Of torch."""
    seed: int = 0


@dataclass
class Course:
    """What is seen of a training: when updates ended, and what their answers scored."""

    job: Job
    watch: Stopwatch = field(default_factory=Stopwatch)
    ends: list[tuple[float, float]] = field(default_factory=list)
    """Seconds on the wall clock and of processor time."""
    logs: list[dict[str, float]] = field(default_factory=list)

    def follow(self, trainer: Any, steps_per_update: int) -> None:
        """Has the trainer report to this."""
        from transformers import PrinterCallback, TrainerCallback

        def on_step_end(state: Any) -> None:
            if state.global_step % steps_per_update == 0:
                self.ends.append((time.perf_counter(), time.process_time()))
                if len(self.ends) == self.job.warmup:
                    self.watch.__enter__()
                elif len(self.ends) == self.job.warmup + self.job.updates:
                    self.watch.__exit__()

        class Reporter(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                on_step_end(state)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "objective/scores" in logs:
                    course.logs.append(logs)

        course = self
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Reporter())

    def result(self, trainable_parameters: int) -> dict[str, Any]:
        """For JSON."""
        wall, processor = (
            [end - begin for begin, end in itertools.pairwise(clock)]
            for clock in zip(*self.ends[self.job.warmup - 1 :], strict=True)
        )
        return {
            "seconds_per_update": wall,
            "cpu_seconds_per_update": processor,
            "parts": self.watch.report(self.job.updates),
            "peak_rss_bytes": peak_rss_bytes(),
            "scores": [row["objective/scores"] for row in self.logs],
            "kl": [row["objective/kl"] for row in self.logs],
            "trainable_parameters": trainable_parameters,
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        }


def settings(job: Job, folder: str) -> dict[str, Any]:
    """Arguments of both sides' `PPOConfig`."""
    return {
        "output_dir": folder,
        "num_ppo_epochs": job.epochs,
        "num_mini_batches": job.mini_batches,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_epsilon": 1e-5,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,  # TRL's PPO does not clip, whatever is set
        "kl_coef": job.kl_coef,
        "cliprange": 0.2,
        "cliprange_value": 10.0,
        "vf_coef": 0.5,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "temperature": 1.0,
        "missing_eos_penalty": None if job.fixed_length else 1.0,
        "gradient_checkpointing": False,
        "bf16": job.precision == "bf16",
        "use_cpu": True,
        "seed": job.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def ours(job: Job, course: Course, folder: str) -> Any:
    """A `rlhf.ppo.PPOTrainer`; with `lora_rank` all roles share the policy's weights."""
    from datasets import Dataset

    from rlhf import models
    from rlhf.config import ModelConfig
    from rlhf.policy_optimization import RewardOfIds
    from rlhf.ppo import PPOConfig, PPOTrainer
    from rlhf.roles import AdapterClassifier
    from rlhf.scoring import RewardScorer
    from rlhf.sft import lora

    reward, batch = Path(job.reward), job.rollout // job.mini_batches
    micro = job.micro_batch or batch
    common = settings(job, folder)
    common["gradient_accumulation_steps"] = batch // micro
    policy, tokenizer = models.open_policy(Path(job.policy))

    def scorer(model: Any) -> RewardScorer:
        return RewardScorer(model, tokenizer, shift=0.0, scale=1.0)  # TRL's side knows neither

    def shared_critic(owner: Any) -> Any:
        judge, critic = (AdapterClassifier(owner, name, reward) for name in ("reward", "critic"))
        judge.set_trainable(False)
        critic.set_trainable(True)
        score.scorer = scorer(judge)
        return critic

    unknown: Any = None  # until there is a policy to share
    score = RewardOfIds(unknown if job.lora_rank else scorer(models.open_reward(reward)[0]), micro)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=score,
        args=PPOConfig(
            **common,
            num_rollouts=job.warmup + job.updates,
            per_device_train_batch_size=micro,
            max_completion_length=job.answer_tokens,
            top_k=0,
            disable_dropout=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job.prompts]),
        processing_class=tokenizer,
        peft_config=lora(
            ModelConfig(lora_rank=job.lora_rank, lora_alpha=job.lora_alpha), "CAUSAL_LM", policy
        ),
        critic=shared_critic if job.lora_rank else models.open_reward(reward)[0],
    )
    if job.fixed_length:
        trainer.eos_token_ids = [-1]  # none
    course.watch.wrap(trainer, "_generate", "sample")
    for name in ("_calculate_rewards", "_in_parts", "_compute_loss"):
        course.watch.wrap(trainer, name, "forward")
    course.follow(trainer, job.epochs * job.mini_batches)
    return trainer


def trl(job: Job, course: Course, folder: str) -> Any:
    """TRL 1.12's `PPOTrainer`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

    tokenizer = AutoTokenizer.from_pretrained(job.policy, padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job.policy) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(job.reward) for _ in range(2))
    ids = [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in job.prompts
    ]
    trainer = PPOTrainer(
        args=PPOConfig(
            **settings(job, folder),
            total_episodes=(job.warmup + job.updates) * job.rollout,
            per_device_train_batch_size=job.rollout,
            local_rollout_forward_batch_size=job.rollout,
            response_length=job.answer_tokens,
            num_sample_generations=0,
            stop_token=None if job.fixed_length else "eos",
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
    )
    course.watch.wrap(ppo_trainer, "batch_generation", "sample")
    for name in ("get_reward", "forward"):
        course.watch.wrap(ppo_trainer, name, "forward")
    course.follow(trainer, 1)
    return trainer


def measure(job: Job) -> dict[str, Any]:
    """Trains and says how fast, in how much memory, and to which scores."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    if job.side == "ours":
        torch.set_flush_denormal(True)  # as `lab` does
    course = Course(job)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(job.seed)
        course.watch.wrap(torch.optim.Adam, "step", "optimizer")
        course.watch.wrap(gc, "collect", "garbage collection")
        trainer = {"ours": ours, "trl": trl}[job.side](job, course, folder)
        course.watch.wrap(trainer.accelerator, "backward", "backward")
        trainer.train()
        models = (trainer.model, *([trainer.critic_model] if job.side == "ours" else []))
        trained = {p for model in models for p in model.parameters() if p.requires_grad}
    return course.result(sum(p.numel() for p in trained))


def main(job_file: str, result_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    Path(result_file).write_text(json.dumps(measure(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
