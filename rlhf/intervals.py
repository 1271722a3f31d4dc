"""95% intervals of means over prompts: answers to one prompt are alike, and no independent evidence.

The prompts are the sample: several answers to each are a cluster, whose mean counts once. How often the
intervals hold the truth was measured: `python -m benchmarks.interval_coverage`.
"""

from typing import Any

import numpy as np
from scipy.stats import t as student_t

CONFIDENCE = 0.95


def fraction(clusters: np.ndarray, answers: int) -> dict[str, float]:
    """Mean of fractions with its interval: Wilson's, for the number of independent answers these are worth.

    That number is what would give a binomial fraction the variance which the mean really has between
    clusters (Kish 1965, section 8.2, the design effect), at most the number of answers and, where all
    clusters agree on 0 or 1 and show no variance, the number of clusters. The quantile is Student's, as the
    variance is estimated from few clusters (Dean and Pagano 2015 compare such intervals).

    Args:
        clusters: (clusters,) the fraction of each, e.g. of a prompt's comparisons that were won.
        answers: independent answers in all clusters together, at most.

    Returns:
        mean, low, high. Of a single cluster nothing is known about others: low is 0, high is 1.
    """
    k, mean = len(clusters), float(clusters.mean())
    if k < 2:
        return {"mean": mean, "low": 0.0, "high": 1.0}
    variance = float(clusters.var(ddof=1)) / k
    agreed = answers if 0 < mean < 1 else k
    worth = min(mean * (1 - mean) / variance, answers) if variance > 0 else agreed
    z2 = float(student_t.ppf((1 + CONFIDENCE) / 2, k - 1)) ** 2 / worth
    centre = (mean + z2 / 2) / (1 + z2)
    half = (z2 * mean * (1 - mean) + z2**2 / 4) ** 0.5 / (1 + z2)
    # At 0 and 1 the bounds are these, but for rounding.
    return {"mean": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def mean(clusters: np.ndarray) -> dict[str, Any]:
    """Mean of (clusters,) numbers with Student's interval; low and high are None for a single cluster."""
    return _around(float(clusters.mean()), clusters)


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, Any]:
    """The ratio of two means over the same clusters, with an interval by linearisation (the delta method)."""
    value = float(above.mean() / below.mean())
    return _around(value, (above - value * below) / below.mean())


def _around(value: float, spread: np.ndarray) -> dict[str, Any]:
    k = len(spread)
    if k < 2:
        return {"mean": value, "low": None, "high": None}
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, k - 1) * spread.std(ddof=1) / k**0.5)
    return {"mean": value, "low": value - half, "high": value + half}
