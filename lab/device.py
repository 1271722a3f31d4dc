"""Which device and number format a run computes on, and why; never a silent downgrade."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from lab.config import require
from lab.errors import LabError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
MOST_THREADS = 1024
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started."""
_MALLOC_KEEPS = {-1: 2**31 - 1, -2: 64 * 2**20, -3: 32 * 2**20}
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD (malloc.h), bytes; the last is 32 MiB at most."""
SHORT_TOKENS = 128
"""Rows up to which attention is quicker as plain products, see `attention_to_learn`."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where and how to compute."""

    device: str = "auto"
    """auto takes cuda, then mps, then cpu; a named device that is missing is an error."""
    precision: str = "auto"
    """auto computes in bf16 where the hardware multiplies it natively, else in fp32."""
    threads: int = 0
    """CPU threads for torch; 0 takes the idle cores, at most 4. CPU results are exact per thread count."""

    def __post_init__(self) -> None:
        base, _, index = self.device.partition(":")
        require(base in DEVICES, "device.device", f"{self.device!r} is none of {', '.join(DEVICES)}")
        require(
            self.device == base or (base == "cuda" and index.isdecimal() and len(index) < 4),
            "device.device",
            f"{self.device!r} has no such number: several GPUs are cuda:0, cuda:1 and so on",
        )
        require(
            self.precision in PRECISIONS,
            "device.precision",
            f"{self.precision!r} is none of {', '.join(PRECISIONS)}",
        )
        require(
            0 <= self.threads <= MOST_THREADS,
            "device.threads",
            f"{self.threads} must be 0 (choose for me) to {MOST_THREADS:,}",
        )


@dataclass(frozen=True)
class Compute:
    """The outcome of a `DeviceConfig` on this machine."""

    device: "torch.device"
    precision: str
    threads: int
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context a forward pass runs in."""
        return autocast(self.device.type, self.precision)

    def line(self) -> str:
        """What a command says of it."""
        return f"device  {self.device}, {self.precision}, {self.threads} threads ({self.reason})"

    def describe(self) -> dict[str, Any]:
        """What run.json keeps."""
        return {
            "device": str(self.device),
            "precision": self.precision,
            "threads": self.threads,
            "reason": self.reason,
        }


def autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bf16, or for fp32 none, even inside another. The meta device has no autocast."""
    import torch

    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")


def attention_to_learn(
    device_type: str, precision: str, n_tokens: int, checkpointed: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass of `n_tokens` a row that gradients will go back through.

    On a CPU the backward pass of torch's fused attention in bf16 takes longer than plain products where rows
    are short. Forward and backward of causal attention in ms, fused and plain: 8 rows of 53 tokens with 9
    heads 13.2 and 6.2, 32 of 128 with 4 heads 66.6 and 45.8, but 32 of 256 with 6 heads 164 and 278.

    With gradient checkpointing the backward pass computes blocks again, outside of this context: they must
    come out as before, so it changes nothing.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device_type == "cpu" and precision == "bf16" and n_tokens <= SHORT_TOKENS and not checkpointed:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def quiet_threads() -> None:
    """Makes idle OpenMP threads sleep soon instead of spinning; must run before torch is imported.

    Threads that spin for long take the cores from the emulators, and on a shared machine make two threads
    several times slower than one; threads that never spin are slow to wake. Measured with PQN on two
    cores, agent steps a second: 2,315 with this, 2,024 without any spinning, 1,979 with the default.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> bool:
    """Lets the process keep the memory of freed tensors instead of giving it back after every layer.

    What was given back is fetched anew for the next layer, a page fault for every 4 KiB: 2,300 in a step of
    LeNet-5 on 128 images, 6,400 in one of ResNet-8. Without them the steps take 0.77 and 0.79 of the time on
    one thread, and ResNet-8's 0.68 on two.

    Returns:
        Whether this C library can be told so (glibc can).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) for parameter, value in _MALLOC_KEEPS.items())


def spare_core(compute: Compute) -> ThreadPoolExecutor | None:
    """A thread for work beside the main one on the CPU, or None where no core is left for it."""
    import torch

    if compute.device.type != "cpu" or usable_cores() < 2 * compute.threads:
        return None
    return ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,))


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def refuse_several_processes() -> None:
    """Raises where this process is one of several that are to train together.

    Nothing here shares work between processes: each would train all of the run, in the same folder.

    Raises:
        LabError: it was started by torchrun, accelerate launch, mpirun or the like.
    """
    for name in PROCESS_COUNTS:
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise LabError(
                f"{name} = {count}: a run trains in one process. Start it without torchrun, accelerate "
                "launch or mpirun; `lab sweep --jobs N` trains several runs at once."
            )


