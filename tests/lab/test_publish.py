"""`lab compare --publish`: what W&B gets is what was computed here, about exactly the runs compared.

The runs are made by the lab's own tracker, the report and the view by the real wandb-workspaces, which also
reads them back; only the server is a stand-in.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import compare, publish, records, report
from lab.cli import main
from lab.run import Run
from tests.lab.runs import make_run
from tests.lab.wandb_stand_in import ReceivedRun, WandbStandIn
from tests.lab.wandb_world import KEY, use, wandb_world

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
PROJECT = "tester/lab-tests"
ASKED = ("--by=agent.algorithm", "--baseline=dqn", "--metric=eval/mean_reward")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ReceivedRun]]:
    """Folders of two agents with three seeds, and what the server has of them.

    They come to 10, 11, 12 (dqn) and 20, 21, 25 (rainbow); only the dqn runs have a loss.
    """
    home = tmp_path_factory.mktemp("publish")
    with WandbStandIn() as server, wandb_world(home, timeout_seconds=2) as patch:
        use(server, patch)
        for algorithm, scores in (("dqn", (10, 11, 12)), ("rainbow", (20, 21, 25))):
            for seed, score in enumerate(scores):
                rows: list[tuple[int, dict[str, Any]]] = [
                    (step, {"eval/mean_reward": score, "frames": 4 * step, "rollout/ep_rew_mean": step})
                    for step in (0, 100, 200)
                ]
                if algorithm == "dqn":
                    rows.append((200, {"train/loss": 0.5}))
                config = {"seed": seed, "agent": {"algorithm": algorithm}, "env": {"game": "pong"}}
                make_run(home / "runs" / f"{algorithm}-s{seed}", rows, config=config, wandb="online")
    assert len(server.runs) == 6
    return home / "runs", server.runs


@pytest.fixture
def server(tracked: tuple[Path, dict[str, ReceivedRun]], tmp_path: Path) -> Iterator[WandbStandIn]:
    """A server that has the runs."""
    with WandbStandIn() as stand_in, wandb_world(tmp_path, timeout_seconds=2) as patch:
        use(stand_in, patch)
        patch.chdir(tmp_path)
        stand_in.runs = copy.deepcopy(tracked[1])
        yield stand_in


@pytest.fixture
def runs(tracked: tuple[Path, dict[str, ReceivedRun]]) -> Path:
    return tracked[0]


def ids(server: WandbStandIn, algorithm: str) -> list[str]:
    """Of an agent's runs, by their seeds."""
    of = [run for run in server.runs.values() if run.config.get("agent") == {"algorithm": algorithm}]
    return [run.name for run in sorted(of, key=lambda run: run.config["seed"])]


def comparison_run(server: WandbStandIn) -> ReceivedRun:
    (run,) = [run for run in server.runs.values() if run.settings.get("jobType") == "comparison"]
    return run


def load(address: str) -> Any:
    """A report or a view, as wandb-workspaces reads it."""
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

    return (Report if "/reports/" in address else Workspace).from_url(address)


def addresses(printed: str) -> tuple[str, str]:
    """Of the report and the view."""
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if ": http" in line)
    return lines["published"], lines["view of the runs"]


def blocks(report_: Any, kind: str) -> list[Any]:
    return [block for block in report_.blocks if type(block).__name__ == kind]


def filtered(runset: Any) -> list[str]:
    """The run ids that a run set or view shows."""
    start = 'Metric("ID") in ['
    assert runset.filters.startswith(start), runset.filters
    return sorted(id_.strip(" '") for id_ in runset.filters.removeprefix(start).rstrip("]").split(","))


