"""What can be set of the three stages: demonstrations, reward model, PPO, and what lies between.

Imports nothing heavy: a mistake in a config is reported before torch is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lab.config import require, require_within
from lab.device import DeviceConfig
from lab.tracking import TrackingConfig

STAGES = ("sft", "collect", "reward", "ppo", "eval")
SCHEDULES = ("constant", "linear", "cosine")
REWARD_LOSSES = ("pairwise", "ranking")
BAD_ROWS = ("error", "skip")
TOO_LONG = ("error", "drop", "truncate_prompt")
CHAT_TEMPLATES = ("chatml", "plain")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model the recipe starts from."""

    path: str = "labgpt"
    """A transformers folder, a model on the Hub, or labgpt: ours, from random weights."""
    labgpt: dict[str, Any] = field(default_factory=dict)
    """Arguments of LabGPT, e.g. {width: 128, n_layer: 4, n_head: 4}; for path labgpt."""
    tokenizer: str = ""
    """A folder or a name on the Hub; empty: the model's own, or with labgpt one made of the data's words."""
    chat_template: str = ""
    """For a tokenizer without one: chatml, plain (Human: and Assistant:), or a file; empty: its own."""
    eos_token: str = ""
    """The token that ends an answer; empty: what the chat template ends a turn with, or the tokenizer's."""
    lora_rank: int = 0
    """Rank of LoRA adapters in every stage; 0 trains all weights."""
    lora_alpha: int = 32
    lora_targets: list[str] | str = "all-linear"
    """Modules that get an adapter."""

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", "must name a model")
        require(
            "vocab_size" not in self.labgpt,
            "model.labgpt",
            "vocab_size follows from the tokenizer; leave it out",
        )
        require(self.lora_rank >= 0, "model.lora_rank", "must not be negative")
        require_within(self, "model.", lora_rank=(0, 2**16), lora_alpha=(1, 2**20))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data comes from: a file, hub:OWNER/NAME, or a built-in task: reviews, everyday."""

    demonstrations: str = "reviews"
    comparisons: str = "collect"
    """`collect` samples answers from the SFT model and has them ranked; else a source of comparisons."""
    prompts: str = ""
    """What PPO and collection are asked; empty: the prompts of the demonstrations."""
    eval_prompts: str = ""
    """Unseen prompts for evaluation; empty: the eval split of the prompts, or a tenth held out."""
    max_length: int = 512
    """Tokens of prompt and answer together."""
    max_new_tokens: int = 64
    """Tokens of a sampled answer."""
    bad_rows: str = "error"
    """Rows that cannot be used: `error` names all of them before anything is trained; `skip` counts them."""
    too_long: str = "error"
    """Rows with more than max_length tokens: `error`, `drop`, or `truncate_prompt` (from its beginning)."""

    def __post_init__(self) -> None:
        for key, known in (("bad_rows", BAD_ROWS), ("too_long", TOO_LONG)):
            value = getattr(self, key)
            require(value in known, f"data.{key}", f"{value!r} is none of {', '.join(known)}")
        require(
            1 <= self.max_new_tokens < self.max_length,
            "data.max_new_tokens",
            f"{self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}",
        )
        require_within(self, "data.", max_length=(2, 2**22))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every stage that trains has."""

    section: ClassVar[str]
    """The stage's name in the config."""
    _may_skip: ClassVar[bool] = False
    """Whether 0 epochs mean something."""

    epochs: float = 1.0
    batch_size: int = 32
    """Examples per optimiser step."""
    micro_batch_size: int = 0
    """Examples at once on the device; 0: batch_size."""
    learning_rate: float = 1e-5
    schedule: str = "cosine"
    """constant, linear or cosine decay."""
    warmup_steps: float = 0.0
    """Optimiser steps of warm-up; below 1, a fraction of all."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    save_every_steps: int = 100
    """Optimiser steps between checkpoints."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "learning_rate", "save_every_steps"):
            require(getattr(self, key) > 0, f"{self.section}.{key}", "must be positive")
        require(self.epochs > 0 or self._may_skip, f"{self.section}.epochs", "must be positive")
        micro = f"{self.section}.micro_batch_size"
        require(self.micro_batch_size >= 0, micro, "must be 0 (batch_size) or more")
        require(
            not self.micro_batch_size or self.batch_size % self.micro_batch_size == 0,
            micro,
            f"{self.micro_batch_size} does not divide batch_size {self.batch_size}",
        )
        require(
            self.schedule in SCHEDULES,
            f"{self.section}.schedule",
            f"{self.schedule!r} is none of {', '.join(SCHEDULES)}",
        )
        require_within(
            self,
            f"{self.section}.",
            epochs=(0, 10**6),
            batch_size=(1, 2**20),
            learning_rate=(0, 1_000),
            warmup_steps=(0, 10**9),
            weight_decay=(0, 1_000),
            max_grad_norm=(0, 10**9),
            save_every_steps=(1, 10**9),
        )

    @property
    def micro(self) -> int:
        """Examples at once."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Stage 1: supervised fine-tuning on demonstrations. 0 epochs take the model as it is."""

    section: ClassVar[str] = "sft"
    _may_skip: ClassVar[bool] = True
    packing: bool = False
    """Fill each row of max_length tokens with several examples."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Comparison data as the recipe makes it: K answers of the SFT model, ranked by a labeler."""

    labeler: dict[str, Any] = field(default_factory=lambda: {"name": "vader"})
    """Who ranks: {name: vader}, human, reward:FOLDER, judge:URL, python:MODULE:FUNCTION, with options."""
    answers: int = 4
    """K, answers per prompt (4 to 9 in InstructGPT)."""
    rounds: int = 1
    """How often each prompt is asked."""
    max_prompts: int | None = None
    """Prompts to collect for, drawn from all of them by a hash of each; null: all."""
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.answers >= 2, "collect.answers", "a comparison needs at least 2")
        require(self.rounds >= 1, "collect.rounds", "must be at least 1")
        require(
            self.max_prompts is None or self.max_prompts >= 1, "collect.max_prompts", "must be at least 1"
        )
        require(self.temperature > 0, "collect.temperature", "must be positive")
        limits: dict[str, tuple[float, float]] = {"answers": (2, 1_024), "rounds": (1, 10**4)}
        require_within(self, "collect.", **limits, max_prompts=(1, 10**9), temperature=(0, 1_000))


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Stage 2: a reward model from ranked comparisons."""

    section: ClassVar[str] = "reward"
    loss: str = "ranking"
    """ranking: all pairs of a prompt in one batch element (InstructGPT); pairwise: single pairs."""
    held_out: float = 0.1
    """Share of the prompts kept from training, to measure accuracy."""
    center_coef: float = 0.01
    """Weight of the squared mean reward (keeps rewards from drifting); 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.loss in REWARD_LOSSES, "reward.loss", f"{self.loss!r} is none of {', '.join(REWARD_LOSSES)}"
        )
        require(0 < self.held_out < 1, "reward.held_out", "is a share between 0 and 1")
        require_within(self, "reward.", center_coef=(0, 10**6))


