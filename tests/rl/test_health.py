"""A run that came to nothing says so, in its state or in warnings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import checkpoint, config
from lab.errors import LabError
from lab.run import Run
from rl.config import RunConfig, run_config_class
from rl.pipeline import MAY_CHANGE, RLPipeline
from rl.train import make_agent
from tests.rl.conftest import SMALL_NET


def settings_of(algorithm: str = "pqn", **changes: Any) -> RunConfig:
    by_algorithm: dict[str, dict[str, Any]] = {
        "pqn": {"rollout_steps": 8, "minibatch_size": 16},
        "dqn": {"buffer_size": 500, "learning_starts": 20, "batch_size": 4},
        "drqn": {
            **{"buffer_size": 500, "learning_starts": 20, "batch_size": 4, "sequence_steps": 2},
            **{"burn_in_steps": 1, "backbone": "lstm", "backbone_spec": {**SMALL_NET, "hidden": 8}},
        },
    }
    values = {
        "env": {"game": "pong", "n_envs": 2, "image_size": 24, "num_threads": 1, "max_episode_frames": 80},
        "agent": {"algorithm": algorithm, "backbone_spec": SMALL_NET, **by_algorithm[algorithm]},
        "total_steps": 96,
        "log_every_steps": 16,
        "eval": {"every_steps": 48, "episodes": 2},
        "checkpoint": {"every_steps": 32},
        "film": {"max_steps": 0},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    return config.build(run_config_class(values, lambda _: "test"), values, changes, "test")


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("algorithm", ["pqn", "dqn"])
def test_a_run_that_diverges_failed_and_keeps_no_weights_that_are_none(
    tmp_path: Path, algorithm: str
) -> None:
    changes = {"agent.learning_rate": 1e30, "agent.max_grad_norm": None}
    with pytest.raises(LabError, match=r"diverged before agent step .* lower agent\.learning_rate") as caught:
        RLPipeline().train(settings_of(algorithm, **changes), tmp_path / "run", resume=False)
    assert "\n" not in str(caught.value)
    assert record_of(tmp_path / "run")["state"] == "failed"
    for path in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        weights = checkpoint.load(path.parent).tensors("model")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_what_makes_a_finished_run_worth_little_is_said(tmp_path: Path, capsys: Any) -> None:
    changes: dict[str, Any] = {
        "total_steps": 23,
        "agent.learning_starts": 22,
        "agent.train_freq": 100,
        "eval.stop_at": 500.0,
    }
    RLPipeline().train(settings_of("dqn", **changes), tmp_path / "run", resume=False)
    record = record_of(tmp_path / "run")
    assert record["state"] == "finished"
    assert record["summary"]["warnings"] == [
        "not one update was made: nothing was learned.",
        "every game of its last evaluation was cut off by the time limit, env.max_episode_frames = 80: it "
        "may be stuck, and a longer limit may give another score.",
        f"eval.stop_at = 500 was not reached: the best is {record['summary']['eval/best_mean_reward']:.1f}.",
    ]
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "Warning: not one update was made" in text
    assert "of 24 (23 rounded up to whole iterations)" in text
    assert "2 cut off by the time limit" in text


@pytest.mark.parametrize(
    ("cut_off", "max_episode_frames", "human_normalized"),
    [
        ([False, False], 400, 1.0),  # whole games, although they might have been cut off
        ([True, True], 108_000, 1.0),
        ([False, True], 18_000, 1.0),  # five minutes, as Mnih et al. 2015 played
        ([False, True], 17_999, None),
    ],
)
def test_pieces_of_games_are_not_compared_with_published_scores(
    cut_off: list[bool], max_episode_frames: int, human_normalized: float | None
) -> None:
    from rl.evaluate import Evaluation, score_table

    found = Evaluation("pong", [9.3, 9.3], [800, 800], cut_off, 0.0, max_episode_frames)
    assert found.human_normalized == human_normalized
    assert ("eval/human_normalized" in found.metrics()) == (human_normalized is not None)
    assert [who for who, _ in score_table(found)] == (
        ["this agent"] if human_normalized is None else ["random", "human", "this agent", "Nature DQN"]
    )


def test_no_better_than_random_play_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl import train
    from rl.evaluate import Evaluation

    lost = Evaluation("pong", [-21.0, -21.0], [800, 800], [False, False], 0.0, 108_000)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: lost)
    RLPipeline().train(settings_of(), tmp_path / "run", resume=False)
    (warning,) = record_of(tmp_path / "run")["summary"]["warnings"]  # and of no time limit
    assert warning.startswith("its best evaluation, -21.0, is not above random play (-20.7)")


def test_keys_that_change_nothing_that_is_learned_may_change_on_resuming(tmp_path: Path) -> None:
    RLPipeline().train(settings_of(), tmp_path / "run", resume=False)
    changed: dict[str, Any] = {
        **{"total_steps": 128, "log_every_steps": 32, "eval.every_steps": 64, "checkpoint.every_steps": 64},
        **{"checkpoint.keep": 1, "film.every_steps": 10, "env.num_threads": 2, "device.threads": 2},
    }
    assert all(key.startswith(MAY_CHANGE) for key in changed)
    RLPipeline().train(settings_of(**changed), tmp_path / "run", resume=True)
    assert record_of(tmp_path / "run")["summary"]["global_step"] == 128
    for key, value in (("agent.learning_rate", 1e-5), ("eval.seed", 3), ("env.n_envs", 4)):
        with pytest.raises(LabError, match="was started with " + key.replace(".", r"\.")):
            RLPipeline().train(settings_of(**{**changed, key: value}), tmp_path / "run", resume=True)
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(LabError, match="has taken 128 steps, and total_steps now allows 112"):
        RLPipeline().train(settings_of(**{**changed, "total_steps": 105}), tmp_path / "run", resume=True)
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_run_of_another_device_goes_on_and_is_evaluated_here(tmp_path: Path) -> None:
    RLPipeline().train(settings_of(), tmp_path / "run", resume=False)
    record = record_of(tmp_path / "run")
    record["config"]["device"]["device"] = "mps" if not torch.backends.mps.is_available() else "cuda"
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    from rl.evaluate import evaluate_run

    result = evaluate_run(Run.open(tmp_path / "run"), "best", 1, 0.0, 5)
    assert result["compute"]["device"] != record["config"]["device"]["device"]
    assert "is not here" in result["compute"]["reason"]
    RLPipeline().train(settings_of(total_steps=112), tmp_path / "run", resume=True)
    assert record_of(tmp_path / "run")["summary"]["global_step"] == 112


def test_checkpoints_from_before_are_not_continued_but_say_what_to_do(tmp_path: Path) -> None:
    RLPipeline().train(settings_of(), tmp_path / "run", resume=False)
    path = checkpoint.find(tmp_path / "run/checkpoints")
    assert path is not None
    saved = checkpoint.load(path)
    state = {key: value for key, value in saved.state.items() if key != "due"}
    tensors = {name: saved.tensors(name) for name in ("model", "optimizer", "progress")}
    checkpoint.save(tmp_path / "run/checkpoints", path.name, tensors, state)
    with pytest.raises(LabError, match=r"of an earlier version .* --agent\.start_from="):
        RLPipeline().train(settings_of(), tmp_path / "run", resume=True)


def test_the_agent_and_its_games_are_of_the_training_seeds() -> None:
    from rl.envs import training_seed

    agent = make_agent(settings_of(seed=2**31 - 1), _cpu())
    agent.begin_games()
    assert agent.env._base_seed == training_seed(2**31 - 1)


def _cpu() -> Any:
    from lab.device import Compute

    return Compute(torch.device("cpu"), "fp32", 1, "test")
