"""Networks in oneDNN's layout compute what they compute in torch's."""

import copy
import platform

import pytest
import torch
from torch import nn

from lab.device import resolve
from supervised.backbones import build
from supervised.backbones.blocked import Conv2d, use
from supervised.trainer import Trainer
from tests.supervised.test_training import objective_of, settings_of

CPU, META = torch.device("cpu"), torch.device("meta")
pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available(),
    reason="blocks are for x86 CPUs with oneDNN",
)
SMALL = {"in_chans": 3, "img_size": 16}
NETWORKS = {
    "projections": ("resnet8", {"width": 16}),
    "padded shortcuts": ("resnet20", {"width": 8}),
    "bottlenecks and pooling": ("resnet50", {"depths": (1, 1), "width": 8}),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same network twice: in torch's layout, and in blocks."""
    torch.manual_seed(0)
    backbone, spec = NETWORKS[name]
    plain = build(backbone, **SMALL, **spec).train()
    blocked = copy.deepcopy(plain)
    use(blocked, CPU)
    return plain, blocked


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_statistics_are_those_of_torchs_layout(name):
    plain, blocked = pair(name)
    images = torch.randn(6, 3, 16, 16)
    inputs = images.clone().requires_grad_(), images.clone().requires_grad_()
    outputs = plain(inputs[0]), blocked(inputs[1])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    pull = torch.randn_like(outputs[0])
    for output in outputs:
        (output * pull).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    for (key, one), other in zip(plain.named_parameters(), blocked.parameters(), strict=True):
        assert one.grad is not None
        scale = float(one.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * scale, msg=key)
    for (key, one), other in zip(plain.named_buffers(), blocked.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_bf16_it_is_as_close_to_fp32_as_torchs_layout(name):
    plain, blocked = pair(name)
    images = torch.randn(32, 3, 16, 16)
    exact = copy.deepcopy(plain)(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [
            float((net(images).detach().float() - exact).norm() / exact.norm()) for net in (plain, blocked)
        ]
    assert errors[1] < 0.03
    assert errors[1] < 1.5 * errors[0]


def test_evaluation_is_the_same_and_with_a_gradient_stays_possible():
    plain, blocked = pair("projections")
    images = torch.randn(6, 3, 16, 16)
    for net in (plain, blocked):
        net.eval()
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), blocked(images), rtol=1e-4, atol=1e-5)
    grads = []
    for net in (plain, blocked):
        wanted = images.clone().requires_grad_()
        net(wanted).square().sum().backward()
        grads.append(wanted.grad)
    torch.testing.assert_close(*grads)


def test_it_computes_in_blocks_where_it_should_and_nowhere_else():
    seen = []

    def layout(net: nn.Module, images: torch.Tensor) -> bool:
        first = next(module for module in net.modules() if isinstance(module, Conv2d))
        handle = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_mkldnn))
        net(images)
        handle.remove()
        return seen[-1]

    net = build("resnet8", **SMALL).train()
    images = torch.randn(2, 3, 16, 16)
    assert not layout(net, images), "not before the loop asks for it"
    use(net, CPU)
    assert layout(net, images)
    use(net, META)
    assert not layout(net, images)
    for norm in ("group", "frozen"):
        other = build("resnet8", **SMALL, norm=norm).train()
        use(other, CPU)
        assert not layout(other, images), f"torch has no {norm} norm in blocks"


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile imports it
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loop_asks_for_it_unless_it_compiles(compiled):
    values = {
        "objective": {"name": "classification"},
        "data": {"source": "digits", "limit": 40},
        "model": {"backbone": "resnet8", "spec": {"width": 8}},
        "batch_size": 8,
        "ema_decay": 0.9,
        "compile": compiled,
    }
    settings = settings_of(values)
    objective = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU), settings, resolve(settings.device))
    for module in (trainer.bare["model"], trainer.averages["model"].module):
        assert module.get_submodule("backbone").blocked == (not compiled)
