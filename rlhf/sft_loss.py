"""The loss of SFT is that of the model's own forward: TRL's is compared with it before a run, else replaced.

TRL computes the log-probabilities of SFT with a head of its own, `add_fused_lm_head`: the body's hidden
states times the output layer's weight, with such caps and scales as it finds in the config under names it
knows. It is taken where it gives what the model's own forward gives on a few tokens of the run; else
the own forward makes the logits. Packed rows stand side by side in one, told apart by positions alone, which
not every family heeds: where they see each other, packing is refused.
"""

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from lab.errors import LabError
from rlhf.agreement import (
    enlargement,
    evaluating,
    first_that_agrees,
    forward_arguments,
    inner_model,
    make_probe,
    name_of,
    plain_logprobs,
    tolerance,
)
from rlhf.logprobs import own_forward


def settle_loss(
    model: Any,
    collate: Callable[[list[dict[str, list[int]]]], dict[str, Any]],
    rows: Sequence[Sequence[int]],
    packing: bool,
) -> str:
    """Leaves TRL's head in the model or, if it computes something else, puts the model's own forward there.

    Args:
        model: with TRL's head, on the device and under the autocast of the run.
        collate: the trainer's, from `input_ids` and `labels` to what the model is called with.
        rows: token ids of some rows of the run.
        packing: whether it sets rows side by side.

    Returns:
        Why TRL's head is not taken; "" if it is.

    Raises:
        LabError: packed or padded rows are read as something else than by themselves, or the model is not
            causal.
    """
    inner = inner_model(model)
    probe = make_probe(inner.config, rows)
    answers = [torch.tensor(answer)[:, None] for answer in probe.answers]
    examples = [
        {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}
        for prompt, answer in zip(probe.prompts, probe.answers, strict=True)
    ]
    device = next(model.parameters()).device
    fused, lengths = inner.forward, [len(answer) for answer in probe.answers]

    def compute(forward: Any) -> list[Tensor]:
        inner.forward = forward
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(examples).items()}
        output = model(**batch, use_cache=False, fused_lm_head=True)
        return list(output.log_probs[batch["labels"][:, 1:] != -100].split(lengths))

    with evaluating(model), torch.no_grad(), _larger_logits(model, probe.rows[0]):
        whole = plain_logprobs(model, probe)
        truth = [own.gather(1, answer.to(device))[:, 0] for own, answer in zip(whole, answers, strict=True)]
        ways = [fused, types.MethodType(_with_own_forward(inner), inner)]
        way, refused = first_that_agrees(ways, compute, truth, tolerance(model, whole))
    inner.forward = way or fused
    if way is None:
        why = refused[-1][1]
        raise LabError(
            f"sft.packing: {name_of(model)} reads packed rows as something else than by themselves ({why}). "
            "Set it to false."
            if packing
            else f"{name_of(model)}: reads rows in a batch as something else than by themselves ({why}). Set "
            "sft.micro_batch_size to 1, or name another model."
        )
    return refused[0][1] if refused else ""


@torch.no_grad()
def gives_balance_loss(model: Any) -> bool:
    """Whether a model that can be asked for its routers' decisions gives a loss that balances its experts.

    TRL asks whenever the configuration has a key for it, which some families have and do not heed.
    """
    inner = inner_model(model)
    ids = torch.tensor([[*range(8)]], device=next(model.parameters()).device)
    try:
        output = own_forward(inner)(input_ids=ids, use_cache=False, output_router_logits=True)
    except Exception:  # whatever a family raises on that argument
        return False
    return getattr(output, "aux_loss", None) is not None


def _with_own_forward(inner: Any) -> Any:
    """A model's forward that gives for `fused_lm_head` what TRL's gives, from the logits of its own."""
    own, before, takes = own_forward(inner), inner.forward, forward_arguments(inner)

    @functools.wraps(type(inner).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            named = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return before(*args, **kwargs, **{k: v for k, v in named.items() if v is not None})
        if "use_cache" not in takes:
            kwargs.pop("use_cache", None)
        output = own(*args, **kwargs)
        labels = labels[:, 1:]
        mask = labels != -100
        logprobs = output.logits[:, :-1][mask].float().log_softmax(-1)
        of_labels = logprobs.gather(1, labels[mask][:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            best = (logprobs.argmax(-1) == labels[mask]).float()
        empty = logprobs.new_zeros(mask.shape)
        return FusedCausalLMOutput(
            log_probs=empty.masked_scatter(mask, of_labels),
            entropy=empty.masked_scatter(mask, entropy),
            is_top1=empty.masked_scatter(mask, best),
            label_mask=mask,
            aux_loss=getattr(output, "aux_loss", None),
        )

    return forward


@contextlib.contextmanager
def _larger_logits(model: Any, row: Sequence[int]) -> Iterator[None]:
    """As `agreement.enlarged`, by the output layer's weight, since TRL does not call the layer.

    A power of two, so that the weight is the same to the bit afterwards.
    """
    head = inner_model(model).get_output_embeddings()
    weight = getattr(head, "weight", None)
    factor = 2.0 ** math.ceil(math.log2(enlargement(model, row)))
    if weight is None or not weight.is_floating_point() or factor == 1:
        yield
        return
    _scale(weight, factor)
    try:
        yield
    finally:
        _scale(weight, 1 / factor)


def _scale(weight: Tensor, factor: float) -> None:
    weight.data.mul_(factor)
    torch.clear_autocast_cache()  # which keeps casts of weights, and does not see that they have changed
