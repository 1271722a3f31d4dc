"""YAML plus dotted overrides -> one frozen, typed config.

A config is a tree of frozen keyword-only dataclasses that stand beside their owner. This file reads the
YAML, lays the overrides over it, checks every key against the tree, and lets jsonargparse check and
convert the values. Whatever is wrong becomes one `LabError` line naming the place, the key and the remedy.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lab.errors import LabError, brief, did_you_mean

T = TypeVar("T")


MOST_CHARACTERS, MOST_VALUES, DEEPEST = 100_000, 20_000, 50
"""Of one YAML text: its length, its values with every alias written out, and how deep they are nested."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-4` as a string; people mean the number. Of a key given twice it takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"the key {brief(key.value)} is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        float(value)  # an OverflowError here, not somewhere in a computation
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _size(node: yaml.Node, above: tuple[int, ...], sizes: dict[int, int]) -> int:
    """Values in a node with its aliases written out, counted without writing them out."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias refers to itself", problem_mark=node.start_mark)
    if len(above) > DEEPEST:
        problem = f"nested more than {DEEPEST} deep"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    if id(node) not in sizes:
        below = [*itertools.chain(*node.value)] if isinstance(node, yaml.MappingNode) else node.value
        parts = below if isinstance(node, yaml.CollectionNode) else ()
        sizes[id(node)] = 1 + sum(_size(part, (*above, id(node)), sizes) for part in parts)
        if sizes[id(node)] > MOST_VALUES:
            problem = f"more than {MOST_VALUES:,} values, aliases written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return sizes[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parses one YAML text; `source` names it in the error."""
    if len(text) > MOST_CHARACTERS:
        raise LabError(f"{source}: longer than {MOST_CHARACTERS:,} characters: no config. Shorten it.")
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, (), {})
        return loader.construct_document(node)
    except RecursionError:
        raise LabError(f"{source}: not valid YAML: nested more than {DEEPEST} deep. Flatten it.") from None
    # ValueError: a date such as 2024-13-45; the others: `!!timestamp x`, `!!int ""`
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, LookupError, ArithmeticError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or " ".join(str(error).split()) or "cannot be parsed"
        raise LabError(f"{where}: not valid YAML: {problem}. Correct that line.") from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a config file.

    Raises:
        LabError: the file is missing, a folder, unreadable, or no YAML mapping.
    """
    if path.is_dir():
        raise LabError(f"{path}: is a folder, not a config file. Name a .yaml file, e.g. {_example(path)}.")
    if not path.exists():
        nearby = [str(p) for p in Path("configs").rglob("*.yaml")]
        by_name = [p for p in nearby if Path(p).stem == path.stem]
        hint = f" Did you mean {by_name[0]!r}?" if by_name else did_you_mean(str(path), nearby)
        raise LabError(f"{path}: no such config file.{hint} `lab list` shows the configs.")
    if not path.is_file() and path.parent != Path("/dev/fd"):  # there a shell puts `<(command)`
        raise LabError(f"{path}: is no ordinary file. Name a YAML file.")
    try:
        with path.open("rb") as file:
            text = file.read(4 * MOST_CHARACTERS + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path}: cannot be read as text: {error}. Name a YAML file.") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise LabError(f"{path}: a config is a mapping of keys to values, this is {_kind(raw)}.")
    return raw


def split_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turns `--a.b=1 --c 2` into `{"a.b": 1, "c": 2}`; the values are read as YAML."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise LabError(f"command line: unexpected {argument!r}. Overrides look like --seed=1.")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise LabError(
                    f"command line: --{key} has no value. Write --{key}=VALUE; --help shows the options "
                    "without one."
                )
            text = rest.pop(0)
        overrides[key] = parse_yaml(text, f"command line, --{key}")
    return overrides


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`; the order of the keys does not matter."""
    tree: dict[str, Any] = {}
    for key in sorted(overrides, key=lambda key: key.count(".")):  # groups before what lies in them
        *parents, leaf = key.split(".")
        node = tree
        for depth, parent in enumerate(parents, 1):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                above = ".".join(parents[:depth])
                raise LabError(f"command line: --{key} and --{above} contradict each other. Keep one.")
        node[leaf] = copy.deepcopy(overrides[key])
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays `over` over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def without_other_specs(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` without what it says of a backbone where `over` names another one beside it."""
    kept = dict(base)
    if "backbone" in over and "backbone" in base and over["backbone"] != base["backbone"]:
        for key in ("spec", "backbone_spec"):
            kept.pop(key, None)
    if "eyes" in over and over["eyes"] != base.get("eyes"):  # a backbone within a recurrent one
        kept = {}
    for key, value in over.items():
        below = kept.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            kept[key] = without_other_specs(below, value)
    return kept


def build(root: type[T], file_values: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> T:
    """Builds the frozen dataclass `root` from a file's values and dotted overrides.

    Args:
        root: a frozen dataclass, possibly of dataclasses.
        file_values: what the YAML file said.
        overrides: dotted keys to values, as `split_overrides` returns them.
        source: the file's name, for errors.

    Raises:
        LabError: unknown key, wrong type or impossible combination.
    """
    over = nest(overrides)
    for values, where in ((file_values, source), (over, "command line")):
        _check_keys(root, values, where, ())
        _check_values(root, values, where, ())
    values = _whole_floats_to_ints(root, merge(without_other_specs(file_values, over), over))
    return _parse(root, values, source, overrides)


def _parse(root: type[T], values: dict[str, Any], source: str, overrides: Mapping[str, Any]) -> T:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(root)
    try:
        return root(**vars(parser.instantiate(parser.parse_object(values))))
    except (Exception, SystemExit) as error:
        raise LabError(_one_line(error, values, source, overrides)) from None


def _one_line(error: BaseException, values: dict[str, Any], source: str, overrides: Mapping[str, Any]) -> str:
    """Says of a rejected value where it stands, what it is and what is wanted."""
    cause = error
    while not isinstance(cause, ConfigError) and (below := cause.__cause__ or cause.__context__) is not None:
        cause = below
    if isinstance(cause, ConfigError):
        error = cause
    text = " ".join(str(error).split())
    key_match = re.search(r'key "([\w.]+)"', text)
    key = key_match.group(1) if key_match else getattr(error, "key", "")
    where = "command line" if key and _has(nest(overrides), key.split(".")) else source
    if isinstance(error, ConfigError):
        return f"{where}: {error}"
    value: Any = values
    for part in key.split("."):
        value = value.get(part, "?") if isinstance(value, dict) else "?"
    wanted = re.search(r"Expected an? (<class '(\w+)'>|[^.:]+)", text)
    want = (wanted.group(2) or wanted.group(1)) if wanted else ""
    if not want:
        choices = re.search(r"(?:accepted values|invalid choice)[^:]*: (.+)", text)
        want = choices.group(1) if choices else text
    return f"{where}: {key} = {brief(value)} is not valid. Expected {want}."


class ConfigError(ValueError):
    """Raised by a config's `__post_init__`; `key` says which value is impossible."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


def require(condition: bool, key: str, message: str) -> None:
    """Raises `ConfigError` for `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(key, message)


def require_within(config: Any, prefix: str, **ranges: tuple[float, float]) -> None:
    """Raises `ConfigError` for the first field that lies outside of its range; None is within every range.

    Args:
        config: the dataclass.
        prefix: of the fields' keys, e.g. "ppo."; empty at the top.
        ranges: field -> (least, most), both allowed.
    """
    for key, (least, most) in ranges.items():
        value = getattr(config, key)
        require(
            value is None or least <= value <= most,
            f"{prefix}{key}",
            f"{value:,} must be from {least:,} to {most:,}" if value is not None else "",
        )


def is_text(value: str) -> bool:
    """Whether a text can stand in a file and in a path: no NUL, no half of a pair of surrogates."""
    return not re.search("[\\0\\ud800-\\udfff]", value)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """A config as YAML that `lab train` accepts again."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


NOT_RESULTS = ("seed", "name", "tracking")
"""Keys of a config that do not say which experiment a run is of."""


def config_hash(values: Mapping[str, Any], without: Sequence[str] = NOT_RESULTS) -> str:
    """Eight hex digits naming a config but for `NOT_RESULTS`: runs alike but for these share it."""
    kept = {key: value for key, value in values.items() if key not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def with_defaults(values: Mapping[str, Any], like: Any, by_default: Any = None) -> dict[str, Any]:
    """The values of a config that an older version wrote, and the keys that came since at their defaults.

    Args:
        values: as `to_dict` gave them then.
        like: a config of today's class.
        by_default: the config that keys have their defaults from; None: what its class says of each.
    """
    filled = dict(values)
    for key in dataclasses.fields(like):
        default = getattr(by_default, key.name, key.default)
        if default is dataclasses.MISSING and key.default_factory is not dataclasses.MISSING:
            default = key.default_factory()
        whole = dataclasses.is_dataclass(default) and not isinstance(default, type)
        if key.name not in filled:
            if default is not dataclasses.MISSING:
                filled[key.name] = to_dict(default) if whole else json.loads(json.dumps(default))
        elif dataclasses.is_dataclass(here := getattr(like, key.name)) and isinstance(filled[key.name], dict):
            known = default if type(default) is type(here) else None
            filled[key.name] = with_defaults(filled[key.name], here, known)
    return filled


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two configs differ, each with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_keys(cls: type, values: Any, source: str, path: tuple[str, ...]) -> None:
    """Raises for the first key that `cls` does not have, naming the nearest it has."""
    here = ".".join(path)
    if not isinstance(values, Mapping):
        example = next(iter(_hints(cls)))
        raise LabError(
            f"{source}: {here} = {brief(values)} is not valid. Expected a group of keys such as "
            f"{here}.{example}."
        )
    hints = _hints(cls)
    for key, value in values.items():
        if key not in hints:
            full = ".".join((*path, str(key)))
            everywhere = list(_all_keys(cls, path))
            hint = did_you_mean(full, everywhere) or did_you_mean(str(key), hints)
            group = f"in {here}" if here else "at the top level"
            raise LabError(f"{source}: unknown key {brief(full)}.{hint} Keys {group}: {', '.join(hints)}.")
        if dataclasses.is_dataclass(hints[key]):
            _check_keys(typing.cast(type, hints[key]), value, source, (*path, str(key)))


def _check_values(hint: Any, values: Any, source: str, path: tuple[str, ...]) -> None:
    """Raises for the first value that JSON cannot hold, or that is null where null means nothing."""
    problem = ""
    if isinstance(values, Mapping):
        hints = _hints(typing.cast(type, hint)) if dataclasses.is_dataclass(hint) else {}
        for key, value in values.items():
            if not isinstance(key, str):
                raise LabError(f"{source}: {'.'.join(path)} has the key {brief(key)}. Expected a text.")
            _check_values(hints.get(key, Any), value, source, (*path, key))
    elif isinstance(values, list):
        for item in values:
            _check_values(Any, item, source, path)
    elif isinstance(values, float) and not math.isfinite(values):
        problem = "a finite number"
    elif (isinstance(values, int) or (isinstance(values, float) and _takes_only_int(hint))) and not (
        -(2**63) <= values < 2**64
    ):
        problem = "a number of at most 64 bits"
    elif isinstance(values, str) and not is_text(values):
        problem = "a text without NUL and without halves of characters"
    elif values is None and hint is not Any and not {None, type(None)} & {*typing.get_args(hint)}:
        problem = hint.__name__
    elif not isinstance(values, str | int | float | None):
        problem = "a number, a text, true, false, null, or a list or mapping of these"
    if problem:
        raise LabError(f"{source}: {'.'.join(path)} = {brief(values)} is not valid. Expected {problem}.")


def _has(tree: Any, parts: Sequence[str]) -> bool:
    """Whether a nested mapping says anything about the key with these parts."""
    for part in parts:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _all_keys(cls: type, path: tuple[str, ...]) -> typing.Iterator[str]:
    for key, hint in _hints(cls).items():
        yield ".".join((*path, key))
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(typing.cast(type, hint), (*path, key))


def _whole_floats_to_ints(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`total_steps: 1e6` means the integer; jsonargparse would refuse the float."""
    converted = dict(values)
    for key, value in values.items():
        hint = _hints(cls)[key]
        if dataclasses.is_dataclass(hint):
            converted[key] = _whole_floats_to_ints(typing.cast(type, hint), value)
        elif isinstance(value, float) and value.is_integer() and _takes_only_int(hint):
            converted[key] = int(value)
    return converted


def _takes_only_int(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return int in options and float not in options


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _example(folder: Path) -> str:
    return str(next(iter(sorted(folder.rglob("*.yaml"))), "configs/rl/pong.yaml"))
