"""Token ids of prompts and answers: one way for all stages.

What a policy is asked, what it is taught to answer, what a reward model is trained on and what it scores are
the same tokens, or the stages learn different languages. Three things go wrong where each library has its own
way, and are settled here:

- Some tokenizers put an end token behind every text. A prompt never ends with one: an answer after it would
  be an answer after the end.
- The token that ends a turn need not be the tokenizer's `eos_token` (Gemma: `<end_of_turn>`; Phi-3:
  `<|end|>`; Qwen2.5 before its tuning: `<|im_end|>`). It is what the chat template writes behind an answer.
- Some tokenizers write a space before every text. An answer is tokenised behind its prompt there.

`prepare` settles the first stage's tokenizer; every later stage finds it so in the folder of the model.
"""

import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError, did_you_mean
from rlhf import templates
from rlhf.config import CHAT_TEMPLATES, DataConfig, ModelConfig
from rlhf.forms import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TooLong(LabError):
    """A prompt and an answer to it have more tokens than allowed."""


@dataclass(frozen=True)
class Ways:
    """What a tokenizer does besides looking up tokens."""

    before: tuple[int, ...]
    """Ids it puts before a plain text (a first token), if any."""
    joins: bool
    """Whether a text has the same ids behind another as by itself."""
    after_turn: str
    """What the chat template writes behind the last assistant's content."""
    before_end: str
    """The part of it before the end token."""
    turn_end: str | None
    """The token it ends a turn with; None: none of its own."""


_known: "weakref.WeakKeyDictionary[Any, tuple[Any, Ways]]" = weakref.WeakKeyDictionary()


def ways(tokenizer: "PreTrainedTokenizerBase") -> Ways:
    """What there is to know of a tokenizer, found by trying."""
    state = (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, _find_ways(tokenizer))
    return known[1]


def _find_ways(tokenizer: "PreTrainedTokenizerBase") -> Ways:
    before = []
    bare, dressed = (_encode(tokenizer, ["a"], special)[0] for special in (False, True))
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            before = dressed[:start]
            break
    joins = all(
        joined[: len(first)] != first or joined[len(first) :] == second
        for first, second, joined in (
            _encode(tokenizer, [a, b, a + b]) for a, b in (("a:", " b"), ("a:", "b"), ("a\n", "b"))
        )
    )
    return Ways(tuple(before), joins, *_end_of_turn(tokenizer))


