"""How often `lab compare` is wrong where the truth is known: `python -m benchmarks.verdict_errors`.

Runs are drawn, compared and put into words by the very code that compares kept runs: `lab.compare.compare`
and the headline of `lab.report`. Measured are

- false claims: comparisons of groups that are all alike in which the headline, or any row of the table, says
  that one is better or worse. At most 5% are meant to be;
- power: how often a group that is better by 1, 2 or 3 standard deviations of a run is called so;
- coverage: how often an interval that is shown holds the truth.

Scores are normal, or bimodal: 30% of the runs fail and score 10 standard deviations less. Every figure comes
with twice its Monte-Carlo standard error. Power is drawn a quarter as often, what is rarer than one task and
equal groups half as often.
What the percentile bootstrap of the probability of improvement claims of equals is measured, too.

    python -m benchmarks.verdict_errors [--reps 2000] [--jobs 2]
"""

import argparse
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from lab import report, statistics
from lab.compare import Comparison, Question, compare
from lab.files import write_json
from lab.records import Record, Series

RESULT = Path(__file__).parent / "results" / "verdict_errors.json"
METRIC = "eval/mean_reward"
FAILING, FALL = 0.3, 10.0
"""Share of runs that fail in bimodal scores, and by how many standard deviations they are lower."""

PARTS = {"equals_several_tasks": 2, "equals_odd": 2, "power": 4, "power_several_tasks": 4}
"""Of the repetitions, what a table is drawn with."""


class Cell(NamedTuple):
    """What is simulated."""

    kind: str
    """normal, bimodal, or bimodal of another kind: half of the runs fail."""
    groups: int
    runs: tuple[int, ...]
    """Of each group, in turn."""
    tasks: int = 1
    seeds: str = "different"
    """different: no two groups share seeds; same: paired by seed."""
    shared: float = 0.0
    """Share of the variance that a seed gives to all groups alike."""
    better: float = 0.0
    """By how many standard deviations the last group is better than the others."""
    spread: float = 1.0
    """Standard deviation of the first group, relative to that of the others."""


def draw(cell: Cell, rng: np.random.Generator) -> list[Record]:
    """Runs of one comparison: one value each."""
    shared = rng.normal(0, math.sqrt(cell.shared), (cell.tasks, max(cell.runs)))
    records = []
    for group, task in itertools.product(range(cell.groups), range(cell.tasks)):
        n = cell.runs[group % len(cell.runs)]
        values = shared[task, :n] + rng.normal(0, math.sqrt(1 - cell.shared), n)
        values *= cell.spread if group == 0 else 1.0
        if cell.kind != "normal":
            values -= FALL * (rng.random(n) < (0.5 if cell.kind == "half fail" else FAILING))
        values += cell.better * (group == cell.groups - 1)
        unit = 100.0**task  # of another unit on each task
        for seed, value in enumerate(values):
            name = f"g{group}-t{task}-s{seed}"
            seed_ = seed if cell.seeds == "same" else 1000 * group + seed
            config = {"algo": f"g{group}", "env_id": f"t{task}", "seed": seed_}
            series = {METRIC: Series(np.zeros(1), np.array([unit * value]))}
            about = {"id": name, "name": name, "source": name, "metrics": frozenset(series)}
            records.append(Record(**about, config=config, series=series))
    return records


def asked(cell: Cell, rng: np.random.Generator) -> Comparison:
    """What `lab compare runs` finds in one draw."""
    return compare(draw(cell, rng), Question(metric=METRIC, by=("algo",), reps=1))


def claims(comparison: Comparison) -> bool:
    """Whether the headline says that one is better, or the table does."""
    told = report.headline(comparison)
    in_words = "is better than" in told or told.startswith(("Better than", "Worse than"))
    in_table = any(
        report.verdict(group.difference, comparison.lower_is_better) != "not settled"
        for group in comparison.groups
        if group.difference is not None
    )
    assert in_words == in_table, told
    return in_words


def measure(cell: Cell, reps: int, seed: int) -> dict[str, Any]:
    """One cell of the tables: shares, with twice their standard error."""
    rng = np.random.default_rng([seed, *(ord(letter) for letter in str(cell))])
    count: Counter[str] = Counter()
    for _ in range(reps):
        comparison = asked(cell, rng)
        count["claims"] += claims(comparison)
        better = next(g for g in comparison.groups if g.label == f"g{cell.groups - 1}")
        of = better.difference
        assert of is not None
        count["right"] += of.settled and of.point > 0
        if cell.tasks == 1:  # scores are in their own unit
            count["difference"] += of.low <= cell.better <= of.high
            base = 0.0 if cell.kind == "normal" else -FALL * (0.5 if cell.kind == "half fail" else FAILING)
            count["mean"] += better.interval.low <= base + cell.better <= better.interval.high
    return {
        **{key: value for key, value in cell._asdict().items() if value != Cell._field_defaults.get(key)},
        **{name: share(count[name], reps) for name in sorted(count)},
        "reps": reps,
    }


