"""Checkpoints are there whole or not at all, are checked before use, and run no code."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import checkpoint
from lab.errors import LabError


def tensors(seed: int = 0, size: int = 100) -> dict[str, dict[str, torch.Tensor]]:
    """A model of every number format we save, with values that are easily lost: NaN, -0, denormals."""
    draw = torch.Generator().manual_seed(seed)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 1 / 3])
    return {
        "model": {"a.weight": torch.randn(size, 10, generator=draw), "odd": odd, "half": odd.bfloat16()},
        "optimizer": {
            "step": torch.tensor(2**40 + 1),
            "bytes": torch.randint(0, 256, (7,), generator=draw, dtype=torch.uint8),
            "empty": torch.empty(0, 3),
            "turned": torch.randn(4, 6, generator=draw).t(),
        },
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def save(root: Path, step: int, **kwargs: Any) -> Path:
    name = checkpoint.step_name(step)
    path = checkpoint.save(root, name, tensors(step), {"step": step}, **kwargs)
    checkpoint.point(root, "latest", name)
    return path


def refuses(path: Path) -> str:
    with pytest.raises(LabError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is saved is what is loaded ----


def test_tensors_and_state_come_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"step": 5, "pi": 0.1 + 0.2, "big": 2**70, "text": "µ", "none": None, "list": [1, [True]]}
    path = checkpoint.save(tmp_path, "step_5", tensors(), state)
    loaded = checkpoint.load(path)
    assert loaded.state == state
    for stem, group in tensors().items():
        found = loaded.tensors(stem)
        assert found.keys() == group.keys()
        for name, tensor in group.items():
            assert same(found[name], tensor), f"{stem}.{name}"


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    """Loading a pickle runs code; neither of these two formats can."""
    names = {file.name for file in save(tmp_path, 1).iterdir()}
    assert names == {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"}


def test_nan_in_the_state_is_refused_before_a_file_appears(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, "step_1", tensors(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_second_save_under_one_name_replaces_the_first(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "best", tensors(1), {"n": 1})
    path = checkpoint.save(tmp_path, "best", {"model": tensors(2)["model"]}, {"n": 2})
    assert checkpoint.load(path).state == {"n": 2}
    assert same(checkpoint.load(path).tensors("model")["a.weight"], tensors(2)["model"]["a.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert not (path / "optimizer.safetensors").exists()


def test_the_weights_hash_names_the_weights(tmp_path: Path) -> None:
    one, same_one, other = (checkpoint.save(tmp_path, str(i), tensors(i // 2), {"i": i}) for i in range(3))
    assert checkpoint.weights_hash(one) == checkpoint.weights_hash(same_one)
    assert checkpoint.weights_hash(one) != checkpoint.weights_hash(other)


def test_latest_is_the_newest_step_and_a_relative_link_survives_moving_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for step in (900, 1_000, 20):
        save(root, step)
    newest = checkpoint.find(root)
    assert newest is not None
    assert newest.name == "step_000000001000"
    assert checkpoint.find(root, "best") is None
    checkpoint.point(root, "latest", newest.name)
    moved = root.rename(tmp_path / "moved")
    assert (moved / "latest").is_symlink()
    assert checkpoint.load(moved / "latest").state == {"step": 1_000}
    assert not list(moved.glob(".*"))


# ---- a crash leaves the old one ----

KILLED_IN_MID_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from lab import checkpoint

call, root, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real, count = getattr(os, sys.argv[4]), 0

def counting(*arguments, **kwargs):
    global count
    count += 1
    if count == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **kwargs)

setattr(os, sys.argv[4], counting)  # Path.rename calls os.rename
group = {"w": torch.full((1000,), 2.0)}
checkpoint.save(root, name, {"model": group, "optimizer": group}, {"n": 2})
"""


@pytest.mark.parametrize(("system_call", "call"), [("fsync", 1), ("fsync", 5), ("rename", 1), ("rename", 2)])
def test_a_save_killed_at_any_moment_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, system_call: str, call: int
) -> None:
    """Killed before the second rename the old one is put back; nothing half-written is ever found."""
    group = {"w": torch.full((1000,), 1.0)}
    for name in ("step_000000000001", "best"):
        checkpoint.save(tmp_path, name, {"model": group, "optimizer": group}, {"n": 1})
    arguments = [str(call), str(tmp_path), "best", system_call]
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_MID_SAVE, *arguments], check=False)
    assert killed.returncode == -9
    checkpoint.clean_up(tmp_path)
    best = checkpoint.load(tmp_path / "best")
    assert best.state == {"n": 1}
    assert best.tensors("model")["w"].unique().tolist() == [1.0]
    assert checkpoint.load(tmp_path / "step_000000000001").state == {"n": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step_000000000001"], "leftovers"


def test_a_save_that_raises_leaves_the_old_checkpoint_and_no_leftovers(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, checkpoint.step_name(1), tensors(2), {"state": object()})
    assert checkpoint.load(tmp_path / "latest").state == {"step": 1}
    assert not list(tmp_path.glob(".*"))


def test_clean_up_removes_what_killed_saves_and_prunes_left_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".writing-step_2", ".replaced-step_000000000001", ".deleting-step_0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_000000000001"], "leftovers are no steps"
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000000000001"]
    assert checkpoint.load(tmp_path / "latest").state == {"step": 1}


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from lab import checkpoint
from lab.errors import LabError

root, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # writing beyond it fails as on a full disk
try:
    checkpoint.save(root, checkpoint.step_name(2), {"model": {"w": torch.ones(100_000)}}, {"n": [1] * 5000})
