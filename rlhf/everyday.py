"""A task made up here for models that already speak: opinions on everyday things, in chat format.

Demonstrations answer in one or two short sentences and praise, blame and describe equally often, so what is
learned from them is to be brief. What people are supposed to prefer is a kind answer; see `rlhf.reviews`,
the same idea for a model that begins with random weights.
"""

import random
from typing import Any

from rlhf.reviews import Split, part_of

THINGS = (
    *("rainy days", "morning walks", "train rides", "old films", "board games", "city parks", "picnics"),
    *("street markets", "houseplants", "phone calls", "birthday parties", "long meetings", "short naps"),
    *("summer evenings", "winter mornings", "library books", "bus stops", "bicycle trips", "museums"),
    *("school lunches", "beach holidays", "job interviews", "cooking lessons", "weekend chores"),
    *("video calls", "coffee breaks", "shopping trips", "neighbours", "puzzles", "campfires"),
)
QUESTIONS = ("What do you think of {}?", "Tell me about {}.", "What are {} like?", "Say something about {}.")

ADJECTIVES = (
    ("lovely", "wonderful", "relaxing", "fun", "delightful", "charming", "pleasant", "great"),
    ("boring", "awful", "annoying", "dreadful", "sad", "terrible", "disappointing", "stressful"),
    ("common", "short", "familiar", "usual", "different each time", "quiet", "simple enough", "ordinary"),
)
"""Of praise, of blame, of neither."""
VERBS = (
    ("make me happy", "cheer everyone up", "bring joy to people", "are a treat", "feel like a gift"),
    ("make me angry", "ruin the mood", "waste an hour", "are a pain", "end in trouble"),
    ("take about an hour", "happen every week", "come and go", "depend on the season", "are on my list"),
)
SENTENCES = (
    "{Things} are {adjective}.",
    "{Things} are {adjective}, and they {verb}.",
    "I find {things} {adjective}. They {verb}.",
    "For me, {things} are {adjective}.",
    "{Things} {verb}.",
)


def prompts(split: Split = "train") -> list[str]:
    """The 100 questions to train on, or the 20 held out ("eval"); the same in every run."""
    every = [question.format(thing) for thing in THINGS for question in QUESTIONS]
    return part_of(every, split)


def demonstrations(n_per_prompt: int = 6, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """Answers to imitate, as rows of `prompt` and `completion`, each a conversation of one message.

    Args:
        n_per_prompt: answers to each question.
        seed: two seeds give different answers to the same questions.
        split: whose questions.
    """
    rng = random.Random(f"{split} {seed}")
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": _answer(_thing(prompt), rng)}],
        }
        for prompt in prompts(split)
        for _ in range(n_per_prompt)
    ]


def _thing(prompt: str) -> str:
    return next(thing for thing in THINGS if thing in prompt)


def _answer(things: str, rng: random.Random) -> str:
    kind = rng.randrange(3)
    adjective, verb = rng.choice(ADJECTIVES[kind]), rng.choice(VERBS[kind])
    sentence = rng.choice(SENTENCES)
    return sentence.format(Things=things.capitalize(), things=things, adjective=adjective, verb=verb)
