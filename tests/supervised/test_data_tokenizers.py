"""Tokenizers: text comes back exactly, files load again, special tokens written in a text stay text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lab.errors import LabError
from supervised.data import tokenizers
from supervised.data.tokenizers import ByteTokenizer, SubwordTokenizer, from_folder, pretrained, train_bpe

TEXTS = [
    "The animal didn't cross the street.\n",
    "Das Tier überquerte die Straße nicht.",
    "日本語 🙂",
    "",
] * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> SubwordTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB_CACHE", str(tmp_path_factory.mktemp("bpe")))
        return train_bpe(TEXTS, 320)


@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_text_comes_back_exactly(bpe: SubwordTokenizer, text: str) -> None:
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert [list(ids) for ids in tokenizer.encode_batch([text, "a"])] == [ids, tokenizer.encode("a")]
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.vocab_size == 261
    specials = [
        *(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id),
        *(tokenizer.delim_id, tokenizer.extract_id),
    ]
    assert specials == [256, 257, 258, 259, 260]
    assert tokenizer.decode([257, 97, 258, 256]) == "a"
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert tokenizer.decode_bytes(tokenizer.encode(latin)) == b"caf\xe9"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_bpe_learns_what_is_frequent(bpe: SubwordTokenizer) -> None:
    assert bpe.vocab_size == 320
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5
    specials = {bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.delim_id, bpe.extract_id}
    assert specials == {0, 1, 2, 3, 4}
    written = "a <eos> b<pad>"
    assert not specials & set(bpe.encode(written))
    assert bpe.decode(bpe.encode(written)) == written
    assert bpe.decode([bpe.bos_id, *bpe.encode("Tier"), bpe.eos_id, bpe.pad_id]) == "Tier"


def test_saved_tokenizers_load_here_and_in_transformers(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, tokenizer in (("bpe", bpe), ("bytes", ByteTokenizer())):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        for loaded in (from_folder(folder), pretrained(str(folder))):
            assert type(loaded) is type(tokenizer)
            assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
            assert loaded.encode("<eos>") == tokenizer.encode("<eos>")
            assert (loaded.pad_id, loaded.extract_id) == (tokenizer.pad_id, tokenizer.extract_id)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.encode(TEXTS[1], add_special_tokens=False) == tokenizer.encode(TEXTS[1])
        assert (theirs.pad_token_id, theirs.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)


def test_training_is_kept_by_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_bpe(TEXTS, 300)
    kept = list((cache / "tokenizers").iterdir())
    assert len(kept) == 1
    (kept[0] / "tokenizer.json").write_text("{")  # damaged: made anew
    assert train_bpe(TEXTS, 300).backend.to_str() == first.backend.to_str()
    with monkeypatch.context() as patch:  # whole again: read, not trained
        patch.delattr(tokenizers.trainers, "BpeTrainer")
        assert train_bpe(TEXTS, 300).encode(TEXTS[0]) == first.encode(TEXTS[0])
    train_bpe(TEXTS[1:], 300)
    train_bpe(TEXTS, 310)
    assert len(list((cache / "tokenizers").iterdir())) == 3


def test_no_cache_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file"))
    assert train_bpe(TEXTS, 300).vocab_size == 300


def test_a_pretrained_tokenizer_that_is_no_byte_level_one(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "</s>": 1, "the": 2, "animal": 3}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = pretrained(str(tmp_path))
    assert tokenizer.encode("the animal") == [2, 3]
    assert tokenizer.decode_bytes([2, 3]) == b"the animal"
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.delim_id == 1
    assert tokenizer.pad_id == tokenizer.vocab_size - 1 != 1  # else no translation could learn to end
    tokenizer.save(tmp_path)
    again = from_folder(tmp_path)
    assert (again.pad_id, again.vocab_size) == (tokenizer.pad_id, tokenizer.vocab_size)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(LabError, match="no usable tokenizer: its special token '<end>' is not in"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(LabError, match="has no end-of-text token"):
        from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_padding_is_not_what_stands_for_unknown_words(kind: str) -> None:
    names = ["<unk>", "</s>", "a", "b"]
    backend = Backend(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
        if kind == "words"
        else models.Unigram([(name, -1.0) for name in names], unk_id=0)
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(names[:2])
    made = SubwordTokenizer(backend, {"eos": "</s>", "pad": "<unk>"})
    assert made.encode("a zz b") == [2, 0, 3]
    assert made.pad_id == 4
    assert made.vocab_size == 5


def test_a_tokenizer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LabError, match=r"data\.tokenizer = 'runs/gpt': no run: .* Train it first"):
        pretrained("runs/gpt")  # and the Hub is not asked for it
    with pytest.raises(LabError, match=r"data\.tokenizer = './gtp2': cannot be loaded.*It is bytes, bpe"):
        pretrained("./gtp2")
