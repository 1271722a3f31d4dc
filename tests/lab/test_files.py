"""Run folders come from strangers, by tar and git, which carry links: what is elsewhere stays as it is."""

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import checkpoint, files
from lab.cli import main
from lab.errors import LabError
from lab.files import open_own
from lab.run import Run
from tests.lab.runs import make_run

TEXT = "not the lab's\n" * 50


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the user's, with a file and one below it."""
    folder = tmp_path / "elsewhere"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_text(TEXT)
    (folder / "below" / "file").write_text(TEXT)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "theirs"
    make_run(folder, [(step, {"eval/x": step}) for step in range(9)], config={"seed": 0}, state="interrupted")
    (folder / "checkpoints" / "step_000000000008").mkdir()
    checkpoint.point(folder / "checkpoints", "latest", "step_000000000008")
    return folder


def untouched(elsewhere: Path) -> bool:
    files = [path for path in elsewhere.rglob("*") if path.is_file()]
    return len(files) == 2 and all(path.read_text() == TEXT for path in files)


LINKS = {
    ".lock": "file",
    "metrics.jsonl": "file",
    "metrics.discarded.jsonl": "file",
    "evaluations.jsonl": "file",
    "run.json": "file",
    "checkpoints": "",
    "checkpoints/shared": "below",
    "checkpoints/.writing-best": "below",
    "checkpoints/step_000000000008/state.json": "file",
    "media": "below",
    "media/learning_curve.png": "file",
    "wandb": "",
    "wandb/offline-run-1/files/config.yaml": "file",
    "notes/deep/below/all/else": "file",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("opens", [Run.open, Run.resume])
def test_a_link_that_leads_outside_is_refused(
    run: Path, elsewhere: Path, name: str, relative: bool, opens: Callable[[Path], Run]
) -> None:
    link, target = run / name, elsewhere / LINKS[name]
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if name == "run.json":
        target.write_text("{}")
    link.symlink_to(os.path.relpath(target, link.parent) if relative else target)
    with pytest.raises(LabError, match=rf"{link}: is a link to {target}, outside of the folder"):
        opens(run)
    if name != "run.json":
        assert untouched(elsewhere)


def test_links_within_the_folder_stay_links(run: Path) -> None:
    (run / "media" / "newest").symlink_to("../checkpoints/latest")
    (run / "gone").symlink_to("checkpoints/step_000000000001")  # a pruned one
    assert Run.open(run).find_checkpoint("step_000000000008").is_dir()


def test_a_run_folder_may_itself_be_reached_by_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert Run.open(tmp_path / "link").info["name"] == "theirs"


@pytest.mark.parametrize("name", ["metrics.jsonl", "media/pipe", ".lock", "checkpoints/shared"])
def test_a_pipe_is_refused_and_not_waited_for(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(LabError, match=f"{run / name}: is a pipe"):
        Run.open(run)


def test_a_socket_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        with pytest.raises(LabError, match="socket: is a pipe, a device or a socket"):
            Run.open(run)


def test_a_new_run_does_not_begin_in_a_folder_with_links(tmp_path: Path, elsewhere: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(elsewhere / "below")
    with pytest.raises(LabError, match="is a link"):
        Run.check_new(folder)
    assert untouched(elsewhere)


def test_a_comparison_names_a_run_with_links_and_goes_on(
    run: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "mine", [(1, {"eval/x": 1}), (2, {"eval/x": 2})], config={"seed": 1})
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(elsewhere / "file")
    code = main(
        ["compare", str(run.parent), "--metric=eval/x", "--goal=maximize", "--out", str(tmp_path / "out")]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "is a link to" in said.out + said.err
    assert untouched(elsewhere)


# ---- the lab's own files ----


@pytest.mark.parametrize("mode", ["a", "ab", "w", "r+b", "rb"])
def test_open_own_follows_no_link_and_waits_for_no_pipe(tmp_path: Path, elsewhere: Path, mode: str) -> None:
    (tmp_path / "link").symlink_to(elsewhere / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a symbolic link"):
        open_own(tmp_path / "link", mode)
    with pytest.raises(OSError, match=r"is no ordinary file|No such device"):
        open_own(tmp_path / "pipe", mode)
    assert untouched(elsewhere)


def test_open_own_makes_files_as_open_does(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_own(tmp_path / "file", "a", encoding="utf-8") as file:
            file.write("a")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    with open_own(tmp_path / "file", "a", encoding="utf-8") as file:
        file.write("b")
    assert (tmp_path / "file").read_text() == "ab"


def test_a_lock_empties_nothing(run: Path) -> None:
    (run / ".lock").write_text("whatever")
    with pytest.raises(LabError, match="enough"):
        Run.resume(run).refuse("enough")
    assert (run / ".lock").read_text() == "whatever"


def test_pruning_follows_no_link(tmp_path: Path, elsewhere: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(root, checkpoint.step_name(step), {}, {"step": step})
    (root / "shared").symlink_to(elsewhere)
    checkpoint.prune(root, keep=1)
    assert untouched(elsewhere)
    (root / "shared").unlink()
    (root / "shared").mkdir()
    (root / "shared" / "link").symlink_to(elsewhere / "file")
    (root / "shared" / "segment").write_text("old")
    checkpoint.prune(root, keep=1)
    assert untouched(elsewhere)
    assert [path.name for path in (root / "shared").iterdir()] == ["link"]


@pytest.mark.parametrize("name", ["../../elsewhere", "/", "shared/x", "..", ".", "step_1/../../.."])
def test_a_checkpoint_is_a_name_and_no_path(tmp_path: Path, elsewhere: Path, name: str) -> None:
    (tmp_path / "runs" / "checkpoints" / "shared" / "x").mkdir(parents=True)
    assert checkpoint.find(tmp_path / "runs" / "checkpoints", name) is None


def test_other_names_of_a_file_keep_what_they_have(tmp_path: Path) -> None:
    """A run folder copied by `cp -al` is another run: what goes on in one is not written into the other."""
    mine, other, lock = tmp_path / "metrics.jsonl", tmp_path / "other", tmp_path / ".lock"
    other.write_text("old\n")
    other.chmod(0o640)
    for mode, text in (("a", "old\nnew\n"), ("r+", "new\n")):
        mine.unlink(missing_ok=True)
        mine.hardlink_to(other)
        with files.open_own(mine, mode) as file:
            file.write("new\n")
        assert (mine.read_text(), other.read_text()) == (text, "old\n")
        assert stat.S_IMODE(mine.stat().st_mode) == 0o640
    lock.hardlink_to(other)
    with files.open_own(lock, "a", alone=False), files.open_own(other, "r"):
        assert lock.samefile(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "other"]


def test_a_line_too_long_for_a_row_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_ROW", 4)
    path = tmp_path / "a"
    for raw, lines in {
        b"abc\ndefg\nhijkl\n\nm": [b"abc\n", b"\0\n", b"\0\n", b"\n", b"m"],
        b"abcd": [b"\0"],
        b"abcdefghi": [b"\0"],
        b"": [],
    }.items():
        path.write_bytes(raw)
        assert list(files.lines_of(path)) == lines
