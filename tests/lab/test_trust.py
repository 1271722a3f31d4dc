"""Nothing that a file names runs without `--trust`, and what runs with it is shown."""

import hashlib
from pathlib import Path

import pytest

from lab import trust
from lab.errors import LabError

NAME = "python:score.py:score"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "score.py"
    path.write_text("def score(prompt, answer): return 0.0\n")
    return path


def ask(code: Path) -> None:
    trust.require(NAME, f"runs {code}", "collect.labeler", [code])


@pytest.mark.parametrize("names", [(), ("python:score.py:scor",), ("score.py",), ("python:score.py:score ",)])
def test_what_is_not_trusted_is_refused_and_named(code: Path, names: tuple[str, ...]) -> None:
    with trust.given(names), pytest.raises(LabError) as caught:
        ask(code)
    assert str(caught.value) == f"collect.labeler: runs {code}. If you trust it, add --trust={NAME}"


def test_an_error_names_the_record(code: Path, tmp_path: Path) -> None:
    with trust.given((), tmp_path), pytest.raises(LabError, match=f"^{tmp_path}: collect.labeler: runs"):
        ask(code)


@pytest.mark.parametrize("names", [("",), (NAME,), ("", "other")])
def test_what_is_trusted_is_shown_once_with_its_hash(
    code: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with trust.given(names):
        ask(code)
        ask(code)
    said = capsys.readouterr()
    assert said.out == "", "standard output is for results"
    assert said.err.count(hashlib.sha256(code.read_bytes()).hexdigest()) == 1
    assert NAME in said.err


def test_a_name_that_nothing_asked_for_is_said(code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with trust.given((NAME, "python:score.py:scoer")):
        ask(code)
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line
        == f"lab: --trust=python:score.py:scoer: nothing of that name was to be run. Did you mean {NAME!r}?"
    )


def test_consent_ends_with_the_command_and_passes_to_its_children(code: Path) -> None:
    with trust.given(("", "a b")):
        assert trust.arguments() == ["--trust", "--trust=a b"]
        with trust.given(()):
            assert trust.arguments() == []
            with pytest.raises(LabError):
                ask(code)
        ask(code)
    assert trust.arguments() == []
    assert not trust.allows(NAME)


def test_a_bare_flag_takes_no_argument() -> None:
    assert trust.spelled_out(["rlhf", "--trust", "a.yaml", "--trust=x"]) == [
        "rlhf",
        "--trust=",
        "a.yaml",
        "--trust=x",
    ]
