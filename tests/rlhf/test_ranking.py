"""The K-wise loss by hand and beside TRL's, and reward models trained by it on toy preferences."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.integrations.integration_utils import rewrite_logs
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from lab.errors import LabError
from rlhf import ranking
from rlhf.config import RLHFRun
from rlhf.ranking import (
    RankingTrainer,
    center,
    collate,
    init_head,
    pair_weights,
    ranking_loss,
)
from rlhf.reward import some_that_fit
from rlhf.scoring import RewardScorer, held_out_report, score_reading_of, sequence_classifier, tokenize
from tests.host_reads import HostReads
from tests.rlhf.test_scoring import EOS, PAD, VOCAB, gpt2, ids, labgpt, llama, word_tokenizer

datasets.disable_progress_bars()


def arguments(folder: Path, **changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3,
        "max_length": 32,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return RewardConfig(str(folder), **(settings | changes))


def comparisons(n: int, k: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts whose answers are better for saying good and worse for saying bad."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str], low: int, high: int) -> list[str]:
        length = int(torch.randint(low, high, (), generator=generator))
        return [words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist()]

    rows = []
    while len(rows) < n:
        answers = [draw(["good", "bad", "it", "was", "very"], 2, 7) for _ in range(k)]
        quality = [("good" in answer) - ("bad" in answer) for answer in answers]
        row = {
            "prompt": " ".join(draw(["is", "the", "pizza", "soup", "today"], 2, 6)) + " ",
            "completions": [" ".join(answer) for answer in answers],
            "ranks": [1 + sum(better > own for better in quality) for own in quality],
            "finished": [True] * k,
            "source": "toy",
        }
        rows += [row] if len(set(quality)) > 1 else []
    return rows


def trainer_of(
    folder: Path,
    rows: list[dict[str, Any]],
    model: Any = None,
    tokenizer: Any = None,
    loss: Any = "ranking",
    on_too_long: Any = "error",
    eval_rows: list[dict[str, Any]] | None = None,
    peft_config: Any = None,
    **settings: Any,
) -> RankingTrainer:
    return RankingTrainer(
        llama() if model is None else model,
        arguments(folder, **settings),
        Dataset.from_list(rows),
        processing_class=word_tokenizer() if tokenizer is None else tokenizer,
        loss=loss,
        on_too_long=on_too_long,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        peft_config=peft_config,
    )


# ---- the loss ----

RANKS = torch.tensor([2, 1, 2, 3, 1, 2, 5, 5, 1])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3])
"""Four answers with a tie, two answers, two that are tied, and one alone."""


def by_hand(rewards: Tensor, ranks: Tensor, group: Tensor) -> Tensor:
    """Ouyang et al. 2022, eq. 1, as a sum over pairs."""
    prompts = []
    for prompt in range(int(group.max()) + 1):
        members = (group == prompt).nonzero()[:, 0].tolist()
        terms = [
            -F.logsigmoid(rewards[w] - rewards[loser])
            for w, loser in itertools.permutations(members, 2)
            if ranks[w] < ranks[loser]
        ]
        if terms:
            prompts.append(torch.stack(terms).sum() / len(terms))
    return torch.stack(prompts).mean()


def test_the_loss_and_its_gradient_are_those_computed_by_hand() -> None:
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(0)).mul_(2).requires_grad_()
    mine, expected = ranking_loss(rewards, pair_weights(RANKS, GROUP)), by_hand(rewards, RANKS, GROUP)
    torch.testing.assert_close(mine, expected)
    gradients = (torch.autograd.grad(loss, rewards)[0] for loss in (mine, expected))
    torch.testing.assert_close(*gradients)


def test_four_answers_with_a_tie_have_five_pairs() -> None:
    rewards = torch.tensor([0.5, 2.0, -1.0, 0.0])
    margins = torch.tensor([1.5, 3.0, 2.0, 0.5, -1.0])  # of 1 over 0, 2 and 3, then of 0 and 2 over 3
    weights = pair_weights(RANKS[:4], GROUP[:4])
    torch.testing.assert_close(ranking_loss(rewards, weights), -F.logsigmoid(margins).sum() / 5)
    assert int((weights > 0).sum()) == 5


def test_with_two_answers_it_is_the_loss_of_pairs_in_any_order() -> None:
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    rewards = torch.stack([chosen, rejected], 1).flatten()
    group, ranks = torch.arange(6).repeat_interleave(2), torch.tensor([1, 2] * 6)
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    loss = ranking_loss(rewards[shuffle], pair_weights(ranks[shuffle], group[shuffle]))
    torch.testing.assert_close(loss, -F.logsigmoid(chosen - rejected).mean())


def test_nothing_to_compare_is_no_loss_and_no_gradient() -> None:
    rewards = torch.randn(3, requires_grad=True)
    loss = ranking_loss(rewards, pair_weights(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 1])))
    loss.backward()
    assert loss.item() == 0
    assert rewards.grad is not None
    assert not rewards.grad.any()


def test_prompts_count_alike_whatever_their_number_of_answers() -> None:
    weights = pair_weights(RANKS, GROUP)
    per_prompt = [weights[prompt == GROUP].sum().item() for prompt in range(4)]
    assert per_prompt == pytest.approx([0.5, 0.5, 0, 0])


def test_the_loss_runs_on_the_meta_device() -> None:
    rewards = torch.randn(9, device="meta", requires_grad=True)
    ranking_loss(rewards, pair_weights(RANKS.to("meta"), GROUP.to("meta"))).backward()
    assert rewards.grad is not None
    assert rewards.grad.device.type == "meta"


def test_the_loss_and_the_metrics_never_wait_for_the_device(tmp_path: Path) -> None:
    rewards = torch.randn(9, requires_grad=True)
    with HostReads() as reads:
        ranking_loss(rewards, pair_weights(RANKS, GROUP)).backward()
    assert not reads.seen

    trainer = trainer_of(tmp_path, comparisons(4), center_rewards_coefficient=0.1)
    batch = collate([*trainer.train_dataset])
    scores = torch.randn(16, 1, requires_grad=True)
    with HostReads() as reads:  # the models themselves are transformers'
        loss = trainer.compute_loss(lambda **_: SequenceClassifierOutputWithPast(logits=scores), batch)  # type: ignore[arg-type]
        loss.backward()
    assert not reads.seen
    with HostReads() as reads:
        loss.item()
    assert reads.seen, "the detector detects"


def test_the_pairs_of_a_batch_are_weighed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the loss, the centring and the metrics alike."""
    weighed = []
    monkeypatch.setattr(ranking, "pair_weights", lambda *of: weighed.append(of) or pair_weights(*of))
    trainer = trainer_of(tmp_path, comparisons(4), center_rewards_coefficient=0.1)
    outputs = SequenceClassifierOutputWithPast(logits=torch.randn(16, 1))  # type: ignore[arg-type]
    trainer.compute_loss(lambda **_: outputs, collate([*trainer.train_dataset]))  # type: ignore[arg-type]
    assert len(weighed) == 1


