"""A stop request that falls where a test wants it."""

import os
import signal
from typing import Any


class Signals:
    """Within, SIGTERM is sent to this process at call `at` of a function; counts all calls."""

    def __init__(self, owner: Any, name: str, at: int) -> None:
        self.owner, self.name, self.at, self.calls = owner, name, at, 0
        self.whole = getattr(owner, name)

    def __enter__(self) -> "Signals":
        def function(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.whole(*args, **kwargs)

        setattr(self.owner, self.name, function)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.whole)
