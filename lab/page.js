// Draws the plots of a comparison as SVG, and lets tables and plots be filtered, sorted, hovered and zoomed.
"use strict";
const comparisons = JSON.parse(document.getElementById("data").textContent);
const tools = Object.fromEntries(["search", "single", "logx", "logy"].map(id => [id, document.getElementById(id)]));
const tip = document.getElementById("tip");
const pinned = new Set();  // labels of groups that were clicked
const zooms = new Map();   // by plot: the part of the x axis that is shown

// ---- numbers ----

const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});

function short(v) {
  if (!Number.isFinite(v)) return "-";
  if (Math.abs(v) >= 1e4) return Math.abs(v) < 1e15 ? compact.format(v) : v.toExponential(2);
  return v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2).replace(/\.?0+e/, "e") : String(+v.toPrecision(4));
}

/** A scale from values to pixels, linear or logarithmic, with its ticks. */
function scale([low, high], [from, to], log) {
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  if (low === high) [low, high] = [low - (log ? 0.5 : Math.abs(low) / 2 || 0.5), high + (log ? 0.5 : Math.abs(high) / 2 || 0.5)];
  const at = v => from + ((log ? Math.log10(v) : v) - low) / (high - low) * (to - from);
  const back = p => { const v = low + (p - from) / (to - from) * (high - low); return log ? 10 ** v : v; };
  const room = Math.max(2, Math.floor(Math.abs(to - from) / 70)), rough = (high - low) / room;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = log ? Math.max(1, Math.ceil(rough)) : power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999);
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step)
    ticks.push(log ? 10 ** v : Math.abs(v) < step * 1e-6 ? 0 : v);
  if (log && ticks.length < 2) ticks.splice(0, 9, 10 ** low, 10 ** high);
  return {at, back, ticks};
}

const usable = (v, log) => Number.isFinite(v) && (!log || v > 0);

function range(values, log) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (usable(v, log)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return null;
  const edge = log ? 0 : (high - low) * 0.04;
  return [low - edge, high + edge];
}

// ---- SVG ----

