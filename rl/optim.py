"""Optimisers for Q-learning that never read a number back from the device."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer


def make_optimizer(name: str, parameters: Iterable[Tensor], lr: float, eps: float) -> Optimizer:
    """`adam`, `radam` or `rmsprop`, fused where there is a fused kernel."""
    if name == "rmsprop":
        return CenteredRMSprop(parameters, lr=lr, eps=eps)
    cls = {"adam": Adam, "radam": RectifiedAdam}[name]
    parameters = list(parameters)
    return cls(parameters, lr=lr, eps=eps, fused=parameters[0].device.type in ("cpu", "cuda", "mps"))


def rectification(step: int, beta2: float = 0.999) -> float:
    """The factor r_t of RAdam (Liu et al. 2020, algorithm 2) at update `step` >= 1; 0 while undefined.

    The first five updates, where the variance of the adaptive rate is not tractable, are skipped; RAdam
    makes tiny un-normalised steps there.
    """
    rho_inf = 2 / (1 - beta2) - 1
    decayed = beta2**step
    rho = rho_inf - 2 * step * decayed / (1 - decayed)
    if rho <= 5:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


class RectifiedAdam(Adam):
    """RAdam as fused Adam whose learning rate is multiplied by `rectification` (torch's is not fused)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group.setdefault("updates", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["updates"] += 1
            group["lr"] *= rectification(group["updates"], group["betas"][1])
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class CenteredRMSprop(Optimizer):
    """RMSprop as DeepMind's 2015 code has it: g / sqrt(mean(g^2) - mean(g)^2 + eps), eps inside the root.

    torch's own adds eps outside the root. DeepMind's eps of 0.01 is for gradients summed over a
    minibatch of 32; for mean gradients it is 0.01 / 32^2.

    Args:
        lr: learning rate.
        decay: of both running means (Nature's "gradient momentum" and "squared gradient momentum").
        eps: "min squared gradient".
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2.5e-4,
        decay: float = 0.95,
        eps: float = 0.01 / 32**2,
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            keep = 1 - group["decay"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["mean_square"] = torch.zeros_like(parameter)
                mean, mean_square = state["mean"], state["mean_square"]
                mean.lerp_(gradient, keep)
                mean_square.lerp_(gradient.square(), keep)
                scale = mean_square.addcmul(mean, mean, value=-1).add_(group["eps"]).sqrt_()
                parameter.addcdiv_(gradient, scale, value=-group["lr"])
        return loss
