"""Who ranks answers: a program, a reward model, a language model as judge, or a person.

    make("vader")                                          sentiment of the text
    make({"name": "python:score.py:score", "batch": True}) any function of yours
    make("reward:runs/mine/reward")                        a reward model's folder
    make({"name": "judge:http://host/v1", "model": "m"})   an OpenAI-compatible service
    make("human")                                          whoever sits at the terminal

A prompt is plain text or a list of messages; an answer is text, of a conversation the assistant's content.
Imports nothing heavy: what a labeler needs is loaded by its `prepare`.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import importlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from lab import config
from lab.config import require
from lab.errors import LabError, did_you_mean

Prompt = str | list[dict[str, str]]
"""Plain text, or messages such as {"role": "user", "content": "Hello"}."""


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


@dataclass(frozen=True, kw_only=True)
class _Made(ABC):
    """What the labelers of this module share; their fields are the options of `make`."""

    # Constants of a class, not annotated lest they become options.
    kind = ""
    target = ""  # the option that may stand behind the colon of the name
    unnamed = ()  # options that change no ranking
    interactive = False

    @property
    def name(self) -> str:
        """`vader`, or `vader(min_words=4)`: two labelers of one name rank alike."""
        told = [
            f"{option.name}={_brief(getattr(self, option.name))}"
            for option in dataclasses.fields(self)
            if option.name not in (self.target, *self.unnamed)
            and getattr(self, option.name) != option.default
        ]
        head = f"{self.kind}:{getattr(self, self.target)}" if self.target else self.kind
        return f"{head}({', '.join(told)})" if told else head

    def prepare(self) -> None:  # noqa: B027 (nothing to load is the ordinary case)
        """Loads what it needs, so that a mistake shows before the first answer is sampled.

        Raises:
            LabError: it is missing or broken.
        """

    @abstractmethod
    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """See `Labeler.rank`."""


@dataclass(frozen=True, kw_only=True)
class Scorer(_Made):
    """A labeler that gives each answer a number of its own, whatever it is compared with."""

    tie_margin: float = 0.0
    """Scores no further apart than this are a tie."""

    def __post_init__(self) -> None:
        require(self.tie_margin >= 0, "tie_margin", f"{self.tie_margin} must not be negative")

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
                    f"{self.name}: scored {_brief(answer.text)} with {_brief(value)}. Return a finite number."
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


# ---- programs ----


@dataclass(frozen=True, kw_only=True)
class Vader(Scorer):
    """How pleasant an answer sounds: VADER's compound (-1 to 1, Hutto and Gilbert 2014), less penalties."""

    kind = "vader"

    tie_margin: float = 0.05
    unfinished_penalty: float = 0.0
    """Subtracted from answers that were cut off at the length limit."""
    min_words: int = 0
    max_words: int | None = None
    length_penalty: float = 0.05
    """Subtracted for every word below min_words or above max_words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("unfinished_penalty", "min_words", "length_penalty"):
            require(getattr(self, key) >= 0, key, f"{getattr(self, key)} must not be negative")
        require(
            self.max_words is None or self.max_words >= self.min_words,
            "max_words",
            f"{self.max_words} is less than min_words {self.min_words}",
        )

    def prepare(self) -> None:
        assert self._analyzer

    @cached_property
    def _analyzer(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
                SentimentIntensityAnalyzer,
            )
        except ImportError:
            raise LabError(
                "labeler 'vader': the package vaderSentiment is missing. Run `pip install vaderSentiment`."
            ) from None
        return SentimentIntensityAnalyzer()

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        return [self._score_one(answer) for answer in answers]

    def _score_one(self, answer: Answer) -> float:
        words = len(answer.text.split())
        outside = max(self.min_words - words, words - self.max_words if self.max_words is not None else 0, 0)
        penalty = self.length_penalty * outside + self.unfinished_penalty * (not answer.finished)
        return self._analyzer.polarity_scores(answer.text)["compound"] - penalty


@dataclass(frozen=True, kw_only=True)
class Function(Scorer):
    """A function of the user's: `(prompt, answer) -> number`, the answer being its text."""

    kind = "python"
    target = "function"

    function: str = ""
    """module.path:function, or path/to/file.py:function."""
    batch: bool = False
    """The function takes a list of prompts and one of answers, of equal length, and returns a list."""

    def prepare(self) -> None:
        assert self._callable

    @cached_property
    def _callable(self) -> Callable[..., Any]:
        where, _, attribute = self.function.rpartition(":")
        if not where or not attribute:
            raise LabError(
                f"labeler {self.name!r}: names no function. "
                "Write python:module.path:function or python:path/to/file.py:function."
            )
        module = self._import(where)
        found = getattr(module, attribute, None)
        if not callable(found):
            hint = did_you_mean(attribute, (name for name, value in vars(module).items() if callable(value)))
            raise LabError(
                f"labeler {self.name!r}: there is no function {attribute!r} in {where}.{hint} "
                "Name a function of (prompt, answer)."
            )
        return found

    def _import(self, where: str) -> ModuleType:
        is_file = where.endswith(".py")
        if is_file and not Path(where).is_file():
            raise LabError(f"labeler {self.name!r}: there is no file {where}. Correct the path.")
        try:
            return _load_file(Path(where)) if is_file else _load_module(where)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
                raise LabError(
                    f"labeler {self.name!r}: there is no module {error.name!r}. Correct the name; modules "
                    "are looked for in this folder and among the installed packages."
                ) from None
            raise LabError(f"labeler {self.name!r}: importing {where} failed: {_told(error)}.") from error

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Any]:
        texts = [answer.text for answer in answers]
        function = self._callable
        try:
            if self.batch:
                return list(function(list(prompts), texts))
            return [function(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        except Exception as error:
            raise LabError(f"labeler {self.name!r}: failed: {_told(error)}. Correct the function.") from error


def _load_module(name: str) -> ModuleType:
    # The command `lab` has its own folder first on the path, not the one it is called from.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    import importlib.util

    name = f"lab_labeler_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up there
    spec.loader.exec_module(module)
    return module


# ---- a reward model ----


@dataclass(frozen=True, kw_only=True)
class RewardModel(Scorer):
    """Another reward model: a folder that transformers loads as a sequence classifier."""

    kind = "reward"
    target = "folder"
    unnamed = ("device",)

    folder: str = ""
    device: str = "cpu"
    """Where it computes: cpu, cuda, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.folder), "folder", "names no reward model. Write reward:FOLDER")

    def prepare(self) -> None:
        assert self._scorer

    @cached_property
    def _scorer(self) -> Any:
        if not (Path(self.folder) / "config.json").exists():
            raise LabError(
                f"{self.folder}: no reward model: there is no config.json in it. Correct the path."
            )
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        import rlhf.labgpt  # noqa: F401 (registers our own models)
        from rlhf.scoring import RewardScorer

        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = model.to(self.device).eval()
        except Exception as error:  # transformers, tokenizers, safetensors and torch raise what they like
            raise LabError(f"{self.folder}: cannot be loaded as a reward model: {_told(error)}.") from error
        # transformers would fill what is missing with random numbers, and they would rank.
        if report["missing_keys"] or model.config.num_labels != 1:
            raise LabError(f"{self.folder}: holds no reward model. Name a classifier with one label.")
        return RewardScorer(model, tokenizer)

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        completions = [completion(*each) for each in zip(prompts, answers, strict=True)]
        finished = [answer.finished for answer in answers]
        return self._scorer.score_texts(list(prompts), completions, finished).tolist()


# ---- a language model as judge ----

QUESTION = """\
Several answers to one prompt follow. Rank them by how well they serve whoever wrote the prompt.

<prompt>
{prompt}
</prompt>

{answers}

Reply with JSON only, in this form: {"ranking": [[2], [1, 3]]}
It lists the numbers of all {count} answers, the best first; answers equally good share a list.
"""


@dataclass(frozen=True, kw_only=True)
class Judge(_Made):
    """A language model behind an OpenAI-compatible service.

    The answers are shuffled before every question, so that the judge's liking for a position averages out.
    """

    kind = "judge"
    target = "url"
    unnamed = ("api_key_env", "timeout_seconds", "retries", "backoff_seconds")

    url: str = ""
    """Where the service is, e.g. http://localhost:8000/v1."""
    model: str = ""
    """The judge's name there."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; without it, none is sent."""
    template: str = QUESTION
    """The question; {prompt}, {answers} and {count} are filled in."""
    temperature: float | None = 0.0
    """null leaves it to the service; some models accept nothing else."""
    seed: int = 0
    """Of the shuffling."""
    timeout_seconds: float = 60.0
    retries: int = 4
    """How often a question is asked again that got no answer, or one that cannot be read."""
    backoff_seconds: float = 1.0
    """The wait before the first retry; it doubles with each."""

    def __post_init__(self) -> None:
        parts = _split_url(self.url)
        require(parts is not None, "url", "is no address. Write judge:http://HOST/v1")
        assert parts is not None
        # It is recorded with every ranking, so nothing secret may be in it; nor does the error repeat it.
        require(
            parts.username is None and not parts.query,
            "url",
            "must hold no credentials. Put the key into an environment variable and name it in api_key_env",
        )
        require(bool(self.model), "model", "is missing: the judge's name at the service")
        for blank in ("{prompt}", "{answers}"):
            require(blank in self.template, "template", f"has no {blank}")
        require(self.timeout_seconds > 0, "timeout_seconds", f"{self.timeout_seconds} must be positive")
        require(self.retries >= 0, "retries", f"{self.retries} must not be negative")
        require(self.backoff_seconds >= 0, "backoff_seconds", f"{self.backoff_seconds} must not be negative")

    def prepare(self) -> None:
        if not re.fullmatch(r"[!-~]*", self._key):  # http.client would print it in its complaint
            raise LabError(f"the key in {self.api_key_env} has characters that no key has. Correct it.")

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """Asks the judge, again in another order if its reply cannot be read.

        Raises:
            Skip: no reply could be read.
            LabError: the service is not there, or refuses.
        """
        return Ranking(_rank_distinct(answers, lambda distinct: self._rank(prompt, distinct)))

    def _rank(self, prompt: Prompt, answers: Sequence[Answer]) -> list[int]:
        problem = ""
        for attempt in range(self.retries + 1):
            # Seeded by the question, not by a count of calls: a resumed collection shuffles alike. And by
            # the attempt, for at temperature 0 the same question would get the same reply.
            draw = random.Random(
                json.dumps([self.seed, attempt, prompt, [answer.text for answer in answers]])
            )
            order = draw.sample(range(len(answers)), len(answers))
            reply = self._ask(self._question(prompt, [answers[index] for index in order]))
            try:
                shuffled = ranks_from_groups(_ranking_in(reply), len(answers))
            except ValueError as error:
                problem = str(error)
                continue
            return [shuffled[order.index(index)] for index in range(len(answers))]
        raise Skip(f"the judge's reply cannot be read: {problem}")

    def _question(self, prompt: Prompt, answers: Sequence[Answer]) -> str:
        shown = "\n\n".join(
            f'<answer number="{number}"{"" if answer.finished else " cut_off"}>\n{answer.text}\n</answer>'
            for number, answer in enumerate(answers, 1)
        )
        blanks = {"prompt": prompt_text(prompt), "answers": shown, "count": str(len(answers))}
        # In one pass: neither the JSON in the template nor braces in an answer are taken for blanks.
        return re.sub(r"\{(prompt|answers|count)\}", lambda blank: blanks[blank[1]], self.template)

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    @property
    def _endpoint(self) -> str:
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"

    def _ask(self, question: str) -> str:
        """One question, one reply; waits and asks again while the service is busy or broken."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._endpoint, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        problem = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff_seconds * 2**attempt
            try:
                with opener.open(request, timeout=self.timeout_seconds) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                problem = self._refusal(error)
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                problem = f"cannot be reached ({reason})"
                if not isinstance(reason, TimeoutError | ConnectionResetError | http.client.HTTPException):
                    remedy = "Start the service, or correct its url."
                    raise LabError(f"{self._endpoint}: {problem}. {remedy}") from None
            if attempt < self.retries:
                time.sleep(min(wait, 60.0))
        raise LabError(
            f"{self._endpoint}: {problem}, also after {self.retries} retries. Start again later: "
            "what was ranked is kept."
        )

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What a service says that may answer later; raises for one that will not."""
        text = ""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            text = " ".join(error.read(2_000).decode("utf-8", "replace").split())
        if error.code in (401, 403):  # whose text may repeat the key
            key = (
                f"the key in {self.api_key_env}"
                if self._key
                else f"a call without key: {self.api_key_env} is empty"
            )
            raise LabError(f"{self._endpoint}: refuses {key}. Set {self.api_key_env} to a valid one.")
        text = text.replace(self._key, "<redacted>") if self._key else text
        problem = f"answers {error.code} {error.reason}" + (f": {text[:200]}" if text else "")
        if error.code not in (408, 429) and error.code < 500:
            raise LabError(f"{self._endpoint}: {problem}. Check the judge's url and model.")
        return problem

    def _content(self, body: bytes) -> str:
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise LabError(
                f"{self._endpoint}: the reply is no chat completion. Check the judge's url."
            ) from None
        return content if isinstance(content, str) else ""  # null: it refused, or thought to the limit


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: urllib would take the key along to whatever host it is sent to."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _ranking_in(reply: str) -> list[list[int]]:
    """The groups of the last {"ranking": ...} in a reply: models think, talk and fence before they obey."""
    decoder, found = json.JSONDecoder(), None
    for brace in re.finditer(r"\{", reply):
        try:
            value = decoder.raw_decode(reply, brace.start())[0]
        except (ValueError, RecursionError):
            continue
        found = value.get("ranking", found)
    if not isinstance(found, list):
        raise ValueError(f"no ranking in {_brief(reply)}")
    groups = [group if isinstance(group, list) else [group] for group in found]
    if not all(type(number) is int for group in groups for number in group):
        raise ValueError(f"not numbers of answers: {_brief(found)}")
    return groups


def _split_url(url: str) -> urllib.parse.SplitResult | None:
    """The parts of a web address, None if it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that cannot be
        return None
    return parts if whole and re.fullmatch(r"[!-~]+", url) else None


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds; its other form, a date, is not worth parsing."""
    return float(header) if header and header.isdecimal() else 0.0


# ---- a person ----

HELP = """\
  2 1=3 4   the order, best first; = makes a tie; every answer once
  s         skip this prompt        u   undo the previous one
  q         quit, keeping all       ?   this help"""


@dataclass(frozen=True, kw_only=True)
class Human(_Made):
    """Whoever sits at the terminal, or writes to standard input."""

    kind = "human"
    interactive = True

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        """Shows prompt and answers and asks for their order until it is one.

        Raises:
            Skip, Undo, Quit: the person said so; the end of the input also means Quit.
        """
        self._show("prompt", prompt_text(prompt))
        return Ranking(_rank_distinct(answers, self._rank))

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


# ---- what they share ----


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


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text to read: messages become `role: content`, a blank line between two."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def completion(prompt: Prompt, answer: Answer) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt, as TRL wants it: text to text, messages to messages."""
    return answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]


def _rank_distinct(answers: Sequence[Answer], rank: Callable[[list[Answer]], list[int]]) -> list[int]:
    """Lets `rank` see every answer once; one given twice ties with itself, and alone needs no ranking."""
    distinct = list(dict.fromkeys(answers))
    ranks = rank(distinct) if len(distinct) > 1 else [1]
    rank_of = dict(zip(distinct, ranks, strict=True))
    return [rank_of[answer] for answer in answers]


def _number(value: Any) -> float:
    """A score as a float, NaN if it is none; scalars of numpy and torch are numbers, texts are not."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _brief(value: Any) -> str:
    """A value within one line of an error or a name; a long one is cut and told apart by its hash."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...#{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _told(error: Exception) -> str:
    """What somebody else's code raised, and where, in one line."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:200]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"{what} ({Path(at.filename).name}, line {at.lineno})"


KINDS: dict[str, type[_Made]] = {made.kind: made for made in (Vader, Function, RewardModel, Judge, Human)}


def names() -> list[str]:
    """How the labelers are called in a config."""
    return [f"{kind}:{made.target.upper()}" if made.target else kind for kind, made in KINDS.items()]


def make(spec: str | Mapping[str, Any], source: str = "labeler") -> Labeler:
    """Builds a labeler and loads what it needs.

    Args:
        spec: one of `names`, or a mapping of `name` and the options of its class here,
            e.g. {"name": "vader", "min_words": 4}.
        source: where the spec stands, for errors.

    Raises:
        LabError: no such labeler or option, or it cannot be loaded.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind, colon, target = str(options.pop("name", "")).partition(":")
    if kind not in KINDS:
        raise LabError(
            f"{source}: no labeler {kind!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(names())}."
        )
    made = KINDS[kind]
    if colon and not made.target:
        raise LabError(f"{source}: {kind} takes nothing behind a colon. Give options by their names.")
    if colon:
        options[made.target] = target
    labeler = config.build(made, options, {}, source)
    labeler.prepare()
    return labeler
