"""Opening models and tokenizers, ours and strangers': what is mended, and what is refused in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lab.errors import LabError
from rlhf import models, reviews
from rlhf.config import ModelConfig
from rlhf.labgpt import LabGPTForCausalLM
from rlhf.tokenization import prepare

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = Dataset.from_list([{"prompt": "review the pizza :", "completion": " it is great ."}])
TALKS = Dataset.from_list([{"prompt": [{"role": "user", "content": "hello"}]}])
TINY = {"width": 16, "n_layer": 1, "n_head": 2, "mlp_width": 32, "max_positions": 32}


def refused(do: Callable[..., Any], *arguments: Any) -> str:
    """Does what must be refused; returns the one line it is refused in."""
    with pytest.raises(LabError) as caught:
        do(*arguments)
    [line] = str(caught.value).splitlines()
    return line


def stock_tokenizer(**special: Any) -> Any:
    """A byte-level tokenizer with the special tokens given, as families on the Hub have them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture
def stock(tmp_path: Path) -> Callable[..., Path]:
    """A tiny Llama's folder with a tokenizer of the special tokens given."""
    import transformers as hf

    def save(**special: Any) -> Path:
        tokenizer = stock_tokenizer(**special)
        config = hf.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "stock")
        tokenizer.save_pretrained(tmp_path / "stock")
        return tmp_path / "stock"

    return save


# ---- opening ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "labgpt"])
def test_what_a_stage_left_opens_as_policy_and_as_reward_model(
    save_tiny: Callable[..., Path], family: str
) -> None:
    policy, tokenizer = models.open_policy(save_tiny(family))
    reward, same = models.open_reward(save_tiny(family, reward=True))
    assert same.get_vocab() == tokenizer.get_vocab()
    ids = torch.tensor([tokenizer("review the pizza :").input_ids])
    assert policy(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert reward(ids).logits.shape == (1, 1)
    for model in (policy, reward):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.pad_token_id == tokenizer.pad_token_id
    assert Path(policy.config.name_or_path) == save_tiny(family), "where PPO looks for its reference"


@pytest.mark.parametrize("family", ["llama", "labgpt"])
def test_a_model_saved_in_half_precision_opens_in_fp32(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str
) -> None:
    """PPO's small steps are lost in bf16's 8 bits."""
    # reveals: LabGPT's loader keeps the format it finds.
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(save_tiny(family), tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    for opened in (models.open_policy(folder)[0], models.open_reward(folder)[0]):
        assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}


def test_a_reward_model_begins_with_the_policys_weights(save_tiny: Callable[..., Path]) -> None:
    policy, _ = models.open_policy(save_tiny("llama"))
    reward, _ = models.open_reward(save_tiny("llama"))
    assert reward.score.weight.shape == (1, 16)
    for (name, wanted), got in zip(
        policy.model.state_dict().items(), reward.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "labgpt"])
