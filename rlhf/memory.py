"""What a stage takes of a device's memory, and how many answers can be sampled at once in what it has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import lab.memory
from rlhf.config import RLHFRun, TrainingConfig

AT_MOST = 4096
"""Rows at once where memory would take any number."""
SHARE = 0.5
"""Of the memory found free, for sampling: what allocators lose and other processes take comes from the
rest."""


def bytes_per_row(config: Any, n_tokens: int, cache_bytes: int) -> int:
    """Memory of one row of `n_tokens` while it is sampled: its cache, and the largest of what is computed of
    it.

    The cache is reckoned as keys and values in every layer; windows and states take less.

    Args:
        config: of a transformers model.
        n_tokens: of prompt and answer.
        cache_bytes: a number in the cache takes.
    """
    size = _Size.of(config)
    cache = 2 * size.keys * n_tokens * cache_bytes
    logits = 5 * 4 * size.vocabulary  # fp32: as they come, scaled, their softmax and its sum, a comparison
    reading = n_tokens * (8 * size.width + 3 * size.inner) * 4  # one layer of the prompt
    return cache + logits + reading


@dataclass(frozen=True)
class _Size:
    """The numbers of a model's configuration that its memory follows from."""

    layers: int
    width: int
    inner: int
    """Of the widest layer."""
    keys: int
    """Of a token, in all layers: as many numbers as there are values."""
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "_Size":
        text = config.get_text_config()
        width = int(text.hidden_size)
        layers = list(getattr(text, "per_layer_config", [text] * int(text.num_hidden_layers)))
        return cls(
            layers=len(layers),
            width=width,
            inner=max(_inner_width(layer, width) for layer in layers),
            keys=sum(_key_width(layer, width) for layer in layers),
            vocabulary=int(text.vocab_size),
        )


def _inner_width(layer: Any, width: int) -> int:
    inner = getattr(layer, "intermediate_size", None) or 4 * width
    return max(inner) if isinstance(inner, list | tuple) else int(inner)


def _key_width(layer: Any, width: int) -> int:
    heads = int(getattr(layer, "num_attention_heads", None) or 1)
    kept_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return kept_heads * int(getattr(layer, "head_dim", None) or width // heads)


@dataclass(frozen=True)
class Needs:
    """Bytes that a stage takes besides the libraries'."""

    kept: int
    """Of weights, gradients and Adam's moments, of all its models: nothing makes these less."""
    passing: int
    """The most that one batch takes, of those trained on and those sampled."""

    @property
    def total(self) -> int:
        return self.kept + self.passing


def needs(
    settings: RLHFRun, config: Any, parameters: int, lengths: Mapping[str, int], bf16: bool, free: int
) -> dict[str, Needs]:
    """An estimate of what each stage takes. Whole models are trained in fp32: 16 bytes a parameter.

    Args:
        settings: the recipe.
        config: of the model, a transformers configuration.
        parameters: how many it has.
        lengths: tokens of the longest demonstration, comparison and prompt, by these names.
        bf16: whether it is computed in bf16.
        free: bytes, which decide how many answers are sampled at once.
    """
    d, size, rank = settings.data, _Size.of(config), settings.model.lora_rank
    dtype = 2 if bf16 else 4
    frozen = (dtype if rank else 4) * parameters
    adapter = rank * size.layers * (8 * size.width + 3 * (size.width + size.inner))
    trained = frozen + 16 * adapter if rank else 16 * parameters
    longest = {
        kind: min(lengths.get(kind, d.max_length), d.max_length) for kind in ("demonstrations", "comparisons")
    }
    asked = min(lengths.get("prompts", d.max_length), d.max_length - d.max_new_tokens) + d.max_new_tokens

    def learning(stage: TrainingConfig, rows: int, n_tokens: int, n_logits: int, models: int = 1) -> int:
        """Of one micro-batch: what the backward pass needs of each layer, and logits of so many tokens."""
        layer = (10 * size.width + 3 * size.inner) * dtype
        layers = (
            layer + size.layers * size.width * dtype if stage.gradient_checkpointing else size.layers * layer
        )
        copies = 2 * parameters if bf16 else 0  # of the weights, by autocast
        return models * (rows * n_tokens * layers + copies) + 4 * rows * n_logits * size.vocabulary

    def sampling(kept: int, wanted: int, at_once: int = 0) -> int:
        rows = min(wanted, at_once or rows_in(max(0, free - kept), config, asked, dtype))
        return rows * bytes_per_row(config, asked, dtype)

    sft, reward, ppo, e = settings.sft, settings.reward, settings.ppo, settings.eval
    # Logits, their gradient and softmax are 3; SFT's 7 is fitted to the peak of one measured run.
    n_sft, n_pairs = longest["demonstrations"], longest["comparisons"]
    # Policy, critic, reference and reward; as adapters they share one base, beside which the reward model is
    # opened once.
    roles = trained + 32 * adapter + 4 * parameters if rank else 2 * trained + 8 * parameters
    return {
        "sft": Needs(trained, learning(sft, sft.micro, n_sft, 7 * n_sft)),
        "collect": Needs(4 * parameters, sampling(4 * parameters, 16 * settings.collect.answers)),
        "reward": Needs(trained, learning(reward, 2 * reward.micro, n_pairs, 0)),
        "ppo": Needs(
            roles,
            max(
                learning(ppo, ppo.micro, asked, 3 * d.max_new_tokens, models=2),
                sampling(roles, ppo.rollout_size, ppo.sampling_batch_size),
            ),
        ),
        "eval": Needs(12 * parameters, sampling(12 * parameters, e.prompts * e.samples)),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, the allocator's own unused included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return lab.memory.free_bytes()


def all_bytes(device: torch.device) -> int:
    """Memory that a device has, or that this process may have of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return lab.memory.total_bytes()


def rows_that_fit(model: Any, n_tokens: int, reserve: int = 0) -> int:
    """How many rows of `n_tokens` can be sampled at once: a power of two, at least 1.

    Args:
        model: whose; its device, weights and autocast decide.
        n_tokens: of prompt and answer.
        reserve: bytes that will be needed besides, as of an optimiser that has not stepped yet.
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    kind = weight.device.type
    if kind == "meta":
        return AT_MOST
    dtype = weight.dtype
    if torch.is_autocast_enabled(kind):  # copies of the weights are made in the format that is computed in
        dtype = torch.get_autocast_dtype(kind)
        reserve += sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return rows_in(free_bytes(weight.device) - reserve, model.config, n_tokens, dtype.itemsize)


def rows_in(free: int, config: Any, n_tokens: int, cache_bytes: int) -> int:
    """How many rows fit `SHARE` of the free bytes: a power of two, at least 1; see `bytes_per_row`."""
    rows = int(free * SHARE) // bytes_per_row(config, n_tokens, cache_bytes)
    return min(AT_MOST, 1 << (rows.bit_length() - 1)) if rows > 0 else 1
