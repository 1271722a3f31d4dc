"""Data for the three stages of the ChatGPT recipe: demonstrations, comparisons and prompts.

A source is a .jsonl, .json or .parquet file, a folder of these, `hub:OWNER/NAME` (one split and configuration
of it: `hub:OWNER/NAME@SPLIT#CONFIG`), or a built-in task, `reviews` or `everyday`. Its rows have one of these
forms:

    prompt, completion            a demonstration
    messages                      a demonstration that is a whole conversation
    text                          a demonstration that is a whole text
    prompt, chosen, rejected      a comparison of two completions
    chosen, rejected              the same where both begin with the prompt, or are transcripts as in hh-rlhf
    prompt, completions, ranks    a comparison of two or more: 1 is the best, equal ranks are a tie
    prompt                        a prompt

Prompts and completions are texts or conversations, which are lists of {"role", "content"}. Whatever cannot be
used is a `LabError` that names file and line. Nothing in a source is ever run as code, and nothing heavy is
imported before it is needed.
"""

import hashlib
import json
import logging
import math
import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lab.errors import LabError, did_you_mean
from lab.files import sha256_file
from rlhf import everyday, reviews
from rlhf.reviews import Split

if TYPE_CHECKING:
    from datasets import Dataset

Message: TypeAlias = dict[str, str]
Text: TypeAlias = str | list[Message]
"""A text, or a conversation."""
Row: TypeAlias = dict[str, Any]

ROLES = ("system", "user", "assistant")
BUILT_IN: Mapping[str, Any] = {"reviews": reviews, "everyday": everyday}
SUFFIXES = (".jsonl", ".json", ".parquet")
KNOWN_SOURCES = "a .jsonl, .json or .parquet file, a folder of these, hub:OWNER/NAME, reviews or everyday"


@dataclass
class Dropped:
    """What was left out while reading. Who passes none to be filled finds it in the log."""

    ties: int = 0
    """Rankings without two different ranks, from which nothing can be learned."""
    bad_rows: int = 0
    """Rows that cannot be used, where `strict` is False."""
    first: str = ""
    """What is wrong with the first bad row, and where it stands."""

    def __str__(self) -> str:
        first = f" (the first: {self.first})" if self.first else ""
        return f"left out {self.ties} ties and {self.bad_rows} rows that cannot be used{first}"


# ---- what the stages ask for ----


