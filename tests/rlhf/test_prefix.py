"""A beginning that all prompts share is read once: same numbers, same gradients, every family of models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from rlhf.labgpt import LabGPTConfig
from rlhf.logprobs import add_logprob_head
from rlhf.prefix import WORTH, hidden_states, shared_prefix
from rlhf.sequences import side_by_side

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
}
CONFIGS = {
    "lab_gpt": LabGPTConfig(**SMALL),
    "lab_gpt learned": LabGPTConfig(**SMALL, positions="learned"),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "bloom": BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "sliding window": MistralConfig(**SMALL, sliding_window=4),
}
BEGINNING = [7, 8, 9, 10, 11, 12]
PROMPTS = [[*BEGINNING, 3], [*BEGINNING, 4, 5], [*BEGINNING, 6, 13, 14]]
ANSWERS = [[20, 21, 22, 1], [23, 1], [24, 25, 26, 27]]


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probabilities_and_gradients_are_those_of_reading_every_row_whole(family: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    add_logprob_head(model)
    packed = side_by_side(PROMPTS, ANSWERS, 0, torch.device("cpu"))
    assert packed.shared == len(BEGINNING)
    results = []
    for shared in (0, packed.shared):
        model.zero_grad()
        logps, entropies = model(logprobs_of=replace(packed, shared=shared))
        (logps * torch.linspace(-1, 1, logps.shape[1])).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([logps.detach(), entropies.detach(), *gradients])
    for whole, parted in zip(*results, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-4, atol=2e-6)


def test_the_beginning_is_computed_for_one_row() -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"]).model
    seen: list[tuple[int, ...]] = []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    packed = side_by_side(PROMPTS, ANSWERS, 0, torch.device("cpu"))
    hidden_states(model, model.config, packed.ids, packed.lengths, packed.answer_lengths, packed.shared)
    assert seen == [(1, 6), (3, packed.ids.shape[1] - 6)]


def test_what_saves_little_is_not_shared() -> None:
    assert shared_prefix([[1, 2, 3], [1, 2, 4]], n_tokens=16) == 2
    assert shared_prefix([[1, 2, 3], [1, 2, 4]], n_tokens=17) == 0
    assert shared_prefix([[1, 2, 3]], n_tokens=3) == 0


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=5))
def test_each_prompt_keeps_its_last_token_and_all_share_the_rest(prompts: list[list[int]]) -> None:
    n_tokens = sum(map(len, prompts)) + len(prompts)
    shared = shared_prefix(prompts, n_tokens)
    assert all(prompt[:shared] == prompts[0][:shared] and shared < len(prompt) for prompt in prompts)
    assert shared == 0 or shared * (len(prompts) - 1) >= WORTH * n_tokens
