"""Recurrent backbones: equal to torch's own layers, and rows that end anywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lab.errors import LabError
from supervised import backbones
from supervised.backbones.recurrent import GRU, LSTM, RNN, LSTMCell, State
from tests.host_reads import HostReads

TORCHS: dict[type[RNN], Any] = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}
LENGTHS = torch.tensor([7, 1, 4])

each_kind = pytest.mark.parametrize("kind", TORCHS, ids=lambda kind: kind.__name__)


def pair(kind: type[RNN], **options: Any) -> tuple[RNN, Any]:
    """Ours and torch's with the same weights: two layers, both ways."""
    torch.manual_seed(0)
    ours = kind(5, 6, **{"n_layer": 2, "bidirectional": True, **options})
    theirs = TORCHS[kind](
        5, 6, num_layers=ours.n_layer, bidirectional=ours.n_direction == 2, batch_first=True
    )
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    return ours, theirs


def rows(time: int = 7) -> Tensor:
    return torch.randn(3, time, 5, generator=torch.Generator().manual_seed(1))


def some_state(net: RNN) -> State:
    return tuple(torch.randn_like(tensor) for tensor in net.initial_state(3, rows()))


def batch_second(state: State) -> Any:
    """A state as torch's layers keep it."""
    tensors = [tensor.transpose(0, 1).contiguous() for tensor in state]
    return tuple(tensors) if len(tensors) > 1 else tensors[0]


def batch_first(state: Any) -> State:
    return tuple(tensor.transpose(0, 1) for tensor in (state if isinstance(state, tuple) else (state,)))


