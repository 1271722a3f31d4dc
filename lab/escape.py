"""Names and texts of strangers where something may obey them: one function for each medium.

    harmless      a terminal          escape sequences, directions of writing
    cell          a spreadsheet       formulas
    markup        a page              tags, attributes
    script_data   a script in a page  the end of the script, comments

Of plots, which need a font for it, see `lab.figure`.
"""

import contextlib
import html
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from lab.errors import cut

LONGEST_MESSAGE = 1_000
"""Characters of a line of what a library warns of."""


def harmless(text: str) -> str:
    """A text for a terminal: what it would obey and not show is spelled out. Newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A name, as `harmless`, without newlines and tabs."""
    return harmless(" ".join(text.split()))


@contextlib.contextmanager
def harmless_warnings() -> Iterator[None]:
    """Within, what is logged or warned of reaches no terminal but as `harmless`, in lines that end: libraries
    repeat names from files there as they are."""
    record, form = logging.getLogRecordFactory(), warnings.formatwarning

    def formatted(*args: Any, **kwargs: Any) -> str:
        return _short(form(*args, **kwargs))

    logging.setLogRecordFactory(_HarmlessRecord)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(record)
        warnings.formatwarning = form


class _HarmlessRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return _short(super().getMessage())


def _short(text: str) -> str:
    return "\n".join(cut(harmless(line), LONGEST_MESSAGE) for line in text.split("\n"))


def cell(value: Any) -> Any:
    """A value for CSV: a text that a spreadsheet would compute becomes one that it shows."""
    is_formula = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if is_formula else value


def markup(text: str) -> str:
    """A text to stand in HTML, attributes included."""
    return html.escape(text, quote=True)


def script_data(value: Any) -> str:
    """JSON to stand within `<script>`: no text in it ends the script or begins a comment there."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
