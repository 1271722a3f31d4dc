"""BLOOM is LabGPT with ALiBi and a norm behind the embeddings: logits equal to transformers' own."""

import re
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from supervised.backbones.transformer import GPT2_OPTIONS, LabGPT, alibi_slopes, linear_biases
from supervised.estimate import estimate

BLOOM: dict[str, Any] = {**GPT2_OPTIONS, "positions": "alibi", "embedding_norm": True}


def pair(n_head: int) -> tuple[LabGPT, BloomForCausalLM]:
    """Ours and transformers' with the same random weights."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=50, hidden_size=8 * n_head, n_layer=2, n_head=n_head, use_cache=False)
    theirs = BloomForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ours = LabGPT(**{**BLOOM, "vocab_size": 50, "width": 8 * n_head, "n_layer": 2, "n_head": n_head}).eval()
    weights = {}
    for key, tensor in theirs.transformer.state_dict().items():
        name = re.sub(r"^h\.", "blocks.", key)
        for theirs_part, ours_part in {
            "word_embeddings_layernorm": "embedding_norm",
            "word_embeddings": "tokens",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "mlp_norm",
            "self_attention.dense": "attention.out",
            "self_attention.query_key_value": "attention.qkv",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.out",
            "ln_f": "norm",
        }.items():
            name = name.replace(theirs_part, ours_part)
        if "qkv" in name:  # head by head a query, a key and a value
            parts = tensor.view(n_head, 3, 8, -1)
            for part, letter in enumerate("qkv"):
                mine = parts[:, part].flatten(0, 1)
                weights[name.replace("qkv", letter)] = mine[:, 0] if name.endswith("bias") else mine
        else:
            weights[name] = tensor
    ours.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("n_head", [4, 6])  # a power of two, and none
def test_logits_equal_transformers(n_head: int) -> None:
    ours, theirs = pair(n_head)
    ids = torch.randint(0, 50, (3, 9))
    logits = ours(ids) @ ours.tokens.weight.T
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_equals_transformers() -> None:
    ours, theirs = pair(4)
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    seen = mask.bool()[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    seen[1, 0, :4, 0] = True  # what padding sees is of no account, but it must see something
    features = ours(ids, attention_mask=seen)
    expected = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        (features @ ours.tokens.weight.T)[1, 4:], expected[1, 4:], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(features[1:, 4:], ours(ids[1:, 4:]), rtol=1e-4, atol=1e-4)


def test_slopes_are_the_papers() -> None:
    """Section 3: for 8 heads 1/2, 1/4 ... 1/256; for 16 heads 2^-0.5, 2^-1 ... 2^-8."""
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    torch.testing.assert_close(alibi_slopes(16), 2.0 ** (-torch.arange(1, 17) / 2))
    torch.testing.assert_close(alibi_slopes(12), torch.cat((alibi_slopes(8), alibi_slopes(16)[::2][:4])))
    assert len(alibi_slopes(112)) == 112


def test_biases_by_hand() -> None:
    biases = linear_biases(None, torch.tensor([[1, 2]]), n_head=8, n_keys=3)
    inf = torch.inf
    torch.testing.assert_close(biases[0, 1], torch.tensor([[-0.25, 0.0, -inf], [-0.5, -0.25, 0.0]]))
    added = linear_biases(torch.tensor([[[[0.0, -5.0, -inf]]]]), torch.tensor([[1]]), n_head=8, n_keys=3)
    torch.testing.assert_close(added[0, 0], torch.tensor([[-0.5, -5.0, -inf]]))


def test_bloom_has_the_published_parameters() -> None:
    assert estimate("bloom-176b")["parameters"] == 176_247_271_424
