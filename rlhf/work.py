"""What each stage does; imports torch, so `rlhf.pipeline` imports this only when a stage begins."""

import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import checkpoint, config
from lab.device import Compute, resolve
from lab.errors import LabError
from lab.files import write_json
from lab.interrupt import StopRequest
from lab.progress import Progress, duration
from lab.run import Run
from lab.seeding import seed_everything
from lab.tracking import Tracker
from rlhf import labelers, sources, splits
from rlhf.config import RLHFRun
from rlhf.pipeline import JOB_TYPES, Recipe, code_of, evaluator, read_settings, recipe_folder
from rlhf.sharing import RESULTS, fingerprint
from rlhf.stage_keys import relevant


def run_stage(recipe: Recipe, stage: str, mode: str, why: str, counts: dict[str, dict[str, Any]]) -> bool:
    """Runs or resumes one stage; returns whether it was finished, and not interrupted.

    Args:
        mode, why: of tracking.
        counts: what the dry pass counted in the stage's data, for its summary.
    """
    settings, folder = recipe.settings, recipe.folder / stage
    begun = recipe.owns(stage)
    run = Run.resume(folder) if begun else None
    compute = resolve(settings.device, before=run.info["compute"] if run else None)
    seed_everything(settings.seed)
    if run is None:
        values = config.to_dict(settings)
        run = Run.create(
            folder,
            config=values,
            pipeline="rlhf",
            job_type=JOB_TYPES[stage],
            name=f"{settings.run_name}__{stage}",
            group=settings.run_name,
            x_axis="optimizer_steps",
            compute=compute.describe(),
            parents=_parents(recipe, stage),
        )
        run.update(stage=stage, stage_config=relevant(settings, stage))
    else:
        latest = checkpoint.find(run.checkpoints)
        saved = checkpoint.load(latest).state if latest else {"metrics_bytes": 0}
        run.continue_from(saved["metrics_bytes"])
    run.summarize(data=counts)
    from rlhf.stage import Stage, quiet_transformers

    t, began = settings.tracking, time.monotonic()
    with run.recording_its_end():
        tracker = run.tracker(mode, why, t.project, t.entity, t.tags)
        exit_code = 1
        try:
            with StopRequest() as stop:
                total, window, every = _length(recipe, stage)
                asks = stage == "collect" and collector(settings).interactive
                with Progress(total, bar=not asks) as progress, quiet_transformers(progress.say):
                    progress.say(
                        f"{stage:8} {'resuming' if begun else 'starting'} in {folder}\n"
                        f"         {compute.device}, {compute.precision}, {compute.threads} threads; "
                        f"W&B {tracker.mode} ({run.info['wandb']['why']})"
                    )
                    for parent in run.info["parents"]:
                        if "stage" in parent:
                            tracker.use_artifact(f"{run.info['group']}-{parent['stage']}", parent["sha256"])
                    handle = Stage(run, tracker, progress, stop, settings.keep_checkpoints, every, window)
                    done = _STAGES[stage](recipe, handle, compute)
                    took = duration(time.monotonic() - began)
                    if done:
                        _record(run, tracker, folder / RESULTS.get(stage, "model"))
                        run.end("finished")
                        recipe.free(stage)
                        progress.say(f"{stage:8} finished in {took}: {folder}")
                        exit_code = 0
                    else:
                        run.end("interrupted", reason=stop.signal_name or "stopped")
                        progress.say(
                            f"{stage:8} interrupted after {took}, saved. The same command continues it."
                        )
                        exit_code = 255
        finally:
            tracker.finish(exit_code, run.info["summary"])
    return done


