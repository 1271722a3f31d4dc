"""Backbones for objectives: built for the data, begun from another run's weights, adapted."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab import checkpoint
from lab.checkpoint import Checkpoint
from lab.errors import LabError
from lab.memory import require_memory
from lab.run import Run
from supervised import backbones
from supervised.config import ModelConfig
from supervised.data import tokenizers
from supervised.data.tokenizers import SubwordTokenizer

ONLY_WHILE_LEARNING = {"dropout", "aux_dropout", "stochastic_depth", "layer_scale", "zero_init_residual"}
"""Arguments of backbones that their weights mean the same without."""
OF_DATA = ("in_features", "in_chans", "img_size", "vocab_size", "max_positions")
"""Arguments of backbones that follow from the data, whatever a backbone takes."""
FOLLOWS_FROM = {"tokens": "data.tokenizer and data.vocab_size", "positions": "data.context"}
"""The settings that decide the shapes of layers."""


def make_backbone(
    config: ModelConfig,
    fitting: Sequence[str],
    *,
    tokenizer: SubwordTokenizer | None = None,
    new_tokens: Sequence[int] = (),
    **of_data: Any,
) -> tuple[nn.Module, list[dict[str, str]]]:
    """The backbone of a config, ready to learn.

    Args:
        fitting: the backbones that read what the objective has for them.
        tokenizer: of texts: a run to start from must have had it.
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
    refuse_what_follows(config.spec, {*OF_DATA, *of_data}, "model.spec")
    spec = {**{key: value for key, value in of_data.items() if key in takes}, **config.spec}
    _require_memory(config, spec)
    backbone = backbones.build(config.backbone, **spec)
    parents = [_start_from(backbone, config, tokenizer)] if config.start_from else []
    if config.adapt == "probe":
        backbone.requires_grad_(False)
    elif config.adapt == "lora":
        _add_lora(backbone, config.lora_rank, new_tokens)
    return backbone, parents


def _require_memory(config: ModelConfig, spec: Mapping[str, Any]) -> None:
    """Raises a `LabError` unless there is room to train such a backbone: where memory is promised before it
    is there, one too large is killed without a word."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        n = sum(p.numel() for p in backbones.build(config.backbone, **spec).parameters())
    each = 16 if config.adapt == "full" else 4  # a weight, its gradient and two averages
    require_memory(
        each * n, f"model.backbone = {config.backbone!r}: {n:,} parameters take", "Use a smaller model.spec."
    )


def refuse_what_follows(spec: Mapping[str, Any], of_data: Collection[str], key: str) -> None:
    """Raises a `LabError` if the spec at a config's `key` has what follows from the data."""
    if given := sorted(spec.keys() & set(of_data)):
        raise LabError(f"{key}.{given[0]}: follows from the data. Leave it out.")


def token_weights(backbone: Any) -> Tensor:
    """The embeddings (vocab_size, width) of a backbone's tokens, with the rows that learn beside adapters."""
    tokens = backbone.tokens
    plain = isinstance(tokens, nn.Embedding)
    return tokens.weight if plain else tokens.get_merged_weights(tokens.active_adapters)


def _start_from(
    backbone: nn.Module, config: ModelConfig, tokenizer: SubwordTokenizer | None
) -> dict[str, str]:
    """Gives the backbone a run's best weights; returns what run.json says of that run."""
    folder = Path(config.start_from or "")
    run, where = Run.named_by("model.start_from", folder), f"model.start_from = {folder}"
    _require_same_meaning(run, config, tokenizer, where)
    saved = checkpoint.load(run.find_checkpoint("best"))
    return load_backbone(backbone, run, saved, where)


def _require_same_meaning(
    run: Run, config: ModelConfig, tokenizer: SubwordTokenizer | None, where: str
) -> None:
    """Raises a `LabError` if a run's weights, though they may fit, mean another thing here: no shape tells
    how many heads there are, nor which text a token stands for."""
    theirs = {"backbone": config.backbone, "spec": config.spec, **run.info["config"].get("model", {})}
    if theirs["backbone"] != config.backbone:
        raise _another(where, f"{theirs['backbone']}, here {config.backbone}")
    for key, argument in backbones.arguments(config.backbone).items():
        there, here = (spec.get(key, argument.default) for spec in (theirs["spec"], config.spec))
        there, here = (list(v) if isinstance(v, tuple) else v for v in (there, here))
        # What is None follows from the rest, and is a matter of shapes.
        if there != here and None not in (there, here) and key not in ONLY_WHILE_LEARNING:
            raise _another(where, f"{key} = {there}, here {here}")
    if tokenizer is not None and (run.folder / tokenizers.FILES[0]).is_file():
        kept = tokenizers.from_folder(run.folder)
        if kept.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise LabError(
                f"{where}: its {kept.vocab_size:,} tokens are not the {tokenizer.vocab_size:,} of "
                f"data.tokenizer (and data.vocab_size). Set data.tokenizer = {run.folder}."
            )


def _another(where: str, why: str, remedy: str = "the same backbone and spec") -> LabError:
    return LabError(f"{where}: its backbone is another one ({why}). Use {remedy}.")


def load_backbone(backbone: nn.Module, run: Run, saved: Checkpoint, where: str) -> dict[str, str]:
    """Gives a backbone the weights of a run's; `where` begins what is said if they do not fit.

    Returns:
        What run.json says of that run.

    Raises:
        LabError: the run's backbone is another one, or has adapters.
    """
    every = saved.weights()
    # A discriminator has a backbone, too, and so has what a generator began with.
    player = "model" if any(key.startswith("model.") for key in every) else "generator"
    prefix = f"{player}.backbone."
    weights = {key.removeprefix(prefix): value for key, value in every.items() if key.startswith(prefix)}
    if any(".lora_" in key for key in weights):
        begun = run.info["config"].get("model", {}).get("start_from") or "one with model.adapt = full"
        raise LabError(f"{where}: it holds adapters beside frozen weights. Start from {begun} instead.")
    mine = backbone.state_dict()
    for key in {**mine, **weights}:
        there, here = (
            (" x ".join(map(str, tensors[key].shape)) or "1") if key in tensors else "missing"
            for tensors in (weights, mine)
        )
        if there != here:
            layer = key.removesuffix(".weight").rpartition(".")[2]
            of_data = FOLLOWS_FROM.get(layer, "data of the same shape")
            raise _another(
                where, f"{key} is {there}, here {here}", f"the same backbone and spec, and {of_data}"
            )
    backbone.load_state_dict(weights)
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
