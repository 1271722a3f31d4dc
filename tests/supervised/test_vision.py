"""Vision backbones: published parameter counts, any fitting image, learning, and parts computed by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised import backbones
from supervised.backbones.convnext import Block as ConvNeXtBlock
from supervised.backbones.layers import FrozenBatchNorm2d, MaxPoolSame, StochasticDepth, make_norm
from supervised.backbones.plain import QuickTanh, Tanh, alexnet_lrn
from supervised.classifier import Classifier
from tests.host_reads import HostReads


def classifier(name: str, num_classes: int = 1000, **options: Any) -> Classifier:
    return Classifier(backbones.build(name, **options), num_classes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


GRAY = {"in_chans": 1, "num_classes": 10}
PUBLISHED = [
    ("mlp", {"num_classes": 10, "in_features": 784, "hidden": (16, 16)}, 13_002),
    ("lenet1", {**GRAY, "img_size": 28}, 3_246),
    ("lenet4", {**GRAY, "img_size": 28}, 51_050),
    ("lenet5", {**GRAY, "img_size": 28}, 61_706),
    ("alexnet", {}, 61_100_840),
    ("vgg11", {}, 132_863_336),
    ("vgg13", {}, 133_047_848),
    ("vgg16", {}, 138_357_544),
    ("vgg16_bn", {}, 138_365_992),
    ("vgg19", {}, 143_667_240),
    ("googlenet", {}, 6_998_552),
    ("googlenet", {"aux": True}, 13_378_280),
    ("googlenet_bn", {}, 6_624_904),
    ("googlenet_bn", {"aux": True}, 13_004_888),
    ("inception_bn", {}, 11_285_224),
    ("inception_v3", {}, 23_834_568),
    ("inception_v3", {"aux": True}, 27_161_264),
    ("resnet18", {}, 11_689_512),
    ("resnet34", {}, 21_797_672),
    ("resnet50", {}, 25_557_032),
    ("resnet101", {}, 44_549_160),
    ("resnet152", {}, 60_192_808),
    ("resnet8", GRAY, 77_754),
    ("resnet20", {"num_classes": 10}, 269_722),  # the paper's table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M
    ("resnet32", {"num_classes": 10}, 464_154),
    ("resnet44", {"num_classes": 10}, 658_586),
    ("resnet56", {"num_classes": 10}, 853_018),
    ("resnet110", {"num_classes": 10}, 1_727_962),
    ("convnext_tiny", {}, 28_589_128),
    ("convnext_small", {}, 50_223_688),
    ("convnext_base", {}, 88_591_464),
    ("convnext_large", {}, 197_767_336),
    ("convnext_xlarge", {}, 350_196_968),
    ("vit_tiny", {}, 5_717_416),
    ("vit_small", {}, 22_050_664),
    ("vit_base", {}, 86_567_656),
    ("vit_large", {}, 304_326_632),
]


@pytest.mark.parametrize(("name", "options", "parameters"), PUBLISHED)
def test_parameters_are_those_published(name: str, options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert count(classifier(name, **options)) == parameters


ANY_SIZE = [
    *("lenet1", "lenet4", "lenet5", "vgg11", "vgg16_bn", "googlenet", "googlenet_bn", "inception_bn"),
    *("resnet8", "resnet20", "resnet18", "resnet50"),
]
SMALLEST = [
    ("alexnet", {}, 63),
    ("alexnet", {"stride": 1}, 21),
    ("inception_v3", {}, 75),
    ("inception_v3", {"aux": True}, 299),
    ("convnext_tiny", {}, 32),
    ("convnext_tiny", {"patch_size": 1}, 8),
]


def features_on_meta(name: str, in_chans: int, size: Any, **options: Any) -> None:
    with torch.device("meta"):
        body = backbones.build(name, in_chans=in_chans, img_size=size, **options)
        height, width = (size, size) if isinstance(size, int) else size
        features = body(torch.empty(2, in_chans, height, width))
        assert features.shape == (2, body.num_features)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_any_image_is_large_enough(name: str) -> None:
    for in_chans, size in ((1, 28), (3, 32), (4, 84), (3, 224), (3, (31, 57)), (1, 1)):
        features_on_meta(name, in_chans, size)


@pytest.mark.parametrize(("name", "options", "least"), SMALLEST)
def test_the_smallest_image_works_and_a_smaller_one_is_told_so(name: str, options: Any, least: int) -> None:
    for size in (least, (least, least + 13)):
        features_on_meta(name, 4, size, **options)
    with pytest.raises(LabError, match=rf"backbone {name}: img_size {least - 1} .* smallest is {least}\b"):
        backbones.build(name, img_size=least - 1, **options)
    # ... and the limit is real: what is built for larger images cannot take it.
    with torch.device("meta"):
        body = backbones.build(name, img_size=least, **options)
        images = torch.empty(2, 3, least - 1, least - 1)
        with pytest.raises(RuntimeError):
            body.forward_with_aux(images) if "aux" in options else body(images)


def test_patch_norm_sees_what_is_small_in_a_patch() -> None:
    """By hand, and: whatever the patch's brightness and contrast are, the token is the same."""
    torch.manual_seed(0)
    net: Any = backbones.build("vit_tiny", in_chans=2, img_size=4, patch_size=2, n_layer=1, patch_norm=True)
    images = torch.rand(3, 2, 4, 4)
    tokens = net._embed(images) - net.positions
    patch = images[1, :, 2:, :2].reshape(-1)  # the third of four, behind the class token
    projected = net.patches.weight.flatten(1) @ F.layer_norm(patch, (8,)) + net.patches.bias
    torch.testing.assert_close(tokens[1, 3], F.layer_norm(projected, (192,)), rtol=1e-4, atol=1e-5)
    fainter = net._embed(0.3 + 0.1 * images) - net.positions
    torch.testing.assert_close(fainter[:, 1:], tokens[:, 1:], rtol=1e-2, atol=1e-2)


