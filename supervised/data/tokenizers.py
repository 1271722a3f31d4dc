"""Text to token ids and back: bytes, byte-pair encoding trained here, or any pretrained tokenizer.

All are kept as the two files that transformers' AutoTokenizer reads too, tokenizer.json and
tokenizer_config.json.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lab.errors import LabError, first_line
from lab.files import written_aside
from lab.hub import from_pretrained
from lab.run import Run

SPECIALS = {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "delim": "<delim>", "extract": "<extract>"}
"""What each special token is for: padding, the start, the end, and those of GPT-1's tasks (section 3.3):
between two texts, and where the answer is read off."""
_HF_NAMES = {
    "pad": "pad_token",
    "bos": "bos_token",
    "eos": "eos_token",
    "delim": "sep_token",
    "extract": "cls_token",
}
FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    delim_id: int
    extract_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens written out in it are text like any other."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of many texts, faster."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, without special tokens; what is encoded by bytes comes back exactly."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `FILES`, from which `from_folder` makes an equal one."""
        ...


class SubwordTokenizer:
    """A tokenizer of the library `tokenizers`.

    Args:
        backend: the library's.
        specials: the tokens that stand for the keys of `SPECIALS`; what one lacks is its end token, but for
            padding, which becomes a token of its own.
    """

    def __init__(self, backend: Backend, specials: dict[str, str]) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        fallback = specials.get("eos") or specials.get("extract") or specials.get("delim")
        if fallback is None:
            raise ValueError("has no end-of-text token")
        self.specials = {use: specials.get(use) or fallback for use in SPECIALS}
        # Padding is what nobody reads or learns: were it the end token, or what stands for unknown words (as
        # in many a Llama), that would be among it.
        read = [token for use, token in self.specials.items() if use != "pad"]
        if self.specials["pad"] in (*read, _unknown(backend)):
            self.specials["pad"] = SPECIALS["pad"]
            backend.add_special_tokens([AddedToken(SPECIALS["pad"], special=True)])
        vocab = backend.get_vocab(with_added_tokens=True)
        if missing := set(self.specials.values()) - vocab.keys():
            raise ValueError(f"its special token {missing.pop()!r} is not in its vocabulary")
        ids = [vocab[token] for token in self.specials.values()]
        self.pad_id, self.bos_id, self.eos_id, self.delim_id, self.extract_id = ids
        self.vocab_size = backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._bytes is None:
            return self.decode(ids).encode()
        return b"".join(map(self._bytes.__getitem__, ids))

    def save(self, folder: Path) -> None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {_HF_NAMES[use]: token for use, token in self.specials.items()}
        for name, text in zip(FILES, (self.backend.to_str(), json.dumps(config, indent=2)), strict=True):
            with written_aside(folder / name) as aside:
                aside.write_text(text, encoding="utf-8")

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """The bytes of each token, of special ones none; None where tokens do not stand for bytes."""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        added = self.backend.get_added_tokens_decoder()
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        return [
            b"" if i in added else bytes(byte_of[char] for char in token) for i, token in enumerate(tokens)
        ]


class ByteTokenizer(SubwordTokenizer):
    """UTF-8: a byte is its own id, and 256 and up are the special tokens.

    Bytes that are no UTF-8 stand in a text as surrogates (`errors="surrogateescape"`).
    """

    def __init__(self) -> None:
        super().__init__(_byte_backend({char: byte for byte, char in enumerate(byte_characters())}), SPECIALS)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i < 256)


def byte_characters() -> list[str]:
    """The character that stands for each byte in the vocabulary of a byte-level tokenizer (as in GPT-2's)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(texts: Sequence[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-pair encoding of these texts, on bytes, so that any text can be encoded and comes back exactly.

    Kept in the cache, below $LAB_CACHE or else ~/.cache/deep-rl-lab, by the content of the texts.
    """
    digest = hashlib.sha256(f"bpe 1 {vocab_size}".encode())
    for text in texts:
        digest.update(f" {len(text)} ".encode())
        digest.update(text.encode())
    cache = Path(os.environ.get("LAB_CACHE") or Path.home() / ".cache" / "deep-rl-lab")
    folder = cache / "tokenizers" / digest.hexdigest()
    if all((folder / name).is_file() for name in FILES):
        try:
            return from_folder(folder)
        except LabError:
            pass  # damaged: made anew
    backend = _byte_backend({})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, len(texts))
    tokenizer = SubwordTokenizer(backend, SPECIALS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
    except OSError:
        pass  # no place to keep it: it is made anew next time
    return tokenizer


def from_folder(folder: Path) -> SubwordTokenizer:
    """The tokenizer of a folder with `FILES`: a run's, or a pretrained one's.

    Raises:
        LabError: they are damaged, or it has no end-of-text token.
    """
    try:
        config = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        specials = {use: _content(config.get(name)) for use, name in _HF_NAMES.items()}
        backend = Backend.from_str((folder / FILES[0]).read_text(encoding="utf-8"))
        if backend.id_to_token(ord("A")) == "A" and backend.token_to_id(SPECIALS["pad"]) == 256:
            return ByteTokenizer()
        return SubwordTokenizer(backend, {use: token for use, token in specials.items() if token})
    except Exception as error:  # the library raises bare Exception
        raise LabError(
            f"{folder}: no usable tokenizer: {first_line(error)}. Name another data.tokenizer."
        ) from None


def pretrained(name: str) -> SubwordTokenizer:
    """A tokenizer in a folder, or on the Hub by its name.

    Raises:
        LabError: there is none, or not one of the library `tokenizers` ("fast").
    """
    if all((Path(name) / file).is_file() for file in FILES):
        return from_folder(Path(name))
    if name.startswith("runs/"):  # no name of the Hub, though it looks like one
        run = Run.named_by("data.tokenizer", Path(name))
        raise LabError(f"data.tokenizer = {name!r}: {run.info['name']} keeps no tokenizer. Name another run.")
    from transformers import AutoTokenizer

    try:
        loaded = from_pretrained(AutoTokenizer, name)
        specials = {use: getattr(loaded, hf_name) for use, hf_name in _HF_NAMES.items()}
        return SubwordTokenizer(
            loaded.backend_tokenizer, {use: token for use, token in specials.items() if token}
        )
    except LabError:
        raise
    except Exception as error:  # each mishap with network, name or files has its class
        reason = first_line(error).rstrip(".")
        raise LabError(
            f"data.tokenizer = {name!r}: cannot be loaded: {reason}. It is bytes, bpe, a "
            f"folder with {' and '.join(FILES)}, or a name on the Hub."
        ) from None


def _byte_backend(vocab: dict[str, int]) -> Backend:
    """Byte-pair encoding without merges so far."""
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if vocab:
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS.values()])
    return backend


def _unknown(backend: Backend) -> str | None:
    """The token that stands for what a vocabulary lacks, if there is one."""
    if not isinstance(backend.model, models.Unigram):
        return getattr(backend.model, "unk_token", None)
    number = json.loads(backend.to_str())["model"]["unk_id"]  # the library does not tell otherwise
    return None if number is None else backend.id_to_token(number)


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: text, or a mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token
