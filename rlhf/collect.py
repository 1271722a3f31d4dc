"""Collecting comparisons: answers are sampled and ranked, prompt by prompt, into two files.

    rankings.jsonl      one row per prompt, appended as it is ranked: prompt, completions, ranks (1 is the
                        best), scores if the labeler gives any, finished, source, seed; and `skipped`, with
                        the reason, where the labeler had no opinion (its ranks are then all 1)
    preferences.jsonl   one row per pair of different rank, in TRL's preference format: prompt, chosen,
                        rejected, chosen_finished, rejected_finished, source

Row i of rankings.jsonl belongs to prompt i, and every prompt has a seed of its own; so the file itself says
where to go on. Nothing depends on how a collection was stopped.
"""

import contextlib
import functools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lab import locks
from lab.errors import LabError
from lab.files import explain_write_errors, open_own, sync_folder, written_aside
from lab.interrupt import SIGNALS
from lab.progress import Progress
from rlhf.data import pairs_of
from rlhf.forms import Row
from rlhf.labelers import Answer, Labeler, Prompt, Quit, Ranking, Scorer, Skip, Undo, completion

RANKINGS = "rankings.jsonl"
PREFERENCES = "preferences.jsonl"

Sampler = Callable[[list[Any], int, list[int]], list[list[Answer]]]
"""`sample(prompts, k, seeds)`: k answers to each prompt, the same whenever all three are the same."""

_NEEDED = {"prompt", "completions", "ranks", "finished", "source", "seed"}
_FREE_SPACE = "What was ranked before is kept. Free some space, then start again: it continues."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a collection holds."""

    prompts: int
    """Prompts done, skipped ones included."""
    pairs: int
    """Rows of preferences.jsonl."""
    ties: int
    """Pairs of answers that were ranked alike."""
    all_tied: int
    """Prompts whose answers were all ranked alike: they yield no pair."""
    skipped: int
    """Prompts the labeler had no opinion on."""
    mean_score: float | None
    """Of all answers; None if the labeler gives no scores."""
    answers_per_second: float | None = None
    """In this session, sampling and ranking together."""
    stopped: str = ""
    """What ended it early: SIGINT, SIGTERM or the labeler's reason; empty if all prompts are done."""


