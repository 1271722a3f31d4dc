"""Chat templates within limits: a stranger's may loop or grow without end.

transformers renders them in jinja2's sandbox, which keeps a template from all that is outside of it and lets
it take any time and memory: its `range` ends at 100,000, and two within each other do not. Here the same
environment also watches the clock at every step of a loop, call and filter, looks at the size of what would
multiply before it does, and of every text and list that is made. What is rendered is the same.
"""

import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lab.errors import LabError

SECONDS = 5.0
"""Of one rendering, which takes a thousandth of it."""
LONGEST = 2**22
"""Characters of a text, or values of a list with all that is in them: about a million tokens."""
LARGEST_BITS = 2**16
"""Of a number."""
_GROW = {
    *("center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "to_bytes"),
    *("translate", "zfill"),  # methods
    *("batch", "indent", "pprint", "round", "slice", "string", "sum", "tojson", "urlize"),  # filters
}
"""Methods and filters whose result may be as many times larger than their subject as they are told."""
_clock = threading.local()


class Endless(LabError):
    """A chat template that takes too long, or too much memory, on whatever it is given."""


def limit() -> None:
    """From now on transformers renders chat templates within these limits, for us and for TRL."""
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template
    if compiled.__module__ == __name__:
        return

    @functools.lru_cache
    def compile_within_limits(chat_template: str) -> jinja2.Template:
        if len(chat_template) > LONGEST:
            raise Endless(f"the chat template has more than {LONGEST:,} characters. Use another.")
        return _Environment(compiled("").environment).from_string(chat_template)

    compile_within_limits.__module__ = __name__
    chat_template_utils._compile_jinja_template = compile_within_limits


class _CodeGenerator(CodeGenerator):
    """Has the environment look at whatever is iterated over or put together."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        watch = nodes.EnvironmentAttribute("watched")
        node.iter = nodes.Call(watch, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def _measured(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._measured(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        with _Timed():
            return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        with _Timed():
            yield from super().generate(*args, **kwargs)


class _Environment(ImmutableSandboxedEnvironment):
    """Another sandbox, and the limits.

    Args:
        like: the other one: transformers', with its extensions, filters and functions.
    """

    code_generator_class = _CodeGenerator
    template_class = _Template
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, like: jinja2.Environment) -> None:
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(extension) for extension in like.extensions.values()],
            finalize=self.measured,
        )
        self.globals |= like.globals
        del self.globals["lipsum"]  # as much text as is asked for
        self.filters |= {name: self._limited(name, do) for name, do in like.filters.items()}

    def watched(self, values: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes through."""
        for value in values:
            _look_at_clock()
            yield value

    def measured(self, value: Any) -> Any:
        """A value, if it is not too large."""
        if size(value) > LONGEST:
            raise Endless(f"the chat template makes texts or lists of more than {LONGEST:,}. Use another.")
        return value

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """All that is written."""
        kept, n = [], 0
        for piece in pieces:
            _look_at_clock()
            kept.append(piece)
            n += len(piece)
            if n > LONGEST:
                self.measured(" " * n)
        return "".join(kept)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _look_at_clock()
        name = getattr(__obj, "__name__", "")
        if name in _GROW:
            args, kwargs = tuple(map(_listed, args)), {key: _listed(value) for key, value in kwargs.items()}
            method = getattr(__obj, "__wrapped__", __obj)  # jinja2 puts its own format around a text's
            _refuse_growth(name, getattr(method, "__self__", None), [*args, *kwargs.values()])
        return __self.measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _look_at_clock()
        if isinstance(left, int | float) and isinstance(right, int | float):
            if operator == "**" and math.log2(abs(left) + 1) * right > LARGEST_BITS:
                raise Endless("the chat template computes with numbers too large. Use another.")
        elif operator == "*":
            _refuse_growth(operator, left, [right])
            _refuse_growth(operator, right, [left])
        elif operator == "%":
            _refuse_growth("format", left, [right])
        return self.measured(super().call_binop(context, operator, left, right))

    def _limited(self, name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(do)  # with jinja2's mark of filters that take the context first
        def limited(*args: Any, **kwargs: Any) -> Any:
            _look_at_clock()
            if name in _GROW:
                args, kwargs = (
                    tuple(map(_listed, args)),
                    {key: _listed(value) for key, value in kwargs.items()},
                )
                subject, *given = args[getattr(do, "jinja_pass_arg", None) is not None :]
                _refuse_growth(name, subject, [*given, *kwargs.values()])
            return self.measured(do(*args, **kwargs))

        return limited


def _refuse_growth(name: str, subject: Any, given: list[Any]) -> None:
    """Raises if what is given to an operation could make its subject far larger than what is allowed."""
    factors = [size(subject)]
    if name in ("format", "format_map") and isinstance(subject, str):
        factors += [int(width) for width in re.findall(r"\d{4,18}", subject)]
        factors += [10**18] * (re.search(r"\d{19}", subject) is not None)
        if not re.search(r"\*|\{[^}]*\{", subject):  # no width is given
            given = [value for value in given if not isinstance(value, int)]
    for value in given[1:] if name == "replace" else given:
        some = value if isinstance(value, tuple) else (value,)
        counts = [abs(number) for number in some if isinstance(number, int)]
        factors.append(max([*counts, size(value)]))
    if math.prod(1 + factor for factor in factors) > 16 * LONGEST:
        raise Endless("the chat template makes texts or lists without measure. Use another.")


def _listed(value: Any) -> Any:
    """What can be counted, of an iterator its values."""
    return list(value) if isinstance(value, Iterator) else value


class _Timed:
    """Within, the clock of this thread runs."""

    def __enter__(self) -> None:
        self.outer = getattr(_clock, "until", None)
        _clock.until = self.outer or (time.monotonic() + SECONDS, time.thread_time() + SECONDS)

    def __exit__(self, *_: object) -> None:
        _clock.until = self.outer


def _look_at_clock() -> None:
    until = getattr(_clock, "until", None)
    # The wall's clock is the quicker to look at; on a busy machine it is the thread's own that counts.
    if until is not None and time.monotonic() > until[0] and time.thread_time() > until[1]:
        raise Endless(
            f"the chat template takes more than {SECONDS:g} seconds for a conversation. Use another."
        )


def size(value: Any) -> int:
    """Characters and values in a value, counted no further than `LONGEST` is passed."""
    n, left = 0, [value]
    while left and n <= LONGEST:
        value = left.pop()
        if isinstance(value, str | bytes):
            n += len(value)
        elif isinstance(value, list | tuple):
            n += len(value)
            left += value
        elif isinstance(value, range):
            n += len(value)
        elif isinstance(value, dict):
            n += len(value)
            left += [*value, *value.values()]
        elif isinstance(value, jinja2.utils.Namespace):
            left.append(value._Namespace__attrs)
            n += 1
        elif isinstance(value, int) and value.bit_length() > LARGEST_BITS:
            n += LONGEST + 1
        else:
            n += 1
    return n
