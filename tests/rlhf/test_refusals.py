"""What `lab rlhf` refuses: one clear line, exit code 2, and if at all possible before anything is trained.

Runs the command's own `main` in this process: each process of its own would take seconds to import TRL.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.cli import main
from rlhf import reviews

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 and PEFT 0.21 still use what transformers 5.23 renamed.
    "ignore:`gradient_checkpointing:FutureWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

WORDS = ("pea", "egg", "fig", "ham", "jam", "nut", "oat", "yam")
DEMONSTRATIONS = [{"prompt": word, "completion": " good"} for word in WORDS]
COMPARISONS = [{"prompt": word, "completions": [" bad", " good"], "ranks": [2, 1]} for word in WORDS]
TRAINING = {"batch_size": 4, "learning_rate": 1e-3}
JUDGE = "def count(prompt, answer):\n    return float(sum(map(ord, answer)))\n"

Lab = Callable[..., str]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(**changes: Any) -> dict[str, Any]:
    """A recipe of seconds on the files beside it; groups are merged with the changes."""
    tiny = {"width": 16, "n_layer": 1, "n_head": 2, "mlp_width": 32, "max_positions": 32}
    base: dict[str, Any] = {
        "pipeline": "rlhf",
        "model": {"labgpt": tiny},
        "data": {
            "demonstrations": "demonstrations.jsonl",
            "comparisons": "comparisons.jsonl",
            "max_length": 32,
            "max_new_tokens": 8,
        },
        "sft": TRAINING,
        "collect": {"labeler": {"name": "python:judge.py:count"}, "answers": 2},
        "reward": TRAINING | {"held_out": 0.3},
        "ppo": TRAINING | {"epochs": 1, "rollouts": 1, "rollout_size": 4},
        "eval": {
            "labeler": {"name": "python:judge.py:count"},
            **{"prompts": 1, "samples": 2, "best_of": 0},
        },
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    return base | {key: base.get(key, {}) | change for key, change in changes.items()}


def furnish(folder: Path) -> None:
    write(folder / "demonstrations.jsonl", DEMONSTRATIONS)
    write(folder / "comparisons.jsonl", COMPARISONS)
    (folder / "judge.py").write_text(JUDGE)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lab:
    """Runs `lab rlhf` in the test's folder; returns the line it refuses with, or one for each problem."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)

    def run(*arguments: str, command: str = "rlhf", **changes: Any) -> str:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(**changes)))
        capsys.readouterr()
        code = main([command, "config.yaml", "--out", "run", "--trust", *arguments])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        said = [i for i, line in enumerate(lines) if line.startswith("lab: ")]
        assert code == 2, captured.err
        assert len(said) == 1
        first, *others = lines[said[0] :]
        assert all(line.startswith(f"  {i}. ") for i, line in enumerate(others, 1)), (
            "it is the last that is said"
        )
        return "\n".join([first, *others])

    return run


