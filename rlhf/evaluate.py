"""How much better a policy is than another, and at what cost: win rate beside KL, length and diversity."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.errors import LabError
from lab.figure import drawn
from lab.files import explain_write_errors, written_aside
from lab.tracking import read_metrics
from rlhf import intervals
from rlhf.decode import end_tokens, sample
from rlhf.labelers import Answer, Labeler, Quit, Scorer, Skip, Undo, rank_in_order
from rlhf.logprobs import add_logprob_head
from rlhf.scoring import RewardScorer
from rlhf.sequences import side_by_side
from rlhf.tokenization import tokenize_prompts

BATCH_SIZE = 64
BIASED = 0.1
"""How far from half the fraction of comparisons won by the answer shown first may be without a warning."""
# Okabe and Ito's blue and vermillion, which the colour-blind tell apart.
_PROXY, _GOLD, _GREY = "#0072B2", "#D55E00", "#666666"


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


@dataclass(frozen=True)
class Verdicts:
    """What a labeler said of one model's answers against another's, counted for each prompt: (prompts,)."""

    wins: np.ndarray
    ties: np.ndarray
    losses: np.ndarray
    first_won: np.ndarray
    """Comparisons won by the answer that was shown first; 0 where answers are scored one by one."""
    first_lost: np.ndarray
    skipped: int = 0
    """Comparisons the labeler had no opinion on; they are among the ties."""

    @property
    def outcomes(self) -> np.ndarray:
        """The win rate of each prompt, a tie being half a win, float64 (prompts,)."""
        return (self.wins + 0.5 * self.ties) / (self.wins + self.ties + self.losses)

    def win_rate(self, answers: int) -> dict[str, Any]:
        """Win rate with its interval over prompts, and what it is made of, as fractions of all comparisons.

        Args:
            answers: of each model, over all prompts: no more comparisons are independent.
        """
        total = int((self.wins + self.ties + self.losses).sum())
        parts = {name: float(getattr(self, name).sum()) / total for name in ("wins", "ties", "losses")}
        rate = intervals.fraction(self.outcomes, answers)
        return {**rate, **parts, "comparisons": total, "skipped": self.skipped}


def compare(
    policy: Any,
    baseline: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    labeler: Labeler | None,
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
        labeler: who decides, and sees neither which model an answer is from nor always the same one first;
            neither model was trained on what it says here. None: there is no win rate.
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
        "labeler": labeler.name if labeler is not None else "none",
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
    kl = (ours - theirs).numpy().reshape(-1, n).mean(1)
    tokens = {who: _tokens(samples, n) for who, samples in contestants.items()}
    _add(result["policy"], "kl_nats", intervals.mean(kl))
    _add(result["policy"], "length_ratio", intervals.ratio(tokens["policy"], tokens["baseline"]))
    if best_of and scorer is not None:
        result["best_of"]["n"] = best_of
        result["best_of"]["kl_nats_at_most"] = float(np.log(best_of) - (best_of - 1) / best_of)
    verdicts: dict[str, Verdicts] = {}
    for who in ("policy", "best_of"):
        if who in contestants and labeler is not None:
            verdicts[who] = verdict = _verdicts(
                labeler, contestants[who], contestants["baseline"], golds, who, n, seed
            )
            result[who]["win_rate"] = verdict.win_rate(len(prompts) * n)
    if labeler is not None and not isinstance(labeler, Scorer):
        result["first_shown"] = _first_shown(list(verdicts.values()))
    result["warnings"] = _warnings(result)
    result["per_prompt"] = [
        {
            "prompt": prompt,
            "kl_nats": float(kl[i]),
            **{f"{who}_tokens": float(each[i]) for who, each in tokens.items()},
            **{f"{who}_win_rate": float(verdict.outcomes[i]) for who, verdict in verdicts.items()},
            **{f"{who}_ties": int(verdict.ties[i]) for who, verdict in verdicts.items()},
        }
        for i, prompt in enumerate(prompts)
    ]
    rows = [
        {
            "prompt": contestants["policy"].prompts[i],
            **{who: samples.answers[i].text for who, samples in contestants.items()},
            **{f"{who}_gold": scores[i] for who, scores in golds.items()},
        }
        for i in range(0, len(prompts) * n, n)
    ]
    return result, rows


def _add(summary: dict[str, Any], key: str, interval: Mapping[str, Any]) -> None:
    """A number under its name, its interval under key_low and key_high."""
    summary[key] = interval["mean"]
    summary |= {f"{key}_{end}": interval[end] for end in ("low", "high") if interval[end] is not None}


def _tokens(samples: Samples, n: int) -> np.ndarray:
    """Mean length of the answers to each prompt, float64 (prompts,)."""
    return np.array([len(ids) for ids in samples.answer_ids], float).reshape(-1, n).mean(1)


def _first_shown(verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """How often the answer shown first won, of all comparisons that one of the two won.

    The order was drawn for each, so that they are independent where the labeler does not go by it.
    """
    won, lost = (
        sum(int(getattr(each, key).sum()) for each in verdicts) for key in ("first_won", "first_lost")
    )
    if not won + lost:
        return {"decided": 0}
    return {"decided": won + lost, **intervals.fraction(np.repeat([1.0, 0.0], [won, lost]), won + lost)}


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """What makes an evaluation say less than it seems to."""
    said = []
    shown = result.get("first_shown", {})
    biased = shown.get("decided") and abs(shown["mean"] - 0.5) > BIASED
    if biased and not shown["low"] <= 0.5 <= shown["high"]:
        said.append(
            f"the answer shown first won {shown['mean']:.0%} of {shown['decided']} comparisons: the labeler "
            "goes by the order, and the win rate is nearer to 50% than it should be"
        )
    if result["prompts"] < 2:
        said.append("one prompt: nothing is known about others")
    if (rate := result["policy"].get("win_rate")) and rate["ties"] > 0.5:
        said.append(f"{rate['ties']:.0%} of the comparisons are ties")
    if result["policy"]["finished"] == 0:
        said.append("no answer of the policy ends within data.max_new_tokens")
    return said


def describe(samples: Samples) -> dict[str, float]:
    """Length, ends and diversity of answers."""
    bigrams = [pair for ids in samples.answer_ids for pair in itertools.pairwise(ids)]
    return {
        "tokens": float(np.mean([len(ids) for ids in samples.answer_ids])),
        "finished": float(np.mean([answer.finished for answer in samples.answers])),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
    }


def _best(samples: Samples, scorer: RewardScorer, k: int) -> Samples:
    scores = scorer.score_ids(samples.prompt_ids, samples.answer_ids).view(-1, k)
    kept = [group * k + int(best) for group, best in enumerate(scores.argmax(1))]
    return Samples(*([field[i] for i in kept] for field in vars(samples).values()))  # type: ignore[arg-type]


def _verdicts(
    labeler: Labeler,
    ours: Samples,
    theirs: Samples,
    golds: Mapping[str, Sequence[float]],
    who: str,
    n: int,
    seed: int,
) -> Verdicts:
    """What the labeler says. Of one that scores, all n x n pairs of a prompt count; others are asked for n.

    Which answer is shown first is drawn by the seed, each as often as the other within a prompt (but for an
    odd one), so that a labeler which only goes by the order finds both models equally good.
    """
    n_prompts = len(ours.answers) // n
    wins, ties, losses, first_won, first_lost = np.zeros((5, n_prompts), int)
    if isinstance(labeler, Scorer):
        mine, other = (np.reshape(golds[name], (-1, n)) for name in (who, "baseline"))
        lead = mine[:, :, None] - other[:, None, :]  # (prompts, ours, theirs)
        wins, losses = ((sign * lead > labeler.tie_margin).sum((1, 2)) for sign in (1, -1))
        return Verdicts(wins, n * n - wins - losses, losses, first_won, first_lost)
    skipped = 0
    for prompt in range(n_prompts):
        draw = random.Random(f"{seed}/{who}/{prompt}")
        odd = draw.randrange(2)
        shown_second = [(i + odd) % 2 for i in range(n)]
        draw.shuffle(shown_second)
        for i in range(n):
            at, order = prompt * n + i, [1, 0] if shown_second[i] else [0, 1]
            try:
                pair = [ours.answers[at], theirs.answers[at]]
                ranking = rank_in_order(labeler, ours.prompts[at], pair, order)
                (a, b), order = ranking.ranks, ranking.shown or order
            except (Skip, Undo):  # no opinion, and nothing to go back to: a tie
                a = b = 1
                skipped += 1
            except Quit as reason:
                raise LabError(f"evaluation: stopped by the labeler: {reason}") from None
            wins[prompt] += a < b
            ties[prompt] += a == b
            losses[prompt] += a > b
            first = (a, b)[order[0]] - (a, b)[order[1]]
            first_won[prompt] += first < 0
            first_lost[prompt] += first > 0
    return Verdicts(wins, ties, losses, first_won, first_lost, skipped)


def describe_for_people(result: Mapping[str, Any]) -> str:
    """A table of `compare`'s numbers."""
    names = {"baseline": "SFT policy", "policy": "PPO policy", "best_of": "best of n"}
    there_are = result.get("prompts_unseen", result["prompts"])
    of_all = f" of {there_are:,}" if there_are > result["prompts"] else ""
    lines = [
        f"{result['prompts']}{of_all} unseen prompts, {result['samples_per_prompt']} answers each, "
        f"evaluated by {result['labeler']}",
        "",
        f"{'':12}{'win rate vs SFT':>24}{'ties':>6}{'KL':>8}{'gold':>10}{'proxy':>10}{'tokens':>8}"
        f"{'ends':>7}{'distinct-2':>12}",
    ]
    for who, name in names.items():
        if who not in result:
            continue
        row = result[who]
        name = f"best of {row['n']}" if who == "best_of" else name
        rate = row.get("win_rate")
        won = f"{rate['mean']:.1%} ({rate['low']:.1%}-{rate['high']:.1%})" if rate else "-"
        tied = f"{rate['ties']:.0%}" if rate else "-"
        kl = f"{row['kl_nats']:.2f}" if "kl_nats" in row else "0"
        kl = f"<{row['kl_nats_at_most']:.2f}" if "kl_nats_at_most" in row else kl
        gold = f"{row['gold_score']:.3g}" if "gold_score" in row else "-"
        proxy = f"{row['proxy_score']:.3g}" if "proxy_score" in row else "-"
        lines.append(
            f"{name:12}{won:>24}{tied:>6}{kl:>8}{gold:>10}{proxy:>10}{row['tokens']:>8.1f}"
            f"{row['finished']:>7.0%}{row['distinct_2']:>12.3f}"
        )
    policy = result["policy"]
    if "kl_nats_low" in policy and "length_ratio_low" in policy:
        lines += [
            "",
            f"PPO policy: KL {policy['kl_nats_low']:.2f} to {policy['kl_nats_high']:.2f} nats an answer, "
            f"{policy['length_ratio']:.2f} ({policy['length_ratio_low']:.2f} to "
            f"{policy['length_ratio_high']:.2f}) of SFT's length; intervals of 95%, over prompts",
        ]
    if (shown := result.get("first_shown", {})).get("decided"):
        lines.append(
            f"shown first and won: {shown['mean']:.0%} ({shown['low']:.0%}-{shown['high']:.0%}) of "
            f"{shown['decided']} comparisons that either won"
        )
    return "\n".join([*lines, *(f"warning: {line}" for line in result.get("warnings", ()))])


