"""A `Comparison` for people: in the terminal, as Markdown and CSV, as plots, and as one page to open."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab.compare import Comparison, Group
from lab.escape import cell
from lab.files import explain_write_errors, write_atomic, written_aside
from lab.statistics import Interval, ThresholdSteps

if TYPE_CHECKING:
    from rich.console import Console

COLORS = ("#2a6fbb", "#c0504d", "#4f9d57", "#8064a2", "#d98b2b", "#3aa6a6", "#a0522d", "#7f7f7f")
"""Of the groups by their labels, so that a group has one in all plots; they repeat."""
SEEDS_DRAWN = 60
"""With more runs than that their single curves would hide the groups'."""


def colors(comparison: Comparison) -> list[str]:
    """A color for each group."""
    labels = [group.label for group in comparison.groups]
    return [COLORS[sorted(labels).index(label) % len(COLORS)] for label in labels]


def number(value: float) -> str:
    """Short, with the digits that matter."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def interval(of: Interval | None) -> str:
    """The point and its interval, as far as there is one."""
    if of is None or math.isnan(of.point):
        return "-"
    if math.isnan(of.low):
        return number(of.point)
    return f"{number(of.point)} [{number(of.low)}, {number(of.high)}]"


def reached(steps: ThresholdSteps | None) -> str:
    """When a threshold was reached, and by how many."""
    if steps is None:
        return "-"
    when = number(steps.median) if math.isfinite(steps.median) else "never"
    return f"{when} ({steps.reached}/{steps.total})"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column heads and a row of texts per group."""
    q, groups = comparison.question, comparison.groups
    several_tasks = len(comparison.tasks) > 1
    percent = f"{q.confidence:.0%}"
    heads = ["group", "runs", "mean", "std", "median", f"IQM [{percent}]"]
    if len(groups) > 1:
        heads.append(f"P(better than {comparison.baseline})")
    if several_tasks:
        heads.append(f"optimality gap to {q.gamma:g}")
    heads.append("area")
    if any(group.win_rate for group in groups):
        heads.append(f"Wilson [{percent}]")
    if q.threshold is not None:
        heads += [f"{comparison.x_label} to {q.threshold:g}", f"seconds to {q.threshold:g}"]
    rows = []
    for group in groups:
        row = [group.label, runs(group), number(group.mean), number(group.std), number(group.median)]
        row.append(interval(group.estimates.get("iqm")))
        if len(groups) > 1:
            baseline = group.label == comparison.baseline
            row.append("baseline" if baseline else interval(group.better_than_baseline))
        if several_tasks:
            row.append(interval(group.estimates.get("optimality_gap")))
        row.append(number(group.auc))
        if any(other.win_rate for other in groups):
            row.append(interval(group.win_rate))
        if q.threshold is not None:
            row += [reached(group.threshold_steps), reached(group.threshold_seconds)]
        rows.append(row)
    return heads, rows


def runs(group: Group) -> str:
    """How many runs count, of how many seeds, and what became of the others."""
    text = f"{group.n}"
    if group.seeds != group.n:
        text += f" of {group.seeds} seed{'s' if group.seeds != 1 else ''}"
    aside = [f"{count} {state}" for state, count in group.unfinished.items()]
    if group.without:
        aside.append(f"{group.without} without a value")
    return f"{text} ({', '.join(aside)})" if aside else text


def headline(comparison: Comparison) -> str:
    """The answer in a sentence."""
    groups = comparison.groups
    best = groups[0]
    scored = [group for group in groups if group.n]
    if len(scored) < 2:
        return f"{best.label}: {interval(best.estimates.get('iqm'))}; there is nothing to compare it with."
    other = next(group for group in groups if group.label == comparison.baseline)
    chance = best.better_than_baseline
    if other is best:
        other = scored[1]
        reverse = other.better_than_baseline
        chance = reverse and Interval(1 - reverse.point, 1 - reverse.high, 1 - reverse.low)
    text = f"{best.label} is better than {other.label} with probability {interval(chance)}"
    if chance is None or math.isnan(chance.low):
        sure = ", from too few runs to say how sure that is"
    else:
        sure = "" if chance.low > 0.5 or chance.high < 0.5 else ": the runs do not say which is better"
    return f"{text}{sure}."


