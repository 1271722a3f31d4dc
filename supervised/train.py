"""A supervised run: the trainer iterates, this file watches, records, judges and saves."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import checkpoint, config
from lab.checkpoint import Checkpoint
from lab.device import Compute, resolve
from lab.errors import LabError, first_line
from lab.files import explain_write_errors
from lab.interrupt import Stopped, StopRequest
from lab.progress import Progress, duration
from lab.run import Run
from lab.seeding import seed_everything
from lab.tracking import Tracker, read_metrics, scrub
from supervised import figures, objectives, smoke
from supervised.config import SupervisedRun
from supervised.data import Batches, DataSet
from supervised.trainer import UNFIT, Trainer

ROOM = "Free some space, then continue with --resume."


def train(
    settings: SupervisedRun, folder: Path, run: Run | None, saved: Checkpoint | None, mode: str, why: str
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
    data = objectives.read(settings, folder)  # a resumed run has its tokenizer there
    seed_everything(settings.seed)
    # A checkpoint has all weights: those the run once began with may be gone.
    model = settings.model if saved is None else replace(settings.model, start_from=None)
    objective = objectives.make(replace(settings, model=model), data)
    trainer = Trainer(objective, objective.batches("train", compute.device), settings, compute)
    held_out = objective.batches("test", compute.device)
    values = config.to_dict(settings)
    redraw, moved = False, ""
    if run is None:
        run = Run.create(
            folder,
            config=values,
            pipeline="supervised",
            job_type="train",
            name=settings.run_name,
            group=f"{data.name}__{settings.model.backbone}__{config.config_hash(values)}",
            x_axis="optimizer_steps",
            compute=compute.describe(),
            parents=objective.parents,
        )
    else:
        if saved is not None:
            _restore(run, saved, data, trainer)
        before, run.info["config"] = run.info["config"], scrub(values)
        moved = _moved(run.info["compute"], compute)
        run.info["compute"] = compute.describe()
        redraw = before["objective"] != run.info["config"]["objective"]
        run.continue_from(saved.state["metrics_bytes"] if saved else 0)
    with run.recording_its_end():
        t = settings.tracking
        tracker = run.tracker(mode, why, t.project, t.entity, t.tags)
        exit_code = 1
        try:
            session = _Session(settings, compute, data, trainer, held_out, run, tracker, moved)
            if data.tokenizer is not None:
                with explain_write_errors(str(run.folder), ROOM):
                    data.tokenizer.save(run.folder)
            if saved is not None:
                session.restore(saved)
            session.run_to_end(redraw)
            exit_code = 0 if run.info["state"] == "finished" else 255
        finally:
            tracker.finish(exit_code, run.info["summary"])
    return run


def _restore(run: Run, saved: Checkpoint, data: DataSet, trainer: Trainer) -> None:
    """Puts a checkpoint into the trainer.

    Raises:
        LabError: the run has gone further than now asked, has other data, or its checkpoint is not one that
            it can have saved. The run is left as it is.
    """
    state = saved.state
    try:
        if state.get("data_sha256", data.sha256) != data.sha256:
            run.refuse(
                f"{data.name} is not what it was when the run began. Put the data back, or start another run "
                "with --out."
            )
        taken = state["trainer"]["step"]
        if taken > trainer.total_steps:
            run.refuse(
                f"has taken {taken:,} steps, and epochs and max_steps now allow {trainer.total_steps:,}. Set "
                "as many or more."
            )
        files = [path.stem for path in saved.path.glob("*.safetensors")]
        trainer.restore({name: saved.tensors(name) for name in files}, state["trainer"])
        counts = (taken, state["metrics_bytes"], state["without_better"], state.get("evaluated_at", 0))
        numbers = (state["elapsed_seconds"], state["best"] or 0.0, state.get("best_loss") or 0.0)
        whole = all(isinstance(n, int) and 0 <= n < 2**62 for n in counts)
        if not whole or not all(map(math.isfinite, numbers)):
            raise ValueError("state.json has impossible numbers")
    except UNFIT as error:
        run.refuse(
            f"its checkpoint {saved.path.name} is not one that this run saved ({first_line(error)[:120]}). "
            "Delete it to go back to the one before, or restore it from a copy."
        )


def _moved(before: Mapping[str, Any], compute: Compute) -> str:
    """A line, where a run goes on with another device, number format or number of threads."""
    now = compute.describe()
    changed = [
        f"{key} {before.get(key)}"
        for key in ("device", "precision", "threads")
        if before.get(key) != now[key]
    ]
    if not changed:
        return ""
    return f"note    so far it computed with {', '.join(changed)}: no longer bit for bit\n"


class _Session:
    """One process's share of a run."""

    def __init__(
        self,
        settings: SupervisedRun,
        compute: Compute,
        data: DataSet,
        trainer: Trainer,
        held_out: Batches,
        run: Run,
        tracker: Tracker,
        moved: str = "",
    ) -> None:
        self.settings, self.compute, self.data = settings, compute, data
        self.trainer, self.objective, self.held_out = trainer, trainer.objective, held_out
        self.run, self.tracker, self.moved = run, tracker, moved
        self.best: float | None = None
        self.best_loss: float | None = None
        """Held-out loss where the best is, which decides between evaluations with equal headlines."""
        self.without_better = self.evaluated_at = 0
        self.broken_off = False
        """A stop fell within the evaluation of this step, which is to be made again."""
        self.seconds_before = 0.0
        self.numbers: dict[str, float] = {}
        """Of the last evaluation in this process."""
        self.first_weights = trainer.sums_of_weights()
        """Of the weights the run began with."""
        self.began = time.monotonic()

    # ---- the loop ----

    def run_to_end(self, redraw: bool) -> None:
        """Trains and draws; with `redraw` it samples otherwise than before, and is judged anew."""
        trainer = self.trainer
        with StopRequest() as stop, Progress(trainer.total_steps, trainer.step) as progress:
            progress.say(self._headline())
            try:
                if self.broken_off:
                    self._after_step(stop, progress)
                over = trainer.step == trainer.total_steps or bool(self._done())
                if over and self.evaluated_at < trainer.step:  # it was stopped where it is now to end
                    self._log(progress)
                    redraw = True
                if over and redraw:
                    self._evaluate(stop, progress)
                    self._save()
                for step in () if self._done() else trainer.iterate():
                    self._after_step(stop, progress)
                    progress.update(step)
                    if self._done():
                        break
                self._finished(stop, progress)
            except Stopped:
                self._interrupted(stop, progress)

    def _after_step(self, stop: StopRequest, progress: Progress) -> None:
        """Does what is due behind a step.

        Raises:
            Stopped: a stop was requested before the last step was done with; a checkpoint is there.
        """
        s, step, per_epoch = self.settings, self.trainer.step, self.trainer.steps_per_epoch
        last = step >= self.trainer.total_steps
        logged = last or step % s.log_every_steps == 0
        if logged and not self.broken_off:
            self._log(progress)
        if last or self.broken_off or _due(step, s.eval.every_epochs, per_epoch):
            self._evaluate(stop, progress)
            last = last or bool(self._done())
        if last and not logged:
            self._log(progress)
        if last or stop or _due(step, s.checkpoint.every_epochs, per_epoch):
            self._save()
        if stop and not last:
            raise Stopped

    def _done(self) -> str:
        """Why there is nothing more to do before the last step, else "": it is good, or gets no better."""
        e, best = self.settings.eval, self.best
        if e.patience is not None and self.without_better >= e.patience:
            return f"no better in eval.patience = {e.patience} evaluations"
        if best is not None and e.stop_at is not None and not self._better(e.stop_at, best):
            return f"eval.stop_at = {e.stop_at:g} is reached"
        return ""

    def _better(self, a: float, b: float) -> bool:
        return a > b if self.objective.higher_is_better else a < b

    def _headline(self) -> str:
        s, t = self.settings, self.trainer
        verb = "resuming at" if t.step else "training from"
        n_parameters = sum(p.numel() for module in t.bare.values() for p in module.parameters())
        return (
            f"{self.data.name} with {s.model.backbone} ({n_parameters:,} parameters): {verb} step {t.step:,} "
            f"of {t.total_steps:,}, {t.steps_per_epoch:,} an epoch\n"
            + "".join(
                f"note    {note}\n"
                for note in (*self.data.notes, *self.data.choice, *self.data.coverage, *self.data.shared)
            )
            + f"run     {self.run.folder}\n"
            f"{self.compute.line()}\n"
            + self.moved
            + f"W&B     {self.tracker.mode} ({self.run.info['wandb']['why']})"
        )

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _log(self, progress: Progress) -> None:
        trainer = self.trainer
        row: dict[str, Any] = {f"train/{name}": value for name, value in trainer.means.take().items()}
        self._require_finite(row)
        row["train/learning_rate"] = trainer.learning_rate
        row["epoch"] = trainer.step / trainer.steps_per_epoch
        row["samples"] = trainer.samples
        row["time/elapsed_seconds"] = round(self._elapsed(), 1)
        self.tracker.log(trainer.step, row)
        progress.update(trainer.step, f"loss {row['train/loss']:.4g}" if "train/loss" in row else None)

    def _evaluate(self, stop: StopRequest, progress: Progress) -> None:
        """Evaluates.

        Raises:
            Stopped: a stop was requested; a checkpoint is there, which says that this is to be made again.
        """
        objective, step = self.objective, self.trainer.step
        try:
            with stop.at_once(), self.trainer.judged() as players:
                numbers = objective.evaluate(players, self.held_out.epoch(0))
        except Stopped:
            self.broken_off = True
            self._save()
            raise
        self.broken_off = False
        self._require_finite(numbers)
        self.numbers = numbers
        self.tracker.log(step, {f"eval/{name}": value for name, value in numbers.items()})
        score = numbers[objective.headline]
        better = self.best is None or self._better(score, self.best)
        self.without_better = 0 if better else self.without_better + (step > self.evaluated_at)
        self.evaluated_at = step
        # BLEU may be 0 for long, and accuracies of few samples are often equal: then the loss tells.
        loss = numbers.get("loss")
        tied = (
            score == self.best and loss is not None and self.best_loss is not None and loss < self.best_loss
        )
        if better or tied:
            self._require_finite_weights()
            self.best, self.best_loss = score, loss
            weights = self.trainer.weights(judged=True)
            state = {
                "step": step,
                **numbers,
                "spec": objective.spec(),
                "data_sha256": self.data.sha256,
                "train_sha256": self.data.train_sha256,
            }
            path = checkpoint.save(self.run.checkpoints, "best", {"model": weights}, state)
            self.tracker.log_checkpoint(path, "best")
        self.run.summarize(
            **{f"eval/{name}": value for name, value in numbers.items()},
            **{f"eval/best_{objective.headline}": self.best, "global_step": step},
        )
        progress.say(
            f"{step:>10,}  evaluation "
            + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            + ("  (best so far)" if better or tied else "")
            + f"  {duration(self._elapsed())}"
        )

    def _require_finite(self, numbers: Mapping[str, float]) -> None:
        """Raises for a loss or verdict that is no number: nothing good follows, and no checkpoint is made."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise LabError(
                    f"{self.run.folder}: diverged: {name} is {value} after step {self.trainer.step:,}. Lower "
                    "optimizer.learning_rate, raise optimizer.warmup_steps or set optimizer.max_grad_norm."
                )

    def _require_finite_weights(self) -> None:
        """Likewise for weights, before they are kept."""
        if name := self.trainer.not_finite():
            self._require_finite({f"a weight of the {name}": math.nan})

    def _warnings(self) -> list[str]:
        """What makes the result worth nothing, though the run came to its end, a sentence each."""
        trainer, o = self.trainer, self.settings.optimizer
        if self.settings.name == smoke.NAME:  # of a few steps nothing is expected
            return []
        found = self.objective.warnings(self.numbers) if self.numbers else []
        if trainer.sums_of_weights() == self.first_weights:
            found.append(
                f"no weight has changed in {trainer.step:,} steps: optimizer.learning_rate = "
                f"{o.learning_rate:g} is too small"
            )
        if trainer.step < o.warmup_steps:
            found.append(
                f"the learning rate was still rising at the end, after {trainer.step:,} of "
                f"optimizer.warmup_steps = {o.warmup_steps:,}"
            )
        losses = [row["train/loss"] for row in read_metrics(self.run.metrics) if "train/loss" in row]
        if len(trainer.bare) == 1 and len(losses) > 1:  # of several players one may win
            few = min(3, len(losses) // 2)
            first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
            if last > first + 0.05 * abs(first):
                found.append(f"the training loss rose from {first:.4g} to {last:.4g}")
        return found

    # ---- saving ----

    def _save(self) -> None:
        self._require_finite_weights()
        tensors, state = self.trainer.capture()
        state = {
            "trainer": state,
            "metrics_bytes": self.tracker.sync(),
            "best": self.best,
            "best_loss": self.best_loss,
            "without_better": self.without_better,
            "evaluated_at": self.evaluated_at,
            "broken_off": self.broken_off,
            "data_sha256": self.data.sha256,
            "train_sha256": self.data.train_sha256,
            "elapsed_seconds": self._elapsed(),
            "first_weights": self.first_weights,
            "spec": self.objective.spec(),
        }
        root, name = self.run.checkpoints, checkpoint.step_name(self.trainer.step)
        path = checkpoint.save(root, name, tensors, state)
        checkpoint.point(root, "latest", name)
        self.tracker.log_checkpoint(path)
        checkpoint.prune(root, self.settings.checkpoint.keep)

    def restore(self, saved: Checkpoint) -> None:
        """Goes back to a checkpoint that the trainer was put back to."""
        self.best, self.without_better = saved.state["best"], saved.state["without_better"]
        self.best_loss = saved.state.get("best_loss")
        self.evaluated_at = saved.state.get("evaluated_at", self.trainer.step)
        self.broken_off = saved.state.get("broken_off", False)
        self.seconds_before = saved.state["elapsed_seconds"]
        self.first_weights = saved.state.get("first_weights", [])

    # ---- ends ----

    def _interrupted(self, stop: StopRequest, progress: Progress) -> None:
        self.run.end("interrupted", reason=stop.signal_name)
        progress.say(f"{stop.signal_name}: saved. Continue with: lab train {self.run.folder} --resume")

    def _curve(self) -> Iterator[tuple[str, Path]]:
        """The losses of training and held-out data, and the headline, step by step."""
        headline = self.objective.headline
        path = self.run.media / "learning_curve.png"
        yield "learning_curve", figures.learning_curve(path, read_metrics(self.run.metrics), headline)

    def _finished(self, stop: StopRequest, progress: Progress) -> None:
        """Draws, and says how it ended; a stop within leaves that to the next session."""
        with (
            stop.at_once(),
            self.trainer.judged() as players,
            explain_write_errors(str(self.run.media), ROOM),
        ):
            self.run.media.mkdir(exist_ok=True)
            batches = self.held_out.epoch(0)
            drawn = [*self._curve(), *self.objective.draw(players, batches, self.run.media)]
        for name, path in drawn:
            if path.suffix == ".png":
                self.tracker.log_media(self.trainer.step, f"media/{name}", path)
        warnings = self._warnings()
        self.run.summarize(
            **{"time/elapsed_seconds": round(self._elapsed(), 1)},
            **({"warnings": warnings} if warnings else {}),
        )
        self.run.end("finished")
        early = f" at step {self.trainer.step:,}: {self._done()}" if self._done() else ""
        progress.say(
            f"finished in {duration(self._elapsed())}{early}. Figures: {self.run.media}"
            + "".join(f"\nwarning {warning}" for warning in warnings)
        )


def _due(step: int, every_epochs: float, steps_per_epoch: int) -> bool:
    """Whether a multiple of so many epochs ends with this step."""
    interval = max(1, round(every_epochs * steps_per_epoch))
    return step % interval == 0
