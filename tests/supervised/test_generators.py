"""Objectives that make images: losses and penalties by hand, two players in turn, exact resume, and how what
they make is judged."""

import json
import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lab import checkpoint
from lab.errors import LabError
from lab.run import Run
from lab.statistics import wilson_interval
from lab.tracking import read_metrics
from supervised import detection
from supervised.backbones.flow import log_density
from supervised.data import load
from supervised.data.config import DataConfig
from supervised.objectives.adversarial import critic_loss, frozen, generator_loss, squared_gradients
from supervised.objectives.generative import _between, to_bytes
from supervised.objectives.likelihood import filled
from supervised.pipeline import SupervisedPipeline
from supervised.trainer import Trainer
from tests.host_reads import HostReads
from tests.supervised.test_training import CPU, objective_of, settings_of, trained, without_times

DIGITS = {"source": "digits", "limit": 120}
PHOTOGRAPHS = {"source": "photographs", "img_size": 48, "limit": 40, "augment": {"flip": True}}


def adversarial(loss: str = "r3gan", **objective: Any) -> dict[str, Any]:
    critic = {"backbone": "dcgan_discriminator", "spec": {"width": 8}}
    return {
        "objective": {"name": "adversarial", "loss": loss, "samples": 60, "critic": critic, **objective},
        "data": DIGITS,
        "model": {"backbone": "dcgan_generator", "spec": {"width": 8, "latent": 8}},
        "batch_size": 30,
        "ema_decay": 0.9,
        "eval": {"every_epochs": 0.75},
    }


def variational(conditional: bool = False) -> dict[str, Any]:
    learned = {"prior_depth": 2, "prior_hidden": 8, "depth": 1} if conditional else {}
    return {
        "objective": {"name": "variational", "samples": 60, "conditional": conditional},
        "data": DIGITS,
        "model": {"backbone": "vae", "spec": {"width": 8, "latent": 4, **learned}},
        "batch_size": 30,
        "ema_decay": 0.9,
    }


def flow(conditional: bool = False) -> dict[str, Any]:
    return {
        "objective": {"name": "flow", "samples": 60, "temperature": 0.8, "conditional": conditional},
        "data": DIGITS,
        "model": {"backbone": "flow", "spec": {"depth": 2, "hidden": 8}},
        "batch_size": 30,
    }


def super_resolution(adversarial_weight: float = 0.01) -> dict[str, Any]:
    critic = {"backbone": "srgan_discriminator", "spec": {"width": 4, "pool": 1, "hidden": 8}}
    return {
        "objective": {
            "name": "super_resolution",
            "patch": 32,
            "adversarial_weight": adversarial_weight,
            "critic": critic,
        },
        "data": PHOTOGRAPHS,
        "model": {"backbone": "srresnet", "spec": {"depth": 1, "width": 8}},
        "batch_size": 4,
        "ema_decay": 0.9,
    }


