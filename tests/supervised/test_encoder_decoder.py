"""The transformer of 2017: published sizes, torch's own as reference, and steps that equal one pass."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.errors import LabError
from supervised import backbones
from supervised.backbones.encoder_decoder import (
    PRESETS,
    Transformer,
    TransformerDecoder,
    TransformerEncoder,
    sinusoids,
)
from tests.host_reads import HostReads

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "pre-norm, rotary, swiglu": {"norm_position": "pre", "positions": "rotary", "mlp": "swiglu"},
    "learned, two vocabularies": {"positions": "learned", "source_vocab_size": 20, "mlp": "gelu_tanh"},
    "deep encoder": {"n_layer": 3, "n_decoder_layer": 1},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
each_norm = pytest.mark.parametrize("norm_position", ["pre", "post"])

SOURCE = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = SOURCE != 0
TARGET = torch.tensor([[1, 11, 12, 13], [1, 14, 15, 16]])


def shaken(model: Any) -> Any:
    """Every parameter, norms and biases too, matters to the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def tiny(**options: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "width": 16, "n_layer": 2, "n_head": 4, "max_positions": 8}
    return shaken(Transformer(**{**sizes, **options}))


def counted(name: str, **options: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in backbones.build(name, **options).parameters())


def test_published_parameter_counts() -> None:
    assert counted("transformer", **PRESETS["transformer-base"]) == 63_082_496
    assert counted("transformer", **PRESETS["transformer-big"]) == 214_245_376


def test_an_encoder_alone_has_berts_blocks() -> None:
    bert = {"vocab_size": 30_522, "width": 768, "n_layer": 12, "n_head": 12, "positions": "learned"}
    blocks = counted("transformer_encoder", **bert) - (30_522 + 512) * 768
    assert blocks == 85_054_464  # the encoder in transformers' BertModel


def torchs(ours: Transformer, norm_position: str) -> nn.Transformer:
    """torch's transformer with our weights; it ends both stacks with a norm, which the published does not."""
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_position == "pre"}
    norms = [nn.LayerNorm(16) if norm_position == "pre" else None for _ in range(2)]
    reference = nn.Transformer(
        batch_first=True,
        custom_encoder=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 64, **options), 2, norms[0], enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 64, **options), 2, norms[1]),
        d_model=16,
        nhead=4,
    )
    weights: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        stack: Any = getattr(ours, side)
        for layer, block in enumerate(stack.blocks):
            attentions = {"self_attn": block.attention, "multihead_attn": block.cross}
            norms = [block.attention_norm, block.cross_norm, block.mlp_norm]
            to = f"{side}.layers.{layer}"
            for name, attention in attentions.items():
                if attention is None:
                    continue
                for leaf in ("weight", "bias"):
                    weights[f"{to}.{name}.in_proj_{leaf}"] = torch.cat(
                        [getattr(getattr(attention, qkv), leaf) for qkv in "qkv"]
                    )
                    weights[f"{to}.{name}.out_proj.{leaf}"] = getattr(attention.out, leaf)
            for number, norm in enumerate((norm for norm in norms if norm is not None), 1):
                weights |= {f"{to}.norm{number}.{leaf}": t for leaf, t in norm.state_dict().items()}
            for number, linear in enumerate((block.mlp.up, block.mlp.out), 1):
                weights |= {f"{to}.linear{number}.{leaf}": t for leaf, t in linear.state_dict().items()}
        weights |= {f"{side}.norm.{leaf}": t for leaf, t in stack.norm.state_dict().items()}
    reference.load_state_dict(weights)
    return reference.eval()


@each_norm
def test_logits_equal_torchs_transformer(norm_position: str) -> None:
    model = tiny(norm_position=norm_position)
    reference = torchs(model, norm_position)
    embedded = [
        model.tokens(ids) * 4 + sinusoids(torch.arange(ids.shape[1])[None], 16) for ids in (SOURCE, TARGET)
    ]
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.bool)
    expected = reference(
        *embedded, tgt_mask=causal, src_key_padding_mask=~MASK, memory_key_padding_mask=~MASK
    )
    logits = model(SOURCE, TARGET, MASK) @ model.tokens.weight.T
    torch.testing.assert_close(logits, expected @ model.tokens.weight.T, rtol=1e-5, atol=1e-5)


def test_sinusoids_by_hand() -> None:
    table = sinusoids(torch.arange(40)[None], 6)[0]
    for position in (0, 1, 7, 39):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@each_variant
def test_cached_steps_equal_one_pass(options: dict[str, Any]) -> None:
    model = tiny(**options)
    memory = model.encode(SOURCE, MASK)
    state = model.start(memory)
    steps = []
    for tokens in TARGET.unbind(1):
        features, state = model.step(memory, state, tokens)
        steps.append(features)
    torch.testing.assert_close(torch.stack(steps, 1), model(SOURCE, TARGET, MASK), rtol=1e-4, atol=1e-5)
    assert [keys.shape for keys, _ in state] == [(2, 4, 4, 4)] * len(model.decoder.blocks)


@each_variant
def test_padding_and_later_tokens_are_never_seen(options: dict[str, Any]) -> None:
    model, changed = tiny(**options), TARGET.clone()
    expected = model(SOURCE, TARGET, MASK)
    torch.testing.assert_close(expected, model(SOURCE.masked_fill(~MASK, 17), TARGET, MASK))
    torch.testing.assert_close(expected[1:], model(SOURCE[1:, :3], TARGET[1:]), rtol=1e-4, atol=1e-5)
    changed[:, 2] = 19
    difference = (model(SOURCE, changed, MASK) - expected).abs().amax((0, 2))
    assert difference[:2].max() < 1e-6
    assert difference[2:].min() > 1e-3


