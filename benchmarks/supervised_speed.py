"""Training steps a second: our loop beside transformers' Trainer, a DataLoader loop and nanoGPT's model.

    python -m benchmarks.supervised_speed --nanogpt PATH

All sides of a case have the same network, batch size and optimiser, take turns in one process, and are
compared round by round: a ratio is the median over rounds. Of the peers of the image networks one Trainer
is fed as transformers' own image-classification example feeds it, PNGs from a `datasets.Dataset` through a
transform; the others get tensors from a Dataset that normalises each image. The images are Fashion-MNIST,
or scikit-learn's digits where it is not installed. PATH is a checkout of github.com/karpathy/nanoGPT, whose
model.py is used as it is. The share of the machine's peak is a step's FLOPs over what the best of some
matrix products reaches.
"""

import argparse
import importlib.util
import itertools
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from benchmarks import machine
from lab import config
from lab.device import Compute, quiet_threads
from lab.errors import LabError
from lab.files import explain_write_errors, write_json

quiet_threads()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from supervised import objectives  # noqa: E402
from supervised.config import SupervisedRun, run_config_class  # noqa: E402
from supervised.data import DataSet, load  # noqa: E402
from supervised.data.config import DataConfig  # noqa: E402
from supervised.trainer import Trainer  # noqa: E402

DEFAULT_OUT = machine.ROOT / "benchmarks" / "results" / "supervised_speed.json"
LEARNING_RATE = 1e-3
WARM_STEPS = 3
"""Steps at the start of each turn that are not timed."""
N_PNGS = 6_000
PEAK_SIZES = (512, 1024, 2048)
GPT_SHAPES = {
    "gpt 4x128": {"n_layer": 4, "n_head": 4, "width": 128, "context": 128, "batch_size": 32},
    "gpt 6x384": {"n_layer": 6, "n_head": 6, "width": 384, "context": 256, "batch_size": 8},
}
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}
"""What nanoGPT is among the shapes `gpt` can take."""

Turn = Callable[[int], float]
"""Does so many steps; returns the seconds they took."""


@dataclass(frozen=True)
class Case:
    """Networks of one shape, trained side by side."""

    name: str
    sides: dict[str, Turn]
    n_steps: int
    """Of a turn."""
    parameters: dict[str, int]
    flops: int
    """Of a step, forward and backward."""


# ---- our side ----


def ours(values: dict[str, Any], data: DataSet, precision: str) -> tuple[Turn, Trainer]:
    """Our loop, as `lab train` runs it."""
    whole = {**values, "epochs": 1e6, "device": {"precision": precision, "threads": 1}}
    settings: SupervisedRun = config.build(
        run_config_class(whole, lambda _: "benchmark"), whole, {}, "benchmark"
    )
    compute = Compute(torch.device("cpu"), precision, 1, "benchmark")
    torch.manual_seed(0)
    objective = objectives.make(settings, data)
    trainer = Trainer(objective, objective.batches("train", compute.device), settings, compute)
    steps = trainer.iterate()
    return lambda n: _seconds(steps, n), trainer


def _seconds(steps: Iterator[Any], n: int) -> float:
    for _ in itertools.islice(steps, WARM_STEPS):
        pass
    began = time.perf_counter()
    for _ in itertools.islice(steps, n):
        pass
    return time.perf_counter() - began


def flops_of_step(trainer: Trainer) -> int:
    """What a forward and a backward pass multiply and add, as torch counts it."""
    batch = next(trainer.batches.epoch(0))
    with FlopCounterMode(display=False) as counter:
        trainer.objective.loss("model", batch).value.backward()
    return counter.get_total_flops()


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

    images, labels = tensors["inputs"][:N_PNGS, 0].numpy(), tensors["labels"][:N_PNGS].tolist()
    mean, std = float(images.mean()) / 255, float(images.std()) / 255
    features = Features({"image": Image(), "labels": ClassLabel(num_classes=10)})
    rows = {"image": [fromarray(image) for image in images], "labels": labels}

    def normalised(batch: dict[str, Any]) -> dict[str, Any]:
        arrays = [np.asarray(image, dtype=np.float32)[None] / 255 for image in batch["image"]]
        return {"inputs": [torch.from_numpy((a - mean) / std) for a in arrays], "labels": batch["labels"]}

    return HubDataset.from_dict(rows, features=features).with_transform(normalised)


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
    return lambda n: _seconds(endless, n)


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


def image_case(backbone: str, data: DataSet, batch_size: int, n_steps: int, folder: Path) -> Case:
    """One image network: ours in both formats, the plain loop, transformers' Trainer."""
    values = {
        "objective": {"name": "classification"},
        "data": {"source": data.name},
        "model": {"backbone": backbone},
        "batch_size": batch_size,
        "optimizer": {"learning_rate": LEARNING_RATE},
    }
    images = Images(data.train.tensors)
    turn_bf16, trainer = ours(values, data, "bf16")
    turn_fp32, _ = ours(values, data, "fp32")
    peers: list[nn.Module] = [ours(values, data, "fp32")[1].bare["model"] for _ in range(4)]
    for peer in peers:
        peer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    sides = {
        "ours, bf16": turn_bf16,
        "ours, fp32": turn_fp32,
        "Trainer on PNGs, fp32": hf_trainer(
            peers[3], png_dataset(data.train.tensors), batch_size, False, folder
        ),
        "Trainer on tensors, fp32": hf_trainer(peers[0], images, batch_size, False, folder),
        "Trainer on tensors, bf16": hf_trainer(peers[1], images, batch_size, True, folder),
        "DataLoader loop, fp32": plain_loop(peers[2].train(), images, batch_size),
    }
    n = sum(p.numel() for p in trainer.bare["model"].parameters())
    return Case(backbone, sides, n_steps, dict.fromkeys(sides, n), flops_of_step(trainer))


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
    return lambda n: _seconds(endless, n), sum(p.numel() for p in model.parameters())