def demonstrations(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """Texts to imitate, in TRL's formats for supervised fine-tuning.

    Args:
        source: see the module. Of a comparison, the best completion is the demonstration.
        split: "train", or "eval" where the source has it (`has_eval`).
        strict: a row that cannot be used is an error; else it is left out and counted.
        dropped: is told what was left out.

    Returns:
        Columns `prompt` and `completion`, or `messages`, or `text`: what the source has.

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    parsers = _DEMONSTRATIONS | {columns: _best_of(parse) for columns, parse in _COMPARISONS.items()}
    rows, left_out = _load(source, split, parsers, strict)
    _tell(source, left_out, dropped)
    return _dataset(rows)


def comparisons(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """Rankings of two or more completions of one prompt; a pair is a ranking of two.

    Args:
        source, split, strict, dropped: as for `demonstrations`. Rows in which all tie are always left out.

    Returns:
        Columns `prompt` (text or messages), `completions` (a list of such), `ranks` (of int; 1 is the best,
        equal ranks are a tie), `finished` (of bool; False: cut off at a length limit, so that no end-of-text
        token belongs behind it), `source` (text) and, where any row has them, `scores` (of float).

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    if source in BUILT_IN:
        raise LabError(
            f"{source}: has no comparisons. Let a labeler rank what a fine-tuned model answers to its "
            "prompts, or name a file of comparisons."
        )
    rows, left_out = _load(source, split, _COMPARISONS, strict)
    untied = [row for row in rows if len(set(row["ranks"])) > 1]
    if not untied:
        raise LabError(f"{source}: all completions tie in each of its rankings. Name data with preferences.")
    left_out.ties = len(rows) - len(untied)
    _tell(source, left_out, dropped)
    return _dataset(untied)


def prompts(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """What to answer: the prompts of rows of any form but whole texts.

    Args:
        source, split, strict, dropped: as for `demonstrations`.

    Returns:
        Column `prompt` (text or messages): each prompt once, in the order of the source.

    Raises:
        LabError: the source cannot be read or, where strict, one of its rows not be used.
    """
    rows, left_out = _load(source, split, _COMPARISONS | _PROMPTS, strict)
    _tell(source, left_out, dropped)
    unique = {_key(row["prompt"]): row["prompt"] for row in rows}
    return _dataset([{"prompt": prompt} for prompt in unique.values()])


def has_eval(source: str) -> bool:
    """Whether the source comes with rows to evaluate on; if not, `hold_out` makes some of its others.

    Of the Hub, only loading the data can tell.
    """
    return _choose("eval", _splits(source)) is not None


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Indices (better, worse) of all pairs of answers whose ranks differ; the smaller rank is the better."""
    return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def pairs_of(row: Row) -> Iterator[Row]:
    """All pairs of different rank in a ranking (a row of `comparisons`), as TRL's preference rows."""
    for better, worse in ordered_pairs(row["ranks"]):
        yield {
            "prompt": row["prompt"],
            "chosen": row["completions"][better],
            "rejected": row["completions"][worse],
            "chosen_finished": row["finished"][better],
            "rejected_finished": row["finished"][worse],
            "source": row["source"],
        }


def hold_out(dataset: "Dataset", fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Splits by prompt: none is on both sides.

    A hash of the prompt decides, so one seed holds out the same prompts of demonstrations, comparisons and
    prompts, whatever else is in these. The price is that `fraction` of the prompts is only roughly met; but
    at least one prompt is on either side.

    Args:
        dataset: as the functions above return it.
        fraction: share of the prompts, between 0 and 1.
        seed: another seed holds out others.

    Returns:
        The rows to train on and those held out, both in their order.

    Raises:
        LabError: all rows have one and the same prompt.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    column = next(name for name in ("prompt", "messages", "text") if name in dataset.column_names)
    keys = [_key(value[:-1] if column == "messages" else value) for value in dataset[column]]
    chances = {key: _uniform(f"{seed} {key}") for key in set(keys)}
    if len(chances) < 2:
        raise LabError("data: no two rows have different prompts, so none can be held out. Name more data.")
    at_least_one = math.nextafter(min(chances.values()), 1)
    threshold = min(max(fraction, at_least_one), max(chances.values()))
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        sides[chances[key] < threshold].append(i)
    train, held_out = sides
    return dataset.select(train), dataset.select(held_out)


def fingerprint(source: str) -> dict[str, Any]:
    """Names the data that a run started from: its `source`, `sha256` and number of `rows`, of all splits.

    The hash is that of the file, of several files or splits that of their hashes, one a line. Rows that come
    from no file of the user's are hashed as lines of JSON.
    """
    parts = [read() for split in _splits(source).values() for read in split]
    hashes = [part.sha256() for part in parts]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"source": source, "sha256": whole, "rows": sum(len(part.rows) for part in parts)}


def _tell(source: str, left_out: Dropped, dropped: Dropped | None) -> None:
    if dropped is not None:
        dropped.ties += left_out.ties
        dropped.bad_rows += left_out.bad_rows
        dropped.first = dropped.first or left_out.first
    elif left_out.ties or left_out.bad_rows:
        logging.getLogger(__name__).warning("%s: %s", source, left_out)


def _dataset(rows: list[Row]) -> "Dataset":
    """The rows as a data set, without columns in which there is nothing."""
    from datasets import Dataset

    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _key(prompt: Text) -> str:
    """Equal for equal prompts."""
    return json.dumps(prompt, sort_keys=True)


def _uniform(text: str) -> float:
    """A number in [0, 1], evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


# ---- from a source to rows as they are ----


@dataclass(frozen=True)
class _Part:
    """Rows that lie together: those of a file, or of a split of the Hub."""

    name: str
    label: str
    """The `source` of rows that name none."""
    rows: list[Any]
    numbers: Sequence[int] = ()
    """The line of each row; empty where there are no lines."""
    path: Path | None = None

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        where = f"line {self.numbers[index]}" if self.numbers else f"row {index + 1}"
        return f"{self.name}, {where}"

    def sha256(self) -> str:
        if self.path is not None:
            return sha256_file(self.path)
        lines = (json.dumps(row, sort_keys=True, default=str) + "\n" for row in self.rows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


_Splits: TypeAlias = dict[str, list[Callable[[], _Part]]]
"""What reads the parts of each split, by the split's own name."""

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    # Validation comes before test: where there are both, the test is for the very end.
    "eval": ("validation", "valid", "val", "dev", "eval", "evaluation", "test"),
}


def _read(source: str, split: Split) -> list[_Part]:
    splits = _splits(source)
    name = _choose(split, splits)
    if name is None:
        remedy = "Hold out some of its rows, or name data that has one."
        if split == "train":
            is_hub = source.startswith("hub:")
            remedy = "Name one as in hub:OWNER/NAME@SPLIT." if is_hub else "Name the file itself."
        raise LabError(f"{source}: has no {split} split, only {', '.join(sorted(splits))}. {remedy}")
    return [read() for read in splits[name]]


def _choose(split: Split, names: Iterable[str]) -> str | None:
    return next((name for name in _SPLIT_NAMES[split] if name in names), None)


def _splits(source: str) -> _Splits:
    if source in BUILT_IN:
        return {split: [partial(_read_built_in, source, split)] for split in _SPLIT_NAMES}
    if source.startswith("hub:"):
        return _hub_splits(source)
    try:
        return _local_splits(source)
    except OSError as error:
        raise LabError(f"{source}: cannot be read: {_line(error)}. Name another source.") from error


def _read_built_in(source: str, split: Split) -> _Part:
    return _Part(source, source, BUILT_IN[source].demonstrations(split=split))


def _hub_splits(source: str) -> _Splits:
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([^@#]+)|#([^@#]+))*", source)
    if not match:
        raise LabError(f"{source}: not understood. A data set on the Hub is hub:OWNER/NAME[@SPLIT][#CONFIG].")
    name, split, config = match.groups()

    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # each mishap with network, name, split, configuration or files has its class
        raise LabError(
            f"{source}: cannot be loaded: {_line(error)}. Check its name and the network, or name a file."
        ) from error
    by_split = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    return {str(split): [partial(_read_loaded, source, name, rows)] for split, rows in by_split.items()}


def _read_loaded(source: str, name: str, loaded: Any) -> _Part:
    return _Part(source, name, loaded.to_list())


def _local_splits(source: str) -> _Splits:
    path = Path(source)
    if source and path.is_dir():
        splits: _Splits = {}
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.suffix in SUFFIXES and not any(name.startswith(".") for name in inside.parts):
                splits.setdefault(_split_in_name(inside) or "train", []).append(partial(_read_file, file))
        if not splits:
            raise LabError(f"{source}: holds no {' or '.join(SUFFIXES)} file. A source is {KNOWN_SOURCES}.")
        return splits
    if not path.is_file():
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*nearby, *BUILT_IN])
        raise LabError(f"{source!r}: no such file or folder.{hint} A source is {KNOWN_SOURCES}.")
    if path.suffix not in SUFFIXES:
        raise LabError(f"{source}: not a kind of file that is known. A source is {KNOWN_SOURCES}.")
    return {"train": [partial(_read_file, path)]}


def _split_in_name(path: Path) -> str | None:
    """The split that the file's name speaks of, or else the nearest folder's."""
    for name in (path.stem, *reversed(path.parent.parts)):
        for word in re.findall("[a-z]+", name.lower()):
            if any(word in known for known in _SPLIT_NAMES.values()):
                return word
    return None


def _read_file(path: Path) -> _Part:
    # Where the file is called by its split alone, its folder's name tells more.
    label = path.resolve().parent.name if path.stem.lower() == _split_in_name(Path(path.stem)) else path.stem
    try:
        if path.suffix == ".parquet":
            return _Part(str(path), label, _read_parquet(path), path=path)
        data = path.read_bytes()
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {_line(error)}. Restore it or name another.") from error
    if data.lstrip().startswith(b"["):  # one list of all rows
        return _Part(str(path), label, _parse(data, path), path=path)
    lines = {number: line for number, line in enumerate(data.splitlines(), 1) if line and not line.isspace()}
    rows = [_parse(line, path, number) for number, line in lines.items()]
    return _Part(str(path), label, rows, list(lines), path)


def _parse(data: bytes, path: Path, line: int | None = None) -> Any:
    """Parses one line of a file, or all of it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: also for bytes that are no UTF-8
        why = _line(error)
        if isinstance(error, json.JSONDecodeError):
            why = f"{error.msg} at column {error.colno}"
            line = line or error.lineno
        raise LabError(
            f"{path}, line {line or 1}: not JSON: {why}. A file holds one row a line, as in "
            '{"prompt": "...", "completion": "..."}, or one list of such rows.'
        ) from None


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            return file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise LabError(f"{path}: not a readable parquet file: {_line(error)}. Restore it.") from error


def _line(error: BaseException) -> str:
    """An error in one short line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" ...").rstrip(".")