def share(count: int, reps: int) -> dict[str, float]:
    """A share and twice its standard error, which at 0 is that of half a case."""
    rate = max(count, 0.5) / reps
    return {"share": round(count / reps, 4), "two_se": round(2 * math.sqrt(rate * (1 - rate) / reps), 4)}


def cells() -> dict[str, list[Cell]]:
    """What is measured, by the name of its table."""
    equals = [
        Cell(kind, groups, (runs,))
        for kind in ("normal", "bimodal")
        for groups in (2, 3, 5, 10)
        for runs in (3, 5, 10)
    ]
    paired = [cell._replace(seeds="same", shared=0.5) for cell in equals]
    tasks = [
        Cell(kind, groups, (runs,), tasks=n)
        for kind in ("normal", "bimodal")
        for n in (2, 5)
        for groups in (2, 5)
        for runs in (3, 5)
    ]
    odd = [
        *(Cell(kind, groups, (3, 10)) for kind in ("normal", "bimodal") for groups in (2, 5)),
        *(Cell(kind, groups, (5, 10)) for kind in ("normal", "bimodal") for groups in (2, 5)),
        *(Cell("half fail", groups, (runs,)) for groups in (2, 5) for runs in (3, 5, 10)),
        *(Cell("normal", groups, (runs,), spread=5.0) for groups in (2, 5) for runs in (3, 5)),
        *(Cell(kind, 2, (1,), tasks=n) for kind in ("normal", "bimodal") for n in (5, 20)),
    ]
    power = [
        Cell("normal", groups, (runs,), better=better, seeds=seeds, shared=shared)
        for groups in (2, 5)
        for runs in (3, 5, 10)
        for seeds, shared in (("different", 0.0), ("same", 0.0), ("same", 0.5), ("same", 0.8))
        for better in (1.0, 2.0, 3.0)
    ]
    several = [
        Cell("normal", 2, (runs,), tasks=3, better=better) for runs in (3, 5) for better in (1.0, 2.0, 3.0)
    ]
    return {
        **{"equals": equals, "equals_paired": paired, "equals_several_tasks": tasks, "equals_odd": odd},
        **{"power": power, "power_several_tasks": several},
    }


def before(reps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two equal groups, called different where the bootstrap's interval of P(X > Y) does not hold 0.5."""
    rng = np.random.default_rng(seed)
    for runs in (3, 5, 10):
        sure = 0
        for _ in range(reps):
            x, y = rng.normal(0, 1, (2, runs))
            interval = statistics.probability_of_improvement([x], [y], reps=500)
            sure += interval.low > 0.5 or interval.high < 0.5
        yield {"groups": 2, "runs": runs, "claims": share(sure, reps), "reps": reps}


def coverage_of_aggregates(reps: int, seed: int) -> Iterator[dict[str, Any]]:
    """The bootstrap intervals of the IQM and the mean, corrected for few seeds and as rliable has them."""
    rng = np.random.default_rng(seed)
    for tasks, runs in itertools.product((1, 3), (3, 5, 10)):
        count: Counter[str] = Counter()
        for _ in range(reps):
            scores = list(rng.normal(0, 1, (tasks, runs)))
            for name, few_seeds in (("corrected", True), ("percentile", False)):
                found = statistics.stratified_bootstrap(
                    scores, ("iqm", "mean"), reps=500, few_seeds=few_seeds
                )
                for aggregate, interval in found.items():
                    count[f"{aggregate}_{name}"] += interval.low <= 0 <= interval.high
        yield {
            **{"tasks": tasks, "runs": runs, "reps": reps},
            **{name: share(value, reps) for name, value in sorted(count.items())},
        }


def simulate(tables: dict[str, Sequence[Cell]], reps: int, jobs: int, seed: int = 0) -> dict[str, Any]:
    """Every cell of every table."""
    todo = [(name, cell) for name, of in tables.items() for cell in of]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}
    with ProcessPoolExecutor(jobs) as pool:
        futures = [
            (name, pool.submit(measure, cell, reps // PARTS.get(name, 1), seed)) for name, cell in todo
        ]
        for name, future in futures:
            found[name].append(future.result())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reps", type=int, default=2000, help="comparisons drawn of each cell (2000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    options = parser.parse_args()
    start = time.time()
    result = {
        "command": f"python -m benchmarks.verdict_errors --reps {options.reps}",
        **simulate(dict(cells()), options.reps, options.jobs),
        "percentile_bootstrap_sentence": list(before(options.reps, 1)),
        "coverage_of_aggregates": list(coverage_of_aggregates(options.reps, 2)),
    }
    worst = max(
        (entry for name, of in result.items() if name.startswith("equals") for entry in of),
        key=lambda entry: entry["claims"]["share"],
    )
    result |= {
        "worst_false_claims": worst,
        "seconds": round(time.time() - start),
        "machine": machine.describe(),
    }
    write_json(RESULT, result)
    print(f"most false claims: {worst}\nwritten: {RESULT}")


if __name__ == "__main__":
    main()