def test_vit_takes_images_its_patches_cover() -> None:
    for in_chans, size, patch_size in ((3, 224, 16), (1, 28, 7), (4, 84, 12), (3, (32, 16), 8)):
        features_on_meta("vit_tiny", in_chans, size, patch_size=patch_size)
    with pytest.raises(LabError, match=r"patch_size 16 does not divide img_size 28: use one of \[1, 2, 4, 7"):
        backbones.build("vit_tiny", img_size=28)


@settings(max_examples=20)
@given(
    patch_size=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    in_chans=st.integers(1, 3),
    n_head=st.integers(1, 3),
    pool=st.sampled_from(["token", "mean"]),
)
def test_attention_maps_say_where_each_token_looks(
    patch_size: int, rows: int, columns: int, in_chans: int, n_head: int, pool: str
) -> None:
    options = {"patch_size": patch_size, "n_layer": 2, "width": 4 * n_head, "n_head": n_head, "pool": pool}
    size = (rows * patch_size, columns * patch_size)
    net = backbones.build("vit_tiny", in_chans=in_chans, img_size=size, **options)
    images = torch.randn(2, in_chans, *size)
    maps = net.attention_maps(images)
    tokens = rows * columns + (pool == "token")
    assert maps.shape == (2, 2, n_head, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, n_head, tokens))
    # They are what the network computes with: with them, the first block's attention is made of values.
    block, x = net.blocks[0], net._embed(images)
    normed = block.norm1(x)
    values = block.attn.v(normed).unflatten(-1, (n_head, -1)).transpose(1, 2)
    by_maps = block.attn.proj((maps[:, 0] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attn(normed), by_maps)


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet5": ("lenet5", {}),
    "lenet_relu": ("lenet5", {"activation": "relu", "pool": "max"}),
    "alexnet": ("alexnet", {"stride": 1, "width": 16}),
    "vgg": ("vgg11", {"width": 16, "depths": (1, 1, 1)}),
    "vgg_bn": ("vgg11_bn", {"width": 16, "depths": (1, 1)}),
    "googlenet": ("googlenet", {"aux": True, "norm": "group"}),
    "googlenet_bn": ("googlenet_bn", {}),
    "inception_bn": ("inception_bn", {"norm": "frozen"}),
    "resnet8": ("resnet8", {}),
    "resnet_bottleneck": ("resnet50", {"depths": (1, 1), "width": 8, "norm": "group"}),
    "resnet_pad": ("resnet20", {"depths": (1, 1), "width": 8, "norm": "frozen"}),
    "convnext": ("convnext_tiny", {"patch_size": 2, "depths": (1, 1), "widths": (8, 16), "layer_scale": 0.1}),
    "vit_token": ("vit_tiny", {"patch_size": 7, "n_layer": 2, "width": 24}),
    "vit_mean": ("vit_tiny", {"patch_size": 4, "n_layer": 2, "width": 24, "pool": "mean"}),
}
each_small = pytest.mark.parametrize("small", SMALL)


