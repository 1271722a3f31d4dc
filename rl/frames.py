"""Records of play: what an agent saw and did, as one file for models that learn from it.

An .npz with, for each agent step:
  * frames: uint8 (steps, height, width), the newest frame the agent saw before it acted;
  * actions: uint8 (steps,), what it did there;
  * rewards: float32 (steps,), raw, what that action brought;
  * begins: bool (steps,), the frame is the first of a game or of one environment's record.
Environments lie one behind the other, so step t + 1 follows step t unless begins[t + 1]. `action_meanings`
names the actions, `game` the game.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab.files import explain_write_errors, write_atomic
from rl.config import EnvConfig
from rl.evaluate import Player, make_env

Record = dict[str, np.ndarray]


def record(
    env: EnvConfig,
    player: Player | None,
    steps: int,
    epsilon: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Record:
    """Plays whole games side by side, those cut off by the end of the record excepted.

    Args:
        env: the game as the agent saw it in training; `n_envs` games at once.
        player: who plays, epsilon-greedily; None for random play.
        steps: agent steps in all, shared out evenly among the environments.
        epsilon: probability of a random action.
        seed: of the games and of the random actions.
        progress: told how many steps there are so far.

    Returns:
        The arrays of the file.
    """
    n_envs = min(env.n_envs, steps)
    lengths = np.full(n_envs, steps // n_envs) + (np.arange(n_envs) < steps % n_envs)
    games = make_env(env, n_envs, seed, training=False)
    rng = np.random.default_rng(seed)
    observations = games.reset()
    if player is not None:
        player.begin(n_envs)
    height, width = observations.shape[-2:]
    rows, everyone = int(lengths.max()), np.arange(n_envs)
    frames = np.empty((n_envs, rows, height, width), np.uint8)
    actions = np.empty((n_envs, rows), np.uint8)
    rewards = np.empty((n_envs, rows), np.float32)
    begins = np.zeros((n_envs, rows), bool)
    begins[:, 0] = True
    n_actions = len(games.action_meanings)
    for row in range(rows):
        frames[:, row] = observations[:, -1]
        if player is None:
            chosen = rng.integers(n_actions, size=n_envs)
        else:
            chosen = player.choose(player.q_values(observations, everyone), epsilon, rng)
        actions[:, row] = chosen
        observations, rewards[:, row], dones, _ = games.step(chosen)
        if row + 1 < rows:
            begins[:, row + 1] = dones
        if player is not None and dones.any():
            player.forget(np.flatnonzero(dones))
        if progress is not None:
            progress(min((row + 1) * n_envs, steps))
    names = games.action_meanings
    games.close()
    kept = np.arange(rows) < lengths[:, None]
    return {
        "frames": frames[kept],
        "actions": actions[kept],
        "rewards": rewards[kept],
        "begins": begins[kept],
        "action_meanings": np.array(names),
        "game": np.array(games.game),
    }


def save(path: Path, arrays: Record) -> None:
    """Writes a record, compressed: Pong's frames shrink to a sixtieth.

    Raises:
        LabError: it cannot be written.
    """
    # In memory first: zipfile does not survive a disk that fills up under it.
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  (numpy takes any names)
    with explain_write_errors(str(path), "Free some space, or choose another file with --out."):
        write_atomic(path, packed.getvalue())
