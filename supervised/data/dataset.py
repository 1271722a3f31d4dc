"""From what a config names to a data set: parts chosen or held out, texts as tokens, all as tensors."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.errors import LabError
from lab.memory import require_memory
from supervised.data import frames, sources, tokenizers
from supervised.data.arrays import as_images
from supervised.data.config import DataConfig
from supervised.data.raw import (
    Column,
    Columns,
    Raw,
    Reading,
    is_evaluation,
    is_part,
    n_rows,
    part_kind,
    some,
    take,
)
from supervised.data.splits import FrameSplit, Ragged, SequenceSplit, Split, TensorSplit, TokenSplit
from supervised.data.tokenizers import Tokenizer

MOST_CLASSES = 1_000_000
HELD_OUT = "held_out"
"""What the part is called that is taken from the training part."""
ALL = "all"
"""What all rows are called together, where none of them was learned from."""
_BYTES_A_CHARACTER = 130
"""Memory that the library of tokenizers takes for one character of a document, measured."""
_AT_ONCE = 2**22
"""Characters of documents that are tokenised together."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is learned from, and what the result is judged by."""

    name: str
    kind: str
    """images, table, sequences, text, pairs, tasks or frames."""
    train: Any
    test: Any
    """A `TensorSplit` of images, tables and sequences, a `TokenSplit` of text, a `FrameSplit` of frames, else
    a `SequenceSplit`."""
    sha256: str
    """Of all tensors of both parts: what a run was trained and judged on."""
    classes: tuple[str, ...] = ()
    """Their names, where samples have labels; of frames those of the actions."""
    columns: tuple[Column, ...] = ()
    """Of a table whose columns have names, what became of them."""
    tokenizer: Any = None
    """Of texts."""
    form: str = ""
    """Of tasks: classification, entailment, similarity or choice."""
    held_out: Columns = field(default_factory=dict)
    """Of text {"text"} and pairs {"source", "target"}: what `test` has as tokens, as it was before."""
    longest: int = 0
    """Of pairs: tokens of the longest sentence to judge by, of this part or another."""
    notes: tuple[str, ...] = field(default=())
    """What was left out or converted, a sentence each."""
    coverage: tuple[str, ...] = field(default=())
    """On classes that are not learned or not evaluated, a sentence each."""
    shared: tuple[str, ...] = field(default=())
    """On samples that are both learned from and evaluated, where there are any, a sentence."""
    choice: tuple[str, ...] = field(default=())
    """On which part chooses the weights, where others could, a sentence."""
    train_sha256: str = ""
    """Of the tensors of `train`."""
    part: str = HELD_OUT
    """What `test` is: a part of the source by its name there, or held_out."""
    chosen_by: str = HELD_OUT
    """The part that is evaluated on in training: it chooses the best weights."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def load(
    config: DataConfig,
    tokenizer_folder: Path | None = None,
    reading: Reading | None = None,
    part: str | None = None,
) -> DataSet:
    """Reads a data set.

    Args:
        config: which, and how.
        tokenizer_folder: where `tokenizer.save` put the one that a run began with; it is used again.
        reading: what the objective wants of data that could be taken in two ways.
        part: to evaluate as `test`, in place of the part that chooses: train (what is learned from),
            held_out, one of the source, or all there is; empty: the source's test part, where it has one.

    Raises:
        LabError: the source is not there, is damaged, or has too little to learn from and be judged by.
    """
    raw = sources.read(config, reading)
    if raw.kind == "table" and config.img_size:
        raw = _as_squares(raw, config)
    if config.augment.any and raw.kind != "images":
        raise LabError(f"data.augment: is for images, and {config.source} holds {raw.kind}. Leave it out.")
    if config.batch_tokens and raw.kind not in ("pairs", "tasks"):
        raise LabError(
            f"data.batch_tokens: is for pairs and tasks, and {config.source} holds {raw.kind}. "
            "Use batch_size."
        )
    notes = list(raw.notes)
    choice: list[str] = []
    train, test, chosen_by, name = _choose(raw, config, part, notes, choice)
    classes = _check_labels(raw, train, test, config.source)
    if reading is not None and reading.classes:
        train, test, classes = _numbered_as_learned(train, test, classes, reading.classes)
    if config.limit is not None:  # only now: which classes there are does not depend on it
        train, test = (_limited(columns, raw.kind, config) for columns in (train, test))
    coverage = _coverage(train, test, classes, name)
    tokenizer, longest = None, 0
    splits: list[Split]
    if raw.kind in ("images", "table", "sequences"):
        _check_shapes(train, test, config.source)
        splits = [TensorSplit({name: _tensor(v) for name, v in part.items()}) for part in (train, test)]
    elif raw.kind == "frames":
        classes = raw.classes
        splits = [FrameSplit(**{name: _tensor(v) for name, v in part.items()}) for part in (train, test)]
    else:
        tokenizer = _tokenizer(config, train, tokenizer_folder)
        if raw.kind == "text":
            splits = [_tokens(part["text"], tokenizer) for part in (train, test)]
        elif raw.kind == "pairs":
            kept = _pairs(train, tokenizer, config.context)
            if (left_out := n_rows(train) - len(kept)) and name != ALL:
                notes.append(f"left out {left_out:,} empty pairs or pairs of over {config.context} tokens")
            held_out = _pairs(test, tokenizer)
            splits = [kept, held_out]
            others = (columns for part, columns in raw.parts.items() if is_evaluation(part))
            judged = [held_out, *(_pairs(columns, tokenizer) for columns in others if n_rows(columns))]
            if n_long := int((held_out.sequences["target"].longest() > config.context + 1).sum()):
                notes.append(
                    f"{n_long:,} translations of {name} have over data.context = {config.context} tokens: "
                    "those of a model end there"
                )
            longest = max(int(r.longest().max()) for split in judged for r in split.sequences.values())
        else:
            keep_end = raw.form == "choice"
            read = [_tasks(part, tokenizer, config.context, keep_end) for part in (train, test)]
            splits = [split for split, _ in read]
            if n_cut := sum(n for _, n in read[name == ALL :]):
                notes.append(
                    f"cut the texts of {n_cut:,} samples, held-out ones too, to {config.context} tokens"
                )
        if not len(splits[0]):
            raise LabError(
                f"{config.source}: no training sample has at most data.context = {config.context} tokens."
            )
    learned, both = _hashes(splits)
    return DataSet(
        name=Path(config.source.removeprefix("hub:").partition("#")[0]).name,
        kind=raw.kind,
        train=splits[0],
        test=splits[1],
        sha256=both,
        train_sha256=learned,
        classes=classes,
        columns=raw.columns,
        tokenizer=tokenizer,
        form=raw.form,
        held_out=test if raw.kind in ("text", "pairs") else {},
        longest=longest,
        notes=tuple(notes),
        coverage=coverage,
        shared=_shared(splits[0], splits[1], name) if name not in ("train", ALL) else (),
        choice=tuple(choice),
        part=name,
        chosen_by=chosen_by,
    )


# ---- parts ----


def _choose(
    raw: Raw, config: DataConfig, part: str | None, notes: list[str], choice: list[str]
) -> tuple[Columns, Columns, str, str]:
    """The columns to learn from and those to evaluate, the part that chooses the weights, and the one that is
    evaluated: the same, unless `part` names another.

    A part called after validation chooses; where there is none, one called after test does, and where there
    is none either, a share of the training part.
    """
    if part == ALL:
        whole = _joined([raw.parts[p] for p in sorted(raw.parts)])
        return whole, whole, HELD_OUT, ALL
    by_kind = [[p for p in sorted(raw.parts) if part_kind(p) == kind] for kind in ("validation", "test")]
    if config.evaluate_on in ("", HELD_OUT):
        chosen = "" if config.evaluate_on else next((found[0] for found in by_kind if found), "")
    else:
        chosen = _named(raw, config.evaluate_on, "data.evaluate_on", config.source)
    others = [p for p in raw.parts if p != chosen and not is_evaluation(p)]
    if to_train := [p for p in others if part_kind(p) == "train"]:
        if left := [f"{p} ({n_rows(raw.parts[p]):,})" for p in others if p not in to_train]:
            notes.append(f"left out {some(left)}: named neither train nor val nor test")
        others = to_train
    if not others and part is not None:  # nothing is to be learned
        others = [chosen]
    if not others:
        raise LabError(
            f"{config.source}: has only {', '.join(sorted(raw.parts))}, nothing to train on. Add train."
        )
    train = _joined([raw.parts[p] for p in others])
    held_out = None
    if not chosen:
        if raw.kind == "text":
            train, held_out = _hold_out_text(train["text"], config)
        elif raw.kind == "frames":
            train, held_out = frames.hold_out(train, config.held_out)
        else:
            train, held_out = _hold_out(train, config)
    if chosen and not config.evaluate_on and part_kind(chosen) == "test":
        choice.append(
            f"there is no validation part: {chosen} is evaluated on in training and chooses the best "
            "weights. data.evaluate_on=held_out leaves it for `lab evaluate`"
        )
    elif part is None and (kept := [p for p in by_kind[1] if p != chosen]):
        choice.append(f"{chosen or HELD_OUT} chooses the weights; `lab evaluate` reports on {some(kept)}")
    name = chosen or HELD_OUT
    if part == "":
        part = name if part_kind(name) == "test" else next(iter(by_kind[1]), name)
    if part is not None and part != name:
        if is_part(part, "train") or (part_kind(part) == "train" and part not in raw.parts):
            name, test = "train", train
        elif part == HELD_OUT:
            raise LabError(f"--part held_out: nothing was held out of {config.source}. It has {chosen!r}.")
        else:
            name = _named(raw, part, "--part", config.source)
            test = raw.parts[name]
    else:
        test = raw.parts[chosen] if held_out is None else held_out
        if part is not None and not n_rows(test):  # too few to hold any out, and none is to be learned from
            return train, train, HELD_OUT, ALL
    for what, columns in (("training", train), (name.replace("_", "-"), test)):
        if not n_rows(columns) or (raw.kind == "text" and not any(columns["text"])):
            raise LabError(
                f"{config.source}: the {what} part is empty. Name more data, or another data.held_out."
            )
    return train, test, chosen or HELD_OUT, name


def _named(raw: Raw, name: str, key: str, source: str) -> str:
    """The part that a name stands for: in any case, with more behind it, or another word for the same."""
    fits = (
        lambda p: p == name,
        lambda p: is_part(p, name),
        lambda p: part_kind(name) is not None and part_kind(p) == part_kind(name),
    )
    for fit in fits:
        for part in sorted(raw.parts):
            if fit(part):
                return part
    raise LabError(f"{key} = {name!r}: {source} has no such part, only {', '.join(sorted(raw.parts))}.")


def _joined(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(values, np.ndarray)
        else [value for part in parts for value in part[name]]
        for name, values in parts[0].items()
    }


def _hold_out(columns: Columns, config: DataConfig) -> tuple[Columns, Columns]:
    """Some samples at random, of each class as large a share, but of two or more at least one and not all;
    both parts in the order of the source."""
    rng, n = np.random.default_rng(config.split_seed), n_rows(columns)
    labels = columns.get("labels", np.zeros(n, np.int64))
    held = np.zeros(n, bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(max(round(len(rows) * config.held_out), 1), len(rows) - 1)]] = True
    return take(columns, np.flatnonzero(~held)), take(columns, np.flatnonzero(held))


def _hold_out_text(texts: list[str], config: DataConfig) -> tuple[Columns, Columns]:
    """Whole documents at random until they are a share of the characters, without those too large for it; if
    that leaves none, the end of the largest, from a line on."""
    total, n, held = sum(map(len, texts)), 0, set()
    share = config.held_out * total
    for i in np.random.default_rng(config.split_seed).permutation(len(texts)).tolist():
        # The last one crosses the share, but takes at most as large a share of the rest.
        fits = n + len(texts[i]) <= share * (2 - config.held_out)
        if n < share and fits and len(held) < len(texts) - 1:
            held.add(i)
            n += len(texts[i])
    if n:
        parts = ([t for i, t in enumerate(texts) if (i in held) == side] for side in (False, True))
        return {"text": next(parts)}, {"text": next(parts)}
    largest = max(range(len(texts)), key=lambda i: len(texts[i]))
    text = texts[largest]
    border = int(len(text) * (1 - config.held_out * (total / max(len(text), 1))))
    border = text.find("\n", max(border - 1, 0), len(text) - 1) + 1 or border
    return {"text": [*texts[:largest], text[:border], *texts[largest + 1 :]]}, {"text": [text[border:]]}


def _limited(columns: Columns, kind: str, config: DataConfig) -> Columns:
    limit, n = config.limit or 0, n_rows(columns)
    if kind == "text":
        texts, left = [], limit
        for text in columns["text"]:
            texts.append(text[:left])
            left -= len(texts[-1])
            if not left:
                break
        return {"text": texts}
    if n <= limit:
        return columns
    if kind == "frames":
        return {name: values[:limit] for name, values in columns.items()}
    rows = np.random.default_rng(config.split_seed).permutation(n)[:limit]
    return take(columns, np.sort(rows))


def _check_labels(raw: Raw, train: Columns, test: Columns, source: str) -> tuple[str, ...]:
    """The classes' names; raises for labels that stand for none."""
    if "labels" not in train:
        return ()
    if "labels" not in test:
        raise LabError(f"{source}: the training part has labels, the held-out part none. Add them.")
    n = len(raw.classes) or max(int(train["labels"].max()) + 1, 1)
    if n > MOST_CLASSES:
        raise LabError(f"{source}: a label is {n - 1:,}: no class, which count from 0. Number them anew.")
    n_samples = len(train["labels"]) + len(test["labels"])
    require_memory(8 * n + 8 * n_samples, f"{source}: its {n:,} classes take", "Number them from 0 on.")
    for part, columns in (("training", train), ("held-out", test)):
        wrong = np.flatnonzero((columns["labels"] < 0) | (columns["labels"] >= n))
        if len(wrong):
            row = int(wrong[0])
            raise LabError(
                f"{source}: label {columns['labels'][row]} of sample {row + 1} of the {part} part is none "
                f"of the classes 0 to {n - 1}. Correct or remove it."
            )
    return raw.classes or tuple(map(str, range(n)))