def small_classifier(small: str, **more: Any) -> Classifier:
    torch.manual_seed(0)
    name, options = SMALL[small]
    return classifier(name, 10, in_chans=1, img_size=28, **options, **more)


@each_small
def test_every_parameter_learns_nothing_is_read_back_and_meta_runs(small: str) -> None:
    for device in ("meta", "cpu"):
        with torch.device(device):
            net = small_classifier(small)
            images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
        optimizer = torch.optim.AdamW(net.parameters())
        with HostReads() as reads:
            loss = sum(F.cross_entropy(logits, labels) for logits in net(images, with_aux=True))
            assert isinstance(loss, Tensor)
            loss.backward()
        assert not reads.seen
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@each_small
def test_half_precision_and_channels_last_change_nothing_but_rounding(small: str) -> None:
    net, images = small_classifier(small).eval(), torch.rand(4, 1, 28, 28)
    expected = net(images)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(images).float()
    scale = expected.abs().max()
    torch.testing.assert_close(rounded / scale, expected / scale, rtol=0, atol=0.05)


NO_BATCH: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "alexnet": {"dropout": 0.0},
    "vgg": {"dropout": 0.0},
    "vgg_bn": {"dropout": 0.0, "norm": "group"},
    "googlenet": {"dropout": 0.0},
    "googlenet_bn": {"dropout": 0.0, "norm": "frozen"},
    "inception_bn": {},
    "resnet8": {"norm": "group"},
    "resnet_bottleneck": {},
    "resnet_pad": {},
    "convnext": {},
    "vit_token": {},
}


@pytest.mark.parametrize("small", NO_BATCH)
def test_without_dropout_and_batch_statistics_training_computes_what_evaluation_does(small: str) -> None:
    net, images = small_classifier(small, **NO_BATCH[small]), torch.rand(3, 1, 28, 28)
    assert torch.equal(net(images), net.eval()(images))


@pytest.mark.parametrize(
    ("small", "more"),
    [
        ("alexnet", {}),
        ("vgg", {}),
        ("googlenet", {}),
        ("vit_token", {"dropout": 0.5}),
        ("vit_mean", {"stochastic_depth": 0.5}),
        ("convnext", {"stochastic_depth": 0.5}),
        ("vgg_bn", {"dropout": 0.0}),
        ("resnet8", {}),
    ],
)
def test_dropout_depth_and_batch_statistics_are_for_training_alone(small: str, more: dict[str, Any]) -> None:
    net, images = small_classifier(small, **more), torch.rand(8, 1, 28, 28)
    trained = net(images)
    net.eval()
    assert not torch.allclose(trained, net(images))
    assert torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    ("small", "steps", "lr"),
    [("lenet5", 90, 5e-3), ("resnet8", 25, 5e-3), ("convnext", 60, 5e-3), ("vit_mean", 60, 3e-3)],
)
def test_small_nets_learn_random_labels_by_heart(small: str, steps: int, lr: float) -> None:
    net, labels = small_classifier(small), torch.arange(32) % 10
    images = torch.randn(32, 1, 28, 28)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
    assert (net(images).argmax(1) == labels).all()


def test_alexnets_response_normalisation_by_hand() -> None:
    """Krizhevsky et al. 2012, section 3.3: k = 2, n = 5, alpha = 1e-4, beta = 0.75."""
    x = 100 * torch.randn(2, 7, 1, 1)
    expected = torch.empty_like(x)
    for b in range(2):
        for i in range(7):
            total = sum(x[b, j, 0, 0] ** 2 for j in range(max(0, i - 2), min(6, i + 2) + 1))
            expected[b, i] = x[b, i] / (2 + 1e-4 * total) ** 0.75
    torch.testing.assert_close(alexnet_lrn()(x), expected)
    net = backbones.build("alexnet", stride=1, img_size=28, width=4, lrn=True)
    assert sum(isinstance(module, nn.LocalResponseNorm) for module in net.modules()) == 2


