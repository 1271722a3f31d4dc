"""`lab sync`: what was tracked without W&B goes to W&B, and is read back before anybody calls it done.

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

import argparse
import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lab.errors import LabError, did_you_mean, first_line
from lab.files import explain_write_errors, sha256_file, write_json
from lab.tracking import AXIS_GROUPS, FINISH_SECONDS, _server_url, choose_mode, read_metrics

RECORD = "synced.json"
API_SECONDS = 20
"""How long one answer of the server is waited for."""
SETTLE_SECONDS = 20.0
"""How long it may take until the server shows the rows it received."""
ROWS_A_SECOND = 100
"""How many a slow server takes; one that takes fewer is given up for this time."""
# By default wandb tries for hours. These bound a silent server to minutes; the environment goes first.
_PATIENCE = {
    f"WANDB_X_{part}_{name}": value
    for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for name, value in {
        **{"RETRY_MAX": "5", "RETRY_WAIT_MIN_SECONDS": "1", "RETRY_WAIT_MAX_SECONDS": "10"},
        "TIMEOUT_SECONDS": "300" if part == "FILE_TRANSFER" else "20",
    }.items()
}
# Which of the caller's W&B settings the sending processes see: where and how, but not what.
_KEPT = ("BASE_URL", "API_KEY", "IDENTITY_TOKEN_FILE", "CONFIG_DIR", "CACHE_DIR", "X_", "INSECURE")

Row = dict[str, Any]


class Outcome(NamedTuple):
    """What became of one run."""

    place: str
    """Its folder or file."""
    verified: bool
    """Whether W&B has all its rows; also if it has none, or was made without W&B on purpose."""
    text: str


class _NoServer(LabError):
    """There is nothing to talk to: no other run can be sent either."""


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lab sync`."""
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder of them, or a W&B folder or .wandb file; default: runs",
    )
    parser.add_argument(
        "--force", action="store_true", help="ask W&B also about runs that were verified and did not change"
    )
    parser.add_argument(
        "--disabled", action="store_true", help="send also runs made with tracking.wandb=disabled"
    )


def do(options: argparse.Namespace) -> int:
    """Runs `lab sync`; returns 2 unless W&B has all rows of all runs."""
    outcomes = []
    for outcome in sync(options.runs or [Path("runs")], force=options.force, disabled=options.disabled):
        print(f"{outcome.place}: {outcome.text}", flush=True)
        outcomes.append(outcome)
    missing = sum(not outcome.verified for outcome in outcomes)
    if len(outcomes) > 1:
        print(f"{len(outcomes)} runs: {len(outcomes) - missing} in order, {missing} not")
    return 2 if missing else 0


def sync(paths: Sequence[Path], *, force: bool = False, disabled: bool = False) -> Iterator[Outcome]:
    """Sends runs to W&B and verifies what arrived, one after the other.

    Args:
        paths: run folders, folders of them, W&B folders or files.
        force: ask the server also about runs that were verified and have not changed since.
        disabled: send also the runs that were made with `tracking.wandb=disabled`.

    Raises:
        LabError: a path is wrong, or there is no key or no server; nothing was changed.
    """
    server = _Server()
    for source in _find(paths):
        place = str(source.place)
        try:
            with _lock(source.lock) as handles:
                if handles is None:
                    text = "skipped: it is running or being sent just now; run it again afterwards"
                    outcome = Outcome(place, False, text)
                else:
                    source.open()
                    outcome = _Sender(source, server, handles).run(force, disabled)
        except _NoServer:
            raise
        except LabError as error:
            outcome = Outcome(place, False, str(error).removeprefix(f"{place}: "))
        yield outcome


# ---- this disk ----


