"""The stages in order, each a run folder that names the weights and the data it started from.

runs/reviews__ppo__s0/
  sft/  collect/  reward/  ppo/  eval/      each with run.json, metrics.jsonl, checkpoints/, media/
    model/                                  what a stage that trains leaves: a plain transformers folder
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import checkpoint, config, tracking
from lab.device import check_without_torch, quiet_threads
from lab.errors import LabError, did_you_mean
from lab.files import check_contained
from lab.pipeline import refuse_options
from lab.run import Run, folder_name
from rlhf import labelers, preflight, sources
from rlhf.config import STAGES, RLHFRun

# What each stage depends on in the config, and which stages' results it starts from.
SECTIONS = {
    "sft": ("model", "sft"),
    "collect": ("model", "collect"),
    "reward": ("model", "reward"),
    "ppo": ("model", "ppo"),
    "eval": ("eval", "collect.labeler"),
}
PARENTS = {
    "sft": (),
    "collect": ("sft",),
    "reward": ("sft", "collect"),
    "ppo": ("sft", "reward"),
    "eval": ("sft", "reward", "ppo"),
}
JOB_TYPES = {"sft": "sft", "collect": "collect", "reward": "rm", "ppo": "ppo", "eval": "eval"}
RESULTS = {"collect": "rankings.jsonl", "eval": "evaluation.json"}
"""What a stage leaves; all others leave model/."""

SMOKE: dict[str, Any] = {
    "name": "smoke",
    "model": {
        "path": "labgpt",
        "labgpt": {"width": 16, "n_layer": 1, "n_head": 2, "mlp_width": 32},
        "tokenizer": "",
    },
    "data": {
        **{"demonstrations": "reviews", "comparisons": "collect", "prompts": "", "eval_prompts": ""},
        **{"max_length": 128, "max_new_tokens": 16},
    },
    "sft": {"epochs": 0.1, "batch_size": 32, "micro_batch_size": 0},
    "collect": {"labeler": {"name": "vader"}, "answers": 4, "rounds": 1, "max_prompts": 24},
    "reward": {"epochs": 1.0, "batch_size": 8, "micro_batch_size": 0},
    "ppo": {"rollouts": 2, "rollout_size": 16, "batch_size": 8, "micro_batch_size": 4, "epochs": 1.0},
    "eval": {"prompts": 4, "samples": 2, "best_of": 2},
    "tracking": {"wandb": "disabled"},
}
"""What `--smoke` sets: every stage of a config in seconds, on a model and data of our own."""


@dataclass(frozen=True)
class Recipe:
    """One run of the recipe: its config and its folder."""

    settings: RLHFRun
    folder: Path

    @property
    def stages(self) -> list[str]:
        """The stages this config has."""
        collects = self.settings.data.comparisons == "collect"
        return [stage for stage in STAGES if stage != "collect" or collects]

    def of(self, stage: str) -> Path:
        """A stage's run folder."""
        return self.folder / stage

    def parents(self, stage: str) -> list[str]:
        """The stages this stage starts from."""
        return [parent for parent in PARENTS[stage] if parent in self.stages]

    def relevant(self, stage: str) -> dict[str, Any]:
        """The part of the config that decides what a stage computes."""
        values = config.to_dict(self.settings)
        kept: dict[str, Any] = {"seed": values["seed"], "data": values["data"]}
        for key in SECTIONS[stage]:
            group, _, name = key.partition(".")
            kept[group] = {name: values[group][name]} if name else values[group]
            kept[group].pop("save_every_steps", None)  # changes nothing that is computed
        return kept

    def state(self, stage: str) -> str:
        """The stage's state, "" if it was never begun."""
        folder = self.of(stage)
        return Run.open(folder).info["state"] if (folder / "run.json").exists() else ""

    def result(self, stage: str) -> Path:
        """The folder or file a finished stage left, checked against its record.

        Raises:
            LabError: it is not finished, or what it left is missing or altered.
        """
        folder = self.of(stage)
        if self.state(stage) != "finished":
            state = self.state(stage) or "not begun"
            raise LabError(
                f"{folder}: stage {stage} is {state}, and later stages start from it. "
                f"Run it first: lab rlhf CONFIG --stage {stage}."
            )
        recorded = Run.open(folder).info["summary"].get("result", {})
        path = folder / RESULTS.get(stage, "model")
        actual = fingerprint(path)
        if recorded.get("sha256") != actual:
            what = "missing" if actual is None else "altered since it was written"
            raise LabError(f"{path}: {what}. Restore it, or make it again with --from {stage}.")
        return path


