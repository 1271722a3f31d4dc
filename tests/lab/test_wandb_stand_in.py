"""The stand-in for W&B's server satisfies W&B's own clients: `wandb.Api` and wandb-workspaces.

What `wandb.init` and `wandb sync` do with it is in test_tracking.py and test_sync.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.tracking import Tracker
from tests.lab.wandb_stand_in import ENTITY, WandbStandIn
from tests.lab.wandb_world import use, wandb_world

PATH = f"{ENTITY}/lab-tests"
UNNEEDED = {"OrganizationCoreWeaveOrganizationID"}
"""What the client asks for, and does without."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbStandIn]:
    """A server with three runs, run0 to run2, of twelve rows each."""
    with wandb_world(tmp_path) as patch, WandbStandIn() as stand_in:
        use(stand_in, patch)
        for number in range(3):
            about = {"project": "lab-tests", "id": f"run{number}", "name": f"pong s{number}", "group": "pong"}
            config = {"seed": number, "agent": {"lr": number / 4}}
            folder = tmp_path / str(number)
            folder.mkdir()
            identity = {**about, "entity": None, "job_type": "train", "tags": ["all", f"tag{number}"]}
            track = Tracker(folder, config, "online", identity)
            for step in range(12):
                track.log(step * 10, {"eval/mean_reward": step * number, "odd": float("nan")})
                if step % 2:
                    track.log(step * 10, {"train/loss": 1 / step})
            track.finish(number, {"best": 11 * number})
        yield stand_in


def api() -> Any:
    import wandb

    return wandb.Api(timeout=10)


def test_the_api_finds_runs_by_filters_and_order(server: WandbStandIn) -> None:
    def found(filters: dict[str, Any], order: str = "+created_at") -> list[str]:
        return [run.id for run in api().runs(PATH, filters=filters, order=order)]

    assert found({}) == ["run0", "run1", "run2"]
    assert found({}, "-created_at") == ["run2", "run1", "run0"]
    assert found({}, "-summary_metrics.best") == ["run2", "run1", "run0"]
    assert found({"config.seed": 1}) == found({"config.seed.value": 1}) == ["run1"]
    assert found({"$and": [{"config.agent.lr": {"$gte": 0.25}}, {"state": "failed"}]}) == ["run1", "run2"]
    assert found({"$or": [{"tags": {"$in": ["tag0"]}}, {"display_name": {"$regex": "s2$"}}]}) == [
        "run0",
        "run2",
    ]
    assert found({"username": ENTITY, "group": "pong", "jobType": "train", "name": {"$ne": "run0"}}) == [
        *("run1", "run2")
    ]
    assert found({"state": "running"}) == []
    assert [run.id for run in api().runs(PATH, per_page=1)] == ["run0", "run1", "run2"], "page by page"
    with pytest.raises(ValueError, match="Could not find project"):
        list(api().runs(f"{ENTITY}/other"))
    assert server.unknown <= UNNEEDED


def test_the_api_reads_a_run_back(server: WandbStandIn, tmp_path: Path) -> None:
    from wandb.errors import CommError

    run = api().run(f"{PATH}/run1")
    assert (run.name, run.group, run.job_type, run.tags) == ("pong s1", "pong", "train", ["all", "tag1"])
    assert (run.state, run.user.username, run.entity) == ("failed", ENTITY, ENTITY)
    assert run.config == {"seed": 1, "agent": {"lr": 0.25}}
    assert (run.summary["best"], run.summary["eval/mean_reward"]) == (11, 11)
    rows = list(run.scan_history(use_cache=False))
    assert len(rows) == run.historyLineCount == 18
    assert [row["_step"] for row in rows] == list(range(18))
    assert rows[0]["odd"] == "nan"
    keyed = list(run.scan_history(keys=["global_step", "train/loss"]))
    assert [row["train/loss"] for row in keyed] == pytest.approx([1 / step for step in range(1, 12, 2)])
    assert len(list(run.scan_history(page_size=5))) == 18
    assert len(run.history(pandas=False)) == 18
    sampled = run.history(keys=["eval/mean_reward"], samples=6, pandas=False)
    assert [row["eval/mean_reward"] for row in sampled] == [0, 2, 4, 6, 8, 10]
    assert "config.yaml" in {file.name for file in run.files()}
    assert run.metadata["host"]
    with run.file("config.yaml").download(str(tmp_path)) as file:
        assert "lr" in file.read()
    with pytest.raises(CommError, match="Could not find run"):
        api().run(f"{PATH}/other")
    assert server.unknown <= UNNEEDED


def test_reports_and_views_are_saved_and_changed(
    server: WandbStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = pytest.importorskip("wandb_workspaces.reports.v2")
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    plot = reports.LinePlot(x="global_step", y=["eval/mean_reward"])
    runs = reports.Runset(ENTITY, "lab-tests")
    blocks = [reports.H1("Pong"), reports.PanelGrid(runsets=[runs], panels=[plot, reports.RunComparer()])]
    report = reports.Report(project="lab-tests", entity=ENTITY, title="Pong", blocks=blocks).save()
    assert report.url.startswith(f"{server.url}/{PATH}/reports/Pong--")
    report.title = "Pong again"
    report.save()
    sections = [workspaces.Section("eval", panels=[plot])]
    view = workspaces.Workspace(entity=ENTITY, project="lab-tests", name="curves", sections=sections).save()
    assert view.url.startswith(f"{server.url}/{PATH}?nw=")
    assert [(one["type"], one["displayName"]) for one in server.views.values()] == [
        *(("runs", "Pong again"), ("project-view", "curves"))
    ]
    assert all("eval/mean_reward" in one["spec"] for one in server.views.values())
    reports.Report(project="new", entity=ENTITY, title="In a new project").save()
    assert len(server.views) == 3
    capsys.readouterr()
