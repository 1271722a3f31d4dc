"""What a run's curve comes down to, which way it is better, and how far runs are compared.

A comparison is fair at one budget: all runs count up to the largest step that each of them reached.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lab import statistics
from lab.records import Record, Series

SCORES = ("final", "last", "best", "auc")
GOALS = ("maximize", "minimize")
FINAL_SHARE = 0.1
SAME_BUDGET = 0.01
"""Ends of runs that differ by no more of their steps count as one: updates come in rounds."""


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


LESS = _words(
    "bce bits bpb bpc bpd brier ce cer collision collisions cost costs crash crashes crossentropy",
    "deviance ece eer entropyloss err error errors failure failures fid hinge huber kid kl latency",
    "loss losses lpips mae mape misclassified mse msle nll overfit perplexity ppl regret rmse rmsle",
    "smape ter toxicity underfit violation violations wer",
)
"""Words in a metric's name that say that less is better."""
MORE = _words(
    "acc accuracies accuracy ap auc auprc auroc bleu chrf comet correct dice elo explained f1 fps hit",
    "hits iou kappa likelihood map mcc meteor miou mrr ndcg normalised normalized passed pearson",
    "precision psnr r2 recall return returns rew reward rewards roc rouge score scores solved",
    "spearman speedup ssim success successes throughput win winrate wins won",
)
"""Words that say that more is better."""
TURNING = _words(
    "anti avoided coef coefficient distance drop false free gap inv inverse len length lr minus neg",
    "negative no non norm reduction rejected scale sem std stddev stderr stdev target threshold to var",
    "variance weight",
)
"""Words beside which the others say nothing: of the scale of a loss it is not known which way is better."""
ONE_UNIT = _words(
    "acc accuracy auc auroc bleu correct dice f1 iou miou normalised normalized percent precision r2",
    "rate recall solved success win winrate",
)
"""Words of metrics that have the same unit on all tasks."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far the runs of one task are compared."""

    until: float
    """The last step that counts; infinity: each run to its own end."""
    reached: tuple[float, float]
    """Where the runs end: the first and the last."""
    limited_by: tuple[str, ...]
    """Names of the runs that ended there, if others went on."""
    uneven: bool = False
    """Whether each run has one value alone, and these are of different steps."""
    without_steps: tuple[str, ...] = ()
    """Names of the runs that say their value once, without a step, if others have steps."""


def words_of(metric: str) -> list[str]:
    """The words of a metric's name, split at what is no letter or digit and at capitals."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", metric)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", apart) if word]


def direction(metric: str) -> str:
    """minimize or maximize by the words of a metric's name; empty if they do not say or contradict."""
    words = {form for word in words_of(metric) for form in (word, word.rstrip("0123456789"))}
    less, more = bool(words & LESS), bool(words & MORE)
    turning = TURNING - {"variance", "var"} if "explained" in words else TURNING
    return "" if less == more or words & turning else "minimize" if less else "maximize"


def same_unit(metric: str) -> bool:
    """Whether a metric means the same on all tasks, as a share does and a game's points do not."""
    return bool(set(words_of(metric)) & ONE_UNIT)


def score_of(series: Series, how: str, lower_is_better: bool = False) -> float:
    """What a curve comes down to: final, the mean over the last tenth of its x; last, best, or auc.

    NaN if it is empty.
    """
    x, y = series
    if not x.size:
        return math.nan
    if not series.has_steps:
        return math.nan if how == "auc" else float(y[-1])
    if how == "last":
        return float(y[-1])
    if how == "best":
        usable = y[np.isfinite(y)]
        return math.nan if not usable.size else float(usable.min() if lower_is_better else usable.max())
    if how == "auc":
        return statistics.area_under_curve(x, y) if x.size > 1 else math.nan
    return float(y[x >= x[-1] - FINAL_SHARE * (x[-1] - x[0])].mean())


def upto(series: Series, until: float) -> Series:
    """The part of a curve that a budget leaves."""
    kept = series.x <= until
    return series if kept.all() else Series(series.x[kept], series.y[kept])


def places(steps: npt.NDArray[np.float64], at: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Which values a run had said last at each of the steps `at`: as if it had been evaluated only then."""
    found = np.unique(np.searchsorted(steps, at, "right") - 1)
    return found[found >= 0]


def diverged(record: Record, metric: str) -> bool:
    """Whether a run ended in numbers that are none: by its last value, or by why it failed."""
    series = record.series.get(metric)
    if series is not None and not np.isfinite(series.y[-1]):
        return True
    return record.state == "failed" and bool(_DIVERGED.search(record.error))


_DIVERGED = re.compile(r"non-?finite|not finite|\bnan\b|\binf(inite|inity)?\b|diverge", re.IGNORECASE)


def budget(records: Sequence[Record], metric: str) -> Budget:
    """How far runs of one task can be compared: to the largest step that all of them reached.

    Runs that diverged do not count: they had their chance. Nor do runs of which all have one value. Where
    some say their value without a step, all count to their own ends.
    """
    counting = [r for r in records if metric in r.series and not diverged(r, metric)]
    ends = [(float(r.series[metric].x[-1]), r) for r in counting if r.series[metric].has_steps]
    if not ends:
        return Budget(until=math.inf, reached=(math.nan, math.nan), limited_by=())
    first, last = min(end for end, _ in ends), max(end for end, _ in ends)
    single = all(record.series[metric].x.size == 1 for _, record in ends)
    same = last - first <= SAME_BUDGET * abs(last)
    if bare := tuple(r.name for r in counting if not r.series[metric].has_steps):
        return Budget(until=math.inf, reached=(first, last), limited_by=(), without_steps=bare)
    if single or same:
        return Budget(until=math.inf, reached=(first, last), limited_by=(), uneven=not same)
    limiting = tuple(record.name for end, record in ends if end - first <= SAME_BUDGET * abs(last))
    return Budget(until=first, reached=(first, last), limited_by=limiting)
