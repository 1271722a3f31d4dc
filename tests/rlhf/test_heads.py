"""Which models can be used, known from their configuration; and score heads where transformers has none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lab.errors import LabError
from rlhf import heads, models
from rlhf.ranking import init_head
from rlhf.scoring import RewardScorer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
WITHOUT_STOCK_HEAD: dict[str, dict[str, Any]] = {
    "granite": SIZES,
    "cohere": SIZES,
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "llama4_text": {
        **SIZES, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64},
}  # fmt: skip
"""Families that differ in where their body lies, how it reads positions and what it keeps of the past."""


def config_of(family: str, **options: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**options)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Any) -> Callable[[str], Path]:
    """A tiny language model of a family, in a folder."""
    from transformers import AutoModelForCausalLM

    def save(family: str) -> Path:
        tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
        options = {"vocab_size": len(tokenizer), "bos_token_id": None, **tokens}
        config = config_of(family, **WITHOUT_STOCK_HEAD[family], **options)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)  # else a token says little of another
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize("family", WITHOUT_STOCK_HEAD)
def test_a_score_head_of_our_own_reads_the_last_token_on_whichever_side_padding_is(
    saved: Callable[[str], Path], family: str, tmp_path: Path, tokenizer: Any
) -> None:
    from transformers import AutoModel

    model, reader = models.open_reward(saved(family))
    assert issubclass(type(model), heads.LastTokenScore)
    init_head(model, seed=3)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    expected = RewardScorer(model, reader, shift=0.0, scale=1.0).score_ids([[]] * 3, rows)
    assert expected.std() > 0.01
    pad = reader.pad_token_id
    gaps = [[pad] * (6 - len(row)) for row in rows]
    for padded in ([gap + row for row, gap in zip(rows, gaps, strict=True)],
                   [row + gap for row, gap in zip(rows, gaps, strict=True)]):  # fmt: skip
        ids = torch.tensor(padded)
        with torch.no_grad():
            ours = model.eval()(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # without a mask, padding at the end is told by its id
        ids = torch.tensor([row + gap for row, gap in zip(rows, gaps, strict=True)])
        torch.testing.assert_close(model(input_ids=ids).logits[:, 0], expected, rtol=1e-3, atol=1e-4)

    # What is left is a plain folder: stock AutoModel opens the body, and the layer is one matrix in it.
    models.save(model, reader, tmp_path / "left")
    names = {path.name for path in (tmp_path / "left").iterdir()}
    assert not [name for name in names if not name.endswith((".json", ".safetensors", ".jinja"))]
    body = AutoModel.from_pretrained(tmp_path / "left").eval()
    score = load_file(tmp_path / "left" / "model.safetensors")["score.weight"]
    with torch.no_grad():
        stock = [(body(torch.tensor([row])).last_hidden_state[0, -1] @ score.T).item() for row in rows]
    assert stock == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    again, _ = models.open_reward(tmp_path / "left")
    assert torch.equal(again.score.weight, model.score.weight)
    same = RewardScorer(again, reader, shift=0.0, scale=1.0).score_ids([[]] * 3, rows)
    torch.testing.assert_close(same, expected)


def test_the_body_is_the_language_models(saved: Callable[[str], Path]) -> None:
    folder = saved("olmoe")
    policy, _ = models.open_policy(folder)
    reward, _ = models.open_reward(folder)
    for (name, wanted), got in zip(
        policy.model.state_dict().items(), reward.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, wanted), name


def test_a_reward_model_is_no_policy(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model, reader = models.open_reward(saved("granite"))
    models.save(model, reader, tmp_path / "left")
    with pytest.raises(LabError, match="holds a reward model, no language model"):
        models.open_policy(tmp_path / "left")


# ---- what a configuration says ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "mpt", *WITHOUT_STOCK_HEAD])
def test_what_is_known_before_weights_are_read(family: str) -> None:
    facts = heads.examine(config_of(family), family)
    assert facts.parameters > 1e6
    assert facts.stock_score_head == (family not in WITHOUT_STOCK_HEAD)
    assert facts.positions is None or facts.positions > 0
    assert (facts.positions is None) == (family in ("bloom", "mpt", "mamba"))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bert", "bidirectional"), ("roberta", "bidirectional"), ("electra", "bidirectional"),
        ("xlnet", "bidirectional"), ("bert-generation", "bidirectional"), ("reformer", "bidirectional"),
        ("t5", "an encoder with a decoder"), ("bart", "an encoder with a decoder"),
        ("whisper", "an encoder with a decoder"), ("trocr", "the decoder of a model with an encoder"),
        ("vit", "do not continue a text"), ("clip", "do not continue a text"),
        ("git", "more than one model (vision_config)"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_from_its_configuration(family: str, words: str) -> None:
    with pytest.raises(LabError) as caught:
        heads.examine(config_of(family), "the/model")
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"the/model: models of type {family}")
    assert words in line
    assert "Use a causal language model" in line


def test_a_bert_that_is_a_decoder_is_causal() -> None:
    assert heads.examine(config_of("bert", is_decoder=True), "x").config.model_type == "bert"


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_5", "mistral3"])
def test_of_a_model_for_images_too_the_text_model_is_used(family: str) -> None:
    facts = heads.examine(config_of(family), family)
    assert facts.config is not None
    assert not facts.config.sub_configs


def test_a_configuration_that_no_model_can_be_built_of_is_one_line() -> None:
    """Whatever the family's own code makes of it."""
    config = config_of("llama", num_hidden_layers=1)
    config.rope_parameters = {"rope_type": "no such"}
    with pytest.raises(LabError) as caught:
        heads.examine(config, "the/model")
    [line] = str(caught.value).splitlines()
    assert line.startswith("the/model: no llama can be built as its config.json says: ")


def test_quantized_weights_are_refused() -> None:
    config = config_of("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(LabError, match="quantized"):
        heads.examine(config, "x")


def test_a_model_that_sees_what_it_predicts_is_refused_whatever_its_configuration_says() -> None:
    """By what it computes, on four tokens."""
    from transformers import BertConfig, BertLMHeadModel

    options: dict[str, Any] = {"vocab_size": 40, **SIZES}
    options.pop("num_key_value_heads")
    heads.check_causal(BertLMHeadModel(BertConfig(**options, is_decoder=True)), "x")
    with pytest.raises(LabError, match="x: is bidirectional"):
        heads.check_causal(BertLMHeadModel(BertConfig(**options)), "x")
