"""Checkpoints of the trainers: no pickle in them, what is missing or altered is one line, exact resume."""

import contextlib
import json
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab.errors import LabError
from rlhf import checkpoints
from tests.rlhf.test_ranking import comparisons, trainer_of

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 still asks for what transformers 5.23 renamed.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

LORA = {"r": 2, "task_type": "SEQ_CLS", "modules_to_save": ["score"], "target_modules": ["q_proj", "v_proj"]}


def pickles(folder: Path) -> list[str]:
    """The files below a folder that a pickle is in: as such, in a zip as torch's, or by its name."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            plain = False
            if data[:1] == b"\x80":
                with contextlib.suppress(ValueError, UnicodeDecodeError):
                    plain = any(opcode.name == "STOP" for opcode, *_ in pickletools.genops(data))
            zipped = data[:4] == b"PK\x03\x04" and b".pkl" in data
            named = path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")
            if plain or zipped or named:
                found.append(str(path.relative_to(folder)))
    return found


def test_a_pickle_would_be_found(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"a": 1}, tmp_path / "b.json", _use_new_zipfile_serialization=False)
    assert sorted(pickles(tmp_path)) == ["a.safetensors", "b.json"]


def reward_trainer(folder: Path, lora: bool = False, **settings: Any) -> Any:
    from peft import LoraConfig

    peft: Any = LoraConfig(**LORA) if lora else None  # type: ignore[arg-type]
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, **settings}
    return trainer_of(folder, comparisons(30), peft_config=peft, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A checkpoint in the middle of a training, of all weights or of adapters; made once."""
    made: dict[bool, Path] = {}

    def make(lora: bool) -> Path:
        if lora not in made:
            folder = tmp_path_factory.mktemp("lora" if lora else "full")
            reward_trainer(folder, lora).train()
            made[lora] = folder
        return made[lora]

    return make


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_checkpoint_holds_a_pickle_and_resuming_opens_none(
    saved: Callable[[bool], Path], tmp_path: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(lora)
    assert len(list(folder.glob("checkpoint-*"))) == 4
    assert pickles(folder) == []
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    monkeypatch.setattr(torch, "save", lambda *_, **__: pytest.fail("torch.save"))
    whole = reward_trainer(tmp_path / "whole", lora)
    whole.train()
    for step in (2, 4, 6, 8):  # within an epoch, between two, and at the very end
        resumed = reward_trainer(tmp_path / "resumed", lora)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.state.global_step == 8
        for (name, a), b in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), (step, name)


def test_the_random_numbers_go_on_where_they_were(saved: Callable[[bool], Path], tmp_path: Path) -> None:
    """Python's, NumPy's and torch's."""
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    trainer = reward_trainer(tmp_path)
    draw()
    np.random.randn()  # noqa: NPY002 (leaves half of a pair for the next call)
    random.gauss(0, 1)
    trainer._save_rng_state(str(tmp_path / "state"))
    expected = draw()
    draw()
    trainer._load_rng_state(str(tmp_path / "state"))
    assert draw() == expected


