"""One side of a case of `benchmarks.generative_speed`, in a process of its own.

    python -m benchmarks.generative_jobs '{"case": "ddpm_fashion, training", "side": "ours", ...}'

See `benchmarks.supervised_jobs`.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.generative_speed import SHAPES, images
from benchmarks.supervised_speed import LEARNING_RATE, Job
from benchmarks.supervised_speed import images as clothes
from lab import checkpoint, config
from lab.device import autocast, quiet_threads
from lab.errors import LabError
from lab.run import Run

if __name__ == "__main__" and Job(**json.loads(sys.argv[1])).side == "ours":
    quiet_threads()  # as the command `lab` does, which must be before torch is there

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.supervised_jobs import Turn, flops_of_step, our_trainer, seconds, serve
from supervised import objectives
from supervised.backbones.diffusion import load_published
from supervised.config import DenoisingRun
from supervised.data import load
from supervised.diffusion import Diffusion, alpha_bars
from supervised.evaluate import open_objective
from supervised.objectives.denoising import Denoising

N_SAMPLES = 200
"""Drawn by DDIM and DDPM: as many of each of ten classes."""


def make(job: Job) -> tuple[Turn, dict[str, Any]]:
    """A side, ready to take turns, and facts about it: `parameters`, and of ours `flops` of a step."""
    name, _, what = job.case.partition(", ")
    shape, data = SHAPES[name], load(images(name))
    pixels = data.train.tensors["inputs"]
    size = (shape["batch_size"], *pixels.shape[1:])
    values = {
        "objective": {"name": "denoising"},
        "data": {"source": data.name},
        "model": {
            "backbone": "unet",
            "spec": {key: shape[key] for key in ("width", "mults", "attention", "n_res", "groups")},
        },
        "batch_size": shape["batch_size"],
        "optimizer": {"learning_rate": LEARNING_RATE, "max_grad_norm": 1.0},
    }
    trainer, theirs = our_trainer(values, data, job), unet2d(shape, size[1])
    model: Any = trainer.bare["model"]
    load_published(model.backbone, theirs.state_dict())
    _require_equal(model.eval(), theirs.eval(), torch.randn(2, *size[1:]))
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    steps: Iterator[Any]
    if job.side == "ours" and what == "training":
        facts["flops"], steps = flops_of_step(trainer), trainer.iterate()
    elif job.side == "ours":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(*size), torch.zeros(1, dtype=torch.long))
        facts["flops"], steps = counter.get_total_flops(), our_sampling(model, size, job.precision)
    elif what == "training":
        steps = diffusers_training(theirs, pixels, shape["batch_size"], job.precision)
    else:
        steps = diffusers_sampling(theirs, size, job.precision)
    return lambda n: seconds(steps, n), facts


def unet2d(shape: dict[str, Any], channels: int) -> Any:
    """diffusers' U-Net of a shape, with the options that google/ddpm-cifar10-32 has."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    size, mults = shape["img_size"], shape["mults"]
    attends = ["Attn" if size >> i in shape["attention"] else "" for i in range(len(mults))]
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(shape["width"] * mult for mult in mults),
        down_block_types=tuple(f"{attend}DownBlock2D" for attend in attends),
        up_block_types=tuple(f"{attend}UpBlock2D" for attend in reversed(attends)),
        layers_per_block=shape["n_res"],
        attention_head_dim=None,  # type: ignore[arg-type]
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=shape["groups"],
    )


def diffusers_training(unet: nn.Module, images: Tensor, batch_size: int, precision: str) -> Iterator[None]:
    """Steps of diffusers' examples/unconditional_image_generation/train_unconditional.py, nothing logged."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    pixels = images.float() / 127.5 - 1
    unet.train()
    while True:
        for clean in DataLoader(pixels, batch_size, shuffle=True, drop_last=True):  # type: ignore[arg-type]
            noise = torch.randn(clean.shape)
            times = torch.randint(0, 1000, (batch_size,), dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, times)  # type: ignore[arg-type]
            with autocast("cpu", precision):
                loss = F.mse_loss(unet(noisy, times).sample.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield


def diffusers_sampling(unet: nn.Module, shape: Sequence[int], precision: str) -> Iterator[None]:
    """Steps back by DDPMScheduler, over and over."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(1000)
    unet.eval()
    while True:
        x = torch.randn(*shape)
        for t in scheduler.timesteps:
            with torch.inference_mode(), autocast("cpu", precision):
                x = scheduler.step(unet(x, t).sample.float(), t, x).prev_sample  # type: ignore[union-attr]
            yield


def our_sampling(model: nn.Module, shape: Sequence[int], precision: str) -> Iterator[None]:
    """Steps back by `Diffusion.reverse`, over and over."""
    diffusion = Diffusion(alpha_bars("linear", 1000), variance="small", clip=True)
    model.eval()
    while True:
        steps = diffusion.reverse(model, torch.randn(*shape))
        for _ in range(1000):
            with torch.inference_mode(), autocast("cpu", precision):
                next(steps)
            yield


def _require_equal(ours_: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Raises unless both networks say the same."""
    with torch.no_grad():
        times = torch.tensor([5, 700])
        apart = float((ours_(x, times) - theirs(x, times).sample).abs().max())
    if apart > 1e-3:
        raise LabError(f"the two networks differ by {apart:.1e}: their options are not the same.")


# ---- samplers ----


def samplers(folder: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Time, and with a classifier quality, of DDIM with 50 steps and of DDPM with all, on one thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    objective = _to_sample_with(folder)
    steps = {"DDIM": (50, 0.0), "DDPM": (objective.config.n_steps, 1.0)}
    n_samples = N_SAMPLES
    if quick:
        steps, n_samples = {"DDIM": (1, 0.0), "DDPM": (2, 1.0)}, 20
    objective.samples = n_samples
    rows = []
    for name, (n_steps, eta) in steps.items():
        objective.config = replace(objective.config, sampling_steps=n_steps, eta=eta)
        began = time.perf_counter()
        with autocast("cpu", "bf16"):
            images = objective.generate(objective.players, n_samples)
        row: dict[str, Any] = {"sampler": name, "steps": n_steps, "samples": n_samples}
        row["seconds"] = round(time.perf_counter() - began, 2)
        with torch.no_grad():
            row |= objective.judged(images)
        rows.append(row)
    return rows


def _to_sample_with(folder: Path | None) -> Denoising:
    """A run's weights, or untrained ones."""
    if folder is None:
        values = {
            "objective": {"name": "denoising"},
            "data": {"source": clothes().source, "img_size": 28},
            "model": {"backbone": "unet", "spec": {"width": 32, "attention": [7], "n_res": 1, "groups": 8}},
        }
        settings = config.build(DenoisingRun, values, {}, "benchmark")
        objective = objectives.make(settings, load(settings.data))
        objective.players["model"].eval()
    else:
        run = Run.open(folder)
        objective = open_objective(run, checkpoint.load(run.find_checkpoint("latest")), torch.device("cpu"))
    if not isinstance(objective, Denoising) or objective.is_flow:
        raise LabError(
            f"{folder}: is no run of diffusion. Name one, e.g. of configs/supervised/ddpm_fashion.yaml."
        )
    return objective


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[1])), make)
