"""The built-in task: what it promises of its words, its prompts, its reviews and its tokenizer."""

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub

import pytest

from rlhf import reviews
from rlhf.reviews import Split

SPLITS: tuple[Split, ...] = ("train", "eval")
tokenizer = cache(reviews.tokenizer)

# ---- words ----


def test_the_words_of_praise_and_blame_are_those_of_vader_and_no_others() -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    lexicon = vader.SentimentIntensityAnalyzer().lexicon
    assert [word for word in reviews.POSITIVE if lexicon.get(word, 0) <= 0] == []
    assert [word for word in reviews.NEGATIVE if lexicon.get(word, 0) >= 0] == []
    others = set(tokenizer().get_vocab()) - {*reviews.POSITIVE, *reviews.NEGATIVE}
    assert [word for word in others if word in lexicon] == []


@pytest.mark.parametrize("adverb", ["", *(f"{adverb} " for adverb in reviews.ADVERBS)])
def test_vader_agrees_with_whole_clauses(adverb: str) -> None:
    analyzer = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    for words, sign in ((reviews.POSITIVE, 1), (reviews.NEGATIVE, -1), (reviews.NEUTRAL, 0)):
        for word in words:
            score = analyzer.polarity_scores(f"the staff was {adverb}{word} .")["compound"]
            assert (score > 0) - (score < 0) == sign, (adverb, word, score)


def test_no_word_is_listed_twice() -> None:
    words = [*reviews.POSITIVE, *reviews.NEGATIVE, *reviews.NEUTRAL, *reviews.ADVERBS, *reviews.PARTS]
    assert [word for word, count in Counter([*words, *reviews.TOPICS]).items() if count > 1] == []
    assert len(reviews.POSITIVE) == len(reviews.NEGATIVE) == len(reviews.NEUTRAL)


# ---- prompts ----


def test_twenty_prompts_are_held_out_of_things_and_questions_that_training_knows() -> None:
    train, held_out = reviews.prompts("train"), reviews.prompts("eval")
    assert (len(train), len(held_out)) == (76, 20)
    assert len({*train, *held_out}) == 96
    words = {word for prompt in train for word in prompt.split()}
    assert [word for prompt in held_out for word in prompt.split() if word not in words] == []


# ---- demonstrations ----


def test_demonstrations_are_the_same_wherever_and_whenever_they_are_made() -> None:
    first, *_, last = reviews.demonstrations(n_per_prompt=2, seed=3)
    assert first == {
        "prompt": "describe the book .",
        "completion": " the setup was quiet , the style was plain .",
    }
    assert last == {
        "prompt": "what about the course ?",
        "completion": " the price was nasty but the view was very excellent .",
    }
    assert reviews.demonstrations(2, seed=3) != reviews.demonstrations(2, seed=4)


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_of_the_split_has_its_demonstrations(split: Split) -> None:
    rows = reviews.demonstrations(3, split=split)
    assert Counter(row["prompt"] for row in rows) == dict.fromkeys(reviews.prompts(split), 3)


def test_reviews_have_one_to_three_clauses_good_bad_and_neutral_equally_often() -> None:
    clauses: Counter[int] = Counter()
    tones: Counter[str] = Counter()
    tone_of = dict.fromkeys(reviews.POSITIVE, "positive")
    tone_of |= dict.fromkeys(reviews.NEGATIVE, "negative")
    tone_of |= dict.fromkeys(reviews.NEUTRAL, "neutral")
    for row in reviews.demonstrations(seed=1):
        assert re.fullmatch(r" the [a-z ,]+ \.", row["completion"])
        words = row["completion"].split()
        clauses[words.count("was")] += 1
        tones.update(tone_of[word] for word in words if word in tone_of)
        assert sum(word in tone_of for word in words) == words.count("was")
    assert clauses.keys() == {1, 2, 3}
    assert tones.keys() == {"positive", "negative", "neutral"}
    assert max(tones.values()) < 1.1 * min(tones.values())


# ---- tokenizer ----


def test_every_word_of_the_task_is_one_known_token() -> None:
    texts = [
        row["prompt"] + row["completion"] for split in SPLITS for row in reviews.demonstrations(split=split)
    ]
    used = set()
    for text, ids in zip(texts, tokenizer()(texts)["input_ids"], strict=True):
        assert len(ids) == len(text.split())
        used.update(ids)
    unused = set(range(len(tokenizer()))) - used
    assert tokenizer().convert_ids_to_tokens(sorted(unused)) == ["<pad>", "<eos>", "<unk>"]


def test_prompt_and_completion_have_the_same_tokens_together_and_apart() -> None:
    for row in reviews.demonstrations(1, split="eval"):
        together = tokenizer()(row["prompt"] + row["completion"])["input_ids"]
        assert (
            together == tokenizer()(row["prompt"])["input_ids"] + tokenizer()(row["completion"])["input_ids"]
        )
        assert tokenizer().decode(together) == row["prompt"] + row["completion"]


def test_padding_end_and_unknown_have_tokens_of_their_own() -> None:
    ids = tokenizer().get_vocab()
    pad, eos, unk = ids["<pad>"], ids["<eos>"], ids["<unk>"]
    assert len({pad, eos, unk}) == 3
    assert (tokenizer().pad_token_id, tokenizer().eos_token_id, tokenizer().unk_token_id) == (pad, eos, unk)
    assert tokenizer()("Great novelty")["input_ids"] == [ids["great"], unk]
    assert tokenizer().decode([ids["great"], eos], skip_special_tokens=True) == "great"


def test_padding_is_on_the_left_and_masked() -> None:
    batch = tokenizer()(["great", "great pizza"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][0] == tokenizer().pad_token_id
    assert batch["attention_mask"] == [[0, 1], [1, 1]]


def test_the_tokenizer_survives_its_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = reviews.demonstrations(1)[0]["completion"]
    assert loaded(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert (loaded.padding_side, loaded.pad_token, loaded.eos_token) == ("left", "<pad>", "<eos>")