@settings(max_examples=50)
@given(height=st.integers(1, 12), width=st.integers(1, 12))
def test_pooling_halves_any_image_and_is_the_published_one_at_even_sizes(height: int, width: int) -> None:
    x = torch.randn(1, 2, height, width)
    pooled = MaxPoolSame()(x)
    assert pooled.shape == (1, 2, -(-height // 2), -(-width // 2))
    for i in range(pooled.shape[2]):
        for j in range(pooled.shape[3]):
            top, left = 2 * i - height % 2, 2 * j - width % 2
            window = x[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(pooled[:, :, i, j], window.amax((2, 3)))


def test_layer_scale_scales_the_residual_branch_of_each_channel() -> None:
    block = ConvNeXtBlock(4, 1.0, 0.0)
    x = torch.randn(2, 4, 5, 5)
    residual = block(x) - x
    with torch.no_grad():
        block.gamma.copy_(torch.tensor([0.0, 1.0, 2.0, -3.0]))  # type: ignore[union-attr]
    torch.testing.assert_close(block(x) - x, residual * torch.tensor([0.0, 1, 2, -3]).view(1, 4, 1, 1))
    assert ConvNeXtBlock(4, None, 0.0).gamma is None
    fresh = backbones.build("convnext_tiny", depths=(1,), widths=(4,), img_size=8)
    assert torch.equal(fresh.stages[0].blocks[0].gamma, torch.full((4,), 1e-6))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    kept = drop(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (kept.flatten(1).std(1) == 0).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(kept), kept)
    net = backbones.build("convnext_tiny", depths=(1, 2), widths=(4, 8), img_size=8, stochastic_depth=0.4)
    assert [m.rate for m in net.modules() if isinstance(m, StochasticDepth)] == pytest.approx([0, 0.2, 0.4])


def test_vit_makes_tokens_of_patches_row_by_row() -> None:
    net = backbones.build("vit_tiny", in_chans=2, img_size=(4, 6), patch_size=2, n_layer=1, width=3, n_head=1)
    image = torch.randn(1, 2, 4, 6)
    tokens = [net.class_token[0, 0]]
    for row in range(2):
        for column in range(3):
            patch = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            tokens.append(net.patches.weight.flatten(1) @ patch + net.patches.bias)
    torch.testing.assert_close(net._embed(image), torch.stack(tokens)[None] + net.positions)


def test_norms_by_hand() -> None:
    x = 3 + 2 * torch.randn(4, 32, 5, 5)
    groups = make_norm("group", 32)(x).view(4, 2, -1)  # of 16 channels
    torch.testing.assert_close(groups.mean(-1), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var(-1, unbiased=False), torch.ones(4, 2), atol=1e-4, rtol=0)
    assert [make_norm("group", n).num_groups for n in (16, 24, 7, 48)] == [1, 3, 7, 3]
    frozen, batch = FrozenBatchNorm2d(32), nn.BatchNorm2d(32)
    batch(x)
    frozen.load_state_dict(batch.state_dict())
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    assert torch.equal(frozen.train()(x), batch.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


def test_zero_init_residual_lets_blocks_begin_as_their_shortcuts() -> None:
    options = {"depths": (2,), "small_input": True, "width": 4}
    net = backbones.build("resnet50", **options, zero_init_residual=True).eval()
    x = torch.rand(1, 16, 6, 6)
    assert torch.equal(net.stages[0][1](x), x)
    assert not torch.equal(backbones.build("resnet50", **options).eval().stages[0][1](x), x)


@each_small
def test_spec_rebuilds_the_backbone(small: str) -> None:
    name, options = SMALL[small]
    first = backbones.build(name, in_chans=1, img_size=(28, 28), **options)
    second = backbones.build(name, **first.spec)
    second.load_state_dict(first.state_dict())
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(first.eval()(images), second.eval()(images))
    assert isinstance(first, backbones.Backbone)


def test_options_override_a_names_settings_which_are_seen_as_defaults() -> None:
    assert backbones.arguments("resnet50")["block"].default == "bottleneck"
    assert backbones.arguments("vit_large")["n_layer"].default == 24
    assert backbones.arguments("resnet18")["width"].default == 64
    with torch.device("meta"):
        assert count(classifier("resnet50", block="basic")) == 21_797_672  # resnet34
        assert count(classifier("vgg16_bn", norm=None)) == 138_357_544


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet18", {"block": "wide"}, "block 'wide' is none of"),
        ("resnet18", {"shortcut": "none"}, "shortcut 'none' is none of"),
        ("resnet18", {"norm": "layer"}, "norm 'layer' is none of"),
        ("resnet18", {"depths": ()}, "depths .* must be positive"),
        ("resnet18", {"img_size": 0}, "must be positive"),
        ("resnet18", {"dpeths": (1,)}, "Did you mean 'depths'"),
        ("resnet19", {}, "unknown backbone 'resnet19'.* Did you mean"),
        ("lenet5", {"activation": "gelu"}, "activation 'gelu' is none of"),
        ("lenet5", {"channels": (1, 2, 3, 4)}, "leave nothing of 32 pixels"),
        ("alexnet", {"img_size": 28}, "smallest is 63; with stride=1, 21"),
        ("convnext_tiny", {"img_size": 28}, "smallest is 32; with patch_size=1, 8"),
        ("convnext_tiny", {"depths": (1, 1)}, "equally long"),
        ("vit_tiny", {"patch_size": 0}, "patch_size 0 must be positive"),
        ("vit_tiny", {"n_head": 5}, "no multiple of n_head"),
        ("vit_tiny", {"pool": "max"}, "pool 'max' is none of"),
        ("inception_v3", {"img_size": 84, "aux": True}, "smallest is 299; without aux, 75"),
        ("googlenet", {"in_chans": 0}, "in_chans 0 must be positive"),
    ],
)
def test_mistakes_say_what_to_do(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said) as error:
        backbones.build(name, **options)
    assert "\n" not in str(error.value)


def test_one_small_image_is_refused_by_batch_norm_in_training_alone() -> None:
    net, image = backbones.build("resnet18", in_chans=1), torch.randn(1, 1, 28, 28)
    with pytest.raises(LabError, match="Use a larger batch_size"):
        net(image)
    assert net.eval()(image).shape == (1, 512)
    assert backbones.build("resnet18", in_chans=1, norm="group")(image).shape == (1, 512)


def test_a_small_resnet_of_stride_2_skips_every_other_place_behind_its_first_convolution() -> None:
    torch.manual_seed(0)
    make = backbones.build
    whole, quick = (make("resnet8", in_chans=1, small_stride=stride).eval() for stride in (1, 2))
    quick.load_state_dict(whole.state_dict())
    images = torch.randn(2, 1, 28, 27)
    places = F.relu(whole.bn1(whole.conv1(images)))[:, :, ::2, ::2]
    torch.testing.assert_close(quick(images), whole.stages(places).mean((2, 3)))
    with pytest.raises(LabError, match="small_stride is for small_input"):
        make("resnet18", small_stride=2)


def test_quick_tanh_is_tanh_with_its_gradient() -> None:
    x = torch.linspace(-12, 12, 10_001)
    assert float((Tanh()(x) - x.double().tanh()).abs().max()) < 3e-7
    assert Tanh()(x.bfloat16()).dtype == torch.float32
    few = torch.linspace(-2, 2, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(QuickTanh.apply(few).sum(), few)
    torch.testing.assert_close(gradient, 1 - few.detach().tanh() ** 2)


def test_positions_of_a_vit_begin_as_waves_in_both_directions() -> None:
    vit = backbones.build(
        "vit_tiny", in_chans=1, img_size=(8, 12), patch_size=4, width=10, n_head=2, n_layer=1
    )
    positions = vit.positions.detach()[0]
    assert positions.shape == (1 + 2 * 3, 10)
    assert not positions[0].any()  # the class token's
    row, column = 1, 2
    by_hand = [math.sin(column), math.sin(column / 1e4), math.cos(column), math.cos(column / 1e4)]
    by_hand += [math.sin(row), math.sin(row / 1e4), math.cos(row), math.cos(row / 1e4), 0, 0]
    torch.testing.assert_close(positions[1 + row * 3 + column], torch.tensor(by_hand))