_NAMED = re.compile(r"\{#- turn_end_token: (.*?) -#\}$")
"""Where a tokenizer keeps `model.eos_token`: at the end of its chat template, as a comment."""
_CONTENT = "wordsbehindwhichtheturnends"


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str, str | None]:
    """What follows an assistant's content in the chat template, its part before the end token, and that."""
    if not tokenizer.chat_template:
        return "", "", None
    try:
        whole = _render(tokenizer, [_said("user", "a"), _said("assistant", _CONTENT)])
    except templates.Endless:
        raise
    except LabError:
        return "", "", None  # the rows of data will meet the same error
    _, content, after = whole.rpartition(_CONTENT)
    if not content:
        return "", "", None
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens |= set(tokenizer.all_special_tokens)
    found = [token for token in tokens if token.strip() and token in after]
    # The first, at which a policy stops; of two that begin at one place the longer: <|end|> is no <|end.
    first = min(found, key=lambda token: (after.index(token), -len(token)), default=None)
    named = _NAMED.search(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None
    end = named[1] if named else first
    return after, after.partition(end)[0] if end else "", end


def end_token(tokenizer: "PreTrainedTokenizerBase", conversation: bool) -> str | None:
    """The token that ends an answer: what the chat template ends a turn with, or the tokenizer's own."""
    turn_end = ways(tokenizer).turn_end if conversation else None
    return turn_end or tokenizer.eos_token  # type: ignore[return-value]


def end_id(tokenizer: "PreTrainedTokenizerBase", conversation: bool) -> int | None:
    """The id of `end_token`."""
    token = end_token(tokenizer, conversation)
    return None if token is None else tokenizer.convert_tokens_to_ids(token)  # type: ignore[return-value]


# ---- rows to ids ----


def tokenize(
    prompt: Text,
    completion: Text,
    finished: bool,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = None,
    truncate_prompt: bool = False,
) -> list[int]:
    """Token ids of a prompt and an answer to it, without padding.

    The prompt is tokenised by itself, so that its ids are those a policy answers to. A finished answer ends
    with exactly one end token, see `end_token`; one that was cut off has none. Nothing follows the end token,
    even if the chat template would add a line break, because nothing does where a policy wrote it.

    Args:
        prompt: text, or messages for the tokenizer's chat template.
        completion: the answer, in the same form.
        finished: whether the answer came to its end, rather than to a limit of length.
        max_length: tokens allowed in all; None: any number.
        truncate_prompt: cut off the prompt's beginning where there are more; a first token stays.

    Raises:
        TooLong: more than `max_length` tokens, even so.
        LabError: text and messages mixed, no end token, or a chat template that cannot render this.
    """
    ((prompt_ids, answer_ids),) = tokenize_rows([(prompt, completion, finished)], tokenizer)
    if max_length is not None and len(prompt_ids) + len(answer_ids) > max_length:
        room = max_length - len(answer_ids)
        if room < 0 or not truncate_prompt:
            raise TooLong(
                f"a prompt of {len(prompt_ids)} tokens and an answer of {len(answer_ids)} are more than "
                f"max_length = {max_length}. Raise it, leave such answers out, or truncate the prompts."
            )
        prompt_ids = cut_left(prompt_ids, room, tokenizer)
    return prompt_ids + answer_ids


def tokenize_prompt(
    prompt: Text, tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[int]:
    """The token ids that an answer to the prompt is generated from, its last `max_length` ones."""
    return tokenize_prompts([prompt], tokenizer, max_length)[0]


def tokenize_prompts(
    prompts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", max_length: int | None = None
) -> list[list[int]]:
    """`tokenize_prompt` of many."""
    said = iter(_render_all(tokenizer, [p for p in prompts if not isinstance(p, str)], True))
    texts = [prompt if isinstance(prompt, str) else next(said) for prompt in prompts]
    rows = [
        _as_prompt(ids, isinstance(prompt, str), tokenizer)
        for prompt, ids in zip(prompts, _encode(tokenizer, texts), strict=True)
    ]
    return rows if max_length is None else [cut_left(row, max_length, tokenizer) for row in rows]


def tokenize_rows(
    rows: Sequence[tuple[Text, Text, bool]], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int]]]:
    """Ids of prompts and of the answers to them, for rows of prompt, answer and `finished`; see `tokenize`.

    Raises:
        LabError: see `tokenize`.
    """
    plain = [isinstance(prompt, str) for prompt, *_ in rows]
    ends = {kind: end_id(tokenizer, not kind) for kind in set(plain)}
    for (_, completion, finished), kind in zip(rows, plain, strict=True):
        if kind != isinstance(completion, str):
            raise LabError("of prompt and completion one is text and the other messages. Make them the same.")
        if finished and ends[kind] is None:
            raise LabError("the tokenizer has no eos_token, with which a finished answer ends. Set it.")
    asked = {id(prompt): prompt for prompt, *_ in rows}  # answers to one prompt share its object
    said = [prompt for prompt in asked.values() if not isinstance(prompt, str)]
    shown: dict[int, str] = dict(zip(map(id, said), _render_all(tokenizer, said, True), strict=True))
    befores = [prompt if isinstance(prompt, str) else shown[id(prompt)] for prompt, *_ in rows]
    talks = [[*prompt, *completion] for prompt, completion, _ in rows if not isinstance(prompt, str)]
    whole, found = iter(_render_all(tokenizer, talks, False)), ways(tokenizer)
    answers: list[str] = [
        row[1] if kind else _answer_in(next(whole), before, found)  # type: ignore[misc]
        for row, kind, before in zip(rows, plain, befores, strict=True)
    ]
    distinct = dict.fromkeys(befores)
    of_text = dict(zip(distinct, _encode(tokenizer, list(distinct)), strict=True))
    answer_ids = _encode_behind(tokenizer, befores, answers, [of_text[before] for before in befores])
    result = []
    for (_, _, finished), kind, before, ids in zip(rows, plain, befores, answer_ids, strict=True):
        end = ends[kind]
        while ids and ids[-1] == end:  # spelled out in the text
            ids.pop()
        if finished and end is not None:
            ids.append(end)
        result.append((_as_prompt(of_text[before], kind, tokenizer), ids))
    return result


