"""One way from rows to token ids, on tokenizers built as other families have them."""

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lab.errors import LabError
from rlhf import templates
from rlhf.config import ModelConfig
from rlhf.tokenization import (
    counted,
    cut_left,
    end_token,
    prepare,
    rendered_prompt,
    rows_of_ids,
    separate_padding,
    tokenize,
    tokenize_conversation,
    tokenize_prompt,
    tokenize_text,
)

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501


def build(
    *tokens: str,
    template: str | None = None,
    around: str = "$A",
    metaspace: Any = False,
    **special: Any,
) -> Any:
    """Byte-level or, with `metaspace`, with a space before every text; `around`: of its post-processor."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581", "\n", " "})
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = (  # type: ignore[assignment]
        pre_tokenizers.Metaspace(prepend_scheme="first")
        if metaspace
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    inner.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()  # type: ignore[assignment]
    names = dict.fromkeys([*tokens, *special.values()])
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if around != "$A":
        used = [part for part in around.split() if part != "$A"]
        inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=around, special_tokens=[(name, inner.token_to_id(name)) for name in used]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma": (
        lambda: build(
            *("<start_of_turn>", "<end_of_turn>"),
            **{"template": GEMMA, "around": "<bos> $A", "metaspace": True},
            **{"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ),
        "<end_of_turn>",
    ),
    "phi3": (
        lambda: build("<|user|>", "<|assistant|>", "<|end|>", template=PHI3, eos_token="<|endoftext|>"),
        "<|end|>",  # its template writes <|endoftext|> behind it: a policy has stopped by then
    ),
    "qwen2.5 base": (
        lambda: build("<|im_start|>", "<|im_end|>", template=CHATML, eos_token="<|endoftext|>"),
        "<|im_end|>",
    ),
    "llama 3": (
        lambda: build(
            *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            **{"template": LLAMA3, "around": "<|begin_of_text|> $A"},
            **{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ),
        "<|eot_id|>",
    ),
    "llama 2, ending every text": (
        lambda: build(
            **{"template": LLAMA2, "around": "<s> $A </s>", "metaspace": True},
            **{"bos_token": "<s>", "eos_token": "</s>"},
        ),
        "</s>",
    ),
    "bert-like": (
        lambda: build(template=CHATML, around="[CLS] $A [SEP]", bos_token="[CLS]", eos_token="[SEP]"),
        "[SEP]",
    ),
    "t5-like": (lambda: build(template=NO_END, around="$A </s>", eos_token="</s>"), "</s>"),
    "padding is the end": (
        lambda: build("<|im_start|>", template=CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>"),
        "<|im_end|>",
    ),
}
NO_END_TOKEN = ("bert-like", "t5-like")
"""Their templates end a turn with no token."""
ASK = [{"role": "user", "content": "a film?"}]
SAY = [{"role": "assistant", "content": "good film"}]


def prepared(name: str, converses: bool = True, **config: Any) -> Any:
    tokenizer = TOKENIZERS[name][0]()
    prepare(tokenizer, ModelConfig(**config), converses, "data.jsonl")
    return tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["the film was", ASK], ids=["text", "chat"])
def test_a_prompt_has_no_end_and_one_beginning_and_an_answer_one_end(name: str, prompt: Any) -> None:
    tokenizer = prepared(name, converses=not isinstance(prompt, str))
    answer = " good" if isinstance(prompt, str) else SAY
    asked, whole = tokenize_prompt(prompt, tokenizer), tokenize(prompt, answer, True, tokenizer)
    end = tokenizer.eos_token_id
    assert whole[: len(asked)] == asked  # what is learned is behind what is asked
    assert asked[-1] != end
    assert asked.count(tokenizer.bos_token_id) <= 1 if tokenizer.bos_token_id is not None else True
    assert whole[len(asked) :].count(end) == 1
    assert whole[-1] == end
    assert tokenize(prompt, answer, False, tokenizer) == whole[:-1]
    assert "good" in tokenizer.decode(whole[len(asked) : -1])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_end_of_a_turn_is_found_and_kept(name: str, tmp_path: Path) -> None:
    """The saved tokenizer has it as its eos_token, and decoding leaves it out."""
    from transformers import AutoTokenizer

    expected = TOKENIZERS[name][1]
    assert end_token(TOKENIZERS[name][0](), conversation=True) == expected
    tokenizer = prepared(name)
    separate_padding(tokenizer)
    assert tokenizer.eos_token == expected
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenize(ASK, SAY, True, again)
    assert ids == tokenize(ASK, SAY, True, tokenizer)
    assert expected not in again.decode(ids, skip_special_tokens=True)
    assert again.chat_template == tokenizer.chat_template


def test_of_texts_the_tokenizers_own_end_stays() -> None:
    assert prepared("qwen2.5 base", converses=False).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("form", ["text", "completion", "chat", "messages"])
def test_trls_own_trainer_tokenises_alike_or_the_difference_is_known(name: str, form: str) -> None:
    """Where they differ it is TRL's prompt that ends with an end token, or its answer that has none."""
    from trl.data_utils import is_conversational
    from trl.trainer.sft_trainer import _tokenize  # type: ignore[attr-defined]

    row = {
        "text": {"text": "the film was good"},
        "completion": {"prompt": "the film was", "completion": " good"},
        "chat": {"prompt": ASK, "completion": SAY},
        "messages": {"messages": [*ASK, *SAY]},
    }[form]
    tokenizer = prepared(name, converses=is_conversational(row))
    ((ours, mask, _),) = rows_of_ids([row], tokenizer)
    if is_conversational(row):
        theirs = _tokenize(tokenizer, [*ASK, *SAY])["input_ids"]
    else:
        text = row.get("text") or row["prompt"] + row["completion"]  # type: ignore[operator]
        theirs = _tokenize(tokenizer, text + tokenizer.eos_token)["input_ids"]
    assert theirs[: len(ours) - 1] == ours[:-1]
    no_end = name in NO_END_TOKEN and is_conversational(row)
    assert no_end or theirs[len(ours) - 1] == tokenizer.eos_token_id == ours[-1]
    assert mask[-1] == 1


