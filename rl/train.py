"""A training run on Atari: the agent iterates, this file watches, records and saves."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from lab import checkpoint, config
from lab.checkpoint import Checkpoint
from lab.device import Compute, resolve
from lab.errors import LabError
from lab.interrupt import Stopped, StopRequest
from lab.memory import total_bytes
from lab.progress import Progress, duration
from lab.run import Run
from lab.seeding import seed_everything
from lab.tracking import Tracker
from rl import games, pretrained
from rl.agent import DQN, QLearner, crossings
from rl.config import DQNConfig, DRQNConfig, EnvConfig, PQNConfig, RunConfig
from rl.curve import draw_curve
from rl.drqn import DRQN
from rl.envs import STACK, training_seed
from rl.evaluate import Evaluation, Player, evaluate, make_env
from rl.film import film
from rl.pqn import PQN

_TENSOR_FILES = {
    "dqn": ("model", "target", "optimizer", "progress"),
    "drqn": ("model", "target", "optimizer", "progress"),
    "pqn": ("model", "optimizer", "progress"),
}

REPLAY_SAYS = 500
"""Steps of the emulators from which on a resumed run says that it plays them again."""


def make_agent(settings: RunConfig, compute: Compute) -> QLearner:
    """The agent of a config on its training environments, all seeded."""
    agent = settings.agent
    if isinstance(agent, DQNConfig):
        _check_replay(agent, settings.env, compute)
    elif isinstance(agent, PQNConfig):
        _check_rollout(agent, settings.env)
    seed_everything(settings.seed)
    env = make_env(settings.env, settings.env.n_envs, training_seed(settings.seed), training=True)
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
    needed, there = agent.buffer_size * env.image_size**2, total_bytes()
    if agent.replay_device == "cpu" and needed > there:
        fits = there // 2 // env.image_size**2
        raise LabError(
            f"agent.buffer_size = {agent.buffer_size}: takes {needed / 1e9:.1f} GB once it is full, this "
            f"machine has {there / 1e9:.1f} GB. Use --agent.buffer_size={fits} or less."
        )


def _check_rollout(agent: PQNConfig, env: EnvConfig) -> None:
    """Refuses a rollout that this machine's memory cannot hold."""
    needed = agent.rollout_steps * env.n_envs * STACK * env.image_size**2
    if needed > (there := total_bytes()):
        raise LabError(
            f"agent.rollout_steps = {agent.rollout_steps}: a rollout of {env.n_envs} environments takes "
            f"{needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB. Lower it or env.n_envs."
        )


