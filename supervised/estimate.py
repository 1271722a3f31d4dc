"""What a model costs before it is built: parameters, memory, training FLOPs, GPU time and price.

Models are built on the `meta` device, where a tensor is a shape, so that the counts are those of the code
that would be trained. All else is arithmetic on assumptions that the answer repeats.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab.errors import LabError, did_you_mean, first_line
from supervised import backbones
from supervised.backbones import encoder_decoder, transformer
from supervised.backbones.drqn import DRQN
from supervised.backbones.mlp import image_size
from supervised.classifier import Classifier

BYTES = {"fp32": (4, 16), "bf16": (2, 8), "mixed": (2, 16), "int8": (1, None)}
"""Bytes per parameter: to hold it, and to train it with AdamW, which is a weight, a gradient and two moments.
"mixed" is a bf16 weight and gradient beside an fp32 weight and moments (arXiv 1910.02054, section 3.1); what
layers keep for the backward pass comes on top, and depends on the batch."""

TOKENS_PER_PARAMETER = 20
"""What is optimal for a given compute (arXiv 2203.15556, table 3)."""
IMAGENET_IMAGES = 90 * 1_281_167
"""The customary 90 epochs of ImageNet-1k."""
UTILISATION = 0.4
"""Share of a GPU's peak that training reaches: 0.46 of PaLM's (arXiv 2204.02311, section 4.1) is among the
best published."""


@dataclass(frozen=True)
class GPU:
    """What is assumed of a GPU; prices are US dollars per hour."""

    tflops: float
    """Peak of dense bf16 (V100: fp16) products with fp32 sums, by the vendor's data sheet."""
    memory_gb: int
    price: float
    note: str
    utilisation: float = UTILISATION


