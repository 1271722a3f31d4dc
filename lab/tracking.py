"""One tracker: metrics.jsonl first, Weights & Biases as its mirror.

Every row goes to `metrics.jsonl` before W&B hears of it; whatever happens to W&B (no key, no server, its
service process dead), training goes on and no number is lost. There is never a prompt.
"""

import configparser
import contextlib
import http.client
import json
import math
import netrc
import os
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lab.artifacts import Artifacts
from lab.config import parse_yaml, require
from lab.errors import LabError
from lab.files import explain_write_errors, lines_of, open_own

MODES = ("auto", "online", "offline", "disabled")
AXIS_GROUPS = ("rollout/*", "train/*", "eval/*", "time/*", "objective/*", "media/*")
SWEEP_VARIABLE = "LAB_WANDB_SWEEP"
"""In a run's environment: the W&B sweep it belongs to. WANDB_SWEEP_ID would change the run's id."""
ENDED = "ended"
"""In W&B's summary: finished, interrupted or failed; W&B itself calls the last two the same."""
INTERRUPTED = 255
"""The exit code of a run that was stopped and can be resumed."""
ANSWER_SECONDS = 5.0
"""How long W&B's server may take for the first answer; who takes longer is asked nothing more."""
INIT_SECONDS = 10.0
"""How long W&B may take to begin a run. What follows a failure takes 3 s: less than 20 s are lost in all."""
FINISH_SECONDS = 60
"""How long the end of a run waits for W&B to take the rest of the rows."""
_JSON = {"Content-Type": "application/json"}
_SECRET = re.compile(r"(?i)(api[_-]?key|secret|passw|[_-]token$|^token$|credential|authorization)")

_TOKEN = re.compile(r"^([\w-]+\.)*(eos|bos|pad|unk|sep|cls|mask)_token$")
"""Keys that name a token of a vocabulary."""
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
"""What a variable of the environment is called: no secret, but the place of one."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The mirror in Weights & Biases."""

    wandb: str = "auto"
    """auto: online with a key and a reachable server, else offline; or online, offline, disabled."""
    project: str = "deep-rl-lab"
    entity: str | None = None
    tags: list[str] | None = None
    artifacts: bool = True
    """Send the weights of checkpoints and what stages leave to W&B, too, when online."""

    def __post_init__(self) -> None:
        require(self.wandb in MODES, "tracking.wandb", f"{self.wandb!r} is none of {', '.join(MODES)}")


