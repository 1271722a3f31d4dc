"""LabGPT among transformers and TRL: their own models as reference, their checklist, their folders."""

import copy
import inspect
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lab.errors import LabError
from rlhf.labgpt import (
    LabGPTConfig,
    LabGPTForCausalLM,
    LabGPTForSequenceClassification,
    LabGPTModel,
    LabModel,
    load,
    save_stock,
)
from supervised import backbones
from supervised.backbones.transformer import GPT2_OPTIONS, INIT_STD, PRESETS, Attention, LabGPT
from tests.host_reads import HostReads

PAD, EOS, VOCAB = 0, 1, 50
SMALL = {
    "vocab_size": VOCAB,
    "width": 32,
    "n_layer": 2,
    "max_positions": 32,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}
GPT2 = {**GPT2_OPTIONS, **SMALL, "mlp_width": 40, "norm_eps": 0.1}
LLAMA = {**SMALL, "n_kv_head": 2, "mlp_width": 40, "rope_theta": 500.0, "tie_word_embeddings": False}
POST_NORM = {**SMALL, "norm_position": "post"}
VARIANTS = {"gpt2": GPT2, "llama": LLAMA, "llama, tied": SMALL, "post-norm": POST_NORM}
STOCK_VARIANTS = {**VARIANTS, "llama, biases": {**SMALL, "bias": True}}
del STOCK_VARIANTS["post-norm"]
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
each_stock_variant = pytest.mark.parametrize("options", STOCK_VARIANTS.values(), ids=STOCK_VARIANTS)


def shake(model: PreTrainedModel) -> None:
    """Makes every parameter, norms and biases too, matter to the output."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def language_model(options: dict[str, Any]) -> LabGPTForCausalLM:
    torch.manual_seed(0)
    model = LabGPTForCausalLM(LabGPTConfig(**options)).eval()
    shake(model)
    return model


def reward_model(options: dict[str, Any]) -> LabGPTForSequenceClassification:
    torch.manual_seed(0)
    model = LabGPTForSequenceClassification(LabGPTConfig(**{**options, "num_labels": 1})).eval()
    shake(model)
    return model


def some_ids(batch: int = 2, time: int = 7) -> Tensor:
    return torch.randint(2, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (3, 7) each, of 7, 4 and 2 tokens."""
    ids, mask = some_ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    for row, length in ((1, 4), (2, 2)):
        padding = slice(0, 7 - length) if side == "left" else slice(length, 7)
        ids[row, padding], mask[row, padding] = PAD, 0
    return ids, mask


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() < 1e-5)


# --- the same numbers as transformers' own models


def test_it_is_transformers_gpt2(tmp_path: Path) -> None:
    stock = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            layer_norm_epsilon=0.1,
            bos_token_id=3,
        )
    ).eval()
    shake(stock)
    stock.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = some_ids()
    assert stock(ids).logits.std() > 0.5
    assert close(model(ids).logits, stock(ids).logits)
    assert close(model(ids, labels=ids).loss, stock(ids, labels=ids).loss)
    assert model.config.dropout == 0.1  # as stock GPT-2 has it
    assert model.config.bos_token_id == 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_it_is_transformers_llama(tmp_path: Path, n_kv_head: int, tied: bool) -> None:
    stock = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=n_kv_head,
            tie_word_embeddings=tied,
            rms_norm_eps=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()
    shake(stock)
    stock.save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = some_ids()
    assert stock(ids).logits.std() > 0.5
    assert close(model(ids).logits, stock(ids).logits)
    ids, mask = padded("left")
    real = mask.bool()
    assert close(model(ids, attention_mask=mask).logits[real], stock(ids, attention_mask=mask).logits[real])


# --- what transformers and TRL ask of a model, point by point


def test_config_has_defaults_answers_to_both_names_and_is_registered(tmp_path: Path) -> None:
    config = LabGPTConfig()
    assert config.options() == LabGPTConfig(**config.options()).options()
    for name, parameter in inspect.signature(LabGPT).parameters.items():
        if parameter.default not in (inspect.Parameter.empty, None):
            assert getattr(config, name) == parameter.default, name
    by_other_names: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3}
    expected = {**config.options(), "width": 64, "n_layer": 3, "mlp_width": 192}
    assert LabGPTConfig(**by_other_names).options() == expected
    LabGPTConfig(**LLAMA).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LabGPTConfig)
    assert again.options() == LabGPTConfig(**LLAMA).options()
    assert not again.tie_word_embeddings
    for auto, cls in (
        (AutoModel, LabGPTModel),
        (AutoModelForCausalLM, LabGPTForCausalLM),
        (AutoModelForSequenceClassification, LabGPTForSequenceClassification),
    ):
        assert type(auto.from_config(again)) is cls


