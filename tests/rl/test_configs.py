"""Every config we ship resolves, and the Nature one says what the paper says."""

import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from lab import config
from lab.errors import LabError
from rl import games
from rl.config import (
    EVALUATION_SEEDS,
    CheckpointConfig,
    DQNConfig,
    DRQNConfig,
    EnvConfig,
    EvalConfig,
    FilmConfig,
    PQNConfig,
    RunConfig,
    is_unseen,
    run_config_class,
    unseen_seed,
)
from rl.drqn import RecurrentExtractor
from rl.pipeline import RLPipeline
from rl.policy import BackboneExtractor

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "rl").glob("*.yaml"))


def resolve(path: Path) -> RunConfig:
    values = config.read_yaml(path)
    return config.build(run_config_class(values, lambda _: str(path)), values, {}, str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_resolves_and_names_what_exists(path: Path) -> None:
    settings = resolve(path)
    assert games.check(settings.env.game) == settings.env.game
    side = settings.env.image_size
    extractor = RecurrentExtractor if isinstance(settings.agent, DRQNConfig) else BackboneExtractor
    space = spaces.Box(0, 255, (4, side, side), np.uint8)
    assert extractor(space, settings.agent.backbone, settings.agent.backbone_spec).features_dim > 0
    assert path.read_text().startswith("# "), "the first line says in `lab list` what it is for"


def test_the_defaults_of_dqn_and_the_nature_config_are_the_papers() -> None:
    # Mnih et al. 2015, extended data table 1
    nature = resolve(next(path for path in CONFIGS if path.stem == "atari_nature"))
    for agent in (nature.agent, DQNConfig()):
        assert isinstance(agent, DQNConfig)
        assert agent.batch_size == 32
        assert agent.buffer_size == 1_000_000
        assert agent.target_update_steps == 10_000 * agent.train_freq
        assert agent.gamma == 0.99
        assert agent.train_freq == 4
        assert agent.learning_rate == 0.00025
        assert (agent.exploration_initial, agent.exploration_final) == (1.0, 0.1)
        assert agent.exploration_steps == 1_000_000
        assert agent.learning_starts == 50_000
        assert (agent.double, agent.dueling, agent.n_step) == (False, False, 1)
    assert nature.agent.optimizer == "rmsprop"
    assert nature.agent.optimizer_eps == 0.01 / 32**2
    assert nature.agent.max_grad_norm is None
    assert (nature.env.frame_skip, nature.env.noop_max, nature.env.life_loss) == (4, 30, True)
    assert not nature.env.fire_reset
    assert nature.eval.epsilon == 0.05
    assert nature.total_steps == 50_000_000


NO_HIGHEST = {"agent.optimizer_eps", "agent.learning_rate", "agent.max_grad_norm"}
NUMBERS = {
    f"{part}.{key}" if part else key: kind
    for part, owner in (
        *(("env", EnvConfig), ("eval", EvalConfig), ("checkpoint", CheckpointConfig), ("film", FilmConfig)),
        *(("agent", DRQNConfig), ("agent", PQNConfig), ("", RunConfig)),
    )
    for key, kind in typing.get_type_hints(owner).items()
    if kind in (int, float, float | None)
    for kind in [owner.__name__]
    if key != "stop_at"  # any goal is a goal
}


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**15])
def test_no_number_is_without_bounds(key: str, value: int) -> None:
    """What is far out is refused by name when the config is read, not by an emulator or by memory later."""
    if value > 0 and key in NO_HIGHEST:
        pytest.skip("any is possible")
    algorithm = "pqn" if NUMBERS[key] == "PQNConfig" else "drqn"
    values = {"env": {"game": "pong"}, "agent": {"algorithm": algorithm}}
    name = key.rpartition(".")[2]
    with pytest.raises(LabError, match=rf"{name}: "):
        config.build(run_config_class(values, lambda _: "test"), values, {key: value}, "test")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"total_steps": 400},
            "agent.learning_starts: 50,000 is not below total_steps 400: nothing would be",
        ),
        ({"env.n_envs": 1, "agent.exploration_ladder": 0.4}, "agent.exploration_ladder: has a rung for each"),
        ({"eval.seed": 2**30 - 5}, "eval.seed: 1073741819 must be from 0 to"),
        ({"agent.buffer_size": 4, "agent.batch_size": 2}, "agent.buffer_size: 4 is less than one transition"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {"env": {"game": "pong"}}
    with pytest.raises(LabError, match=said):
        config.build(run_config_class(values, lambda _: "test"), values, changes, "test")


@given(st.integers(0, 2**30 - 20_000), st.integers(1, 10_000), st.integers(1, 10_000))
def test_the_games_of_an_evaluation_are_not_those_that_chose(seed: int, chosen: int, played: int) -> None:
    settings = EvalConfig(seed=seed, episodes=chosen)
    unseen = unseen_seed(settings, played)
    assert not set(range(unseen, unseen + played)) & set(range(seed, seed + chosen))
    assert unseen >= 0
    assert unseen + played <= EVALUATION_SEEDS
    assert is_unseen(settings, unseen, played)
    assert not is_unseen(settings, seed + chosen - 1, played)


@pytest.mark.parametrize(
    ("game", "said"),
    [
        ("CartPole-v1", "is no Atari game, and other environments are not supported"),
        ("LunarLander-v3", "is no Atari game"),
        ("MiniGrid-Empty-5x5-v0", "is no Atari game"),
        ("package:Env-v0", "is no Atari game"),
        ("ALE/Warlords-v5", "is for two players"),
        ("joust", "is for two players"),
        ("Pong-v0", "of version 0 only the names -v4 and -v5 are known"),
        ("brakeout", "Did you mean 'breakout'"),
        ("xyz", "no such game"),
    ],
)
def test_what_is_no_atari_game_for_one_player_is_said(game: str, said: str) -> None:
    with pytest.raises(LabError, match=said):
        games.check(game)


@pytest.mark.parametrize("game", ["PongDeterministic-v4", "ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_names_of_gym_are_understood(game: str) -> None:
    assert games.check(game) == "pong"


@pytest.mark.parametrize(
    ("game", "sticky", "said"),
    [
        (
            "ALE/Pong-v5",
            0.0,
            "sticky actions of 0.25; here env.sticky_actions = 0 holds",
        ),
        (
            "PongNoFrameskip-v4",
            0.25,
            "sticky actions of 0; here env.sticky_actions = 0.25 holds",
        ),
        ("ALE/Pong-v5", 0.25, ""),
        ("pong", 0.25, ""),
    ],
)
def test_a_name_that_means_other_actions_than_the_config_is_said(
    game: str, sticky: float, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").touch()  # the folder of a run, which is refused
    settings = RunConfig(agent=DQNConfig(), env=EnvConfig(game=game, sticky_actions=sticky))
    with pytest.raises(LabError, match="already holds"):
        RLPipeline().train(settings, tmp_path, resume=False)
    found = capsys.readouterr().err
    assert said in found
    assert bool(said) == bool(found)
