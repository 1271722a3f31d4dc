"""Every config runs from beginning to end within seconds, on data of our own: what `--smoke` is for."""

from pathlib import Path

import pytest

from lab import cli
from tests.conftest import REPO

CONFIGS = sorted(
    path.relative_to(REPO)
    for kind in ("rl", "rlhf", "supervised")
    for path in REPO.glob(f"configs/{kind}/*.yaml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(REPO / path), "--smoke", "--device.threads=1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("works.")
    assert not list(tmp_path.iterdir())
