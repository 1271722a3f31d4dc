"""From an answer to its reward: one way to its token ids, one way to its score; and how good the scores are.

Reward models are spoiled between training and use: an end token there and none here, padding taken for the
end of an answer, a score read one token early. So training (`rlhf.ranking`) and all that scores later share
`tokenize` (`rlhf.tokenization`) and `last_token_scores`. Nothing in here imports TRL, which takes seconds.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lab.errors import LabError
from lab.figure import drawn
from lab.statistics import wilson_interval
from rlhf.agreement import (
    BF16_TOLERANCE,
    evaluating,
    first_that_agrees,
    is_coarse,
    make_probe,
    name_of,
    tolerance,
)
from rlhf.data import ordered_pairs
from rlhf.forms import Text
from rlhf.prefix import hidden_states
from rlhf.tokenization import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLUE, _GREY = "#2a6fbb", "#666666"


def pad_right(rows: Sequence[Sequence[int]], multiple_of: int = 1) -> Tensor:
    """Token ids (rows, longest row, rounded up to `multiple_of`).

    The rows' lengths alone say what is padding. Its id is 0, whatever the tokenizer's, and no one should look
    for it: where padding and end of sequence are one token, ids do not tell.
    """
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), -(-longest // multiple_of) * multiple_of, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
    return input_ids


def sequence_classifier(model: nn.Module) -> Any:
    """The model with the `score` layer, out of PEFT's wrapper if it is in one.

    Raises:
        LabError: there is no such layer.
    """
    classifier: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(classifier, "score"):
        raise LabError(
            f"{type(classifier).__name__} is no reward model, it has no `score` layer. "
            "Load it with AutoModelForSequenceClassification."
        )
    return classifier


def last_token_scores(classifier: Any, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """What a sequence classifier's `score` layer says of each row's last token.

    transformers' own forward takes the last id that is not `pad_token_id` for the last token. Where padding
    and end of sequence are one token, that is the one before the end: the end would never be scored.

    Args:
        classifier: a causal model, from `sequence_classifier`.
        input_ids: (rows, time), padded on the right: the model is causal, and no token sees it.
        lengths: tokens of each row.

    Returns:
        (rows, num_labels)
    """
    return scores_of_last(classifier, input_ids, lengths, [1] * len(lengths))


@dataclass(frozen=True)
class ScoreReading:
    """How the rows that a classifier scores are read; see `rlhf.agreement`."""

    shares: bool = True
    """A beginning that all rows have is read once."""
    together: bool = True
    """Rows of several lengths are read together, padded on the right; else one by one."""


_READING_WAYS = [ScoreReading(), ScoreReading(shares=False), ScoreReading(shares=False, together=False)]
"""From the quickest to the plainest."""

_READINGS: weakref.WeakKeyDictionary[Any, dict[bool, ScoreReading]] = weakref.WeakKeyDictionary()


def scores_of_last(
    classifier: Any, input_ids: Tensor, lengths: Sequence[int], wanted: Sequence[int], shared: int = 0
) -> Tensor:
    """What the `score` layer says of rows' last tokens, (sum of wanted, num_labels); see `hidden_states`.

    Raises:
        LabError: that is not what the classifier's own forward says.
    """
    way = score_reading_of(classifier)
    return _scores(classifier, input_ids, lengths, wanted, shared if way.shares else 0, way.together)


def _scores(
    classifier: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    wanted: Sequence[int],
    shared: int,
    together: bool,
) -> Tensor:
    base, config = classifier.base_model, classifier.config
    return classifier.score(hidden_states(base, config, input_ids, lengths, wanted, shared, together))


def score_reading_of(classifier: Any) -> ScoreReading:
    """How a classifier is read, found once: the quickest way that gives what its own forward gives.

    Its own forward scores the last token of a row without padding. What its `score` layer says of the tokens
    before must be what that forward says of the row cut off there.

    Raises:
        LabError: no way does: something else than a linear layer stands between body and score.
    """
    weight = classifier.score.weight
    if weight.device.type == "meta":
        return ScoreReading()
    known = _READINGS.setdefault(classifier, {})
    autocast = torch.is_autocast_enabled(weight.device.type)
    if autocast not in known:
        with torch.autocast(weight.device.type, enabled=False):
            if False not in known:
                known[False] = _find_score_reading(classifier, _READING_WAYS)
        if autocast:  # whose rounding hides what was seen without it
            known[True] = _find_score_reading(classifier, _READING_WAYS[_READING_WAYS.index(known[False]) :])
    return known[autocast]


def _find_score_reading(classifier: Any, ways: Sequence[ScoreReading]) -> ScoreReading:
    device = classifier.score.weight.device
    probe = make_probe(classifier.config)
    lengths = [len(row) - 1 for row in probe.rows]
    ids, wanted = pad_right([row[:-1] for row in probe.rows]).to(device), [len(a) for a in probe.answers]

    def compute(way: ScoreReading) -> list[Tensor]:
        shared = probe.shared if way.shares else 0
        scores = _scores(classifier, ids, lengths, wanted, shared, way.together)
        return list(scores[:, 0].float().split(wanted))

    def own(row: list[int], n: int) -> Tensor:
        ends = range(len(row) - n, len(row))
        rows = [torch.tensor([row[:end]], device=device) for end in ends]
        return torch.stack([type(classifier).forward(classifier, ids).logits[0, 0].float() for ids in rows])

    with evaluating(classifier), torch.no_grad():
        if type(classifier).forward is nn.Module.forward:  # an adapter of another model has none of its own
            truth = compute(ways[-1])
        else:
            truth = [own(row, n) for row, n in zip(probe.rows, wanted, strict=True)]
        scores = torch.cat(truth)
        size = max(float(scores.std(correction=0)), 1e-6)
        within = size * tolerance(classifier, [scores / size])
        if is_coarse(classifier):  # bf16 is wrong by a fraction of a score, however far all are from 0
            within = max(within, BF16_TOLERANCE * float(scores.square().mean().sqrt()))
        way, refused = first_that_agrees(ways, compute, truth, within)
    if way is None:
        raise LabError(
            f"{name_of(classifier)}: its scores are not what its own forward gives ({refused[-1][1]}), so it "
            "can be neither reward model nor critic. Name another model."
        )
    return way


class RewardScorer:
    """Scores answers: (output of the reward model - shift) * scale.

    An answer's score does not depend on what is scored beside it.

    Args:
        model: a causal sequence classifier with one label, with or without PEFT.
        tokenizer: the one it was trained with; only `score_texts` needs it.
        shift: None: `reward_shift` of the model's config.json, where `rlhf.ranking.center` puts it, or 0.
        scale: None: `reward_scale` of the model's config.json, or 1.

    Raises:
        LabError: the model has no `score` layer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        shift: float | None = None,
        scale: float | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._classifier = sequence_classifier(model)
        config = self._classifier.config
        self.shift: float = getattr(config, "reward_shift", 0.0) if shift is None else shift
        self.scale: float = getattr(config, "reward_scale", 1.0) if scale is None else scale
        self._positions = getattr(config.get_text_config(), "max_position_embeddings", None)

    @property
    def config(self) -> Any:
        """Of the reward model."""
        return self._classifier.config

    def score_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        batch_size: int = 32,
    ) -> Tensor:
        """Scores answers as they were generated, with their end token if they have one.

        Args:
            prompt_ids: token ids of n prompts, without padding.
            completion_ids: token ids of n answers, without padding.
            batch_size: answers per forward pass.

        Returns:
            (n,) float32, on the CPU.

        Raises:
            LabError: an answer and its prompt are empty, or more than the model has positions for.
        """
        return self._score([[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)], batch_size)

    def score_texts(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        finished: Sequence[bool],
        batch_size: int = 32,
    ) -> Tensor:
        """Scores answers in text or messages, (n,) float32; see `tokenize` and `score_ids`."""
        answers = zip(prompts, completions, finished, strict=True)
        return self._score([tokenize(*answer, self.tokenizer) for answer in answers], batch_size)

    def _score(self, rows: list[list[int]], batch_size: int) -> Tensor:
        for i, row in enumerate(rows):
            if not row:
                raise LabError(f"answer {i}: it and its prompt are empty. Leave it out.")
            if self._positions is not None and len(row) > self._positions:
                raise LabError(
                    f"answer {i}: it and its prompt have {len(row)} tokens, the reward model has "
                    f"{self._positions} positions. Shorten prompts or answers."
                )
        # Rows of like length need little padding; the longest come first, so that memory runs out at once.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        device = self._classifier.score.weight.device
        scores = torch.empty(len(rows), device=device)
        with evaluating(self.model), torch.no_grad():
            for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
                chosen = [rows[i] for i in batch]
                input_ids, lengths = pad_right(chosen).to(device), [len(row) for row in chosen]
                scores[batch] = last_token_scores(self._classifier, input_ids, lengths)[:, 0].float()
        return (scores.cpu() - self.shift) * self.scale


