"""One measurement of DQN, made in a process of its own: `python -m benchmarks.dqn_jobs '{...}'`.

`benchmarks.dqn_vs_sb3` starts these; each prints one line of JSON. Both sides get the same game, images,
network, optimiser, hyperparameters and number of updates per agent step.
"""

import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from stable_baselines3 import DQN as SB3DQN
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.vec_env import VecEnv

    from rl.agent import DQN

GAME = "pong"
SB3_ENV_ID = "PongNoFrameskip-v4"
BATCH_SIZE = 32
TRAIN_FREQ = 4  # agent steps per update
LEARNING_RATE = 1e-4
GAMMA = 0.99
EPSILON = 0.01  # from the start: nearly all actions come from the network
TARGET_UPDATE_STEPS = 10_000
MAX_GRAD_NORM = 10.0
N_STACK, IMAGE_SIZE = 4, 84
# Transitions of real play the memories are filled with, over and over, before anything is measured.
RECORDED_TRANSITIONS = 1_024
NATURE_BUFFER_SIZE = 1_000_000
ENDLESS_STEPS = 10**9

Transition = tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray", list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures."""

    measure: str
    """speed, profile, replay or checkpoint."""
    side: str = "ours"
    """sb3 or ours."""
    precision: str = "auto"
    """Of our side: auto, fp32 or bf16. SB3 knows only fp32."""
    n_envs: int = 8
    seconds: float = 15.0
    """Length of the timed part; it ends with the next whole cycle of acting and learning."""
    warmup_seconds: float = 3.0
    """Learning before the timed part begins."""
    learning_starts: int = 1_000
    """Agent steps of random play."""
    buffer_size: int = 20_000
    """Transitions; the memory is full before anything is measured."""
    threads: int = 1
    """Of torch."""
    emulator_threads: int = 0
    """Of our side's emulators, 0 is one per core. SB3 steps its emulators one after the other."""
    cores: int = 0
    """Processor cores the process may use; 0 is all."""
    device: str = "cpu"
    seed: int = 0


class Meter:
    """Times whole cycles of acting and learning, after the learning has warmed up.

    Args:
        job: how long.
        updates: returns the number of updates so far.
        watch: entered at the start of the timed part, left at its end.
    """

    def __init__(
        self, job: Job, updates: Callable[[], int], watch: AbstractContextManager[Any] | None = None
    ) -> None:
        self._job, self._updates, self._watch = job, updates, watch
        self._cycle_steps = TRAIN_FREQ * job.n_envs
        self._warm_from: float | None = None
        self._start: tuple[float, float, int, int] | None = None
        self.wall_seconds = self.cpu_seconds = 0.0
        self.agent_steps = self.n_updates = 0

    def tick(self, agent_steps: int) -> bool:
        """Called after every step of the environments; returns whether to go on."""
        if agent_steps % self._cycle_steps or agent_steps <= self._job.learning_starts + self._cycle_steps:
            return True
        now = time.perf_counter()
        if self._warm_from is None:
            self._warm_from = now
        elif self._start is None:
            if now - self._warm_from >= self._job.warmup_seconds:
                updates = self._updates()
                if self._watch is not None:
                    self._watch.__enter__()
                self._start = time.perf_counter(), time.process_time(), agent_steps, updates
        elif now - self._start[0] >= self._job.seconds:
            updates = self._updates()
            self.wall_seconds = time.perf_counter() - self._start[0]
            self.cpu_seconds = time.process_time() - self._start[1]
            self.agent_steps = agent_steps - self._start[2]
            self.n_updates = updates - self._start[3]
            if self._watch is not None:
                self._watch.__exit__(None, None, None)
            return False
        return True


