"""Images from noise, by their likelihood: a bound on it (variational autoencoder), or exactly (flow)."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.device import autocast
from supervised import detection, figures
from supervised.backbones.flow import log_density
from supervised.backbones.vae import bits_per_dimension, log_likelihood_of_bytes
from supervised.config import FlowRun, VariationalRun
from supervised.data import DataSet
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Players, samples_in
from supervised.objectives.generative import Decoder, to_bytes

FIRST_BATCH = 256
RECONSTRUCTED = 10


class Modelled(nn.Module):
    """A backbone that is the whole model."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs: Tensor) -> Any:
        return self.backbone(*inputs)


class _Likelihood(Decoder):
    """Judged by the bits a number of a held-out image costs."""

    headline = "bits_per_dim"
    higher_is_better = False

    def _make(self, name: str) -> Any:
        """The backbone, which becomes the only player."""
        of_data: dict[str, Any] = {"in_chans": self.shape[0], "img_size": list(self.shape[1:])}
        of_data["num_classes"] = self.classes_made
        backbone, self.parents = make_backbone(self.settings.model, [name], **of_data)
        self.players = {"model": Modelled(backbone)}
        self.latent = int(backbone.num_features)  # type: ignore[arg-type]
        return backbone

    def _labels_of(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the model is given of them."""
        return (batch["labels"],) if self.classes_made else ()

    def _bits(self, nats: Tensor) -> Tensor:
        return bits_per_dimension(1.0, self.shape) * nats


class Variational(_Likelihood):
    """A lower bound on the likelihood, the ELBO (arXiv 1312.6114, equation 3), from one draw an image."""

    def __init__(self, settings: VariationalRun, data: DataSet) -> None:
        super().__init__(settings, data)
        self.config = settings.objective
        self._make("vae")

    def _parts(self, model: nn.Module, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Nats, (batch,) each: what is lost of an image, and what its code tells beyond the prior."""
        images = batch["inputs"]
        told, *pixels = model(images.float() / 255, noise.to(images.device), *self._labels_of(batch))
        return -log_likelihood_of_bytes(images, *pixels).flatten(1).sum(1), told

    def loss(self, player: str, batch: Batch) -> Loss:
        noise = torch.randn(samples_in(batch), self.latent, device=batch["inputs"].device)
        lost, told = (nats.mean() for nats in self._parts(self.players[player], batch, noise))
        bits = self._bits(lost + told).detach()
        metrics = {"loss": (lost + told).detach(), "bits_per_dim": bits, "kl_nats": told.detach()}
        return Loss(lost + self.config.beta * told, metrics)

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        sums, n = torch.zeros(2, dtype=torch.float64), 0
        for number, batch in enumerate(batches):
            n_images = samples_in(batch)
            parts = torch.stack(self._parts(players["model"], batch, self.noise(n_images, seed=number)))
            sums, n = sums.to(parts.device) + parts.sum(1, dtype=torch.float64), n + n_images
        lost, told = (sums / n).tolist()
        bits = bits_per_dimension(lost + told, self.shape)
        return {"bits_per_dim": bits, "loss": lost + told, "kl_nats": told}

    def decode(self, players: Players, latents: Tensor, labels: Tensor | None) -> Tensor:
        model: Any = players["model"]
        return _decoded(model, model.backbone.from_noise(self.config.temperature * latents, labels))

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Also some held-out images, and below each what is made of its vector."""
        yield from super().draw(players, batches, folder)
        model: Any = players["model"]
        images = next(iter(batches))["inputs"]
        columns = min(RECONSTRUCTED, len(images))
        images = images[: min(4, len(images) // columns) * columns]
        mean, _ = model.backbone.encode(images.float() / 255)
        made = to_bytes(_decoded(model, mean))
        pairs = torch.stack([part.unflatten(0, (-1, columns)) for part in (images, made)], 1)
        path = figures.mosaic(folder / "reconstructions.png", pairs.flatten(0, 1).cpu().numpy())
        yield "reconstructions", path


def _decoded(model: Any, codes: Tensor) -> Tensor:
    """Images, 0 to 1: the middle of what each pixel may be."""
    return (model.backbone.decode(codes)[0] + 1) / 2


class NormalizingFlow(_Likelihood):
    """The exact likelihood of images between whose values noise fills the gaps (arXiv 1605.08803; that this
    bounds the likelihood of the bytes: arXiv 1511.01844, section 3.1)."""

    def __init__(self, settings: FlowRun, data: DataSet) -> None:
        super().__init__(settings, data)
        self.config = settings.objective
        backbone = self._make("flow")
        if settings.model.start_from is None:
            # At random: files lie class by class, and the first of them are of one.
            first = {name: detection.some(tensor, FIRST_BATCH) for name, tensor in data.train.tensors.items()}
            generator = torch.Generator().manual_seed(settings.seed)
            noise = torch.rand(first["inputs"].shape, generator=generator)
            backbone.initialize(filled(first["inputs"], noise), *self._labels_of(first))

    def _nats(self, model: nn.Module, batch: Batch, noise: Tensor) -> Tensor:
        """(batch,): of bytes, each of which has the share 1/256 of its number's range."""
        images = batch["inputs"]
        density = log_density(*model(filled(images, noise), *self._labels_of(batch)))
        return images[0].numel() * math.log(256) - density

    def loss(self, player: str, batch: Batch) -> Loss:
        images = batch["inputs"]
        noise = torch.rand(images.shape, device=images.device)
        nats = self._nats(self.players[player], batch, noise).mean()
        return Loss(nats, {"loss": nats.detach(), "bits_per_dim": self._bits(nats).detach()})

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        nats, n = torch.zeros((), dtype=torch.float64), 0
        for number, batch in enumerate(batches):
            images = batch["inputs"]
            noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(number))
            with autocast(images.device.type, "fp32"):
                found = self._nats(players["model"], batch, noise.to(images.device))
            nats, n = nats.to(images.device) + found.sum(dtype=torch.float64), n + samples_in(batch)
        loss = float(nats) / n
        return {"bits_per_dim": bits_per_dimension(loss, self.shape), "loss": loss}

    def decode(self, players: Players, latents: Tensor, labels: Tensor | None) -> Tensor:
        model: Any = players["model"]
        with autocast(latents.device.type, "fp32"):
            return model.backbone.inverse(self.config.temperature * latents, labels)


def filled(images: Tensor, noise: Tensor) -> Tensor:
    """Bytes as numbers between 0 and 1, spread over the whole range by noise from 0 to 1."""
    return (images.float() + noise) / 256
