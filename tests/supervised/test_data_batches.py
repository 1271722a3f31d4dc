"""Batches: every sample as often as it should be, in an order that depends on seed and epoch alone."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from supervised.data import (
    Batches,
    FrameSplit,
    Ragged,
    SequenceSplit,
    Split,
    TensorSplit,
    TokenSplit,
    batches,
)
from tests.host_reads import HostReads

CPU = torch.device("cpu")


def rows(n: int) -> TensorSplit:
    inputs = torch.arange(n * 4, dtype=torch.uint8).view(n, 1, 2, 2)
    return TensorSplit({"inputs": inputs, "labels": torch.arange(n)})


def text(n: int) -> TokenSplit:
    return TokenSplit(torch.arange(n, dtype=torch.int32), torch.tensor([0]))


def pairs(lengths: list[tuple[int, int]]) -> SequenceSplit:
    """Pairs of which every token tells its pair: source i is [100 + i, ...], target [100 + i, ...]."""
    sides = ([[100 + i] * pair[side] for i, pair in enumerate(lengths)] for side in (0, 1))
    labels = torch.arange(len(lengths))
    return SequenceSplit(
        {"source": Ragged.of(next(sides)), "target": Ragged.of(next(sides))}, 7, {"labels": labels}
    )


def play(lengths: list[int]) -> FrameSplit:
    """Stretches of play of so many frames, each of which tells its step."""
    n = sum(lengths)
    begins = torch.zeros(n, dtype=torch.bool)
    begins[list(itertools.accumulate([0, *lengths[:-1]]))] = True
    return FrameSplit(
        torch.arange(n, dtype=torch.uint8)[:, None, None].repeat(1, 2, 3), torch.arange(n), begins
    )


SPLITS: dict[str, tuple[Split, dict[str, Any]]] = {
    "rows": (rows(23), {}),
    "text": (text(97), {"context": 8}),
    "pairs": (pairs([(1 + i % 5, 2 + i % 7) for i in range(31)]), {"batch_tokens": 20}),
    "play": (play([9, 3, 20]), {"context": 4}),
}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_order_depends_on_seed_and_epoch_alone(kind: str, drop_last: bool) -> None:
    split, more = SPLITS[kind]
    made = Batches(split, 4, seed=3, drop_last=drop_last, **more)
    list(made.epoch(0))  # whatever was read before
    torch.manual_seed(5)
    first = list(made.epoch(1))
    again = Batches(split, 4, seed=3, drop_last=drop_last, **more)
    for start in range(len(made) + 1):
        resumed = list(again.epoch(1, start=start))
        assert len(resumed) == len(made) - start
        assert all(equal(a, b) for a, b in zip(first[start:], resumed, strict=True))
    for other in (made.epoch(2), Batches(split, 4, seed=4, drop_last=drop_last, **more).epoch(1)):
        assert not all(equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_from_host_memory_are_the_same(kind: str, shuffle: bool) -> None:
    split, more = SPLITS[kind]
    resident = Batches(split, 4, seed=3, shuffle=shuffle, **more)
    streamed = Batches(split, 4, seed=3, shuffle=shuffle, resident=False, **more)
    assert resident.resident
    assert not streamed.resident
    for start in (0, 2, len(resident)):
        both = list(zip(resident.epoch(1, start), streamed.epoch(1, start), strict=True))
        assert len(both) == len(resident) - start
        assert all(equal(a, b) for a, b in both)


def test_reading_from_host_memory_can_stop_early() -> None:
    stream = Batches(rows(23), 4, resident=False).epoch(0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


@given(n=st.integers(1, 40), size=st.integers(0, 50), drop=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_once_an_epoch(n: int, size: int, drop: bool) -> None:
    made = Batches(rows(n), size, drop_last=drop)
    labels = [batch["labels"] for batch in made.epoch(4)]
    assert len(labels) == len(made) > 0
    full = min(size or n, n)
    assert all(len(some) == full for some in labels[: None if drop else -1])
    seen = torch.cat(labels).tolist()
    assert len(set(seen)) == len(seen) == (n - n % full if drop else n)
    in_order = Batches(rows(n), size, shuffle=False, drop_last=drop)
    assert torch.cat([batch["labels"] for batch in in_order.epoch(0)]).tolist() == list(range(n))
    for batch in made.epoch(4):
        assert torch.equal(batch["inputs"].flatten(1)[:, 0], (4 * batch["labels"]).to(torch.uint8))


@given(n=st.integers(2, 80), context=st.integers(1, 90), size=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_evaluation_predicts_every_token_once(n: int, context: int, size: int) -> None:
    made = Batches(text(n), size, shuffle=False, context=context)
    targets = []
    for batch in made.epoch(0):
        assert torch.equal(batch["ids"].diff(dim=1), torch.ones_like(batch["ids"][:, 1:]))
        assert batch["ids"].shape[1] == min(context, n - 1) + 1
        targets += batch["ids"][:, 1:][batch["mask"]].tolist()
    assert targets == list(range(1, n))


@given(n=st.integers(2, 80), context=st.integers(1, 20), size=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_windows_to_learn_from_do_not_overlap(n: int, context: int, size: int) -> None:
    if n <= context:
        with pytest.raises(LabError, match=rf"data\.context = {context}: the text has only {n} tokens\."):
            Batches(text(n), size, context=context)
        return
    made = Batches(text(n), size, context=context)
    offsets = set()
    for epoch in range(6):
        batches_ = list(made.epoch(epoch))
        assert len(batches_) == len(made)
        ids = torch.cat([batch["ids"] for batch in batches_])
        assert ids.shape[1] == context + 1
        targets = ids[:, 1:].flatten().sort().values
        assert torch.equal(targets.diff(), torch.ones_like(targets[1:]))
        assert n - 1 - len(targets) < 2 * context  # what is left out at the ends differs from epoch to epoch
        offsets.add(int(targets[0]))
    assert len(offsets) <= context


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40),
    batch_tokens=st.sampled_from([0, 5, 12, 30, 1000]),
    size=st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_every_pair_once_an_epoch_padded(
    lengths: list[tuple[int, int]], batch_tokens: int, size: int
) -> None:
    made = Batches(pairs(lengths), size, batch_tokens=batch_tokens)
    for epoch in range(2):
        seen = []
        found = list(made.epoch(epoch))
        assert len(found) == len(made)
        for batch in found:
            for side, name in enumerate(("source", "target")):
                longest = max(lengths[i][side] for i in batch["labels"])
                assert batch[name].shape == (len(batch["labels"]), longest)
                for i, row in zip(batch["labels"].tolist(), batch[name].tolist(), strict=True):
                    n = lengths[i][side]
                    assert row == [100 + i] * n + [7] * (longest - n)
                if batch_tokens:
                    assert batch[name].numel() <= batch_tokens or len(batch[name]) == 1
            if not batch_tokens:
                assert len(batch["labels"]) <= (size or len(lengths))
            seen += batch["labels"].tolist()
        assert sorted(seen) == list(range(len(lengths)))


def test_batches_of_similar_length_waste_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [(int(n), int(n)) for n in torch.randint(5, 60, (2000,), generator=generator)]
    made = list(Batches(pairs(lengths), 0, batch_tokens=1000).epoch(0))
    tokens = sum(int((batch["source"] != 7).sum()) for batch in made)
    assert tokens / sum(batch["source"].numel() for batch in made) > 0.95
    order = [batch["source"].shape[1] for batch in made]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_sequences_of_one_sample_stay_together() -> None:
    split = SequenceSplit({"ids": Ragged.of([[1], [2, 2], [3, 3, 3], [4], [5], [6]], group=2)}, 0)
    batch = next(Batches(split, 0, shuffle=False).epoch(0))  # the shortest comes first
    assert batch["ids"].tolist() == [
        [[5, 0, 0], [6, 0, 0]],
        [[1, 0, 0], [2, 2, 0]],
        [[3, 3, 3], [4, 0, 0]],
    ]
    assert batch["rows"].tolist() == [2, 0, 1]


def test_windows_begin_elsewhere_in_each_epoch() -> None:
    made = Batches(text(100), 0, context=8)
    assert len({int(next(made.epoch(e))["ids"].min()) for e in range(20)}) > 4


@pytest.mark.parametrize("kind", SPLITS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    split, more = SPLITS[kind]
    made = Batches(split, 4, "meta", **more)
    shapes = [{key: value.shape for key, value in batch.items()} for batch in made.epoch(1)]
    on_cpu = Batches(split, 4, **more).epoch(1)
    assert shapes == [{key: value.shape for key, value in batch.items()} for batch in on_cpu]
    if kind != "pairs":  # how long a batch of sequences is, is known on the CPU
        with HostReads() as reads:
            list(Batches(split, 4, **more).epoch(1))
        assert not reads.seen


def test_what_does_not_fit_stays_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    cuda = torch.device("cuda")
    assert batches._fits(2**29, cuda) == (
        True,
        "512.0 MiB of data, 1,024 MiB free on cuda: fits into 50% of that",
    )
    fits, why = batches._fits(2**29 + 1, cuda)
    assert not fits
    assert "does not fit" in why
    assert Batches(rows(3), 2).why == "the data is in the memory of the cpu anyway"


def test_tensors_of_one_split_are_equally_long() -> None:
    with pytest.raises(ValueError, match="equally long"):
        TensorSplit({"inputs": torch.zeros(3), "labels": torch.zeros(2)})


def test_epochs_differ_and_are_random() -> None:
    orders = [tuple(next(Batches(rows(20), 0).epoch(e))["labels"].tolist()) for e in range(5)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
