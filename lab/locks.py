"""Locks between processes: one that holds a file's lock loses it when it ends, however it ends."""

import time
from pathlib import Path
from typing import IO, Any

from lab.files import open_own

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes in one folder are then not caught
    fcntl = None

_ATTEMPTS, _PAUSE_SECONDS = 5, 0.01


def lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed, by this process and by all that inherited it.

    Returns:
        whether nobody else had locked it; True also where a file system has no locks.
    """
    if fcntl is None:
        return True
    for attempt in range(_ATTEMPTS):  # `is_locked` of another process holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE_SECONDS)
        except OSError:
            return True
        else:
            return True
    return False


def is_locked(path: Path) -> bool:
    """Whether a process has locked this file; one that is not there nobody has."""
    if fcntl is None:
        return False
    try:
        with open_own(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
