"""The sources of this Python's standard library: real text that is on every machine."""

import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def library_files() -> tuple[Path, list[Path]]:
    """The library's folder, and its files, sorted, without tests and what was installed."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, [p for p in sorted(root.rglob("*.py")) if not LEFT_OUT & set(p.relative_to(root).parts)]