PROBLEMS: dict[str, Callable[[], dict[str, Any]]] = {
    "r3gan": adversarial,
    "wgan_gp": lambda: adversarial("wgan_gp", critic_steps=3),
    "non_saturating, conditional": lambda: adversarial("non_saturating", conditional=True),
    "variational": variational,
    "variational, conditional": lambda: variational(conditional=True),
    "flow": flow,
    "flow, conditional": lambda: flow(conditional=True),
    "pixels": lambda: super_resolution(0.0),
    "srgan": super_resolution,
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of digits, right in most cases."""
    values = {
        "objective": {"name": "classification"},
        "data": {"source": "digits"},
        "model": {"backbone": "lenet5"},
        "optimizer": {"learning_rate": 3e-3},
        "checkpoint": {"every_epochs": 1e6},
    }
    folder = tmp_path_factory.mktemp("judge") / "lenet"
    return trained(settings_of(values, max_steps=150, epochs=100.0), folder).folder


# ---- the loop ----


@each_problem
def test_a_run_killed_and_resumed_ends_as_one_never_stopped(problem: str, tmp_path: Path) -> None:
    """Both players, their optimisers and averages, and the statistics of batch norms."""
    settings = settings_of(PROBLEMS[problem]())
    whole = trained(settings, tmp_path / "whole")
    killed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True))
    for path in sorted(killed.glob("checkpoints/step_*"))[3:]:
        shutil.rmtree(path)
    (killed / "run.json").write_text((killed / "run.json").read_text().replace('"finished"', '"running"'))
    resumed = trained(settings, killed, resume=True)
    assert without_times(resumed) == without_times(whole)
    last = f"checkpoints/step_{8:012d}"
    files = sorted((whole.folder / last).glob("*.safetensors"))
    optimizers = {path.stem for path in files} & {"optimizer_generator", "optimizer_critic"}
    assert len(optimizers) == len(settings_players(problem) & {"generator", "critic"})
    for file in files:
        mine, theirs = load_file(file), load_file(killed / last / file.name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file.name


def settings_players(problem: str) -> set[str]:
    return set(objective_of(settings_of(PROBLEMS[problem]())).players)


@each_problem
def test_a_step_on_the_meta_device(problem: str) -> None:
    objective = objective_of(settings_of(PROBLEMS[problem]()))
    batch = next(objective.batches("train", torch.device("meta")).epoch(0))
    for module in objective.players.values():
        module.to("meta").train()
    for player in {name for step in range(8) for name in objective.turns(step)}:
        loss = objective.loss(player, batch)
        loss.value.backward()
        assert loss.value.device.type == "meta"
        assert all(p.grad is not None for p in objective.players[player].parameters())


@each_problem
def test_an_update_never_waits_for_the_device(problem: str) -> None:
    settings = settings_of(PROBLEMS[problem]())
    objective = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
    steps = trainer.iterate()
    next(steps)
    with HostReads() as reads:
        for _ in range(3):
            next(steps)
    assert not reads.seen


@each_problem
def test_it_leaves_numbers_and_figures(problem: str, tmp_path: Path) -> None:
    settings = settings_of(PROBLEMS[problem](), checkpoint={"every_epochs": 1e6}, max_steps=2)
    run = trained(settings, tmp_path / "run")
    headline = objective_of(settings).headline
    assert math.isfinite(run.info["summary"][f"eval/best_{headline}"])
    drawn = {path.stem for path in run.media.iterdir()}
    wanted = {"comparison"} if "super" in settings.objective.name else {"samples", "interpolation"}
    assert drawn >= wanted


@pytest.mark.parametrize(
    ("problem", "number"), [("variational", "loss"), ("flow", "loss"), ("pixels", "loss")]
)
def test_it_learns(problem: str, number: str, tmp_path: Path) -> None:
    quiet = {"every_epochs": 1e6}
    values = {**PROBLEMS[problem](), "ema_decay": 0.0, "eval": quiet, "checkpoint": quiet}
    run = trained(settings_of(values, max_steps=60, optimizer={"learning_rate": 5e-3}), tmp_path / "run")
    losses = [row[f"train/{number}"] for row in read_metrics(run.metrics) if f"train/{number}" in row]
    assert sum(losses[-5:]) < 0.93 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["r3gan", "wgan_gp", "non_saturating"])
def test_a_generator_comes_nearer_to_what_is_real(loss: str, tmp_path: Path) -> None:
    quiet = {"every_epochs": 1e6}
    values = {**adversarial(loss), "eval": quiet, "checkpoint": quiet, "log_every_steps": 200}
    betas = [0.5, 0.99]
    values["optimizer"] = {"name": "adam", "learning_rate": 2e-3, "betas": betas, "schedule": "constant"}
    distances = []
    for n_steps in (1, 200):
        run = trained(settings_of(values, max_steps=n_steps), tmp_path / f"{n_steps}")
        distances.append(run.info["summary"]["eval/frechet_pixels"])
    assert distances[1] < 0.5 * distances[0]


def test_the_critic_may_move_more_often_than_the_generator() -> None:
    settings = settings_of(adversarial("wgan_gp", critic_steps=3))
    objective = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
    moved = []
    before = trainer.weights(judged=False)
    before = {name: value.clone() for name, value in before.items()}
    for _ in trainer.iterate():
        after = {name: value.clone() for name, value in trainer.weights(judged=False).items()}
        learned = {k.partition(".")[0] for k in after if "running" not in k and "num_batches" not in k}
        moved.append(
            {
                player
                for player in learned
                if any(
                    not torch.equal(after[k], before[k])
                    for k in after
                    if k.startswith(player) and k.endswith(("weight", "bias"))
                )
            }
        )
        before = after
    both = {"critic", "generator"}
    assert moved == [{"critic"}, {"critic"}, both, {"critic"}, {"critic"}, both, {"critic"}, {"critic"}]


# ---- losses by hand ----


class Linear(nn.Module):
    """D(x) = w . x, with the gradient w everywhere."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return images.flatten(1) @ self.weights


class Bowl(nn.Module):
    """D(x) = |x|^2 / 2, with the gradient x."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.5 * images.flatten(1).square().sum(1)


REAL, FAKE = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
REAL, FAKE = REAL.view(2, 1, 1, 2), FAKE.view(2, 1, 1, 2)
WEIGHTS = torch.tensor([0.6, 0.8])  # of length 1
# D(x) = 1.8, 0.8; D(y) = 1.6, 1.2


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_critics_losses_by_hand() -> None:
    values = {
        loss: critic_loss(Linear(2 * WEIGHTS), REAL, FAKE, loss, 3.0).value.item()
        for loss in ("non_saturating", "wgan_gp", "r3gan")
    }
    # D is twice as large: 3.6, 1.6 and 3.2, 2.4; its gradient's length is 2.
    original = (softplus(-3.6) + softplus(-1.6) + softplus(3.2) + softplus(2.4)) / 2
    assert values["non_saturating"] == pytest.approx(original)
    assert values["wgan_gp"] == pytest.approx(2.8 - 2.6 + 3 * (2 - 1) ** 2)
    relative = (softplus(3.2 - 3.6) + softplus(2.4 - 1.6)) / 2
    assert values["r3gan"] == pytest.approx(relative + 3 / 2 * (4 + 4))


def test_the_generators_losses_by_hand() -> None:
    critic = Linear(WEIGHTS)
    values = {
        loss: generator_loss(critic, REAL, FAKE, loss).item()
        for loss in ("non_saturating", "wgan_gp", "r3gan")
    }
    assert values["non_saturating"] == pytest.approx((softplus(-1.6) + softplus(-1.2)) / 2)
    assert values["wgan_gp"] == pytest.approx(-1.4)
    assert values["r3gan"] == pytest.approx((softplus(1.8 - 1.6) + softplus(0.8 - 1.2)) / 2)


def test_r1_and_r2_are_of_each_image() -> None:
    found = critic_loss(Bowl(), REAL, FAKE, "r3gan", 1.0).value
    plain = critic_loss(Bowl(), REAL, FAKE, "r3gan", 0.0).value
    r1, r2 = (9 + 1) / 2, (4 + 4) / 2
    assert (found - plain).item() == pytest.approx((r1 + r2) / 2)
    images = REAL.clone().requires_grad_()
    assert squared_gradients(Bowl()(images), images).tolist() == [9.0, 1.0]


def test_the_gradient_penalty_is_of_points_between() -> None:
    """With D(x) = |x|^2 / 2 and images along one line, the gradient's length is where the point lies."""
    real, fake = torch.full((4000, 1, 1, 1), 3.0), torch.full((4000, 1, 1, 1), 1.0)
    torch.manual_seed(0)
    found = critic_loss(Bowl(), real, fake, "wgan_gp", 1.0).value - (0.5 - 4.5)
    assert found.item() == pytest.approx(4 / 3, abs=0.06)  # the mean of (u - 1)^2 for u from 1 to 3


def test_penalties_are_learned_from() -> None:
    for loss in ("wgan_gp", "r3gan"):
        critic = Linear(3 * WEIGHTS)
        with_, without = (
            torch.autograd.grad(critic_loss(critic, REAL, FAKE, loss, p).value, critic.weights)[0]
            for p in (1.0, 0.0)
        )
        # 2 (|w| - 1) w / |w|, and 2 w for R1 + R2 with a half before them.
        torch.testing.assert_close(with_ - without, 4 * WEIGHTS if loss == "wgan_gp" else 2 * 3 * WEIGHTS)


def test_a_generators_turn_costs_no_gradients_of_the_critic() -> None:
    objective = objective_of(settings_of(adversarial()))
    batch = next(objective.batches("train", CPU.device).epoch(0))
    objective.loss("generator", batch).value.backward()
    critic = objective.players["critic"]
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert all(p.grad is not None for p in objective.players["generator"].parameters())
    objective.players["generator"].zero_grad(set_to_none=True)
    objective.loss("critic", batch).value.backward()
    assert all(p.grad is not None for p in critic.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in objective.players["generator"].parameters())
    with frozen(critic):
        assert not any(p.requires_grad for p in critic.parameters())


def test_a_vaes_loss_is_the_bound_and_each_image_counts_once() -> None:
    settings = settings_of(variational(), eval={"batch_size": 50})  # 120 images: the last batch is smaller
    objective: Any = objective_of(settings)
    objective.players["model"].eval()
    with torch.no_grad():
        found = objective.evaluate(objective.players, objective.batches("test", CPU.device).epoch(0))
        noise = torch.cat([objective.noise(n, seed=i) for i, n in enumerate((50, 50, 20))])
        lost, told = objective._parts(objective.players["model"], objective.data.test.tensors, noise)
    assert found["loss"] == pytest.approx(float((lost + told).mean()), rel=1e-5)
    assert found["kl_nats"] == pytest.approx(float(told.mean()), rel=1e-5)
    assert found["bits_per_dim"] == pytest.approx(found["loss"] / 64 / math.log(2))


def test_a_flows_loss_is_the_density_of_bytes_filled_up() -> None:
    objective: Any = objective_of(settings_of(flow()))
    model = objective.players["model"]
    images = objective.data.test.tensors["inputs"][:5]
    noise = torch.rand(images.shape)
    nats = objective._nats(model, {"inputs": images}, noise)
    density = log_density(*model((images.float() + noise) / 256))
    torch.testing.assert_close(nats, 64 * math.log(256) - density)
    assert filled(torch.tensor([0, 255]), torch.tensor([0.0, 0.5])).tolist() == [0, 255.5 / 256]


# ---- how what is made is judged ----


def test_the_frechet_distance_is_that_of_two_normal_distributions() -> None:
    a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    assert detection.frechet_distance(a, b + 5) == pytest.approx(5**2 + (2 - 1) ** 2)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) for _ in range(2))
    from scipy.linalg import sqrtm

    c, d = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * np.real(np.asarray(sqrtm(c @ d))))
    assert detection.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted)
    assert detection.frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-9)


