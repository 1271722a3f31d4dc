"""What the comparison with TRL 1.12 makes of its measurements; the measurements themselves take minutes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import ppo_vs_trl
from benchmarks.ppo_jobs import Course, Job, settings
from lab.errors import LabError

JOB = Job(
    policy="p",
    reward="r",
    prompts=["hello"],
    answer_tokens=4,
    rollout=8,
    mini_batches=2,
    epochs=3,
    learning_rate=1e-4,
    kl_coef=0.1,
    updates=2,
    warmup=2,
)


def measured(seconds: list[float], rss: int, scores: list[float], parameters: int = 7) -> dict[str, Any]:
    return {
        "seconds_per_update": seconds,
        "cpu_seconds_per_update": [s / 2 for s in seconds],
        "parts": [{"part": "forward", "share": 1.0, "ms": 1.0, "calls": 2}],
        "peak_rss_bytes": rss,
        "scores": scores,
        "kl": [0.0 for _ in scores],
        "trainable_parameters": parameters,
        "versions": {"trl": "1.12.0"},
    }


RAN = {
    "trl": [measured([4.0, 4.0, 9.0], 800, [0.0, 1.0]), measured([8.0], 1000, [0.0, 3.0])],
    "ours": [measured([2.0], 400, [0.0, 2.0]), measured([2.0], 500, [1.0, 2.0])],
    "ours, LoRA": [measured([1.0], 300, [0.0, 2.0], 3), measured([1.0], 250, [1.0, 2.0], 3)],
}


def test_each_round_is_held_against_the_peers_of_that_round() -> None:
    rows = {row["name"]: row for row in ppo_vs_trl.compare("tiny", RAN)}
    assert rows["trl"]["trl_seconds_per_update_over_these"] == 1
    assert rows["ours"]["trl_seconds_per_update_over_these_by_round"] == [2, 4]
    assert rows["ours"]["trl_seconds_per_update_over_these"] == 3
    assert rows["ours"]["trl_cpu_seconds_per_update_over_these"] == 3
    assert rows["ours"]["peak_rss_over_trl"] == 0.5
    assert rows["ours, LoRA"]["peak_rss_over_trl"] == 0.3


def test_models_of_different_size_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="differ in size"):
        ppo_vs_trl.compare("tiny", {"trl": RAN["trl"], "ours": [measured([1.0], 1, [0.0], 8)] * 2})


def test_curves_say_where_they_arrive() -> None:
    sides = ppo_vs_trl.curves({"trl": RAN["trl"]})
    assert sides["trl"]["end_score_by_seed"] == [0.5, 1.5]
    assert sides["trl"]["end_score"] == 1
    assert sides["trl"]["end_score_error"] == pytest.approx(0.5)
    assert ppo_vs_trl.curves({"trl": RAN["trl"][:1]})["trl"]["end_score_error"] is None


def test_curves_are_drawn_and_the_table_names_everything(tmp_path: Path) -> None:
    curves = ppo_vs_trl.curves({name: RAN[name] for name in ("trl", "ours")})
    ppo_vs_trl.draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = {
        "machine": {"cpu": "a CPU", "cores_usable": 2, "load_average_1_minute": 0.1},
        "settings": {"tiny": {"ours": {"threads": 1}}},
        "rows": ppo_vs_trl.compare("tiny", RAN),
        "curves": curves,
    }
    assert json.loads(json.dumps(results)) == results
    text = ppo_vs_trl.table(results)
    assert "3.00x" in text
    assert "ours, LoRA" in text
    assert "1.00 +- 0.50" in text


def test_only_updates_after_the_warm_up_are_timed() -> None:
    course = Course(JOB)
    reporters: list[Any] = []
    trainer = SimpleNamespace(remove_callback=lambda _: None, add_callback=reporters.append)
    course.follow(trainer, 6)
    for step in range(1, 25):
        reporters[0].on_step_end(None, SimpleNamespace(global_step=step), None)
        if step % 6 == 1:
            reporters[0].on_log(None, None, None, logs={"objective/scores": step, "objective/kl": 0.0})
        reporters[0].on_log(None, None, None, logs={"loss": 1.0})
    result = course.result(trainable_parameters=5)
    assert len(course.ends) == 4
    assert len(result["seconds_per_update"]) == len(result["cpu_seconds_per_update"]) == JOB.updates
    assert result["scores"] == [1, 7, 13, 19]
    assert not course.watch.running


def test_our_config_takes_the_settings_of_both_sides(tmp_path: Path) -> None:
    import dataclasses

    from rlhf.ppo import PPOConfig

    names = {field.name for field in dataclasses.fields(PPOConfig)}
    assert set(settings(JOB, str(tmp_path))) <= names


def test_an_environment_that_is_there_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installs: list[Any] = []

    def fake(step: Any, **_: Any) -> Any:
        installs.append(step)
        tmp_path.mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(ppo_vs_trl.subprocess, "run", fake)
    assert ppo_vs_trl.peer(tmp_path) == ppo_vs_trl.peer(tmp_path) == tmp_path / "bin" / "python"
    assert len(installs) == 2
    assert "trl==1.12.0" in installs[1]


def test_a_failed_installation_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="retrying\nERROR: No matching distribution.\n")
    monkeypatch.setattr(ppo_vs_trl.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LabError, match=r"cannot be installed: ERROR: No matching distribution\.") as error:
        ppo_vs_trl.peer(tmp_path / "venv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--threads", "x"], ["--out", "results.txt"], ["--nonsense"]]
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo_vs_trl.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_found_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert ppo_vs_trl.main(["--out", str(tmp_path / "file" / "results.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_is_kept_without_folders() -> None:
    kept = ppo_vs_trl.command(["--out", "x.json", "--rounds", "2", "--tiny=y", "--threads=1"])
    assert kept == "python -m benchmarks.ppo_vs_trl --rounds 2 --threads=1"
    assert ppo_vs_trl.settings(JOB)["prompts"] == 1
    assert not {"policy", "reward", "seed"} & set(ppo_vs_trl.settings(JOB))


def test_the_parent_does_not_import_torch() -> None:
    import subprocess

    code = "import sys, benchmarks.ppo_vs_trl; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ppo_vs_trl.machine.ROOT, check=False).returncode == 0
    )