def held_out_report(
    scorer: RewardScorer, dataset: Iterable[Any], n_bins: int = 10, batch_size: int = 32
) -> dict[str, Any]:
    """How well a reward model orders answers it has not seen, and how well it knows how well.

    By its loss, a reward model says that the answer with the higher reward is preferred with probability
    sigmoid(difference): its confidence, between 0.5 and 1. It is calibrated if pairs of confidence p are in
    the right order p of the time. Calibration error and Brier score measure that.

    Args:
        dataset: rows of `prompt`, `completions`, `ranks`, `finished` and `source`.
        n_bins: bins of equal width between 0.5 and 1.

    Returns:
        For JSON; each pair counts once:
        accuracy, its 95% interval accuracy_low to accuracy_high, pairs, mean_margin;
        brier: mean squared error of the probability, 0.25 if it is always 0.5 (Brier 1950);
        expected_calibration_error: mean distance between a bin's confidence and accuracy, weighted by pairs
            (Guo et al. 2017, arXiv 1706.04599, eq. 3);
        by_source: {source: {accuracy, pairs}};
        by_confidence: [{low, high, confidence, accuracy, pairs}], without empty bins.

    Raises:
        LabError: no two answers of different rank, or see `tokenize` and `RewardScorer.score_ids`.
    """
    rows = list(dataset)
    sources = [row["source"] for row in rows for _ in ordered_pairs(row["ranks"])]
    if not sources:
        raise LabError("held-out comparisons: no prompt has two answers of different rank.")
    rewards = scorer.score_texts(
        [row["prompt"] for row in rows for _ in row["completions"]],
        [completion for row in rows for completion in row["completions"]],
        [finished for row in rows for finished in row["finished"]],
        batch_size,
    ).split([len(row["completions"]) for row in rows])
    margins = [
        (scores[better] - scores[worse]).item() / scorer.scale  # probabilities are those of the loss
        for row, scores in zip(rows, rewards, strict=True)
        for better, worse in ordered_pairs(row["ranks"])
    ]

    margin = torch.tensor(margins, dtype=torch.float64)
    right = (margin > 0).double()
    confidence = margin.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * n_bins).long().clamp(max=n_bins - 1).tolist()
    by_source, by_bin = _group(sources), _group(bins)
    by_confidence = [
        {
            "low": 0.5 + 0.5 * b / n_bins,
            "high": 0.5 + 0.5 * (b + 1) / n_bins,
            "confidence": confidence[by_bin[b]].mean().item(),
            "accuracy": right[by_bin[b]].mean().item(),
            "pairs": len(by_bin[b]),
        }
        for b in sorted(by_bin)
    ]
    pairs_of_row = [sum(1 for _ in ordered_pairs(row["ranks"])) for row in rows]
    low, high = clustered_interval([own.tolist() for own in right.split(pairs_of_row)])
    return {
        "accuracy": right.mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": len(margins),
        "mean_margin": margin.mean().item(),
        "brier": (1 - margin.sigmoid()).square().mean().item(),
        "expected_calibration_error": sum(
            abs(b["confidence"] - b["accuracy"]) * b["pairs"] for b in by_confidence
        )
        / len(margins),
        "by_source": {
            source: {"accuracy": right[indices].mean().item(), "pairs": len(indices)}
            for source, indices in sorted(by_source.items())
        },
        "by_confidence": by_confidence,
    }


