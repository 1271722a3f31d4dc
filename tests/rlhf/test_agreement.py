"""What the lab computes of a model is what the model's own forward gives, in families that differ in kind."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.families import examine, table, tiny_model
from lab.errors import LabError
from rlhf import agreement, decode, logprobs, memory
from rlhf.check import check_model
from rlhf.evaluate import Samples, answer_logprobs
from rlhf.logprobs import add_logprob_head
from rlhf.randomness import switch_off_randomness
from rlhf.scoring import clustered_interval
from rlhf.sequences import side_by_side

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

KINDS = {
    "gemma2": "quick path",  # caps its logits
    "cohere": "quick path",  # scales them
    "granite": "quick path",  # divides them
    "gptj": "quick path",  # a bias in the head
    "bloom": "quick path",  # ALiBi
    "opt": "quick path",  # learned positions with an offset, dropout by function
    "mistral": "quick path",  # a sliding window
    "mixtral": "quick path",  # experts
    "llama4_text": "quick path",  # its base_model is itself
    "qwen3_5_text": "quick path",  # states beside keys and values
    "recurrent_gemma": "",  # states, a window, and a cap
    "mamba": "in part",  # states alone: padding on the left would change them
    "roberta": "in part",  # positions that do not begin at 0
    "rwkv": "in part",  # a state that no common cache holds
    "bert": "quick path",  # causal once it is a decoder
}


@pytest.mark.parametrize("family", KINDS)
def test_sampler_and_log_probabilities_are_those_of_the_models_own_forward(family: str) -> None:
    row = examine(family)
    assert row.outcome in ("quick path", "in part", "own forward"), row
    assert row.outcome == KINDS[family] or not KINDS[family], row
    assert row.logprobs_apart is not None
    assert row.logprobs_apart < 1e-3
    assert row.sampler_apart is not None
    assert row.sampler_apart < 1e-3
    assert row.dropout_off, row


def test_a_model_that_cannot_compute_in_bf16_is_refused_in_one_line() -> None:
    model = tiny_model("xmod")  # its language adapters write float32 into bf16
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(LabError) as refused:
        logprobs.reading_of(model)
    said = str(refused.value)
    assert said.startswith(
        "XmodForCausalLM (xmod): its own forward fails in bf16. Set device.precision to fp32."
    )
    assert "\n" not in said


@pytest.mark.slow
def test_no_family_is_computed_otherwise_than_by_its_own_forward() -> None:
    from benchmarks.families import families

    rows = [examine(family) for family in families()]
    assert len(rows) > 150
    for row in rows:
        assert (row.logprobs_apart or 0) < 1e-3, row
        assert (row.sampler_apart or 0) < 1e-3, row
        assert row.why or row.outcome == "quick path", row


def test_a_family_that_sees_what_follows_is_refused() -> None:
    model = tiny_model("bert")
    model.config.is_decoder = False
    from transformers import AutoModelForCausalLM

    seeing = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(LabError, match="depends on the tokens behind it"):
        decode.decoding_of(seeing)
    with pytest.raises(LabError, match="depends on the tokens behind it"):
        add_logprob_head(seeing)


def test_the_comparison_tells_a_cap_that_is_forgotten() -> None:
    """As the lab once did: the head on the body's hidden states. Small random logits would not show it."""
    model = tiny_model("gemma2")
    probe = agreement.make_probe(model.config)
    factor = agreement.enlargement(model, probe.rows[0])
    with torch.no_grad(), agreement.enlarged(model, factor):
        truth = agreement.plain_logprobs(model, probe)
        rows = zip(probe.rows, probe.prompts, strict=True)
        hidden = [
            model.model(input_ids=torch.tensor([row])).last_hidden_state[0, len(p) - 1 : -1]
            for row, p in rows
        ]
        by_parts = [model.lm_head(h).log_softmax(-1) for h in hidden]
        way, refused = agreement.first_that_agrees(["head"], lambda _: by_parts, truth, 1e-3)
    assert way is None
    assert float(refused[0][1].split()[2]) > 0.1, refused


def test_numbers_that_are_none_and_errors_never_agree() -> None:
    truth = [torch.zeros(3)]

    def compute(way: str) -> list[Tensor]:
        if way == "raises":
            raise IndexError("no such layer")
        return [torch.tensor([0.0, math.nan, 0.0]) if way == "nan" else torch.zeros(3)]

    way, refused = agreement.first_that_agrees(["raises", "nan", "right"], compute, truth, 1.0)
    assert way == "right"
    assert [name for name, _ in refused] == ["raises", "nan"]