def collect(
    folder: Path,
    prompts: Sequence[Prompt],
    sample: Sampler,
    labeler: Labeler,
    *,
    k: int,
    seed: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Summary:
    """Ranks `k` answers to each prompt; continues what the folder holds of it.

    SIGINT and SIGTERM end it at once: at most the ranking in hand is lost, which the next start makes again.
    With a deterministic labeler a collection that was stopped, even killed, at any moments ends with the
    same bytes as one never stopped. More prompts may be given than before, behind the old ones.

    Args:
        folder: where the two files are, or will be.
        prompts: plain texts or lists of messages.
        sample: makes the answers. It sees the same prompts together whenever it is called, so it need
            only be deterministic in its three arguments, not independent of the batch.
        labeler: ranks them.
        k: answers per prompt.
        seed: decides the seeds that `sample` gets.
        batch_size: prompts per call of `sample`.
        progress: an open one to count the answers in; None opens one, unless somebody is at the terminal.

    Raises:
        LabError: the folder holds another collection, cannot be written or is being written by another
            process; or the labeler cannot go on. The two files hold what was ranked until then.
    """
    if k < 2:
        raise LabError(f"k = {k}: a ranking needs answers to compare. Sample at least 2 per prompt.")
    seeds = [random.Random(f"{seed}/{index}").getrandbits(31) for index in range(len(prompts))]
    began, stopped = time.monotonic(), ""
    with _RankingsFile.opened(folder / RANKINGS) as file:
        done_before = len(file.rows)
        _check_same(file, prompts, seeds, labeler, k)
        for leftover in folder.glob(f".{Path(PREFERENCES).stem}.tmp-*"):  # of one killed while it wrote them
            leftover.unlink(missing_ok=True)
        try:
            with _signals_interrupt():
                _rank_the_rest(file, prompts, seeds, sample, labeler, k, batch_size, progress)
        except (KeyboardInterrupt, Quit) as reason:
            stopped = str(reason) or "SIGINT"
        except Exception:
            with contextlib.suppress(LabError):  # the disk may be full; what went wrong first is the news
                write_preferences(folder)
            raise
        rows = write_preferences(folder)
    speed = k * (len(rows) - done_before) / max(time.monotonic() - began, 1e-9)
    return summary(rows, answers_per_second=speed, stopped=stopped)


def _rank_the_rest(
    file: "_RankingsFile",
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sample: Sampler,
    labeler: Labeler,
    k: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    @functools.lru_cache(maxsize=2)  # two, for an undo may lead back across the border
    def batch(number: int) -> tuple[list[list[Answer]], list[Ranking] | None]:
        """A batch's answers and, from labelers that score, its rankings.

        Batches begin at multiples of batch_size, wherever the collection was stopped: padding changes the
        last bits of what a model computes, and with them now and then an answer.
        """
        part = slice(number * batch_size, (number + 1) * batch_size)
        answers = sample(list(prompts[part]), k, list(seeds[part]))
        if [len(own) for own in answers] != [k] * len(prompts[part]):
            raise ValueError(
                f"sample returned {[len(own) for own in answers]} answers, not {k} for each prompt"
            )
        return answers, labeler.rank_batch(prompts[part], answers) if isinstance(labeler, Scorer) else None

    start, total = k * len(file.rows), k * len(prompts)
    if progress is not None:
        progress.begin(start, total)
    own = Progress(total, start, "answers") if progress is None and not labeler.interactive else None
    with own or contextlib.nullcontext():
        while (done := len(file.rows)) < len(prompts):
            number, index = divmod(done, batch_size)
            answers, rankings = batch(number)
            if labeler.interactive:
                print(f"\nprompt {done + 1} of {len(prompts)}, {len(prompts) - done} left", flush=True)
            try:
                ranking = rankings[index] if rankings else labeler.rank(prompts[done], answers[index])
                row = _row(prompts[done], answers[index], ranking, labeler.name, seeds[done])
            except Skip as reason:
                nothing = Ranking([1] * k)
                row = _row(prompts[done], answers[index], nothing, labeler.name, seeds[done])
                row["skipped"] = str(reason)
            except Undo:
                if not _undo(file):
                    print("  there is nothing to undo", flush=True)
                continue
            file.append(row)
            if shown := progress or own:
                shown.update(k * len(file.rows))


def _undo(file: "_RankingsFile") -> bool:
    """Takes back the last ranking and, before it, those that needed no labeler: all answers the same."""
    while file.rows:
        row = file.rows[-1]
        file.drop_last()
        if len(set(answers_of(row))) > 1:
            return True
    return False


# ---- rows ----


def _row(prompt: Prompt, answers: Sequence[Answer], ranking: Ranking, source: str, seed: int) -> Row:
    return {
        "prompt": prompt,
        "completions": [completion(prompt, answer) for answer in answers],
        "ranks": ranking.ranks,
        **({} if ranking.scores is None else {"scores": ranking.scores}),
        "finished": [answer.finished for answer in answers],
        "source": source,
        "seed": seed,
    }


def answers_of(row: Row) -> list[Answer]:
    """The answers in a row of rankings.jsonl."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in row["completions"]]
    return [Answer(text, finished) for text, finished in zip(texts, row["finished"], strict=True)]


def summary(rows: Sequence[Row], *, answers_per_second: float | None = None, stopped: str = "") -> Summary:
    """Counts what rows of rankings.jsonl hold."""
    ranked = [row["ranks"] for row in rows if "skipped" not in row]
    pairs = sum(1 for row in rows for _ in pairs_of(row))
    scores = [score for row in rows for score in row.get("scores", ())]
    return Summary(
        prompts=len(rows),
        pairs=pairs,
        ties=sum(len(ranks) * (len(ranks) - 1) // 2 for ranks in ranked) - pairs,
        all_tied=sum(len(set(ranks)) == 1 for ranks in ranked),
        skipped=len(rows) - len(ranked),
        mean_score=sum(scores) / len(scores) if scores else None,
        answers_per_second=answers_per_second,
        stopped=stopped,
    )


# ---- files ----


def read_rankings(path: Path) -> list[Row]:
    """The rows of a rankings.jsonl; a half-written last line (a collection killed just then) is left out.

    Raises:
        LabError: the file is missing or damaged.
    """
    if not path.exists():
        raise LabError(f"{path}: missing. Name a folder with a collection in it, or collect one.")
    return [row for row, _ in _parse(path)]


def write_preferences(folder: Path) -> list[Row]:
    """Writes the pairs of a folder's rankings, atomically; returns the rankings.

    It reads them again: a signal may have come between a row's writing and its noting in memory.

    Raises:
        LabError: the one file cannot be read or the other not written.
    """
    rows, path = read_rankings(folder / RANKINGS), folder / PREFERENCES
    with explain_write_errors(str(path), _FREE_SPACE), written_aside(path) as aside, aside.open("wb") as file:
        for row in rows:
            file.writelines(_line(pair) for pair in pairs_of(row))
    return rows


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _parse(path: Path) -> Iterator[tuple[Row, int]]:
    """The rows of a file, each with the offset where its line ends."""
    end = 0
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was being written
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= _NEEDED:
            if number == len(lines):
                return  # a power cut may leave the newline and lose what stood before it
            raise LabError(f"{path}, line {number}: damaged. Restore the file from a copy.")
        end += len(line) + 1
        yield row, end


class _RankingsFile:
    """rankings.jsonl, open to be continued: every row is on disk before the next is begun."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        parsed = list(_parse(path))
        self.rows = [row for row, _ in parsed]
        self._ends = [0, *(end for _, end in parsed)]
        file.truncate(self._ends[-1])

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> "Iterator[_RankingsFile]":
        """Opens the file, or begins one, and keeps other processes from it."""
        with explain_write_errors(str(path), "Choose a folder you may write to."):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer would try again, on closing, what did not fit the disk.
            file = open_own(path, "ab", buffering=0)
            sync_folder(path.parent)
        with file:
            _lock(file, path)
            yield cls(path, file)

    def append(self, row: Row) -> None:
        """Adds a row and forces it to disk.

        Raises:
            LabError: it cannot be written; a part of it may be, which the next start removes.
        """
        line = _line(row)
        with explain_write_errors(str(self.path), _FREE_SPACE):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        self.rows.append(row)
        self._ends.append(self._ends[-1] + len(line))

    def drop_last(self) -> None:
        """Removes the last row."""
        self.rows.pop()
        self._ends.pop()
        self._file.truncate(self._ends[-1])


def _lock(file: IO[bytes], path: Path) -> None:
    if not locks.lock(file):
        raise LabError(f"{path}: another process is writing it. Wait for it, or stop it first.")


def _check_same(
    file: _RankingsFile, prompts: Sequence[Prompt], seeds: Sequence[int], labeler: Labeler, k: int
) -> None:
    """Raises unless the rows there are the beginning of this collection."""
    if len(file.rows) > len(prompts):
        raise LabError(
            f"{file.path}: holds {len(file.rows)} rankings, but only {len(prompts)} prompts are given. "
            "Give all of them, or choose another folder."
        )
    for number, (row, prompt, seed) in enumerate(zip(file.rows, prompts, seeds, strict=False), 1):
        for what, there, here in (
            ("prompt", row["prompt"], prompt),
            ("number of answers", len(row["completions"]), k),
            ("seed", row["seed"], seed),
            ("labeler", row["source"], labeler.name),
        ):
            if there != here:
                raise LabError(
                    f"{file.path}, line {number}: made with another {what}: {str(there)[:80]!r}, now "
                    f"{str(here)[:80]!r}. Continue with what it was begun with, or choose another folder."
                )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise a KeyboardInterrupt that names them; after, they are as before.

    Unlike a training step, a step here may be a person's, who would have to finish it first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
