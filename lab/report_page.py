"""A comparison as one HTML file: plots to hover, zoom and filter; nothing is loaded from anywhere."""

import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from lab.compare import Comparison, Group
from lab.records import Series
from lab.report import SEEDS_DRAWN, colors, headline, number, question, table, task_table

POINTS_DRAWN = 1000
"""Of a single run's curve at most; the numbers are of all."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2rem auto;
  padding:0 1.2rem}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.2rem;margin:2.2rem 0 .3rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}
code{color:#555;font-size:.85rem;overflow-wrap:anywhere}.answer{font-size:1.05rem;margin:.2rem 0 .6rem}
table{border-collapse:collapse;font-size:.88rem;display:block;overflow-x:auto}
th{color:#666;font-weight:500;text-align:left}
td,th{padding:.25rem .8rem .25rem 0;border-bottom:1px solid #eee}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}.dot{color:var(--c)}.wide{overflow-x:auto}
.plots{display:grid;grid-template-columns:3fr 2fr;gap:.5rem}.plot{height:380px;min-width:0}
#tools{position:sticky;top:0;background:#fffd;padding:.6rem 0;z-index:9;
  display:flex;gap:1rem;align-items:center}
input[type=search]{font:inherit;padding:.2rem .5rem;width:20rem;border:1px solid #ccc;border-radius:4px}
ul.notes{color:#666;font-size:.88rem}svg text{font:12px system-ui,sans-serif}
@media(max-width:800px){.plots{grid-template-columns:1fr}}
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const layout = {margin: {l: 60, r: 10, t: 10, b: 45}, hovermode: 'closest', showlegend: false,
  font: {family: 'system-ui,sans-serif', size: 12}};
const plots = data.map(plot => {
  const div = document.getElementById(plot.id);
  Plotly.newPlot(div, plot.traces, {...layout, ...plot.layout}, {displaylogo: false, responsive: true});
  return div;
});
const search = document.getElementById('search'), single = document.getElementById('single');
function filter() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const shown = text => words.every(word => text.toLowerCase().includes(word));
  plots.forEach((div, i) => Plotly.restyle(div, {visible: data[i].traces.map(
    trace => shown(trace.meta.filter) && (single.checked || !trace.meta.single))}));
  document.querySelectorAll('tr[data-filter]').forEach(row => row.hidden = !shown(row.dataset.filter));
}
search.addEventListener('input', filter);
single.addEventListener('change', filter);
"""


