"""The recipe by the real command: what every stage leaves, killed and resumed, refused in one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lab.run import Run
from lab.tracking import read_metrics
from tests.conftest import REPO, LabCommand, LabStart
from tests.e2e.test_bad_input import refuse
from tests.forks import Fork
from tests.rlhf.test_checkpoints import pickles

CONFIG = REPO / "configs" / "rlhf" / "tiny.yaml"
SMALL = (
    *("--model.labgpt.width=16", "--model.labgpt.n_layer=1", "--model.labgpt.n_head=2", "--sft.epochs=0.2"),
    *("--model.labgpt.mlp_width=32", "--collect.rounds=1", "--collect.max_prompts=24", "--ppo.rollouts=6"),
    *("--ppo.rollout_size=16", "--ppo.batch_size=8", "--ppo.micro_batch_size=4", "--ppo.save_every_steps=4"),
    *("--eval.prompts=4", "--eval.samples=3", "--device.threads=1", "--tracking.wandb=disabled"),
)
"""Overrides that make of tiny.yaml a recipe of seconds."""
STAGES = ("sft", "collect", "reward", "ppo", "eval")


def run(lab_command: LabCommand, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return lab_command("rlhf", CONFIG, "--out", "run", *SMALL, *arguments, cwd=cwd, timeout=300)


def begin(lab_start: LabStart, cwd: Path, *arguments: str) -> Fork:
    return lab_start("rlhf", CONFIG, "--out", "run", *SMALL, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def finished(lab_command: LabCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    result = run(lab_command, root)
    assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished recipe's parent folder for one test."""
    return Path(shutil.copytree(finished, tmp_path / "copy", symlinks=True))


def summary(root: Path, stage: str) -> dict[str, Any]:
    return Run.open(root / "run" / stage).info["summary"]


def test_every_stage_is_a_finished_run_that_names_what_it_started_from(finished: Path) -> None:
    runs = {stage: Run.open(finished / "run" / stage).info for stage in STAGES}
    assert {info["state"] for info in runs.values()} == {"finished"}
    assert [info["job_type"] for info in runs.values()] == ["sft", "collect", "rm", "ppo", "eval"]
    assert len({info["group"] for info in runs.values()}) == 1
    expected = {
        "collect": {"sft"},
        "reward": {"sft", "collect"},
        "ppo": {"sft", "reward"},
        "eval": {"sft", "reward", "ppo"},
    }
    for stage, parents in expected.items():
        named = {p["stage"]: p for p in runs[stage]["parents"] if "stage" in p}
        assert named.keys() == parents
        for parent, entry in named.items():
            assert entry["run_id"] == runs[parent]["id"]
            assert entry["sha256"] == runs[parent]["summary"]["result"]["sha256"]
    for stage in ("sft", "reward", "ppo"):  # the reward model is centred on the demonstrations
        assert [p["data"] for p in runs[stage]["parents"] if "data" in p] == ["reviews"]


def test_the_numbers_of_every_stage_are_there_under_the_labs_names(finished: Path) -> None:
    def keys(stage: str) -> set[str]:
        return {key for row in read_metrics(finished / "run" / stage / "metrics.jsonl") for key in row}

    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss"} <= keys("sft")
    assert {"train/loss", "train/accuracy", "train/margin", "eval/accuracy"} <= keys("reward")
    assert {
        "episode", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "objective/gold_scores", "policy/approxkl_avg", "policy/clipfrac_avg",
        "loss/policy_avg", "loss/value_avg", "val/ratio",
    } <= keys("ppo")  # fmt: skip
    rows = [r for r in read_metrics(finished / "run" / "ppo" / "metrics.jsonl") if "episode" in r]
    assert [row["episode"] for row in rows] == [16 * (i + 1) for i in range(6)]


def test_stock_transformers_opens_what_the_stages_leave(finished: Path) -> None:
    """In a process that never imports the lab."""
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
policy = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/ppo/model")
reward = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/reward/model")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/ppo/model")
ids = tokenizer("review the pizza :", return_tensors="pt", return_token_type_ids=False)
assert policy(**ids).logits.shape[-1] == len(tokenizer)
assert reward(**ids).logits.shape == (1, 1)
assert policy.generate(**ids, max_new_tokens=3).shape[1] <= 4 + 3
assert not any(name.split(".")[0] in ("lab", "rlhf", "supervised") for name in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(finished / "run")],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr


def test_demonstrations_score_0_and_comparisons_are_in_trls_format(finished: Path) -> None:
    from rlhf import data, models
    from rlhf.scoring import RewardScorer

    scorer = RewardScorer(*models.open_reward(finished / "run" / "reward" / "model"))
    rows = data.demonstrations("reviews").to_list()
    scores = scorer.score_texts(
        [r["prompt"] for r in rows], [r["completion"] for r in rows], [True] * len(rows)
    )
    assert abs(scores.mean()) < 0.2 * scores.std() + 0.05
    lines = (finished / "run" / "collect" / "preferences.jsonl").read_text().splitlines()
    assert {"prompt", "chosen", "rejected"} <= json.loads(lines[0]).keys()


