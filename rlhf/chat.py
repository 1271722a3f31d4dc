"""`lab chat`: talking to a model in the terminal, or to two side by side.

A model whose tokenizer has a chat template keeps the dialogue; any other continues a text.
"""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.device import DeviceConfig, quiet_threads, resolve
from lab.errors import LabError, did_you_mean
from lab.escape import harmless
from lab.files import read_json
from rlhf.pipeline import find_model

if TYPE_CHECKING:
    from rich.console import Console

MAX_NEW_TOKENS = 256
COLUMNS_FOR_TWO = 100
"""Two answers are shown side by side in a terminal at least so wide."""

COMMANDS = {
    "/reset": "forget the dialogue",
    "/seed N": "begin the random numbers anew at N",
    "/temperature X": "0: always the likeliest token; 1: as trained; more: wilder",
    "/help": "this list",
    "/quit": "leave; so does the end of input, or Ctrl-C twice. Ctrl-C once stops an answer",
}

# What may still grow: letters of scripts that put spaces between words, and the mark of half a character.
# No word is longer than 40; what a broken model says may be.
_UNFINISHED = re.compile(r"([^\W\u0e00-\u0eff\u2e80-\U0010ffff]|['\u2019]){0,40}\ufffd*$")

# What a terminal would obey and not show; tabs and newlines are neither.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `lab chat` takes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run of `lab rlhf`, or a transformers folder")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="a second model, side by side")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this once and leave")
    parser.add_argument("--system", metavar="TEXT", help="the system message of a dialogue")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help=COMMANDS["/temperature X"]
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"of each answer ({MAX_NEW_TOKENS})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")


class Speaker:
    """A model and what was said to it and by it.

    Args:
        name: what people see.
        model, tokenizer: as `rlhf.models.open_policy` returns them.
        system: the system message; empty: what the chat template puts there, if anything.
        max_new_tokens: of each answer.
        temperature: of sampling.
        seed: of the random numbers.

    Raises:
        LabError: a system message for a model without a chat template.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        system: str = "",
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        import torch

        from rlhf.decode import end_tokens

        self.name, self.temperature = name, temperature
        self.converses = bool(tokenizer.chat_template)
        if system and not self.converses:
            raise LabError(f"{name}: has no chat template, so it takes no --system message. Leave it out.")
        self._model, self._tokenizer = model, tokenizer
        self._ends = end_tokens(model, tokenizer)
        self._positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
        self._max_new_tokens = max_new_tokens
        self._opening = [{"role": "system", "content": system}] if system else []
        self._generator = torch.Generator(next(model.parameters()).device)
        self.reset()
        self.seed(seed)

    def reset(self) -> None:
        """Forgets the dialogue."""
        self.turns: list[dict[str, str]] = []

    def seed(self, number: int) -> None:
        """Begins the random numbers anew."""
        self._generator.manual_seed(number % 2**63)

    def ask(self, text: str) -> str:
        """Puts a question, or a text to continue; `answer` is next.

        Returns:
            A note if old turns had to go because the dialogue is longer than the model reads, else "".

        Raises:
            LabError: the text alone is too long, or empty.
        """
        before = self.turns if self.converses else []
        turns = [*before, {"role": "user", "content": text}]
        room = min(self._max_new_tokens, self._positions // 2)
        while len(ids := self._ids(turns)) + room > self._positions and len(turns) > 1:
            turns = turns[2:]
        if not 0 < len(ids) < self._positions:
            raise LabError(f"{self.name}: reads 1 to {self._positions - 1:,} tokens; these are {len(ids):,}.")
        self._prompt, self._asked = ids, turns
        gone = (len(before) + 1 - len(turns)) // 2
        return f"{self.name}: forgot the oldest {gone} of {len(before) // 2} turns." if gone else ""

    def answer(self) -> Generator[str, None, None]:
        """Yields the answer in whole words as they are sampled; closed early, it ends there for good."""
        from rlhf.decode import stream

        tokens = stream(
            self._model,
            self._prompt,
            max_new_tokens=min(self._max_new_tokens, self._positions - len(self._prompt)),
            eos_ids=self._ends,
            temperature=self.temperature,
            generator=self._generator,
        )
        said = ""
        try:
            for piece in whole_words(tokens, self._decode):
                said += piece
                yield piece
        finally:
            self.turns = [*self._asked, {"role": "assistant", "content": said}]

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        from rlhf.tokenization import tokenize_prompt

        prompt = [*self._opening, *turns] if self.converses else turns[-1]["content"]
        return tokenize_prompt(prompt, self._tokenizer)

    def _decode(self, ids: Sequence[int]) -> str:
        return _CONTROL.sub("", self._tokenizer.decode(ids, skip_special_tokens=True))


def whole_words(tokens: Iterator[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yields text as tokens come; a word, or a character of several tokens, not before it is complete."""
    ids: list[int] = []
    text, shown = "", 0
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        unfinished = _UNFINISHED.search(text, shown)
        if unfinished is not None and unfinished.start() > shown:
            yield text[shown : unfinished.start()]
            shown = unfinished.start()
    if text[shown:]:
        yield text[shown:]


