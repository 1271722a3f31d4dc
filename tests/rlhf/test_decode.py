"""Sampling: exact by an oracle without cache, batch or padding, and by transformers' own `generate`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub

from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from rlhf import decode
from rlhf.decode import draw, end_tokens, sample, stream
from rlhf.labgpt import LabGPTConfig

VOCAB, PAD = 40, 0
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48},
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SIZES),
    "gpt2, learned positions": GPT2Config(n_positions=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **SIZES),
    "mistral, a window": MistralConfig(
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, **SIZES
    ),
    "labgpt, learned positions": LabGPTConfig(
        vocab_size=VOCAB,
        width=32,
        n_layer=2,
        n_head=4,
        max_positions=64,
        positions="learned",
        pad_token_id=PAD,
    ),
}
each_model = pytest.mark.parametrize("model", CONFIGS, indirect=True)


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # else all tokens are about as likely, and mistakes are not seen
    return model


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


def some_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int], seed: int = 3
) -> list[list[int]]:
    """Row by row and without a cache: the model reads everything again for every token."""
    chances = [
        torch.rand(len(prompts), 1, generator=generator) for generator in [seeded(seed)] * max_new_tokens
    ]
    answers = []
    for row, prompt in enumerate(prompts):
        answer: list[int] = []
        while len(answer) < max_new_tokens and not (answer and answer[-1] in eos_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, -1]
            reached = logits.double().softmax(-1).cumsum(-1)
            answer.append(int((reached <= chances[len(answer)][row]).sum()))
        answers.append(answer)
    return answers


class Forwards:
    """Notes the shape of the ids in every call of a model, once it is known how it is sampled."""

    def __init__(self, model: Any) -> None:
        decode.decoding_of(model)
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )


# ---- the loop ----


@each_model
def test_every_row_is_what_it_would_be_alone(model: Any) -> None:
    """Prompts of other lengths, the same prompt twice, answers that end early: a row sees none of it."""
    prompts = some_prompts(5, 2, 9, 1)
    prompts.insert(2, prompts[0])
    eos = {7, 8, 9, 10, 11, 12}
    answers = sample(model, prompts, max_new_tokens=12, eos_ids=eos, pad_id=PAD, generator=seeded())
    assert answers == oracle(model, prompts, 12, eos)
    assert len({len(answer) for answer in answers}) > 2
    assert answers[0] != answers[2]


@each_model
@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_the_likeliest_tokens_are_those_of_generate(model: Any, temperature: float) -> None:
    prompts = some_prompts(4, 7, 1)
    padded = torch.tensor([[PAD] * (7 - len(prompt)) + prompt for prompt in prompts])
    expected = model.generate(
        padded, attention_mask=(padded != PAD).long(), do_sample=False, max_new_tokens=10, pad_token_id=PAD
    )[:, 7:].tolist()
    answers = sample(model, prompts, max_new_tokens=10, eos_ids=(), pad_id=PAD, temperature=temperature)
    assert answers == expected

    eos = {expected[0][2], expected[1][4]}
    ends = [next((i for i, token in enumerate(row, 1) if token in eos), 10) for row in expected]
    answers = sample(model, prompts, max_new_tokens=10, eos_ids=eos, pad_id=PAD, temperature=temperature)
    assert answers == [row[:end] for row, end in zip(expected, ends, strict=True)]
    assert min(ends) < 10


def test_other_rows_change_nothing(llama: Any) -> None:
    """A row keeps its random numbers when its neighbours end at once, are longer, or are the same."""
    mine, *others = some_prompts(4, 3, 11)
    eos = {5, 6, 7, 8}
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_ids": eos, "pad_id": PAD}
    answers = [
        sample(llama, [neighbour, mine, neighbour], generator=seeded(), **options)
        for neighbour in (*others, mine, mine[:1])
    ]
    assert len({tuple(three[1]) for three in answers}) == 1
    assert len({tuple(three[0]) for three in answers}) > 1


def test_ended_rows_are_soon_no_longer_computed(llama: Any) -> None:
    eos = set(range(3, 20))
    prompts = some_prompts(*[3] * 16)
    forwards = Forwards(llama)
    answers = sample(llama, prompts, max_new_tokens=20, eos_ids=eos, pad_id=PAD, generator=seeded())
    assert answers == oracle(llama, prompts, 20, eos)
    computed = [rows for rows, time in forwards.shapes if time == 1]
    for step, rows in enumerate(computed, 1):
        assert rows * (1 - decode.DROP_ENDED) < sum(len(answer) > step for answer in answers) <= rows
    assert len(computed) == max(map(len, answers)) - 1


def test_a_prompt_is_read_once_for_all_its_answers(llama: Any) -> None:
    one, other = some_prompts(3, 5)
    prompts = [one, other, one, one, other]
    forwards = Forwards(llama)
    answers = sample(llama, prompts, max_new_tokens=4, eos_ids=(), pad_id=PAD, generator=seeded())
    assert forwards.shapes == [(2, 5), (5, 1), (5, 1), (5, 1)]
    assert answers == oracle(llama, prompts, 4, ())


def test_padding_may_be_the_end_token(llama: Any) -> None:
    """And a token sampled before the end may be the padding: what counts is the place, not the id."""
    prompts = some_prompts(5, 2, 8)
    eos = {4, 9, 13}
    expected = oracle(llama, prompts, 12, eos)
    for pad in (4, 2, expected[0][0]):
        assert (
            sample(llama, prompts, max_new_tokens=12, eos_ids=eos, pad_id=pad, generator=seeded()) == expected
        )
    assert any(answer[-1] in eos for answer in expected)
    assert expected[0][0] not in eos


def test_one_token_takes_one_forward_pass(llama: Any) -> None:
    prompts = some_prompts(5, 2)
    forwards = Forwards(llama)
    answers = sample(llama, prompts, max_new_tokens=1, eos_ids=(), pad_id=PAD, generator=seeded())
    assert forwards.shapes == [(2, 5)]
    assert answers == oracle(llama, prompts, 1, ())


def test_a_stream_is_the_sample_of_one_row_and_may_be_left(llama: Any) -> None:
    (prompt,) = some_prompts(4)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_ids": {3, 4}, "temperature": 1.5, "top_k": 20}
    (expected,) = sample(llama, [prompt], pad_id=PAD, generator=seeded(), **options)
    assert list(stream(llama, prompt, generator=seeded(), **options)) == expected

    forwards = Forwards(llama)
    beginning = stream(llama, prompt, generator=seeded(), **options)
    assert next(beginning) == expected[0]
    assert torch.is_grad_enabled()
    assert len(forwards.shapes) == 1


def test_without_a_generator_the_global_one_is_used(llama: Any) -> None:
    prompts = some_prompts(4, 2)
    torch.manual_seed(3)
    answers = sample(llama, prompts, max_new_tokens=6, eos_ids=(), pad_id=PAD)
    assert answers == oracle(llama, prompts, 6, ())
    assert torch.rand(1) != torch.rand(1, generator=seeded())


# ---- autocast ----


class Conversions(TorchDispatchMode):
    """Counts the conversions of tensors of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_frozen_weights_are_converted_once_and_stay_frozen(llama: Any) -> None:
    prompts = some_prompts(4, 2)

    def run() -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16):
            return sample(llama, prompts, max_new_tokens=6, eos_ids=(), pad_id=PAD, generator=seeded())

    trainable = run()  # which also finds out how the model is sampled
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    with Conversions(llama.model.layers[0].mlp.down_proj.weight.shape) as conversions:
        assert run() == trainable
    assert conversions.count == 2  # of two layers
    assert not any(parameter.requires_grad for parameter in llama.parameters())

    llama.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert not any(parameter.requires_grad for parameter in llama.parameters())


