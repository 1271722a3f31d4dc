"""How a row is understood: every form of demonstrations, comparisons and prompts that is known, and no other.

    prompt, completion            a demonstration
    messages                      a demonstration that is a whole conversation
    text                          a demonstration that is a whole text
    prompt, chosen, rejected      a comparison of two completions
    chosen, rejected              the same where both begin with the prompt, or are transcripts as in hh-rlhf
    prompt, completions, ranks    a comparison of two or more: 1 is the best, equal ranks are a tie
    prompt                        a prompt

Prompts and completions are texts or conversations, which are lists of {"role", "content"}.
"""

import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lab.errors import LabError, did_you_mean

Message: TypeAlias = dict[str, str]
Text: TypeAlias = str | list[Message]
"""A text, or a conversation."""
Row: TypeAlias = dict[str, Any]

ROLES = ("system", "user", "assistant")


class BadRow(Exception):
    """What is wrong with a row; who knows where it stands completes the line."""

    def __str__(self) -> str:
        end = "" if str(self.args[0]).endswith("?") else "."
        return f"{self.args[0]}{end} Correct the row or remove it."


Parser: TypeAlias = Callable[[Row], Row]
Parsers: TypeAlias = Mapping[tuple[str, ...], Parser]
"""Parsers by the columns they need. The first whose columns are there is taken."""


def as_row(value: Any) -> Row:
    """The value itself, if it is a row at all.

    Raises:
        BadRow: it is not.
    """
    if not isinstance(value, dict):
        raise BadRow(f"the row is {_kind(value)}, no object with columns")
    return value


def choose_parser(row: Row, parsers: Parsers, place: str) -> Parser:
    """The parser for a row's columns.

    Raises:
        LabError: there is none. As the columns are those of all rows, it is no `BadRow`.
    """
    for columns, parse in parsers.items():
        if row.keys() >= set(columns):
            return parse
    forms = "; ".join(" + ".join(columns) for columns in parsers)
    missing = sorted({column for columns in parsers for column in columns} - row.keys())
    hint = next(filter(None, (did_you_mean(name, missing) for name in row)), "")
    found = textwrap.shorten(", ".join(row), 200, placeholder=" ...") or "none"
    raise LabError(f"{place}: has the columns {found}. Name them as in one of: {forms}.{hint}")


def form_of(row: Row) -> str:
    """What must not change from one row to the next."""
    column = next(iter(row))
    return f"{column} as a {'text' if isinstance(row[column], str) else 'conversation'}"


def _parse_completion(row: Row) -> Row:
    prompt = _prompt(_column(row, "prompt"))
    return {"prompt": prompt, "completion": _completion(_column(row, "completion"), "completion", prompt)}


def _parse_messages(row: Row) -> Row:
    messages = _text(_column(row, "messages"), "messages")
    if isinstance(messages, str):
        raise BadRow("messages is a text; it must be a list of messages")
    _completion(messages[-1:], "messages", prompt=[])
    return {"messages": messages}


def _parse_text(row: Row) -> Row:
    text = _plain(_column(row, "text"), "text")
    if not text.strip():
        raise BadRow("text is empty")
    return {"text": text}


def _parse_prompt(row: Row) -> Row:
    return {"prompt": _prompt(_column(row, "prompt"))}


def _parse_prompt_of_messages(row: Row) -> Row:
    return {"prompt": _prompt(_parse_messages(row)["messages"][:-1])}


def _parse_ranking(row: Row) -> Row:
    completions = _entries(_column(row, "completions"), "completions")
    count = len(completions)
    if count < 2:
        raise BadRow(f"completions holds {count}; a ranking is of two or more")
    ranks = _entries(_column(row, "ranks"), "ranks", count)
    if not all(type(rank) is int and 1 <= rank <= count for rank in ranks):
        # Beyond `count` they may be ratings, of which the highest is the best.
        raise BadRow(f"ranks is {reprlib.repr(ranks)}; it must be of 1, the best, to {count}")
    scores = row.get("scores")
    if scores is not None:
        if not all(map(_is_finite, _entries(scores, "scores", count))):
            raise BadRow(f"scores is {reprlib.repr(scores)}; it must be of finite numbers")
        scores = [float(score) for score in scores]
    named = {f"completion {i}": completion for i, completion in enumerate(completions, 1)}
    finished = row.get("finished")
    finished = [None] * count if finished is None else _entries(finished, "finished", count)
    return _comparison(row, _column(row, "prompt"), named, ranks, finished, scores)


def _parse_preference(row: Row) -> Row:
    chosen, rejected = _text(_column(row, "chosen"), "chosen"), _text(_column(row, "rejected"), "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one of chosen and rejected is a text, the other a conversation")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # UltraFeedback has whole conversations, and of what the user says in them a copy as the prompt.
        if prompt.strip() not in [turn["content"].strip() for turn in chosen]:
            raise BadRow("prompt is a text, chosen a conversation without it")
        prompt = None
    if prompt is None:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
    finished = [row.get("chosen_finished"), row.get("rejected_finished")]
    return _comparison(row, prompt, {"chosen": chosen, "rejected": rejected}, [1, 2], finished, None)