def _parents(recipe: Recipe, stage: str) -> list[dict[str, str]]:
    """What a stage starts from: other stages' results and data, each by its hash."""
    parents = []
    for name in recipe.parents(stage):
        info = recipe.info(name)
        parents.append({"stage": name, "run_id": info["id"], **info["summary"]["result"]})
    d = recipe.settings.data
    asked = d.prompts or d.demonstrations
    named = {
        "sft": [d.demonstrations],
        "collect": [asked],
        "reward": [d.comparisons, d.demonstrations],  # it is centred on these
        "ppo": [asked, *([d.demonstrations] if recipe.settings.ppo.ptx_coef else [])],
        "eval": [d.eval_prompts or asked],
    }
    used = [source for source in dict.fromkeys(named.get(stage, [])) if source != "collect"]
    code = code_of(recipe.settings, stage)
    parents += [{"data": one, "path": one, "sha256": sources.sha256(one)} for one in used]
    return [*parents, *([code] if code else [])]


def _record(run: Run, tracker: Tracker, result: Path) -> None:
    sha256 = fingerprint(result)
    run.summarize(result={"path": str(result), "sha256": sha256})
    kind = "model" if result.is_dir() else "dataset"
    tracker.log_artifact(f"{run.info['group']}-{result.parent.name}", kind, result, str(sha256))