function element(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

/** The path through the points that can be drawn; it is broken where one cannot. */
function path(x, y, sx, sy, logx, logy) {
  let text = "", open = false;
  for (let i = 0; i < x.length; i++) {
    const drawn = usable(x[i], logx) && usable(y[i], logy);
    if (drawn) text += `${open ? "L" : "M"}${sx.at(x[i]).toFixed(1)} ${sy.at(y[i]).toFixed(1)}`;
    open = drawn;
  }
  return text;
}

const DASHES = ["", "7 4", "2 3", "8 3 2 3"];
const color = group => group.color === null ? "var(--rest)" : `var(--c${group.color % 8})`;

function layer(svg, group) {
  const classes = `group${group.color === null ? " rest" : ""}${pinned.has(group.label) ? " lit" : ""}`;
  return element("g", {class: classes, style: `--c:${color(group)}`, "data-group": group.label}, svg);
}

const LONGEST = 44;  // characters of a label beside a plot
const cut = (text, n) => text.length > n ? `${text.slice(0, n * 0.6 | 0)}…${text.slice(-(n * 0.4 | 0))}` : text;

function frame(svg, box, sx, sy, xlabel, ylabel) {
  for (const v of sx.ticks) {
    element("line", {class: "grid", x1: sx.at(v), x2: sx.at(v), y1: box.top, y2: box.bottom}, svg);
    element("text", {class: "soft", x: sx.at(v), y: box.bottom + 16, "text-anchor": "middle"}, svg, short(v));
  }
  for (const v of sy ? sy.ticks : []) {
    element("line", {class: "grid", x1: box.left, x2: box.right, y1: sy.at(v), y2: sy.at(v)}, svg);
    element("text", {class: "soft", x: box.left - 6, y: sy.at(v) + 4, "text-anchor": "end"}, svg, short(v));
  }
  element("line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}, svg);
  element("text", {class: "soft", x: (box.left + box.right) / 2, y: box.bottom + 34, "text-anchor": "middle"}, svg, xlabel);
  if (ylabel) element("text", {class: "soft", x: box.left, y: box.top - 8}, svg, ylabel);
}

// ---- plots ----

/** Lines over x: the curves of the runs and groups, or performance profiles. */
function lines(figure, groups, {xlabel, ylabel, logx, logy, single}) {
  const box = {left: 62, right: 648, top: 24, bottom: 316};
  const svg = start(figure, 660, 360);
  const all = groups.flatMap(g => [g, ...(single ? g.runs || [] : [])]).filter(s => s.x);
  const xs = zooms.get(figure.id) || range(all.flatMap(s => s.x), logx);
  const inside = s => s.x.map((x, i) => xs && x >= xs[0] && x <= xs[1] ? i : -1).filter(i => i >= 0);
  const ys = range(all.flatMap(s => inside(s).flatMap(i => [s.y[i], ...(s.low ? [s.low[i], s.high[i]] : [])])), logy);
  if (!xs || !ys) {
    element("text", {class: "soft", x: 330, y: 180, "text-anchor": "middle"}, svg,
      all.length ? "nothing positive to draw on a log axis" : "no curve: one value a run");
    return;
  }
  const sx = scale(xs, [box.left, box.right], logx), sy = scale(ys, [box.bottom, box.top], logy);
  frame(svg, box, sx, sy, xlabel, ylabel);
  const clip = element("clipPath", {id: `${figure.id}-clip`}, svg);
  element("rect", {x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top}, clip);
  const drawing = element("g", {"clip-path": `url(#${figure.id}-clip)`}, svg);
  for (const group of [...groups].reverse()) {  // the best on top
    const g = layer(drawing, group);
    if (single) for (const run of group.runs || []) if (run.x)
      element("path", {class: "run", d: path(run.x, run.y, sx, sy, logx, logy)}, g);
    if (!group.x) continue;
    const known = (group.low || []).map((v, i) => usable(v, logy) && usable(group.x[i], logx) ? i : -1).filter(i => i >= 0);
    if (known.length > 1) {
      const forth = path(known.map(i => group.x[i]), known.map(i => group.high[i]), sx, sy, logx, logy);
      known.reverse();
      const back = path(known.map(i => group.x[i]), known.map(i => group.low[i]), sx, sy, logx, logy);
      element("path", {class: "band", d: `${forth}${back.replace("M", "L")}Z`}, g);
    }
    const dash = group.color === null ? "" : DASHES[(group.color / 8 | 0) % 4];
    element("path", {class: "mark", d: path(group.x, group.y, sx, sy, logx, logy), "stroke-dasharray": dash}, g);
  }
  listen(svg, box, (px, py) => {
    let best = null;
    for (const group of groups) for (const s of [group, ...(single ? group.runs || [] : [])]) {
      if (!s.x) continue;
      s.x.forEach((x, i) => {
        if (!usable(x, logx) || !usable(s.y[i], logy)) return;
        const far = Math.hypot(sx.at(x) - px, (sy.at(s.y[i]) - py) * 2);
        if (!best || far < best.far) best = {far, group, s, i};
      });
    }
    if (!best || best.far > 120) return null;
    const {group, s, i} = best, band = s.low && Number.isFinite(s.low[i]) ? ` [${short(s.low[i])}, ${short(s.high[i])}]` : "";
    const who = s === group ? `${group.label}, n=${group.n}` : `${s.name} (${group.label})`;
    return {group, text: `${who}\n${xlabel} ${short(s.x[i])}: ${short(s.y[i])}${band}`};
  }, (from, to) => zooms.set(figure.id, [sx.back(from), sx.back(to)]), figure.id);
}

/** A row per group: its runs as points, its mean and interval. */
function rows(figure, groups, {xlabel, logy, single}) {
  const longest = Math.max(4, ...groups.map(g => Math.min(g.label.length, LONGEST)));
  const width = 560, height = 22 * groups.length + 70;
  const box = {left: 18 + 6.9 * longest, right: width - 16, top: 24, bottom: height - 44};
  const svg = start(figure, width, height);
  const values = groups.flatMap(g => [g.mean, g.meanLow, g.meanHigh, ...(single ? g.runs.map(r => r.score) : [])]);
  const xs = range(values, logy);
  if (!xs) return;
  const sx = scale(xs, [box.left, box.right], logy);
  frame(svg, box, sx, null, xlabel, "");
  groups.forEach((group, index) => {
    const y = box.top + 11 + 22 * index, g = layer(svg, group);
    element("rect", {class: "hit", x: 0, y: y - 11, width, height: 22}, g);
    element("text", {x: box.left - 8, y: y + 4, "text-anchor": "end"}, g, cut(group.label, LONGEST));
    const [low, high] = [group.meanLow, group.meanHigh];
    if (usable(low, logy) && usable(high, logy))
      element("line", {class: "bar", x1: sx.at(low), x2: sx.at(high), y1: y, y2: y}, g);
    if (single) for (const run of group.runs) if (usable(run.score, logy))
      element("circle", {class: "point", cx: sx.at(run.score), cy: y, r: 4}, g);
    if (usable(group.mean, logy))
      element("line", {class: "mark", x1: sx.at(group.mean), x2: sx.at(group.mean), y1: y - 8, y2: y + 8}, g);
  });
  listen(svg, box, (px, py) => {
    const group = groups[Math.floor((py - box.top) / 22)];
    if (!group) return null;
    const near = single && group.runs.filter(r => usable(r.score, logy) && Math.abs(sx.at(r.score) - px) < 5)[0];
    const band = Number.isFinite(group.meanLow) ? ` [${short(group.meanLow)}, ${short(group.meanHigh)}]` : "";
    return {group, text: `${group.label}, n=${group.n}\n${near ? `${near.name}: ${short(near.score)}` : `mean ${short(group.mean)}${band}`}`};
  });
}

function start(figure, width, height) {
  figure.querySelector("svg")?.remove();
  const title = figure.querySelector("figcaption").textContent;
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title});
  element("title", {}, svg, title);
  figure.prepend(svg);
  return svg;
}

