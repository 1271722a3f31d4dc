"""A collection goes on wherever it was stopped, ends with the same bytes, and loses nothing it had."""

import dataclasses
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.progress import Progress
from rlhf.collect import Row, Summary, answers_of, collect, read_rankings, summary
from rlhf.data import pairs_of
from rlhf.labelers import Answer, Prompt, Quit, Ranking, Skip, Undo, make
from rlhf.labelers.human import Human
from tests.conftest import REPO

WORDS = ("awful", "bad", "fine", "good", "great")


@dataclasses.dataclass
class Scripted:
    """A labeler that ranks by length, shortest first, unless told otherwise for the next calls."""

    name: str = "scripted"
    interactive: bool = False
    said: list[Any] = dataclasses.field(default_factory=list)
    asked: list[Any] = dataclasses.field(default_factory=list)

    def rank(self, prompt: Prompt, answers: Sequence[Answer]) -> Ranking:
        self.asked.append(prompt)
        said = self.said.pop(0) if self.said else None
        if isinstance(said, Exception):
            raise said
        lengths = [len(answer.text) for answer in answers]
        return said or Ranking([sorted(set(lengths)).index(length) + 1 for length in lengths])


def sample(prompts: list[Any], k: int, seeds: list[int]) -> list[list[Answer]]:
    """Answers that tell by their length which they are."""
    return [[Answer("x" * (1 + j), j % 2 == 0) for j in range(k)] for _ in prompts]


def run(folder: Path, prompts: Sequence[Prompt] = ("p0", "p1", "p2"), **changes: Any) -> Summary:
    arguments: dict[str, Any] = {"sample": sample, "labeler": Scripted(), "k": 3, "seed": 0, "batch_size": 2}
    return collect(folder, prompts, **{**arguments, **changes})


def rankings(folder: Path) -> list[Row]:
    return read_rankings(folder / "rankings.jsonl")


