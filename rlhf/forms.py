"""How a row is understood: every form of demonstrations, comparisons and prompts that is known, and no other.

    prompt, completion            a demonstration; also prompt + response, question + answer, input + output,
                                  instruction + output with input and history (Alpaca), instruction + response
                                  with context (Dolly)
    messages                      a demonstration that is a whole conversation; also conversations (ShareGPT;
                                  LIMA's texts in turn) and conversation (Capybara's pairs)
    text                          a demonstration that is a whole text
    prompt, chosen, rejected      a comparison of two completions; a tie where score_chosen and
                                  score_rejected are equal; also with question, query, input, instruction or
                                  messages instead of prompt
    chosen, rejected              the same where both begin with the prompt, or are transcripts as in hh-rlhf
    prompt, completions, ranks    a comparison of two or more: 1 is the best, equal ranks are a tie; also with
                                  scores instead of ranks, Nectar's answers, UltraFeedback's own completions
    two answers and a choice      as in SHP, PKU-SafeRLHF, Chatbot Arena, MT-bench, HelpSteer's strengths,
                                  WebGPT's scores, OpenAI's preferred_output and summaries, AlpacaFarm,
                                  Stack Exchange's response_j and _k
    a tree of messages            OpenAssistant's, see `rlhf.trees`
    prompt                        a prompt

A demonstration with label or kto_tag is feedback (KTO): it is imitated where that is true. `system`,
`system_prompt` and `tools` beside any prompt make it a conversation that begins with them.

Prompts and completions are texts or conversations, which are lists of {"role", "content"}: of {"from",
"value"} too, with content as a list of parts of text, with tool calls, with what was thought before
(`reasoning_content`, `thinking`), and in the roles that OpenAI has. A text that is a conversation written as
JSON or as Python prints it is that conversation: tables of text hold no other.
"""

import contextlib
import json
import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lab.errors import LabError, did_you_mean
from rlhf.notation import written_in

Message: TypeAlias = dict[str, Any]
"""`role` and `content`; where there are any, `tool_calls` and `tools` as JSON, `name`, `tool_call_id`,
`reasoning_content` (what was thought before the answer), and `weight` 0 of an answer not to be learned."""
Text: TypeAlias = str | list[Message]
"""A text, or a conversation."""
Row: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(Exception):
    """What is wrong with a row; who knows where it stands completes the line."""

    def __str__(self) -> str:
        end = "" if str(self.args[0]).endswith("?") else "."
        return f"{self.args[0]}{end} Correct the row or remove it."


class NotMeant(Exception):
    """Why a row that is as it should be is not used; it is counted, and no mistake."""


Parse: TypeAlias = Callable[[Row], Row]


class Parser(NamedTuple):
    """What understands rows of some columns."""

    needs: tuple[str, ...]
    parse: Parse
    may: tuple[str, ...] = ()
    """Columns it reads where there are any."""


Parsers: TypeAlias = Sequence[Parser]
"""The first whose columns are there is taken."""


def as_row(value: Any, parsers: Parsers) -> Row:
    """The value itself, if it is a row at all; a text is a prompt.

    Raises:
        BadRow: it is not.
    """
    if isinstance(value, str) and parsers is PROMPTS:
        return {"prompt": value}
    if not isinstance(value, dict):
        raise BadRow(f"the row is {_kind(value)}, no object with columns")
    for name in _OTHER_SENSES:
        if name in value and _structure(value[name]) not in (None, "", [], {}):
            raise BadRow(f"has {name}, which nobody here sees; text alone can be learned")
    return {name: _as_turns(column, name) for name, column in value.items()}


_TURNS_IN_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*(['"])(?:role|from|content|value)\1\s*:\s*['"\[]""")
"""How a conversation, or a message, begins that is written into a text."""


def _as_turns(value: Any, name: str) -> Any:
    """A conversation that is written into a text, as tables of text have it; else the value itself.

    Raises:
        BadRow: it begins like one, and is not whole.
    """
    if not isinstance(value, str) or not _TURNS_IN_TEXT.match(value):
        return value
    found = _structure(value)
    turns = found if isinstance(found, list) else [found]
    if all(isinstance(turn, dict) and _role_of(turn) is not None for turn in turns):
        return found
    if isinstance(found, str) and re.search(r"""['"](?:role|from)['"]\s*:""", value):
        raise BadRow(f"{name} begins like a list of messages and cannot be read as JSON or Python's")
    return value


def _structure(value: Any) -> Any:
    """What is written into a text as JSON or as Python prints it, where it is a list or an object."""
    return written_in(value.strip()) if isinstance(value, str) else value


def _role_of(turn: Mapping[str, Any]) -> Any:
    return next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)