def test_a_text_already_ended_is_ended_once() -> None:
    tokenizer = prepared("llama 2, ending every text", converses=False)
    assert tokenize_text("good</s>", tokenizer) == tokenize_text("good", tokenizer)
    assert tokenize_prompt("good</s></s>", tokenizer) == tokenize_prompt("good", tokenizer)
    assert tokenize_prompt("<s>good", tokenizer)[0] == tokenizer.bos_token_id
    assert tokenize_prompt("<s>good", tokenizer)[1] != tokenizer.bos_token_id


def test_of_a_conversation_every_answer_is_learned_where_the_template_lets_it() -> None:
    turns = [*ASK, *SAY, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "that"}]
    for name in TOKENIZERS:
        tokenizer = prepared(name)
        ids, mask, every = tokenize_conversation(turns, tokenizer)
        said = [tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])]
        if name in NO_END_TOKEN:  # earlier answers would be followed by no end where a policy wrote one
            assert not every
            assert said[0].split(tokenizer.eos_token)[0].endswith("that")
        else:
            assert every
            assert said[0].count("good film") == said[0].count("that") == 1
            assert "a film?" not in said[0]
    silent = [dict(turn, weight=0) if i == 1 else turn for i, turn in enumerate(turns)]
    ids, mask, _ = tokenize_conversation(silent, prepared("llama 3"))
    assert sum(mask) == len("that") + 1


def learned_of(row: Any, tokenizer: Any) -> list[str]:
    """The texts of which the loss is taken."""
    ((ids, mask, _),) = rows_of_ids([row], tokenizer)
    runs = itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for learned, run in runs if learned]


def test_what_the_user_says_in_a_completion_is_not_learned() -> None:
    tokenizer = prepared("llama 3")
    more = [*SAY, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "that"}]
    for before in (ASK, [*ASK, *SAY, *ASK]):
        row = {"prompt": before, "completion": more}
        assert learned_of(row, tokenizer) == ["good film<|eot_id|>", "that<|eot_id|>"]
    silent = {"prompt": ASK, "completion": [{**SAY[0], "weight": 0}]}
    assert learned_of(silent, tokenizer) == []
    twice = {"messages": [*ASK, *SAY, {"role": "assistant", "content": "that"}]}
    assert learned_of(twice, tokenizer) == ["good film<|eot_id|>", "that<|eot_id|>"]


