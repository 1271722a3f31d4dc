"""A `Comparison` for people: in the terminal, as Markdown and CSV, as plots, and as one page to open."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.compare import Comparison, Group, named
from lab.escape import cell, harmless
from lab.files import explain_write_errors, write_atomic
from lab.statistics import Interval, ThresholdSteps
from lab.verdict import MOST_RUNS, POWER, Difference, turned

if TYPE_CHECKING:
    from rich.console import Console

NAMED = 3
"""Groups of a kind of which the answer says by how much."""


class _Csv:
    """A CSV file as text. Texts that a spreadsheet would take for formulas begin with an apostrophe there."""

    def __init__(self) -> None:
        self._out = io.StringIO()
        self._rows = csv.writer(self._out, lineterminator="\n")

    def writerow(self, cells: Sequence[object]) -> None:
        self._rows.writerow(map(cell, cells))

    def getvalue(self) -> str:
        return self._out.getvalue()


def number(value: float, within: float = 0.0) -> str:
    """Short, with the digits that matter: three, or as many as show what the value is known `within`."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if (digits := _digits(value, within)) > 3:
        return (
            f"{value:,.{max(0, digits - 1 - _exponent(value))}f}"
            if abs(value) < 1e7
            else f"{value:.{digits}g}"
        )
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


MOST_DIGITS = 13
"""Of a number; what differs beyond them differs by rounding."""


def _digits(value: float, within: float) -> int:
    """Significant digits that show `within` by its first two, or that a share close to 1 is not 1."""
    if not value:
        return 0
    if within > 0 and math.isfinite(within):
        digits = _exponent(value) - _exponent(within) + 2
        return digits if digits <= MOST_DIGITS else 0
    return next((n for n in (3, 4, 5, 6) if float(f"{value:.{n}g}") != 1), 3) if 0.99 < value < 1 else 0


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def percent(share: float) -> str:
    """0.95 as 95%, 0.995 as 99.5%."""
    return f"{100 * share:.10g}%"


def interval(of: Interval | None) -> str:
    """The point and its interval, as far as there is one."""
    if of is None or math.isnan(of.point):
        return "-"
    if math.isnan(of.low):
        return number(of.point)
    point, low, high = (number(value, (of.high - of.low) / 2) for value in of)
    return f"{point} [{low}, {high}]"


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
    level = percent(q.confidence)
    gap = several_tasks and not comparison.lower_is_better
    compared = len(groups) > 1 and not comparison.comparable
    base = comparison.baseline if len(comparison.baseline) <= 20 else "the baseline"
    win_rates = any(group.win_rate for group in groups)
    heads = ["group", "runs", f"mean [{level}]", "std", "median"]
    if compared:
        heads += [f"difference to {base} [{level}]", "verdict", "pairs won"]
    if several_tasks:
        heads += [f"IQM [{level}]"] + [f"optimality gap to {q.gamma:g}"] * gap
    heads.append("area")
    if win_rates:
        heads.append("over its prompts [95%]")
    if q.threshold is not None:
        heads += [f"{comparison.x_label} to {q.threshold:g}", f"seconds to {q.threshold:g}"]
    rows = []
    for group in groups:
        mean, median = interval(group.interval), number(group.median, group.std)
        row = [group.label, runs(group), mean, number(group.std), median]
        if compared:
            row += _against(group, comparison)
        if several_tasks:
            row.append(interval(group.estimates.get("iqm")))
        if gap:
            row.append(interval(group.estimates.get("optimality_gap")))
        row.append(number(group.auc))
        if win_rates:
            row.append(interval(group.win_rate))
        if q.threshold is not None:
            row += [reached(group.threshold_steps), reached(group.threshold_seconds)]
        rows.append(row)
    return heads, rows


def _against(group: Group, comparison: Comparison) -> list[str]:
    """The cells of a group about the baseline: difference, verdict, pairs won."""
    of = group.difference
    if of is None:
        return ["baseline", "", ""]
    won = of.pairs - of.wins if comparison.lower_is_better else of.wins
    pairs = f"{number(won)} of {of.pairs}" if of.pairs else "-"
    return [interval(Interval(of.point, of.low, of.high)), verdict(of, comparison.lower_is_better), pairs]


def verdict(difference: Difference, lower_is_better: bool) -> str:
    """better, worse, or not settled: of a group against the baseline."""
    if not difference.settled:
        return "not settled"
    return "better" if (difference.point < 0) == lower_is_better else "worse"


