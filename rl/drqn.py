"""DRQN: deep Q-learning that remembers (Hausknecht and Stone 2015, arXiv 1507.06527).

The agent sees single frames and carries a memory from step to step, which begins empty in every game. It
learns from sequences out of replay, each behind steps that only bring the memory up to date: with a memory
that began empty too far back, its Q-values differ from those it acted on (Kapturowski et al. 2019, figure 1).
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rl.agent import DQN, Tensors
from rl.config import DRQNConfig
from rl.policy import BackboneExtractor, BackboneQNetwork, BackboneQPolicy
from rl.sequences import SequenceReplay, Sequences
from supervised.backbones import build
from supervised.backbones.recurrent import State

OF_THE_MEMORY = ("hidden", "n_layer")


class RecurrentExtractor(BackboneExtractor):
    """Eyes on the newest frame, and a memory."""

    def make(self, backbone: str, channels: int, size: tuple[int, int], spec: dict[str, Any]) -> Any:
        of_eyes = {key: value for key, value in spec.items() if key not in (*OF_THE_MEMORY, "eyes")}
        of_memory = {key: spec[key] for key in OF_THE_MEMORY if key in spec}
        eyes = spec.get("eyes", "nature_cnn")
        return build(
            "drqn", in_chans=1, img_size=size, memory=backbone, eyes=eyes, eyes_spec=of_eyes, **of_memory
        )


class RecurrentQNetwork(BackboneQNetwork):
    """Q-values of sequences of frames."""

    def forward(  # type: ignore[override]
        self, frames: Tensor, state: State | None = None, begins: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Q-values of every step.

        Args:
            frames: uint8 (batch, time, 1, height, width).
            state, begins: as `supervised.backbones.drqn.DRQN.forward`.

        Returns:
            float32 (batch, time, n_actions), and the memory behind the last step.
        """
        extractor: Any = self.features_extractor
        if not extractor.takes_bytes:
            frames = self._scale(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        with self._autocast(frames):
            features, after = extractor.backbone(frames, state, begins)
        with self._autocast(frames, "fp32"):
            q = self.q_net(features.float().flatten(0, 1)).unflatten(0, frames.shape[:2])
        return q, after

    def step(self, observations: np.ndarray, state: State | None, begins: np.ndarray) -> tuple[Tensor, State]:
        """Q-values (batch, n_actions) of the newest frames of stacked observations, and the memory behind."""
        frames = torch.from_numpy(observations[:, None, -1:]).to(self.device, non_blocking=True)
        with torch.inference_mode():
            q, after = self(frames, state, torch.from_numpy(begins[:, None]).to(self.device))
        return q[:, 0], after


class RecurrentQPolicy(BackboneQPolicy):
    """SB3's DQN policy with a memory."""

    q_net: RecurrentQNetwork  # pyright: ignore[reportIncompatibleVariableOverride]
    q_net_target: RecurrentQNetwork  # pyright: ignore[reportIncompatibleVariableOverride]
    q_net_class: ClassVar[type[BackboneQNetwork]] = RecurrentQNetwork
    extractor_class: ClassVar[type[BackboneExtractor]] = RecurrentExtractor


class DRQN(DQN):
    """DQN on sequences, with a memory carried from step to step while it acts."""

    config: DRQNConfig
    config_class = DRQNConfig
    policy: RecurrentQPolicy  # pyright: ignore[reportIncompatibleVariableOverride]
    q_policy_class = RecurrentQPolicy
    replay_class = SequenceReplay

    def _setup_model(self) -> None:
        super()._setup_model()
        self._memory: State | None = None
        self._begins = np.ones(self.n_envs, bool)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_memory", "_begins"]

    # ---- acting ----

    def q_values(self, observations: np.ndarray) -> Tensor:
        q, self._memory = self.policy.q_net.step(observations, self._memory, self._begins)
        self._begins[:] = False
        return q

    def predict(  # type: ignore[override]
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As SB3's recurrent policies: hand `state` on from step to step, and say where episodes start."""
        batch, batched = self._as_batch(observation)
        begins = np.zeros(len(batch), bool) if episode_start is None else np.asarray(episode_start, bool)
        memory = None if state is None else tuple(torch.from_numpy(s).to(self.device) for s in state)
        q, after = self.policy.q_net.step(batch, memory, begins)
        actions = q.argmax(1).cpu().numpy()
        if not deterministic:
            actions = self.explore(actions, len(batch), self.exploration_rate)
        kept = tuple(tensor.cpu().numpy() for tensor in after)
        return (actions if batched else actions.squeeze(0)), kept

    def _after_env_step(self, dones: np.ndarray, infos: list[dict[str, Any]], **seen: Any) -> None:
        self._begins |= np.asarray(dones, bool)
        super()._after_env_step(dones, infos, **seen)

    def _games_began(self) -> None:
        self._begins[:] = True
        super()._games_began()

    # ---- learning ----

    def _train(self, updates: int, batch_size: int, made: int = 0) -> int:
        c = self.config
        self._set_learning_rate()
        assert isinstance(self.replay, SequenceReplay)
        while made < updates:
            self.learn_from(self.replay.sample_sequences(batch_size, c.burn_in_steps, c.sequence_steps))
            made += 1
            if self._stop():
                return made
        return updates

    def learn_from(self, batch: Sequences) -> None:
        """One update: DQN's loss at each step of each sequence, with memories from the burn-in."""
        burn_in, steps = self.config.burn_in_steps, self.config.sequence_steps
        frames, begins = batch.frames, batch.begins
        with self.compute.autocast():
            memory = None
            with torch.no_grad():
                if burn_in:
                    _, memory = self.policy.q_net(frames[:, :burn_in], None, begins[:, :burn_in])
                target_q, _ = self.policy.q_net_target(frames, None, begins)
            all_q, _ = self.policy.q_net(frames[:, burn_in:], memory, begins[:, burn_in:])
        q = all_q[:, :steps].gather(2, batch.actions[..., None]).squeeze(2)
        at = batch.following[..., None].expand(-1, -1, all_q.shape[2])
        next_q = target_q[:, burn_in:].gather(1, at)
        choice = all_q.detach().gather(1, at) if self.config.double else next_q
        next_value = next_q.gather(2, choice.argmax(2, keepdim=True)).squeeze(2)
        targets = batch.rewards + (1 - batch.dones) * batch.discounts * next_value
        losses = F.smooth_l1_loss(q, targets, reduction="none") * batch.mask
        loss = losses.sum() / batch.mask.sum()  # a sequence has at least one step
        self.descend(loss)
        self._count(loss, q)

    # ---- saving ----

    def capture(self) -> tuple[Tensors, dict[str, Any]]:
        tensors, state = super().capture()
        for index, tensor in enumerate(self._memory or ()):
            tensors["progress"][f"memory_{index}"] = tensor
        state["begins"] = self._begins.tolist()
        return tensors, state

    def restore(self, tensors: Tensors, state: dict[str, Any]) -> None:
        super().restore(tensors, state)
        kept = sorted(key for key in tensors["progress"] if key.startswith("memory_"))
        self._memory = tuple(tensors["progress"][key].to(self.device) for key in kept) or None
        self._begins = np.array(state["begins"], bool)