# ---- from rows as they are to rows of a known form ----


class _BadRow(Exception):
    """What is wrong with a row; `_load` knows where it stands and completes the line."""

    def __str__(self) -> str:
        end = "" if str(self.args[0]).endswith("?") else "."
        return f"{self.args[0]}{end} Correct the row or remove it."


_Parser: TypeAlias = Callable[[Row], Row]
_Parsers: TypeAlias = Mapping[tuple[str, ...], _Parser]
"""Parsers by the columns they need. The first whose columns are there is taken."""


def _load(source: str, split: Split, parsers: _Parsers, strict: bool) -> tuple[list[Row], Dropped]:
    """The rows of a split, all of one form and kind, and what was left out."""
    rows: list[Row] = []
    dropped = Dropped()
    form = first = ""
    for part in _read(source, split):
        parse = None
        for i, raw in enumerate(part.rows):
            try:
                if not isinstance(raw, dict):
                    raise _BadRow(f"the row is {_kind(raw)}, no object with columns")
                parse = parse or _choose_parser(raw, parsers, part.place(i))
                row = parse(raw)
                if not form:
                    form, first = _form(row), part.place(i)
                elif _form(row) != form:
                    raise _BadRow(f"has {_form(row)}, while {first} has {form}")
            except _BadRow as bad:
                problem = f"{part.place(i)}: {bad}"
                if strict:
                    raise LabError(problem) from None
                dropped.bad_rows += 1
                dropped.first = dropped.first or problem
                continue
            if "source" in row:
                row["source"] = row["source"] or part.label
            rows.append(row)
    if not rows:
        raise LabError(dropped.first or f"{source}: is empty. Name data with rows in it.")
    return rows, dropped


