"""Names and texts of strangers where something may obey them: one function for each medium.

    harmless      a terminal          escape sequences, directions of writing
    cell          a spreadsheet       formulas
    markup        a page              tags, attributes
    script_data   a script in a page  the end of the script, comments

Of plots, which need a font for it, see `lab.figure`.
"""

import html
import json
from typing import Any


def harmless(text: str) -> str:
    """A text for a terminal: what it would obey and not show is spelled out. Newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A name, as `harmless`, without newlines and tabs."""
    return harmless(" ".join(text.split()))


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