_OTHER_SENSES = ("image", "images", "video", "videos", "audio", "audios")
_FEEDBACK = ("label", "kto_tag")
_SAID = ("system", "system_prompt", "tools")


def columns_of(row: Row) -> tuple[str, ...]:
    """The columns that decide how a row is understood: those with a value, and a label even without one."""
    return tuple(name for name, value in row.items() if value is not None or name == "label")


def choose_parser(row: Row, parsers: Parsers) -> Parser | None:
    """The parser for a row's columns, None if there is none; columns without a value count if need be."""
    for names in (set(columns_of(row)), row.keys()):
        for parser in parsers:
            if names >= set(parser.needs):
                return parser
    return None


def unused_columns(row: Row, parser: Parser) -> set[str]:
    """The columns of a row that its parser does not read."""
    said = {name for name in _FEEDBACK if opinion(row.get(name)) is not None}
    return {*columns_of(row)} - {*parser.needs, *parser.may} - said


_COMMON = (
    ("prompt", "completion"),
    ("messages",),
    ("text",),
    ("prompt",),
    ("chosen", "rejected"),
    ("prompt", "completions", "ranks"),
)
FORMS_SHOWN = 8
"""Forms that are named where a row has none of them."""


def unknown_columns(row: Row, parsers: Parsers, place: str) -> LabError:
    """What is wrong with a row that no parser takes."""
    for columns, why in _REFUSED.items():
        if row.keys() >= set(columns):
            return LabError(f"{place}: has the columns {', '.join(columns)}. {why}")
    # The common ones come first, then those that share most with the row.
    near = sorted(parsers, key=lambda p: (p.needs not in _COMMON, -len(row.keys() & {*p.needs})))
    forms = [*dict.fromkeys(" + ".join(parser.needs) for parser in near)]
    shown = "; ".join(forms[:FORMS_SHOWN]) + (
        f" (or {len(forms) - FORMS_SHOWN} more, in rlhf/forms.py)" if len(forms) > FORMS_SHOWN else ""
    )
    missing = sorted({column for parser in parsers for column in parser.needs} - row.keys())
    known = {column for parser in parsers for column in (*parser.needs, *parser.may)}
    odd = [str(name) for name in row if name not in known]
    hint = next(filter(None, (did_you_mean(name, missing) for name in odd)), "")
    found = textwrap.shorten(", ".join(row), 200, placeholder=" ...") or "none"
    return LabError(f"{place}: has the columns {found}. Name them as in one of: {shown}.{hint}")


_REFUSED = {
    ("input_ids",): "These are token ids of some tokenizer; name the texts they were made of.",
    (
        "completions",
        "labels",
    ): "Step by step labels are for process reward models, which are not trained here.",
    ("prompt", "completion", "label"): (
        "Unpaired feedback does not say which of two answers is better. Use it as demonstrations, or name "
        "pairs."
    ),
    ("segments",): "Write them as prompt and completion.",
}


def form_of(row: Row) -> str:
    """What must not change from one row to the next."""
    column = next(iter(row))
    return f"{column} as a {'text' if isinstance(row[column], str) else 'conversation'}"


def _parse_completion(row: Row) -> Row:
    prompt = _prompt(_with_tools(_column(row, "prompt"), row))
    completion = _column(row, "completion")
    if isinstance(prompt, list):
        completion = _answer(completion)
    return {"prompt": prompt, "completion": _completion(completion, "completion", prompt)}


