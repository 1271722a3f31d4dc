"""Policy, reference, reward model and critic over one base model: each role is an adapter, two have a head.

Full fine-tuning keeps four models in memory. With LoRA the weights they share are there once: the reference
is the base with its adapters off, the policy, the reward model and the critic switch theirs on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import LabError
from lab.hub import from_pretrained
from rlhf.heads import read_any_format


class AdapterClassifier(nn.Module):
    """A sequence classifier made of an adapter on another model's weights and a `score` layer of its own.

    It has what the scorer and the critic ask of a transformers sequence classifier: `config`, `base_model`
    and `score`.

    Args:
        owner: the PEFT model whose base is shared; gets an adapter `name`.
        name: of the adapter.
        folder: a reward model's folder whose `adapter/` was trained on that very base.

    Raises:
        LabError: there is no adapter in the folder, or it does not fit.
    """

    def __init__(self, owner: Any, name: str, folder: Path) -> None:
        super().__init__()
        from peft import LoraConfig, set_peft_model_state_dict
        from peft.utils import load_peft_weights

        if not (folder / "adapter" / "adapter_config.json").exists():
            raise LabError(
                f"{folder}: has no adapter/, so it was not trained with LoRA and cannot share the policy's "
                "weights. Train it again with model.lora_rank above 0."
            )
        settings: Any = LoraConfig.from_pretrained(str(folder / "adapter"))
        settings.modules_to_save, settings.task_type, settings.inference_mode = None, None, False
        weights = load_peft_weights(str(folder / "adapter"), device="cpu")
        head = [key for key in weights if key.endswith("score.weight")]
        if len(head) != 1:
            raise LabError(f"{folder / 'adapter'}: holds no score layer. Train it again.")
        adapter = {key: value for key, value in weights.items() if key not in head}
        try:
            with keeping_what_is_trained(owner):
                owner.add_adapter(name, settings)
            fitted = set_peft_model_state_dict(owner, adapter, adapter_name=name)
            if fitted.unexpected_keys:
                raise ValueError(fitted.unexpected_keys[0])
        except (RuntimeError, ValueError) as error:  # other shapes, other modules
            raise LabError(
                f"{folder / 'adapter'}: does not fit the policy: {str(error).splitlines()[-1].strip()}. "
                "Train both stages from one model."
            ) from None
        from transformers import AutoConfig

        self.config = from_pretrained(AutoConfig, folder)
        self.score = nn.Linear(weights[head[0]].shape[1], 1, bias=False)
        read_any_format(self.score)
        with torch.no_grad():
            self.score.weight.copy_(weights[head[0]])
        # In a tuple, so that the shared model is no part of this one's state.
        self._owner, self._name = (owner,), name

    def base_model(self, **inputs: Any) -> Any:
        """The shared base's hidden states with this adapter on."""
        (owner,) = self._owner
        with active_adapter(owner, self._name):
            return owner.get_base_model().base_model(**inputs)

    def own_parameters(self) -> dict[str, Tensor]:
        """The adapter's and the head's, by name."""
        (owner,) = self._owner
        mark = f".{self._name}."
        adapter = {name: p for name, p in owner.named_parameters() if mark in name}
        return adapter | {"score.weight": self.score.weight}

    def set_trainable(self, trainable: bool) -> None:
        """Whether gradients are computed for the adapter and the head."""
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(trainable)


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a critic by name: an adapter's and its head's, or a whole model's."""
    return model.own_parameters() if isinstance(model, AdapterClassifier) else dict(model.named_parameters())


@contextmanager
def active_adapter(model: Any, name: str) -> Iterator[None]:
    """Switches `model` to one adapter; unlike PEFT's own switch it leaves alone which weights are trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [name], False
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def keeping_what_is_trained(model: Any) -> Iterator[None]:
    """Keeps which parameters are trained as it is while PEFT adds, loads or switches adapters."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
