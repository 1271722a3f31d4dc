"""From what a config names to a data set: parts chosen or held out, texts as tokens, all as tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.errors import LabError
from supervised.data import frames, sources, tokenizers
from supervised.data.config import DataConfig
from supervised.data.raw import EVALUATION, Columns, Raw, is_evaluation, is_part, n_rows, take
from supervised.data.splits import FrameSplit, Ragged, SequenceSplit, Split, TensorSplit, TokenSplit
from supervised.data.tokenizers import Tokenizer

MOST_CLASSES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is learned from, and what the result is judged by."""

    name: str
    kind: str
    """images, table, text, pairs, tasks or frames."""
    train: Any
    test: Any
    """A `TensorSplit` of images and tables, a `TokenSplit` of text, a `FrameSplit` of frames, else a
    `SequenceSplit`."""
    sha256: str
    """Of all tensors of both parts: what a run was trained and judged on."""
    classes: tuple[str, ...] = ()
    """Their names, where samples have labels; of frames those of the actions."""
    tokenizer: Any = None
    """Of texts."""
    form: str = ""
    """Of tasks: classification, entailment, similarity or choice."""
    held_out: Columns = field(default_factory=dict)
    """Of text {"text"} and pairs {"source", "target"}: what `test` has as tokens, as it was before."""
    longest: int = 0
    """Of pairs: tokens of the longest sentence to judge by, of this part or another."""
    notes: tuple[str, ...] = field(default=())
    """What was left out, a sentence each."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def load(config: DataConfig, tokenizer_folder: Path | None = None) -> DataSet:
    """Reads a data set.

    Args:
        config: which, and how.
        tokenizer_folder: where `tokenizer.save` put the one that a run began with; it is used again.

    Raises:
        LabError: the source is not there, is damaged, or has too little to learn from and be judged by.
    """
    raw = sources.read(config)
    if config.augment.any and raw.kind != "images":
        raise LabError(f"data.augment: is for images, and {config.source} holds {raw.kind}. Leave it out.")
    if config.batch_tokens and raw.kind not in ("pairs", "tasks"):
        raise LabError(
            f"data.batch_tokens: is for pairs and tasks, and {config.source} holds {raw.kind}. "
            "Use batch_size."
        )
    train, test = _choose(raw, config)
    classes = _check_labels(raw, train, test, config.source)
    if config.limit is not None:  # only now: which classes there are does not depend on it
        train, test = (_limited(columns, raw.kind, config) for columns in (train, test))
    notes = list(raw.notes)
    tokenizer, longest = None, 0
    splits: list[Split]
    if raw.kind in ("images", "table"):
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
            if left_out := n_rows(train) - len(kept):
                notes.append(f"left out {left_out:,} empty pairs or pairs of over {config.context} tokens")
            splits = [kept, _pairs(test, tokenizer)]
            others = (columns for part, columns in raw.parts.items() if is_evaluation(part))
            judged = [splits[1], *(_pairs(columns, tokenizer) for columns in others if n_rows(columns))]
            longest = max(int(r.longest().max()) for split in judged for r in split.sequences.values())
        else:
            keep_end = raw.form == "choice"
            read = [_tasks(part, tokenizer, config.context, keep_end) for part in (train, test)]
            splits = [split for split, _ in read]
            if n_cut := sum(n for _, n in read):
                notes.append(
                    f"cut the texts of {n_cut:,} samples, held-out ones too, to {config.context} tokens"
                )
        if not len(splits[0]):
            raise LabError(
                f"{config.source}: no training sample has at most data.context = {config.context} tokens."
            )
    return DataSet(
        name=Path(config.source.removeprefix("hub:").partition("#")[0]).name,
        kind=raw.kind,
        train=splits[0],
        test=splits[1],
        sha256=_hash(splits),
        classes=classes,
        tokenizer=tokenizer,
        form=raw.form,
        held_out=test if raw.kind in ("text", "pairs") else {},
        longest=longest,
        notes=tuple(notes),
    )


# ---- parts ----


def _choose(raw: Raw, config: DataConfig) -> tuple[Columns, Columns]:
    """The columns to learn from and those to judge by."""
    wanted = [config.evaluate_on] if config.evaluate_on else EVALUATION
    found = [
        part
        for name in wanted
        for part in (name, *sorted(raw.parts))
        if part in raw.parts and is_part(part, name)
    ]
    if config.evaluate_on and not found:
        raise LabError(
            f"data.evaluate_on = {config.evaluate_on!r}: {config.source} has no such part, only "
            f"{', '.join(sorted(raw.parts))}."
        )
    others = [
        columns for part, columns in raw.parts.items() if part not in found[:1] and not is_evaluation(part)
    ]
    if not others:
        raise LabError(
            f"{config.source}: has only {', '.join(sorted(raw.parts))}, nothing to train on. Add train."
        )
    train = _joined(others)
    if found:
        test = raw.parts[found[0]]
    elif raw.kind == "text":
        train, test = _hold_out_text(train["text"], config)
    elif raw.kind == "frames":
        train, test = frames.hold_out(train, config.held_out)
    else:
        train, test = _hold_out(train, config)
    for part, columns in (("training", train), ("held-out", test)):
        if not n_rows(columns) or (raw.kind == "text" and not any(columns["text"])):
            raise LabError(
                f"{config.source}: the {part} part is empty. Name more data, or another data.held_out."
            )
    return train, test


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
    """Some samples at random, of each class as large a share but not all; both parts in the order of the
    source."""
    rng, n = np.random.default_rng(config.split_seed), n_rows(columns)
    labels = columns.get("labels", np.zeros(n, np.int64))
    held = np.zeros(n, bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held[rows[: min(round(len(rows) * config.held_out), len(rows) - 1)]] = True
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
    for part, columns in (("training", train), ("held-out", test)):
        wrong = np.flatnonzero((columns["labels"] < 0) | (columns["labels"] >= n))
        if len(wrong):
            row = int(wrong[0])
            raise LabError(
                f"{source}: label {columns['labels'][row]} of sample {row + 1} of the {part} part is none "
                f"of the classes 0 to {n - 1}. Correct or remove it."
            )
    return raw.classes or tuple(map(str, range(n)))


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


def _tokens(texts: list[str], tokenizer: Tokenizer) -> TokenSplit:
    end = np.array([tokenizer.eos_id], np.int32)
    documents = [np.append(np.asarray(ids, np.int32), end) for ids in tokenizer.encode_batch(texts)]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    return TokenSplit(torch.from_numpy(np.concatenate(documents)), torch.from_numpy(starts))


def _pairs(columns: Columns, tokenizer: Tokenizer, longest: int | None = None) -> SequenceSplit:
    """Sources end in the end token; targets begin with the start token, too."""
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    sources_ = [[*ids, *eos] for ids in tokenizer.encode_batch(columns["source"])]
    targets = [[*bos, *ids, *eos] for ids in tokenizer.encode_batch(columns["target"])]
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
    encoded = iter(tokenizer.encode_batch([text for sequence in sequences for text in sequence]))
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


def _hash(splits: Sequence[Split]) -> str:
    digest = hashlib.sha256()
    for part, split in zip(("train", "test"), splits, strict=True):
        for name, tensor in split.parts():
            digest.update(f"{part} {name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