@dataclass
class _Source:
    """A run on this disk: a run folder, or W&B's files without one."""

    place: Path
    """The run folder, or the last of the files."""
    id: str = ""
    """Of the files; empty for a run folder."""
    info: dict[str, Any] = field(default_factory=dict)
    """run.json; empty without a run folder."""

    @property
    def files(self) -> list[Path]:
        """W&B's files, one a session, the first one first."""
        folder = self.place.parent.parent if self.id else self.place / "wandb"
        name = self.id or self.info["id"]
        files = {
            path
            for kind in ("offline-run", "run")  # online ones may be incomplete as well
            for path in folder.glob(f"{kind}-*/run-{name}.wandb")
        }
        return sorted(files, key=lambda path: path.parent.name.removeprefix("offline-"))

    @property
    def record(self) -> Path:
        """Where it is noted what was verified."""
        return self.place.parent / RECORD if self.id else self.place / "wandb" / RECORD

    @property
    def lock(self) -> Path:
        return self.place if self.id else self.place / ".lock"

    @property
    def made_without(self) -> bool:
        """Whether whoever started it wanted no W&B."""
        tracked = self.info.get("wandb") or {}
        return tracked.get("mode") == "disabled" and tracked.get("why") == "asked for"

    def open(self) -> None:
        """Reads run.json."""
        if not self.id:
            from lab.run import Run

            self.info = Run.open(self.place).info

    def metrics(self, name: str) -> list[Row]:
        """The rows of one of the run folder's files as W&B knows them."""
        rows = [row for row in read_metrics(self.place / name) if isinstance(row, dict)] if self.info else []
        for row in rows:
            if "_time" in row:
                row["_timestamp"] = row.pop("_time")
        return rows

    def state(self) -> dict[str, list[Any]]:
        """Size and hash of everything that rows come from."""
        paths = [*self.files, *([self.place / "metrics.jsonl"] if self.info else [])]
        top = self.record.parent.parent
        return {
            str(path.relative_to(top)): [path.stat().st_size, sha256_file(path)]
            for path in paths
            if path.exists()
        }


class _Part(NamedTuple):
    """Rows that came from one place."""

    file: Path | None
    """A W&B file; None: metrics.jsonl."""
    rows: list[Row]
    info: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's defaults; nobody writes to it)
    """What W&B's file says of the run, and its config."""
    exit_code: int | None = 0
    """None: the file does not say that its session ended; it is cut off."""


def _find(paths: Sequence[Path]) -> list[_Source]:
    from lab import records

    sources: dict[Path, _Source] = {}
    for path in paths:
        if not path.exists():
            beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
            raise LabError(
                f"{path}: not there.{did_you_mean(path.name, beside)} Name a run folder or a folder of them."
            )
        folders, files = records._find(path)
        found = [_Source(folder) for folder in folders]
        for file in files:
            run = file.absolute().parents[2]  # RUN/wandb/SESSION/run-ID.wandb
            if (run / "run.json").exists():
                found.append(_Source(_shown(run)))
            elif file.suffix == ".wandb":
                found.append(_Source(_shown(file), id=file.stem.removeprefix("run-")))
        if not found:
            raise LabError(f"{path}: no run in it, nor a W&B file. Name a run folder, e.g. runs/pong.")
        for source in found:
            if source.id:
                source.place = (source.files or [source.place])[-1]
            sources.setdefault(source.place.absolute(), source)
    return list(sources.values())


def _shown(path: Path) -> Path:
    """An absolute path as one would type it here."""
    return path.absolute().relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[tuple[int, ...] | None]:
    """Locks a run; yields what a process must inherit to hold the lock too, or None if it is taken."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield ()
        return
    with (
        explain_write_errors(str(path), "lab sync must be able to lock a run: send a copy of it."),
        path.open("rb" if path.suffix == ".wandb" else "ab") as file,
    ):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handles: tuple[int, ...] | None = (file.fileno(),)
        except BlockingIOError:
            handles = None
        yield handles


def _read_parts(source: _Source) -> list[_Part]:
    """Everything that belongs on the server, in the order in which it was logged."""
    from lab import records

    parts = []
    for file in source.files:
        read = records._read_fragment(file)
        if isinstance(read, str):
            parts.append(_Part(file, [], exit_code=None))
        else:
            parts.append(_Part(file, read.rows, {**read.info, "config": read.config}, read.exit_code))
    mirrored = Counter(identity(row) for part in parts for row in part.rows)
    parts.append(_Part(None, _without(source.metrics("metrics.jsonl"), mirrored)))
    return parts


# ---- rows ----


def identity(row: Mapping[str, Any]) -> int:
    """What makes a row this row, however it was kept: its names and values, but W&B's own.

    Numbers count to 12 digits. Nothing (None) is as good as absent. Of an image, film or table it counts
    that there is one.
    """
    from lab.records import flatten

    flat = flatten(row)
    media = tuple(f"{key.removesuffix('_type')}" for key in flat if key.endswith("._type"))
    return hash(
        frozenset(
            (key, _plain(value))
            for key, value in flat.items()
            if value is not None
            and not key.startswith("_")
            and not (key.startswith(media) and not key.endswith("._type"))
        )
    )


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, sort_keys=True)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return str(value)
    if isinstance(value, str) and math.isfinite(number):
        return f"text {value}"
    return f"{number:.12g}"  # as text: not-a-number is equal to itself


def _without(rows: Iterable[Row], there: Counter[int]) -> list[Row]:
    """The rows that are not `there`, as often as they are; those found are taken out of it."""
    missing = []
    for row in rows:
        what = identity(row)
        if there[what] > 0:
            there[what] -= 1
        else:
            missing.append(row)
    return missing


def _describe(rows: Sequence[Row]) -> str:
    steps = [row["global_step"] for row in rows if isinstance(row.get("global_step"), int | float)]
    last = f", last step {steps[-1]}" if steps else ""
    return f"{_count(len(rows))}{last}"


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


# ---- the server ----


class _Target(NamedTuple):
    """A run's name on the server."""

    entity: str
    project: str
    id: str