def test_a_detector_tells_what_can_be_told_and_no_more() -> None:
    data = load(DataConfig(source="digits"))
    images = data.train.tensors["inputs"]
    rng = torch.Generator().manual_seed(5)

    def real_ones(n: int, seed: int) -> Tensor:
        return images[torch.randint(len(images), (n,), generator=rng)]

    mixed = detection.real_versus_generated(data, real_ones, 200)
    assert (len(mixed.train), len(mixed.test), mixed.classes) == (400, 400, ("generated", "real"))
    same = detection.two_sample_test(mixed, CPU)
    assert same.low < 0.55
    noisy = detection.real_versus_generated(
        data, lambda n, seed: (real_ones(n, seed) + torch.randint(100, (n, 1, 8, 8))).to(torch.uint8), 200
    )
    told = detection.two_sample_test(noisy, CPU)
    assert told.point > 0.9
    assert told == wilson_interval(round(told.point * 400), 400)


@pytest.mark.slow
def test_evaluation_reports_distance_floor_and_detector(judge: Path, tmp_path: Path) -> None:
    values = adversarial("non_saturating", conditional=True, judge=str(judge))
    run = trained(settings_of({**values, "data": {"source": "digits"}}, max_steps=3), tmp_path / "run")
    options = Namespace(checkpoint="best", part=None)
    result = SupervisedPipeline().evaluate(run.folder, options)
    numbers = result["eval"]
    assert numbers["frechet_features"] > 3 * numbers["frechet_features_floor"] > 0
    assert numbers["detector_accuracy_low"] > 0.9  # three steps make no digits
    assert 0 <= numbers["recognised"] <= 1
    weights = checkpoint.weights_hash(Run.open(judge).find_checkpoint("best"))
    assert any(weights in note and "60 generated images" in note for note in result["notes"])
    text = SupervisedPipeline().describe_evaluation(result)
    assert weights in text
    assert "(chance 0.5)" in text
    kept = [json.loads(line) for line in (run.folder / "evaluations.jsonl").read_text().splitlines()]
    assert kept[0]["eval"] == numbers
    again = SupervisedPipeline().evaluate(run.folder, options)["eval"]
    assert again.pop("ms_to_sample_one") > 0
    assert again.items() < numbers.items()