def clustered_interval(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95% interval of a fraction whose cases come in clusters, as pairs of answers to one prompt do.

    Wilson's, for so many independent cases as vary as much: the variance of the ratio is that between
    clusters (Cochran 1977, section 2.9), the quantile Student's for as many (Korn and Graubard 1998).

    Args:
        clusters: of cases, each 1 or 0; empty clusters do not count.
    """
    clusters = [cluster for cluster in clusters if len(cluster)]
    k, n = len(clusters), sum(map(len, clusters))
    fraction = sum(map(sum, clusters)) / n
    if k < 2:
        return 0.0, 1.0  # nothing is known of how prompts differ
    z, freedom = 1.959964, k - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    squares = sum((sum(cluster) - fraction * len(cluster)) ** 2 for cluster in clusters)
    variance = squares * k / (k - 1) / n**2
    binomial = fraction * (1 - fraction)
    # Where all cases are alike nothing is seen of the variance, and each cluster counts as one.
    effective = min(float(n), binomial / variance) if variance > 0 and binomial > 0 else float(k)
    effective = max(1, round(effective * (z / t) ** 2))
    interval = wilson_interval(fraction * effective, effective)
    return float(interval.low), float(interval.high)


def _group(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Key -> the indices at which it stands."""
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return groups


def _wilson_error(fraction: float, n: int) -> tuple[float, float]:
    """How far the Wilson score interval of one standard error reaches below and above an observed fraction.

    It is not empty where the fraction is 0 or 1 and does not leave [0, 1] (Wilson 1927).
    """
    centre = (fraction + 0.5 / n) / (1 + 1 / n)
    half = (fraction * (1 - fraction) / n + 0.25 / n**2) ** 0.5 / (1 + 1 / n)
    return max(0.0, fraction - (centre - half)), max(0.0, centre + half - fraction)


def calibration_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws a `held_out_report` to `path`, a PNG: probability predicted and observed, and how many pairs.

    Raises:
        LabError: the file cannot be written.
    """
    from matplotlib.ticker import PercentFormatter

    bins = report["by_confidence"]
    confidence = [b["confidence"] for b in bins]
    accuracy = [b["accuracy"] for b in bins]
    pairs = [b["pairs"] for b in bins]
    error = [_wilson_error(a, n) for a, n in zip(accuracy, pairs, strict=True)]

    with drawn(path, 6, 6) as figure:
        upper, lower = figure.subplots(2, sharex=True, height_ratios=[4, 1])
        upper.plot([0.5, 1], [0.5, 1], color=_GREY, linewidth=0.9, linestyle="--", label="calibrated")
        upper.errorbar(
            confidence,
            accuracy,
            [*zip(*error, strict=True)],
            fmt="o",
            color=_BLUE,
            capsize=3,
            label="reward model, with standard error",
        )
        upper.set(
            title=f"{report['accuracy']:.1%} ({report['accuracy_low']:.1%} to {report['accuracy_high']:.1%}) "
            f"of {report['pairs']:,} held-out pairs in the right order",
            ylabel="observed: in the right order",
            xlim=(0.49, 1.01),
            ylim=(None, 1.03),
        )
        upper.legend(
            loc="best",
            fontsize=8,
            title=f"Brier score {report['brier']:.3f}\n"
            f"expected calibration error {report['expected_calibration_error']:.3f}",
            title_fontsize=8,
            alignment="left",
        )
        bars = lower.bar(
            [b["low"] for b in bins],
            pairs,
            [b["high"] - b["low"] for b in bins],
            align="edge",
            color=_BLUE,
            alpha=0.5,
            edgecolor="white",
        )
        lower.bar_label(bars, [f"{n:,}" for n in pairs], fontsize=7, color=_GREY)
        lower.margins(y=0.25)
        lower.set_yticks([])  # the numbers are on the bars
        lower.set(xlabel="predicted: sigmoid of the difference of rewards", ylabel="pairs")
        for axes in (upper, lower):
            axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        upper.yaxis.set_major_formatter(PercentFormatter(1, 0))
