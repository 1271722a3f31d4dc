"""Samples out of noise: diffusion and flow matching, of images or of rows of numbers."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import LabError
from supervised import backbones, detection, figures, flow_matching
from supervised.config import DenoisingRun
from supervised.data import DataSet
from supervised.data.augment import Augment, Normalize
from supervised.detection import BATCH
from supervised.diffusion import Denoise, Diffusion, alpha_bars, guided
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Players, require_kind
from supervised.objectives.generative import Generative, device_of

LEVELS = 256
"""Values of a pixel."""
TIME_SCALE = 1000.0
"""Flow matching's times go from 0 to 1, and the network's sinusoids are made for steps up to about this."""
ROWS, COLUMNS, FRAMES = 8, 8, 10
"""Of samples, and of the film strip."""
POINTS, ARROWS = 2000, 21
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the way into noise, of which pictures of points are made."""


class Denoiser(nn.Module):
    """A network that reads noisy samples, times and perhaps labels, and answers in the samples' shape."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.backbone(x, times, labels).float()


class Denoising(Generative):
    """Squared error of the noise, or of whatever the network says, at a random time for each sample.

    Ho et al. 2020 (arXiv 2006.11239), equation 14; Liu et al. 2022 (arXiv 2209.03003), equation 1. Judged
    by the variational bound in bits per dimension, of images in 256 levels: with labels, of an image given
    its class.
    """

    headline = "bits_per_dim"
    higher_is_better = False

    def __init__(self, settings: DenoisingRun, data: DataSet) -> None:
        require_kind(data, ("images", "table"), "denoising", "inputs")
        super().__init__(settings, data)
        self.config = c = settings.objective
        self.is_flow = c.process == "flow_matching"
        self.is_image = data.kind == "images"
        of_data: dict[str, Any] = {"num_classes": self.classes_made}
        if self.is_image:
            channels = self.shape[0]
            of_data |= {"in_chans": channels, "out_chans": channels, "img_size": list(self.shape[1:])}
            augment = settings.data.augment
            if augment.shift or augment.cutout or augment.mixup or augment.cutmix:
                raise LabError("data.augment: what is not in the data would be learned, too. Use only flip.")
            self.augment = Augment(augment)
        else:
            of_data["in_features"] = self.shape[0]
            self.normalize = Normalize.of(data.train.tensors["inputs"])
        fitting = [
            name for name in backbones.DENOISERS if ("in_chans" in backbones.arguments(name)) == self.is_image
        ]
        backbone, self.parents = make_backbone(settings.model, fitting, **of_data)
        self.longest_attention = backbone.attention_tokens  # type: ignore[assignment]
        self.diffusion = Diffusion(
            alpha_bars(c.schedule, c.n_steps), predicts=c.predicts, variance=c.variance, clip=self.is_image
        )
        self.players: dict[str, nn.Module] = {"model": Denoiser(backbone)}

    # ---- learning ----

    def _scaled(self, inputs: Tensor) -> Tensor:
        """Pixels as -1..1, columns with mean 0 and variance 1."""
        return inputs.float() * (2 / (LEVELS - 1)) - 1 if self.is_image else self.normalize(inputs)

    def loss(self, player: str, batch: Batch) -> Loss:
        c, model = self.config, self.players[player]
        x0, labels = self._scaled(batch["inputs"]), None
        n, device = len(x0), x0.device
        if self.is_image:
            x0 = self.augment(x0)
        if c.conditional:
            told = torch.rand(n, device=device) >= c.label_dropout
            labels = torch.where(told, batch["labels"], self.data.num_classes)
        noise = torch.randn_like(x0)
        if self.is_flow:
            times = torch.rand(n, device=device)
            x, target = flow_matching.along(x0, times, noise)
            loss = (model(x, TIME_SCALE * times, labels) - target).square().mean()
            return Loss(loss, {"loss": loss})
        times = torch.randint(self.diffusion.n_steps, (n,), device=device)
        said = model(self.diffusion.diffuse(x0, times, noise), times, labels)
        errors = (said - self.diffusion.target(x0, times, noise)).square().flatten(1).mean(1)
        loss = errors.mean()
        metrics = {"loss": loss}
        if c.weighting == "min_snr":
            loss = (errors * self.diffusion.min_snr_weight(times)).mean()
            metrics = {"loss": loss, "unweighted_loss": metrics["loss"]}
        return Loss(loss, metrics)

    # ---- the way back ----

    def _told(self, model: Any, labels: Tensor | None, guidance: float = 1.0) -> Denoise:
        """The network as a function of samples and times; flow matching's are from 0 to 1."""
        told = model if labels is None else guided(model, labels, self.data.num_classes, guidance)
        return (lambda x, times: told(x, TIME_SCALE * times)) if self.is_flow else told

    def _back(
        self, model: Any, noise: Tensor, labels: Tensor | None, generator: torch.Generator
    ) -> Iterator[tuple[float, Tensor]]:
        """From noise to samples; yields which share of the way into noise is left, and x."""
        c, told = self.config, self._told(model, labels, self.config.guidance)
        if self.is_flow:
            n = c.sampling_steps or c.n_steps
            for time, x in flow_matching.solve(told, noise, n_steps=n, solver=c.solver):
                yield 1 - time, x
        else:
            way = self.diffusion.reverse(
                told, noise, n_steps=c.sampling_steps, eta=c.eta, generator=generator
            )
            for step, x in way:
                yield (step + 1) / c.n_steps, x

    def generate(self, players: Players, n: int, seed: int = 0) -> Tensor:
        noise, generator = self._noise(players, n, seed)
        labels, made = self.labels(n), []
        with torch.no_grad():
            for start in range(0, n, BATCH):
                rows = slice(start, start + BATCH)
                told = None if labels is None else labels[rows].to(noise.device)
                ((_, x),) = deque(self._back(players["model"], noise[rows], told, generator), maxlen=1)
                made.append(self._unscaled(x).cpu())
        return torch.cat(made)

    def _noise(self, players: Players, n: int, seed: int) -> tuple[Tensor, torch.Generator]:
        device = device_of(players)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(n, *self.shape, device=device, generator=generator), generator

    def _unscaled(self, x: Tensor) -> Tensor:
        if not self.is_image:
            return self.normalize.undo(x)
        return ((x + 1) * ((LEVELS - 1) / 2)).round().clamp(0, LEVELS - 1).to(torch.uint8)

    # ---- the verdict ----

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        s, device, held_out = self.settings, device_of(players), self.data.test.tensors
        bits = gaussian = torch.zeros((), device=device)
        generator = self._noise(players, 0, seed=0)[1]
        # At random: files lie class by class, and the first of them are of one.
        rows = detection.some(torch.arange(len(self.data.test)), self.config.bound_samples).sort().values
        n = len(rows)
        for part in rows.split(s.eval.batch_size or s.batch_size or n):
            x0 = self._scaled(held_out["inputs"][part].to(device))
            labels = held_out["labels"][part].to(device) if self.config.conditional else None
            bits = bits + self._bound(players["model"], x0, labels, generator).sum()
            gaussian = gaussian + 0.5 * (x0.square() / math.log(2)).flatten(1).mean(1).sum()
        if self.is_image:
            found = {"bits_per_dim": float(bits / n)}
        else:  # in the columns' own units, beside a Gaussian of their mean and variance
            unit = sum(math.log2(std) for std in self.normalize.std) / len(self.normalize.std)
            found = {
                "bits_per_dim": float(bits / n) + unit,
                "gaussian_bits_per_dim": float(gaussian / n) + 0.5 * math.log2(2 * math.pi) + unit,
            }
        if self.classes_made and self.judge.classify is not None:
            images = self.generate(players, self.config.judged_samples)
            found |= self.recognised(images, device_of(players))
        return found

    def _bound(self, model: Any, x0: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Bits per dimension, (batch,)."""
        diffusion, denoise = self.diffusion, self._told(model, labels)
        if self.is_flow:
            diffusion, denoise = flow_matching.as_diffusion(denoise, self.config.n_steps, clip=self.is_image)
        bins = LEVELS if self.is_image else 0
        return diffusion.bound(denoise, x0, n_times=self.config.bound_steps, generator=generator, bins=bins)

    def spec(self) -> dict[str, Any]:
        spec = super().spec() | ({} if self.is_image else self.normalize.spec())
        return {**spec, "classes": list(self.data.classes)} if self.classes_made else spec

    def use_spec(self, spec: Mapping[str, Any]) -> None:
        if not self.is_image:
            self.normalize = self.normalize.like(spec)

    # ---- pictures ----

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Samples and how they came about; of points in the plane, figure 1 of Sohl-Dickstein et al. 2015."""
        if self.is_image:
            yield from self._draw_images(players, folder)
        elif self.data.train.tensors["inputs"].shape[1] == 2 and not self.config.conditional:
            yield "process", self._draw_points(players, folder / "process.png")

    def _draw_images(self, players: Players, folder: Path) -> Iterator[tuple[str, Path]]:
        """Rows of samples, of a class each if there are any, and how the first of each row came about."""
        labels, names, n_rows = None, (), ROWS
        if self.config.conditional:
            names, n_rows = self.data.classes, self.data.num_classes
            labels = torch.arange(n_rows, device=device_of(players))
            labels = labels.repeat_interleave(COLUMNS)
        noise, generator = self._noise(players, n_rows * COLUMNS, seed=0)
        frames, x = [(1.0, noise[::COLUMNS])], noise
        for share, x in self._back(players["model"], noise, labels, generator):
            if share <= 1 - len(frames) / (FRAMES - 1) + 1e-6:
                frames.append((share, x[::COLUMNS]))
        samples = self._unscaled(x).unflatten(0, (n_rows, COLUMNS)).cpu().numpy()
        yield "samples", figures.mosaic(folder / "samples.png", samples, names)
        film = torch.stack([self._unscaled(x) for _, x in frames], 1).cpu().numpy()
        shares = [f"{share:.0%}" for share, _ in frames]
        yield "film_strip", figures.mosaic(folder / "film_strip.png", film, names, shares)

    def _draw_points(self, players: Players, path: Path) -> Path:
        """Rows: into noise, out of it, and where the way out leads from each place."""
        model = players["model"]
        noise, generator = self._noise(players, POINTS, seed=0)
        held = self._scaled(self.data.test.tensors["inputs"][:POINTS].to(noise.device))
        back = [(1.0, noise), *self._back(model, noise, None, generator)]
        forward, reverse, drift = [], [], []
        ticks = torch.linspace(-2, 2, ARROWS, device=noise.device)
        places = torch.cartesian_prod(ticks, ticks)
        for wanted in SHARES:
            forward.append(self._into_noise(held, wanted, generator))
            reverse.append(min(back, key=lambda step: abs(step[0] - wanted))[1])
            drift.append(self._drift(model, places, wanted))
        titles = ["data", *(f"{share:.0%} of the way" for share in SHARES[1:-1]), "noise"]
        arrays = [[x.cpu().numpy() for x in row] for row in (forward, reverse, drift)]
        return figures.diffusion(path, titles, arrays[0], arrays[1], places.cpu().numpy(), arrays[2])

    def _into_noise(self, x0: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """x0 after a share of the way into noise."""
        noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        if self.is_flow:
            return (1 - share) * x0 + share * noise
        step = round(share * self.config.n_steps) - 1
        return x0 if step < 0 else self.diffusion.diffuse(x0, torch.full((1,), step, device=x0.device), noise)

    def _drift(self, model: Any, x: Tensor, share: float) -> Tensor:
        """Where the next step back leads from x, without noise, less x."""
        if self.is_flow:
            return self._told(model, None)(x, torch.full((1,), 1 - share, device=x.device))
        step = max(round(share * self.config.n_steps) - 1, 0)
        time = torch.full((1,), step, device=x.device)
        found = self.diffusion.to_x0(model(x, time), x, time)
        return self.diffusion.posterior(found, x, time)[0] - x
