"""The one loop on every objective: it learns, resumes exactly, judges the right weights and never waits."""

import dataclasses
import itertools
import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lab import checkpoint, config
from lab.device import Compute
from lab.errors import LabError
from lab.run import Run
from lab.tracking import read_metrics
from supervised import figures, objectives
from supervised.config import SupervisedRun, run_config_class
from supervised.data import load
from supervised.evaluate import evaluate_run, open_objective
from supervised.objectives import translation
from supervised.objectives.base import Objective
from supervised.pipeline import SupervisedPipeline
from supervised.trainer import Trainer
from tests.host_reads import HostReads

CPU = Compute(torch.device("cpu"), "fp32", 1, "test")
SMALL: dict[str, Any] = {
    "device": {"device": "cpu", "precision": "fp32", "threads": 1},
    "tracking": {"wandb": "disabled"},
    "log_every_steps": 1,
    "checkpoint": {"every_epochs": 0.01, "keep": 100},
    "max_steps": 8,
    "epochs": 100.0,
}
GPT = {"width": 16, "n_layer": 1, "n_head": 2}
WORDS = (
    "the cat sat on the mat",
    "a dog ran to the sea",
    "two birds flew over a hill",
    "she read a long book",
)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text("\n".join(f"{i}: {WORDS[i % 4]}" for i in range(200)))
    return {
        "objective": {"name": "language_model"},
        "data": {"source": str(folder / "text.txt"), "context": 16},
        "model": {"backbone": "gpt", "spec": {**GPT, "dropout": 0.1}},
        "batch_size": 8,
    }


def pairs(folder: Path) -> dict[str, Any]:
    rows = [{"source": f"{word} {i}", "target": f"{i} {word}"} for i in range(10) for word in WORDS]
    return {
        "objective": {"name": "translation"},
        "data": {"source": str(write_rows(folder, rows)), "context": 64},
        "model": {"backbone": "transformer", "spec": {"width": 16, "n_layer": 1, "n_head": 2}},
        "batch_size": 8,
        "eval": {"every_epochs": 1.5},
    }


def pairs_by_lstm(folder: Path) -> dict[str, Any]:
    model = {"backbone": "seq2seq", "spec": {"width": 16, "dropout": 0.1}}
    return {**pairs(folder), "model": model, "accumulate": 2, "ema_decay": 0.9}


def task(folder: Path) -> dict[str, Any]:
    rows = [
        {"text": f"{word} {i}", "label": str(label)} for i in range(10) for label, word in enumerate(WORDS)
    ]
    return {
        "objective": {"name": "text_task", "language_model_weight": 0.5},
        "data": {"source": str(write_rows(folder, rows)), "context": 40},
        "model": {"backbone": "gpt", "spec": GPT},
        "batch_size": 8,
    }


def similarity_by_adapters(folder: Path) -> dict[str, Any]:
    rows = [
        {"first": f"{a} {i}", "second": f"{b} {i}", "label": float(a == b)}
        for i in range(3)
        for a in WORDS
        for b in WORDS
    ]
    return {
        "objective": {"name": "text_task"},
        "data": {"source": str(write_rows(folder, rows)), "context": 64},
        "model": {"backbone": "gpt", "spec": GPT, "adapt": "lora", "lora_rank": 4},
        "batch_size": 8,
    }


def digits(folder: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "classification", "label_smoothing": 0.1},
        "data": {"source": "digits", "limit": 200, "augment": {"shift": 1, "mixup": 0.2}},
        "model": {"backbone": "nature_cnn", "spec": {"width": 16}, "dropout": 0.2},
        "batch_size": 32,
        "accumulate": 2,
        "ema_decay": 0.9,
        "optimizer": {"max_grad_norm": 1.0, "weight_decay": 0.1},
    }


def rows_of_digits(folder: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "classification", "rows": True},
        "data": {"source": "digits", "limit": 200},
        "model": {"backbone": "lstm", "spec": {"hidden": 16}},
        "batch_size": 32,
    }


def noisy_digits(folder: Path) -> dict[str, Any]:
    return {
        "objective": {
            "name": "denoising",
            "conditional": True,
            "guidance": 2.0,
            "weighting": "min_snr",
            **{"n_steps": 50, "sampling_steps": 3, "bound_samples": 16, "bound_steps": 3},
        },
        "data": {"source": "digits", "limit": 200, "augment": {"flip": True}},
        "model": {
            "backbone": "unet",
            "spec": {"width": 8, "mults": [1, 2], "attention": [4], "groups": 4, "dropout": 0.1},
        },
        "batch_size": 32,
        "ema_decay": 0.9,
        "eval": {"every_epochs": 0.5},
    }


def points(folder: Path) -> dict[str, Any]:
    return {
        "objective": {
            "name": "denoising",
            "process": "flow_matching",
            **{"n_steps": 50, "sampling_steps": 10, "bound_samples": 16, "bound_steps": 3},
        },
        "data": {"source": "swiss_roll", "limit": 500},
        "model": {"backbone": "diffusion_mlp", "spec": {"width": 32}},
        "batch_size": 100,
    }


def restored_digits(folder: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "autoencoding", "patch": 2, "decoder_width": 8},
        "data": {"source": "digits", "limit": 200},
        "model": {"backbone": "nature_cnn", "spec": {"width": 32, "norm": "layer"}},
        "batch_size": 32,
        "accumulate": 2,
        "ema_decay": 0.9,
    }