def overoptimization_plot(metrics: Path, path: Path, sft: Mapping[str, Mapping[str, float]]) -> bool:
    """Reward model's and labeler's scores against KL over training (Gao et al. 2022, arXiv 2210.10760).

    Both are standardised by the scores of the SFT policy's answers, so that one axis is fair to both: at 1
    the mean answer is as good as one of the SFT policy's a standard deviation above their mean.

    Args:
        metrics: of the PPO stage.
        path: where the PNG goes.
        sft: of the SFT policy's answers, {proxy, gold: {mean, std}}.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in read_metrics(metrics) if "objective/kl" in row]
    if not rows or "proxy" not in sft:
        return False
    kl = np.array([row["objective/kl"] for row in rows])
    with drawn(path, 7, 4) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=_GREY, linewidth=0.9, linestyle=":")
        curves = [("proxy", "objective/scores", "reward model (what PPO maximises)", _PROXY, "-", "o")]
        if "gold" in sft and all("objective/gold_scores" in row for row in rows):
            curves.append(("gold", "objective/gold_scores", "labeler (what was meant)", _GOLD, "--", "^"))
        for which, key, label, color, dashes, marker in curves:
            spread = sft[which]["std"]
            if not spread > 0:
                label += ", its points: SFT's answers all have one score"
            values = (np.array([row[key] for row in rows]) - sft[which]["mean"]) / (spread or 1.0)
            axes.scatter(kl, values, s=10, color=color, alpha=0.3, linewidths=0, marker=marker)
            window = max(1, len(values) // 12)
            kernel = np.ones(window) / window
            x, y = np.convolve(kl, kernel, "valid"), np.convolve(values, kernel, "valid")
            axes.plot(x, y, dashes, color=color, linewidth=2, label=label)
        axes.set(
            xlabel="KL to the SFT policy, nats per answer",
            ylabel="mean score, in standard deviations\nof the SFT policy's answers from their mean",
            title="Proxy and gold against KL over PPO",
        )
        axes.legend(loc="best", fontsize=9, frameon=False)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return True


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines."""
    with explain_write_errors(str(path), "Free some space and try again."), written_aside(path) as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
