"""What can be set of a supervised run. Imports nothing heavy: mistakes are found before torch is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.config import require
from lab.device import DeviceConfig
from lab.errors import LabError, did_you_mean
from lab.tracking import TrackingConfig
from supervised.data.config import DataConfig, require_at_most

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    backbone: str
    """One of `lab list backbones`."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The backbone's own arguments, e.g. {width: 256}; what follows from the data is left out."""
    dropout: float = 0.0
    """In front of the last layer."""
    start_from: str | None = None
    """A finished run whose backbone's weights this one begins with."""
    adapt: str = "full"
    """What of the backbone learns: full, lora (adapters beside frozen weights, arXiv 2106.09685) or probe
    (nothing: only the head does)."""
    lora_rank: int = 8

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "model.dropout", f"{self.dropout} must be at least 0 and below 1")
        require(
            self.adapt in ("full", "lora", "probe"),
            "model.adapt",
            f"{self.adapt!r} is none of full, lora, probe",
        )
        require(self.lora_rank >= 1, "model.lora_rank", "must be at least 1")
        require_at_most(self, "model", lora_rank=65_536)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights move."""

    name: str = "adamw"
    """adamw, adam, or sgd (plain gradient descent without momentum)."""
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    """Of the learning rate after the warm-up: constant, linear or cosine, to `final_share` of it."""
    warmup_steps: int = 0
    final_share: float = 0.0
    weight_decay: float = 0.0
    """Not on biases, norms and other vectors."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    momentum: float = 0.0
    """Of sgd."""
    max_grad_norm: float | None = None
    """Clip the gradient's norm to this; null for no clipping."""

    def __post_init__(self) -> None:
        for key, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, key)
            require(value in known, f"optimizer.{key}", f"{value!r} is none of {', '.join(known)}")
        require(self.learning_rate > 0, "optimizer.learning_rate", f"{self.learning_rate} must be positive")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", "must not be negative")
        require(0 <= self.final_share <= 1, "optimizer.final_share", f"{self.final_share} must lie in 0 to 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", "must not be negative")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            f"{self.betas} must be two numbers of at least 0 and below 1",
        )
        require(self.eps > 0, "optimizer.eps", "must be positive")
        require(
            0 <= self.momentum < 1, "optimizer.momentum", f"{self.momentum} must be at least 0 and below 1"
        )
        require(
            self.name == "sgd" or not self.momentum,
            "optimizer.momentum",
            f"{self.momentum} is for sgd, not {self.name}: leave it out",
        )
        require(
            self.name != "sgd" or self.betas == [0.9, 0.999],
            "optimizer.betas",
            f"{self.betas} are for adam and adamw, not sgd: leave them out",
        )
        require_at_most(self, "optimizer", warmup_steps=10**9, weight_decay=1e3, eps=1.0)
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "optimizer.max_grad_norm",
            "must be positive, or null for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data, with the averaged weights if there are any."""

    every_epochs: float = 1.0
    """Epochs between evaluations; the last one is always made."""
    batch_size: int = 0
    """0: as in training."""
    stop_at: float | None = None
    """Finish once the objective's headline number is this good; null trains to the end."""
    patience: int | None = None
    """Finish after so many evaluations without a better one; null: never."""

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "eval.every_epochs", "must be positive")
        require(self.batch_size >= 0, "eval.batch_size", "must be 0 (as in training) or more")
        require(self.patience is None or self.patience >= 1, "eval.patience", "must be at least 1, or null")
        require_at_most(self, "eval", every_epochs=1e9, batch_size=2**31, patience=10**9)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often to save, and how much to keep."""

    every_epochs: float = 1.0
    """Epochs between checkpoints; the last one is always made."""
    keep: int = 2
    """Newest checkpoints that stay; the best by evaluation stays besides."""

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "checkpoint.every_epochs", "must be positive")
        require(self.keep >= 1, "checkpoint.keep", "must be at least 1")
        require_at_most(self, "checkpoint", every_epochs=1e9, keep=10**6)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What every learning problem has; the rest stands beside its objective."""

    name: str
    """One of `lab list objectives`."""


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """One training run on a data set."""

    objective: ObjectiveConfig
    data: DataConfig
    model: ModelConfig
    pipeline: str = "supervised"
    name: str | None = None
    """Name of the run and, unless --out says otherwise, of its folder below runs/."""
    seed: int = 0
    epochs: float = 10.0
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimiser steps at most; null: as many as the epochs have."""
    batch_size: int = 128
    """Samples an optimiser step learns from; 0: all there are (plain gradient descent)."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to fit into memory."""
    ema_decay: float = 0.0
    """Of the running average of the weights that is evaluated and kept; 0: none."""
    compile: bool = False
    """torch.compile: half a minute at the start, for long runs on a GPU."""
    log_every_steps: int = 50
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", f"{self.seed} must be between 0 and 2^31 - 1")
        require(self.epochs > 0, "epochs", f"{self.epochs} must be positive")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", "must be at least 1, or null")
        require(self.batch_size >= 0, "batch_size", "must be 0 (all) or more")
        require(self.accumulate >= 1, "accumulate", "must be at least 1")
        require(
            self.accumulate <= self.batch_size or not self.batch_size or self.data.batch_tokens > 0,
            "accumulate",
            f"{self.accumulate} parts cannot be made of a batch_size of {self.batch_size}",
        )
        require(0 <= self.ema_decay < 1, "ema_decay", f"{self.ema_decay} must be at least 0 and below 1")
        require(self.log_every_steps >= 1, "log_every_steps", "must be at least 1")
        require_at_most(
            self,
            "",
            epochs=1e9,
            max_steps=10**12,
            batch_size=2**31,
            accumulate=2**20,
            log_every_steps=10**9,
        )

    @property
    def run_name(self) -> str:
        """`name`, or {data}__{backbone}__s{seed}."""
        return self.name or f"{self.data.source.split('/')[-1]}__{self.model.backbone}__s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(ObjectiveConfig):
    """Which class an image, a row of a table or a sequence is of."""

    name: str = "classification"
    label_smoothing: float = 0.0
    aux_weight: float = 0.3
    """Of the auxiliary classifiers' losses, where the backbone has any (GoogLeNet, section 5: 0.3)."""
    rows: bool = False
    """Give the rows of an image to the backbone one after the other, as a sequence."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(
            0 <= smoothing < 1, "objective.label_smoothing", f"{smoothing} must be at least 0 and below 1"
        )
        require(self.aux_weight >= 0, "objective.aux_weight", "must not be negative")
        require_at_most(self, "objective", aux_weight=1e6)


@dataclass(frozen=True, kw_only=True)
class ClassificationRun(SupervisedRun):
    """A run of classification."""

    objective: ClassificationConfig = field(default_factory=ClassificationConfig)


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(ObjectiveConfig):
    """Numbers from numbers, by least squares."""

    name: str = "regression"


@dataclass(frozen=True, kw_only=True)
class RegressionRun(SupervisedRun):
    """A run of regression."""

    objective: RegressionConfig = field(default_factory=RegressionConfig)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(ObjectiveConfig):
    """The next token of a text."""

    name: str = "language_model"


@dataclass(frozen=True, kw_only=True)
class LanguageModelRun(SupervisedRun):
    """A run of language modelling."""

    objective: LanguageModelConfig = field(default_factory=LanguageModelConfig)


@dataclass(frozen=True, kw_only=True)
class TranslationConfig(ObjectiveConfig):
    """A sentence in another language."""

    name: str = "translation"
    label_smoothing: float = 0.1
    """Vaswani et al. 2017, section 5.4: 0.1."""
    beam: int = 1
    """Translations looked at side by side in evaluations; 1: always the likeliest token."""
    length_penalty: float = 0.6
    """Exponent by which longer translations are favoured (arXiv 1609.08144, equation 14)."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require(
            0 <= smoothing < 1, "objective.label_smoothing", f"{smoothing} must be at least 0 and below 1"
        )
        require(self.beam >= 1, "objective.beam", "must be at least 1")
        require(self.length_penalty >= 0, "objective.length_penalty", "must not be negative")
        require_at_most(self, "objective", beam=1000, length_penalty=100)