def runs(group: Group) -> str:
    """How many runs count, of how many seeds, and what became of the others."""
    text = f"{group.n}"
    if group.seeds < group.n:
        text += f" of {group.seeds} seed{'s' if group.seeds != 1 else ''}"
    aside = [f"{group.diverged} diverged"] if group.diverged else []
    aside += [f"{count} {state}" for state, count in group.unfinished.items()]
    if group.without:
        aside.append(f"{group.without} without a value")
    return f"{text} ({', '.join(aside)})" if aside else text


def headline(comparison: Comparison) -> str:
    """The answer in a sentence or two."""
    groups = comparison.groups
    best = groups[0]
    scored = [group for group in groups if group.n]
    if len(groups) < 2:
        return f"{best.label}: {interval(best.interval)}; there is nothing to compare it with."
    if comparison.comparable:
        return f"Not comparable: {comparison.comparable}."
    base = next(group for group in groups if group.label == comparison.baseline)
    if not base.n or len(scored) < 2:
        without = named([group.label for group in groups if not group.n])
        return f"Nothing can be compared: {without} has no score."
    others = [(group, group.difference) for group in scored if group.difference is not None]
    if len(others) == 1:
        (other, difference) = others[0]
        return _of_two(other, base, difference, comparison)
    return _of_many(others, comparison)


def _of_two(other: Group, base: Group, difference: Difference, comparison: Comparison) -> str:
    less = comparison.lower_is_better
    if not difference.settled:
        gap = abs(difference.point)
        scores = " and ".join(
            f"{group.label} {number(group.mean, gap)}"
            for group in comparison.groups
            if group in (other, base)
        )
        return f"Not settled: {scores}{_how(difference, comparison)}. {_remedy(difference)}"
    winner, loser = (other, base) if verdict(difference, less) == "better" else (base, other)
    if winner is base:
        difference = turned(difference)
    return (
        f"{winner.label} is better than {loser.label} by {number(abs(difference.point))}"
        f" ({_evidence(difference, comparison)}).{_condition(comparison)}"
    )


def _of_many(others: Sequence[tuple[Group, Difference]], comparison: Comparison) -> str:
    less, base = comparison.lower_is_better, comparison.baseline
    sides: dict[str, list[str]] = {"better": [], "worse": [], "not settled": []}
    for group, difference in others:
        side = verdict(difference, less)
        text = group.label
        if side != "not settled" and len(sides[side]) < NAMED:
            size = number(abs(difference.point))
            text += f" by {size} ({_evidence(difference, comparison)})"
        sides[side].append(text)
    parts = [f"{side} than {base}: {named(sides[side])}" for side in ("better", "worse") if sides[side]]
    if open_ := sides["not settled"]:
        parts.append(f"not settled against {base}: {named(open_)}")
    text = "; ".join(parts)
    text = f"{text[0].upper()}{text[1:]}."
    closest = [d for _, d in others if not d.settled]
    if len(closest) == len(others):
        text += f" {_remedy(min(closest, key=lambda d: d.runs_needed or MOST_RUNS + 1))}"
    return text + _condition(comparison)


def _how(difference: Difference, comparison: Comparison) -> str:
    return f"; difference {number(abs(difference.point))} ({_evidence(difference, comparison)})"


def _evidence(difference: Difference, comparison: Comparison) -> str:
    """The interval, turned so that the difference is positive, and how it was made."""
    of = turned(difference) if difference.point < 0 else difference
    parts = []
    if not math.isnan(of.low):
        parts.append(f"{percent(comparison.question.confidence)} {number(of.low)} to {number(of.high)}")
    tasks = f" over {difference.tasks} {comparison.task_key or 'tasks'}" if difference.tasks > 1 else ""
    methods = {
        "welch": f"Welch{tasks}",
        "seeds": f"paired by seed{tasks}",
        "tasks": f"paired by {comparison.task_key or 'task'}, of which there are {difference.tasks}",
    }
    if difference.method:
        parts.append(methods[difference.method])
    if difference.family > 1:
        parts.append(f"Holm over {difference.family}")
    return ", ".join(parts) or "no interval"


def _remedy(difference: Difference) -> str:
    """What would settle it."""
    if difference.why:
        return f"For a verdict there are too few runs: {difference.why}."
    if not difference.point:
        return "Their means are equal."
    if math.isnan(difference.low):
        return "Too few runs for scores that are all alike."
    if difference.runs_needed is None:
        return f"More than {MOST_RUNS:,} seeds each would be needed to show a difference of this size."
    return (
        f"About {difference.runs_needed} seeds each would show a difference of this size "
        f"(with {percent(POWER)} power)."
    )