@dataclass(frozen=True, kw_only=True)
class PPOStageConfig(TrainingConfig):
    """Stage 3: PPO against the reward model."""

    section: ClassVar[str] = "ppo"
    rollouts: int = 60
    """Rollouts in all; `epochs` passes are made over each."""
    rollout_size: int = 64
    """Answers per rollout; batch_size of them make one optimiser step."""
    critic_learning_rate: float | None = None
    """null: learning_rate."""
    kl_coef: float = 0.05
    """Weight of the per-token KL to the SFT policy in the reward."""
    kl_target: float | None = None
    """Nats a sequence that kl_coef is steered to (Ziegler et al. 2019); null: fixed."""
    kl_horizon: int = 10_000
    """Episodes over which kl_coef adapts."""
    clip: float = 0.2
    """Of the probability ratio."""
    clip_value: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    missing_eos_penalty: float | None = 1.0
    """Taken from the score of an answer that did not end."""
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    score_clip: float | None = None
    temperature: float = 1.0
    sampling_batch_size: int = 0
    """Answers sampled at once; 0: as many as fit the memory. What is sampled does not depend on it."""
    ptx_coef: float = 0.0
    """Weight of the language-model loss on the demonstrations (27.8 in InstructGPT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rollouts >= 1, "ppo.rollouts", "must be at least 1")
        require(self.sampling_batch_size >= 0, "ppo.sampling_batch_size", "must be 0 (found) or more")
        require(
            self.rollout_size % self.batch_size == 0,
            "ppo.rollout_size",
            f"{self.rollout_size} is no multiple of batch_size {self.batch_size}",
        )
        require(float(self.epochs).is_integer(), "ppo.epochs", "are whole passes over a rollout")
        require(self.temperature > 0, "ppo.temperature", "must be positive")
        require(self.kl_target is None or self.kl_target > 0, "ppo.kl_target", "must be positive, or null")
        for key in ("clip", "clip_value"):
            require(getattr(self, key) > 0, f"ppo.{key}", "must be positive")
        for key in ("kl_coef", "value_coef", "ptx_coef"):
            require(getattr(self, key) >= 0, f"ppo.{key}", "must be 0 or more")
        for key in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, key) <= 1, f"ppo.{key}", "must lie between 0 and 1")
        require_within(
            self,
            "ppo.",
            rollouts=(1, 10**9),
            rollout_size=(1, 2**20),
            critic_learning_rate=(0, 1_000),
            kl_coef=(0, 10**6),
            kl_target=(0, 10**9),
            kl_horizon=(1, 10**12),
            clip=(0, 1_000),
            clip_value=(0, 10**9),
            value_coef=(0, 10**6),
            ptx_coef=(0, 10**6),
            score_clip=(0, 10**9),
            temperature=(0, 1_000),
        )


@dataclass(frozen=True, kw_only=True)
class EvalStageConfig:
    """Evaluation: the policy against the SFT policy on unseen prompts."""

    labeler: dict[str, Any] = field(default_factory=dict)
    """Who evaluates, named as in collect.labeler; empty: whoever collected. {name: none}: no win rate."""
    prompts: int = 20
    """Unseen prompts at most, drawn from all of them by a hash of each."""
    samples: int = 15
    """Answers per prompt."""
    best_of: int = 4
    """Also compare with the reward model's best of so many SFT answers; 0 leaves it out."""

    def __post_init__(self) -> None:
        for key in ("prompts", "samples"):
            require(getattr(self, key) >= 1, f"eval.{key}", "must be at least 1")
        require(self.best_of == 0 or self.best_of >= 2, "eval.best_of", "must be 0 or at least 2")
        require_within(self, "eval.", prompts=(1, 10**9), samples=(1, 10**4), best_of=(0, 1_024))


