"""What every labeler is, and what labelers share: answers, rankings, ranks from scores and from groups.

A prompt is plain text or a list of messages; an answer is text, of a conversation the assistant's content.
"""

import dataclasses
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from lab.config import require
from lab.errors import LabError
from rlhf.forms import Text

Prompt: TypeAlias = Text


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    text: str
    finished: bool = True
    """Whether it ended by itself, with end-of-text, rather than at the length limit."""


@dataclass(frozen=True)
class Ranking:
    """A labeler's opinion of the answers to one prompt, in their order."""

    ranks: list[int]
    """1 is the best; equal ranks are a tie; no rank is left out (1, 2, 2, 3)."""
    scores: list[float] | None = None
    """Of labelers that score; higher is better."""
    shown: list[int] | None = None
    """The order in which the answers were really shown, by index, where it is another than they came in."""


class Skip(Exception):
    """Raised by `Labeler.rank`: no opinion on this prompt; the text says why."""


class Undo(Exception):
    """Raised by `Labeler.rank`: the previous ranking was a mistake, ask for it again."""


class Quit(Exception):
    """Raised by `Labeler.rank`: enough for now."""


class Labeler(Protocol):
    """Ranks answers. Any object with these will do."""

    @property
    def name(self) -> str:
        """Says all that decides its rankings: it is the source recorded with each of them."""
        ...

    @property
    def interactive(self) -> bool:
        """Whether it talks to somebody on the terminal, where a progress bar would be in the way."""
        ...

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """Ranks the answers to one prompt.

        Raises:
            Skip, Undo, Quit: instead of a ranking.
            LabError: it cannot rank, neither these nor any others.
        """
        ...


def rank_in_order(
    labeler: Labeler, prompt: Prompt, answers: Sequence[Answer], order: Sequence[int]
) -> Ranking:
    """The labeler's opinion of answers that it is shown in another order than they are given in.

    Args:
        order: the index of the answer shown first, then of the second, and so on.

    Returns:
        Ranks and scores in the order of `answers`, and the order in which they were really shown: a labeler
        may have shuffled them once more.
    """
    ranking = labeler.rank(prompt, [answers[index] for index in order])
    place = {index: number for number, index in enumerate(order)}
    ranks = [ranking.ranks[place[index]] for index in range(len(answers))]
    scores = ranking.scores and [ranking.scores[place[index]] for index in range(len(answers))]
    shown = [*order] if ranking.shown is None else [order[index] for index in ranking.shown]
    return Ranking(ranks, scores, shown)


@dataclass(frozen=True, kw_only=True)
class Configured(ABC):
    """A labeler that a config can name: the fields of its class are the options there."""

    # Constants of a class, not annotated lest they become options.
    kind = ""
    target = ""  # the option that may stand behind the colon of the name
    unnamed = ()  # options that change no ranking
    interactive = False

    @property
    def name(self) -> str:
        """`vader`, or `vader(min_words=4)`: two labelers of one name rank alike."""
        told = [
            f"{option.name}={brief(getattr(self, option.name))}"
            for option in dataclasses.fields(self)
            if option.name not in (self.target, *self.unnamed)
            and getattr(self, option.name) != option.default
        ]
        head = f"{self.kind}:{getattr(self, self.target)}" if self.target else self.kind
        return f"{head}({', '.join(told)})" if told else head

    def require_consent(self, source: str) -> None:  # noqa: B027 (most run nothing of a stranger's)
        """Raises a `LabError` unless the command line trusts the code it runs, or whom it asks.

        Args:
            source: where its spec stands, for the error.
        """

    def code(self) -> dict[str, str] | None:
        """The user's own code that it runs, for the record of a run: `code`, its `path` and its `sha256`."""
        return None

    def prepare(self) -> None:  # noqa: B027 (nothing to load is the ordinary case)
        """Loads what it needs, so that a mistake shows before the first answer is sampled.

        Raises:
            LabError: it is missing or broken.
        """

    @abstractmethod
    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """See `Labeler.rank`."""