def _choose_parser(row: Row, parsers: _Parsers, place: str) -> _Parser:
    for columns, parse in parsers.items():
        if row.keys() >= set(columns):
            return parse
    forms = "; ".join(" + ".join(columns) for columns in parsers)
    missing = sorted({column for columns in parsers for column in columns} - row.keys())
    hint = next(filter(None, (did_you_mean(name, missing) for name in row)), "")
    found = textwrap.shorten(", ".join(row), 200, placeholder=" ...") or "none"
    raise LabError(f"{place}: has the columns {found}. Name them as in one of: {forms}.{hint}")


def _form(row: Row) -> str:
    """What must not change from one row to the next."""
    column = next(iter(row))
    return f"{column} as a {'text' if isinstance(row[column], str) else 'conversation'}"


def _parse_completion(row: Row) -> Row:
    prompt = _prompt(_column(row, "prompt"))
    return {"prompt": prompt, "completion": _completion(_column(row, "completion"), "completion", prompt)}


def _parse_messages(row: Row) -> Row:
    messages = _text(_column(row, "messages"), "messages")
    if isinstance(messages, str):
        raise _BadRow("messages is a text; it must be a list of messages")
    _completion(messages[-1:], "messages", prompt=[])
    return {"messages": messages}


def _parse_text(row: Row) -> Row:
    text = _plain(_column(row, "text"), "text")
    if not text.strip():
        raise _BadRow("text is empty")
    return {"text": text}