def test_saved_and_opened_is_the_same(tmp_path: Path, save_tiny: Callable[..., Path], family: str) -> None:
    model, tokenizer = models.open_policy(save_tiny(family))
    models.save(model, tokenizer, tmp_path)
    again, _ = models.open_policy(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert not (tmp_path / "adapter").exists()


# ---- LabGPT from nothing ----


def begun(config: ModelConfig, demonstrations: Any, source: str, seed: int = 0) -> tuple[Any, Any]:
    """Model and tokenizer as SFT begins with them."""
    tokenizer = models.start_tokenizer(config, demonstrations, source)
    prepare(tokenizer, config, False, source)
    return models.start(config, tokenizer, seed), tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_fine_tuning_computes_as_a_labgpt_what_one_can(
    tmp_path: Path, save_tiny: Callable[..., Path], family: str
) -> None:
    """The same logits, quicker; adapters are for the model by its own names."""
    folder = save_tiny(family)
    full, adapted = (begun(ModelConfig(path=str(folder), lora_rank=rank), [], "")[0] for rank in (0, 2))
    assert isinstance(full, LabGPTForCausalLM)
    assert type(adapted).__module__.startswith("transformers.")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(full(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    key = {"llama": "attention_dropout", "gpt2": "attn_pdrop"}[
        family
    ]  # a LabGPT would have it elsewhere, too
    (other / "config.json").write_text(json.dumps({**settings, key: 0.1}))
    assert not isinstance(begun(ModelConfig(path=str(other)), [], "")[0], LabGPTForCausalLM)


def test_the_seed_alone_decides_labgpts_first_weights() -> None:
    config = ModelConfig(labgpt=TINY)

    def first(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)  # whatever was drawn before
        return begun(config, TEXTS, "reviews", seed)[0].state_dict()

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_labgpt_speaks_the_words_of_its_task_or_of_its_data() -> None:
    model, tokenizer = begun(ModelConfig(labgpt=TINY), TEXTS, "reviews")
    assert tokenizer.get_vocab() == reviews.tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    model, tokenizer = begun(ModelConfig(labgpt=TINY), TEXTS, "demos.jsonl")
    for text in ("it is great .", "never seen: äöü 漢 \n\t"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 3
    assert (model.config.pad_token_id, model.config.eos_token_id) == tuple(special[:2])
    assert model.config.vocab_size == len(tokenizer)


def test_a_tokenizer_can_be_made_of_conversations() -> None:
    rows = [{"messages": [{"role": "user", "content": "what what what what"}]}] * 3
    _, tokenizer = begun(ModelConfig(labgpt=TINY), Dataset.from_list(rows), "chats.jsonl")
    assert len(tokenizer("what").input_ids) == 1


def test_labgpt_can_be_given_another_tokenizer(save_tiny: Callable[..., Path]) -> None:
    config = ModelConfig(labgpt=TINY, tokenizer=str(save_tiny("llama")))
    model, tokenizer = begun(config, TEXTS, "demos.jsonl")
    assert tokenizer.get_vocab() == reviews.tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"widht": 16}, "widht"), ({"width": 15, "n_head": 2}, "15"), ({"n_layer": "two"}, "two")],
)
def test_mistakes_in_labgpts_arguments_are_one_line(options: dict[str, Any], words: str) -> None:
    # reveals: a misspelt one is taken, and ignored.
    line = refused(begun, ModelConfig(labgpt=options), TEXTS, "reviews", 0)
    assert line.startswith(f"model.labgpt = {options}: ")
    assert words in line


# ---- padding and end ----