def _numbered_as_learned(
    train: Columns, test: Columns, classes: tuple[str, ...], learned: tuple[str, ...]
) -> tuple[Columns, Columns, tuple[str, ...]]:
    """Both parts with labels that count the classes that a run learned, if the data hold no others: they may
    lack some."""
    if "labels" not in train or not set(classes) <= set(learned):
        return train, test, classes
    index = {name: i for i, name in enumerate(learned)}
    numbers = np.array([index[name] for name in classes], np.int64)
    train, test = ({**part, "labels": numbers[part["labels"]]} for part in (train, test))
    return train, test, learned


def _coverage(train: Columns, test: Columns, classes: tuple[str, ...], part: str) -> tuple[str, ...]:
    """On classes without samples in either part, a sentence each."""
    if "labels" not in train:
        return ()
    learned, tested = (np.bincount(c["labels"], minlength=len(classes)) for c in (train, test))
    said = []
    if empty := [classes[i] for i in np.flatnonzero((learned == 0) & (tested == 0))]:
        said.append(f"of {len(classes):,} classes {len(empty):,} have no sample: {some(empty)}")
    for where, missing, there in (
        (f"in {part}, so not evaluated", tested, learned),
        ("to learn from", learned, tested),
    ):
        if rows := [f"{classes[i]} ({there[i]:,})" for i in np.flatnonzero((missing == 0) & (there > 0))]:
            n = f"{len(rows):,} class{'es have' if len(rows) > 1 else ' has'}"
            said.append(f"{n} no sample {where}: {some(rows)}")
    return tuple(said)


