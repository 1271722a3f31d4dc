"""Other libraries' weights in our vision backbones: the same logits as from transformers' models, and as from
networks written down here once more, function by function, under the names of torchvision's weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lab.errors import LabError
from supervised import backbones
from supervised.classifier import Classifier, load_published


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within rounding, and worth comparing: logits that differ from image to image."""
    assert (theirs.std(0) > 1e-4).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def randomize(net: nn.Module) -> None:
    """Every weight and statistic another than it starts as."""
    generator = torch.Generator().manual_seed(1)
    for value in net.state_dict().values():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if value.dim() == 1 else (noise - 0.5) * (6 / value[0].numel()) ** 0.5)


LABELS: Any = {"num_labels": 5}  # an attribute of every config that none of their signatures shows
TRANSFORMERS: dict[str, tuple[type[Any], Any, dict[str, Any]]] = {
    "resnet18": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", **LABELS),
        {"width": 8, "depths": (2, 1)},
    ),
    "resnet50": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[32, 64], depths=[1, 2], **LABELS),
        {"width": 8, "depths": (1, 2)},
    ),
    "convnext_tiny": (
        ConvNextForImageClassification,
        ConvNextConfig(
            hidden_sizes=[8, 12, 16], depths=[1, 2, 1], num_stages=3, layer_norm_eps=1e-6, **LABELS
        ),
        {"widths": (8, 12, 16), "depths": (1, 2, 1)},
    ),
    "vit_tiny": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
            **LABELS,
        ),
        {"width": 24, "n_layer": 2, "n_head": 3, "mlp_width": 40, "patch_size": 8},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    model, config, options = TRANSFORMERS[name]
    theirs = model(config).eval()
    randomize(theirs)
    ours = Classifier(backbones.build(name, img_size=32, **options), 5).eval()
    load_published(ours, theirs.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert_close(ours(images), theirs(images).logits)


def test_attention_maps_are_those_of_transformers() -> None:
    model, config, options = TRANSFORMERS["vit_tiny"]
    theirs = model(config).eval()
    theirs.set_attn_implementation("eager")
    ours = Classifier(backbones.build("vit_tiny", img_size=32, **options), 5).eval()
    load_published(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack(theirs(images, output_attentions=True).attentions, 1)
        torch.testing.assert_close(ours.backbone.attention_maps(images), expected)


class Functional:
    """Computes layers whose random weights it makes up and keeps, by name, in torchvision's layout."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def _make(self, name: str, *shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape, generator=self.generator) * (2 / fan_in) ** 0.5
        self.state[name] = value if len(shape) > 1 else 0.1 * value
        return self.state[name]

    def conv(
        self, name: str, x: Tensor, out: int, kernel: Any, stride: int = 1, pad: Any = 0, bias: bool = True
    ) -> Tensor:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        weight = self._make(f"{name}.weight", out, x.shape[1], *kernel)
        return F.conv2d(x, weight, self._make(f"{name}.bias", out) if bias else None, stride, pad)

    def bn(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        mean, bias = (self._make(f"{name}.{part}", x.shape[1]) for part in ("running_mean", "bias"))
        for part in ("running_var", "weight"):
            self.state[f"{name}.{part}"] = 1 + self._make(f"{name}.{part}", x.shape[1]).abs()
        weight, var = self.state[f"{name}.weight"], self.state[f"{name}.running_var"]
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / (var + eps).sqrt().view(shape) * weight.view(shape) + bias.view(shape)

    def cbr(self, name: str, x: Tensor, out: int, kernel: Any, stride: int = 1, pad: Any = 0) -> Tensor:
        """GoogLeNet's and Inception's convolution, normalisation, ReLU."""
        return self.bn(
            f"{name}.bn", self.conv(f"{name}.conv", x, out, kernel, stride, pad, False), 1e-3
        ).relu()

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self._make(f"{name}.weight", out, x.shape[1]), self._make(f"{name}.bias", out))


def alexnet(f: Functional, x: Tensor) -> Tensor:
    x = F.max_pool2d(f.conv("features.0", x, 64, 11, 4, 2).relu(), 3, 2)
    x = F.max_pool2d(f.conv("features.3", x, 192, 5, 1, 2).relu(), 3, 2)
    x = f.conv("features.6", x, 384, 3, 1, 1).relu()
    x = f.conv("features.8", x, 256, 3, 1, 1).relu()
    x = F.max_pool2d(f.conv("features.10", x, 256, 3, 1, 1).relu(), 3, 2).flatten(1)
    return f.linear(
        "classifier.6", f.linear("classifier.4", f.linear("classifier.1", x, 9).relu(), 9).relu(), 5
    )


def vgg11_bn(f: Functional, x: Tensor) -> Tensor:
    index = 0
    for out in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if isinstance(out, str):
            x, index = F.max_pool2d(x, 2), index + 1
        else:
            x = f.bn(f"features.{index + 1}", f.conv(f"features.{index}", x, out, 3, 1, 1)).relu()
            index += 3
    x = f.linear("classifier.0", x.flatten(1), 9).relu()
    return f.linear("classifier.6", f.linear("classifier.3", x, 9).relu(), 5)


def resnet18(f: Functional, x: Tensor) -> Tensor:
    x = F.max_pool2d(f.bn("bn1", f.conv("conv1", x, 8, 7, 2, 3, False)).relu(), 3, 2, 1)
    for stage, width in enumerate((8, 16), 1):
        for block in range(2):
            name, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            y = f.bn(name + "bn1", f.conv(name + "conv1", x, width, 3, stride, 1, False)).relu()
            y = f.bn(name + "bn2", f.conv(name + "conv2", y, width, 3, 1, 1, False))
            if stride == 2:
                x = f.bn(name + "downsample.1", f.conv(name + "downsample.0", x, width, 1, 2, 0, False))
            x = (x + y).relu()
    return f.linear("fc", x.mean((2, 3)), 5)


def googlenet(f: Functional, x: Tensor, torchvision: bool = False) -> list[Tensor]:
    """The paper's, or torchvision's: 3x3 for 5x5, no response normalisation, other poolings."""

    def conv(name: str, x: Tensor, out: int, kernel: int, stride: int = 1, pad: int = 0) -> Tensor:
        if torchvision:
            return f.cbr(name, x, out, kernel, stride, pad)
        return f.conv(f"{name}.conv", x, out, kernel, stride, pad).relu()

    def lrn(x: Tensor) -> Tensor:
        return x if torchvision else F.local_response_norm(x, 5)

    wide = (3, 1, 1) if torchvision else (5, 1, 2)

    def mix(name: str, x: Tensor, c1: int, r3: int, c3: int, r5: int, c5: int, proj: int) -> Tensor:
        return torch.cat(
            [
                conv(f"{name}.branch1", x, c1, 1),
                conv(f"{name}.branch2.1", conv(f"{name}.branch2.0", x, r3, 1), c3, 3, 1, 1),
                conv(f"{name}.branch3.1", conv(f"{name}.branch3.0", x, r5, 1), c5, *wide),
                conv(f"{name}.branch4.1", F.max_pool2d(x, 3, 1, 1, ceil_mode=True), proj, 1),
            ],
            1,
        )

    def aux(name: str, x: Tensor) -> Tensor:
        x = conv(
            f"{name}.conv", F.adaptive_avg_pool2d(x, 4) if torchvision else F.avg_pool2d(x, 5, 3), 128, 1
        ).flatten(1)
        return f.linear(f"{name}.fc2", f.linear(f"{name}.fc1", x, 1024).relu(), 5)

    x = lrn(F.max_pool2d(conv("conv1", x, 64, 7, 2, 3), 3, 2, ceil_mode=True))
    x = conv("conv3", conv("conv2", x, 64, 1), 192, 3, 1, 1)
    x = F.max_pool2d(lrn(x), 3, 2, ceil_mode=True)
    x = mix("inception3a", x, 64, 96, 128, 16, 32, 32)
    x = mix("inception3b", x, 128, 128, 192, 32, 96, 64)
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    x = mix("inception4a", x, 192, 96, 208, 16, 48, 64)
    aux1 = aux("aux1", x)
    x = mix("inception4b", x, 160, 112, 224, 24, 64, 64)
    x = mix("inception4c", x, 128, 128, 256, 24, 64, 64)
    x = mix("inception4d", x, 112, 144, 288, 32, 64, 64)
    aux2 = aux("aux2", x)
    x = mix("inception4e", x, 256, 160, 320, 32, 128, 128)
    x = F.max_pool2d(x, 2 if torchvision else 3, 2, ceil_mode=True)
    x = mix("inception5a", x, 256, 160, 320, 32, 128, 128)
    x = mix("inception5b", x, 384, 192, 384, 48, 128, 128)
    return [f.linear("fc", x.mean((2, 3)), 5), aux1, aux2]


def googlenet_bn(f: Functional, x: Tensor) -> list[Tensor]:
    return googlenet(f, x, torchvision=True)


def inception_v3(f: Functional, x: Tensor) -> list[Tensor]:
    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))

    def chain(name: str, x: Tensor, *layers: tuple[Any, ...]) -> Tensor:
        for number, layer in enumerate(layers, 1):
            x = f.cbr(f"{name}_{number}", x, *layer)
        return x

    def pooled(name: str, x: Tensor, out: int) -> Tensor:
        return f.cbr(f"{name}.branch_pool", F.avg_pool2d(x, 3, 1, 1), out, 1)

    def a(name: str, x: Tensor, proj: int) -> Tensor:
        one = f.cbr(f"{name}.branch1x1", x, 64, 1)
        five = chain(f"{name}.branch5x5", x, (48, 1), (64, 5, 1, 2))
        double = chain(f"{name}.branch3x3dbl", x, (64, 1), (96, 3, 1, 1), (96, 3, 1, 1))
        return torch.cat((one, five, double, pooled(name, x, proj)), 1)

    def c(name: str, x: Tensor, c7: int) -> Tensor:
        one = f.cbr(f"{name}.branch1x1", x, 192, 1)
        seven = chain(f"{name}.branch7x7", x, (c7, 1), (c7, *wide), (192, *tall))
        double = chain(
            f"{name}.branch7x7dbl", x, (c7, 1), (c7, *tall), (c7, *wide), (c7, *tall), (192, *wide)
        )
        return torch.cat((one, seven, double, pooled(name, x, 192)), 1)

    def e(name: str, x: Tensor) -> Tensor:
        def split(name: str, x: Tensor) -> Tensor:
            across = f.cbr(f"{name}a", x, 384, (1, 3), 1, (0, 1))
            return torch.cat((across, f.cbr(f"{name}b", x, 384, (3, 1), 1, (1, 0))), 1)

        one = f.cbr(f"{name}.branch1x1", x, 320, 1)
        three = split(f"{name}.branch3x3_2", chain(f"{name}.branch3x3", x, (384, 1)))
        double = split(f"{name}.branch3x3dbl_3", chain(f"{name}.branch3x3dbl", x, (448, 1), (384, 3, 1, 1)))
        return torch.cat((one, three, double, pooled(name, x, 192)), 1)

    x = f.cbr("Conv2d_2a_3x3", f.cbr("Conv2d_1a_3x3", x, 32, 3, 2), 32, 3)
    x = F.max_pool2d(f.cbr("Conv2d_2b_3x3", x, 64, 3, 1, 1), 3, 2)
    x = F.max_pool2d(f.cbr("Conv2d_4a_3x3", f.cbr("Conv2d_3b_1x1", x, 80, 1), 192, 3), 3, 2)
    x = a("Mixed_5d", a("Mixed_5c", a("Mixed_5b", x, 32), 64), 64)
    double = chain("Mixed_6a.branch3x3dbl", x, (64, 1), (96, 3, 1, 1), (96, 3, 2))
    x = torch.cat((f.cbr("Mixed_6a.branch3x3", x, 384, 3, 2), double, F.max_pool2d(x, 3, 2)), 1)
    x = c("Mixed_6e", c("Mixed_6d", c("Mixed_6c", c("Mixed_6b", x, 128), 160), 160), 192)
    aux = f.cbr("AuxLogits.conv0", F.avg_pool2d(x, 5, 3), 128, 1)
    aux = f.linear("AuxLogits.fc", f.cbr("AuxLogits.conv1", aux, 768, 5).mean((2, 3)), 5)
    three = chain("Mixed_7a.branch3x3", x, (192, 1), (320, 3, 2))
    seven = chain("Mixed_7a.branch7x7x3", x, (192, 1), (192, *wide), (192, *tall), (192, 3, 2))
    x = torch.cat((three, seven, F.max_pool2d(x, 3, 2)), 1)
    x = e("Mixed_7c", e("Mixed_7b", x))
    return [f.linear("fc", x.mean((2, 3)), 5), aux]


TORCHVISION: dict[Callable[[Functional, Tensor], Any], tuple[int, dict[str, Any]]] = {
    alexnet: (95, {"width": 9}),
    vgg11_bn: (64, {"width": 9}),
    resnet18: (32, {"width": 8, "depths": (2, 2)}),
    googlenet: (224, {"aux": True}),
    googlenet_bn: (64, {"aux": True}),
    inception_v3: (299, {"aux": True}),
}


@pytest.mark.parametrize("network", TORCHVISION, ids=lambda network: network.__name__)
@torch.no_grad()
def test_logits_equal_those_of_torchvisions_weights(network: Callable[[Functional, Tensor], Any]) -> None:
    size, options = TORCHVISION[network]
    functional, images = Functional(), torch.randn(2, 3, size, size)
    expected = network(functional, images)
    name = network.__name__
    ours = Classifier(backbones.build(name, img_size=size, **options), 5).eval()
    load_published(ours, functional.state)
    expected = expected if isinstance(expected, list) else [expected]
    for logits, other in zip(ours(images, with_aux=True), expected, strict=True):
        assert_close(logits, other)
    if "aux" in options:  # without auxiliary classifiers, theirs are left out
        bare = Classifier(backbones.build(name, img_size=size), 5).eval()
        load_published(bare, functional.state)
        assert_close(bare(images), expected[0])


def test_logits_equal_those_of_timms_and_the_authors_weights() -> None:
    """The layouts of ConvNeXt's authors and of timm, made of ours by exchanging the names."""
    options = {"widths": (8, 12), "depths": (1, 2), "img_size": 16}
    ours, copy = (Classifier(backbones.build("convnext_tiny", **options), 5).eval() for _ in range(2))
    randomize(ours)
    images = torch.randn(2, 3, 16, 16)
    authors = [
        ("backbone.stem", "downsample_layers.0"),
        ("backbone.stages.1.downsample", "downsample_layers.1"),
        ("backbone.norm", "norm"),
        ("backbone.", ""),
        (".blocks.", "."),
        (".fc", ".pwconv"),
    ]
    timm = [
        ("backbone.norm", "head.norm"),
        ("backbone.", ""),
        ("dwconv", "conv_dw"),
        ("head.weight", "head.fc.weight"),
        ("head.bias", "head.fc.bias"),
        (".fc1", ".mlp.fc1"),
        (".fc2", ".mlp.fc2"),
    ]
    for names in (authors, timm):
        state = {}
        for key, value in ours.state_dict().items():
            for mine, theirs in names:
                key = key.replace(mine, theirs)
            state[key] = value
        load_published(copy, state)
        assert torch.equal(copy(images), ours(images))
        for value in copy.state_dict().values():
            value.zero_()


def test_timms_one_matrix_for_queries_keys_and_values_is_split() -> None:
    options = {"width": 12, "n_layer": 1, "n_head": 3, "patch_size": 8, "img_size": 16}
    ours, copy = (Classifier(backbones.build("vit_tiny", **options), 5).eval() for _ in range(2))
    own = {key.removeprefix("backbone."): value for key, value in ours.state_dict().items()}
    state = {
        "cls_token": own.pop("class_token"),
        "pos_embed": own.pop("positions"),
        "patch_embed.proj.weight": own.pop("patches.weight"),
        "patch_embed.proj.bias": own.pop("patches.bias"),
    }
    for part in ("weight", "bias"):
        qkv = [own.pop(f"blocks.0.attn.{name}.{part}") for name in "qkv"]
        state[f"blocks.0.attn.qkv.{part}"] = torch.cat(qkv)
    state |= {key.replace(".fc", ".mlp.fc"): value for key, value in own.items()}
    load_published(copy, state)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy(images), ours(images))


def test_heads_may_stay_and_what_does_not_fit_is_said() -> None:
    functional = Functional()
    resnet18(functional, torch.zeros(1, 3, 32, 32))
    ours = Classifier(backbones.build("resnet18", width=8, depths=(2, 2)), 7)
    head = ours.head.weight.clone()
    load_published(ours, functional.state, heads=False)
    assert torch.equal(ours.head.weight, head)
    assert torch.equal(ours.backbone.conv1.weight, functional.state["conv1.weight"])
    with pytest.raises(LabError, match=r"head\.bias is \(5,\), not \(7,\)"):
        load_published(ours, functional.state)
    del functional.state["layer2.1.bn2.bias"]
    with pytest.raises(LabError, match=r"stages\.1\.1\.bn2\.bias is none, not \(16,\)"):
        load_published(ours, functional.state, heads=False)
    with pytest.raises(LabError, match="no other library's names are known"):
        load_published(Classifier(backbones.build("lenet5"), 2), {})
