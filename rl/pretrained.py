"""A body that has learned to see before it plays: weights from a run of supervised learning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import checkpoint
from lab.checkpoint import Checkpoint
from lab.errors import LabError
from lab.run import Run
from supervised import backbones

if TYPE_CHECKING:
    from rl.agent import QLearner

SAME_SIGHT = ("autoencoding",)
"""Objectives whose backbones see what an agent's body sees: pixels of 0..1. Others shift or stretch them."""


def find(folder: str) -> tuple[Run, Checkpoint]:
    """The run that `agent.start_from` names and its best weights, verified; needs no torch.

    Raises:
        LabError: there is no such run, it is of another kind or not finished, or its checkpoint is damaged.
    """
    run = Run.named_by("agent.start_from", Path(folder))
    objective = (run.info["config"].get("objective") or {}).get("name")
    kind = objective if run.info["pipeline"] == "supervised" else run.info["pipeline"]
    if kind not in SAME_SIGHT:
        raise LabError(
            f"agent.start_from = {folder}: a run of {kind}, whose network does not see pixels as an agent "
            f"does. Name a run of {' or '.join(SAME_SIGHT)}."
        )
    if run.info["state"] != "finished":
        raise LabError(
            f"agent.start_from = {folder}: the run is {run.info['state']}, not finished. Wait for it, or go "
            f"on with it: lab train {folder} --resume"
        )
    return run, checkpoint.load(run.find_checkpoint("best"))


def begin(agent: "QLearner") -> dict[str, str]:
    """Gives the agent's body, of online and target network, the weights of the run its config names.

    With a memory that body is what comes before it, the eyes.

    Returns:
        What run.json says of that run.

    Raises:
        LabError: as `find`, or its backbone is another one.
    """
    from supervised.models import load_backbone

    config = agent.config
    assert config.start_from is not None
    run, saved = find(config.start_from)
    where = f"agent.start_from = {config.start_from}"
    online, target = (_body(net) for net in (agent.policy.q_net, agent.policy.q_net_target))
    mine = config.backbone
    if mine in backbones.RECURRENT:
        mine = config.backbone_spec.get("eyes", "nature_cnn")
    theirs = saved.state["spec"]["backbone"]
    if mine != theirs:
        raise LabError(f"{where}: its backbone is {theirs}, the agent's {mine}. Use the same in both.")
    defaults = {key: argument.default for key, argument in backbones.arguments(mine).items()}
    a, b = ({**defaults, **spec} for spec in (saved.state["spec"]["backbone_spec"], online.spec))
    for key in defaults:
        if _plain(a[key]) != _plain(b[key]):
            what = {
                "in_chans": "Let it see as many frames (objective.frames).",
                "img_size": "Record frames of env.image_size.",
            }.get(key, "Make model.spec and agent.backbone_spec the same.")
            raise LabError(
                f"{where}: its backbone has {key} = {_plain(a[key])}, the agent's {_plain(b[key])}. {what}"
            )
    parent = load_backbone(online, run, saved, where)
    target.load_state_dict(online.state_dict())
    return parent


def _body(net: Any) -> Any:
    """What sees the frames, of a Q-network."""
    backbone = net.features_extractor.backbone
    return getattr(backbone, "eyes", backbone)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
