"""Opening and saving the models of the recipe: LabGPT, any model of the Hub, and what a stage left."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lab.errors import LabError, did_you_mean, first_line
from lab.hub import from_pretrained
from rlhf import labgpt, reviews
from rlhf.config import ModelConfig
from rlhf.tokenization import separate_padding

# Vocabulary of a tokenizer made of the data.
BPE_SIZE = 2048


def start(config: ModelConfig, demonstrations: Any, source: str, seed: int) -> tuple[Any, Any]:
    """The language model the recipe starts from, in fp32, and its tokenizer.

    Args:
        config: which.
        demonstrations: the data set, from whose words LabGPT gets a tokenizer if the config names none.
        source: where they are from.
        seed: of LabGPT's random weights.

    Raises:
        LabError: neither a folder nor on the Hub, or the Hub cannot be reached.
    """
    if config.path != "labgpt":
        tokenizer = _open_tokenizer(config.tokenizer or config.path)
        # LabGPT computes no padding, and is a tenth faster. Adapters, though, are for the model they name.
        if not config.lora_rank and labgpt.computes(Path(config.path)):
            return _fitted(labgpt.load(config.path).float(), tokenizer, config.path), tokenizer
        return _open_causal_lm(config.path, tokenizer), tokenizer
    tokenizer = (
        _open_tokenizer(config.tokenizer)
        if config.tokenizer
        else reviews.tokenizer()
        if source == "reviews"
        else tokenizer_of(_texts(demonstrations))
    )
    known = [*labgpt.LabGPTConfig().options(), *labgpt.LabGPTConfig.attribute_map]
    for key in config.labgpt:
        if key not in known:  # transformers would keep it, and do nothing about it
            raise LabError(f"model.labgpt = {config.labgpt}: no argument {key!r}.{did_you_mean(key, known)}")
    torch.manual_seed(seed)
    tokens: Any = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")
    }
    try:
        settings = labgpt.LabGPTConfig(vocab_size=len(tokenizer), **tokens, **config.labgpt)
        return labgpt.LabGPTForCausalLM(settings), tokenizer
    except (TypeError, ValueError) as error:
        raise LabError(f"model.labgpt = {config.labgpt}: {error}") from None


def open_policy(folder: Path) -> tuple[Any, Any]:
    """A language model that a stage left (or any transformers folder) and its tokenizer."""
    tokenizer = _open_tokenizer(str(folder))
    return _open_causal_lm(str(folder), tokenizer), tokenizer


def open_reward(folder: Path) -> tuple[Any, Any]:
    """A reward model's folder, or a language model's with a fresh `score` layer on it, and its tokenizer.

    Raises:
        LabError: no such folder, or no model in it.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = _open_tokenizer(str(folder))
    if _is_labgpt(folder):
        return _fitted(labgpt.load(folder, head="reward").float(), tokenizer, str(folder)), tokenizer
    try:
        model = from_pretrained(AutoModelForSequenceClassification, folder, num_labels=1, dtype=torch.float32)
    except LabError:
        raise
    except Exception as error:  # whatever transformers or safetensors raise
        raise LabError(f"{folder}: no model that can be opened: {first_line(error)}") from None
    model.config.pad_token_id = tokenizer.pad_token_id
    return _fitted(model, tokenizer, str(folder)), tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a plain transformers folder; adapters are merged into the weights, and kept in adapter/ too."""
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter", selected_adapters=["default"])
        model = model.merge_and_unload(adapter_names=["default"])
    if isinstance(model, labgpt.LabGPTForCausalLM | labgpt.LabGPTForSequenceClassification):
        labgpt.save_stock(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_of(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer of `BPE_SIZE` tokens made from texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def declare_end(model: Any, tokenizer: Any) -> None:
    """Writes the tokenizer's end token into the model's config, so that stock `generate` stops there too."""
    end, declared = tokenizer.eos_token_id, model.generation_config.eos_token_id
    more = [declared] if isinstance(declared, int) else (declared or [])
    if end not in more:
        model.config.get_text_config().eos_token_id = end
        model.generation_config.eos_token_id = [end, *more]


def check_chat_template(tokenizer: Any, dataset: Any, source: str) -> None:
    """Raises a `LabError` if the data are conversations and the tokenizer cannot render one."""
    first = next(iter(dataset[0].values()))
    if isinstance(first, list) and isinstance(first[0], dict) and not tokenizer.chat_template:
        raise LabError(
            f"{source}: holds conversations, but the model's tokenizer has no chat template. "
            "Use a chat model's tokenizer (model.tokenizer), or data in plain text."
        )


def _open_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = from_pretrained(AutoTokenizer, name, padding_side="left")
    except LabError:
        raise
    except Exception as error:  # whatever the Hub's client, json or tokenizers raise
        raise LabError(
            f"{name}: no tokenizer found: {first_line(error)} Name a transformers folder, or a model of the "
            "Hub (which must be reachable)."
        ) from None
    if tokenizer.eos_token_id is None:
        raise LabError(f"{name}: its tokenizer has no eos_token, so no answer could end. Set one.")
    separate_padding(tokenizer)
    return tokenizer


def _fitted(model: Any, tokenizer: Any, name: str) -> Any:
    """The model, with an embedding for a padding token that `_open_tokenizer` added."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) == rows + 1 and tokenizer.pad_token_id == rows:
        model.resize_token_embeddings(len(tokenizer))
    elif len(tokenizer) > rows:
        raise LabError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, but the model {rows} embeddings. "
            "Name the tokenizer the model was trained with."
        )
    return model


def _open_causal_lm(name: str, tokenizer: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if _is_labgpt(Path(name)):
        return _fitted(labgpt.load(name).float(), tokenizer, name)
    try:
        model = from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32)
    except LabError:
        raise
    except Exception as error:
        raise LabError(f"{name}: no language model that can be opened: {first_line(error)}") from None
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return _fitted(model, tokenizer, name)


def _is_labgpt(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"lab_gpt"' in config.read_text(encoding="utf-8")


def _texts(demonstrations: Any) -> Iterable[str]:
    for row in demonstrations:
        for value in row.values():
            if isinstance(value, str):
                yield value
            else:
                yield from (message["content"] for message in value)
