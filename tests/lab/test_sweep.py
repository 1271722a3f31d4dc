"""Whole sweeps by the real command.

Most sweeps here are of a toy: a pipeline of its own with real run folders, whose runs take a moment because
they load no torch. One is of PQN on Pong.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lab import config, search
from lab.errors import LabError
from lab.run import Run
from lab.search import Goal, Tried, read_parameters
from lab.sweep import wandb_config
from lab.sweep_file import read_sweep, short_names, word
from lab.sweep_record import Candidate, Record, Trial, last_value, runs_of, setting_name
from lab.sweep_runs import Runner
from lab.tracking import read_metrics
from tests.conftest import PONG, REPO, TINY, LabCommand
from tests.e2e.test_bad_input import KEY, refuse, snapshot
from tests.lab.wandb_stand_in import WandbStandIn

# ---- names ----


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda below: st.lists(below) | st.dictionaries(st.text(), below),
        max_leaves=5,
    )
)
def test_a_value_on_the_command_line_is_read_back_as_it_was(value: Any) -> None:
    assert search.same(config.split_overrides([f"--a={word(value)}"])["a"], value)


def test_keys_are_as_short_as_they_are_clear() -> None:
    assert short_names(["agent.lr", "seed"]) == {"agent.lr": "lr", "seed": "seed"}
    assert short_names(["sft.lr", "ppo.lr", "ppo.kl"]) == {
        **{"sft.lr": "sft.lr", "ppo.lr": "ppo.lr", "ppo.kl": "kl"}
    }
    assert short_names(["lr", "ppo.lr"]) == {"lr": "lr", "ppo.lr": "ppo.lr"}


# ---- a toy to train ----

TOY = '''
"""A pipeline whose runs take a moment: a few steps towards a score that the config decides."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from lab import config
from lab.config import require
from lab.interrupt import StopRequest
from lab.run import Run
from lab.tracking import TrackingConfig, choose_mode, read_metrics


@dataclass(frozen=True, kw_only=True)
class Agent:
    x: float = 0.0
    n: int = 1
    kind: str = "good"

    def __post_init__(self):
        require(self.x != 13 or self.n != 13, "agent.n", "must not be 13 with x = 13")


@dataclass(frozen=True, kw_only=True)
class Config:
    pipeline: str = "toy"
    name: str | None = None
    seed: int = 0
    steps: int = 3
    pause: float = 0.0
    agent: Agent = field(default_factory=Agent)
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb="disabled"))


class Pipeline:
    def config_class(self, values, source_of):
        return Config

    def smoke(self, values):
        return {**values, "steps": 1, "pause": 0.0}

    def train(self, c, folder, resume):
        run = Run.resume(folder) if resume else None
        mode, why = choose_mode(c.tracking.wandb)
        if run is None:
            run = Run.create(
                folder, config=config.to_dict(c), pipeline="toy", job_type="train", name=c.name or "toy",
                group="toy", x_axis="agent_steps", compute={},
            )
        else:
            run.continue_from(run.metrics.stat().st_size)
        with run.recording_its_end(), StopRequest() as stop:
            tracker = run.tracker(mode, why, c.tracking.project, c.tracking.entity, None)
            for step in range(len(read_metrics(run.metrics)), c.steps):
                if stop:
                    run.end("interrupted", reason=stop.signal_name)
                    break
                while c.pause and not Path("go").exists() and not stop:
                    time.sleep(c.pause)
                if c.agent.kind == "broken" and not Path("mended").exists():
                    raise RuntimeError("the toy is broken")
                score = -((c.agent.x - 2) ** 2) - 0.1 * abs(c.agent.n - 3) + 0.01 * c.seed + step - c.steps
                score = float("nan") if c.agent.kind == "nan" else score
                score = float("nan") if c.agent.kind == "seed 0 diverges" and c.seed == 0 else score
                tracker.log(step, {"eval/score": score, "threads": os.environ.get("OMP_NUM_THREADS", "")})
            else:
                run.end("finished")
            tracker.finish(0)