def _parse_prompt(row: Row) -> Row:
    return {"prompt": _prompt(_column(row, "prompt"))}


def _parse_prompt_of_messages(row: Row) -> Row:
    return {"prompt": _prompt(_parse_messages(row)["messages"][:-1])}


def _parse_ranking(row: Row) -> Row:
    completions = _entries(_column(row, "completions"), "completions")
    count = len(completions)
    if count < 2:
        raise _BadRow(f"completions holds {count}; a ranking is of two or more")
    ranks = _entries(_column(row, "ranks"), "ranks", count)
    if not all(type(rank) is int and 1 <= rank <= count for rank in ranks):
        # Beyond `count` they may be ratings, of which the highest is the best.
        raise _BadRow(f"ranks is {reprlib.repr(ranks)}; it must be of 1, the best, to {count}")
    scores = row.get("scores")
    if scores is not None:
        if not all(map(_is_finite, _entries(scores, "scores", count))):
            raise _BadRow(f"scores is {reprlib.repr(scores)}; it must be of finite numbers")
        scores = [float(score) for score in scores]
    named = {f"completion {i}": completion for i, completion in enumerate(completions, 1)}
    finished = row.get("finished")
    finished = [None] * count if finished is None else _entries(finished, "finished", count)
    return _comparison(row, _column(row, "prompt"), named, ranks, finished, scores)