def _shared(train: Split, test: Split, part: str) -> tuple[str, ...]:
    """On samples to evaluate whose inputs are also learned from: they show what was memorised."""
    inputs = (_inputs(train), _inputs(test))
    if inputs[0] is None or inputs[1] is None:
        return ()
    learned = set(map(hash, inputs[0]))
    n, shared = 0, 0
    what = "documents" if isinstance(test, TokenSplit) else "samples"
    for sample in inputs[1]:
        n += 1
        shared += hash(sample) in learned
    return (
        (f"{shared:,} of {n:,} {what} of {part} are also learned from, with the same input",)
        if shared
        else ()
    )


def _inputs(split: Split) -> Iterator[bytes] | None:
    """The bytes of each sample's input, and of text of each document that is not empty; None: it is play."""
    if isinstance(split, TensorSplit):
        return (row.tobytes() for row in split.tensors["inputs"].numpy())
    if isinstance(split, SequenceSplit):
        ragged = split.sequences.get("source") or split.sequences["ids"]
        flat, ends = ragged.flat.numpy(), ragged.offsets[:: ragged.group].tolist()
        return (flat[a:b].tobytes() for a, b in pairwise(ends))
    if isinstance(split, TokenSplit):
        flat, ends = split.ids.numpy(), [*split.documents.tolist(), len(split)]
        return (flat[a:b].tobytes() for a, b in pairwise(ends) if b > a + 1)
    return None


