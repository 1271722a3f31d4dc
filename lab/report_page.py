"""A comparison as one HTML file: plots to hover, zoom and filter, tables to sort; nothing is loaded."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from lab.compare import Comparison, Group
from lab.escape import markup, script_data
from lab.records import Series
from lab.report import headline, number, question, table, task_table
from lab.report_plot import has_profile, palette, runs_are_few, score_label, unit

POINTS_DRAWN = 40_000
"""Of all curves of single runs together at most, so that a page can be mailed; the numbers are of all."""
LEAST_DRAWN = 60
"""Of one run's curve at least."""

_Colors = Mapping[str, int | None]


def page(comparisons: Sequence[Comparison], title: str, command: str) -> str:
    """The page.

    Args:
        command: what made it, shown below the title.
    """
    colors = palette(comparisons)
    data = [_comparison(comparison, colors) for comparison in comparisons]
    sections = [_section(index, comparison, colors) for index, comparison in enumerate(comparisons)]
    places = [
        f'<a href="#metric{index}">{markup(comparison.question.metric)}</a>'
        for index, comparison in enumerate(comparisons)
    ]
    # Whatever stands in a label: the browser is told to load nothing.
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{markup(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><style>
{_asset("page.css")}</style></head><body>
<h1>{markup(title)}</h1><code>{markup(command)}</code>
<nav aria-label="metrics">{" &middot; ".join(places) if len(places) > 1 else ""}</nav>
<div id="tools" role="search">
<input id="search" type="search" placeholder="filter groups and runs" aria-label="filter groups and runs">
<label><input id="single" type="checkbox" checked> single runs</label>
<label><input id="logx" type="checkbox"> log steps</label>
<label><input id="logy" type="checkbox"> log values</label>
<span class="about">hover to compare, click to keep, drag to zoom, double-click to see all</span></div>
<main>{"".join(sections)}{_lineage(comparisons)}</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{script_data(data)}</script>
<script>
{_asset("page.js")}</script></body></html>
"""


def _asset(name: str) -> str:
    return (files("lab") / name).read_text(encoding="utf-8")


def _section(index: int, comparison: Comparison, colors: _Colors) -> str:
    q, groups = comparison.question, comparison.groups
    labels = [group.label for group in groups]
    heads, rows = table(comparison)
    parts = [
        f'<section id="metric{index}"><h2>{markup(q.metric)}</h2>',
        f'<p class="answer">{markup(headline(comparison))}</p>',
    ]
    parts.append(f'<p class="about">{markup(question(comparison))}</p>')
    parts.append(_table(f"groups by {q.metric}, the best first", heads, rows, labels, labels, colors))
    task_heads, task_rows = task_table(comparison)
    if task_rows:
        parts.append(_table("mean of each task", task_heads, task_rows))
    figures = [
        (
            "curves",
            f"{unit(comparison)} over {comparison.x_label}: mean of each group, its interval, single runs",
        ),
        ("scores", score_label(comparison)),
    ]
    if has_profile(comparison):
        figures.append(("profile", f"performance profile: fraction of runs above each {q.metric}"))
    drawn = [
        f'<figure id="{name}{index}"><figcaption>{markup(caption)}</figcaption></figure>'
        for name, caption in figures
    ]
    parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    if comparison.differences and len(groups) > 1:
        keys = list(comparison.differences)
        differing = [[label, *(comparison.differences[key][label] for key in keys)] for label in labels]
        parts.append(_table("config keys that differ", ["group", *keys], differing, labels, labels, colors))
    parts.append(_runs(comparison, colors))
    if comparison.notes:
        notes = "".join(f"<li>{markup(note)}</li>" for note in comparison.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    return "".join((*parts, "</section>"))


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    labels: Sequence[str] = (),
    marks: Sequence[str] = (),
    colors: _Colors | None = None,
) -> str:
    """A table to sort.

    Args:
        caption, heads, rows: its texts.
        labels: the group of each row.
        marks: what the filter looks for in each row.
        colors: of the groups, shown at the head of each row.
    """
    lines = []
    for index, row in enumerate(rows):
        about = ""
        if labels:
            about = f' data-group="{markup(labels[index])}" data-filter="{markup(marks[index])}"'
        color = (colors or {}).get(labels[index]) if labels else None
        dot = f'<span class="dot" style="background:var(--c{color % 8})"></span>' if color is not None else ""
        cells = "".join(map(_cell, row[1:]))
        lines.append(f'<tr{about}><th scope="row">{dot}{markup(row[0])}</th>{cells}</tr>')
    top = "".join(f'<th scope="col"><button type="button">{markup(head)}</button></th>' for head in heads)
    return (
        f'<div class="wide{" tall" * (len(rows) > 30)}" tabindex="0">'
        f"<table><caption>{markup(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """A cell; numbers and points of intervals are sorted by their value, which may be written with commas."""
    found = re.match(r"[-+]?(\d[\d,]*\.?\d*(e[-+]?\d+)?)(?= |$)", text)
    if found is None:
        return f'<td class="text">{markup(text)}</td>' if len(text) > 24 else f"<td>{markup(text)}</td>"
    return f'<td data-value="{found[0].replace(",", "")}">{markup(text)}</td>'


def _runs(comparison: Comparison, colors: _Colors) -> str:
    rows, marks, labels = [], [], []
    for group in comparison.groups:
        for record in group.records:
            score = number(group.by_run[record.id], 0 if comparison.normalized else group.std)
            rows.append([record.name, group.label, str(record.seed), record.state, score, record.source])
            marks.append(f"{group.label} {record.name} {record.state}")
            labels.append(group.label)
    heads = ["run", "group", "seed", "state", "score", "from"]
    return _table("runs", heads, rows, labels, marks, colors)


# ---- what is drawn ----


def _comparison(comparison: Comparison, colors: _Colors) -> dict[str, Any]:
    drawn = sum(group.n for group in comparison.groups) if runs_are_few(comparison) else 0
    points = max(LEAST_DRAWN, POINTS_DRAWN // max(1, drawn))
    profile = has_profile(comparison)
    return {
        "metric": unit(comparison),
        "xLabel": comparison.x_label,
        "thresholds": _numbers(comparison.thresholds) if profile else [],
        "groups": [_group(group, comparison, colors, points, profile) for group in comparison.groups],
    }


def _group(
    group: Group, comparison: Comparison, colors: _Colors, points: int, profile: bool
) -> dict[str, Any]:
    few = runs_are_few(comparison)
    runs = []
    for record in group.records:
        run: dict[str, Any] = {"name": record.name, "score": _number(group.compared.get(record.id, math.nan))}
        series = group.run_curves[record.id]
        if few and series.x.size > 1:
            kept = thinned(series, points)
            run |= {"x": _numbers(kept.x), "y": _numbers(kept.y)}
        runs.append(run)
    values: dict[str, Any] = {"label": group.label, "n": group.n, "color": colors[group.label], "runs": runs}
    mean, low, high = group.interval
    values |= {"mean": _number(mean), "meanLow": _number(low), "meanHigh": _number(high)}
    if group.curve is not None:
        values |= {"x": _numbers(group.curve_x), "y": _numbers(group.curve.point)}
        if np.isfinite(group.curve.low).any():
            values |= {"low": _numbers(group.curve.low), "high": _numbers(group.curve.high)}
    if profile and group.profile is not None:
        values["profile"] = _numbers(group.profile.point)
    return values


def thinned(series: Series, points: int) -> Series:
    """A curve of about `points` at most; the lowest and highest value of each part stay: no peak is lost."""
    if series.x.size <= points:
        return series
    bins = np.array_split(np.arange(series.x.size), max(1, points // 2))
    kept = {0, series.x.size - 1}
    for part in bins:
        values = np.where(np.isfinite(series.y[part]), series.y[part], np.nan)
        if not np.isnan(values).all():
            kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
    places = sorted(kept)
    return Series(series.x[places], series.y[places])


def _number(value: float) -> float | None:
    """For JSON, which has no NaN: five digits are more than can be seen."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _numbers(values: Any) -> list[float | None]:
    short = map(_number, values)
    return [
        int(value) if value is not None and value.is_integer() and abs(value) < 1e15 else value
        for value in short
    ]


# ---- lineage ----


def _lineage(comparisons: Sequence[Comparison]) -> str:
    """What started from what, as a drawing: a column per generation."""
    links, names = comparisons[0].links, comparisons[0].names
    if not links:
        return ""
    parents = {run: {link.parent for link in links if link.child == run} for run in names}
    depth: dict[str, int] = {}

    def generation(run: str, above: tuple[str, ...] = ()) -> int:
        if run not in depth:
            depth[run] = 1 + max(
                (generation(p, (*above, run)) for p in parents[run] if p not in above), default=-1
            )
        return depth[run]

    place: dict[str, tuple[int, int]] = {}
    taken: dict[int, int] = {}
    for run in names:
        column = generation(run)
        row = taken.get(column, 0)
        taken[column] = row + 1
        place[run] = (20 + column * 230, 24 + row * 46)
    drawn = []
    for link in links:
        (x1, y1), (x2, y2) = place[link.parent], place[link.child]
        path = f"M{x1 + 180} {y1} C{x1 + 205} {y1} {x2 - 25} {y2} {x2} {y2}"
        drawn.append(f'<path d="{path}"><title>{markup(link.sha256[:12])}</title></path>')
    for run, (x, y) in place.items():
        text = f'<text x="{x + 8}" y="{y + 4}">{markup(names[run][:24])}</text>'
        title = f"<title>{markup(f'{names[run]} ({run})')}</title>"
        drawn.append(f'<g>{title}<rect x="{x}" y="{y - 15}" width="180" height="30" rx="5"/>{text}</g>')
    width, height = (max(p[i] for p in place.values()) for i in (0, 1))
    size = f'width="{width + 210}" height="{height + 30}"'
    return (
        '<h2>What started from what</h2><div class="wide lineage">'
        f'<svg {size} role="img" aria-label="which run started from which">{"".join(drawn)}</svg></div>'
    )