def make_sb3(job: Job) -> "SB3DQN":
    """Stock SB3: its own wrappers, network, memory and loop."""
    import torch
    from stable_baselines3 import DQN as SB3DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(job.threads)
    # `train_freq` counts steps of all environments together, so `gradient_steps` must grow with them.
    return SB3DQN(
        "CnnPolicy",
        VecFrameStack(make_atari_env(SB3_ENV_ID, job.n_envs, seed=job.seed), N_STACK),
        learning_rate=LEARNING_RATE,
        buffer_size=job.buffer_size,
        learning_starts=job.learning_starts,
        batch_size=BATCH_SIZE,
        gamma=GAMMA,
        train_freq=TRAIN_FREQ,
        gradient_steps=job.n_envs,
        target_update_interval=TARGET_UPDATE_STEPS,
        exploration_initial_eps=EPSILON,
        exploration_final_eps=EPSILON,
        max_grad_norm=MAX_GRAD_NORM,
        seed=job.seed,
        device=job.device,
    )


def make_ours(job: Job) -> "tuple[DQN, str]":
    """Our DQN without double, dueling and n-step returns, and the precision it computes in."""
    from lab.device import DeviceConfig, resolve
    from lab.seeding import seed_everything
    from rl.agent import DQN
    from rl.config import DQNConfig, DQNRun, EnvConfig
    from rl.evaluate import make_env

    run = DQNRun(
        env=EnvConfig(game=GAME, n_envs=job.n_envs, image_size=IMAGE_SIZE, num_threads=job.emulator_threads),
        agent=DQNConfig(
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            gamma=GAMMA,
            buffer_size=job.buffer_size,
            learning_starts=job.learning_starts,
            batch_size=BATCH_SIZE,
            train_freq=TRAIN_FREQ,
            target_update_steps=TARGET_UPDATE_STEPS,
            exploration_initial=EPSILON,
            exploration_final=EPSILON,
        ),
        device=DeviceConfig(device=job.device, precision=job.precision, threads=job.threads),
        seed=job.seed,
    )
    compute = resolve(run.device)
    seed_everything(run.seed)
    env = make_env(run.env, run.env.n_envs, run.seed, training=True)
    return DQN(run.agent, env, compute, run.seed), compute.precision


