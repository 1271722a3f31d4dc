"""Data for the three stages of the ChatGPT recipe: demonstrations, comparisons and prompts.

Where the rows come from is said in `rlhf.sources`, in which forms they may come in `rlhf.forms`. Whatever
cannot be used is a `LabError` that names file and line, and nothing heavy is imported before it is needed.
"""

import contextlib
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import unpack
from lab.errors import LabError
from lab.files import written_aside
from rlhf import forms, notation, sources, trees
from rlhf.forms import Row, Text
from rlhf.reviews import Split

if TYPE_CHECKING:
    from datasets import Dataset

NAMED = 10
"""Rows that cannot be used are named up to so many; all are counted."""


def named(places: Sequence[str], count: int) -> str:
    """Places of rows in a few words: those of one file by their numbers, and how many more there are."""
    files: dict[str, list[str]] = {}
    for place in places:
        before, _, number = place.rpartition(" ")
        files.setdefault(before, []).append(number)
    told = "; ".join(
        f"{before}{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for before, numbers in files.items()
    )
    return told + (f" and {count - len(places):,} more" if count > len(places) else "")


@dataclass
class Dropped:
    """What was left out while reading. Who passes none to be filled finds it in the log."""

    rows: int = 0
    """Rows there are, used or not."""
    ties: int = 0
    """Comparisons without two different ranks, from which nothing can be learned."""
    bad_rows: int = 0
    """Rows that cannot be used, where `strict` is False."""
    first: str = ""
    """What is wrong with the first bad row, and where it stands."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Bad rows by what is wrong with them."""
    places: list[str] = field(default_factory=list)
    """Where the first bad rows stand, `NAMED` at most."""
    not_meant: dict[str, int] = field(default_factory=dict)
    """Rows that are as they should be and teach nothing here, by what they are."""
    unused: list[str] = field(default_factory=list)
    """Columns that nobody reads."""

    def __str__(self) -> str:
        first = f" (the first: {self.first})" if self.first else ""
        return f"left out {self.ties} ties and {self.bad_rows} rows that cannot be used{first}"

    def add(self, other: "Dropped") -> None:
        """Counts what another reading left out, too."""
        self.rows += other.rows
        self.ties += other.ties
        self.bad_rows += other.bad_rows
        self.first = self.first or other.first
        self.places = [*self.places, *other.places][:NAMED]
        self.unused = sorted({*self.unused, *other.unused})
        for mine, theirs in ((self.reasons, other.reasons), (self.not_meant, other.not_meant)):
            for what, count in theirs.items():
                mine[what] = mine.get(what, 0) + count

    def notes(self) -> list[str]:
        """What is to be said of it, in a few words each."""
        notes = [f"{count:,} {what} left out" for what, count in self.not_meant.items()]
        if self.ties:
            notes.append(f"{self.ties:,} ties left out")
        if self.bad_rows:
            notes.append(f"{self.bad_rows:,} rows that cannot be used left out ({self._by_reason()})")
        if self.unused:
            more = "" if len(self.unused) <= 8 else f" and {len(self.unused) - 8} more"
            notes.append(f"columns that are not used: {', '.join(self.unused[:8])}{more}")
        return notes

    def refusal(self, source: str) -> LabError:
        """All that is wrong with the rows of a source, in one line."""
        if self.bad_rows == 1:
            problem = self.first.removesuffix("Correct the row or remove it.")
            return LabError(f"{problem}Correct the row, remove it, or set data.bad_rows to skip.")
        return LabError(
            f"{source}: {self.bad_rows:,} of {self.rows:,} rows cannot be used: {self._by_reason()}. They "
            f"are {named(self.places, self.bad_rows)}. Correct or remove them, or set data.bad_rows to skip."
        )

    def _by_reason(self) -> str:
        reasons = sorted(self.reasons.items(), key=lambda item: -item[1])
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:5])
        rest = sum(count for _, count in reasons[5:])
        return told + (f", {rest:,} for other reasons" if rest else "")


@dataclass(frozen=True)
class Loaded:
    """Rows, where each of them stands, and what was left out."""

    rows: "Dataset"
    left_out: Dropped
    mark: str
    """A hash of all they follow from, where they are worth keeping; else empty."""
    _parts: list[tuple[str, str]]
    _places: "Dataset"

    def place(self, index: int) -> str:
        """File and line of a row."""
        at = self._places[index]
        name, unit = self._parts[at["_part"]]
        return f"{name}, {unit} {at['_line']}"