class _Seen(NamedTuple):
    """How a run on the server compares with the parts here."""

    missing: list[list[Row]]
    """Of each part."""
    foreign: int
    """Rows on the server that are not here."""
    hidden: int
    """Rows that it counts and does not show: yet, or at all."""


class _Server:
    """W&B; asked for the first time when it is needed."""

    def __init__(self) -> None:
        self._api: Any = None

    def connect(self) -> Any:
        """W&B's client.

        Raises:
            LabError: no key, no server, or one that refuses us or does not answer.
        """
        if self._api is not None:
            return self._api
        mode, why = choose_mode("auto")
        if mode != "online":
            asked = why == "asked for"
            why = f"WANDB_MODE is {os.environ.get('WANDB_MODE', mode)!r}" if asked else why
            advice = "Unset it" if asked else "Run `wandb login`, or see to the network"
            raise _NoServer(f"lab sync: {why}. {advice}, then run it again: nothing is lost.")
        for name, value in {"WANDB_SILENT": "true", **_PATIENCE}.items():
            os.environ.setdefault(name, value)
        import wandb

        try:
            self._api = wandb.Api(timeout=API_SECONDS)
        except Exception as error:
            raise _NoServer(f"lab sync: {_says(error)}. Run it again later: nothing is lost.") from error
        return self._api

    def entity(self) -> str:
        """Whose runs they are if nothing else says so."""
        api = self.connect()
        return str(api.settings.get("entity") or api.default_entity)

    def rows(self, target: _Target) -> tuple[list[Row], int]:
        """The rows of a run that the server shows, and how many it counts; none if there is no such run.

        Raises:
            LabError: it did not answer.
        """
        from wandb.apis.public.runs import RunNotFoundError

        api = self.connect()
        try:
            api.flush()  # it remembers what it was told of a run
            run = api.run("/".join(target))
            rows = [dict(row) for row in run.scan_history(use_cache=False)]
            return rows, int(run.historyLineCount or 0)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, RunNotFoundError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                return [], 0
            self._api = None  # the next run sees whether the server is there at all
            raise LabError(f"not verified: {_says(error)}. Run it again: no row is sent twice.") from error


def _says(error: Exception) -> str:
    return f"W&B's server {_server_url()} refuses or does not answer ({first_line(error).rstrip('.')[:160]})"


# ---- one run ----