except LabError as error:
    print(error)
    raise SystemExit(2)
"""


@pytest.mark.parametrize("limit", [0, 200, 50_000])
def test_a_full_disk_is_one_clear_line_and_older_checkpoints_stay_whole(tmp_path: Path, limit: int) -> None:
    """Whichever of the files does not fit any more: 200 bytes hold no state.json, 50,000 no weights."""
    save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr == ""
    [line] = result.stdout.splitlines()
    assert line.startswith(f"{tmp_path}/step_000000000002: cannot be written: ")
    assert "File too large" in line
    assert line.endswith(
        "The checkpoint step_000000000001 is whole. Free some space, then continue with --resume."
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoint.load(tmp_path / "latest").state == {"step": 1}


# ---- damage is found, named, and the way back is told ----


def test_a_missing_checkpoint_or_file_is_named(tmp_path: Path) -> None:
    assert "no such checkpoint" in refuses(tmp_path / "step_000000000009")
    path = save(tmp_path, 1)
    (path / "optimizer.safetensors").unlink()
    assert refuses(path).startswith(f"{path}/optimizer.safetensors: missing from the checkpoint.")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, file: str) -> None:
    target = save(tmp_path, 1) / file
    whole = target.stat().st_size
    target.write_bytes(target.read_bytes()[:-3])
    assert f"{target}: truncated: {whole - 3} of {whole} bytes." in refuses(target.parent)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("where", [0, -1])
def test_a_single_altered_bit_is_found(tmp_path: Path, file: str, where: int) -> None:
    target = save(tmp_path, 1) / file
    content = bytearray(target.read_bytes())
    content[where] ^= 1
    target.write_bytes(content)
    assert f"{target}: altered: its SHA-256 is not the one in manifest.json." in refuses(target.parent)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"state.json": {"bytes": 3}}}',
        '{"format": 1, "files": {"state.json": 5}}',
        "\x00\xff",
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, manifest: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(manifest, encoding="latin-1")
    assert refuses(path).startswith(f"{path}/manifest.json: damaged.")


def test_weights_the_manifest_does_not_list_are_refused(tmp_path: Path) -> None:
    """Else dropping a line from the manifest would switch the check off."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert f"{path}/model.safetensors: altered: manifest.json does not list it." in refuses(path)


def test_a_checkpoint_of_another_format_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "written in checkpoint format 99, this version reads 1" in refuses(path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    assert f"{path}: no checkpoint: it has no manifest.json." in refuses(path)
    assert checkpoint.find(tmp_path) is None


def test_the_way_back_to_an_older_checkpoint_is_told_and_works(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "model.safetensors").unlink()
    assert refuses(newest).endswith(f"Delete {newest} to go back to step_000000000001.")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    older = checkpoint.find(tmp_path)
    assert older is not None
    assert checkpoint.load(older).state == {"step": 1}


# ---- pruning ----


def shared_file(root: Path, name: str) -> Path:
    path = root / "shared" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
    return path


def test_prune_keeps_the_newest_and_only_the_shared_files_they_need(tmp_path: Path) -> None:
    segments = [shared_file(tmp_path, f"segment_{i}") for i in range(5)]
    for step in range(4):
        save(tmp_path, step, shared=segments[step : step + 2])
    checkpoint.save(tmp_path, "best", tensors(), {})
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == [checkpoint.step_name(i) for i in (2, 3)]
    assert [p.exists() for p in segments] == [False, False, True, True, True]
    for which in ("best", "latest", checkpoint.step_name(2)):
        checkpoint.load(tmp_path / which)
    checkpoint.prune(tmp_path, keep=2)
    assert len(checkpoint.steps(tmp_path)) == 2
    assert not list(tmp_path.glob(".*"))


def test_damage_to_a_shared_file_is_found(tmp_path: Path) -> None:
    segment = shared_file(tmp_path, "segment")
    path = save(tmp_path, 1, shared=[segment])
    checkpoint.load(path)
    segment.write_bytes(b"SEGMENT")
    assert "segment: altered" in refuses(path)
    segment.write_bytes(b"seg")
    assert "segment: truncated: 3 of 7 bytes" in refuses(path)
    segment.unlink()
    assert "segment: missing from the checkpoint" in refuses(path)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_colleagues_may_read_all_of_a_checkpoint_or_none(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, "best", {"model": {"w": torch.ones(2)}}, {"step": 1})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "change",
    [
        {"w": torch.ones(3), "b": torch.ones(1)},
        {"w": torch.ones(2)},
        {"w": torch.ones(2), "b": torch.ones(1), "more": torch.ones(1)},
        {"w": torch.ones(2).double(), "b": torch.ones(1)},
        {"v": torch.ones(2), "b": torch.ones(1)},
        {},
    ],
)
def test_tensors_that_a_run_would_not_write_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    own = {"model": {"w": torch.ones(2), "b": torch.ones(1)}}
    good, other = (
        checkpoint.load(checkpoint.save(tmp_path, name, tensors, {"step": 1}))
        for name, tensors in (("good", own), ("other", {"model": change}))
    )
    with good.restoring(lambda: own):
        pass
    with pytest.raises(LabError, match=r"other: does not fit this run"), other.restoring(lambda: own):
        pass


@pytest.mark.parametrize("length", [-1, 10**30, "9", None, 2.5])
def test_a_state_that_no_run_wrote_is_damaged(tmp_path: Path, length: object) -> None:
    path = checkpoint.save(tmp_path, "best", {}, {"metrics_bytes": length})
    with pytest.raises(LabError, match=r"state\.json: damaged"):
        checkpoint.load(path)