PIPELINE = Pipeline()
'''


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that registers the toy, as an installed package would, when it is on Python's path."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_pipeline.py").write_text(TOY)
    (folder / "toy-1.dist-info").mkdir()
    (folder / "toy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    points = "[lab.pipelines]\ntoy = toy_pipeline:PIPELINE\n"
    (folder / "toy-1.dist-info" / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture
def toy_here(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy in this process."""
    monkeypatch.syspath_prepend(str(toy))
    assert "toy" in importlib.metadata.entry_points(group="lab.pipelines").names


SCORE = {"name": "eval/score", "goal": "maximize"}
GRID: dict[str, Any] = {
    "config": "toy.yaml",
    "method": "grid",
    "metric": SCORE,
    "parameters": {"agent.x": {"values": [0, 1.5, 3]}},
    "seeds": [0, 1],
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes toy.yaml and a sweep of it into the folder of the test, which one is then in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text("pipeline: toy\n")

    def write(**changes: Any) -> Path:
        file = tmp_path / "sweep.yaml"
        file.write_text(
            yaml.safe_dump(
                {key: item for key, item in (GRID | changes).items() if item is not None}, sort_keys=False
            )
        )
        return Path("sweep.yaml")

    return write


@pytest.fixture
def lab(
    lab_command: LabCommand, toy: Path, tmp_path: Path
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs `lab sweep sweep.yaml ARGUMENTS` where the toy is known."""

    def lab(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return lab_command(
            "sweep", "sweep.yaml", *arguments, cwd=tmp_path, env={**with_toy(toy), **environment}
        )

    return lab


def with_toy(toy: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(toy), *filter(None, [os.environ.get("PYTHONPATH")])])}


Lab = Callable[..., "subprocess.CompletedProcess[str]"]
Write = Callable[..., Path]


def sessions(folder: Path) -> dict[str, int]:
    """How often each run was begun or continued."""
    return {
        path.parent.name: len(Run.open(path.parent).info["sessions"])
        for path in sorted(folder.glob("*/run.json"))
    }


def states(folder: Path) -> list[str]:
    record = json.loads((folder / "sweep.json").read_text())
    return [trial["state"] for one in record["candidates"] for trial in one["trials"]]


# ---- the file ----


@pytest.mark.usefixtures("toy_here")
def test_a_sweep_file_says_what_is_run(write: Write) -> None:
    sweep = read_sweep(write(name="scores", description="why"), {"steps": 5}, None)
    assert (sweep.name, sweep.count, sweep.seeds, sweep.resolved["steps"]) == ("scores", 3, (0, 1), 5)
    assert read_sweep(write(), {}, 2).count == 2
    assert read_sweep(write(count=1), {}, None).count == 1
    assert read_sweep(write(), {}, 50).count == 3, "there are no more"
    seeds = {"agent.n": {"values": [1, 2]}, "seed": {"values": [4, 5]}}
    sweep = read_sweep(write(parameters=seeds, seeds=None), {}, None)
    assert (sweep.seeds, [one.key for one in sweep.parameters]) == ((4, 5), ["agent.n"]), "as W&B writes it"
    sweep = read_sweep(write(parameters={"seed": {"values": [4, 5]}}, seeds=None), {}, None)
    assert (sweep.count, setting_name(sweep, {})) == (1, "config"), "seeds alone"


BAD_FILES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "unknown key": ({"metod": "grid"}, [], "sweep.yaml: unknown key 'metod'. Did you mean 'method'?"),
    "early_terminate": (
        {"early_terminate": {"type": "hyperband"}},
        [],
        "the lab trains every run to its end",
    ),
    "program": ({"program": "train.py"}, [], "lab sweep runs `lab train`"),
    "a config": ({"pipeline": "toy"}, [], "pipeline: is a key of a config. A sweep names its config"),
    "run_cap": ({"run_cap": 3}, [], "run_cap: is called count here"),
    "no method": ({"method": None}, [], "method = None is not valid. Expected grid, random, bayes."),
    "method": ({"method": "gird"}, [], "method = 'gird' is not valid. Did you mean 'grid'?"),
    "no metric": ({"metric": None}, [], "metric = None is not valid. Expected e.g. metric: {name:"),
    "no goal": ({"metric": {"name": "a"}}, [], "metric has no goal. Add goal: maximize, or goal: minimize."),
    "goal": ({"metric": {"name": "a", "goal": "max"}}, [], "metric.goal = 'max' is not valid"),
    "metric key": ({"metric": {**SCORE, "target": 3}}, [], "unknown key 'metric.target'"),
    "no parameters": ({"parameters": None}, [], "parameters = None is not valid. Expected config keys"),
    "config key": (
        {"parameters": {"agent.xx": {"value": 1}}},
        [],
        "sweep.yaml: unknown key 'agent.xx'. Did you mean 'agent.x'?",
    ),
    "value": (
        {"parameters": {"agent.n": {"values": [1, 2, "three"]}}},
        [],
        "sweep.yaml: agent.n = 'three' is not valid. Expected int.",
    ),
    "combination": (
        {"parameters": {"agent.x": {"values": [0, 13]}, "agent.n": {"values": [1, 13]}}},
        [],
        "agent.n: must not be 13 with x = 13 (with agent.x=13, agent.n=13)",
    ),
    "end of a range": (
        {"method": "bayes", "count": 3, "parameters": {"agent.n": {"min": 0.5, "max": 3.5}}},
        [],
        "agent.n = 0.5 is not valid. Expected int.",
    ),
    "grid of a range": (
        {"parameters": {"agent.x": {"min": 0.0, "max": 1.0}}},
        [],
        "a grid needs values: [...]",
    ),
    "no count": ({"method": "random"}, [], "method random needs count, the number of settings"),
    "count": ({"count": 0}, [], "count: 0 is not valid. Expected a whole number of at least 1."),
    "too many": (
        {"method": "random", "count": 10**6, "parameters": {"agent.x": {"min": 0.0, "max": 1.0}}},
        [],
        "1,000,000 settings are more than 1,000",
    ),
    "seeds": ({"seeds": 3}, [], "seeds = 3 is not valid. Expected a list such as [0, 1, 2]."),
    "seed": ({"seeds": [0, -1]}, [], "seeds: -1 is not valid"),
    "seed twice": ({"seeds": [1, 1]}, [], "a seed is there twice"),
    "seed drawn": (
        {"method": "random", "count": 2, "seeds": None, "parameters": {"seed": {"min": 0, "max": 9}}},
        [],
        "parameter seed: write seeds: [0, 1, 2]",
    ),
    "search_seed": ({"search_seed": "a"}, [], "search_seed: 'a' is not valid"),
    "no config": ({"config": None}, [], "config = None is not valid. Expected a config file to vary."),
    "config": ({"config": "tou.yaml"}, [], "tou.yaml: no such config file."),
    "name": ({"name": [1]}, [], "name = [1] is not valid"),
    "override": ({}, ["--agent.xx=1"], "command line: unknown key 'agent.xx'."),
    "override of a parameter": ({}, ["--agent.x=1"], "command line: --agent.x: sweep.yaml varies it."),
    "override of the seed": ({}, ["--seed=1"], "command line: --seed: sweep.yaml varies it."),
}


@pytest.mark.usefixtures("toy_here")
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_mistake_in_the_file_is_one_clear_line(write: Write, case: str) -> None:
    changes, arguments, words = BAD_FILES[case]
    with pytest.raises(LabError) as error:
        read_sweep(write(**changes), config.split_overrides(arguments), None)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_refuses_before_anything_is_written(write: Write, lab: Lab, tmp_path: Path) -> None:
    write(parameters={"agent.xx": {"value": 1}})
    before = snapshot(tmp_path)
    refuse(lab(), "sweep.yaml: unknown key 'agent.xx'")
    refuse(lab("--resume"), "--resume is not needed: the same command goes on where it stopped.")
    refuse(lab("--jobs=0"), "argument --jobs: '0' is no whole number of at least 1")
    write()
    refuse(lab("--tracking.wandb=online"), "tracking.wandb = 'online': no W&B key")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refuse(lab("--out=mine"), "mine: is not empty and no sweep. Choose another folder with --out.")
    refuse(lab("--out=toy.yaml"), "toy.yaml: is a file.")
    assert before.keys() == snapshot(tmp_path).keys() - {
        str(tmp_path / "mine"),
        str(tmp_path / "mine/notes.txt"),
    }


@pytest.mark.parametrize(
    "file", sorted((REPO / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_sweeps_that_come_with_the_lab_can_be_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    sweep = read_sweep(file, {}, None)
    assert file.read_text().startswith("# ")
    assert sweep.count * len(sweep.seeds) > 1


# ---- whole sweeps ----


def test_a_grid_is_run_with_every_seed_and_shown_and_done_once(
    write: Write, lab: Lab, tmp_path: Path
) -> None:
    write()
    result = lab("--jobs=2")
    assert result.returncode == 0, result.stderr
    root = tmp_path / "runs" / "sweep"
    names = {f"x={x}__s{seed}" for x in ("0", "1.5", "3") for seed in (0, 1)}
    assert sessions(root) == dict.fromkeys(names, 1)
    assert "sweep: grid over agent.x: 3 settings x 2 seeds = 6 runs" in result.stderr
    assert re.findall(r"\[(\d)/6\] finished", result.stderr) == list("123456")
    info = Run.open(root / "x=1.5__s1").info
    assert (info["config"]["agent"]["x"], info["seed"], info["name"]) == (1.5, 1, "sweep__x=1.5__s1")
    lines = result.stdout.splitlines()
    assert lines[0] == "eval/score (last value of each run, maximized)"
    assert lines[2].split() == ["1", "-1.445", "0.007071", "2", "1.5"]
    assert [line.split()[-1] for line in lines[2:5]] == ["1.5", "3", "0"]
    assert "6 of 6 runs finished" in lines
    assert "best     lab train toy.yaml --agent.x=1.5" in lines
    assert "compare  lab compare runs/sweep --metric=eval/score --score=last --goal=maximize" in lines
    before = snapshot(root / "x=0__s0")
    again = lab("--jobs=2")
    assert again.stdout == result.stdout
    assert "started" not in again.stderr
    assert snapshot(root / "x=0__s0") == before
    assert lab("--count=2").returncode == 0, "what there is stays"


def test_a_sweep_goes_on_with_more_settings_but_not_as_another(
    write: Write, lab: Lab, tmp_path: Path
) -> None:
    drawn = {"method": "random", "parameters": {"agent.x": {"min": 0.0, "max": 4.0}}, "seeds": None}
    write(**drawn, count=2)
    assert lab().returncode == 0
    root = tmp_path / "runs" / "sweep"
    first = sessions(root)
    assert lab("--count=4").returncode == 0
    assert len(sessions(root)) == 4
    assert first.items() <= sessions(root).items()
    for changes, words in (
        ({"search_seed": 1}, "runs/sweep: holds another sweep: search_seed was 0 there, now it is 1."),
        ({"seeds": [7]}, "seeds was [] there, now it is [7]."),
        ({"parameters": {"agent.x": {"min": 0.0, "max": 3.0}}}, "parameters.agent.x.high was 4.0 there"),
        ({"parameters": {"agent.x": {"values": [0, 4]}}}, "parameters.agent.x.distribution was 'uniform'"),
    ):
        write(**(drawn | changes), count=2)
        refuse(lab(), words)
    write(**drawn, count=2)
    refuse(lab("--steps=4"), "config.steps was 3 there, now it is 4. Set it back, or choose another folder")
    (root / "sweep.json").write_text("{}")
    refuse(lab(), "runs/sweep/sweep.json: damaged.")


def test_a_failing_run_is_counted_and_can_be_done_again(write: Write, lab: Lab, tmp_path: Path) -> None:
    write(parameters={"agent.kind": {"values": ["broken", "good", "nan"]}}, seeds=None)
    result = lab()
    assert result.returncode == 0, result.stderr
    assert states(tmp_path / "runs" / "sweep") == ["failed", "finished", "failed"]
    assert (
        "failed      kind=broken__s0: RuntimeError: the toy is broken (see runs/sweep/logs/" in result.stderr
    )
    assert "its last eval/score is 'nan', which is no number" in result.stderr
    assert "1 of 3 runs finished, 2 failed: lab sweep sweep.yaml --retry does them again" in result.stdout
    assert "started" not in lab().stderr, "not by itself"
    (tmp_path / "mended").touch()
    result = lab("--retry")
    assert states(tmp_path / "runs" / "sweep") == ["finished", "finished", "failed"]
    assert "resumed     kind=broken__s0" in result.stderr


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_a_setting_is_not_better_for_its_failures(goal: Goal, tmp_path: Path) -> None:
    """The mean of the runs that are left would rank a setting first of which two of three diverged."""
    sign = 1 if goal == "maximize" else -1

    def candidate(x: int, *values: float | None) -> Candidate:
        trials = [
            Trial(f"x={x}__s{s}", s, "finished" if v is not None else "failed", v if v is None else sign * v)
            for s, v in enumerate(values)
        ]
        return Candidate({"x": x}, trials)

    unstable, steady, gone = (
        candidate(1, None, 9.0, None),
        candidate(2, 5.0, 4.0, 6.0),
        candidate(3, None, None),
    )
    record = Record(tmp_path, {}, "score", [unstable, steady, gone])
    assert record.worst(goal) == sign * 4
    assert [one.value for one in record.tried(goal)] == [pytest.approx(sign * 17 / 3), sign * 5.0, None]
    unstable.trials[0].state = "running"
    assert record.tried(goal)[0] == Tried({"x": 1}, None, True)
    steady.trials[1].value = sign * 1.0
    assert record.worst(goal) == sign * 1


@pytest.mark.slow
def test_failures_are_in_the_table_of_a_sweep(write: Write, lab: Lab) -> None:
    write(parameters={"agent.kind": {"values": ["seed 0 diverges", "good"]}, "agent.x": {"values": [1, 2]}})
    text = lab().stdout
    assert "A run that failed counts with the worst value of all, -2" in text
    rows = [line.split() for line in text.splitlines() if re.match(r" *\d+ +-", line)]
    assert sorted(row[4] for row in rows) == ["0", "0", "1", "1"], text
    assert rows[0][3:6] == ["2", "0", "good"], text


def test_when_nothing_finished_that_is_an_error(write: Write, lab: Lab) -> None:
    write(parameters={"agent.kind": {"value": "broken"}})
    result = lab()
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(
        "lab: runs/sweep: none of 2 runs finished. The first: RuntimeError: the toy is broken (see "
    )


def test_a_sweep_grows_by_seeds_values_and_a_wider_range(write: Write, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "sweep"
    write(parameters={"agent.x": {"values": [3]}}, seeds=None)
    assert lab().returncode == 0
    assert sessions(root) == {"config__s0": 1}
    write(parameters={"agent.x": {"values": [0, 3]}}, seeds=[1, 0])
    result = lab()
    assert result.returncode == 0, result.stderr
    assert sessions(root) == {"config__s0": 1, "config__s1": 1, "x=0__s0": 1, "x=0__s1": 1}
    assert "4 of 4 runs finished" in result.stdout
    assert {Run.open(root / f"config__s{seed}").info["config"]["agent"]["x"] for seed in (0, 1)} == {3}
    write(parameters={"agent.x": {"values": [0]}}, seeds=[0, 1])
    refuse(lab(), "runs/sweep: holds another sweep: parameters.agent.x.", "may be added to")
    shutil.rmtree(root)
    narrow = {"method": "bayes", "seeds": None, "parameters": {"agent.x": {"min": 0.0, "max": 4.0}}}
    write(**narrow, count=2)
    assert lab().returncode == 0
    first = sessions(root)
    write(**(narrow | {"parameters": {"agent.x": {"min": -1.0, "max": 9.0}}}), count=4)
    assert lab().returncode == 0
    assert len(sessions(root)) == 4
    assert first.items() <= sessions(root).items()


def test_a_deleted_run_is_made_again(write: Write, lab: Lab, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "sweep"
    write()
    before = lab()
    assert before.returncode == 0
    for name in ("x=3__s0", "x=0__s1"):
        shutil.rmtree(root / name)
    result = lab()
    assert "x=3__s0: its folder is gone; it is run again" in result.stderr
    assert "6 of 6 runs finished" in result.stdout
    assert result.stdout == before.stdout
    assert set(sessions(root).values()) == {1}
    assert len(sessions(root)) == 6


def test_a_misspelt_metric_is_found_before_the_first_run(write: Write, lab: Lab, tmp_path: Path) -> None:
    write(metric={"name": "eval/scroe", "goal": "maximize"})
    refuse(
        lab("--steps=100", "--pause=60"),
        "sweep.yaml: metric.name = 'eval/scroe': a few steps of the first setting logged no such metric. Did "
        "you mean 'eval/score'? They logged eval/score, global_step, threads.",
    )
    assert not (tmp_path / "runs").exists()
    write()
    assert lab().returncode == 0


def test_a_metric_that_comes_late_may_be_waited_for(write: Write, lab: Lab, tmp_path: Path) -> None:
    write(metric={"name": "eval/scroe", "goal": "maximize"})
    for _ in range(2):
        result = lab("--skip-trial")
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1] == (
            "lab: runs/sweep/x=0__s0: has no metric 'eval/scroe', which metric.name asks for. Did you mean "
            "'eval/score'? It has eval/score, global_step, threads."
        )
        assert list(sessions(tmp_path / "runs" / "sweep")) == ["x=0__s0"]
    write()
    assert lab().returncode == 0
    assert set(sessions(tmp_path / "runs" / "sweep").values()) == {1}


def test_a_trial_that_cannot_be_made_is_said_and_hinders_nothing(write: Write, lab: Lab) -> None:
    write(parameters={"agent.kind": {"values": ["broken", "good"]}}, seeds=None)
    result = lab()
    assert result.returncode == 0
    assert "note    whether runs will have 'eval/score' is not known: " in result.stderr
    assert "the toy is broken" in result.stderr


def test_bayesian_search_runs_side_by_side(write: Write, lab: Lab, tmp_path: Path) -> None:
    space = {"agent.x": {"min": -10.0, "max": 10.0}, "agent.kind": {"values": ["good", "broken"]}}
    write(method="bayes", parameters=space, count=14, seeds=None)
    result = lab("--jobs=2")
    assert result.returncode == 0, result.stderr
    ended = states(tmp_path / "runs" / "sweep")
    assert len(ended) == 14
    assert ended.count("failed") >= 1
    assert f"{ended.count('finished')} of 14 runs finished" in result.stdout
    assert "and " in result.stdout or ended.count("finished") <= 10


def test_threads_are_divided_between_runs_at_once(
    write: Write, toy_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.device.usable_cores", lambda: 6)
    sweep = read_sweep(write(), {}, None)
    record = Record.open(tmp_path / "runs", sweep)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Runner(sweep, record, 2)._environment()["OMP_NUM_THREADS"] == "5", "what the user says"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Runner(sweep, record, 2)._environment()["OMP_NUM_THREADS"] == "3"
    assert Runner(sweep, record, 9)._environment()["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in Runner(sweep, record, 1)._environment(), (
        "a run looks for idle cores itself"
    )


# ---- stopped and continued ----


def heed_signals() -> None:
    """As in a terminal: what is started in the background inherits that these are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(
    write: Write, toy: Path, lab_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a sweep whose runs wait for a file `go`; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        write()
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.cli", "sweep", "sweep.yaml", "--pause=0.02", *arguments],
            cwd=tmp_path,
            env={**lab_environment, **with_toy(toy)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_signals,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    for path in tmp_path.glob("runs/*/*/run.json"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(path.read_text())["sessions"][-1]["pid"], signal.SIGKILL)


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def begun(root: Path) -> list[int]:
    """The processes of the runs that have begun."""
    return [json.loads(path.read_text())["sessions"][-1]["pid"] for path in root.glob("*/run.json")]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one whose parent was killed may stay behind as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_it_saves_its_runs_and_goes_on_where_it_stopped(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    root = tmp_path / "runs" / "sweep"
    process = start("--jobs=2")
    wait_until(lambda: len(begun(root)) == 2, "two runs have begun")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    asked = number.name
    assert f"[0/6] {asked}: 2 runs will save and end; once more ends them at once" in output
    assert "0 of 6 runs finished. Continue with: lab sweep sweep.yaml --pause=0.02" in output
    assert states(root) == ["interrupted", "interrupted"]
    assert {Run.open(path.parent).info["state"] for path in root.glob("*/run.json")} == {"interrupted"}
    assert not any(is_alive(pid) for pid in begun(root))
    (tmp_path / "go").touch()
    process = start("--jobs=2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "6 of 6 runs finished" in output
    assert sorted(sessions(root).values()) == [1, 1, 1, 1, 2, 2]
    for path in root.glob("*/metrics.jsonl"):
        assert [row["global_step"] for row in read_metrics(path)] == [0, 1, 2], "each step once"


def test_interrupted_twice_it_kills_its_runs(start: Start, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "sweep"
    process = start()
    wait_until(lambda: len(begun(root)) == 1, "a run has begun")
    [pid] = begun(root)
    os.kill(pid, signal.SIGSTOP)  # it cannot save
    process.send_signal(signal.SIGINT)
    wait_until(
        lambda: "SIGINT: 1 run will save" in (process.stdout.readline() if process.stdout else ""), "told"
    )
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "lab: stopped at once. The same command goes on where it stopped." in output
    assert not is_alive(pid)
    (tmp_path / "go").touch()
    assert "6 of 6 runs finished" in start().communicate(timeout=60)[0]


def test_killed_it_leaves_its_runs_running_and_waits_for_them_when_it_goes_on(
    start: Start, tmp_path: Path
) -> None:
    root = tmp_path / "runs" / "sweep"
    process = start("--jobs=2")
    wait_until(lambda: len(begun(root)) == 2, "two runs have begun")
    before = begun(root)
    process.kill()
    process.communicate()
    one = start("--jobs=2")
    wait_until(lambda: len(begun(root)) == 4, "two others have begun beside them")
    refused = start()
    assert refused.communicate(timeout=60)[0] == (
        "lab: runs/sweep: another process runs this sweep. Wait for it, or stop it first.\n"
    )
    (tmp_path / "go").touch()
    output = one.communicate(timeout=60)[0]
    assert "6 of 6 runs finished" in output
    assert output.count("another process is running it") == 2
    assert set(sessions(root).values()) == {1}, "each run once"
    assert not any(is_alive(pid) for pid in before)


# ---- what a run or a recipe left ----


def make_stage(folder: Path, state: str, *rows: dict[str, Any]) -> None:
    run = Run.create(
        folder,
        config={},
        pipeline="toy",
        job_type="x",
        name="x",
        group="x",
        x_axis="optimizer_steps",
        compute={},
    )
    run.end(state)
    run._release_lock()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_recipe_is_judged_by_the_stage_that_measured_last(tmp_path: Path) -> None:
    make_stage(tmp_path / "sft", "finished", {"_time": 5, "eval/loss": 3.0}, {"_time": 6, "eval/loss": 2.0})
    make_stage(tmp_path / "reward", "finished", {"_time": 7, "eval/loss": 1.0}, {"_time": 8, "other": 1})
    make_stage(tmp_path / "eval", "finished", {"_time": 9, "eval/win_rate": 0.7})
    make_stage(tmp_path / "eval.old1", "interrupted", {"_time": 99, "eval/win_rate": 0.1})
    assert [path.name for path in runs_of(tmp_path)] == ["sft", "reward", "eval"]
    assert last_value(tmp_path, "eval/win_rate") == 0.7
    assert last_value(tmp_path, "eval/loss") == 1.0
    with pytest.raises(
        LabError, match=r"Did you mean 'eval/loss'\? It has eval/loss, eval/win_rate, other\."
    ):
        last_value(tmp_path, "eval/los")


# ---- the real thing ----


@pytest.mark.slow
def test_a_sweep_of_pqn_on_pong(lab_command: LabCommand, tmp_path: Path) -> None:
    sweep = {
        "config": str(PONG),
        "method": "random",
        "metric": {"name": "eval/mean_reward", "goal": "maximize"},
        "parameters": {
            "agent.learning_rate": {"min": 1e-5, "max": 1e-3, "distribution": "log_uniform_values"},
            "agent.backbone_spec": {"values": [{"width": 16}, {"width": 32}]},
        },
        "count": 1,
    }
    (tmp_path / "pong.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    result = lab_command("sweep", "pong.yaml", *TINY, "--total_steps=128", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1 of 1 runs finished" in result.stdout
    assert "W&B     offline (no W&B key for api.wandb.ai)" in result.stderr
    [path] = (tmp_path / "runs" / "pong").glob("*/run.json")
    info = Run.open(path.parent).info
    assert info["state"] == "finished"
    agent = info["config"]["agent"]
    rate, width = word(agent["learning_rate"]), agent["backbone_spec"]["width"]
    assert path.parent.name == f"learning_rate={rate}__backbone_spec=width-{width}__s0"


# ---- at W&B ----


class WithSweeps(WandbStandIn):
    """Also keeps sweeps, as they are made and stopped by `wandb sweep`."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: dict[str, dict[str, Any]] = {}

    def _answer_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("id") or f"sweep{len(self.sweeps)}"
        known = self.sweeps.setdefault(name, {"state": "PENDING"})
        known |= {key: value for key, value in variables.items() if value is not None}
        entity = {"id": "entity", "name": "tester"}
        project = {"id": "project", "name": known["projectName"], "entity": entity}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _answer_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = self.sweeps[variables["sweep"]]
        sweep = {"id": variables["sweep"], "state": known["state"], "runs": {"edges": []}}
        return {"project": {"sweep": {**sweep, "name": variables["sweep"], "config": known["config"]}}}


@pytest.mark.usefixtures("toy_here")
def test_wandb_is_told_the_sweep_in_its_own_format(write: Write) -> None:
    specs = {
        "agent.x": {"min": 1e-5, "max": 1, "distribution": "log_uniform_values"},
        "agent.kind": {"values": ["good", "nan"]},
        "agent.n": {"value": 3},
        "steps": {"min": 2, "max": 6, "q": 2, "distribution": "q_uniform"},
    }
    sweep = read_sweep(write(method="bayes", count=4, parameters=specs), {}, None)
    told = wandb_config(sweep)
    assert told["parameters"] == {
        "agent": {
            "parameters": {
                "x": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1},
                "kind": {"values": ["good", "nan"]},
                "n": {"value": 3},
            }
        },
        "steps": {"distribution": "q_uniform", "min": 2, "max": 6, "q": 2},
        "seed": {"values": [0, 1]},
    }
    assert told["metric"] == SCORE
    assert (told["method"], told["run_cap"], told["name"]) == ("bayes", 8, "sweep")
    again = {key: told[key] for key in ("method", "metric", "parameters")} | {
        "config": "toy.yaml",
        "count": 4,
    }
    again["parameters"] = {key: spec for key, spec in told["parameters"].items() if key != "seed"}
    assert read_parameters(again["parameters"], "x") == list(sweep.parameters), "and reads it back"


def test_online_the_runs_belong_to_a_sweep_of_wandbs(write: Write, lab: Lab, tmp_path: Path) -> None:
    write(parameters={"agent.x": {"values": [0, 3]}}, seeds=None)
    server = WithSweeps()
    with server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        result = lab("--tracking.wandb=auto", "--tracking.project=toys", "--jobs=2", **environment)
        assert result.returncode == 0, result.stderr
        [(name, told)] = server.sweeps.items()
        assert told["state"] == "FINISHED"
        assert told["projectName"] == "toys"
        assert yaml.safe_load(told["config"])["parameters"] == {
            "agent": {"parameters": {"x": {"values": [0, 3]}}}
        }
        root = tmp_path / "runs" / "sweep"
        infos = [Run.open(root / f"x={x}__s0").info for x in (0, 3)]
        assert server.runs.keys() == {info["id"] for info in infos}, "under the ids of their folders"
        for info in infos:
            run = server.runs[info["id"]]
            assert run.settings["sweep"] == name
            assert run.settings["project"] == "toys"
            assert run.settings["displayName"] == info["name"]
            assert run.config["agent"]["x"] == info["config"]["agent"]["x"]
            assert len(run.column("eval/score")) == 3
        assert json.loads((root / "sweep.json").read_text())["wandb"]["path"] == f"tester/toys/{name}"
        assert f"/tester/toys/sweeps/{name}" in result.stderr
        lab("--tracking.wandb=auto", "--tracking.project=toys", **environment)
        assert len(server.sweeps) == 1, "it is made once"


@pytest.mark.parametrize("local", [False, True])
def test_without_a_sweep_at_wandb_the_search_goes_on(write: Write, lab: Lab, local: bool) -> None:
    write(parameters={"agent.x": {"value": 3}}, seeds=None)
    with WandbStandIn() as server:  # which knows no sweeps
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        arguments = ["--tracking.wandb=auto", *(["--local"] if local else [])]
        result = lab(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        assert ("lab: W&B made no sweep (" in result.stderr) == (not local)
        assert "1 of 1 runs finished" in result.stdout
        [run] = server.runs.values()
        assert run.settings.get("sweep") is None


@pytest.mark.usefixtures("toy_here")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("candidates", 0, "trials", 0, "name"), "../../escaped__s0"),
        (("candidates", 0, "trials", 0, "name"), "/tmp/escaped__s0"),
        (("candidates", 0, "trials", 0, "name"), ".."),
        (("candidates", 0, "trials", 0, "name"), 3),
        (("candidates", 0, "trials", 0, "state"), "paused"),
        (("candidates", 0, "trials", 0, "value"), "9"),
        (("candidates", 0, "trials", 0, "seed"), -1),
        (("candidates", 0, "trials"), []),
        (("candidates", 0, "setting"), {"out": "/tmp/escaped"}),
        (("candidates", 0, "setting"), {"trust": ""}),
        (("wandb",), {"path": "--help", "id": "a", "url": ""}),
        (("wandb",), {"path": "a/b/c", "id": "a", "url": "\x1b]0;title"}),
        (("metric",), 3),
    ],
)
def test_a_record_that_no_sweep_wrote_is_refused(
    write: Write, tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    """sweep.json may be a stranger's, and its names become folders and words of command lines."""
    sweep, folder = read_sweep(write(), {}, None), tmp_path / "records"
    record = Record.open(folder, sweep)
    setting = sweep.ask([])
    assert setting is not None
    record.add(sweep, setting)
    folder.mkdir()
    record.save()
    assert len(Record.open(folder, sweep).trials) == 2, "what a sweep wrote is read"
    raw = json.loads(record.path.read_text())
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    record.path.write_text(json.dumps(raw))
    with pytest.raises(LabError, match=r"sweep\.json: damaged"):
        Record.open(folder, sweep)
