"""A run that went wrong says so: numbers that are none end it, and what voids a result is said at its end."""

import math
import statistics
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lab.errors import LabError

CRITIC_ROLLOUTS = 6
"""Rollouts from which on a critic is expected to explain something."""
CRITIC_WORST = -0.5
"""Explained variance below which a critic's values are worse than none: then 0 is the mean's."""


def check_weights(model: nn.Module, what: str) -> None:
    """Raises a `LabError` if a parameter is not finite."""
    sums = [p.detach().float().sum() for p in model.parameters()]
    if sums and not bool(torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all()):
        names = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if names:
            raise LabError(
                f"{what}: weights are no longer finite ({names[0]} and {len(names) - 1} more). Its last "
                "checkpoint is from before. Lower its learning_rate, or compute in fp32."
            )


class Health(TrainerCallback):
    """Ends training at the first loss or gradient that is not finite; keeps what the end must say."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.moved = False
        """Whether any gradient was not 0."""
        self.explained: list[float] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, value in (logs or {}).items():
            if ("loss" in key or "grad_norm" in key) and not math.isfinite(float(value)):
                raise LabError(
                    f"{self.stage}: {key} is {float(value)} at step {state.global_step}: it has diverged. "
                    "Its last checkpoint is from before. Lower its learning_rate, or compute in fp32."
                )
        norms = [float(value) for key, value in (logs or {}).items() if key.endswith("grad_norm")]
        self.moved = self.moved or any(norms)
        if logs and "val/explained_variance" in logs:
            self.explained.append(float(logs["val/explained_variance"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save:
            check_weights(kwargs["model"], self.stage)

    def warnings(self, state: TrainerState) -> list[str]:
        """What makes the result worthless or doubtful, one line each."""
        found = []
        if not state.global_step:
            found.append("no update was made")
        elif not self.moved:
            found.append("all gradients were 0, so nothing was learned")
        late = self.explained[len(self.explained) // 2 :]
        if len(self.explained) >= CRITIC_ROLLOUTS and (worth := statistics.median(late)) < CRITIC_WORST:
            found.append(
                f"the critic explains nothing (explained variance {worth:.2f} in the second "
                "half; 0 is as good as a constant). Lower ppo.critic_learning_rate"
            )
        return found


def warn(stage: Any, *lines: str) -> None:
    """Says what makes a stage's result doubtful, and keeps it in run.json's summary under `warnings`."""
    if lines:
        known = stage.run.info["summary"].get("warnings", [])
        stage.run.summarize(warnings=[*known, *(line for line in lines if line not in known)])
    for line in lines:
        stage.progress.say(f"         warning: {line}.")