@pytest.mark.slow
def test_classes_asked_for_are_recognised_where_images_are_of_them(judge: Path) -> None:
    """A stand-in for a perfect generator, of real digits: what is counted is whether classes agree."""
    values = adversarial("non_saturating", conditional=True, judge=str(judge))
    objective: Any = objective_of(settings_of({**values, "data": {"source": "digits"}}))
    images, labels = (objective.data.test.tensors[name] for name in ("inputs", "labels"))
    assert objective.labels(12).tolist() == [*range(10), 0, 1]
    by_class = torch.stack([images[labels == i][:6] for i in range(10)], 1).flatten(0, 1)
    found = detection.in_batches(objective.judge.classify, by_class, CPU.device)
    assert (found == objective.labels(60)).float().mean() > 0.85


def test_a_detector_can_be_a_run_of_its_own(judge: Path, tmp_path: Path) -> None:
    maker = trained(settings_of(adversarial(), max_steps=2), tmp_path / "maker")
    values = {
        "objective": {"name": "detection", "generator": str(maker.folder), "samples": 100},
        "data": {"source": "digits"},
        "model": {"backbone": "resnet8", "spec": {"width": 4}},
        "batch_size": 20,
        "optimizer": {"learning_rate": 3e-3},
    }
    run = trained(settings_of(values, max_steps=40), tmp_path / "detector")
    summary = run.info["summary"]
    assert summary["eval/accuracy_low"] < summary["eval/accuracy"] <= summary["eval/accuracy_high"]
    assert summary["eval/best_accuracy"] > 0.8
    assert [(p["run_id"], p["stage"]) for p in run.info["parents"]] == [(maker.info["id"], "generator")]
    with pytest.raises(LabError, match="makes no images"):
        objective_of(settings_of({**values, "objective": {"name": "detection", "generator": str(judge)}}))
    with pytest.raises(LabError, match="makes images of 1 x 8 x 8, and those of digits are 1 x 16 x 16"):
        objective_of(settings_of({**values, "data": {"source": "digits", "img_size": 16}}))


