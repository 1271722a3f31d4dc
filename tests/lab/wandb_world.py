"""A world in which W&B's client knows nothing of this machine, for whatever a test tells it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.wandb_stand_in import WandbStandIn

KEY = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def wandb_world(home: Path, timeout_seconds: int | None = None) -> Iterator[pytest.MonkeyPatch]:
    """No key, no settings and no home of this machine; W&B's service is gone before and afterwards.

    Args:
        home: an empty folder.
        timeout_seconds: how long the client waits for an answer, and once more; None: as long as it likes.
    """
    before = dict(os.environ)
    end_service()  # it would go on with the settings of the test before
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / ".netrc"))
        if timeout_seconds is not None:
            for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER"):
                # Below one second, and from no retry at all, W&B would make its own defaults.
                for name in ("MAX", "WAIT_MIN_SECONDS", "WAIT_MAX_SECONDS"):
                    patch.setenv(f"WANDB_X_{part}_RETRY_{name}", "1")
                patch.setenv(f"WANDB_X_{part}_TIMEOUT_SECONDS", str(timeout_seconds))
        yield patch
        end_service()
    for name in set(os.environ) - set(before):  # the tracker sets some for the service
        del os.environ[name]


def use(server: WandbStandIn, patch: pytest.MonkeyPatch) -> None:
    """Gives the client a server and a key for it."""
    end_service()  # it remembers the server before
    patch.setenv("WANDB_BASE_URL", server.url)
    patch.setenv("WANDB_API_KEY", KEY)


def end_service() -> None:
    """What happens when a process exits: the service writes the last rows of its log and ends."""
    if "wandb" in sys.modules:
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()