def test_the_cache_holds_what_attention_computes_in(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 under autocast, where transformers' cache has keys in fp32; the answers are the same."""
    caches: list[DynamicCache] = []
    make = decode._cache
    monkeypatch.setattr(decode, "_cache", lambda *args: caches.append(make(*args)) or caches[-1])
    with torch.autocast("cpu", torch.bfloat16):
        decode.decoding_of(llama)
    caches.clear()
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_ids": (), "pad_id": PAD}

    def run() -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16):
            return sample(llama, some_prompts(4, 2), generator=seeded(), **options)

    ours = run()
    monkeypatch.setattr(decode, "_cache", lambda model, room, way: DynamicCache(config=model.config))
    assert run() == ours
    keys: Any = caches[0].layers[0].keys  # type: ignore[union-attr]
    assert (keys.dtype, tuple(keys.shape)) == (torch.bfloat16, (2, 2, 4 + 7, 8))


# ---- the draw ----

PROBABILITIES = torch.tensor([0.4, 0.02, 0.3, 0.08, 0.15, 0.05])


def draws(logits: Tensor, n: int = 40_000, **options: Any) -> Tensor:
    """How often each token is drawn in n draws."""
    chance = torch.rand(n, 1, generator=seeded())
    return draw(logits.expand(n, -1), chance, **options).bincount(minlength=len(logits))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected)[probabilities > 0].sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_are_distributed_as_the_softmax(temperature: float) -> None:
    logits = PROBABILITIES.log() + 3
    counts = draws(logits, temperature=temperature)
    assert chi_square(counts, (logits / temperature).softmax(-1)) < 20.5  # 5 degrees of freedom, 0.1%
    assert chi_square(counts, (logits / (1.1 * temperature)).softmax(-1)) > 20.5  # the test can tell


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.84}, {0, 2, 4}),
        ({"top_p": 0.86}, {0, 2, 3, 4}),
        ({"top_p": 0.999}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3, "top_p": 0.5}, {0, 2}),
        ({"temperature": 0.25, "top_p": 0.9}, {0, 2}),
    ],
)
def test_top_k_and_top_p_keep_exactly_these_tokens(options: dict[str, Any], kept: set[int]) -> None:
    counts = draws(PROBABILITIES.log(), **options)
    assert set(counts.nonzero()[:, 0].tolist()) == kept
    inside = torch.tensor([i in kept for i in range(len(PROBABILITIES))])
    rest = torch.where(inside, PROBABILITIES ** (1 / options.get("temperature", 1.0)), 0)
    assert chi_square(counts, rest / rest.sum()) < 20.5


