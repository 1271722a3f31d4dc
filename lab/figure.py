"""Pictures of runs: matplotlib figures, written whole or not at all, in which names are only names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lab.files import explain_write_errors, written_aside


@contextmanager
def drawn(paths: Path | Sequence[Path], width: float, height: float, dpi: int = 120) -> Iterator[Any]:
    """Yields a matplotlib figure of this size in inches; what is drawn on it becomes PNG or SVG files.

    A dollar begins no formula. Texts from files are passed through `shown`.

    Raises:
        LabError: a file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        for path in [paths] if isinstance(paths, Path) else paths:
            explained = explain_write_errors(str(path), "Free some space and try again.")
            with explained, written_aside(path) as aside:
                figure.savefig(aside, format=path.suffix[1:])


def shown(text: str) -> str:
    """A text as matplotlib's font can show it: what it has no glyph for is spelled out."""
    known = _glyphs()
    return "".join(
        c if c.isprintable() and ord(c) in known else c.encode("unicode_escape").decode() for c in text
    )


@cache
def _glyphs() -> Mapping[int, int]:
    """What matplotlib's own font can show, by code point."""
    from matplotlib.font_manager import findfont, get_font

    return get_font(findfont("DejaVu Sans")).get_charmap()
