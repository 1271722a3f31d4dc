"""How often the 95% intervals of win rates hold the true one: `python -m benchmarks.interval_coverage`.

Simulated evaluations of P prompts with N answers each. A prompt's probability of a win has a normal logit:
its mean is how much better the policy is, its standard deviation how much prompts differ. The truth is the
mean probability over all prompts there could be. Writes benchmarks/results/interval_coverage.json.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks import machine
from lab.files import write_json
from rlhf import intervals

SIZES = ((20, 15), (20, 5), (4, 2), (50, 1), (2, 4))
SPREADS = (0.0, 1.0, 2.5)
LOGITS = (0.0, 1.5, 3.0)
RESULTS = Path(__file__).parent / "results"
NODES = 200
"""Of the Gauss-Hermite rule for the true win rate."""


def coverage(
    prompts: int, answers: int, spread: float, logit: float, repetitions: int, seed: int = 0
) -> float:
    """The fraction of simulated evaluations whose interval holds the true win rate.

    Args:
        prompts, answers: of an evaluation.
        spread: standard deviation of the logits between prompts.
        logit: their mean.
        repetitions: evaluations.
        seed: of the simulation.
    """
    rng = np.random.default_rng(seed)
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    truth = float((weights * _sigmoid(logit + spread * points)).sum() / weights.sum())
    hits = 0
    for _ in range(repetitions):
        chance = _sigmoid(logit + spread * rng.standard_normal(prompts))
        found = intervals.fraction(rng.binomial(answers, chance) / answers, prompts * answers)
        hits += found["low"] <= truth <= found["high"]
    return hits / repetitions


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2_000)
    options = parser.parse_args()
    rows = [
        {
            **{"prompts": prompts, "answers": answers, "logit_spread": spread, "logit_mean": logit},
            "coverage": coverage(prompts, answers, spread, logit, options.repetitions),
        }
        for prompts, answers in SIZES
        for spread in SPREADS
        for logit in LOGITS
    ]
    print("prompts x answers   spread   coverage at mean logits " + ", ".join(f"{x:g}" for x in LOGITS))
    for prompts, answers in SIZES:
        for spread in SPREADS:
            own = [
                r
                for r in rows
                if (r["prompts"], r["answers"], r["logit_spread"]) == (prompts, answers, spread)
            ]
            print(
                f"{prompts:7} x {answers:<7} {spread:7}    " + "  ".join(f"{r['coverage']:.3f}" for r in own)
            )
    RESULTS.mkdir(exist_ok=True)
    write_json(
        RESULTS / "interval_coverage.json",
        {
            "command": f"python -m benchmarks.interval_coverage --repetitions {options.repetitions}",
            "repetitions": options.repetitions,
            "rows": rows,
            "machine": machine.describe(),
        },
    )


if __name__ == "__main__":
    main()