@dataclass(frozen=True, kw_only=True)
class TranslationRun(SupervisedRun):
    """A run of translation."""

    objective: TranslationConfig = field(default_factory=TranslationConfig)


@dataclass(frozen=True, kw_only=True)
class TextTaskConfig(ObjectiveConfig):
    """A question about texts, in the four forms of Radford et al. 2018 (GPT-1), figure 1."""

    name: str = "text_task"
    language_model_weight: float = 0.0
    """Of the language-model loss beside the task's (section 3.2; there 0.5)."""

    def __post_init__(self) -> None:
        require(self.language_model_weight >= 0, "objective.language_model_weight", "must not be negative")
        require_at_most(self, "objective", language_model_weight=1e6)


@dataclass(frozen=True, kw_only=True)
class TextTaskRun(SupervisedRun):
    """A run of fine-tuning on a task."""

    objective: TextTaskConfig = field(default_factory=TextTaskConfig)


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig(ObjectiveConfig):
    """What all have in common that make images, and how these are judged."""

    samples: int = 5000
    """Generated images that are compared with as many real ones."""
    judge: str | None = None
    """A finished run of classification whose features tell how far generated images are from real ones; null:
    the pixels themselves do."""
    conditional: bool = False
    """Learn samples of each class, by the labels of the data."""

    def __post_init__(self) -> None:
        require(self.samples >= 2, "objective.samples", "must be at least 2")
        require_at_most(self, "objective", samples=10**7)


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(GenerativeConfig):
    """Samples out of noise: diffusion, or flow matching."""

    name: str = "denoising"
    process: str = "diffusion"
    """diffusion (Ho et al. 2020), or flow_matching (straight lines, Liu et al. 2022)."""
    n_steps: int = 1000
    """Of diffusion; of flow matching those of the diffusion its bound is computed on."""
    schedule: str = "linear"
    """How fast diffusion's noise grows: linear, or cosine (Nichol and Dhariwal 2021)."""
    predicts: str = "epsilon"
    """What diffusion's network says: epsilon (the noise), v, or x0."""
    weighting: str = "simple"
    """Of diffusion's loss over the steps: simple (all alike), or min_snr (Hang et al. 2023, gamma 5)."""
    variance: str = "large"
    """Of diffusion's steps back: large (as forward) or small (as the posterior's)."""
    label_dropout: float = 0.1
    """Share of samples whose class is not told, so that it can be guided (Ho and Salimans 2022)."""
    guidance: float = 1.0
    """How far samples go in the direction of their class: 1 is conditional, more is more typical."""
    sampling_steps: int = 0
    """From noise to samples; 0: as many as `n_steps`."""
    eta: float = 1.0
    """Share of noise put on again in diffusion's steps back; 0: DDIM's, which can do with 50 steps."""
    solver: str = "euler"
    """Of flow matching: euler, or heun with two evaluations a step."""
    bound_samples: int = 256
    """Held-out samples whose likelihood is bounded in an evaluation."""
    bound_steps: int = 20
    """Steps of the bound that are computed for each of them; the others are estimated from these."""
    judged_samples: int = 100
    """So many, of all classes together, are shown to `judge` in every evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "process": ("diffusion", "flow_matching"),
            "schedule": ("linear", "cosine"),
            "predicts": ("epsilon", "v", "x0"),
            "weighting": ("simple", "min_snr"),
            "variance": ("large", "small"),
            "solver": ("euler", "heun"),
        }
        for key, values in known.items():
            value = getattr(self, key)
            require(value in values, f"objective.{key}", f"{value!r} is none of {', '.join(values)}")
        for key, least in {"n_steps": 2, "bound_samples": 1, "bound_steps": 1, "judged_samples": 1}.items():
            require(getattr(self, key) >= least, f"objective.{key}", f"must be at least {least}")
        require_at_most(
            self,
            "objective",
            n_steps=10**6,
            sampling_steps=10**6,
            bound_samples=10**7,
            bound_steps=10**6,
            judged_samples=10**7,
            guidance=1e4,
        )
        steps = self.sampling_steps
        require(steps >= 0, "objective.sampling_steps", "must be 0 (as many as n_steps) or more")
        for key in ("label_dropout", "eta"):
            require(0 <= getattr(self, key) <= 1, f"objective.{key}", "must lie in 0 to 1")
        require(self.guidance >= 0, "objective.guidance", f"{self.guidance} must not be negative")
        require(
            self.guidance == 1 or (self.conditional and self.label_dropout > 0),
            "objective.guidance",
            "needs objective.conditional, and label_dropout above 0",
        )
        flow = self.process == "flow_matching"
        for key in ("solver",) if not flow else ("schedule", "predicts", "weighting", "variance", "eta"):
            if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                other = "diffusion" if flow else "flow_matching"
                require(False, f"objective.{key}", f"is of {other}, and the process is {self.process}")


@dataclass(frozen=True, kw_only=True)
class DenoisingRun(SupervisedRun):
    """A run of denoising."""

    objective: DenoisingConfig = field(default_factory=DenoisingConfig)


ADVERSARIAL_LOSSES = ("non_saturating", "wgan_gp", "r3gan")


def _check_adversarial(loss: str, penalty: float | None) -> None:
    known = ", ".join(ADVERSARIAL_LOSSES)
    require(loss in ADVERSARIAL_LOSSES, "objective.loss", f"{loss!r} is none of {known}")
    require(
        penalty is None or 0 <= penalty <= 1e6, "objective.penalty", "must not be negative, nor above 1e6"
    )
    require(
        penalty is None or loss != "non_saturating",
        "objective.penalty",
        "is of wgan_gp and r3gan; non_saturating has none",
    )


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The network a generator learns from."""

    backbone: str
    """One of `lab list backbones` that tells one number of an image."""
    spec: dict[str, Any] = field(default_factory=dict)
    """The backbone's own arguments."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(GenerativeConfig):
    """Images from noise, by a generator that learns to deceive a discriminator (arXiv 1406.2661)."""

    name: str = "adversarial"
    loss: str = "r3gan"
    """non_saturating (arXiv 1406.2661, section 3), wgan_gp (arXiv 1704.00028) or r3gan (arXiv 2501.05441)."""
    penalty: float | None = None
    """Of the discriminator's gradients: lambda of wgan_gp (null: 10), gamma of r3gan (null: 1);
    non_saturating has none."""
    critic_steps: int = 1
    """Of the discriminator for each of the generator; wgan_gp: 5."""
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(backbone="dcgan_discriminator"))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_adversarial(self.loss, self.penalty)
        require(self.critic_steps >= 1, "objective.critic_steps", "must be at least 1")
        require_at_most(self, "objective", critic_steps=10**6)


@dataclass(frozen=True, kw_only=True)
class AdversarialRun(SupervisedRun):
    """A run of a generator and a discriminator."""

    objective: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(GenerativeConfig):
    """Images from noise that a likelihood says something of."""

    temperature: float = 1.0
    """Standard deviation of the noise that images are made from (arXiv 1807.03039: 0.7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "objective.temperature", "must be positive")
        require_at_most(self, "objective", temperature=1e4)