def preferences(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refuses(folder: Path, *arguments: Any, **changes: Any) -> str:
    with pytest.raises(LabError) as caught:
        run(folder, *arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is written ----


def test_the_two_files_by_hand(tmp_path: Path) -> None:
    labeler = Scripted(said=[Ranking([2, 1, 2], [0.25, 1.0, 0.25])])
    result = run(tmp_path / "new" / "folder", ["p0"], labeler=labeler)
    [row] = rankings(tmp_path / "new" / "folder")
    seed, shown = row.pop("seed"), row.pop("shown")
    assert 0 <= seed < 2**31
    best = shown[1]
    ranks = [1 if index == best else 2 for index in range(3)]
    assert row == {
        "prompt": "p0",
        "completions": ["x", "xx", "xxx"],
        "ranks": ranks,
        "scores": [1.0 if index == best else 0.25 for index in range(3)],
        "finished": [True, False, True],
        "source": "scripted",
    }
    texts, ended = ["x", "xx", "xxx"], [True, False, True]
    assert preferences(tmp_path / "new" / "folder") == [
        {
            **{"prompt": "p0", "chosen": texts[best], "rejected": texts[other]},
            **{"chosen_finished": ended[best], "rejected_finished": ended[other], "source": "scripted"},
        }
        for other in range(3)
        if other != best
    ]
    assert result == Summary(
        prompts=1,
        pairs=2,
        ties=1,
        all_tied=0,
        skipped=0,
        earlier_won=0.5,
        mean_score=0.5,
        answers_per_second=result.answers_per_second,
    )
    assert result.answers_per_second is not None
    assert result.answers_per_second > 0


def test_a_conversation_stays_one_as_trl_wants_it(tmp_path: Path) -> None:
    prompt: Prompt = [{"role": "user", "content": "Hello \N{SNOWMAN}"}]
    run(tmp_path, [prompt], k=2)
    [row] = rankings(tmp_path)
    assert row["prompt"] == prompt
    assert row["completions"][1] == [{"role": "assistant", "content": "xx"}]
    assert answers_of(row) == [Answer("x", True), Answer("xx", False)]
    [pair] = preferences(tmp_path)
    assert pair["prompt"] == prompt
    assert pair["chosen"] == [{"role": "assistant", "content": "x"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "xx"}]


def test_trl_takes_the_preferences(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.data_utils import is_conversational

    run(tmp_path / "plain", ["p0", "p1"])
    run(tmp_path / "chat", [[{"role": "user", "content": "p0"}]])
    for name in ("plain", "chat"):
        rows = Dataset.from_list(preferences(tmp_path / name))
        assert {"prompt", "chosen", "rejected"} <= set(rows.column_names)
        assert is_conversational(rows[0]) == (name == "chat")


def test_every_prompt_has_a_seed_of_its_own_that_its_batch_does_not_change(tmp_path: Path) -> None:
    seen: dict[int, list[int]] = {}
    for batch_size in (1, 2, 3, 8):

        def noting(prompts: list[Any], k: int, seeds: list[int], size: int = batch_size) -> Any:
            seen.setdefault(size, []).extend(seeds)
            return sample(prompts, k, seeds)

        run(tmp_path / str(batch_size), sample=noting, batch_size=batch_size)
    assert seen[1] == seen[2] == seen[3] == seen[8] == [row["seed"] for row in rankings(tmp_path / "1")]
    assert len(set(seen[1])) == 3
    run(tmp_path / "other", seed=1)
    assert not {row["seed"] for row in rankings(tmp_path / "other")} & set(seen[1])


def test_answers_all_ranked_alike_yield_no_pair_and_are_counted(tmp_path: Path) -> None:
    def same(prompts: list[Any], k: int, seeds: list[int]) -> list[list[Answer]]:
        return [[Answer("the same")] * k for _ in prompts]

    result = run(tmp_path, sample=same)
    assert (result.prompts, result.pairs, result.ties, result.all_tied) == (3, 0, 9, 3)
    assert [row["completions"] for row in rankings(tmp_path)] == [["the same"] * 3] * 3
    assert preferences(tmp_path) == []


def test_a_prompt_without_opinion_is_kept_counted_and_not_asked_again(tmp_path: Path) -> None:
    result = run(tmp_path, labeler=Scripted(said=[None, Skip("cannot be read"), None]))
    assert (result.prompts, result.skipped, result.pairs, result.ties, result.all_tied) == (3, 1, 6, 0, 0)
    row = rankings(tmp_path)[1]
    assert row["skipped"] == "cannot be read"
    assert list(pairs_of(row)) == []
    again = Scripted()
    assert run(tmp_path, labeler=again).skipped == 1
    assert again.asked == []


def test_a_collection_may_grow(tmp_path: Path) -> None:
    run(tmp_path / "grown", ["p0", "p1", "p2"])
    labeler = Scripted()
    run(tmp_path / "grown", ["p0", "p1", "p2", "p3", "p4"], labeler=labeler)
    assert labeler.asked == ["p3", "p4"]
    run(tmp_path / "whole", ["p0", "p1", "p2", "p3", "p4"])
    assert contents(tmp_path / "grown") == contents(tmp_path / "whole")


def test_progress_is_counted_in_answers_from_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, ["p0"])
    progress, seen = Progress(1), []
    monkeypatch.setattr(progress, "begin", lambda start, total: seen.append((start, total)))
    monkeypatch.setattr(progress, "update", seen.append)
    run(tmp_path, progress=progress)
    assert seen == [(3, 9), 6, 9]


def test_no_prompts_is_an_empty_collection(tmp_path: Path) -> None:
    assert run(tmp_path, []) == dataclasses.replace(summary([]), answers_per_second=0.0)
    assert contents(tmp_path) == {"rankings.jsonl": b"", "preferences.jsonl": b""}


# ---- stopped and continued ----

CHILD = """
import os, random, signal, sys, time
from pathlib import Path
from rlhf.collect import collect
from rlhf.labelers import Answer, make

folder, moment, call, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
words = "the pizza was awful bad fine good great , and but".split()
prompts = [f"review {i}" if i % 3 else [{"role": "user", "content": f"review {i}"}] for i in range(23)]
calls = 0

def killing(name, real):
    def counted(*arguments, **options):
        global calls
        calls += name == moment
        if name == moment and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return counted

def sample(prompts, k, seeds):
    "Every answer depends on the whole batch, as it does where padding changes the last bits."
    time.sleep(seconds)
    draw = random.Random(repr((prompts, seeds)))
    return [
        [Answer(" ".join(draw.choices(words, k=6)), draw.random() < 0.8) for _ in range(k)] for _ in prompts
    ]

os.fsync, os.replace = killing("fsync", os.fsync), killing("replace", os.replace)
labeler = make({"name": "vader", "unfinished_penalty": 0.1})
result = collect(folder, prompts, killing("sample", sample), labeler, k=4, seed=5, batch_size=4)
print(result.prompts, result.pairs, result.stopped or "done")
"""


def start(folder: Path, moment: str = "", call: int = 0, seconds: float = 0.0) -> "subprocess.Popen[str]":
    arguments = [str(folder), moment, str(call), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ending(child: "subprocess.Popen[str]") -> tuple[int, str]:
    out, error = child.communicate(timeout=60)
    assert error == ""
    return child.returncode, out.strip()


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("never_stopped")
    code, said = ending(start(folder))
    assert code == 0
    assert said.startswith("23 ")
    assert said.endswith("done")
    found = contents(folder)
    assert found["rankings.jsonl"].count(b"\n") == 23
    assert found["preferences.jsonl"].count(b"\n") > 23
    return found


@pytest.mark.parametrize(
    ("moment", "call", "rows"),
    [
        ("sample", 1, 0),
        ("fsync", 2, 1),  # the first one is the folder's
        ("fsync", 7, 6),  # within a batch
        ("sample", 3, 8),
        ("fsync", 24, 23),
        ("fsync", 25, 23),  # the preferences, written aside
        ("replace", 1, 23),
    ],
)
def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    tmp_path: Path, never_stopped: dict[str, bytes], moment: str, call: int, rows: int
) -> None:
    assert ending(start(tmp_path, moment, call)) == (-signal.SIGKILL, "")
    assert len(rankings(tmp_path)) == rows
    assert ending(start(tmp_path))[0] == 0
    assert contents(tmp_path) == never_stopped


def test_killed_again_and_again_it_gets_there(tmp_path: Path, never_stopped: dict[str, bytes]) -> None:
    """From outside, at moments nobody chose; each time it has gone on by some batches."""
    path, kills = tmp_path / "rankings.jsonl", 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        child = start(tmp_path, seconds=0.02)
        while child.poll() is None and (path.stat().st_size if path.exists() else 0) < before + 1500:
            time.sleep(0.001)
        child.kill()
        code, _ = ending(child)
        if code == 0:
            break
        kills += 1
    assert kills >= 2
    assert contents(tmp_path) == never_stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_with_the_pairs_so_far(
    tmp_path: Path, never_stopped: dict[str, bytes], number: signal.Signals
) -> None:
    child = start(tmp_path, seconds=0.3)
    deadline = time.monotonic() + 30
    while not (tmp_path / "rankings.jsonl").exists() or len(rankings(tmp_path)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    code, said = ending(child)
    assert code == 0
    done = rankings(tmp_path)
    assert 4 <= len(done) < 23
    assert preferences(tmp_path) == [pair for row in done for pair in pairs_of(row)]
    assert said == f"{len(done)} {len(preferences(tmp_path))} {number.name}"
    assert ending(start(tmp_path))[0] == 0
    assert contents(tmp_path) == never_stopped


def test_a_signal_between_writing_a_row_and_noting_it_loses_no_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def interrupted(handle: int) -> None:
        nonlocal calls
        calls += 1
        real(handle)
        if calls == 3:  # the folder, the first row, the second
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", interrupted)
    result = run(tmp_path)
    assert (result.prompts, result.pairs, result.stopped) == (2, 6, "SIGTERM")
    assert len(preferences(tmp_path)) == 6


def test_the_handlers_of_signals_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_last_line_half_written_is_made_again_wherever_it_was_cut(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    whole = (tmp_path / "whole" / "rankings.jsonl").read_bytes()
    ends = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in sorted({*range(0, len(whole), 17), *ends, *(end + 1 for end in ends)}):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "rankings.jsonl").write_bytes(whole[:length])
        assert len(rankings(folder)) == whole[:length].count(b"\n")
        run(folder)
        assert contents(folder) == contents(tmp_path / "whole"), f"cut at byte {length}"


def test_a_last_line_that_a_power_cut_emptied_is_made_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    *lines, last = before["rankings.jsonl"].splitlines(keepends=True)
    (tmp_path / "rankings.jsonl").write_bytes(b"".join(lines) + bytes(len(last) - 1) + b"\n")
    run(tmp_path)
    assert contents(tmp_path) == before


def test_a_labeler_that_cannot_go_on_leaves_what_was_ranked(tmp_path: Path) -> None:
    labeler = Scripted(said=[None, LabError("the judge is gone")])
    assert refuses(tmp_path, labeler=labeler) == "the judge is gone"
    assert len(rankings(tmp_path)) == 1
    assert len(preferences(tmp_path)) == 3
    run(tmp_path)
    run(tmp_path.parent / "whole")
    assert contents(tmp_path) == contents(tmp_path.parent / "whole")


FULL_DISK = """
import resource, sys
from pathlib import Path
from lab.errors import LabError
from tests.rlhf.test_collect import run

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # as on a full disk
try:
    run(Path(sys.argv[1]))
except LabError as error:
    print(error)
    raise SystemExit(2)
"""


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_full_disk_is_one_clear_line_and_what_was_ranked_stays(tmp_path: Path, share: float) -> None:
    """The rankings do not fit, or (with all of their size) the preferences, which are longer."""
    run(tmp_path / "whole")
    limit = int(share * (tmp_path / "whole" / "rankings.jsonl").stat().st_size)
    folder = tmp_path / "full"
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(folder), str(limit)]
    # There, so that the child finds `tests`.
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert (result.returncode, result.stderr) == (2, "")
    name = "preferences.jsonl" if share == 1.0 else "rankings.jsonl"
    assert result.stdout == (
        f"{folder / name}: cannot be written: File too large. "
        "What was ranked before is kept. Free some space, then start again: it continues.\n"
    )
    assert len(rankings(folder)) == int(share * 3)
    assert not list(folder.glob(".*"))
    run(folder)
    assert contents(folder) == contents(tmp_path / "whole")


# ---- what is not this collection ----


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": ["p0", "other", "p2"]}, "line 2: made with another prompt: 'p1', now 'other'."),
        ({"prompts": ["p0"]}, "holds 3 rankings, but only 1 prompts are given."),
        ({"k": 4}, "line 1: made with another number of answers: '3', now '4'."),
        ({"seed": 1}, "line 1: made with another seed: "),
        ({"labeler": Scripted("else")}, "line 1: made with another labeler: 'scripted', now 'else'."),
        ({"k": 1}, "k = 1: a ranking needs answers to compare."),
    ],
)
def test_another_collection_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    assert complaint in refuses(tmp_path, **changes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [b"{half\n", b"[]\n", b'{"prompt": "p0"}\n', b"\n"])
def test_damage_before_the_last_line_is_named(tmp_path: Path, damage: bytes) -> None:
    run(tmp_path)
    path = tmp_path / "rankings.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"".join(others))
    assert refuses(tmp_path) == f"{path}, line 2: damaged. Restore the file from a copy."
    assert path.read_bytes() == first + damage + b"".join(others)


