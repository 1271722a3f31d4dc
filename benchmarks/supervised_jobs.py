"""One side of a case of `benchmarks.supervised_speed`, in a process of its own.

    python -m benchmarks.supervised_jobs '{"case": "lenet5", "side": "ours", ...}'

It says what it trains, then answers each number of steps on its input with the seconds they took.
"""

import functools
import importlib.util
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.supervised_speed import GPT_SHAPES, IMAGE_BATCH, LEARNING_RATE, WARM_STEPS, Job, images
from lab import config
from lab.device import Compute, quiet_threads, resolve
from lab.errors import LabError

if __name__ == "__main__" and Job(**json.loads(sys.argv[1])).side == "ours":
    quiet_threads()  # as the command `lab` does, which must be before torch is there

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from supervised import objectives
from supervised.backbones import blocked
from supervised.config import SupervisedRun, run_config_class
from supervised.data import DataSet, load
from supervised.data.config import DataConfig
from supervised.trainer import Trainer

N_ROWS = 6_000
"""Of the sets of the library `datasets`."""
PEAK_SIZES = (512, 1024, 2048)
NOWHERE = torch.device("meta")
"""A device on which no network computes in blocks."""
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
"""What nanoGPT is among the shapes `gpt` can take."""

Turn = Callable[[int], float]
"""Does so many steps; returns the seconds they took."""


def make(job: Job, folder: Path) -> tuple[Turn, dict[str, Any]]:
    """A side, ready to take turns, and facts about it: `parameters`, and of ours `flops` of a step.

    `folder` is for what it writes.
    """
    shape = GPT_SHAPES.get(job.case)
    data = load(images() if shape is None else DataConfig(source="python_library", limit=1_000_000))
    values = image_values(job.case, data) if shape is None else gpt_values(shape, data)
    trainer = our_trainer(values, data, job)
    model = trainer.bare["model"]
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    bf16 = job.precision == "bf16"
    if job.side == "ours":
        facts["flops"] = flops_of_step(trainer)
        steps = trainer.iterate()
        return lambda n: seconds(steps, n), facts
    if shape is not None:
        assert job.nanogpt is not None
        nanogpt = load_nanogpt(Path(job.nanogpt))
        turn, facts["parameters"] = nanogpt_loop(
            nanogpt, shape, data.tokenizer.vocab_size, data.train.ids, bf16
        )
        return turn, facts
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    blocked.use(model, NOWHERE)
    if job.side == "DataLoader loop":
        return plain_loop(model.train(), Images(data.train.tensors), IMAGE_BATCH), facts
    feed = {"Trainer on PNGs": png_dataset, "Trainer on arrays": array_dataset}.get(job.side, Images)
    return hf_trainer(model, feed(data.train.tensors), IMAGE_BATCH, bf16, folder), facts


def image_values(backbone: str, data: DataSet) -> dict[str, Any]:
    """Our config of an image network."""
    return {
        "objective": {"name": "classification"},
        "data": {"source": data.name},
        "model": {"backbone": backbone},
        "batch_size": IMAGE_BATCH,
        "optimizer": {"learning_rate": LEARNING_RATE},
    }


def gpt_values(shape: dict[str, int], data: DataSet) -> dict[str, Any]:
    """Our config of a GPT, with nanoGPT's optimiser."""
    sizes = {key: shape[key] for key in ("width", "n_layer", "n_head")}
    return {
        "objective": {"name": "language_model"},
        "data": {"source": data.name, "context": shape["context"]},
        "model": {"backbone": "gpt", "spec": {**GPT2, **sizes}},
        "batch_size": shape["batch_size"],
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
            "max_grad_norm": 1.0,
        },
    }


def our_trainer(values: dict[str, Any], data: DataSet, job: Job) -> Trainer:
    """Our loop, as `lab train` runs it; the peers take their network from one, too."""
    device = {"device": "cpu", "precision": job.precision, "threads": job.threads}
    whole = {**values, "epochs": 1e6, "device": device}
    settings: SupervisedRun = config.build(
        run_config_class(whole, lambda _: "benchmark"), whole, {}, "benchmark"
    )
    if job.side == "ours":
        compute = resolve(settings.device)
    else:
        torch.set_num_threads(job.threads)
        compute = Compute(torch.device("cpu"), job.precision, job.threads, "benchmark")
    torch.manual_seed(0)
    objective = objectives.make(settings, data)
    return Trainer(objective, objective.batches("train", compute.device), settings, compute)


def flops_of_step(trainer: Trainer) -> int:
    """What a forward and a backward pass multiply and add, as torch counts it."""
    batch, model = next(trainer.batches.epoch(0)), trainer.bare["model"]
    blocked.use(model, NOWHERE)  # torch counts no operation of oneDNN's layout
    with FlopCounterMode(display=False) as counter:
        trainer.objective.loss("model", batch).value.backward()
    blocked.use(model, trainer.compute.device)
    return counter.get_total_flops()


def seconds(steps: Iterator[Any], n: int) -> float:
    """That `n` steps took, after some to warm up."""
    for _ in itertools.islice(steps, WARM_STEPS):
        pass
    began = time.perf_counter()
    for _ in itertools.islice(steps, n):
        pass
    return time.perf_counter() - began