def tokenize_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int], bool]:
    """A whole conversation, every answer as it would be generated.

    Returns:
        Ids; a mask, 1 where an assistant's turn is learned; and whether all its turns are. Some templates
        render a turn in another way once there is a later one (Qwen3 leaves out what was thought): what comes
        before then is none that the policy could have written, and the last turn alone is learned.

    Raises:
        LabError: see `tokenize`.
    """
    ids: list[int] = []
    mask: list[int] = []
    asked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i]
    turns = [(list(messages[:i]), [messages[i]]) for i in asked]
    for number, (prompt, answer) in enumerate(turns):
        ((prompt_ids, answer_ids),) = tokenize_rows([(prompt, answer, True)], tokenizer)  # type: ignore[list-item]
        if prompt_ids[: len(ids)] != ids:
            prompt, answer = turns[-1]
            ((prompt_ids, answer_ids),) = tokenize_rows([(prompt, answer, True)], tokenizer)  # type: ignore[list-item]
            learned = int(messages[asked[-1]].get("weight") != 0)
            return prompt_ids + answer_ids, [0] * len(prompt_ids) + [learned] * len(answer_ids), False
        learned = int(messages[asked[number]].get("weight") != 0)
        mask += [0] * (len(prompt_ids) - len(ids)) + [learned] * len(answer_ids)
        ids = prompt_ids + answer_ids
    return ids, mask, True


def tokenize_whole(messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A conversation to its end as the chat template writes it, and what that puts behind an end token."""
    return _encode(tokenizer, [_render(tokenizer, messages)])[0]


def tokenize_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A whole text, with exactly one end token behind it."""
    end = end_id(tokenizer, conversation=False)
    ids = _as_prompt(_encode(tokenizer, [text])[0], True, tokenizer)
    return ids if end is None else [*ids, end]


BATCH = 1_000
"""Rows that are tokenised together."""


def rows_of_ids(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int], bool]]:
    """Of each demonstration its ids, a mask of what is learned of them, and whether all its answers are."""
    if "messages" in rows[0]:
        return [tokenize_conversation(row["messages"], tokenizer) for row in rows]
    if "text" in rows[0]:
        texts = [tokenize_text(row["text"], tokenizer) for row in rows]
        return [(ids, [1] * len(ids), True) for ids in texts]
    talks = {
        i: tokenize_conversation(_as_conversation(row), tokenizer)
        for i, row in enumerate(rows)
        if not isinstance(row["completion"], str)
        and (len(row["completion"]) > 1 or row["completion"][0].get("weight") == 0)
    }
    asked = [(row["prompt"], row["completion"], True) for i, row in enumerate(rows) if i not in talks]
    answered = iter(tokenize_rows(asked, tokenizer) if asked else [])
    for i in range(len(rows)):
        if i not in talks:
            prompt, answer = next(answered)
            talks[i] = prompt + answer, [0] * len(prompt) + [1] * len(answer), True
    return [talks[i] for i in range(len(rows))]