def with_gradients(net: nn.Module, output: Tensor, state: State) -> list[Tensor]:
    """Outputs, states and the gradients of all weights for a sum in which each number counts differently."""
    net.zero_grad()
    total = sum(
        (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum()
        for tensor in (output, *state)
    )
    assert isinstance(total, Tensor)
    total.backward()
    return [output, *state, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_an_lstm_cell_by_hand() -> None:
    cell = LSTMCell(1, 1)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor([[0.5], [-1.0], [2.0], [0.25]]))  # input, forget, cell, output
        cell.weight_hh.copy_(torch.tensor([[1.0], [0.5], [-0.5], [2.0]]))
        cell.bias_ih.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        cell.bias_hh.zero_()
    h, c = cell(torch.tensor([[2.0]]), (torch.tensor([[0.5]]), torch.tensor([[-1.0]])))
    i, f, g, o = sigmoid(1.6), sigmoid(-1.55), math.tanh(4.05), sigmoid(1.9)
    assert c.item() == pytest.approx(f * -1 + i * g)
    assert h.item() == pytest.approx(o * math.tanh(f * -1 + i * g))


@each_kind
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
def test_equal_to_torchs_from_the_same_weights(kind: type[RNN], given: bool) -> None:
    ours, theirs = pair(kind)
    state = some_state(ours) if given else None
    output, after = ours.outputs(rows(), state)
    expected, hidden = theirs(rows(), batch_second(state) if state else None)
    assert_close(with_gradients(ours, output, after), with_gradients(theirs, expected, batch_first(hidden)))


@each_kind
def test_steps_by_the_definition_equal_torchs_kernel(kind: type[RNN]) -> None:
    ours, _ = pair(kind, bidirectional=False)
    state = before = some_state(ours)
    steps = []
    for x in rows().unbind(1):
        output, state = ours.step(x, state)
        steps.append(output)
    by_definition = with_gradients(ours, torch.stack(steps, 1), state)
    assert_close(with_gradients(ours, *ours.outputs(rows(), before)), by_definition)


@each_kind
def test_rows_of_any_length_equal_torchs_packed_ones(kind: type[RNN]) -> None:
    ours, theirs = pair(kind)
    state = some_state(ours)
    output, after = ours.outputs(rows(), state, LENGTHS)
    packed = pack_padded_sequence(rows(), LENGTHS, batch_first=True, enforce_sorted=False)
    expected, hidden = theirs(packed, batch_second(state))
    expected = pad_packed_sequence(expected, batch_first=True)[0]
    assert_close(with_gradients(ours, output, after), with_gradients(theirs, expected, batch_first(hidden)))


@each_kind
def test_what_stands_behind_a_row_is_never_read(kind: type[RNN]) -> None:
    net, _ = pair(kind)
    x = rows().requires_grad_()
    behind = (torch.arange(7) >= LENGTHS[:, None])[..., None]
    features = net(x, lengths=LENGTHS)
    assert torch.equal(features, net(torch.where(behind, 100.0, x), lengths=LENGTHS))
    (gradient,) = torch.autograd.grad(features.square().sum(), x)
    assert torch.equal((gradient != 0).any(-1), ~behind[..., 0])


@each_kind
def test_a_state_carried_over_equals_one_pass(kind: type[RNN]) -> None:
    net, _ = pair(kind, bidirectional=False)
    whole, end = net.outputs(rows())
    first, state = net.outputs(rows()[:, :3])
    second, after = net.outputs(rows()[:, 3:], state)
    assert_close([torch.cat((first, second), 1), *after], [whole, *end])
    torch.testing.assert_close(net(rows()[:, 3:], state), whole[:, -1])


@each_kind
def test_features_are_what_both_directions_end_with(kind: type[RNN]) -> None:
    net, _ = pair(kind)
    output, _ = net.outputs(rows(), lengths=LENGTHS)
    forwards = output[torch.arange(3), LENGTHS - 1, :6]
    torch.testing.assert_close(net(rows(), lengths=LENGTHS), torch.cat((forwards, output[:, 0, 6:]), 1))


def test_dropout_is_between_layers_and_for_training() -> None:
    plain, _ = pair(LSTM)
    net, _ = pair(LSTM, dropout=0.5)
    assert torch.equal(net.eval()(rows()), plain(rows()))
    assert not torch.equal(net.train()(rows()), net(rows()))
    single, _ = pair(LSTM, n_layer=1, dropout=0.5)
    assert torch.equal(single.train()(rows()), single(rows()))


def test_parameters_and_start_are_torchs() -> None:
    body = backbones.build("lstm", in_features=3136, hidden=512)
    assert sum(parameter.numel() for parameter in body.parameters()) == 7_475_200  # 4 (3136 + 512 + 2) 512
    for parameter in body.parameters():
        assert parameter.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_spec_rebuilds_it(name: str) -> None:
    first = backbones.build(name, in_features=5, hidden=4, n_layer=2, bidirectional=True)
    second = backbones.build(name, **first.spec)
    second.load_state_dict(first.state_dict())
    features = first(rows())
    assert features.shape == (3, first.num_features)
    assert torch.equal(features, second(rows()))
    assert isinstance(first, backbones.Backbone)


@each_kind
def test_a_training_step_reads_nothing_back_and_runs_on_meta(kind: type[RNN]) -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = kind(5, 6, 2, bidirectional=True, dropout=0.1)
            x, lengths = torch.zeros(3, 7, 5), torch.ones(3, dtype=torch.int64)
        optimizer = torch.optim.AdamW(net.parameters())
        with HostReads() as reads:
            net(x, lengths=lengths).sum().backward()
        assert not reads.seen
        optimizer.step()


def test_bf16_autocast_computes_nearly_the_same() -> None:
    net, _ = pair(LSTM)
    exact = net(rows(), lengths=LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(rows(), lengths=LENGTHS)
    assert F.cosine_similarity(rough.float(), exact).min() > 0.99


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 0}, "at least 1"),
        ({"n_layer": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"bidirectonal": True}, "Did you mean 'bidirectional'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        backbones.build("lstm", in_features=5, **options)


def test_both_ways_cannot_go_step_by_step() -> None:
    net, _ = pair(LSTM)
    with pytest.raises(ValueError, match="bidirectional"):
        net.step(rows()[:, 0], net.initial_state(3, rows()))
