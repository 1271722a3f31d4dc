"""What people see of a comparison: colors that anybody can tell apart, and plots of many groups."""

import itertools
import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lab import cli, report_plot
from lab.records import Series
from lab.report_page import thinned
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"
CSS = (Path(report_plot.__file__).parent / "page.css").read_text()
LIGHT, DARK = (re.findall(r"--c\d:(#\w{6})", part) for part in CSS.split("prefers-color-scheme:dark"))
BACKS = re.findall(r"--back:(#\w{3,6})", CSS)

# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", table 1, severity 1.0: linear RGB as somebody without one kind of cone sees it.
VISION = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# sRGB to CIE XYZ, D65.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
    """Linear RGB of #rrggbb or #rgb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    values = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@cache
def seen(color: str, vision: str) -> tuple[float, ...]:
    """CIE 1976 L*a*b* of a color as it is seen."""
    rgb = np.clip(np.array(VISION[vision]) @ linear(color), 0, 1)
    x, y, z = (
        t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116
        for t in XYZ @ rgb / np.array([0.9505, 1, 1.089])
    )
    return (116 * y - 16, 500 * (x - y), 200 * (y - z))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of luminances."""
    low, high = sorted(float(XYZ[1] @ linear(color)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("colors", "back"), list(zip((LIGHT, DARK), BACKS, strict=True)), ids=["light", "dark"]
)
def test_anybody_can_tell_the_colors_apart(colors: list[str], back: str, vision: str) -> None:
    assert len(colors) == len(report_plot.COLORS) == 8
    pairs = itertools.combinations([seen(color, vision) for color in colors], 2)
    assert min(math.dist(one, other) for one, other in pairs) > 20  # 2.3 can just be noticed
    assert min(contrast(color, back) for color in colors) >= 3, "WCAG 1.4.11, graphical objects"


def test_the_page_has_the_colors_of_the_picture() -> None:
    assert tuple(LIGHT) == report_plot.COLORS


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of 100 groups of two runs, one of them with a name of another kind."""
    root = tmp_path_factory.mktemp("many")
    made = make_run(root / "made", [], config={})
    for number in range(100):
        kind = "$\\foo$ <!--<script> \x1b[31m \u4e2d" if number == 50 else f"a rather long kind {number}"
        for seed in range(2):
            folder = root / "runs" / f"r{number}_{seed}"
            folder.mkdir(parents=True)
            about = {
                "id": folder.name,
                "name": folder.name,
                "config": {"seed": seed, "agent": {"kind": kind}},
            }
            (folder / "run.json").write_text(json.dumps({**made.info, **about, "seed": seed}))
            rows = [
                {"global_step": step, METRIC: number / 10 + step / 50 + seed} for step in range(0, 100, 10)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["compare", str(root / "runs"), f"--metric={METRIC}", "--out", str(root / "out")]) == 0
    return root / "out"


def test_with_many_groups_the_best_and_the_baseline_have_colors(many: Path) -> None:
    page = (many / "comparison.html").read_text()
    numbers = re.findall(r'"n":2,"color":(\d+|null)', page)
    assert len(numbers) == 100
    assert sorted(n for n in numbers if n != "null") == [str(n) for n in range(8)]
    assert numbers[:7] == [str(n) for n in range(7)], "in their order"


def test_a_picture_of_many_groups_can_be_read(many: Path) -> None:
    from PIL import Image

    image = Image.open(many / "comparison.png")
    assert image.height > 100 * 20, "a line of text each"
    assert image.width < 1500
    svg = (many / "comparison.svg").read_text()
    assert "legend" not in svg, "it would cover the curves"


def test_a_page_of_many_groups_can_be_mailed(many: Path) -> None:
    page = (many / "comparison.html").read_bytes()
    assert len(page) < 2_000_000
    assert b"<!--<script" not in page, "it would end the page's own script"
    assert b"://" not in page.replace(b"http://www.w3.org/2000/svg", b""), "nothing is loaded"


def test_a_thinned_curve_keeps_its_ends_and_peaks() -> None:
    y = np.sin(np.arange(10_000) / 700)
    y[1234], y[5678] = 9.0, math.nan
    kept = thinned(Series(np.arange(10_000.0), y), 100)
    assert kept.x.size <= 102
    assert (kept.x[0], kept.x[-1], np.nanmax(kept.y)) == (0, 9999, 9)
    assert (np.diff(kept.x) > 0).all()
    short = Series(np.arange(5.0), np.arange(5.0))
    assert thinned(short, 100) is short


def test_long_labels_keep_both_ends() -> None:
    label = "agent.learning_rate=0.0003, " * 4 + "n_step=3"
    short = report_plot.shortened(label)
    assert len(short) == report_plot.LABEL_LENGTH
    assert short.startswith("agent.learning_rate=")
    assert short.endswith("n_step=3")
    assert report_plot.shortened("short") == "short"
