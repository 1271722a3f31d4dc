"""Generative backbones: published parameter counts, any size, exact inverses, densities, bounds by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import LabError
from supervised import backbones, estimate
from supervised.backbones.flow import ActNorm, ClassNormal, Coupling, Flow, Logit, Mix, Squeeze, log_density
from supervised.backbones.vae import bits_per_dimension, kl_from_standard_normal, log_likelihood_of_bytes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dcgan_generator", 3_576_704),
        ("dcgan_discriminator", 2_765_568),
        ("srresnet", 1_549_462),
        # Eight convolutions and their batch norms, and the dense layers on 6x6 cells of a piece of 96 pixels.
        ("srgan_discriminator", 4_689_088 + 36 * 512 * 1024 + 1024 + 1025),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(backbones.build(name)) == parameters


@pytest.mark.parametrize("size", [8, 28, 32, 33, (28, 20), 84])
@pytest.mark.parametrize("norm", ["batch", "group", None])
def test_dcgan_makes_and_judges_images_of_any_size(size: Any, norm: str | None) -> None:
    shape = (size, size) if isinstance(size, int) else size
    make = backbones.build("dcgan_generator", in_chans=2, img_size=size, latent=5, width=8, norm=norm)
    judge = backbones.build("dcgan_discriminator", in_chans=2, img_size=size, width=8, norm=norm)
    images = make(torch.randn(3, 5))
    assert images.shape == (3, 2, *shape)
    assert images.abs().max() <= 1
    assert make.num_features == images[0].numel()
    verdict = judge(images)
    assert verdict.shape == (3, 1)
    verdict.sum().backward()
    assert all(p.grad is not None for net in (make, judge) for p in net.parameters())


def test_a_discriminator_may_have_spectral_norm() -> None:
    """Every layer then stretches nothing by more than 1: the largest singular value."""
    for name in ("dcgan_discriminator", "srgan_discriminator"):
        judge = backbones.build(name, in_chans=1, width=8, norm="spectral")
        for _ in range(30):
            judge(torch.randn(2, 1, 64, 64))  # each forward pass is a step of the power iteration
        layers = [m for m in judge.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == (5 if name == "dcgan_discriminator" else 10)
        for layer in layers:
            largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert largest == pytest.approx(1, abs=0.1)


def test_srresnet_scales_and_its_discriminator_takes_any_piece() -> None:
    for scale in (2, 4, 8):
        net = backbones.build("srresnet", depth=1, width=8, scale=scale)
        assert net(torch.rand(2, 3, 6, 5)).shape == (2, 3, 6 * scale, 5 * scale)
    judge = backbones.build("srgan_discriminator", width=4, hidden=8)
    for side in (24, 96, 50):
        assert judge(torch.rand(2, 3, side, side)).shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "spec", "said"),
    [
        ("dcgan_generator", {"img_size": 7}, "too small: the smallest is 8"),
        ("dcgan_generator", {"norm": "spectral"}, "'spectral' is of discriminators"),
        ("dcgan_discriminator", {"norm": "layer"}, "'layer' is none of"),
        ("srresnet", {"scale": 3}, "no power of 2"),
        ("vae", {"norm": "spectral"}, "'spectral' is of discriminators"),
        ("vae", {"latent": 0}, "must be positive"),
        ("flow", {"levels": 3}, "cannot be halved 3 times"),
        ("flow", {"img_size": 2}, "too small: the smallest is 4"),
    ],
)
def test_mistakes_say_what_to_do(name: str, spec: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        backbones.build(name, **spec)


def test_spec_rebuilds_them() -> None:
    for name, spec in (
        ("dcgan_generator", {"in_chans": 1, "img_size": 28, "width": 8}),
        ("vae", {"width": 8, "latent": 3}),
        ("flow", {"depth": 1, "hidden": 8}),
        ("srresnet", {"depth": 1, "width": 8}),
    ):
        first = backbones.build(name, **spec)
        backbones.build(name, **first.spec).load_state_dict(first.state_dict())


def test_they_can_be_estimated() -> None:
    """A transposed convolution multiplies as often as the plain one that is its gradient."""
    made = estimate.estimate("dcgan_generator")
    assert made["parameters"] == 3_576_704
    products = 100 * 512 * 16 + 16 * sum(a * b * side**2 for a, b, side in DCGAN_STAGES)
    assert made["training_flops_each"]["flops"] == 3 * 2 * products
    for name in backbones.GENERATIVE:
        with torch.device("meta"):
            net = backbones.build(name)
            net.eval()(*net.example())
        assert estimate.estimate(name)["parameters"] == count(net)
    with pytest.raises(LabError, match="--classes is for classifiers"):
        estimate.estimate("vae", classes=10)


DCGAN_STAGES = ((512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32))
"""Channels before and behind, and pixels a side before."""


# ---- variational autoencoder ----


def test_the_divergence_from_a_standard_normal_is_that_of_torch() -> None:
    mean, log_std = torch.randn(4, 7), torch.randn(4, 7)
    ours = kl_from_standard_normal(mean, log_std)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.1, -2.0), (-1.3, -4.0), (0.9, 0.5)])
def test_the_bytes_probabilities_are_those_of_a_logistic_and_add_up_to_1(
    mean: float, log_scale: float
) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    ours = log_likelihood_of_bytes(pixels, torch.tensor(mean), torch.tensor(log_scale))
    edges = ((torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1 - mean) / math.exp(log_scale)
    cumulative = torch.cat((torch.zeros(1), edges.sigmoid(), torch.ones(1)))
    probabilities = cumulative.diff()
    assert ours.double().exp().sum() == pytest.approx(1, abs=1e-5)
    likely = probabilities > 1e-6  # below, the plain difference has lost its digits; ours has not
    torch.testing.assert_close(ours[likely].double(), probabilities[likely].log(), rtol=1e-3, atol=1e-3)
    assert ours.isfinite().all()


def test_the_bound_of_a_vae_by_hand() -> None:
    vae = backbones.build("vae", img_size=8, latent=2, width=4).eval()
    images, noise = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8), torch.randn(3, 2)
    told, pixel_mean, pixel_log_scale = vae(images.float() / 255, noise)
    mean, log_std = vae.encoder(2 * (images.float() / 255) - 1).flatten(1).chunk(2, 1)
    torch.testing.assert_close(told, kl_from_standard_normal(mean, log_std))
    decoded = vae.decoder((mean + log_std.exp() * noise)[:, :, None, None])
    torch.testing.assert_close(pixel_mean, decoded[:, :1])
    torch.testing.assert_close(pixel_log_scale, decoded[:, 1:].clamp(min=-7))
    assert bits_per_dimension(64 * math.log(2) * 3, (1, 8, 8)) == pytest.approx(3)


@pytest.mark.parametrize(("prior_depth", "num_classes"), [(0, 3), (2, 0), (2, 3)])
def test_a_learned_prior_can_be_drawn_from_and_its_density_is_known(
    prior_depth: int, num_classes: int
) -> None:
    """At first it is the standard normal, up to a rotation; then the bound is on log q(z|x) - log p(z)."""
    torch.manual_seed(0)
    prior = {"prior_depth": prior_depth, "prior_hidden": 6, "num_classes": num_classes}
    vae = backbones.build("vae", img_size=8, latent=3, width=4, depth=1, **prior).eval()
    image = torch.rand(1, 1, 8, 8).expand(20_000, -1, -1, -1)
    noise, labels = torch.randn(20_000, 3), torch.arange(20_000) % num_classes if num_classes else None
    with torch.no_grad():
        mean, log_std = vae.encode(image[:1])
        told = vae(image, noise, labels)[0]
        assert told.mean() == pytest.approx(
            float(kl_from_standard_normal(mean, log_std)), abs=6 * float(told.std()) / 20_000**0.5
        )
        for parameter in [p for name, p in vae.named_parameters() if name.startswith("prior")]:
            parameter += 0.3 * torch.randn_like(parameter)
        codes = vae.from_noise(noise[:8], None if labels is None else labels[:8])
        again, log_det = vae.prior(codes[:, :, None, None], None if labels is None else labels[:8])
    torch.testing.assert_close(again.flatten(1), noise[:8], rtol=1e-4, atol=1e-4)
    one = None if labels is None else labels[:1]
    code = codes[:1, :, None, None]
    jacobian: Any = torch.autograd.functional.jacobian(lambda z: vae.prior(z, one)[0], code)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian.reshape(3, 3))[1])


# ---- flow ----


def tiny_flow() -> Flow:
    """Of two levels, with weights that do something."""
    torch.manual_seed(0)
    flow = backbones.build("flow", img_size=4, levels=2, depth=2, hidden=6)
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow


def log_det_by_jacobian(layer: Any, x: Tensor) -> Tensor:
    """Of one sample (1, ...)."""
    jacobian = torch.autograd.functional.jacobian(lambda inputs: layer(inputs)[0].flatten(), x)
    assert isinstance(jacobian, Tensor)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


@pytest.mark.parametrize("layer", [Logit(0.05), Squeeze(), ActNorm(4), Mix(4), Coupling(4, 8)])
def test_every_layer_of_a_flow_can_be_undone_and_knows_its_determinant(layer: Any) -> None:
    torch.manual_seed(1)
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    x = torch.rand(2, 4, 4, 2, dtype=torch.float64)
    y, log_det = layer(x)
    torch.testing.assert_close(layer.inverse(y), x)
    for i in range(2):
        torch.testing.assert_close(log_det[i], log_det_by_jacobian(layer, x[i : i + 1]))


@pytest.mark.parametrize("layer", [Coupling(4, 8, num_classes=3), ClassNormal(32, 3)])
def test_a_layer_that_knows_classes_treats_each_in_its_own_way(layer: Any) -> None:
    torch.manual_seed(1)
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    x = torch.rand(1, 4, 4, 2, dtype=torch.float64).expand(3, -1, -1, -1)
    x, labels = x.flatten(1) if isinstance(layer, ClassNormal) else x, torch.arange(3)
    y, log_det = layer(x, labels)
    assert (y[0] - y[1]).abs().max() > 0.01
    torch.testing.assert_close(layer.inverse(y, labels), x)
    for i in range(3):
        expected = log_det_by_jacobian(lambda z, i=i: layer(z, labels[i : i + 1]), x[i : i + 1])
        torch.testing.assert_close(log_det[i], expected)


def test_a_flow_by_class_can_be_undone_and_its_density_integrates_to_1() -> None:
    torch.manual_seed(0)
    flow = backbones.build("flow", img_size=2, levels=1, depth=2, hidden=6, num_classes=2)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    # All that a flow can make, which is a little more than pixels can be: from -1/18 to 19/18 (edge 0.05).
    points, labels = 10 / 9 * torch.rand(400_000, 1, 2, 2) - 1 / 18, torch.arange(400_000) % 2
    with torch.no_grad():
        noise, _ = flow(points, labels)
        assert (flow.inverse(noise[:100], labels[:100]) - points[:100]).abs().max() < 1e-5
        density = (10 / 9) ** 4 * flow.log_density(points, labels).double().exp()
    for of_class in (density[::2], density[1::2]):
        error = float(of_class.std()) / len(of_class) ** 0.5
        assert of_class.mean() == pytest.approx(1, abs=6 * error)
        assert error < 0.03


def test_a_flow_can_be_undone_to_a_hundred_thousandth() -> None:
    flow = tiny_flow()
    images = torch.rand(64, 1, 4, 4)
    noise, _ = flow(images)
    assert noise.shape == (64, flow.num_features)
    assert (flow.inverse(noise) - images).abs().max() < 1e-5
    large = backbones.build("flow", in_chans=1, img_size=28, depth=4, hidden=16)
    images = torch.rand(16, 1, 28, 28)
    large.initialize(images)
    assert (large.inverse(large(images)[0]) - images).abs().max() < 1e-5
    again = torch.randn(4, 784)
    assert (large(large.inverse(0.5 * again))[0] - 0.5 * again).abs().max() < 1e-3  # logits near an edge


def test_a_flows_determinant_is_that_of_its_jacobian() -> None:
    flow, image = tiny_flow(), torch.rand(1, 1, 4, 4)
    noise, log_det = flow(image)
    torch.testing.assert_close(log_det[0], log_det_by_jacobian(flow, image), rtol=1e-4, atol=1e-4)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(noise).sum(1) + log_det
    torch.testing.assert_close(flow.log_density(image), density)
    torch.testing.assert_close(log_density(noise, log_det), density)


def test_a_flows_density_integrates_to_1() -> None:
    """The mean over images of 2x2 pixels drawn uniformly, within its own error."""
    torch.manual_seed(0)
    flow = backbones.build("flow", img_size=2, levels=1, depth=2, hidden=6)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    points = torch.rand(400_000, 1, 2, 2)
    with torch.no_grad():
        density = flow.log_density(points).double().exp()
    assert density.mean() == pytest.approx(1, abs=6 * float(density.std()) / len(points) ** 0.5)
    assert density.std() / len(points) ** 0.5 < 0.02


def test_a_flow_begins_with_every_scaled_channel_at_mean_0_and_variance_1() -> None:
    flow = backbones.build("flow", img_size=8, depth=1, hidden=4)
    images = torch.rand(200, 1, 8, 8) ** 2
    flow.initialize(images)
    y, _ = flow.levels[0][1](flow.levels[0][0](flow.logit(images)[0])[0])
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_pixels_lie_within_bounds_whatever_the_noise() -> None:
    flow = tiny_flow()
    images = flow.inverse(3 * torch.randn(32, 16))
    assert images.min() > -0.06
    assert images.max() < 1.06
    assert F.relu(images - 1).mean() < 0.06