def test_the_evaluation_puts_the_win_rate_beside_its_cost(finished: Path) -> None:
    result = json.loads((finished / "run" / "eval" / "evaluation.json").read_text())
    policy = result["policy"]
    assert policy["win_rate"]["low"] <= policy["win_rate"]["mean"] <= policy["win_rate"]["high"]
    assert {"kl_nats", "length_ratio", "distinct_2", "gold_score", "proxy_score"} <= policy.keys()
    assert result["best_of"]["n"] == 4
    for plot in ("reward/media/calibration.png", "ppo/media/overoptimization.png"):
        assert (finished / "run" / plot).stat().st_size > 5_000
    assert (finished / "run" / "eval" / "media" / "samples.jsonl").exists()


def test_finished_stages_are_skipped(lab_command: LabCommand, copied: Path) -> None:
    before = (copied / "run" / "ppo" / "model" / "manifest.json").read_bytes()
    result = run(lab_command, copied)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished before") == 5
    assert (copied / "run" / "ppo" / "model" / "manifest.json").read_bytes() == before


def test_from_does_a_stage_and_all_after_it_anew(lab_command: LabCommand, copied: Path) -> None:
    result = run(lab_command, copied, "--from", "eval", "--eval.samples=2")
    assert result.returncode == 0, result.stderr
    assert json.loads((copied / "run" / "eval" / "evaluation.json").read_text())["samples_per_prompt"] == 2
    assert (copied / "run" / "eval.old1" / "run.json").exists()


@pytest.mark.parametrize(
    ("stage", "at"),
    [("sft", 6), *(pytest.param(*at, marks=pytest.mark.slow) for at in (("reward", 3), ("ppo", 9)))],
)
def test_a_stage_killed_at_any_moment_ends_as_one_never_stopped(
    lab_command: LabCommand,
    lab_start: LabStart,
    copied: Path,
    finished: Path,
    stage: str,
    at: int,
) -> None:
    """SIGKILL after `at` rows of metrics: weights, critic and metrics end equal bit for bit."""
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(copied / "run" / later)
    more = ("--stage", stage, "--sft.save_every_steps=4", "--reward.save_every_steps=2")
    process = begin(lab_start, copied, *more)
    metrics = copied / "run" / stage / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < at):
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Run.open(copied / "run" / stage).info["state"] == "running"
    assert not (copied / "run" / stage / "model").exists()

    result = run(lab_command, copied, *more)
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stderr
    mine, whole = (
        load_file(root / "run" / stage / "model" / "model.safetensors") for root in (copied, finished)
    )
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(mine[name], tensor), name

    def rows(root: Path) -> list[dict[str, Any]]:
        clocks = ("_time", "train/step_time", "step_time", "eval/runtime", "eval/samples_per_second")
        found = read_metrics(root / "run" / stage / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in clocks and "_per_second" not in k} for row in found]

    assert rows(copied) == rows(finished)


def test_no_file_of_a_recipe_is_a_pickle(finished: Path) -> None:
    """What the stages leave; of checkpoints, which go with the end of a stage, test_checkpoints says it."""
    assert not list((finished / "run").glob("*/checkpoints/*"))
    assert pickles(finished) == []


@pytest.mark.slow
def test_a_stage_killed_behind_its_last_step_takes_no_other(
    lab_command: LabCommand, lab_start: LabStart, copied: Path, finished: Path
) -> None:
    """Its epochs are a fraction, and all steps are in a checkpoint, but model/ is not written yet."""
    last = max(row["global_step"] for row in read_metrics(finished / "run" / "sft" / "metrics.jsonl"))
    shutil.rmtree(copied / "run")
    model = copied / "run" / "sft" / "model" / "model.safetensors"
    checkpoint = copied / "run" / "sft" / "checkpoints" / f"step_{last:012d}" / "manifest.json"
    process = begin(lab_start, copied, "--stage", "sft")
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    assert not model.exists()
    result = run(lab_command, copied, "--stage", "sft")
    assert result.returncode == 0, result.stderr
    assert model.read_bytes() == (finished / "run" / "sft" / "model" / "model.safetensors").read_bytes()
    steps, expected = (
        [row["global_step"] for row in read_metrics(root / "run" / "sft" / "metrics.jsonl")]
        for root in (copied, finished)
    )
    assert steps == expected


@pytest.mark.slow
def test_sigterm_finishes_the_rollout_saves_and_says_how_to_go_on(
    lab_command: LabCommand, lab_start: LabStart, copied: Path, finished: Path
) -> None:
    for later in ("ppo", "eval"):
        shutil.rmtree(copied / "run" / later)
    process = begin(lab_start, copied, "--stage", "ppo")
    metrics = copied / "run" / "ppo" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "interrupted" in said
    assert Run.open(copied / "run" / "ppo").info["state"] == "interrupted"
    result = run(lab_command, copied, "--stage", "ppo")
    assert result.returncode == 0, result.stderr
    mine, whole = (load_file(r / "run" / "ppo" / "model" / "model.safetensors") for r in (copied, finished))
    assert all(torch.equal(mine[name], tensor) for name, tensor in whole.items())


