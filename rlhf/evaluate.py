"""How much better a policy is than another, and at what cost: win rate beside KL, length and diversity."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.errors import LabError
from lab.files import explain_write_errors, written_aside
from lab.tracking import read_metrics
from rlhf.decode import end_tokens, sample
from rlhf.labelers import Answer, Labeler, Quit, Scorer, Skip, Undo
from rlhf.logprobs import add_logprob_head
from rlhf.scoring import RewardScorer
from rlhf.sequences import side_by_side
from rlhf.tokenization import tokenize_prompts

BATCH_SIZE = 64
BOOTSTRAP = 2_000
_BLUE, _GOLD, _GREY = "#2a6fbb", "#c8860d", "#666666"


@dataclass(frozen=True)
class Samples:
    """Answers of one model: `n` in a row for each prompt."""

    prompts: list[Any]
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    answers: list[Answer]


def draw_samples(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    n: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    max_prompt: int | None = None,
) -> Samples:
    """Samples `n` answers to each prompt, of which the model reads the last `max_prompt` tokens.

    As many are sampled at once as fit the memory.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    ids = [own for own in tokenize_prompts(prompts, tokenizer, max_prompt) for _ in range(n)]
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends = end_tokens(model, tokenizer)
    answers = sample(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        eos_ids=ends,
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        generator=generator,
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Samples(
        repeated,
        ids,
        answers,
        [Answer(text, bool(a) and a[-1] in ends) for text, a in zip(texts, answers, strict=True)],
    )


@torch.no_grad()
def answer_logprobs(model: Any, samples: Samples, pad_id: int) -> Tensor:
    """The log-probability of each answer under a model, float64 (answers,)."""
    device = next(model.parameters()).device
    sums = []
    for begin in range(0, len(samples.answer_ids), BATCH_SIZE):
        part = slice(begin, begin + BATCH_SIZE)
        packed = side_by_side(samples.prompt_ids[part], samples.answer_ids[part], pad_id, device)
        logps, _ = model(logprobs_of=packed)
        sums.append(logps.double().sum(1).cpu())
    return torch.cat(sums)


def compare(
    policy: Any,
    baseline: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    labeler: Labeler,
    scorer: RewardScorer | None,
    *,
    n: int,
    best_of: int,
    max_new_tokens: int,
    seed: int,
    max_prompt: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The policy against the baseline it came from, on prompts neither was trained on.

    Args:
        labeler: who decides; neither model was trained on what it says here.
        scorer: the reward model, for proxy scores and best-of-n.
        n: answers per prompt and model.
        best_of: also the reward model's best of so many answers of the baseline; 0: not.
        max_prompt: tokens of a prompt that the models read, its last ones.

    Returns:
        One JSON object of numbers, and rows of samples.
    """
    for model in (policy, baseline):
        model.eval()
        add_logprob_head(model)
    contestants = {
        "baseline": draw_samples(baseline, tokenizer, prompts, n, max_new_tokens, seed, 1.0, max_prompt),
        "policy": draw_samples(policy, tokenizer, prompts, n, max_new_tokens, seed + 1, 1.0, max_prompt),
    }
    if best_of and scorer is not None:
        size = n * best_of
        many = draw_samples(baseline, tokenizer, prompts, size, max_new_tokens, seed + 2, 1.0, max_prompt)
        contestants["best_of"] = _best(many, scorer, best_of)
    result: dict[str, Any] = {
        "prompts": len(prompts),
        "samples_per_prompt": n,
        "labeler": labeler.name,
        "seed": seed,
    }
    golds: dict[str, list[float]] = {}
    for who, samples in contestants.items():
        summary = describe(samples)
        if scorer is not None:
            summary["proxy_score"] = float(scorer.score_ids(samples.prompt_ids, samples.answer_ids).mean())
        if isinstance(labeler, Scorer):
            golds[who] = labeler.scores(samples.prompts, samples.answers)
            summary["gold_score"] = float(np.mean(golds[who]))
        result[who] = summary
    ours = answer_logprobs(policy, contestants["policy"], tokenizer.pad_token_id)
    theirs = answer_logprobs(baseline, contestants["policy"], tokenizer.pad_token_id)
    result["policy"]["kl_nats"] = float((ours - theirs).mean())
    result["policy"]["length_ratio"] = result["policy"]["tokens"] / result["baseline"]["tokens"]
    if best_of and scorer is not None:
        result["best_of"]["n"] = best_of
        result["best_of"]["kl_nats_at_most"] = float(np.log(best_of) - (best_of - 1) / best_of)
    for who in ("policy", "best_of"):
        if who in contestants:
            outcomes = _outcomes(labeler, contestants[who], contestants["baseline"], golds, who)
            result[who]["win_rate"] = win_rate(outcomes.reshape(len(prompts), n), seed)
    rows = [
        {
            "prompt": contestants["policy"].prompts[i],
            **{who: samples.answers[i].text for who, samples in contestants.items()},
            **{f"{who}_gold": scores[i] for who, scores in golds.items()},
        }
        for i in range(0, len(prompts) * n, n)
    ]
    return result, rows


def describe(samples: Samples) -> dict[str, float]:
    """Length, ends and diversity of answers."""
    bigrams = [pair for ids in samples.answer_ids for pair in itertools.pairwise(ids)]
    return {
        "tokens": float(np.mean([len(ids) for ids in samples.answer_ids])),
        "finished": float(np.mean([answer.finished for answer in samples.answers])),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def win_rate(outcomes: np.ndarray, seed: int) -> dict[str, float]:
    """Mean of outcomes (prompts, samples), 1 won, 0.5 tied, 0 lost, with its 95% interval.

    The interval is the bootstrap's over prompts and then over each prompt's samples, since answers to one
    prompt are alike.
    """
    rng = np.random.default_rng(seed)
    n_prompts, n = outcomes.shape
    chosen = outcomes[rng.integers(n_prompts, size=(BOOTSTRAP, n_prompts))]
    within = rng.integers(n, size=chosen.shape)
    means = np.take_along_axis(chosen, within, 2).mean((1, 2))
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(outcomes.mean()), "low": float(low), "high": float(high)}


def _best(samples: Samples, scorer: RewardScorer, k: int) -> Samples:
    scores = scorer.score_ids(samples.prompt_ids, samples.answer_ids).view(-1, k)
    kept = [group * k + int(best) for group, best in enumerate(scores.argmax(1))]
    return Samples(*([field[i] for i in kept] for field in vars(samples).values()))  # type: ignore[arg-type]


def _outcomes(
    labeler: Labeler, ours: Samples, theirs: Samples, golds: Mapping[str, list[float]], who: str
) -> np.ndarray:
    if isinstance(labeler, Scorer):
        lead = np.array(golds[who]) - np.array(golds["baseline"])
        return (lead > labeler.tie_margin) + 0.5 * (abs(lead) <= labeler.tie_margin)
    outcomes = []
    for prompt, a, b in zip(ours.prompts, ours.answers, theirs.answers, strict=True):
        try:
            mine, other = labeler.rank(prompt, [a, b]).ranks
        except (Skip, Undo):  # no opinion, and nothing to go back to: a tie
            mine = other = 1
        except Quit as reason:
            raise LabError(f"evaluation: stopped by the labeler: {reason}") from None
        outcomes.append((mine < other) + 0.5 * (mine == other))
    return np.array(outcomes)


def describe_for_people(result: Mapping[str, Any]) -> str:
    """A table of `compare`'s numbers."""
    names = {"baseline": "SFT policy", "policy": "PPO policy", "best_of": "best of n"}
    lines = [
        f"{result['prompts']} unseen prompts, {result['samples_per_prompt']} answers each, "
        f"judged by {result['labeler']}",
        "",
        f"{'':12}{'win rate vs SFT':>24}{'KL':>7}{'gold':>8}{'proxy':>8}{'tokens':>8}"
        f"{'ends':>7}{'distinct-2':>12}",
    ]
    for who, name in names.items():
        if who not in result:
            continue
        row = result[who]
        name = f"best of {row['n']}" if who == "best_of" else name
        rate = row.get("win_rate")
        won = f"{rate['mean']:.1%} ({rate['low']:.1%}-{rate['high']:.1%})" if rate else "-"
        kl = (
            f"{row['kl_nats']:.2f}" if "kl_nats" in row else f"<{row['kl_nats_at_most']:.2f}" if rate else "0"
        )
        gold = f"{row['gold_score']:.3f}" if "gold_score" in row else "-"
        proxy = f"{row['proxy_score']:.2f}" if "proxy_score" in row else "-"
        lines.append(
            f"{name:12}{won:>24}{kl:>7}{gold:>8}{proxy:>8}{row['tokens']:>8.1f}{row['finished']:>7.0%}"
            f"{row['distinct_2']:>12.3f}"
        )
    return "\n".join(lines)


def overoptimization_plot(metrics: Path, path: Path) -> bool:
    """Reward model's and labeler's scores against KL over training (Gao et al. 2022, arXiv 2210.10760).

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in read_metrics(metrics) if "objective/kl" in row]
    if not rows:
        return False
    from matplotlib.figure import Figure

    kl = np.array([row["objective/kl"] for row in rows])
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    curves = [("objective/scores", "reward model (what PPO maximises)", _BLUE, axes)]
    if all("objective/gold_scores" in row for row in rows):
        curves.append(("objective/gold_scores", "labeler (what was meant)", _GOLD, axes.twinx()))
    for key, label, color, own in curves:
        values = np.array([row[key] for row in rows])
        own.scatter(kl, values, s=9, color=color, alpha=0.3, linewidths=0)
        window = max(1, len(values) // 12)
        kernel = np.ones(window) / window
        own.plot(np.convolve(kl, kernel, "valid"), np.convolve(values, kernel, "valid"), color=color)
        own.set_ylabel(label, color=color)
        own.spines["top"].set_visible(False)
    axes.set(xlabel="KL to the SFT policy, nats per answer", title="Proxy and gold against KL over PPO")
    axes.grid(alpha=0.25)
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        figure.savefig(aside, format="png")
    return True


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines."""
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