def _answer(value: Any) -> Any:
    """A text as what the assistant says."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _parse_unpaired(row: Row) -> Row:
    label = _column(row, "label")
    if str(label) in ("0", "1", "0.0", "1.0"):
        label = bool(float(label))
    if opinion(label) is None:
        raise BadRow(f"label is {reprlib.repr(label)}; it must be true or false")
    return _unless_disliked(_parse_completion)(row | {"label": label})


def opinion(value: Any) -> bool | None:
    """Feedback as true or false; None for what is none, such as the number of a class."""
    return {"true": True, "false": False}.get(str(value).lower())


def _unless_disliked(parse: Parse) -> Parse:
    """Of a parser of demonstrations one that imitates nothing of which the row says that it was bad."""

    def parse_liked(row: Row) -> Row:
        for name in _FEEDBACK:
            if opinion(row.get(name)) is False:
                raise NotMeant(f"feedback whose {name} is false")
        return parse(row)

    return parse_liked


def _renamed(parse: Parse, **names: str) -> Parse:
    """A parser of other names for the same columns: name=the other name."""
    return _worded(lambda row: parse(row | {name: row.get(other) for name, other in names.items()}), **names)


def _worded(parse: Parse, **names: str) -> Parse:
    """The same parser, whose errors speak in the words of the file."""

    def parse_worded(row: Row) -> Row:
        try:
            return parse(row)
        except BadRow as bad:
            text = str(bad.args[0])
            for name, other in names.items():
                text = re.sub(rf"\b{name}\b", other, text)
            raise BadRow(text) from None

    return parse_worded


def _instruction(row: Row, *more: str) -> Text:
    """An instruction and what it is about; a conversation where there is a history, be it empty."""
    parts = [_plain(_column(row, "instruction"), "instruction")]
    parts += [_plain(row[name], name) for name in more if row.get(name)]
    text = "\n\n".join(part for part in parts if part.strip())
    if "history" not in row:
        return text
    before = _pairs(row["history"], "history") if row["history"] else []
    return [*before, {"role": "user", "content": text}]


def _pairs(value: Any, name: str) -> list[Message]:
    turns: list[Message] = []
    for pair in _entries(value, name):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{name} is no list of pairs of a question and an answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _parse_alpaca(row: Row) -> Row:
    prompt = _instruction(row, "input")
    return _parse_completion(_said(row) | {"prompt": prompt, "completion": _column(row, "output")})


def _parse_dolly(row: Row) -> Row:
    prompt = _instruction(row, "context", "input")
    return _parse_completion(_said(row) | {"prompt": prompt, "completion": _column(row, "response")})


def _parse_calls(row: Row) -> Row:
    """What tools to call, of these: xLAM's."""
    calls = _entries(_column(row, "answers"), "answers")
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRow("answers is no list of calls with a name")
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return _parse_completion(_said(row) | {"prompt": _column(row, "query"), "completion": [answer]})


_GLAIVE = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")


def _glaive_turns(row: Row) -> Row:
    """Glaive's conversations, in one text."""
    before, *parts = _GLAIVE.split(_plain(_column(row, "chat"), "chat"))
    if before.strip() or not parts:
        raise BadRow("chat is no conversation of USER: and ASSISTANT:")
    roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    said = [part.replace("<|endoftext|>", "").strip() for part in parts[1::2]]
    turns = [{"role": roles[r], "content": text} for r, text in zip(parts[::2], said, strict=True)]
    system = re.sub(r"^\s*SYSTEM:\s*", "", row.get("system") or "")
    return {"messages": turns, "system": system}


def _said(row: Row) -> Row:
    return {name: row[name] for name in _SAID if name in row}


def _parse_messages(row: Row) -> Row:
    messages = _text(_with_tools(_turns(_structure(_column(row, "messages"))), row), "messages")
    if isinstance(messages, str):
        raise BadRow("messages is a text; it must be a list of messages")
    _completion(messages[-1:], "messages", prompt=[])
    if messages[0]["role"] == "assistant" or len(messages) < 2:
        raise BadRow("messages begins with a turn of assistant; somebody must have asked")
    return {"messages": messages}


_ANSWERED = (("input", "output"), ("human", "assistant"))