def lineage(comparison: Comparison) -> list[str]:
    """Which run started from which, a line each."""
    lines = []
    for child in dict.fromkeys(link.child for link in comparison.links):
        parents = [link for link in comparison.links if link.child == child]
        came = ", ".join(f"{comparison.names[p.parent]} ({p.parent}, sha256 {p.sha256[:8]})" for p in parents)
        lines.append(f"{comparison.names[child]} ({child}) from {came}")
    return lines


def show(comparison: Comparison, console: "Console") -> None:
    """Prints table, answer, differences and notes."""
    from rich.table import Table

    q = comparison.question
    less = ", less is better" if q.lower_is_better else ""
    console.print(f"{q.metric} ({q.score} value of each run{less})", style="bold", highlight=False)
    heads, rows = table(comparison)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        shown.add_column(head, justify="left" if head == "group" else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown, highlight=False, markup=False)
    console.print(headline(comparison), highlight=False, markup=False)
    if comparison.differences and len(comparison.groups) > 1:
        console.print("\nconfig keys that differ", style="bold")
        differences = Table(box=None, pad_edge=False, header_style="dim")
        for head in ("key", *(group.label for group in comparison.groups)):
            differences.add_column(head, overflow="fold")
        for key, values in comparison.differences.items():
            differences.add_row(key, *(values[group.label] for group in comparison.groups))
        console.print(differences, highlight=False, markup=False)
    for note in comparison.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False)


def markdown(comparisons: Sequence[Comparison], figure: str = "") -> str:
    """The same for a README or an issue."""
    parts = []
    for number_, comparison in enumerate(comparisons):
        heads, rows = table(comparison)
        parts += [f"## {comparison.question.metric}", headline(comparison), _markdown_table(heads, rows)]
        if figure and not number_:
            parts.append(f"![curves and intervals]({figure})")
        if comparison.differences and len(comparison.groups) > 1:
            labels = [group.label for group in comparison.groups]
            rows = [
                [key, *(values[label] for label in labels)] for key, values in comparison.differences.items()
            ]
            parts += ["### Config keys that differ", _markdown_table(["key", *labels], rows)]
        if comparison.links and not number_:
            parts += ["### What started from what", "\n".join(f"- {line}" for line in lineage(comparison))]
        if comparison.notes:
            parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])


def groups_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric and group, with numbers to compute with."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    estimates = ("iqm", "mean", "median", "optimality_gap")
    rows.writerow(
        ["metric", "group", "runs", "seeds", "unfinished", "without_value", "mean", "std", "median"]
        + [f"{name}{end}" for name in estimates for end in ("_over_tasks", "_low", "_high")]
        + ["p_better", "p_better_low", "p_better_high", "area_under_curve"]
        + ["win_rate", "win_rate_low", "win_rate_high"]
        + ["threshold", "steps_to_threshold", "seconds_to_threshold", "reached"]
    )
    nothing = Interval(math.nan, math.nan, math.nan)
    for comparison in comparisons:
        for group in comparison.groups:
            steps, seconds = group.threshold_steps, group.threshold_seconds
            rows.writerow(
                [cell(comparison.question.metric), cell(group.label), group.n, group.seeds]
                + [sum(group.unfinished.values()), group.without, group.mean, group.std, group.median]
                + [value for name in estimates for value in group.estimates.get(name, nothing)]
                + [*(group.better_than_baseline or nothing), group.auc, *(group.win_rate or nothing)]
                + [comparison.question.threshold, steps and steps.median, seconds and seconds.median]
                + [steps and steps.reached]
            )
    return out.getvalue()


