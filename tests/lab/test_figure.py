"""Names in pictures are only names, and every picture, page and table escapes them at one place."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.figure import drawn, shown
from tests.conftest import REPO

NAMES = ["$\\foo$", "a $5 or $6", "$$", "\\$", "x^{", "\x1b[31m", "a\0b", "\ud800", "\u202etxt", "日本", "\n"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_any_name_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"names{suffix}"
    with drawn(path, 6, 6) as figure:
        axes = figure.subplots()
        names = [shown(name) for name in NAMES]
        axes.plot([0, 1], [0, 1e-9], label=names[0])
        axes.set(title=names[0], xlabel=names[1], ylabel=names[2])
        axes.set_yticks(range(len(names)), names)
        axes.legend()
    assert path.stat().st_size > 1_000
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"


@given(st.text(st.characters()))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_what_is_shown_can_be_shown(text: str) -> None:
    assert shown(text).isprintable()
    assert shown(shown(text)) == shown(text)


def test_what_the_font_has_stays() -> None:
    assert shown("Größe $5 µm, \\alpha") == "Größe $5 µm, \\alpha"
    assert shown("a\tb日") == "a\\tb\\u65e5"


@pytest.mark.parametrize(
    ("by_hand", "place"),
    [
        (r"matplotlib\.figure|savefig|parse_math", "lab/figure.py"),
        (r"html\.escape|<\\\\?u003c|replace\(\"<\"", "lab/escape.py"),
    ],
)
def test_one_place_escapes_for_a_medium(by_hand: str, place: str) -> None:
    code = [path for room in ("lab", "supervised", "rl", "rlhf") for path in (REPO / room).rglob("*.py")]
    found = {str(path.relative_to(REPO)) for path in code if re.search(by_hand, path.read_text("utf-8"))}
    assert found == {place}