@dataclass(frozen=True, kw_only=True)
class RLHFRun:
    """The three stages of the ChatGPT recipe (Ouyang et al. 2022) in one config."""

    pipeline: str = "rlhf"
    name: str | None = None
    """Name of the run and, unless --out says otherwise, of its folder below runs/."""
    seed: int = 0
    start_from: str = ""
    """Another recipe's folder: its sft, collect and reward are taken wherever config and data are the same.
    siblings: of any recipe in the folder that this one is in, as the runs of a sweep are."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOStageConfig = field(default_factory=lambda: PPOStageConfig(epochs=4))
    eval: EvalStageConfig = field(default_factory=EvalStageConfig)
    keep_checkpoints: int = 2
    """Newest checkpoints of a stage that stay until it is finished; then all of them go."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", f"{self.seed} must be between 0 and 2^31 - 1")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", "must be at least 1")
        require_within(self, "", keep_checkpoints=(1, 10**6))
        require(
            not (self.model.lora_rank and self.ppo.gradient_checkpointing),
            "ppo.gradient_checkpointing",
            "with LoRA, policy and critic share one base, whose activations would be computed again under "
            "the wrong adapter. Set it to false, or make ppo.micro_batch_size smaller",
        )

    @property
    def run_name(self) -> str:
        """`name`, or {task}__ppo__s{seed}."""
        task = self.data.demonstrations.rstrip("/").rpartition("/")[2].partition(".")[0]
        return self.name or f"{task}__ppo__s{self.seed}"
