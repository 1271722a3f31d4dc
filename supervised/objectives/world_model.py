"""The next frame of a game from those before and the actions: a world model that can be dreamed in."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.device import Compute
from lab.errors import LabError
from supervised import dreaming, figures, flow_matching
from supervised.config import WorldModelRun
from supervised.data import DataSet, FrameSplit
from supervised.models import make_backbone
from supervised.objectives.base import Batch, Loss, Objective, Players, require_kind
from supervised.objectives.generative import device_of

CHANGE = 8.0
"""Levels of 255 by which a pixel must differ to count as changed."""
REACH = 3
"""Pixels around what has moved in which it may move on."""
STARTS = 32
"""Held-out beginnings of dreams that are kept with the weights."""
SHOWN = 3


def near_motion(past: Tensor) -> Tensor:
    """(batch, 1, height, width) of 0 and 1: where a pixel within `REACH` has changed between frames (batch,
    context, height, width) in -1..1.

    What is weighted by the past alone has the same best answer as without weights. Weighted by what changes
    next, the best answer has too much change, and dreams of Pong filled with balls.
    """
    moved = (past.diff(dim=1).abs() > CHANGE * 2 / 255).any(1, keepdim=True).float()
    return F.max_pool2d(moved, 2 * REACH + 1, stride=1, padding=REACH)


class Rollouts(NamedTuple):
    """Dreams beside what really happened, (batch, frames, height, width) in 0..1."""

    true: Tensor
    dreamed: Tensor
    copied: Tensor
    """The last frame that was given, (batch, 1, height, width): the baseline."""


class WorldModel(Objective):
    """Flow matching of the next frame, given past frames and actions; judged by rollouts of its own.

    `rollout_mse` is the mean squared error of pixels in 0..1 over `rollout` frames of dreams that begin with
    held-out frames and are told the true actions; `copy_mse` that of the last frame given, repeated.
    """

    headline = "rollout_mse"
    higher_is_better = False

    def __init__(self, settings: WorldModelRun, data: DataSet) -> None:
        super().__init__(settings, data)
        require_kind(data, ("frames",), "world_model")
        self.config = c = settings.objective
        train, test = data.train, data.test
        assert isinstance(train, FrameSplit)
        self.shape = list(train.frames.shape[1:])
        if any(side % c.patch for side in self.shape):
            raise LabError(
                f"objective.patch = {c.patch}: does not divide the frames' sides, "
                f"{' x '.join(map(str, self.shape))} pixels. Use 1."
            )
        of_data = dreaming.network_shape(c.context, c.patch, data.num_classes, self.shape)
        backbone, self.parents = make_backbone(settings.model, ["unet"], **of_data)
        self.longest_attention = backbone.attention_tokens  # type: ignore[assignment]
        starts = self._starts(test)
        player = dreaming.Dreamer(backbone, c.patch, data.num_classes, *starts)
        self.players: dict[str, nn.Module] = {"model": player}

    def _starts(self, split: FrameSplit) -> tuple[Tensor, Tensor]:
        """Windows of frames and actions, spread over the held-out part."""
        context = self.config.context
        found = split.windows(context)
        if not len(found):
            raise LabError(
                f"data.source = {self.data.name!r}: no held-out stretch has objective.context = {context} "
                "frames. Record longer ones, or make it smaller."
            )
        some = found[torch.linspace(0, len(found) - 1, min(STARTS, len(found))).long()]
        at = some[:, None] + torch.arange(context)
        return split.frames[at], split.actions[at]

    def window(self, train: bool) -> int:
        c = self.config
        return c.context + (c.own_frames + 1 if train else c.rollout)

    # ---- learning ----

    @property
    def _way(self) -> dict[str, Any]:
        """How a frame is made."""
        return {"n_steps": self.config.sampling_steps, "noise": self.config.noise}

    def loss(self, player: str, batch: Batch) -> Loss:
        """Squared error of the velocity at a random time of the way to the last frame of each window.

        In a share of the batch, `own_frames` stand before it that the network has just dreamed, and on all
        there is noise: what it will see of itself in a rollout (GameNGen, arXiv 2408.14837, section 3.2.1).
        Pixels near what has moved count more.
        """
        c, model = self.config, self.players[player]
        frames, actions = dreaming.scaled(batch["frames"]), batch["actions"]
        n, device = len(frames), frames.device
        past, target = frames[:, -c.context - 1 : -1], frames[:, -1:]
        n_own = round(n * c.own_share) if c.own_frames else 0
        if n_own:
            begun, told = frames[:n_own, : c.context], actions[:n_own, : c.context - 1 + c.own_frames]
            with torch.no_grad():
                own = list(dreaming.dream(model, begun, told, n_steps=1, noise=c.noise))
            past = torch.cat((torch.cat((begun, *own), 1)[:, -c.context :], past[n_own:]))
        if c.context_noise:
            level = c.context_noise * torch.rand(n, 1, 1, 1, device=device)
            past = past + level * torch.randn_like(past)
        times = torch.rand(n, device=device)
        times = times * (torch.rand(n, device=device) >= c.first_share)
        x, velocity = flow_matching.along(target, times, dreaming.start_of(past, c.noise))
        errors = (model(x, past, times, actions[:, -c.context - 1 : -1]) - velocity).square()
        plain = errors.mean()
        if not c.motion_weight:
            return Loss(plain, {"loss": plain})
        loss = plain + c.motion_weight * (errors * near_motion(frames[:, -c.context - 1 : -1])).mean()
        return Loss(loss, {"loss": loss, "unweighted_loss": plain})

    # ---- the verdict ----

    def _rollouts(self, players: Players, batches: Iterable[Batch]) -> Iterator[Rollouts]:
        context = self.config.context
        generator = torch.Generator(device_of(players)).manual_seed(0)
        for batch in batches:
            frames = dreaming.scaled(batch["frames"])
            past, true = frames[:, :context], frames[:, context:]
            way = {**self._way, "generator": generator}
            made = torch.cat(list(dreaming.dream(players["model"], past, batch["actions"][:, :-1], **way)), 1)
            yield Rollouts(*((x + 1) / 2 for x in (true, made, past[:, -1:])))

    def _errors(self, players: Players, batches: Iterable[Batch]) -> Tensor:
        """(4, frames): mean squared errors of dream and copy, and both of the pixels that changed alone."""
        sums, n, n_changed = torch.zeros(()), 0, torch.zeros(())
        for true, dreamed, copied in self._rollouts(players, batches):
            changed = (true - copied).abs() > CHANGE / 255
            both = torch.stack(((dreamed - true).square(), (copied - true).square()))
            both = torch.cat((both, both * changed)).sum((1, 3, 4))
            sums, n = sums.to(both.device) + both, n + true[:, 0].numel()
            n_changed = n_changed.to(both.device) + changed.sum((0, 2, 3))
        whole = torch.full_like(n_changed, n)
        return sums / torch.stack((whole, whole, n_changed, n_changed)).clamp(min=1)

    def evaluate(self, players: Players, batches: Iterable[Batch]) -> dict[str, float]:
        errors = self._errors(players, batches)
        dreamed, copied, changed, copied_changed = errors.mean(1).tolist()
        return {
            "rollout_mse": dreamed,
            "copy_mse": copied,
            "rollout_mse_of_copy": dreamed / max(copied, 1e-12),
            "changed_mse_of_copy": changed / max(copied_changed, 1e-12),
            "steps_below_copy": float((errors[0] < errors[1]).sum()),
        }

    def examine(self, players: Players, compute: Compute) -> tuple[dict[str, float], list[str]]:
        """Step by step."""
        with torch.inference_mode(), compute.autocast():
            errors = self._errors(players, self.batches("test", compute.device).epoch(0)).tolist()
        numbers = {
            f"{name}_step_{step:02}": error
            for name, row in zip(("rollout_mse", "copy_mse"), errors, strict=False)
            for step, error in enumerate(row, 1)
        }
        return numbers, [
            f"rollout: {self.config.rollout} frames dreamed from {self.config.context} held-out ones and the "
            "true actions; copy: the last of these, repeated"
        ]

    def spec(self) -> dict[str, Any]:
        return {"shape": self.shape, "actions": list(self.data.classes)}

    # ---- pictures ----

    def draw(self, players: Players, batches: Iterable[Batch], folder: Path) -> Iterator[tuple[str, Path]]:
        """Dreams below what really happened, and how errors grow."""
        batches = list(batches)
        errors = self._errors(players, batches).cpu().numpy()
        yield "rollout_error", figures.errors_by_step(folder / "rollout_error.png", errors[0], errors[1])
        some = [{name: value[:: max(1, len(value) // SHOWN)][:SHOWN] for name, value in batches[0].items()}]
        (found,) = self._rollouts(players, some)
        rows = torch.stack((found.true, found.dreamed), 1).flatten(0, 1)[:, :, None]
        images = (rows * 255).round().to(torch.uint8).cpu().numpy()
        names = ["true", "dreamed"] * len(found.true)
        steps = [str(step) for step in range(1, rows.shape[1] + 1)]
        yield "dream", figures.mosaic(folder / "dream.png", images, names, steps)