def _as_conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompt and completion in one, of which only what the assistant says in the completion is learned."""
    return [*({**turn, "weight": 0} for turn in row["prompt"]), *row["completion"]]


def counted(kind: str, dataset: Any, tokenizer: "PreTrainedTokenizerBase") -> Iterator[int | str]:
    """Tokens of each row, or why it cannot be rendered.

    Args:
        kind: demonstrations, comparisons (the longest answer with the prompt counts) or prompts.
        dataset: such rows, as `rlhf.data` returns them.
    """

    def count(begin: int) -> list[int | str]:
        rows = dataset.select(range(begin, min(begin + BATCH, len(dataset)))).to_list()
        try:
            return [*_count(kind, rows, tokenizer)]
        except templates.Endless:  # seconds for each row would be hours
            raise
        except LabError:
            return [_count_or_why(kind, row, tokenizer) for row in rows]

    ways(tokenizer)  # is found once, before both threads ask
    pool = ThreadPoolExecutor(2)  # tokenizers lets go of the interpreter: one batch is rendered meanwhile
    try:
        for counts in pool.map(count, range(0, len(dataset), BATCH)):
            yield from counts
    finally:
        pool.shutdown(cancel_futures=True)


def _count_or_why(kind: str, row: Any, tokenizer: "PreTrainedTokenizerBase") -> int | str:
    try:
        return _count(kind, [row], tokenizer)[0]
    except templates.Endless:
        raise
    except LabError as error:
        return str(error)


def _count(kind: str, rows: list[Any], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if kind == "prompts":
        return [len(ids) for ids in tokenize_prompts([row["prompt"] for row in rows], tokenizer)]
    if kind == "demonstrations":
        return [len(ids) for ids, *_ in rows_of_ids(rows, tokenizer)]
    answers = [
        (row["prompt"], completion, finished)
        for row in rows
        for completion, finished in zip(row["completions"], row["finished"], strict=True)
    ]
    counts = iter([len(prompt) + len(answer) for prompt, answer in tokenize_rows(answers, tokenizer)])
    return [max(next(counts) for _ in row["completions"]) for row in rows]


def rendered(kind: str, dataset: Any, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> Any:
    """The rows that the chat template can render where `data.bad_rows` is skip; else all.

    Args:
        kind, dataset: as for `counted`.

    Raises:
        LabError: it can render none of them.
    """
    if config.bad_rows != "skip":
        return dataset
    counts = list(counted(kind, dataset, tokenizer))
    kept = [i for i, count in enumerate(counts) if not isinstance(count, str)]
    if not kept:
        raise LabError(f"{kind}: none can be used: {counts[0]}")
    return dataset if len(kept) == len(counts) else dataset.select(kept)


def room_for_prompts(config: DataConfig) -> int:
    """Tokens that a prompt may have, so that an answer to it has room too."""
    return config.max_length - config.max_new_tokens


def fitting_prompts(
    dataset: Any, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, source: str
) -> tuple[Any, int]:
    """The prompts that may be asked, and how many have more tokens than there is room for.

    Under `data.too_long` = drop these are left out; under truncate_prompt they stay, and who asks cuts them.

    Raises:
        LabError: there are any where that is an error, or no other prompts.
    """
    room, on_too_long = room_for_prompts(config), config.too_long
    lengths = [len(ids) for ids in tokenize_prompts(dataset["prompt"][:], tokenizer)]
    kept = [i for i, length in enumerate(lengths) if length <= room]
    too_long = len(lengths) - len(kept)
    if too_long and (on_too_long == "error" or not (kept or on_too_long == "truncate_prompt")):
        raise LabError(
            f"{source}: {too_long:,} of {len(lengths):,} prompts have more than {room} tokens (the longest "
            f"{max(lengths):,}), which is data.max_length {config.max_length} less data.max_new_tokens "
            f"{config.max_new_tokens}. Change these, or set data.too_long."
        )
    return (dataset.select(kept) if too_long and on_too_long == "drop" else dataset), too_long


def fitting_answers(
    rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[dict[str, Any]]:
    """Comparisons without the answers that have, with their prompt, more than `max_length` tokens.

    Comparisons of which no two answers of different rank are left are left out.
    """
    kept = []
    for row in rows:
        answers = list(zip(row["completions"], row["finished"], strict=True))
        counted = tokenize_rows([(row["prompt"], *answer) for answer in answers], tokenizer)
        fits = [len(prompt) + len(answer) <= max_length for prompt, answer in counted]
        lists = {name: row[name] for name in ("completions", "ranks", "finished", "scores") if row.get(name)}
        own = {
            name: [value for value, fit in zip(values, fits, strict=True) if fit]
            for name, values in lists.items()
        }
        if len(set(own["ranks"])) > 1:
            kept.append({**row, **own})
    return kept


def cut_left(ids: list[int], max_length: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The last `max_length` ids, of which a first token of every text stays the first."""
    if len(ids) <= max_length:
        return ids
    before = list(ways(tokenizer).before)
    if before and ids[: len(before)] == before and len(before) < max_length:
        return before + ids[len(ids) - max_length + len(before) :]
    return ids[len(ids) - max_length :]