@pytest.mark.parametrize("family", ["gemma2", "cohere", "mamba"])
def test_gradients_are_those_of_the_models_own_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in blocks that are computed again in the backward pass."""
    model = tiny_model(family)
    switch_off_randomness(model)
    probe = agreement.make_probe(model.config)
    packed = side_by_side(probe.prompts, probe.answers, 0, torch.device("cpu"))
    total: Any = 0.0
    for prompt, row in zip(probe.prompts, probe.rows, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
        total = total + logits.log_softmax(-1).gather(1, torch.tensor(row[len(prompt) :])[:, None]).sum()
    own = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 96 * 3)
    add_logprob_head(model)
    ours = torch.autograd.grad(
        model(logprobs_of=packed)[0].sum(), list(model.parameters()), allow_unused=True
    )
    for (name, _), a, b in zip(model.named_parameters(), ours, own, strict=True):
        if b is not None:
            assert a is not None, name
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()) + 1e-6)


def test_the_kl_of_an_evaluation_is_that_of_the_models_own_forward() -> None:
    model = tiny_model("gemma2")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the cap bites
    probe = agreement.make_probe(model.config)
    truth = [
        own.gather(1, torch.tensor(a)[:, None]).sum().item()
        for own, a in zip(agreement.plain_logprobs(model, probe), probe.answers, strict=True)
    ]
    add_logprob_head(model)
    samples = Samples([""] * 5, probe.prompts, probe.answers, [])
    assert answer_logprobs(model, samples, 0).tolist() == pytest.approx(truth, abs=1e-3)


def test_what_is_slower_than_usual_is_known_before_anything_is_trained() -> None:
    class Words:
        all_special_ids = (0, 1, 2)

        def __len__(self) -> int:
            return 96

    assert check_model(tiny_model("llama"), Words()) == []
    (line,) = check_model(tiny_model("mamba"), Words())
    assert line == "MambaForCausalLM (mamba) is sampled in a slower way: prompts of each length by themselves"


def test_every_short_cut_that_is_not_taken_is_said() -> None:
    for way in (decode.Decoding(), logprobs.Reading("model")):
        assert way.left_out == ""
        for field in fields(way):
            without = replace(way, **{field.name: "" if field.name == "body" else False})  # type: ignore[arg-type]
            # Rows are read one by one only by the model's own forward.
            without = replace(without, body="") if field.name == "together" else without  # type: ignore[call-arg]
            assert without.left_out, without
    said = [way.left_out for way in decode.DECODINGS]
    assert len({*said}) == len(said)


def test_a_model_that_needs_a_cache_of_transformers_own_gets_it_and_it_is_said() -> None:
    from transformers import LlamaForCausalLM
    from transformers.cache_utils import DynamicLayer

    class Particular(LlamaForCausalLM):
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            if past_key_values is not None and type(past_key_values.layers[0]) is not DynamicLayer:
                raise TypeError("a cache that is not known here")
            return super().forward(*args, past_key_values=past_key_values, **kwargs)

    model = Particular(tiny_model("llama").config).eval()
    assert decode.decoding_of(model) == decode.Decoding(room=False)
    (line,) = check_model(model, None, [[5, 6, 7, 8, 9, 10, 11, 12]])
    assert line == "Particular (llama) is sampled in a slower way: keys and values are copied for every token"


# ---- nothing is random ----


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "phimoe", "biogpt"])
def test_a_model_in_training_mode_computes_what_it_does_in_eval_mode(family: str) -> None:
    """OPT passes its dropout to a function, BioGPT drops layers, Phi-MoE's router adds noise."""
    model = tiny_model(family)
    with pytest.raises(LabError, match="is random in training mode"):
        agreement.check_training_mode(model)
    switch_off_randomness(model)
    agreement.check_training_mode(model)
    assert not model.training


def test_looking_for_randomness_draws_none_of_the_runs_random_numbers() -> None:
    model = tiny_model("opt")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(LabError):
        agreement.check_training_mode(model)
    decode.decoding_of(model)
    logprobs.reading_of(model)
    assert torch.equal(torch.get_rng_state(), before)


