"""The picture of a comparison: curves with their bands, scores with their intervals. PNG or SVG."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.compare import Comparison, Group
from lab.figure import drawn, shown
from lab.report import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#08477e", "#b33500", "#007f4c", "#e468a9", "#c38a00", "#009ce9", "#4b2f11", "#693ab8")
"""Told apart with any kind of color blindness (tests/lab/test_report_plot.py), 3:1 or more on white."""
REST = "#9aa1a8"
"""Of groups that have none of their own."""
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 3)))
"""Of the first and the second eight groups; with more, only the best and the baseline have a color."""
SEEDS_DRAWN = 60
"""With more runs than that their single curves would hide the groups'."""
LABEL_LENGTH = 44
"""Characters of a label in a plot."""


def palette(comparisons: Sequence[Comparison]) -> dict[str, int | None]:
    """Each group's number by its label; its color is that modulo 8, its dash the rest. None: drawn in grey.

    It is the same for all metrics. Of few groups each has one, by label; of many only the best of the first
    metric and the baseline.
    """
    first = comparisons[0]
    labels = list(dict.fromkeys(group.label for one in comparisons for group in one.groups))
    if len(labels) <= len(COLORS) * len(DASHES):
        return {label: sorted(labels).index(label) for label in labels}
    chosen = [group.label for group in first.groups if group.label != first.baseline][: len(COLORS) - 1]
    chosen.append(first.baseline)
    return {label: chosen.index(label) if label in chosen else None for label in labels}


def runs_are_few(comparison: Comparison) -> bool:
    """Whether curves of single runs are drawn."""
    return sum(group.n for group in comparison.groups) <= SEEDS_DRAWN


def has_profile(comparison: Comparison) -> bool:
    """Whether there are enough runs or tasks for performance profiles to say something."""
    return len(comparison.tasks) > 1 or max(group.n for group in comparison.groups) > 4


def unit(comparison: Comparison) -> str:
    """What the plots are of: the metric, as it is or scaled by each task's range (a note says which)."""
    metric = comparison.question.metric
    return f"{metric} (scaled)" if comparison.normalized else metric


def score_label(comparison: Comparison) -> str:
    """What the plot of scores shows."""
    return f"{unit(comparison)}: single runs, mean, {percent(comparison.question.confidence)} interval"


def shortened(label: str, length: int = LABEL_LENGTH) -> str:
    """A label with its middle left out where it is long: what tells groups apart stands at the ends."""
    if len(label) <= length:
        return label
    head = length * 3 // 5
    return f"{label[:head]}…{label[len(label) - (length - head - 1) :]}"


def draw(comparisons: Sequence[Comparison], paths: Sequence[Path]) -> None:
    """Draws curves and scores, a row of two plots per metric; the scores of many groups stand below.

    Raises:
        LabError: a file cannot be written.
    """
    colors = palette(comparisons)
    most = max(len(comparison.groups) for comparison in comparisons)
    many = most > 2 * len(COLORS)
    tall = 0.24 * most + 0.9  # inches for a row of text each
    width, height = (11, 3.8 + tall) if many else (12, max(3.6, tall))
    with drawn(paths, width, height * len(comparisons), dpi=110) as figure:
        if many:
            grid = figure.subplots(
                2 * len(comparisons), 1, height_ratios=[3.8, tall] * len(comparisons), squeeze=False
            )
            pairs = grid.reshape(len(comparisons), 2)
        else:
            pairs = figure.subplots(len(comparisons), 2, squeeze=False, width_ratios=[3, 2])
        for (curves, scores), comparison in zip(pairs, comparisons, strict=True):
            _draw_curves(curves, comparison, colors)
            _draw_scores(scores, comparison, colors)
            for axes in (curves, scores):
                axes.grid(alpha=0.25)
                axes.spines[["top", "right"]].set_visible(False)


def _style(number: int | None) -> tuple[str, str | tuple[int, tuple[int, ...]]]:
    if number is None:
        return REST, "-"
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def _draw_curves(axes: "Axes", comparison: Comparison, colors: dict[str, int | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    grey = 0
    for group in reversed(comparison.groups):  # the best on top
        number = colors[group.label]
        color, dash = _style(number)
        grey += number is None and group.curve is not None
        for record in group.records if runs_are_few(comparison) else ():
            series = group.run_curves[record.id]
            axes.plot(series.x, series.y, color=color, alpha=0.25, lw=0.8)
        if group.curve is None:
            continue
        x, (mean, low, high) = group.curve_x, group.curve
        width = 1.8 if number is not None else 0.7
        axes.plot(x, mean, color=color, ls=dash, lw=width, alpha=1 if number is not None else 0.6)
        if number is not None:
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes.set(xlabel=shown(comparison.x_label), ylabel=shown(unit(comparison)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    said = "color as in the plot of scores" + (f"; {grey} groups in grey" if grey else "")
    if all(group.curve is None for group in comparison.groups):
        said = ""
        where = axes.transAxes
        axes.text(0.5, 0.5, "no curve: one value a run", ha="center", transform=where, color="#666")
    axes.set_title(said, loc="left", fontsize=9, color="#666")


def _draw_scores(axes: "Axes", comparison: Comparison, colors: dict[str, int | None]) -> None:
    groups = comparison.groups
    places = range(len(groups))[::-1]
    for group, y in zip(groups, places, strict=True):
        color, dash = _style(colors[group.label])
        _draw_score(axes, group, y, color, dash)
    axes.set(xlabel=shown(score_label(comparison)).replace(": single", ":\nsingle"))
    axes.set_yticks(list(places), [shortened(shown(f"{group.label} (n={group.n})")) for group in groups])
    for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
        tick.set_color(_style(colors[group.label])[0] if colors[group.label] is not None else "#555")
        tick.set_fontsize(9)
    axes.set_ylim(-0.6, len(groups) - 0.4)


def _draw_score(
    axes: "Axes", group: Group, y: int, color: str, dash: str | tuple[int, tuple[int, ...]]
) -> None:
    scores = [score for task in group.scores.values() for score in task]
    axes.plot(scores, [y] * len(scores), "o", color=color, alpha=0.4, ms=4.5, mew=0)
    mean, low, high = group.interval
    if not math.isnan(low):
        axes.plot([low, high], [y, y], color=color, ls=dash, lw=3, alpha=0.5)
    if not math.isnan(mean):
        axes.plot([mean], [y], "|", color=color, ms=13, mew=2.5)