def test_a_finished_run_draws_at_another_temperature_by_the_same_weights(tmp_path: Path) -> None:
    values, folder = flow(), tmp_path / "run"
    trained(settings_of(values, max_steps=2), folder)
    before = (folder / "media/samples.png").read_bytes()
    weights = (folder / "checkpoints/latest/model.safetensors").read_bytes()
    values["objective"]["temperature"] = 0.1
    run = trained(settings_of(values, max_steps=2), folder, resume=True)
    assert (folder / "media/samples.png").read_bytes() != before
    assert (folder / "checkpoints/latest/model.safetensors").read_bytes() == weights
    assert run.info["config"]["objective"]["temperature"] == 0.1


def test_one_walks_between_two_noises_along_an_arc() -> None:
    a, b = torch.randn(2, 50).unbind()
    walk = _between(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(walk[0], a)
    torch.testing.assert_close(walk[-1], b)
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(_between(a, b, torch.tensor([0.5])), torch.tensor([[2.0, 2.0]]) / 2**0.5)


def test_images_become_bytes() -> None:
    assert to_bytes(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def net(backbone: str, **spec: Any) -> dict[str, Any]:
    return {"backbone": backbone, "spec": spec}


BATCH_NORM = net("dcgan_discriminator", norm="batch")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**adversarial(critic=BATCH_NORM), "data": {"source": "digits", "img_size": 16}}, "batch norm"),
        ({**adversarial(), "model": {"backbone": "vae"}}, "Use one of dcgan_generator."),
        ({**adversarial(), "data": {"source": "iris"}}, "adversarial learns from images"),
        ({**adversarial(), "data": {**DIGITS, "augment": {"flip": True}}}, "data.augment"),
        (adversarial(judge="nowhere"), "objective.judge = 'nowhere': no run"),
        ({**adversarial(conditional=True), "data": {**PHOTOGRAPHS, "augment": {}}}, "has no labels"),
        ({**variational(), "model": {"backbone": "flow"}}, "Use one of vae."),
        ({**flow(), "model": {"backbone": "vae"}}, "Use one of flow."),
        ({**flow(), "model": {"backbone": "flow", "spec": {"levels": 4}}}, "is too small"),
        ({**flow(), "model": {"backbone": "flow", "spec": {"depth": [1]}}}, "for each of 2 levels"),
        ({**flow(), "model": {"backbone": "flow", "spec": {"edge": 0.7}}}, "edge 0.7 must be"),
        ({**variational(), "model": {"backbone": "vae", "spec": {"prior_depth": -1}}}, "not be negative"),
        ({**flow(conditional=True), "data": {**PHOTOGRAPHS, "augment": {}}}, "has no labels"),
        ({**super_resolution(), "model": {"backbone": "vae"}}, "Use one of srresnet."),
        (adversarial(critic=net("srgan_discriminator"), conditional=True), "not one of each class"),
        (adversarial(critic=net("dcgan_discriminator", num_outputs=3)), "num_outputs: follows"),
        (adversarial(critic=net("dcgan_discriminator", img_size=14)), "img_size: follows"),
        ({**adversarial(conditional=True), "model": net("dcgan_generator", latent=3)}, "Make it 4 or more"),
        ({**variational(), "model": net("vae", latent=1, prior_depth=1)}, "need 2 or more"),
        (
            {
                "objective": {"name": "super_resolution", "patch": 8},
                "data": {**PHOTOGRAPHS, "img_size": 16},
                "model": net("srresnet", depth=1, width=8),
            },
            "SSIM needs 11 a side",
        ),
    ],
)
def test_mistakes_say_what_to_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError) as caught:
        objective_of(settings_of(values))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "adversarial", "loss": "wasserstein"}, "none of non_saturating, wgan_gp, r3gan"),
        ({"name": "adversarial", "loss": "non_saturating", "penalty": 1.0}, "non_saturating has none"),
        ({"name": "adversarial", "critic_steps": 0}, "objective.critic_steps"),
        ({"name": "variational", "beta": 0.0}, "objective.beta"),
        ({"name": "flow", "temperature": 0.0}, "objective.temperature"),
        ({"name": "flow", "samples": 1}, "objective.samples"),
        ({"name": "detection"}, "generator"),
        ({"name": "super_resolution", "pixel_loss": "l3"}, "none of l1, mse"),
        ({"name": "super_resolution", "pixel_weight": 0.0}, "must be above 0"),
        ({"name": "super_resolution", "perceptual_weight": 1.0}, "must be set together"),
    ],
)
def test_impossible_settings_are_refused(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError) as caught:
        settings_of({"objective": objective, "data": DIGITS, "model": {"backbone": "vae"}})
    assert said in str(caught.value)