def test_run_folders_become_a_report_and_a_view(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(runs), *ASKED, "--publish"]) == 0
    made, view = map(load, addresses(capsys.readouterr().out))
    dqn, rainbow = ids(server, "dqn"), ids(server, "rainbow")

    assert (made.entity, made.project, made.title) == (
        "tester",
        "lab-tests",
        "eval.mean_reward: rainbow, dqn",
    )
    text = blocks(made, "MarkdownBlock")[0].text
    answer = compare.compare(
        records.load([str(runs)], ["eval/mean_reward"]).records,
        compare.Question(metric="eval/mean_reward", by=("agent.algorithm",), baseline="dqn"),
    )
    assert answer.groups[0].estimates["iqm"].point == pytest.approx(22)  # too few to trim: the mean
    assert f"| rainbow | 3 | 22 [15.4, 28.6] | {report.number(7**0.5)} | 21 | 11 [" in text
    assert text == report.markdown([answer]).partition("\n\n")[2]
    assert "| agent.algorithm | rainbow | dqn |" in text
    command = blocks(made, "MarkdownBlock")[-1].text
    assert f"lab compare {runs} --by=agent.algorithm --baseline=dqn --metric=eval/mean_reward" in command
    assert "TableOfContents" in {type(block).__name__ for block in made.blocks}

    media, curves, comparer = blocks(made, "PanelGrid")
    assert {runset.name: filtered(runset) for runset in curves.runsets} == {
        "rainbow": sorted(rainbow),
        "dqn": sorted(dqn),
    }
    assert [runset.groupby for runset in curves.runsets] == [["config.agent.value.algorithm"]] * 2
    assert [(plot.x.name, [y.name for y in plot.y]) for plot in curves.panels] == [
        ("global_step", ["eval/mean_reward"])
    ]
    assert [type(panel).__name__ for panel in comparer.panels] == ["RunComparer"]
    assert filtered(comparer.runsets[0]) == sorted(dqn + rainbow)
    held = comparison_run(server)
    assert filtered(media.runsets[0]) == [held.name]
    shown = [key for panel in media.panels for key in panel.media_keys]
    assert shown == ["comparison/plots", "comparison/page"]
    plots, page = [held.files[held.history[-1][key]["path"]] for key in shown]
    assert plots.startswith(b"\x89PNG")
    assert b"rainbow is better than dqn by 11 (95% " in page
    assert (held.state, held.settings["displayName"]) == ("finished", made.title)

    assert (view.name, filtered(view.runset_settings)) == (made.title, sorted(dqn + rainbow))
    assert [key.name for key in view.runset_settings.groupby] == ["agent.algorithm"]
    assert view.runset_settings.baseline_run == dqn[1], "the one with the median"
    assert view.runset_settings.pinned_runs == [dqn[1]]
    assert "summary:eval/mean_reward" in view.runset_settings.pinned_columns
    panels = {s.name: [(p.x.name, p.y[0].name) for p in s.panels] for s in view.sections}
    assert panels == {
        "compared": [("global_step", "eval/mean_reward")],
        "rollout": [("global_step", "rollout/ep_rew_mean")],
        "train": [("global_step", "train/loss")],
    }
    sent = [
        *(one["spec"] for one in server.views.values()),
        json.dumps(held.config),
        json.dumps(held.settings),
    ]
    assert not any(KEY in text for text in (*sent, page.decode(), *map(repr, held.files.values())))
    assert server.unknown <= {"OrganizationCoreWeaveOrganizationID"}


