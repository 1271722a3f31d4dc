"""Exports: an agent for others to open."""

from pathlib import Path

from stable_baselines3 import DQN as SB3DQN

from lab.errors import LabError
from lab.files import explain_write_errors, written_aside
from lab.run import Run
from rl.agent import policy_kwargs
from rl.config import DRQNConfig
from rl.evaluate import load_player, make_env, run_config
from rl.policy import BackboneQPolicy


def export_sb3(run: Run, which: str, path: Path) -> Path:
    """Writes a zip that stock `stable_baselines3.DQN.load(path)` opens and plays.

    It holds the Q-network in fp32 under the importable policy class `rl.policy.BackboneQPolicy`, and
    neither replay memory nor optimiser state. The algorithm that trained it does not matter: PQN's agents
    are Q-networks too.

    Raises:
        LabError: no such checkpoint, or the file cannot be written.
    """
    settings = run_config(run)
    if isinstance(settings.agent, DRQNConfig):
        raise LabError(
            f"{run.folder}: drqn remembers, and Stable-Baselines3's DQN does not. It cannot be exported."
        )
    player, _, _ = load_player(run, which)
    env = make_env(settings.env, 1, 0, training=False)
    model = SB3DQN(
        BackboneQPolicy,
        env,
        learning_rate=settings.agent.learning_rate,
        buffer_size=1,
        gamma=settings.agent.gamma,
        exploration_final_eps=settings.eval.epsilon,
        policy_kwargs=policy_kwargs(settings.agent),
        device="cpu",
    )
    weights = player.q_net.state_dict()
    model.q_net.load_state_dict(weights)
    model.q_net_target.load_state_dict(weights)
    model.exploration_rate = settings.eval.epsilon
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        model.save(aside, exclude=["replay_buffer"])
    env.close()
    return path
