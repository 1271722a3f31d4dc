"""The Q-network: any registered backbone, a head, and how both are computed.

`BackboneQPolicy` is importable by name and takes only JSON-like arguments, so an exported agent opens in
stock Stable-Baselines3: `DQN.load("agent.zip")`.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

from lab.device import autocast
from supervised.backbones import build
from supervised.backbones.layers import FrozenBatchNorm2d, StochasticDepth, make_norm


class BackboneExtractor(BaseFeaturesExtractor):
    """A backbone as SB3's features extractor: images (batch, chans, height, width) -> features."""

    def __init__(self, observation_space: spaces.Box, backbone: str, spec: dict[str, Any]) -> None:
        channels, height, width = observation_space.shape
        net = self.make(backbone, channels, (height, width), spec)
        super().__init__(observation_space, net.num_features)
        self.backbone = steady(net)
        self.takes_bytes = getattr(net, "takes_bytes", False)

    def make(self, backbone: str, channels: int, size: tuple[int, int], spec: dict[str, Any]) -> Any:
        """The network that makes the features."""
        return build(backbone, in_chans=channels, img_size=size, **spec)

    def forward(self, observations: Tensor) -> Tensor:
        return self.backbone(observations)


def steady(net: nn.Module) -> nn.Module:
    """Makes a network say the same of a state whatever stands beside it and however often it is asked.

    Batch norms, whose statistics lag behind what an agent comes to see and differ between online and target
    network, become group norms (arXiv 1803.08494); nothing is dropped at random.
    """
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, FrozenBatchNorm2d):
            setattr(net, name, make_norm("group", child.num_features))
        elif isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(child, StochasticDepth):
            child.rate = 0.0
        else:
            steady(child)
    return net


class DuelingHead(nn.Module):
    """Q(s,a) = V(s) + A(s,a) - mean_a' A(s,a') (Wang et al. 2016, equation 9).

    Both streams are linear over the backbone's features, which makes it a linear head in other coordinates:
    what it can express is the same, what an update changes is not. In the paper each stream has a hidden
    layer of its own.
    """

    def __init__(self, num_features: int, n_actions: int) -> None:
        super().__init__()
        self.value = nn.Linear(num_features, 1)
        self.advantage = nn.Linear(num_features, n_actions)

    def forward(self, features: Tensor) -> Tensor:
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(1, keepdim=True)


class BackboneQNetwork(QNetwork):
    """Backbone and head. Pixels are scaled to 0..1; the head is always computed in fp32.

    Attributes:
        precision: "fp32" or "bf16", for the backbone.
    """

    precision = "fp32"

    def __init__(self, *args: Any, dueling: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if dueling:
            self.q_net = DuelingHead(self.features_dim, int(self.action_space.n))  # type: ignore[assignment]

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Q-values: uint8 (batch, chans, height, width) -> float32 (batch, n_actions)."""
        assert isinstance(obs, Tensor)
        images = obs if self.features_extractor.takes_bytes else self._scale(obs)  # type: ignore[union-attr]
        with self._autocast(images):
            features = self.features_extractor(images)
        with self._autocast(images, "fp32"):
            return self.q_net(features.float())

    def _autocast(self, images: Tensor, precision: str | None = None) -> Any:
        return autocast(images.device.type, precision or self.precision)

    def _scale(self, obs: Tensor) -> Tensor:
        """Pixels of 0..1, channels_last for the matrix units; reordering bytes is the cheapest way there."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return obs.contiguous(memory_format=torch.channels_last).to(dtype).mul_(1 / 255)


class BackboneQPolicy(DQNPolicy):
    """SB3's DQN policy over a backbone of ours.

    Args:
        backbone, backbone_spec: for `supervised.backbones.build`.
        dueling: use `DuelingHead`.
    """

    q_net: BackboneQNetwork
    q_net_target: BackboneQNetwork
    q_net_class: ClassVar[type[BackboneQNetwork]] = BackboneQNetwork
    extractor_class: ClassVar[type[BackboneExtractor]] = BackboneExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        backbone: str = "nature_cnn",
        backbone_spec: dict[str, Any] | None = None,
        dueling: bool = False,
        **kwargs: Any,
    ) -> None:
        self._backbone = {"backbone": backbone, "spec": dict(backbone_spec or {})}
        self._dueling = dueling
        kwargs |= {
            "features_extractor_class": self.extractor_class,
            "features_extractor_kwargs": self._backbone,
            "net_arch": [],
        }
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def make_q_net(self) -> BackboneQNetwork:
        net_args = self._update_features_extractor(self.net_args, features_extractor=None)
        net = self.q_net_class(**net_args, dueling=self._dueling)
        return net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for key in ("features_extractor_class", "features_extractor_kwargs", "net_arch", "activation_fn"):
            data.pop(key, None)
        return data | {
            "backbone": self._backbone["backbone"],
            "backbone_spec": self._backbone["spec"],
            "dueling": self._dueling,
        }

    def set_precision(self, precision: str) -> None:
        """Computes the backbone in "fp32" or "bf16"; the target's weights are then stored as bf16 too.

        The optimiser works on the online network's fp32 weights, which autocast converts in each forward
        pass; the target network, which only ever takes copies, is converted once.
        """
        self.q_net.precision = self.q_net_target.precision = precision
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.q_net_target.features_extractor.to(dtype)


def q_values(q_net: QNetwork, observations: np.ndarray) -> Tensor:
    """Q-values without gradient, on the network's device.

    Args:
        observations: uint8 (batch, chans, height, width).

    Returns:
        float32 (batch, n_actions).
    """
    with torch.inference_mode():
        return q_net(torch.from_numpy(observations).to(q_net.device, non_blocking=True))