def write_frames(folder: Path, n: int = 200, side: int = 12) -> Path:
    """Games of 50 frames in which a ball of one pixel goes to and fro, each on a course of its own; the row
    on top, as a score, is bright in the second half of each."""
    frames = np.full((n, side, side), 90, np.uint8)
    frames[np.arange(n) % 50 >= 25, 0] = 200
    speeds = np.random.default_rng(0).integers(1, side, (-(-n // 50), 2))
    for i in range(n):
        at = speeds[i // 50] * (i % 50 + 1) % (2 * side - 2)
        row, column = np.minimum(at, 2 * side - 2 - at)
        frames[i, row, column] = 240
    begins, actions = np.arange(n) % 50 == 0, np.zeros(n, np.uint8)
    np.savez(folder / "frames.npz", frames=frames, begins=begins, actions=actions)
    return folder / "frames.npz"


def frames(folder: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "autoencoding", "foretell": 1, "decoder_width": 8, "least_std": 0.3},
        "data": {"source": str(write_frames(folder))},
        "model": {"backbone": "nature_cnn", "spec": {"width": 64}},
        "batch_size": 32,
    }


def play(folder: Path) -> dict[str, Any]:
    return {
        "objective": {
            "name": "world_model",
            **{
                "start_noise": 0.02,
                "sampling_steps": 2,
                "context_noise": 0.02,
                "own_frames": 1,
                "rollout": 3,
            },
            "motion_weight": 1.0,
        },
        "data": {"source": "catch", "limit": 200},
        "model": {"backbone": "unet", "spec": {"width": 8, "mults": [1, 2], "n_res": 1, "groups": 4}},
        "batch_size": 32,
        "accumulate": 2,
        "ema_decay": 0.9,
        "eval": {"every_epochs": 0.5},
    }


def table(folder: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "regression"},
        "data": {"source": "diabetes"},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
        "batch_size": 0,
        "optimizer": {"name": "sgd", "momentum": 0.9, "schedule": "linear"},
    }


PROBLEMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "classification": digits,
    "rows": rows_of_digits,
    "autoencoding": restored_digits,
    "frames": frames,
    "regression": table,
    "diffusion": noisy_digits,
    "flow matching": points,
    "world model": play,
    "language model": text,
    "translation": pairs,
    "translation by LSTM": pairs_by_lstm,
    "text task": task,
    "similarity": similarity_by_adapters,
}
KILLED_ALWAYS = "classification", "regression", "diffusion", "language model"
each_problem = pytest.mark.parametrize("problem", PROBLEMS)


def settings_of(values: Mapping[str, Any], **more: Any) -> SupervisedRun:
    whole = config.merge(config.merge(SMALL, values), more)
    return config.build(run_config_class(whole, lambda _: "test"), whole, {}, "test")


def objective_of(settings: SupervisedRun) -> Objective:
    torch.manual_seed(settings.seed)
    return objectives.make(settings, load(settings.data))


def trained(settings: SupervisedRun, folder: Path, resume: bool = False) -> Run:
    SupervisedPipeline().train(settings, folder, resume)
    return Run.open(folder)


def without_times(run: Run) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "_time"))}
        for row in read_metrics(run.metrics)
    ]


