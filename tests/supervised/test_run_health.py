"""A run says when its result is worth nothing, goes on only where it may, and refuses what cannot be."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import checkpoint, config
from lab.device import PROCESS_COUNTS
from lab.errors import LabError
from lab.files import sha256_file
from lab.run import Run
from supervised.config import SupervisedRun, run_config_class
from supervised.config import objectives as names
from supervised.evaluate import evaluate_run
from supervised.objectives.classification import draw_confusion
from supervised.pipeline import SupervisedPipeline
from supervised.train import _Session


def settings_of(folder: Path, **more: Any) -> SupervisedRun:
    """A small classifier of a table of two classes."""
    if not (folder / "a.npz").exists():
        labels = np.arange(60) % 2
        inputs = np.random.default_rng(0).normal(size=(60, 3)) + labels[:, None] * 3
        np.savez(folder / "a.npz", x=inputs, y=labels)
    base: dict[str, Any] = {
        "objective": {"name": "classification"},
        "data": {"source": str(folder / "a.npz")},
        "model": {"backbone": "mlp", "spec": {"hidden": [4]}},
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "tracking": {"wandb": "disabled"},
        "batch_size": 16,
        "max_steps": 6,
        "log_every_steps": 1,
        "optimizer": {"learning_rate": 0.01},
    }
    values = config.merge(base | {key: {} for key in ("model",) if key in more}, more)
    return config.build(run_config_class(values, lambda _: "test"), values, {}, "test")


def trained(settings: SupervisedRun, folder: Path, resume: bool = False) -> Run:
    SupervisedPipeline().train(settings, folder, resume)
    return Run.open(folder)


def warnings_of(run: Run) -> str:
    return " | ".join(run.info["summary"].get("warnings", []))


# ---- health ----


def test_a_healthy_run_warns_of_nothing(tmp_path: Path) -> None:
    run = trained(settings_of(tmp_path, max_steps=60), tmp_path / "run")
    assert "warnings" not in run.info["summary"]


def test_numbers_that_are_all_alike(tmp_path: Path) -> None:
    """Of those to learn from there is nothing to learn; of those to evaluate, r2 is some large number."""
    regression = {"name": "regression"}
    x, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20.0)[:, None]
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y * 0 + 5, x_test=x, y_test=y)
    with pytest.raises(LabError, match=r"a\.npz': the numbers to predict are all \[5\.0\], "):
        trained(settings_of(tmp_path, objective=regression), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y * 0 + 5)
    run = trained(settings_of(tmp_path, objective=regression), tmp_path / "run")
    assert "all numbers of test are alike: r2 says nothing, only the loss does" in warnings_of(run)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"learning_rate": 1e-30}, "no weight has changed in 6 steps: optimizer.learning_rate = 1e-30"),
        (
            {"warmup_steps": 1000},
            "the learning rate was still rising at the end, after 6 of optimizer.warmup_steps = 1,000",
        ),
        ({"learning_rate": 30.0, "name": "sgd", "schedule": "constant"}, "the training loss rose from"),
    ],
)
def test_a_run_that_learned_nothing_says_so(
    optimizer: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(settings_of(tmp_path, optimizer=optimizer), tmp_path / "run")
    assert words in warnings_of(run)
    assert f"warning {words}" in capsys.readouterr().err


def test_an_accuracy_that_naming_one_class_reaches_is_said(tmp_path: Path) -> None:
    labels = np.arange(100) < 90
    np.savez(tmp_path / "a.npz", x=np.zeros((100, 2)), y=np.where(labels, "common", "rare"))
    run = trained(settings_of(tmp_path, optimizer={"learning_rate": 0.1}), tmp_path / "run")
    said = "accuracy 0.9 is no better than always naming 'common', the most frequent class of held_out (0.9)"
    assert said in warnings_of(run)
    result = evaluate_run(run, checkpoint.load(run.find_checkpoint("best")))
    assert said in result["notes"]


def test_numbers_that_their_mean_predicts_as_well_are_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(60, 3)), y=rng.normal(size=60))
    run = trained(settings_of(tmp_path, objective={"name": "regression"}), tmp_path / "run")
    assert "is no better than always naming the mean of held_out" in warnings_of(run)


@pytest.mark.parametrize("where", ["weight", "average", "statistic"])
def test_weights_that_are_no_numbers_never_become_the_best(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the evaluation shows nothing of it."""
    more: dict[str, Any] = {"ema_decay": 0.9} if where == "average" else {}
    if where == "statistic":
        more = {
            "objective": {"name": "autoencoding", "decoder_width": 4},
            "data": {"source": "digits", "limit": 32},
        }
        more["model"] = {"backbone": "nature_cnn", "spec": {"width": 8}}
    settings = settings_of(tmp_path, **more)
    evaluate = _Session._evaluate

    def spoiled(self: _Session, stop: Any, progress: Any) -> None:
        numbers = {self.objective.headline: 0.5, "loss": 1.0}
        monkeypatch.setattr(self.objective, "evaluate", lambda *_: numbers)
        averages, bare = self.trainer.averages, self.trainer.bare
        module = averages["model"].module if where == "average" else bare["model"]
        tensors = module.buffers() if where == "statistic" else module.parameters()
        with torch.no_grad():
            next(t for t in tensors if t.is_floating_point()).view(-1)[0] = torch.nan
        evaluate(self, stop, progress)

    monkeypatch.setattr(_Session, "_evaluate", spoiled)
    with pytest.raises(LabError, match="diverged: a weight of the model is nan after step"):
        trained(settings, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.info["state"] == "failed"
    assert not list(run.checkpoints.glob("*/model.safetensors"))


# ---- classes ----


def test_classes_numbered_far_apart_are_evaluated_and_drawn(tmp_path: Path) -> None:
    """195,000 squared floats are 142 GiB."""
    labels = np.arange(80) % 40 * 5000
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(80, 3)), y=labels)
    run = trained(settings_of(tmp_path, max_steps=2), tmp_path / "run")
    result = evaluate_run(run, checkpoint.load(run.find_checkpoint("best")))
    assert result["notes"][0].startswith("of 195,001 classes 194,961 have no sample")
    assert (run.media / "confusion.csv").read_text().startswith("is,taken_for,samples")