def check_without_torch(config: DeviceConfig) -> None:
    """Refuses what cannot work here, without the second it takes to import torch.

    Raises:
        LabError: a device that the installed torch cannot have, or one of several processes.
    """
    refuse_several_processes()
    if config.device.startswith("cuda") and importlib.metadata.version("torch").endswith("+cpu"):
        raise LabError(
            f"device.device = {config.device!r}: not available here (this torch is a CPU build). "
            "Use --device.device=auto."
        )


def resolve(
    config: DeviceConfig, before: Mapping[str, Any] | None = None, *, elsewhere: bool = False
) -> Compute:
    """Chooses device, number format and thread count, and sets torch's thread count.

    Args:
        config: what is wanted.
        before: `Compute.describe()` of the run being continued: what was left to choose is chosen as then,
            so that it goes on bit for bit.
        elsewhere: the config is that of a run that is only read (evaluated, filmed), perhaps on another
            machine: where the device it names is missing, `auto` chooses; `reason` says so, and a line
            on stderr.

    Raises:
        LabError: a device was named that this machine or this torch does not have, or this is one of several
            processes.
    """
    import torch

    refuse_several_processes()
    if before is not None:
        threads = before.get("threads")
        if before.get("precision") not in PRECISIONS or not isinstance(threads, int) or threads < 1:
            raise LabError("run.json: `compute`, how the run computed, is damaged. Restore it from a copy.")
        if threads > MOST_THREADS:
            raise LabError(f"run.json: compute.threads = {threads:,} are too many. Restore it from a copy.")
        precision = before["precision"] if config.precision == "auto" else config.precision
        config = replace(config, precision=precision)
    wanted = config.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    base, _, index = wanted.partition(":")
    missing_here = wanted != "auto" and (
        not available[base] or (index != "" and int(index) >= torch.cuda.device_count())
    )
    instead = f"{wanted} of the run's config is not here; " if missing_here and elsewhere else ""
    if instead:
        wanted = "auto"
    if wanted == "auto":
        name = next(device for device, there in available.items() if there)
        missing = [device for device in ("cuda", "mps") if not available[device]]
        reason = f"{instead}auto: {name}" + (
            f", because there is no {' and no '.join(missing)}" if name == "cpu" else ""
        )
    else:
        name, reason = wanted, f"{wanted}: named in the config"
        if missing_here:
            build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
            build += f", {torch.cuda.device_count()} GPUs" if available["cuda"] else ""
            raise LabError(
                f"device.device = {wanted!r}: not available here (torch {torch.__version__} is {build}). "
                "Use --device.device=auto."
            )
    device = torch.device(name)
    native = _multiplies_bf16(device.type)
    precision = ("bf16" if native else "fp32") if config.precision == "auto" else config.precision
    if config.precision == "auto":
        reason += f"; {precision}, because this {device.type} {'has' if native else 'lacks'} native bf16"
    threads, why = _choose_threads(config, before)
    reason += f"; {threads} thread{'s' * (threads > 1)}, {why}"
    torch.set_num_threads(threads)
    # Adam's running squares of small gradients are denormal numbers, which the CPU handles in microcode:
    # with them, a step of the optimiser took six times as long.
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        keep_freed_memory()
    compute = Compute(device, precision, threads, reason)
    if instead:
        print(compute.line(), file=sys.stderr)
    return compute


def _choose_threads(config: DeviceConfig, before: Mapping[str, Any] | None) -> tuple[int, str]:
    """How many CPU threads, and why so many."""
    if config.threads:
        return config.threads, "named in the config"
    if before is not None:
        return before["threads"], "as in the run so far"
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named), "by OMP_NUM_THREADS"
    # A thread whose core is taken holds up all others at every barrier: with one of two cores taken, two
    # threads were ten times slower than one. So look for half a second how busy the machine is.
    cores = usable_cores()
    busy = psutil.cpu_percent(interval=0.5) / 100
    return max(1, min(int(cores * (1 - busy) + 0.3), 4)), f"at most 4 of the idle ones of {cores} cores"


def _multiplies_bf16(device_type: str) -> bool:
    import torch

    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False
