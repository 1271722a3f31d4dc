"""The file of a sweep: W&B's format, with the config that is varied and the seeds of every setting.

    config: configs/rl/pong_dqn_cpu.yaml    what `lab train` would train
    method: random                          or grid, or bayes
    metric: {name: eval/mean_reward, goal: maximize}
    parameters:
      agent.learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-3}
    seeds: [0, 1, 2]                        each setting is run with each; left out: the config's seed
    count: 20                               settings

It is checked whole, with the config of every run, before anything runs.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lab import config, pipeline, search
from lab.errors import LabError, did_you_mean
from lab.search import Goal, Parameter, Setting, Tried

Name = TypeVar("Name", bound=str)

MOST_SETTINGS = 1_000
"""More than anybody runs; checking them alone takes a minute."""
_KEYS = ("name", "description", "config", "method", "metric", "parameters", "seeds", "count", "search_seed")
_NOT_HERE = {
    "early_terminate": "the lab trains every run to its end. Leave it out",
    "pipeline": "is a key of a config. A sweep names its config with config:, and what varies in parameters:",
    "program": "lab sweep runs `lab train`. Leave it out, and name what it trains with config:",
    "command": "lab sweep runs `lab train`. Leave it out, and name what it trains with config:",
    "run_cap": "is called count here. Rename it",
    "project": "is a key of the config. Use --tracking.project=NAME",
    "entity": "is a key of the config. Use --tracking.entity=NAME",
    "controller": "the lab chooses the settings itself. Leave it out",
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, checked."""

    file: Path
    name: str
    config: Path
    method: str
    metric: str
    goal: Goal
    parameters: tuple[Parameter, ...]
    seeds: tuple[int, ...]
    """Of the runs of each setting; none: the seed of the config alone."""
    count: int
    """Settings at most."""
    search_seed: int
    values: dict[str, Any]
    """What the config file says."""
    overrides: dict[str, Any]
    """Of the command line, the same for every run."""
    resolved: dict[str, Any]
    """The config without the sweep's settings, complete."""

    @property
    def tracking(self) -> Mapping[str, Any]:
        """How the runs are tracked."""
        return self.resolved.get("tracking", {})

    def identity(self) -> dict[str, Any]:
        """What must be the same when a sweep goes on; its metric, its count and the tracking may change."""
        searched = {parameter.key: asdict(parameter) for parameter in self.parameters}
        kept = {key: value for key, value in self.resolved.items() if key != "tracking"}
        parts = {"method": self.method, "parameters": searched, "seeds": list(self.seeds)}
        return json.loads(json.dumps({**parts, "search_seed": self.search_seed, "config": kept}))

    def ask(self, tried: Sequence[Tried]) -> Setting | None:
        """The next setting; None: there are no more."""
        if len(tried) >= self.count:
            return None
        return search.next_setting(self.method, self.parameters, self.goal, self.search_seed, tried)


def read_sweep(path: Path, overrides: Mapping[str, Any], count: int | None) -> Sweep:
    """Reads a sweep file and checks all of it, with every setting that can be known beforehand.

    Args:
        path: of the sweep file.
        overrides: dotted keys to values, as `config.split_overrides` returns them.
        count: replaces the file's.

    Raises:
        LabError: something is wrong with the file, the config or a setting.
    """
    raw = config.read_yaml(path)
    for key in raw:
        if key in _NOT_HERE:
            raise LabError(f"{path}: {key}: {_NOT_HERE[key]}.")
        if key not in _KEYS:
            raise LabError(
                f"{path}: unknown key {key!r}.{did_you_mean(str(key), _KEYS)} Known: {', '.join(_KEYS)}."
            )
    method = _one_of(raw.get("method"), search.METHODS, f"{path}: method")
    metric, goal = _read_metric(raw.get("metric"), path)
    parameters = search.read_parameters(raw.get("parameters"), str(path))
    seeds = _read_seeds(raw.get("seeds", []), f"{path}: seeds")
    for parameter in [one for one in parameters if one.key == "seed"]:  # how W&B's sweeps have seeds
        if method != "grid" or seeds or not parameter.values:
            raise LabError(f"{path}: parameter seed: write seeds: [0, 1, 2]; every setting is run with each.")
        seeds = _read_seeds(list(parameter.values), f"{path}: parameter seed")
        parameters.remove(parameter)
    for key in overrides:
        if key in [parameter.key for parameter in parameters] or (key == "seed" and seeds):
            raise LabError(f"command line: --{key}: {path} varies it. Leave it out, there or here.")
    base = _base(raw.get("config"), path)
    values = config.read_yaml(base)
    _, resolved = pipeline.configured(values, overrides, str(base))
    sweep = Sweep(
        file=path,
        name=_text_or(raw.get("name"), path.stem, f"{path}: name"),
        config=base,
        method=method,
        metric=metric,
        goal=goal,
        parameters=tuple(parameters),
        seeds=seeds,
        count=_read_count(method, parameters, count, raw.get("count"), path),
        search_seed=_whole(raw.get("search_seed", 0), 0, f"{path}: search_seed"),
        values=values,
        overrides=dict(overrides),
        resolved=config.to_dict(resolved),
    )
    for setting in _foreseen(sweep):
        check_setting(sweep, setting)
    for seed in seeds:
        check_setting(sweep, {"seed": seed})
    return sweep


