"""Progress: a bar for people, plain lines where there is no terminal."""

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from lab.escape import harmless

PLAIN_SECONDS = 15.0


class Progress:
    """Shows how far a run is, how fast it goes and how long it still takes.

    Args:
        total: the step at which the run ends.
        start: the step at which this session begins (a resumed run begins late).
        unit: what a step is, e.g. "steps".
        bar: False: plain lines only, where a person types answers in between.
    """

    def __init__(self, total: int, start: int = 0, unit: str = "steps", bar: bool = True) -> None:
        self._wants_bar = bar
        self._total, self._start, self._step, self._unit = total, start, start, unit
        self._began = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._note = ""

    def __enter__(self) -> "Progress":
        if self._wants_bar and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._start, speed="", note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def speed(self) -> float:
        """Steps per second in this session."""
        return (self._step - self._start) / max(time.monotonic() - self._began, 1e-9)

    def begin(self, start: int, total: int) -> None:
        """Says anew where this session begins and the run ends, once that is known."""
        self._total, self._start, self._step = total, start, start
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=start)

    def update(self, step: int, note: str | None = None) -> None:
        """Reports the current step; `note` replaces the text behind the bar."""
        self._step = step
        if note is not None:
            self._note = note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, speed=pace(self.speed, self._unit), note=self._note)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            left = max(self._total - step, 0) / max(self.speed, 1e-9)
            self.say(
                f"{step:>10,} / {self._total:,}  {pace(self.speed, self._unit)}  "
                f"{duration(left)} left  {self._note}"
            )

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar; a full disk behind stderr stops no training."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.console.print(harmless(line), highlight=False, markup=False)
            else:
                print(harmless(line), file=sys.stderr, flush=True)


def pace(speed: float, unit: str) -> str:
    """Speed in a form that is never 0: `1,234 steps/s`, `2.5 steps/s`, `8.3 s/step`."""
    if speed >= 10:
        return f"{speed:,.0f} {unit}/s"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / max(speed, 1e-9):.1f} s/{unit.removesuffix('s')}"


def duration(seconds: float) -> str:
    """`3723` -> `1h02m`, `62` -> `1m02s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
