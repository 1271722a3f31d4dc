"""Hugging Face's Hub where there is no network."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE_SECONDS = 3.0
PORTS = {"https": 443, "http": 80}


@contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Within, the Hub's clients look for `name` in their cache alone if the Hub cannot be reached.

    Left to themselves they ask six times, with a line and up to eight seconds each, before they do. Behind a
    proxy, of which nothing is known here, they are.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(name).exists() or getproxies() or _is_reachable(constants.ENDPOINT):
        yield
        return
    clients: list[Any] = [constants]
    if "datasets" in sys.modules:  # it has taken a copy
        clients.append(sys.modules["datasets"].config)
    for client in clients:
        client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client in clients:
            client.HF_HUB_OFFLINE = False


def _is_reachable(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    try:
        address = parts.hostname or "", parts.port or PORTS.get(parts.scheme, 443)
        socket.create_connection(address, timeout=PATIENCE_SECONDS).close()
    except (OSError, ValueError):  # ValueError: no port
        return False
    return True