@dataclass(frozen=True, kw_only=True)
class Scorer(Configured):
    """A labeler that gives each answer a number of its own, whatever it is compared with."""

    tie_margin: float = 0.0
    """Scores no further apart than this are a tie."""

    def __post_init__(self) -> None:
        require(self.tie_margin >= 0, "tie_margin", f"{self.tie_margin} must not be negative")

    @cached_property
    def _instrument(self) -> Any:
        """What it scores with, loaded when it is first asked for."""
        return None

    def prepare(self) -> None:
        _ = self._instrument

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        """Scores answer i to prompt i, all in one batch.

        Raises:
            LabError: the scorer failed, or returned something else than one finite number each.
        """
        raw = self._score(prompts, answers)
        if len(raw) != len(answers):
            raise LabError(
                f"{self.name}: returned {len(raw)} scores for {len(answers)} answers. Return one each."
            )
        numbers = [_number(value) for value in raw]
        for number, value, answer in zip(numbers, raw, answers, strict=True):
            if not math.isfinite(number):
                raise LabError(
                    f"{self.name}: scored {brief(answer.text)} with {brief(value)}. Return a finite number."
                )
        return numbers

    def rank_batch(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> list[Ranking]:
        """Ranks the answers to each prompt, scoring all of them at once."""
        each = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
        scores = iter(self.scores([prompt for prompt, _ in each], [answer for _, answer in each]))
        groups = [list(itertools.islice(scores, len(own))) for own in answers]
        return [Ranking(ranking_from_scores(group, self.tie_margin), group) for group in groups]

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        return self.rank_batch([prompt], [answers])[0]

    @abstractmethod
    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Sequence[Any]:
        """One raw score per answer; `scores` checks them."""


def ranking_from_scores(scores: Sequence[float], tie_margin: float = 0.0) -> list[int]:
    """Ranks from scores, the highest first; whatever lies within `tie_margin` of its neighbour ties with it.

    Ties chain: 0.10, 0.06 and 0.02 are one tie at a margin of 0.05. So no difference within the margin
    ever becomes a preference, at the price of a few larger ones that do not either.
    """
    ranks = [0] * len(scores)
    rank, previous = 0, math.inf
    for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
        rank += previous - scores[index] > tie_margin
        ranks[index], previous = rank, scores[index]
    return ranks


def ranks_from_groups(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """Ranks of `count` answers from groups of their numbers (from 1), the best group first.

    Raises:
        ValueError: an answer is missing, unknown or named twice; the text says which.
    """
    ranks = [0] * count
    for rank, group in enumerate((group for group in groups if group), 1):
        for number in group:
            if not 1 <= number <= count:
                raise ValueError(f"there is no answer {number}, only 1 to {count}")
            if ranks[number - 1]:
                raise ValueError(f"answer {number} is named twice")
            ranks[number - 1] = rank
    if 0 in ranks:
        raise ValueError(f"answer {ranks.index(0) + 1} is missing")
    return ranks


def rank_distinct(answers: Sequence[Answer], rank: Callable[[list[Answer]], list[int]]) -> list[int]:
    """Lets `rank` see every answer once; one given twice ties with itself, and alone needs no ranking."""
    distinct = list(dict.fromkeys(answers))
    ranks = rank(distinct) if len(distinct) > 1 else [1]
    rank_of = dict(zip(distinct, ranks, strict=True))
    return [rank_of[answer] for answer in answers]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text to read: messages become `role: content`, a blank line between two."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(
        f"{message['role']}: {message['content']}{message.get('tool_calls') or ''}" for message in prompt
    )


def completion(prompt: Prompt, answer: Answer) -> Text:
    """An answer in the form of its prompt, as TRL wants it: text to text, messages to messages."""
    return answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]


def brief(value: Any) -> str:
    """A value within one line of an error or a name; a long one is cut and told apart by its hash."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...#{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _number(value: Any) -> float:
    """A score as a float, NaN if it is none; scalars of numpy and torch are numbers, texts are not."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