def runs_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric and run."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["metric", "group", "run", "name", "seed", "state", "source", "score"])
    from lab.compare import score_of

    for comparison in comparisons:
        q = comparison.question
        for group in comparison.groups:
            for record in group.records:
                score = score_of(record.over(q.metric, "step"), q.score, q.lower_is_better)
                about = [record.id, record.name, record.seed, record.state, record.source]
                rows.writerow(map(cell, [q.metric, group.label, *about, score]))
    return out.getvalue()


def curves_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric, group and x: mean and interval."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["metric", "group", "x_axis", "x", "mean", "low", "high"])
    for comparison in comparisons:
        for group in comparison.groups:
            if group.curve is not None:
                for values in zip(group.curve_x, *group.curve, strict=True):
                    names = (comparison.question.metric, group.label, comparison.x_label)
                    rows.writerow([*map(cell, names), *values])
    return out.getvalue()


def draw(comparisons: Sequence[Comparison], paths: Sequence[Path]) -> None:
    """Curves with their bands and scores with their intervals, a row of plots per metric, as PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(comparisons)), layout="constrained", dpi=110)
    grid = figure.subplots(len(comparisons), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), comparison in zip(grid, comparisons, strict=True):
        q = comparison.question
        few = sum(group.n for group in comparison.groups) <= SEEDS_DRAWN
        positions = range(len(comparison.groups))[::-1]
        for color, group, y in zip(colors(comparison), comparison.groups, positions, strict=True):
            if group.curve is not None:
                left.plot(group.curve_x, group.curve.point, color=color, label=f"{group.label} (n={group.n})")
                left.fill_between(
                    group.curve_x, group.curve.low, group.curve.high, color=color, alpha=0.2, lw=0
                )
            for record in group.records if few else ():
                series = record.over(q.metric, q.axis)
                left.plot(series.x, series.y, color=color, alpha=0.25, lw=0.8)
            scores = [score for task in group.scores.values() for score in task]
            right.plot(scores, [y] * len(scores), "o", color=color, alpha=0.35, ms=5, mew=0)
            estimate = group.estimates.get("iqm")
            if estimate is not None:
                if not math.isnan(estimate.low):
                    right.plot([estimate.low, estimate.high], [y, y], color=color, lw=6, alpha=0.3)
                right.plot([estimate.point], [y], "|", color=color, ms=18, mew=2.5)
        left.set(xlabel=comparison.x_label, ylabel=q.metric)
        right.set(xlabel=f"{q.metric}: runs, IQM, {q.confidence:.0%} interval")
        right.set_yticks(list(positions), [group.label for group in comparison.groups])
        right.set_ylim(-0.6, len(comparison.groups) - 0.4)
        if any(group.curve is not None for group in comparison.groups):
            left.legend(frameon=False, fontsize=9)
        else:
            left.text(
                0.5, 0.5, "no curve: one value a run", ha="center", transform=left.transAxes, color="#666"
            )
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for path in paths:
        with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
            figure.savefig(aside, format=path.suffix[1:])


def write(comparisons: Sequence[Comparison], folder: Path, title: str, command: str) -> Path:
    """Writes everything to a folder; returns the page."""
    from lab.report_page import page

    with explain_write_errors(str(folder), "Name another folder with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        draw(comparisons, [folder / "comparison.png", folder / "comparison.svg"])
        for name, text in (
            ("comparison.md", f"# {title}\n\n`{command}`\n\n{markdown(comparisons, 'comparison.png')}"),
            ("groups.csv", groups_csv(comparisons)),
            ("runs.csv", runs_csv(comparisons)),
            ("curves.csv", curves_csv(comparisons)),
            ("comparison.html", page(comparisons, title, command)),
        ):
            write_atomic(folder / name, text.encode())
    return folder / "comparison.html"