def test_a_last_answer_that_is_not_to_be_learned_is_not_where_it_alone_would_be() -> None:
    tokenizer = build("<|im_start|>", "<|im_end|>", template=THINKING, eos_token="<|im_end|>")
    turns = [*ASK, *SAY, {"role": "user", "content": "and?"}]
    assert (
        learned_of({"messages": [*turns, {"role": "assistant", "content": "that", "weight": 0}]}, tokenizer)
        == []
    )


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_what_was_thought_is_learned_or_refused(name: str) -> None:
    thoughtful = CHATML.replace(
        "{{ m.content }}", f"{{{{ '<think>' + m.{name} if m.{name} }}}}{{{{ m.content }}}}"
    )
    row = {"messages": [*ASK, {**SAY[0], "reasoning_content": "a film?"}]}
    tokenizer = build("<|im_start|>", "<|im_end|>", template=thoughtful, eos_token="<|im_end|>")
    assert learned_of(row, tokenizer) == ["<think>a film?good film<|im_end|>"]
    with pytest.raises(LabError, match="knows no reasoning_content"):
        learned_of(row, prepared("llama 3"))


def test_a_template_that_thinks_in_the_last_turn_alone() -> None:
    tokenizer = build("<|im_start|>", "<|im_end|>", template=THINKING, eos_token="<|im_end|>")
    turns = [*ASK, *SAY, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "that"}]
    ids, mask, every = tokenize_conversation(turns, tokenizer)
    assert not every
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == "<think>\n\n</think>\n\nthat<|im_end|>"


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: build(eos_token="<|endoftext|>"),  # GPT-2
        lambda: build(around="</s> $A", bos_token="</s>", eos_token="</s>"),  # OPT: one token for both
    ],
    ids=["gpt2", "opt"],
)
def test_a_built_in_template_for_models_without_one(
    template: str, tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    made = tokenizer()
    with pytest.raises(LabError, match=r"no chat template\. Set model\.chat_template to chatml, plain"):
        prepare(made, ModelConfig(), True, "data.jsonl")
    prepare(made, ModelConfig(chat_template=template), True, "data.jsonl")
    asked, whole = tokenize_prompt(ASK, made), tokenize(ASK, SAY, True, made)
    starts = made.decode(asked)
    first = "</s>" if made.bos_token else ""
    assert (
        starts
        == first
        + {
            "chatml": f"<|im_start|>user\na film?{made.eos_token}\n<|im_start|>assistant\n",
            "plain": "\n\nHuman: a film?\n\nAssistant:",
        }[template]
    )
    assert made.decode(whole[len(asked) :]).strip() == f"good film{made.eos_token}"
    made.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False) == asked


def test_a_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    for name in ("chat.jinja", "tokenizer_config.json"):
        tokenizer = build("<|im_start|>", "<|im_end|>", eos_token="</s>")
        prepare(tokenizer, ModelConfig(chat_template=str(tmp_path / name)), True, "data.jsonl")
        assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")
    (tmp_path / "broken").write_text("{% for %}")
    for name, problem in (
        ("chatmll", "cannot be read: No such file or directory. Did you mean 'chatml'?"),
        (str(tmp_path / "broken"), "the chat template cannot render"),
    ):
        with pytest.raises(LabError) as caught:
            prepare(build(eos_token="</s>"), ModelConfig(chat_template=name), True, "data.jsonl")
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("token", "problem"),
    [("<|im_ent|>", "is not one token"), ("<|endoftext|>", "ends a turn with '<|im_end|>'")],
)
def test_an_end_token_that_cannot_be(token: str, problem: str) -> None:
    with pytest.raises(LabError) as caught:
        prepared("qwen2.5 base", eos_token=token)
    assert problem in str(caught.value)


def test_an_end_token_that_was_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = prepared("phi3", eos_token="<|endoftext|>")
    assert named.eos_token == end_token(named, conversation=True) == "<|endoftext|>"
    named.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenize(ASK, SAY, True, again) == tokenize(ASK, SAY, True, named)
    assert end_token(again, conversation=True) == "<|endoftext|>"
    assert prepared("t5-like", converses=False, eos_token="</s>").eos_token == "</s>"


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "42"}, "leaves out what the tool says"),
        ({"role": "system", "content": "Be brief"}, "leaves out what the system says"),
        ({"role": "developer", "content": "Be brief"}, "leaves out what the system says"),
        (
            {"role": "assistant", "content": "", "tool_calls": '[{"type": "function"}]'},
            "it knows no tool calls",
        ),
    ],
)
def test_a_template_that_would_drop_what_is_said(message: Any, problem: str) -> None:
    two = "{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}"
    template = "{% for m in messages %}" + two + "{% endfor %}"
    tokenizer = build(template=template, eos_token="</s>")
    with pytest.raises(LabError, match=problem):
        tokenize_prompt([message, *ASK], tokenizer)


