"""Convolutional networks in oneDNN's own memory layout, the one an x86 CPU computes them fastest in.

oneDNN, torch's library for CPUs, keeps channels in blocks of as many as a register holds. In that layout its
batch norm takes a quarter of the time of torch's own on channels_last, its ReLU and its sum a third, its
convolutions 0.8: a step of ResNet-8 in bf16 on 128 images of 28x28 takes 33.5 ms for 42.4, one of ResNet-20
90 for 121. Where a network has 64 channels and more, convolutions are nearly everything and little is gained.
Layers without batch norm gain nothing: LeNet-5 takes longer.
"""

import platform

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """A convolution of tensors in either layout."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_mkldnn:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return torch.ops.aten.mkldnn_convolution(
            input, self.weight.to(input.dtype), bias, self.padding, self.stride, self.dilation, self.groups
        )


class Blocked(nn.Module):
    """A network that can compute in blocks, from `enter` to `leave`. It does where `use` has been called."""

    can_be_blocked = True
    """Whether all its layers can; torch has batch norm in blocks, but no other norm."""
    blocked = False

    def enter(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) in blocks and autocast's number format, or else as it is."""
        with_gradient = torch.is_grad_enabled()
        if not self.blocked or (with_gradient and not self.training):  # torch has no backward pass for that
            return x
        if torch.is_autocast_enabled("cpu"):
            if torch.backends.cpu.get_cpu_capability() != "AVX512":  # oneDNN's batch norm in bf16 is for it
                return x
            x = x.to(torch.get_autocast_dtype("cpu"))
        return x.to_mkldnn()


def leave(x: Tensor) -> Tensor:
    """`x` in torch's layout."""
    return x.to_dense() if x.is_mkldnn else x


def use(net: nn.Module, device: torch.device) -> None:
    """Has the networks in `net` that can compute in blocks do so on an x86 CPU, and elsewhere not."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    here = device.type == "cpu" and x86 and torch.backends.mkldnn.is_available()
    for module in net.modules():
        if isinstance(module, Blocked):
            module.blocked = here and module.can_be_blocked