def test_padding_that_is_the_end_token_becomes_another_special_token(stock: Callable[..., Path]) -> None:
    """As SmolLM2 has it. Stock reward models take the last token that is no padding for the last."""
    folder = stock(
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    for open_ in (models.open_policy, models.open_reward):
        model, tokenizer = open_(folder)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert tokenizer.pad_token_id < model.config.vocab_size


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),  # Llama 2
        ({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, "<|begin_of_text|>"),  # Llama 3
        ({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}, "<pad>"),  # its own stays
    ],
)
def test_a_tokenizer_without_padding_gets_a_special_token_to_spare(
    stock: Callable[..., Path], special: dict[str, str], pad: str
) -> None:
    model, tokenizer = models.open_policy(stock(**special))
    assert tokenizer.pad_token == pad
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_whose_only_special_token_is_the_end_gets_a_new_one(stock: Callable[..., Path]) -> None:
    """As GPT-2 has it: the first, the last and the unknown token are one."""
    folder = stock(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    # reveals: it is refused, and with it every GPT-2 of the Hub.
    model, tokenizer = models.open_policy(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id < model.get_input_embeddings().weight.shape[0]
    assert models.open_reward(folder)[0].config.pad_token_id == tokenizer.pad_token_id


def test_the_stages_agree_about_padding(tmp_path: Path, stock: Callable[..., Path]) -> None:
    folder = stock(eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>")
    model, tokenizer = models.open_policy(folder)
    models.save(model, tokenizer, tmp_path / "left")
    assert models.open_reward(tmp_path / "left")[1].pad_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_an_end_token_is_refused(stock: Callable[..., Path]) -> None:
    folder = stock(pad_token="<pad>")
    line = refused(models.open_policy, folder)
    assert line.startswith(f"{folder}: its tokenizer has no eos_token, so no answer could end. Set one, or ")


# ---- chat templates ----


def test_conversations_need_a_chat_template(tokenizer: Any) -> None:
    line = refused(models.check_chat_template, tokenizer, TALKS, "talks.jsonl")
    assert line.startswith("talks.jsonl: holds conversations, but the model's tokenizer has no chat template")
    assert "model.tokenizer" in line
    models.check_chat_template(tokenizer, TEXTS, "texts.jsonl")
    models.check_chat_template(stock_tokenizer(eos_token="<e>", chat_template=CHATML), TALKS, "talks.jsonl")


def test_a_chat_template_stays_with_the_model(tmp_path: Path, stock: Callable[..., Path]) -> None:
    folder = stock(eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML)
    models.save(*models.open_policy(folder), tmp_path / "left")
    assert models.open_policy(tmp_path / "left")[1].chat_template == CHATML


# ---- refused ----


@pytest.mark.parametrize("open_", [models.open_policy, models.open_reward])
def test_a_folder_that_is_not_there(tmp_path: Path, open_: Callable[..., Any]) -> None:
    line = refused(open_, tmp_path / "nowhere")
    assert line.startswith(f"{tmp_path / 'nowhere'}: ")


@pytest.mark.parametrize("open_", [models.open_policy, models.open_reward])
def test_a_folder_that_holds_no_model(tmp_path: Path, open_: Callable[..., Any], tokenizer: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(open_, tmp_path / "empty").startswith(f"{tmp_path / 'empty'}: no tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    line = refused(open_, tmp_path / "tokenizer")
    assert line.startswith(f"{tmp_path / 'tokenizer'}: no ")
    assert "model" in line


@pytest.mark.parametrize("open_", [models.open_policy, models.open_reward])
@pytest.mark.parametrize("family", ["llama", "labgpt"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no such"}'),
        ("tokenizer.json", b"{"),
        ("model.safetensors", b"no weights"),
    ],
)
def test_a_broken_file_is_one_line(
    tmp_path: Path,
    save_tiny: Callable[..., Path],
    open_: Callable[..., Any],
    family: str,
    name: str,
    content: bytes,
) -> None:
    folder = Path(shutil.copytree(save_tiny(family), tmp_path / "broken"))
    (folder / name).write_bytes(content)
    # reveals: of weights that are none, open_reward lets safetensors' error through.
    assert str(folder) in refused(open_, folder)


def test_missing_weights_are_one_line(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    folder = Path(shutil.copytree(save_tiny("llama"), tmp_path / "bare"))
    (folder / "model.safetensors").unlink()
    for open_ in (models.open_policy, models.open_reward):
        assert str(folder) in refused(open_, folder)


def test_a_model_of_the_hub_that_cannot_be_reached() -> None:
    """The tests are offline, so no name is known there."""
    line = refused(models.start, ModelConfig(path="nobody/nothing"), None, 0)
    assert line.startswith("nobody/nothing: no model that can be opened: ")
    assert "the Hub (which must be reachable)" in line


def test_a_model_that_continues_no_text_is_no_policy(tmp_path: Path, tokenizer: Any) -> None:
    import transformers as hf

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    line = refused(models.open_policy, tmp_path)
    assert line.startswith(f"{tmp_path}: models of type vit do not continue a text. ")


def test_words_the_model_has_no_embeddings_for_are_refused(
    tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    """A tokenizer of more tokens than the model has would fail in the middle of training, without a line."""
    folder = Path(shutil.copytree(save_tiny("llama"), tmp_path / "larger"))
    stock_tokenizer(eos_token="<e>", pad_token="<p>").save_pretrained(folder)
    # reveals: the mismatch is noticed nowhere.
    for open_ in (models.open_policy, models.open_reward):
        assert re.search(r"tokenizer has 258 tokens, .* model \d+", refused(open_, folder))


def test_a_reward_model_of_another_tokenizer_is_refused(
    tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    """By the stage that would score the policy's tokens with it, before it trains."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from lab.device import DeviceConfig, resolve
    from rlhf.config import RLHFRun
    from rlhf.policy_optimization import train_policy

    words = Tokenizer(WordLevel({"<p>": 0, "<e>": 1, "the": 2, "pizza": 3}))
    other = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>", eos_token="<e>")
    stranger = tmp_path / "stranger"
    models.save(models.open_reward(save_tiny("llama"))[0], other, stranger)
    compute = resolve(DeviceConfig(device="cpu", threads=1))
    prompts = TEXTS.select_columns("prompt")
    nobody: Any = None
    with pytest.raises(LabError) as caught:
        train_policy(RLHFRun(), nobody, compute, prompts, TEXTS, save_tiny("llama"), stranger, None)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{stranger}: the reward model has another tokenizer than the policy")


def test_what_is_saved_is_plain_json(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    """No pickle, and nothing that needs this package to be read."""
    models.save(*models.open_policy(save_tiny("labgpt")), tmp_path)
    assert "lab" not in json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]
