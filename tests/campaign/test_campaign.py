"""Thousands of inputs that nobody means: refused in a few lines, or right; never a traceback, a hang, or a
change outside of the run's folder. A sample of seconds runs with the other tests, all of it with `-m slow`.
"""

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import config, pipeline
from lab.cli import main
from tests.campaign import damage, mutants
from tests.campaign.harness import Result, Tally, forked, lab, snapshot
from tests.conftest import PONG, TINY
from tests.rlhf.test_refusals import furnish, values

DQN = PONG.with_name("pong_dqn_cpu.yaml")
SAMPLE = 24
"""Cases of each campaign in the ordinary suite."""


def parts(cases: int, of: int, start: int) -> list[Any]:
    """All cases of a campaign, in parts that each end within a test's time: (cases, first seed)."""
    return [
        pytest.param(of, start + done, id=f"all{done // of}", marks=pytest.mark.slow)
        for done in range(0, cases, of)
    ]


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no keys, nobody's home; and torch in one thread, as its threads do not survive a fork."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


def check(tally: Tally, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{tally.report(name)}")
        for fault in tally.faults:
            print(f"  {fault}")
    assert not tally.faults, f"{len(tally.faults)} faults; the first: {tally.faults[0]}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to work in, and beside it one that nobody may touch."""
    (tmp_path / "place").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    for name in ("file", "below/file"):
        (tmp_path / "elsewhere" / name).write_text("not the lab's\n" * 20)
    return tmp_path / "place"


class Guard:
    """Runs commands and sees what they touched outside of the folder they were given."""

    def __init__(self, place: Path) -> None:
        self.place, self.scratch = place, place.parent / "scratch"
        self.before = snapshot(place.parent / "elsewhere")

    def run(self, do: Callable[[], int]) -> tuple[Result, list[str]]:
        result = forked(do, self.place, self.scratch)
        after = snapshot(self.place.parent / "elsewhere")
        touched = sorted({*self.before.items()} ^ {*after.items()})
        touched += [str(path) for path in self.place.parent.iterdir() if path.name not in _OURS]
        return result, [str(one) for one in touched]


_OURS = ("place", "scratch", "elsewhere")


# ---- configs, overrides, sweep files ----


@pytest.mark.parametrize(
    ("cases", "start"),
    [pytest.param(SAMPLE, 0, id="sample"), *parts(2_000, of=200, start=10_000)],
)
def test_configs_that_nobody_means(
    place: Path, cases: int, start: int, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = {}
    for path in mutants.CONFIGS:
        _, settings = pipeline.configured(config.read_yaml(path), {}, str(path))
        resolved[path] = config.to_dict(settings)
    guard, tally = Guard(place), Tally()
    for number in range(start, start + cases):
        draw = random.Random(number)
        kind = draw.random()
        if kind < 0.4:
            base = draw.choice(mutants.CONFIGS)
            words = [mutants.override(draw, resolved[base]) for _ in range(draw.choice([1, 1, 2]))]
            what = [str(base), *words]
        elif kind < 0.8:
            file = place / "config.yaml"
            file.write_text(mutants.file_text(draw, draw.choice(mutants.CONFIGS)), errors="surrogatepass")
            what = [str(file)]
        else:
            file = place / "sweep.yaml"
            file.write_text(mutants.file_text(draw, draw.choice(mutants.SWEEPS)), errors="surrogatepass")

            def read(file: Path = file) -> int:
                from lab import sweep

                sweep.read_sweep(file, {}, None)
                return main(["list", "games"])

            result, touched = guard.run(_as_command(read))
            tally.add(f"{number}: sweep", result, touched)
            continue
        result, touched = guard.run(lab("train", *what, "--print_config"))
        tally.add(f"{number}: {what[1:]}", result, touched)
        if result.code == 0:
            (place / "again.yaml").write_text(result.out)
            again, _ = guard.run(lab("train", "again.yaml", "--print_config"))
            if again.out != result.out:
                tally.faults.append(f"{number}: {what[1:]}: what was printed is not read back as it was")
    check(tally, f"configs from seed {start}", capsys)


def _as_command(do: Callable[[], int]) -> Callable[[], int]:
    """A function whose `LabError` ends it as it ends a command."""

    def run() -> int:
        import lab.cli

        lab.cli._run = lambda arguments: do()
        return lab.cli.main([])

    return run


@pytest.mark.parametrize(
    ("cases", "start"),
    [
        pytest.param(6, 0, id="sample", marks=pytest.mark.slow),
        *parts(150, of=25, start=20_000),
    ],
)
def test_extreme_values_really_run(
    place: Path, cases: int, start: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the config accepts is trained for some seconds and then asked to stop."""
    (place / "cpu.yaml").write_text(PONG.read_text())
    base = ["cpu.yaml", *TINY, "--tracking.wandb=disabled"]
    mlp = _smallest()
    resolved = {}
    for path in (PONG, mlp):
        _, settings = pipeline.configured(config.read_yaml(path), {}, str(path))
        resolved[path] = config.to_dict(settings)
    guard, tally = Guard(place), Tally()
    number = start
    while tally.ends.total() < cases:
        number += 1
        draw = random.Random(number)
        if draw.random() < 0.5:
            word, arguments = mutants.override(draw, resolved[PONG]), base
        else:
            word, arguments = mutants.override(draw, resolved[mlp]), [str(mlp), "--tracking.wandb=disabled"]
        tried, _ = guard.run(lab("train", *arguments, word, "--print_config"))
        if tried.code != 0:
            continue
        shutil.rmtree(place / "run", ignore_errors=True)
        result, touched = guard.run(_stopped_after(4.0, "train", *arguments, word, "--out=run"))
        tally.add(f"{number}: {word[:120]}", result, touched)
    check(tally, f"values that really run from seed {start}", capsys)


def _stopped_after(seconds: float, *arguments: str) -> Callable[[], int]:
    def do() -> int:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
        code = main(arguments)
        return 0 if code in (143, 255) else code

    return do


# ---- folders ----


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind."""
    root, scratch = (tmp_path_factory.mktemp(name) for name in ("theirs", "scratch"))
    for name, (begin, _) in _pipelines(root).items():
        result = forked(lab(*[word.replace("RUN", name) for word in begin]), root, scratch)
        assert result.code == 0, f"{name}: {result.err}"
    return {name: root / name for name in COMMANDS}


def _smallest() -> Path:
    return next(path for path in mutants.CONFIGS if path.stem == "mlp_digits")


COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "pqn": (
        ("evaluate", "RUN", "--episodes=1", "--json"),
        ("play", "RUN", "--max_steps=3"),
        ("export", "RUN"),
        ("train", "RUN", "--resume"),
    ),
    "dqn": (
        ("train", "RUN", "--resume"),
        ("evaluate", "RUN", "--episodes=1"),
        ("export", "RUN", "--checkpoint=latest"),
    ),
    "supervised": (("evaluate", "RUN"), ("train", "RUN", "--resume"), ("play", "RUN"), ("export", "RUN")),
    "rlhf": (
        ("evaluate", "RUN", "--prompts=1", "--samples=1", "--trust"),
        ("chat", "RUN", "--prompt=a b", "--max_new_tokens=2"),
        ("rlhf", "rlhf.yaml", "--out=RUN", "--trust"),
        ("rlhf", "rlhf.yaml", "--out=RUN", "--trust", "--from=eval"),
    ),
}
ANY: tuple[tuple[str, ...], ...] = (
    ("compare", "RUN", "--metric=eval/mean_reward", "--goal=maximize", "--out=out"),
    ("compare", "RUN", "--metric=eval/loss", "--out=out"),
    ("sync", "RUN"),
)


@pytest.mark.parametrize(
    ("cases", "start"),
    [
        pytest.param(SAMPLE, 0, id="sample", marks=pytest.mark.slow),
        *parts(500, of=100, start=30_000),
    ],
)
def test_folders_that_nobody_left(
    place: Path, theirs: dict[str, Path], cases: int, start: int, capsys: pytest.CaptureFixture[str]
) -> None:
    guard, tally = Guard(place), Tally()
    furnish(place)
    (place / "rlhf.yaml").write_text(yaml.safe_dump(values(data={"comparisons": "collect"})))
    for number in range(start, start + cases):
        draw = random.Random(number)
        name = draw.choice(sorted(theirs))
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.rmtree(place / "out", ignore_errors=True)
        run = Path(shutil.copytree(theirs[name], place / "run", symlinks=True))
        if draw.random() < 0.5 and "--resume" in str(COMMANDS[name]):
            _as_interrupted(run)
        done: list[Any] = []
        for _ in range(draw.choice([1, 1, 1, 2])):
            where = draw.choice([path.parent for path in run.rglob("run.json")] or [run])
            done.append(draw.choice(damage.DAMAGES)(draw, where, place.parent / "elsewhere"))
        words = draw.choice([*COMMANDS[name], *COMMANDS[name], *ANY])
        result, touched = guard.run(_stopped_after(12.0, *[word.replace("RUN", "run") for word in words]))
        tally.add(f"{number}: {name}: {'; '.join(done)}: lab {' '.join(words)}", result, touched)
        _remove(place / "run")
    check(tally, f"run folders from seed {start}", capsys)


def _as_interrupted(run: Path) -> None:
    """Takes the newest checkpoint away, so that there is something left to train."""
    steps = sorted((run / "checkpoints").glob("step_*"))
    for path in steps[1:]:
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    for below in path.rglob("*"):
        if below.is_dir() and not below.is_symlink():
            below.chmod(0o755)
    shutil.rmtree(path, ignore_errors=True)


# ---- faults of the machine ----


def _pipelines(root: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Of each pipeline: how a tiny run begins and how it goes on; the folder is RUN."""
    furnish(root)
    recipe = values(data={"comparisons": "collect"}) | {"seed": 3}
    (root / "rlhf.yaml").write_text(yaml.safe_dump(recipe))
    (root / "mlp.yaml").write_text(_smallest().read_text())
    pqn = ["train", str(PONG), *TINY, "--tracking.wandb=disabled", "--out", "RUN"]
    dqn = [word for word in pqn if "rollout_steps" not in word and "minibatch" not in word]
    dqn[1] = str(DQN)
    dqn += ["--agent.buffer_size=2000", "--agent.learning_starts=100"]
    mlp = ["train", "mlp.yaml", "--epochs=3", "--checkpoint.every_epochs=1", "--tracking.wandb=disabled"]
    rlhf = ["rlhf", "rlhf.yaml", "--out", "RUN", "--trust"]
    return {
        "pqn": (pqn, [*pqn, "--resume"]),
        "dqn": (dqn, [*dqn, "--resume"]),
        "supervised": ([*mlp, "--out", "RUN"], [*mlp, "--out", "RUN", "--resume"]),
        "rlhf": (rlhf, rlhf),
    }


def _weights(run: Path) -> dict[str, bytes]:
    """What a finished run leaves to use: the newest weights of a run, the model of each stage."""
    found = sorted(run.glob("checkpoints/latest/model.safetensors")) + sorted(
        run.glob("*/model/*.safetensors")
    )
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("kills", "seed"),
    [
        pytest.param(4, 0, id="sample", marks=pytest.mark.slow),
        *parts(100, of=20, start=1),
    ],
)
def test_killed_at_any_moment_the_weights_are_the_same(
    place: Path, kills: int, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, tally = random.Random(seed), Tally()
    scratch, done = place.parent / "scratch", 0
    whole: dict[str, tuple[dict[str, bytes], float]] = {}
    pipelines = _pipelines(place)
    names = list(pipelines) if kills > 4 else ["pqn", "supervised"]
    while done < kills:
        name = names[tally.ends.total() % len(names)]
        begin, go_on = pipelines[name]
        if name not in whole:
            run = place / f"{name}_whole"
            result = forked(lab(*[word.replace("RUN", str(run)) for word in begin]), place, scratch)
            assert result.code == 0, result.err
            whole[name] = (_weights(run), result.seconds)
            assert whole[name][0]
        run = place / f"{name}_{done}"
        left = 5  # kills of a run at most, so that each pipeline is reached
        while True:
            words = go_on if (run / "run.json").exists() else begin
            within = draw.uniform(0.05, 1.0) * whole[name][1] if left and done < kills else None
            result = forked(lab(*[word.replace("RUN", str(run)) for word in words]), place, scratch, within)
            done += result.code == -signal.SIGKILL
            if result.code != -signal.SIGKILL:
                break
            left -= 1
        same = _weights(run) == whole[name][0]
        differs = [] if same else [f"other weights than {name} as a whole: {result.err[-300:]!r}"]
        tally.add(f"{name}, {done} kills", result, differs)
        shutil.rmtree(run, ignore_errors=True)
    check(tally, f"{done} kills from seed {seed}", capsys)


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [
        pytest.param(3, 0, id="sample", marks=pytest.mark.slow),
        *parts(40, of=10, start=1),
    ],
)
def test_a_disk_that_is_full_loses_nothing(
    place: Path, sizes: int, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file can grow beyond a size: one line; with room again the run ends as one that always had it."""
    draw, tally = random.Random(seed), Tally()
    scratch, pipelines = place.parent / "scratch", _pipelines(place)
    names = list(pipelines) if sizes > 3 else ["supervised"]
    whole = {}
    for number in range(sizes):
        name = names[number % len(names)]
        begin, go_on = pipelines[name]
        if name not in whole:
            result = forked(lab(*[word.replace("RUN", f"{name}_whole") for word in begin]), place, scratch)
            assert result.code == 0, result.err
            whole[name] = _weights(place / f"{name}_whole")
        # At least what a refusal takes: what a command says goes to files, too.
        run, size = place / f"{name}_{number}", int(10 ** draw.uniform(2.8, 6))
        words = [word.replace("RUN", str(run)) for word in begin]
        result = forked(lab(*words), place, scratch, file_bytes=size)
        tally.add(f"{name} with files of {size:,} bytes at most", result)
        words = [word.replace("RUN", str(run)) for word in (go_on if (run / "run.json").exists() else begin)]
        result = forked(lab(*words), place, scratch)
        finished = result.code == 0 and _weights(run) == whole[name]
        tally.add(f"{name} with room again", result, [] if finished else ["other weights, or none"])
        shutil.rmtree(run, ignore_errors=True)
    check(tally, f"{sizes} full disks from seed {seed}", capsys)


def _without_override(do: Callable[[], int]) -> Callable[[], int]:
    """Lets the permissions of files bind root, too: gives its right to pass over them away (Linux)."""

    def run() -> int:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
        return do()

    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_cannot_be_written(
    place: Path, theirs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What reads a run works or is refused in a line, and what would write there says so."""
    guard, tally = Guard(place), Tally()
    furnish(place)
    (place / "rlhf.yaml").write_text(yaml.safe_dump(values(data={"comparisons": "collect"})))
    shut = place / "shut"
    shut.mkdir()
    for name, source in theirs.items():
        run = Path(shutil.copytree(source, shut / name, symlinks=True))
        if "--resume" in str(COMMANDS[name]):
            _as_interrupted(run)
    before = snapshot(shut)
    _permit(shut, 0o500)
    try:
        for name in theirs:
            for words in (*COMMANDS[name], *ANY):
                words = [word.replace("RUN", f"shut/{name}") for word in words]
                result, touched = guard.run(_without_override(lab(*words)))
                tally.add(f"lab {' '.join(words)}", result, touched)
        for name, (begin, _) in _pipelines(place).items():
            words = [word.replace("RUN", f"shut/new_{name}") for word in begin]
            result, touched = guard.run(_without_override(lab(*words)))
            tally.add(f"lab {' '.join(words)}", result, touched or ["nothing"] * (result.code != 2))
        assert snapshot(shut) == before
    finally:
        _permit(shut, 0o700)
    check(tally, "folders that cannot be written", capsys)


def _permit(folder: Path, mode: int) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(mode)


@pytest.fixture(params=["refuses", "hangs", "hangs up", "answers nonsense"])
def dead_wandb(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a W&B server that is none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param != "refuses":
            server.listen(64)
            threading.Thread(target=_answer, args=(server, request.param), daemon=True).start()
        yield address


def _answer(server: socket.socket, how: str) -> None:
    kept = []
    with contextlib.suppress(OSError):  # closed at the end of the test
        while True:
            client, _ = server.accept()
            kept.append(client)
            if how == "hangs up":
                client.close()
            elif how == "answers nonsense":
                client.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n<html>\x1b\x00\xff"
                )
                client.close()


@pytest.mark.slow
def test_a_wandb_server_that_is_none_costs_no_number(
    place: Path,
    theirs: dict[str, Path],
    dead_wandb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", dead_wandb)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    guard, tally = Guard(place), Tally()
    shutil.copytree(theirs["pqn"], place / "run", symlinks=True)
    begin, _ = _pipelines(place)["pqn"]
    begin = [word.replace("RUN", "new") for word in begin if not word.startswith("--tracking")]
    for words, code in (
        (begin, 0),
        (["sync", "run", "--disabled"], 2),
        (["sync", "new"], 2),
        (["compare", "wandb:a/b", "--metric=eval/mean_reward"], 2),
    ):
        result, touched = guard.run(lab(*words))
        tally.add(f"lab {' '.join(words)}", result, touched or ["nothing"] * (result.code != code))
    assert len(_weights(place / "new")) == len(_weights(theirs["pqn"])) == 1
    assert _weights(place / "new") == _weights(theirs["pqn"])
    check(tally, f"a W&B server that is none: {dead_wandb}", capsys)
