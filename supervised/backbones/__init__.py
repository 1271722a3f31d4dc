"""The registry of backbones: `build(name, ...)` makes a plain module by name.

A backbone knows nothing of tasks, environments or trainers. It maps its input to `num_features` features
a sample, and its `spec` (JSON) together with its `name` rebuilds it. It never normalises pixels: images
come in as floats, channels first. One that also takes them as bytes, where 255 means 1.0, says so by an
attribute `takes_bytes`.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Protocol, get_args, get_origin, runtime_checkable

from lab.errors import LabError, did_you_mean, first_line

# name -> module and class; the module is imported when the backbone is built, so that listing is free. A name
# that stands for settings of a class has them in the module's table PRESETS.
_REGISTRY = {
    "mlp": ("supervised.backbones.mlp", "MLP"),
    "nature_cnn": ("supervised.backbones.cnn", "NatureCNN"),
    "impala_cnn": ("supervised.backbones.cnn", "ImpalaCNN"),
    **{f"lenet{n}": ("supervised.backbones.plain", "LeNet") for n in (1, 4, 5)},
    "alexnet": ("supervised.backbones.plain", "AlexNet"),
    **{
        f"vgg{n}{suffix}": ("supervised.backbones.plain", "VGG")
        for n in (11, 13, 16, 19)
        for suffix in ("", "_bn")
    },
    "googlenet": ("supervised.backbones.inception", "GoogLeNet"),
    "googlenet_bn": ("supervised.backbones.inception", "GoogLeNet"),
    "inception_bn": ("supervised.backbones.inception", "InceptionBN"),
    "inception_v3": ("supervised.backbones.inception", "InceptionV3"),
    **{
        f"resnet{n}": ("supervised.backbones.resnet", "ResNet")
        for n in (8, 18, 20, 32, 34, 44, 50, 56, 101, 110, 152)
    },
    **{
        f"convnext_{size}": ("supervised.backbones.convnext", "ConvNeXt")
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
    **{f"vit_{size}": ("supervised.backbones.vit", "ViT") for size in ("tiny", "small", "base", "large")},
    "gpt": ("supervised.backbones.transformer", "LabGPT"),
    "transformer": ("supervised.backbones.encoder_decoder", "Transformer"),
    "transformer_encoder": ("supervised.backbones.encoder_decoder", "TransformerEncoder"),
    "transformer_decoder": ("supervised.backbones.encoder_decoder", "TransformerDecoder"),
    "rnn": ("supervised.backbones.recurrent", "RNN"),
    "lstm": ("supervised.backbones.recurrent", "LSTM"),
    "gru": ("supervised.backbones.recurrent", "GRU"),
    "drqn": ("supervised.backbones.drqn", "DRQN"),
    "seq2seq": ("supervised.backbones.seq2seq", "Seq2Seq"),
    **dict.fromkeys(("unet", "ddpm_cifar10", "ddpm_256"), ("supervised.backbones.diffusion", "UNet")),
    "diffusion_mlp": ("supervised.backbones.diffusion", "DiffusionMLP"),
    "dcgan_generator": ("supervised.backbones.gan", "DCGANGenerator"),
    "dcgan_discriminator": ("supervised.backbones.gan", "DCGANDiscriminator"),
    "srresnet": ("supervised.backbones.gan", "SRResNet"),
    "srgan_discriminator": ("supervised.backbones.gan", "SRGANDiscriminator"),
    "vae": ("supervised.backbones.vae", "VAE"),
    "flow": ("supervised.backbones.flow", "Flow"),
}


RECURRENT = ("rnn", "lstm", "gru")
"""Those that read steps of features, one after the other, and remember."""
CAUSAL = ("gpt", "transformer_decoder")
"""Those that read tokens, each of which sees none behind it."""
TRANSLATORS = ("transformer", "seq2seq")
"""Those that read one sequence of tokens beside another."""
DENOISERS = ("unet", "ddpm_cifar10", "ddpm_256", "diffusion_mlp")
"""Those that read noisy samples and times, and answer in the samples' shape."""
CRITICS = ("dcgan_discriminator", "srgan_discriminator")
"""Those that tell one number of an image: how real it looks."""
GENERATIVE = (*DENOISERS, *CRITICS, "dcgan_generator", "srresnet", "vae", "flow")
"""Those that make samples, and their opponents: their `example()` is what they take, of one sample."""
_NOT_FOR_IMAGES = ("mlp", "transformer_encoder", "drqn", *RECURRENT, *CAUSAL, *TRANSLATORS, *GENERATIVE)