ON_DEMAND = "price: on-demand order of magnitude, 2025"
GPUS = {
    "H100": GPU(989, 80, 3.0, f"SXM; {ON_DEMAND}"),
    "A100": GPU(312, 80, 1.8, f"SXM; {ON_DEMAND}"),
    "V100": GPU(125, 32, 0.55, f"tensor cores; {ON_DEMAND}"),
    "RTX4090": GPU(165, 24, 0.5, ON_DEMAND),
    "V100-2020": GPU(
        28, 32, 1.5, "fp16 peak without tensor cores, all of it; Lambda's estimate, June 2020", 1.0
    ),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as published."""

    spec: dict[str, Any]
    backbone: str = "gpt"
    samples: float | None = None
    """Tokens or images it was trained on."""
    source: str = ""
    """Where `samples` was published."""
    classes: int | None = None
    """Outputs of its head; None: it has none."""
    untied_head: bool = False
    """Whether the output layer has a matrix of its own; else it shares the embeddings'."""
    also: str = ""
    """What others published of its cost."""


def _gpt(n_layer: int, width: int, n_head: int, **options: Any) -> dict[str, Any]:
    return {**transformer.GPT2_OPTIONS, "n_layer": n_layer, "width": width, "n_head": n_head, **options}


def _gpt3(n_layer: int, width: int, n_head: int, also: str = "") -> Published:
    # The sparse half of GPT-3's attention has the same parameters.
    spec = _gpt(n_layer, width, n_head, max_positions=2048)
    return Published(spec=spec, samples=300e9, source="arXiv 2005.14165, table 2.1", also=also)


def _llama(n_layer: int, width: int, n_head: int, mlp_width: int, tokens: float, **options: Any) -> Published:
    shape = {
        "vocab_size": 32_000,
        "n_layer": n_layer,
        "width": width,
        "n_head": n_head,
        "mlp_width": mlp_width,
    }
    source = "arXiv 2307.09288, table 1" if "n_kv_head" in options else "arXiv 2302.13971, table 2"
    return Published(spec={**shape, **options}, samples=tokens, source=source, untied_head=True)


def _lenet(name: str, size: int) -> Published:
    return Published(
        backbone=name,
        spec={"in_chans": 1, "img_size": size},
        classes=10,
        samples=20 * 60_000,
        source="20 passes through MNIST, LeCun et al. 1998, section III.B",
    )


def _cifar(name: str) -> Published:
    return Published(
        backbone=name,
        spec={"in_chans": 3, "img_size": 32},
        classes=10,
        samples=64_000 * 128,
        source="64,000 steps of 128 images, arXiv 1512.03385, section 4.2",
    )


PUBLISHED = {
    "gpt1": Published(spec=_gpt(12, 768, 12, vocab_size=40_478, max_positions=512, norm_position="post")),
    **{name: Published(spec=spec) for name, spec in transformer.PRESETS.items()},
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),  # the paper's 24 heads of 128 would be wider than the model
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),  # the paper's 5140 is not 40 heads of 128
    "gpt3-175b": _gpt3(
        96,
        12_288,
        96,
        also="3.14e23 FLOPs (arXiv 2005.14165, table D.1); 355 V100-years and $4.6M (Lambda, June 2020)",
    ),
    "bloom-176b": Published(
        spec=_gpt(70, 14_336, 112, vocab_size=250_880, positions="alibi", embedding_norm=True),
        samples=366e9,
        source="arXiv 2211.05100, table 3",
    ),
    "llama-7b": _llama(32, 4096, 32, 11_008, 1.0e12),
    "llama-13b": _llama(40, 5120, 40, 13_824, 1.0e12),
    "llama-65b": _llama(80, 8192, 64, 22_016, 1.4e12),
    "llama2-70b": _llama(80, 8192, 64, 28_672, 2.0e12, n_kv_head=8),
    "ddpm-cifar10": Published(
        backbone="ddpm_cifar10",
        spec={},
        samples=800_000 * 128,
        source="800,000 steps of 128 images, arXiv 2006.11239, appendix B",
    ),
    "transformer-base": Published(
        backbone="transformer",
        spec=encoder_decoder.PRESETS["transformer-base"],
        samples=100_000 * 25_000,
        source="100,000 steps of 25,000 target tokens, arXiv 1706.03762, section 5",
    ),
    "transformer-big": Published(
        backbone="transformer",
        spec=encoder_decoder.PRESETS["transformer-big"],
        samples=300_000 * 25_000,
        source="300,000 steps of 25,000 target tokens, arXiv 1706.03762, section 5",
    ),
    **{name: _lenet(name, size) for name, size in (("lenet1", 28), ("lenet4", 32), ("lenet5", 32))},
    **{f"resnet{n}": _cifar(f"resnet{n}") for n in (8, 20, 32, 44, 56, 110)},
    "nature_cnn": Published(backbone="nature_cnn", spec={"in_chans": 4, "img_size": 84}),
    "impala_cnn": Published(backbone="impala_cnn", spec={"in_chans": 4, "img_size": 84}),
    "drqn": Published(backbone="drqn", spec={"in_chans": 1, "img_size": 84}),
}