def demonstrations(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """Texts to imitate, in TRL's formats for supervised fine-tuning.

    Args:
        source: see `rlhf.sources`. Of a comparison, the best completion is the demonstration.
        split: "train", or "eval" where the source has it (`sources.has_eval`).
        strict: a row that cannot be used is an error, which counts all of them; else it is left out.
        dropped: is told what was left out.

    Returns:
        Columns `prompt` and `completion`, or `messages`, or `text`: what the source has.

    Raises:
        LabError: the source cannot be read or, where strict, some of its rows not be used.
    """
    return _told(load("demonstrations", source, split, strict=strict), source, dropped)


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
        LabError: the source cannot be read or, where strict, some of its rows not be used.
    """
    return _told(load("comparisons", source, split, strict=strict), source, dropped)


def prompts(
    source: str, split: Split = "train", *, strict: bool = True, dropped: Dropped | None = None
) -> "Dataset":
    """What to answer: the prompts of rows of any form but whole texts.

    Args:
        source, split, strict, dropped: as for `demonstrations`.

    Returns:
        Column `prompt` (text or messages): each prompt once, in the order of the source.

    Raises:
        LabError: the source cannot be read or, where strict, some of its rows not be used.
    """
    return _told(load("prompts", source, split, strict=strict), source, dropped)


def _told(loaded: Loaded, source: str, dropped: Dropped | None) -> "Dataset":
    left_out = loaded.left_out
    if dropped is not None:
        dropped.add(left_out)
    elif left_out.ties or left_out.bad_rows or left_out.not_meant:
        logging.getLogger(__name__).warning("%s: %s", source, left_out)
    return loaded.rows


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
    keys = [key_of(value[:-1] if column == "messages" else value) for value in dataset[column][:]]
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


def drawn(prompts: Sequence[Text], at_most: int | None) -> list[int]:
    """Which prompts stand for all of them where only some are asked: files are often sorted, by topic or
    source, so that their first rows do not.

    A hash of each prompt decides, and nothing else: whatever the seed the same ones are drawn, and where more
    are asked for, the same ones first.

    Returns:
        Indices, at most `at_most`, in the order drawn; all in the order given if there are no more.
    """
    everything = list(range(len(prompts)))
    if at_most is None or len(prompts) <= at_most:
        return everything
    return sorted(everything, key=lambda i: _uniform(f"drawn {key_of(prompts[i])}"))[:at_most]


# ---- reading, and keeping what was read ----

_PARSERS: dict[str, forms.Parsers] = {
    "demonstrations": forms.DEMONSTRATIONS,
    "comparisons": forms.COMPARISONS,
    "prompts": forms.PROMPTS,
}


def load(kind: str, source: str, split: Split = "train", *, strict: bool = True) -> Loaded:
    """The rows of a split, all of one form, with their places and what was left out.

    Args:
        kind: demonstrations, comparisons or prompts; see these functions.

    Raises:
        LabError: see these functions.
    """
    if kind == "comparisons" and source in sources.BUILT_IN:
        raise LabError(
            f"{source}: has no comparisons. Let a labeler rank what a fine-tuned model answers to its "
            "prompts, or name a file of comparisons."
        )
    parts = sources.read(source, split)
    kept = _Kept.of(kind, split, parts)
    table = kept.read() if kept else None
    if table is None:
        table = _parsed(kind, source, parts)
        if kept:
            kept.write(table)
    left_out = Dropped(**json.loads(table.schema.metadata[b"left_out"]))
    if left_out.bad_rows and strict:
        raise left_out.refusal(source)
    if not table.num_rows:
        if left_out.ties:
            raise LabError(
                f"{source}: all completions tie in each of its comparisons. Name data with preferences."
            )
        why = "; ".join(f"{count:,} {what}" for what, count in left_out.not_meant.items())
        nothing = f"holds nothing to learn from ({why})" if why else "is empty"
        raise LabError(left_out.first or f"{source}: {nothing}. Name data with rows in it.")
    from datasets import Dataset
    from datasets.table import InMemoryTable

    whole = Dataset(InMemoryTable(table.replace_schema_metadata(None)))
    columns = ["_part", "_line"]
    names = [(part.name, part.unit) for part in parts]
    mark = kept.path.stem if kept else ""
    return Loaded(whole.remove_columns(columns), left_out, mark, names, whole.select_columns(columns))


def _parsed(kind: str, source: str, parts: Sequence[sources.Part]) -> Any:
    """A table of Arrow: canonical rows, where they stand, and in its metadata what was left out."""
    left_out, builder, seen = Dropped(), _Builder(), set[str]()
    unused: set[str] = set()
    form = first = ""
    parsers = _PARSERS[kind]
    for index, part in enumerate(parts):
        usual: forms.Parser | None = None
        known: dict[tuple[str, ...], forms.Parser | None] = {}
        unknown: LabError | None = None
        used = 0
        for number, raw in _expanded(part.read()):
            left_out.rows += 1
            try:
                if isinstance(raw, sources.NotJSON):
                    raise forms.BadRow(str(raw))
                raw = forms.as_row(raw, parsers)
                columns = forms.columns_of(raw)
                if columns not in known:
                    known[columns] = found = forms.choose_parser(raw, parsers)
                    if found:
                        unused |= forms.unused_columns(raw, found)
                parser = known[columns] or usual
                if parser is None:
                    unknown = unknown or forms.unknown_columns(raw, parsers, part.place(number))
                    raise forms.BadRow(f"has the columns {', '.join(raw)[:80]}")
                usual = usual or parser
                row = parser.parse(raw)
                used += 1
                if not form:
                    form, first = forms.form_of(row), part.place(number)
                elif forms.form_of(row) != form:
                    raise forms.BadRow(f"has {forms.form_of(row)}, while {first} has {form}")
            except forms.NotMeant as reason:
                used += 1
                left_out.not_meant[str(reason)] = left_out.not_meant.get(str(reason), 0) + 1
                continue
            except forms.BadRow as bad:
                _note(left_out, part.place(number), bad)
                continue
            if kind == "comparisons" and len(set(row["ranks"])) == 1:
                left_out.ties += 1
                continue
            if kind == "prompts":
                key = key_of(row["prompt"])
                if key in seen:
                    continue
                seen.add(key)
            if "source" in row:
                row["source"] = row["source"] or part.label
            builder.add(row, index, number)
        if unknown is not None and not used:  # no row of it has columns that are known: it is other data
            raise unknown
    left_out.unused = sorted(map(str, unused))
    return builder.table({b"left_out": json.dumps(asdict(left_out)).encode()})


def _note(left_out: Dropped, place: str, bad: forms.BadRow) -> None:
    reason = str(bad.args[0])
    left_out.bad_rows += 1
    left_out.first = left_out.first or f"{place}: {bad}"
    is_json = not reason.startswith("not JSON")
    kind = reason.partition("; ")[0] if is_json else "not JSON (one row a line, or one list of rows)"
    if kind not in left_out.reasons and len(left_out.reasons) >= 50:
        kind = "something else"
    left_out.reasons[kind] = left_out.reasons.get(kind, 0) + 1
    if len(left_out.places) < NAMED:
        left_out.places.append(place)


def _expanded(rows: Iterable[sources.Numbered]) -> Iterator[sources.Numbered]:
    """The rows, and for OpenAssistant's trees those that they hold."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    if trees.is_message(first[1]):
        yield from trees.rows_of_messages(rows)
    elif trees.is_tree(first[1]):
        for number, row in rows:
            yield from trees.rows_of_tree(row, number) if trees.is_tree(row) else [(number, row)]
    else:
        yield from rows


_EXTRAS = ("name", "tool_call_id", "tool_calls", "tools", "weight")


class _Builder:
    """Rows to a table of Arrow, some thousand at a time: as Python's objects all would fill a memory."""

    BATCH = 4096

    def __init__(self) -> None:
        self._rows: list[tuple[Row, int, int]] = []
        self._batches: list[Any] = []
        self._extras = False

    def add(self, row: Row, part: int, line: int) -> None:
        self._rows.append((row, part, line))
        if len(self._rows) == self.BATCH:
            self._flush()

    def table(self, metadata: dict[bytes, bytes]) -> Any:
        """All rows; columns in which there is nothing are left out."""
        import pyarrow

        self._flush()
        if not self._batches:
            return pyarrow.table({"_part": [], "_line": []}).replace_schema_metadata(metadata)
        whole = pyarrow.concat_tables(self._batches, promote_options="permissive")
        empty = [name for name in whole.column_names if whole[name].null_count == whole.num_rows]
        return whole.drop_columns(empty).replace_schema_metadata(metadata).combine_chunks()

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        rows, self._rows = self._rows, []
        columns = {name: [row[name] for row, *_ in rows] for name in rows[0][0]}
        types = {name: _type_of(name, values) for name, values in columns.items()}
        arrays = {name: pyarrow.array(values, types[name]) for name, values in columns.items()}
        arrays["_part"] = pyarrow.array([part for _, part, _ in rows], pyarrow.int32())
        arrays["_line"] = pyarrow.array([line for *_, line in rows], pyarrow.int64())
        self._batches.append(pyarrow.table(arrays))


def _type_of(name: str, values: Sequence[Any]) -> Any:
    """The Arrow type of a canonical column."""
    import pyarrow

    simple = {
        "ranks": pyarrow.list_(pyarrow.int64()),
        "finished": pyarrow.list_(pyarrow.bool_()),
        "scores": pyarrow.list_(pyarrow.float64()),
        "source": pyarrow.string(),
        "text": pyarrow.string(),
    }
    if name in simple:
        return simple[name]
    several = name == "completions"
    sample = values[0][0] if several else values[0]
    if isinstance(sample, str):
        inner = pyarrow.string()
    else:
        conversations = chain.from_iterable(values) if several else values
        extras = {key for turns in conversations for turn in turns for key in turn if len(turn) > 2} - {
            "role",
            "content",
        }
        fields = {"role": pyarrow.string(), "content": pyarrow.string()}
        fields |= {key: pyarrow.int64() if key == "weight" else pyarrow.string() for key in sorted(extras)}
        inner = pyarrow.list_(pyarrow.struct(list(fields.items())))
    return pyarrow.list_(inner) if several else inner


@dataclass(frozen=True)
class _Kept:
    """A file of parsed rows, named by the hash of all that they follow from.

    A process that finds it half-written, damaged or not at all parses the rows again; one that cannot write
    it does without. Two that write it at once write the same bytes, each aside, and rename.
    """

    path: Path

    @classmethod
    def of(cls, kind: str, split: Split, parts: Sequence[sources.Part]) -> "_Kept | None":
        """The file for these rows; None for rows that are not worth it."""
        if not all(part.path or part.mark for part in parts):
            return None
        size = sum(part.path.stat().st_size for part in parts if part.path)
        if size < sources.WORTH_KEEPING and not any(part.mark for part in parts):
            return None
        marks = [(part.name, part.label, part.unit, part.sha256()) for part in parts]
        key = json.dumps([_code(), kind, split, marks])
        return cls(sources.cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow")

    def read(self) -> Any:
        """The table, None if there is none that is whole."""
        import pyarrow

        try:
            checked = json.loads(self.path.with_suffix(".json").read_text())
            with pyarrow.memory_map(str(self.path)) as file:
                whole = file.read_buffer()
            if checked != {"bytes": whole.size, "crc32": zlib.crc32(whole)}:
                return None
            return pyarrow.ipc.open_stream(whole).read_all()
        except (OSError, ValueError, pyarrow.ArrowException):
            return None

    def write(self, table: Any) -> None:
        """Keeps a table, if the disk allows it."""
        import pyarrow

        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(self.path) as aside:
                with (
                    pyarrow.OSFile(str(aside), "wb") as file,
                    pyarrow.ipc.new_stream(file, table.schema) as out,
                ):
                    out.write_table(table)
                with pyarrow.memory_map(str(aside)) as file:
                    whole = file.read_buffer()
                checked = {"bytes": whole.size, "crc32": zlib.crc32(whole)}
            with written_aside(self.path.with_suffix(".json")) as aside:
                aside.write_text(json.dumps(checked))


@cache
def _code() -> str:
    """A hash of the code that parses, so that what other code parsed is not taken for its own."""
    files = [Path(str(module.__file__)) for module in (forms, notation, sources, trees, unpack)] + [
        Path(__file__)
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_of(prompt: Text) -> str:
    """Equal for equal prompts."""
    if isinstance(prompt, list):
        prompt = [{key: value for key, value in turn.items() if value is not None} for turn in prompt]
    return json.dumps(prompt, sort_keys=True)


def _uniform(text: str) -> float:
    """A number in [0, 1], evenly spread over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
