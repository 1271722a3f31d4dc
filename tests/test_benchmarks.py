"""The benchmarks run, and keep what the README quotes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparisons, gallery
from benchmarks.stopwatch import Stopwatch
from lab import records
from lab.errors import LabError
from tests.lab.runs import make_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "dqn_vs_sb3.json"
    command = [sys.executable, "-m", "benchmarks.dqn_vs_sb3", "--quick", "--envs", "2", "--seconds", "0.3"]
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps/s" in done.stdout
    assert "Warning" not in done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_results_say_what_made_them(results: dict[str, Any]) -> None:
    assert set(results) == {"machine", "command", "settings", "rows", "profile"}
    assert {"cpu", "cores_usable", "ram_bytes", "os", "packages", "git", "date"} <= set(results["machine"])
    assert {"torch", "stable-baselines3", "ale-py"} <= set(results["machine"]["packages"])
    assert results["command"] == "python -m benchmarks.dqn_vs_sb3 --quick --envs 2 --seconds 0.3"
    assert results["settings"]["quick"]


@pytest.mark.slow
def test_both_sides_do_the_same_work(results: dict[str, Any]) -> None:
    speed = [row for row in results["rows"] if row["measure"] == "speed"]
    assert [(row["side"], row["precision"]) for row in speed] == [
        ("sb3", "fp32"),
        ("ours", "fp32"),
        ("ours", "bf16"),
    ]
    assert {row["updates_per_agent_step"] for row in speed} == {0.25}
    assert {row["parameters"] for row in speed} == {1_687_206}  # Mnih et al. 2015 with Pong's six actions
    for row in speed:
        assert row["agent_steps_per_second"] > 0
        assert row["peak_rss_bytes"] > 1e8
    assert speed[1]["speed_ratio_to_sb3"] == pytest.approx(
        speed[1]["agent_steps_per_second_by_round"][0] / speed[0]["agent_steps_per_second_by_round"][0]
    )


@pytest.mark.slow
def test_a_million_transitions_take_at_most_7_3_gigabytes(results: dict[str, Any]) -> None:
    memory = {
        row["side"]: row["bytes_per_transition"] for row in results["rows"] if row["measure"] == "memory"
    }
    assert memory["ours"] * 1e6 <= 7.3e9
    assert memory["sb3"] == 2 * 4 * 84 * 84 + 8 + 3 * 4  # two stacks, action, reward, done, timeout
    assert memory["sb3_optimize_memory_usage"] == 4 * 84 * 84 + 8 + 3 * 4


@pytest.mark.slow
def test_profiles_add_up(results: dict[str, Any]) -> None:
    for side in ("ours", "sb3"):
        profile = results["profile"][side]
        assert {p["part"] for p in profile["parts"]} >= {"act", "emulator", "sample", "backward", "other"}
        assert sum(p["share"] for p in profile["parts"]) == pytest.approx(1, abs=0.01)
        assert profile["operations"]


@pytest.mark.slow
def test_the_sides_of_supervised_speed_do_the_same_work(tmp_path: Path) -> None:
    out = tmp_path / "supervised_speed.json"
    command = [sys.executable, "-m", "benchmarks.supervised_speed", "--quick", "--rounds", "1"]
    command += ["--threads", "1", "--cases", "lenet5", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "ours is so many times as fast" in done.stdout
    results = json.loads(out.read_text())
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_case.setdefault(row["case"], []).append(row)
    found = {case: {row["parameters"] for row in rows} for case, rows in by_case.items()}
    assert found == {"lenet5": {61_706}}
    for rows in by_case.values():
        spent = {(row["side"], row["precision"]): row["ms_a_step_by_round"][0] for row in rows}
        assert len(spent) == 7
        for row in rows:
            assert 0 < row["share_of_matmul_peak"] < 1
            for precision, ratio in row["ours_is_so_many_times_as_fast"].items():
                ms = row["ms_a_step_by_round"][0]
                assert ratio == pytest.approx(ms / spent["ours", precision], abs=0.01)


def test_what_supervised_speed_cannot_use_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.supervised_speed", "--nanogpt", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "has no model.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_stopwatch_counts_nested_calls_once() -> None:
    class Loop:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            sum(range(1000))

    loop, watch = Loop(), Stopwatch()
    watch.wrap(loop, "outer", "outer")
    watch.wrap(loop, "inner", "inner")
    with watch:
        loop.outer()
        loop.inner()
    parts = {p["part"]: p for p in watch.report(per=1)}
    assert parts["outer"]["calls"] == parts["inner"]["calls"] == 1
    assert sum(p["share"] for p in parts.values()) == pytest.approx(1, abs=0.001)


def test_kept_runs_compare_as_the_runs_themselves_and_name_no_path_of_a_machine(tmp_path: Path) -> None:
    for number in range(2):
        make_run(
            tmp_path / "runs" / f"tiny_s{number}" / "ppo",
            [(step, {"eval/win_rate": 0.5 + number / 10}) for step in (1, 2)],
            config={"seed": number},
            parents=[
                {"run_id": "a", "path": str(tmp_path / "runs" / f"tiny_s{number}" / "sft"), "sha256": "b"}
            ],
        )
        comparisons.keep(tmp_path / "runs" / f"tiny_s{number}", tmp_path / "kept")
    before, after = (records.load([str(tmp_path / name)], ["eval/win_rate"]) for name in ("runs", "kept"))
    assert [r.series["eval/win_rate"].y.tolist() for r in after.records] == [[0.5, 0.5], [0.6, 0.6]]
    assert [r.config for r in after.records] == [r.config for r in before.records]
    kept = (tmp_path / "kept/tiny_s0/ppo/run.json").read_text()
    assert str(tmp_path) not in kept
    assert '"path": "tiny_s0/sft"' in kept


def test_an_unfinished_run_is_not_kept(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [], config={"seed": 0}, state="running")
    with pytest.raises(LabError, match=r"is running\. Finish it"):
        comparisons.keep(tmp_path / "run", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_gallery_is_what_its_command_writes_of_the_results() -> None:
    assert gallery.PAGE.read_text() == gallery.page()
