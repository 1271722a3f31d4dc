"""Brings runs to W&B and verifies that every row arrived.

`wandb sync` alone says "finished" where the server stored nothing, and where it is run again it appends a
file's rows once more. So nothing is sent here before the server said which rows it has, and nothing counts
as sent before the server shows it:

1. The rows of a run are those of its W&B files (one a session) and those of metrics.jsonl that are in none
   of them: a kill cuts W&B's file off, metrics.jsonl is whole.
2. A file of which the server has no row is sent by `wandb sync`, with all that belongs to it. Of a file that
   was sent in part only the missing rows are logged, to the end of the same run.
3. After each step the server's rows are read and compared, value by value. A run all of whose rows are there
   is noted in synced.json beside W&B's files.

Stopped anywhere and run again, it ends with every row once. A lock, which the sending process inherits, keeps
two of them, or one and a training, from sending at the same time.
"""

import datetime
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lab.errors import LabError
from lab.files import explain_write_errors, write_json
from lab.run import Run
from lab.sync_rows import Row, count, describe, identity, without
from lab.sync_send import Handles, send_file, send_rows
from lab.sync_server import NoServer, Server, Target
from lab.sync_source import Part, Source, find, locked
from lab.tracking import _server_url

SETTLE_SECONDS = 20.0
"""How long it may take until the server shows the rows it received."""


class Outcome(NamedTuple):
    """What became of one run."""

    place: str
    """Its folder or file."""
    verified: bool
    """Whether W&B has all its rows; also if it has none, or was made without W&B on purpose."""
    text: str


def sync(paths: Sequence[Path], *, force: bool = False, disabled: bool = False) -> Iterator[Outcome]:
    """Sends runs to W&B and verifies what arrived, one after the other.

    Args:
        paths: run folders, folders of them, or what lies in a run folder.
        force: ask the server also about runs that were verified and have not changed since.
        disabled: send also the runs that were made with `tracking.wandb=disabled`.

    Raises:
        LabError: a path is wrong, or there is no key or no server; nothing was changed.
    """
    server = Server()
    for folder in find(paths):
        try:
            # A full disk shows anywhere, in the folder for temporary files as well.
            advice = "See to the disk and run it again: no row is sent twice."
            with locked(folder) as handles, explain_write_errors(str(folder), advice):
                if handles is None:
                    raise LabError("skipped: it is running or being sent just now; run it again afterwards")
                source = Source(folder, Run.open(folder).info)
                verified, text = _bring(source, server, handles, force, disabled)
        except NoServer:
            raise
        except LabError as error:
            verified, text = False, str(error).removeprefix(f"{folder}: ")
        yield Outcome(str(folder), verified, text)


class _Seen(NamedTuple):
    """How a run on the server compares with its parts here."""

    missing: list[list[Row]]
    """Of each part."""
    foreign: int
    """Rows on the server that are not here."""
    hidden: int
    """Rows that it counts and does not show: yet, or at all."""

    def __bool__(self) -> bool:
        """Whether every row is there."""
        return not any(self.missing)

    @property
    def trouble(self) -> str:
        """Why nothing may be sent: what is there would be doubled, or cannot be told."""
        missing = sum(map(len, self.missing))
        if self.hidden:
            return (
                f"not sent: the server counts {count(self.hidden)} more than it shows, maybe the {missing} "
                "that seem to be missing; run it again in a few minutes"
            )
        if self.foreign:
            return (
                f"not sent: the server lacks {count(missing)} of this run and has {self.foreign} that are "
                "not here. Is it another copy of the run? Send the whole one, or delete the run at W&B first."
            )
        return ""


def _bring(source: Source, server: Server, handles: Handles, force: bool, disabled: bool) -> tuple[bool, str]:
    """Brings one run, whose lock is held, to the server; whether it is all there, and what to say of it."""
    if source.made_without and not source.record.exists() and not disabled:
        return True, "made without W&B on purpose, not sent; --disabled sends it"
    state = source.state()
    if not force and (record := source.verified(state)):
        return True, f"already there: {record['rows']} (verified {str(record['verified'])[:10]})"
    server.connect()  # before files are read, which takes a while
    parts, damaged = source.parts()
    rows = [row for part in parts for row in part.rows]
    if not rows:
        return True, f"nothing to send: it has no rows{_losses(parts, damaged)}"
    tracked = source.info.get("wandb") or {}
    of_files = next((part.entity for part in parts if part.entity), "")
    entity = tracked.get("entity") or of_files or server.entity()
    target = Target(entity, tracked.get("project") or "deep-rl-lab", source.info["id"])
    # What a resumed run computed anew; an online run has it at the server, too.
    discarded, _ = source.metrics("metrics.discarded.jsonl")

    def look(awaited: int | None = None) -> _Seen:
        """Compares; waits a while for the rows of a part that was just sent."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            shown, counted = server.rows(target)
            there = Counter(map(identity, shown))
            missing = [without(part.rows, there) for part in parts]
            without(discarded, there)
            seen = _Seen(missing, there.total(), max(0, counted - len(shown)))
            waits = seen.hidden or (awaited is not None and missing[awaited])
            if not waits or time.monotonic() > deadline:
                return seen
            time.sleep(min(1.0, SETTLE_SECONDS / 4))

    seen = look()
    sent, problem = not seen, ""
    for number, part in enumerate(parts):
        # A file that is cut off may have been sent only up to the cut: then the rest is logged.
        for attempt in range(1 + part.is_cut):
            if not (missing := seen.missing[number]):
                break
            if seen.trouble:
                return False, seen.trouble
            if sys.stderr.isatty():
                print(f"{source.folder}: sending {count(len(missing))} ...", file=sys.stderr, flush=True)
            if part.file and attempt == 0 and len(missing) == len(part.rows):
                problem = send_file(part.file, target, handles)
            else:
                problem = send_rows(source, parts, part, missing, target, handles)
            seen = look(number)
        if seen.missing[number]:
            there = len(rows) - sum(map(len, seen.missing))
            why = f" (W&B: {problem})" if problem else ""
            return False, f"incomplete: the server has {there} of {len(rows)} rows{why}; run it again"
    if seen.foreign:
        return False, (
            f"not as here: W&B has all {describe(rows)}, and {count(seen.foreign)} more: sent twice by "
            "something else, or from another copy of the run"
        )
    source.record.parent.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    where = {"run": "/".join(target), "server": _server_url()}
    write_json(source.record, {"rows": describe(rows), **where, "verified": now, "files": state})
    what = "sent and verified" if sent else "already there"
    return True, f"{what}: {describe(rows)}{_losses(parts, damaged)}"


def _losses(parts: Sequence[Part], damaged: int) -> str:
    """What was not where it should be, in brackets."""
    notes = []
    if rest := len(parts[-1].rows):
        notes.append(f"{rest} of them from metrics.jsonl")
    if cut := ", ".join(part.file.parent.name for part in parts if part.file and part.is_cut):
        notes.append(f"cut off file: {cut}")
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} lost")
    return f" ({'; '.join(notes)})" if notes else ""