def test_confusions_of_few_and_of_many_classes_count_the_same(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(4, (2, 200), generator=generator)
    names = tuple("0123")
    (_, table), *_ = draw_confusion(pairs, names, tmp_path, most=3)
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert len(rows) == len({(a, b) for a, b, _ in rows})
    for a, b, n in rows:
        assert int(n) == int(((pairs[0] == int(a)) & (pairs[1] == int(b))).sum())
        assert a != b
    assert sum(int(n) for *_, n in rows) == int((pairs[0] != pairs[1]).sum())
    (_, picture), *_ = draw_confusion(pairs, names, tmp_path)
    assert picture.suffix == ".png"


def test_sequences_are_learned_by_recurrent_backbones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    steps = rng.normal(size=(80, 9, 2)) + [0, 100] + labels[:, None, None]
    np.savez(tmp_path / "a.npz", x=steps, y=labels)
    model = {"backbone": "lstm", "spec": {"hidden": 16}}
    run = trained(settings_of(tmp_path, model=model, max_steps=80), tmp_path / "run")
    assert run.info["summary"]["eval/best_accuracy"] > 0.9
    np.savez(tmp_path / "a.npz", x=steps, y=steps.mean((1, 2)))
    numbers = settings_of(tmp_path, model=model, max_steps=80, objective={"name": "regression"})
    assert trained(numbers, tmp_path / "more").info["summary"]["eval/best_r2"] > 0.5
    with pytest.raises(LabError, match="does not say where black and white are"):
        trained(settings_of(tmp_path, model={"backbone": "mlp", "spec": {}}), tmp_path / "mlp")
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(80, 9)) + labels[:, None], y=labels)
    run = trained(settings_of(tmp_path, model=model, max_steps=80), tmp_path / "series")
    assert run.info["summary"]["eval/best_accuracy"] > 0.8