@each_variant
def test_attention_maps_say_where_each_token_looked(options: dict[str, Any]) -> None:
    model = tiny(**options)
    expected = model(SOURCE, TARGET, MASK)
    maps = model.attention_maps(SOURCE, TARGET, MASK)
    n_encoder, n_decoder = len(model.encoder.blocks), len(model.decoder.blocks)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == {
        "encoder": (n_encoder, 2, 4, 5, 5),
        "decoder": (n_decoder, 2, 4, 4, 4),
        "cross": (n_decoder, 2, 4, 4, 5),
    }
    assert not maps["encoder"][:, 1, ..., 3:].any()
    assert not maps["cross"][:, 1, ..., 3:].any()
    assert not maps["decoder"].triu(1).any()
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(model(SOURCE, TARGET, MASK), expected)  # nothing is kept from here on


def test_attention_maps_are_the_weights_of_the_values() -> None:
    model = tiny()
    taken: list[Tensor] = []
    block: Any = model.decoder.blocks[0]
    block.cross.out.register_forward_hook(lambda _, inputs, __: taken.append(inputs[0]))
    weights = model.attention_maps(SOURCE, TARGET, MASK)["cross"][0]
    values = model.encode(SOURCE, MASK).keys_values[0][1]
    torch.testing.assert_close(taken[0], (weights @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
def test_one_side_alone(causal: bool) -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "width": 16, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    model = shaken((TransformerDecoder if causal else TransformerEncoder)(**sizes))
    features, changed = model(SOURCE, MASK), SOURCE.clone()
    torch.testing.assert_close(features[1:, :3], model(SOURCE[1:, :3]), rtol=1e-4, atol=1e-5)
    changed[:, 2] = 19
    seen = (model(changed, MASK) - features).abs().amax((0, 2)) > 1e-4
    assert seen[:4].tolist() == [not causal, not causal, True, True]
    maps = model.attention_maps(SOURCE, MASK)
    assert maps.shape == (2, 2, 4, 5, 5)
    assert maps.triu(1).any().item() is not causal
    torch.testing.assert_close(model.attention_maps(SOURCE[:1])[:, 0], maps[:, 0])


@each_variant
def test_every_parameter_learns_nothing_is_read_back_and_meta_runs(options: dict[str, Any]) -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Transformer(**{"vocab_size": 20, "width": 16, "n_layer": 2, "n_head": 4, **options})
        source, target, mask = (tensor.to(device) for tensor in (SOURCE, TARGET, MASK))
        optimizer = torch.optim.AdamW(model.parameters())
        weights = torch.linspace(-1, 1, 16, device=device)  # the sum of a norm's outputs says nothing
        with HostReads() as reads:
            (model(source, target, mask) ** 3 * weights).sum().backward()
        assert not reads.seen
        optimizer.step()
        if device == "cpu":
            assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_is_for_training() -> None:
    model = tiny(dropout=0.5)
    assert torch.equal(model(SOURCE, TARGET, MASK), tiny(dropout=0.0)(SOURCE, TARGET, MASK))
    model.train()
    assert not torch.equal(model(SOURCE, TARGET, MASK), model(SOURCE, TARGET, MASK))


def test_embeddings_start_with_unit_variance_behind_their_scale() -> None:
    model = Transformer(1000, width=64, n_layer=1)
    assert (model.tokens.weight * 8).std().item() == pytest.approx(1, rel=0.05)
    block: Any = model.decoder.blocks[0]
    assert block.cross.q.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert not block.cross.q.bias.any()


@pytest.mark.parametrize("name", ["transformer", "transformer_encoder", "transformer_decoder"])
def test_spec_rebuilds_it(name: str) -> None:
    first = backbones.build(name, vocab_size=20, width=16, n_layer=1, n_head=2, dropout=0.0)
    second = backbones.build(name, **first.spec)
    second.load_state_dict(first.state_dict())
    inputs = (SOURCE, TARGET, MASK) if name == "transformer" else (SOURCE, MASK)
    assert first(*inputs).shape[-1] == first.num_features
    assert torch.equal(first(*inputs), second(*inputs))
    assert isinstance(first, backbones.Backbone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 30}, "width 30 must be divisible by n_head 8"),
        ({"width": 24, "positions": "rotary"}, "heads of even width"),
        ({"width": 9, "n_head": 1}, "sinusoidal positions need an even width"),
        ({"positions": "alibi"}, "positions 'alibi' is none of"),
        ({"norm_position": "mid"}, "norm_position 'mid' is none of"),
        ({"mlp": "elu"}, "mlp 'elu' is none of"),
        ({"n_layer": 0}, "at least one layer"),
        ({"vocab_size": 0}, "at least 1 token"),
        ({"mlp_width": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"n_heads": 2}, "Did you mean 'n_head'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        backbones.build("transformer", **{"vocab_size": 20, **options})


def test_bad_input_says_what_is_wrong() -> None:
    model = tiny(positions="learned")
    with pytest.raises(ValueError, match="9 tokens are more than max_positions 8"):
        model(SOURCE, torch.ones(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="target ids must lie between 0 and 19"):
        model(SOURCE, TARGET + 10)
