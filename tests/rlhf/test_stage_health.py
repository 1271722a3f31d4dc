"""Runs that went wrong say so."""

import warnings as python_warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lab.errors import LabError
from rlhf.health import Health, check_weights, warn
from rlhf.stage import quiet_transformers


def logged(health: Health, *rows: dict[str, float]) -> None:
    arguments: Any = SimpleNamespace()
    for step, row in enumerate(rows, 1):
        health.on_log(arguments, SimpleNamespace(global_step=step), arguments, logs=row)  # type: ignore[arg-type]


def warnings(health: Health, steps: int = 9) -> list[str]:
    return health.warnings(SimpleNamespace(global_step=steps))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "loss/policy_avg", "val/critic_grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_ends_the_stage(key: str, value: float) -> None:
    with pytest.raises(LabError, match=f"ppo: {key} is .* at step 2: it has diverged"):
        logged(Health("ppo"), {key: 1.0}, {key: value})


def test_weights_that_are_not_finite_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    check_weights(model, "sft")
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(LabError, match="sft: weights are no longer finite \\(bias"):
        check_weights(model, "sft")


def test_what_voids_a_result_is_said() -> None:
    health = Health("ppo")
    assert warnings(health, steps=0) == ["no update was made"]
    assert warnings(health) == ["all gradients were 0, so nothing was learned"]
    logged(health, *({"grad_norm": 0.5, "val/explained_variance": -3.0} for _ in range(6)))
    (line,) = warnings(health)
    assert "explained variance -3.00" in line
    better = Health("ppo")
    logged(better, *({"grad_norm": 0.5, "val/explained_variance": v} for v in (-9, -9, -9, 0.1, 0.3, 0.2)))
    assert warnings(better) == []


def test_warnings_are_kept_once() -> None:
    summary: dict[str, Any] = {}
    said: list[str] = []
    stage = SimpleNamespace(
        run=SimpleNamespace(info={"summary": summary}, summarize=lambda **more: summary.update(more)),
        progress=SimpleNamespace(say=said.append),
    )
    warn(stage, "a", "b")
    warn(stage, "b")
    warn(stage)
    assert summary == {"warnings": ["a", "b"]}
    assert len(said) == 3


def test_what_transformers_says_of_the_users_model_is_said_once_and_its_advice_is_not(
    save_tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

    folder, said = save_tiny("llama"), list[str]()
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    with quiet_transformers(said.append):
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=4)
        for _ in range(2):  # the library's own warning of what would be cut off, or crash
            tokenizer.deprecation_warnings.clear()
            tokenizer("it is great . " * 3)
        LlamaConfig(vocab_size=10, bos_token_id=77)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)  # a fresh score layer
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("always")
            python_warnings.warn("Adapter keys\nare missing", UserWarning, stacklevel=1)
    assert len(said) == 3, said
    assert all(line.startswith("         warning: ") and "\n" not in line for line in said)
    for line, words in zip(
        said, ("Token indices sequence length", "within the vocabulary", "keys are"), strict=True
    ):
        assert words in line
    assert transformers.logging.get_verbosity() == verbosity
    assert capfd.readouterr().err == ""