def chat(folder: Path, options: argparse.Namespace) -> None:
    """Talks with whoever sits at the terminal until they leave, or answers `options.prompt`.

    Args:
        folder: a model, in any way `find_model` takes.
        options: what `add_arguments` adds.

    Raises:
        LabError: no language model there, or an option that cannot be.
        KeyboardInterrupt: while `options.prompt` was being answered.
    """
    if not 0 <= options.temperature < math.inf:
        raise LabError(f"--temperature {options.temperature:g}: must be a number that is not negative.")
    if options.max_new_tokens < 1:
        raise LabError(f"--max_new_tokens {options.max_new_tokens}: must be at least 1.")
    folders = [folder, options.against] if options.against else [folder]
    places = [_language_model(each) for each in folders]
    quiet_threads()
    speakers = _open(folders, places, options)
    if options.prompt is not None:
        if not _answer(speakers, options.prompt, plain=True):
            raise KeyboardInterrupt
        return
    _converse(speakers)


def _language_model(folder: Path) -> Path:
    place = find_model(folder)
    if (place / "config.json").exists():
        architecture, *_ = read_json(place / "config.json", "a model's config").get("architectures") or [""]
        scores = architecture.endswith("ForSequenceClassification")
    else:
        scores = read_json(place / "adapter_config.json", "an adapter's").get("task_type") == "SEQ_CLS"
    if scores:
        raise LabError(f"{folder}: is a reward model, which scores answers and gives none.")
    return place


def _open(folders: Sequence[Path], places: Sequence[Path], options: argparse.Namespace) -> list[Speaker]:
    from rlhf.models import open_policy
    from rlhf.stage import quiet_transformers

    device = resolve(DeviceConfig()).device
    speakers = []
    for folder, place in zip(folders, places, strict=True):
        with quiet_transformers(lambda line: print(harmless(line.strip()), file=sys.stderr)):
            model, tokenizer = open_policy(place)
        speakers.append(
            Speaker(
                str(folder),
                model.eval().to(device),
                tokenizer,
                system=options.system or "",
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
            )
        )
    return speakers


# ---- the terminal ----


def _converse(speakers: Sequence[Speaker]) -> None:
    """Reads questions and commands until /quit, the end of input or a second Ctrl-C."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # lets `input` edit lines and remember them
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        for speaker in speakers:
            print(f"{speaker.name} {'answers' if speaker.converses else 'continues a text'}.")
        print("/help lists the commands.")
    interrupted = False
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            print("Ctrl-C again leaves.")
            interrupted = True
            continue
        interrupted = False
        if line.strip() == "/quit":
            return
        if line.strip().startswith("/"):
            print(_obey(line, speakers))
        elif line.strip():
            try:
                interrupted = not _answer(speakers, line)
            except LabError as error:
                print(error)


def _obey(line: str, speakers: Sequence[Speaker]) -> str:
    """Carries out a command; returns what to say about it."""
    command, _, value = line.strip().partition(" ")
    try:
        for speaker in speakers:
            if command == "/reset":
                speaker.reset()
            elif command == "/seed":
                speaker.seed(int(value))
            elif command == "/temperature":
                if not 0 <= float(value) < math.inf:
                    raise ValueError
                speaker.temperature = float(value)
    except ValueError:
        return f"{command}: {value!r} is no number it can be."
    names = [usage.split()[0] for usage in COMMANDS]
    if command == "/help":
        return "\n".join(f"  {usage:<16} {text}" for usage, text in COMMANDS.items())
    return "Done." if command in names else f"{command}: no such command.{did_you_mean(command, names)}"


def _answer(speakers: Sequence[Speaker], text: str, plain: bool = False) -> bool:
    """Prints everyone's answer as it comes; returns whether it was heard out, and not stopped by Ctrl-C."""
    from rich.console import Console

    console = Console(highlight=False)
    for note in [speaker.ask(text) for speaker in speakers]:
        if note:
            print(note, file=sys.stderr)
    try:
        if len(speakers) > 1 and console.is_terminal and not plain:
            _side_by_side(speakers, console)
        else:
            _one_by_one(speakers)
    except KeyboardInterrupt:
        print()
        return False
    return True


def _one_by_one(speakers: Sequence[Speaker]) -> None:
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"{speaker.name}:")
        with contextlib.closing(speaker.answer()) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()


def _side_by_side(speakers: Sequence[Speaker], console: "Console") -> None:
    """Two panels that fill at the same time; one below the other in a narrow terminal."""
    from rich.console import Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    said = dict.fromkeys(speakers, "")

    def panels() -> Table | Group:
        each = [
            Panel(Text(said[speaker]), title=Text(speaker.name), title_align="left") for speaker in speakers
        ]
        if console.width < COLUMNS_FOR_TWO:
            return Group(*each)
        columns = Table.grid(expand=True)
        for _ in each:
            columns.add_column(ratio=1)
        columns.add_row(*each)
        return columns

    with contextlib.ExitStack() as stack, Live(panels(), console=console) as live:
        answers = {s: stack.enter_context(contextlib.closing(s.answer())) for s in speakers}
        while answers:
            for speaker, pieces in list(answers.items()):
                piece = next(pieces, None)
                if piece is None:
                    del answers[speaker]
                else:
                    said[speaker] += piece
            live.update(panels())