def scrub(value: Any) -> Any:
    """A copy of a config with the values of secret-looking keys replaced."""
    if isinstance(value, Mapping):
        return {
            key: "<redacted>" if _is_secret(str(key), item) else scrub(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return value


def _is_secret(key: str, value: Any) -> bool:
    if value is None or not _SECRET.search(key) or _TOKEN.match(key):
        return False
    return not (key.endswith("_env") and isinstance(value, str) and _VARIABLE.fullmatch(value))


def scrub_argv(argv: list[str]) -> list[str]:
    """A command line with the values of secret-looking options replaced (`--key=x` and `--key x`)."""
    clean: list[str] = []
    hide_next = False
    for argument in argv:
        key, equals, value = argument.partition("=")
        option = argument.startswith("-")
        secret = option and _is_secret(key.lstrip("-"), value)
        if not option and (hide_next or _holds_secret(argument)):
            clean.append("<redacted>")
        else:
            hide = option and equals and (secret or _holds_secret(value))
            clean.append(f"{key}=<redacted>" if hide else argument)
        hide_next = secret and not equals
    return clean


def _holds_secret(text: str) -> bool:
    """Whether an option's value is a mapping with a secret in it, e.g. `{api_key: abc}`."""
    with contextlib.suppress(LabError):
        value = parse_yaml(text, "") if "{" in text else None
        return scrub(value) != value
    return False


def choose_mode(requested: str) -> tuple[str, str]:
    """The W&B mode to use, and why. Takes at most seven seconds and never asks.

    Raises:
        LabError: `online` was demanded in the config but there is no key or no server.
    """
    mode = requested if requested != "auto" else os.environ.get("WANDB_MODE", "auto")
    mode = "offline" if mode == "dryrun" else mode  # W&B's older name for it
    if mode in ("offline", "disabled"):
        return mode, "asked for"
    problem = _server_problem(_server_url())
    if not problem:
        return "online", "a key and a reachable server"
    if requested == "online":
        raise LabError(
            f"tracking.wandb = 'online': {problem}. Run `wandb login`, or use --tracking.wandb=auto, "
            "which goes offline by itself."
        )
    return "offline", problem


def _server_problem(address: str) -> str:
    """What is wrong with the key for a W&B server, or with the server; empty: nothing."""
    url = urllib.parse.urlparse(address)
    try:
        host, port = url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)
    except ValueError as error:
        return f"W&B's base URL {address!r} is no address ({error})"
    if not _has_key(host):
        return f"no W&B key for {host}"
    server = f"W&B's server {host}:{port}"
    try:
        if url.scheme not in urllib.request.getproxies():  # which may know the way where nothing here does
            socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return f"{server} cannot be reached ({error.strerror or error})"
    # What is asked needs no key. A port that is open says little: tunnels take connections for dead servers.
    query = json.dumps({"query": "query ServerFeaturesQuery { serverInfo { features { name } } }"}).encode()
    asked = urllib.request.Request(f"{address.rstrip('/')}/graphql", query, _JSON)
    try:
        with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError:
        return ""  # it is there; what it does not like, its own client finds out
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"{server} takes connections and does not answer within {ANSWER_SECONDS:g} s"
        if not isinstance(reason, ssl.SSLCertVerificationError):  # W&B's client knows other certificates
            return f"{server} does not answer as one ({_brief(error)})"
    return ""


def _server_url() -> str:
    """WANDB_BASE_URL, else what `wandb login --host` saved, else W&B's own."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    saved = configparser.ConfigParser(interpolation=None)
    # RuntimeError: nobody's home
    with contextlib.suppress(OSError, RuntimeError, configparser.Error, UnicodeDecodeError):
        saved.read(folder.expanduser() / "settings", encoding="utf-8")
    return (
        os.environ.get("WANDB_BASE_URL")
        or saved.get("default", "base_url", fallback="")
        or "https://api.wandb.ai"
    )


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class Tracker:
    """Writes a run's metrics and mirrors them to W&B.

    Args:
        folder: the run folder.
        config: the resolved config; secrets are scrubbed before W&B sees it.
        mode: "online", "offline" or "disabled", from `choose_mode`.
        identity: keyword arguments for `wandb.init`: project, entity, id, name, group, job_type, tags.
        init_seconds: how long W&B may take to begin.
        finish_seconds: how long `finish` waits for a slow or dead server.

    `problem` says why `mode` is not the one asked for; it is empty if it is.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        mode: str,
        identity: Mapping[str, Any],
        init_seconds: float = INIT_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self.problem = ""
        self._init_seconds = init_seconds
        self._finish_seconds = finish_seconds
        self._path = folder / "metrics.jsonl"
        self._file: IO[str] = open_own(self._path, "a", encoding="utf-8", buffering=1)
        self.mode = mode
        self._wandb: Any = None
        self._artifacts: Artifacts | None = None
        self._owns_data_dir = False
        self._checkpoint_name = f"{identity.get('name')}-{identity.get('id')}"
        if mode != "disabled":
            self._start_wandb(folder, config, identity)
        if self.mode == "online" and (config.get("tracking") or {}).get("artifacts", True):
            # Offline, W&B would only copy them, and it knows no other run.
            self._artifacts = Artifacts(self._wandb, folder / "wandb" / "uploads", self._warn)

    def _start_wandb(self, folder: Path, config: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        # Staged artifacts and caches stay inside the run folder: a run is a folder.
        self._owns_data_dir = "WANDB_DATA_DIR" not in os.environ
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        os.environ.setdefault("WANDB_SILENT", "true")
        # W&B is told what is trained, and not how its client fares: at the end of a process that takes 15 s
        # where a server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        argv = sys.argv
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                sys.argv = scrub_argv(argv)  # wandb records the command line
                self._wandb = wandb.init(
                    **identity,
                    config=scrub(dict(config)),
                    dir=str(folder),
                    mode=mode,  # type: ignore[arg-type]
                    resume="allow",
                    settings=wandb.Settings(
                        init_timeout=self._init_seconds,
                        finish_timeout=self._finish_seconds,  # by default it waits for ever
                        finish_timeout_raises=True,
                        x_transaction_log_flush_interval=1.0,  # the default loses 15 s to a SIGKILL
                        console="off",
                        disable_git=True,
                        save_code=False,
                        silent=True,
                        sweep_id=os.environ.get(SWEEP_VARIABLE),
                    ),
                )
                self._wandb.define_metric("global_step")
                for group in AXIS_GROUPS:
                    self._wandb.define_metric(group, step_metric="global_step")
                self.mode = mode
                return
            except Exception as error:
                self.problem = f"W&B {mode} is not available ({_brief(error)})"
                self._warn(self.problem)
                with contextlib.suppress(Exception):
                    wandb.teardown()  # else the run id stays "in use"
            finally:
                sys.argv = argv
        self.mode = "disabled"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row at `step`; values are numbers or strings, NaN and infinity included.

        Raises:
            LabError: metrics.jsonl cannot be written.
        """
        row = {"global_step": int(step), **{key: _plain(value) for key, value in values.items()}}
        row["_time"] = time.time()
        with explain_write_errors(str(self._path), "Free some space, then continue with --resume."):
            self._file.write(json.dumps(row) + "\n")
        self._mirror({"_timestamp" if key == "_time" else key: value for key, value in row.items()})

    def log_media(self, step: int, key: str, path: Path) -> None:
        """Mirrors an image or a film that already lies in the run folder."""
        if self._wandb is None:
            return
        try:
            import wandb

            kind = {".mp4": wandb.Video, ".png": wandb.Image}[path.suffix]
            self._mirror({"global_step": int(step), key: kind(str(path))})
        except Exception as error:
            self._lose_wandb(error)

    def log_table(self, step: int, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Mirrors a table that already lies in the run folder."""
        if self._wandb is None:
            return
        try:
            import wandb

            table = wandb.Table(columns=list(columns), data=[[_cell(value) for value in row] for row in rows])
            self._mirror({"global_step": int(step), key: table})
        except Exception as error:
            self._lose_wandb(error)

    def log_checkpoint(self, path: Path, *aliases: str) -> None:
        """Sends the weights of a checkpoint, as W&B's newest version of the run's model; only when online.

        Args:
            path: its folder, in which it may be pruned at once.
            aliases: what the version is called besides `latest`, e.g. "best".
        """
        if self._artifacts is not None:
            self._artifacts.add_checkpoint(self._checkpoint_name, path, aliases)

    def log_artifact(self, name: str, kind: str, path: Path, sha256: str) -> None:
        """Sends a result that stays in the run folder, a file or a folder; only when online.

        Args:
            name: of the artifact, the same for every version of it.
            kind: its W&B type, e.g. "model".
            path: what to send.
            sha256: goes into its metadata; `use_artifact` finds the version by it.
        """
        if self._artifacts is not None:
            self._artifacts.add(name, kind, path, sha256)

    def use_artifact(self, name: str, sha256: str = "") -> None:
        """Tells W&B that this run starts from an artifact; only when online.

        Args:
            name: as it was logged.
            sha256: of the version; without one it is the newest.
        """
        if self._artifacts is not None:
            self._artifacts.use(name, sha256)

    def sync(self) -> int:
        """Forces the rows to disk and returns the length of metrics.jsonl in bytes."""
        with explain_write_errors(str(self._path), "Free some space, then continue with --resume."):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def finish(self, exit_code: int, summary: Mapping[str, Any] | None = None) -> None:
        """Closes the file and the mirror."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._artifacts is not None:
            self._artifacts.finish(self._finish_seconds)
        if self._wandb is not None:
            try:
                ended = {0: "finished", INTERRUPTED: "interrupted"}.get(exit_code, "failed")
                self._wandb.summary.update({**(summary or {}), ENDED: ended})
                self._wandb.finish(exit_code=exit_code)
            except TimeoutError:
                self._warn(
                    f"W&B did not take the rest within {self._finish_seconds:g} s; nothing is lost: "
                    f"`lab sync {self._path.parent}` sends it later"
                )
                self._wandb = None
            except Exception as error:
                self._lose_wandb(error)
        if self._artifacts is not None:
            self._artifacts.clear()
        if self._owns_data_dir:
            os.environ.pop("WANDB_DATA_DIR", None)  # the next stage has a folder of its own

    def _mirror(self, row: dict[str, Any]) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log(row)  # never with step=: wandb drops rows whose step went down
        except Exception as error:
            self._lose_wandb(error)

    def _lose_wandb(self, error: Exception) -> None:
        self._wandb = None
        self._warn(f"W&B stopped ({_brief(error)}); metrics.jsonl goes on")

    @staticmethod
    def _warn(line: str) -> None:
        print(f"lab: {line}", file=sys.stderr, flush=True)


def rewind(path: Path, length: int) -> None:
    """Cuts metrics.jsonl back to `length` bytes, where the checkpoint was taken.

    The rows behind it are computed again by the resumed run; they are kept in metrics.discarded.jsonl
    all the same, so that no number is ever lost.
    """
    if not path.exists():
        return
    with (
        explain_write_errors(str(path), "Free some space, then continue with --resume."),
        open_own(path, "r+b") as file,
    ):
        size = file.seek(0, os.SEEK_END)
        file.seek(min(length, size))
        if size > length:
            with open_own(path.with_name("metrics.discarded.jsonl"), "ab") as aside:
                shutil.copyfileobj(file, aside)
                file.seek(size - 1)
                aside.write(b"" if file.read() == b"\n" else b"\n")
            file.truncate(length)


def unrecorded(finish_seconds: float) -> Any:
    """W&B's settings for a run that tells of something else than the process it is logged by."""
    import wandb

    return wandb.Settings(
        init_timeout=60,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        console="off",
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a half-written last line (a run killed just then) is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in lines_of(path):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def _cell(value: Any) -> Any:
    """A table's value: numbers and texts as they are, conversations as text."""
    return value if isinstance(value, int | float | str) or value is None else json.dumps(value)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    # JSON proper has no NaN; strings survive every reader, and W&B shows them the same way.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _brief(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160]}" if first else type(error).__name__
