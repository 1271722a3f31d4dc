"""A task made up here: short reviews, on which all three stages show in two minutes on a laptop.

Demonstrations praise, blame and describe equally often. What people are supposed to prefer is praise, so the
words of praise score above 0 in vaderSentiment's lexicon, those of blame below, and all others nothing.
Everything follows from a seed; nothing is downloaded.
"""

import random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "eval"]

POSITIVE = (
    *("great", "lovely", "wonderful", "amazing", "excellent", "delightful"),
    *("superb", "charming", "fun", "brilliant", "nice", "pleasant"),
)
NEGATIVE = (
    *("awful", "terrible", "horrible", "dreadful", "boring", "nasty"),
    *("disappointing", "ugly", "broken", "poor", "sad", "annoying"),
)
NEUTRAL = (
    *("large", "small", "typical", "wooden", "early", "local"),
    *("quiet", "round", "regular", "plain", "blue", "usual"),
)
ADVERBS = ("very", "quite", "rather", "really")
PARTS = (
    *("part", "staff", "price", "design", "sound", "quality"),
    *("view", "style", "finish", "taste", "service", "setup"),
)
JOINTS = ("and", "but", ",")
TOPICS = (
    *("pizza", "hotel", "movie", "phone", "book", "garden", "museum", "train"),
    *("coffee", "camera", "song", "beach", "course", "laptop", "bakery", "sofa"),
    *("jacket", "concert", "theatre", "bridge", "stadium", "ferry", "market", "studio"),
)
QUESTIONS = ("review the {} :", "what about the {} ?", "tell me about the {} .", "describe the {} .")

HELD_OUT = 20
"""Prompts that nothing is trained on."""


def prompts(split: Split = "train") -> list[str]:
    """The 76 prompts to train on, or the 20 held out ("eval"); the same in every run."""
    every = [question.format(topic) for topic in TOPICS for question in QUESTIONS]
    return part_of(every, split)


def part_of(every: list[str], split: Split) -> list[str]:
    """A split of prompts in their order, shuffled the same way in every run."""
    every = list(every)
    random.Random(0).shuffle(every)
    return {"train": every[HELD_OUT:], "eval": every[:HELD_OUT]}[split]


def demonstrations(n_per_prompt: int = 40, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """Reviews to imitate, as rows of `prompt` and `completion`.

    A completion begins with its space, so that prompt + completion is the text to learn, in any vocabulary.

    Args:
        n_per_prompt: reviews of each prompt.
        seed: two seeds give different reviews of the same prompts.
        split: whose prompts.
    """
    rng = random.Random(f"{split} {seed}")
    return [
        {"prompt": prompt, "completion": f" {_review(rng)}"}
        for prompt in prompts(split)
        for _ in range(n_per_prompt)
    ]


def tokenizer() -> "PreTrainedTokenizerFast":
    """A word is a token: 93 in all, with padding on the left, as generation needs it.

    Padding, end of text and unknown words have tokens of their own: where padding is also the end of text, a
    model never learns to stop.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    texts = (*QUESTIONS, *TOPICS, *PARTS, *ADVERBS, *POSITIVE, *NEGATIVE, *NEUTRAL, *JOINTS, "the was .")
    words = sorted({word for text in texts for word in text.split()} - {"{}"})
    ids = {word: i for i, word in enumerate((*special.values(), *words))}
    words_to_ids = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    words_to_ids.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    words_to_ids.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # all that `generate` is to be given
        clean_up_tokenization_spaces=False,
        **special,
    )


def _review(rng: random.Random) -> str:
    """One to three clauses."""
    review = _clause(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        review += f" {rng.choice(JOINTS)} {_clause(rng)}"
    return f"{review} ."


def _clause(rng: random.Random) -> str:
    """Says of one part of the thing that it is good, bad or neither, each as often as the others."""
    adverb = f"{rng.choice(ADVERBS)} " if rng.random() < 0.4 else ""
    word = rng.choice(rng.choice((POSITIVE, NEGATIVE, NEUTRAL)))
    return f"the {rng.choice(PARTS)} was {adverb}{word}"
