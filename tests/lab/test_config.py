"""Configs: YAML plus overrides become one typed config, and every mistake one line that names it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lab import config
from lab.config import require
from lab.errors import LabError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group of keys."""

    rate: float = 0.1
    count: int = 3
    switch: bool = False
    word: str = "plain"
    limit: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A whole config."""

    inner: Inner = field(default_factory=Inner)
    seed: int = 0
    name: str | None = None
    total_steps: int = 1_000

    def __post_init__(self) -> None:
        require(
            self.inner.count <= self.total_steps, "inner.count", f"{self.inner.count} is above total_steps"
        )


def build(values: dict[str, Any], *arguments: str) -> Outer:
    return config.build(Outer, values, config.split_overrides(arguments), "some.yaml")


def error(values: dict[str, Any], *arguments: str) -> str:
    """The message `build` refuses with; always a single line."""
    with pytest.raises(LabError) as caught:
        build(values, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is understood ----


def test_overrides_lie_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: {rate: 0.5, count: 7}\nseed: 4\n")
    built = build(config.read_yaml(path), "--inner.count=9", "--name", "x y")
    assert built == Outer(inner=Inner(rate=0.5, count=9), seed=4, name="x y")


def test_what_a_file_says_of_one_backbone_is_not_said_of_another() -> None:
    base = {"agent": {"backbone": "nature_cnn", "backbone_spec": {"width": 8}, "gamma": 0.9}, "seed": 1}
    for over, left in (
        ({"agent": {"gamma": 0.5}}, {"width": 8}),
        ({"agent": {"backbone": "nature_cnn"}}, {"width": 8}),
        ({"agent": {"backbone": "resnet8"}}, None),
        ({"agent": {"backbone": "resnet8", "backbone_spec": {"width": 4}}}, None),
    ):
        kept = config.without_other_specs(base, over)
        assert kept["agent"].get("backbone_spec") == left
        assert (kept["agent"]["gamma"], kept["seed"]) == (0.9, 1)
    nested = {"objective": {"critic": {"backbone": "a", "spec": {"width": 8}}}}
    kept = config.without_other_specs(nested, {"objective": {"critic": {"backbone": "b"}}})
    assert kept == {"objective": {"critic": {"backbone": "a"}}}
    assert base["agent"]["backbone_spec"] == {"width": 8}
    recurrent = {"backbone": "lstm", "backbone_spec": {"hidden": 8, "channels": [4]}}
    for eyes, left in (({"eyes": "resnet8"}, {}), ({"hidden": 4}, recurrent["backbone_spec"])):
        kept = config.without_other_specs(recurrent, {"backbone": "lstm", "backbone_spec": eyes})
        assert kept["backbone_spec"] == left


def test_a_built_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build({}).seed = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-4", 5e-4), ("2.5e-4", 2.5e-4), ("1e6", 1e6), ("1E+3", 1e3), (".5e1", 5.0), ("-1e-3", -1e-3)],
)
def test_scientific_notation_is_a_number(text: str, number: float) -> None:
    """YAML 1.1 reads `5e-4`, without a dot, as a string."""
    assert build({}, f"--inner.rate={text}").inner.rate == number
    assert config.parse_yaml(f"rate: {text}", "some.yaml") == {"rate": number}


def test_a_whole_float_is_taken_for_an_integer() -> None:
    built = build({"total_steps": 1e6}, "--inner.limit=2e3")
    assert (built.total_steps, built.inner.limit) == (1_000_000, 2_000)
    assert type(built.total_steps) is int
    assert type(built.inner.limit) is int


@pytest.mark.parametrize(
    "word", ["--total_steps=1e30", "--inner.limit=-1e19", "--total_steps=10000000000000000000000"]
)
def test_an_integer_has_64_bits_however_it_is_written(word: str) -> None:
    """What is accepted is printed, and must be accepted again."""
    with pytest.raises(LabError, match="at most 64 bits"):
        build({}, word)


def test_a_whole_number_does_for_a_float() -> None:
    assert build({}, "--inner.rate=2").inner.rate == 2.0


def test_words_that_look_like_numbers_stay_words() -> None:
    assert build({}, "--inner.word=e5").inner.word == "e5"
    assert build({}, "--inner.word='5'").inner.word == "5"


def test_a_printed_config_is_read_back_as_the_same_config(tmp_path: Path) -> None:
    built = build({}, "--inner.rate=1e-8", "--inner.extra={a: [1, 2], b: null}", "--name=on fire")
    path = tmp_path / "printed.yaml"
    path.write_text(config.to_yaml(built))
    assert build(config.read_yaml(path)) == built


# ---- what is refused ----


def test_an_unknown_key_names_its_place_and_the_nearest_key() -> None:
    assert "some.yaml: unknown key 'inner.ratte'. Did you mean 'inner.rate'?" in error(
        {"inner": {"ratte": 1}}
    )
    assert "command line: unknown key 'sed'. Did you mean 'seed'?" in error({}, "--sed=1")
    assert "command line: unknown key 'rate'. Did you mean 'inner.rate'?" in error({}, "--rate=1")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("seed", "abc", "int"),
        ("seed", 1.5, "int"),
        ("seed", True, "int"),
        ("seed", [1], "int"),
        ("seed", None, "int"),
        ("inner.rate", "fast", "float"),
        ("inner.rate", None, "float"),
        ("inner.rate", float("nan"), "a finite number"),
        ("inner.rate", float("inf"), "a finite number"),
        ("inner.switch", 1, "bool"),
        ("inner.word", 5, "str"),
        ("inner.extra", None, "dict"),
    ],
)
def test_a_wrong_type_names_place_key_value_and_the_type(key: str, value: Any, wanted: str) -> None:
    in_file = error(config.nest({key: value}))
    assert in_file == f"some.yaml: {key} = {value!r} is not valid. Expected {wanted}."
    argument = f"--{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
    assert error({}, argument) == in_file.replace("some.yaml", "command line")


def test_keys_are_texts() -> None:
    assert error({"inner": {"extra": {3: 4}}}) == "some.yaml: inner.extra has the key 3. Expected a text."


def test_a_mistake_in_a_group_given_as_one_override_is_the_command_lines() -> None:
    assert error({}, "--inner={count: x}").startswith("command line: inner.count = 'x' is not valid.")


def test_a_value_where_a_group_belongs_is_refused() -> None:
    assert error({"inner": 5}).startswith("some.yaml: inner = 5 is not valid. Expected a group of keys")
    assert error({}, "--inner=5").startswith("command line: inner = 5 is not valid.")
    assert error({"seed": 1}, "--seed.x=5").startswith("command line: seed = ")


def test_what_run_json_could_not_hold_is_refused_at_once() -> None:
    """Free-form groups accept any value; a date or NaN would fail much later, when run.json is written."""
    assert "inner.extra.a.b = nan is not valid" in error({}, "--inner.extra={a: {b: .nan}}")
    assert "inner.extra.a = inf is not valid" in error({}, "--inner.extra.a=[1, .inf]")
    assert "inner.extra.day = datetime.date(2024, 1, 2) is not valid" in error(
        {}, "--inner.extra.day=2024-01-02"
    )
    assert build({}, "--inner.extra={a: null}").inner.extra == {"a": None}


def test_an_impossible_combination_names_the_key_and_who_set_it() -> None:
    assert error({"inner": {"count": 2_000}}) == "some.yaml: inner.count: 2000 is above total_steps"
    assert error({}, "--inner.count=2000") == "command line: inner.count: 2000 is above total_steps"


@pytest.mark.parametrize(
    "arguments", [["seed=1"], ["--seed"], ["--seed", "--name=x"], ["--inner.count=[1"], ["--seed=2024-13-45"]]
)
def test_a_malformed_override_is_refused(arguments: list[str]) -> None:
    with pytest.raises(LabError, match="command line"):
        config.split_overrides(arguments)


# ---- files that are no configs ----


def test_a_folder_a_missing_file_and_an_unreadable_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "rl").mkdir(parents=True)
    (tmp_path / "configs" / "rl" / "pong.yaml").write_text("seed: 1\n")
    with pytest.raises(LabError, match=r"configs: is a folder, .* e\.g\. configs/rl/pong\.yaml"):
        config.read_yaml(Path("configs"))
    with pytest.raises(LabError, match=r"pong\.yaml: no such config file\. Did you mean 'configs/rl/pong\.y"):
        config.read_yaml(Path("pong.yaml"))
    with pytest.raises(LabError, match=r"Did you mean 'configs/rl/pong\.yaml'"):
        config.read_yaml(Path("configs/rl/pongg.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabError, match=r"binary\.yaml: cannot be read as text"):
        config.read_yaml(Path("binary.yaml"))


@pytest.mark.parametrize(
    "text", ["a: [1\nb: 2", "a: b: c", "\t- x", "a: !!python/object:os.system x", "? {", "seed: 2"]
)
def test_broken_yaml_names_file_and_line_and_runs_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(f"seed: 1\n{text}\n")
    with pytest.raises(LabError, match=r"broken\.yaml, line \d+: not valid YAML: ") as caught:
        config.read_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("", "empty"), ("- a\n- b", "a list"), ("hello", "a str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(
        LabError, match=rf"list\.yaml: a config is a mapping of keys to values, this is {kind}"
    ):
        config.read_yaml(path)


# ---- hashes and differences ----


def test_the_hash_is_the_same_wherever_a_run_is_tracked() -> None:
    assert config.config_hash({"a": 1, "tracking": {"wandb": "online"}}) == config.config_hash({"a": 1})


def test_the_hash_ignores_seed_and_name() -> None:
    base = config.config_hash(config.to_dict(build({})))
    assert config.config_hash(config.to_dict(build({"seed": 5, "name": "x"}))) == base
    assert config.config_hash(config.to_dict(build({"inner": {"rate": 0.2}}))) != base
    assert len(base) == 8
    int(base, 16)


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert config.config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config.config_hash(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )


def test_differences_names_dotted_keys_with_both_values() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert config.differences(old, new) == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}


KEYS = st.text("abcd_", min_size=1, max_size=3)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab 1e-.:", max_size=5)
)
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=4),
    lambda below: st.dictionaries(KEYS, LEAVES | below, max_size=4),
    max_leaves=8,
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves; an empty group is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@given(TREES, st.randoms(use_true_random=False))
def test_nest_rebuilds_any_tree_from_its_dotted_keys_in_any_order(tree: dict[str, Any], order: Any) -> None:
    pairs = list(flatten(tree).items())
    order.shuffle(pairs)
    assert config.nest(dict(pairs)) == tree


@given(TREES)
def test_overrides_survive_the_command_line(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    assert config.split_overrides([f"--{key}={json.dumps(value)}" for key, value in flat.items()]) == flat


@given(TREES, TREES)
def test_differences_are_none_exactly_between_equals(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = config.differences(old, new)
    assert config.differences(old, old) == {}
    assert found == {key: (a, b) for key, (b, a) in config.differences(new, old).items()}
    if not found:  # a key that is absent counts as null
        assert {k: v for k, v in flatten(old).items() if v not in (None, {})} == {
            k: v for k, v in flatten(new).items() if v not in (None, {})
        }


@given(TREES, TREES)
def test_merged_trees_say_what_the_upper_one_says(base: dict[str, Any], over: dict[str, Any]) -> None:
    before = json.dumps([base, over])
    merged = config.merge(base, over)
    assert config.merge(merged, over) == merged
    for key, value in flatten(over).items():
        node: Any = merged
        for part in key.split("."):
            node = node[part]
        assert node == value or value == {}
    assert json.dumps([base, over]) == before, "the arguments were changed"


def test_nest_refuses_contradictions_in_either_order_and_changes_nothing() -> None:
    for keys in (("a", "a.b"), ("a.b", "a")):
        with pytest.raises(LabError, match=r"--a\.b and --a contradict"):
            config.nest(dict.fromkeys(keys, 1))
    group = {"a": {"x": 1}, "a.b": 2}
    assert config.nest(group) == {"a": {"x": 1, "b": 2}}
    assert config.nest(dict(reversed(group.items()))) == {"a": {"x": 1, "b": 2}}
    assert group == {"a": {"x": 1}, "a.b": 2}