def test_the_borders_of_chance_draw_no_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([[0.0]])).tolist() == [1]
    assert draw(logits, torch.tensor([[0.5]])).tolist() == [3]
    assert draw(logits, torch.tensor([[1 - 2**-24]])).tolist() == [3]


def test_rows_are_drawn_each_from_its_own_logits() -> None:
    logits = torch.eye(7) * 1000
    assert draw(logits, torch.rand(7, 1, generator=seeded())).tolist() == list(range(7))
    assert draw(logits, torch.rand(7, 1), temperature=0).tolist() == list(range(7))


def test_end_tokens_are_the_tokenizers_and_the_models(llama: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"a": 0, "<eos>": 1, "<turn>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    for declared, expected in ((None, {1}), (2, {1, 2}), ([2, 3], {1, 2, 3})):
        llama.generation_config.eos_token_id = declared
        assert end_tokens(llama, tokenizer) == expected


@each_model
def test_the_sampler_sees_the_log_probabilities_a_forward_pass_gives(model: Any) -> None:
    """Prompts of three lengths, answers that end early and late, a temperature, and top_k left out of it."""
    prompts = [[3, 4, 5], [6], [3, 4, 5], [7, 8, 9, 10, 11]]
    drawn = decode.DrawnLogprobs(4, 12, 0.7, torch.device("cpu"))
    answers = sample(
        model,
        prompts,
        max_new_tokens=12,
        eos_ids=range(2, 12),
        pad_id=PAD,
        temperature=0.7,
        top_k=9,
        generator=seeded(),
        observe=drawn,
    )
    assert len({len(answer) for answer in answers}) > 1
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)
        tokens = torch.tensor(answer)[:, None]
        close: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
        torch.testing.assert_close(
            drawn.logprobs[row, : len(answer)], expected.gather(1, tokens)[:, 0], **close
        )
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(drawn.entropies[row, : len(answer)], entropy, **close)
