"""Configs, overrides and sweep files as nobody means them: every one from a seed."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPO

CONFIGS = sorted(path for path in (REPO / "configs").rglob("*.yaml") if "sweeps" not in path.parts)
SWEEPS = sorted((REPO / "configs" / "sweeps").glob("*.yaml"))

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        " ",
        "x",
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        {"": ""},
        [1, "a", None],
        "null",
        "1e9",
    ),
    *(
        0,
        -1,
        1,
        2,
        3,
        7,
        64,
        10**6,
        10**9,
        2**31 - 1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        -(2**63) - 1,
    ),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 1e300, 1e30, float("inf"), float("-inf"), float("nan")),
    *(
        "../../x",
        "/",
        "/dev/zero",
        "/dev/null",
        "/etc/passwd",
        "a/b",
        "a\0b",
        "\x1b[31mred",
        "\u202eabc",
        "\ud800",
    ),
    *(
        "a" * 300,
        "a" * 5_000,
        "é" * 200,
        "${HOME}",
        "$(id)",
        "{{7*7}}",
        "%s%n",
        "<!--<script>",
        "=1+1",
        "$\\foo$",
    ),
    *("hub:a/b", "python:os:system", "wandb:a/b", "runs/none", "2024-13-45", "nan", "~", "pong", "cuda:99"),
)
TEXTS = (
    *(
        "\t",
        "  ",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a ",
        "!!python/object:os.system x",
        "!!timestamp x",
        "%",
        "@",
    ),
    *(
        '"',
        "'",
        "|\n",
        ">\n",
        "? ",
        "<<: ",
        "<<: *a",
        "\x00",
        "\x1b",
        "\ufeff",
        "\u2028",
        "---\n",
        "...\n",
        "#",
        "`",
    ),
    *(
        "[" * 400,
        "{a: " * 200,
        "1" * 5_000,
        "!!binary x",
        "!!set [1]",
        "!!omap x",
        "!!int ''",
        "a: " * 50,
        "1e400",
    ),
)


def bomb(levels: int, width: int) -> str:
    """A YAML text of a few hundred bytes with width ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def paths(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a nested mapping, groups included."""
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def override(draw: random.Random, resolved: dict[str, Any]) -> str:
    """`--key=value` of a key that is there, or nearly."""
    key = ".".join(draw.choice(list(paths(resolved))))
    if draw.random() < 0.1:
        at = draw.randrange(len(key))
        key = key[:at] + draw.choice(["", ".", "..", "x", "-", "\x1b", "A"]) + key[at + 1 :]
    value = draw.choice(VALUES)
    if draw.random() < 0.2:
        return f"--{key}={draw.choice(TEXTS)}"
    flow = yaml.safe_dump(value, default_flow_style=True).strip() if not isinstance(value, str) else value
    return f"--{key}={flow}"


def spoil(draw: random.Random, tree: Any) -> dict[str, Any]:
    """A nested mapping with one thing in it changed, gone, or added."""
    where = draw.choice(list(paths(tree)))
    copied: Any = yaml.safe_load(yaml.safe_dump(tree))
    tree = copied
    for key in where[:-1]:
        tree = tree[key]
    match draw.randrange(4):
        case 0:
            del tree[where[-1]]
        case 1:
            tree[draw.choice([1, None, "x", "seed", True, 2.5, "name"])] = draw.choice(VALUES)
        case _:
            tree[where[-1]] = draw.choice(VALUES)
    return copied


def garble(draw: random.Random, text: str) -> str:
    """A text with a few characters or lines changed."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        match draw.randrange(4):
            case 0:
                text = text[:at] + draw.choice(TEXTS) + text[at:]
            case 1:
                text = text[:at] + text[at + draw.randint(1, 40) :]
            case 2:
                lines = text.splitlines(keepends=True) or [""]
                line = draw.randrange(len(lines))
                text = "".join([*lines[:line], *[lines[line]] * draw.choice([0, 2, 3]), *lines[line + 1 :]])
            case _:
                text = text[:at] + draw.choice("\t :-#[]{}&*!|>'\"%@`,?\n") + text[at + 1 :]
    return text


def file_text(draw: random.Random, base: Path) -> str:
    """A mutated file."""
    text = base.read_text(encoding="utf-8")
    kind = draw.random()
    if kind < 0.05:
        return draw.choice(
            [
                bomb(9, 9),
                bomb(30, 2),
                "a: &a [*a]",
                "[" * 30_000,
                "",
                "null",
                "5",
                "- 1",
                "\ud83d".join("ab")[0],
            ]
        )
    if kind < 0.5:
        return garble(draw, text)
    tree = spoil(draw, yaml.safe_load(text))
    return yaml.dump(tree, allow_unicode=draw.random() < 0.5)