# ---- sampling in parts ----


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_size_of_parts_does_not_change_what_is_sampled(llama: Any, size: int) -> None:
    prompts = [[3, 4, 5], [6], [3, 4, 5], [7, 8, 9, 10, 11], [6], [12, 13], [3, 4, 5]]
    options: dict[str, Any] = {"max_new_tokens": 9, "eos_ids": {20, 21, 22, 23, 24, 25}, "pad_id": 0}

    def drawn(rows_at_once: int) -> tuple[list[list[int]], Tensor]:
        observed = decode.DrawnLogprobs(len(prompts), 9, 1.0, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        answers = decode.sample(
            llama, prompts, rows_at_once=rows_at_once, generator=generator, observe=observed, **options
        )
        for row, answer in enumerate(answers):
            observed.logprobs[row, len(answer) :] = 0
        assert torch.rand((), generator=generator) == after, "what is drawn next does not depend on it either"
        return answers, observed.logprobs

    generator = torch.Generator().manual_seed(1)
    torch.rand((9, len(prompts), 1), generator=generator)
    after = torch.rand((), generator=generator)
    answers, numbers = drawn(size)
    whole, whole_numbers = drawn(len(prompts))
    assert answers == whole
    torch.testing.assert_close(numbers, whole_numbers, rtol=1e-4, atol=1e-4)


def test_memory_of_a_row_by_hand() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=100, vocab_size=1000,
    )  # fmt: skip
    cache = 2 * 3 * (2 * 8) * 50 * 2  # keys and values, layers, heads x width, tokens, bytes
    assert memory.bytes_per_row(config, 50, 2) == cache + 5 * 4 * 1000 + 50 * (8 * 64 + 3 * 100) * 4


def test_layers_of_several_widths_are_reckoned_one_by_one() -> None:
    from transformers import Gemma4TextConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 100, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma4TextConfig(num_hidden_layers=3, layer_types=kinds, num_kv_shared_layers=0, **sizes)
    cache = 2 * (2 * 16 + 2 * 16 + 2 * 32) * 50 * 2
    assert memory.bytes_per_row(config, 50, 2) == cache + 5 * 4 * 1000 + 50 * (8 * 64 + 3 * 100) * 4


def test_rows_that_fit_are_a_power_of_two_and_at_least_one(llama: Any) -> None:
    row = memory.bytes_per_row(llama.config, 20, 4)
    assert memory.rows_in(2 * 11 * row, llama.config, 20, 4) == 8
    assert memory.rows_in(2 * 2 * row, llama.config, 20, 4) == 2
    assert memory.rows_in(2 * row - 1, llama.config, 20, 4) == 1
    assert memory.rows_that_fit(llama, 20, reserve=10**15) == 1
    assert memory.rows_that_fit(llama, 20) > 64


def test_instructgpt_fits_one_gpu_of_80_gb() -> None:
    """GPT-2 XL, four roles: what is sampled at once, beside weights, gradients and Adam's moments."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from lab import config
    from rlhf.config import RLHFRun
    from tests.conftest import REPO

    settings = config.build(
        RLHFRun, config.read_yaml(REPO / "configs" / "rlhf" / "instructgpt.yaml"), {}, "x"
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    n = sum(p.numel() for p in model.parameters())
    assert 1.5e9 < n < 1.6e9
    weights, moments = 4 * 4 * n, 2 * 3 * 4 * n  # policy, critic, reference, reward; two of them learn
    free = int(80e9) - weights - moments - 2 * n  # and a copy of the policy's weights in bf16
    row = memory.bytes_per_row(model.config, settings.data.max_length, 2)
    assert settings.ppo.rollout_size * row > 2 * int(80e9), "the whole rollout at once did not fit"
    rows = memory.rows_in(free, model.config, settings.data.max_length, 2)
    assert rows >= 8
    assert rows * row < free / 2


# ---- held-out accuracy ----


def test_pairs_of_few_prompts_say_less_than_as_many_independent_ones() -> None:
    independent = clustered_interval([[1]] * 70 + [[0]] * 30)
    clustered = clustered_interval([[1] * 10] * 7 + [[0] * 10] * 3)
    assert clustered[0] < independent[0] < 0.7 < independent[1] < clustered[1]
    assert clustered_interval([[1, 1], [1, 1], [1]])[0] < 0.5, "all right, but of three prompts"
    assert clustered_interval([[1, 0, 1]]) == (0, 1)


def test_intervals_of_clustered_pairs_hold_the_truth_as_often_as_they_say() -> None:
    """Prompts differ: of some all pairs are easy. By simulation; 95% are promised."""
    generator = torch.Generator().manual_seed(0)
    held, truth = 0, 0.0
    for _ in range(400):
        chances = torch.sigmoid(torch.randn(20, generator=generator) * 1.5 + 1)
        pairs = [(torch.rand(6, generator=generator) < chance).int().tolist() for chance in chances]
        truth = float(torch.sigmoid(torch.randn(100_000, generator=generator) * 1.5 + 1).mean())
        low, high = clustered_interval(pairs)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.99


def test_the_table_has_a_row_for_every_family() -> None:
    from dataclasses import asdict

    trained = {"outcome": "refused", "why": "no | such", "score_head": "ours"}
    text = table([asdict(examine("gemma2"))], {"all stages": {"gemma2": trained}})
    assert "| gemma2 | Gemma2ForCausalLM | quick path | yes |" in text
    assert "| yes | refused | ours | refused: no \\| such |" in text
    assert "| whole model | 0 | 1 | 0 | 0 |" in text