def page(comparisons: Sequence[Comparison], title: str, command: str) -> str:
    """The page.

    Args:
        command: what made it, shown below the title.
    """
    plots: list[dict[str, Any]] = []
    sections = [_section(index, comparison, plots) for index, comparison in enumerate(comparisons)]
    data = json.dumps(plots, allow_nan=False).replace("</", "<\\/")
    library = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    # Whatever stands in a label: the browser is told to load nothing.
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{_e(title)}</h1><code>{_e(command)}</code>
<div id="tools"><input id="search" type="search" placeholder="filter groups and runs">
<label><input id="single" type="checkbox" checked> single runs</label></div>
{"".join(sections)}
{_lineage(comparisons)}
<script>{library}</script>
<script type="application/json" id="data">{data}</script>
<script>{_SCRIPT}</script></body></html>
"""


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _section(index: int, comparison: Comparison, plots: list[dict[str, Any]]) -> str:
    q = comparison.question
    heads, rows = table(comparison)
    parts = [f"<h2>{_e(q.metric)}</h2><p class=answer>{_e(headline(comparison))}</p>"]
    parts.append(f"<p>{_e(question(comparison))}</p>")
    parts.append(_table(heads, rows, [group.label for group in comparison.groups], colors(comparison)))
    task_heads, task_rows = task_table(comparison)
    if task_rows:
        parts.append("<h3>Mean of each task</h3>" + _table(task_heads, task_rows))
    found = [("curves", _curves(comparison)), ("scores", _scores(comparison))]
    if len(comparison.tasks) > 1 or max(group.n for group in comparison.groups) > 4:
        found.append(("profile", _profile(comparison)))
    drawn = []
    for name, (traces, layout) in found:
        if traces:
            plots.append({"id": f"{name}{index}", "traces": traces, "layout": layout})
            drawn.append(f'<div class="plot" id="{name}{index}"></div>')
    parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    if comparison.differences and len(comparison.groups) > 1:
        labels = [group.label for group in comparison.groups]
        differing = [[key, *(of[label] for label in labels)] for key, of in comparison.differences.items()]
        parts.append("<h3>Config keys that differ</h3>" + _table(["key", *labels], differing))
    parts.append("<h3>Runs</h3>" + _runs(comparison))
    if comparison.notes:
        notes = "".join(f"<li>{_e(note)}</li>" for note in comparison.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    return "".join(parts)


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    marks: Sequence[str] = (),
    dots: Sequence[str] = (),
) -> str:
    lines = []
    for index, row in enumerate(rows):
        mark = f' data-filter="{_e(marks[index])}"' if marks else ""
        dot = f'<span class="dot" style="--c:{dots[index]}">&#9679;</span> ' if dots else ""
        cells = "".join(f"<td class=n>{_e(cell)}</td>" for cell in row[1:])
        lines.append(f"<tr{mark}><td>{dot}{_e(row[0])}</td>{cells}</tr>")
    top = "".join(f"<th>{_e(head)}</th>" for head in heads)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _runs(comparison: Comparison) -> str:
    rows, marks = [], []
    for group in comparison.groups:
        for record in group.records:
            score = group.by_run[record.id]
            rows.append(
                [record.name, group.label, str(record.seed), record.state, number(score), record.source]
            )
            marks.append(f"{group.label} {record.name} {record.state}")
    return _table(["run", "group", "seed", "state", "score", "from"], rows, marks)


# ---- plots ----


def _numbers(values: Any) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _colored(comparison: Comparison) -> list[tuple[str, Group]]:
    return list(zip(colors(comparison), comparison.groups, strict=True))


def _curves(comparison: Comparison) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    q, traces = comparison.question, list[dict[str, Any]]()
    few = sum(group.n for group in comparison.groups) <= SEEDS_DRAWN
    for color, group in _colored(comparison):
        meta = {"filter": group.label, "single": False}
        for record in group.records if few else ():
            series = _thinned(record.over(q.metric, q.axis))
            if series.x.size > 1:
                traces.append(
                    {
                        **{
                            "x": _numbers(series.x),
                            "y": _numbers(series.y),
                            "mode": "lines",
                            "opacity": 0.35,
                        },
                        **{"line": {"color": color, "width": 1}, "meta": {**meta, "single": True}},
                        "hovertemplate": f"{_e(record.name)}<br>%{{x}}: %{{y}}<extra></extra>",
                    }
                )
        if group.curve is None:
            continue
        x, band = _numbers(group.curve_x), group.curve
        if np.isfinite(band.low).any():
            kept = np.isfinite(band.low)
            edge = [*_numbers(group.curve_x[kept]), *_numbers(group.curve_x[kept][::-1])]
            sides = [*_numbers(band.high[kept]), *_numbers(band.low[kept][::-1])]
            traces.append(
                {
                    **{
                        "x": edge,
                        "y": sides,
                        "fill": "toself",
                        "fillcolor": color + "30",
                        "hoverinfo": "skip",
                    },
                    **{"mode": "lines", "line": {"width": 0}, "meta": meta},
                }
            )
        ends = [f"[{number(low)}, {number(high)}]" for low, high in zip(band.low, band.high, strict=True)]
        traces.append(
            {
                **{
                    "x": x,
                    "y": _numbers(band.point),
                    "mode": "lines",
                    "line": {"color": color, "width": 2.5},
                },
                **{"text": ends, "meta": meta},
                "hovertemplate": f"{_e(group.label)}, n={group.n}<br>%{{x}}: %{{y}} %{{text}}<extra></extra>",
            }
        )
    return traces, {"xaxis": {"title": {"text": comparison.x_label}}, "yaxis": {"title": {"text": q.metric}}}


def _thinned(series: Series) -> Series:
    step = math.ceil(series.x.size / POINTS_DRAWN)
    return Series(series.x[::step], series.y[::step]) if step > 1 else series


def _scores(comparison: Comparison) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    q, traces = comparison.question, list[dict[str, Any]]()
    for row, (color, group) in enumerate(_colored(comparison)):
        meta = {"filter": group.label, "single": False}
        scored = [record for record in group.records if record.id in group.compared]
        points = [group.compared[record.id] for record in scored]
        traces.append(
            {
                **{"x": _numbers(points), "y": [-row] * len(points), "mode": "markers"},
                **{"marker": {"color": color, "opacity": 0.4, "size": 8}, "meta": {**meta, "single": True}},
                **{"text": [_e(record.name) for record in scored]},
                "hovertemplate": "%{text}: %{x}<extra></extra>",
            }
        )
        estimate = group.interval
        if group.n:
            error = {"type": "data", "symmetric": False, "color": color, "thickness": 3, "width": 7}
            if not math.isnan(estimate.low):
                error |= {
                    "array": [estimate.high - estimate.point],
                    "arrayminus": [estimate.point - estimate.low],
                }
            traces.append(
                {
                    **{"x": _numbers([estimate.point]), "y": [-row], "mode": "markers", "error_x": error},
                    **{
                        "marker": {
                            "color": color,
                            "size": 14,
                            "symbol": "line-ns",
                            "line": {"width": 3, "color": color},
                        }
                    },
                    "meta": meta,
                    "hovertemplate": f"{_e(group.label)}: mean %{{x}}<extra></extra>",
                }
            )
    labels = [_e(group.label) for group in comparison.groups]
    rows = [-row for row in range(len(labels))]
    yaxis = {"tickvals": rows, "ticktext": labels, "range": [rows[-1] - 0.6, 0.6], "zeroline": False}
    yaxis |= {"automargin": True, "showgrid": False}
    title = {"text": f"runs, mean, {q.confidence:.0%} interval"}
    return traces, {"xaxis": {"title": title}, "yaxis": yaxis}


def _profile(comparison: Comparison) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    traces = [
        {
            **{"x": _numbers(comparison.thresholds), "y": _numbers(group.profile.point), "mode": "lines"},
            **{"line": {"color": color, "width": 2}, "meta": {"filter": group.label, "single": False}},
            "hovertemplate": f"{_e(group.label)}: %{{y:.0%}} of runs above %{{x}}<extra></extra>",
        }
        for color, group in _colored(comparison)
        if group.profile is not None
    ]
    title = {"text": f"performance profile: {comparison.question.metric}"}
    return traces, {"xaxis": {"title": title}, "yaxis": {"title": {"text": "share of runs above"}}}


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
        drawn.append(
            f'<path d="{path}" fill="none" stroke="#bbb"><title>{_e(link.sha256[:12])}</title></path>'
        )
    for run, (x, y) in place.items():
        text = f'<text x="{x + 8}" y="{y + 4}">{_e(names[run][:24])}</text>'
        title = f"<title>{_e(f'{names[run]} ({run})')}</title>"
        box = f'<rect x="{x}" y="{y - 15}" width="180" height="30" rx="5" fill="#f4f7fb" stroke="#9bb4d3"/>'
        drawn.append(f"<g>{title}{box}{text}</g>")
    width, height = (max(p[i] for p in place.values()) for i in (0, 1))
    size = f'width="{width + 210}" height="{height + 30}"'
    return f'<h2>What started from what</h2><div class="wide"><svg {size}>{"".join(drawn)}</svg></div>'