def fingerprint(path: Path) -> str | None:
    """SHA-256 of a stage's result, None if it is not there; a model's files are all verified."""
    from lab.files import sha256_file

    if path.is_file():
        return sha256_file(path)
    if not (path / "manifest.json").exists():
        return None
    try:
        checkpoint.load(path)
    except LabError:
        return "altered"
    return sha256_file(path / "manifest.json")


class RLHFPipeline:
    """Demonstrations, reward model, PPO."""

    def config_class(self, values: Mapping[str, Any], source_of: Callable[[str], str]) -> type:
        return RLHFRun

    def smoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        merged = config.merge(values, SMOKE)
        merged["model"]["labgpt"] = SMOKE["model"]["labgpt"]
        return {**merged, "collect": SMOKE["collect"]}

    def train(self, config_: RLHFRun, folder: Path | None, resume: bool) -> None:
        """All stages that are not finished yet; `lab rlhf` has more options."""
        run_stages(config_, folder)

    def evaluate(self, folder: Path, options: Namespace) -> dict[str, Any]:
        refuse_options(options, ("episodes", "epsilon"), "is for games; this run is of a language model")
        refuse_options(options, ("checkpoint",), "is for other runs; what the stages left is evaluated")
        refuse_options(options, ("part",), "is for models that learned from a data set; this run has prompts")
        quiet_threads()
        from rlhf.work import evaluate_run

        return evaluate_run(folder, options)

    def describe_evaluation(self, result: Mapping[str, Any]) -> str:
        from rlhf.evaluate import describe_for_people

        return describe_for_people(result)

    def play(self, folder: Path, options: Namespace) -> dict[str, Any]:
        raise LabError(f"{folder}: is a language model. Talk to it: lab chat {folder}")

    def export(self, folder: Path, options: Namespace) -> Path:
        raise LabError(f"{folder}: its model/ already is a plain transformers folder.")


def run_stages(
    settings: RLHFRun, folder: Path | None, only: str | None = None, restart_from: str | None = None
) -> None:
    """Runs the stages in order: finished ones are skipped, an interrupted one is resumed.

    Args:
        settings: the config.
        folder: the recipe's folder; None takes runs/<name>.
        only: run this stage alone.
        restart_from: put this stage and all after it aside and run them anew.

    Raises:
        LabError: anything the user can mend; found before a stage begins where possible.
    """
    recipe = Recipe(settings, folder or Path("runs") / folder_name(settings.run_name))
    for name in (only, restart_from):
        if name is not None and name not in recipe.stages:
            raise LabError(
                f"command line: no stage {name!r} in this config.{did_you_mean(name, recipe.stages)} "
                f"It has {', '.join(recipe.stages)}."
            )
    if recipe.folder.is_dir():
        check_contained(recipe.folder)
    check_without_torch(settings.device)
    again = STAGES[STAGES.index(restart_from) :] if restart_from else ()
    wanted = [only] if only else recipe.stages
    due = [stage for stage in wanted if stage in again or recipe.state(stage) != "finished"]
    if due:
        for parent in dict.fromkeys(parent for stage in due for parent in recipe.parents(stage)):
            if parent not in again and recipe.state(parent) == "finished":
                recipe.result(parent)
        _check_sources(recipe, due, restart_from)
    if restart_from:
        _put_aside(recipe, restart_from)
    _check_config(recipe)
    mode, why = tracking.choose_mode(settings.tracking.wandb)
    quiet_threads()
    from rlhf.work import run_stage

    for stage in [only] if only else recipe.stages:
        if recipe.state(stage) == "finished":
            recipe.result(stage)
            print(f"{stage:8} finished before: {recipe.of(stage)}")
            continue
        for parent in recipe.parents(stage):
            recipe.result(parent)
        if not run_stage(recipe, stage, mode, why):
            return


