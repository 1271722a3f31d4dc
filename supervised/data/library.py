"""The sources of this Python's standard library: real text that is on every machine."""

import os
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def library_files() -> tuple[Path, list[Path]]:
    """The library's folder, and its files, sorted, without tests and what was installed."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        below[:] = set(below) - LEFT_OUT
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return root, sorted(found)
