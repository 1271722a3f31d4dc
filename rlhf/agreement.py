"""Our quicker ways of computing are used on a model only once they gave what its own forward gives.

Sampling with a cache, reading rows side by side, reading a shared beginning once and computing only some
logits are short cuts through a model. Families differ in what their forward does on the way: they cap or
scale logits, keep states instead of keys, count positions from what is padding. So before a model is used,
every short cut is compared with the model's own plain forward on a few tokens: one row at a time, without
padding and without a cache. The first that agrees is taken; see `rlhf.logprobs.reading_of` and
`rlhf.decode.decoding_of`.

Small random models, and models early in training, have small logits, at which a cap or a wrong mask hardly
shows. So what reaches the output layer is scaled until the logits are as large as those of trained models.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lab.errors import LabError, first_line

FP32_TOLERANCE = 1e-3
"""Nats. Two ways of one computation differ by about 1e-5 in fp32; a wrong mask or position by far more."""
BF16_TOLERANCE = 2**-4
"""Of the standard deviation of the logits: bf16 keeps 8 bits, so each rounding moves a number by up to 2^-9
of itself, and a few dozen of them on the way add up to about 2^-6; four times that is a fault."""
SAMPLED_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
"""Nats a token, on average, between what was sampled and what training says of it."""
LOGITS_STD = 12.0
"""What logits are scaled to: the largest of a row are then beyond 30, where Gemma 2's cap is."""


@dataclass(frozen=True)
class Probe:
    """A few prompts with answers: of several lengths, one prompt twice, with a common beginning."""

    prompts: list[list[int]]
    answers: list[list[int]]
    shared: int = 4
    """Tokens with which all prompts begin, at most all but their last."""

    @property
    def rows(self) -> list[list[int]]:
        """Prompts and answers as one."""
        return [p + a for p, a in zip(self.prompts, self.answers, strict=True)]


def make_probe(config: Any, prompts: Sequence[Sequence[int]] = ()) -> Probe:
    """A probe made of the tokens of prompts, or of a vocabulary.

    Args:
        config: of the model; ids that it names stand for something else than text, as padding or an image.
        prompts: real ones, of the run.
    """
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    named = [value for c in (config, text) for name, value in vars(c).items() if "_token_i" in name]
    special = {i for value in named for i in (value if isinstance(value, list) else [value])}
    pool = [token for prompt in prompts[:64] for token in prompt if token not in special]
    if len(set(pool)) < 8:
        pool += sorted(set(range(text.vocab_size)) - special)
    picked = torch.randint(len(pool), (40,), generator=generator).tolist()
    tokens = [pool[i] for i in picked]
    lead = tokens[:6]
    first = lead + tokens[6:9]
    begun = [first, lead + tokens[9:10], first, lead + tokens[10:15], lead[:5]]
    lengths, answers, at = [6, 1, 8, 3, 5], [], 15
    for length in lengths:
        answers.append(tokens[at : at + length])
        at += length
    return Probe(begun, answers)


def inner_model(model: Any) -> Any:
    """transformers' model, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode: nothing is dropped, by modules or by functions."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def enlarged(model: Any, factor: float) -> Iterator[None]:
    """Scales what reaches the output layer, so that caps and clamps of the logits show."""
    head = inner_model(model).get_output_embeddings()
    if head is None or factor == 1:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def enlargement(model: Any, row: Sequence[int]) -> float:
    """The factor for `enlarged` that brings the logits to `LOGITS_STD`; 1 if they are as large."""
    head = inner_model(model).get_output_embeddings()
    spread: list[float] = []
    if head is not None:
        handle = head.register_forward_hook(
            lambda _, __, output: spread.append(float(output.float().std(correction=0)))
        )
        try:
            plain_logits(model, row)
        finally:
            handle.remove()
    return max(1.0, LOGITS_STD / spread[-1]) if spread and 0 < spread[-1] < torch.inf else 1.0


def plain_logits(model: Any, row: Sequence[int]) -> Tensor:
    """The model's own logits of one row, float32 (tokens, vocabulary): what all else must agree with.

    Raises:
        LabError: the model cannot compute them, as some families cannot in bf16.
    """
    weight = next(model.parameters())
    ids = torch.tensor([list(row)], device=weight.device)
    try:
        return model(input_ids=ids, **_no_cache(model)).logits[0].float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's forward raises
        mixed = torch.is_autocast_enabled(weight.device.type)
        advice = " in bf16. Set device.precision to fp32" if mixed else ""
        raise LabError(
            f"{name_of(model)}: its own forward fails{advice}. ({type(error).__name__}: {first_line(error)})"
        ) from error


def _no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in forward_arguments(model) else {}


@functools.lru_cache(maxsize=256)
def _arguments(forward: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(forward).parameters)


def forward_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments of transformers' forward."""
    return _arguments(type(inner_model(model)).forward)


