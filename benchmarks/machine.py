"""The machine and the code a measurement was made with. Imports no torch."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from lab.device import usable_cores
from lab.run import git_state, package_versions

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "stable-baselines3", "ale-py", "gymnasium", "numpy", "opencv-python-headless")


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Processor, memory, system, versions, commit and date (UTC), as JSON values."""
    return {
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": usable_cores(),
        "ram_bytes": psutil.virtual_memory().total,
        # Other work on the machine shows here: near 0 when it was quiet.
        "load_average_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(packages),
        # Results themselves are no change of the code.
        "git": git_state(":!benchmarks/results"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    if (name := _cpuinfo("model name")) is not None:
        return name
    if platform.system() == "Darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    """Those of the processor's extensions that decide how fast it multiplies matrices."""
    flags = set((_cpuinfo("flags") or "").split())
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