def matmul_peaks(threads: int) -> dict[str, float]:
    """FLOPs a second of the best of some square matrix products, by number format."""
    torch.set_num_threads(threads)
    best: dict[str, float] = {"fp32": 0.0, "bf16": 0.0}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in PEAK_SIZES:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            for _ in range(10):
                began = time.perf_counter()
                torch.mm(a, b)
                best[name] = max(best[name], 2 * size**3 / (time.perf_counter() - began))
    return best


# ---- the peers of image networks ----


class Images(Dataset[Any]):
    """Images one by one, scaled and normalised like everybody's first Dataset."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.images, self.labels = tensors["inputs"], tensors["labels"]
        pixels = self.images.float() / 255
        self.mean, self.std = pixels.mean(), pixels.std()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = (self.images[index].float() / 255 - self.mean) / self.std
        return {"inputs": image, "labels": self.labels[index]}


def png_dataset(tensors: dict[str, Tensor]) -> Any:
    """Images as the Hub has them, decoded and normalised one by one when they are asked for."""
    import numpy as np
    from datasets import ClassLabel, Features, Image
    from datasets import Dataset as HubDataset
    from PIL.Image import fromarray

    images, labels = tensors["inputs"][:N_ROWS, 0].numpy(), tensors["labels"][:N_ROWS].tolist()
    mean, std = float(images.mean()) / 255, float(images.std()) / 255
    features = Features({"image": Image(), "labels": ClassLabel(num_classes=10)})
    rows = {"image": [fromarray(image) for image in images], "labels": labels}

    def normalised(batch: dict[str, Any]) -> dict[str, Any]:
        arrays = [np.asarray(image, dtype=np.float32)[None] / 255 for image in batch["image"]]
        return {"inputs": [torch.from_numpy((a - mean) / std) for a in arrays], "labels": batch["labels"]}

    return HubDataset.from_dict(rows, features=features).with_transform(normalised)


def array_dataset(tensors: dict[str, Tensor]) -> Any:
    """Normalised images as rows of a table that gives tensors, as the documentation of `datasets` begins."""
    from datasets import Dataset as HubDataset

    images = Images({name: tensor[:N_ROWS] for name, tensor in tensors.items()})
    rows = {"inputs": [images[i]["inputs"].numpy() for i in range(len(images))]}
    return HubDataset.from_dict({**rows, "labels": images.labels.tolist()}).with_format("torch")


def plain_loop(model: nn.Module, images: Images, batch_size: int) -> Turn:
    """A DataLoader, AdamW and a loss that is read every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def steps() -> Iterator[float]:
        while True:
            for batch in DataLoader(images, batch_size, shuffle=True, drop_last=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch["inputs"]), batch["labels"])
                loss.backward()
                optimizer.step()
                yield loss.item()

    endless = steps()
    return lambda n: seconds(endless, n)


def hf_trainer(model: nn.Module, images: Any, batch_size: int, bf16: bool, folder: Path) -> Turn:
    """transformers' Trainer with its defaults, logging and saving off."""
    from transformers import Trainer as HFTrainer
    from transformers import TrainerCallback, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Clock(TrainerCallback):
        began = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_STEPS:
                self.began = time.perf_counter()
            self.seconds = time.perf_counter() - self.began

    wrapped = WithLoss()

    def turn(n: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=WARM_STEPS + n,
            per_device_train_batch_size=batch_size,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            bf16=bf16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,  # of images the transform needs one that the model does not know
        )
        clock = Clock()
        HFTrainer(model=wrapped, args=arguments, train_dataset=images, callbacks=[clock]).train()
        return clock.seconds

    return turn


# ---- nanoGPT ----


def load_nanogpt(folder: Path) -> ModuleType:
    """Its model.py.

    Raises:
        LabError: it is not there.
    """
    path = folder / "model.py"
    if not path.is_file():
        raise LabError(f"{path}: no such file. --nanogpt is a clone of github.com/karpathy/nanoGPT.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def nanogpt_loop(
    module: ModuleType, shape: dict[str, int], vocab_size: int, ids: Tensor, bf16: bool
) -> tuple[Turn, int]:
    """nanoGPT's model and optimiser, stepped as in its train.py: autocast, clipping at 1, nothing read."""
    context, batch_size = shape["context"], shape["batch_size"]
    torch.manual_seed(0)
    model = module.GPT(
        module.GPTConfig(
            block_size=context,
            vocab_size=vocab_size,
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            n_embd=shape["width"],
            dropout=0.0,
            bias=True,
        )
    )
    optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), "cpu")

    def autocast() -> AbstractContextManager[Any]:
        return torch.amp.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    def steps() -> Iterator[int]:
        for step in itertools.count():
            starts = torch.randint(len(ids) - context, (batch_size,)).tolist()
            x = torch.stack([ids[i : i + context] for i in starts]).long()
            y = torch.stack([ids[i + 1 : i + 1 + context] for i in starts]).long()
            with autocast():
                _, loss = model(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield step

    endless = steps()
    return lambda n: seconds(endless, n), sum(p.numel() for p in model.parameters())


def serve(job: Job, make: Callable[[Job], tuple[Turn, dict[str, Any]]]) -> None:
    """Answers on what was the standard output, where nothing else may write."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    warnings.filterwarnings("ignore", module="transformers")
    if job.side == "peak":
        print(json.dumps(matmul_peaks(job.threads)), file=answers, flush=True)
        return
    turn, facts = make(job)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        serve(Job(**json.loads(sys.argv[1])), functools.partial(make, folder=Path(folder)))
