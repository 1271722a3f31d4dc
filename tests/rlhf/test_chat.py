"""Talking to tiny models: whole words, a dialogue that fits, two side by side, and a real terminal."""

import argparse
import builtins
import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here is on the Hub

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.cli import main
from lab.errors import LabError
from rlhf import chat as module
from rlhf import decode
from rlhf.chat import Speaker, add_arguments, chat, whole_words

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A message takes three tokens and one for each of its bytes."""
POSITIONS = 64


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte is a token."""
    ids = {
        token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokens = Tokenizer(models.BPE(ids, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def make_model(tokenizer: Any, positions: int = POSITIONS, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=positions,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


Script = Callable[..., list[list[int]]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Script:
    """`scripted("one", "two")` has the models say this, a byte at a time; returns the prompts they then get.

    A ^C in a text is a Ctrl-C that comes while it is said.
    """

    def script(*answers: str) -> list[list[int]]:
        tokenizer, left = make_tokenizer(), list(answers)
        prompts: list[list[int]] = []

        def stream(model: Any, prompt: list[int], *, max_new_tokens: int, **_: Any) -> Iterator[int]:
            prompts.append(prompt)
            for token in tokenizer(left.pop(0))["input_ids"][:max_new_tokens]:
                if tokenizer.decode([token]) == "\x03":
                    raise KeyboardInterrupt
                yield token

        monkeypatch.setattr(decode, "stream", stream)
        return prompts

    return script


def make_speaker(name: str = "model", template: str | None = TEMPLATE, **options: Any) -> Speaker:
    tokenizer = make_tokenizer(template)
    return Speaker(name, make_model(tokenizer), tokenizer, **options)


def text_of(prompt: list[int]) -> str:
    return make_tokenizer().decode(prompt)


def say(speaker: Speaker, text: str) -> str:
    speaker.ask(text)
    return "".join(speaker.answer())


# ---- words ----


@pytest.mark.parametrize(
    "pieces",
    [
        ["Hello ", "big ", "world"],
        ["don't,", " ", "you\u2019ll ", "see."],
        ["naïve ", "café"],
        ["日", "本", "語"],
        ["a🙂", "b"],
        ["1.", " ", "two"],
        [*"a" * 60, "a" * 40 + " ", "b"],
        [],
    ],
)
def test_words_and_characters_come_whole(pieces: list[str]) -> None:
    """Of tokens that are a byte each."""
    tokenizer = make_tokenizer()
    tokens = iter(tokenizer("".join(pieces))["input_ids"])
    assert list(whole_words(tokens, tokenizer.decode)) == pieces


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("ok 日")["input_ids"]
    assert "".join(whole_words(iter(ids[:-1]), tokenizer.decode)) == "ok \ufffd"
    broken = [*ids[:-1], ids[0], ids[1]]
    assert "".join(whole_words(iter(broken), tokenizer.decode)) == "ok \ufffdok"


def test_a_word_is_shown_as_soon_as_it_is_complete() -> None:
    tokenizer = make_tokenizer()
    taken: list[int] = []

    def tokens() -> Iterator[int]:
        for token in tokenizer("one two")["input_ids"]:
            taken.append(token)
            yield token

    words = whole_words(tokens(), tokenizer.decode)
    assert next(words) == "one "
    assert len(taken) == 4


# ---- the dialogue ----


def test_a_dialogue_is_kept_and_forgotten(scripted: Script) -> None:
    prompts = scripted("hi", "ok", "yes")
    speaker = make_speaker(system="S")
    assert say(speaker, "A") == "hi"
    assert say(speaker, "B") == "ok"
    speaker.reset()
    assert say(speaker, "C") == "yes"
    assert [text_of(prompt) for prompt in prompts] == [
        "s:S<eos>u:A<eos>a:",
        "s:S<eos>u:A<eos>a:hi<eos>u:B<eos>a:",
        "s:S<eos>u:C<eos>a:",
    ]


def test_without_a_template_a_text_is_continued(scripted: Script) -> None:
    prompts = scripted(" on", " off")
    speaker = make_speaker(template=None)
    assert say(speaker, "go ") + say(speaker, "well") == " on off"
    assert [text_of(prompt) for prompt in prompts] == ["go ", "well"]
    with pytest.raises(LabError, match=r"no chat template.*--system"):
        make_speaker(template=None, system="S")


def test_the_oldest_turns_go_when_the_model_reads_no_more(scripted: Script) -> None:
    """64 positions, 10 of them for the answer: the system message (4) and two turns of 12 and 14 fit."""
    prompts = scripted(*["1234567"] * 4)
    speaker = make_speaker(system="S", max_new_tokens=10)
    notes = []
    for letter in "ABCD":
        notes.append(speaker.ask(letter * 5))
        assert "".join(speaker.answer()) == "1234567"
    turn = "u:{}<eos>a:1234567<eos>"
    assert notes == ["", "", "", "model: forgot the oldest 1 of 3 turns."]
    assert text_of(prompts[2]) == f"s:S<eos>{turn}{turn}u:CCCCC<eos>a:".format("AAAAA", "BBBBB")
    assert text_of(prompts[3]) == f"s:S<eos>{turn}{turn}u:DDDDD<eos>a:".format("BBBBB", "CCCCC")
    assert max(map(len, prompts)) + 10 <= POSITIONS


def test_a_long_question_leaves_less_for_the_answer_or_is_refused(scripted: Script) -> None:
    prompts = scripted("y" * 99, "fine")
    speaker = make_speaker(max_new_tokens=40)
    assert say(speaker, "x" * 50) == "y" * (POSITIONS - 55)
    with pytest.raises(LabError, match="reads 1 to 63 tokens; these are 64"):
        speaker.ask("x" * 59)
    assert speaker.ask("A") == "model: forgot the oldest 1 of 1 turns."
    assert "".join(speaker.answer()) == "fine"
    assert text_of(prompts[1]) == "u:A<eos>a:"


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_was_heard(scripted: Script) -> None:
    prompts = scripted("one two\x03 three", "one two", "ok")
    speaker = make_speaker()
    with pytest.raises(KeyboardInterrupt):
        say(speaker, "A")
    speaker.ask("B")
    answer = speaker.answer()
    assert next(answer) == "one "
    answer.close()
    say(speaker, "C")
    assert text_of(prompts[2]) == "u:A<eos>a:one <eos>u:B<eos>a:one <eos>u:C<eos>a:"


def test_answers_follow_from_seed_and_temperature() -> None:
    def first(**options: Any) -> str:
        return say(make_speaker(max_new_tokens=20, **options), "A")

    assert first(seed=1) == first(seed=1) != first(seed=2)
    assert first(seed=1, temperature=0) == first(seed=2, temperature=0)
    speaker = make_speaker(max_new_tokens=20, seed=1)
    assert say(speaker, "A") == first(seed=1)
    speaker.reset()
    assert say(speaker, "A") != first(seed=1)
    speaker.reset()
    speaker.seed(1)
    assert say(speaker, "A") == first(seed=1)


def test_no_answer_commands_the_terminal(scripted: Script) -> None:
    scripted("red \x1b[31m\x07\ttab\r\nline\x9b")
    assert say(make_speaker(), "A") == "red [31m\ttab\nline"


# ---- the terminal ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models for dialogues, one that continues texts, and one that scores answers."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "other", "plain", "reward")):
        tokenizer = make_tokenizer(None if name == "plain" else TEMPLATE)
        make_model(tokenizer, 8192, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    config = json.loads((root / "reward" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (root / "reward" / "config.json").write_text(json.dumps(config))
    return {path.name: path for path in root.iterdir()}


def run_chat(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([str(argument) for argument in arguments])
    chat(options.run, options)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`typed(line, ...)` is what will be typed, an exception being raised; then input ends."""

    def script(*lines: str | type[BaseException]) -> None:
        left = list(lines)

        def read(prompt: str = "") -> str:
            line = left.pop(0) if left else EOFError
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)

    return script


def test_a_prompt_is_answered_in_plain_text(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "hi", "--max_new_tokens", 12, "--seed", 1)
    run_chat(folders["one"], *options)
    once = capsys.readouterr().out
    run_chat(folders["one"], *options)
    assert capsys.readouterr().out == once
    run_chat(folders["other"], *options)
    other = capsys.readouterr().out
    run_chat(folders["one"], "--against", folders["other"], *options)
    assert capsys.readouterr().out == f"{folders['one']}:\n{once}{folders['other']}:\n{other}"
    assert len(once) > 3


def test_a_conversation_with_commands(
    folders: dict[str, Path],
    scripted: Script,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = scripted("one", "two", "three")
    typed(
        "A",
        "",
        "B",
        "/reset",
        "/seed 5",
        "/seed x",
        "/temperature -1",
        "/temperatur 1",
        "/help",
        "C",
        "/quit",
        "D",
    )
    run_chat(folders["one"])
    assert capsys.readouterr().out.splitlines() == [
        "one",
        "two",
        "Done.",
        "Done.",
        "/seed: 'x' is no number it can be.",
        "/temperature: '-1' is no number it can be.",
        "/temperatur: no such command. Did you mean '/temperature'?",
        *(f"  {usage:<16} {text}" for usage, text in module.COMMANDS.items()),
        "three",
    ]
    assert [text_of(prompt) for prompt in prompts] == [
        "u:A<eos>a:",
        "u:A<eos>a:one<eos>u:B<eos>a:",
        "u:C<eos>a:",
    ]


def test_two_in_a_terminal_have_panels_unless_they_answer_a_script(
    folders: dict[str, Path],
    scripted: Script,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that this is a terminal
    monkeypatch.setenv("COLUMNS", "120")
    prompts = scripted("on", "off", "left", "right")
    typed("go")
    arguments = (folders["plain"], "--against", folders["one"])
    run_chat(*arguments)
    assert any(
        "on" in line and "off" in line and "│" in line for line in capsys.readouterr().out.splitlines()
    )
    assert [text_of(prompt) for prompt in prompts] == ["go", "u:go<eos>a:"]
    run_chat(*arguments, "--prompt", "go")
    assert capsys.readouterr().out == f"{folders['plain']}:\nleft\n{folders['one']}:\nright\n"


def test_commands_reach_every_model() -> None:
    speakers = [make_speaker("one", max_new_tokens=9), make_speaker("other", max_new_tokens=9)]
    for speaker in speakers:
        say(speaker, "A")
    assert module._obey("/temperature 0.5", speakers) == module._obey("/seed 7", speakers) == "Done."
    assert module._obey("/reset", speakers) == "Done."
    assert [(speaker.temperature, speaker.turns) for speaker in speakers] == [(0.5, []), (0.5, [])]
    assert say(speakers[0], "B") == say(speakers[1], "B")


def test_ctrl_c_stops_an_answer_and_twice_leaves(
    folders: dict[str, Path],
    scripted: Script,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = scripted("one two\x03", "three", "four \x03")
    typed("A", "B", KeyboardInterrupt, "/reset", "C", KeyboardInterrupt, "never")
    run_chat(folders["one"])
    assert capsys.readouterr().out.splitlines() == [
        "one ",
        "three",
        "",
        "Ctrl-C again leaves.",
        "Done.",
        "four ",
        "",
    ]
    assert len(prompts) == 3

    typed(KeyboardInterrupt, KeyboardInterrupt, "never")
    run_chat(folders["one"])
    scripted("one \x03two")
    with pytest.raises(KeyboardInterrupt):
        run_chat(folders["one"], "--prompt", "A")


def test_lab_chat_interrupted_has_nothing_to_continue(
    folders: dict[str, Path], scripted: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted("one \x03two")
    assert main(["chat", str(folders["one"]), "--prompt", "A"]) == 130
    assert capsys.readouterr().err == "lab: stopped at once.\n"


def test_a_question_that_is_too_long_is_said_and_the_talk_goes_on(
    folders: dict[str, Path],
    scripted: Script,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted("ok")
    typed("x" * 9000, "A")
    run_chat(folders["one"])
    first, second = capsys.readouterr().out.splitlines()
    assert "reads 1 to 8,191 tokens; these are 9,005" in first
    assert second == "ok"


@pytest.mark.parametrize(("width", "beside"), [(120, True), (80, False)])
def test_two_answer_side_by_side_where_there_is_room(scripted: Script, width: int, beside: bool) -> None:
    scripted("left words here", "right [bold]words[/bold]")
    speakers = [make_speaker("one"), make_speaker("other")]
    for speaker in speakers:
        speaker.ask("A")
    screen = io.StringIO()
    module._side_by_side(speakers, Console(file=screen, force_terminal=True, width=width, height=40))
    lines = screen.getvalue().splitlines()
    assert any("left words here" in line and "right [bold]words[/bold]" in line for line in lines) == beside
    assert any("─ one ─" in line and "─ other ─" in line for line in lines) == beside
    assert [speaker.turns[-1]["content"] for speaker in speakers] == [
        "left words here",
        "right [bold]words[/bold]",
    ]


def test_two_take_turns_word_by_word_and_stop_together(
    scripted: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted("a b c d e f", "1 2 3\x03 4")
    speakers = [make_speaker("one"), make_speaker("other")]
    for speaker in speakers:
        speaker.ask("A")
    with pytest.raises(KeyboardInterrupt):
        module._side_by_side(speakers, Console(file=io.StringIO(), force_terminal=True, width=120))
    assert [speaker.turns[-1]["content"] for speaker in speakers] == ["a b c ", "1 2 "]


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_open", lambda *_: pytest.fail("loaded"))
    with pytest.raises(LabError, match="no language model in it"):
        run_chat(tmp_path)
    with pytest.raises(LabError, match="no language model in it"):
        run_chat(folders["one"], "--against", tmp_path)
    with pytest.raises(LabError, match="is a reward model"):
        run_chat(folders["reward"])
    with pytest.raises(LabError, match="must be a number that is not negative"):
        run_chat(folders["one"], "--temperature", -1)
    with pytest.raises(LabError, match="at least 1"):
        run_chat(folders["one"], "--max_new_tokens", 0)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, rlhf.chat; print({'torch', 'transformers', 'rich.live'} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_in_a_real_terminal(folders: dict[str, Path]) -> None:
    """A question, Ctrl-C while the answer runs, /help, and Ctrl-C twice, which leaves without a traceback."""
    code = (
        "import argparse; from rlhf.chat import add_arguments, chat; parser = argparse.ArgumentParser(); "
        "add_arguments(parser); options = parser.parse_args(); chat(options.run, options)"
    )
    endless = ("--max_new_tokens", "8000", "--temperature", "0")
    command = [sys.executable, "-c", code, str(folders["one"]), *endless]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=REPO,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    os.close(end)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 240
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for("lists the commands.\r\n> ")
        os.write(terminal, b"hello\n")
        wait_for("hello\r\n")
        select.select([terminal], [], [], 240)  # the answer has begun
        process.send_signal(signal.SIGINT)
        wait_for("\r\n> ")
        os.write(terminal, b"/help\n")
        wait_for("forget the dialogue")
        wait_for("\r\n> ")
        time.sleep(1)  # readline shows the prompt a moment before it listens to signals
        process.send_signal(signal.SIGINT)
        wait_for("\r\nCtrl-C again leaves.\r\n> ")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # what Linux says of a terminal that nobody has open any more
            while seen := os.read(terminal, 65536).decode():
                assert "Traceback" not in seen
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
