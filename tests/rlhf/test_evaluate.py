"""The numbers of an evaluation against values worked out by hand, and its verdicts against its samples."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.errors import LabError
from rlhf import labelers, models
from rlhf.evaluate import (
    Samples,
    _best,
    _verdicts,
    answer_logprobs,
    compare,
    describe,
    describe_for_people,
    draw_samples,
    end_tokens,
    overoptimization_plot,
    write_rows,
)
from rlhf.labelers import Answer, Prompt, Quit, Ranking, Skip, Undo
from rlhf.logprobs import add_logprob_head
from rlhf.scoring import RewardScorer

PROMPTS = ["review the pizza :", "review the soup :", "review the film :"]
WORDS = "def words(prompts, answers):\n    return [len(answer.split()) for answer in answers]\n"


@pytest.fixture
def word_counter(tmp_path: Path) -> labelers.Labeler:
    """A labeler that scores: the longer answer is the better one."""
    path = tmp_path / "judge.py"
    path.write_text(WORDS)
    return labelers.make({"name": f"python:{path}:words", "batch": True})


class Opinion:
    """A labeler that ranks without scores; it may also raise."""

    name = "opinion"
    interactive = False

    def __init__(self, says: Callable[[Sequence[Answer]], list[int]]) -> None:
        self.says = says

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        return Ranking(self.says(answers))


@pytest.fixture
def contest(save_tiny: Callable[..., Path]) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """compare() of two tiny models; `same` makes the policy the baseline itself."""

    def run(judge: Any, same: bool = False, best_of: int = 0, n: int = 4, seed: int = 5) -> Any:
        policy, tokenizer = models.open_policy(save_tiny("llama", seed=0 if same else 1))
        baseline, _ = models.open_policy(save_tiny("llama", seed=0))
        scorer = RewardScorer(models.open_reward(save_tiny("llama", reward=True))[0], tokenizer)
        return compare(
            policy, baseline, tokenizer, PROMPTS, judge, scorer if best_of else None,
            n=n, best_of=best_of, max_new_tokens=8, seed=seed,
        )  # fmt: skip

    return run


# ---- length, ends, diversity ----


def samples_of(*ids: list[int], finished: Sequence[bool] = ()) -> Samples:
    answers = [Answer("", end) for end in finished or [True] * len(ids)]
    return Samples(["p"] * len(ids), [[3]] * len(ids), list(ids), answers)


def test_length_ends_and_distinct_bigrams_by_hand() -> None:
    """(5,6) (6,5) (5,6) and (6,5) (5,6): two of five differ; (6,6) and (6,7) would span two answers."""
    summary = describe(samples_of([5, 6, 5, 6], [6, 5, 6], [7], finished=[True, False, False]))
    assert summary == {"tokens": 8 / 3, "finished": 1 / 3, "distinct_2": 2 / 5}


def test_answers_too_short_for_a_bigram_have_no_diversity() -> None:
    assert describe(samples_of([5], [6]))["distinct_2"] == 0


# ---- samples ----


def test_samples_are_whole_repeatable_and_say_how_they_ended(save_tiny: Callable[..., Path]) -> None:
    model, tokenizer = models.open_policy(save_tiny("llama"))
    drawn = draw_samples(model, tokenizer, PROMPTS, 30, 8, seed=1)
    assert drawn == draw_samples(model, tokenizer, PROMPTS, 30, 8, seed=1)
    assert drawn.answer_ids != draw_samples(model, tokenizer, PROMPTS, 30, 8, seed=2).answer_ids
    assert drawn.prompts == [prompt for prompt in PROMPTS for _ in range(30)]
    assert drawn.prompt_ids == [tokenizer(prompt).input_ids for prompt in drawn.prompts]
    ends = [ids[-1] == tokenizer.eos_token_id for ids in drawn.answer_ids]
    assert [answer.finished for answer in drawn.answers] == ends
    assert 0 < sum(ends) < len(ends)
    assert all(len(ids) == 8 or end for ids, end in zip(drawn.answer_ids, ends, strict=True))
    for ids, answer in zip(drawn.answer_ids, drawn.answers, strict=True):
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.eos_token not in answer.text


@pytest.mark.parametrize(("declared", "more"), [(7, {7}), ([7, 8], {7, 8}), (None, set())])
def test_an_answer_ends_with_whatever_token_the_model_declares(
    save_tiny: Callable[..., Path], declared: Any, more: set[int]
) -> None:
    model, tokenizer = models.open_policy(save_tiny("llama"))
    model.generation_config.eos_token_id = declared
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id} | more


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens(
    save_tiny: Callable[..., Path], family: str
) -> None:
    model, tokenizer = models.open_policy(save_tiny(family))
    drawn = draw_samples(model, tokenizer, PROMPTS, 2, 6, seed=1)
    expected = []
    with torch.no_grad():
        for prompt, answer in zip(drawn.prompt_ids, drawn.answer_ids, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            each = logits.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            expected.append(each.sum())
    add_logprob_head(model)
    got = answer_logprobs(model, drawn, tokenizer.pad_token_id)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_best_of_n_is_the_highest_of_each_prompts_own(save_tiny: Callable[..., Path]) -> None:
    model, tokenizer = models.open_policy(save_tiny("llama"))
    scorer = RewardScorer(models.open_reward(save_tiny("llama", reward=True))[0], tokenizer)
    many = draw_samples(model, tokenizer, PROMPTS, 2 * 3, 6, seed=1)
    scores = scorer.score_ids(many.prompt_ids, many.answer_ids).tolist()
    best = _best(many, scorer, 3)
    assert best.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    kept = scorer.score_ids(best.prompt_ids, best.answer_ids).tolist()
    assert kept == pytest.approx([max(scores[i : i + 3]) for i in range(0, len(scores), 3)])
    assert all(len(field) == 6 for field in vars(best).values())


# ---- the comparison ----


def test_win_rate_and_length_ratio_are_those_of_the_samples(
    contest: Callable[..., Any], word_counter: labelers.Labeler, save_tiny: Callable[..., Path]
) -> None:
    result, rows = contest(word_counter)
    drawn = {}
    for who, weights, seed in (("baseline", 0, 5), ("policy", 1, 6)):
        model, tokenizer = models.open_policy(save_tiny("llama", seed=weights))
        drawn[who] = draw_samples(model, tokenizer, PROMPTS, 4, 8, seed)
    words = {who: [len(answer.text.split()) for answer in s.answers] for who, s in drawn.items()}
    # Every answer of the policy against every one of the baseline to the same prompt.
    outcomes = [
        [
            1.0 if ours > theirs else 0.5 if ours == theirs else 0.0
            for ours in words["policy"][i : i + 4]
            for theirs in words["baseline"][i : i + 4]
        ]
        for i in (0, 4, 8)
    ]
    rate = result["policy"]["win_rate"]
    assert {0.0, 0.5, 1.0} >= set(np.ravel(outcomes)) > {0.5}
    assert rate["mean"] == pytest.approx(np.mean(outcomes))
    assert rate["comparisons"] == 3 * 4 * 4
    assert rate["wins"] == np.mean(np.equal(outcomes, 1))
    assert rate["ties"] == np.mean(np.equal(outcomes, 0.5))
    assert rate["wins"] + rate["ties"] + rate["losses"] == pytest.approx(1)
    per_prompt = [row["policy_win_rate"] for row in result["per_prompt"]]
    assert per_prompt == pytest.approx(np.mean(outcomes, 1).tolist())
    assert "win_rate" not in result["baseline"]
    for who, counts in words.items():
        assert result[who]["gold_score"] == pytest.approx(np.mean(counts))
    tokens = {who: sum(len(ids) for ids in s.answer_ids) for who, s in drawn.items()}
    assert result["policy"]["length_ratio"] == pytest.approx(tokens["policy"] / tokens["baseline"])
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["policy"] for row in rows] == [answer.text for answer in drawn["policy"].answers[::4]]
    assert [row["policy_gold"] for row in rows] == words["policy"][::4]


@pytest.mark.parametrize(("margin", "expected"), [(0.0, [1, 1, 0.5, 0, 0]), (0.25, [1, 0.5, 0.5, 0.5, 0])])
def test_scores_within_the_labelers_tie_margin_are_a_tie_as_in_its_rankings(
    tmp_path: Path, margin: float, expected: list[float]
) -> None:
    (tmp_path / "judge.py").write_text("def read(prompt, answer):\n    return float(answer)\n")
    judge = labelers.make({"name": f"python:{tmp_path / 'judge.py'}:read", "tie_margin": margin})
    assert isinstance(judge, labelers.Scorer)

    def says(*numbers: float) -> Samples:
        texts = [Answer(str(number)) for number in numbers]
        return Samples(["p"] * len(texts), [[3]] * len(texts), [[5]] * len(texts), texts)

    ours, theirs = says(1.0, 0.75, 0.5, 0.25, 0.0), says(*[0.5] * 5)
    golds = {"policy": judge.scores(ours.prompts, ours.answers), "baseline": [0.5] * 5}
    assert _verdicts(judge, ours, theirs, golds, "policy", 1, 0).outcomes.tolist() == expected
    ranked = [judge.rank("p", pair).ranks for pair in zip(ours.answers, theirs.answers, strict=True)]
    assert [{-1: 1, 0: 0.5, 1: 0}[mine - other] for mine, other in ranked] == expected


def test_the_kl_is_of_the_policys_own_samples(
    contest: Callable[..., Any], word_counter: labelers.Labeler, save_tiny: Callable[..., Path]
) -> None:
    result, _ = contest(word_counter)
    policy, tokenizer = models.open_policy(save_tiny("llama", seed=1))
    baseline, _ = models.open_policy(save_tiny("llama", seed=0))
    own = draw_samples(policy, tokenizer, PROMPTS, 4, 8, seed=6)
    for model in (policy, baseline):
        add_logprob_head(model)
    ours, theirs = (answer_logprobs(m, own, tokenizer.pad_token_id) for m in (policy, baseline))
    assert result["policy"]["kl_nats"] == pytest.approx((ours - theirs).mean().item(), abs=1e-5)
    assert result["policy"]["kl_nats"] != 0


def test_a_policy_that_is_its_baseline_has_no_kl(
    contest: Callable[..., Any], word_counter: labelers.Labeler
) -> None:
    assert contest(word_counter, same=True)[0]["policy"]["kl_nats"] == 0


def test_best_of_n_has_its_bound_on_the_kl_and_better_proxy_scores(
    contest: Callable[..., Any], word_counter: labelers.Labeler
) -> None:
    result, rows = contest(word_counter, best_of=4)
    assert result["best_of"]["n"] == 4
    assert result["best_of"]["kl_nats_at_most"] == pytest.approx(math.log(4) - 3 / 4)
    assert result["best_of"]["proxy_score"] > result["baseline"]["proxy_score"]
    assert 0 <= result["best_of"]["win_rate"]["mean"] <= 1
    assert "best_of" in rows[0]
    assert "best_of" not in contest(word_counter, best_of=0)[0]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_a_labeler_that_prefers_what_it_sees_first_finds_both_equally_good(
    contest: Callable[..., Any], n: int
) -> None:
    result, _ = contest(Opinion(lambda answers: [1, 2]), best_of=2, n=n)
    for who in ("policy", "best_of"):
        rate = result[who]["win_rate"]
        assert rate["low"] <= 0.5 <= rate["high"]
        assert abs(rate["mean"] - 0.5) <= 0.5 / n, "each is first as often as the other, but for an odd one"
    shown = result["first_shown"]
    assert (shown["mean"], shown["decided"]) == (1.0, 2 * 3 * n)
    warned = any("the labeler goes by the order" in line for line in result["warnings"])
    assert warned == (n > 1), "six comparisons are too few to say so"
    assert ("goes by the order" in describe_for_people(result)) == warned


def test_a_labeler_is_not_told_which_model_an_answer_is_from(contest: Callable[..., Any]) -> None:
    """It gets text and how it ended; the order is another for another seed."""
    orders = []
    for seed in (5, 6):
        asked: list[list[Answer]] = []

        def note(answers: Sequence[Answer], asked: list[list[Answer]] = asked) -> list[int]:
            asked.append(list(answers))
            return [1, 1]

        _, rows = contest(Opinion(note), n=4, seed=seed)
        texts = {row["policy"] for row in rows}
        orders.append([answers[0].text in texts for answers in asked])
        assert all(vars(answer).keys() == {"text", "finished"} for pair in asked for answer in pair)
    assert orders[0] != orders[1]


def test_a_fair_labeler_is_not_warned_about(contest: Callable[..., Any]) -> None:
    def longer(answers: Sequence[Answer]) -> list[int]:
        one, other = (len(answer.text) for answer in answers)
        return [1 + (one < other), 1 + (other < one)]

    result, _ = contest(Opinion(longer), n=8)
    assert not any("order" in line for line in result["warnings"])
    assert 0 < result["first_shown"]["mean"] < 1
    assert "gold_score" not in result["policy"]


@pytest.mark.parametrize(("win", "rate"), [(True, 1.0), (False, 0.0)])
def test_ranks_are_given_back_to_the_answers_they_are_of(
    save_tiny: Callable[..., Path], win: bool, rate: float
) -> None:
    def says(mark: str) -> Samples:
        return Samples(["p"] * 6, [[3]] * 6, [[5]] * 6, [Answer(f"{mark}{i}") for i in range(6)])

    def by_mark(answers: Sequence[Answer]) -> list[int]:
        return [1 if answer.text.startswith("ours") == win else 2 for answer in answers]

    found = _verdicts(Opinion(by_mark), says("ours"), says("theirs"), {}, "policy", 3, 0)
    assert found.win_rate(6)["mean"] == rate
    assert (found.first_won + found.first_lost).tolist() == [3, 3]
    assert 0 < found.first_won.sum() < 6


@pytest.mark.parametrize("reason", [Skip, Undo])
def test_no_opinion_is_a_tie_and_counted(contest: Callable[..., Any], reason: type[Exception]) -> None:
    def shrug(answers: Sequence[Answer]) -> list[int]:
        raise reason("do not know")

    rate = contest(Opinion(shrug))[0]["policy"]["win_rate"]
    assert (rate["mean"], rate["ties"], rate["skipped"]) == (0.5, 1.0, 12)


def test_without_a_labeler_there_is_no_win_rate(contest: Callable[..., Any]) -> None:
    result, rows = contest(None, best_of=2)
    assert "win_rate" not in result["policy"]
    assert {"kl_nats", "kl_nats_low", "length_ratio", "proxy_score"} <= result["policy"].keys()
    assert result["labeler"] == "none"
    assert "per_prompt" in result
    assert describe_for_people(result).splitlines()[4].split()[2:4] == ["-", "-"]
    assert len(rows) == 3


def test_a_labeler_that_has_had_enough_stops_the_evaluation_in_one_line(contest: Callable[..., Any]) -> None:
    def leave(answers: Sequence[Answer]) -> list[int]:
        raise Quit("enough for today")

    with pytest.raises(LabError, match=r"^evaluation: stopped by the labeler: enough for today$"):
        contest(Opinion(leave))


# ---- for people ----


def test_the_table_has_what_was_measured_and_dashes_for_what_was_not() -> None:
    common = {"tokens": 12.34, "finished": 0.5, "distinct_2": 0.1234}
    result = {
        "prompts": 20,
        "samples_per_prompt": 15,
        "labeler": "vader",
        "baseline": common,
        "policy": common
        | {
            "kl_nats": 2.456,
            "gold_score": 0.789,
            "proxy_score": 1.5,
            "win_rate": {"mean": 0.935, "low": 0.9, "high": 0.97, "ties": 0.07},
        },
        "best_of": common
        | {
            **{"n": 4, "kl_nats_at_most": 0.6363},
            "win_rate": {"mean": 0.77, "low": 0.7, "high": 0.8, "ties": 0.07},
        },
    }
    head, _, titles, sft, ppo, best = describe_for_people(result).splitlines()
    assert head == "20 unseen prompts, 15 answers each, evaluated by vader"
    (of_more, *_) = describe_for_people(result | {"prompts_unseen": 3_100}).splitlines()
    assert of_more == "20 of 3,100 unseen prompts, 15 answers each, evaluated by vader"
    assert sft.split() == ["SFT", "policy", "-", "-", "0", "-", "-", "12.3", "50%", "0.123"]
    ends = ["2.46", "0.789", "1.5", "12.3", "50%", "0.123"]
    assert ppo.split()[2:] == ["93.5%", "(90.0%-97.0%)", "7%", *ends]
    assert best.split()[:7] == ["best", "of", "4", "77.0%", "(70.0%-80.0%)", "7%", "<0.64"]
    assert len({len(line) for line in (titles, sft, ppo, best)}) == 1, "columns stand below their titles"


def test_rows_are_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a\nb", "policy": "ü"}, {"prompt": [{"role": "user", "content": "x"}]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# ---- over-optimisation ----


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved, to read from it what was drawn."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write_metrics(path: Path, n: int, gold: bool) -> Path:
    rows: list[dict[str, float]] = [{"train/loss": 1.0}]  # a row of something else, to be passed over
    for i in range(n):
        row = {"objective/kl": float(i), "objective/scores": 2.0 * i}
        rows.append(row | ({"objective/gold_scores": -1.0 * i} if gold else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SFT = {"proxy": {"mean": 4.0, "std": 2.0}, "gold": {"mean": -1.0, "std": 0.5}}


@pytest.mark.parametrize("gold", [True, False])
def test_both_scores_are_standardised_on_one_axis(
    tmp_path: Path, drawn_figures: list[Any], gold: bool
) -> None:
    """36 rows are smoothed over 3: 34 points, the first of them the mean of rows 0, 1, 2."""
    metrics = write_metrics(tmp_path / "metrics.jsonl", 36, gold)
    assert overoptimization_plot(metrics, tmp_path / "plot.png", SFT)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    [figure] = drawn_figures
    [axes] = figure.axes
    assert "standard deviations" in axes.get_ylabel()
    zero, *curves = axes.lines
    assert set(zero.get_ydata()) == {0}
    kl = np.arange(1, 35)
    expected = {"reward model": (2.0 * kl - 4) / 2} | ({"labeler": (-1.0 * kl + 1) / 0.5} if gold else {})
    drawn = {line.get_label().split(" (")[0]: line.get_data() for line in curves}
    assert drawn.keys() == expected.keys()
    for name, (x, y) in drawn.items():
        np.testing.assert_allclose(x, kl)
        np.testing.assert_allclose(y, expected[name])
    assert len({line.get_linestyle() for line in curves}) == len(curves), "told apart without colours"
    assert all(len(dots.get_offsets()) == 36 for dots in axes.collections)


def test_a_labeler_that_scores_sft_all_alike_keeps_its_own_units(
    tmp_path: Path, drawn_figures: list[Any]
) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", 3, gold=True)
    sft = SFT | {"gold": {"mean": 1.0, "std": 0.0}}
    assert overoptimization_plot(metrics, tmp_path / "plot.png", sft)
    line = drawn_figures[0].axes[0].lines[-1]
    assert "its points" in line.get_label()
    np.testing.assert_allclose(line.get_ydata(), [-1, -2, -3])


def test_a_run_of_one_rollout_is_drawn_and_one_of_none_is_not(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "one.jsonl", 1, gold=True)
    assert overoptimization_plot(metrics, tmp_path / "one.png", SFT)
    metrics = write_metrics(tmp_path / "none.jsonl", 0, gold=True)
    assert not overoptimization_plot(metrics, tmp_path / "none.png", SFT)
    assert not overoptimization_plot(tmp_path / "missing.jsonl", tmp_path / "none.png", SFT)
    assert not (tmp_path / "none.png").exists()
