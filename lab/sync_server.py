"""What W&B's server has of a run."""

import os
from typing import Any, NamedTuple

from lab.errors import LabError, first_line
from lab.sync_rows import Row
from lab.tracking import _server_url, choose_mode

API_SECONDS = 20
"""How long one answer of the server is waited for."""
# By default wandb tries for hours. These bound a silent server to minutes; the environment goes first.
_PATIENCE = {
    f"WANDB_X_{part}_{name}": value
    for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for name, value in {
        **{"RETRY_MAX": "5", "RETRY_WAIT_MIN_SECONDS": "1", "RETRY_WAIT_MAX_SECONDS": "10"},
        "TIMEOUT_SECONDS": "300" if part == "FILE_TRANSFER" else "20",
    }.items()
}


class NoServer(LabError):
    """There is nothing to talk to: no run can be sent."""


class Target(NamedTuple):
    """A run's name on the server."""

    entity: str
    project: str
    id: str


class Server:
    """W&B; asked for the first time when it is needed."""

    def __init__(self) -> None:
        self._api: Any = None

    def connect(self) -> Any:
        """W&B's client.

        Raises:
            NoServer: no key, no server, or one that refuses us or does not answer.
        """
        if self._api is not None:
            return self._api
        mode, why = choose_mode("auto")
        if mode != "online":
            asked = why == "asked for"
            why = f"WANDB_MODE is {os.environ.get('WANDB_MODE', mode)!r}" if asked else why
            advice = "Unset it" if asked else "Run `wandb login`, or see to the network"
            raise NoServer(f"{why}. {advice}, then run it again: nothing is lost.")
        for name, value in {"WANDB_SILENT": "true", **_PATIENCE}.items():
            os.environ.setdefault(name, value)
        import wandb

        try:
            self._api = wandb.Api(timeout=API_SECONDS)
        except Exception as error:
            raise NoServer(f"{_says(error)}. Run it again later: nothing is lost.") from error
        return self._api

    def entity(self) -> str:
        """Whose runs they are if nothing else says so."""
        api = self.connect()
        return str(api.settings.get("entity") or api.default_entity)

    def rows(self, target: Target) -> tuple[list[Row], int]:
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