def test_missing_rankings_are_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"missing\. Name a folder with a collection in it"):
        rankings(tmp_path)


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory. There is no folder" in refuses(tmp_path / "file" / "folder")


def test_two_processes_cannot_write_one_collection(tmp_path: Path) -> None:
    def meanwhile(prompts: list[Any], k: int, seeds: list[int]) -> list[list[Answer]]:
        assert "another process is writing it" in refuses(tmp_path)
        return sample(prompts, k, seeds)

    assert run(tmp_path, sample=meanwhile).prompts == 3


def test_a_sampler_that_breaks_its_word_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample returned \[3, 2\] answers, not 3 for each"):
        run(tmp_path, sample=lambda prompts, k, seeds: [[Answer("a")] * k, [Answer("a")] * 2])


# ---- a person ----


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda lines: monkeypatch.setattr(sys, "stdin", io.StringIO(lines))


def test_undo_asks_again_even_across_a_restart(
    tmp_path: Path, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("u\n1 2 3\n3 2 1\nq\n")
    result = run(tmp_path, labeler=Human())
    assert (result.prompts, result.stopped) == (2, "by the person")
    screen = capsys.readouterr().out
    assert "there is nothing to undo" in screen
    assert "prompt 3 of 3, 1 left" in screen
    assert len(preferences(tmp_path)) == 6, "q keeps everything"
    typed("u\nu\n1=2=3\ns\n2 1 3\n")
    result = run(tmp_path, labeler=Human())
    assert (result.stopped, result.skipped, result.all_tied) == ("", 1, 1)
    *ties, last = rankings(tmp_path)
    assert [row["ranks"] for row in ties] == [[1, 1, 1], [1, 1, 1]]
    assert [last["ranks"][index] for index in last["shown"]] == [2, 1, 3]
    assert [row["prompt"] for row in rankings(tmp_path)] == ["p0", "p1", "p2"]
    assert len(preferences(tmp_path)) == 3


def test_undo_steps_over_what_needed_no_opinion(tmp_path: Path) -> None:
    """p1's answers are all the same: ranked without a question, it would be ranked again at once."""

    def one_same(prompts: list[Any], k: int, seeds: list[int]) -> list[list[Answer]]:
        found = zip(prompts, sample(prompts, k, seeds), strict=True)
        return [[Answer("x")] * k if prompt == "p1" else own for prompt, own in found]

    labeler = Scripted(said=[Ranking([3, 2, 1]), Ranking([1, 1, 1]), Undo()])
    run(tmp_path, sample=one_same, labeler=labeler)
    assert labeler.asked == ["p0", "p1", "p2", "p0", "p1", "p2"]
    assert [row["ranks"] for row in rankings(tmp_path)] == [[1, 2, 3], [1, 1, 1], [1, 2, 3]]


def test_the_end_of_the_input_keeps_everything(tmp_path: Path, typed: Callable[[str], None]) -> None:
    typed("1 2 3\n")
    assert run(tmp_path, labeler=Human()).stopped == "end of input"
    assert len(rankings(tmp_path)) == 1
    assert run(tmp_path / "program", labeler=Scripted(said=[Quit("enough")])).stopped == "enough"


AT_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that the Ctrl-C typed there is a signal here
from pathlib import Path
from rlhf.labelers.human import Human
from tests.conftest import REPO
from tests.rlhf.test_collect import run
result = run(Path(sys.argv[1]), labeler=Human())
print(f"[{result.prompts} done, {result.stopped}]")
"""


def test_at_a_real_terminal_ctrl_c_leaves_at_once_and_keeps_everything(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", AT_A_TERMINAL, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=REPO
    ) as child:
        os.close(terminal)
        screen = b""

        def wait_for(text: bytes) -> None:
            nonlocal screen
            while text not in screen:
                assert select.select([master], [], [], 60)[0], f"{text!r} did not appear after {screen!r}"
                screen += os.read(master, 10_000)
            screen = screen.partition(text)[2]

        wait_for(b"order, best first")
        os.write(master, b"2 1=3\n")
        wait_for(b"prompt 2 of 3, 2 left")
        wait_for(b"order, best first")
        os.write(master, b"3 2 1")
        wait_for(b"3 2 1")  # echoed: the line is being read
        os.write(master, b"\x03")
        wait_for(b"[1 done, SIGINT]")
        child.wait(timeout=30)
    os.close(master)
    assert [row["ranks"] for row in rankings(tmp_path)] == [[2, 1, 2]]
    assert len(preferences(tmp_path)) == 2


def test_vader_ranks_what_it_scores(tmp_path: Path) -> None:
    texts = ["It was great.", "It was awful.", "It was there."]
    result = run(
        tmp_path,
        sample=lambda prompts, k, seeds: [[Answer(text) for text in texts] for _ in prompts],
        labeler=make("vader"),
    )
    for row in rankings(tmp_path):
        assert row["ranks"] == [1, 3, 2]
        assert row["scores"][0] > row["scores"][2] == 0 > row["scores"][1]
    assert result.mean_score == pytest.approx(sum(rankings(tmp_path)[0]["scores"]) / 3)