# ---- from comparisons to batches ----


def test_all_answers_to_a_prompt_are_one_element_and_ends_are_where_answers_end(tmp_path: Path) -> None:
    row = {
        "prompt": "is it ",
        "completions": ["very good", "bad", "fine"],
        "ranks": [1, 3, 1],
        "finished": [True, False, True],
        "source": "a",
    }
    rows = [row, row | {"ranks": [1, 1, 1]}]  # a tie alone is left out
    answers = [[*ids("is it very good"), EOS], ids("is it bad"), [*ids("is it fine"), EOS]]
    kwise = trainer_of(tmp_path, rows).train_dataset
    assert list(kwise) == [{"answer_ids": answers, "ranks": [1, 3, 1]}]
    pairs = trainer_of(tmp_path, rows, loss="pairwise").train_dataset
    assert list(pairs) == [
        {"answer_ids": [answers[0], answers[1]], "ranks": [1, 2]},
        {"answer_ids": [answers[2], answers[1]], "ranks": [1, 2]},
    ]
    batch = collate(list(kwise), multiple_of=4)
    assert batch["input_ids"].shape == (3, 8)
    assert batch["lengths"] == [5, 3, 4]
    assert batch["sizes"].tolist() == [3]


def test_conversations_are_trained_on_as_they_are_scored(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    prompt = [{"role": "user", "content": "is it good"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("it was", "not")]
    row = {
        "prompt": prompt,
        "completions": answers,
        "ranks": [2, 1],
        "finished": [True, False],
        "source": "a",
    }
    (element,) = trainer_of(tmp_path, [row], tokenizer=tokenizer).train_dataset
    expected = [
        tokenize(prompt, answer, done, tokenizer) for answer, done in zip(answers, (True, False), strict=True)
    ]
    assert element["answer_ids"] == expected


def test_too_long_names_the_row_or_is_dropped_or_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = comparisons(1, k=3)
    rows.append(
        {
            "prompt": "is the soup good today ",
            "completions": ["it was very good and fine", "it was", "bad"],
            "ranks": [1, 2, 3],
            "finished": [True, True, True],
            "source": "a",
        }
    )
    with pytest.raises(
        LabError, match=r"train data, row 1: a prompt of 5 tokens and an answer of 7 are more than"
    ):
        trainer_of(tmp_path, rows, max_length=11)
    short = trainer_of(tmp_path, rows, max_length=11, on_too_long="drop").train_dataset[1]
    assert short["ranks"] == [2, 3]
    assert "1 answers longer than max_length = 11 tokens were dropped" in caplog.text
    cut = trainer_of(tmp_path, rows, max_length=11, on_too_long="truncate_prompt").train_dataset[1]
    assert cut["answer_ids"][0] == [*ids("the soup good today it was very good and fine"), EOS]
    assert cut["answer_ids"][1] == [*ids("is the soup good today it was"), EOS]


def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    good = comparisons(2)
    without_ranks = [{key: row[key] for key in row if key != "ranks"} for row in good]
    with pytest.raises(LabError, match="train data: no column 'ranks'"):
        trainer_of(tmp_path, without_ranks)
    with pytest.raises(LabError, match="eval data: no column 'ranks'"):
        trainer_of(tmp_path, good, eval_rows=without_ranks)
    with pytest.raises(LabError, match=r"train data, row 1: has 4 completions, 2 ranks, 4 finished"):
        trainer_of(tmp_path, [good[0], good[1] | {"ranks": [1, 2]}])
    with pytest.raises(LabError, match="no prompt has two answers of different rank"):
        trainer_of(tmp_path, [good[0] | {"ranks": [1, 1, 1, 1]}])
    with pytest.raises(
        LabError, match=r"loss = 'rankin' is none of pairwise, ranking. Did you mean 'ranking'\?"
    ):
        trainer_of(tmp_path, good, loss="rankin")
    stream: Any = Dataset.from_list(good).to_iterable_dataset()
    with pytest.raises(LabError, match="not a stream"):
        RankingTrainer(llama(), arguments(tmp_path, max_steps=1), stream, processing_class=word_tokenizer())


# ---- training ----


def test_pairwise_is_trls_reward_trainer(tmp_path: Path) -> None:
    rows = comparisons(40, k=2)
    settings = {"center_rewards_coefficient": 0.05, "max_steps": 6, "logging_steps": 1}
    mine = trainer_of(tmp_path, rows, loss="pairwise", **settings)
    mine.train()

    pairs = []
    for row in rows:
        rejected, chosen = sorted(
            row["completions"], key=lambda text, row=row: -row["ranks"][row["completions"].index(text)]
        )
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    trl = RewardTrainer(
        llama(),
        arguments(tmp_path, **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=word_tokenizer(),
    )
    trl.train()

    for own, theirs in zip(mine.state.log_history[:-1], trl.state.log_history[:-1], strict=True):
        assert set(theirs) - set(own) == {"num_tokens"}
        for name in own:
            assert own[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    for (name, own), theirs in zip(mine.model.named_parameters(), trl.model.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("loss", "rows_expected"), [("ranking", 12 * 4), ("pairwise", 12 * 6 * 2)])
def test_each_answer_passes_the_model_once(tmp_path: Path, loss: Any, rows_expected: int) -> None:
    ranked = [row | {"ranks": [1, 2, 3, 4]} for row in comparisons(12)]
    trainer = trainer_of(tmp_path, ranked, loss=loss, num_train_epochs=1)
    rows = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal rows
        rows += len(kwargs["input_ids"])

    score_reading_of(trainer.model)  # which compares with other passes
    trainer.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert rows == rows_expected


@pytest.mark.parametrize(
    ("loss", "make", "epochs"), [("ranking", llama, 4), ("ranking", gpt2, 6), ("pairwise", llama, 2)]
)
def test_a_toy_preference_is_learned(tmp_path: Path, loss: Any, make: Callable[[], Any], epochs: int) -> None:
    model, tokenizer = make(), word_tokenizer()
    init_head(model, seed=0)
    trainer = trainer_of(
        tmp_path,
        comparisons(200),
        model,
        tokenizer,
        loss,
        num_train_epochs=epochs,
        per_device_train_batch_size=16 if loss == "ranking" else 64,
        learning_rate=6e-3,
    )
    held_out = comparisons(60, seed=1)
    before = held_out_report(RewardScorer(model, tokenizer), held_out)
    trainer.train()
    after = held_out_report(RewardScorer(model, tokenizer), held_out)
    assert before["accuracy"] < 0.7
    assert after["accuracy"] > 0.95
    assert after["brier"] < 0.05


@pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("make", [llama, labgpt])
def test_training_sees_the_end_token_and_the_scores_the_scorer_sees(
    tmp_path: Path, make: Callable[[int], Any], pad_id: int
) -> None:
    """Two answers that differ in their end alone; reading before the end token cannot tell them apart."""
    model, tokenizer = make(pad_id), word_tokenizer(pad=VOCAB[pad_id])
    rows = [
        row | {"completions": [text] * 2, "ranks": [1, 2], "finished": [True, False]}
        for row in comparisons(24)
        for text in row["completions"][:1]
    ]
    trainer = trainer_of(tmp_path, rows, model, tokenizer, num_train_epochs=4)
    batch = collate([*trainer.train_dataset])
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    scores = RewardScorer(model, tokenizer).score_texts(
        [row["prompt"] for row in rows for _ in range(2)],
        [text for row in rows for text in row["completions"]],
        [True, False] * len(rows),
    )
    torch.testing.assert_close(outputs.logits[:, 0].detach(), scores, atol=1e-5, rtol=1e-5)
    trainer.train()
    assert held_out_report(RewardScorer(model, tokenizer), rows)["accuracy"] == 1


def test_metrics_have_the_names_of_the_lab_and_count_every_prompt_alike(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    held_out = comparisons(11, seed=1)  # a batch of 8 and one of 3
    trainer = trainer_of(
        tmp_path,
        comparisons(16),
        tokenizer=tokenizer,
        eval_rows=held_out,
        eval_strategy="epoch",
        num_train_epochs=1,
        learning_rate=1e-4,
    )
    trainer.train()
    train, evaluation = (
        next(row for row in map(rewrite_logs, trainer.state.log_history) if key in row)
        for key in ("train/accuracy", "eval/accuracy")
    )
    for name in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert isinstance(train[f"train/{name}"], float)
        assert isinstance(evaluation[f"eval/{name}"], float)
    assert 0 <= train["train/accuracy"] <= 1
    assert train["train/min_reward"] < train["train/mean_reward"] < train["train/max_reward"]

    scorer = RewardScorer(trainer.model, tokenizer)
    reports = [held_out_report(scorer, [row]) for row in held_out]
    for name, in_report in (("accuracy", "accuracy"), ("margin", "mean_margin")):
        expected = sum(report[in_report] for report in reports) / len(reports)
        assert evaluation[f"eval/{name}"] == pytest.approx(expected, rel=1e-4)
    again = trainer.evaluate(Dataset.from_list(held_out[:5]))  # type: ignore[arg-type]
    assert again["eval_accuracy"] == pytest.approx(sum(report["accuracy"] for report in reports[:5]) / 5)


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    def train(folder: str, resume: Path | None = None, **settings: Any) -> dict[str, Tensor]:
        trainer = trainer_of(  # 4 steps an epoch
            tmp_path / folder,
            comparisons(30),
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=2,
            **settings,
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer.model.state_dict()

    whole = train("whole")
    for step in (2, 4, 6):  # within and between epochs
        resumed = train("resumed", tmp_path / "whole" / f"checkpoint-{step}")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
    other = train("other", seed=7)
    assert not torch.equal(whole["score.weight"], other["score.weight"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_lora_trains_and_is_scored_without_its_wrapper(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=4, task_type="SEQ_CLS", modules_to_save=["score"], target_modules=["q_proj", "v_proj"]
    )
    tokenizer, held_out = word_tokenizer(), comparisons(8, seed=1)
    trainer = trainer_of(tmp_path, comparisons(32), peft_config=config, tokenizer=tokenizer)
    before = held_out_report(RewardScorer(trainer.model, tokenizer), held_out)
    trainer.train()
    after = held_out_report(RewardScorer(trainer.model, tokenizer), held_out)
    assert after["mean_margin"] > before["mean_margin"]
    merged = held_out_report(RewardScorer(trainer.model.merge_and_unload(), tokenizer), held_out)
    assert merged["mean_margin"] == pytest.approx(after["mean_margin"], rel=1e-4)


# ---- the head and its centre ----


@pytest.mark.parametrize("make", [llama, gpt2, labgpt])
def test_the_head_starts_with_rewards_of_variance_one(make: Callable[[], Any]) -> None:
    model = make()
    for seed in (0, 1):
        init_head(model, seed)
        expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) / math.sqrt(33)
        torch.testing.assert_close(model.score.weight.detach(), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_demonstrations_score_zero_from_the_saved_folder(tmp_path: Path, make: Callable[[], Any]) -> None:
    model, tokenizer = make(), word_tokenizer()
    demonstrations = [{"prompt": "is it ", "completion": text} for text in ("good", "it was very bad", "not")]

    def scores(model: Any) -> Tensor:
        prompts, texts = (
            list(column) for column in zip(*(row.values() for row in demonstrations), strict=True)
        )
        return RewardScorer(model, tokenizer).score_texts(prompts, texts, [True] * 3)

    raw = scores(model)
    assert raw.mean().abs() > 0.1
    assert center(model, tokenizer, demonstrations) == pytest.approx(raw.mean().item(), abs=1e-6)
    assert center(model, tokenizer, Dataset.from_list(demonstrations)) == pytest.approx(
        raw.mean().item(), abs=1e-6
    )
    model.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert scores(opened).mean().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scores(opened), raw - raw.mean(), atol=1e-5, rtol=1e-5)
    with pytest.raises(LabError, match="demonstrations: there are none"):
        center(model, tokenizer, [])


FORMS: dict[str, Any] = {
    "a text": {"text": "is it good"},
    "messages": {
        "messages": [{"role": "user", "content": "is it "}, {"role": "assistant", "content": "good"}]
    },
    "prompt and completion": {"prompt": "is it ", "completion": "good"},
}


@pytest.mark.parametrize("form", FORMS)
def test_demonstrations_of_every_form_are_centred_on(form: str) -> None:
    model, tokenizer = llama(), word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = some_that_fit(Dataset.from_list([FORMS[form]] * 2), tokenizer, RLHFRun())
    whole = torch.tensor([[*tokenizer("is it good").input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model.eval()(whole).logits.item()
    assert center(model, tokenizer, rows) == pytest.approx(expected, abs=1e-6)


def test_what_is_no_reward_model_is_refused() -> None:
    with pytest.raises(LabError, match="Linear is no reward model"):
        sequence_classifier(torch.nn.Linear(1, 1))