@each_variant
@pytest.mark.parametrize("make", [language_model, reward_model])
def test_save_pretrained_and_back_is_bit_exact(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    model = make(options)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_tensors(model, again)
    head = "reward" if make is reward_model else "causal_lm"
    loaded = load(tmp_path, head=head)  # type: ignore[call-overload]
    assert same_tensors(model, loaded)
    ids = some_ids()
    for other in (again, loaded):
        # Equal weights, but where they lie in memory decides, on some processors, in which order is summed.
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_tied_weights_are_one_tensor_in_memory_on_disk_and_after_loading(tmp_path: Path) -> None:
    for options, tied in ((SMALL, True), (LLAMA, False)):
        model = language_model(options)
        model.save_pretrained(tmp_path)
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
        for again in (model, AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)):
            assert (again.lm_head.weight is again.model.gpt.tokens.weight) is tied


def test_it_generates_and_its_vocabulary_can_grow() -> None:
    model = language_model(SMALL)
    assert isinstance(model, GenerationMixin)
    assert model.get_input_embeddings() is model.model.gpt.tokens
    assert model.get_output_embeddings() is model.lm_head
    before = model(some_ids()).logits
    model.resize_token_embeddings(VOCAB + 3)
    after = model(some_ids()).logits
    assert after.shape[-1] == model.config.vocab_size == VOCAB + 3
    assert model.lm_head.weight is model.model.gpt.tokens.weight
    torch.testing.assert_close(before, after[..., :VOCAB])


def test_forward_names_its_arguments() -> None:
    names = inspect.signature(LabGPTForCausalLM.forward).parameters
    shared = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}
    assert shared | {"logits_to_keep", "labels"} < names.keys()
    assert shared | {"labels"} < inspect.signature(LabGPTForSequenceClassification.forward).parameters.keys()


def test_outputs_on_request() -> None:
    model, ids = language_model(SMALL), some_ids()
    logits = model(ids).logits
    assert close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    assert close(model(inputs_embeds=model.model.gpt.tokens(ids)).logits, logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    assert close(model.lm_head(hidden[-1]), logits)
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="token ids must lie between 0 and 49"):
        model(ids + VOCAB)


def test_loss_is_the_mean_over_labels_that_count_or_over_the_trainers_number() -> None:
    model, ids = language_model(SMALL), some_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(ids, labels=labels)
    log_probs = outputs.logits.log_softmax(-1)
    picked = [
        log_probs[row, time - 1, ids[row, time]].item()
        for row in range(2)
        for time in range(1, 7)
        if labels[row, time] >= 0
    ]
    assert outputs.loss.item() == pytest.approx(-sum(picked) / len(picked), rel=1e-5)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(3)).loss
    assert summed.item() == pytest.approx(-sum(picked) / 3, rel=1e-5)


@each_variant
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_uncached(options: dict[str, Any], cache: str) -> None:
    model = language_model(options)
    for ids, mask in ((some_ids(), torch.ones(2, 7, dtype=torch.int64)), padded("left")):
        common: dict[str, Any] = {
            "attention_mask": mask,
            "max_new_tokens": 8,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "eos_token_id": None,
            "pad_token_id": PAD,
        }
        cached = model.generate(ids, **common, cache_implementation=cache)
        uncached = model.generate(ids, **common, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert close(torch.stack(cached.logits), torch.stack(uncached.logits))


@each_variant
def test_a_prompt_may_enter_the_cache_in_pieces(options: dict[str, Any]) -> None:
    model, (ids, mask) = language_model(options), padded("left")
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    second = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    assert close(second.logits[mask[:, 4:].bool()], whole[:, 4:][mask[:, 4:].bool()])
    whole = model(ids[:1]).logits
    first = model(ids[:1, :4], use_cache=True)
    second = model(ids[:1, 4:], past_key_values=first.past_key_values)
    assert close(second.logits, whole[:, 4:])


@each_variant
def test_a_left_padded_batch_equals_its_rows_alone(options: dict[str, Any]) -> None:
    model, (ids, mask) = language_model(options), padded("left")
    logits = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        assert close(logits[row, mask[row].bool()], model(alone).logits[0])
        expected = model.generate(alone, max_new_tokens=4, do_sample=False)[0, alone.shape[1] :]
        assert torch.equal(generated[row, 7 : 7 + len(expected)], expected)
    explicit = (mask.cumsum(-1) - 1).clamp_min(0)
    assert torch.equal(logits, model(ids, attention_mask=mask, position_ids=explicit).logits)
    shifted = model(ids, attention_mask=mask, position_ids=explicit * 2).logits
    assert not torch.allclose(logits, shifted, atol=1e-2), "passed positions must be respected"


@each_variant
def test_packed_documents_do_not_see_each_other(options: dict[str, Any]) -> None:
    model, ids = language_model(options), some_ids(2, 9)
    lengths = ((3, 4, 2), (1, 8))
    position_ids = torch.tensor([[p for length in row for p in range(length)] for row in lengths])
    logits = model(ids, position_ids=position_ids).logits
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            span = slice(start, start + length)
            assert close(logits[row, span], model(ids[row : row + 1, span]).logits[0])
            start += length
    flat = model(ids[:1], position_ids=position_ids[:1]).logits
    assert close(flat, logits[:1])


def test_nothing_in_it_comes_back_uninitialised(tmp_path: Path) -> None:
    model = reward_model(GPT2)
    assert not list(model.buffers())
    layers = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    bare = [type(m).__name__ for m in model.modules() if m._parameters and not isinstance(m, layers)]
    assert not bare, "a parameter outside these layers would not be refilled"
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "blocks.1" in name or name == "score.weight"]:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = LabGPTForSequenceClassification.from_pretrained(tmp_path)
    block: Any = again.model.gpt.blocks[1]
    assert block.attention.q.weight.std().item() == pytest.approx(INIT_STD, rel=0.1)
    assert block.attention.out.weight.std().item() == pytest.approx(INIT_STD / 2, rel=0.1)  # 2 = sqrt(2 * 2)
    assert (block.mlp_norm.weight == 1).all()
    assert not block.mlp.up.bias.any()
    assert again.score.weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.4)