def _parse_preference(row: Row) -> Row:
    chosen, rejected = _text(_column(row, "chosen"), "chosen"), _text(_column(row, "rejected"), "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _BadRow("one of chosen and rejected is a text, the other a conversation")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # UltraFeedback has whole conversations, and of what the user says in them a copy as the prompt.
        if prompt.strip() not in [turn["content"].strip() for turn in chosen]:
            raise _BadRow("prompt is a text, chosen a conversation without it")
        prompt = None
    if prompt is None:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
    finished = [row.get("chosen_finished"), row.get("rejected_finished")]
    return _comparison(row, prompt, {"chosen": chosen, "rejected": rejected}, [1, 2], finished, None)


def _comparison(
    row: Row,
    prompt: Any,
    named: dict[str, Any],
    ranks: list[int],
    finished: list[Any],
    scores: list[float] | None,
) -> Row:
    """The canonical row. `named`: each completion by what errors call it; `finished`: None where not said."""
    if not all(end is None or isinstance(end, bool) for end in finished):
        raise _BadRow(f"finished is {reprlib.repr(finished)}; it must be of true and false")
    prompt = _prompt(prompt)
    completions = [
        _completion(value, name, prompt, may_be_empty=end is True)
        for (name, value), end in zip(named.items(), finished, strict=True)
    ]
    finished = [end is not False for end in finished]
    first, *others = zip(completions, finished, strict=True)
    if all(other == first for other in others) and len(set(ranks)) > 1:
        raise _BadRow(f"{' and '.join(named)} are the same, so none is better")
    source = row.get("source")
    return {
        "prompt": prompt,
        "completions": completions,
        "ranks": ranks,
        "finished": finished,
        "scores": scores,
        "source": None if source is None else _plain(source, "source"),
    }


def _best_of(parse: _Parser) -> _Parser:
    """Makes of a parser of comparisons one of demonstrations."""

    def parse_best(row: Row) -> Row:
        comparison = parse(row)
        best = comparison["ranks"].index(min(comparison["ranks"]))
        return {"prompt": comparison["prompt"], "completion": comparison["completions"][best]}

    return parse_best


_COMPARISONS: dict[tuple[str, ...], _Parser] = {
    ("prompt", "completions", "ranks"): _parse_ranking,
    ("chosen", "rejected"): _parse_preference,
}
_DEMONSTRATIONS: dict[tuple[str, ...], _Parser] = {
    ("prompt", "completion"): _parse_completion,
    ("messages",): _parse_messages,
    ("text",): _parse_text,
}
_PROMPTS: dict[tuple[str, ...], _Parser] = {
    ("messages",): _parse_prompt_of_messages,
    ("prompt",): _parse_prompt,
}


# ---- texts and conversations ----


def _column(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise _BadRow(f"{name} is {'null' if name in row else 'missing'}")
    return row[name]


def _entries(value: Any, name: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise _BadRow(f"{name} is {_kind(value)}; it must be a list")
    if count is not None and len(value) != count:
        raise _BadRow(f"{name} has {len(value)} entries for {count} completions")
    return value


def _text(value: Any, name: str) -> Text:
    """A text as it is, or a conversation reduced to roles and contents."""
    if isinstance(value, list):
        return [_message(turn, f"{name}, message {i}") for i, turn in enumerate(value, 1)]
    return _plain(value, name, "a text or a list of messages")


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise _BadRow(f'{name} is no object with "role" and "content"')
    role = value["role"]
    if role not in ROLES:
        meant = _OTHER_NAMES.get(str(role))
        hint = f" Did you mean {meant!r}?" if meant else did_you_mean(str(role), ROLES)
        raise _BadRow(f"{name} has the role {reprlib.repr(role)}; known are {', '.join(ROLES)}.{hint}")
    return {"role": role, "content": _plain(value["content"], f"content of {name}")}


_OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}


def _plain(value: Any, name: str, wanted: str = "a text") -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{name} is {_kind(value)}; it must be {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _prompt(value: Any) -> Text:
    prompt = _text(value, "prompt")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise _BadRow("prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise _BadRow(f"prompt ends with a turn of {prompt[-1]['role']}; the last turn must be the user's")
    return prompt


def _completion(value: Any, name: str, prompt: Text, may_be_empty: bool = False) -> Text:
    """Checks one. A sampled answer `may_be_empty`: its end token is all it says, and can be learned from."""
    completion = _text(value, name)
    if isinstance(completion, str) != isinstance(prompt, str):
        kinds = ("text", "conversation") if isinstance(completion, str) else ("conversation", "text")
        raise _BadRow(f"{name} is a {kinds[0]}, but the prompt a {kinds[1]}")
    end = completion
    if not isinstance(end, str):
        for does, turn in zip(("ends", "begins"), end[-1:] + end[:1], strict=False):
            if turn["role"] != "assistant":
                raise _BadRow(f"{name} {does} with a turn of {turn['role']}; it must be the assistant's")
        end = end[-1]["content"] if end else ""
    if not end.strip() and not may_be_empty:
        raise _BadRow(f"{name} is empty")
    return completion


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The common beginning of two texts or conversations, and what follows it in each."""
    if chosen == rejected:
        raise _BadRow("chosen and rejected are the same")
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, other_turns = _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
        if turns or other_turns:
            if turns[:-1] != other_turns[:-1]:
                raise _BadRow("chosen and rejected differ before the last reply")
            return turns[:-1], turns[-1:], other_turns[-1:]
        # Never within a word, and the space before a completion is its own: tokens would change otherwise.
        words = re.match(r".*\S(?=\s)", chosen[: _common(chosen, rejected)], re.DOTALL)
        length = words.end() if words else 0
    else:
        length = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if length < 1:
        raise _BadRow("chosen and rejected have no common beginning, and there is no prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _common(a: Text, b: Text) -> int:
    """Length of the common beginning; by bisection, because comparing whole slices is quick."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _transcript(text: str, name: str) -> list[Message]:
    """The turns of an hh-rlhf transcript; none if the text is not one.

    Raises:
        _BadRow: it does not begin with the human or does not end with the assistant.
    """
    preamble, *speeches = _SPEAKER.split("\n\n" + text.lstrip())
    if not speeches:
        return []
    if preamble or speeches[0] != "Human":
        raise _BadRow(f"{name} is a transcript that does not begin with 'Human:'")
    if speeches[-2] != "Assistant":
        raise _BadRow(f"{name} is a transcript that does not end with a turn of 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": speech.strip()}
        for speaker, speech in zip(speeches[::2], speeches[1::2], strict=True)
    ]


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # unlike math.isfinite, also for integers beyond it


def _kind(value: Any) -> str:
    """What a JSON value is, for errors."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