def test_a_cut_prompt_keeps_its_first_token() -> None:
    tokenizer = prepared("llama 3")
    ids = tokenize_prompt(ASK, tokenizer)
    cut = cut_left(ids, 5, tokenizer)
    assert cut == [ids[0], *ids[-4:]]
    assert tokenize_prompt(ASK, tokenizer, 5) == cut
    assert cut_left(ids, len(ids), tokenizer) == ids


MESSAGE = [{"role": "user", "content": "hi"}]
DOUBLED = (
    "{{% set ns = namespace(x='a') %}}{{% for i in range(60) %}}{{% set ns.x = {} %}}{{% endfor %}}"
    "{{{{ ns.x }}}}"
)
ENDLESS = {
    "two ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a range of lists": "{% for a in range(99999) %}{{ (range(99999) | sort | length) * 0 }}{% endfor %}",
    "calls of itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "much output": "{% for a in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "a text many times": "{{ 'a' * 10**10 }}",
    "many times a list": "{{ 10**10 * [1] }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "squares": DOUBLED.format("(ns.x | length + 2) if i == 0 else ns.x * ns.x"),
    "doubled": DOUBLED.format("ns.x ~ ns.x"),
    "added": DOUBLED.format("ns.x + ns.x"),
    "lists of lists": DOUBLED.format("[ns.x, ns.x]"),
    "mappings": DOUBLED.format("dict(a=ns.x, b=ns.x)"),
    "a block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% set ns.x = y %}{% endfor %}",
    "a width": "{{ 'a'.center(10**10) }}",
    "a filter's width": "{{ 'a' | center(10000000000) }}",
    "a mapped filter": "{{ ['a'] | map('center', 10000000000) | list }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "its arguments": "{{ '%*d' % (9999999999, 1) }}",
    "a text's format": "{{ '{:9999999999}'.format(1) }}",
    "replaced": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "joined": "{% set a = 'a' * 1000000 %}{{ range(99999) | map('string') | join(a) }}",
    "an indent": "{{ [[[1]]] | tojson(indent=9999999999) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_chat_template_without_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    tokenizer = build(template=template)
    began = time.thread_time()
    with pytest.raises(templates.Endless, match=r"^the chat template .* Use another\.$"):
        rendered_prompt(MESSAGE, tokenizer)
    with pytest.raises(templates.Endless):
        list(counted("prompts", Dataset.from_list([{"prompt": MESSAGE}] * 3), tokenizer))
    assert time.thread_time() - began < 8


def test_a_chat_template_without_end_is_refused_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    tokenizer = build(template=ENDLESS["two ranges"])
    with ThreadPoolExecutor(2) as pool:
        errors = [pool.submit(rendered_prompt, MESSAGE, tokenizer).exception(20) for _ in range(3)]
    assert {type(error) for error in errors} == {templates.Endless}


LOOPS = (
    "{% macro show(x, n=2) %}<{{ x | trim | upper }}{{ '-' * n }}>{% endmacro %}{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}/{{ loop.revindex0 }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }}"
    "{{ loop.changed(m.role) }}{{ show(m.content, n=3) }}{{ '%03d %s' % (loop.index, m.role) }}{{ none }}"
    "{% for k, v in m.items() %}{{ k ~ '=' ~ v | tojson }}{% if loop.first %}{% continue %}{% endif %};"
    "{% endfor %}"
    "{{ 'a, b'.split(', ') | join('+') }}{{ '{:>5}'.format(loop.index0) }}{{ [m.role, (1, 2), {'a': 1.5}] }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content.replace('b', 'cc') }}{% endgeneration %}"
    "{% endif %}"
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    "{% set y %}{{ m.content }}!{% endset %}{{ y | length }}{{ missing }}{% for z in missing %}{% endfor %}"
    "{% endfor %}{{ messages[::-1] | map(attribute='role') | list }}{{ 2 ** 3 + 7 % 4 - 1 // 2 }}"
    "{{ 1.26 | round(1) }}"
)


@pytest.mark.parametrize("template", [GEMMA, PHI3, CHATML, LLAMA3, LLAMA2, THINKING, NO_END, LOOPS])
def test_within_limits_the_same_is_rendered(template: str) -> None:
    from transformers.utils import chat_template_utils

    turns = [("system", "s"), ("user", "a\n"), ("assistant", "b b"), ("user", "c")]
    options: dict[str, Any] = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        **{"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"},
    }
    stock = chat_template_utils._cached_compile_jinja_template(template).render(**options)
    templates.limit()
    ours = chat_template_utils._compile_jinja_template(template)
    assert type(ours) is templates._Template
    assert ours.render(**options) == stock
    assert "".join(ours.generate(**options)) == stock