def _check_sources(recipe: Recipe, stages: Sequence[str], first_again: str | None) -> None:
    """Raises for anything that these stages cannot use, before anything is trained, moved or written."""
    if {"collect", "eval"} & set(stages):
        labelers.make(recipe.settings.collect.labeler, "collect.labeler")
    begins = first_again == "sft" or recipe.state("sft") != "finished"
    policy = None if begins else recipe.of("sft") / "model"
    for note in preflight.check(recipe.settings, stages, recipe.folder, policy):
        print(f"data     {note}", flush=True)


def _check_config(recipe: Recipe) -> None:
    """Raises if a stage was begun with another config, or from other weights than are there now."""
    for stage in recipe.stages:
        if not recipe.state(stage):
            continue
        info = Run.open(recipe.of(stage)).info
        changed = config.differences(info["stage_config"], recipe.relevant(stage))
        changed = {key: value for key, value in changed.items() if not key.startswith("name")}
        if changed:
            key, (was, now) = next(iter(changed.items()))
            raise LabError(
                f"{recipe.of(stage)}: was begun with {key} = {was!r}, now it is {now!r}. Set it back, choose "
                f"another folder with --out, or do this stage again with --from {stage}."
            )
        for parent in info["parents"]:
            if "data" in parent and sources.fingerprint(parent["data"])["sha256"] != parent["sha256"]:
                raise LabError(
                    f"{recipe.of(stage)}: was begun with other rows in {parent['data']} than there are now. "
                    f"Restore them, or do this stage again with --from {stage}."
                )
            code = labelers.code_of(recipe.settings.collect.labeler) if "code" in parent else None
            if code and code["sha256"] != parent["sha256"]:
                raise LabError(
                    f"{recipe.of(stage)}: was begun with other code in {parent['path']} than there is now. "
                    f"Restore it, or do this stage again with --from {stage}."
                )
            name = parent.get("stage")
            if name and recipe.state(name) == "finished":
                now = Run.open(recipe.of(name)).info["summary"]["result"]["sha256"]
                if now != parent["sha256"]:
                    raise LabError(
                        f"{recipe.of(stage)}: was made from an earlier {name} stage. "
                        f"Do it again with --from {stage}."
                    )


def _put_aside(recipe: Recipe, first: str) -> None:
    """Renames the folders of `first` and all later stages: nothing is deleted."""
    for stage in STAGES[STAGES.index(first) :]:
        folder = recipe.of(stage)
        if folder.exists():
            number = 1
            while (aside := folder.with_name(f"{stage}.old{number}")).exists():
                number += 1
            shutil.move(folder, aside)
            print(f"{stage:8} put aside: {aside}")


def find_model(folder: Path) -> Path:
    """The model of a run folder, of a recipe's folder (its last stage's), or a transformers folder itself.

    Raises:
        LabError: there is none.
    """
    if any((place / "run.json").exists() for place in (folder, folder / "sft", folder.parent)):
        check_contained(folder)  # a folder of transformers' cache is all links
    for place in (folder / "ppo" / "model", folder / "sft" / "model", folder / "model", folder):
        if (place / "config.json").exists():
            return place
    raise LabError(f"{folder}: no language model in it. Name a run of `lab rlhf` or a transformers folder.")


def read_settings(folder: Path) -> RLHFRun:
    """The config of a stage's or a recipe's folder."""
    check_contained(folder)
    for place in (folder, folder / "sft", folder.parent / "sft"):
        if (place / "run.json").exists():
            return config.build(RLHFRun, Run.open(place).info["config"], {}, str(place / "run.json"))
    raise LabError(f"{folder}: no run of `lab rlhf`: there is no run.json in it.")


PIPELINE = RLHFPipeline()