@pytest.mark.parametrize(
    "problem",
    [
        problem if problem in KILLED_ALWAYS else pytest.param(problem, marks=pytest.mark.slow)
        for problem in PROBLEMS
    ],
)
def test_a_run_killed_and_resumed_ends_as_one_never_stopped(problem: str, tmp_path: Path) -> None:
    settings = settings_of(PROBLEMS[problem](tmp_path))
    whole = trained(settings, tmp_path / "whole")
    assert whole.info["state"] == "finished"
    killed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True))
    for path in sorted(killed.glob("checkpoints/step_*"))[3:]:  # it went on a little after the third
        shutil.rmtree(path)
    (killed / "run.json").write_text((killed / "run.json").read_text().replace('"finished"', '"running"'))
    resumed = trained(settings, killed, resume=True)
    assert without_times(resumed) == without_times(whole)
    last = f"checkpoints/step_{8:012d}"
    for file in sorted((whole.folder / last).glob("*.safetensors")):
        mine, theirs = load_file(file), load_file(killed / last / file.name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file.name


@pytest.mark.slow
def test_a_finished_run_can_go_on_for_longer(tmp_path: Path) -> None:
    """At a constant learning rate as if that had been meant, else with the rates of the longer schedule."""
    seldom = {"every_epochs": 1e6}
    values = {**PROBLEMS["classification"](tmp_path), "checkpoint": seldom, "eval": seldom}
    for schedule in ("constant", "cosine"):
        optimizer = {**values.get("optimizer", {}), "schedule": schedule}
        short, long = (settings_of(values, max_steps=n, optimizer=optimizer) for n in (4, 8))
        trained(short, tmp_path / schedule / "short")
        longer = trained(long, tmp_path / schedule / "short", resume=True)
        assert longer.info["state"] == "finished"
        assert longer.info["config"]["max_steps"] == 8
        whole = trained(long, tmp_path / schedule / "whole")
        weights = [
            load_file(run.folder / "checkpoints" / "latest" / "model.safetensors") for run in (longer, whole)
        ]
        same = all(torch.equal(one, other) for one, other in zip(*map(dict.values, weights), strict=True))
        assert same == (schedule == "constant")
        rates = [
            [row["train/learning_rate"] for row in read_metrics(run.metrics) if "train/learning_rate" in row]
            for run in (longer, whole)
        ]
        assert rates[0][-1] == rates[1][-1]
    before = (tmp_path / "cosine" / "short" / "run.json").read_bytes()
    with pytest.raises(LabError, match="has taken 8 steps, and epochs and max_steps now allow 4"):
        trained(short, tmp_path / "cosine" / "short", resume=True)
    assert (tmp_path / "cosine" / "short" / "run.json").read_bytes() == before


def test_a_run_that_is_to_end_where_it_was_stopped_is_evaluated_there(tmp_path: Path) -> None:
    values = {**PROBLEMS["classification"](tmp_path), "log_every_steps": 100, "eval": {"every_epochs": 100}}
    stopped = trained(settings_of(values, max_steps=8), tmp_path / "run").folder
    for path in sorted(stopped.glob("checkpoints/step_*"))[5:]:
        shutil.rmtree(path)
    taken = len(list(stopped.glob("checkpoints/step_*")))
    ended = trained(settings_of(values, max_steps=taken), stopped, resume=True)
    last = list(read_metrics(ended.metrics))
    assert ended.info["summary"]["global_step"] == taken
    assert {row["global_step"] for row in last} == {taken}
    assert any("train/loss" in row for row in last)
    assert any("eval/accuracy" in row for row in last)
    n_rows = len(last)
    again = trained(settings_of(values, max_steps=taken), stopped, resume=True)
    assert len(list(read_metrics(again.metrics))) == n_rows, "nothing is left to do"


def test_an_early_end_says_why_and_leaves_no_step_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = {**PROBLEMS["classification"](tmp_path), "log_every_steps": 100}
    settings = settings_of(values, eval={"every_epochs": 0.01, "stop_at": 0.0})
    run = trained(settings, tmp_path / "run")
    assert "at step 1: eval.stop_at = 0 is reached" in capsys.readouterr().err
    assert any("train/loss" in row for row in read_metrics(run.metrics))
    longer = settings_of(values, eval={"every_epochs": 0.01, "stop_at": 0.0}, max_steps=12)
    trained(longer, tmp_path / "run", resume=True)
    assert "at step 1: eval.stop_at = 0 is reached" in capsys.readouterr().err


def test_a_diverged_run_keeps_only_checkpoints_that_are_numbers(tmp_path: Path) -> None:
    values = {**PROBLEMS["classification"](tmp_path), "log_every_steps": 100, "eval": {"every_epochs": 100}}
    optimizer = {"name": "sgd", "learning_rate": 1e30}
    with pytest.raises(LabError, match="diverged"):
        trained(settings_of(values, optimizer=optimizer), tmp_path / "run")
    kept = list((tmp_path / "run" / "checkpoints").glob("step_*/model.safetensors"))
    assert all(torch.isfinite(value).all() for file in kept for value in load_file(file).values())


def test_other_data_than_a_run_began_with_is_refused(tmp_path: Path) -> None:
    def write(n_classes: int, shift: float) -> None:
        labels = np.arange(60) % n_classes
        np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(60, 5)) + shift, y=labels)

    write(3, 0.0)
    values = {
        "objective": {"name": "classification"},
        "data": {"source": str(tmp_path / "rows.npz")},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
        "batch_size": 8,
    }
    run = trained(settings_of(values), tmp_path / "run")
    before = (run.folder / "run.json").read_bytes()
    for n_classes, shift in ((4, 0.0), (3, 1.0)):
        write(n_classes, shift)
        with pytest.raises(LabError, match="not what it was when the run began"):
            trained(settings_of(values, max_steps=12), run.folder, resume=True)
        assert (run.folder / "run.json").read_bytes() == before
    saved = checkpoint.load(run.find_checkpoint("best"))
    assert any("not what it was" in note for note in evaluate_run(run, saved)["notes"])
    write(4, 0.0)
    with pytest.raises(LabError, match=r"has the classes 0, 1, 2, 3, and .* learned 0, 1, 2"):
        evaluate_run(run, saved)


