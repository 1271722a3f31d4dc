"""Folders as they are found and left: number formats, parts, pickled tensors, adapters and their bases."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families import random_model, tiny_config
from benchmarks.family_stages import tokenizer
from lab.errors import LabError
from rlhf import heads, labgpt, models
from rlhf.config import ModelConfig
from rlhf.pipeline import find_model
from rlhf.sft import lora

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 still asks for what transformers 5.23 renamed.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

FAMILIES = ["llama", "gpt2", "qwen2"]
"""Two that LabGPT computes, and one that it does not."""


def stored(folder: Path, dtype: torch.dtype, form: str, source: Path) -> Path:
    """A copy of a model's folder in another number format and form."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    many = form.endswith("parts")
    model.save_pretrained(folder, max_shard_size="3KB" if many else "1GB")
    if form.startswith("bin"):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
        for path in folder.glob("*.safetensors"):
            name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(path), folder / name)
            path.unlink()
    assert len([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) > 1 if many else True
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["safetensors", "safetensors in parts", "bin", "bin in parts"])
@pytest.mark.parametrize("rank", [0, 2])
def test_whatever_form_weights_are_in_they_are_read(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str, form: str, rank: int
) -> None:
    """Also through LabGPT, and as reward model."""
    source = save_tiny(family)
    folder = stored(tmp_path / "model", torch.float32, form, source)
    expected, _ = models.open_policy(source)
    model = models.start(ModelConfig(path=str(folder), lora_rank=rank), models.open_tokenizer(str(folder)), 0)
    assert isinstance(model, labgpt.LabGPTForCausalLM) == (rank == 0 and family != "qwen2")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, expected.eval()(ids).logits)
    assert models.open_reward(folder)[0].score.weight.shape == (1, 16)


