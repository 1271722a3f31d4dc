"""The stages in order, each a run folder that names the weights and the data it started from.

runs/reviews__ppo__s0/
  sft/  collect/  reward/  ppo/  eval/      each with run.json, metrics.jsonl, checkpoints/, media/
    model/                                  what a stage that trains leaves: a plain transformers folder
  taken.json                                stages of another recipe that this one uses, see `rlhf.sharing`
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lab import checkpoint, config, locks, tracking
from lab.device import check_without_torch, quiet_threads
from lab.errors import LabError, did_you_mean
from lab.files import check_contained, explain_write_errors
from lab.pipeline import refuse_options
from lab.run import Run, folder_name
from rlhf import labelers, preflight, sharing, sources
from rlhf.config import STAGES, RLHFRun
from rlhf.sharing import RESULTS, fingerprint
from rlhf.stage_keys import relevant

# Which stages' results each stage starts from.
PARENTS = {
    "sft": (),
    "collect": ("sft",),
    "reward": ("sft", "collect"),
    "ppo": ("sft", "reward"),
    "eval": ("sft", "reward", "ppo"),
}
JOB_TYPES = {"sft": "sft", "collect": "collect", "reward": "rm", "ppo": "ppo", "eval": "eval"}

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
    "start_from": "",
    "tracking": {"wandb": "disabled"},
}
"""What `--smoke` sets: every stage of a config in seconds, on a model and data of our own."""


@dataclass(frozen=True)
class Recipe:
    """One run of the recipe: its config, its folder, and the stages it takes from another one."""

    settings: RLHFRun
    folder: Path
    taken: dict[str, sharing.Taken] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: RLHFRun, folder: Path) -> "Recipe":
        """A recipe as its folder has it."""
        return cls(settings, folder, sharing.read(folder).stages)

    @property
    def stages(self) -> list[str]:
        """The stages this config has."""
        collects = self.settings.data.comparisons == "collect"
        return [stage for stage in STAGES if stage != "collect" or collects]

    def owns(self, stage: str) -> bool:
        """Whether the recipe has begun this stage itself."""
        return (self.folder / stage / "run.json").exists()

    def of(self, stage: str) -> Path:
        """A stage's run folder: the recipe's own or, of a stage taken from another recipe, that one's."""
        own = self.folder / stage
        return self.taken[stage].folder if stage in self.taken and not self.owns(stage) else own

    def parents(self, stage: str) -> list[str]:
        """The stages this stage starts from."""
        return [parent for parent in PARENTS[stage] if parent in self.stages]

    def state(self, stage: str) -> str:
        """The stage's state, "" if it was never begun, "taken" if it is another recipe's."""
        if self.owns(stage):
            return Run.open(self.folder / stage).info["state"]
        return "taken" if stage in self.taken else ""

    def info(self, stage: str) -> dict[str, Any]:
        """The record of a stage that was begun, or taken from another recipe.

        Raises:
            LabError: it was taken, and is not there any more, or is another.
        """
        if self.owns(stage) or stage not in self.taken:
            return Run.open(self.folder / stage).info
        return sharing.info(self.folder, stage, self.taken[stage])

    def sha256(self, stage: str) -> str:
        """The recorded hash of what a finished stage left.

        Raises:
            LabError: the stage is not finished.
        """
        if self.state(stage) not in ("finished", "taken"):
            raise LabError(
                f"{self.of(stage)}: stage {stage} is {self.state(stage) or 'not begun'}, and later stages "
                f"start from it. Run it first: lab rlhf CONFIG --stage {stage}."
            )
        return str(self.info(stage)["summary"].get("result", {}).get("sha256"))

    def result(self, stage: str) -> Path:
        """The folder or file a finished stage left, checked against its record.

        Raises:
            LabError: it is not finished, or what it left is missing or altered.
        """
        recorded = self.sha256(stage)
        path = self.of(stage) / RESULTS.get(stage, "model")
        actual = fingerprint(path)
        if recorded != actual:
            what = "missing" if actual is None else "altered since it was written"
            raise LabError(f"{path}: {what}. Restore it, or make it again with --from {stage}.")
        return path

    def free(self, stage: str) -> None:
        """Removes the checkpoints of a finished stage of its own: nothing will resume from them."""
        checkpoint.clear(self.folder / stage / "checkpoints")


