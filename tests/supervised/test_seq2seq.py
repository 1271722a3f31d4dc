"""LSTM translators: attention by hand, padding that is never seen, and steps that equal one pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lab.errors import LabError
from supervised import backbones
from supervised.backbones.seq2seq import Memory, Seq2Seq
from tests.host_reads import HostReads

VARIANTS: dict[str, dict[str, Any]] = {
    "general": {},
    "dot, two layers": {"score": "dot", "n_layer": 2},
    "additive, one way": {"score": "additive", "bidirectional": False},
    "fed, two vocabularies": {"input_feeding": True, "n_layer": 2, "source_vocab_size": 20},
    "additive, fed": {"score": "additive", "input_feeding": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)

SOURCE = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = SOURCE != 0
TARGET = torch.tensor([[1, 11, 12, 13], [1, 14, 15, 16]])


def tiny(**options: Any) -> Seq2Seq:
    """A small model whose every parameter matters to the output."""
    torch.manual_seed(0)
    model = Seq2Seq(**{"vocab_size": 20, "width": 8, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@each_variant
def test_steps_equal_one_pass(options: dict[str, Any]) -> None:
    model = tiny(**options)
    memory = model.encode(SOURCE, MASK)
    state = model.start(memory)
    steps = []
    for tokens in TARGET.unbind(1):
        features, state = model.step(memory, state, tokens)
        steps.append(features)
    torch.testing.assert_close(torch.stack(steps, 1), model(SOURCE, TARGET, MASK))


@each_variant
def test_padding_is_never_seen(options: dict[str, Any]) -> None:
    model = tiny(**options)
    batched = model(SOURCE, TARGET, MASK)
    assert torch.equal(batched, model(SOURCE.masked_fill(~MASK, 17), TARGET, MASK))
    torch.testing.assert_close(batched[1:], model(SOURCE[1:, :3], TARGET[1:]))
    weights = model.attention_maps(SOURCE, TARGET, MASK)["cross"]
    assert weights.shape == (1, 2, 1, 4, 5)
    assert not weights[0, 1, 0, :, 3:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 1, 4))


@each_variant
def test_a_target_token_sees_none_behind_it(options: dict[str, Any]) -> None:
    model, changed = tiny(**options), TARGET.clone()
    changed[:, 2] = 19
    before, after = model(SOURCE, TARGET, MASK), model(SOURCE, changed, MASK)
    assert torch.equal(before[:, :2], after[:, :2])
    assert ((before - after)[:, 2:].abs().amax((0, 2)) > 1e-4).all()


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_scores_by_hand(score: str) -> None:
    alignment = tiny(score=score).alignment
    query, values = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    memory = Memory(values, alignment.keys(values), MASK, query[:, :1], query[:, :1])
    weights = alignment(query, memory)
    parameters = {name: parameter.detach() for name, parameter in alignment.named_parameters()}

    def by_hand(q: Tensor, m: Tensor) -> Tensor:
        if score == "dot":
            return (q * m).sum()
        mapped = parameters["keys.weight"] @ m
        if score == "general":
            return (q * mapped).sum()
        asked = parameters["query.weight"] @ q + parameters["query.bias"]
        return (parameters["v.weight"][0] * torch.tanh(asked + mapped)).sum()

    for row, length in ((0, 5), (1, 3)):
        for time in range(4):
            scores = torch.stack([by_hand(query[row, time], values[row, at]) for at in range(length)])
            torch.testing.assert_close(weights[row, time, :length], scores.softmax(0))


def test_features_by_hand() -> None:
    """Equation 5 of arXiv 1508.04025: tanh(W [context; output])."""
    model = tiny()
    memory = model.encode(SOURCE, MASK)
    outputs, _ = model.decoder.outputs(model.tokens(TARGET), (memory.hidden, memory.cell))
    weights = model.attention_maps(SOURCE, TARGET, MASK)["cross"][0, :, 0]
    context = torch.einsum("bts,bsw->btw", weights, memory.values)
    by_hand = torch.tanh(torch.cat((context, outputs), -1) @ model.combine.weight.T)
    torch.testing.assert_close(model(SOURCE, TARGET, MASK), by_hand)


def test_the_decoder_starts_where_both_directions_ended() -> None:
    model = tiny(n_layer=2)
    memory = model.encode(SOURCE, MASK)
    torch.testing.assert_close(memory.hidden[1, 1, :4], memory.values[1, 2, :4])  # forward, at the last token
    torch.testing.assert_close(memory.hidden[1, 1, 4:], memory.values[1, 0, 4:])  # in reverse, at the first


def test_fed_features_matter() -> None:
    model = tiny(input_feeding=True)
    memory = model.encode(SOURCE)
    state = model.start(memory)
    expected, _ = model.step(memory, state, TARGET[:, 0])
    changed, _ = model.step(memory, state._replace(fed=state.fed + 1), TARGET[:, 0])
    assert not torch.allclose(expected, changed, atol=1e-3)


@each_variant
def test_every_parameter_learns_nothing_is_read_back_and_meta_runs(options: dict[str, Any]) -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Seq2Seq(20, width=8, dropout=0.1, **{k: v for k, v in options.items() if k != "width"})
        source, target, mask = (tensor.to(device) for tensor in (SOURCE, TARGET, MASK))
        optimizer = torch.optim.AdamW(model.parameters())
        with HostReads() as reads:
            model(source, target, mask).square().sum().backward()
        assert not reads.seen
        optimizer.step()
        if device == "cpu":
            assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_variant
def test_spec_rebuilds_it(options: dict[str, Any]) -> None:
    first = backbones.build("seq2seq", vocab_size=20, width=8, **options)
    second = backbones.build("seq2seq", **first.spec)
    second.load_state_dict(first.state_dict())
    features = first(SOURCE, TARGET, MASK)
    assert features.shape == (2, 4, first.num_features)
    assert torch.equal(features, second(SOURCE, TARGET, MASK))
    assert isinstance(first, backbones.Backbone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "concat"}, "score 'concat' is none of"),
        ({"width": 7}, "width 7 must be even"),
        ({"n_layer": 0}, "at least 1"),
        ({"source_vocab_size": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"input_feed": True}, "Did you mean 'input_feeding'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        backbones.build("seq2seq", **{"vocab_size": 20, "width": 8, **options})


def test_unknown_tokens_say_which_side() -> None:
    model = tiny(source_vocab_size=12)
    with pytest.raises(ValueError, match="source ids must lie between 0 and 11"):
        model(SOURCE + 2, TARGET)
    with pytest.raises(ValueError, match="target ids must lie between 0 and 19"):
        model(SOURCE, TARGET + 5)