@runtime_checkable
class Backbone(Protocol):
    """What every backbone offers beside being a `torch.nn.Module`."""

    num_features: int
    spec: dict[str, Any]


def names() -> list[str]:
    """The names `build` knows."""
    return sorted(_REGISTRY)


def image_names() -> list[str]:
    """Those that take images (batch, in_chans, height, width)."""
    return [name for name in names() if name not in _NOT_FOR_IMAGES]


def arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """What the backbone `name` takes, by name, with its defaults.

    Raises:
        LabError: there is no such backbone.
    """
    cls, preset = _find(name)
    return {
        key: argument.replace(default=preset.get(key, argument.default))
        for key, argument in inspect.signature(cls).parameters.items()
    }


DEPTHS = {"n_layer", "n_decoder_layer", "depth", "depths", "n_res", "levels", "prior_depth"}
MOST_LAYERS = 10_000


def build(name: str, **spec: Any) -> Any:
    """Builds the backbone `name`, a `torch.nn.Module` that satisfies `Backbone`.

    Args:
        name: one of `names()`.
        spec: the backbone's own arguments, e.g. in_chans=4, img_size=(84, 84).

    Raises:
        LabError: unknown name, or an argument the backbone does not take or cannot use.
    """
    cls, preset = _find(name)
    spec = typed(name, spec)
    for key in DEPTHS & spec.keys():  # more would be built, layer by layer, until the memory is full
        numbers = spec[key] if isinstance(spec[key], list | tuple) else [spec[key]]
        if max((n for n in numbers if isinstance(n, int)), default=0) > MOST_LAYERS:
            raise LabError(
                f"backbone {name}: {key} {spec[key]} is above {MOST_LAYERS:,}. Use a smaller number."
            )
    try:
        backbone = cls(**{**preset, **spec})
    except (TypeError, ValueError) as error:
        raise LabError(f"backbone {name}: {first_line(error)}") from None
    except (RuntimeError, OverflowError) as error:  # torch's words for what no memory can hold
        raise LabError(
            f"backbone {name}: cannot be built: {first_line(error)}. Use smaller numbers."
        ) from None
    backbone.spec = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
    return backbone


def typed(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the backbone `name` wants them: 5e4 may be an integer, but a word may not.

    Raises:
        LabError: the backbone does not take one, or not of this type.
    """
    takes, right = inspect.signature(_find(name)[0]).parameters, dict(spec)
    for key, value in spec.items():
        if key not in takes:
            raise LabError(
                f"backbone {name}: unknown argument {key!r}.{did_you_mean(key, takes)} "
                f"It takes {', '.join(takes)}."
            )
        hint = takes[key].annotation
        if isinstance(value, float) and value.is_integer() and not _is(value, hint):
            value = right[key] = int(value)
        elif isinstance(value, int) and _is(value, float) and _is(0.5, hint):
            value = right[key] = float(value)
        if not _is(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            for word, plain in (("collections.abc.", ""), ("typing.", ""), ("Sequence", "list")):
                wanted = wanted.replace(word, plain)
            raise LabError(f"backbone {name}: {key} = {value!r} is not valid. Expected {wanted}.")
    return right


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as the annotations of backbones go."""
    if hint in (Any, None, type(None)):
        return hint is Any or value is None
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_is(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if not isinstance(hint, type):  # a union
        return any(_is(value, option) for option in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))


def _find(name: str) -> tuple[type, Mapping[str, Any]]:
    """The class that `name` stands for, and the settings of it."""
    if name not in _REGISTRY:
        raise LabError(
            f"unknown backbone {name!r}.{did_you_mean(name, names())} `lab list backbones` shows them all."
        )
    path, cls = _REGISTRY[name]
    module = importlib.import_module(path)
    return getattr(module, cls), getattr(module, "PRESETS", {}).get(name, {})