@pytest.mark.parametrize("family", [*FAMILIES, "labgpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_keeps_its_number_format(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    """It is trained in fp32, and what a stage leaves is as large as what it began with."""
    folder = stored(tmp_path / "half", dtype, "safetensors", save_tiny(family))
    for open_, name in ((models.open_policy, "policy"), (models.open_reward, "reward")):
        model, tokenizer = open_(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        models.save(model, tokenizer, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        formats = {key: tensor.dtype for key, tensor in tensors.items() if key != "score.weight"}
        assert set(formats.values()) == {dtype}
        assert tensors.get("score.weight", torch.zeros(1)).dtype == torch.float32, "scores need their bits"
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype)[6:]
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("half", "policy"))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), "nothing was trained"


def test_weights_too_large_for_their_format_are_written_in_fp32(
    tmp_path: Path, save_tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stored(tmp_path / "half", torch.float16, "safetensors", save_tiny("qwen2"))
    model, tokenizer = models.open_policy(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    models.save(model, tokenizer, tmp_path / "left")
    tensors = load_file(tmp_path / "left" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "written in fp32" in caplog.text


def test_with_lora_a_base_in_bf16_stays_in_it(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    """Where that is what is computed in; the adapters and the score layer are in fp32."""
    from peft import get_peft_model

    folder = stored(tmp_path / "half", torch.bfloat16, "safetensors", save_tiny("qwen2"))
    config = ModelConfig(path=str(folder), lora_rank=2)
    policy, tokenizer = models.open_policy(folder, keep_format=True)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    adapted: Any = get_peft_model(policy, lora(config, "CAUSAL_LM", policy))
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    models.save(adapted, tokenizer, tmp_path / "left")
    tensors = load_file(tmp_path / "left" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    reward, _ = models.open_reward(folder, keep_format=True)
    assert reward.score.weight.dtype == torch.float32
    assert reward.eval()(torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_are_not_all_there_are_refused(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str, damage: str
) -> None:
    """transformers would put random ones in their place, and say so to nobody."""
    folder = Path(shutil.copytree(save_tiny(family), tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "norm" in name or "ln_" in name)
    tensor = tensors.pop(name)
    if damage == "shape":
        tensors[name] = torch.zeros(len(tensor) + 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for open_ in (models.open_policy, models.open_reward):
        with pytest.raises(LabError) as caught:
            open_(folder)
        [line] = str(caught.value).splitlines()
        assert str(folder) in line
        assert name in line


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_that_would_run_code_runs_none(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str
) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    folder = Path(shutil.copytree(save_tiny(family), tmp_path / "hostile"))
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch()}, folder / "pytorch_model.bin")
    for open_ in (models.open_policy, models.open_reward):
        with pytest.raises(LabError) as caught:
            open_(folder)
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_a_generation_config_that_contradicts_itself_is_not_found_after_training(
    tmp_path: Path, save_tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As of Llama 2: do_sample false beside a temperature. transformers opens it, and refuses to save it."""
    folder = Path(shutil.copytree(save_tiny("qwen2"), tmp_path / "odd"))
    path = folder / "generation_config.json"
    odd = {"do_sample": False, "temperature": 0.0, "top_p": 0.6, "max_length": 20, "forced_eos_token_id": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    model, tokenizer = models.open_policy(folder)
    models.save(model, tokenizer, tmp_path / "left")
    again, _ = models.open_policy(tmp_path / "left")
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "contradicts itself" in caplog.text


# ---- adapters ----


@pytest.fixture
def run(tmp_path: Path, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with a model, and one that an adapter was trained on top of it, named relatively."""
    from peft import get_peft_model

    monkeypatch.chdir(tmp_path)
    base, left = Path("runs/a/sft/model"), Path("runs/a/ppo/model")
    shutil.copytree(save_tiny("qwen2"), base)
    model, tokenizer = models.open_policy(base)
    adapted: Any = get_peft_model(model, lora(ModelConfig(lora_rank=2), "CAUSAL_LM", model))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    models.save(adapted, tokenizer, left)
    return tmp_path / "runs" / "a"


IDS = torch.tensor([[5, 6, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_stock_peft_opens_an_adapter_from_any_folder(run: Path) -> None:
    code = (
        "import sys, torch\nfrom peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())\n"
    )
    adapter = str(run / "ppo" / "model" / "adapter")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, adapter],
        capture_output=True, text=True, check=False, cwd="/", env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    merged = models.open_policy(run / "ppo" / "model")[0]
    assert float(result.stdout) == pytest.approx(logits(merged).sum().item(), rel=1e-3)


def test_ours_opens_an_adapter_where_the_whole_run_was_moved(run: Path, tmp_path: Path) -> None:
    merged = logits(models.open_policy(run / "ppo" / "model")[0])
    moved = run.rename(tmp_path / "elsewhere")
    opened, _ = models.open_policy(moved / "ppo" / "model" / "adapter")
    torch.testing.assert_close(logits(opened), merged, rtol=1e-4, atol=1e-5)
    adapter = str(moved / "ppo/model/adapter")
    started = models.start(ModelConfig(path=adapter), models.open_tokenizer(adapter), 0)
    torch.testing.assert_close(logits(started), merged, rtol=1e-4, atol=1e-5)


def test_lab_chat_takes_an_adapters_folder(run: Path) -> None:
    adapter = run / "ppo" / "model" / "adapter"
    assert find_model(adapter) == adapter


def test_an_adapter_is_not_put_on_another_model(run: Path) -> None:
    weights = run / "sft" / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(LabError, match="is not the model it was trained on"):
        models.open_policy(run / "ppo" / "model" / "adapter")
    shutil.rmtree(run / "sft")
    with pytest.raises(LabError, match="the model it was trained on is not at"):
        models.open_policy(run / "ppo" / "model" / "adapter")


def test_examine_knows_an_adapters_base_and_a_fresh_model(run: Path) -> None:
    facts = models.examine(ModelConfig(path=str(run / "ppo" / "model" / "adapter")))
    assert isinstance(facts, heads.Facts)
    assert facts.config.model_type == "qwen2"
    assert facts.positions == 64
    assert models.examine(ModelConfig()) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_a_larger_one_has_the_head_of_the_whole(tied: bool, tmp_path: Path) -> None:
    """GOT-OCR2, Mistral 3, InternVL and others say what is tied in the whole's configuration alone."""
    config = tiny_config("got_ocr2")
    config.tie_word_embeddings, config.text_config.tie_word_embeddings = tied, not tied
    whole = random_model(config)
    whole.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    policy, _ = models.open_policy(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["lost", "renamed", "of other modules", "DoRA's"])
def test_an_adapter_of_which_a_part_would_do_nothing_is_refused(run: Path, change: str) -> None:
    """PEFT warns of it, and the model answers as if it had not been trained."""
    adapter = run / "ppo" / "model" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    first = min(tensors)
    if change == "DoRA's":
        config = adapter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    elif change == "of other modules":
        tensors[first.replace("q_proj", "qkv")] = tensors[first].clone()
        tensors["\x1b]0;obey\x07"] = torch.ones(1)
    else:
        moved = tensors.pop(first)
        tensors |= {first.replace("model.", "_orig_mod."): moved} if change == "renamed" else {}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LabError, match=r"of the adapter's tensors are (missing|of modules)"):
        models.open_policy(adapter)


@pytest.mark.parametrize(
    "key",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"],
)
def test_a_pattern_of_modules_that_takes_forever_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(models, "MATCH_SECONDS", 0.3)
    adapter = run / "ppo" / "model" / "adapter"
    config = adapter / "adapter_config.json"
    pattern = "(.*.*.*.*.*.*.*.*)*x"
    value: Any = {pattern: 4} if key.endswith("_pattern") and key != "layers_pattern" else pattern
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value, "layers_to_transform": [0]}))
    with pytest.raises(LabError, match="patterns of modules take more than"):
        models.open_policy(adapter)


def test_an_adapter_of_endless_copies_of_layers_is_refused(run: Path) -> None:
    adapter = run / "ppo" / "model" / "adapter"
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_replication": [[0, 2]] * 100_000}))
    with pytest.raises(LabError, match="layer_replication has 100,000 parts"):
        models.open_policy(adapter)


def test_ordinary_patterns_of_modules_are_taken(run: Path) -> None:
    adapter = run / "ppo" / "model" / "adapter"
    expected = logits(models.open_policy(adapter)[0])
    config = adapter / "adapter_config.json"
    values = json.loads(config.read_text())
    last = "|".join(sorted({name.rpartition(".")[2] for name in values["target_modules"]}))
    values |= {
        "target_modules": rf".*\.layers\.\d+\.(self_attn|mlp)\.({last})",
        "rank_pattern": {"q.?_proj": 2},
    }
    config.write_text(json.dumps(values))
    torch.testing.assert_close(logits(models.open_policy(adapter)[0]), expected)
