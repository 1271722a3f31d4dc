"""What all tests share: one thread for torch, and the real `lab` command in a world of its own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share the machine

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

# A busy machine is slow, which is no mistake in the code under test.
hypothesis.settings.register_profile(
    "lab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lab")

REPO = Path(__file__).resolve().parent.parent
PONG = REPO / "configs" / "rl" / "pong_cpu.yaml"

TINY = (
    *("--total_steps=512", "--env.n_envs=4", "--agent.rollout_steps=8", "--agent.minibatch_size=16"),
    *("--log_every_steps=64", "--checkpoint.every_steps=128", "--eval.every_steps=512"),
    *("--eval.episodes=1", "--env.max_episode_frames=400", "--film.max_steps=0"),
    *("--device.threads=1", "--env.num_threads=1"),
)
"""Overrides that make of pong_cpu.yaml a run of seconds, with four checkpoints."""

LONGEST = (
    "test_benchmarks",
    "test_runs",
    "test_generators",
    "test_smoke",
    "test_world_model",
    "test_generative",
)
"""Files that take a minute or more: begun first, so that no worker has one left when the others are done."""

LabCommand = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by file, the longest first; within a file nothing changes."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _ordinary_floats() -> Iterator[None]:
    """`lab.device.resolve` makes this process flush denormal numbers, which hypothesis will not have."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def lab_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without W&B settings, and with an empty home: no key is found by accident."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    fonts = environment.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")  # slow to rebuild
    home = str(tmp_path_factory.mktemp("home"))
    return environment | {"HOME": home, "NETRC": f"{home}/.netrc", "MPLCONFIGDIR": fonts, "COLUMNS": "200"}


@pytest.fixture(scope="session")
def lab_command(lab_environment: dict[str, str]) -> LabCommand:
    """Runs `lab ARGUMENTS` in a process of its own, with nobody to answer a prompt."""

    def run(
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        preexec_fn: Callable[[], None] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "lab.cli", *map(str, arguments)],
            cwd=cwd,
            env={**lab_environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=preexec_fn,
        )

    return run


@pytest.fixture(scope="session")
def finished_run(lab_command: LabCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished run of PQN on Pong, trained once. Read it; use `tiny_run` to change it."""
    root = tmp_path_factory.mktemp("finished")
    result = lab_command("train", PONG, "--out", "run", *TINY, "--tracking.wandb=disabled", cwd=root)
    assert result.returncode == 0, result.stderr
    return root / "run"


@pytest.fixture
def tiny_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run` for one test."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