@torch.no_grad()
def plain_logprobs(model: Any, probe: Probe) -> list[Tensor]:
    """The model's own log-probabilities of all tokens where each answer's tokens stand, (answer, vocabulary).

    Raises:
        LabError: a token's depend on what follows it: the model is not causal.
    """
    truth = []
    for prompt, row in zip(probe.prompts, probe.rows, strict=True):
        truth.append(plain_logits(model, row)[len(prompt) - 1 : -1].log_softmax(-1))
    cut = len(probe.prompts[0]) + 2  # the row without its last tokens
    shorter = plain_logits(model, probe.rows[0][:cut])[-1].log_softmax(-1)
    apart = float((shorter - truth[0][2]).abs().max())
    if not apart <= tolerance(model, truth):
        raise LabError(
            f"{name_of(model)}: what it says of a token depends on the tokens behind it ({apart:.2g} nats), "
            "so it cannot write answers. Name a causal language model as model.path."
        )
    return truth


def tolerance(model: Any, truth: Sequence[Tensor]) -> float:
    """How far two ways of one computation may be apart at any token, in nats."""
    if not is_coarse(model):
        return FP32_TOLERANCE
    return max(FP32_TOLERANCE, BF16_TOLERANCE * max(float(x.std(correction=0)) for x in truth))


def is_coarse(model: Any) -> bool:
    """Whether a model is computed in bf16 or fp16."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return torch.is_autocast_enabled(weight.device.type) or weight.dtype != torch.float32


def name_of(model: Any) -> str:
    """What a model is called in messages."""
    inner = inner_model(model)
    return f"{type(inner).__name__} ({getattr(inner.config, 'model_type', 'model')})"


Way = TypeVar("Way")


def first_that_agrees(
    ways: Sequence[Way],
    compute: Callable[[Way], Sequence[Tensor]],
    truth: Sequence[Tensor],
    within: float,
) -> tuple[Way | None, list[tuple[Way, str]]]:
    """The first way whose numbers are those of the model's own forward, and why those before it are not.

    Args:
        ways: from the quickest to the plainest.
        compute: the numbers by a way, shaped as `truth`; what it raises counts as a disagreement.
        within: how far they may be apart.
    """
    refused: list[tuple[Way, str]] = []
    for way in ways:
        try:
            numbers = compute(way)
            apart = max(
                (float((ours - own).abs().max()) for ours, own in zip(numbers, truth, strict=True)),
                key=lambda x: torch.inf if x != x else x,
            )
        except Exception as error:  # whatever a family's forward raises on being called in this way
            refused.append((way, f"{type(error).__name__}: {first_line(error)}"))
            continue
        if apart <= within:
            return way, refused
        refused.append((way, f"off by {apart:.2g} nats"))
    return None, refused


def check_training_mode(model: Any) -> None:
    """Raises a `LabError` if a model computes something else in training mode, where it is needed.

    transformers computes activations again in that mode alone. Dropout is off; what else may be random or
    different there is found by looking: two passes in training mode against one in eval mode.
    """
    inner = inner_model(model)
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    probe = make_probe(inner.config)
    ids = torch.tensor([probe.rows[0]], device=device)
    training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            passes = []
            for mode in (False, True, True):
                model.train(mode)
                passes.append(inner(input_ids=ids, **_no_cache(inner)).logits.float())
    finally:
        model.train(training)
    scale = max(float(passes[0].std(correction=0)), 1e-6)
    apart = max(float((other - passes[0]).abs().max()) for other in passes[1:]) / scale
    if not apart <= tolerance(model, [passes[0] / scale]):
        raise LabError(
            f"{name_of(model)}: is random in training mode though dropout is off (its outputs differ by "
            f"{apart:.2g} of their spread), and gradient checkpointing needs that mode. Set "
            "ppo.gradient_checkpointing to false."
        )