def _check_shapes(train: Columns, test: Columns, source: str) -> None:
    """Raises unless samples of both parts have the same columns and shapes, and only finite numbers."""
    shapes = [{name: values.shape[1:] for name, values in part.items()} for part in (train, test)]
    if shapes[0] != shapes[1]:
        both = [
            ", ".join(f"{name} {' x '.join(map(str, shape))}".rstrip() for name, shape in part.items())
            for part in shapes
        ]
        raise LabError(
            f"{source}: a training sample is {both[0]}; a held-out one {both[1]}. They must be alike."
        )
    for part, columns in (("training", train), ("held-out", test)):
        for name, values in columns.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                raise LabError(
                    f"{source}: {name} of sample {row + 1} of the {part} part is no finite number. "
                    "Correct or remove it."
                )


# ---- tensors ----


def _tensor(values: np.ndarray) -> torch.Tensor:
    """Of a copy if the array cannot be written to, as one that looks into a file's bytes."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _tokenizer(config: DataConfig, train: Columns, folder: Path | None) -> Tokenizer:
    if folder is not None and (folder / tokenizers.FILES[0]).is_file():
        return tokenizers.from_folder(folder)
    if config.tokenizer == "bytes":
        return tokenizers.ByteTokenizer()
    if config.tokenizer != "bpe":
        return tokenizers.pretrained(config.tokenizer)
    if "texts" in train:
        texts = [text for sample in train["texts"] for sequence in sample for text in sequence]
    else:
        texts = [text for column in train.values() for text in column]
    return tokenizers.train_bpe(texts, config.vocab_size)


def _as_squares(raw: Raw, config: DataConfig) -> Raw:
    """A table of pixels as grey images of `img_size` x `img_size`."""
    side, notes = config.img_size or 1, list(raw.notes)
    parts = {}
    for part, columns in raw.parts.items():
        n, width = columns["inputs"].shape
        if width != side * side:
            raise LabError(
                f"data.img_size = {side}: {config.source} is a table of {width} columns, no grey images "
                f"of {side} x {side}. Leave it out."
            )
        squares = columns["inputs"].reshape(n, 1, side, side)
        images = as_images(squares, f"{config.source}: {part}", "the columns", notes)
        parts[part] = {**columns, "inputs": images}
    return Raw(kind="images", parts=parts, classes=raw.classes, notes=list(dict.fromkeys(notes)))


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each text, int32, tokenised some at a time: what the library keeps of one is a hundred times
    as large as its text."""
    longest = max(map(len, texts), default=0)
    if not isinstance(tokenizer, tokenizers.ByteTokenizer):
        require_memory(
            _BYTES_A_CHARACTER * max(longest, min(_AT_ONCE, sum(map(len, texts)))),
            f"a document of {longest:,} characters: to make tokens of it takes about",
            "Part it into several files, or set data.tokenizer=bytes.",
        )
    batch: list[str] = []
    size = 0
    for i, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _AT_ONCE or i == len(texts) - 1:
            yield from (np.array(ids, np.int32) for ids in tokenizer.encode_batch(batch))
            batch, size = [], 0