/** Tells what is under the mouse, pins groups on a click, zooms where it is dragged. */
function listen(svg, box, find, zoom, id) {
  let from = null;
  const place = event => {
    const view = svg.viewBox.baseVal, seen = svg.getBoundingClientRect();
    return [(event.clientX - seen.left) * view.width / seen.width, (event.clientY - seen.top) * view.height / seen.height];
  };
  svg.addEventListener("mousemove", event => {
    const found = find(...place(event));
    light(found ? [found.group.label] : []);
    tip.hidden = !found;
    if (!found) return;
    tip.style.whiteSpace = "pre-line";
    tip.textContent = found.text;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  svg.addEventListener("mouseleave", () => { tip.hidden = true; light([]); });
  svg.addEventListener("mousedown", event => { from = place(event); event.preventDefault(); });
  svg.addEventListener("mouseup", event => {
    const to = place(event);
    if (zoom && from && Math.abs(to[0] - from[0]) > 12) {
      const ends = [from[0], to[0]].map(p => Math.min(Math.max(p, box.left), box.right)).sort((a, b) => a - b);
      zoom(...ends);
      draw();
    } else {
      const found = find(...to);
      if (found) pin(found.group.label);
    }
    from = null;
  });
  svg.addEventListener("dblclick", () => { zooms.delete(id); draw(); });
}

/** Makes groups stand out, besides those that are pinned, in all plots and tables. */
function light(labels) {
  const lit = new Set([...pinned, ...labels]);
  document.querySelectorAll("[data-group]").forEach(item => item.classList.toggle("lit", lit.has(item.dataset.group)));
  document.querySelectorAll(".plots svg").forEach(svg => svg.classList.toggle("some", !!svg.querySelector(".group.lit")));
}

function pin(label) {
  if (!pinned.delete(label)) pinned.add(label);
  light([]);
}

// ---- what is shown ----

const words = () => tools.search.value.toLowerCase().split(/\s+/).filter(Boolean);
const matches = text => words().every(word => text.toLowerCase().includes(word));

function draw() {
  const options = {single: tools.single.checked, logx: tools.logx.checked, logy: tools.logy.checked};
  comparisons.forEach((of, index) => {
    const shown = of.groups.filter(g => matches(g.label) || g.runs.some(run => matches(`${g.label} ${run.name}`)));
    const figure = name => document.getElementById(`${name}${index}`);
    lines(figure("curves"), shown, {...options, xlabel: of.xLabel, ylabel: of.metric});
    rows(figure("scores"), shown, {...options, xlabel: of.metric});
    if (figure("profile")) lines(figure("profile"), shown.filter(g => g.profile).map(
      g => ({...g, x: of.thresholds, y: g.profile, low: null, runs: []})),
      {xlabel: of.metric, ylabel: "fraction of runs above", single: false});
  });
  light([]);
}

function filter() {
  document.querySelectorAll("tr[data-filter]").forEach(row => { row.hidden = !matches(row.dataset.filter); });
  draw();
}

/** Sorts a table by a column: numbers by their value, all else as text; again: the other way round. */
function sort(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const number = text => text.trim() !== "" && Number.isFinite(+text);
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)], [m, n] = [number(x), number(y)];
    if (m !== n) return m ? -1 : 1;  // what has no number comes last, either way
    return down * (m ? x - y : x.localeCompare(y, undefined, {numeric: true}));
  };
  body.append(...[...body.rows].sort(compare));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
}

document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => sort(button.parentNode)));
document.querySelectorAll("tbody tr[data-group]").forEach(row => {
  row.addEventListener("mouseenter", () => light([row.dataset.group]));
  row.addEventListener("mouseleave", () => light([]));
  row.addEventListener("click", () => pin(row.dataset.group));
});
tools.search.addEventListener("input", filter);
for (const id of ["single", "logx", "logy"]) tools[id].addEventListener("change", draw);
draw();
