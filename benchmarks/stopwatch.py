"""Where the wall time of a training loop goes, by part."""

import functools
import threading
import time
from collections import defaultdict
from typing import Any, Self


class Stopwatch:
    """Adds up the time wrapped functions take while it is entered.

    A wrapped function called by another counts as the other.

    Only the thread that made the stopwatch is timed. On a GPU kernels run after the call returns, so the
    parts are those of the launching thread; on a CPU they are exact.
    """

    def __init__(self) -> None:
        self.running = False
        self._inside = False
        self._thread = threading.get_ident()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._began = self._total_seconds = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replaces `owner.name` by a function that does the same and counts its time as `part`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.running or self._inside or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._inside = True
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[part] += time.perf_counter() - began
                self._calls[part] += 1
                self._inside = False

        setattr(owner, name, timed)

    def __enter__(self) -> Self:
        self.running = True
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._total_seconds += time.perf_counter() - self._began
        self.running = False

    def report(self, per: int) -> list[dict[str, Any]]:
        """Parts, longest first, "other" among them; `ms` and `calls` are divided by `per`."""
        seconds = dict(self._seconds)
        seconds["other"] = self._total_seconds - sum(seconds.values())
        return [
            {
                "part": part,
                "share": round(spent / self._total_seconds, 4),
                "ms": round(1000 * spent / per, 4),
                "calls": round(self._calls[part] / per, 3) if part in self._calls else None,
            }
            for part, spent in sorted(seconds.items(), key=lambda item: -item[1])
        ]
