"""Checkpoints of transformers' and TRL's trainers as safetensors and JSON: opening one runs no code.

What such a trainer writes by itself are pickles (optimizer.pt, scheduler.pt, rng_state.pth,
training_args.bin). With `PlainCheckpoints` before it a checkpoint is

    model.safetensors, config.json ...          the weights, in the number format they are trained in
    adapter_model.safetensors ...               instead, where adapters are trained
    optimizer.safetensors, optimizer.json       tensors by parameter and key; options, schedule, loss scale
    rng_state.safetensors, rng_state.json       torch (CPU, CUDA); Python, NumPy. rng_state_1 of process 1 ...
    trainer_state.json, training_args.json

and whatever it holds is compared, by name, shape and number format, with what the trainer has before
anything is taken from it.
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState

from lab.errors import LabError, first_line

PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt")
"""What transformers writes, and this lab wrote until checkpoints became plain."""
_SHAPED = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"})
"""State of an optimiser that has the shape of its parameter."""


class PlainCheckpoints:
    """Mixed in before a transformers Trainer: nothing that it saves is a pickle, nor is one ever opened.

    On one process or several with DDP; where the model is sharded (FSDP, DeepSpeed) it refuses to save.
    """

    _resumed_from: str | None = None

    def named_parameters_of_optimizer(self) -> dict[str, Tensor]:
        """Every parameter that may be in the optimiser, by name."""
        return dict(_unwrapped(self).named_parameters())

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        trainer: Any = self
        _refuse_shards(trainer)
        if not trainer.args.should_save:
            return
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(_unwrapped(trainer), folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        _write(folder / "training_args.json", json.loads(trainer.args.to_json_string()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        _refuse_shards(trainer)
        if not trainer.args.should_save:
            return
        tensors, described = describe_optimizer(trainer.optimizer, self.named_parameters_of_optimizer())
        save_file(tensors, Path(output_dir) / "optimizer.safetensors")
        scaler = getattr(trainer.accelerator, "scaler", None)
        described["schedule"] = trainer.lr_scheduler.state_dict()
        described["loss_scale"] = scaler.state_dict() if scaler is not None else None
        _write(Path(output_dir) / "optimizer.json", described)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: it is in optimizer.json."""

    def _save_rng_state(self, output_dir: str) -> None:
        trainer: Any = self
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # another process may not have come to it yet
        name, numpy_state = _rng_name(trainer), np.random.get_state()  # noqa: NPY002 (the one that is drawn from)
        tensors = {"cpu": torch.get_rng_state()}
        if trainer.args.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(trainer.args.device)
        save_file(tensors, folder / f"{name}.safetensors")
        kind, keys, *rest = numpy_state
        values = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
        _write(folder / f"{name}.json", values)

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_format(folder)
        load_model(_unwrapped(self) if model is None else model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        trainer: Any = self
        folder = Path(checkpoint)
        check_format(folder)
        self._resumed_from = checkpoint
        path = folder / "optimizer.json"
        described = read(path)
        tensors = read_tensors(folder / "optimizer.safetensors")
        with damage(path):
            schedule, scale = described["schedule"], described["loss_scale"]
            _same_keys(path, schedule, trainer.lr_scheduler.state_dict(), "schedule")
            restore_optimizer(
                trainer.optimizer, self.named_parameters_of_optimizer(), tensors, described, folder
            )
            trainer.lr_scheduler.load_state_dict(schedule)
            scaler = getattr(trainer.accelerator, "scaler", None)
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: see `_load_optimizer_and_scheduler`."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        trainer: Any = self
        folder, name = Path(checkpoint), _rng_name(trainer)
        path = folder / f"{name}.json"
        if not path.is_file():
            raise LabError(
                f"{path}: missing: the checkpoint was written by fewer processes than there are now. Go on "
                "with as many as before."
            )
        values, tensors = read(path), read_tensors(folder / f"{name}.safetensors")
        with damage(path):
            version, internal, gauss = values["python"]
            kind, keys, *rest = values["numpy"]
            random.setstate((version, tuple(internal), gauss))
            np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
            torch.set_rng_state(tensors["cpu"])
            if trainer.args.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["cuda"], trainer.args.device)

    # ---- a run that had come to its end ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, but none at all where every step has been taken.

        transformers looks whether it has come to `max_steps` after a step. Resumed there, within an epoch
        that was not to be finished, it would take one more.
        """
        trainer: Any = self
        if self._resumed_from and trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        if self._resumed_from and trainer._initial_global_step >= trainer.state.max_steps:
            # No epoch has restored them; what follows draws what it would have drawn.
            self._load_rng_state(self._resumed_from)
        self._resumed_from = None
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]


# ---- weights ----


def save_model(model: Any, folder: Path) -> None:
    """Writes the weights being trained, an adapter's or a whole model's, by the names they have in memory.

    transformers by itself renames and splits those of some families (experts of a mixture) to what the Hub
    has, and its trainer then does not find them again.
    """
    if _is_peft(model):
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    else:
        model.save_pretrained(folder, save_original_format=False, max_shard_size="1000TB")


def load_model(model: Any, folder: Path) -> None:
    """Puts weights that `save_model` wrote into a model of the same shape.

    Raises:
        LabError: tensors are missing, too many, or of another shape or number format.
    """
    if _is_peft(model):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        path = folder / "adapter_model.safetensors"
        weights = read_tensors(path)
        options = {"adapter_name": "default", "save_embedding_layers": False}
        compare(path, weights, get_peft_model_state_dict(model, **options))
        set_peft_model_state_dict(model, weights, adapter_name="default")
        return
    path = folder / "model.safetensors"
    weights = read_tensors(path)
    expected = model.state_dict()
    # Of tensors that share memory, as tied embeddings do, one is written.
    written = {_place(expected[name]) for name in weights if name in expected}
    own = {n: t for n, t in expected.items() if n in weights or _place(t) not in written}
    compare(path, weights, own)
    model.load_state_dict(weights, strict=False)


def compare(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a `LabError` unless both have the same names, shapes and number formats."""
    for names, what in ((expected.keys() - found.keys(), "lacks"), (found.keys() - expected.keys(), "has")):
        if names:
            more = f" ({len(names)} such tensors)" if len(names) > 1 else ""
            extra = "" if what == "lacks" else ", which is no tensor of what is trained"
            _refuse(path, f"{what} {min(names)}{extra}{more}")
    for name, tensor in expected.items():
        ours, theirs = ((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in (tensor, found[name]))
        if ours != theirs:
            _refuse(path, f"{name} is {theirs[1]} {theirs[0]}, not {ours[1]} {ours[0]}")


# ---- the optimiser ----


def describe_optimizer(
    optimizer: Any, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by "parameter/key", and the rest for JSON.

    Args:
        optimizer: of torch, or accelerate's wrapper around one.
        parameters: all there may be, by name.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        named = [names.get(id(p), f"{len(groups)}.{i}") for i, p in enumerate(live["params"])]
        groups.append({**group, "params": named})
        for index, name in zip(group["params"], named, strict=True):
            for key, value in state["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
                else:
                    numbers.setdefault(name, {})[key] = value
    kept = sorted({name.rpartition("/")[0] for name in tensors} | numbers.keys())
    return tensors, {"groups": groups, "kept_of": kept, "numbers": numbers}


def restore_optimizer(
    optimizer: Any,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Any],
    folder: Path,
) -> None:
    """The reverse of `describe_optimizer`, into an optimiser that was made in the same way.

    Raises:
        LabError: it is of other parameters or options, or tensors are missing, too many or of another shape.
    """
    path = folder / "optimizer.safetensors"
    now = describe_optimizer(optimizer, parameters)[1]["groups"]
    groups = described["groups"]
    if [group["params"] for group in groups] != [group["params"] for group in now]:
        _refuse(folder / "optimizer.json", "is of other parameters than are trained")
    saved: dict[str, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        saved.setdefault(name, {})[key] = value
    for name, values in described["numbers"].items():
        saved.setdefault(name, {}).update(values)
    shapes = {
        name: parameter.shape
        for group, live in zip(now, optimizer.param_groups, strict=True)
        for name, parameter in zip(group["params"], live["params"], strict=True)
    }
    kept = set(described["kept_of"])  # a parameter that never had a gradient has no state
    for names, what in (
        (saved.keys() - kept, "has a state of {}, of which there was none"),
        (kept - saved.keys(), "lacks the state of {}"),
        (kept - shapes.keys(), "has a state of {}, which is not trained"),
    ):
        if names:
            _refuse(path, what.format(min(names)))
    keys = _keys_of(optimizer)
    if keys and not saved:
        _refuse(path, "lacks every state of the optimiser")
    for name, values in saved.items():
        if keys and keys != values.keys():
            odd = min(keys ^ values.keys())
            _refuse(path, f"{'lacks' if odd in keys else 'has'} {name}/{odd}")
        for key, value in values.items():
            if key in _SHAPED and value.shape != shapes[name]:
                _refuse(path, f"{name}/{key} is {tuple(value.shape)}, not {tuple(shapes[name])}")
            if isinstance(value, Tensor) and not value.is_floating_point():
                _refuse(path, f"{name}/{key} is {value.dtype}, no floating-point numbers")
    state = optimizer.state_dict()
    for group, then in zip(state["param_groups"], groups, strict=True):
        _same_keys(folder / "optimizer.json", then, group, "options")
        for key in group.keys() - {"params"}:
            group[key] = _like(folder / "optimizer.json", key, then[key], group[key])
    index_of = {
        name: index
        for group, then in zip(state["param_groups"], groups, strict=True)
        for index, name in zip(group["params"], then["params"], strict=True)
    }
    optimizer.load_state_dict({**state, "state": {index_of[name]: values for name, values in saved.items()}})


def _keys_of(optimizer: Any) -> set[str] | None:
    """What Adam keeps of every parameter; None for optimisers of which that is not known here."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return None
    amsgrad = any(group["amsgrad"] for group in inner.param_groups)
    return {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}


# ---- files ----


def check_format(folder: Path) -> None:
    """Raises a `LabError` where a checkpoint holds pickles, as older versions and other tools wrote."""
    for name in PICKLES:
        if (folder / name).exists() and not (folder / "optimizer.json").exists():
            raise LabError(
                f"{folder}: holds {name}, a pickle, as earlier versions and other tools wrote; it is not "
                "opened. Finish this run with the version that began it, or begin it again in another folder."
            )


def check_step(folder: Path, step: int) -> None:
    """Raises a `LabError` unless the trainer's own record in a checkpoint is whole and of this step."""
    path = folder / "trainer_state.json"
    values = read(path)
    with damage(path):
        TrainerState(**values)
        if values["global_step"] != step:
            raise ValueError(f"it is of step {values['global_step']}, not {step}")


def read(path: Path) -> Any:
    """JSON of a checkpoint; one line if it is missing or damaged."""
    with damage(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no object")
        return values
    raise AssertionError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; one line if it is missing or damaged."""
    with damage(path):
        return load_file(path)
    raise AssertionError


class damage:
    """A context in which whatever goes wrong means that the file at `path` is not what was written there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        known = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError)
        if isinstance(error, FileNotFoundError):
            _refuse(self.path, "is missing")
        if isinstance(error, (*known, SafetensorError)) and not isinstance(error, LabError):
            _refuse(self.path, f"is damaged ({first_line(error)[:120]})")


def _refuse(path: Path, what: str) -> NoReturn:
    raise LabError(
        f"{path.parent.name}/{path.name}: {what}. Delete {path.parent} to go back to an earlier checkpoint, "
        "or begin this run again."
    ) from None


def _same_keys(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    if found.keys() != expected.keys():
        _refuse(path, f"has other {what} than this version of torch: {min(found.keys() ^ expected.keys())}")


def _like(path: Path, key: str, then: Any, now: Any) -> Any:
    """An option of an optimiser as JSON kept it, of the kind it is now: JSON knows no tuples."""
    if isinstance(now, tuple) and isinstance(then, list) and len(then) == len(now):
        return tuple(_like(path, key, *pair) for pair in zip(then, now, strict=True))
    kinds = {type(now), *((int, float) if type(now) in (int, float) else ())}
    if now is not None and type(then) not in kinds:
        _refuse(path, f"has {key} = {json.dumps(then)[:40]}")
    return then


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, default=_plain), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no place in a checkpoint")


def _rng_name(trainer: Any) -> str:
    index = trainer.args.process_index
    return f"rng_state_{index}" if index else "rng_state"


def _refuse_shards(trainer: Any) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise LabError(
            "checkpoints are written on one process or with DDP; those of a sharded model (FSDP, DeepSpeed) "
            "would be pickles. Set save_strategy='no'."
        )


def _unwrapped(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _place(tensor: Tensor) -> Any:
    """What tensors that share memory have in common; on the meta device they have none."""
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() and not tensor.is_meta else id(tensor)
