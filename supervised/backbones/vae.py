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

from supervised.backbones.gan import grow, halvings, shrink
from supervised.backbones.layers import init_he, require_positive

LEAST_LOG_SCALE = -7.0
"""A pixel more certain than this, in units of half the range, gains nothing."""


class VAE(nn.Module):
    """An image to a distribution over vectors, and a vector to a distribution over images.

    Args:
        in_chans: channels of the images.
        img_size: height and width of the images, at least 8.
        latent: numbers an image is told by.
        width: channels next to the image; they double as its sides are halved.
        norm: "batch", "group", "frozen" or None.

    Shapes: images (batch, in_chans, height, width), 0 to 1, to what `encode` and `decode` return, one behind
    the other, for a vector that `noise` (batch, latent) picks from the distribution.

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
        norm: str | None = "batch",
    ) -> None:
        super().__init__()
        require_positive(in_chans=in_chans, latent=latent, width=width)
        self.latent = self.num_features = latent
        self.shape = (in_chans, *halvings(img_size)[0])
        self.encoder = shrink(in_chans, img_size, width, 2 * latent, norm)
        self.decoder = grow(latent, img_size, width, 2 * in_chans, norm)
        init_he(self)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of a normal distribution, (batch, latent) each."""
        mean, log_std = self.encoder(2 * images - 1).flatten(1).float().chunk(2, 1)
        return mean, log_std.clamp(-10, 10)

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the scale of each pixel's distribution, on a range from -1 to 1."""
        mean, log_scale = self.decoder(latents[:, :, None, None]).float().chunk(2, 1)
        return mean, log_scale.clamp(min=LEAST_LOG_SCALE)

    def example(self) -> tuple[Tensor, Tensor]:
        weight = next(self.parameters())
        return weight.new_zeros(1, *self.shape), weight.new_zeros(1, self.latent)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, log_std = self.encode(images)
        return mean, log_std, *self.decode(mean + log_std.exp() * noise)


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
