"""How `lab sync` sends: processes of their own, which hold the run's lock as long as they live.

A W&B file goes by `wandb sync`, with all that belongs to it. Single rows are logged by this module, run as a
program.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.tracking import AXIS_GROUPS, FINISH_SECONDS, unrecorded

if TYPE_CHECKING:
    from lab.sync_rows import Row
    from lab.sync_server import Target
    from lab.sync_source import Part, Source

ROWS_A_SECOND = 100
"""How many a slow server takes; one that takes fewer is given up for this time."""
Handles = Sequence[int]
"""What a sending process inherits to hold the run's lock."""
# Which of the caller's W&B settings the sending processes see: where and how, but not what.
_KEPT = ("BASE_URL", "API_KEY", "IDENTITY_TOKEN_FILE", "CONFIG_DIR", "CACHE_DIR", "X_", "INSECURE")


def send_file(file: Path, target: "Target", handles: Handles) -> str:
    """Sends a W&B file of which no row arrived yet; returns what W&B complained of."""
    # In it W&B keeps from which step on it numbers the rows. Others may have arrived since.
    file.with_name(f"{file.name}.syncstate").unlink(missing_ok=True)
    where = ["--entity", target.entity, "--project", target.project, str(file.absolute())]
    return _call(["wandb", "sync", "--include-synced", "--include-online", *where], handles)


def send_rows(
    source: "Source",
    parts: Sequence["Part"],
    part: "Part",
    rows: list["Row"],
    target: "Target",
    handles: Handles,
) -> str:
    """Logs rows of a part to the end of a run, which is made if need be; returns what W&B complained of."""
    info = source.info
    tags = (info["config"].get("tracking") or {}).get("tags") or []
    config = {**info["config"], **{key: info[key] for key in ("x_axis", "parents", "compute")}}
    # Older rows, sent late, are not what the run ended with.
    last = {key: value for other in parts for row in other.rows for key, value in row.items()}
    summary = {key: value for key, value in last.items() if isinstance(value, int | float | str)}
    message = {
        "init": {
            **{**target._asdict(), "config": config, "tags": tags},
            **{key: info[key] for key in ("name", "group", "job_type")},
        },
        "rows": rows,
        "files": str(part.file.absolute().parent / "files") if part.file else "",
        "summary": {key: summary[key] for key in summary if not key.startswith("_")} | info["summary"],
        "exit_code": int(info["state"] != "finished"),
    }
    return _call(["lab.sync_send"], handles, json.dumps(message))


def _call(module: Sequence[str], handles: Handles, message: str = "") -> str:
    """Runs a Python module that sends something; returns what W&B complained of, if it did."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("WANDB_") or key.removeprefix("WANDB_").startswith(_KEPT)
    }
    with tempfile.TemporaryDirectory(prefix="lab-sync-", ignore_cleanup_errors=True) as scratch:
        done = subprocess.run(
            [sys.executable, "-m", *module],
            input=message.encode(),
            capture_output=True,
            cwd=scratch,  # wandb leaves logs where it is called
            env={**kept, "WANDB_DATA_DIR": scratch},
            pass_fds=handles,
            check=False,
        )
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line.partition("ERROR ")[2] for line in lines if "ERROR " in line]
    return next(iter(errors or (lines[-1:] if done.returncode else [])), "")[:200]


# ---- the process that logs rows ----


def _log_rows(message: Mapping[str, Any]) -> None:
    import wandb

    rows = message["rows"]
    run = wandb.init(
        **message["init"],
        dir=".",
        mode="online",
        resume="allow",
        settings=unrecorded(FINISH_SECONDS + len(rows) / ROWS_A_SECOND),
    )
    run.define_metric("global_step")
    for group in AXIS_GROUPS:
        run.define_metric(group, step_metric="global_step")
    for row in rows:
        run.log(_loggable(row, message["files"]))
    run.summary.update(message["summary"])
    run.finish(exit_code=message["exit_code"])


def _loggable(row: Mapping[str, Any], files: str) -> dict[str, Any]:
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
