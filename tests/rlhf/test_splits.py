"""Nothing that is evaluated was trained on by any stage, and how much was left out for that is said."""

from pathlib import Path
from typing import Any

import pytest

from lab import config
from lab.errors import LabError
from rlhf import preflight, splits
from rlhf.config import STAGES, RLHFRun
from tests.rlhf.test_refusals import WORDS, furnish, values, write

NEW = ("rye", "tea", "cod")


def demonstrations(*words: str) -> list[dict[str, Any]]:
    return [{"prompt": word, "completion": " good"} for word in words]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder data/ whose train and test parts share four prompts of eight and seven."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", demonstrations(*WORDS))
    write(tmp_path / "data" / "test.jsonl", demonstrations(*WORDS[:4], *NEW))
    return tmp_path


def settings_of(**data: str) -> RLHFRun:
    return config.build(RLHFRun, values(data=data), {}, "test")


def trained_on(settings: RLHFRun) -> set[str]:
    rows = splits.demonstrations(settings)[0]
    compared = splits.load(settings, "comparisons", settings.data.comparisons).rows
    parts = rows, splits.training_prompts(settings), splits.training_comparisons(settings, compared)[0]
    return {prompt for part in parts for prompt in part["prompt"]}


def notes(settings: RLHFRun, folder: Path) -> str:
    return "\n".join(preflight.check(settings, STAGES, folder / "run").notes)


def test_prompts_that_train_and_test_share_are_trained_on_alone(here: Path) -> None:
    settings = settings_of(demonstrations="data")
    _, held_out = splits.demonstrations(settings)
    unseen, dropped = splits.unseen_prompts(settings)
    assert (sorted(held_out["prompt"]), sorted(unseen["prompt"]), dropped) == (sorted(NEW), sorted(NEW), 4)
    assert not {*unseen["prompt"], *held_out["prompt"]} & trained_on(settings)
    said = notes(settings, here)
    assert "4 prompts to evaluate on are trained on, and left out of the evaluation" in said
    assert "4 held-out demonstrations have prompts that are trained on, and are left out" in said


@pytest.mark.parametrize("held_out", [0.02, 0.3])
def test_of_prompts_to_evaluate_on_those_of_any_stage_are_left_out(here: Path, held_out: float) -> None:
    """The demonstrations' and the comparisons' (each a tenth less) and those PPO asks."""
    write(here / "comparisons.jsonl", [
        {"prompt": word, "completions": [" bad", " good"], "ranks": [2, 1]} for word in (*WORDS, "cod", "elk")
    ])  # fmt: skip
    write(here / "asked.jsonl", [{"prompt": word} for word in (*WORDS, "gnu", "ant")])
    write(here / "unseen.jsonl", [{"prompt": word} for word in (*WORDS, *NEW, "elk", "gnu", "ant")])
    names = {"eval_prompts": "unseen.jsonl", "prompts": "asked.jsonl"}
    whole = values(data=names)
    settings = config.build(RLHFRun, whole | {"reward": whole["reward"] | {"held_out": held_out}}, {}, "test")
    unseen, dropped = splits.unseen_prompts(settings)
    every = {*WORDS, *NEW, "elk", "gnu", "ant"}
    assert {*unseen["prompt"]} == every - trained_on(settings)
    assert dropped == len(every & trained_on(settings)) > 0
    assert f"{dropped} prompts to evaluate on are trained on" in notes(settings, here)


def test_evaluating_on_the_demonstrations_is_refused_or_leaves_those_that_are_held_out(here: Path) -> None:
    settings = settings_of(eval_prompts="demonstrations.jsonl")
    unseen, dropped = splits.unseen_prompts(settings)
    assert (*unseen["prompt"],) == (*splits.demonstrations(settings)[1]["prompt"],)
    assert dropped == len(WORDS) - len(unseen)
    everything = settings_of(demonstrations="data", eval_prompts="data/train.jsonl")
    with pytest.raises(LabError, match=r"all 8 prompts of data/train\.jsonl to evaluate on are among those"):
        preflight.check(everything, STAGES, here / "run")


def test_a_prompt_that_is_trained_on_as_a_text_is_not_unseen_as_a_conversation(here: Path) -> None:
    asked = [*WORDS, *NEW]
    talks = [{"prompt": [{"role": "user", "content": word}]} for word in asked]
    write(here / "talks.jsonl", talks)
    settings = settings_of(demonstrations="data/train.jsonl", eval_prompts="talks.jsonl")
    unseen, dropped = splits.unseen_prompts(settings)
    left = {prompt[0]["content"] for prompt in unseen["prompt"]}
    assert left == {*asked} - trained_on(settings)
    assert dropped == len(asked) - len(left) > 0

    weighted = [
        {"messages": [*talk["prompt"], {"role": "assistant", "content": "yes", "weight": weight}] * 2}
        for talk, weight in zip(talks, [0, 1] * len(talks), strict=False)
    ]
    write(here / "weighted.jsonl", weighted)
    keys = [set(splits.prompt_keys(splits.load(settings, "demonstrations", "weighted.jsonl").rows))]
    for row in weighted:
        for turn in row["messages"]:
            turn.pop("weight", None)
    write(here / "weighted.jsonl", weighted)
    keys.append(set(splits.prompt_keys(splits.load(settings, "demonstrations", "weighted.jsonl").rows)))
    assert keys[0] == keys[1]


def test_that_some_data_are_texts_and_others_conversations_is_said(here: Path) -> None:
    write(here / "talks.jsonl", [{"prompt": [{"role": "user", "content": word}]} for word in NEW])
    found = {
        preflight.Needed(kind, source): splits.load(settings_of(), kind, source)
        for kind, source in (("demonstrations", "data/train.jsonl"), ("prompts", "talks.jsonl"))
    }
    (said,) = preflight.mixed_forms(found)
    assert "texts in data/train.jsonl (demonstrations), conversations in talks.jsonl (prompts)" in said
    (one, *_) = found
    assert not [*preflight.mixed_forms({one: found[one]})]


def test_some_prompts_stand_for_all_of_a_file_that_is_sorted_by_topic() -> None:
    asked = [f"{topic} {i}" for topic in ("cars", "maths") for i in range(200)]
    some: list[Any] = splits.some(asked, 100, "asked.jsonl")
    assert len({*some}) == 100
    assert 35 <= sum(prompt.startswith("cars") for prompt in some) <= 65
    assert splits.some(sorted(asked, key=len), 100, "asked.jsonl") == some  # wherever they stand
    assert splits.some(asked, 20, "asked.jsonl") == some[:20]
    assert splits.some(asked, 400, "asked.jsonl") == splits.some(asked, None, "asked.jsonl") == asked
    talks: list[Any] = [[{"role": "user", "content": prompt}] for prompt in asked]
    drawn: list[Any] = splits.some(talks, 100, "asked.jsonl")
    assert 35 <= sum(talk[0]["content"].startswith("cars") for talk in drawn) <= 65


def test_prompts_of_a_built_in_task_are_shuffled_already_and_taken_from_the_first() -> None:
    asked = splits.training_prompts(settings_of(demonstrations="reviews"))["prompt"][:]
    assert splits.some(asked, 35, "reviews") == asked[:35]