def _as_prompt(ids: list[int], plain: bool, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a prompt's text with what the tokenizer puts before one, and without an end token."""
    if not plain:
        return list(ids)  # the chat template wrote all there is
    before = list(ways(tokenizer).before)
    ids = ids if before and ids[: len(before)] == before else before + ids
    while len(ids) > len(before) and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return list(ids)


def _encode_behind(
    tokenizer: "PreTrainedTokenizerBase",
    befores: Sequence[str],
    texts: Sequence[str],
    before_ids: Sequence[list[int]],
) -> list[list[int]]:
    """Ids of texts where each stands behind another."""
    alone = _encode(tokenizer, list(texts))
    if ways(tokenizer).joins:
        return alone
    joined = _encode(tokenizer, [before + text for before, text in zip(befores, texts, strict=True)])
    return [
        # Where tokens merge over the border, no policy could write them: the text is then as it is alone.
        whole[len(first) :] if whole[: len(first)] == first else own
        for whole, first, own in zip(joined, before_ids, alone, strict=True)
    ]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    # verbose: lengths are looked at here, and the tokenizer need not warn of them.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]  # type: ignore[return-value]


# ---- chat templates ----


def rendered_prompt(prompt: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    """What a policy is shown of a conversation before it answers."""
    return _render(tokenizer, prompt, add_generation_prompt=True)


def _answer_in(whole: str, before: str, found: Ways) -> str:
    """What the chat template puts between the prompt and the end token of the last message."""
    if not whole.startswith(before):
        raise LabError(
            "the chat template renders the prompt in another way once there is an answer, so no policy could "
            "have written it. Use a template that does not."
        )
    if found.after_turn and whole.endswith(found.after_turn):
        whole = whole[: len(whole) - len(found.after_turn)] + found.before_end
    return whole[len(before) :]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render_all(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Mapping[str, Any]]], asks: bool
) -> list[str]:
    """`_render` of many, all at once: much of the time goes into what transformers does before it renders."""
    template = _template(tokenizer)
    templates.limit()
    try:
        if len(conversations) < 2 or any(turns[0].get("tools") for turns in conversations):
            raise ValueError
        many = [[_for_template(message, template) for message in turns] for turns in conversations]
        texts: Any = tokenizer.apply_chat_template(many, tokenize=False, add_generation_prompt=asks)
    except templates.Endless:
        raise
    except Exception:  # which of them it is, and why, is found one by one
        return [_render(tokenizer, turns, add_generation_prompt=asks) for turns in conversations]
    return [_checked(text, turns) for text, turns in zip(texts, many, strict=True)]


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], **options: Any
) -> str:
    template = _template(tokenizer)
    turns = [_for_template(message, template) for message in messages]
    tools = json.loads(messages[0]["tools"]) if messages and messages[0].get("tools") else None
    templates.limit()
    try:
        whole = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
    except templates.Endless:
        raise
    except Exception as error:  # whatever a template raises
        why = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        raise LabError(f"the chat template cannot render this conversation: {why}") from error
    return _checked(whole, turns)  # type: ignore[arg-type]


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Its chat template; of one that has several, all of them."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template)


def _checked(text: str, turns: Sequence[Mapping[str, Any]]) -> str:
    """The text; a template that does not know a role may write nothing of it, and nobody would notice."""
    for turn in turns:
        if turn["role"] in ("system", "developer", "user", "tool"):
            end = turn["content"].strip()[-24:]
            if end and end not in text and json.dumps(end)[1:-1] not in text:
                raise LabError(
                    f"the chat template leaves out what the {turn['role']} says. Use one that knows the role"
                )
    return text


_READS_THINKING = re.compile(r"""(\.|\[?\\?['"])thinking\b""")
"""gpt-oss calls a message's reasoning_content so; elsewhere it is the name of a setting."""