def test_online_runs_of_several_metrics_over_frames(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for algorithm in ("dqn", "rainbow"):
        for id_ in ids(server, algorithm):
            server.runs[id_].settings["groupName"] = f"pong__{algorithm}"
    metrics = ("--metric=eval/mean_reward", "--metric=rollout/ep_rew_mean")
    assert main(["compare", f"wandb:{PROJECT}", *metrics, "--axis=frames", "--publish"]) == 0
    made, view = map(load, addresses(capsys.readouterr().out))
    headings = [block.text for block in blocks(made, "H1")]
    assert headings[:2] == ["eval/mean_reward", "rollout/ep_rew_mean"]
    _, curves, _ = blocks(made, "PanelGrid")
    assert [(plot.x.name, plot.y[0].name) for plot in curves.panels] == [
        ("frames", "eval/mean_reward"),
        ("frames", "rollout/ep_rew_mean"),
    ]
    assert [runset.groupby for runset in curves.runsets] == [["run.Group"]] * 2, "W&B's groups are the same"
    assert [key.name for key in view.runset_settings.groupby] == ["Group"]


def test_the_same_question_changes_what_was_published(
    server: WandbStandIn, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*more: str) -> tuple[str, str]:
        assert main(["compare", str(runs), *ASKED, *more, "--publish"]) == 0
        return addresses(capsys.readouterr().out)

    first = asked()
    for view in server.views.values():
        view["spec"] = view["spec"].replace("rainbow is better", "OLD").replace("dqn", "OLD")
    assert asked() == first
    assert "OLD" not in "".join(view["spec"] for view in server.views.values())
    assert [view["type"] for view in server.views.values()] == ["project-view", "runs"]
    assert len(comparison_run(server).history) == 2

    deleted = next(id_ for id_, view in server.views.items() if view["type"] == "runs")
    del server.views[deleted]
    renewed = asked()
    assert renewed[1] == first[1]
    assert load(renewed[0]).title == "eval.mean_reward: rainbow, dqn"
    other = asked("--score=best")
    assert not {*other} & {*renewed}, "an address once shared keeps its question"
    assert len(server.views) == 4


def test_runs_that_are_not_there_are_named(
    server: WandbStandIn, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "left here"
    config = {"seed": 3, "agent": {"algorithm": "dqn"}, "env": {"game": "pong"}}
    alone = make_run(folder, [(0, {"eval/mean_reward": 13})], config=config)
    assert main(["compare", str(runs), "left here", *ASKED, "--publish"]) == 0
    printed = capsys.readouterr().out
    note = f"left here ({alone.info['id']}). To send them: lab sync 'left here'"
    assert note in printed
    made, view = map(load, addresses(printed))
    text = blocks(made, "MarkdownBlock")[0].text
    assert note in text
    assert "| dqn | 4 | 11.5 [" in text, "it counts all the same"
    sets = {runset.name: filtered(runset) for runset in blocks(made, "PanelGrid")[1].runsets}
    assert sets["dqn"] == sorted(ids(server, "dqn"))
    assert alone.info["id"] not in filtered(view.runset_settings)

    server.runs.clear()
    assert main(["compare", "left here", "--metric=eval/mean_reward", "--publish"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"lab: --publish: W&B's {PROJECT} has none of the 1 runs. Send them first: lab sync 'left here'\n"
    )


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("no key", "no W&B key for 127.0.0.1. Run `wandb login`"),
        ("offline", "WANDB_MODE is 'offline'. Unset it"),
        ("dead", "cannot be reached (Connection refused)"),
        ("projects", "several projects (5 in tester/lab-tests, 1 in tester/other)"),
        ("Runs", "refuses or does not answer (input: permission denied)"),
        ("UpsertBucket", "refuses or does not answer (Error initializing run: input: permission denied)"),
        ("upsertView", "refuses or does not answer (input: permission denied)"),
    ],
)
def test_trouble_is_one_line_and_costs_nothing(
    server: WandbStandIn,
    runs: Path,
    tmp_path: Path,
    trouble: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = str(runs)
    if trouble == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif trouble == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    elif trouble == "dead":
        server.die()
    elif trouble == "projects":
        source = str(tmp_path / "runs")
        subprocess.run(["cp", "-r", str(runs), source], check=True)
        Run.open(tmp_path / "runs" / "dqn-s0").update(wandb={"project": "other", "entity": None})
    else:
        server.refused.add(trouble)
    call = ["compare", source, *ASKED, "--out=out", "--publish"]
    assert main(call) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lab: --publish: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert "published" not in printed.out
    assert "rainbow is better than dqn by 11 (95% " in printed.out
    assert Path("out/comparison.html").exists()
    assert KEY not in printed.out + printed.err
    if trouble in ("UpsertBucket", "upsertView"):
        server.refused.clear()
        assert main(call) == 0, "nothing that failed is in the way"
        load(addresses(capsys.readouterr().out)[0])
        assert comparison_run(server).state == "finished"


def test_titles_suit_addresses_and_views() -> None:
    one = np.ones(1)

    def title(*labels: str) -> str:
        found = [
            records.Record(
                id=label,
                name=label,
                source="",
                config={"key": label},
                series={"a/b": records.Series(one, one)},
            )
            for label in labels
        ]
        return publish.title(
            [compare.compare(found, compare.Question(metric="a/b", by=("key",), goal="maximize"))]
        )

    assert title("lr=0.1, ε=1", "50% #1?", "🚀+$") == "a.b: 50 1 , lr 0.1, ε 1,"
    assert len(title(*(letter * 300 for letter in "xyz"))) == 120


def test_nothing_of_wandb_is_loaded_before_it_is_asked() -> None:
    code = "import sys, lab.comparing, lab.publish; print([n for n in sys.modules if n.startswith('wandb')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