def _length(recipe: Recipe, stage: str) -> tuple[int, int, int]:
    """Steps of a stage, how many belong together, and steps between checkpoints; 0 where not known yet."""
    s = recipe.settings
    if stage == "ppo":
        window = int(s.ppo.epochs) * (s.ppo.rollout_size // s.ppo.batch_size)
        return s.ppo.rollouts * window, window, s.ppo.save_every_steps
    every = {"sft": s.sft.save_every_steps, "reward": s.reward.save_every_steps}.get(stage, 1)
    return 0, 1, every


def collector(settings: RLHFRun) -> labelers.Labeler:
    """Who ranks what is collected."""
    return labelers.make(settings.collect.labeler, "collect.labeler")


def watcher(settings: RLHFRun) -> labelers.Scorer | None:
    """Who evaluates, if that is a program which gives scores: PPO asks it, too, only to be watched."""
    try:
        found = evaluator(settings)
    except LabError:  # nobody is named; the evaluation needs one, PPO does not
        return None
    return found if isinstance(found, labelers.Scorer) else None


# ---- the stages ----


def _sft(recipe: Recipe, stage: Any, compute: Compute) -> bool:
    from rlhf.sft import train_sft

    settings = recipe.settings
    rows, held_out = splits.demonstrations(settings)
    converses = splits.converses(settings)
    trained = train_sft(settings, stage, compute, rows, held_out, converses)
    return _keep(recipe.of("sft"), trained)


def _collect(recipe: Recipe, stage: Any, compute: Compute) -> bool:
    from rlhf import models
    from rlhf.collect import collect
    from rlhf.evaluate import BIASED, draw_samples
    from rlhf.health import warn
    from rlhf.tokenization import fitting_prompts, rendered, room_for_prompts

    settings, c = recipe.settings, recipe.settings.collect
    model, tokenizer = models.open_policy(recipe.result("sft"))
    model.to(compute.device).eval()
    source = settings.data.prompts or settings.data.demonstrations
    found, too_long = fitting_prompts(
        rendered("prompts", splits.training_prompts(settings), tokenizer, settings.data),
        tokenizer,
        settings.data,
        source,
    )
    chosen = splits.some(found["prompt"][:], c.max_prompts, source)
    asked = [prompt for prompt in chosen for _ in range(c.rounds)]

    def sample(batch: list[Any], k: int, seeds: list[int]) -> list[list[labelers.Answer]]:
        drawn = draw_samples(
            *(model, tokenizer, batch, k, settings.data.max_new_tokens, seeds[0], c.temperature),
            max_prompt=room_for_prompts(settings.data),
        )
        return [drawn.answers[i : i + k] for i in range(0, len(drawn.answers), k)]

    labeler = collector(settings)
    summary = collect(
        stage.run.folder,
        asked,
        sample,
        labeler,
        k=c.answers,
        seed=settings.seed,
        batch_size=16,
        progress=stage.progress,
    )
    warnings = []
    if summary.earlier_won is not None and abs(summary.earlier_won - 0.5) > BIASED and summary.pairs >= 30:
        warnings.append(
            f"the answer shown earlier won {summary.earlier_won:.0%} of {summary.pairs} pairs: the labeler "
            "goes by the order"
        )
    if summary.ties > summary.pairs:
        warnings.append(f"more pairs of answers are ties ({summary.ties}) than are not ({summary.pairs})")
    stage.run.summarize(
        too_long=too_long,
        prompts=summary.prompts,
        pairs=summary.pairs,
        ties=summary.ties,
        skipped=summary.skipped,
        earlier_won=summary.earlier_won,
    )
    stage.tracker.log(summary.prompts, {"collect/prompts": summary.prompts, "collect/pairs": summary.pairs})
    stage.progress.say(
        f"         {summary.pairs} pairs from {summary.prompts} prompts, {summary.ties} ties, "
        f"{summary.skipped} skipped"
    )
    if summary.stopped:
        return False
    warn(stage, *warnings)
    preferred = summary.prompts - summary.all_tied - summary.skipped
    if preferred < 2:  # one to learn from, another to measure by
        raise LabError(
            f"collect: of {summary.prompts} prompts {preferred} have an answer that {labeler.name} "
            "prefers to another, and a reward model needs two. Ask more (collect.max_prompts, "
            "collect.rounds, collect.answers) or another labeler, with --from collect."
        )
    return True


def _reward(recipe: Recipe, stage: Any, compute: Compute) -> bool:
    from rlhf.reward import train_reward

    settings = recipe.settings
    collected = settings.data.comparisons == "collect"
    source = str(recipe.result("collect")) if collected else settings.data.comparisons
    compared = splits.load(settings, "comparisons", source).rows
    rows, _ = splits.demonstrations(settings)
    policy = recipe.result("sft")
    both = splits.training_comparisons(settings, compared)
    return _keep(recipe.of("reward"), train_reward(settings, stage, compute, *both, rows, policy))


def _ppo(recipe: Recipe, stage: Any, compute: Compute) -> bool:
    from rlhf.evaluate import overoptimization_plot
    from rlhf.policy_optimization import train_policy

    settings = recipe.settings
    rows, _ = splits.demonstrations(settings)
    asked = splits.training_prompts(settings)
    policy, reward = recipe.result("sft"), recipe.result("reward")
    trained = train_policy(settings, stage, compute, asked, rows, policy, reward, watcher(settings))
    plot = stage.run.media / "overoptimization.png"
    if overoptimization_plot(stage.run.metrics, plot, stage.run.info["summary"].get("sft_answers", {})):
        stage.tracker.log_media(0, "media/overoptimization", plot)
    return _keep(recipe.of("ppo"), trained)


def _eval(recipe: Recipe, stage: Any, compute: Compute) -> bool:
    result = evaluate_recipe(recipe, compute, {}, stage.run.media / "samples.jsonl")
    write_json(stage.run.folder / "evaluation.json", result)
    policy = result["policy"]
    numbers = {f"eval/{key}": policy[key] for key in policy if key.startswith(("kl_nats", "length_ratio"))}
    if rate := policy.get("win_rate"):
        numbers |= {
            "eval/win_rate": rate["mean"],
            "eval/win_rate_low": rate["low"],
            "eval/win_rate_high": rate["high"],
            "eval/win_rate_n": result["prompts"] * result["samples_per_prompt"],
            "eval/tie_rate": rate["ties"],
        }
    stage.tracker.log(0, numbers)
    stage.run.summarize(**numbers, **_warned(result["warnings"]))
    from rlhf.evaluate import describe_for_people

    stage.progress.say("\n" + describe_for_people(result) + "\n")
    return True


def _warned(warnings: list[str]) -> dict[str, list[str]]:
    return {"warnings": warnings} if warnings else {}


def _keep(folder: Path, trained: tuple[Any, Any] | None) -> bool:
    """Writes a trained model and its tokenizer to model/, whole or not at all; whether there is one."""
    if trained is None:
        return False
    from rlhf import models

    with checkpoint.written(folder, "model") as aside:
        models.save(*trained, aside)
        (aside / "state.json").write_text(json.dumps({"stage": folder.name}))
    return True


_STAGES = {"sft": _sft, "collect": _collect, "reward": _reward, "ppo": _ppo, "eval": _eval}


def evaluate_recipe(
    recipe: Recipe,
    compute: Compute,
    chosen: dict[str, Any],
    samples: Path | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The PPO policy against the SFT policy, on unseen prompts.

    Args:
        recipe: whose policies; its seed decides which prompts are unseen.
        compute: on what.
        chosen: replaces keys of the eval config.
        samples: where a table of answers goes.
        seed: of the sampling; None takes the recipe's.
    """
    from rlhf import models
    from rlhf.evaluate import compare, write_rows
    from rlhf.scoring import RewardScorer
    from rlhf.tokenization import fitting_prompts, rendered, room_for_prompts

    settings = recipe.settings
    e = replace(settings.eval, **chosen)
    unseen, trained_on = splits.unseen_prompts(settings)
    policy, tokenizer = models.open_policy(recipe.result("ppo"))
    d = settings.data
    unseen = rendered("prompts", unseen, tokenizer, d)
    source = d.eval_prompts or d.prompts or d.demonstrations
    unseen, too_long = fitting_prompts(unseen, tokenizer, d, source)
    baseline, _ = models.open_policy(recipe.result("sft"))
    reward_model, _ = models.open_reward(recipe.result("reward"))
    for model in (policy, baseline, reward_model):
        model.to(compute.device)
    result, rows = compare(
        policy,
        baseline,
        tokenizer,
        splits.some(unseen["prompt"][:], e.prompts, source),
        evaluator(settings),
        RewardScorer(reward_model, tokenizer),
        n=e.samples,
        best_of=e.best_of,
        max_new_tokens=settings.data.max_new_tokens,
        seed=settings.seed if seed is None else seed,
        max_prompt=room_for_prompts(settings.data),
    )
    result["prompts_unseen"] = len(unseen)
    if too_long:
        result["prompts_too_long"] = too_long
    if trained_on:
        result["prompts_trained_on"] = trained_on
        result["warnings"].append(f"{trained_on} prompts were left out, as a stage trains on them")
    if samples is not None:
        write_rows(samples, rows)
    return result


def evaluate_run(folder: Path, options: Namespace) -> dict[str, Any]:
    """`lab evaluate` of a recipe's folder, or of one of its stages'."""
    root = recipe_folder(folder)
    if not (root / "ppo" / "run.json").exists():
        raise LabError(f"{folder}: its recipe has no PPO stage yet. Run it: lab rlhf CONFIG --stage ppo.")
    settings = read_settings(root)
    compute = resolve(settings.device)
    chosen = {
        key: getattr(options, key) for key in ("prompts", "samples") if getattr(options, key) is not None
    }
    recipe = Recipe.open(settings, root)
    result = evaluate_recipe(recipe, compute, chosen, seed=options.seed)
    if changed := _changed_since(recipe):
        result["warnings"].append(
            f"{' and '.join(changed)} held other rows when the stages were trained: prompts that count as "
            "unseen may have been trained on"
        )
    return result


def _changed_since(recipe: Recipe) -> list[str]:
    """The data that are not those which a stage was trained on."""
    known = {
        parent["data"]: parent["sha256"]
        for stage in ("sft", "reward", "ppo")
        for parent in recipe.info(stage)["parents"]
        if "data" in parent
    }
    return [source for source, sha256 in known.items() if sources.sha256(source) != sha256]
