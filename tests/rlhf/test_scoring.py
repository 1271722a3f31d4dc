"""From an answer to token ids, from those to a score, and the report on scores: by hand and transformers."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lab.errors import LabError
from rlhf.labgpt import LabGPTConfig, LabGPTForSequenceClassification
from rlhf.scoring import (
    RewardScorer,
    calibration_plot,
    held_out_report,
    last_token_scores,
    ordered_pairs,
    pad_right,
)
from rlhf.tokenization import TooLong, tokenize, tokenize_prompt

PAD, EOS, BOS = 0, 1, 2
VOCAB = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>"),
    *(
        "is",
        "the",
        "pizza",
        "soup",
        "it",
        "was",
        "good",
        "bad",
        "fine",
        "very",
        "and",
        "not",
        "really",
        "today",
    ),
]
POSITIONS = 32
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} <eos> fine {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""After each message an end token and a word, as other templates put a line break there."""


def word_tokenizer(
    pad: str = "<pad>", bos: bool = False, template: str = TEMPLATE
) -> PreTrainedTokenizerFast:
    """One token per word, padding on the left, as for generation."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if bos:
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
        padding_side="left",
    )


def ids(text: str) -> list[int]:
    return [VOCAB.index(word) for word in text.split()]


def shaken(model_class: type[PreTrainedModel], config: Any) -> Any:
    """The same model each time, with weights that make every token and every position matter to the score."""
    config.num_labels = 1
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def llama(pad_id: int = PAD) -> LlamaForSequenceClassification:
    """Rotary positions."""
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=pad_id,
        eos_token_id=EOS,
    )
    return shaken(LlamaForSequenceClassification, config)


def gpt2(pad_id: int = PAD) -> GPT2ForSequenceClassification:
    """Learned positions."""
    config = GPT2Config(
        vocab_size=len(VOCAB),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=BOS,
        pad_token_id=pad_id,
        eos_token_id=EOS,
    )
    return shaken(GPT2ForSequenceClassification, config)


def labgpt(pad_id: int = PAD) -> LabGPTForSequenceClassification:
    config = LabGPTConfig(
        vocab_size=len(VOCAB), width=32, n_layer=2, max_positions=POSITIONS, pad_token_id=pad_id
    )
    return shaken(LabGPTForSequenceClassification, config)


MODELS = [llama, gpt2, labgpt]
PROMPTS = [ids("is the pizza good"), ids("is it"), ids("the soup was very very good and not bad"), ids("it")]
ANSWERS = [[*ids("it was"), EOS], ids("not really good today"), [EOS], [*ids("very fine"), EOS]]


# ---- from answers to ids ----


def test_a_finished_answer_ends_with_one_end_token_and_a_cut_off_one_with_none() -> None:
    tokenizer = word_tokenizer()
    body = ids("is it good it was")
    assert tokenize("is it good", "it was", True, tokenizer) == [*body, EOS]
    assert tokenize("is it good", "it was", False, tokenizer) == body
    assert tokenize("is it good", "it was <eos> <eos>", True, tokenizer) == [*body, EOS]
    assert tokenize("is it good", "it was <eos>", False, tokenizer) == body
    assert tokenize("is it good", "", True, tokenizer) == [*ids("is it good"), EOS]


def test_the_end_token_survives_where_it_is_the_padding_too() -> None:
    assert tokenize("is it", "good", True, word_tokenizer(pad="<eos>")) == [*ids("is it good"), EOS]


def test_special_tokens_go_to_the_prompt_as_in_generation_and_not_to_the_answer() -> None:
    tokenizer = word_tokenizer(bos=True)
    assert tokenize_prompt("is it good", tokenizer) == tokenizer("is it good")["input_ids"]
    assert tokenize("is it good", "it was", True, tokenizer) == [BOS, *ids("is it good it was"), EOS]


@pytest.mark.parametrize("bos", [False, True])
def test_in_a_conversation_nothing_follows_the_end_token(bos: bool) -> None:
    tokenizer = word_tokenizer(bos=bos)
    prompt = [{"role": "user", "content": "is it good"}]
    answer = [{"role": "assistant", "content": "it was"}]
    generated_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]  # type: ignore[call-overload,index]
    assert tokenize_prompt(prompt, tokenizer) == generated_from
    assert tokenize(prompt, answer, True, tokenizer) == [*generated_from, *ids("it was"), EOS]
    assert tokenize(prompt, answer, False, tokenizer) == [*generated_from, *ids("it was")]
    rendered = tokenizer.apply_chat_template([*prompt, *answer])["input_ids"]  # type: ignore[call-overload,index]
    assert rendered == [*generated_from, *ids("it was"), EOS, *ids("fine")], "the template adds a word"


def test_an_answer_of_several_messages_keeps_the_end_tokens_within() -> None:
    prompt = [{"role": "user", "content": "is it"}]
    answer = [
        {"role": role, "content": text}
        for role, text in [("assistant", "it was"), ("user", "good"), ("assistant", "very")]
    ]
    expected = "<user> is it <eos> fine <assistant> it was <eos> fine <user> good <eos> fine <assistant> very"
    assert tokenize(prompt, answer, True, word_tokenizer()) == [*ids(expected), EOS]


def test_too_long_is_an_error_or_costs_the_prompt_its_beginning() -> None:
    tokenizer = word_tokenizer()
    example = ("is the pizza good", "it was", True, tokenizer)
    assert tokenize(*example, max_length=7) == [*ids("is the pizza good it was"), EOS]
    with pytest.raises(TooLong, match="prompt of 4 tokens and an answer of 3 are more than max_length = 6"):
        tokenize(*example, max_length=6)
    assert tokenize(*example, max_length=7, truncate_prompt=True) == tokenize(*example)
    assert tokenize(*example, max_length=5, truncate_prompt=True) == [*ids("pizza good it was"), EOS]
    assert tokenize(*example, max_length=3, truncate_prompt=True) == [*ids("it was"), EOS]
    with pytest.raises(TooLong):
        tokenize(*example, max_length=2, truncate_prompt=True)


def test_what_cannot_be_tokenised_is_said_in_one_line() -> None:
    prompt = [{"role": "user", "content": "is it"}]
    answer = [{"role": "assistant", "content": "it was"}]
    with pytest.raises(LabError, match="one is text and the other messages"):
        tokenize(prompt, "it was", True, word_tokenizer())
    with pytest.raises(LabError, match=r"cannot render this conversation: .*only users"):
        tokenize(prompt, answer, True, word_tokenizer(template="{{ raise_exception('only users') }}"))
    changing = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(LabError, match="renders the prompt in another way"):
        tokenize(prompt, answer, True, word_tokenizer(template=changing))
    endless = word_tokenizer()
    endless.eos_token = None
    assert tokenize("is it", "good", False, endless) == ids("is it good")
    with pytest.raises(LabError, match="no eos_token"):
        tokenize("is it", "good", True, endless)


def test_ordered_pairs_leave_out_ties() -> None:
    assert ordered_pairs([2, 1, 2, 3]) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert ordered_pairs([1, 1]) == ordered_pairs([1]) == []


# ---- from ids to scores ----


def alone(model: Any, row: list[int]) -> float:
    """The score of one row without any padding."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state
        return (hidden[0, -1] @ model.score.weight[0]).item()


@pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("make", MODELS)
def test_a_score_does_not_depend_on_padding_or_batch(make: Callable[..., Any], pad_id: int) -> None:
    model = make(pad_id)
    scorer = RewardScorer(model, word_tokenizer(pad=VOCAB[pad_id]))
    expected = torch.tensor([alone(model, p + a) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert expected.std() > 0.1
    for batch_size in (1, 2, 3, 32):
        scores = scorer.score_ids(PROMPTS, ANSWERS, batch_size)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    backwards = scorer.score_ids(PROMPTS[::-1], ANSWERS[::-1], 3).flip(0)
    torch.testing.assert_close(backwards, expected, atol=1e-5, rtol=1e-5)
    assert scorer.score_ids([], []).shape == (0,)


@pytest.mark.parametrize("seed", range(8))
def test_in_bf16_scores_far_from_zero_are_read_as_any_others(seed: int) -> None:
    """bf16 rounds scores of about 24 by 0.1, whether these differ by 100 or by 1."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 64}
    more: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 1}
    config = GPT2Config(vocab_size=len(VOCAB), initializer_range=0.3, **sizes, **more)
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        weight = model.score.weight.copy_(torch.randn(1, 64) / 8)
        cast(Any, model.transformer.ln_f).bias.copy_(24 * weight[0] / weight.square().sum())
        expected = alone(model, PROMPTS[0])
        with torch.autocast("cpu", torch.bfloat16):
            read = last_token_scores(model, torch.tensor([PROMPTS[0]]), [len(PROMPTS[0])])
    assert float(read) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("make", MODELS)
def test_stock_transformers_reads_the_same_score_unless_padding_is_the_end_token(
    make: Callable[..., Any],
) -> None:
    def by_stock(model: Any) -> Tensor:
        rows = [[*p, *a] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        input_ids = pad_right(rows)
        mask = torch.stack([torch.arange(input_ids.shape[1]) < len(row) for row in rows]).long()
        input_ids[mask == 0] = model.config.pad_token_id
        with torch.no_grad():
            return model(input_ids=input_ids, attention_mask=mask).logits[:, 0]

    for pad_id in (PAD, EOS):
        model = make(pad_id)
        scores = RewardScorer(model, word_tokenizer()).score_ids(PROMPTS, ANSWERS)
        same = (scores - by_stock(model)).abs() < 1e-4
        reads_ids = pad_id == EOS and make is not labgpt
        assert same.tolist() == [not reads_ids, True, not reads_ids, not reads_ids]


def test_texts_are_scored_as_their_ids() -> None:
    model, tokenizer = llama(), word_tokenizer()
    scorer = RewardScorer(model, tokenizer)
    scores = scorer.score_texts(["is it good", "is it good"], ["it was", "it was"], [True, False])
    expected = scorer.score_ids([ids("is it good")] * 2, [[*ids("it was"), EOS], ids("it was")])
    torch.testing.assert_close(scores, expected, atol=0, rtol=0)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_shift_and_scale_lie_in_config_json_of_a_folder_stock_transformers_opens(tmp_path: Path) -> None:
    model, tokenizer = llama(), word_tokenizer()
    raw = RewardScorer(model, tokenizer).score_ids(PROMPTS, ANSWERS)
    model.config.reward_shift, model.config.reward_scale = 0.25, 2.0
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(stock) is LlamaForSequenceClassification
    scores = RewardScorer(stock, tokenizer).score_ids(PROMPTS, ANSWERS)
    torch.testing.assert_close(scores, (raw - 0.25) * 2, atol=1e-6, rtol=1e-6)
    own = RewardScorer(stock, tokenizer, shift=1.0, scale=0.5).score_ids(PROMPTS, ANSWERS)
    torch.testing.assert_close(own, (raw - 1) * 0.5, atol=1e-6, rtol=1e-6)


def test_scoring_is_without_dropout_and_gradient_and_leaves_the_model_in_training() -> None:
    model = gpt2()
    assert model.config.resid_pdrop > 0
    scorer = RewardScorer(model, word_tokenizer())
    expected = scorer.score_ids(PROMPTS, ANSWERS)
    model.train()
    scores = scorer.score_ids(PROMPTS, ANSWERS)
    assert model.training
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, atol=0, rtol=0)


def test_scores_have_gradients_for_training() -> None:
    model = llama()
    last_token_scores(model, pad_right(PROMPTS), [len(prompt) for prompt in PROMPTS]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_what_cannot_be_scored_is_named() -> None:
    scorer = RewardScorer(gpt2(), word_tokenizer())
    with pytest.raises(LabError, match=r"answer 1: it and its prompt are empty"):
        scorer.score_ids([[5], []], [[6], []])
    with pytest.raises(
        LabError, match=rf"answer 0: .* 33 tokens, the reward model has {POSITIONS} positions"
    ):
        scorer.score_ids([[5] * 30], [[6] * 3])
    with pytest.raises(LabError, match="LlamaForCausalLM is no reward model"):
        RewardScorer(LlamaForCausalLM(llama().config), word_tokenizer())


def test_importing_scoring_does_not_wait_for_trl() -> None:
    code = (
        "import sys, rlhf.scoring; print([name for name in ('trl', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- reports ----


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scorer_of(rewards: dict[str, float], scale: float = 1.0) -> Any:
    """Scores each answer with a number of its own."""
    return SimpleNamespace(
        scale=scale,
        score_texts=lambda prompts, completions, finished, batch_size: (
            scale * torch.tensor([rewards[text] for text in completions])
        ),
    )


def comparison(answers: str, ranks: list[int], source: str = "a") -> dict[str, Any]:
    completions = answers.split()
    return {
        "prompt": "is it",
        "completions": completions,
        "ranks": ranks,
        "finished": [True] * len(completions),
        "source": source,
    }


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_report_by_hand(scale: float) -> None:
    rewards = {"good": 2.0, "fine": 1.5, "bad": -1.0, "not": 1.0}
    dataset = [
        comparison("bad good fine", [3, 1, 2]),
        comparison("good not", [2, 1], "b"),
        comparison("it it", [1, 1]),
    ]
    rewards["it"] = 0.0
    report = held_out_report(scorer_of(rewards, scale), dataset)

    p = [sigmoid(3.0), sigmoid(0.5), sigmoid(2.5), sigmoid(-1.0)]  # of the order the labelers gave
    assert report["pairs"] == 4
    assert report["accuracy"] == 0.75
    assert report["mean_margin"] == pytest.approx((3 + 0.5 + 2.5 - 1) / 4)
    assert report["brier"] == pytest.approx(sum((1 - x) ** 2 for x in p) / 4)
    assert report["by_source"] == {"a": {"accuracy": 1.0, "pairs": 3}, "b": {"accuracy": 0.0, "pairs": 1}}
    # confidences 0.62, 0.73, 0.92 and 0.95, in bins of 0.05
    low = [b["low"] for b in report["by_confidence"]]
    assert low == pytest.approx([0.6, 0.7, 0.9, 0.95])
    assert [b["high"] - b["low"] for b in report["by_confidence"]] == pytest.approx([0.05] * 4)
    assert [b["accuracy"] for b in report["by_confidence"]] == [1, 0, 1, 1]
    assert [b["confidence"] for b in report["by_confidence"]] == pytest.approx([p[1], 1 - p[3], p[2], p[0]])
    gaps = [1 - p[1], 1 - p[3], 1 - p[2], 1 - p[0]]
    assert report["expected_calibration_error"] == pytest.approx(sum(gaps) / 4)
    json.dumps(report, allow_nan=False)


def labelled_by_chance(n: int, overconfidence: float) -> tuple[Any, list[dict[str, Any]]]:
    """Pairs whose order is drawn with probability sigmoid(margin), and a scorer with larger margins."""
    generator = torch.Generator().manual_seed(0)
    margins = (torch.randn(n, generator=generator) * 2).tolist()
    chances = torch.rand(n, generator=generator).tolist()
    dataset = [
        comparison(f"one{i} two{i}", [1, 2] if chance < sigmoid(margin) else [2, 1], "ab"[i % 2])
        for i, (margin, chance) in enumerate(zip(margins, chances, strict=True))
    ]
    rewards = {f"one{i}": overconfidence * margin for i, margin in enumerate(margins)}
    return scorer_of(rewards | {f"two{i}": 0.0 for i in range(n)}), dataset


def test_calibration_error_tells_honest_from_overconfident_scores() -> None:
    honest = held_out_report(*labelled_by_chance(4000, overconfidence=1.0))
    boasting = held_out_report(*labelled_by_chance(4000, overconfidence=4.0))
    assert honest["accuracy"] == boasting["accuracy"] == pytest.approx(0.77, abs=0.03)
    assert honest["expected_calibration_error"] < 0.02
    assert boasting["expected_calibration_error"] > 0.1
    assert honest["brier"] < boasting["brier"]
    assert sum(b["pairs"] for b in honest["by_confidence"]) == 4000


def test_a_report_on_a_real_model_scores_every_answer_as_the_scorer_does() -> None:
    scorer = RewardScorer(llama(), word_tokenizer(), shift=3.0, scale=0.1)
    dataset = [comparison("good bad fine", [1, 2, 3]), comparison("it was", [2, 1])]
    scores = RewardScorer(scorer.model, scorer.tokenizer).score_texts(
        ["is it"] * 5, ["good", "bad", "fine", "it", "was"], [True] * 5
    )
    good, bad, fine, it, was = scores.tolist()
    margins = [good - bad, good - fine, bad - fine, was - it]
    report = held_out_report(scorer, dataset, batch_size=2)
    assert report["mean_margin"] == pytest.approx(sum(margins) / 4, abs=1e-4)
    assert report["accuracy"] == sum(margin > 0 for margin in margins) / 4


def test_a_report_on_nothing_is_refused() -> None:
    for dataset in ([], [comparison("it was", [1, 1])]):
        with pytest.raises(LabError, match="no prompt has two answers of different rank"):
            held_out_report(scorer_of({}), dataset)


def test_the_calibration_plot_is_a_png_and_nothing_else_stays(tmp_path: Path) -> None:
    report = held_out_report(*labelled_by_chance(300, overconfidence=1.5))
    calibration_plot(report, tmp_path / "calibration.png")
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.png"]
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LabError, match="cannot be written"):
        calibration_plot(report, tmp_path / "missing" / "calibration.png")
