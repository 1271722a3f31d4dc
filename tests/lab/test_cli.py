"""What the command itself says, whatever it runs."""

from typing import Any

import pytest

from lab import cli


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "a.yaml"], "lab: stopped at once. Continue the run with --resume."),
        (["rlhf", "a.yaml"], "lab: stopped at once. The same command goes on where it stopped."),
        (["play", "runs/a"], "lab: stopped at once."),
    ],
)
def test_stopped_at_once_only_a_training_is_to_be_continued(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == f"{line}\n"