def _turns(value: Any) -> Any:
    """A conversation as messages, where it is a list of texts in turn (LIMA), or of pairs (Capybara)."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
    for asked, answered in _ANSWERED:
        if all(isinstance(turn, dict) and {asked, answered} <= turn.keys() for turn in value):
            pairs = _pairs([[turn[asked], turn[answered]] for turn in value], "conversation")
            system = value[0].get("system")
            return [{"role": "system", "content": system}, *pairs] if system else pairs
    return value


def _with_tools(value: Any, row: Row) -> Any:
    """A conversation with the row's `system` and `tools` in it, where it has any.

    A text becomes one as soon as there is a column for them, be it empty in this row: the next has the same.
    """
    if isinstance(value, str) and value.strip() and any(name in row for name in _SAID):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        return value
    system, tools = row.get("system") or row.get("system_prompt"), row.get("tools")
    if not isinstance(value[0], dict):
        return value
    first = value[0].get("role", value[0].get("from"))
    if isinstance(system, str) and system.strip() and first != "system":
        value = [{"role": "system", "content": system}, *value]
    if tools:
        tools = _structure(tools)
        if isinstance(tools, str):
            raise BadRow("tools is no JSON")
        if tools:
            value = [value[0] | {"tools": json.dumps(tools)}, *value[1:]]
    return value


def _parse_text(row: Row) -> Row:
    text = _plain(_column(row, "text"), "text")
    if not text.strip():
        raise BadRow("text is empty")
    return {"text": text}


def _parse_prompt(row: Row) -> Row:
    return {"prompt": _prompt(_with_tools(_column(row, "prompt"), row))}


def _parse_prompt_of_messages(row: Row) -> Row:
    messages = _text(_with_tools(_turns(_structure(_column(row, "messages"))), row), "messages")
    if isinstance(messages, list) and messages and messages[-1]["role"] == "user":
        return {"prompt": _prompt(messages)}  # nobody has answered yet
    return {"prompt": _prompt(_parse_messages(row)["messages"][:-1])}


def _prompt_alone(parse: Parse) -> Parse:
    """Of a parser of demonstrations the prompt, whatever was thought of the answer."""
    return lambda row: {"prompt": parse(row)["prompt"]}


def _parse_ranking(row: Row) -> Row:
    completions = _entries(_column(row, "completions"), "completions")
    count = len(completions)
    if count < 2:
        raise BadRow(f"completions holds {count}; a ranking is of two or more")
    ranks = _entries(_column(row, "ranks"), "ranks", count)
    ranks: list[Any] = [int(r) if isinstance(r, float) and r.is_integer() else r for r in ranks]
    if not all(type(rank) is int and 1 <= rank <= count for rank in ranks):
        # Beyond `count` they may be ratings, of which the highest is the best.
        raise BadRow(f"ranks is {reprlib.repr(ranks)}; it must be of 1, the best, to {count}")
    scores = row.get("scores")
    if scores is not None:
        scores = [*map(number, _entries(scores, "scores", count))]
        if not all(map(is_finite, scores)):
            raise BadRow(f"scores is {reprlib.repr(scores)}; it must be of finite numbers")
        scores = [float(score) for score in scores]
    named = {f"completion {i}": completion for i, completion in enumerate(completions, 1)}
    finished = row.get("finished")
    finished = [None] * count if finished is None else _entries(finished, "finished", count)
    return _comparison(row, _column(row, "prompt"), named, ranks, finished, scores)


def _parse_preference(row: Row) -> Row:
    if row.get("prompt") is None:
        if row.get("instruction") is not None:
            return _parse_preference(row | {"prompt": _instruction(row, "input")})
        name = next((name for name in _ASKED_AS if row.get(name) is not None), "")
        if name and not _is_whole(row.get("chosen")):
            return _renamed(_parse_preference, prompt=name)(row | {name: _turns(row[name])})
    prompt = row.get("prompt")
    chosen, rejected = (_text(_as_conversation(_column(row, name)), name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one of chosen and rejected is a text, the other a conversation")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # UltraFeedback has whole conversations, and of what the user says in them a copy as the prompt.
        if chosen[:1] and chosen[0]["role"] == "assistant":
            prompt = [{"role": "user", "content": prompt}]
        elif prompt.strip() not in [turn["content"].strip() for turn in chosen]:
            raise BadRow("prompt is a text, chosen a conversation without it")
        else:
            prompt = None
    elif isinstance(prompt, list) and chosen[: len(prompt)] == rejected[: len(prompt)] == _text(
        prompt, "prompt"
    ):
        prompt = None
    if prompt is None:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        if isinstance(prompt, str) and (other := _perhaps_asked(row)):
            raise BadRow(f"there is no prompt, and {other} may be it: name it prompt")
    finished = [row.get("chosen_finished"), row.get("rejected_finished")]
    found = ([row.get(a), row.get(b)] for a, b in SCORES)
    scores = next(([*map(number, both)] for both in found if None not in both), None)
    ranks = [1, 2]
    if scores is not None:
        if not all(map(is_finite, scores)):
            raise BadRow(f"the scores are {reprlib.repr(scores)}; they must be finite numbers")
        if scores[0] < scores[1]:
            raise BadRow(
                f"the score of rejected, {scores[1]:g}, is higher than that of chosen, {scores[0]:g}"
            )
        ranks = [1, 2] if scores[0] > scores[1] else [1, 1]
        scores = [float(score) for score in scores]
    return _comparison(row, prompt, {"chosen": chosen, "rejected": rejected}, ranks, finished, scores)


SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
)


_ASKED_AS = ("conversations", "messages", "conversation", "question", "query", "input")
"""What else the prompt of a preference is called."""


def _is_whole(value: Any) -> bool:
    """Whether an answer begins with what was asked."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        role = str(value[0].get("role", value[0].get("from"))).lower()
        return _OTHER_NAMES.get(role, role) != "assistant"
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None


