"""Weights to begin with: of another agent, or of a body that has learned to see before it plays."""

import sys
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
    """The run that `agent.start_from` names and its weights, verified; needs no torch.

    Args:
        folder: a run, whose best weights are meant, or a folder in its checkpoints/.

    Raises:
        LabError: there is no such run, it is of another kind or, of autoencoding, not finished, or its
            checkpoint is damaged.
    """
    path, which = Path(folder), "best"
    if path.parent.name == "checkpoints" and not (path / "run.json").exists():
        path, which = path.parent.parent, path.name
    run = Run.named_by("agent.start_from", path)
    objective = (run.info["config"].get("objective") or {}).get("name")
    kind = objective if run.info["pipeline"] == "supervised" else run.info["pipeline"]
    if kind not in (*SAME_SIGHT, "rl"):
        raise LabError(
            f"agent.start_from = {folder}: a run of {kind}, whose network does not see pixels as an agent "
            f"does. Name an agent's run, or one of {' or '.join(SAME_SIGHT)}."
        )
    # An agent's weights are as good as its evaluations say, also where it was stopped or diverged later.
    if run.info["state"] != "finished" and kind != "rl":
        raise LabError(
            f"agent.start_from = {folder}: the run is {run.info['state']}, not finished. Wait for it, or go "
            f"on with it: lab train {path} --resume"
        )
    return run, checkpoint.load(run.find_checkpoint(which))


def begin(agent: "QLearner") -> dict[str, str]:
    """Gives the agent's networks, online and target, the weights of the run its config names.

    Of another agent's run these are all its weights; of autoencoding those of the body, which in an agent
    with a hidden state is what comes before it, the eyes.

    Returns:
        What run.json says of that run.

    Raises:
        LabError: as `find`, or its network is another one.
    """
    assert agent.config.start_from is not None
    run, saved = find(agent.config.start_from)
    return (_whole if run.info["pipeline"] == "rl" else _body_alone)(agent, run, saved)


def _whole(agent: "QLearner", run: Run, saved: Checkpoint) -> dict[str, str]:
    """All of another agent's Q-network; the game may be another one with as many actions."""
    where = f"agent.start_from = {agent.config.start_from}"
    weights, net = saved.weights(), agent.policy.q_net
    there, here = ({name: tuple(t.shape) for name, t in x.items()} for x in (weights, net.state_dict()))
    other = next((name for name in {**here, **there} if here.get(name) != there.get(name)), None)
    of_agent, of_game = _differences(agent, run)
    if other is not None:
        differ = ", ".join(of_agent or of_game)
        remedy = f"Different: {differ}. Make it the same in both."
        if not differ:
            remedy = "Its run.json describes another network than its weights. Restore both from one copy."
        raise LabError(
            f"{where}: its network has {other} as {there.get(other, 'no part')}, this agent's as "
            f"{here.get(other, 'no part')}. {remedy}"
        )
    if of_game:
        print(f"note: {where}: its agent had another {', '.join(of_game)}.", file=sys.stderr)
    net.load_state_dict(weights)
    if agent.policy.q_net_target is not net:
        agent.policy.q_net_target.load_state_dict(weights)
    return {"run_id": run.info["id"], "stage": "agent", "sha256": checkpoint.weights_hash(saved.path)}


def _differences(agent: "QLearner", run: Run) -> tuple[list[str], list[str]]:
    """What another agent's network, and what it saw and its actions, have otherwise than this agent's."""
    from rl.evaluate import make_env, run_config

    settings, env = run_config(run), agent.env
    keys = ("backbone", "backbone_spec", "dueling")
    of_agent = [f"agent.{k}" for k in keys if getattr(settings.agent, k) != getattr(agent.config, k)]
    theirs = make_env(settings.env, 1, 0, training=False)
    of_game = []
    for key, there, here in (
        ("env.game", theirs.game, env.game),
        ("env.image_size", *(e.observation_space.shape[-1] for e in (theirs, env))),  # type: ignore[index]
        ("env.frame_skip", theirs.frame_skip, env.frame_skip),
        ("actions", *(" ".join(e.action_meanings) for e in (theirs, env))),
    ):
        if there != here:
            of_game.append(f"{key} ({there}, here {here})")
    theirs.close()
    return of_agent, of_game


def _body_alone(agent: "QLearner", run: Run, saved: Checkpoint) -> dict[str, str]:
    from supervised.models import load_backbone

    config = agent.config
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
