"""Optimisers by config: groups, learning rates by step, and exact capture and restore."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from supervised.config import OptimizerConfig


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """An optimiser of the module's trainable weights, fused where there is a fused kernel.

    Matrices and kernels decay; biases, norms and other vectors do not.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    if config.name == "sgd":
        return SGD(groups, config.learning_rate, config.momentum, fused=fused)
    cls = {"adam": Adam, "adamw": AdamW}[config.name]
    b1, b2 = config.betas
    return cls(groups, lr=config.learning_rate, betas=(b1, b2), eps=config.eps, fused=fused)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of update `step`, counted from 0, of `total_steps`.

    A linear warm-up from rate / warmup_steps, then constant, or to `final_share` of the rate linearly or on
    a half cosine (arXiv 1608.03983, eq. 5), which is reached behind the last update.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def capture(optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps of each weight, by "index.name"."""
    return {
        f"{index}.{name}": value
        for index, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
    }


def restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `capture` took; learning rates and the like are as the optimiser was made.

    Raises:
        ValueError, IndexError: it is of other weights.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        if value.dim() and value.shape != like.shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, and its weight {tuple(like.shape)}")
        # The fused kernels walk memory, not indices: a moment must lie as its weight does.
        same_layout = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        state.setdefault(int(index), {})[name] = same_layout
    if len({frozenset(kept) for kept in state.values()}) > 1:
        raise ValueError("some weights have other averages than others")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class RunningAverage:
    """An exponential moving average of a module's weights: a module of its own, to evaluate and to keep.

    The decay grows with the updates seen, min(decay, (1 + n) / (10 + n)), so that the first weights are
    soon forgotten (TensorFlow's ExponentialMovingAverage). Buffers, e.g. the statistics of batch norms, are
    copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        import copy

        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, n_updates: int) -> None:
        """Takes in the weights behind update `n_updates`, counted from 1."""
        decay = min(self.decay, (1 + n_updates) / (10 + n_updates))
        averaged, current = _both(self.module.parameters(), module.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        averaged, current = _both(self.module.buffers(), module.buffers())
        for a, b in zip(averaged, current, strict=True):
            a.copy_(b)


def _both(a: Iterable[Tensor], b: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return list(a), [tensor.detach() for tensor in b]