def record_play(env: "VecEnv", n_transitions: int) -> list[Transition]:
    """Random play: arguments for a replay memory's `add`, one per step of the environments."""
    import numpy as np

    rng = np.random.default_rng(0)
    play: list[Transition] = []
    observations = np.array(env.reset())
    for _ in range(max(n_transitions // env.num_envs, 1)):
        actions = rng.integers(6, size=env.num_envs)
        stepped, rewards, dones, infos = env.step(actions)
        following = np.array(stepped)
        stored = following.copy() if dones.any() else following
        for i in np.flatnonzero(dones):
            stored[i] = infos[i]["terminal_observation"]
        play.append((observations, stored, actions[:, None], rewards, dones, infos))
        observations = following
    return play


def fill(memory: "ReplayBuffer", play: list[Transition], n_transitions: int) -> None:
    """Adds the play over and over until `n_transitions` were added."""
    from rl.replay import FrameReplay

    added = 0
    while added < n_transitions:
        if isinstance(memory, FrameReplay):
            memory.cut()
        for transition in play:
            memory.add(*transition)
            added += len(transition[0])
    if isinstance(memory, FrameReplay):
        memory.cut()


def peak_rss_bytes() -> int:
    """The most memory this process ever had."""
    try:
        # Not getrusage where this is to be had: a child's maximum begins with that of its parent.
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except OSError:
        import resource

        unit_bytes = 1 if platform.system() == "Darwin" else 1024
        return unit_bytes * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _learn(job: Job, prepare: Callable[[Any], AbstractContextManager[Any] | None]) -> dict[str, Any]:
    """Makes the agent of a job, fills its memory and lets it learn until the meter stops it.

    Args:
        job: what to measure.
        prepare: gets the agent and returns what the meter enters for the timed part.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    if job.side == "sb3":
        agent, precision = make_sb3(job), "fp32"
    else:
        agent, precision = make_ours(job)
    env, memory = agent.get_env(), agent.replay_buffer
    assert env is not None
    assert memory is not None
    # A few more than the memory holds: ours has slots to spare.
    fill(memory, record_play(env, RECORDED_TRANSITIONS), int(1.05 * job.buffer_size) + 100)

    meter = Meter(job, lambda: agent._n_updates, prepare(agent))
    if job.side == "sb3":

        class MeterCallback(BaseCallback):
            def _on_step(self) -> bool:
                return meter.tick(self.num_timesteps)

        agent.learn(ENDLESS_STEPS, MeterCallback())
    else:
        for agent_steps in agent.iterate(ENDLESS_STEPS):  # type: ignore[attr-defined]
            if not meter.tick(agent_steps):
                break
    return {
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in agent.policy.q_net.parameters()),
        "agent_steps_per_second": meter.agent_steps / meter.wall_seconds,
        "agent_steps_per_cpu_second": meter.agent_steps / meter.cpu_seconds,
        "updates_per_agent_step": meter.n_updates / meter.agent_steps,
        "timed_seconds": meter.wall_seconds,
        "timed_updates": meter.n_updates,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def measure_speed(job: Job) -> dict[str, Any]:
    """Agent steps per second of wall time and of processor time, and the peak memory of the process."""
    return _learn(job, lambda agent: None)


def profile(job: Job) -> dict[str, Any]:
    """Wall time of the loop by part, per update, and the torch operations that take the most."""
    import torch

    from benchmarks.stopwatch import Stopwatch

    watch = Stopwatch()

    def prepare(agent: Any) -> Stopwatch:
        for name in ("step_async", "step_wait"):
            watch.wrap(agent.env, name, "emulator")
        watch.wrap(agent, "predict" if job.side == "sb3" else "q_values", "act")
        watch.wrap(agent.replay_buffer, "sample", "sample")
        watch.wrap(agent.replay_buffer, "add", "store")
        watch.wrap(agent.policy.q_net_target, "forward", "target forward")
        watch.wrap(agent.policy.q_net, "forward", "forward")
        for name in ("backward", "grad"):
            watch.wrap(torch.autograd, name, "backward")
        watch.wrap(torch.nn.utils, "clip_grad_norm_", "gradient clipping")
        watch.wrap(agent.policy.optimizer, "step", "optimiser")
        return watch

    result = _learn(job, prepare)
    parts = watch.report(result["timed_updates"])

    # Apart from the stopwatch, because recording every operation slows the loop.
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    recorded = _learn(job, lambda agent: recorder)
    events = sorted(recorder.key_averages(), key=lambda event: -event.self_cpu_time_total)
    per_update = recorded["timed_updates"]
    return {
        "precision": result["precision"],
        "n_envs": job.n_envs,
        "agent_steps_per_second": result["agent_steps_per_second"],
        "ms_per_update": 1000 * result["timed_seconds"] / result["timed_updates"],
        "agent_steps_per_update": TRAIN_FREQ,
        "parts": parts,
        "operations": [
            {
                "operation": event.key,
                "self_ms": round(event.self_cpu_time_total / 1000 / per_update, 4),
                "calls": round(event.count / per_update, 2),
            }
            for event in events[:15]
        ],
    }


def measure_replay(job: Job) -> dict[str, Any]:
    """Bytes per transition, and the time to sample 32 of the same transitions, alternating."""
    import numpy as np
    import torch
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    from rl.envs import AtariVecEnv
    from rl.replay import FrameReplay

    torch.set_num_threads(job.threads)
    observation_space = spaces.Box(0, 255, (N_STACK, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    action_space = spaces.Discrete(6)

    def sb3_bytes(**kwargs: Any) -> float:
        memory = ReplayBuffer(
            job.buffer_size, observation_space, action_space, "cpu", n_envs=job.n_envs, **kwargs
        )
        arrays = [value for value in vars(memory).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) / (memory.buffer_size * memory.n_envs)

    # A million transitions, whose pages the system hands out only when they are written.
    nature = FrameReplay(NATURE_BUFFER_SIZE, observation_space, action_space, "cpu", n_envs=job.n_envs)
    bytes_per_transition = {
        "sb3": sb3_bytes(),
        "sb3_optimize_memory_usage": sb3_bytes(optimize_memory_usage=True, handle_timeout_termination=False),
        "ours": nature.nbytes / NATURE_BUFFER_SIZE,
    }
    del nature

    env = AtariVecEnv(GAME, job.n_envs, job.seed, image_size=IMAGE_SIZE)
    play = record_play(env, RECORDED_TRANSITIONS)
    env.close()
    memories = {
        "sb3": ReplayBuffer(job.buffer_size, observation_space, action_space, "cpu", n_envs=job.n_envs),
        "ours": FrameReplay(job.buffer_size, observation_space, action_space, "cpu", n_envs=job.n_envs),
    }
    for memory in memories.values():
        fill(memory, play, int(1.05 * job.buffer_size) + 100)
    block_samples = 50
    blocks: dict[str, list[float]] = {side: [] for side in memories}
    for memory in memories.values():
        for _ in range(block_samples):
            memory.sample(BATCH_SIZE)
    began = time.perf_counter()
    while time.perf_counter() - began < job.seconds or not blocks["ours"]:
        for side, memory in memories.items():
            block_began = time.perf_counter()
            for _ in range(block_samples):
                memory.sample(BATCH_SIZE)
            blocks[side].append((time.perf_counter() - block_began) / block_samples)
    return {
        "bytes_per_transition": bytes_per_transition,
        "sample_seconds": {side: median(times) for side, times in blocks.items()},
        "sample_time_ratio_ours_to_sb3": median(
            ours / sb3 for ours, sb3 in zip(blocks["ours"], blocks["sb3"], strict=True)
        ),
        "sample_pairs": len(blocks["ours"]),
    }


def measure_checkpoint(job: Job) -> dict[str, Any]:
    """How long a checkpoint holds up training when the memory is full, by transitions since the last one."""
    from lab import checkpoint

    agent, _ = make_ours(job)
    play = record_play(agent.env, RECORDED_TRANSITIONS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def save(n_new: int) -> float:
            fill(agent.replay, play, n_new)
            agent._last_obs = agent.env.reset()  # type: ignore[assignment]
            began = time.perf_counter()
            segments = agent.replay.save_new(root / "shared")
            tensors, state = agent.capture()
            checkpoint.save(root, checkpoint.step_name(0), tensors, state, segments)
            return time.perf_counter() - began

        parts = 8  # a memory fills in many checkpoints, not in one
        for _ in range(parts):
            save(job.buffer_size // parts)
        for n_new in (job.buffer_size // 10, job.buffer_size // 4):
            seconds = save(n_new)
            on_disk = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
            rows.append({"new_transitions": n_new, "seconds": seconds, "bytes_on_disk": on_disk})
    return {"transitions": agent.replay.size(), "rows": rows}


MEASURES = {
    "speed": measure_speed,
    "profile": profile,
    "replay": measure_replay,
    "checkpoint": measure_checkpoint,
}


def main() -> None:
    """Does the job named on the command line and prints its result."""
    job = Job(**json.loads(sys.argv[1]))
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    if job.side == "ours":
        from lab.device import quiet_threads

        quiet_threads()  # as `lab train` does, before torch is imported
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner from every process
    # The environment SB3's users train on is kept by gymnasium as an old name.
    warnings.filterwarnings("ignore", message=".*The environment PongNoFrameskip-v4 is out of date")
    print(json.dumps(MEASURES[job.measure](job)))


if __name__ == "__main__":
    main()