def test_a_run_is_evaluated_on_data_that_have_moved(tmp_path: Path) -> None:
    def write(path: Path, columns: int = 5, shift: int = 0) -> str:
        labels = (np.arange(60) % 3 + shift).astype(str)
        np.savez(path, x=np.random.default_rng(0).normal(size=(60, columns)), y=labels)
        return str(path)

    values = {
        "objective": {"name": "classification"},
        "data": {"source": write(tmp_path / "rows.npz")},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
        "batch_size": 8,
    }
    run = trained(settings_of(values), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    before = evaluate_run(run, saved)
    (tmp_path / "rows.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(LabError, match="no such data set, file or folder"):
        evaluate_run(run, saved)
    moved = evaluate_run(run, saved, source=str(tmp_path / "moved.npz"))
    assert (moved["data"], moved["eval"]) == ("moved.npz", before["eval"])
    assert not any("not what it was" in note for note in moved["notes"])
    with pytest.raises(LabError, match=r"has the classes 1, 2, 3, and .* learned 0, 1, 2"):
        evaluate_run(run, saved, source=write(tmp_path / "others.npz", shift=1))
    with pytest.raises(LabError, match="do not fit"):
        evaluate_run(run, saved, source=write(tmp_path / "wider.npz", columns=6))


def test_other_data_of_a_table_are_read_by_the_names_of_columns_and_categories(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"sex": sex, "age": age, "dose": dose, "label": ["ill", "well"][int((sex == "f") != (dose > 5))]}
        for sex, age, dose in zip(
            rng.choice(["f", "m"], 120), rng.integers(20, 70, 120), rng.integers(1, 10, 120), strict=True
        )
    ]

    def write(name: str, of: list[dict[str, Any]], columns: str = "sex age dose label") -> str:
        lines = [columns.split(), *([str(row[c]) for c in columns.split()] for row in of)]
        (tmp_path / name).write_text("\n".join(map(",".join, lines)) + "\n")
        return str(tmp_path / name)

    values = {
        "objective": {"name": "classification"},
        "data": {"source": write("rows.csv", rows[:80])},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
        "batch_size": 8,
    }
    run = trained(settings_of(values), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    new = rows[80:]
    plain = evaluate_run(run, saved, source=write("new.csv", new))
    assert plain["part"] == "all"
    assert any("all of it is judged, 40 samples" in note for note in plain["notes"])
    assert not any("chose this checkpoint" in note for note in plain["notes"])
    more = [{**row, "id": i} for i, row in enumerate(new)]
    moved = evaluate_run(run, saved, source=write("moved.csv", more, "label dose id sex age"))
    assert moved["eval"] == plain["eval"]
    assert any("left out id" in note for note in moved["notes"])
    parts = {sex: [row for row in new if row["sex"] == sex] for sex in ("f", "m")}
    halves = {sex: evaluate_run(run, saved, source=write("half.csv", half)) for sex, half in parts.items()}
    whole = sum(len(parts[sex]) * half["eval"]["accuracy"] for sex, half in halves.items()) / len(new)
    assert whole == pytest.approx(plain["eval"]["accuracy"])
    one = evaluate_run(run, saved, source=write("one.csv", [row for row in new if row["label"] == "ill"]))
    assert any("1 have no sample: well" in note for note in one["notes"])
    assert evaluate_run(run, saved, source=write("row.csv", new[:1]))["part"] == "all"
    unseen = [{**row, "sex": {"f": "m", "m": "x"}[row["sex"]]} for row in new]
    notes = evaluate_run(run, saved, source=write("unseen.csv", unseen))["notes"]
    assert any(f"sex is x in {len(parts['m'])} rows" in note for note in notes)
    with pytest.raises(LabError, match="has no column 'dose', from which the run learned"):
        evaluate_run(run, saved, source=write("fewer.csv", new, "sex age label"))
    with pytest.raises(LabError, match="column 'age' holds texts, and the run learned from numbers"):
        evaluate_run(run, saved, source=write("texts.csv", [{**row, "age": "old"} for row in new]))


def test_other_images_of_another_size_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in (16, 24):
        images = rng.integers(0, 256, (40, side, side), np.uint8)
        np.savez(tmp_path / f"{side}.npz", images=images, labels=np.arange(40) % 2)
    values = {
        "objective": {"name": "classification"},
        "data": {"source": str(tmp_path / "16.npz")},
        "model": {"backbone": "resnet8"},
        "batch_size": 16,
        "max_steps": 1,
    }
    run = trained(settings_of(values, max_steps=1), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    notes = evaluate_run(run, saved, source=str(tmp_path / "24.npz"))["notes"]
    assert any("images are 1 x 24 x 24, and the run learned from 1 x 16 x 16" in note for note in notes)
    assert not any("the run learned from 1 x" in note for note in evaluate_run(run, saved)["notes"])


def test_a_checkpoint_that_describes_no_columns_or_classes_is_one_line(tmp_path: Path) -> None:
    run = trained(settings_of(PROBLEMS["classification"](tmp_path), max_steps=1), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    column = {"name": "a", "categories": [None]}
    columns: list[Any] = ["a", ["a"], [{"name": 1}], [column], [{**column, "categories": "b"}]]
    for spec in ([], {"classes": 3}, {"classes": [1, 2]}, *({"columns": value} for value in columns)):
        spoilt = dataclasses.replace(saved, state={**saved.state, "spec": spec})
        with pytest.raises(LabError, match="does not say what it learned from"):
            evaluate_run(run, spoilt)


@pytest.mark.parametrize("n_targets", [1, 3])
def test_numbers_of_regression_are_those_of_scikit_learn(n_targets: int, tmp_path: Path) -> None:
    from sklearn import metrics

    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4))
    y = (x @ rng.normal(size=(4, 3)) + rng.normal(size=(90, 3)) * [0.1, 1, 4])[:, :n_targets] * [
        1000,
        1,
        1e-9,
    ][:n_targets]
    y[60:] *= 1.7  # other deviations than training's
    np.savez(tmp_path / "a.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    values = {
        "objective": {"name": "regression"},
        "data": {"source": str(tmp_path / "a.npz")},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
        "batch_size": 8,
        "device": {"precision": "fp32"},
    }
    run = trained(settings_of(values), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    numbers = evaluate_run(run, saved)["eval"]
    opened = open_objective(run, saved, torch.device("cpu"))
    with torch.inference_mode():
        found = opened.players["model"](opened.inputs(torch.from_numpy(x[60:])))  # type: ignore[attr-defined]
        found = opened.targets.undo(found).double().numpy()  # type: ignore[attr-defined]
    assert numbers["r2"] == pytest.approx(metrics.r2_score(y[60:], found), rel=1e-4)
    if n_targets > 1:
        assert "rmse" not in numbers
        return
    assert numbers["rmse"] == pytest.approx(metrics.root_mean_squared_error(y[60:], found), rel=1e-4)
    assert numbers["mae"] == pytest.approx(metrics.mean_absolute_error(y[60:], found), rel=1e-4)


@pytest.mark.parametrize("label", ["y", "targets"])
def test_other_data_are_scaled_as_those_that_were_learned_from(label: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    y = (x[:, 1] > 0).astype(str) if label == "y" else 3 + 2 * x[:, :1]
    for name, kept in (("rows", x[:, 0] < np.inf), ("half", x[:, 0] > 0)):
        arrays: dict[str, Any] = {"x": x[kept], label: y[kept]}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    values = {
        "objective": {"name": "classification" if label == "y" else "regression"},
        "data": {"source": str(tmp_path / "rows.npz")},
        "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
    }
    run = trained(settings_of(values), tmp_path / "run")
    saved = checkpoint.load(run.find_checkpoint("best"))
    device = torch.device("cpu")
    whole = open_objective(run, saved, device)
    other = open_objective(run, saved, device, source=str(tmp_path / "half.npz"))
    batch = torch.from_numpy(x).float()
    names = ["normalize"] if label == "y" else ["inputs", "targets"]
    for spoilt in ("/etc/passwd", None, ["a"] * 3, [0.0] * 3, [1.0]):
        scales = {"mean": [0.0] * 3, "std": spoilt}
        with pytest.raises(ValueError):  # noqa: PT011 (open_objective has the words)
            whole.use_spec(scales if label == "y" else {"inputs": scales, "targets": scales})
    for name in names:
        data = batch if name != "targets" else batch[:, :1]
        assert torch.equal(getattr(whole, name)(data), getattr(other, name)(data)), name


@each_problem
def test_it_learns_and_leaves_numbers_and_figures(problem: str, tmp_path: Path) -> None:
    values = PROBLEMS[problem](tmp_path)
    rate = {"regression": 0.1, "classification": 2e-3}.get(problem, 1e-2)
    quiet = {"checkpoint": {"every_epochs": 1e6}, "eval": {"every_epochs": 1e6}}
    if problem == "classification":
        values["data"] = {"source": "digits", "limit": 200}  # what is mixed cannot be told apart
    optimizer = {**values.get("optimizer", {}), "learning_rate": rate}
    settings = settings_of({**values, **quiet}, max_steps=60, optimizer=optimizer)
    run = trained(settings, tmp_path / "run")
    losses = [row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    objective = objective_of(settings)
    assert f"eval/best_{objective.headline}" in run.info["summary"]
    assert len(list((tmp_path / "run" / "media").iterdir())) > (problem != "regression")
    for picture in (tmp_path / "run" / "media").glob("*.png"):
        assert picture.stat().st_size > 2000


@each_problem
def test_a_step_on_the_meta_device(problem: str, tmp_path: Path) -> None:
    """A tensor left on the CPU, or a number read back, would be an error there."""
    objective = objective_of(settings_of(PROBLEMS[problem](tmp_path)))
    batch = next(objective.batches("train", torch.device("meta")).epoch(0))
    model = objective.players["model"].to("meta").train()
    loss = objective.loss("model", batch)
    loss.value.backward()
    assert loss.value.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@each_problem
def test_an_update_never_waits_for_the_device(problem: str, tmp_path: Path) -> None:
    settings = settings_of(PROBLEMS[problem](tmp_path), optimizer={"max_grad_norm": 1.0})
    objective = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
    steps = trainer.iterate()
    next(steps)
    with HostReads() as reads:
        next(steps)
    assert not reads.seen


def test_the_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    settings = settings_of(digits(tmp_path), ema_decay=0.5)
    run = trained(settings, tmp_path / "run")
    last = load_file(run.checkpoints / "latest" / "average.safetensors")
    best = load_file(run.checkpoints / "best" / "model.safetensors")
    current = load_file(run.checkpoints / "latest" / "model.safetensors")
    assert best.keys() == last.keys() == current.keys()
    assert not torch.equal(last["model.head.weight"], current["model.head.weight"])


def test_accumulation_changes_nothing_but_memory(tmp_path: Path) -> None:
    plain = {**digits(tmp_path), "data": {"source": "digits", "limit": 200}, "model": {"backbone": "mlp"}}
    weights = []
    for parts in (1, 4):
        settings = settings_of(plain, accumulate=parts)
        objective = objective_of(settings)
        trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
        for _ in trainer.iterate():
            pass
        weights.append(trainer.weights(judged=False))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def after_one_step(values: dict[str, Any], parts: int) -> Trainer:
    """A trainer that has moved once, by plain gradient descent, by a batch in so many parts."""
    optimizer = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant"}
    settings = settings_of(values, accumulate=parts, batch_size=32, max_steps=1, optimizer=optimizer)
    objective = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
    list(trainer.iterate())
    return trainer


def test_parts_of_a_task_with_a_language_model_loss_add_up(tmp_path: Path) -> None:
    rows = [{"text": "a" * n, "label": "b" if n > 9 else "c"} for n in (1, 2, 3, 30) for _ in range(10)]
    values = task(tmp_path)
    values["data"] = {"source": str(write_rows(tmp_path, rows)), "context": 64}
    whole, in_parts = (after_one_step(values, parts) for parts in (1, 4))
    weights = in_parts.weights(judged=False)
    for name, weight in whole.weights(judged=False).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)


def test_parts_of_pairs_count_by_their_tokens(tmp_path: Path) -> None:
    """The mean of a batch's tokens is no mean of its parts' means: parts differ in padding."""
    values = pairs(tmp_path)
    values["model"]["spec"]["dropout"] = 0.0
    rows = [{"source": "a" * n, "target": "b" * n} for n in (1, 1, 1, 30) for _ in range(10)]
    values["data"] = {"source": str(write_rows(tmp_path, rows)), "context": 64}
    whole, in_parts = (after_one_step(values, parts) for parts in (1, 4))
    assert whole.means.take()["loss"] == pytest.approx(in_parts.means.take()["loss"], rel=1e-5)
    weights = in_parts.weights(judged=False)
    for name, weight in whole.weights(judged=False).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("every", "words"), [(1.0, "r2 is nan after step 1"), (1e6, "train/loss is nan")])
def test_a_run_that_diverges_says_so(every: float, words: str, tmp_path: Path) -> None:
    values = {**table(tmp_path), "eval": {"every_epochs": every}, "checkpoint": {"every_epochs": 1e6}}
    values["optimizer"] = {"name": "sgd", "learning_rate": 1e30}
    with pytest.raises(LabError, match=rf"diverged: {words}.* Lower optimizer\.learning_rate"):
        trained(settings_of(values), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.info["state"] == "failed"
    assert not list(run.checkpoints.iterdir())


def test_the_shortest_context_there_is(tmp_path: Path) -> None:
    values = text(tmp_path)
    values["data"]["context"] = 1
    run = trained(settings_of(values, max_steps=1), tmp_path / "run")
    assert "the model goes on" in (run.media / "sample.txt").read_text()


def write_lossy_tokenizer(folder: Path) -> Path:
    """Of a few words in lower case; all others are [UNK]."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *sorted({word for line in WORDS for word in line.split()})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@torch.inference_mode()
def test_bleu_is_against_what_was_written_not_against_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"source": f"{word} {i}", "target": f"{word} {i}".title()} for i in range(9) for word in WORDS]
    values = pairs(tmp_path)
    values["data"] = {"source": str(write_rows(tmp_path, rows)), "context": 64}
    for tokenizer in ("bytes", str(write_lossy_tokenizer(tmp_path / "tokenizer"))):
        values["data"]["tokenizer"] = tokenizer
        objective = objective_of(settings_of(values))
        data, batches = objective.data, objective.batches("test", CPU.device)
        wanted = data.held_out["target"]
        encoded = [data.tokenizer.encode(text) for text in wanted]
        right = iter([[encoded[i] for i in batch["rows"].tolist()] for batch in batches.epoch(0)])
        monkeypatch.setattr(objective, "_translate", lambda *_, right=right: next(right))
        found = objective.evaluate(objective.players, batches.epoch(0))["bleu"]
        theirs = sacrebleu.corpus_bleu([data.tokenizer.decode(ids) for ids in encoded], [wanted]).score
        assert found == pytest.approx(theirs)
        assert (found > 99) == (tokenizer == "bytes")


@torch.inference_mode()
def test_bits_are_per_byte_of_the_text_as_it_was_written(tmp_path: Path) -> None:
    values, numbers = text(tmp_path), []
    for tokenizer in ("bytes", "bpe", str(write_lossy_tokenizer(tmp_path / "tokenizer"))):
        values["data"] |= {"tokenizer": tokenizer, "vocab_size": 300}
        objective = objective_of(settings_of(values))
        batches = objective.batches("test", CPU.device)
        numbers.append(objective.evaluate(objective.players, batches.epoch(0)))
        nats = numbers[-1]["loss"] * len(objective.data.test)
        (original,) = objective.data.held_out["text"]
        assert (tmp_path / "text.txt").read_text().endswith(original)
        assert numbers[-1]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(original))
    assert len({row["gzip_bits_per_byte"] for row in numbers}) == 1


@pytest.mark.parametrize("words", [1, 2, 3, 4, 5])
def test_perfect_translations_have_bleu_100_however_short(words: int) -> None:
    texts = [" ".join(f"w{i}{j}" for j in range(words)) for i in range(5)]
    assert translation.bleu(texts, texts) == pytest.approx(100)
    assert translation.bleu([text + " and more of it" for text in texts], texts) < 80
    longer = [*texts, "one of more than four words"]
    other = [*longer[:3], *longer[2:5]]
    assert translation.bleu(other, longer) == sacrebleu.corpus_bleu(other, [longer]).score


def test_that_bleu_is_of_fewer_words_is_said(tmp_path: Path) -> None:
    objective = objective_of(settings_of(pairs(tmp_path)))
    assert not objective.warnings({})
    values = pairs(tmp_path)
    write_rows(tmp_path, [{"source": str(i), "target": f"number {i}"} for i in range(20)])
    (said,) = objective_of(settings_of(values)).warnings({})
    assert said == "bleu is of up to 2 words in a row, not 4: no translation of held_out has more"


def test_translations_may_be_as_long_as_those_learned_from(tmp_path: Path) -> None:
    for part, lengths in (("train", [40] * 10), ("test", [40, 90])):
        rows = [{"source": str(i), "target": "x" * n} for i, n in enumerate(lengths)]
        write_rows(tmp_path, rows).rename(tmp_path / f"{part}.jsonl")
    values = {**pairs(tmp_path), "data": {"source": str(tmp_path), "context": 64}}
    (tmp_path / "rows.jsonl").unlink()
    objective: Any = objective_of(settings_of(values))
    source = torch.tensor([[ord("1"), objective.tokens.eos_id]])
    torch.nn.init.zeros_(objective.players["model"].backbone.tokens.weight)  # byte 0 is taken for ever
    (found,) = objective._translate(objective.players, source)
    assert len(found) == 42, "with start and end, as those in the data"
    assert any(
        note.startswith("1 translations of test have over data.context = 64") for note in objective.data.notes
    )


def test_learned_positions_reach_as_far_as_any_sentence_to_judge_by(tmp_path: Path) -> None:
    (folder := tmp_path / "data").mkdir()
    for name, n in (("train", 8), ("val", 150), ("test", 100)):
        row = json.dumps({"source": "a" * n, "target": "b" * (n + 5)}) + "\n"
        (folder / f"{name}.jsonl").write_text(row * 8)
    values = pairs(tmp_path)
    values["data"] = {"source": str(folder), "context": 16}
    values["model"]["spec"]["positions"] = "learned"
    run = trained(settings_of(values, max_steps=1), tmp_path / "run")
    assert run.info["state"] == "finished"
    saved = checkpoint.load(run.find_checkpoint("best"))
    assert evaluate_run(run, saved, "val")["eval"]["loss"] > 0


def test_translations_shown_are_of_all_lengths_and_the_attention_of_a_median_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "data").mkdir()
    for name in ("train", "test"):
        rows = ({"source": "a" * n, "target": "b" * n} for n in range(1, 101))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = pairs(tmp_path)
    values["data"] = {"source": str(folder), "context": 120}
    objective = objective_of(settings_of(values))
    drawn = []
    monkeypatch.setattr(figures, "attention", lambda path, _, columns, *rows: drawn.append(len(columns)))
    list(objective.draw(objective.players, iter(()), tmp_path))
    lines = (tmp_path / "translations.txt").read_text().splitlines()
    shown = [len(line.split()[1]) for line in lines if line.startswith("source")]
    assert len(shown) == 40
    assert (shown[0], shown[-1]) == (1, 100)
    assert max(b - a for a, b in itertools.pairwise(shown)) <= 3
    assert lines.count("reference " + "b" * 100) == 1
    assert drawn[0] in (51, 52), "half of the sentences are shorter; the end counts"


def test_figures_of_many_classes_and_tokens_stay_small(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    figures.confusion(tmp_path / "confusion.png", np.eye(1000), names)
    odd = ["$5_$10", "$_$", "雨", "a\tb"]  # mathematics to matplotlib, no glyph in its font, no character
    figures.confusion(tmp_path / "odd.png", np.eye(4), odd)
    figures.attention(tmp_path / "odd_attention.png", np.eye(4), odd, odd)
    figures.image_grid(tmp_path / "odd_images.png", np.zeros((4, 1, 8, 8)), odd)
    figures.attention(tmp_path / "attention.png", np.ones((1000, 3)), names[:3], names)
    for name in ("confusion", "attention"):
        width, height = struct.unpack(">II", (tmp_path / f"{name}.png").read_bytes()[16:24])
        assert max(width, height) < 3000


def test_a_similarity_in_numbers_is_learned_by_its_squared_error(tmp_path: Path) -> None:
    objective = objective_of(settings_of(similarity_by_adapters(tmp_path)))
    batch = next(objective.batches("test", CPU.device).epoch(0))
    model: Any = objective.players["model"].eval()
    ids = batch["ids"]
    ends = (ids != objective.data.tokenizer.pad_id).sum(2) - 1
    found = []
    for both_orders, last in zip(ids, ends, strict=True):
        features = sum(model.backbone(row[None])[0, at] for row, at in zip(both_orders, last, strict=True))
        found.append(model.head(features).item())
    wanted = batch["targets"].flatten().tolist()
    by_hand = sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) / len(found)
    assert objective.loss("model", batch).value.item() == pytest.approx(by_hand, rel=1e-4)


def test_a_correlation_is_as_exact_in_bf16_as_its_answers(tmp_path: Path) -> None:
    values = {**similarity_by_adapters(tmp_path), "device": {**SMALL["device"], "precision": "bf16"}}
    objective: Any = objective_of(settings_of(values))
    batches = list(objective.batches("test", CPU.device).epoch(0))
    with torch.inference_mode(), Compute(CPU.device, "bf16", 1, "test").autocast():
        numbers = objective.evaluate(objective.players, batches)
        found, wanted = (column[:, 0].numpy() for column in objective._answers(objective.players, batches))
    assert numbers["pearson"] == pytest.approx(np.corrcoef(found, wanted)[0, 1], abs=1e-6)
    assert numbers["loss"] == pytest.approx(np.square(found - wanted).mean(), rel=1e-6)


def test_of_equal_headlines_the_lower_loss_is_best_also_after_a_stop(tmp_path: Path) -> None:
    values = {**pairs(tmp_path), "eval": {"every_epochs": 0.01}, "optimizer": {"learning_rate": 1e-5}}
    for steps, resume in ((4, False), (6, True)):
        run = trained(settings_of(values, max_steps=steps), tmp_path / "run", resume=resume)
    rows = [row for row in read_metrics(run.metrics) if "eval/bleu" in row]
    assert {row["eval/bleu"] for row in rows} == {0.0}
    lowest = min(rows, key=lambda row: row["eval/loss"])
    assert lowest["global_step"] > 4, "or nothing is shown"
    assert checkpoint.load(run.find_checkpoint("best")).state["step"] == lowest["global_step"]


def test_another_config_than_before_is_refused(tmp_path: Path) -> None:
    settings = settings_of(table(tmp_path))
    trained(settings, tmp_path / "run")
    with pytest.raises(LabError, match=r"was started with batch_size = 0, now it is 16"):
        trained(dataclasses.replace(settings, batch_size=16), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": {"name": "regression"}}, "holds images, and regression learns from table"),
        ({"model": {"backbone": "resnet5"}}, "no such backbone. Did you mean"),
        ({"model": {"backbone": "mlp", "spec": {"hiden": [3]}}}, "Did you mean 'hidden'"),
        ({"model": {"backbone": "mlp", "spec": {"img_size": 8}}}, "follows from the data"),
        ({"data": {"source": "digitz"}}, "no such data set"),
        ({"model": {"backbone": "mlp", "start_from": "nowhere"}}, "nowhere"),
        ({"model": {"backbone": "lstm"}}, "does not read what there is here. Use one of mlp"),
        ({"model": {"backbone": "drqn"}}, "does not read what there is here"),
        (
            {"model": {"backbone": "resnet8"}, "objective": {"name": "classification", "rows": True}},
            "Use one of rnn, lstm, gru",
        ),
        ({"model": {"backbone": "mlp", "spec": {"hidden": 3}}}, "hidden = 3 is not valid"),
        ({"model": {"backbone": "mlp", "spec": {"hidden": [0]}}}, "must be positive"),
        ({"data": {"source": "photographs"}, "model": {"backbone": "mlp"}}, "has no labels"),
        ({"data": {"source": "diabetes"}, "model": {"backbone": "mlp"}}, "has no labels"),
        ({"data": {"source": "iris"}, "objective": {"name": "regression"}}, "has no targets"),
        (
            {
                "objective": {"name": "language_model"},
                "data": {"source": "python_library", "limit": 99, "context": 8},
                "model": {"backbone": "transformer_encoder"},  # it would see what it is to foretell
            },
            "Use one of gpt, transformer_decoder",
        ),
        (
            {
                "objective": {"name": "language_model"},
                "data": {"source": "python_library", "limit": 99, "context": 500},
                "model": {"backbone": "gpt", "spec": GPT},
            },
            "the text has only",
        ),
        (
            {
                "objective": {"name": "translation"},
                "data": {"source": "number_words", "limit": 99},
                "model": {"backbone": "transformer", "spec": {"width": 16, "n_head": 2}, "adapt": "probe"},
            },
            "leaves nothing to learn",
        ),
        ({"model": {"backbone": "mlp", "spec": {"in_features": 4}}}, "model.spec.in_features: follows from"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum: 0.9 is for sgd, not adamw"),
        ({"optimizer": {"name": "sgd", "betas": [0.5, 0.9]}}, "are for adam and adamw, not sgd"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = {**digits(tmp_path), "data": {"source": "digits", "limit": 50}}
    with pytest.raises(LabError) as caught:
        trained(settings_of({**base, **values}), tmp_path / "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_probed_backbone_stays_as_it_is_and_so_do_its_statistics(tmp_path: Path) -> None:
    values = {
        "objective": {"name": "classification"},
        "data": {"source": "digits", "limit": 200},
        "model": {"backbone": "resnet8", "spec": {"width": 4}},
        "batch_size": 16,
        "ema_decay": 0.5,
    }
    first = trained(settings_of(values), tmp_path / "first")
    values["model"] |= {"start_from": str(first.folder), "adapt": "probe"}
    probed = trained(settings_of(values), tmp_path / "probed")
    begun, ended = (load_file(run.checkpoints / "best" / "model.safetensors") for run in (first, probed))
    same = {name for name in begun if torch.equal(begun[name], ended[name])}
    assert {name for name in begun if ".backbone." in name} == same


def test_a_backbone_goes_on_from_another_run_and_is_named_as_its_parent(tmp_path: Path) -> None:
    first = trained(settings_of(text(tmp_path)), tmp_path / "pretrained")
    values = task(tmp_path)
    values["model"] = {**values["model"], "start_from": str(first.folder)}
    frozen = load_file(first.checkpoints / "best" / "model.safetensors")
    for adapt in ("full", "probe", "lora"):
        values["model"]["adapt"] = adapt
        run = trained(settings_of(values), tmp_path / adapt)
        assert [parent["run_id"] for parent in run.info["parents"]] == [first.info["id"]]
        after = load_file(run.checkpoints / "latest" / "model.safetensors")
        for name, before in frozen.items():
            kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
            assert kept is not None
            assert torch.equal(kept, before) == (adapt != "full"), (adapt, name)
    tokens, name = load(settings_of(values).data).tokenizer, "model.backbone.tokens"
    new = sorted([tokens.bos_id, tokens.delim_id, tokens.extract_id])
    learned, begun = after[f"{name}.trainable_tokens_delta.default"], frozen[f"{name}.weight"][new]
    assert (learned != begun).any(1).all()  # even the delimiter, which no text here has: as a wrong answer


def test_a_run_to_start_from_has_the_same_backbone_and_tokens(tmp_path: Path) -> None:
    values = text(tmp_path)
    values["data"] |= {"tokenizer": "bpe", "vocab_size": 300}
    first = trained(settings_of(values, max_steps=1), tmp_path / "first").folder
    values = task(tmp_path)
    values["model"] |= {"start_from": str(first)}
    values["data"]["tokenizer"] = str(first)

    def refused(**other: dict[str, Any]) -> str:
        with pytest.raises(LabError) as caught:
            trained(settings_of(config.merge(values, other)), tmp_path / "refused")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        return str(caught.value).replace(str(tmp_path), "")

    another = "model.start_from = /first: its backbone is another one"
    assert f"{another} (n_head = 2, here 4)" in refused(model={"spec": {"n_head": 4}})
    assert f"{another} (gpt, here transformer_decoder)" in refused(model={"backbone": "transformer_decoder"})
    assert "Use the same backbone and spec" in refused(model={"spec": {"width": 32}})
    assert f"{another} (blocks.0.mlp.gate.weight is " in refused(model={"spec": {"mlp_width": 8}})
    for tokenizer, size in (("bpe", 300), ("bytes", 261)):
        data = {"tokenizer": tokenizer, "vocab_size": 300}
        assert f"its 300 tokens are not the {size} of data.tokenizer" in (message := refused(data=data))
        assert message.endswith("Set data.tokenizer = /first.")
    (first / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    message = refused(data={"tokenizer": "bytes"})
    assert "(tokens.weight is 300 x 16, here 261 x 16)" in message
    assert "data.tokenizer and data.vocab_size" in message
    (tmp_path / "tokenizer.json").rename(first / "tokenizer.json")
    values["model"]["adapt"] = "lora"
    second = trained(settings_of(values, max_steps=1), tmp_path / "second").folder
    message = refused(model={"start_from": str(second)})
    assert "/second: it holds adapters beside frozen weights. Start from /first instead." in message


def test_new_tokens_beside_adapters_are_learned_where_they_are_foretold(tmp_path: Path) -> None:
    values = task(tmp_path)
    values["model"] |= {"adapt": "lora", "lora_rank": 4}
    objective = objective_of(settings_of(values))
    model: Any = objective.players["model"]
    new = model.backbone.tokens.trainable_tokens_delta["default"]
    batch = next(objective.batches("train", CPU.device).epoch(0))
    objective.loss("model", batch).metrics["text_loss"].backward()
    extract = sorted(model.backbone.tokens.token_indices["default"]).index(
        objective.data.tokenizer.extract_id
    )
    assert new.grad[extract].abs().sum() > 0, "nothing follows this token, so it is not learned as input"
    before = objective.loss("model", batch).metrics["text_loss"].item()
    with torch.no_grad():
        new[extract] *= -1000
    assert objective.loss("model", batch).metrics["text_loss"].item() != pytest.approx(before, rel=0.01)