@pytest.mark.parametrize("epochs", [0.5, *(pytest.param(n, marks=pytest.mark.slow) for n in (0.3, 1.0, 1.6))])
def test_resumed_at_its_last_step_it_takes_no_more(tmp_path: Path, epochs: float) -> None:
    """Stopped between its last checkpoint and model/, as a kill may stop it."""
    settings = {"num_train_epochs": epochs, "save_steps": 1, "per_device_train_batch_size": 3}
    whole = reward_trainer(tmp_path, **settings)
    whole.train()
    last = whole.state.max_steps
    assert last == -(-10 * epochs // 1)
    after = torch.rand(3)
    for _ in range(2):  # each resume took one more update
        resumed = reward_trainer(tmp_path / "again", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
        assert torch.equal(torch.rand(3), after), "random numbers go on"
        assert resumed.state.global_step == last
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


# ---- what is missing or altered ----


def without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def with_one_more(tensors: dict[str, Tensor], name: str) -> None:
    tensors["stranger/exp_avg"] = torch.zeros(3)


def renamed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_"] = tensors.pop(name)


def of_another_shape(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros((*tensors[name].shape, 2), dtype=tensors[name].dtype)


def of_another_format(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64 if tensors[name].is_floating_point() else torch.float32)


def empty(tensors: dict[str, Tensor], name: str) -> None:
    tensors.clear()


DAMAGES = [without, with_one_more, renamed, of_another_shape, of_another_format, empty]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_one_line(
    saved: Callable[[bool], Path], tmp_path: Path, lora: bool, damage: Callable[..., None]
) -> None:
    """Whichever file they are in: also of one whose hash was made to match."""
    source = saved(lora) / "checkpoint-2"
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        if file == "rng_state.safetensors" and damage is with_one_more:
            continue  # another device's, which this run has not
        folder = Path(shutil.copytree(source, tmp_path / file))
        tensors = load_file(folder / file)
        # A tensor with dimensions: Adam's count of steps has none.
        damage(tensors, next(name for name, tensor in sorted(tensors.items()) if tensor.dim()))
        save_file(tensors, folder / file)
        with pytest.raises(LabError) as caught:
            reward_trainer(tmp_path / "run", lora).train(resume_from_checkpoint=str(folder))
        [line] = str(caught.value).splitlines()
        assert file.partition(".")[0] in line, line
        assert "go back to an earlier checkpoint" in line


@pytest.mark.parametrize("file", ["optimizer.json", "rng_state.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"python": 3, "numpy": [1], "groups": 1}', None])
def test_values_that_are_none_are_one_line(
    saved: Callable[[bool], Path], tmp_path: Path, file: str, content: str | None
) -> None:
    folder = Path(shutil.copytree(saved(False) / "checkpoint-2", tmp_path / "damaged"))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(LabError) as caught:
        reward_trainer(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    [line] = str(caught.value).splitlines()
    assert file in line


@pytest.mark.parametrize("path", [("groups", 0, "lr"), ("groups", 0, "params"), ("kept_of",), ("schedule",)])
@pytest.mark.parametrize("value", [None, "x", {}, [["a"]]])
def test_every_value_is_looked_at(
    saved: Callable[[bool], Path], tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    folder = Path(shutil.copytree(saved(False) / "checkpoint-2", tmp_path / "damaged"))
    whole = inner = json.loads((folder / "optimizer.json").read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "optimizer.json").write_text(json.dumps(whole))
    with pytest.raises(LabError) as caught:
        reward_trainer(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", checkpoints.PICKLES)
def test_a_checkpoint_of_an_earlier_version_says_what_to_do(
    saved: Callable[[bool], Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(saved(False) / "checkpoint-2", tmp_path / "old"))
    (folder / "optimizer.json").unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(LabError) as caught:
        reward_trainer(tmp_path / "run").train(resume_from_checkpoint=str(folder))
    [line] = str(caught.value).splitlines()
    assert name in line
    assert "a pickle" in line
    assert "begin it again" in line


@pytest.mark.parametrize(("step", "whole"), [(2, True), (3, False)])
def test_the_trainers_own_record_is_of_this_step(
    saved: Callable[[bool], Path], step: int, whole: bool, tmp_path: Path
) -> None:
    folder = saved(False) / "checkpoint-2"
    if whole:
        checkpoints.check_step(folder, step)
        return
    with pytest.raises(LabError, match=r"trainer_state\.json: is damaged .it is of step 2, not 3"):
        checkpoints.check_step(folder, step)


# ---- optimisers and models that differ in kind ----


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_other_optimisers_go_on_exactly_too(tmp_path: Path, optim: str) -> None:
    settings = {"optim": optim, "max_steps": 4}
    whole = reward_trainer(tmp_path, **settings)
    whole.train()
    resumed = reward_trainer(tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_the_hub_keeps_under_other_names_goes_on_exactly(tmp_path: Path) -> None:
    """A mixture's experts are one tensor in memory and many on disk; resumed by name, they stayed random."""
    from transformers import AutoModelForSequenceClassification, MixtralConfig

    from tests.rlhf.test_scoring import EOS, PAD, VOCAB

    def trainer(folder: str) -> Any:
        torch.manual_seed(0)
        options: dict[str, Any] = {"vocab_size": len(VOCAB), "pad_token_id": PAD, "eos_token_id": EOS}
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_local_experts": 2,
        }
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_labels": 1}
        config = MixtralConfig(**options, **sizes, **heads)
        model = AutoModelForSequenceClassification.from_config(config)
        return trainer_of(
            tmp_path / folder, comparisons(30), model, max_steps=4, save_strategy="steps", save_steps=2
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_number_of_processes_that_grew_is_said(saved: Callable[[bool], Path], tmp_path: Path) -> None:
    trainer = reward_trainer(tmp_path)
    trainer.args = type("Arguments", (), {"process_index": 1, "device": torch.device("cpu")})()
    with pytest.raises(LabError, match="fewer processes than there are now"):
        trainer._load_rng_state(str(saved(False) / "checkpoint-2"))


def test_what_is_overridden_is_still_there() -> None:
    """An upgrade of transformers that renames any of these must fail here, loudly: it would write pickles."""
    import inspect

    from transformers import Trainer

    source = inspect.getsource(Trainer)
    for name in (n for n in vars(checkpoints.PlainCheckpoints) if n.startswith("_") and "__" not in n):
        assert hasattr(Trainer, name) or name == "_resumed_from", name
    # Every place that saves or opens a pickle is in a method that is overridden, or for hardware this is not.
    assert source.count("torch.save(") == 9, "look for new ones"
    assert source.count("torch.load(") == 11
