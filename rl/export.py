"""Exports: an agent for others to open."""

import math
from pathlib import Path

from stable_baselines3 import DQN as SB3DQN

from lab import checkpoint
from lab.errors import LabError
from lab.files import explain_write_errors, written_aside
from lab.run import Run
from rl.agent import policy_kwargs
from rl.config import DQNConfig, DRQNConfig
from rl.evaluate import load_player, make_env, run_config
from rl.policy import BackboneQPolicy

STOCK_BUFFER = 10_000
"""Transitions of the memory that stock SB3 makes on loading an export; 56 kB each at 84x84, once filled."""


def export_sb3(run: Run, which: str, path: Path) -> Path:
    """Writes a zip that stock `stable_baselines3.DQN.load(path)` opens, plays and trains further.

    It holds the Q-network in fp32 under the importable policy class `rl.policy.BackboneQPolicy`, the settings
    that stock DQN shares with the agent's, and neither replay memory nor optimiser state. The algorithm that
    trained it does not matter: PQN's agents are Q-networks too. `DQN.load(path, env, buffer_size=1_000_000)`
    takes another memory than `STOCK_BUFFER`; the settings of PQN that DQN has too are DQN's own there.

    Raises:
        LabError: no such checkpoint, or the file cannot be written.
    """
    settings = run_config(run)
    agent = settings.agent
    if isinstance(agent, DRQNConfig):
        raise LabError(
            f"{run.folder}: drqn has a hidden state, and Stable-Baselines3's DQN has none. It cannot be "
            "exported."
        )
    player, checkpoint_path, _ = load_player(run, which)
    dqn = agent if isinstance(agent, DQNConfig) else DQNConfig()
    env = make_env(settings.env, 1, 0, training=False)
    model = SB3DQN(
        BackboneQPolicy,
        env,
        learning_rate=agent.learning_rate,
        buffer_size=1,  # for this moment; the file says STOCK_BUFFER
        learning_starts=1_000,
        batch_size=dqn.batch_size,
        gamma=agent.gamma,
        train_freq=max(dqn.train_freq // settings.env.n_envs, 1),  # of SB3 counted in steps of all at once
        gradient_steps=max(settings.env.n_envs // dqn.train_freq, 1),
        n_steps=dqn.n_step,
        target_update_interval=dqn.target_update_steps,
        # It does not begin with random play again.
        exploration_initial_eps=agent.exploration_final,
        exploration_final_eps=agent.exploration_final,
        max_grad_norm=agent.max_grad_norm or math.inf,
        policy_kwargs=policy_kwargs(agent),
        device="cpu",
    )
    weights = player.q_net.state_dict()
    model.q_net.load_state_dict(weights)
    model.q_net_target.load_state_dict(weights)
    model.exploration_rate = settings.eval.epsilon
    model.buffer_size = STOCK_BUFFER
    # As SB3 found them: with the class that it chose for n_steps named, it warns on loading its own file.
    model.replay_buffer_class, model.replay_buffer_kwargs = None, {}
    model.num_timesteps = checkpoint.load(checkpoint_path).state.get("step", 0)
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        model.save(aside, exclude=["replay_buffer"])
    env.close()
    return path
