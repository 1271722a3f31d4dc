"""How far, how fast, how long still, in words."""

from types import SimpleNamespace

import pytest

from lab.progress import Progress, duration, pace


@pytest.mark.parametrize(
    ("speed", "text"),
    [(1234.4, "1,234 steps/s"), (10, "10 steps/s"), (2.54, "2.5 steps/s"), (0.12, "8.3 s/step")],
)
def test_a_slow_pace_is_said_in_seconds_a_step(speed: float, text: str) -> None:
    assert pace(speed, "steps") == text


@pytest.mark.parametrize(("seconds", "text"), [(3723, "1h02m"), (62.4, "1m02s"), (59.6, "1m00s"), (5, "5s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_says_step_pace_time_left_and_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("lab.progress.time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(1_000)
    now = 5.0
    progress.update(50)  # too soon for another line
    now = 20.0
    progress.update(200, "return -20")
    line = capsys.readouterr().err
    assert [part.strip() for part in line.split("  ") if part] == [
        "200 / 1,000",
        "10 steps/s",
        "1m20s left",
        "return -20",
    ]
