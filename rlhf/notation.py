"""Lists and objects written into a text: as JSON, or as Python and numpy print them.

A table of text has no other way to hold a conversation: `to_csv` of pandas and of datasets prints it.
"""

import ast
import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<word>True|False|None|nan)\b
    |(?P<begin>[\[{])|(?P<end>[\]}])|(?P<between>[,:])
    |(?P<numpy>(?:np\.\w+|array)\(|\))
    )""",
    re.VERBOSE,
)
_TYPE = re.compile(r",\s*dtype=[\w.]+\s*(?=\))")
_WORDS = {"True": "true", "False": "false", "None": "null", "nan": "null"}


def written_in(text: str) -> Any:
    """The list or object that a text is the notation of, else the text itself; linear in its length."""
    if text[:1] not in ("[", "{") or text.rstrip()[-1:] not in ("]", "}"):
        return text
    for notation in (lambda: text, lambda: _as_json(text)):
        try:
            return json.loads(notation())
        except (ValueError, RecursionError):
            continue
    return text


def _as_json(text: str) -> str:
    """What Python or numpy printed, as JSON.

    Raises:
        ValueError: neither did.
    """
    pieces: list[str] = []
    at, after_value = 0, False
    text = text.rstrip()
    while at < len(text):
        if (kind := _TYPE.match(text, at)) is not None:
            at = kind.end()
            continue
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"no notation of Python's at {at}")
        at, kind, said = token.end(), token.lastgroup, token[token.lastgroup or 0]
        if kind == "numpy":
            continue
        if after_value and kind not in ("end", "between"):
            pieces.append(",")  # numpy puts none
        if kind == "text":
            said = json.dumps(ast.literal_eval(said))  # of one text: nothing can be nested in it
        elif kind == "number":
            said = json.dumps(float(said) if re.search("[.eE]", said) else int(said))
        pieces.append(_WORDS.get(said, said))
        after_value = kind not in ("begin", "between")
    return "".join(pieces)