def estimate(
    model: str,
    spec: Mapping[str, Any] | None = None,
    *,
    samples: float | None = None,
    classes: int | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    utilisation: float | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """What `lab estimate` prints, as JSON values.

    Args:
        model: a name of `PUBLISHED` or of the registry of backbones.
        spec: options of the backbone, laid over the published ones.
        samples: tokens, images or else inputs (of a recurrent network: time steps) to train on.
        classes: outputs of a classifier's head; None: as published, else 1000 for an image model.
        gpu: one of `GPUS`; None: all.
        gpus: how many of them share the work.
        utilisation: share of the peak reached, in place of what is assumed.
        price: US dollars per hour of one GPU, in place of what is assumed.

    Raises:
        LabError: an unknown model, option or GPU, or a combination that cannot be.
    """
    known = [*PUBLISHED, *backbones.names()]
    if model not in known:
        raise LabError(
            f"command line: no model {model!r}.{did_you_mean(model, known)} Known: {', '.join(known)}."
        )
    if gpu is not None and gpu not in GPUS:
        raise LabError(f"command line: no GPU {gpu!r}.{did_you_mean(gpu, GPUS)} Known: {', '.join(GPUS)}.")
    published = PUBLISHED.get(model) or Published(backbone=model, spec={})
    spec, takes = spec or {}, backbones.arguments(published.backbone)
    unit = "image" if "in_chans" in takes and "in_features" not in spec else "input"
    unit = "token" if "vocab_size" in takes else unit
    generates = published.backbone in backbones.GENERATIVE
    if classes is not None and (unit == "token" or "memory" in takes or generates):
        raise LabError(f"command line: --classes is for classifiers, not for {model}. Leave it out.")

    spec = {**published.spec, **backbones.typed(published.backbone, spec)}
    if unit == "image":
        if model not in PUBLISHED and not generates:
            source = "90 epochs of ImageNet-1k"
            published = replace(published, classes=1000, samples=float(IMAGENET_IMAGES), source=source)
        classes = published.classes if classes is None else classes
        shape = {"in_chans": 3, "img_size": 224}
        spec = {key: _whole_default(takes[key], value) for key, value in shape.items() if key in takes} | spec
    required = [key for key, argument in takes.items() if argument.default is argument.empty]
    if lacking := [key for key in required if key not in spec]:
        raise LabError(f"command line: {model} needs --{lacking[0]}=VALUE. It takes {', '.join(takes)}.")
    net = _build(model, published, spec, classes)
    n_parameters = sum(parameter.numel() for parameter in net.parameters())

    if unit == "image":
        # A backward pass is two forward passes: for the weights' gradients and for the inputs'.
        flops_each, formula = 3 * _forward_flops(model, net, spec), "3 x forward, counted"
    else:
        flops_each, formula = 6 * n_parameters, "6 N"
    assumed, source = published.samples, published.source
    if assumed is None and unit == "token":
        assumed = float(TOKENS_PER_PARAMETER * n_parameters)
        source = f"{TOKENS_PER_PARAMETER} a parameter, arXiv 2203.15556"
    if samples is not None:
        assumed, source = samples, "as given"

    result: dict[str, Any] = {
        "model": model,
        "backbone": published.backbone,
        "spec": spec,
        "parameters": n_parameters,
        "memory_bytes": {
            name: {"hold": hold * n_parameters, "train": train and train * n_parameters}
            for name, (hold, train) in BYTES.items()
        },
        "training_flops_each": {"unit": unit, "formula": formula, "flops": flops_each},
        "published": published.also,
    }
    if assumed is not None:
        flops = flops_each * assumed
        chosen = {gpu: GPUS[gpu]} if gpu is not None else GPUS
        result["training"] = {"samples": assumed, "source": source, "flops": flops, "gpus": gpus}
        result["on"] = {
            name: {
                "gpus_to_train": math.ceil(BYTES["mixed"][1] * n_parameters / (one.memory_gb * 1e9)),
                **_cost(flops, gpus, one, utilisation, price),
            }
            for name, one in chosen.items()
        }
    return result


def _cost(
    flops: float, gpus: int, gpu: GPU, utilisation: float | None, price: float | None
) -> dict[str, Any]:
    utilisation = gpu.utilisation if utilisation is None else utilisation
    price = gpu.price if price is None else price
    gpu_hours = flops / (gpu.tflops * 1e12 * utilisation) / 3600
    return {
        "tflops": gpu.tflops,
        "memory_gb": gpu.memory_gb,
        "utilisation": utilisation,
        "price_per_hour": price,
        "gpu_hours": gpu_hours,
        "hours": gpu_hours / gpus,
        "dollars": gpu_hours * price,
        "note": gpu.note,
    }


def _build(model: str, published: Published, spec: Mapping[str, Any], classes: int | None) -> nn.Module:
    """The backbone and the output layer that goes with it, without memory."""
    try:
        with torch.device("meta"):
            body = backbones.build(published.backbone, **spec)
            if classes is not None:
                return Classifier(body, classes)
            if published.untied_head:
                return nn.Sequential(body, nn.Linear(body.num_features, spec["vocab_size"], bias=False))
            return body
    except (RuntimeError, OverflowError, TypeError) as error:
        raise LabError(f"{model}: cannot be counted: {first_line(error)}. Use smaller numbers.") from None


def _forward_flops(model: str, net: nn.Module, spec: Mapping[str, Any]) -> int:
    """FLOPs of one image in training, a product and its sum being two."""
    counter, example = FlopCounterMode(display=False), getattr(net, "example", None)
    try:
        if example is not None:
            inputs = example()
        else:
            inputs = (torch.empty(1, spec["in_chans"], *image_size(spec["img_size"]), device="meta"),)
        with torch.no_grad(), counter:
            if isinstance(net, Classifier):
                net.eval()(*inputs, with_aux=True)
            else:
                net.eval()(*((images[None] for images in inputs) if isinstance(net, DRQN) else inputs))
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        what = f"image of img_size {list(image_size(spec['img_size']))}" if "img_size" in spec else "example"
        raise LabError(f"{model}: takes no {what}: {first_line(error)}.") from None
    return counter.get_total_flops()


def _whole_default(argument: inspect.Parameter, otherwise: int) -> int:
    """A backbone's own default, where it has one."""
    return argument.default if isinstance(argument.default, int) else otherwise


def describe(result: Mapping[str, Any]) -> str:
    """The result of `estimate` for people."""
    options = ", ".join(f"{key}={value}" for key, value in result["spec"].items())
    each = result["training_flops_each"]
    lines = [
        f"{result['model']}: {result['backbone']}({options})",
        f"parameters: {result['parameters']:,}",
        "",
        f"{'memory':<10} {'hold':>10} {'train with AdamW':>18}  (without activations)",
    ]
    for name, memory in result["memory_bytes"].items():
        train = "-" if memory["train"] is None else _bytes(memory["train"])
        lines.append(f"{name:<10} {_bytes(memory['hold']):>10} {train:>18}")
    if "training" not in result:
        lines += ["", f"training: {each['flops']:.3g} FLOPs per {each['unit']} ({each['formula']})"]
        return "\n".join([*lines, "Give --samples for time and price."])
    training, unit = result["training"], each["unit"]
    lines += [
        "",
        f"training: {training['flops']:.3g} FLOPs = {each['flops']:.3g} per {unit} ({each['formula']}) "
        f"x {training['samples']:.3g} {unit}s ({training['source']})",
    ]
    if result["published"]:
        lines.append(f"published: {result['published']}")
    gpus = training["gpus"]
    on = "on one" if gpus == 1 else f"on {gpus}"
    lines += [
        "",
        f"{'GPU':<10} {'TFLOPS':>6} {'used':>5} {'$/h':>5} {on:>14} {'price':>11} {'at least':>8}  assumed",
    ]
    for name, cost in result["on"].items():
        assumed = f"{cost['tflops']:>6g} {cost['utilisation']:>5.0%} {cost['price_per_hour']:>5.2f}"
        answer = f"{_time(cost['hours']):>14} {_dollars(cost['dollars']):>11} {cost['gpus_to_train']:>8}"
        lines.append(f"{name:<10} {assumed} {answer}  {cost['note']}")
    lines.append("at least: so many of them have the memory to train it (mixed), without activations")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    unit = next((unit for unit in (1e9, 1e6) if count >= unit), 1e3)
    return f"{count / unit:,.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'})[unit]}"


def _time(hours: float) -> str:
    for unit, length in (("years", 24 * 365), ("days", 24), ("hours", 1)):
        if hours >= length:
            return f"{hours / length:,.1f} {unit}"
    return f"{hours * 60:.1f} minutes"


def _dollars(amount: float) -> str:
    if amount >= 1e6:
        return f"${amount / 1e6:,.2f}M"
    return f"${amount:,.0f}" if amount >= 1000 else f"${amount:,.2f}"
