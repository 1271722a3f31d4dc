"""Data sets made by code of what every machine has: tasks about Python's library, numbers in words."""

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from supervised.data.config import DataConfig
from supervised.data.files import read_text
from supervised.data.library import library_files
from supervised.data.raw import Columns, Raw

LINES = 4
"""Of a snippet, at least; it has at least `CHARACTERS`, too, and at most twice as many."""
CHARACTERS = 80
PACKAGES = 8
CHOICES = 4
PER_FILE = 40
HELD_OUT_FILES = 0.2


def python_origin(config: DataConfig) -> Raw:
    """Which of the eight largest packages of Python's library a snippet is from; a task of classification."""
    snippets = _snippets()
    sizes: dict[str, int] = defaultdict(int)
    for path, found in snippets.items():
        sizes[path.parts[0]] += len(found) if len(path.parts) > 1 else 0
    packages = sorted(sorted(sizes, key=sizes.__getitem__, reverse=True)[:PACKAGES])

    def samples(path: Path, rng: np.random.Generator) -> list[tuple[list[list[str]], int]]:
        if len(path.parts) == 1 or path.parts[0] not in packages:
            return []
        label = packages.index(path.parts[0])
        return [([[text]], label) for text in snippets[path]]

    return _raw("classification", snippets, samples, tuple(packages))


def python_same_file(config: DataConfig) -> Raw:
    """Whether two snippets of Python's library are from one file; a task in the form of entailment."""
    snippets = _snippets()
    everywhere = [(path, text) for path, found in snippets.items() for text in found]

    def samples(path: Path, rng: np.random.Generator) -> list[tuple[list[list[str]], int]]:
        made = []
        for first, second in itertools.pairwise(snippets[path]):
            same = int(rng.integers(2))
            while not same:
                other, second = everywhere[rng.integers(len(everywhere))]
                if other != path:
                    break
            made.append(([[first, second]], same))
        return made

    return _raw("entailment", snippets, samples, ("another file", "the same file"))


def python_next_line(config: DataConfig) -> Raw:
    """Which of four lines of a file comes next; a task of multiple choice."""
    snippets = _snippets()

    def samples(path: Path, rng: np.random.Generator) -> list[tuple[list[list[str]], int]]:
        made = []
        last = [text.rstrip("\n").rpartition("\n")[2] for text in snippets[path]]
        for i, text in enumerate(snippets[path]):
            others = [line for line in dict.fromkeys(last) if line != last[i]]
            if len(others) < CHOICES - 1:
                continue
            wrong = [others[j] for j in rng.choice(len(others), CHOICES - 1, replace=False)]
            label = int(rng.integers(CHOICES))
            context = text.rstrip("\n").rpartition("\n")[0]
            made.append(([[context, line] for line in [*wrong[:label], last[i], *wrong[label:]]], label))
        return made

    return _raw("choice", snippets, samples, tuple(map(str, range(CHOICES))))


def _snippets() -> dict[Path, list[str]]:
    """By file, at most `PER_FILE` pieces of whole lines that follow one another."""
    root, files = library_files()
    found: dict[Path, list[str]] = {}
    for path in files:
        pieces, lines, size = [], [], 0
        for line in read_text(path).splitlines(keepends=True):
            if not line.strip():
                continue
            lines.append(line[: 2 * CHARACTERS])
            size += len(lines[-1])
            if len(lines) >= LINES and size >= CHARACTERS:
                pieces.append("".join(lines)[: 4 * CHARACTERS])
                lines, size = [], 0
        if len(pieces) >= CHOICES:
            every = max(1, len(pieces) // PER_FILE)
            found[path.relative_to(root)] = pieces[::every][:PER_FILE]
    return found


def _raw(form: str, snippets: dict[Path, list[str]], samples: Any, classes: tuple[str, ...]) -> Raw:
    """Samples of each file, from a seed of its own; whole files are held out."""
    parts: dict[str, Columns] = {name: {"texts": [], "labels": []} for name in ("train", "test")}
    held = np.random.default_rng(0).random(len(snippets)) < HELD_OUT_FILES
    for number, (path, is_held) in enumerate(zip(snippets, held, strict=True)):
        for texts, label in samples(path, np.random.default_rng(number)):
            part = parts["test" if is_held else "train"]
            part["texts"].append(texts)
            part["labels"].append(label)
    for part in parts.values():
        part["labels"] = np.array(part["labels"], np.int64)
    return Raw(kind="tasks", parts=parts, classes=classes, form=form)


# ---- numbers ----

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_ONES += ["seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_EINS = [
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
    "zehn",
    "elf",
    "zwölf",
    "dreizehn",
    "vierzehn",
    "fünfzehn",
]
_EINS += ["sechzehn", "siebzehn", "achtzehn", "neunzehn"]
_ZEHN = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]


def number_words(config: DataConfig) -> Raw:
    """The numbers from 0 to 9,999 in English and in German words; every tenth is held out."""
    order = np.random.default_rng(0).permutation(10_000)
    parts: dict[str, Columns] = {}
    for name, numbers in (("train", order[1000:]), ("test", order[:1000])):
        parts[name] = {
            "source": [english(int(n)) for n in numbers],
            "target": [german(int(n)) for n in numbers],
        }
    return Raw(kind="pairs", parts=parts)


def english(n: int) -> str:
    """A number below 10,000 in words."""
    if n >= 1000:
        return f"{_ONES[n // 1000]} thousand" + (f" {english(n % 1000)}" if n % 1000 else "")
    if n >= 100:
        return f"{_ONES[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def german(n: int) -> str:
    """A number below 10,000 in words."""
    if n >= 1000:
        return f"{_ein(n // 1000)}tausend" + (german(n % 1000) if n % 1000 else "")
    if n >= 100:
        return f"{_ein(n // 100)}hundert" + (german(n % 100) if n % 100 else "")
    if n < 20:
        return _EINS[n]
    return (f"{_ein(n % 10)}und" if n % 10 else "") + _ZEHN[n // 10 - 2]


def _ein(n: int) -> str:
    return "ein" if n == 1 else _EINS[n]
