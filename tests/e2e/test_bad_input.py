"""Bad input to the real command: one line, exit code 2, nothing lost and nothing written.

Every case runs `lab` in a process of its own, in an empty folder and with an empty home.
"""

import json
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import checkpoint
from lab.tracking import read_metrics
from tests.conftest import PONG, TINY, LabCommand

KEY = "0123456789abcdef0123456789abcdef01234567"


def refuse(result: "subprocess.CompletedProcess[str]", *words: str) -> str:
    """Checks that the command refused with one line holding `words`, and returns it."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("lab: ")
    for word in words:
        assert word in line
    return line


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, size and time of everything in a folder but the lock, which a refused resume also takes."""
    stats = {str(path): path.lstat() for path in folder.rglob("*") if path.name != ".lock"}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


# ---- mistakes in the config: found at once, nothing written ----

CONFIG_MISTAKES = {
    "unknown key": (["--agent.gama=0.9"], ["command line: unknown key 'agent.gama'", "'agent.gamma'?"]),
    "wrong type": (["--seed=abc"], ["command line: seed = 'abc' is not valid. Expected int."]),
    "null": (["--total_steps=null"], ["command line: total_steps = None is not valid. Expected int."]),
    "infinite": (["--agent.learning_rate=.inf"], ["agent.learning_rate = inf", "a finite number"]),
    "date": (["--agent.backbone_spec.width=2024-01-02"], ["agent.backbone_spec.width = datetime.date"]),
    "broken YAML": (["--env=[1"], ["command line, --env, line 1: not valid YAML"]),
    "no value": (["--seed"], ["--seed has no value. Write --seed=VALUE; --help shows"]),
    "out of range": (["--agent.gamma=2"], ["command line: agent.gamma: 2.0 must be above 0"]),
    "combination": (["--agent.minibatch_size=60"], ["agent.minibatch_size: 60 does not divide"]),
    "game": (["--env.game=pomg"], ["env.game = 'pomg': no such game. Did you mean 'pong'?"]),
    "backbone": (["--agent.backbone=nature_cn"], ["no such backbone. Did you mean 'nature_cnn'?"]),
    "algorithm": (
        ["--agent.algorithm=pqm"],
        ["command line: agent.algorithm = 'pqm'", "Did you mean 'pqn'?"],
    ),
    "pipeline": (
        ["--pipeline=rll"],
        ["command line: pipeline = 'rll': no such pipeline. Did you mean 'rl'?"],
    ),
    "pipeline list": (["--pipeline=[rl]"], ["pipeline = ['rl']: no such pipeline."]),
    "device": (["--device.device=gpu"], ["device.device: 'gpu' is none of auto, cpu, cuda, mps"]),
    "W&B mode": (["--tracking.wandb=on"], ["tracking.wandb = True is not valid. Expected str."]),
    "resume of nothing": (["--resume"], ["no run to resume. Leave --resume out to start one."]),
}