@pytest.mark.slow
def test_a_judge_may_have_been_adapted(tmp_path: Path) -> None:
    values = {
        "objective": {"name": "classification"},
        "data": {"source": "digits", "limit": 100},
        "model": {"backbone": "vit_tiny", "spec": {"patch_size": 4, "width": 16, "n_head": 2, "n_layer": 1}},
    }
    first = trained(settings_of(values, max_steps=1), tmp_path / "first")
    values["model"] |= {"start_from": str(first.folder), "adapt": "lora", "lora_rank": 2}
    adapted = trained(settings_of(values, max_steps=1), tmp_path / "adapted")
    net, *_ = detection.open_classifier(str(adapted.folder), (1, 8, 8))
    kept = load_file(adapted.checkpoints / "best" / "model.safetensors")
    assert all(torch.equal(kept[f"model.{name}"], value) for name, value in net.state_dict().items())
    assert any("lora" in name for name in kept)


def test_a_judge_must_fit(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="does not know images of 3 x 48 x 48"):
        detection.make_judge(str(judge), (3, 48, 48))
    with pytest.raises(LabError, match="does not know images of 1 x 16 x 16"):
        detection.make_judge(str(judge), (1, 16, 16))
    maker = trained(settings_of(adversarial(), max_steps=1), tmp_path / "maker")
    with pytest.raises(LabError, match=r"'adversarial'. Name a run of classification"):
        detection.make_judge(str(maker.folder), (1, 8, 8))
    features = detection.make_judge(None, (3, 48, 48)).features
    images = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    torch.testing.assert_close(features(images), F.avg_pool2d(images.float() / 255, 6).flatten(1))
