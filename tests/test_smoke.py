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
ALIKE = {
    *("adapt_gpt_next_line", "adapt_gpt_origin", "translate_multi30k", "srgan_photos", "tiny_overoptimised"),
    *("freeway", "breakout", "pong_pretrained", "pong_vit_cpu", "smollm2", "instructgpt"),
    *("atari_nature", "translate_numbers"),
}
"""Configs that are another one with other numbers."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=[pytest.mark.slow] if path.stem in ALIKE else [], id=f"{path.parent.name}/{path.stem}"
        )
        for path in CONFIGS
    ],
)
def test_every_config_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(REPO / path), "--smoke", "--device.threads=1"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("works.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "batch_size: 16\naccumulate: 12\nmodel: {backbone: lenet5}\ndata: {source: fashion_mnist}",
            "works.",
        ),
        ("model: {backbone: vit_tiny}\ndata: {source: my/folder, img_size: 64}", "works."),
        ("model: {backbone: lenet5}\ndata: digits", "data = 'digits' is not valid"),
        ("model: lenet5\ndata: {source: digits}", "model = 'lenet5' is not valid"),
        (
            "batch_size: null\nmodel: {backbone: mlp}\ndata: {source: digits}",
            "batch_size = None is not valid",
        ),
    ],
)
def test_any_config_can_be_tried_and_a_wrong_one_is_one_line(
    lines: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"pipeline: supervised\nobjective: {{name: classification}}\n{lines}\n")
    code = cli.main(["train", str(path), "--smoke", "--device.threads=1"])
    out, err = capsys.readouterr()
    assert code == (0 if said == "works." else 2)
    assert said in (out if code == 0 else err)
    assert code == 0 or err.count("\n") == 1
