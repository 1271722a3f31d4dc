"""Every config we ship resolves, and the Nature one says what the paper says."""

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from lab import config
from rl import games
from rl.config import DQNConfig, DRQNConfig, RunConfig, run_config_class
from rl.drqn import RecurrentExtractor
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
    assert nature.eval.epsilon == 0.05
    assert nature.total_steps == 50_000_000