def _perhaps_asked(row: Row) -> str:
    """A column that nobody reads and that may hold what was asked: a list, or some words."""
    known = {name for parser in COMPARISONS for name in (*parser.needs, *parser.may)}
    return next(
        (
            name
            for name, value in row.items()
            if name not in known
            and ((isinstance(value, str) and len(value.split()) > 2) or (isinstance(value, list) and value))
        ),
        "",
    )


def _as_conversation(value: Any) -> Any:
    """One message as a conversation of one."""
    return [value] if isinstance(value, dict) else value


def _parse_scored(row: Row) -> Row:
    """A ranking by scores; the highest is the best."""
    scores = [*map(number, _entries(_column(row, "scores"), "scores"))]
    if not all(map(is_finite, scores)):
        raise BadRow(f"scores is {reprlib.repr(scores)}; it must be of finite numbers")
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    return _parse_ranking(row | {"ranks": ranks})


def _listed(answers: str, text: str, rank: str = "", score: str = "") -> Parse:
    """A ranking whose answers are objects, each with its text and its rank or score."""

    def parse(row: Row) -> Row:
        entries = _entries(_column(row, answers), answers)
        if not all(isinstance(entry, dict) and text in entry for entry in entries):
            raise BadRow(f"{answers} is no list of objects with {text!r}")
        found = [number(entry.get(rank or score)) for entry in entries]
        if not all(map(is_finite, found)):
            raise BadRow(
                f"{rank or score} of {answers} is {reprlib.repr(found)}; it must be of finite numbers"
            )
        key = 1 if rank else -1
        ranks = [1 + sum(key * other < key * value for other in found) for value in found]
        completions = [entry[text] for entry in entries]
        return _parse_ranking(row | {"completions": completions, "ranks": ranks, "scores": None})

    return parse


def _choice(first: str, second: str, chosen: str, meanings: Mapping[Any, int]) -> Parse:
    """Two answers and which is the better: 1, 2, or 0 for a tie."""

    def parse(row: Row) -> Row:
        said = _column(row, chosen)
        said = number(said.lower() if isinstance(said, str) else said)
        if isinstance(said, list | dict) or said not in meanings:
            raise BadRow(
                f"{chosen} is {reprlib.repr(said)}; it must be one of {', '.join(map(str, meanings))}"
            )
        ranks = {0: [1, 1], 1: [1, 2], 2: [2, 1]}[meanings[said]]
        answers = {name: _until_turn(_column(row, name), row.get("turn")) for name in (first, second)}
        prompt = row.get("prompt")
        if prompt is None:
            a, b = (_text(answer, name) for name, answer in answers.items())
            if a == b:
                raise BadRow(f"{first} and {second} are the same")
            prompt, *both = _split_prompt(a, b)
            answers = dict(zip(answers, both, strict=True))
        return _comparison(row, prompt, answers, ranks, [None, None], None)

    return parse


def _until_turn(value: Any, turn: Any) -> Any:
    """A conversation up to the turn that was judged: MT-bench shows two, and asks about the first or both."""
    turn = number(turn)
    if not isinstance(value, list) or not is_finite(turn):
        return value
    roles = [_OTHER_NAMES.get(str(role), role) for role in map(_role_of, value)]
    ends = [i for i, role in enumerate(roles, 1) if role == "assistant"]
    return value[: ends[int(turn) - 1]] if 1 <= turn <= len(ends) else value


def _parse_arena(row: Row) -> Row:
    """Chatbot Arena as Kaggle had it: turns as lists, and a column for each outcome, of which one is 1."""
    asked, *answers = (_entries(_column(row, name), name) for name in ("prompt", "response_a", "response_b"))
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    won = [number(row[name]) for name in names]
    if sorted(won, key=str) != [0, 0, 1]:
        raise BadRow(f"of {', '.join(names)} not one is 1 and the others 0")
    if any(len(own) != len(asked) for own in answers):
        raise BadRow("prompt, response_a and response_b have not the same number of turns")
    a, b = (_pairs([list(pair) for pair in zip(asked, own, strict=True)], "prompt") for own in answers)
    winner = ("model_a", "model_b", "tie")[won.index(1)]
    talks = {"conversation_a": a, "conversation_b": b, "winner": winner, "source": row.get("source")}
    return _choice("conversation_a", "conversation_b", "winner", _WINNER)(talks)


