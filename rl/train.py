"""A training run on Atari: the agent iterates, this file watches, records and saves."""

import time
from pathlib import Path
from typing import Any

import psutil

from lab import checkpoint, config
from lab.checkpoint import Checkpoint
from lab.device import Compute, resolve
from lab.errors import LabError
from lab.interrupt import StopRequest
from lab.progress import Progress, duration
from lab.run import Run
from lab.seeding import derive_seed, seed_everything
from lab.tracking import Tracker
from rl import pretrained
from rl.agent import DQN, QLearner, crossings
from rl.config import DQNConfig, DRQNConfig, EnvConfig, PQNConfig, RunConfig
from rl.curve import draw_curve
from rl.drqn import DRQN
from rl.evaluate import Evaluation, Player, evaluate, make_env
from rl.film import film
from rl.pqn import PQN

_TENSOR_FILES = {
    "dqn": ("model", "target", "optimizer", "progress"),
    "drqn": ("model", "target", "optimizer", "progress"),
    "pqn": ("model", "optimizer", "progress"),
}


def make_agent(settings: RunConfig, compute: Compute) -> QLearner:
    """The agent of a config on its training environments, all seeded."""
    agent = settings.agent
    if isinstance(agent, DQNConfig):
        _check_replay(agent, settings.env, compute)
    seed_everything(settings.seed)
    env = make_env(settings.env, settings.env.n_envs, _games_seed(settings, 0), training=True)
    if isinstance(agent, DRQNConfig):
        return DRQN(agent, env, compute, settings.seed)
    if isinstance(agent, DQNConfig):
        return DQN(agent, env, compute, settings.seed)
    assert isinstance(agent, PQNConfig)
    return PQN(agent, env, compute, settings.seed)


def _check_replay(agent: DQNConfig, env: EnvConfig, compute: Compute) -> None:
    """Refuses a replay memory that cannot be where the config wants it, or can never fill."""
    if agent.replay_device not in ("cpu", compute.device.type):
        raise LabError(
            f"agent.replay_device = {agent.replay_device!r}: the run computes on {compute.device}. "
            "Use --agent.replay_device=cpu."
        )
    needed, there = agent.buffer_size * env.image_size**2, psutil.virtual_memory().total
    if agent.replay_device == "cpu" and needed > there:
        fits = there // 2 // env.image_size**2
        raise LabError(
            f"agent.buffer_size = {agent.buffer_size}: takes {needed / 1e9:.1f} GB once it is full, this "
            f"machine has {there / 1e9:.1f} GB. Use --agent.buffer_size={fits} or less."
        )


def train(
    settings: RunConfig, folder: Path, run: Run | None, saved: Checkpoint | None, mode: str, why: str
) -> Run:
    """Trains to the end, or to the next SIGINT or SIGTERM.

    Args:
        settings: the resolved config.
        folder: of the run.
        run: the run to continue, or None to create one.
        saved: its latest checkpoint, verified; None starts from the beginning.
        mode, why: W&B's, from `tracking.choose_mode`.

    Raises:
        LabError: anything the user can mend; the run is then marked `failed` and can be resumed.
    """
    compute = resolve(settings.device, run.info["compute"] if run is not None else None)
    agent = make_agent(settings, compute)
    # A checkpoint has all weights: those the run once began with may be gone.
    begun = saved is None and settings.agent.start_from is not None
    parents = [pretrained.begin(agent)] if begun else []
    values = config.to_dict(settings)
    if run is None:
        run = Run.create(
            folder,
            config=values,
            pipeline="rl",
            job_type="train",
            name=settings.run_name,
            group=f"{settings.env.game}__{settings.agent.algorithm}__{config.config_hash(values)}",
            x_axis="agent_steps",
            compute=compute.describe(),
            parents=parents,
        )
    else:
        run.continue_from(saved.state["metrics_bytes"] if saved else 0)
    with run.recording_its_end():
        tracking_config = settings.tracking
        tracker = run.tracker(
            mode, why, tracking_config.project, tracking_config.entity, tracking_config.tags
        )
        exit_code = 1
        try:
            session = _Session(settings, compute, agent, run, tracker)
            if saved is not None:
                session.restore(saved)
            session.run_to_end()
            exit_code = 0 if run.info["state"] == "finished" else 255
        finally:
            tracker.finish(exit_code, run.info["summary"])
    return run