def test_initial_weights_are_the_backbones() -> None:
    torch.manual_seed(0)
    model = LabGPTForCausalLM(LabGPTConfig(vocab_size=200, width=128, n_layer=8))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            expected = INIT_STD / 4 if name.endswith("out.weight") else INIT_STD  # 4 = sqrt(2 * 8)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    scores = LabGPTForSequenceClassification(LabGPTConfig(vocab_size=9, width=4096, n_layer=1, n_head=32))
    assert scores.score.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)


@each_variant
def test_gradient_checkpointing_changes_memory_not_gradients(options: dict[str, Any]) -> None:
    plain, (ids, mask) = language_model(options).train(), padded("left")
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    blocks = [m for m in checkpointed.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert [block.gradient_checkpointing for block in blocks] == [True, True]
    calls: Counter[str] = Counter()
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert calls == {"plain": 2, "checkpointed": 4}
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.isfinite().all(), "a row of padding sees nothing, which must not become NaN"
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@each_variant
def test_bf16_autocast_is_close(options: dict[str, Any]) -> None:
    model, ids = language_model(options), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids)
        rough.loss.backward()
    exact = model(ids, labels=ids)
    assert rough.logits.dtype == torch.bfloat16
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)


def test_only_its_own_attention() -> None:
    with pytest.raises(ValueError, match="'eager': LabGPT has 'sdpa' alone"):
        LabGPTForCausalLM(LabGPTConfig(**{**SMALL, "attn_implementation": "eager"}))


@each_variant
def test_reward_is_the_last_tokens_on_whichever_side_the_padding_is(options: dict[str, Any]) -> None:
    model = reward_model(options)
    for side in ("left", "right"):
        ids, mask = padded(side)
        ids[1, mask[1].bool()] = torch.tensor([5, PAD, 7, PAD])  # the pad id is no proof of padding
        scores = model(ids, attention_mask=mask).logits
        assert scores.shape == (3, 1)
        for row in range(3):
            assert close(scores[row], model(ids[row : row + 1, mask[row].bool()]).logits[0])
    labelled = model(ids, attention_mask=mask, labels=torch.zeros(3))
    assert labelled.loss.item() == pytest.approx(labelled.logits.square().mean().item())


# --- ready for a GPU


def training_batches(device: str) -> list[dict[str, Tensor]]:
    ids, mask = padded("left")
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    batches = [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": restarting.expand(3, -1)},
        {"input_ids": ids, "position_ids": restarting},
    ]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def train_on(model: LabModel, batch: dict[str, Tensor]) -> None:
    labels = batch["input_ids"] if isinstance(model, LabGPTForCausalLM) else batch["input_ids"][:, 0].float()
    model(**batch, labels=labels).loss.backward()


@each_variant
@pytest.mark.parametrize("make", [language_model, reward_model])
def test_a_training_step_runs_on_the_meta_device(make: Any, options: dict[str, Any]) -> None:
    model = make(options).to("meta").train()
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in training_batches("meta"):  # a tensor left on the CPU, or a number read back, raises here
        train_on(model, batch)
        optimizer.step()
        optimizer.zero_grad()


