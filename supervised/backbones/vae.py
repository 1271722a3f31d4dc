"""Variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114) of convolutions.

What a pixel may be is a logistic distribution cut into the 256 values a byte has (arXiv 1701.05517, section
2.1), so that the bound is one on the likelihood of the image as it is, comparable with that of other models.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supervised.backbones.flow import ClassNormal, Steps, log_density, steps
from supervised.backbones.gan import Residual, grow, halvings, shrink
from supervised.backbones.layers import init_he, require_positive

LEAST_LOG_SCALE = -7.0
"""A pixel more certain than this, in units of half the range, gains nothing."""


class VAE(nn.Module):
    """An image to a distribution over vectors, and a vector to a distribution over images.

    The prior of its codes is a standard normal, or learned beside it: a flow on codes (arXiv 1611.02731,
    section 3.2), told the class if images have one. The decoder, which is not told, then gets codes as they
    are and not as a normal distribution would have them.

    Args:
        in_chans: channels of the images.
        img_size: height and width of the images, at least 8.
        latent: numbers an image is told by.
        width: channels next to the image; they double as its sides are halved.
        depth: residual blocks behind each halving and each doubling.
        prior_depth: couplings of the prior's flow.
        prior_hidden: width of their nets.
        num_classes: that images are of; 0: they have no labels.
        norm: "batch", "group", "frozen" or None.

    Shapes: images (batch, in_chans, height, width), 0 to 1, a draw `noise` (batch, latent) of a standard
    normal, and with classes labels (batch,) -> what the code tells beyond the prior, nats (batch,), and what
    `decode` returns of the code.

    Raises:
        ValueError: too small an image, or an unknown norm.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int | Sequence[int] = 28,
        latent: int = 32,
        width: int = 64,
        depth: int = 0,
        prior_depth: int = 0,
        prior_hidden: int = 128,
        num_classes: int = 0,
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, latent=latent, width=width, prior_hidden=prior_hidden)
        if min(depth, prior_depth) < 0:
            raise ValueError(f"depth {depth} and prior_depth {prior_depth} must not be negative")
        if prior_depth and latent < 2:
            raise ValueError(f"latent {latent}: the couplings of prior_depth {prior_depth} need 2 or more")
        self.latent = self.num_features = latent
        self.num_classes = num_classes
        self.shape = (in_chans, *halvings(img_size)[0])
        self.encoder = shrink(in_chans, img_size, width, 2 * latent, norm, depth)
        self.decoder = grow(latent, img_size, width, 2 * in_chans, norm, depth)
        init_he(self)
        for module in self.modules():
            if isinstance(module, Residual):
                module.silence()
        self.prior = Steps(steps(latent, prior_depth, prior_hidden, num_classes, kernel_size=1))
        if num_classes:
            self.prior.append(ClassNormal(latent, num_classes))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of a normal distribution, (batch, latent) each."""
        mean, log_std = self.encoder(2 * images - 1).flatten(1).float().chunk(2, 1)
        return mean, log_std.clamp(-10, 10)

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the scale of each pixel's distribution, on a range from -1 to 1."""
        mean, log_scale = self.decoder(latents[:, :, None, None]).float().chunk(2, 1)
        return mean, log_scale.clamp(min=LEAST_LOG_SCALE)

    def example(self) -> tuple[Tensor, ...]:
        weight = next(self.parameters())
        labels = (weight.new_zeros(1, dtype=torch.long),) if self.num_classes else ()
        return weight.new_zeros(1, *self.shape), weight.new_zeros(1, self.latent), *labels

    def forward(
        self, images: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = self.encode(images)
        latents = mean + log_std.exp() * noise
        if not self.prior:
            told = kl_from_standard_normal(mean, log_std)
        else:  # from the one draw there is
            of_prior, log_det = self.prior(latents[:, :, None, None], labels)
            told = log_density(noise, -log_std.sum(1)) - log_density(of_prior.flatten(1), log_det)
        return told, *self.decode(latents)

    def from_noise(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Codes of the prior, (batch, latent), of a draw of a standard normal."""
        return self.prior.inverse(noise[:, :, None, None], labels).flatten(1)


def kl_from_standard_normal(mean: Tensor, log_std: Tensor) -> Tensor:
    """Nats by which N(mean, exp(log_std)^2) differs from N(0, 1), summed over each row (appendix B)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)


def log_likelihood_of_bytes(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of the probability of each byte under a logistic distribution, in nats.

    A value has what lies within half a step around it; 0 and 255 have all that lies beyond, too
    (arXiv 1701.05517, equation 2). With step d in units of the scale, sigmoid(a) - sigmoid(a - d) is
    sigmoid(a) sigmoid(d - a) (1 - exp(-d)): nothing is lost to rounding however unlikely a value is.

    Args:
        pixels: uint8.
        mean, log_scale: of the same shape, on a range from -1 (0) to 1 (255).
    """
    precision = (-log_scale).exp()
    centred = pixels.float() / 127.5 - 1 - mean
    above, below = (centred + 1 / 255) * precision, (centred - 1 / 255) * precision
    under, over = F.logsigmoid(above), F.logsigmoid(-below)
    between = under + over + torch.log(-torch.expm1(-2 / 255 * precision))
    return torch.where(pixels == 0, under, torch.where(pixels == 255, over, between))


def bits_per_dimension(nats: float, shape: Sequence[int]) -> float:
    """Bits a number of an image of this shape costs, where the whole image costs so many nats."""
    return nats / math.prod(shape) / math.log(2)