def _for_template(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A message as templates expect it."""
    turn = {"role": message["role"], "content": message["content"]}
    if turn["role"] == "developer" and "developer" not in template:
        turn["role"] = "system"  # what it is called in all templates but OpenAI's
    if message.get("tool_calls"):
        if "tool_calls" not in template:
            raise LabError("the chat template cannot render this conversation: it knows no tool calls")
        turn["tool_calls"] = json.loads(message["tool_calls"])
    for key in ("name", "tool_call_id"):
        if message.get(key):
            turn[key] = message[key]
    if message.get("reasoning_content"):
        key = "reasoning_content" if "reasoning_content" in template else "thinking"
        if key == "thinking" and not _READS_THINKING.search(template):
            raise LabError(
                "the chat template cannot render this conversation: it knows no reasoning_content. Put what "
                "was thought into content, or leave it out"
            )
        turn[key] = message["reasoning_content"]
    return turn


_CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + END }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + END }}{%- endif %}{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As Anthropic's hh-rlhf writes a dialogue. The space before an answer is the answer's: so its first word is
# the token that it is in any text.
_PLAIN = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- '\\n\\nAssistant:' }}"
    "{%- generation %}{{- ' ' + message['content'] | trim + END }}{%- endgeneration %}"
    "{%- elif message['role'] == 'user' %}{{- '\\n\\nHuman: ' + message['content'] | trim }}"
    "{%- else %}{{- '\\n\\n' + message['role'] | capitalize + ': ' + message['content'] | trim }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\\n\\nAssistant:' }}{%- endif %}"
)


def prepare(
    tokenizer: "PreTrainedTokenizerBase", config: ModelConfig, converses: bool, source: str
) -> list[str]:
    """Gives a tokenizer the chat template and the end token that the recipe uses, for all stages.

    Both are saved with the tokenizer, so later stages and stock transformers find them.

    Args:
        config: `chat_template` and `eos_token` of it.
        converses: whether any of the data are conversations.
        source: of these data, for errors.

    Returns:
        What was decided, in words, where there was something to decide.

    Raises:
        LabError: conversations and no template, a template that is none, or no such token.
    """
    notes = []
    end = config.eos_token
    if end:
        ids = _encode(tokenizer, [end])[0]
        if end not in tokenizer.get_vocab() and len(ids) != 1:
            raise LabError(
                f"model.eos_token: {end!r} is not one token of the model's vocabulary."
                f"{did_you_mean(end, tokenizer.all_special_tokens)}"
            )
        if tokenizer.eos_token is None:  # which chat templates write
            tokenizer.add_special_tokens({"eos_token": end})
    if config.chat_template:
        tokenizer.chat_template = _chat_template(config.chat_template, tokenizer)
        if converses:
            _render(tokenizer, [_said("user", "a"), _said("assistant", _CONTENT)])
    if converses and not tokenizer.chat_template:
        raise LabError(
            f"{source}: holds conversations, but the model's tokenizer has no chat template. Set "
            "model.chat_template to chatml, plain or a file, use a chat model's tokenizer (model.tokenizer), "
            "or data in plain text."
        )
    if end:
        after, turn_end = ways(tokenizer).after_turn, ways(tokenizer).turn_end
        if converses and turn_end and end not in after:
            raise LabError(
                f"model.eos_token: the chat template ends a turn with {turn_end!r}, and {end!r} is not in "
                "what follows an answer. Leave the key empty, or set model.chat_template to one that has it."
            )
        if turn_end and isinstance(tokenizer.chat_template, str) and end != turn_end:
            tokenizer.chat_template += f"{{#- turn_end_token: {end} -#}}"
    end = end or end_token(tokenizer, converses)
    if end and end != tokenizer.eos_token:
        if not config.eos_token:
            other = f", not {tokenizer.eos_token!r}" if tokenizer.eos_token else ""
            notes.append(f"answers end with {end!r}, as the chat template has it{other}")
        tokenizer.add_special_tokens({"eos_token": end})
    elif end and converses and ways(tokenizer).turn_end is None:
        notes.append(f"the chat template ends a turn with no token; answers end with {end!r}")
    check_end(tokenizer)
    separate_padding(tokenizer)
    return notes


def check_end(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises a `LabError` if a tokenizer has no end token."""
    if tokenizer.eos_token_id is None:
        raise LabError(
            f"{tokenizer.name_or_path}: its tokenizer has no eos_token, so no answer could end. Set one, or "
            "name one of its tokens in model.eos_token."
        )


def separate_padding(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Gives the tokenizer a padding token that is not the end token.

    Stock reward models find an answer's end by it. Where there is no token to spare, one is added to the
    vocabulary: the model then needs an embedding for it.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    spare = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
    if spare:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token in spare else spare[0]
    else:  # GPT-2's first, last and unknown token are one
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


def _chat_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A built-in template, or that in a file."""
    if name in CHAT_TEMPLATES:
        known = "<|im_end|>" in tokenizer.get_vocab()
        end = "'<|im_end|>'" if name == "chatml" and known else "eos_token"
        first = "{{- bos_token }}" if ways(tokenizer).before and tokenizer.bos_token else ""
        return first + {"chatml": _CHATML, "plain": _PLAIN}[name].replace("END", end)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        hint = did_you_mean(name, CHAT_TEMPLATES)
        raise LabError(
            f"model.chat_template: {name!r} cannot be read: {why}.{hint} Known are "
            f"{', '.join(CHAT_TEMPLATES)} and files of a Jinja template."
        ) from None
    if name.endswith(".json"):  # a tokenizer_config.json has it as one of its keys
        try:
            text = json.loads(text)["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise LabError(
                f"model.chat_template: {name} has no key chat_template. Name a file that has."
            ) from None
    if not isinstance(text, str) or "{" not in text:
        raise LabError(f"model.chat_template: {name} is no Jinja template. Name a file of one.")
    return text


@contextmanager
def in_parallel() -> Iterator[None]:
    """Within, tokenizers use all cores; nothing may be forked meanwhile."""
    import os

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