class RLHFPipeline:
    """Demonstrations, reward model, PPO."""

    def config_class(self, values: Mapping[str, Any], source_of: Callable[[str], str]) -> type:
        return RLHFRun

    def smoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        merged = config.merge(values, SMOKE)
        merged["model"]["labgpt"] = SMOKE["model"]["labgpt"]
        return {**merged, "collect": SMOKE["collect"], "eval": SMOKE["eval"]}

    def train(self, config_: RLHFRun, folder: Path | None, resume: bool) -> None:
        """All stages that are not finished yet; `lab rlhf` has more options."""
        run_stages(config_, folder)

    def evaluate(self, folder: Path, options: Namespace) -> dict[str, Any]:
        refuse_options(options, ("episodes", "epsilon"), "is for games; this run is of a language model")
        refuse_options(options, ("checkpoint",), "is for other runs; what the stages left is evaluated")
        refuse_options(
            options,
            ("part", "data.source"),
            "is for models that learned from a data set; this run has prompts",
        )
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

    Everything is checked first, of every stage that will run; only then is anything moved or written.

    Args:
        settings: the config.
        folder: the recipe's folder; None takes runs/<name>.
        only: run this stage alone.
        restart_from: put this stage and all after it aside and run them again.

    Raises:
        LabError: anything the user can mend; found before a stage begins where possible.
    """
    recipe = Recipe.open(settings, folder or Path("runs") / folder_name(settings.run_name))
    for name in (only, restart_from):
        if name is not None and name not in recipe.stages:
            raise LabError(
                f"command line: no stage {name!r} in this config.{did_you_mean(name, recipe.stages)} "
                f"It has {', '.join(recipe.stages)}."
            )
    if recipe.folder.is_dir():
        check_contained(recipe.folder)
    check_without_torch(settings.device)
    aside = STAGES[STAGES.index(restart_from) :] if restart_from else ()
    _check_free(recipe, aside)
    kept = [stage for stage in recipe.stages if stage not in aside]
    found = sharing.find(recipe, kept)
    recipe = replace(recipe, taken=found.stages)
    check = _Checks(recipe, kept)
    for stage in kept:
        check(stage)
    done = [stage for stage in kept if recipe.state(stage) in ("finished", "taken")]
    wanted = [only] if only else recipe.stages
    due = [stage for stage in wanted if stage not in done]
    for stage in wanted:
        for name in [stage] if stage in done else recipe.parents(stage):
            if only or name in done:
                recipe.result(name)
    counts = _check_sources(recipe, due, restart_from) if due else {}
    for line in found.said:
        print(line, flush=True)
    run: Callable[[str], bool] | None = None
    if due:
        run = _runner(recipe, counts)
        _put_aside(recipe, aside, found)
        sharing.write(recipe.folder, found)
    for stage in wanted:
        check(stage)
        if stage in done or run is None:
            print(f"{stage:8} finished before: {recipe.of(stage)}", flush=True)
            recipe.free(stage)
        elif not sharing.claim(recipe, stage, partial(run, stage)):
            return


def _runner(recipe: Recipe, counts: Mapping[str, Any]) -> Callable[[str], bool]:
    """What runs a stage; torch is loaded here, and a device that is not there refused."""
    quiet_threads()
    from lab.device import resolve
    from rlhf.work import run_stage

    resolve(recipe.settings.device)
    mode, why = tracking.choose_mode(recipe.settings.tracking.wandb)
    return lambda stage: run_stage(recipe, stage, mode, why, counts.get(stage, {}))


def _check_sources(
    recipe: Recipe, stages: Sequence[str], first_again: str | None
) -> dict[str, dict[str, Any]]:
    """What each stage will not use of its data, by reason; says so, too.

    Raises for anything that these stages cannot use, before anything is trained, moved or written.
    """
    _check_labelers(recipe.settings, stages)
    begins = first_again == "sft" or recipe.state("sft") not in ("finished", "taken")
    policy = None if begins else recipe.of("sft") / "model"
    found = preflight.check(recipe.settings, stages, recipe.folder, policy)
    for note in found.notes:
        print(f"data     {note}", flush=True)
    return {stage: found.of(recipe.settings, stage) for stage in stages}


def _check_labelers(settings: RLHFRun, stages: Sequence[str]) -> None:
    """Raises if the labelers of these stages are not there, or nobody is named who evaluates."""
    if "collect" in stages:
        labelers.make(settings.collect.labeler, "collect.labeler")
    if "eval" in stages:
        evaluator(settings)


def labeler_of(settings: RLHFRun, stage: str) -> dict[str, Any] | None:
    """The labeler that collect or eval asks, as the config names it; None: none, {}: nobody is named."""
    if stage == "collect" or (
        stage == "eval" and not settings.eval.labeler and settings.data.comparisons == "collect"
    ):
        return settings.collect.labeler
    none = stage != "eval" or settings.eval.labeler.get("name") == "none"
    return None if none else settings.eval.labeler


def code_of(settings: RLHFRun, stage: str) -> dict[str, str] | None:
    """The code of the user's that a stage's labeler runs, as records name it."""
    named = labeler_of(settings, stage)
    return labelers.code_of(named) if named else None


def evaluator(settings: RLHFRun) -> labelers.Labeler | None:
    """Who evaluates: eval.labeler, else whoever collected; None where it is {name: none}.

    Raises:
        LabError: nothing was collected and eval.labeler names nobody, or there is no such labeler.
    """
    named = labeler_of(settings, "eval")
    if named is None:
        return None
    if not named:
        raise LabError(
            "eval.labeler.name: is empty, and data.comparisons are not collected here, so nothing says who "
            f"evaluates. Name one of {', '.join(labelers.names())}, or none for an evaluation without a win "
            "rate, e.g. --eval.labeler='{name: none}'."
        )
    return labelers.make(named, "eval.labeler" if settings.eval.labeler else "collect.labeler")


class _Checks:
    """Raises if a stage was begun with another config, or from other weights or data than there are now.

    Args:
        recipe: whose stages.
        stages: those that are not to be done again.
    """

    def __init__(self, recipe: Recipe, stages: Sequence[str]) -> None:
        self.recipe, self.stages = recipe, stages

    def __call__(self, stage: str) -> None:
        recipe = self.recipe
        if stage not in self.stages or not recipe.state(stage):
            return
        info, unfinished = recipe.info(stage), recipe.state(stage) not in ("finished", "taken")
        before, now = (relevant(c, stage, watched=unfinished) for c in (info["config"], recipe.settings))
        if changed := config.differences(before, now):
            key, (was, is_now) = next(iter(changed.items()))
            raise LabError(
                f"{recipe.of(stage)}: was begun with {key} = {was!r}, now it is {is_now!r}. Set it back, "
                f"choose another folder with --out, or do this stage again with --from {stage}."
            )
        for parent in info["parents"]:
            source, name = parent.get("data"), parent.get("stage")
            if source and sources.sha256(source) != parent["sha256"]:
                raise LabError(
                    f"{recipe.of(stage)}: was begun with other rows in {source} than there are now. "
                    f"Restore them, or do this stage again with --from {stage}."
                )
            code = code_of(recipe.settings, stage) if "code" in parent else None
            if code and code["sha256"] != parent["sha256"]:
                raise LabError(
                    f"{recipe.of(stage)}: was begun with other code in {parent['path']} than there is now. "
                    f"Restore it, or do this stage again with --from {stage}."
                )
            made = name in self.stages and recipe.state(name) in ("finished", "taken")
            if made and recipe.sha256(name) != parent["sha256"]:
                raise LabError(
                    f"{recipe.of(stage)}: was made from an earlier {name} stage. "
                    f"Do it again with --from {stage}."
                )


def _check_free(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raises if another process runs one of the recipe's own stages just now."""
    for stage in stages:
        if locks.is_locked(recipe.folder / stage / ".lock"):
            raise LabError(
                f"{recipe.folder / stage}: is running just now, in another process. Wait for it, or stop it."
            )


