"""Backbones for objectives: built for the data, begun from another run's weights, adapted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lab import checkpoint
from lab.checkpoint import Checkpoint
from lab.errors import LabError
from lab.run import Run
from supervised import backbones
from supervised.config import ModelConfig


def make_backbone(
    config: ModelConfig, fitting: Sequence[str], *, new_tokens: Sequence[int] = (), **of_data: Any
) -> tuple[nn.Module, list[dict[str, str]]]:
    """The backbone of a config, ready to learn.

    Args:
        fitting: the backbones that read what the objective has for them.
        new_tokens: ids that mean nothing to a pretrained backbone: beside adapters their embeddings learn.
        of_data: arguments that follow from the data; only those the backbone takes are passed on.

    Returns:
        The module, and the runs its weights come from, as run.json names them.

    Raises:
        LabError: no such or no fitting backbone, arguments it does not take, or `start_from` names no fitting
            run.
    """
    if config.backbone not in fitting:
        known = ", ".join(fitting[:8]) + (" and others of `lab list backbones`" if len(fitting) > 8 else "")
        raise LabError(
            f"model.backbone = {config.backbone!r}: does not read what there is here. Use one of {known}."
        )
    takes = backbones.arguments(config.backbone)
    refuse_what_follows(config.spec, of_data, "model.spec")
    backbone = backbones.build(
        config.backbone, **{key: value for key, value in of_data.items() if key in takes}, **config.spec
    )
    parents = [_start_from(backbone, Path(config.start_from))] if config.start_from else []
    if config.adapt == "probe":
        backbone.requires_grad_(False)
    elif config.adapt == "lora":
        _add_lora(backbone, config.lora_rank, new_tokens)
    return backbone, parents


def refuse_what_follows(spec: Mapping[str, Any], of_data: Mapping[str, Any], key: str) -> None:
    """Raises a `LabError` if the spec at a config's `key` has what follows from the data."""
    if given := sorted(spec.keys() & of_data.keys()):
        raise LabError(f"{key}.{given[0]}: follows from the data. Leave it out.")


def _start_from(backbone: nn.Module, folder: Path) -> dict[str, str]:
    """Gives the backbone a run's best weights; returns what run.json says of that run."""
    run = Run.named_by("model.start_from", folder)
    saved = checkpoint.load(run.find_checkpoint("best"))
    return load_backbone(backbone, run, saved, f"model.start_from = {folder}")


def load_backbone(backbone: nn.Module, run: Run, saved: Checkpoint, where: str) -> dict[str, str]:
    """Gives a backbone the weights of a run's; `where` begins what is said if they do not fit.

    Returns:
        What run.json says of that run.

    Raises:
        LabError: the run's backbone is another one.
    """
    mark = ".backbone."
    weights = {key.partition(mark)[2]: value for key, value in saved.tensors("model").items() if mark in key}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise LabError(
            f"{where}: its backbone is another one ({first}). Use the same backbone and spec, and data of "
            "the same shape."
        ) from None
    return {"run_id": run.info["id"], "stage": "pretraining", "sha256": checkpoint.weights_hash(saved.path)}


def _add_lora(backbone: nn.Module, rank: int, new_tokens: Sequence[int]) -> None:
    """Freezes the backbone and puts adapters beside its linear layers (arXiv 2106.09685, section 4), and for
    new tokens rows beside its embedding (Radford et al. 2018, section 3.2: delimiters are learned)."""
    from peft import LoraConfig, TrainableTokensConfig, inject_adapter_in_model

    targets = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise LabError("model.adapt = 'lora': this backbone has no linear layers. Use full or probe.")
    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), backbone)
    if new_tokens:
        del backbone.peft_config  # or the next injection takes the first for a mistake
        rows = TrainableTokensConfig(target_modules=["tokens"], token_indices=list(new_tokens))
        inject_adapter_in_model(rows, backbone)