class _Sender:
    """Brings one run, whose lock is held, to the server."""

    def __init__(self, source: _Source, server: _Server, handles: tuple[int, ...]) -> None:
        self._source, self._server, self._handles = source, server, handles
        self._parts: list[_Part] = []
        self._known: list[Row] = []
        self._target = _Target("", "", "")
        self._problem = ""
        """What W&B complained of last."""

    def run(self, force: bool, disabled: bool) -> Outcome:
        """Sends what is missing and verifies it."""
        source = self._source
        if source.made_without and not source.files and not source.record.exists() and not disabled:
            return self._outcome(True, "made without W&B on purpose, not sent; --disabled sends it")
        state = source.state()
        if not force and (record := _read_record(source.record, state)):
            when = str(record["verified"])[:10]
            return self._outcome(True, f"already there: {record['rows']} (verified {when})")
        self._parts = _read_parts(source)
        rows = [row for part in self._parts for row in part.rows]
        if not rows:
            return self._outcome(True, "nothing to send: it has no rows")
        self._known = source.metrics("metrics.discarded.jsonl")
        self._target = self._choose_target()
        seen = self._look()
        sent = any(seen.missing)
        for number in range(len(self._parts)):
            # A file that is cut off may have been sent only up to the cut: then the rest is logged.
            for attempt in range(2 if self._parts[number].exit_code is None else 1):
                if not seen.missing[number]:
                    break
                if trouble := _trouble(seen):
                    return self._outcome(False, trouble)
                self._send(number, seen.missing[number], by_row=attempt > 0)
                seen = self._look(number)
            if seen.missing[number]:
                break
        if any(seen.missing):
            there = len(rows) - sum(len(missing) for missing in seen.missing)
            why = f" (W&B: {self._problem})" if self._problem else ""
            text = f"incomplete: the server has {there} of {len(rows)} rows{why}; run it again"
            return self._outcome(False, text)
        if seen.foreign:
            return self._outcome(
                False,
                f"not as here: W&B has all {_describe(rows)}, and {_count(seen.foreign)} more: sent twice by "
                "something else, or from another copy of the run",
            )
        record = {"rows": _describe(rows), "run": "/".join(self._target), "server": _server_url()}
        record |= {"verified": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        with explain_write_errors(str(source.record), "The run is at W&B; free some space all the same."):
            source.record.parent.mkdir(exist_ok=True)
            write_json(source.record, {**record, "files": state})
        return self._outcome(
            True, f"{'sent and verified' if sent else 'already there'}: {_describe(rows)}{self._note()}"
        )

    def _outcome(self, verified: bool, text: str) -> Outcome:
        return Outcome(str(self._source.place), verified, text)

    def _note(self) -> str:
        cut = [part.file for part in self._parts if part.file and part.exit_code is None]
        rest = len(self._parts[-1].rows)
        files = ", ".join(file.parent.name for file in cut)
        if rest:
            return f" ({rest} of them from metrics.jsonl{f': cut off file: {files}' if cut else ''})"
        return f" (cut off file: {files}; what was behind the cut is lost)" if cut and self._source.id else ""

    def _choose_target(self) -> _Target:
        tracked = self._source.info.get("wandb") or {}
        files = [part.info for part in self._parts if part.info]
        last = files[-1] if files else {}
        return _Target(
            tracked.get("entity") or last.get("entity") or self._server.entity(),
            tracked.get("project") or last.get("project") or "deep-rl-lab",
            self._source.id or self._source.info["id"],
        )

    def _look(self, awaited: int | None = None) -> _Seen:
        """Compares the server with the parts; waits a while for the rows of one that was just sent."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            shown, counted = self._server.rows(self._target)
            there = Counter(identity(row) for row in shown)
            missing = [_without(part.rows, there) for part in self._parts]
            _without(self._known, there)  # what a resumed run computed anew; an online run has it too
            seen = _Seen(missing, there.total(), max(0, counted - len(shown)))
            waits = seen.hidden or (awaited is not None and seen.missing[awaited])
            if not waits or time.monotonic() > deadline:
                return seen
            time.sleep(min(1.0, SETTLE_SECONDS / 4))

    def _send(self, number: int, missing: list[Row], by_row: bool) -> None:
        """Sends what is missing of a part."""
        part = self._parts[number]
        if sys.stderr.isatty():
            print(f"{self._source.place}: sending {len(missing)} rows ...", file=sys.stderr, flush=True)
        if part.file is not None and len(missing) == len(part.rows) and not by_row:
            self._send_file(part.file)
        else:
            self._send_rows(part, missing)

    def _send_file(self, file: Path) -> None:
        from lab import records

        # In it W&B keeps from which step on it numbers the rows. None of them arrived, others may have since.
        file.with_name(f"{file.name}.syncstate").unlink(missing_ok=True)
        self._call(
            [
                *(records._wandb_command(), "sync", "--include-synced", "--include-online"),
                *("--entity", self._target.entity, "--project", self._target.project, str(file.absolute())),
            ]
        )

    def _send_rows(self, part: _Part, rows: list[Row]) -> None:
        info = self._source.info
        of_file = next((other.info for other in reversed(self._parts) if other.info), {})
        if info:
            config = {**info["config"], **{key: info[key] for key in ("x_axis", "parents", "compute")}}
            about = {key: info[key] for key in ("name", "group", "job_type")}
            about["tags"] = (info["config"].get("tracking") or {}).get("tags") or []
            failed = info["state"] != "finished"
        else:
            config = {key: value for key, value in of_file.get("config", {}).items() if key != "_wandb"}
            about = {"name": of_file.get("display_name"), "group": of_file.get("run_group")}
            about |= {"job_type": of_file.get("job_type"), "tags": of_file.get("tags") or []}
            failed = self._parts[-2].exit_code != 0  # behind it are only metrics.jsonl's rows
        last: Row = {}
        for other in self._parts:
            for row in other.rows:
                last |= row
        message = {
            "init": {**self._target._asdict(), **about, "config": config},
            "rows": rows,
            "files": str(part.file.absolute().parent / "files") if part.file else "",
            # Older rows, sent late, are not what the run ended with.
            "summary": {key: value for key, value in last.items() if isinstance(value, int | float | str)}
            | (info.get("summary") or {}),
            "exit_code": int(failed),
        }
        message["summary"] = {key: value for key, value in message["summary"].items() if key[0] != "_"}
        self._call([sys.executable, "-m", "lab.sync"], json.dumps(message))

    def _call(self, command: list[str], message: str = "") -> None:
        """Runs a sending process, which holds the lock too, and notes what W&B complained of."""
        with tempfile.TemporaryDirectory(prefix="lab-sync-", ignore_cleanup_errors=True) as scratch:
            environment = {
                key: value
                for key, value in os.environ.items()
                if not key.startswith("WANDB_") or key.removeprefix("WANDB_").startswith(_KEPT)
            }
            done = subprocess.run(
                command,
                input=message.encode(),
                capture_output=True,
                cwd=scratch,  # wandb leaves logs where it is called
                env={**environment, "WANDB_DATA_DIR": scratch},
                pass_fds=self._handles,
                check=False,
            )
        lines = done.stderr.decode(errors="replace").splitlines()
        errors = [line.partition("ERROR ")[2] for line in lines if "ERROR " in line]
        if done.returncode and not errors:
            errors = lines[-1:]
        self._problem = errors[0][:200] if errors else ""


def _trouble(seen: _Seen) -> str:
    """Why nothing may be sent to a run: what is there would be doubled, or cannot be told."""
    missing = sum(len(rows) for rows in seen.missing)
    if seen.hidden:
        return (
            f"not sent: the server counts {_count(seen.hidden)} more than it shows, maybe the {missing} that "
            "seem to be missing; run it again in a few minutes"
        )
    if seen.foreign:
        return (
            f"not sent: the server lacks {_count(missing)} of this run and has {seen.foreign} that are not "
            "here. Is it another copy of the run? Send the whole one, or delete the run at W&B first."
        )
    return ""


def _read_record(path: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was verified, if it was this, on this server."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["files"] == state and record["server"] == _server_url() and record["rows"]:
            return record
    return None


# ---- the process that logs rows ----


def _log_rows(message: Mapping[str, Any]) -> None:
    """Logs rows to the end of a run on the server, which is made if it is not there."""
    import wandb

    rows = message["rows"]
    run = wandb.init(
        **message["init"],
        dir=".",
        mode="online",
        resume="allow",
        settings=wandb.Settings(
            init_timeout=60,
            finish_timeout=FINISH_SECONDS + len(rows) / ROWS_A_SECOND,
            finish_timeout_raises=True,
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            # They would be those of this process.
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
    run.define_metric("global_step")
    for group in AXIS_GROUPS:
        run.define_metric(group, step_metric="global_step")
    for row in rows:
        run.log(_loggable(row, message["files"]))
    run.summary.update(message["summary"])
    run.finish(exit_code=message["exit_code"])


def _loggable(row: Row, files: str) -> Row:
    """A row as it was first logged: images, films and tables made again from W&B's copies of them."""
    import wandb

    kept = {key: value for key, value in row.items() if key not in ("_step", "_runtime")}
    for name in [key.removesuffix("._type") for key in row if key.endswith("._type")]:
        about = {key: kept.pop(key) for key in list(kept) if key.startswith(f"{name}.")}
        path = Path(files, str(about.get(f"{name}.path")))
        kind = about[f"{name}._type"]
        if not files or not path.is_file() or kind not in ("image-file", "video-file", "table-file"):
            kept[name] = {key.removeprefix(f"{name}."): value for key, value in about.items()}
        elif kind == "table-file":
            table = json.loads(path.read_text(encoding="utf-8"))
            kept[name] = wandb.Table(columns=table["columns"], data=table["data"])
        else:
            kept[name] = wandb.Image(str(path)) if kind == "image-file" else wandb.Video(str(path))
    return kept


if __name__ == "__main__":
    try:
        _log_rows(json.load(sys.stdin))
        code = 0
    except BaseException as error:
        print(f"ERROR {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)  # W&B's own end would wait for a server that does not answer
