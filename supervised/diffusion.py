"""Gaussian diffusion: noise put on samples step by step, and the ways back. No network in here.

What a network has learned comes in as a function `denoise(x, times)`, times being (batch,) or (1,) int64 on
the samples' device. Step t counts from 0: it is t + 1 in Ho et al. 2020 (arXiv 2006.11239), whose equations
are quoted unless another paper is named. Each step keeps a part of the signal and adds as much variance of
noise:

    x_t = signal_t * x_0 + noise_t * epsilon,   signal_t^2 = alpha_bar_t,   noise_t^2 = 1 - alpha_bar_t

Everything a training step needs lies in tables on the device: nothing waits for it.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("large", "small")
MAX_BETA = 0.999
GAMMA = 5.0
"""Of min-SNR: the paper's choice."""


def alpha_bars(schedule: str, n_steps: int) -> Tensor:
    """How much variance of the signal is left after each step, (n_steps,) float64.

    linear: betas from 1e-4 to 0.02 (section 4); of other numbers of steps than 1,000 so many times as large
    that about as much is left in the end. cosine: arXiv 2102.09672, equation 17.
    """
    steps = torch.arange(n_steps, dtype=torch.float64)
    if schedule == "linear":
        betas = (1e-4 + (0.02 - 1e-4) * steps / max(n_steps - 1, 1)) * (1000 / n_steps)
    else:
        left = torch.cos(
            (torch.arange(n_steps + 1, dtype=torch.float64) / n_steps + 0.008) / 1.008 * math.pi / 2
        )
        betas = 1 - (left[1:] / left[:-1]).square()
    return (1 - betas.clamp(max=MAX_BETA)).cumprod(0)


