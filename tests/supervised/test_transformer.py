"""The decoder-only transformer: published sizes, formulas by hand, and torch's own layers as reference."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised import backbones
from supervised.backbones.ragged import Ragged
from supervised.backbones.transformer import (
    GPT2_OPTIONS,
    INIT_STD,
    PRESETS,
    FeedForward,
    LabGPT,
    repeat_heads,
    rotary,
    rotate,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, grouped": {"n_kv_head": 2},
    "gpt2": {**GPT2_OPTIONS, "vocab_size": 50, "max_positions": 16},
    "gpt1": {**GPT2_OPTIONS, "vocab_size": 50, "max_positions": 16, "norm_position": "post"},
    "bloom": {
        **GPT2_OPTIONS,
        "vocab_size": 50,
        "max_positions": 16,
        "positions": "alibi",
        "embedding_norm": True,
    },
    "post-norm, rotary": {"norm_position": "post", "norm": "layer", "bias": True},
}
GPT1 = {**PRESETS["gpt2"], "vocab_size": 40_478, "max_positions": 512, "norm_position": "post"}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def tiny(**options: Any) -> LabGPT:
    """A small model whose every parameter, norms and biases too, matters to the output."""
    torch.manual_seed(0)
    model = LabGPT(**{"vocab_size": 50, "width": 32, "n_layer": 2, "max_positions": 16, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def some_ids(batch: int = 2, time: int = 7) -> Tensor:
    return torch.randint(0, 50, (batch, time), generator=torch.Generator().manual_seed(1))


class DictCache:
    """The least a cache can be."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        if layer_idx in self.seen:
            before = self.seen[layer_idx]
            keys, values = torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)
        self.seen[layer_idx] = keys, values
        return keys, values


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How torch's attention is called, from here on."""
    calls: list[dict[str, Any]] = []
    original = F.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return calls


