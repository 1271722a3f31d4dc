"""`lab compare --publish`: the comparison at Weights & Biases, for others to read.

W&B's own charts know mean and spread, but no interval, no test and no correction for several groups.
So what was computed here goes there. In the project of the runs are made:

- a report: our statistics, plots and notes; below them W&B's line plots, a run set per group with exactly
  the runs compared, and its run comparer;
- a saved view of the workspace: these runs in their groups, a run of the baseline pinned, with the panels of
  their pipelines;
- a run of the job type `comparison`, which holds the plots and the page: a report shows only images that a
  run has logged.

The same question about the same runs, published again, changes these three: their run has the question's
hash and the other two's addresses in its config. Any other question, or one run more, makes new ones, so that
an address once shared never comes to show something else.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import secrets
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lab import report, report_page, report_plot
from lab.compare import Comparison
from lab.errors import LabError
from lab.grouping import FIELDS, is_bookkeeping
from lab.records import AXES, STEP, Record, flatten
from lab.sync_server import Server, _says
from lab.tracking import FINISH_SECONDS, unrecorded

if TYPE_CHECKING:
    from wandb_workspaces import workspaces as ws

JOB_TYPE = "comparison"
DEFAULT_PROJECT = "deep-rl-lab"
PLOTS, PAGE = "comparison/plots", "comparison/page"
PANELS = (
    *("eval/mean_reward", "eval/human_normalized", "eval/mean_ep_length"),
    *("eval/win_rate", "eval/accuracy", "eval/loss", "eval/kl_nats"),
    *("rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/exploration_rate"),
    *("objective/rlhf_reward", "objective/scores", "objective/gold_scores", "objective/kl"),
    *("objective/entropy", "objective/non_score_reward"),
    *("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/ratio"),
    *("train/loss", "train/accuracy", "train/margin", "train/grad_norm", "train/learning_rate"),
    *("train/epoch", "train/num_tokens", "time/fps"),
)
"""Of the view, as far as the runs have them; a section for each first part of a name."""
_ATTRIBUTES = {
    **{"group": "group", "name": "displayName", "job_type": "jobType", "state": "state", "id": "name"},
}
"""W&B's names for `grouping.FIELDS`."""


class Published(NamedTuple):
    """Where the comparison is now."""

    report: str
    view: str
    notes: tuple[str, ...]
    """What is not as one would expect."""


def publish(comparisons: Sequence[Comparison], command: str) -> Published:
    """Publishes comparisons of the same runs, one a metric.

    Args:
        comparisons: of one question each.
        command: what asks the same again.

    Raises:
        LabError: no key or no server, or one that refuses; the runs are not at W&B, or in several projects.
    """
    server = Server()
    with _explained():
        api = server.connect()
        runs = _Runs(comparisons, server)
        if runs.missing:
            first = comparisons[0]
            comparisons = [dataclasses.replace(first, notes=(*first.notes, *runs.notes)), *comparisons[1:]]
        with tempfile.TemporaryDirectory(prefix="lab-publish-", ignore_cleanup_errors=True) as scratch:
            return _publish(api, comparisons, command, runs, Path(scratch))