class _Session:
    """One process's share of a run."""

    def __init__(
        self, settings: RunConfig, compute: Compute, agent: QLearner, run: Run, tracker: Tracker
    ) -> None:
        self.settings, self.compute, self.agent = settings, compute, agent
        self.run, self.tracker = run, tracker
        self.player = Player(agent.policy.q_net, settings.env)
        self.best: float | None = None
        self.seconds_before = 0.0
        self.began = time.monotonic()

    # ---- the loop ----

    def run_to_end(self) -> None:
        s, agent = self.settings, self.agent
        start = step = agent.num_timesteps
        with StopRequest() as stop, Progress(s.total_steps, start) as progress:
            progress.say(self._headline())
            for new_step in () if self._solved() else agent.iterate(s.total_steps):
                stride, step = new_step - step, new_step
                last = step >= s.total_steps

                if last or crossings(step, stride, s.log_every_steps):
                    self._log(progress)
                if last or crossings(step, stride, s.eval.every_steps):
                    self._evaluate(progress)
                    last = last or self._solved()
                if last or (s.film.every_steps and crossings(step, stride, s.film.every_steps)):
                    self._film(progress)
                if last or crossings(step, stride, s.checkpoint.every_steps):
                    # Emulators cannot be saved, so every checkpoint begins fresh games, seeded by its
                    # step: a run that goes on and one that is resumed here are the same run.
                    agent.begin_games(_games_seed(s, step))
                    self._save(progress)
                elif stop:
                    # An extra checkpoint must not begin fresh games, or the run would differ from one
                    # never stopped: it keeps the actions since the last one, to be replayed.
                    self._save(progress)
                if stop and not last:
                    self._interrupted(stop, progress)
                    return
                progress.update(step)
                if last:
                    break
            self._finished(progress)

    def _solved(self) -> bool:
        """An evaluation reached `eval.stop_at`."""
        goal = self.settings.eval.stop_at
        return goal is not None and self.best is not None and self.best >= goal

    def _headline(self) -> str:
        s, c = self.settings, self.compute
        verb = "resuming at" if self.agent.num_timesteps else "training from"
        return (
            f"{s.env.game} with {s.agent.algorithm.upper()}: {verb} agent step {self.agent.num_timesteps:,} "
            f"of {s.total_steps:,}\n"
            f"run     {self.run.folder}\n"
            f"device  {c.device}, {c.precision}, {c.threads} threads ({c.reason})\n"
            f"W&B     {self.tracker.mode} ({self.run.info['wandb']['why']})"
        )

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _log(self, progress: Progress) -> None:
        row: dict[str, Any] = dict(self.agent.metrics())
        row["time/fps"] = round(progress.speed, 1)
        row["time/elapsed_seconds"] = round(self._elapsed(), 1)
        self.tracker.log(self.agent.num_timesteps, row)
        mean = row.get("rollout/ep_rew_mean")
        if mean is not None:
            progress.update(self.agent.num_timesteps, f"mean return {mean:.1f}")

    def _evaluate(self, progress: Progress) -> None:
        e = self.settings.eval
        self.agent.policy.set_training_mode(False)
        result = evaluate(self.player, e.episodes, e.epsilon, e.seed)
        self.agent.policy.set_training_mode(True)
        step = self.agent.num_timesteps
        self.tracker.log(step, result.metrics())
        better = self.best is None or result.mean > self.best
        if better:
            self.best = result.mean
            model = dict(self.agent.policy.q_net.state_dict())
            path = checkpoint.save(
                self.run.checkpoints, "best", {"model": model}, {"step": step, "mean_reward": result.mean}
            )
            self.tracker.log_checkpoint(path, "best")
        self._summarize(result, step)
        progress.say(
            f"{step:>10,}  evaluation {result.mean:.1f} +- {result.std:.1f} over {e.episodes} games"
            + ("  (best so far)" if better else "")
            + f"  {duration(self._elapsed())}"
        )

    def _summarize(self, result: Evaluation, step: int) -> None:
        self.run.summarize(
            **{
                "global_step": step,
                "eval/mean_reward": result.mean,
                "eval/std_reward": result.std,
                "eval/best_mean_reward": self.best,
                "eval/human_normalized": result.human_normalized,
                "time/elapsed_seconds": round(self._elapsed(), 1),
            }
        )

    def _film(self, progress: Progress) -> None:
        f, step = self.settings.film, self.agent.num_timesteps
        if f.max_steps == 0:
            return
        path = self.run.media / f"step_{step:012d}.mp4"
        result = film(self.player, path, self.settings.eval.seed, self.settings.eval.epsilon, f.max_steps)
        self.tracker.log_media(step, "media/play", path)
        progress.say(f"{step:>10,}  film {path} ({result['steps']} agent steps, score {result['return']:g})")

    # ---- saving ----

    def _save(self, progress: Progress) -> None:
        began = time.monotonic()
        root, agent = self.run.checkpoints, self.agent
        shared: list[Path] = []
        if isinstance(agent, DQN):
            shared = agent.replay.save_new(root / "shared")
        tensors, state = agent.capture()
        state = {
            "agent": state,
            "metrics_bytes": self.tracker.sync(),
            "best": self.best,
            "elapsed_seconds": self._elapsed(),
        }
        name = checkpoint.step_name(agent.num_timesteps)
        path = checkpoint.save(root, name, tensors, state, shared)
        checkpoint.point(root, "latest", name)
        self.tracker.log_checkpoint(path)
        checkpoint.prune(root, self.settings.checkpoint.keep)
        self._curve()
        progress.say(f"{agent.num_timesteps:>10,}  checkpoint {name} in {time.monotonic() - began:.1f} s")

    def restore(self, saved: Checkpoint) -> None:
        """Goes back to a checkpoint."""
        state, agent = saved.state, self.agent
        with saved.restoring(lambda: agent.capture()[0]):
            if isinstance(agent, DQN):
                agent.replay.restore(self.run.checkpoints / "shared", state["agent"]["replay"]["segments"])
            files = _TENSOR_FILES[self.settings.agent.algorithm]
            agent.restore({name: saved.tensors(name) for name in files}, state["agent"])
            self.best = state["best"]
            self.seconds_before = state["elapsed_seconds"]

    # ---- ends ----

    def _curve(self) -> None:
        s = self.settings
        title = f"{s.env.game}, {s.agent.algorithm.upper()}, seed {s.seed}"
        draw_curve(self.run.metrics, s.env.game, title, self.run.media / "learning_curve.png")

    def _interrupted(self, stop: StopRequest, progress: Progress) -> None:
        self.run.end("interrupted", reason=stop.signal_name)
        progress.say(f"{stop.signal_name}: saved. Continue with: lab train {self.run.folder} --resume")

    def _finished(self, progress: Progress) -> None:
        self._curve()
        curve = self.run.media / "learning_curve.png"
        self.tracker.log_media(self.agent.num_timesteps, "media/learning_curve", curve)
        self.run.summarize(**{"time/elapsed_seconds": round(self._elapsed(), 1)})
        self.run.end("finished")
        progress.say(f"finished in {duration(self._elapsed())}. Curve: {curve}")


def _games_seed(settings: RunConfig, step: int) -> int:
    """The seed of the training games begun at `step`."""
    return derive_seed(settings.seed, 4, step)