class Diffusion:
    """A forward process, and what follows from it.

    Args:
        left: alpha_bar of each step, falling; from `alpha_bars`.
        predicts: what the network says: the noise "epsilon", the sample "x0", or "v", which is
            signal * epsilon - noise * x0 (arXiv 2202.00512, section 4).
        variance: of a reverse step: "large" is beta_t, which is best where samples are drawn from a unit
            Gaussian; "small" is the posterior's, best where there is but one sample (section 3.2).
        clip: samples lie in -1..1, and so shall what is taken for one on the way back.
    """

    def __init__(
        self, left: Tensor, *, predicts: str = "epsilon", variance: str = "large", clip: bool = False
    ) -> None:
        self.n_steps, self.predicts, self.variance, self.clip = len(left), predicts, variance, clip
        self.left: list[float] = left.tolist()
        before = torch.cat((torch.ones(1, dtype=torch.float64), left[:-1]))
        betas = 1 - left / before
        posterior = (1 - before) / (1 - left) * betas  # equation 7
        # A first step without variance could not be judged; the second one's is taken (the published code).
        first = posterior[1:2] if self.n_steps > 1 else betas[:1]
        chosen = betas if variance == "large" else posterior
        self._columns = {
            "signal": left.sqrt(),
            "noise": (1 - left).sqrt(),
            "snr": left / (1 - left),
            "of_x0": before.sqrt() * betas / (1 - left),
            "of_x_t": (left / before).sqrt() * (1 - before) / (1 - left),
            "posterior_variance": posterior,
            "log_variance": torch.cat((first, chosen[1:])).log(),
        }
        self._there: dict[torch.device, dict[str, Tensor]] = {}

    def at(self, name: str, times: Tensor, like: Tensor) -> Tensor:
        """A column of the table at each sample's time, shaped to be multiplied with `like`."""
        if times.device not in self._there:
            self._there[times.device] = {
                key: column.float().to(times.device) for key, column in self._columns.items()
            }
        found = self._there[times.device][name].index_select(0, times)
        return found.view(-1, *[1] * (like.dim() - 1))

    # ---- forward, and what is learned ----

    def diffuse(self, x0: Tensor, times: Tensor, epsilon: Tensor) -> Tensor:
        """x_t, drawn from q(x_t | x_0) by a draw of unit noise (equation 4)."""
        return self.at("signal", times, x0) * x0 + self.at("noise", times, x0) * epsilon

    def target(self, x0: Tensor, times: Tensor, epsilon: Tensor) -> Tensor:
        """What the network should say of x_t."""
        if self.predicts == "epsilon":
            return epsilon
        if self.predicts == "x0":
            return x0
        return self.at("signal", times, x0) * epsilon - self.at("noise", times, x0) * x0

    def min_snr_weight(self, times: Tensor) -> Tensor:
        """(batch,): weights of squared errors that keep the easy, little noised samples from dominating:
        min(SNR, 5) of the error in x_0, whatever the network says (arXiv 2303.09556, section 3)."""
        snr = self.at("snr", times, times)
        weight = snr.clamp(max=GAMMA)
        return weight / {"x0": 1.0, "epsilon": snr, "v": snr + 1}[self.predicts]

    def to_x0(self, said: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The sample that the network takes to be in x_t."""
        signal, noise = self.at("signal", times, x), self.at("noise", times, x)
        if self.predicts == "epsilon":
            x0 = (x - noise * said) / signal
        else:
            x0 = said if self.predicts == "x0" else signal * x - noise * said
        return x0.clamp(-1, 1) if self.clip else x0

    def posterior(self, x0: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) (equations 6 and 7)."""
        mean = self.at("of_x0", times, x) * x0 + self.at("of_x_t", times, x) * x
        return mean, self.at("posterior_variance", times, x)

    # ---- back ----

    def reverse(
        self,
        denoise: Denoise,
        x: Tensor,
        *,
        n_steps: int = 0,
        eta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """From noise to samples; yields (time, x) after each step, the last time being -1.

        Equations 12 and 16 of DDIM (arXiv 2010.02502), on times evenly spread over the chain and ending in
        its last (arXiv 2305.08891, section 3.3). With `eta` 0 nothing is drawn on the way; with 1 and all
        steps it is Ho et al.'s algorithm 2. Of large `variance`, as much noise is put on as on the way
        forward, without being allowed for in the mean (DDIM's sigma-hat, section 5).

        Args:
            x: unit noise.
            n_steps: of the way back, at most the chain's; 0: all of it.
            eta: share of the noise.
            generator: what is drawn from.
        """
        n = min(n_steps or self.n_steps, self.n_steps)
        times = [round((i + 1) * self.n_steps / n) - 1 for i in range(n)]
        for t, to in pairwise([*reversed(times), -1]):
            x = self._step(denoise, x, t, to, eta, generator)
            yield to, x

    def _step(
        self, denoise: Denoise, x: Tensor, t: int, to: int, eta: float, generator: torch.Generator | None
    ) -> Tensor:
        """x at time `to` from x at time `t`."""
        time = torch.full((1,), t, device=x.device)
        left, left_then = self.left[t], self.left[to] if to >= 0 else 1.0
        x0 = self.to_x0(denoise(x, time), x, time)
        epsilon = (x - left**0.5 * x0) / (1 - left) ** 0.5
        small = eta**2 * (1 - left_then) / (1 - left) * (1 - left / left_then)
        x = left_then**0.5 * x0 + max(1 - left_then - small, 0.0) ** 0.5 * epsilon
        put_on = eta**2 * (1 - left / left_then) if self.variance == "large" and to >= 0 else small
        if put_on:
            drawn = torch.randn(x.shape, device=x.device, generator=generator)
            x = x + put_on**0.5 * drawn
        return x

    # ---- likelihood ----

    def bound(
        self,
        denoise: Denoise,
        x0: Tensor,
        *,
        n_times: int,
        generator: torch.Generator,
        bins: int = 0,
    ) -> Tensor:
        """An upper bound of -log2 p(x_0) per dimension (equation 5), (batch,).

        The last and the first term are computed; of those between, one from each of `n_times` stretches of
        the chain, longer ones where there is more noise and terms differ less, is drawn for each sample.

        Args:
            x0: samples; with `bins`, pixels in -1..1.
            n_times: evaluations of the network, beside one; of T - 1 and more, nothing is drawn but noise.
            generator: what is drawn from.
            bins: values a pixel can take, whose probability is that of its bin (equation 13); 0: x_0 is
                continuous, and the bound one of its density.
        """
        nats = self.prior_term(x0)
        between = self.n_steps - 1
        n = min(n_times, between)
        edges = [max(1 + i, 1 + round(between * (i / n) ** 2)) for i in range(n + 1)] if n else []
        for low, high in pairwise(edges):
            share = torch.rand(len(x0), device=x0.device, generator=generator)
            times = (low + (share * (high - low)).floor().long()).clamp(max=high - 1)
            nats = nats + (high - low) * self.middle_term(denoise, x0, times, generator)
        nats = nats + self.first_term(denoise, x0, bins, generator)
        return nats / math.log(2) / x0[0].numel()

    def prior_term(self, x0: Tensor) -> Tensor:
        """L_T in nats: what the last step still tells, as KL from a unit Gaussian."""
        left = self.left[-1]
        return _sum(0.5 * (left * x0.square() + (1 - left) - 1 - math.log(1 - left)))

    def _drawn(
        self, denoise: Denoise, x0: Tensor, times: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """x_t, and what the network takes to be in it."""
        epsilon = torch.randn(x0.shape, device=x0.device, generator=generator)
        x = self.diffuse(x0, times, epsilon)
        return x, self.to_x0(denoise(x, times), x, times)

    def middle_term(self, denoise: Denoise, x0: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
        """L_{t-1} in nats: KL of the reverse step from the posterior, at each sample's time."""
        x, found = self._drawn(denoise, x0, times, generator)
        true_mean, true_variance = self.posterior(x0, x, times)
        mean, _ = self.posterior(found, x, times)
        log_variance = self.at("log_variance", times, x)
        apart = (true_variance + (true_mean - mean).square()) * torch.exp(-log_variance)
        return _sum(0.5 * (log_variance - true_variance.log() + apart - 1))

    def first_term(self, denoise: Denoise, x0: Tensor, bins: int, generator: torch.Generator) -> Tensor:
        """L_0 in nats: what the last step back, whose mean the network finds, says of the sample."""
        times = torch.zeros(len(x0), dtype=torch.long, device=x0.device)
        _, mean = self._drawn(denoise, x0, times, generator)
        log_variance = self.at("log_variance", times, x0)
        apart = (x0 - mean) * torch.exp(-0.5 * log_variance)
        if not bins:
            return _sum(0.5 * (math.log(2 * math.pi) + log_variance + apart.square()))
        half = torch.exp(-0.5 * log_variance) / (bins - 1)
        # The outermost bins reach to infinity. In the upper half, probabilities are taken from above, where
        # differences of numbers next to 1 would be lost.
        low = torch.where(x0 <= -1 + 0.5 / (bins - 1), -torch.inf, apart - half)
        high = torch.where(x0 >= 1 - 0.5 / (bins - 1), torch.inf, apart + half)
        turned = apart > 0
        low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
        inside = torch.special.ndtr(high) - torch.special.ndtr(low)
        return _sum(-inside.clamp_min(1e-12).log())


def _sum(terms: Tensor) -> Tensor:
    """Over all but the batch."""
    return terms.flatten(1).sum(1)


def guided(model: Callable[..., Tensor], labels: Tensor, none: int, scale: float) -> Denoise:
    """A conditional network as a function of (x, times), further in the direction of its labels.

    none + scale * (labelled - none), by arXiv 2207.12598, equation 6, where `scale` is 1 + w: at 1 the
    network is just conditional, at 0 it is not, above 1 samples are the more typical of their class and the
    less diverse.

    Args:
        model: of (x, times, labels).
        labels: (batch,) int64.
        none: the label of no class.
    """
    nothing = torch.full_like(labels, none)
    if scale in (0, 1):
        chosen = labels if scale else nothing
        return lambda x, times: model(x, times, chosen)
    both = torch.cat((labels, nothing))

    def denoise(x: Tensor, times: Tensor) -> Tensor:
        twice = torch.cat((times, times)) if len(times) > 1 else times
        labelled, unlabelled = model(torch.cat((x, x)), twice, both).chunk(2)
        return unlabelled + scale * (labelled - unlabelled)

    return denoise