@dataclass(frozen=True, kw_only=True)
class VariationalConfig(LikelihoodConfig):
    """Images from noise, by a bound on their likelihood (arXiv 1312.6114)."""

    name: str = "variational"
    beta: float = 1.0
    """Weight of the divergence from the prior; other than 1, what is trained on is no bound (it is judged by
    the bound all the same)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "objective.beta", "must be positive")
        require_at_most(self, "objective", beta=1e6)


@dataclass(frozen=True, kw_only=True)
class VariationalRun(SupervisedRun):
    """A run of a variational autoencoder."""

    objective: VariationalConfig = field(default_factory=VariationalConfig)


@dataclass(frozen=True, kw_only=True)
class FlowConfig(LikelihoodConfig):
    """Images from noise, by their exact likelihood."""

    name: str = "flow"


@dataclass(frozen=True, kw_only=True)
class FlowRun(SupervisedRun):
    """A run of a normalizing flow."""

    objective: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True, kw_only=True)
class AutoencodingConfig(ObjectiveConfig):
    """What an image was, from a corrupted one, by way of a backbone's features: without labels."""

    name: str = "autoencoding"
    noise: float = 0.02
    """Standard deviation of the noise that is put on pixels of 0..1."""
    mask: float = 0.1
    """Share of each image, of each frame on its own, that is wiped out."""
    patch: int = 4
    """Side of the squares that are wiped out, pixels."""
    frames: int = 4
    """Of play, which follow each other, that the backbone sees: as many as an agent."""
    foretell: int = 0
    """So many frames behind them are not shown but to be foretold."""
    decoder_width: int = 16
    """Channels of the decoder's last stage but one; each stage before has twice as many."""
    least_std: float = 0.01
    """A pixel's error is in units of its own standard deviation over the data, or in this one if that is
    smaller: 1 would be plain pixels, for which what is small does not count."""

    def __post_init__(self) -> None:
        require(self.noise >= 0, "objective.noise", f"{self.noise} must not be negative")
        require(0 <= self.mask < 1, "objective.mask", f"{self.mask} must be at least 0 and below 1")
        require(self.patch >= 1, "objective.patch", f"{self.patch} must be at least 1")
        require(self.frames >= 1, "objective.frames", f"{self.frames} must be at least 1")
        require(self.foretell >= 0, "objective.foretell", f"{self.foretell} must not be negative")
        require(self.decoder_width >= 1, "objective.decoder_width", "must be at least 1")
        require(self.least_std > 0, "objective.least_std", f"{self.least_std} must be positive")
        require_at_most(
            self,
            "objective",
            noise=1e3,
            patch=65_536,
            frames=10**4,
            foretell=10**4,
            decoder_width=65_536,
            least_std=1e3,
        )


