"""Playing by hand in a world model's dream: its frames in the terminal, its actions from the keyboard."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from lab.checkpoint import Checkpoint
from lab.device import Compute, resolve
from lab.errors import LabError
from lab.interrupt import StopRequest
from lab.run import Run
from lab.terminal import Terminal
from supervised import dreaming
from supervised.config import WorldModelConfig
from supervised.evaluate import judged_weights, run_config
from supervised.models import make_backbone
from supervised.trainer import part_of

FRAMES_PER_SECOND = 10.0
HOLD = 3
"""Frames that a key counts for: a terminal tells nothing of its release, and is slow to repeat it."""
KEYS = {
    **{"up": "up", "w": "up", "down": "down", "s": "down"},
    **{"left": "left", "a": "left", "right": "right", "d": "right", "space": "space"},
}
ACTIONS = {
    "up": ("UP", "RIGHT"),  # Pong's RIGHT is up, its LEFT down
    "down": ("DOWN", "LEFT"),
    "left": ("LEFT", "UP"),
    "right": ("RIGHT", "DOWN"),
    "space": ("FIRE",),
}
"""What a direction stands for: the first of these that the game has."""


class Dream:
    """A world model that is played.

    Args:
        model: with its weights, on the device.
        config: of its objective.
        compute: device and number format.
        seed: of the order of its beginnings, and of noise.
    """

    def __init__(
        self, model: dreaming.Dreamer, config: WorldModelConfig, compute: Compute, seed: int
    ) -> None:
        self.model, self.config, self.compute = model, config, compute
        self.generator = torch.Generator(compute.device).manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(model.starts), generator=order).tolist()
        self._begun = 0
        self.begin()

    def begin(self) -> None:
        """Starts anew, from the next of the real beginnings."""
        at = self._order[self._begun % len(self._order)]
        self._begun += 1
        self.past = dreaming.scaled(self.model.starts[at : at + 1])
        self.actions = self.model.start_actions[at : at + 1]

    @property
    def frame(self) -> Any:
        """The newest, uint8 (height, width)."""
        return dreaming.unscaled(self.past[0, -1]).cpu().numpy()

    def step(self, action: int) -> None:
        """Takes an action at the newest frame."""
        self.actions = torch.cat((self.actions[:, :-1], torch.full_like(self.actions[:, :1], action)), 1)
        with torch.inference_mode(), self.compute.autocast():
            x = dreaming.next_frame(
                self.model,
                self.past,
                self.actions,
                n_steps=self.config.sampling_steps,
                noise=self.config.noise,
                generator=self.generator,
            )
        self.past = torch.cat((self.past[:, 1:], x), 1)
        # The place of the newest frame's action is free until it is taken.
        self.actions = torch.cat((self.actions[:, 1:], torch.zeros_like(self.actions[:, :1])), 1)


def open_dream(run: Run, saved: Checkpoint, seed: int) -> tuple[Dream, list[str]]:
    """The world model of a checkpoint, without the data it learned from; and the names of its actions."""
    settings = run_config(run)
    config, spec = settings.objective, saved.state["spec"]
    assert isinstance(config, WorldModelConfig)
    compute = resolve(settings.device, run.info["compute"], elsewhere=True)
    weights = part_of(judged_weights(saved), "model")
    names = list(spec["actions"])
    of_data = dreaming.network_shape(config.context, config.patch, len(names), spec["shape"])
    # Not `start_from`: a checkpoint has all weights, and that run may be gone.
    model = settings.model
    backbone, _ = make_backbone(
        type(model)(backbone=model.backbone, spec=model.spec, adapt=model.adapt, lora_rank=model.lora_rank),
        ["unet"],
        **of_data,
    )
    dreamer = dreaming.Dreamer(
        backbone,
        config.patch,
        len(names),
        torch.zeros_like(weights["starts"]),
        torch.zeros_like(weights["start_actions"]),
    )
    dreamer.load_state_dict(weights)
    dreamer.to(compute.device).eval()
    return Dream(dreamer, config, compute, seed), names


def action_of(key: str, names: Sequence[str]) -> int | None:
    """The action a key stands for, None: none."""
    wanted = ACTIONS.get(KEYS.get(key, ""), ())
    return next((names.index(name) for name in wanted if name in names), None)


def play(dream: Dream, names: Sequence[str], title: str, max_steps: int) -> dict[str, Any]:
    """Plays until q, Ctrl-C or `max_steps`; returns how many frames there were, and how many a second.

    Raises:
        LabError: there is no terminal.
    """
    idle = names.index("NOOP") if "NOOP" in names else 0
    action, held, steps, speed = idle, 0, 0, 0.0
    began = time.monotonic()
    help_line = "arrows or wasd: move   space: fire   r: start anew   q: quit"
    with StopRequest() as stop, Terminal() as terminal:
        due = time.monotonic()
        while steps < max_steps and not stop:
            status = f"{title}   frame {steps}   {names[action].lower()}   {speed:.1f} frames/s"
            terminal.show(dream.frame, [status, help_line])
            due = max(due + 1 / FRAMES_PER_SECOND, time.monotonic())
            pressed = terminal.keys(due)
            if "q" in pressed:
                break
            if "r" in pressed:
                dream.begin()
                continue
            taken = [found for key in pressed if (found := action_of(key, names)) is not None]
            action, held = (taken[-1], HOLD) if taken else (action, held - 1)
            if held <= 0:
                action = idle
            dream.step(action)
            steps += 1
            speed = steps / (time.monotonic() - began)
    return {"steps": steps, "frames_per_second": round(speed, 1)}


def play_run(run: Run, saved: Checkpoint, seed: int, max_steps: int) -> dict[str, Any]:
    """Opens a run's world model and plays."""
    if "spec" not in saved.state or "actions" not in saved.state["spec"]:
        raise LabError(f"{saved.path}: is no world model's checkpoint. Name another with --checkpoint.")
    dream, names = open_dream(run, saved, seed)
    result = play(dream, names, run.info["name"], max_steps)
    return {"run": str(run.folder), "checkpoint": saved.path.name, **result}