def title(comparisons: Sequence[Comparison]) -> str:
    """Of everything that is made: what W&B takes in an address and in the name of a view."""
    metrics = " and ".join(comparison.question.metric.replace("/", ".") for comparison in comparisons)
    labels = ", ".join(group.label for group in comparisons[0].groups)
    text = re.sub(r"\s+", " ", re.sub(r"[^\w .,:-]", " ", f"{metrics}: {labels}")).strip()
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what goes wrong with W&B into one line that says that nothing is lost."""
    try:
        yield
    except LabError as error:
        raise LabError(f"--publish: {error}") from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("wandb"):
            raise  # our own mistake
        raise LabError(f"--publish: {_says(error)}. Run it again later: nothing is lost.") from error


# ---- the runs ----


class _Runs:
    """The runs compared, and what W&B knows of them.

    Raises:
        LabError: W&B has none of them, or they are in several projects.
    """

    def __init__(self, comparisons: Sequence[Comparison], server: Server) -> None:
        self.groups: dict[str, dict[str, Record]] = {}
        """By label: the records by id."""
        for group in itertools.chain.from_iterable(comparison.groups for comparison in comparisons):
            self.groups.setdefault(group.label, {}).update({record.id: record for record in group.records})
        self.records = [record for group in self.groups.values() for record in group.values()]
        self.entity, self.project = self._place(server)
        self.place: dict[str, Any] = {"entity": self.entity, "project": self.project}
        api = server.connect()
        found: list[Any] = []
        filters = {"name": {"$in": sorted(record.id for record in self.records)}}
        try:
            found = list(api.runs(f"{self.entity}/{self.project}", filters=filters, lazy=False))
        except ValueError as error:
            if "Could not find project" not in str(error):
                raise
        self.there = {run.id: run for run in found}
        """W&B's, by id."""
        self.keys = {key for run in found for key in (*run.config, *flatten(run.config))}
        """Of their configs, nested ones with dots."""
        self.step = STEP if any(STEP in dict(run.summary) for run in found) else "Step"
        """What W&B calls the steps."""
        self.lines = max(10, len(self.groups))
        """How many a plot must show; by itself W&B shows ten."""
        self.missing = [record for record in self.records if record.id not in self.there]
        if not found:
            raise LabError(
                f"W&B's {self.entity}/{self.project} has none of the {len(self.records)} runs. "
                f"Send them first: {self._sync()}"
            )

    def ids(self, label: str = "") -> list[str]:
        """Of the runs at W&B, of one group or of all."""
        wanted = self.groups[label] if label else {record.id for record in self.records}
        return [id_ for id_ in self.there if id_ in wanted]

    @property
    def notes(self) -> tuple[str, ...]:
        """That runs are missing at W&B, if some are."""
        if not self.missing:
            return ()
        names = ", ".join(f"{record.name} ({record.id})" for record in self.missing)
        return (
            f"not in W&B's {self.entity}/{self.project}, so not in its panels, but in all numbers here: "
            f"{names}. To send them: {self._sync()}",
        )

    def _sync(self) -> str:
        return f"lab sync {shlex.join(record.source for record in self.missing)}"

    def _place(self, server: Server) -> tuple[str, str]:
        places = Counter(_place(record, server) for record in self.records)
        if len(places) > 1:
            where = ", ".join(f"{count} in {'/'.join(place)}" for place, count in places.most_common())
            raise LabError(
                f"the runs are in several projects ({where}); a view and a report belong to one. "
                "Compare the runs of one project at a time."
            )
        return next(iter(places))


def _place(record: Record, server: Server) -> tuple[str, str]:
    """Entity and project of a run, as whoever tracked it has named them."""
    from lab import records
    from lab.run import Run

    if record.source.startswith("wandb:"):
        entity, project, _ = record.source.removeprefix("wandb:").split("/")
        return entity, project
    path = Path(record.source)
    tracked: Mapping[str, Any] = {}
    if path.is_dir():
        tracked = Run.open(path).info.get("wandb") or {}
    elif isinstance(read := records._read_fragment(path), records._Fragment):
        tracked = read.info
    return tracked.get("entity") or server.entity(), tracked.get("project") or DEFAULT_PROJECT


# ---- what W&B is told of them ----


def _grouping(comparisons: Sequence[Comparison], runs: _Runs) -> list[tuple[str, str]]:
    """What makes the groups, as W&B's (section, name): the keys asked for; its own groups, if they are ours
    and nothing was asked for; else the keys that differ."""
    keys = comparisons[0].question.by or ("group",)
    if keys == ("group",) and "group" not in runs.keys:
        groups = [{runs.there[id_].group for id_ in runs.ids(label)} for label in runs.groups]
        names = set().union(*groups) - {None, ""}
        if any(len(group) > 1 for group in groups) or len(names) < len(groups):
            differing = dict.fromkeys(key for comparison in comparisons for key in comparison.differences)
            keys = tuple(key for key in differing if key in runs.keys and not is_bookkeeping(key))
    return [_wandb_key(key, runs) for key in keys]