@dataclass(frozen=True, kw_only=True)
class AutoencodingRun(SupervisedRun):
    """A run of autoencoding."""

    objective: AutoencodingConfig = field(default_factory=AutoencodingConfig)


PIXEL_LOSSES = ("l1", "mse")


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(ObjectiveConfig):
    """Images of more pixels from images of few (arXiv 1609.04802): by the pixels alone, or, from there on,
    also by features and by a discriminator."""

    name: str = "super_resolution"
    patch: int = 96
    """Side of the pieces that are learned from, pixels of the larger image."""
    residual: bool = False
    """Learn what bicubic interpolation misses (arXiv 1511.04587, section 3.2) instead of all of the image."""
    pixel_loss: str = "l1"
    """Mean absolute (l1) or squared (mse) error."""
    pixel_weight: float = 1.0
    perceptual_weight: float = 0.0
    """Of the squared error of features of the classifier that `judge` names."""
    judge: str | None = None
    """A finished run of classification on photographs."""
    adversarial_weight: float = 0.0
    """Of the discriminator's verdict (section 2.2: 0.001); 0: there is none."""
    loss: str = "non_saturating"
    """Of generator and discriminator: non_saturating, wgan_gp or r3gan, as `adversarial` has them."""
    penalty: float | None = None
    """As `adversarial` has it."""
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(backbone="srgan_discriminator"))

    def __post_init__(self) -> None:
        known = ", ".join(PIXEL_LOSSES)
        require(
            self.pixel_loss in PIXEL_LOSSES, "objective.pixel_loss", f"{self.pixel_loss!r} is none of {known}"
        )
        for key in ("pixel_weight", "perceptual_weight", "adversarial_weight"):
            require(getattr(self, key) >= 0, f"objective.{key}", "must not be negative")
        require(self.patch >= 1, "objective.patch", "must be at least 1")
        require_at_most(
            self,
            "objective",
            patch=65_536,
            pixel_weight=1e6,
            perceptual_weight=1e6,
            adversarial_weight=1e6,
        )
        require(
            self.pixel_weight + self.perceptual_weight > 0,
            "objective.pixel_weight",
            "must be above 0 where perceptual_weight is 0",
        )
        require(
            bool(self.perceptual_weight) == (self.judge is not None),
            "objective.judge",
            "and perceptual_weight must be set together",
        )
        _check_adversarial(self.loss, self.penalty)


