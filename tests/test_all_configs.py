"""What configs say of themselves: `lab list configs` shows their first lines; results are kept elsewhere."""

import re
from pathlib import Path

import pytest

from lab import cli

REPO = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
RESULT = re.compile(
    r"\d\s?%|\bBLEU \d|\b(?:accuracy|R\^?2|perplexity|loss|score|return) (?:of )?-?\d"
    r"|\b(?:\d+|an?|one|two|three|four|five|six|seven|ten) (?:minutes?|hours?)\b",
    re.IGNORECASE,
)
"""How results and times are told: these are in benchmarks/results/, measured anew by commands."""


def header(path: Path) -> list[str]:
    """The comment that a config begins with, line by line."""
    text = path.read_text(encoding="utf-8")
    return [line.removeprefix("#").strip() for line in re.match(r"(#.*\n)*", text)[0].splitlines()]  # type: ignore[index]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_a_sentence_that_the_list_shows_whole(path: Path) -> None:
    first = header(path)[0]
    assert first == cli._first_comment(path)
    assert first[0].isupper() or first.split()[0].endswith(".yaml")
    assert first.endswith((".", "?")), "a sentence ends on its line"
    assert first.count("(") == first.count(")")
    assert len(first) <= 100


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_tells_no_result_that_a_new_measurement_would_contradict(path: Path) -> None:
    assert not [line for line in header(path) if RESULT.search(line)]


@pytest.mark.parametrize(
    "line",
    [
        "LeNet-5 (1998) on Fashion-MNIST: 90.5% within 6 minutes on two cores.",
        "English into German by a Transformer: BLEU 33.",
        "A world model of Pong, an hour on one CPU core.",
        "In this order (the second takes seven minutes on one CPU core):",
    ],
)
def test_results_are_found_where_they_are_told(line: str) -> None:
    assert RESULT.search(line)


def test_the_list_shows_all_configs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["list", "configs"]) == 0
    shown = capsys.readouterr().out
    for path in CONFIGS:
        assert header(path)[0] in shown