def _parse_summaries(row: Row) -> Row:
    """OpenAI's comparisons of summaries, the post as their models were shown it (Stiennon et al. 2020)."""
    info = _structure(_column(row, "info"))
    summaries = [_structure(summary) for summary in _entries(_column(row, "summaries"), "summaries")]
    if not isinstance(info, dict) or len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise BadRow("info and summaries are not a post and two objects with their text")
    if info.get("post"):
        about = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}"
    else:
        about = f"Article:\n\n{_plain(info.get('article'), 'article')}"
    first, second = (" " + _plain(summary.get("text"), "text").strip() for summary in summaries)
    shown = {"prompt": f"{about}\n\nTL;DR:", "first": first, "second": second, "choice": row["choice"]}
    return _choice("first", "second", "choice", {0: 1, 1: 2})(shown | {"source": row.get("source")})


def _parse_webgpt(row: Row) -> Row:
    question = _column(row, "question")
    asked = _structure(question)
    prompt = asked.get("full_text") if isinstance(asked, dict) else question
    answers, scores = ([_column(row, f"{name}_{i}") for i in (0, 1)] for name in ("answer", "score"))
    return _parse_scored(row | {"prompt": prompt, "completions": answers, "scores": scores})


def _parse_openai_preference(row: Row) -> Row:
    given = _structure(_column(row, "input"))
    if not isinstance(given, dict) or "messages" not in given:
        raise BadRow('input is no object with "messages"')
    prompt = _with_tools(given["messages"], given)
    answers = {name: _column(row, name) for name in ("preferred_output", "non_preferred_output")}
    return _comparison(row, prompt, answers, [1, 2], [None, None], None)


def _comparison(
    row: Row,
    prompt: Any,
    named: dict[str, Any],
    ranks: list[int],
    finished: list[Any],
    scores: list[float] | None,
) -> Row:
    """The canonical row. `named`: each completion by what errors call it; `finished`: None where not said."""
    finished = [end if (said := opinion(end)) is None else said for end in finished]
    if not all(end is None or isinstance(end, bool) for end in finished):
        raise BadRow(f"finished is {reprlib.repr(finished)}; it must be of true and false")
    prompt = _prompt(_with_tools(prompt, row))
    if isinstance(prompt, list):
        named = {name: _answer(value) for name, value in named.items()}
    completions = [
        _completion(value, name, prompt, may_be_empty=end is True)
        for (name, value), end in zip(named.items(), finished, strict=True)
    ]
    finished = [end is not False for end in finished]
    first, *others = zip(completions, finished, strict=True)
    if all(other == first for other in others) and len(set(ranks)) > 1:
        raise BadRow(f"{' and '.join(named)} are the same, so none is better")
    source = row.get("source")
    if isinstance(source, list):  # Nectar's
        source = ", ".join(map(str, source))
    return {
        "prompt": prompt,
        "completions": completions,
        "ranks": ranks,
        "finished": finished,
        "scores": scores,
        "source": None if source is None else _plain(source, "source"),
    }


def _best_of(parse: Parse) -> Parse:
    """Makes of a parser of comparisons one of demonstrations."""

    def parse_best(row: Row) -> Row:
        comparison = parse(row)
        if len(set(comparison["ranks"])) == 1:
            raise NotMeant("comparisons in which all answers tie")
        best = comparison["ranks"].index(min(comparison["ranks"]))
        return {"prompt": comparison["prompt"], "completion": comparison["completions"][best]}

    return parse_best