@dataclass(frozen=True, kw_only=True)
class SuperResolutionRun(SupervisedRun):
    """A run of super-resolution."""

    objective: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(ClassificationConfig):
    """Whether an image is real, or made by the generator of another run."""

    name: str = "detection"
    generator: str
    """The run."""
    samples: int = 5000
    """Images of each kind to learn from, and of each kind to be judged by; at most as many as there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples >= 2, "objective.samples", "must be at least 2")
        require_at_most(self, "objective", samples=10**7)


@dataclass(frozen=True, kw_only=True)
class DetectionRun(ClassificationRun):
    """A run of detection."""

    objective: DetectionConfig  # pyright: ignore[reportGeneralTypeIssues]


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig(ObjectiveConfig):
    """The next frame of a game, from those before and the actions (DIAMOND, arXiv 2405.12399)."""

    name: str = "world_model"
    context: int = 4
    """Frames that are seen, each with the action taken there."""
    patch: int = 2
    """Side of the squares of pixels that the network sees as channels of one: 2 costs a quarter of 1."""
    start: str = "frame"
    """Where the way to the next frame begins: frame (the last one) or noise."""
    start_noise: float = 0.0
    """Standard deviation of noise on that frame, whose pixels are -1 to 1."""
    sampling_steps: int = 1
    """Of the way to a frame."""
    first_share: float = 0.5
    """Share of samples that are learned at the beginning of the way; the others' times are even."""
    motion_weight: float = 0.0
    """What pixels near those that moved in the past frames count beside all: there are few, but they are the
    game."""
    context_noise: float = 0.0
    """Standard deviation, at most, of noise on the past frames while learning (DIAMOND's conditioning
    augmentation), so that dreams do not drift."""
    own_frames: int = 0
    """Of the past frames while learning, so many are the network's own: likewise."""
    own_share: float = 0.5
    """Of the batch in which they are; each frame costs a third of a step on such samples."""
    rollout: int = 15
    """Frames dreamed in a row to judge it."""

    def __post_init__(self) -> None:
        require(
            self.start in ("frame", "noise"), "objective.start", f"{self.start!r} is none of frame, noise"
        )
        for key in ("context", "patch", "sampling_steps", "rollout"):
            require(getattr(self, key) >= 1, f"objective.{key}", "must be at least 1")
        for key in ("start_noise", "motion_weight", "context_noise", "own_frames"):
            require(getattr(self, key) >= 0, f"objective.{key}", "must not be negative")
        require_at_most(
            self,
            "objective",
            context=10**4,
            patch=1024,
            sampling_steps=10**4,
            rollout=10**5,
            start_noise=1e3,
            motion_weight=1e6,
            context_noise=1e3,
            own_frames=10**4,
        )
        for key in ("first_share", "own_share"):
            require(0 <= getattr(self, key) <= 1, f"objective.{key}", "must lie in 0 to 1")
        require(
            self.start == "frame" or not self.start_noise,
            "objective.start_noise",
            "is of start: frame; noise begins with nothing else",
        )

    @property
    def noise(self) -> float | None:
        """As `supervised.dreaming.start_of` takes it."""
        return None if self.start == "noise" else self.start_noise


