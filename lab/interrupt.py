"""SIGINT, SIGTERM and SIGHUP as a polite request: finish the step, save, leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Windows has no SIGHUP."""


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end a command as Ctrl-C does, with a line; also before it has begun."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS[1:]:
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Stopped(KeyboardInterrupt):
    """A stop was requested, within what may be broken off; no `except Exception` on the way swallows it."""


class StopRequest:
    """While entered, the first signal to stop only sets `signal_name`; the second ends at once.

    A terminal that is closed sends SIGHUP; under nohup, which ignores it, it stays ignored.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a request raises where it falls: for what may last, and can be made again from its
        beginning.

        Raises:
            Stopped: a stop is requested, or was before.
        """
        self._at_once = True
        try:
            if not self:
                yield
        finally:
            self._at_once = False
        if self:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if self._at_once:
            raise Stopped