def _comparison(
    row: Row,
    prompt: Any,
    named: dict[str, Any],
    ranks: list[int],
    finished: list[Any],
    scores: list[float] | None,
) -> Row:
    """The canonical row. `named`: each completion by what errors call it; `finished`: None where not said."""
    if not all(end is None or isinstance(end, bool) for end in finished):
        raise BadRow(f"finished is {reprlib.repr(finished)}; it must be of true and false")
    prompt = _prompt(prompt)
    completions = [
        _completion(value, name, prompt, may_be_empty=end is True)
        for (name, value), end in zip(named.items(), finished, strict=True)
    ]
    finished = [end is not False for end in finished]
    first, *others = zip(completions, finished, strict=True)
    if all(other == first for other in others) and len(set(ranks)) > 1:
        raise BadRow(f"{' and '.join(named)} are the same, so none is better")
    source = row.get("source")
    return {
        "prompt": prompt,
        "completions": completions,
        "ranks": ranks,
        "finished": finished,
        "scores": scores,
        "source": None if source is None else _plain(source, "source"),
    }


def _best_of(parse: Parser) -> Parser:
    """Makes of a parser of comparisons one of demonstrations."""

    def parse_best(row: Row) -> Row:
        comparison = parse(row)
        best = comparison["ranks"].index(min(comparison["ranks"]))
        return {"prompt": comparison["prompt"], "completion": comparison["completions"][best]}

    return parse_best


COMPARISONS: dict[tuple[str, ...], Parser] = {
    ("prompt", "completions", "ranks"): _parse_ranking,
    ("chosen", "rejected"): _parse_preference,
}
DEMONSTRATIONS: Parsers = {
    ("prompt", "completion"): _parse_completion,
    ("messages",): _parse_messages,
    ("text",): _parse_text,
    **{columns: _best_of(parse) for columns, parse in COMPARISONS.items()},
}
PROMPTS: Parsers = {
    **COMPARISONS,
    ("messages",): _parse_prompt_of_messages,
    ("prompt",): _parse_prompt,
}


# ---- texts and conversations ----


def _column(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"{name} is {'null' if name in row else 'missing'}")
    return row[name]


def _entries(value: Any, name: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{name} is {_kind(value)}; it must be a list")
    if count is not None and len(value) != count:
        raise BadRow(f"{name} has {len(value)} entries for {count} completions")
    return value


def _text(value: Any, name: str) -> Text:
    """A text as it is, or a conversation reduced to roles and contents."""
    if isinstance(value, list):
        return [_message(turn, f"{name}, message {i}") for i, turn in enumerate(value, 1)]
    return _plain(value, name, "a text or a list of messages")


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise BadRow(f'{name} is no object with "role" and "content"')
    role = value["role"]
    if role not in ROLES:
        meant = _OTHER_NAMES.get(str(role))
        hint = f" Did you mean {meant!r}?" if meant else did_you_mean(str(role), ROLES)
        raise BadRow(f"{name} has the role {reprlib.repr(role)}; known are {', '.join(ROLES)}.{hint}")
    return {"role": role, "content": _plain(value["content"], f"content of {name}")}


_OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}


def _plain(value: Any, name: str, wanted: str = "a text") -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}; it must be {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} holds half a surrogate pair, which is no character") from None
    return value


def _prompt(value: Any) -> Text:
    prompt = _text(value, "prompt")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRow("prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise BadRow(f"prompt ends with a turn of {prompt[-1]['role']}; the last turn must be the user's")
    return prompt


def _completion(value: Any, name: str, prompt: Text, may_be_empty: bool = False) -> Text:
    """Checks one. A sampled answer `may_be_empty`: its end token is all it says, and can be learned from."""
    completion = _text(value, name)
    if isinstance(completion, str) != isinstance(prompt, str):
        kinds = ("text", "conversation") if isinstance(completion, str) else ("conversation", "text")
        raise BadRow(f"{name} is a {kinds[0]}, but the prompt a {kinds[1]}")
    end = completion
    if not isinstance(end, str):
        for does, turn in zip(("ends", "begins"), end[-1:] + end[:1], strict=False):
            if turn["role"] != "assistant":
                raise BadRow(f"{name} {does} with a turn of {turn['role']}; it must be the assistant's")
        end = end[-1]["content"] if end else ""
    if not end.strip() and not may_be_empty:
        raise BadRow(f"{name} is empty")
    return completion


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The common beginning of two texts or conversations, and what follows it in each."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if isinstance(chosen, str) and isinstance(rejected, str):
        turns, other_turns = _transcript(chosen, "chosen"), _transcript(rejected, "rejected")
        if turns or other_turns:
            if turns[:-1] != other_turns[:-1]:
                raise BadRow("chosen and rejected differ before the last reply")
            return turns[:-1], turns[-1:], other_turns[-1:]
        # Never within a word, and the space before a completion is its own: tokens would change otherwise.
        words = re.match(r".*\S(?=\s)", chosen[: _common(chosen, rejected)], re.DOTALL)
        length = words.end() if words else 0
    else:
        length = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if length < 1:
        raise BadRow("chosen and rejected have no common beginning, and there is no prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _common(a: Text, b: Text) -> int:
    """Length of the common beginning; by bisection, because comparing whole slices is quick."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _transcript(text: str, name: str) -> list[Message]:
    """The turns of an hh-rlhf transcript; none if the text is not one.

    Raises:
        BadRow: it does not begin with the human or does not end with the assistant.
    """
    preamble, *speeches = _SPEAKER.split("\n\n" + text.lstrip())
    if not speeches:
        return []
    if preamble or speeches[0] != "Human":
        raise BadRow(f"{name} is a transcript that does not begin with 'Human:'")
    if speeches[-2] != "Assistant":
        raise BadRow(f"{name} is a transcript that does not end with a turn of 'Assistant:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": speech.strip()}
        for speaker, speech in zip(speeches[::2], speeches[1::2], strict=True)
    ]


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # unlike math.isfinite, also for integers beyond it


def _kind(value: Any) -> str:
    """What a JSON value is, for errors."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
