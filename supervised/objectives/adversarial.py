"""Images from noise, by a generator that learns to deceive a discriminator (Goodfellow et al. 2014)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised import backbones
from supervised.config import AdversarialConfig, AdversarialRun, CriticConfig, SuperResolutionConfig
from supervised.data import DataSet
from supervised.models import make_backbone, refuse_what_follows
from supervised.objectives.base import Batch, Loss, Players, samples_in
from supervised.objectives.generative import Decoder

PENALTIES = {"wgan_gp": 10.0, "r3gan": 1.0}
"""Weights of the penalties where none is given (of wgan_gp: arXiv 1704.00028, section 4)."""


class Generator(nn.Module):
    """Images of noise; if classes can be asked for, of noise and a vector of the class beside it.

    Shapes: (batch, latent), labels (batch,) -> (batch, channels, height, width), from -1 to 1.
    """

    def __init__(self, backbone: Any, num_classes: int, embedded: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.embedding = nn.Embedding(num_classes, embedded) if num_classes else None

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None and labels is not None:
            latents = torch.cat((latents, F.normalize(self.embedding(labels)) * latents.shape[1] ** 0.5), 1)
        return self.backbone(latents)


class Critic(nn.Module):
    """How real images look, as a number each; with classes, how much like one of theirs (arXiv 1801.04406).

    Shapes: (batch, channels, height, width), labels (batch,) -> (batch,).
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        told = self.backbone(images).float()
        return told[:, 0] if labels is None else told.gather(1, labels[:, None])[:, 0]


class Adversarial(Decoder):
    """Two players: a step moves the discriminator, and each `critic_steps`-th the generator, too."""

    higher_is_better = False

    def __init__(self, settings: AdversarialRun, data: DataSet) -> None:
        super().__init__(settings, data)
        self.config = c = settings.objective
        self.headline = self.distance_name
        self.penalty = penalty_of(c)
        of_data: dict[str, Any] = {"in_chans": self.shape[0], "img_size": list(self.shape[1:])}
        backbone: Any
        backbone, self.parents = make_backbone(settings.model, ["dcgan_generator"], **of_data)
        # The vector of the class is a quarter of what an image is made of.
        embedded = backbone.latent // 4 if self.classes_made else 0
        if self.classes_made and not embedded:
            raise LabError(
                f"model.spec.latent = {backbone.latent}: a quarter of it says which class. Make it 4 or more."
            )
        self.latent = backbone.latent - embedded
        critic = make_critic(c.critic, c.loss, **of_data, num_outputs=self.classes_made or 1)
        self.players: dict[str, nn.Module] = {
            "generator": Generator(backbone, self.classes_made, embedded),
            "critic": critic,
        }

    def turns(self, step: int) -> Sequence[str]:
        generator_too = (step + 1) % self.config.critic_steps == 0
        return ("critic", "generator") if generator_too else ("critic",)

    def loss(self, player: str, batch: Batch) -> Loss:
        real = batch["inputs"].float() / 127.5 - 1
        labels = batch["labels"] if self.classes_made else None
        noise = torch.randn(samples_in(batch), self.latent, device=real.device)
        generator, critic = self.players["generator"], self.players["critic"]
        if player == "critic":
            with torch.no_grad():
                fake = generator(noise, labels)
            return critic_loss(critic, real, fake.to(real.dtype), self.config.loss, self.penalty, labels)
        fake = generator(noise, labels)
        with frozen(critic):
            value = generator_loss(critic, real, fake, self.config.loss, labels)
        return Loss(value, {"generator_loss": value.detach()})

    def decode(self, players: Players, latents: Tensor, labels: Tensor | None) -> Tensor:
        return (players["generator"](latents, labels).float() + 1) / 2

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        return self.distance(players)


def penalty_of(config: AdversarialConfig | SuperResolutionConfig) -> float:
    """The weight of the penalty on the discriminator's gradients."""
    return PENALTIES.get(config.loss, 0.0) if config.penalty is None else config.penalty