def check_setting(sweep: Sweep, setting: Setting) -> None:
    """Raises a `LabError` that names the sweep file if the config cannot have this setting."""
    merged = config.merge(sweep.values, config.nest(setting))
    try:
        pipeline.configured(merged, sweep.overrides, str(sweep.file))
    except LabError as error:
        among = ", ".join(f"{key}={word(value)}" for key, value in setting.items())
        raise LabError(f"{error} (with {among})" if len(setting) > 1 else str(error)) from None


def _foreseen(sweep: Sweep) -> Iterator[Setting]:
    """Every setting; of Bayesian search, whose settings are not known yet, the ends of every parameter."""
    if sweep.method != "bayes":
        tried: list[Tried] = []
        while (setting := sweep.ask(tried)) is not None:
            tried.append(Tried(setting))
            yield setting
        return
    middle = {parameter.key: parameter.at(0.5) for parameter in sweep.parameters}
    for parameter in sweep.parameters:
        for value in parameter.values or (parameter.at(0), parameter.at(1 - 1e-9)):
            yield {**middle, parameter.key: value}


def _read_metric(raw: Any, path: Path) -> tuple[str, Goal]:
    known = ("name", "goal")
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        raise LabError(
            f"{path}: metric = {raw!r} is not valid. Expected e.g. metric: {{name: eval/mean_reward, "
            "goal: maximize}."
        )
    for key in raw:
        if key not in known:
            raise LabError(f"{path}: unknown key 'metric.{key}'. A metric has: {', '.join(known)}.")
    if "goal" not in raw:  # W&B's default is minimize, of a reward, too
        raise LabError(f"{path}: metric has no goal. Add goal: maximize, or goal: minimize.")
    return raw["name"], _one_of(raw["goal"], search.GOALS, f"{path}: metric.goal")


def _read_seeds(raw: Any, where: str) -> tuple[int, ...]:
    if not isinstance(raw, list):
        raise LabError(f"{where} = {raw!r} is not valid. Expected a list such as [0, 1, 2].")
    seeds = tuple(_whole(seed, 0, where) for seed in raw)
    if len(seeds) > MOST_SETTINGS:
        raise LabError(f"{where}: {len(seeds):,} seeds are more than {MOST_SETTINGS:,}. Name fewer.")
    if len(set(seeds)) < len(seeds):
        raise LabError(f"{where} = {raw!r}: a seed is there twice. Leave one out.")
    return seeds


def _read_count(
    method: str, parameters: Sequence[Parameter], wanted: int | None, raw: Any, path: Path
) -> int:
    """How many settings at most."""
    count = wanted if wanted is not None else None if raw is None else _whole(raw, 1, f"{path}: count")
    size = search.grid_size(parameters)
    if method == "grid":
        for parameter in parameters:
            if parameter.count is None:
                raise LabError(
                    f"{path}: parameter {parameter.key}: a grid needs values: [...], not all numbers "
                    "from min to max. Name them, or use method: random."
                )
    elif count is None:
        raise LabError(f"{path}: method {method} needs count, the number of settings. Add it, or --count=N.")
    least = min(number for number in (count, size) if number is not None)
    if method == "bayes" and (n := sum(len(parameter.values) for parameter in parameters)) > MOST_SETTINGS:
        raise LabError(f"{path}: {n:,} values to choose from are more than {MOST_SETTINGS:,}. Name fewer.")
    if least > MOST_SETTINGS:
        raise LabError(
            f"{path}: {least:,} settings are more than {MOST_SETTINGS:,}. Use --count=N for fewer."
        )
    return least


def _base(raw: Any, path: Path) -> Path:
    """The config that is varied: seen from here, else from the sweep file."""
    if not isinstance(raw, str) or not raw:
        raise LabError(f"{path}: config = {raw!r} is not valid. Expected a config file to vary.")
    beside = path.parent / raw
    return beside if not Path(raw).exists() and beside.exists() else Path(raw)


def _one_of(value: Any, known: Sequence[Name], where: str) -> Name:
    if value not in known:
        raise LabError(
            f"{where} = {value!r} is not valid.{did_you_mean(str(value), known)} Expected {', '.join(known)}."
        )
    return value


def _whole(value: Any, least: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LabError(f"{where}: {value!r} is not valid. Expected a whole number of at least {least}.")
    return value


def _text_or(value: Any, default: str, where: str) -> str:
    if value is None:
        return default
    if not isinstance(value, str) or not value:
        raise LabError(f"{where} = {value!r} is not valid. Expected a text.")
    return value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys by as many of their last words as tell them apart."""

    def end(key: str, n: int) -> str:
        return ".".join(key.split(".")[-n:])

    return {
        key: next(
            end(key, n)
            for n in range(1, len(key) + 2)
            if n > key.count(".") or sum(end(other, n) == end(key, n) for other in keys) == 1
        )
        for key in keys
    }


def word(value: Any) -> str:
    """A value as the command line takes it: what YAML reads back as the same value."""
    if isinstance(value, str):
        with contextlib.suppress(LabError):
            if config.parse_yaml(value, "") == value:
                return value
    return json.dumps(value)