def test_collect_evaluate_and_chat_work_on_a_finished_recipe(lab_command: LabCommand, copied: Path) -> None:
    def lab(*arguments: str) -> str:
        result = lab_command(*arguments, cwd=copied, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    rankings = (copied / "run" / "collect" / "rankings.jsonl").read_bytes()
    for later in STAGES[1:]:
        (copied / "run" / later).rename(copied / later)
    lab("collect", str(CONFIG), "--out", "run", *SMALL)
    assert (copied / "run" / "collect" / "rankings.jsonl").read_bytes() == rankings
    assert not (copied / "run" / "reward").exists()

    for later in STAGES[2:]:
        (copied / later).rename(copied / "run" / later)
    found = json.loads(lab("evaluate", "run/ppo", "--prompts", "3", "--samples", "2", "--json"))
    assert found["samples_per_prompt"] == 2
    assert found["policy"]["win_rate"].keys() >= {"mean", "low", "high"}
    kept = json.loads((copied / "run" / "eval" / "evaluation.json").read_text())
    assert kept["samples_per_prompt"] == 3  # what the stage found stays

    answer = lab("chat", "run", "--prompt", "review the pizza :", "--max_new_tokens", "5")
    assert 1 <= len(answer.split()) <= 5


# ---- refused ----


def test_a_labeler_that_prefers_next_to_nothing_is_told_of_or_ends_the_recipe_there(
    lab_command: LabCommand, copied: Path
) -> None:
    for later in STAGES[1:]:
        shutil.rmtree(copied / "run" / later)
    result = run(lab_command, copied, "--stage=collect", "--collect.labeler.tie_margin=0.9")
    assert result.returncode == 0, result.stderr
    found = summary(copied, "collect")
    assert found["ties"] > found["pairs"] > 0
    (said,) = found["warnings"]
    assert f"warning: {said}" in result.stdout + result.stderr
    shutil.rmtree(copied / "run" / "collect")
    result = run(lab_command, copied, "--collect.labeler.tie_margin=3")
    assert result.returncode == 2
    assert "collect: of 24 prompts 0 have an answer that vader(" in result.stderr
    assert not (copied / "run" / "reward").exists()


def test_a_stage_out_of_order_is_refused(lab_command: LabCommand, tmp_path: Path) -> None:
    refuse(run(lab_command, tmp_path, "--stage", "ppo"), "stage sft is not begun", "--stage sft")
    assert not (tmp_path / "run").exists()


def test_an_altered_or_missing_parent_is_refused(lab_command: LabCommand, copied: Path) -> None:
    shutil.rmtree(copied / "run" / "ppo")
    shutil.rmtree(copied / "run" / "eval")
    weights = copied / "run" / "sft" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    result = run(lab_command, copied, "--stage", "ppo")
    assert result.returncode == 2
    assert "altered since it was written" in result.stderr
    assert "--from sft" in result.stderr
    shutil.rmtree(weights.parent)
    result = run(lab_command, copied, "--stage", "ppo")
    assert result.returncode == 2
    assert "missing" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ppo.kl_coef=0.5"], ["ppo.kl_coef = 0.1", "now it is 0.5", "--from ppo"]),
        (["--stage", "pppo"], ["no stage 'pppo'", "'ppo'?"]),
        (["--stage", "ppo", "--from", "sft"], ["contradict each other"]),
    ],
)
def test_another_config_than_before_is_refused(
    lab_command: LabCommand, copied: Path, arguments: list[str], words: list[str]
) -> None:
    refuse(run(lab_command, copied, *arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.demonstrations=none.jsonl"], ["none.jsonl"]),
        (["--collect.labeler.name=vadr"], ["no labeler 'vadr'", "'vader'?"]),
        (["--sft.schedule=cosin"], ["sft.schedule", "'cosin' is none of"]),
        (["--ppo.batch_size=24"], ["ppo.rollout_size"]),
        (["--model.lora_rank=2", "--ppo.gradient_checkpointing=true"], ["ppo.gradient_checkpointing"]),
        (["--ppo.klcoef=1"], ["unknown key 'ppo.klcoef'", "'ppo.kl_coef'?"]),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    lab_command: LabCommand, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refuse(run(lab_command, tmp_path, *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_pipeline_is_refused(lab_command: LabCommand, tmp_path: Path) -> None:
    refuse(lab_command("rlhf", REPO / "configs/rl/pong_cpu.yaml", cwd=tmp_path), "pipeline 'rl'", "lab train")


def test_data_with_wrong_columns_names_file_and_line(lab_command: LabCommand, tmp_path: Path) -> None:
    path = tmp_path / "demos.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = run(lab_command, tmp_path, f"--data.demonstrations={path}")
    assert result.returncode == 2
    assert "demos.jsonl" in result.stderr
    assert "line 2" in result.stderr
