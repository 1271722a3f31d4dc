"""Where a sweep looks next: a grid, random draws, or Bayesian search. Nothing here runs anything.

`next_setting` is a function of what was tried so far and of a seed, and of nothing else: a sweep that was
stopped goes on as if it never was, and the same sweep asks for the same settings again.
"""

import collections
import functools
import itertools
import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab.errors import LabError, did_you_mean

METHODS = ("grid", "random", "bayes")
Goal = Literal["maximize", "minimize"]
GOALS: tuple[Goal, ...] = ("maximize", "minimize")
RANGES = ("uniform", "int_uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values")
DISTRIBUTIONS = (*RANGES, "categorical", "constant")
DIGITS = 4
"""Significant digits of a number drawn from a range: what a folder is called is exactly what was run."""
MOST_EXPONENT = 700
"""Of e, in a float."""
ATTEMPTS = 200
"""Draws in which nothing new comes up, after which what is left is tried in order."""

Setting = dict[str, Any]
"""Values by the dotted keys of the config."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What a key of the config may be: one of `values`, or a number from `low` to `high`."""

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    q: float = 0.0
    """Numbers are multiples of this; 0 for any number."""

    @property
    def log(self) -> bool:
        """Whether every factor is as likely as any other, and not every distance."""
        return "log" in self.distribution

    @property
    def count(self) -> int | None:
        """How many values there are; None: more than can be counted."""
        if self.values:
            return len(self.values)
        if self.distribution == "int_uniform":
            return int(self.high) - int(self.low) + 1
        if self.q:
            first, last = _multiples(self.low, self.high, self.q)
            return last - first + 1
        return None

    def choice(self, number: int) -> Any:
        """One of the values that can be counted, in order, from 0. A range is never written out."""
        if self.values:
            return self.values[number]
        if self.distribution == "int_uniform":
            return int(self.low) + number
        return self.tidy((_multiples(self.low, self.high, self.q)[0] + number) * self.q)

    def at(self, quantile: float) -> Any:
        """The value that a share `quantile` (0 to below 1) of all draws lies below."""
        if self.values:
            return self.values[int(quantile * len(self.values))]
        if self.distribution == "int_uniform":
            return int(self.low) + int(quantile * (int(self.high) - int(self.low) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        number = low + quantile * (high - low)
        return self.tidy(math.exp(number) if self.log else number)

    def tidy(self, number: float) -> float | int:
        """The nearest number that a draw can give."""
        if self.q:
            first, last = _multiples(self.low, self.high, self.q)
            multiple = min(max(round(number / self.q), first), last) * self.q
            return int(multiple) if float(self.q).is_integer() else float(f"{multiple:.12g}")
        return min(max(float(f"{number:.{DIGITS}g}"), float(self.low)), float(self.high))

    def as_wandb(self) -> dict[str, Any]:
        """This parameter in a sweep of W&B's."""
        if self.values:
            one = len(self.values) == 1
            return {"value": self.values[0]} if one else {"values": list(self.values)}
        spec = {"distribution": self.distribution, "min": self.low, "max": self.high}
        return spec | ({"q": self.q} if self.q else {})


@dataclass(frozen=True)
class Tried:
    """A setting that was asked for, and its value once there is one."""

    setting: Setting
    value: float | None = None
    pending: bool = False
    """Still running: without a value, and not failed."""

    @functools.cached_property
    def name(self) -> str:
        """Equal for settings that are the same."""
        return same_name(self.setting)


def read_parameters(raw: Any, source: str) -> list[Parameter]:
    """The parameters of a sweep file, in W&B's format; keys are dotted, or groups nested as W&B nests them.

    Args:
        raw: what the file says under `parameters`.
        source: the file's name, for errors.

    Raises:
        LabError: they are not as they should be.
    """
    parameters = list(_read_group(raw, source, "parameters", ""))
    keys = {parameter.key for parameter in parameters}
    for key in [parameter.key for parameter in parameters]:
        words = key.split(".")
        for above in (".".join(words[:n]) for n in range(1, len(words))):
            if above in keys:
                raise LabError(f"{source}: parameters {above} and {key} contradict each other. Keep one.")
    if len(keys) < len(parameters):
        counts = collections.Counter(parameter.key for parameter in parameters)
        raise LabError(f"{source}: parameter {counts.most_common(1)[0][0]} is there twice. Keep one.")
    return parameters


def _read_group(raw: Any, source: str, where: str, prefix: str) -> Iterator[Parameter]:
    if not isinstance(raw, Mapping) or not raw:
        raise LabError(
            f"{source}: {where} = {raw!r} is not valid. Expected config keys, each with what it may be, "
            "such as agent.learning_rate: {values: [1e-4, 3e-4]}."
        )
    for name, spec in raw.items():
        key = f"{prefix}{name}"
        if not isinstance(spec, Mapping) or not spec:
            raise LabError(
                f"{source}: parameter {key} = {spec!r} is not valid. Expected {{values: [...]}}, "
                "{value: ...} or {min: ..., max: ...}."
            )
        if "parameters" in spec and len(spec) == 1:
            yield from _read_group(spec["parameters"], source, f"{where}.{key}.parameters", f"{key}.")
        else:
            yield _read_parameter(key, spec, f"{source}: parameter {key}")


def _read_parameter(key: str, spec: Mapping[str, Any], where: str) -> Parameter:
    """One parameter; `where` begins its errors."""
    known = ("value", "values", "min", "max", "q", "distribution")
    distribution = spec.get("distribution")
    if distribution is not None and distribution not in DISTRIBUTIONS:
        hint = _instead(distribution, spec) or (
            f"{did_you_mean(str(distribution), DISTRIBUTIONS)} Known: {', '.join(DISTRIBUTIONS)}."
        )
        raise LabError(f"{where}: distribution = {distribution!r} is not supported.{hint}")
    if "probabilities" in spec:
        raise LabError(f"{where}: probabilities: all values are drawn alike. Leave them out.")
    for name in spec:
        if name not in known:
            raise LabError(
                f"{where}: unknown key {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}."
            )
    kind = [name for name in ("value", "values", "min") if name in spec]
    if len(kind) != 1 or ("min" in spec) != ("max" in spec):
        raise LabError(f"{where}: expected either value, or values, or min and max.")
    if kind[0] != "min":
        return _read_choices(key, spec, where)
    for name in ("min", "max", "q"):
        number = spec.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise LabError(f"{where}: {name} = {number!r} is not valid. Expected a number.")
    low, high = spec["min"], spec["max"]
    if distribution is None:
        distribution = "int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform"
    if distribution not in RANGES:
        raise LabError(f"{where}: distribution {distribution!r} takes value or values, not min and max.")
    if low >= high:
        raise LabError(f"{where}: min {low} is not below max {high}.")
    if distribution == "int_uniform" and not (float(low).is_integer() and float(high).is_integer()):
        raise LabError(f"{where}: min and max of int_uniform must be whole numbers, not {low} and {high}.")
    if "log" in distribution and low <= 0:
        raise LabError(f"{where}: min {low} must be above 0: {distribution} draws factors.")
    q = spec.get("q", 1) if distribution.startswith("q_") else 0
    if "q" in spec and not distribution.startswith("q_"):
        raise LabError(f"{where}: q is for q_uniform and q_log_uniform_values, not for {distribution}.")
    if q < 0 or (q == 0 and distribution.startswith("q_")):
        raise LabError(f"{where}: q = {q} must be positive.")
    if q:
        first, last = _multiples(low, high, q)
        if first > last:
            raise LabError(f"{where}: no multiple of q = {q} lies between min {low} and max {high}.")
    return Parameter(key=key, distribution=distribution, low=low, high=high, q=q)


def _instead(distribution: Any, spec: Mapping[str, Any]) -> str:
    """What to write for a distribution that W&B has and the lab has not; empty for any other."""
    if distribution in ("log_uniform", "q_log_uniform", "inv_log_uniform"):
        # Ends as exponents of e, which many take for the ends themselves: so they are not guessed.
        given = [spec.get(name) for name in ("min", "max")]
        sign = -1 if distribution.startswith("inv") else 1
        ends = sorted(
            sign * end for end in given if isinstance(end, int | float) and abs(end) < MOST_EXPONENT
        )
        words = [f"{name}: {math.exp(end):.4g}" for name, end in zip(("min", "max"), ends, strict=False)]
        other = "q_log_uniform_values" if distribution.startswith("q") else "log_uniform_values"
        same_as = f", here {', '.join(words)}" if len(words) == 2 else ""
        return f" Its ends are exponents of e. Write {other} with the numbers themselves{same_as}."
    if distribution == "inv_log_uniform_values":
        return " It draws the same as log_uniform_values: write that."
    if distribution in ("normal", "q_normal", "log_normal", "q_log_normal"):
        plain = "q_" * distribution.startswith("q_")
        plain += "log_uniform_values" if "log" in distribution else "uniform"
        return f" It has no ends. Write {plain} with min and max, for example two sigma on either side of mu."
    if distribution == "categorical_w_probabilities":
        return " All values are drawn alike. Write categorical, without probabilities."
    return ""


def _read_choices(key: str, spec: Mapping[str, Any], where: str) -> Parameter:
    values = spec["values"] if "values" in spec else [spec["value"]]
    if "q" in spec or spec.get("distribution", "categorical") not in ("categorical", "constant"):
        raise LabError(f"{where}: values take neither q nor a distribution but categorical.")
    if not isinstance(values, list) or not values:
        raise LabError(f"{where}: values = {values!r} is not valid. Expected a list such as [1, 2, 3].")
    seen: dict[str, Any] = {}
    for value in values:
        try:
            name = same_name(value)
        except (TypeError, ValueError):  # a date, NaN
            raise LabError(
                f"{where}: {value!r} is not valid. Expected numbers, texts, true, false or null, or lists or "
                "mappings of these."
            ) from None
        if name in seen:
            raise LabError(f"{where}: {seen[name]!r} is there twice. Leave one out.")
        seen[name] = value
    return Parameter(
        key=key, distribution="constant" if len(values) == 1 else "categorical", values=tuple(values)
    )


def same(one: Any, other: Any) -> bool:
    """Whether two settings or values are the same to a config: 1 and 1.0 are, 1 and true are not."""
    return same_name(one) == same_name(other)


def same_name(value: Any) -> str:
    """Equal for settings or values that are the `same`."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(key)}:{same_name(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(same_name, value)) + "]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, allow_nan=False)


def grid(parameters: Sequence[Parameter]) -> Iterator[Setting] | None:
    """All settings, the last parameter changing fastest; None: more than can be counted."""
    size = grid_size(parameters)
    return None if size is None else (_in_grid(parameters, number) for number in range(size))


def _in_grid(parameters: Sequence[Parameter], number: int) -> Setting:
    """The setting of that number, from 0: the choices are its digits."""
    setting: Setting = {}
    for parameter in reversed(parameters):
        number, choice = divmod(number, parameter.count or 1)
        setting[parameter.key] = parameter.choice(choice)
    return dict(reversed(setting.items()))


def grid_size(parameters: Sequence[Parameter]) -> int | None:
    """How many settings there are; None: more than can be counted."""
    sizes = [parameter.count for parameter in parameters]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def next_setting(
    method: str, parameters: Sequence[Parameter], goal: Goal, seed: int, tried: Sequence[Tried]
) -> Setting | None:
    """The setting to try after those that were `tried`, none of them again; None: there is no other.

    Args:
        method: grid (in order, the last parameter changing fastest), random, or bayes.
        parameters: what may vary; for a grid, all countable.
        goal: maximize or minimize; only bayes minds.
        seed: of the draws.
        tried: all settings so far, in the order they were asked for.
    """
    size = grid_size(parameters)
    if size is not None and len(tried) >= size:
        return None
    every = grid(parameters) or iter(())
    known = {one.name for one in tried}
    if method == "grid":
        return next((setting for setting in every if same_name(setting) not in known), None)
    draws = _bayes(parameters, goal, seed, tried) if method == "bayes" else _random(parameters, seed, tried)
    some = itertools.chain(itertools.islice(draws, ATTEMPTS), every)
    return next((setting for setting in some if same_name(setting) not in known), None)


def _random(parameters: Sequence[Parameter], seed: int, tried: Sequence[Tried]) -> Iterator[Setting]:
    for attempt in itertools.count():
        # Seeded by a text, which Python hashes the same everywhere.
        rng = random.Random(f"{seed}/{len(tried)}/{attempt}")
        yield {parameter.key: parameter.at(rng.random()) for parameter in parameters}


def _bayes(
    parameters: Sequence[Parameter], goal: Goal, seed: int, tried: Sequence[Tried]
) -> Iterator[Setting]:
    """What Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) would try.

    Its study is made anew from what was tried. Of settings that still run it takes for granted that they come
    out badly ("constant liar"), so that runs side by side do not all look at the same place.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = [parameter for parameter in parameters if len(parameter.values) != 1]
    distributions = {parameter.key: _as_optuna(parameter) for parameter in searched}
    numbers = {p.key: {same_name(value): i for i, value in enumerate(p.values)} for p in searched}
    study = optuna.create_study(direction=goal)
    states = optuna.trial.TrialState
    for one in tried:
        state = states.COMPLETE if one.value is not None else states.RUNNING if one.pending else states.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=one.value,
                params={
                    p.key: numbers[p.key][same_name(one.setting[p.key])] if p.values else one.setting[p.key]
                    for p in searched
                },
                distributions=distributions,
            )
        )
    for attempt in itertools.count():
        draw_seed = random.Random(f"{seed}/{len(tried)}/{attempt}").getrandbits(31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(seed=draw_seed, constant_liar=True)
        found = study.ask(distributions).params
        yield {
            p.key: p.values[found.get(p.key, 0)]
            if p.values
            else found[p.key]
            if p.distribution == "int_uniform"
            else p.tidy(found[p.key])
            for p in parameters
        }


def _as_optuna(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.values:  # by their number: Optuna warns of lists and mappings
        return distributions.CategoricalDistribution(list(range(len(parameter.values))))
    if parameter.distribution == "int_uniform":
        return distributions.IntDistribution(int(parameter.low), int(parameter.high))
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _multiples(low: float, high: float, q: float) -> tuple[int, int]:
    """The first and the last multiple of `q` from `low` to `high`; 1e-9 forgives rounding."""
    return math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
