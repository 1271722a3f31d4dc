"""A stop is heard within every stage that can last, and changes nothing of what is learned."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from rl import film
from rl.config import RunConfig
from rl.evaluate import Player
from rl.pipeline import RLPipeline
from tests.rl.test_health import record_of, settings_of
from tests.rl.test_runs import assert_same_run
from tests.signals import Signals

OF: dict[str, dict[str, Any]] = {
    "pqn": {"agent.epochs": 3, "agent.rollout_steps": 16, "agent.minibatch_size": 8},
    # Four updates of each step, from a memory that overflows.
    "dqn": {"agent.train_freq": 1, "agent.buffer_size": 60, "env.n_envs": 4},
}
OF["drqn"] = OF["dqn"]


def settings(algorithm: str) -> RunConfig:
    never: dict[str, Any] = {"checkpoint.every_steps": 10**6, "eval.every_steps": 10**6}
    return settings_of(algorithm, **OF[algorithm], **never)


def train(algorithm: str, folder: Path, resume: bool = False) -> str:
    RLPipeline().train(settings(algorithm), folder, resume=resume)
    return record_of(folder)["state"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(algorithm: str) -> Path:
        if algorithm not in made:
            made[algorithm] = tmp_path_factory.mktemp("unstopped") / algorithm
            assert train(algorithm, made[algorithm]) == "finished"
        return made[algorithm]

    return get


def stage(algorithm: str, name: str) -> tuple[type, str]:
    from rl.agent import DQN
    from rl.drqn import DRQN
    from rl.envs import AtariVecEnv
    from rl.pqn import PQN

    learner = {"pqn": (PQN, "update"), "dqn": (DQN, "update"), "drqn": (DRQN, "learn_from")}
    elsewhere: dict[str, tuple[type, str]] = {
        "plays": (AtariVecEnv, "step_wait"),
        "evaluates": (Player, "q_values"),
    }
    return elsewhere.get(name) or learner[algorithm]


@pytest.mark.parametrize(
    ("algorithm", "name", "at"),
    [
        ("pqn", "plays", 27),
        ("pqn", "learns", 35),  # of the last rollout
        ("pqn", "evaluates", 3),
        ("dqn", "plays", 3),  # random play
        ("dqn", "learns", 43),
        ("drqn", "learns", 43),
    ],
)
def test_it_is_heard_between_two_steps_and_two_updates(
    unstopped: Callable[[str], Path],
    tmp_path: Path,
    algorithm: str,
    name: str,
    at: int,
) -> None:
    whole, folder = unstopped(algorithm), tmp_path / "run"
    with Signals(*stage(algorithm, name), at) as signals:
        assert train(algorithm, folder) == "interrupted"
    assert signals.calls == at, "it went on after the signal"
    assert train(algorithm, folder, resume=True) == "finished"
    assert_same_run(whole, folder)


@pytest.mark.parametrize("algorithm", ["pqn", pytest.param("dqn", marks=pytest.mark.slow)])
def test_stopped_again_and_again_it_ends_as_if_never_stopped(
    unstopped: Callable[[str], Path], tmp_path: Path, algorithm: str
) -> None:
    whole, folder = unstopped(algorithm), tmp_path / "run"
    stops, state = 0, ""
    for at in range(5, 60, 7):
        with Signals(*stage(algorithm, "learns"), at):
            state = train(algorithm, folder, resume=folder.exists())
        if state == "finished":
            break
        stops += 1
    assert stops >= 3
    assert state == "finished"
    assert_same_run(whole, folder)


def test_it_is_heard_while_a_resumed_run_plays_again_and_while_it_reads_its_memory(
    unstopped: Callable[[str], Path], tmp_path: Path
) -> None:
    from rl.envs import AtariVecEnv
    from rl.replay import FrameReplay

    folder = tmp_path / "run"
    with Signals(AtariVecEnv, "step_wait", 12):
        assert train("dqn", folder) == "interrupted"
    before = (folder / "checkpoints/latest/state.json").read_bytes()
    for place in ((AtariVecEnv, "step_wait"), (FrameReplay, "_unpack")):
        with Signals(*place, 2) as signals:
            assert train("dqn", folder, resume=True) == "interrupted"
        assert signals.calls == 2
        assert (folder / "checkpoints/latest/state.json").read_bytes() == before
    assert train("dqn", folder, resume=True) == "finished"
    assert_same_run(unstopped("dqn"), folder)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_film_that_is_broken_off_leaves_nothing_and_is_made_again(tmp_path: Path) -> None:
    more: dict[str, Any] = {"film.max_steps": 15, "film.every_steps": 48, "log_every_steps": 96}
    changed = settings_of(**more)
    with Signals(film, "_compose", 5) as signals:
        RLPipeline().train(changed, tmp_path / "run", resume=False)
    assert signals.calls == 5
    assert record_of(tmp_path / "run")["state"] == "interrupted"
    assert files(tmp_path / "run/media") == ["learning_curve.png"]
    RLPipeline().train(changed, tmp_path / "run", resume=True)
    assert [name for name in files(tmp_path / "run/media") if name.endswith(".mp4")] == [
        "step_000000000048.mp4",
        "step_000000000096.mp4",
    ]


@pytest.mark.parametrize("command", ["play", "evaluate", "export"])
def test_a_command_that_reads_a_run_ends_at_once_and_leaves_nothing(
    unstopped: Callable[[str], Path], capsys: Any, command: str
) -> None:
    from stable_baselines3 import DQN

    folder = unstopped("dqn")
    places: dict[str, tuple[Any, str, int]] = {
        "play": (film, "_compose", 5),
        "evaluate": (Player, "q_values", 5),
        "export": (DQN, "save", 1),
    }
    before = files(folder)
    capsys.readouterr()
    owner, name, at = places[command]
    with Signals(owner, name, at) as signals:
        assert cli.main([command, str(folder)]) == 128 + signal.SIGTERM
    assert signals.calls == signals.at
    assert capsys.readouterr() == ("", "lab: stopped at once.\n")
    assert files(folder) == before


@pytest.mark.parametrize("command", ["play", "evaluate", "export"])
def test_a_command_says_once_that_the_runs_device_is_not_here(
    unstopped: Callable[[str], Path], tmp_path: Path, capsys: Any, command: str
) -> None:
    import shutil

    import torch

    folder = tmp_path / "run"
    shutil.copytree(unstopped("pqn"), folder, symlinks=True)
    record = record_of(folder)
    device = "cuda" if not torch.cuda.is_available() else "mps"
    record["config"]["device"]["device"] = device
    (folder / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert cli.main([command, str(folder), *(["--json"] if command == "evaluate" else [])]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("device  ")
    assert f"({device} of the run's config is not here; auto: " in line
    if command == "evaluate":
        assert json.loads(said.out)["compute"]["reason"] in line


def test_a_stuck_agent_is_cut_off_and_it_is_said(unstopped: Callable[[str], Path], capsys: Any) -> None:
    assert cli.main(["evaluate", str(unstopped("pqn")), "--episodes=3"]) == 0
    assert "every game was cut off by the time limit, env.max_episode_frames" in capsys.readouterr().out
    summary = record_of(unstopped("pqn"))["summary"]
    assert summary["eval/truncated_episodes"] == 2
    assert any("every game of its last evaluation was cut off" in line for line in summary["warnings"])
