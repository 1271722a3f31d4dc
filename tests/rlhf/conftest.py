"""Tiny models in folders, as the stages of the recipe leave them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Words of the review task; pad, end and unknown differ."""
    from rlhf import reviews

    return reviews.tokenizer()


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Writes a tiny random model of a family, with the tokenizer: save_tiny("llama", reward=True)."""
    import transformers as hf

    from rlhf import labgpt

    made: dict[tuple[str, bool, int], Path] = {}

    def save(family: str, reward: bool = False, seed: int = 0) -> Path:
        key = (family, reward, seed)
        if key in made:
            return made[key]
        torch.manual_seed(seed)
        common: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **({"num_labels": 1} if reward else {}),
        }
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
        config: Any
        if family == "labgpt":
            config = labgpt.LabGPTConfig(
                width=16, n_layer=2, n_head=2, mlp_width=32, max_positions=64, **common
            )
            cls: Any = labgpt.LabGPTForSequenceClassification if reward else labgpt.LabGPTForCausalLM
            model = cls(config)
        else:
            config = {
                "llama": lambda: hf.LlamaConfig(max_position_embeddings=64, **sizes, **common),
                "qwen2": lambda: hf.Qwen2Config(
                    max_position_embeddings=64, num_key_value_heads=2, **sizes, **common
                ),
                "gpt2": lambda: hf.GPT2Config(
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    n_positions=64,
                    attn_pdrop=0,
                    embd_pdrop=0,
                    resid_pdrop=0,
                    **common,
                ),
                "bloom": lambda: hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **common),
            }[family]()
            auto = hf.AutoModelForSequenceClassification if reward else hf.AutoModelForCausalLM
            model = auto.from_config(config)
        folder = tmp_path_factory.mktemp(f"{family}{'_reward' if reward else ''}")
        if family == "labgpt":
            labgpt.save_stock(model, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[key] = folder
        return folder

    return save