def _wandb_key(key: str, runs: _Runs) -> tuple[str, str]:
    if key in FIELDS and key not in runs.keys:
        return "run", _ATTRIBUTES[key]
    if any(key in run.config for run in runs.there.values()):  # also one with dots in its name
        return "config", f"{key}.value"
    first, *rest = key.split(".")
    return "config", ".".join([first, "value", *rest])


def _x(comparison: Comparison, runs: _Runs) -> str:
    """What W&B can lay the metric over: the axis asked for if both are in the same rows, else the steps."""
    axis, metric = comparison.question.axis, comparison.question.metric
    for record in runs.records if axis != "step" else ():
        curve, scale = record.series.get(metric), record.series.get(AXES[axis])
        if curve is not None and scale is not None and np.isin(curve.x, scale.x).any():
            return AXES[axis]
    if axis == "time":
        return "RelativeTime(Process)"
    return runs.step


def _baseline_run(comparison: Comparison, runs: _Runs) -> str | None:
    """Of the baseline's runs at W&B the one nearest to its median: W&B compares with a run, not a group."""
    group = next(group for group in comparison.groups if group.label == comparison.baseline)
    scores = {record.id: group.by_run[record.id] for record in group.records if record.id in runs.there}
    return min(scores, key=lambda id_: (abs(scores[id_] - group.median), id_), default=None)


def _only(ids: Sequence[str]) -> Any:
    """W&B's filter for these runs and no others."""
    from wandb_workspaces import expr

    return expr.And(expr.Metric("ID").isin(list(ids)))


# ---- what is made ----


def _publish(
    api: Any, comparisons: Sequence[Comparison], command: str, runs: _Runs, scratch: Path
) -> Published:
    import wandb
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports.v2 import interface as wr

    name = title(comparisons)
    plots, page = scratch / "comparison.png", scratch / "comparison.html"
    report_plot.draw(comparisons, [plots])
    page.write_text(report_page.page(comparisons, name, command), encoding="utf-8")
    asked = [dataclasses.asdict(comparison.question) for comparison in comparisons]
    question = json.dumps([asked, sorted(record.id for record in runs.records)])
    digest = hashlib.sha256(question.encode()).hexdigest()
    same = {"jobType": JOB_TYPE, "config.question.value": digest}
    before = next(iter(api.runs(f"{runs.entity}/{runs.project}", filters=same, lazy=False)), None)
    links = before.config if before else {}
    with _logging(
        **runs.place, id=before.id if before else secrets.token_hex(4), name=name, dir=str(scratch)
    ) as run:
        run.config.update({"question": digest, "command": command}, allow_val_change=True)
        run.log({PLOTS: wandb.Image(str(plots)), PAGE: wandb.Html(str(page), inject=False)})
        view = _save(
            ws.Workspace,
            links.get("view"),
            **runs.place,
            name=name,
            sections=_sections(comparisons, runs),
            settings=ws.WorkspaceSettings(max_runs=runs.lines),
            runset_settings=_runset(comparisons, runs),
        )
        address = _save(
            wr.Report,
            links.get("report"),
            **runs.place,
            title=name,
            description=report.headline(comparisons[0]),
            blocks=_blocks(comparisons, command, runs, run.id, view),
            width="fluid",
        )
        run.config.update({"report": address, "view": view}, allow_val_change=True)
    return Published(address, view, runs.notes)


@contextlib.contextmanager
def _logging(**about: Any) -> Iterator[Any]:
    """A run that nothing of this process is recorded of; a failed one if the block raises."""
    import wandb

    try:
        run = wandb.init(
            **about,
            job_type=JOB_TYPE,
            mode="online",
            resume="allow",
            settings=unrecorded(FINISH_SECONDS),
        )
    except Exception:
        with contextlib.suppress(Exception):
            wandb.teardown()  # else the run id stays "in use"
        raise
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def _save(kind: Any, address: str | None, **fields: Any) -> str:
    """Saves a report or view, the one at the address if it is still there; returns its address."""
    saved = None
    if address:
        with contextlib.suppress(Exception):  # somebody deleted it
            saved = kind.from_url(address)
    if saved is None:
        saved = kind(**fields)
    for name, value in fields.items():
        setattr(saved, name, value)
    return saved.save().url