def make_critic(config: CriticConfig, loss: str, num_outputs: int = 1, **of_data: Any) -> Critic:
    """The discriminator of a config; without normalisation over the batch, where its gradient is penalised.

    Raises:
        LabError: no such backbone, arguments it does not take or that follow from the data, one number of an
            image where each class is to have one, or batch norm with such a loss.
    """
    if config.backbone not in backbones.CRITICS:
        raise LabError(
            f"objective.critic.backbone = {config.backbone!r}: does not tell one number of an image. "
            f"Use one of {', '.join(backbones.CRITICS)}."
        )
    takes, of_data = backbones.arguments(config.backbone), {**of_data, "num_outputs": num_outputs}
    refuse_what_follows(config.spec, of_data, "objective.critic.spec")
    if num_outputs > 1 and "num_outputs" not in takes:
        raise LabError(
            f"objective.critic.backbone = {config.backbone!r}: tells one number of an image, not one of each "
            "class. Use dcgan_discriminator, or leave out objective.conditional."
        )
    defaults = {"norm": None} if loss in PENALTIES and "norm" in takes else {}
    of_data = {key: value for key, value in of_data.items() if key in takes}
    backbone = backbones.build(config.backbone, **{**of_data, **defaults, **config.spec})
    if loss in PENALTIES and any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        raise LabError(
            f"objective.critic: {loss} penalises the gradient of each sample, and with batch norm a sample "
            "has none of its own. Leave out norm, or set it to group or spectral."
        )
    return Critic(backbone)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, what a module computes has no gradients for its weights, which the backward pass then skips."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, loss: str, penalty: float, labels: Tensor | None = None
) -> Loss:
    """What a discriminator has to make smaller.

    With D its numbers of real images x and generated ones y, and p the penalty's weight:
    non_saturating: softplus(-D(x)) + softplus(D(y)) (arXiv 1406.2661, equation 1, by logits);
    wgan_gp: D(y) - D(x) + p (|grad D(u)| - 1)^2, u on a line between x and y (arXiv 1704.00028, equation 3);
    r3gan: softplus(D(y) - D(x)) + p / 2 (|grad D(x)|^2 + |grad D(y)|^2) (arXiv 2501.05441, section 2).
    """
    metrics: dict[str, Tensor] = {}
    if loss == "non_saturating":  # each batch by itself: batch norms see what is alike
        of_real, of_fake = critic(real, labels), critic(fake, labels)
        value = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
    else:
        both = torch.cat((real, fake)).requires_grad_()
        told = critic(both, None if labels is None else torch.cat((labels, labels)))
        of_real, of_fake = told.chunk(2)
        if loss == "r3gan":
            squares = squared_gradients(told, both)
            # The mean over both halves, twice, is the sum of R1 and R2.
            value = F.softplus(of_fake - of_real).mean() + penalty / 2 * 2 * squares.mean()
        else:
            share = torch.rand(len(real), 1, 1, 1, device=real.device)
            between = (real + share * (fake - real)).requires_grad_()
            squares = squared_gradients(critic(between, labels), between)
            lengths = (squares + 1e-12).sqrt()  # whose slope at 0 is finite
            value = (of_fake - of_real).mean() + penalty * (lengths - 1).square().mean()
        metrics["squared_gradient"] = squares.mean()
    metrics |= {"loss": value, "critic_real": of_real.mean(), "critic_fake": of_fake.mean()}
    return Loss(value, {name: number.detach() for name, number in metrics.items()})


def generator_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, loss: str, labels: Tensor | None = None
) -> Tensor:
    """What a generator has to make smaller: the same numbers, seen from the other side.

    non_saturating: softplus(-D(y)) (arXiv 1406.2661, section 3);
    wgan_gp: -D(y);
    r3gan: softplus(D(x) - D(y)).
    """
    of_fake = critic(fake, labels)
    if loss == "wgan_gp":
        return -of_fake.mean()
    if loss == "r3gan":
        return F.softplus(critic(real, labels) - of_fake).mean()
    return F.softplus(-of_fake).mean()


def squared_gradients(told: Tensor, images: Tensor) -> Tensor:
    """(batch,): the squared length of the gradient of each number to its image, to be learned from."""
    (gradient,) = torch.autograd.grad(told.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)
