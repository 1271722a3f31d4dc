"""The registry of backbones: `build(name, ...)` makes a plain module by name.

A backbone knows nothing of tasks, environments or trainers. It maps its input to `num_features` features
a sample, and its `spec` (JSON) together with its `name` rebuilds it. It never normalises pixels: images
come in as floats, channels first. One that also takes them as bytes, where 255 means 1.0, says so by an
attribute `takes_bytes`.
"""

import importlib
import inspect
from typing import Any, Protocol, runtime_checkable

from lab.errors import LabError, did_you_mean

# name -> module and class; the module is imported when the backbone is built, so that listing is free.
_REGISTRY = {
    "mlp": ("supervised.backbones.mlp", "MLP"),
    "nature_cnn": ("supervised.backbones.cnn", "NatureCNN"),
    "impala_cnn": ("supervised.backbones.cnn", "ImpalaCNN"),
    "gpt": ("supervised.backbones.transformer", "LabGPT"),
}


@runtime_checkable
class Backbone(Protocol):
    """What every backbone offers beside being a `torch.nn.Module`."""

    num_features: int
    spec: dict[str, Any]


def names() -> list[str]:
    """The names `build` knows."""
    return sorted(_REGISTRY)


def build(name: str, **spec: Any) -> Any:
    """Builds the backbone `name`, a `torch.nn.Module` that satisfies `Backbone`.

    Args:
        name: one of `names()`.
        spec: the backbone's own arguments, e.g. in_chans=4, img_size=(84, 84).

    Raises:
        LabError: unknown name, or an argument the backbone does not take or cannot use.
    """
    cls = _find(name)
    accepted = list(inspect.signature(cls).parameters)
    for key in spec:
        if key not in accepted:
            raise LabError(
                f"backbone {name}: unknown argument {key!r}.{did_you_mean(key, accepted)} "
                f"It takes {', '.join(accepted)}."
            )
    try:
        backbone = cls(**spec)
    except (TypeError, ValueError) as error:
        raise LabError(f"backbone {name}: {error}") from None
    backbone.spec = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
    return backbone


def _find(name: str) -> type:
    if name not in _REGISTRY:
        raise LabError(
            f"unknown backbone {name!r}.{did_you_mean(name, names())} `lab list backbones` shows them all."
        )
    module, cls = _REGISTRY[name]
    return getattr(importlib.import_module(module), cls)
