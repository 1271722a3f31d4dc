"""Without a way to the Hub its clients look into their cache, and are as they were afterwards."""

import json
import socket
from pathlib import Path

import datasets.config
import pytest
from huggingface_hub import constants

from lab.errors import LabError
from lab.hub import from_pretrained, hub_or_cache

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A place on this machine where the Hub's address leads; it answers once it listens."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    for client in (constants, datasets.config):
        monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{place.getsockname()[1]}")
    return place


def are_offline() -> list[bool]:
    return [constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE]


def test_a_hub_that_does_not_answer_is_not_asked_again(hub: socket.socket) -> None:
    with hub, hub_or_cache("me/model"):
        assert are_offline() == [True, True]
    assert are_offline() == [False, False]


def test_one_that_answers_is_asked(hub: socket.socket) -> None:
    with hub:
        hub.listen()
        with hub_or_cache("me/model"):
            assert are_offline() == [False, False]


def test_what_is_here_needs_no_hub(hub: socket.socket, tmp_path: Path) -> None:
    with hub, hub_or_cache(str(tmp_path)):
        assert are_offline() == [False, False]


def test_a_proxy_may_know_the_way(hub: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with hub, hub_or_cache("me/model"):
        assert are_offline() == [False, False]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"num_hidden_layers": 10**9}, id="layers"),
        pytest.param({"text_config": {"n_routed_experts": 10**9}}, id="experts within"),
        pytest.param({"num_hidden_layers": [1] * 20_000}, id="a list"),
    ],
)
def test_a_model_of_endless_layers_is_not_built(tmp_path: Path, values: dict[str, object]) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | values))
    with pytest.raises(LabError, match="no model has more than 10,000"):
        from_pretrained(AutoConfig, tmp_path)


@pytest.mark.parametrize("part", ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_parts_of_weights_lie_in_their_folder(tmp_path: Path, part: str) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    index = {"metadata": {}, "weight_map": {"lm_head.weight": part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LabError, match="outside of the folder"):
        from_pretrained(AutoConfig, tmp_path)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "BertTokenizer", "T5Tokenizer"])
def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(tmp_path: Path, kind: str) -> None:
    """transformers makes one that reads every text as nothing, or as unknown."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(LabError, match="has no vocabulary"):
        from_pretrained(AutoTokenizer, tmp_path)
