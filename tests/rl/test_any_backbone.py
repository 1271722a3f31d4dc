"""Every backbone for images as the body of a Q-network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rl.policy import BackboneExtractor, BackboneQPolicy
from supervised import backbones
from tests.conftest import REPO, LabCommand

SLOW_TO_BUILD = ("vgg", "convnext", "vit_", "alexnet", "resnet101", "resnet152", "inception_v3")


def policy(name: str, size: int = 84, **spec: Any) -> BackboneQPolicy:
    space = spaces.Box(0, 255, (4, size, size), np.uint8)
    return BackboneQPolicy(space, spaces.Discrete(6), lambda _: 1e-3, backbone=name, backbone_spec=spec)


@pytest.mark.parametrize("name", backbones.image_names())
def test_it_takes_a_games_images_and_learns(name: str) -> None:
    """On the meta device, where the large ones cost nothing, with a vision transformer's patches of 14."""
    spec = {"patch_size": 14} if name.startswith("vit") else {}
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    with torch.device("meta"):
        body = BackboneExtractor(space, name, spec).train()
        pixels = torch.zeros(2, 4, 84, 84, dtype=torch.uint8 if body.takes_bytes else torch.float)
        features = body(pixels)
        features.sum().backward()
    assert features.shape == (2, body.features_dim)
    assert not any(type(module) is nn.BatchNorm2d for module in body.modules())
    assert not {n for n, p in body.named_parameters() if p.grad is None and "aux" not in n}


@pytest.mark.parametrize("name", [n for n in backbones.image_names() if not n.startswith(SLOW_TO_BUILD)])
def test_what_it_says_of_a_state_depends_on_nothing_else(name: str) -> None:
    made = policy(name, size=44)
    made.set_training_mode(True)
    images = torch.randint(
        0, 256, (3, 4, 44, 44), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        together = made.q_net(images)
        torch.testing.assert_close(made.q_net(images), together)
        torch.testing.assert_close(made.q_net(images[1:2]), together[1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--agent.backbone=gpt"], "not for the images of a game"),
        (["--agent.backbone=resnet9"], "Did you mean 'resnet8'"),
        (["--agent.backbone=seq2seq"], "with rnn, lstm, gru dqn remembers"),
        (["--agent.algorithm=drqn", "--agent.backbone=resnet8"], "of drqn it is one of rnn, lstm, gru"),
        (["--agent.backbone=vit_tiny"], "patch"),
        (["--agent.backbone=lstm", "--agent.backbone_spec={hiden: 3}"], "hiden"),
    ],
)
def test_one_that_does_not_fit_is_refused_in_one_line(
    lab_command: LabCommand, tmp_path: Path, options: list[str], words: str
) -> None:
    result = lab_command(
        "train", REPO / "configs/rl/atari_nature.yaml", "--env.game=pong", *options, cwd=tmp_path
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
