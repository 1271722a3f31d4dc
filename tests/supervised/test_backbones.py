"""Backbones: published parameter counts, any image, and a spec that rebuilds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.errors import LabError
from supervised import backbones


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_nature_cnn_has_the_published_parameters() -> None:
    body = backbones.build("nature_cnn", in_chans=4, img_size=84)
    assert count(body) == 1_684_128
    assert count(nn.Sequential(body, nn.Linear(body.num_features, 6))) == 1_687_206
    assert count(nn.Sequential(body, nn.Linear(body.num_features, 18))) == 1_693_362


def test_impala_cnn_has_the_published_parameters() -> None:
    body = backbones.build("impala_cnn", in_chans=4, img_size=(84, 84))
    assert count(body.convs) == 97_744
    assert count(body) == 1_089_232


def test_mlp_has_the_parameters_of_its_layers() -> None:
    body = backbones.build("mlp", in_features=784, hidden=(16, 16))
    assert count(nn.Sequential(body, nn.Linear(body.num_features, 10))) == 13_002


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mlp", "nature_cnn", "impala_cnn"]),
    in_chans=st.integers(1, 6),
    height=st.integers(1, 100),
    width=st.integers(1, 100),
)
def test_any_image_size_and_channel_count_works(name: str, in_chans: int, height: int, width: int) -> None:
    body = backbones.build(name, in_chans=in_chans, img_size=(height, width))
    features = body(torch.rand(2, in_chans, height, width))
    assert features.shape == (2, body.num_features)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mlp", {"in_features": 12, "hidden": (5, 3)}),
        ("nature_cnn", {"in_chans": 2, "img_size": (44, 40), "width": 32, "norm": "layer"}),
        ("impala_cnn", {"in_chans": 1, "img_size": 20, "channels": (4, 8)}),
    ],
)
def test_spec_rebuilds_the_backbone(name: str, spec: dict) -> None:
    first = backbones.build(name, **spec)
    second = backbones.build(name, **first.spec)
    second.load_state_dict(first.state_dict())
    x = torch.rand(2, 12) if name == "mlp" else torch.rand(2, first.spec["in_chans"], 44, 40)
    if name == "impala_cnn":
        x = torch.rand(2, 1, 20, 20)
    assert torch.equal(first(x), second(x))


def test_backbones_satisfy_the_interface() -> None:
    for name in ("mlp", "nature_cnn", "impala_cnn"):
        assert isinstance(backbones.build(name, in_chans=1, img_size=10), backbones.Backbone)


@pytest.mark.parametrize(
    ("name", "spec", "said"),
    [
        ("nature_cmm", {}, "nature_cnn"),
        ("nature_cnn", {"in_chans": 4, "img_size": 84, "widht": 3}, "Did you mean 'width'"),
        ("nature_cnn", {"in_chans": 4, "img_size": 84, "norm": "batch"}, "'batch' is none of"),
        ("nature_cnn", {"in_chans": 4, "img_size": 84, "channels": (1, 2)}, "equally long"),
        ("mlp", {}, "give in_features"),
        ("mlp", {"in_features": 3, "hidden": ()}, "at least one"),
        ("impala_cnn", {"in_chans": 4, "img_size": (0, 3)}, "positive"),
        ("resnet8", {"img_size": (1, 2, 3)}, "one side, or height and width"),
        ("mlp", {"in_features": 3, "hidden": 3}, r"hidden = 3 is not valid. Expected list\[int\]"),
        ("mlp", {"in_features": 3, "hidden": [10**15]}, "cannot be built"),
        ("gpt", {"vocab_size": "many"}, "vocab_size = 'many' is not valid. Expected int"),
        ("gpt", {"vocab_size": 9, "bias": 1}, "bias = 1 is not valid. Expected bool"),
        ("vit_tiny", {"stochastic_depth": 1}, "stochastic_depth 1 must be at least 0 and below 1"),
    ],
)
def test_mistakes_say_what_to_do(name: str, spec: dict, said: str) -> None:
    with pytest.raises(LabError, match=said):
        backbones.build(name, **spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"img_size": 84},  # as blocks of four
        {"img_size": (84, 83)},  # not divisible
        {"img_size": 20},  # padded
        {"img_size": 44, "kernels": (5, 4, 3), "strides": (2, 2, 2), "paddings": (2, 1, 1), "norm": "layer"},
    ],
)
def test_nature_cnn_reads_bytes_as_255ths(spec: dict) -> None:
    """Features, gradients and what reaches the input must be those of the same image as floats."""
    body = backbones.build("nature_cnn", in_chans=4, **spec).double()  # so that no sign of a ReLU's flips
    height, width = (spec["img_size"],) * 2 if isinstance(spec["img_size"], int) else spec["img_size"]
    pixels = torch.randint(0, 256, (3, 4, height, width), dtype=torch.uint8)
    gradients = []
    for images in (pixels, pixels.double() / 255):
        body.zero_grad()
        features = body(images)
        features.square().sum().backward()
        gradients.append([features, *(parameter.grad.clone() for parameter in body.parameters())])
    for from_bytes, from_floats in zip(*gradients, strict=True):
        torch.testing.assert_close(from_bytes, from_floats)


def test_numbers_become_what_a_backbone_takes() -> None:
    assert backbones.typed("gpt", {"vocab_size": 5e4, "dropout": 0, "n_kv_head": None}) == {
        "vocab_size": 50_000,
        "dropout": 0.0,
        "n_kv_head": None,
    }
    for name in backbones.names():  # every default is of the type that is checked
        defaults = {k: v.default for k, v in backbones.arguments(name).items() if v.default is not v.empty}
        assert backbones.typed(name, defaults) == defaults
