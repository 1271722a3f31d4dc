"""What strangers write is shown where it would be obeyed: terminals, spreadsheets, pages, refusals."""

import json
import logging
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import config
from lab.cli import main
from lab.config import parse_yaml
from lab.errors import LONGEST_LINE, LabError, brief, cut, did_you_mean
from lab.escape import cell, harmless, harmless_warnings, one_line, script_data
from lab.records import Record


@given(st.text())
def test_a_terminal_obeys_nothing(text: str) -> None:
    shown = harmless(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert harmless(shown) == shown
    if all(c.isprintable() or c in "\n\t" for c in text):
        assert shown == text, "what is harmless stays"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\u202etxt.exe", r"a\u202etxt.exe"),
        ("\x9b31m", r"\x9b31m"),
        ("\ud800", r"\ud800"),
        ("Größe 3 µm, 日本", "Größe 3 µm, 日本"),
    ],
)
def test_what_a_terminal_is_shown(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(st.text())
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    assert cell(text)[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert cell(text).endswith(text)


def test_numbers_stay_numbers_in_a_spreadsheet() -> None:
    assert [cell(value) for value in (-1, -0.5, None, "x")] == [-1, -0.5, None, "x"]


@given(st.recursive(st.text(), lambda below: st.lists(below) | st.dictionaries(st.text(), below)))
def test_data_within_a_script_neither_ends_it_nor_changes(value: object) -> None:
    text = script_data(value)
    assert json.loads(text) == value
    assert not set("<>&") & set(text)


def test_a_record_speaks_to_nobody() -> None:
    record = Record(id="a\x1b[2J", name="one\nline", source="x", config={"a\x07": "\u202e", "b": 1})
    assert (record.id, record.name) == (r"a\x1b[2J", "one line")
    assert record.config == {r"a\x07": r"\u202e", "b": 1}
    assert one_line(" a \t b\n") == "a b"


# ---- lines of refusal ----


@given(st.text(max_size=3_000) | st.integers() | st.lists(st.integers(), max_size=500))
def test_a_value_in_an_error_is_short(value: object) -> None:
    assert len(brief(value)) <= 200
    assert len(repr(value)) > 200 or brief(value) == repr(value)


def test_a_long_line_keeps_what_it_is_about_and_what_to_do() -> None:
    line = cut(f"file: {'x' * 5_000}. Remove it.", LONGEST_LINE)
    assert line.startswith("file: xxx")
    assert line.endswith("xxx. Remove it.")
    assert len(line) <= LONGEST_LINE


def test_nothing_is_guessed_for_a_very_long_word() -> None:
    assert did_you_mean("a" * 100_000, ["a" * 99_999]) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "\x1b]0;x\x07.yaml"],
        ["train", "x" * 4_000],
        ["evaluate", "y" * 300],
        ["list", "z" * 100_000],
        ["evaluate", "run", "--seed", "9" * 5_000],
        ["sweep", "\u202esweep"],
    ],
)
def test_every_refusal_is_short_and_plain(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert len(line) <= LONGEST_LINE + len("lab: ")


@pytest.mark.parametrize(
    ("word", "nearest"), [("evalute", "evaluate"), ("rhlf", "rlhf"), ("swep", "sweep"), ("lsit", "list")]
)
def test_commands_and_kinds_are_guessed(word: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert f"no command {word!r}. Did you mean {nearest!r}?" in capsys.readouterr().err
    assert main(["list", "gaems"]) == 2
    assert "no kind 'gaems'. Did you mean 'games'?" in capsys.readouterr().err


# ---- limits before parsing ----


def nested(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [*a]", "an alias refers to itself"),
        (nested(9, 9), "values, aliases written out"),
        (nested(40, 2), "values, aliases written out"),
        ("[" * 5_000, "nested more than"),
        ("{a: " * 3_000, "nested more than"),
        ("[" * 60 + "]" * 60, "nested more than"),
        ("!!timestamp x", "not valid YAML"),
        ("!!int ''", "not valid YAML"),
        ("!!set [1]", "not valid YAML"),
        ("9" * 6_000, "not valid YAML"),
        ("1" + "0" * 400, "not valid YAML"),
        ("x" * 100_001, "longer than 100,000 characters"),
        ("!!python/object/apply:os.system [id]", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: the key 'a' is there twice"),
    ],
)
def test_yaml_that_is_no_config_is_refused_at_once(text: str, problem: str) -> None:
    with pytest.raises(LabError) as caught:
        parse_yaml(text, "config.yaml")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_ordinary_aliases_and_merges_are_read() -> None:
    text = "base: &base {width: 3, names: &names [a, b]}\nmine: {<<: *base, depth: 2}\nagain: *names"
    expected = {"width": 3, "names": ["a", "b"]}
    assert parse_yaml(text, "") == {"base": expected, "mine": {**expected, "depth": 2}, "again": ["a", "b"]}


def test_thousands_of_keys_take_no_longer_each() -> None:
    assert len(parse_yaml("\n".join(f"k{n}: 1" for n in range(4_000)), "")) == 4_000


@pytest.mark.parametrize("value", ["a\0b", "\ud800", 2**64, -(2**63) - 1])
def test_values_that_no_file_can_hold_are_refused(value: object) -> None:
    from rlhf.config import RLHFRun

    key = "seed" if isinstance(value, int) else "name"
    with pytest.raises(LabError, match=f"command line: {key} = .* is not valid"):
        config.build(RLHFRun, {}, {key: value}, "config.yaml")


def test_what_libraries_warn_of_reaches_the_terminal_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers and PEFT repeat names of tensors and keys from files as these are."""
    name = "\x1b]0;obey\x07\u202e" + "z" * 5_000
    handler = logging.StreamHandler()
    log = logging.getLogger("some.library")
    log.addHandler(handler)
    try:
        with harmless_warnings(), warnings.catch_warnings():
            warnings.simplefilter("always")
            log.warning("unused: %s", name)
            print(warnings.formatwarning(name, UserWarning, "file.py", 1))
    finally:
        log.removeHandler(handler)
    captured = capsys.readouterr()
    for said in (captured.out, captured.err):
        assert "\\x1b]0;obey\\x07\\u202e" in said
        assert not any(c in said for c in "\x1b\x07\u202e")
        assert max(map(len, said.splitlines())) <= LONGEST_LINE
    assert logging.getLogRecordFactory() is logging.LogRecord
