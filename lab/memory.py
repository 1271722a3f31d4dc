"""The machine's memory, and what containers and job schedulers leave of it to this process."""

from pathlib import Path

import psutil

from lab.errors import LabError


def free_bytes() -> int:
    """Memory that this process may still take."""
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _limits())])


def total_bytes() -> int:
    """Memory that the machine has, or that this process may have of it."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def require_memory(needed: float, what: str, remedy: str) -> None:
    """Raises unless so many bytes are free.

    Raises:
        LabError: they are not; `what` begins the line, `remedy` ends it.
    """
    if needed > (free := free_bytes()):
        raise LabError(
            f"{what} {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free. {remedy}"
        )


def _limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """What containers and job schedulers allow this process (Linux's control groups), and what is used of it.

    Files that the kernel keeps in memory as long as there is room do not count as used.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            base, names = (
                root / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        elif not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        here = Path(path.lstrip("/"))
        for group in (base / here, *(base / above for above in here.parents)):
            try:
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max", or another's namespace
                continue
            found.append((limit, max(0, used - int(stat.get(names[2], 0)))))
    return found
