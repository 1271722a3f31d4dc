"""Data sets by name, as tensors and as batches on the device.

`load` reads whatever a `DataConfig` names: sets that come with a dependency, local files, the Hub. Nothing
heavy is imported before it is needed: a config is checked without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supervised.data.batches import Batches
    from supervised.data.dataset import DataSet, load
    from supervised.data.splits import FrameSplit, Ragged, SequenceSplit, Split, TensorSplit, TokenSplit

_HOMES = {
    "Batches": "supervised.data.batches",
    "DataSet": "supervised.data.dataset",
    "load": "supervised.data.dataset",
    "FrameSplit": "supervised.data.splits",
    "Ragged": "supervised.data.splits",
    "SequenceSplit": "supervised.data.splits",
    "Split": "supervised.data.splits",
    "TensorSplit": "supervised.data.splits",
    "TokenSplit": "supervised.data.splits",
}

__all__ = [
    "Batches",
    "DataSet",
    "FrameSplit",
    "Ragged",
    "SequenceSplit",
    "Split",
    "TensorSplit",
    "TokenSplit",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