# ---- resuming, on other machines and in other hands ----


@pytest.mark.parametrize(
    "changed",
    [
        {"log_every_steps": 3},
        {"checkpoint": {"every_epochs": 7.0, "keep": 5}},
        {"eval": {"every_epochs": 0.5}},
        {"device": {"device": "auto"}},
    ],
)
def test_what_changes_no_result_may_change_on_resume(changed: dict[str, Any], tmp_path: Path) -> None:
    trained(settings_of(tmp_path), tmp_path / "run")
    straight = trained(settings_of(tmp_path, max_steps=9), tmp_path / "straight")
    run = trained(settings_of(tmp_path, max_steps=9, **changed), tmp_path / "run", resume=True)
    weights = [load_file(r.find_checkpoint("latest") / "model.safetensors") for r in (straight, run)]
    assert weights[0].keys() == weights[1].keys()
    # With other steps to go the learning rate falls otherwise, so of a run that goes on for longer nothing
    # more is known than that it went there.
    assert run.info["summary"]["global_step"] == 9


def test_data_that_were_moved_are_the_same_data(tmp_path: Path) -> None:
    run = trained(settings_of(tmp_path), tmp_path / "run")
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    moved = settings_of(tmp_path, data={"source": str(tmp_path / "b.npz")}, max_steps=9)
    run = trained(moved, tmp_path / "run", resume=True)
    assert run.info["summary"]["global_step"] == 9
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "c.npz", x=np.zeros((60, 3)), y=np.arange(60) % 2)
    others = settings_of(tmp_path, data={"source": str(tmp_path / "c.npz")}, max_steps=12)
    with pytest.raises(LabError, match="not what it was when the run began"):
        trained(others, tmp_path / "run", resume=True)


