"""GPT-1 is LabGPT with norms behind the sums: features and maps equal to transformers' own."""

import re
from typing import Any

import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTModel

from supervised import backbones
from supervised.estimate import PUBLISHED

NAMES = {
    r"^tokens_embed": "tokens",
    r"^positions_embed": "positions",
    r"^h\.": "blocks.",
    r"\.attn\.c_proj": ".attention.out",
    r"\.attn\.c_attn": ".attention.qkv",
    r"\.ln_1": ".attention_norm",
    r"\.ln_2": ".mlp_norm",
    r"\.c_fc": ".up",
    r"\.c_proj": ".out",
}


@pytest.mark.parametrize(("n_layer", "n_head", "width"), [(2, 2, 12), (3, 5, 20)])
def test_features_and_attention_equal_transformers(n_layer: int, n_head: int, width: int) -> None:
    config = OpenAIGPTConfig(
        vocab_size=50,
        n_positions=16,
        n_embd=width,
        n_layer=n_layer,
        n_head=n_head,
    )
    theirs = OpenAIGPTModel(config).eval()
    theirs.set_attn_implementation("eager")
    weights: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
            for pattern, replacement in NAMES.items():
                key = re.sub(pattern, replacement, key)
            matrix = value.T if value.dim() == 2 and "blocks" in key else value  # theirs are Conv1D
            parts = matrix.chunk(3) if "qkv" in key else [matrix]
            for letter, part in zip("qkv", parts, strict=False):
                weights[key.replace("qkv", letter)] = part
    small: dict[str, Any] = {"vocab_size": 50, "n_layer": n_layer, "width": width, "n_head": n_head}
    ours = backbones.build("gpt", **{**PUBLISHED["gpt1"].spec, **small, "max_positions": 16}).eval()
    ours.load_state_dict(weights)
    ids = torch.randint(0, 50, (3, 16))
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True)
        torch.testing.assert_close(ours(ids), expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        maps = torch.stack(expected.attentions)
        torch.testing.assert_close(ours.attention_maps(ids), maps, rtol=1e-4, atol=1e-6)