def _whole_iterations(settings: RunConfig, agent: QLearner) -> int:
    """The steps that will be taken: what is asked for, rounded up to whole iterations."""
    return -(-settings.total_steps // agent.steps_per_iteration) * agent.steps_per_iteration


def train(
    settings: RunConfig, folder: Path, run: Run | None, saved: Checkpoint | None, mode: str, why: str
) -> Run:
    """Trains to the end, or to the next request to stop.

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
    if run is not None and saved is not None:
        taken, total = saved.state["agent"]["num_timesteps"], _whole_iterations(settings, agent)
        if taken > total:
            run.refuse(
                f"has taken {taken:,} steps, and total_steps now allows {total:,}. Set as many or more."
            )
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
            _Session(settings, compute, agent, run, tracker).run_to_end(saved)
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
        self.due: list[str] = []
        self.seconds_before = 0.0
        self.began = time.monotonic()

    # ---- the loop ----

    def run_to_end(self, saved: Checkpoint | None) -> None:
        """Trains from the checkpoint `saved`, or from the beginning, until the end or a request to stop.

        A stop within an iteration is heard there, and saved there: rollouts and their updates may take
        minutes. What is due is done between iterations alone, so a stop changes none of it.
        """
        s, agent = self.settings, self.agent
        total = _whole_iterations(s, agent)
        with StopRequest() as stop, Progress(total) as progress:
            try:
                if saved is not None:
                    self._restore(saved, stop, progress)
                progress.begin(agent.num_timesteps, total)
                progress.say(self._headline(total))
                self._do_what_is_due(stop, progress)  # where a stop broke off
                for step in () if self._solved() else agent.iterate(s.total_steps, lambda: bool(stop)):
                    self.due = self._becomes_due(step, agent.steps_per_iteration)
                    self._do_what_is_due(stop, progress)
                    progress.update(step)
                    if self._solved():
                        break
                if agent.within_iteration:
                    self._save(progress)
                    raise Stopped
            except Stopped:
                self._interrupted(stop, progress)
                return
            self._finished(progress)

    def _becomes_due(self, step: int, stride: int) -> list[str]:
        """What is to be done at this step, in this order."""
        s = self.settings
        every = {
            "log": s.log_every_steps,
            "evaluate": s.eval.every_steps,
            "film": s.film.every_steps,
            "restart": s.env.restart_every_steps,
            "save": s.checkpoint.every_steps,
        }
        due = [what for what, interval in every.items() if interval and crossings(step, stride, interval)]
        return self._also_at_the_end(due) if step >= s.total_steps else due

    @staticmethod
    def _also_at_the_end(due: list[str]) -> list[str]:
        """`due`, and what is done at the last step of all; in their order."""
        wanted = {*due, "log", "evaluate", "film", "save"}
        return [what for what in ("log", "evaluate", "film", "restart", "save") if what in wanted]

    def _do_what_is_due(self, stop: StopRequest, progress: Progress) -> None:
        """Does it, one after the other; a checkpoint taken in between says what is left.

        Raises:
            Stopped: a stop was requested; a checkpoint of this moment is there. An evaluation or a film that
                was broken off is made again from its beginning when the run goes on.
        """
        what = None
        try:
            while self.due:
                what = self.due[0]
                if what == "log":
                    self._log(progress)
                elif what == "evaluate":
                    self._evaluate(stop, progress)
                    if self._solved():
                        self.due = ["evaluate", *self._also_at_the_end(self.due)[2:]]
                elif what == "film":
                    self._film(stop, progress)
                elif what == "restart":
                    self.agent.begin_games()
                self.due.pop(0)
                if what == "save":
                    self._save(progress)
            if not stop:
                return
        except Stopped:
            what = None
        if what != "save":
            self._save(progress)
        at_end = self.agent.num_timesteps >= self.settings.total_steps or self._solved()
        if self.due or not at_end:
            raise Stopped

    def _solved(self) -> bool:
        """An evaluation reached `eval.stop_at`."""
        goal = self.settings.eval.stop_at
        return goal is not None and self.best is not None and self.best >= goal

    def _headline(self, total: int) -> str:
        s = self.settings
        rounded = "" if total == s.total_steps else f" ({s.total_steps:,} rounded up to whole iterations)"
        parent = s.agent.start_from
        begun = f"\nweights {parent} (optimiser and exploration begin as ever)" if parent else ""
        verb = "resuming at" if self.agent.num_timesteps else "training from"
        return (
            f"{s.env.game} with {s.agent.algorithm.upper()}: {verb} agent step {self.agent.num_timesteps:,} "
            f"of {total:,}{rounded}\n"
            f"run     {self.run.folder}\n"
            f"{self.compute.line()}\n"
            f"W&B     {self.tracker.mode} ({self.run.info['wandb']['why']})"
            f"{begun}"
        )

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _log(self, progress: Progress) -> None:
        row: dict[str, Any] = dict(self.agent.metrics())
        self._refuse_divergence(row.get("train/loss"), row.get("train/q_mean"))
        row["time/fps"] = round(progress.speed, 1)
        row["time/elapsed_seconds"] = round(self._elapsed(), 1)
        self.tracker.log(self.agent.num_timesteps, row)
        mean = row.get("rollout/ep_rew_mean")
        if mean is not None:
            progress.update(self.agent.num_timesteps, f"mean return {mean:.1f}")

    def _refuse_divergence(self, *values: float | None) -> None:
        """Raises a `LabError` if one of these values, or a weight, is no finite number any more."""
        lost = [value for value in values if value is not None and not math.isfinite(value)]
        parameters = torch.stack([p.detach().float().sum() for p in self.agent.policy.q_net.parameters()])
        if lost or not bool(torch.isfinite(parameters).all()):
            latest = checkpoint.find(self.run.checkpoints)
            kept = "It has no checkpoint" if latest is None else f"Its last checkpoint is {latest.name}"
            raise LabError(
                f"{self.run.folder}: diverged before agent step {self.agent.num_timesteps:,}: the loss or "
                f"the weights are not finite. {kept}. Train another run with a lower agent.learning_rate "
                f"than {self.settings.agent.learning_rate:g}."
            )

    def _evaluate(self, stop: StopRequest, progress: Progress) -> None:
        e = self.settings.eval
        self._refuse_divergence()
        self.agent.policy.set_training_mode(False)
        try:
            with stop.at_once():
                result = evaluate(self.player, e.episodes, e.epsilon, e.seed)
        finally:
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
            + (f", {cut} cut off by the time limit" if (cut := sum(result.truncated)) else "")
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
                "eval/truncated_episodes": sum(result.truncated),
                "eval/human_normalized": result.human_normalized,
                "time/elapsed_seconds": round(self._elapsed(), 1),
            }
        )

    def _film(self, stop: StopRequest, progress: Progress) -> None:
        f, step = self.settings.film, self.agent.num_timesteps
        if f.max_steps == 0:
            return
        path = self.run.media / f"step_{step:012d}.mp4"
        e = self.settings.eval
        with stop.at_once():
            result = film(self.player, path, e.seed, e.epsilon, f.max_steps)
        self.tracker.log_media(step, "media/play", path)
        progress.say(f"{step:>10,}  film {path} ({result['steps']} agent steps, score {result['return']:g})")

    # ---- saving ----

    def _save(self, progress: Progress) -> None:
        began = time.monotonic()
        self._refuse_divergence()
        root, agent = self.run.checkpoints, self.agent
        shared: list[Path] = []
        if isinstance(agent, DQN):
            shared = agent.replay.save_new(root / "shared")
        tensors, state = agent.capture()
        state = {
            "agent": state,
            "metrics_bytes": self.tracker.sync(),
            "best": self.best,
            "due": self.due,
            "elapsed_seconds": self._elapsed(),
        }
        name = checkpoint.step_name(agent.num_timesteps)
        path = checkpoint.save(root, name, tensors, state, shared)
        checkpoint.point(root, "latest", name)
        self.tracker.log_checkpoint(path)
        checkpoint.prune(root, self.settings.checkpoint.keep)
        self._curve()
        progress.say(f"{agent.num_timesteps:>10,}  checkpoint {name} in {time.monotonic() - began:.1f} s")

    def _restore(self, saved: Checkpoint, stop: StopRequest, progress: Progress) -> None:
        """Goes back to a checkpoint.

        Raises:
            Stopped: a stop was requested; the checkpoint is as it was.
        """
        state, agent = saved.state, self.agent
        files = _TENSOR_FILES[self.settings.agent.algorithm]
        tensors = {name: saved.tensors(name) for name in files}
        n_rows = len(tensors["progress"]["env_actions"])
        if n_rows > REPLAY_SAYS:
            progress.say(
                f"playing the last {n_rows:,} steps of each game again, as emulators cannot be saved"
            )
        with stop.at_once(), saved.restoring(lambda: agent.capture()[0]):
            if isinstance(agent, DQN):
                segments = state["agent"]["replay"]["segments"]
                agent.replay.restore(self.run.checkpoints / "shared", segments)
            agent.restore(tensors, state["agent"])
            self.best, self.due = state["best"], list(state["due"])
            self.seconds_before = state["elapsed_seconds"]

    # ---- ends ----

    def _curve(self) -> None:
        s = self.settings
        title = f"{s.env.game}, {s.agent.algorithm.upper()}, seed {s.seed}"
        curve = self.run.media / "learning_curve.png"
        draw_curve(self.run.metrics, s.env.game, s.env.frame_skip, title, curve)

    def _interrupted(self, stop: StopRequest, progress: Progress) -> None:
        self.run.end("interrupted", reason=stop.signal_name)
        progress.say(f"{stop.signal_name}: saved. Continue with: lab train {self.run.folder} --resume")

    def _finished(self, progress: Progress) -> None:
        self._curve()
        curve = self.run.media / "learning_curve.png"
        self.tracker.log_media(self.agent.num_timesteps, "media/learning_curve", curve)
        warnings = self._warnings()
        self.run.summarize(**{"time/elapsed_seconds": round(self._elapsed(), 1), "warnings": warnings})
        self.run.end("finished")
        for warning in warnings:
            progress.say(f"Warning: {warning}")
        progress.say(f"finished in {duration(self._elapsed())}. Curve: {curve}")

    def _warnings(self) -> list[str]:
        """What makes the result of a finished run worth little."""
        s, found = self.settings, []
        if self.agent._n_updates == 0:
            found.append("not one update was made: nothing was learned.")
        scores = games.published(s.env.game)
        if self.best is not None and scores is not None and self.best <= scores.random:
            found.append(
                f"its best evaluation, {self.best:.1f}, is not above random play ({scores.random:g}): it has "
                "not learned to play."
            )
        if self.run.info["summary"].get("eval/truncated_episodes") == s.eval.episodes:
            found.append(
                "every game of its last evaluation was cut off by the time limit, env.max_episode_frames = "
                f"{s.env.max_episode_frames:,}: it may be stuck, and a longer limit may give another score."
            )
        if not self._solved() and s.eval.stop_at is not None:
            found.append(f"eval.stop_at = {s.eval.stop_at:g} was not reached: the best is {self.best:.1f}.")
        return found