def _condition(comparison: Comparison) -> str:
    """What the verdict leaves out or takes for granted."""
    failed = sum(group.diverged for group in comparison.groups)
    missing = sum(group.without for group in comparison.groups)
    total = sum(len(group.records) for group in comparison.groups)
    text = f" {failed} of {total} runs diverged and count as the worst." if failed else ""
    return text + (f" {missing} of {total} runs have no value and do not count." if missing else "")


def lineage(comparison: Comparison) -> list[str]:
    """Which run started from which, a line each."""
    lines = []
    for child in dict.fromkeys(link.child for link in comparison.links):
        parents = [link for link in comparison.links if link.child == child]
        came = ", ".join(f"{comparison.names[p.parent]} ({p.parent}, sha256 {p.sha256[:8]})" for p in parents)
        lines.append(f"{comparison.names[child]} ({child}) from {came}")
    return lines


def question(comparison: Comparison) -> str:
    """What was asked, with which way is better and what the others are compared with."""
    q = comparison.question
    way = f"{'less' if comparison.lower_is_better else 'more'} is better, {comparison.why_direction}"
    base = (
        f"; baseline {comparison.baseline}: {comparison.why_baseline}" if len(comparison.groups) > 1 else ""
    )
    scaled = f", scaled by each {comparison.task_key}'s range" if comparison.normalized else ""
    return f"{q.metric} ({q.score} value of each run{scaled}; {way}{base})"


def task_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The mean of each group on each task, in the metric's own unit; no rows if there is one task."""
    if len(comparison.tasks) < 2:
        return [], []
    heads = [comparison.task_key or "task", *(group.label for group in comparison.groups)]
    rows = [
        [task, *(number(group.task_means.get(task, math.nan)) for group in comparison.groups)]
        for task in comparison.tasks
    ]
    return heads, rows


def show(comparison: Comparison, console: "Console") -> None:
    """Prints table, answer, differences and notes."""
    from rich.table import Table

    console.print(harmless(question(comparison)), style="bold", highlight=False, markup=False)
    heads, rows = table(comparison)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        shown.add_column(harmless(head), justify="left" if head == "group" else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(harmless, row))
    console.print(shown, highlight=False, markup=False)
    console.print(harmless(headline(comparison)), highlight=False, markup=False)
    heads, rows = task_table(comparison)
    if rows:
        console.print("\nmean of each task", style="bold")
        tasks = Table(box=None, pad_edge=False, header_style="dim")
        for head in heads:
            tasks.add_column(harmless(head), justify="left" if head == heads[0] else "right", overflow="fold")
        for row in rows:
            tasks.add_row(*map(harmless, row))
        console.print(tasks, highlight=False, markup=False)
    if comparison.differences and len(comparison.groups) > 1:
        console.print("\nconfig keys that differ", style="bold")
        differences = Table(box=None, pad_edge=False, header_style="dim")
        for head in ("key", *(group.label for group in comparison.groups)):
            differences.add_column(harmless(head), overflow="fold")
        for key, values in comparison.differences.items():
            differences.add_row(*map(harmless, [key, *(values[group.label] for group in comparison.groups)]))
        console.print(differences, highlight=False, markup=False)
    for note in comparison.notes:
        console.print(harmless(f"note: {note}"), style="dim", highlight=False, markup=False)


def markdown(comparisons: Sequence[Comparison], figure: str = "") -> str:
    """The same for a README or an issue."""
    parts = []
    for number_, comparison in enumerate(comparisons):
        heads, rows = table(comparison)
        parts += [f"## {comparison.question.metric}", headline(comparison)]
        parts += [f"{question(comparison)}:", _markdown_table(heads, rows)]
        task_heads, task_rows = task_table(comparison)
        if task_rows:
            parts += ["### Mean of each task", _markdown_table(task_heads, task_rows)]
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
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])


