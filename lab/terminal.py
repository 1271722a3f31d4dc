"""A terminal to play in: images as half blocks, keys as they are pressed, and all as it was in the end."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from lab.errors import LabError

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
"""The other screen, no cursor, empty."""
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}
_NAMES = {" ": "space", "\r": "enter", "\n": "enter"}


def require_terminal(what: str) -> None:
    """Raises unless a person can see and type.

    Raises:
        LabError: input or output is no terminal; `what` needs one.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LabError(f"{what}: needs a terminal to show pictures and read keys. Run it in one, unpiped.")


class Terminal:
    """While entered, the terminal is a screen of pictures and gives keys at once; Ctrl-C still interrupts.

    Raises:
        LabError: there is no terminal, or this system has no `termios`.
    """

    def __init__(self) -> None:
        self._before: list[Any] = []
        self._rest = ""
        self._in, self._out = -1, -1

    def __enter__(self) -> "Terminal":
        require_terminal("play")
        try:
            import termios
            import tty
        except ImportError:
            raise LabError("play: this system has no termios. Play under Linux, macOS or WSL.") from None
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._before = termios.tcgetattr(self._in)
        try:
            tty.setcbreak(self._in)
            self._write(_ENTER)
        except BaseException:  # an interrupt here would find nobody to restore it
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        import termios

        with contextlib.suppress(OSError):  # a window that was closed
            self._write(_LEAVE)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(self._in, termios.TCSAFLUSH, self._before)

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._out, data) :]

    def keys(self, until: float) -> list[str]:
        """What is pressed until a time of `time.monotonic`, and was before: up, down, left, right, space,
        enter, or a character. A terminal that is gone has pressed q."""
        pressed: list[str] = []
        while True:
            wait = max(0.0, until - time.monotonic())
            if not select.select([self._in], [], [], wait)[0]:
                return pressed
            try:
                data = os.read(self._in, 1024)
            except OSError:
                data = b""
            if not data:
                return [*pressed, "q"]
            found, self._rest = parse_keys(self._rest + data.decode(errors="ignore"))
            pressed += found

    def show(self, image: Any, lines: Sequence[str]) -> None:
        """Draws an image, uint8 (height, width), as large as there is room for, and lines below it."""
        columns, rows = _size(self._out)
        pixels = _fitted(image, columns, 2 * max(rows - len(lines), 1))
        text = [f"\x1b[H{half_blocks(pixels)}", *(f"{line[:columns]}\x1b[K" for line in lines)]
        self._write("\r\n".join(text) + "\x1b[J")


def parse_keys(text: str) -> tuple[list[str], str]:
    """The keys that a terminal sent, and the beginning of one that is not yet whole."""
    keys: list[str] = []
    while text:
        if text[0] != "\x1b":
            keys.append(_NAMES.get(text[0], text[0].lower()))
            text = text[1:]
        elif len(text) == 1 or (len(text) == 2 and text[1] in "[O"):
            return keys, text
        elif text[1] in "[O":
            end = next((i for i, c in enumerate(text[2:], 2) if c.isalpha() or c == "~"), None)
            if end is None:
                return keys, text
            keys += [_ARROWS[text[end]]] if text[end] in _ARROWS else []
            text = text[end + 1 :]
        else:
            text = text[1:]
    return keys, ""


def half_blocks(image: Any) -> str:
    """A grey image, uint8 (height, width), in 24-bit colours: each character is an upper pixel in its own
    colour over a lower one in that of its ground."""
    rows = []
    height = len(image)
    for y in range(0, height, 2):
        upper = image[y].tolist()
        lower = image[y + 1].tolist() if y + 1 < height else [0] * len(upper)
        row, before = "", (-1, -1)
        for pair in zip(upper, lower, strict=True):
            if pair[0] != before[0]:
                row += f"\x1b[38;2;{pair[0]};{pair[0]};{pair[0]}m"
            if pair[1] != before[1]:
                row += f"\x1b[48;2;{pair[1]};{pair[1]};{pair[1]}m"
            row, before = row + "\u2580", pair
        rows.append(f"{row}\x1b[0m\x1b[K")
    return "\r\n".join(rows)


def _fitted(image: Any, width: int, height: int) -> Any:
    """An image of pixels repeated as often as there is room, or else with some of them left out."""
    import numpy as np

    high, wide = image.shape
    times = min(width // wide, height // high)
    if times >= 1:
        return image.repeat(times, 0).repeat(times, 1)
    share = min(width / wide, height / high)
    new_high, new_wide = max(int(high * share), 1), max(int(wide * share), 1)
    return image[np.arange(new_high) * high // new_high][:, np.arange(new_wide) * wide // new_wide]


def _size(handle: int) -> tuple[int, int]:
    """Columns and rows; 80 and 24 where the terminal does not say."""
    with contextlib.suppress(OSError):
        columns, rows = os.get_terminal_size(handle)
        if columns and rows:
            return columns, rows
    return 80, 24
