"""Finds operations that make the host wait for the device: readiness for a GPU, proved without one."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero")


class HostReads(TorchDispatchMode):
    """Counts, while entered, operations that make the host wait for a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = args[1] if name == "aten.index.Tensor" else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if by_mask or any(read in name for read in HOST_READS):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))