def test_a_run_begun_before_there_was_a_key_goes_on(tmp_path: Path) -> None:
    run = trained(settings_of(tmp_path), tmp_path / "run")
    info = json.loads((run.folder / "run.json").read_text())
    for key in ("label", "header", "drop", "bad_rows"):
        del info["config"]["data"][key]
    del info["config"]["data"]["augment"]
    (run.folder / "run.json").write_text(json.dumps(info))
    shutil.rmtree(run.media)  # nor need its figures be there
    run = trained(settings_of(tmp_path, max_steps=9), run.folder, resume=True)
    assert run.info["summary"]["global_step"] == 9
    (run.folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(LabError, match=r"was started with data.bad_rows = 'error', now it is 'skip'"):
        trained(settings_of(tmp_path, max_steps=9, data={"bad_rows": "skip"}), run.folder, resume=True)


@pytest.mark.parametrize("key", ["batch_size", "seed", "epochs"])
def test_what_changes_results_may_not(key: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    trained(settings, tmp_path / "run")
    other = dataclasses.replace(settings, **{key: 7})
    if key == "epochs":  # goes on for longer
        trained(other, tmp_path / "run", resume=True)
        return
    with pytest.raises(LabError, match=f"was started with {key} ="):
        trained(other, tmp_path / "run", resume=True)


def altered(path: Path, change: Any) -> None:
    """Changes a checkpoint's tensors or state, and its manifest with them: no hash tells of it."""
    name = "state.json" if change.__name__.startswith("state") else "model.safetensors"
    if change.__name__.startswith("optimizer"):
        name = "optimizer_model.safetensors"
    file = path / name
    if file.suffix == ".json":
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.more"] = torch.zeros(2)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["other"] = tensors.pop(next(iter(tensors)))


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(7, 7)


def optimizer_missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop("0.exp_avg")


def optimizer_reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["0.exp_avg"] = torch.zeros(3)


def optimizer_of_more_weights(tensors: dict[str, torch.Tensor]) -> None:
    tensors["99.exp_avg"] = torch.zeros(3)


def state_without_trainer(state: dict[str, Any]) -> None:
    del state["trainer"]


def state_of_many_bytes(state: dict[str, Any]) -> None:
    state["metrics_bytes"] = 10**30


def state_before_the_start(state: dict[str, Any]) -> None:
    state["trainer"]["step"] = -3


def state_of_words(state: dict[str, Any]) -> None:
    state["trainer"] = "here"


DAMAGE = [
    *(missing, extra, renamed, reshaped, optimizer_missing, optimizer_reshaped, optimizer_of_more_weights),
    *(state_without_trainer, state_of_many_bytes, state_before_the_start, state_of_words),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_of_another_run_is_one_line_and_the_run_stays_as_it_was(
    damage: Any, tmp_path: Path
) -> None:
    run = trained(settings_of(tmp_path), tmp_path / "run")
    altered(run.find_checkpoint("latest").resolve(), damage)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(LabError, match=r"is not one that this run saved|not what the lab writes") as caught:
        trained(settings_of(tmp_path, max_steps=9), run.folder, resume=True)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    if damage in (missing, extra, renamed, reshaped):
        with pytest.raises(LabError, match="do not fit"):
            evaluate_run(run, checkpoint.load(run.find_checkpoint("latest")))


def test_a_run_of_another_device_is_evaluated_here(tmp_path: Path) -> None:
    run = trained(settings_of(tmp_path), tmp_path / "run")
    info = json.loads((run.folder / "run.json").read_text())
    info["config"]["device"]["device"] = "cuda"
    (run.folder / "run.json").write_text(json.dumps(info))
    run = Run.open(run.folder)
    assert evaluate_run(run, checkpoint.load(run.find_checkpoint("best")))["eval"]["accuracy"] >= 0


def test_one_of_several_processes_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROCESS_COUNTS[0], "2")
    with pytest.raises(LabError, match="a run trains in one process"):
        trained(settings_of(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- bounds ----


def numbers_of(cls: type, values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of a config whose values are numbers."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += numbers_of(cls, value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((*path, key))
    return found


def of(name: str) -> dict[str, Any]:
    more = {"generator": "runs/x"} if name == "detection" else {}
    return {"objective": {"name": name, **more}, "data": {"source": "digits"}, "model": {"backbone": "mlp"}}


EXEMPT = ("learning_rate", "max_grad_norm", "penalty", "label", "stop_at")
"""Of which no size is impossible; one that diverges says so."""


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("value", [-1, 1e30])
def test_every_number_has_bounds(name: str, value: float) -> None:
    """Impossible ones end before anything begins, in one line that names the key."""
    values = of(name)
    cls = run_config_class(values, lambda _: "test")
    whole = config.to_dict(config.build(cls, values, {}, "test"))
    said = []
    for path in numbers_of(cls, whole):
        key = ".".join(path)
        if path[0] in ("device", "tracking") or path[-1] in EXEMPT:
            continue
        if path[0] != "objective" and name != "classification":
            continue  # of these there is one alone
        try:
            config.build(cls, values, {key: value}, "test")
            said.append(f"{key} was accepted")
        except LabError as error:
            said.append(str(error))
    assert [line for line in said if "\n" in line or "command line: " not in line] == []


def test_a_backbone_that_no_memory_holds_is_refused_before_it_is_built(tmp_path: Path) -> None:
    spec = {"hidden": [1_000_000, 1_000_000]}
    with pytest.raises(LabError, match=r"1,000,00\d,00\d,00\d parameters take .* GiB of memory"):
        trained(settings_of(tmp_path, model={"backbone": "mlp", "spec": spec}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
