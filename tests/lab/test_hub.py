"""Without a way to the Hub its clients look into their cache, and are as they were afterwards."""

import socket
from pathlib import Path

import datasets.config
import pytest
from huggingface_hub import constants

from lab.hub import hub_or_cache

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
