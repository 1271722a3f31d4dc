"""Small agents for the tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lab.device import Compute
from rl.agent import DQN
from rl.config import DQNConfig, PQNConfig
from rl.envs import AtariVecEnv
from rl.pqn import PQN

SMALL_NET = {"channels": [8, 8, 8], "width": 32, "norm": "layer"}


@pytest.fixture
def make_dqn() -> Callable[..., DQN]:
    """Builds a small DQN on Pong; keyword arguments change its config."""

    def make(
        n_envs: int = 2, device: str = "cpu", precision: str = "fp32", seed: int = 0, **changes: Any
    ) -> DQN:
        settings = {
            "buffer_size": 500,
            "learning_starts": 40,
            "batch_size": 8,
            "target_update_steps": 64,
            "exploration_steps": 200,
            "backbone_spec": SMALL_NET,
        }
        env = AtariVecEnv("pong", n_envs, seed, image_size=44, num_threads=1)
        compute = Compute(torch.device(device), precision, 1, "test")
        return DQN(DQNConfig(**(settings | changes)), env, compute, seed)

    return make


@pytest.fixture
def make_pqn() -> Callable[..., PQN]:
    """Builds a small PQN on Pong; keyword arguments change its config."""

    def make(
        n_envs: int = 4,
        device: str = "cpu",
        precision: str = "fp32",
        seed: int = 0,
        max_episode_frames: int = 108_000,
        **changes: Any,
    ) -> PQN:
        settings = {"rollout_steps": 8, "minibatch_size": 16, "backbone_spec": SMALL_NET}
        env = AtariVecEnv(
            "pong", n_envs, seed, image_size=44, num_threads=1, max_episode_frames=max_episode_frames
        )
        compute = Compute(torch.device(device), precision, 1, "test")
        return PQN(PQNConfig(**(settings | changes)), env, compute, seed)

    return make
