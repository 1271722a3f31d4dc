"""Whether a model can go through all stages, known before the first of them is trained."""

from collections.abc import Sequence
from typing import Any

from rlhf.agreement import name_of
from rlhf.decode import decoding_of
from rlhf.logprobs import reading_of


def check_model(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]] = ()) -> list[str]:
    """Compares sampler and log-probabilities of a language model with its own forward.

    Args:
        model: a transformers causal LM, on the device and under the autocast it will be used in.
        tokenizer: its own; of its tokens the comparison is made where there are no prompts.
        prompts: token ids of some of the run's.

    Returns:
        What is done in a slower way than usual, one line each; mostly none.

    Raises:
        LabError: the model is not causal, or cannot be sampled.
    """
    if not prompts:
        special, size = set(tokenizer.all_special_ids), model.config.get_text_config().vocab_size
        prompts = [[token for token in range(min(len(tokenizer), size, 4096)) if token not in special]]
    told = (("sampled", decoding_of(model, prompts)), ("read", reading_of(model, prompts)))
    return [
        f"{name_of(model)} is {what} in a slower way: {way.left_out}" for what, way in told if way.left_out
    ]