def _tokens(texts: list[str], tokenizer: Tokenizer) -> TokenSplit:
    end = np.array([tokenizer.eos_id], np.int32)
    documents = [np.append(ids, end) for ids in _encoded(texts, tokenizer)]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    return TokenSplit(torch.from_numpy(np.concatenate(documents)), torch.from_numpy(starts))


def _pairs(columns: Columns, tokenizer: Tokenizer, longest: int | None = None) -> SequenceSplit:
    """Sources end in the end token; targets begin with the start token, too."""
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    sources_ = [[*ids, *eos] for ids in _encoded(columns["source"], tokenizer)]
    targets = [[*bos, *ids, *eos] for ids in _encoded(columns["target"], tokenizer)]
    if longest is not None:
        pairs = zip(sources_, targets, strict=True)
        kept = [(s, t) for s, t in pairs if 1 < len(s) <= longest and 2 < len(t) <= longest]
        sources_, targets = [s for s, _ in kept], [t for _, t in kept]
    return SequenceSplit({"source": Ragged.of(sources_), "target": Ragged.of(targets)}, tokenizer.pad_id)


def _tasks(columns: Columns, tokenizer: Tokenizer, longest: int, keep_end: bool) -> tuple[SequenceSplit, int]:
    """Start, text (delimiter, text), extract, as in GPT-1's figure 1, and how many samples had to be cut.

    Of two texts the longer one is cut first; `keep_end`: the first one at its beginning.
    """
    sequences = [sequence for sample in columns["texts"] for sequence in sample]
    encoded = _encoded([text for sequence in sequences for text in sequence], tokenizer)
    rows, cut, group = [], set(), len(columns["texts"][0])
    for i, sequence in enumerate(sequences):
        first, *others = ([*ids] for ids in islice(encoded, len(sequence)))
        room = max(longest - 2 - len(others), 0)
        if len(first) + sum(map(len, others)) > longest - 2 - len(others):
            cut.add(i // group)
            others = [ids[: max(room - len(first), (room + 1) // 2)] for ids in others]
            room -= sum(map(len, others))
            first = first[max(len(first) - room, 0) :] if keep_end else first[:room]
        rest = [token for ids in others for token in (tokenizer.delim_id, *ids)]
        text = [tokenizer.bos_id, *first, *rest]
        rows.append([*text[: longest - 1], tokenizer.extract_id])  # without it there is no answer
    tensors = {name: _tensor(columns[name]) for name in ("labels", "targets") if name in columns}
    return SequenceSplit({"ids": Ragged.of(rows, group)}, tokenizer.pad_id, tensors), len(cut)


def _hashes(splits: Sequence[Split]) -> tuple[str, str]:
    """SHA-256 of the training part, and of both."""
    digest, found = hashlib.sha256(), []
    for part, split in zip(("train", "test"), splits, strict=True):
        for name, tensor in split.parts():
            digest.update(f"{part} {name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().data)
        found.append(digest.hexdigest())
    return found[0], found[1]