@dataclass(frozen=True, kw_only=True)
class WorldModelRun(SupervisedRun):
    """A run of a world model."""

    objective: WorldModelConfig = field(default_factory=WorldModelConfig)


_RUNS: dict[str, type[SupervisedRun]] = {
    "adversarial": AdversarialRun,
    "autoencoding": AutoencodingRun,
    "classification": ClassificationRun,
    "denoising": DenoisingRun,
    "detection": DetectionRun,
    "flow": FlowRun,
    "language_model": LanguageModelRun,
    "regression": RegressionRun,
    "super_resolution": SuperResolutionRun,
    "text_task": TextTaskRun,
    "translation": TranslationRun,
    "variational": VariationalRun,
    "world_model": WorldModelRun,
}


def objectives() -> list[str]:
    """The values of objective.name."""
    return sorted(_RUNS)


def run_config_class(values: Mapping[str, Any], source_of: Callable[[str], str]) -> type[SupervisedRun]:
    """The config class for these values, which `objective.name` decides.

    Args:
        values: the raw config.
        source_of: where a dotted key was set, for errors.

    Raises:
        LabError: no such objective.
    """
    objective = values.get("objective")
    name = objective.get("name") if isinstance(objective, Mapping) else None
    if not isinstance(name, str) or name not in _RUNS:
        raise LabError(
            f"{source_of('objective.name')}: objective.name = {name!r}: no such objective."
            f"{did_you_mean(str(name), _RUNS)} Known: {', '.join(objectives())}."
        )
    return _RUNS[name]