@each_variant
@pytest.mark.parametrize("make", [language_model, reward_model])
def test_a_training_step_never_waits_for_the_device(make: Any, options: dict[str, Any]) -> None:
    model = make(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with HostReads() as reads:
        for batch in training_batches("cpu"):
            train_on(model, batch)
            optimizer.step()
    assert not reads.seen
    with HostReads() as reads:  # the detector detects
        bool(torch.ones(1).sum() > 0)
    assert reads.seen


# --- folders


@each_stock_variant
def test_language_models_go_to_stock_folders_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model = language_model({**options, "dropout": 0.1})
    model.generation_config.update(do_sample=True, temperature=0.7)
    save_stock(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    kind = "gpt2" if options is GPT2 else "llama"
    assert config["model_type"] == kind
    assert config["lab_gpt"] is True
    assert config["architectures"] == [{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[kind]]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock).__name__ == config["architectures"][0]
    assert close(stock(some_ids()).logits, model(some_ids()).logits)
    again = load(tmp_path / "model")
    assert same_tensors(model, again)
    assert again.config.options() == model.config.options()
    assert again.generation_config.eos_token_id == EOS
    assert again.generation_config.temperature == 0.7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left beside it"
    monkeypatch.chdir(tmp_path / "model")
    save_stock(again, ".")  # over itself
    assert same_tensors(model, load("."))


@each_stock_variant
def test_reward_models_go_to_stock_folders_and_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model = reward_model(options)
    save_stock(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == PAD
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = load(tmp_path, head="reward")
    assert same_tensors(model, again)
    assert again.num_labels == stock.num_labels == 1
    for side in ("left", "right"):
        ids, mask = padded(side)
        # Stock GPT-2 does not derive positions from the mask; stock Llama's are relative.
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        scores = stock(ids, attention_mask=mask, position_ids=positions).logits
        assert scores.std() > 0.1
        assert close(model(ids, attention_mask=mask).logits, scores)
        assert close(again(ids, attention_mask=mask).logits, scores)


def test_stock_reward_models_open_as_ours(tmp_path: Path) -> None:
    stock = GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            pad_token_id=PAD,
            id2label={0: "score"},
        )
    ).eval()
    shake(stock)
    stock.save_pretrained(tmp_path)
    ids, mask = padded("right")
    scores = load(tmp_path, head="reward")(ids, attention_mask=mask).logits
    assert close(scores, stock(ids, attention_mask=mask).logits)


@each_variant
def test_a_reward_model_starts_from_a_language_model(tmp_path: Path, options: dict[str, Any]) -> None:
    wide = {**options, "width": 512, "n_head": 4}
    policy = language_model(wide)
    save_stock(policy, tmp_path)
    torch.manual_seed(3)
    reward = load(tmp_path, head="reward")
    assert same_tensors(reward.model, policy.model)
    assert reward.score.weight.shape == (1, 512)
    assert reward.score.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    torch.manual_seed(3)
    assert torch.equal(load(tmp_path, head="reward").score.weight, reward.score.weight)
    assert not torch.equal(load(tmp_path, head="reward").score.weight, reward.score.weight)


def test_what_no_stock_architecture_has_keeps_a_format_of_its_own(tmp_path: Path) -> None:
    model = language_model(POST_NORM)
    save_stock(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lab_gpt"
    assert same_tensors(model, load(tmp_path))
    assert same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_saving_keeps_the_number_format_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = language_model(LLAMA).bfloat16()
    save_stock(model, tmp_path)
    again = load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert same_tensors(model, again)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    reward = load(tmp_path, head="reward")
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.bfloat16}


def test_a_save_that_breaks_off_leaves_no_model_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        if self.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(LabError, match=r"No space left on device\. Free some space"):
        save_stock(language_model(LLAMA), tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_reference_model_is_found_where_the_policy_came_from(tmp_path: Path) -> None:
    save_stock(language_model(LLAMA), tmp_path)
    policy = load(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(policy.config._name_or_path)
    assert close(reference(some_ids()).logits, policy(some_ids()).logits)


def test_weights_move_between_the_language_model_and_the_bare_backbone() -> None:
    model = language_model(LLAMA)
    bare = backbones.build("gpt", **model.config.options())
    bare.load_state_dict(model.model.gpt.state_dict())
    assert torch.equal(model.lm_head(bare(some_ids())), model(some_ids()).logits)


def test_presets_are_configurations() -> None:
    with torch.device("meta"):
        model = LabGPTForCausalLM(LabGPTConfig(**PRESETS["gpt2"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


STOCK_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
ids = torch.tensor(json.loads(sys.argv[2]))
result = {}
for kind in ("gpt2", "llama"):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{kind}")
    result[kind] = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    reward = AutoModelForSequenceClassification.from_pretrained(f"{sys.argv[1]}/{kind}_reward")
    result[f"{kind}_reward"] = reward(ids).logits.tolist()
assert not {"rlhf", "supervised", "lab"} & sys.modules.keys()
print(json.dumps(result))
"""


def test_a_process_without_this_package_generates_the_same(tmp_path: Path) -> None:
    ids = some_ids()
    expected: dict[str, Any] = {}
    rewards: dict[str, Tensor] = {}
    for kind, options in (("gpt2", GPT2), ("llama", LLAMA)):
        policy, reward = language_model(options), reward_model(options)
        save_stock(policy, tmp_path / kind)
        save_stock(reward, tmp_path / f"{kind}_reward")
        expected[kind] = policy.generate(ids, max_new_tokens=8, do_sample=False).tolist()
        rewards[f"{kind}_reward"] = reward(ids).logits
    ran = subprocess.run(
        [sys.executable, "-c", STOCK_PROCESS, str(tmp_path), json.dumps(ids.tolist())],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    for kind, tokens in expected.items():
        assert result[kind] == tokens
    for kind, scores in rewards.items():
        assert close(torch.tensor(result[kind]), scores)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_embd": 64}, r"c_attn.bias is \(96,\), by config.json it should be \(192,\)"),
        ({"n_layer": 3}, r"weights lack transformer.h.2.*\(12 in all\)"),
        ({"n_layer": 1}, r"weights have, unlike config.json, transformer.h.1"),
        ({"activation_function": "relu"}, "activation_function 'relu', which LabGPT does not compute"),
        ({"attn_pdrop": 0.3}, "attn_pdrop 0.3, which LabGPT does not compute"),
        ({"model_type": "bert"}, "holds a 'bert'"),
        ({"model_type": "no_such"}, "config.json: describes no model"),
        ({"n_embd": "wide"}, "config.json: describes no model"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, change: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_stock(language_model(GPT2), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(LabError, match=said) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_rope_scaling_is_refused(tmp_path: Path) -> None:
    save_stock(language_model(LLAMA), tmp_path)
    file = tmp_path / "config.json"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))
    with pytest.raises(LabError, match="rope_parameters"):
        load(tmp_path)


def test_a_folder_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(LabError, match=r"has no config\.json"):
        load(tmp_path)
    save_stock(language_model(GPT2), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabError, match="weights cannot be loaded"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(LabError, match="weights cannot be loaded"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LabError, match=r"config\.json: damaged"):
        load(tmp_path)


def test_mistakes_about_heads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head 'value' is none of"):
        load(tmp_path, head="value")  # type: ignore[call-overload]
    save_stock(reward_model(LLAMA), tmp_path)
    with pytest.raises(LabError, match="holds a reward model"):
        load(tmp_path)
    with pytest.raises(LabError, match="pad_token_id"):
        save_stock(reward_model({**LLAMA, "pad_token_id": None}), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be written"):
        save_stock(language_model(LLAMA), tmp_path / "file")


# --- TRL


@pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own deprecations
def test_trl_finds_the_class_of_a_folder_in_our_own_format(tmp_path: Path) -> None:
    from trl.trainer.utils import create_model_from_path

    model = language_model(POST_NORM)
    save_stock(model, tmp_path)
    assert same_tensors(create_model_from_path(str(tmp_path), device_map=None), model)


@pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own deprecations
def test_trl_trains_it_with_its_defaults(tmp_path: Path) -> None:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    model = language_model(GPT2)
    before = copy.deepcopy(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a " * n, "completion": "b a"} for n in (1, 2, 3, 4)]),
        processing_class=tokenizer,
    )
    trainer.train()
    [logged] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert math.isfinite(logged["loss"])
    assert logged["grad_norm"] > 0
    assert not same_tensors(model, before)


def test_what_centres_and_scales_a_reward_model_is_kept(tmp_path: Path) -> None:
    config = LabGPTConfig(vocab_size=9, width=8, n_layer=1, n_head=1, max_positions=8, pad_token_id=0)
    model = LabGPTForSequenceClassification(config)
    model.config.reward_shift, model.config.reward_scale = 1.25, 0.5
    save_stock(model, tmp_path / "model")
    opened = load(tmp_path / "model", head="reward").config
    assert (opened.reward_shift, opened.reward_scale) == (1.25, 0.5)
