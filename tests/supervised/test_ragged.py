"""Rows of different lengths, flat and as a rectangle."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from supervised.backbones.ragged import Ragged
from tests.host_reads import HostReads

rows_and_tails = st.lists(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6
)


@given(rows_and_tails)
def test_entries_are_found_again_where_they_lie(both: list[tuple[int, int]]) -> None:
    lengths, wanted = map(list, zip(*both, strict=True))
    flat = torch.arange(1.0, sum(lengths) + 1)[:, None] * torch.tensor([1.0, -1.0])
    parts = flat.split(lengths)
    rows = Ragged(lengths)
    rectangle = rows.pad(flat)
    assert torch.equal(rectangle, torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True))
    assert torch.equal(rows.unpad(rectangle), flat)
    assert torch.equal(rows.mask, rectangle[..., 0] != 0)
    assert rows.columns.tolist() == [i for n in lengths for i in range(n)]
    tails = rows.tails(wanted)
    assert torch.equal(
        tails.take(flat[None])[0], torch.cat([p[-k:] for p, k in zip(parts, wanted, strict=True)])
    )
    places = [list(range(n - k, n)) for n, k in both]
    assert [row[: len(place)] for row, place in zip(tails.columns.tolist(), places, strict=True)] == places


def test_gradients_go_where_the_entries_lie() -> None:
    rows = Ragged([2, 3])
    flat = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rows.pad, flat)
    assert torch.autograd.gradcheck(rows.unpad, torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(rows.tails([1, 2]).take, flat[None].detach().requires_grad_())


def test_nothing_waits_for_the_device() -> None:
    with HostReads() as reads:
        rows = Ragged([2, 3], "cpu")
        flat = torch.randn(5, 2, requires_grad=True)
        (rows.unpad(rows.pad(flat)) * rows.tails([1, 3]).rows.mask.sum()).sum().backward()
    assert not reads.seen