def _put_aside(recipe: Recipe, stages: Sequence[str], found: sharing.Found) -> None:
    """Renames the folders of stages, all or none: nothing is deleted. They are not taken again."""
    moved: list[tuple[Path, Path]] = []
    with explain_write_errors(str(recipe.folder), "Nothing was moved. Choose another folder with --out."):
        try:
            for stage in stages:
                folder = recipe.folder / stage
                if folder.exists():
                    number = 1
                    while (aside := folder.with_name(f"{stage}.old{number}")).exists():
                        number += 1
                    folder.rename(aside)
                    moved.append((folder, aside))
        except BaseException:
            for folder, aside in reversed(moved):
                aside.rename(folder)
            raise
    shared = [stage for stage in stages if stage in sharing.SHARED and stage not in found.own]
    found.own += shared if recipe.settings.start_from else []
    for folder, aside in moved:
        print(f"{folder.name:8} put aside: {aside}", flush=True)


def find_model(folder: Path) -> Path:
    """The model of a run folder, of a recipe's folder (its last stage's), or transformers' or PEFT's folder.

    Raises:
        LabError: there is none, or it was taken from a recipe that is gone.
    """
    if any((place / "run.json").exists() for place in (folder, folder / "sft", folder.parent)):
        check_contained(folder)  # a folder of transformers' cache is all links
    places = [folder / "ppo" / "model", folder / "sft" / "model"]
    if "sft" in (taken := sharing.read(folder).stages) and not any(place.exists() for place in places):
        sharing.info(folder, "sft", taken["sft"])
        places.append(taken["sft"].folder / "model")
    for place in (*places, folder / "model", folder):
        if (place / "config.json").exists():
            return place
    if (folder / "adapter_config.json").exists():
        return folder
    raise LabError(f"{folder}: no language model in it. Name a run of `lab rlhf` or a transformers folder.")


def recipe_folder(folder: Path) -> Path:
    """The recipe's folder, of itself or of one of its stages."""
    return folder.parent if (folder / "run.json").exists() else folder


def read_settings(folder: Path) -> RLHFRun:
    """The config of a recipe's folder: its last stage's, for what only later stages read may have changed."""
    check_contained(folder)
    for stage in reversed(STAGES):
        place = folder / stage / "run.json"
        if place.exists():
            return config.build(RLHFRun, Run.open(place.parent).info["config"], {}, str(place))
    raise LabError(f"{folder}: no run of `lab rlhf`: none of its stages is in it.")


PIPELINE = RLHFPipeline()
