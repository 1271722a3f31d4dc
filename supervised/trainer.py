"""The one training loop. It computes and yields; what is logged, judged and kept is others' business."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from torch import Tensor, nn

from lab.device import Compute, attention_to_learn
from lab.seeding import derive_seed, seed_step
from supervised import optim
from supervised.backbones import blocked
from supervised.config import SupervisedRun
from supervised.data import Batches
from supervised.objectives.base import Batch, Objective, Players, samples_in

UNFIT = (
    *(KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError),
    SafetensorError,
)
"""What torch and Python raise where tensors or values are not those that a run would have saved."""


class Means:
    """Means of numbers since somebody last asked; they stay on the device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, numbers: Mapping[str, Tensor], weight: float = 1.0) -> None:
        for name, number in numbers.items():
            value = number.detach().float() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def take(self) -> dict[str, float]:
        """The means as numbers, which waits for the device; then they begin anew."""
        means = {name: float(value) / self.weights[name] for name, value in self.sums.items()}
        self.sums, self.weights = {}, {}
        return means


class Trainer:
    """Moves an objective's players, batch by batch.

    Args:
        objective: with its players on the CPU or the device.
        batches: of the training data.
        config: of the run.
        compute: device and number format.

    A run is the same whether or not it was stopped in between: the order of the batches depends on the seed
    and the epoch alone, everything else that is drawn on the seed and the step.
    """

    def __init__(
        self, objective: Objective, batches: Batches, config: SupervisedRun, compute: Compute
    ) -> None:
        self.objective, self.batches, self.config, self.compute = objective, batches, config, compute
        self.steps_per_epoch = len(batches)
        wanted = math.ceil(config.epochs * self.steps_per_epoch)
        self.total_steps = min(wanted, config.max_steps or wanted)
        self.step = self.samples = 0
        self.means = Means()
        """Of the losses' metrics."""

        # Accelerate's state belongs to the process: a number format from elsewhere must not stay with us.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=compute.device.type == "cpu", device_placement=False)
        for module in objective.players.values():
            module.to(compute.device)
            if _likes_channels_last(module, compute.device):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if not config.compile:
                blocked.use(module, compute.device)
        self.bare = dict(objective.players)
        """The players without what the loop wraps around them."""
        self.frozen = {name: list(_frozen_parts(module)) for name, module in self.bare.items()}
        for name in self.bare:
            self._set_to_learn(name)
        self.optimizers = {
            name: optim.make_optimizer(module, config.optimizer) for name, module in self.bare.items()
        }
        self.averages = {
            name: optim.RunningAverage(module, config.ema_decay)
            for name, module in self.bare.items()
            if config.ema_decay
        }
        for name, module in self.bare.items():
            wrapped = self.accelerator.prepare_model(module, device_placement=False)
            objective.players[name] = torch.compile(wrapped) if config.compile else wrapped  # type: ignore[assignment]

    # ---- the loop ----

    def iterate(self) -> Iterator[int]:
        """Trains to the end; yields the number of updates after each."""
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            for batch in self.batches.epoch(epoch, start=position):
                self._update(batch)
                yield self.step
                if self.step >= self.total_steps:
                    return

    def _update(self, batch: Batch) -> None:
        config, n_samples = self.config, samples_in(batch)
        seed_step(derive_seed(config.seed, 1, self.step), self.compute.device)
        rate = optim.learning_rate(config.optimizer, self.step, self.total_steps)
        for name, module in self.bare.items():  # one that is not to move may be in an opponent's loss
            if not module.training:
                self._set_to_learn(name)
        for name in self.objective.turns(self.step):
            module, optimizer = self.bare[name], self.optimizers[name]
            optimizer.zero_grad(set_to_none=True)
            metrics = Means()
            for part in _split(batch, config.accumulate):
                share = self.objective.share(part, batch)
                with self.compute.autocast(), self._attention():
                    loss = self.objective.loss(name, part)
                self.accelerator.backward(loss.value * share)
                metrics.add({key: value * share for key, value in loss.metrics.items()}, weight=1)
            self.means.add(metrics.sums)
            if config.optimizer.max_grad_norm is not None:
                norm = nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm)
                self.means.add({f"{name}_grad_norm": norm})
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            if name in self.averages:
                self.averages[name].update(module, self.step + 1)
        self.step += 1
        self.samples += n_samples

    def _set_to_learn(self, name: str) -> None:
        self.bare[name].train()
        for part in self.frozen[name]:  # or their batch norms' statistics would move
            part.eval()

    def _attention(self) -> AbstractContextManager[Any]:
        return attention_to_learn(
            self.compute.device.type, self.compute.precision, self.objective.longest_attention
        )

    # ---- for those who watch ----

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return optim.learning_rate(self.config.optimizer, self.step, self.total_steps)

    @contextmanager
    def judged(self) -> Iterator[Players]:
        """The players to evaluate and to draw, without gradients: averaged, where there is an average."""
        players = {
            name: self.averages[name].module if name in self.averages else module
            for name, module in self.bare.items()
        }
        for module in players.values():
            module.eval()
        with torch.inference_mode(), self.compute.autocast():
            yield players

    def weights(self, judged: bool) -> dict[str, Tensor]:
        """All players' weights by "player.name"; if `judged`, the averaged ones where there is an average."""
        modules = {
            name: self.averages[name].module if judged and name in self.averages else module
            for name, module in self.bare.items()
        }
        return {
            f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()
        }

    @torch.no_grad()
    def not_finite(self) -> str | None:
        """The player of which a weight or statistic, averaged ones included, is NaN or infinite; waits for
        the device."""
        for name, module in self.bare.items():
            averaged = [self.averages[name].module] if name in self.averages else []
            kept = [t for m in (module, *averaged) for t in m.state_dict().values()]
            # 0 times a number is 0, but for these.
            sums = [(t * 0).sum().float() for t in kept if t.is_floating_point()]
            if sums and float(torch.stack(sums).sum()) != 0:
                return name
        return None

    @torch.no_grad()
    def sums_of_weights(self) -> list[float]:
        """Of each tensor that learns, in double precision: they show whether any weight moved at all."""
        learning = [p for module in self.bare.values() for p in module.parameters() if p.requires_grad]
        return [float(p.cpu().double().sum()) for p in learning]

    def capture(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything needed to go on exactly: tensors by file and name, and JSON values."""
        tensors = {"model": self.weights(judged=False), "progress": dict(self.means.sums)}
        if self.averages:
            tensors["average"] = self.weights(judged=True)
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer_{name}"] = optim.capture(optimizer)
        return tensors, {"step": self.step, "samples": self.samples, "weights": self.means.weights}

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Puts back what `capture` took; raises one of `UNFIT` if it is of another run."""
        for name, module in self.bare.items():
            module.load_state_dict(part_of(tensors["model"], name))
            if name in self.averages:
                self.averages[name].module.load_state_dict(part_of(tensors["average"], name))
            optim.restore(self.optimizers[name], tensors[f"optimizer_{name}"])
        self.step, self.samples = state["step"], state["samples"]
        if tensors["progress"].keys() != state["weights"].keys():
            raise ValueError("progress and its weights are of different numbers")
        device = self.compute.device
        self.means.sums = {name: value.to(device) for name, value in tensors["progress"].items()}
        self.means.weights = dict(state["weights"])


def _likes_channels_last(module: nn.Module, device: torch.device) -> bool:
    """Whether kernels of convolutions should lie so.

    Not with group norms on a CPU: torch's takes 25 times as long there (64 images of 32 x 28 x 28 in bf16,
    forward and backward: 40 ms for 1.5), which the convolutions' 22 ms for 26 do not make up for.
    """
    slow = device.type == "cpu" and any(isinstance(m, nn.GroupNorm) for m in module.modules())
    return not slow and any(p.dim() == 4 for p in module.parameters())


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that have weights of which none learns."""
    learning = [parameter.requires_grad for parameter in module.parameters()]
    if learning and not any(learning):
        yield module
    else:
        for child in module.children():
            yield from _frozen_parts(child)


def part_of(weights: Mapping[str, Tensor], player: str) -> dict[str, Tensor]:
    """One player's weights, from those of all by "player.name"."""
    prefix = f"{player}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    chunks = {name: value.chunk(parts) for name, value in batch.items()}
    n = len(next(iter(chunks.values())))
    return [{name: values[i] for name, values in chunks.items()} for i in range(n)]
