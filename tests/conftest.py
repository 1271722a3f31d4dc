"""What all tests share: one thread for torch, and the real `lab` command in a world of its own."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share the machine

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import hypothesis.configuration
import pytest

from tests.forks import Fork, Forks

# What a user has set, or has at home, changes no test. This happens before any library looks.
_SETTINGS = ("WANDB_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "ACCELERATE_", "XDG_")
for _name in [name for name in os.environ if name.startswith(_SETTINGS) or name.endswith("_API_KEY")]:
    del os.environ[_name]
for _name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
    os.environ.pop(_name, None)
_HOME = tempfile.TemporaryDirectory(prefix="deep-rl-lab-home-", ignore_cleanup_errors=True)
# matplotlib's list of fonts takes seconds to make: one for all runs of the tests.
_FONTS = f"{tempfile.gettempdir()}/deep-rl-lab-fonts-{os.getuid()}"
os.environ |= {"HOME": _HOME.name, "NETRC": f"{_HOME.name}/.netrc", "MPLCONFIGDIR": _FONTS}
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is on the Hub

hypothesis.configuration.set_hypothesis_home_dir(f"{_HOME.name}/hypothesis")
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
LabStart = Callable[..., Fork]


@pytest.fixture(scope="session", autouse=True)
def _working_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty one: no test meets the runs of who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("cwd")
        patch.chdir(here)
        yield here


@pytest.fixture(autouse=True)
def _leaves_the_working_folder_empty(_working_folder: Path) -> Iterator[None]:
    """Tests write to `tmp_path` alone."""
    yield
    left = list(_working_folder.iterdir())
    for path in left:  # the tests that follow are not to blame
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, f"left in the working folder: {[path.name for path in left]}"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: gzip writes the time into them, and all workers must find the same names."""
    return argname if isinstance(val, bytes) else None


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
    """An environment for the commands that tests run: another empty home, nothing of earlier tests."""
    home = str(tmp_path_factory.mktemp("home"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": home, "NETRC": f"{home}/.netrc", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def forks(lab_environment: dict[str, str]) -> Iterator[Callable[[], Forks]]:
    """The process that commands are forks of; made when it is first asked for."""
    made: list[Forks] = []

    def get() -> Forks:
        made[:] = made or [Forks(lab_environment)]
        return made[0]

    yield get
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def lab_start(forks: Callable[[], Forks], lab_environment: dict[str, str]) -> LabStart:
    """Begins `lab ARGUMENTS` as `subprocess.Popen` would; one at a time, see `tests.forks`."""

    def start(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Fork:
        return forks().start([*map(str, arguments)], cwd, {**lab_environment, **(env or {})})

    return start


@pytest.fixture(scope="session")
def lab_command(forks: Callable[[], Forks], lab_environment: dict[str, str]) -> LabCommand:
    """Runs `lab ARGUMENTS` in a process of its own, with nobody to answer a prompt; see `tests.forks`."""

    def run(
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        preexec_fn: Callable[[], None] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        environment = {**lab_environment, **(env or {})}
        if preexec_fn is None and not {name for name in env or {} if not name.startswith("WANDB_")}:
            return forks().run([*map(str, arguments)], cwd, environment, timeout)
        return subprocess.run(
            [sys.executable, "-m", "lab.cli", *map(str, arguments)],
            cwd=cwd,
            env=environment,
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