_WINNER = {"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}
_STRENGTH = {-3: 1, -2: 1, -1: 1, 0: 0, 1: 2, 2: 2, 3: 2}
_COMPARISONS: Parsers = (
    Parser(("prompt", "completions", "ranks"), _parse_ranking, ("finished", "scores")),
    Parser(("prompt", "completions", "scores"), _parse_scored, ("finished",)),
    Parser(
        ("instruction", "completions"),
        _renamed(_listed("completions", "response", score="overall_score"), prompt="instruction"),
    ),
    Parser(("prompt", "answers"), _listed("answers", "answer", rank="rank")),
    Parser(("preferred_output", "non_preferred_output", "input"), _parse_openai_preference),
    Parser(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        _renamed(_choice("human_ref_A", "human_ref_B", "labels", {1: 1, 0: 2}), prompt="history"),
    ),
    Parser(
        ("prompt", "response_0", "response_1", "better_response_id"),
        _choice("response_0", "response_1", "better_response_id", {0: 1, 1: 2}),
    ),
    Parser(
        ("conversation_a", "conversation_b", "winner"),
        _choice("conversation_a", "conversation_b", "winner", _WINNER),
        ("turn",),
    ),
    Parser(
        ("prompt", "response_a", "response_b", "winner"),
        _choice("response_a", "response_b", "winner", _WINNER),
    ),
    Parser(
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"), _parse_arena
    ),
    Parser(
        ("context", "response1", "response2", "overall_preference"),
        _renamed(_choice("response1", "response2", "overall_preference", _STRENGTH), prompt="context"),
    ),
    Parser(("info", "summaries", "choice"), _parse_summaries),
    Parser(
        ("instruction", "output_1", "output_2", "preference"),
        lambda row: _choice("output_1", "output_2", "preference", {1: 1, 2: 2, 1.5: 0})(
            row | {"prompt": _instruction(row, "input")}
        ),
        ("input", "history"),
    ),
    Parser(
        ("instruction", "generations", "ratings"),
        _renamed(_parse_scored, prompt="instruction", completions="generations", scores="ratings"),
    ),
    Parser(
        ("instruction", "chosen_response", "rejected_response"),
        _renamed(
            _parse_preference, prompt="instruction", chosen="chosen_response", rejected="rejected_response"
        ),
        tuple(name for names in SCORES for name in names),
    ),
    Parser(
        ("prompt", "response_1", "response_2", "preference_strength"),
        _choice("response_1", "response_2", "preference_strength", _STRENGTH),
    ),
    Parser(("question", "answer_0", "answer_1", "score_0", "score_1"), _parse_webgpt),
    Parser(
        ("qid", "question", "answers"),
        _renamed(_listed("answers", "text", score="pm_score"), prompt="question"),
    ),
    Parser(
        ("question", "response_j", "response_k"),
        _renamed(_parse_preference, prompt="question", chosen="response_j", rejected="response_k"),
    ),
    Parser(
        ("chosen", "rejected"),
        _parse_preference,
        (
            *("prompt", "instruction", "input", "history", "chosen_finished", "rejected_finished"),
            *(*_ASKED_AS, *(name for names in SCORES for name in names)),
        ),
    ),
)
COMPARISONS: Parsers = tuple(p._replace(may=(*p.may, "source", *_SAID)) for p in _COMPARISONS)
_PAIRS = (("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"))
_PAIRS += (("inputs", "targets"), ("problem", "solution"), ("prompt", "answer"))
_PAIRS += (("input", "output"), ("instruction", "generation"), ("prompt", "generation"))
_DEMONSTRATIONS: Parsers = (
    Parser(("prompt", "completion", "label"), _parse_unpaired, _SAID),
    Parser(("prompt", "completion"), _parse_completion, _SAID),
    Parser(
        ("instruction", "output"), _worded(_parse_alpaca, completion="output"), ("input", "history", *_SAID)
    ),
    Parser(
        ("instruction", "response"),
        _worded(_parse_dolly, completion="response"),
        ("context", "input", "history", *_SAID),
    ),
    Parser(("query", "answers", "tools"), _worded(_parse_calls, prompt="query"), _SAID),
    *(
        Parser(pair, _renamed(_parse_completion, prompt=pair[0], completion=pair[1]), _SAID)
        for pair in _PAIRS
    ),
)
_WHOLE = {
    ("messages",): _parse_messages,
    ("conversations",): _renamed(_parse_messages, messages="conversations"),
    ("conversation",): _renamed(_parse_messages, messages="conversation"),
    ("system", "chat"): lambda row: _parse_messages(_glaive_turns(row)),
}
_ASKED = {
    ("messages",): _parse_prompt_of_messages,
    ("conversations",): _renamed(_parse_prompt_of_messages, messages="conversations"),
    ("conversation",): _renamed(_parse_prompt_of_messages, messages="conversation"),
    ("system", "chat"): lambda row: _parse_prompt_of_messages(_glaive_turns(row)),
}
DEMONSTRATIONS: Parsers = (
    *(Parser(p.needs, _best_of(p.parse), p.may) for p in COMPARISONS),
    *(Parser(needs, _unless_disliked(parse), ("prompt", *_SAID)) for needs, parse in _WHOLE.items()),
    *(p._replace(parse=_unless_disliked(p.parse)) for p in _DEMONSTRATIONS),
    Parser(("text",), _parse_text),
)
PROMPTS: Parsers = (
    *(Parser(p.needs, _prompt_alone(p.parse), p.may) for p in COMPARISONS),
    *(Parser(needs, parse, ("prompt", *_SAID)) for needs, parse in _ASKED.items()),
    *(
        Parser(p.needs, _prompt_alone(_parse_completion if p.parse is _parse_unpaired else p.parse), p.may)
        for p in _DEMONSTRATIONS
    ),
    Parser(("prompt",), _parse_prompt, _SAID),
    Parser(
        ("instruction",),
        lambda row: _parse_prompt(_said(row) | {"prompt": _instruction(row, "input")}),
        ("input", "history", *_SAID),
    ),
    *(Parser((name,), _renamed(_parse_prompt, prompt=name), _SAID) for name in ("question", "query")),
)


# ---- texts and conversations ----


def _column(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"{name} is {'null' if name in row else 'missing'}")
    return row[name]


def _entries(value: Any, name: str, count: int | None = None) -> list[Any]:
    value = _structure(value)
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
    if not isinstance(value, dict):
        raise BadRow(f'{name} is no object with "role" and "content"')
    if len(value) == 2 and value.get("role") in ROLES and isinstance(value.get("content"), str):
        return {"role": value["role"], "content": _plain(value["content"], f"content of {name}")}
    role = _role_of(value)
    if role is None or not value.keys() & {"content", "value", "tool_calls", "function_call", "text"}:
        raise BadRow(f'{name} is no object with "role" and "content"')
    role = _OTHER_NAMES.get(str(role).lower(), role)
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise BadRow(f"{name} has the role {reprlib.repr(role)}; known are {', '.join(ROLES)}.{hint}")
    content = next((value[key] for key in ("content", "value", "text") if value.get(key) is not None), None)
    message: Message = {"role": role}
    calls = value.get("tool_calls") or (
        [{"type": "function", "function": f}] if (f := value.get("function_call")) else None
    )
    if calls:
        message["tool_calls"] = calls if isinstance(calls, str) else json.dumps(calls)
        content = "" if content is None else content
    thoughts = next((value[key] for key in _THOUGHT if isinstance(value.get(key), str)), "")
    if isinstance(content, list):
        of_parts = [part for part in content if isinstance(part, dict) and part.get("type") in _THOUGHT]
        thoughts = "".join(str(part.get("text", part.get(part["type"]))) for part in of_parts) or thoughts
        content = [part for part in content if part not in of_parts]
    message["content"] = _content(content, f"content of {name}")
    if thoughts.strip():
        message["reasoning_content"] = _plain(thoughts, f"reasoning_content of {name}")
    for key in ("name", "tool_call_id", "tools"):
        if isinstance(value.get(key), str) and value[key]:
            message[key] = value[key]
    weight = value.get("weight", value.get("train", value.get("training")))
    if role == "assistant" and weight is not None and not weight:
        message["weight"] = 0  # OpenAI's and axolotl's word for an answer that is there but not to be learned
    return message


_THOUGHT = ("reasoning_content", "thinking", "reasoning")
"""What is called so, of a message or as the type of a part, was thought before the answer."""


def _content(value: Any, name: str) -> str:
    """A text; of a list of parts their texts, if they are nothing else."""
    if not isinstance(value, list):
        return _plain(value, name)
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
            texts.append(_plain(part.get("text"), f"a part of {name}"))
        elif isinstance(part, str):
            texts.append(_plain(part, name))
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow(f"{name} has a part of type {reprlib.repr(kind)}; text alone can be learned")
    return "".join(texts)


_OTHER_NAMES = {
    **{"human": "user", "prompter": "user", "customer": "user"},
    **{
        "gpt": "assistant",
        "bot": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "ai": "assistant",
    },
    **{"function": "tool", "observation": "tool", "ipython": "tool"},
}


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
    if isinstance(prompt, list) and prompt[-1]["role"] not in ("user", "tool"):
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
        end = (end[-1]["content"] or end[-1].get("tool_calls", "")) if end else ""
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


def number(value: Any) -> Any:
    """A number that is a text, as all are in a table of text; else the value itself."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither NaN nor infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # unlike math.isfinite, also for integers beyond it


def _kind(value: Any) -> str:
    """What a JSON value is, for errors."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