def _blocks(
    comparisons: Sequence[Comparison], command: str, runs: _Runs, media_run: str, view: str
) -> list[Any]:
    """The report from top to bottom."""
    from wandb_workspaces.reports.v2 import interface as wr

    answers = []
    for number, comparison in enumerate(comparisons):
        shown = dataclasses.replace(comparison, links=()) if number else comparison
        _, _, text = report.markdown([shown]).partition("\n\n")  # a heading only of W&B's is in its contents
        answers += [wr.H1(comparison.question.metric), wr.MarkdownBlock(text)]
    media = wr.Runset(**runs.place, name="comparison", filters=_only([media_run]))
    images: list[Any] = [
        wr.MediaBrowser(title=head, media_keys=[key], num_columns=1, layout=wr.Layout(w=24, h=height))
        for head, key, height in (
            ("Curves with their bands, scores with their intervals", PLOTS, 12),
            ("The same to hover, zoom and filter", PAGE, 20),
        )
    ]
    keys = [f"{section}.{name}" for section, name in _grouping(comparisons, runs)]
    groups = [
        wr.Runset(**runs.place, name=label, filters=_only(runs.ids(label)), groupby=keys)
        for label in runs.groups
        if runs.ids(label)
    ]
    curves = [
        _plot(comparison.question.metric, _x(comparison, runs), runs, layout=wr.Layout(w=24, h=10))
        for comparison in comparisons
    ]
    everything = wr.Runset(**runs.place, name="all", filters=_only(runs.ids()))
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=16))
    return [
        wr.TableOfContents(),
        *answers,
        wr.H1("Plots"),
        wr.PanelGrid(runsets=[media], panels=images, hide_run_sets=True),
        wr.H1("The groups at W&B"),
        wr.MarkdownBlock(
            f"Means and standard deviations, as W&B draws them. [More panels of these runs]({view})."
        ),
        wr.PanelGrid(runsets=groups, panels=curves),
        wr.H1("Run by run"),
        wr.PanelGrid(runsets=[everything], panels=[comparer]),
        wr.H1("How it was made"),
        wr.MarkdownBlock(
            f"```\n{command}\n```\n\nWith `--publish` this writes the report anew as long as the runs are "
            "the same: keep what you add to it in a copy."
        ),
    ]


def _sections(comparisons: Sequence[Comparison], runs: _Runs) -> "list[ws.Section]":
    """Of the view: the compared metrics, then the usual ones that the runs have."""
    from wandb_workspaces import workspaces as ws

    compared = {comparison.question.metric: _x(comparison, runs) for comparison in comparisons}
    have = frozenset().union(*(record.metrics for record in runs.records)) - set(compared)
    sections = [ws.Section("compared", [_plot(*pair, runs) for pair in compared.items()], is_open=True)]
    for first, names in itertools.groupby(PANELS, key=lambda name: name.split("/")[0]):
        if panels := [_plot(name, runs.step, runs) for name in names if name in have]:
            sections.append(ws.Section(first, panels, is_open=True))
    return sections


def _plot(metric: str, x: str, runs: _Runs, **kwargs: Any) -> Any:
    from wandb_workspaces.reports.v2 import interface as wr

    return wr.LinePlot(
        title=metric,
        x=x,
        y=[metric],
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=runs.lines,
        **kwargs,
    )


def _runset(comparisons: Sequence[Comparison], runs: _Runs) -> "ws.RunsetSettings":
    """The runs of the view: which, in which groups, with what beside their names, compared with which."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    grouping = _grouping(comparisons, runs)
    return ws.RunsetSettings(
        filters=_only(runs.ids()),
        groupby=[(expr.Config if section == "config" else expr.Metric)(name) for section, name in grouping],
        pinned_columns=[
            *(f"summary:{comparison.question.metric}" for comparison in comparisons),
            *(f"{section}:{name}" for section, name in grouping),
        ],
        baseline_run=_baseline_run(comparisons[0], runs),
    )