def groups_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric and group, with numbers to compute with."""
    rows = _Csv()
    estimates = ("iqm", "mean", "median", "optimality_gap")
    rows.writerow(
        ["metric", "group", "runs", "seeds", "unfinished", "without_value", "diverged"]
        + ["mean", "mean_low", "mean_high", "std", "median"]
        + [f"{name}_over_tasks{end}" for name in estimates for end in ("", "_low", "_high")]
        + ["baseline", "difference", "difference_low", "difference_high", "p_holm", "verdict", "method"]
        + ["runs_needed", "pairs_won", "pairs", "area_under_curve"]
        + ["win_rate", "win_rate_low", "win_rate_high"]
        + ["threshold", "steps_to_threshold", "seconds_to_threshold", "reached"]
    )
    nothing = Interval(math.nan, math.nan, math.nan)
    for comparison in comparisons:
        for group in comparison.groups:
            steps, seconds, of = group.threshold_steps, group.threshold_seconds, group.difference
            against: list[object] = [""] * 10
            if of is not None:
                against = [comparison.baseline, of.point, of.low, of.high, of.p]
                against += [
                    verdict(of, comparison.lower_is_better),
                    of.method,
                    of.runs_needed,
                    of.wins,
                    of.pairs,
                ]
            rows.writerow(
                [comparison.question.metric, group.label, group.n, group.seeds]
                + [sum(group.unfinished.values()), group.without, group.diverged]
                + [*group.interval, group.std, group.median]
                + [value for name in estimates for value in group.estimates.get(name, nothing)]
                + [*against, group.auc, *(group.win_rate or nothing)]
                + [comparison.question.threshold, steps and steps.median, seconds and seconds.median]
                + [steps and steps.reached]
            )
    return rows.getvalue()


def runs_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric and run."""
    rows = _Csv()
    rows.writerow(["metric", "group", "run", "name", "seed", "state", "source", "score"])
    for comparison in comparisons:
        for group in comparison.groups:
            for record in group.records:
                about = [record.id, record.name, record.seed, record.state, record.source]
                rows.writerow([comparison.question.metric, group.label, *about, group.by_run[record.id]])
    return rows.getvalue()


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The same for programs, one entry a metric; what is not known is null."""
    return [_finite(_entry(comparison)) for comparison in comparisons]


def _entry(comparison: Comparison) -> dict[str, Any]:
    q = comparison.question
    return {
        **{"metric": q.metric, "score": q.score, "confidence": q.confidence},
        **{"goal": "minimize" if comparison.lower_is_better else "maximize"},
        **{"goal_from": comparison.why_direction, "answer": headline(comparison)},
        **{"baseline": comparison.baseline, "baseline_from": comparison.why_baseline},
        **{"tasks": list(comparison.tasks), "normalized": comparison.normalized},
        "until": {task: until for task, until in comparison.until.items() if math.isfinite(until)},
        "groups": [_group_entry(group, comparison) for group in comparison.groups],
        **{"differences": comparison.differences, "notes": list(comparison.notes)},
    }


def _group_entry(group: Group, comparison: Comparison) -> dict[str, Any]:
    of = group.difference
    entry: dict[str, Any] = {
        **{"label": group.label, "runs": group.n, "seeds": group.seeds, "diverged": group.diverged},
        **{"unfinished": group.unfinished, "without_value": group.without},
        **{"mean": group.interval._asdict(), "std": group.std, "median": group.median},
        "estimates": {name: interval_._asdict() for name, interval_ in group.estimates.items()},
        "task_means": group.task_means,
        "scores": [
            {"run": r.id, "name": r.name, "seed": r.seed, "score": group.by_run[r.id]} for r in group.records
        ],
        "area_under_curve": group.auc,
    }
    if of is not None:
        entry["against_baseline"] = {
            **{"difference": of.point, "low": of.low, "high": of.high, "p_holm": of.p},
            **{"verdict": verdict(of, comparison.lower_is_better), "method": of.method},
            **{"comparisons": of.family, "runs_needed": of.runs_needed, "why": of.why},
            **{"pairs_won": of.wins, "pairs": of.pairs},
        }
    return entry


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def curves_csv(comparisons: Sequence[Comparison]) -> str:
    """A row per metric, group and x: mean and interval."""
    rows = _Csv()
    rows.writerow(["metric", "group", "x_axis", "x", "mean", "low", "high"])
    for comparison in comparisons:
        for group in comparison.groups:
            if group.curve is not None:
                for values in zip(group.curve_x, *group.curve, strict=True):
                    rows.writerow([comparison.question.metric, group.label, comparison.x_label, *values])
    return rows.getvalue()


def write(comparisons: Sequence[Comparison], folder: Path, title: str, command: str) -> Path:
    """Writes everything to a folder; returns the page."""
    from lab.report_page import page
    from lab.report_plot import draw

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