@pytest.mark.parametrize(
    ("options", "published"),
    [
        (PRESETS["gpt2"], 124_439_808),
        (PRESETS["gpt2-medium"], 354_823_168),
        (PRESETS["gpt2-large"], 774_030_080),
        (PRESETS["gpt2-xl"], 1_557_611_200),
        (
            {**PRESETS["gpt2"], "vocab_size": 40_478, "max_positions": 512, "norm_position": "post"},
            116_534_784,
        ),
        ({**PRESETS["gpt2"], "max_positions": 2048}, 125_226_240),
        (
            {**GPT2_OPTIONS, "max_positions": 2048, "n_layer": 96, "width": 12_288, "n_head": 96},
            174_604_259_328,
        ),
    ],
    ids=["gpt2", "medium", "large", "xl", "gpt1", "gpt3-125M", "gpt3-175B"],
)
def test_published_parameter_counts(options: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        model = LabGPT(**options)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_presets_by_name() -> None:
    with torch.device("meta"):
        model = LabGPT.preset("gpt2-medium", n_layer=1, dropout=0.1)
    assert (model.num_features, len(model.blocks), model.dropout.p) == (1024, 1, 0.1)
    with pytest.raises(ValueError, match="'gpt3' is none of"):
        LabGPT.preset("gpt3")


@each_variant
def test_registry_builds_it_and_spec_rebuilds_it(options: dict[str, Any]) -> None:
    spec = {"vocab_size": 50, "width": 32, "n_layer": 2, **options}
    first = backbones.build("gpt", **spec)
    second = backbones.build("gpt", **first.spec)
    second.load_state_dict(first.state_dict())
    features = first(some_ids())
    assert features.shape == (2, 7, first.num_features)
    assert torch.equal(features, second(some_ids()))
    assert isinstance(first, backbones.Backbone)


def test_rotary_by_hand() -> None:
    head_dim, theta = 8, 100.0
    position_ids = torch.tensor([[0, 1, 5, 900], [3, 2, 1, 0]])
    x = torch.randn(2, 4, 3, head_dim)
    turned = rotate(x, rotary(position_ids, head_dim, theta, torch.float32))
    for batch, time, head in ((0, 0, 0), (0, 2, 1), (0, 3, 2), (1, 0, 0), (1, 2, 2)):
        for i in range(head_dim // 2):
            angle = position_ids[batch, time].item() * theta ** (-2 * i / head_dim)
            a, b = x[batch, time, head, i].item(), x[batch, time, head, i + head_dim // 2].item()
            real = turned[batch, time, head, i].item(), turned[batch, time, head, i + head_dim // 2].item()
            by_hand = complex(a, b) * complex(math.cos(angle), math.sin(angle))
            assert real == pytest.approx((by_hand.real, by_hand.imag), abs=2e-4)


def test_rotary_sees_distances_and_learned_positions_see_places() -> None:
    ids, shifted = some_ids(), torch.arange(7)[None] + 5
    model = tiny()
    torch.testing.assert_close(model(ids), model(ids, position_ids=shifted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids), model(ids, position_ids=shifted * 2), atol=1e-2)
    model = tiny(**VARIANTS["gpt2"])
    assert not torch.allclose(model(ids), model(ids, position_ids=shifted), atol=1e-2)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_block_is_torchs_encoder_layer_with_a_causal_mask(norm_position: str) -> None:
    model = tiny(**{**VARIANTS["gpt2"], "n_layer": 1, "norm_position": norm_position})
    block: Any = model.blocks[0]
    reference = nn.TransformerEncoderLayer(
        d_model=32,
        nhead=4,
        dim_feedforward=128,
        dropout=0.0,
        activation=functools.partial(F.gelu, approximate="tanh"),
        batch_first=True,
        norm_first=norm_position == "pre",
    ).eval()
    qkv = [getattr(block.attention, name) for name in "qkv"]
    weights = {
        "self_attn.in_proj_weight": torch.cat([layer.weight for layer in qkv]),
        "self_attn.in_proj_bias": torch.cat([layer.bias for layer in qkv]),
    }
    for theirs, ours in {
        "self_attn.out_proj": block.attention.out,
        "linear1": block.mlp.up,
        "linear2": block.mlp.out,
        "norm1": block.attention_norm,
        "norm2": block.mlp_norm,
    }.items():
        weights |= {f"{theirs}.{leaf}": tensor for leaf, tensor in ours.state_dict().items()}
    reference.load_state_dict(weights)
    ids = some_ids()
    positions = model.positions
    assert positions is not None
    x = model.tokens(ids) + positions(torch.arange(7))
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    expected = reference(x, src_mask=causal)
    if norm_position == "pre":
        expected = model.norm(expected)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_post_norm_ends_with_the_last_blocks_norm() -> None:
    model = LabGPT(50, 32, 1, norm_position="post")
    torch.testing.assert_close(model(some_ids()).square().mean(-1), torch.ones(2, 7), rtol=1e-2, atol=0)
    assert not list(model.norm.parameters())


def test_grouped_queries_are_shared_keys_and_values() -> None:
    grouped, full = tiny(n_kv_head=2), tiny()
    weights = dict(grouped.state_dict())
    for name in [name for name in weights if name.endswith(("attention.k.weight", "attention.v.weight"))]:
        heads = weights[name].view(2, 8, 32)  # kv heads, head_dim, width
        weights[name] = heads.repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(weights)
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(grouped(some_ids()), full(some_ids()))
    torch.testing.assert_close(grouped(some_ids(), attention_mask=causal), full(some_ids()))


def test_repeated_heads_are_what_grouped_attention_shares() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, repeat_heads(k, 3), repeat_heads(v, 3)),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


@each_variant
def test_a_token_sees_itself_and_what_is_before_it(options: dict[str, Any]) -> None:
    model, ids = tiny(**options), some_ids()
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after)[:, 3:].abs().amax((0, 2)) > 1e-3).all()


def test_without_a_mask_attention_is_told_that_it_is_causal(sdpa_calls: list[dict[str, Any]]) -> None:
    tiny()(some_ids())
    assert [(call["is_causal"], call["attn_mask"]) for call in sdpa_calls] == [(True, None)] * 2


@each_variant
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_is_boolean_or_added(options: dict[str, Any], additive: bool) -> None:
    model, ids = tiny(**options), some_ids()
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    mask[..., 0] = False  # nobody sees the first token but itself
    mask[..., 0, 0] = True
    given = torch.zeros(1, 1, 7, 7).masked_fill(~mask, -math.inf) if additive else mask
    masked = model(ids, attention_mask=given)
    unseen = model(ids[:, 1:], position_ids=torch.arange(1, 7)[None])
    torch.testing.assert_close(masked[:, 1:], unseen, rtol=1e-4, atol=1e-5)


@each_variant
def test_cached_steps_equal_one_pass(options: dict[str, Any]) -> None:
    model, ids = tiny(**options), some_ids()
    whole = model(ids)
    cache = DictCache()
    parts = [model(ids[:, :3], position_ids=torch.arange(3)[None], past_key_values=cache)]
    lower_right = torch.ones(1, 1, 2, 5, dtype=torch.bool).tril(3)
    parts.append(
        model(
            ids[:, 3:5],
            position_ids=torch.tensor([[3, 4]]),
            attention_mask=lower_right,
            past_key_values=cache,
        )
    )
    for time in (5, 6):
        position_ids = torch.tensor([[time]])
        parts.append(model(ids[:, time, None], position_ids=position_ids, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def packed(ids: Tensor, lengths: list[int]) -> Tensor:
    """The first tokens of each row, one row's behind the other's: (1, tokens)."""
    return torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]


@each_variant
@pytest.mark.parametrize("wanted", [None, [2, 1, 3]])
@pytest.mark.parametrize("lead", [False, True])
def test_documents_in_one_row_are_each_as_if_alone(
    options: dict[str, Any], wanted: list[int] | None, lead: bool
) -> None:
    model, lengths = tiny(**options).double(), [4, 1, 6]
    ids, beginning = some_ids(3), some_ids(1)[:, : 3 if lead else 0]
    documents = Ragged(lengths, lead=beginning.shape[1])
    row = torch.cat((beginning, packed(ids, lengths)), 1)
    together = model(row, documents=documents, wanted=documents.tails(wanted) if wanted else None)[0]
    if lead and not wanted:
        torch.testing.assert_close(together[:3], model(beginning)[0], rtol=1e-9, atol=1e-9)
        together = together[3:]
    alone = []
    for own, n, k in zip(ids, lengths, wanted or lengths, strict=True):
        alone.append(model(torch.cat((beginning[0], own[:n]))[None])[0, -k:])
    results = []
    for features in (torch.cat(alone), together):
        model.zero_grad()
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        results.append([features, *(p.grad for p in model.parameters() if p.grad is not None)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_variant
def test_the_last_block_computes_but_keys_and_values_of_other_tokens(options: dict[str, Any]) -> None:
    model, documents = tiny(**options), Ragged([4, 7])
    rows: dict[str, list[int]] = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, x, __, name=name: rows.update({name: x[0].shape[1]}))
    model(packed(some_ids(), [4, 7]), documents=documents, wanted=documents.tails([1, 2]))
    assert {name for name, n in rows.items() if n == 11} >= {"0.attention.q", "0.mlp.out", "1.attention.k"}
    assert {name for name, n in rows.items() if n == 3 and name.startswith("1.")} == {
        name for name in rows if name.startswith("1.") and name not in ("1.attention.k", "1.attention.v")
    }


def test_documents_that_do_not_fit_the_input_are_refused() -> None:
    model, documents = tiny(), Ragged([3, 4])
    with pytest.raises(ValueError, match="documents of 7 tokens need"):
        model(some_ids(), documents=documents)
    with pytest.raises(ValueError, match="no mask, cache or position_ids"):
        model(some_ids(1), documents=documents, past_key_values=DictCache())
    with pytest.raises(ValueError, match="wanted needs documents"):
        model(some_ids(), wanted=documents.tails([1, 1]))


@each_variant
def test_attention_maps_are_the_weights_of_the_values(options: dict[str, Any]) -> None:
    model, ids = tiny(**options), some_ids()
    block: Any = model.blocks[0]
    taken: list[Tensor] = []
    block.attention.v.register_forward_hook(lambda _, __, out: taken.append(out))
    block.attention.out.register_forward_hook(lambda _, inputs, __: taken.append(inputs[0]))
    maps = model.attention_maps(ids)
    assert maps.shape == (2, 2, 4, 7, 7)
    values = taken[0].view(2, 7, -1, 8).transpose(1, 2)
    values = repeat_heads(values, 4 // values.shape[1])
    torch.testing.assert_close((maps[0] @ values).transpose(1, 2).flatten(2), taken[1])
    assert block.attention.kept is None


@pytest.mark.parametrize(("mlp", "by_hand"), [("relu", F.relu), ("gelu", F.gelu)])
def test_other_nonlinearities(mlp: str, by_hand: Any) -> None:
    net = FeedForward(mlp, 8, 16, True, 0.02)
    x = torch.randn(3, 8)
    assert torch.equal(net(x), net.out(by_hand(net.up(x))))


def test_embeddings_in_place_of_ids() -> None:
    model, ids = tiny(), some_ids()
    assert torch.equal(model(ids), model(inputs_embeds=model.tokens(ids)))


@each_variant
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = tiny(**options)
    model(some_ids()).square().sum().backward()
    unmoved = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert unmoved == []


@each_variant
def test_a_training_step_runs_on_the_meta_device(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = LabGPT(**{"vocab_size": 50, "width": 32, "n_layer": 2, "dropout": 0.1, **options})
        ids, mask = torch.zeros(2, 7, dtype=torch.int64), torch.ones(2, 1, 7, 7, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters())
    for attention_mask in (None, mask):  # a tensor left on the CPU, or a number read back, raises here
        model(ids, attention_mask=attention_mask).sum().backward()
        optimizer.step()


def test_dropout_is_for_training_and_in_every_place(sdpa_calls: list[dict[str, Any]]) -> None:
    model, ids = tiny(dropout=0.5), some_ids()
    assert torch.equal(model(ids), tiny()(ids))
    assert [call["dropout_p"] for call in sdpa_calls] == [0.0] * 4
    sdpa_calls.clear()
    zeros: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, out: zeros.append((out == 0).float().mean().item()))
    assert not torch.equal(model.train()(ids), model(ids))
    assert [call["dropout_p"] for call in sdpa_calls] == [0.5] * 4
    assert zeros == [pytest.approx(0.5, abs=0.15)] * 10  # embeddings, attention twice, MLP twice; two passes


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    model = LabGPT(200, 128, n_layer=8, **{k: v for k, v in GPT2_OPTIONS.items() if k != "vocab_size"})
    residual = INIT_STD / math.sqrt(16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if name.endswith("out.weight") else INIT_STD
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 30, "n_head": 4}, "width 30 must be divisible by n_head 4"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head 4 must be divisible by n_kv_head 3"),
        ({"width": 12, "n_head": 4}, "heads of even width"),
        ({"positions": "sinusoidal"}, "positions 'sinusoidal' is none of"),
        ({"norm_position": "mid"}, "norm_position 'mid' is none of"),
        ({"norm": "batch"}, "norm 'batch' is none of"),
        ({"mlp": "elu"}, "mlp 'elu' is none of"),
        ({"n_layer": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"n_heads": 2}, "Did you mean 'n_head'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said) as raised:
        backbones.build("gpt", vocab_size=50, **options)
    assert "\n" not in str(raised.value)


def test_bad_input_says_what_is_wrong() -> None:
    model, ids = tiny(**VARIANTS["gpt2"]), some_ids()
    with pytest.raises(ValueError, match="either ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either ids or inputs_embeds"):
        model(ids, inputs_embeds=model.tokens(ids))
    with pytest.raises(ValueError, match=r"must be \(batch, 1, time, keys\), not \(2, 7\)"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="give position_ids"):
        model(ids, past_key_values=DictCache())
    with pytest.raises(ValueError, match="17 tokens are more than max_positions 16"):
        model(some_ids(1, 17))
    with pytest.raises(ValueError, match="position ids must lie between 0 and 15"):
        model(ids, position_ids=torch.arange(10, 17)[None])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 49"):
        model(ids + 50)
    cache = DictCache()
    model(ids, position_ids=torch.arange(7)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="need an attention_mask"):
        model(ids, position_ids=torch.arange(7, 14)[None], past_key_values=cache)
