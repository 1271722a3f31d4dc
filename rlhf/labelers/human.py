"""A person as labeler, at the terminal or behind standard input."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.labelers.base import (
    Answer,
    Configured,
    Prompt,
    Quit,
    Ranking,
    Skip,
    Undo,
    prompt_text,
    rank_distinct,
    ranks_from_groups,
)

HELP = """\
  2 1=3 4   the order, best first; = makes a tie; every answer once
  s         skip this prompt        u   undo the previous one
  q         quit, keeping all       ?   this help"""


@dataclass(frozen=True, kw_only=True)
class Human(Configured):
    """Whoever sits at the terminal, or writes to standard input."""

    kind = "human"
    interactive = True

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """Shows prompt and answers and asks for their order until it is one.

        Raises:
            Skip, Undo, Quit: the person said so; the end of the input also means Quit.
        """
        self._show("prompt", prompt_text(prompt))
        return Ranking(rank_distinct(answers, self._rank))

    def _rank(self, answers: Sequence[Answer]) -> list[int]:
        for number, answer in enumerate(answers, 1):
            cut = "" if answer.finished else " (cut off at the length limit)"
            self._show(f"answer {number}{cut}", answer.text)
        while True:
            try:
                said = input("order, best first (? for help): ").strip()
            except EOFError:
                raise Quit("end of input") from None
            except UnicodeDecodeError:
                said = "\N{REPLACEMENT CHARACTER}"
            if said in ("s", "u", "q"):
                raise {"s": Skip, "u": Undo, "q": Quit}[said]("by the person")
            if said == "?":
                print(HELP)
                continue
            try:
                return ranks_from_groups(parse_order(said), len(answers))
            except ValueError as error:
                print(f"  {error}. Write for example: {' '.join(map(str, range(1, len(answers) + 1)))}")

    @staticmethod
    def _show(title: str, text: str) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        # What a model writes must not reach the terminal as a command to it.
        harmless = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        Console(highlight=False).print(Panel(Text(harmless or "(empty)"), title=title, title_align="left"))


def parse_order(text: str) -> list[list[int]]:
    """`2 1=3 4` -> [[2], [1, 3], [4]]; commas and > may stand between, too.

    Raises:
        ValueError: something in it is no number; the text says what.
    """
    words = re.sub(r"\s*=\s*", "=", re.sub(r"[,>]", " ", text)).split()
    groups = [word.split("=") for word in words] or [[""]]
    for part in itertools.chain(*groups):
        if not part.isdecimal():
            raise ValueError(f"{part!r} is no number of an answer" if part else "a number is missing")
    return [[int(part) for part in group] for group in groups]