def begun(folder: Path) -> list[str]:
    """The stages that have a folder."""
    return sorted(path.name for path in folder.glob("run/*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished recipe that collected its comparisons."""
    root = tmp_path_factory.mktemp("finished")
    furnish(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "config.yaml").write_text(yaml.safe_dump(values(data={"comparisons": "collect"})))
        assert main(["rlhf", "config.yaml", "--out", "run", "--trust"]) == 0
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished recipe, where `lab` runs."""
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


COLLECTED = {"data": {"comparisons": "collect"}}


# ---- data ----


@pytest.mark.parametrize("key", ["demonstrations", "comparisons", "prompts", "eval_prompts"])
def test_an_empty_data_set_is_found_before_a_stage_begins(lab: Lab, tmp_path: Path, key: str) -> None:
    write(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl: is empty. Name data with rows in it." in lab(data={key: "empty.jsonl"})
    # reveals: each is read by the stage that needs it, so stages before it have been trained by then.
    assert begun(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "row", "hint"),
    [
        ("demonstrations", {"prompt": "a", "completon": "b"}, "Did you mean 'completion'?"),
        ("comparisons", {"prompt": "a", "choosen": "b", "rejected": "c"}, "Did you mean 'chosen'?"),
        ("comparisons", {"prompt": "a", "completion": "b"}, "chosen + rejected"),
        ("prompts", {"promt": "a"}, "Did you mean 'prompt'?"),
        ("eval_prompts", {"utterance": "a"}, "prompt"),
    ],
)
def test_wrong_columns_are_found_before_a_stage_begins(
    lab: Lab, tmp_path: Path, key: str, row: dict[str, str], hint: str
) -> None:
    write(tmp_path / "wrong.jsonl", [row])
    line = lab(data={key: "wrong.jsonl"})
    assert "wrong.jsonl, line 1: has the columns " in line
    assert hint in line
    # reveals: as above.
    assert begun(tmp_path) == []


def test_demonstrations_that_have_no_prompts_are_found_before_a_stage_begins(
    lab: Lab, tmp_path: Path
) -> None:
    """Whole texts can be imitated; but PPO would have nothing to ask."""
    write(tmp_path / "texts.jsonl", [{"text": f"a text about {word}"} for word in WORDS])
    line = lab(data={"demonstrations": "texts.jsonl"})
    assert "texts.jsonl" in line
    assert "prompt" in line
    # reveals: as above.
    assert begun(tmp_path) == []


def test_one_prompt_cannot_be_held_out(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", DEMONSTRATIONS[:1] * 4)
    assert "no two rows have different prompts" in lab(data={"demonstrations": "one.jsonl"})


def test_comparisons_that_all_tie_teach_nothing(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "ties.jsonl", [row | {"ranks": [1, 1]} for row in COMPARISONS])
    line = lab(data={"comparisons": "ties.jsonl"})
    assert "ties.jsonl: all completions tie in each of its comparisons" in line


def test_a_labeler_to_whom_all_is_one_teaches_nothing(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def count(prompt, answer):\n    return 1.0\n")
    line = lab(**COLLECTED)
    assert "of 7 prompts 0 have an answer that python:judge.py:count prefers to another" in line
    assert "Traceback" not in line


def test_conversations_need_a_chat_template(lab: Lab, tmp_path: Path) -> None:
    talks = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in DEMONSTRATIONS
    ]
    write(tmp_path / "talks.jsonl", talks)
    assert "talks.jsonl: holds conversations, but the model's tokenizer has no chat template" in lab(
        data={"demonstrations": "talks.jsonl"}
    )


# ---- lengths ----


def test_answers_longer_than_the_context_are_refused(lab: Lab, tmp_path: Path) -> None:
    """Cut off before its end, no answer would teach the policy to stop."""
    long = [row | {"completion": " good" * 60} for row in DEMONSTRATIONS]
    write(tmp_path / "long.jsonl", long)
    line = lab(data={"demonstrations": "long.jsonl"})
    assert "8 of 8 demonstrations have more than 32 tokens (data.max_length 32), the longest 64" in line
    assert "long.jsonl, lines 1, 2, 3, 4, 5, 6, 7, 8. Raise data.max_length, or set data.too_long" in line
    assert begun(tmp_path) == []


def test_prompts_longer_than_the_context_leave_no_answer(lab: Lab, tmp_path: Path) -> None:
    long = [row | {"prompt": " ".join([row["prompt"]] * 60)} for row in DEMONSTRATIONS]
    write(tmp_path / "long.jsonl", long)
    # reveals: TRL leaves all rows out, and the sampler of none of them raises a ValueError.
    line = lab(data={"demonstrations": "long.jsonl"})
    assert "8 of 8 demonstrations have more than 32 tokens" in line
    assert "8 of 8 prompts have more than 24 tokens (data.max_length 32 less data.max_new_tokens 8)" in line
    assert begun(tmp_path) == []


def test_held_out_prompts_longer_than_the_context_are_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    write(tmp_path / "split" / "train.jsonl", DEMONSTRATIONS)
    long = [row | {"prompt": " ".join([row["prompt"]] * 60)} for row in DEMONSTRATIONS]
    write(tmp_path / "split" / "test.jsonl", long)
    # reveals: training goes on to its end, and the model is lost with a KeyError.
    line = lab(data={"demonstrations": "split"})
    assert "split (its part to evaluate on): 8 of 8 demonstrations have more than 32 tokens" in line
    assert begun(tmp_path) == []


def test_compared_answers_longer_than_the_context_are_named(lab: Lab, tmp_path: Path) -> None:
    long = [row | {"completions": [" bad", " fine" * 60]} for row in COMPARISONS]
    write(tmp_path / "long.jsonl", long)
    line = lab(data={"comparisons": "long.jsonl"})
    assert "8 of 8 comparisons have more than 32 tokens" in line
    assert begun(tmp_path) == []


def test_a_context_longer_than_the_models_is_refused(lab: Lab, tmp_path: Path) -> None:
    """The model has 32 positions. Rows as long as data.max_length allows would fail within training."""
    long = [row | {"prompt": " ".join([row["prompt"]] * 40)} for row in DEMONSTRATIONS]
    write(tmp_path / "long.jsonl", long)
    # reveals: nobody compares the two.
    line = lab(data={"demonstrations": "long.jsonl", "max_length": 128})
    assert "data.max_length" in line
    assert "32" in line


def test_prompts_that_leave_no_room_for_an_answer_are_refused(lab: Lab, tmp_path: Path) -> None:
    """A prompt of nearly max_length tokens and an answer of max_new_tokens are more than the context."""
    write(tmp_path / "long.jsonl", [{"prompt": " ".join([word] * 14)} for word in WORDS])
    # reveals: PPO answers whatever it is asked, beyond the model's positions.
    line = lab(data={"prompts": "long.jsonl", "max_new_tokens": 24})
    assert "long.jsonl" in line
    assert "max_new_tokens" in line


@pytest.mark.parametrize("new", [32, 33])
def test_answers_as_long_as_the_context_are_refused(lab: Lab, tmp_path: Path, new: int) -> None:
    line = lab(data={"max_new_tokens": new})
    assert f"data.max_new_tokens: {new} leaves no room for a prompt in max_length 32" in line
    assert begun(tmp_path) == []


# ---- the model ----


def test_a_model_that_is_not_there(lab: Lab) -> None:
    assert "nowhere: no tokenizer found" in lab(model={"path": "nowhere"})


def test_a_misspelt_argument_of_labgpt(lab: Lab) -> None:
    # reveals: it is taken, and ignored.
    line = lab("--model.labgpt.widht=16")
    assert "widht" in line
    assert "'width'?" in line


@pytest.mark.parametrize("targets", ["nothing_like_it", ["nothing_like_it"]])
def test_adapters_for_modules_that_are_not_there(lab: Lab, targets: Any) -> None:
    # reveals: PEFT's own error comes through as a traceback.
    line = lab(model={"lora_rank": 2, "lora_targets": targets})
    assert "model.lora_targets" in line
    assert "nothing_like_it" in line


def test_adapters_and_recomputed_activations_exclude_each_other(lab: Lab, tmp_path: Path) -> None:
    line = lab(model={"lora_rank": 2}, ppo={"gradient_checkpointing": True})
    assert "ppo.gradient_checkpointing" in line
    assert begun(tmp_path) == []


def test_ptx_needs_demonstrations_with_prompts(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "texts.jsonl", [{"text": f"about {word}"} for word in WORDS])
    write(tmp_path / "prompts.jsonl", [{"prompt": word} for word in WORDS])
    line = lab(data={"demonstrations": "texts.jsonl", "prompts": "prompts.jsonl"}, ppo={"ptx_coef": 1.0})
    assert "ppo.ptx_coef needs demonstrations of prompt and completion" in line
    # reveals: only the stage that needs them looks, when all before it have been trained.
    assert begun(tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("clip", 0.0, "must be positive"),
        ("clip_value", -0.2, "must be positive"),
        ("kl_coef", -0.1, "must be 0 or more"),
        ("value_coef", -1.0, "must be 0 or more"),
        ("ptx_coef", -27.8, "must be 0 or more"),
        ("gamma", 1.5, "must lie between 0 and 1"),
        ("gae_lambda", -0.1, "must lie between 0 and 1"),
    ],
)
def test_numbers_that_ppo_cannot_have(lab: Lab, tmp_path: Path, key: str, value: float, why: str) -> None:
    assert f"ppo.{key}: {why}" in lab(ppo={key: value})
    assert begun(tmp_path) == []


def test_the_labeler_of_the_evaluation_is_looked_for_before_a_stage_begins(lab: Lab, tmp_path: Path) -> None:
    rows = [{"prompt": w, "chosen": "good", "rejected": "bad"} for w in WORDS]
    write(tmp_path / "pairs.jsonl", rows)
    line = lab(data={"comparisons": "pairs.jsonl"}, eval={"labeler": {"name": "vadr"}})
    assert "vadr" in line
    # reveals: with comparisons given, only the evaluation has a labeler, after all training.
    assert begun(tmp_path) == []


# ---- order and parents ----


@pytest.mark.parametrize(
    ("stage", "needed"), [("collect", "sft"), ("reward", "sft"), ("ppo", "sft"), ("eval", "sft")]
)
def test_a_stage_before_those_it_starts_from(lab: Lab, tmp_path: Path, stage: str, needed: str) -> None:
    line = lab("--stage", stage, **COLLECTED)
    assert f"stage {needed} is not begun" in line
    assert f"--stage {needed}" in line
    assert begun(tmp_path) == []


@pytest.mark.parametrize(("stage", "missing"), [("reward", "collect"), ("ppo", "reward"), ("eval", "ppo")])
def test_a_stage_whose_second_parent_is_missing(lab: Lab, copied: Path, stage: str, missing: str) -> None:
    for name in (stage, missing):
        shutil.rmtree(copied / name)
    assert f"stage {missing} is not begun" in lab("--stage", stage, **COLLECTED)
    assert not (copied / stage).exists()


def test_a_stage_whose_parent_was_interrupted(lab: Lab, copied: Path) -> None:
    shutil.rmtree(copied / "ppo")
    record = json.loads((copied / "reward" / "run.json").read_text())
    (copied / "reward" / "run.json").write_text(json.dumps(record | {"state": "interrupted"}))
    assert "stage reward is interrupted" in lab("--stage", "ppo", **COLLECTED)


def test_collecting_needs_a_policy(lab: Lab) -> None:
    assert "stage sft is not begun" in lab(command="collect", **COLLECTED)


def test_a_recipe_that_does_not_collect_has_no_such_stage(lab: Lab) -> None:
    line = lab("--stage", "collect")
    assert "no stage 'collect' in this config" in line
    assert "It has sft, reward, ppo, eval" in line


@pytest.mark.parametrize(
    ("result", "stage", "parent"),
    [
        ("sft/model/tokenizer.json", "ppo", "sft"),
        ("sft/model/config.json", "ppo", "sft"),
        ("collect/rankings.jsonl", "reward", "collect"),
        ("reward/model/config.json", "ppo", "reward"),  # where the scale of its scores is
        ("ppo/model/model.safetensors", "eval", "ppo"),
    ],
)
def test_whatever_is_altered_in_a_parent_is_noticed(
    lab: Lab, copied: Path, result: str, stage: str, parent: str
) -> None:
    shutil.rmtree(copied / stage)
    path = copied / result
    path.write_bytes(path.read_bytes() + b" ")
    line = lab("--stage", stage, **COLLECTED)
    assert "altered since it was written" in line
    assert f"--from {parent}" in line
    assert not (copied / stage).exists()


def test_results_made_from_a_parent_that_was_made_anew_are_noticed(lab: Lab, copied: Path) -> None:
    """The folder of one stage was deleted by hand, and the stage done otherwise."""
    shutil.rmtree(copied / "sft")
    config = copied.parent / "other.yaml"
    changes: dict[str, Any] = {**COLLECTED, "sft": {"learning_rate": 2e-3}}
    config.write_text(yaml.safe_dump(values(**changes)))
    assert main(["rlhf", "other.yaml", "--out", "run", "--stage", "sft", "--trust"]) == 0
    line = lab(**changes)
    assert "was made from an earlier sft stage" in line
    assert "--from collect" in line


def test_data_that_changed_since_a_stage_was_begun_is_noticed(lab: Lab, copied: Path) -> None:
    """Its hash is among the stage's parents; other rows are another run."""
    for stage in ("ppo", "eval"):
        shutil.rmtree(copied / stage)
    write(copied.parent / "demonstrations.jsonl", DEMONSTRATIONS[:-1])
    # reveals: the hash is written down, and compared with nothing.
    line = lab(**COLLECTED)
    assert "demonstrations.jsonl" in line
    assert "--from sft" in line


# ---- all at once, before anything is trained ----


def test_everything_that_is_wrong_is_said_at_once(lab: Lab, tmp_path: Path) -> None:
    """Today's kinds: rows that cannot be used in two sources, one too long, and too long a context."""
    write(tmp_path / "bad.jsonl", [*COMPARISONS, COMPARISONS[0] | {"ranks": [0, 1]}])
    write(tmp_path / "long.jsonl", [{"prompt": "very " * 40}, {"prompt": "short"}])
    line = lab(data={"comparisons": "bad.jsonl", "prompts": "nowhere.jsonl", "max_length": 64})
    assert line.startswith("lab: 3 things must be put right before a stage can begin:")
    for problem in (
        "bad.jsonl, line 9: ranks is",
        "'nowhere.jsonl': no such file",
        "more than the model's 32 positions",
    ):
        assert problem in line
    assert begun(tmp_path) == []


def test_a_model_that_reads_both_ways_is_refused_before_a_stage(lab: Lab, tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained("bert")
    transformers.T5Config(d_model=8, num_layers=1).save_pretrained("t5")
    reviews.tokenizer().save_pretrained("words")
    for name in ("bert", "t5"):
        assert f"{name}: " in lab(model={"path": name, "tokenizer": "words"})
        assert begun(tmp_path) == []


def counted(folder: Path, stage: str) -> Any:
    """What a stage's summary says of its data."""
    return json.loads((folder / "run" / stage / "run.json").read_text())["summary"]["data"]


def test_what_is_skipped_and_cut_is_said_and_the_stages_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    long = {"prompt": "kiwi", "completions": [" bad", " fine" * 60], "ranks": [1, 2]}
    odd = {"prompt": "plum", "completions": [" good", " good"], "ranks": [1, 2]}
    tie = {"prompt": "lime", "completions": [" good", " bad"], "ranks": [1, 1]}
    write(tmp_path / "comparisons.jsonl", [*COMPARISONS, long, odd, tie])
    too_long = {"prompt": "x " * 60, "completion": " good"}
    write(tmp_path / "demonstrations.jsonl", [*DEMONSTRATIONS, too_long])
    data = {"bad_rows": "skip", "too_long": "drop"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(data=data)))
    assert main(["rlhf", "config.yaml", "--out", "run", "--trust"]) == 0
    said = capsys.readouterr().out
    assert "comparisons.jsonl, as comparisons: 1 ties left out; 1 rows that cannot be used left out" in said
    assert "comparisons.jsonl: 1 of 9 comparisons have more than 32 tokens" in said
    assert "demonstrations.jsonl: 1 of 9 demonstrations have more than 32 tokens" in said
    assert begun(tmp_path) == ["eval", "ppo", "reward", "sft"]
    demonstrations = {"source": "demonstrations.jsonl", "rows": 9, "too_long": 1}
    prompts = demonstrations
    comparisons: Any = {"source": "comparisons.jsonl", "rows": 11, "ties": 1, "too_long": 1}
    (reason,) = counted(tmp_path, "reward")["comparisons"].pop("bad_rows").items()
    assert reason[1] == 1
    comparisons["bad_rows"] = dict([reason])
    assert counted(tmp_path, "sft") == {"demonstrations": demonstrations}
    assert counted(tmp_path, "reward") == {"demonstrations": demonstrations, "comparisons": comparisons}
    assert counted(tmp_path, "ppo") == {"demonstrations": demonstrations, "prompts": prompts}
    assert counted(tmp_path, "eval") == counted(tmp_path, "ppo") | {"comparisons": comparisons}
    capsys.readouterr()
    monkeypatch.setattr("rlhf.preflight.check", None)  # a finished recipe needs no row of its data
    assert main(["rlhf", "config.yaml", "--out", "run", "--trust"]) == 0


def test_rows_that_a_chat_template_cannot_render_are_as_bad_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Gemma's, which has no place for a system's message; in all stages alike."""
    from tests.rlhf.test_families import CHATML, FAMILIES, save

    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    save(FAMILIES["qwen3"], tmp_path / "base")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(refuses + CHATML)

    def asked(word: str, system: bool = False) -> list[dict[str, str]]:
        before = [{"role": "system", "content": "Be brief."}] if system else []
        return [*before, {"role": "user", "content": word}]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    prompts = [*map(asked, WORDS), asked("sloe", system=True)]
    write(tmp_path / "demonstrations.jsonl", [{"prompt": p, "completion": said("good")} for p in prompts])
    write(
        tmp_path / "comparisons.jsonl",
        [{"prompt": p, "completions": [said("bad"), said("good")], "ranks": [2, 1]} for p in prompts],
    )
    data = {"max_length": 96, "eval_prompts": "unseen.jsonl"}
    unseen = [{"prompt": asked(word, system)} for word, system in (("rye", False), ("tea", True))]
    write(tmp_path / "unseen.jsonl", unseen)
    model = {"path": "base", "labgpt": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(data=data, model=model)))
    assert main(["rlhf", "config.yaml", "--out", "run", "--trust"]) == 2
    problems = capsys.readouterr().err
    for what in ("1 of 9 demonstrations", "1 of 9 comparisons", "1 of 9 prompts", "1 of 2 prompts"):
        assert f"{what}: the chat template cannot render this conversation" in problems
    assert "jsonl, line 9). Correct or remove them, or set data.bad_rows to skip." in problems
    assert not (tmp_path / "run").exists()
    assert main(["rlhf", "config.yaml", "--out", "run", "--trust", "--data.bad_rows=skip"]) == 0
    for stage, names in {
        "sft": {"demonstrations"},
        "reward": {"demonstrations", "comparisons"},
        "ppo": {"demonstrations", "prompts"},
        "eval": {"demonstrations", "comparisons", "prompts"},
    }.items():
        found = counted(tmp_path, stage)
        assert found.keys() == names
        assert all([*one["not_rendered"].values()] == [1] for one in found.values()), found