@pytest.mark.parametrize("case", CONFIG_MISTAKES)
def test_a_mistake_in_the_config_is_one_line_and_nothing_is_written(
    lab_command: LabCommand, tmp_path: Path, case: str
) -> None:
    arguments, words = CONFIG_MISTAKES[case]
    refuse(lab_command("train", PONG, "--out", "run", *arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--agent.buffer_size=1_000_000_000", "takes 1936.0 GB once it is full"),
        ("--agent.replay_device=cuda", "agent.replay_device = 'cuda': the run computes on"),
        ("--env.max_episode_frames=1", "env.max_episode_frames: 1 must be from 4 to"),
    ],
)
def test_a_replay_memory_or_game_that_cannot_be_is_refused(
    lab_command: LabCommand, tmp_path: Path, argument: str, words: str
) -> None:
    config = PONG.with_name("pong_dqn_cpu.yaml")
    refuse(lab_command("train", config, "--out", "run", "--device.device=cpu", argument, cwd=tmp_path), words)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_file_names_the_file(lab_command: LabCommand, tmp_path: Path) -> None:
    for text, words in (
        ("env: {game: pong}\nagent: {gama: 1}", ["bad.yaml: unknown key 'agent.gama'", "'agent.gamma'?"]),
        ("env: {game: pong}\nseed: x", ["bad.yaml: seed = 'x' is not valid. Expected int."]),
        ("env: {game: pong}\npipeline: rll", ["bad.yaml: pipeline = 'rll'"]),
        ("env: {game: [pong", ["bad.yaml, line 1: not valid YAML"]),
        ("- pong", ["bad.yaml: a config is a mapping"]),
        ("", ["bad.yaml: a config is a mapping", "this is empty"]),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        refuse(lab_command("train", "bad.yaml", cwd=tmp_path), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_config_that_is_missing_or_a_folder_is_one_line(lab_command: LabCommand, tmp_path: Path) -> None:
    refuse(lab_command("train", "nope.yaml", cwd=tmp_path), "nope.yaml: no such config file.")
    refuse(lab_command("train", PONG.parent, cwd=tmp_path), f"{PONG.parent}: is a folder, not a config file.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["train"], "required: CONFIG"),
        (["list", "gamess"], "no kind 'gamess'. Did you mean 'games'?"),
        (["list", "--jsn"], "unknown argument '--jsn'"),
        (["evaluate", ".", "--episodes=ten"], "argument --episodes: 'ten' is no whole number of at least 1"),
        (["evaluate", ".", "--episodes=0"], "argument --episodes: '0' is no whole number of at least 1"),
        (["play", ".", "--epsilon=2"], "argument --epsilon: '2' is no probability between 0 and 1"),
        (["play", ".", "--epsilon=nan"], "argument --epsilon: 'nan' is no probability between 0 and 1"),
        (["evaluate", "."], ".: no run: there is no run.json in it."),
        (["play", "nowhere"], "nowhere: no run: there is no run.json in it."),
        (["export", "."], ".: no run: there is no run.json in it."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    lab_command: LabCommand, tmp_path: Path, arguments: list[str], words: str
) -> None:
    refuse(lab_command(*arguments, cwd=tmp_path), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", str(PONG), "--agent.gama=1"], 2),
        (["train", str(PONG), "--seed=abc"], 2),
        (["train", str(PONG), "--env.game=pomg"], 2),
        (["train", str(PONG), "--agent.backbone=nature_cn"], 2),
        (["train", str(PONG), "--out", __file__], 2),
        (["evaluate", "."], 2),
    ],
)
def test_help_and_errors_come_within_a_second(
    lab_command: LabCommand, tmp_path: Path, arguments: list[str], code: int
) -> None:
    """Seconds of the processor, for the machine may be busy, and a few more of them where it is.

    The slowest case takes 0.8, and importing torch alone 1.9.
    """
    limit, seconds = 1.2, []
    while len(seconds) < 3 and min(seconds, default=limit) >= limit:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = lab_command(*arguments, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == code, result.stderr
    assert min(seconds) < limit


def test_print_config_shows_what_lab_train_takes_again(lab_command: LabCommand, tmp_path: Path) -> None:
    arguments = ["--agent.learning_rate=5e-4", "--total_steps=1e6", "--seed=3", "--print_config"]
    first = lab_command("train", PONG, *arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "printed.yaml").write_text(first.stdout)
    again = lab_command("train", "printed.yaml", "--print_config", cwd=tmp_path)
    assert again.stdout == first.stdout
    assert "learning_rate: 0.0005\n" in first.stdout
    assert "total_steps: 1000000\n" in first.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["printed.yaml"]


# ---- run folders and checkpoints ----


def test_a_folder_that_holds_a_run_is_not_overwritten(lab_command: LabCommand, tiny_run: Path) -> None:
    before = snapshot(tiny_run)
    result = lab_command("train", PONG, "--out", tiny_run, *TINY, cwd=tiny_run.parent)
    refuse(result, "already holds a run. Continue it with --resume, or choose another folder with --out.")
    refuse(lab_command("train", tiny_run, cwd=tiny_run.parent), "is a run. Add --resume to continue it")
    assert snapshot(tiny_run) == before


def test_a_resume_with_another_config_is_refused(lab_command: LabCommand, tiny_run: Path) -> None:
    before = (tiny_run / "run.json").read_bytes()
    result = lab_command("train", tiny_run, "--resume", "--agent.gamma=0.5", cwd=tiny_run.parent)
    refuse(result, "was started with agent.gamma = 0.99, now it is 0.5.")
    assert (tiny_run / "run.json").read_bytes() == before


def test_a_near_miss_of_a_run_folder_names_the_run(lab_command: LabCommand, tiny_run: Path) -> None:
    for command in ("evaluate", "play", "export"):
        refuse(lab_command(command, tiny_run.with_name("runn"), cwd=tiny_run.parent), f"{str(tiny_run)!r}?")
    within = tiny_run / "checkpoints" / "best"
    refuse(
        lab_command("evaluate", within, cwd=tiny_run.parent), f"It is within a run: name that, {tiny_run}."
    )


def test_an_agent_is_no_world_model(lab_command: LabCommand, tiny_run: Path) -> None:
    refuse(lab_command("play", tiny_run, "--world-model", cwd=tiny_run.parent), "is an agent, no world model")


@pytest.mark.parametrize("out", ["agent.pt", "agent", "agent.zip.txt"])
def test_an_export_is_a_zip(lab_command: LabCommand, tiny_run: Path, out: str) -> None:
    before = snapshot(tiny_run.parent)
    result = lab_command("export", tiny_run, "--out", out, cwd=tiny_run.parent)
    refuse(result, f"--out {out}: Stable-Baselines3 saves a .zip file. Name it so.")
    result = lab_command("export", tiny_run, "--out", "nowhere/agent.zip", cwd=tiny_run.parent)
    refuse(result, "There is no folder nowhere. Make it first, or name another.")
    assert snapshot(tiny_run.parent) == before


def damage(path: Path, kind: str) -> str:
    """Damages one file of a checkpoint; returns the word the error must have for it."""
    if kind == "missing":
        path.unlink()
        return "missing from the checkpoint"
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return {"truncated": "truncated: ", "tampered": "altered: its SHA-256"}[kind]


@pytest.mark.parametrize("kind", ["missing", "truncated", "tampered"])
def test_a_damaged_checkpoint_is_refused_by_every_command_that_would_load_it(
    lab_command: LabCommand, tiny_run: Path, kind: str
) -> None:
    newest = checkpoint.find(tiny_run / "checkpoints")
    assert newest is not None
    words = {}
    for folder, command in ((newest, "resume"), (newest.with_name("best"), "best")):
        words[command] = f"{folder}/model.safetensors: {damage(folder / 'model.safetensors', kind)}"
    before = snapshot(tiny_run)
    for command in ("evaluate", "play", "export"):
        refuse(lab_command(command, tiny_run, cwd=tiny_run.parent), words["best"])
    result = lab_command("evaluate", tiny_run, "--checkpoint", "latest", cwd=tiny_run.parent)
    refuse(result, words["resume"], "to go back to step_000000000384.")
    result = lab_command("train", tiny_run, "--resume", "--total_steps=640", cwd=tiny_run.parent)
    refuse(result, words["resume"], f"Delete {newest} to go back to step_000000000384.")
    assert snapshot(tiny_run) == before


def test_a_checkpoint_or_run_record_that_is_gone_is_one_line(lab_command: LabCommand, tiny_run: Path) -> None:
    result = lab_command("evaluate", tiny_run, "--checkpoint", "step_7", cwd=tiny_run.parent)
    refuse(result, "no checkpoint 'step_7'. It has best, latest, step_000000000384, step_000000000512.")
    shutil.rmtree(tiny_run / "checkpoints")
    refuse(lab_command("evaluate", tiny_run, cwd=tiny_run.parent), "It has none yet")
    (tiny_run / "run.json").write_text("{")
    for arguments in (["evaluate", tiny_run], ["train", tiny_run, "--resume"]):
        refuse(lab_command(*arguments, cwd=tiny_run.parent), "run.json: damaged")


# ---- a full disk ----


def test_a_full_disk_loses_nothing_and_the_run_goes_on_once_there_is_room(
    lab_command: LabCommand, finished_run: Path, tmp_path: Path
) -> None:
    """The optimizer's file does not fit from the second session on, as on a disk that filled up.

    The run that meets the full disk and goes on ends with the bits of the one that never met it.
    """
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    root = run / "checkpoints"
    whole = {name: checkpoint.load(root / name).state for name in ("step_000000000384", "best")}
    shutil.rmtree(root / "step_000000000512")
    limit = 2_000_000  # more than the model's file, less than the optimizer's

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = lab_command("train", run, "--resume", cwd=tmp_path, preexec_fn=full)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("lab: ")]
    assert line == result.stderr.splitlines()[-1]
    assert f"{root}/step_000000000512: cannot be written: " in line
    assert "File too large" in line
    assert "The checkpoint step_000000000384 is whole. Free some space, then continue with --resume." in line
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    assert [path.name for path in checkpoint.steps(root)] == ["step_000000000384"]
    assert not list(root.glob(".writing-*"))
    for name, state in whole.items():
        found = checkpoint.load(root / name).state
        assert found == state or name == "best"

    result = lab_command("train", run, "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    ends = [folder / "checkpoints" / "step_000000000512" for folder in (run, finished_run)]
    assert checkpoint.weights_hash(ends[0]) == checkpoint.weights_hash(ends[1])
    rows = [
        [
            {key: value for key, value in row.items() if not key.startswith(("time/", "_"))}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (run, finished_run)
    ]
    assert rows[0] == rows[1]


# ---- a key with a dead server ----


@pytest.fixture
def dead_server() -> Iterator[dict[str, str]]:
    """The environment of a user with a key, whose server's port refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, so that nobody else can, but not listening
        yield {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{bound.getsockname()[1]}"}


def test_a_key_with_a_dead_server_trains_offline_and_says_so_in_one_line(
    lab_command: LabCommand, tmp_path: Path, dead_server: dict[str, str]
) -> None:
    result = lab_command(
        *("train", PONG, "--out", "run", *TINY, "--total_steps=64", "--env.max_episode_frames=40"),
        cwd=tmp_path,
        env=dead_server,
    )
    assert result.returncode == 0, result.stderr
    host = dead_server["WANDB_BASE_URL"].removeprefix("http://")
    lines = [line for line in result.stderr.splitlines() if "W&B" in line]
    assert lines == [f"W&B     offline (W&B's server {host} cannot be reached (Connection refused))"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == 1
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["state"], info["wandb"]["mode"]) == ("finished", "offline")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["global_step"] == 64
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_online_by_name_with_a_dead_server_or_without_a_key_is_refused(
    lab_command: LabCommand, tmp_path: Path, dead_server: dict[str, str]
) -> None:
    arguments = ("train", PONG, "--out", "run", *TINY, "--tracking.wandb=online")
    result = lab_command(*arguments, cwd=tmp_path, env=dead_server)
    refuse(result, "tracking.wandb = 'online': W&B's server 127.0.0.1:", "use --tracking.wandb=auto")
    without = {key: value for key, value in dead_server.items() if key != "WANDB_API_KEY"}
    refuse(lab_command(*arguments, cwd=tmp_path, env=without), "no W&B key for 127.0.0.1", "`wandb login`")
    assert list(tmp_path.iterdir()) == []
