"""Hugging Face's folders and Hub: without its questions, and where there is no network."""

import re
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lab import trust
from lab.errors import LabError
from lab.files import read_json

PATIENCE_SECONDS = 3.0
PORTS = {"https": 443, "http": 80}
MOST_LAYERS = 10_000
"""Of layers, or of experts in one: a hundred times those of the deepest models."""


def from_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, which runs no code of the folder's but by `--trust`, and asks nobody.

    Args:
        kind: a class of transformers, e.g. AutoTokenizer.
        name: a folder, or a name on the Hub.
        options: as `kind.from_pretrained` takes them.

    Raises:
        LabError: it cannot be opened without running code of its own, asks for more layers than any model
            has, takes weights from outside of its folder, or is a tokenizer without a vocabulary.
        Exception: whatever the library raises for anything else.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # a library that opens it again would ask on standard input
    _check_sizes_and_parts(Path(name))
    files = sorted(Path(name).rglob("*.py"))
    trusted = bool(files) and trust.allows(str(name))
    if trusted:
        if elsewhere := _code_elsewhere(Path(name)):
            raise LabError(
                f"{name}: its code is not in it, but {elsewhere}. Put it there and name it in auto_map."
            )
        trust.require(str(name), "runs the Python code in it", str(name), files)
    try:
        with hub_or_cache(str(name)):
            opened = kind.from_pretrained(name, trust_remote_code=trusted, **options)
        if hasattr(opened, "backend_tokenizer"):
            _check_vocabulary(opened, name)
        return opened
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        if files:
            runs = f"runs code of its own ({', '.join(file.name for file in files)})"
            remedy = f"If you trust it, add --trust={shlex.quote(str(name))}"
        else:
            runs, remedy = (
                "runs code that is not in it",
                "Put the code into a folder with the model and name that.",
            )
        raise LabError(f"{name}: {runs}. {remedy}") from None


def _check_sizes_and_parts(folder: Path) -> None:
    """Looks at what transformers would do as it is told, for hours, or outside of the folder.

    Raises:
        LabError: it is told so.
    """
    config = folder / "config.json"
    if config.is_file():
        told = [read_json(config, "a model's config")]
        while told:
            values = told.pop()
            for key, value in values.items() if isinstance(values, dict) else ():
                n = value if isinstance(value, int) else len(value) if isinstance(value, list) else 0
                if n > MOST_LAYERS and re.search(r"(layers?|experts|blocks)$", key):
                    raise LabError(
                        f"{config}: {key} is {n:,}, and no model has more than {MOST_LAYERS:,}. Restore the "
                        "folder from a copy."
                    )
                told.append(value)
    for index in folder.glob("*.index.json"):
        parts = read_json(index, "where the parts of the weights are").get("weight_map")
        for part in set(map(str, parts.values())) if isinstance(parts, dict) else ():
            if not part or Path(part).name != part:
                raise LabError(
                    f"{index}: takes weights from {part!r}, outside of the folder. Restore it from a copy."
                )


def _check_vocabulary(tokenizer: Any, name: str | Path) -> None:
    """transformers makes a tokenizer of special tokens alone where its file is missing, without a word.

    Raises:
        LabError: it did.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if len(tokenizer.get_vocab().keys() - special) < 2:
        raise LabError(
            f"{name}: its tokenizer has no vocabulary: tokenizer.json (or vocab.json and merges.txt, "
            "tokenizer.model, vocab.txt) is missing. Put it beside tokenizer_config.json."
        )


def _code_elsewhere(folder: Path) -> str:
    """The first class of a folder's `auto_map` that the Hub has: nobody could see its hash before it runs."""
    for file in folder.glob("*config.json"):
        for value in re.findall(r'"([^"]+--[^"]+)"', file.read_text(encoding="utf-8", errors="replace")):
            return value
    return ""


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
