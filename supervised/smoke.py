"""Any config as a run of seconds: does it all work here?"""

from collections.abc import Mapping
from typing import Any

from supervised.data import sources

STAND_INS = {
    "adversarial": "digits",
    "autoencoding": "digits",
    "classification": "digits",
    "denoising": "digits",
    "flow": "digits",
    "language_model": "python_library",
    "regression": "diabetes",
    "text_task": "python_origin",
    "super_resolution": "photographs",
    "translation": "number_words",
    "variational": "digits",
    "world_model": "catch",
}
"""By objective, data that is on every machine."""

NAME = "smoke"
MAY_BE_MISSING = ("fashion_mnist", "more_photographs")
STEPS, BATCH, CONTEXT = 3, 8, 64
SAMPLES, CHARACTERS = 300, 20_000
GENERATIVE = {"judge": None, "samples": 32}
CHEAPER: dict[str, dict[str, Any]] = {
    "adversarial": GENERATIVE,
    "autoencoding": {"foretell": 0},
    "denoising": {**GENERATIVE, "sampling_steps": 2, "bound_samples": BATCH, "bound_steps": 2},
    "flow": GENERATIVE,
    "super_resolution": {"judge": None, "perceptual_weight": 0.0},
    "variational": GENERATIVE,
}
"""By objective, what would make an evaluation long, or needs another run."""
KEPT = ("augment", "batch_tokens", "tokenizer", "vocab_size")
"""Of the data's settings, where the data is replaced."""


def smoke(values: Mapping[str, Any]) -> dict[str, Any]:
    """The raw config with few steps on little data that is there; model, objective and optimiser stay."""
    data, model, objective = (values.get(key) or {} for key in ("data", "model", "objective"))
    source = str(data.get("source"))
    if source not in sources.names() or source in MAY_BE_MISSING:
        source = STAND_INS.get(str(objective.get("name")), source)
        img_size = data.get("img_size")
        data = {key: data[key] for key in KEPT if key in data}
        data |= {"img_size": img_size or 28} if source == "digits" else {}
        data |= {"img_size": 128} if source == "photographs" else {}
    trained_elsewhere = data.get("tokenizer", "bytes") not in ("bytes", "bpe")
    never = {"every_epochs": 1e6}
    return {
        **values,
        "name": NAME,
        "max_steps": STEPS,
        "batch_size": min(values.get("batch_size", BATCH), BATCH),
        "accumulate": min(values.get("accumulate", 1), BATCH),
        "log_every_steps": 1,
        "compile": False,
        "data": {
            **data,
            "source": source,
            **({"tokenizer": "bytes"} if trained_elsewhere else {}),
            "limit": CHARACTERS if source == "python_library" else SAMPLES,
            "context": min(data.get("context", CONTEXT), CONTEXT),
            "batch_tokens": min(data.get("batch_tokens", 0), BATCH * CONTEXT),
        },
        "model": {**model, "start_from": None},
        "objective": {**objective, **CHEAPER.get(str(objective.get("name")), {})},
        "eval": never,
        "checkpoint": never,
        "tracking": {"wandb": "disabled"},
    }
