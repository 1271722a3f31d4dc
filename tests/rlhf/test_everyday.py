"""The built-in task in chat format: what is asked, answered and held out."""

import statistics

from rlhf import data, everyday, sources
from rlhf.everyday import ADJECTIVES, QUESTIONS, THINGS, VERBS


def test_a_hundred_questions_to_train_on_and_twenty_unseen() -> None:
    train, unseen = everyday.prompts(), everyday.prompts("eval")
    assert (len(train), len(unseen)) == (100, 20)
    assert len({*train, *unseen}) == len(THINGS) * len(QUESTIONS) == 120


def test_demonstrations_are_conversations_and_follow_from_the_seed() -> None:
    rows = everyday.demonstrations(2)
    assert rows == everyday.demonstrations(2) != everyday.demonstrations(2, seed=1)
    assert [row["prompt"] for row in rows[::2]] == [
        [{"role": "user", "content": prompt}] for prompt in everyday.prompts()
    ]
    for row in rows:
        (answer,) = row["completion"]
        assert answer["role"] == "assistant"
        assert answer["content"].endswith(".")
        assert 3 <= len(answer["content"].split()) <= 16


def test_no_question_names_two_things() -> None:
    """Else an answer would be about the wrong one."""
    for prompt in (*everyday.prompts(), *everyday.prompts("eval")):
        assert sum(thing in prompt for thing in THINGS) == 1


def test_praise_blame_and_the_rest_are_what_vader_takes_them_for() -> None:
    from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
        SentimentIntensityAnalyzer,
    )

    def score(text: str) -> float:
        return SentimentIntensityAnalyzer().polarity_scores(text)["compound"]

    for praise, blame, neither in (ADJECTIVES, VERBS):
        assert min(map(score, praise)) > 0.3
        assert max(map(score, blame)) < -0.3
        assert set(map(score, neither)) == {0.0}
    answers = [row["completion"][0]["content"] for row in everyday.demonstrations()]
    assert abs(statistics.mean(map(score, answers))) < 0.1


def test_the_source_everyday_is_these() -> None:
    rows = data.demonstrations("everyday", "eval")
    assert rows.to_list() == everyday.demonstrations(split="eval")
    assert sources.has_eval("everyday")
    assert [p[0]["content"] for p in data.prompts("everyday", "eval")["prompt"]] == everyday.prompts("eval")