def gpt_case(name: str, shape: dict[str, int], data: DataSet, nanogpt: ModuleType, n_steps: int) -> Case:
    """A GPT: ours and nanoGPT's, in both formats."""
    values = {
        "objective": {"name": "language_model"},
        "data": {"source": data.name, "context": shape["context"]},
        "model": {
            "backbone": "gpt",
            "spec": {**GPT2, **{key: shape[key] for key in ("width", "n_layer", "n_head")}},
        },
        "batch_size": shape["batch_size"],
        "optimizer": {
            **{
                "learning_rate": LEARNING_RATE,
                "weight_decay": 0.1,
                "betas": [0.9, 0.95],
                "max_grad_norm": 1.0,
            }
        },
    }
    sides: dict[str, Turn] = {}
    parameters: dict[str, int] = {}
    for precision in ("bf16", "fp32"):
        sides[f"ours, {precision}"], trainer = ours(values, data, precision)
        parameters[f"ours, {precision}"] = sum(p.numel() for p in trainer.bare["model"].parameters())
        side = f"nanoGPT, {precision}"
        vocab_size, bf16 = data.tokenizer.vocab_size, precision == "bf16"
        sides[side], parameters[side] = nanogpt_loop(nanogpt, shape, vocab_size, data.train.ids, bf16)
    return Case(name, sides, n_steps, parameters, flops_of_step(trainer))


# ---- measuring ----


def matmul_peak(dtype: torch.dtype, repeats: int) -> float:
    """FLOPs a second of the best of some square matrix products."""
    best = 0.0
    for size in PEAK_SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def measure(case: Case, rounds: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """All sides in turn, `rounds` times; a row for each."""
    seconds: dict[str, list[float]] = {side: [] for side in case.sides}
    for number in range(rounds):
        order = list(case.sides.items())
        for side, turn in order if number % 2 == 0 else reversed(order):
            seconds[side].append(turn(case.n_steps) / case.n_steps)
    rows = []
    for side, spent in seconds.items():
        precision = side.rpartition(", ")[2]
        rows.append(
            {
                "case": case.name,
                "side": side,
                "parameters": case.parameters[side],
                "ms_a_step_by_round": [round(1000 * s, 3) for s in spent],
                "ours_is_so_many_times_as_fast": {
                    other: round(median(b / a for a, b in zip(mine, spent, strict=True)), 2)
                    for other, mine in seconds.items()
                    if other.startswith("ours") and other != side
                },
                "share_of_matmul_peak": round(case.flops / median(spent) / peaks[precision], 3),
            }
        )
    return rows


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures all cases and writes the results."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="transformers")
    about = machine.describe(("torch", "transformers", "accelerate", "numpy"))
    quick, rounds = options.quick, options.rounds
    peaks = {
        name: matmul_peak(dtype, 2 if quick else 10)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    data = load(_images())
    with explain_write_errors(str(options.out), "Name another file."):
        options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for backbone, n_steps in (("lenet5", 60), ("resnet8", 20)):
        case = image_case(backbone, data, 128, 2 if quick else n_steps, options.out.parent)
        rows += measure(case, rounds, peaks)
    if options.nanogpt is None:
        print("nanoGPT left out: --nanogpt PATH, a clone of github.com/karpathy/nanoGPT", file=sys.stderr)
    else:
        nanogpt = load_nanogpt(options.nanogpt)
        text = load(DataConfig(source="python_library", limit=1_000_000))
        for name, shape in list(GPT_SHAPES.items())[: 1 if quick else None]:
            rows += measure(gpt_case(name, shape, text, nanogpt, 2 if quick else 10), rounds, peaks)
    results = {
        "machine": about,
        "command": shlex.join(["python", "-m", "benchmarks.supervised_speed", *_public(arguments)]),
        "settings": {
            "threads": 1,
            "rounds": rounds,
            "images": data.name,
            "batch_size": 128,
            "gpt": GPT_SHAPES,
        },
        "matmul_peak_gflops": {name: round(peak / 1e9, 1) for name, peak in peaks.items()},
        "rows": rows,
    }
    with explain_write_errors(str(options.out), "Free some space and try again."):
        write_json(options.out, results)
    return results


def _public(arguments: Sequence[str]) -> list[str]:
    """Without folders of this machine."""
    return [
        "PATH" if before == "--nanogpt" else word for before, word in itertools.pairwise(["", *arguments])
    ]


def _images() -> DataConfig:
    try:
        config_ = DataConfig(source="fashion_mnist")
        load(config_)
    except LabError:
        return DataConfig(source="digits", img_size=28)
    return config_


def table(results: dict[str, Any]) -> str:
    """The rows for people."""
    lines = [
        f"matmul peak, one thread: {results['matmul_peak_gflops']} GFLOP/s",
        f"{'case':10} {'side':28} {'ms a step':>10} {'of peak':>8}  ours is so many times as fast",
    ]
    for row in results["rows"]:
        ratios = ", ".join(
            f"{k.partition(', ')[2]} {v}" for k, v in row["ours_is_so_many_times_as_fast"].items()
        )
        spent = median(row["ms_a_step_by_round"])
        lines.append(
            f"{row['case']:10} {row['side']:28} {spent:>10.2f} {row['share_of_matmul_peak']:>8.1%}  {ratios}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes the file; returns the exit code, 2 for anything the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (7)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work?")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON")
    try:
        results = run(parser.parse_args(arguments), arguments)
    except LabError as error:
        print(f"supervised_speed: {error}", file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
