"""Flow matching along straight lines, or rectified flow: an ODE leads from noise to samples.

Lipman et al. 2022 (arXiv 2210.02747) and Liu et al. 2022 (arXiv 2209.03003). No network in here: what one has
learned comes in as a function `velocity(x, times)`, times from 0 (noise) to 1 (samples) on the samples'
device, (batch,) or (1,).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from supervised.diffusion import Denoise, Diffusion

Velocity = Callable[[Tensor, Tensor], Tensor]

SOLVERS = ("euler", "heun")


def along(x1: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Points on straight lines from noise to samples, and the velocity, which is the same all the way.

    arXiv 2209.03003, equation 1: x_t = t * x_1 + (1 - t) * x_0, dx/dt = x_1 - x_0.
    """
    t = times.view(-1, *[1] * (x1.dim() - 1))
    return t * x1 + (1 - t) * noise, x1 - noise


def solve(
    velocity: Velocity, x: Tensor, *, n_steps: int, solver: str = "euler"
) -> Iterator[tuple[float, Tensor]]:
    """From noise to samples in equal steps; yields (time, x) after each.

    Args:
        x: unit noise.
        n_steps: of the solver.
        solver: "euler", or "heun", which goes each step with the mean of the velocities at both of its ends
        and
            asks the network twice for it.
    """
    for step in range(n_steps):
        time = torch.full((1,), step / n_steps, device=x.device)
        way = velocity(x, time)
        if solver == "heun":
            way = (way + velocity(x + way / n_steps, time + 1 / n_steps)) / 2
        x = x + way / n_steps
        yield (step + 1) / n_steps, x


def as_diffusion(velocity: Velocity, n_steps: int, *, clip: bool) -> tuple[Diffusion, Denoise]:
    """The diffusion that a velocity belongs to, so that its likelihood can be bounded.

    A point of a straight line is, scaled to t^2 + (1 - t)^2 = 1, one of a diffusion with alpha_bar =
    t^2 / (t^2 + (1 - t)^2): only the ratio of signal and noise matters (arXiv 2107.00630, section 5.1). The
    sample in it is x_t + (1 - t) * velocity.

    Args:
        n_steps: of the chain.
        clip: see `Diffusion`.

    Returns:
        A diffusion, and a network of it that says x_0.
    """
    times = 1 - torch.arange(1, n_steps + 1, dtype=torch.float64) / (n_steps + 1)
    length = (times.square() + (1 - times).square()).sqrt()
    diffusion = Diffusion((times / length).square(), predicts="x0", clip=clip)

    def denoise(x: Tensor, steps: Tensor) -> Tensor:
        t = (1 - (steps.float() + 1) / (n_steps + 1)).view(-1, *[1] * (x.dim() - 1))
        x = x * (t.square() + (1 - t).square()).sqrt()
        return x + (1 - t) * velocity(x, t.flatten())

    return diffusion, denoise
