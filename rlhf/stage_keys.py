"""Which keys of the config each stage depends on: what it may share with another run, and what it refuses.

A stage of the same keys, the same data and the same parents computes the same. A test records what the
stages really read, so that the tables here stay true.
"""

from collections.abc import Mapping
from typing import Any

from lab import config
from lab.errors import LabError
from lab.tracking import scrub
from rlhf.config import RLHFRun

_ROWS = ("seed", "data.bad_rows", "data.too_long")
_LORA = ("model.lora_rank", "model.lora_alpha", "model.lora_targets")
_UNSEEN = ("data.prompts", "data.eval_prompts", "data.demonstrations", "data.comparisons", "reward.held_out")

READS: dict[str, tuple[str, ...]] = {
    "sft": (*_ROWS, "model.*", "data.demonstrations", "data.max_length", "sft.*"),
    "collect": (*_ROWS, "data.prompts", "data.max_length", "data.max_new_tokens", "collect.*"),
    "reward": (*_ROWS, *_LORA, "data.demonstrations", "data.comparisons", "data.max_length", "reward.*"),
    "ppo": (*_ROWS, *_LORA, "data.prompts", "data.max_length", "data.max_new_tokens", "ppo.*"),
    "eval": (*_ROWS, *_UNSEEN, "data.max_length", "data.max_new_tokens", "eval.*"),
}
"""GROUP.* are all keys of a group. The stages before it each stage knows by their results' hashes."""

CHANGES_NOTHING = ("save_every_steps",)
"""Keys of a stage's group that do not change what it computes. (Examples at once on the device do: rounding,
and the mean of a last, smaller batch.)"""

WATCHES: dict[str, tuple[str, ...]] = {"ppo": ("eval.labeler",)}
"""Keys that decide what is recorded next to a result and not the result: they may change when it is there."""


def relevant(settings: RLHFRun | Mapping[str, Any], stage: str, *, watched: bool = False) -> dict[str, Any]:
    """The dotted keys that decide what a stage computes, with their values.

    Keys that fall back on others have the value that counts: data.prompts are the demonstrations' where it
    is empty. Secrets are left out, as they are in run.json.

    Args:
        settings: a config, or what a run.json has of one; keys that it lacks have their defaults.
        stage: one of `STAGES`.
        watched: also `WATCHES`.
    """
    given = config.to_dict(settings) if isinstance(settings, RLHFRun) else settings
    values = config.with_defaults(given, RLHFRun())
    flat: dict[str, Any] = {"seed": values["seed"]}
    for group in ("model", "data", "sft", "collect", "reward", "ppo", "eval"):
        if not isinstance(values[group], dict):
            raise LabError(
                f"run.json of stage {stage}: config.{group} holds no keys. Restore the file from a copy."
            )
        flat |= {f"{group}.{key}": value for key, value in values[group].items()}
    flat["data.prompts"] = flat["data.prompts"] or flat["data.demonstrations"]
    if not flat["eval.labeler"] and flat["data.comparisons"] == "collect":
        flat["eval.labeler"] = flat["collect.labeler"]
    names = [*READS[stage], *(WATCHES.get(stage, ()) if watched else ())]
    if stage == "ppo" and flat["ppo.ptx_coef"]:
        names.append("data.demonstrations")
    if stage == "eval" and flat["data.comparisons"] == "collect":  # of prompts that are trained on anyway
        names.remove("reward.held_out")
    kept = {
        key: value for key, value in flat.items() if key in names or f"{key.partition('.')[0]}.*" in names
    }
    return scrub({key: value for key, value in kept.items() if key.rpartition(".")[2] not in CHANGES_NOTHING})
