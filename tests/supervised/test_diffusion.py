"""Diffusion and flow matching: published sizes and logits, and every formula against a closed form."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab import checkpoint
from lab.errors import LabError
from lab.tracking import read_metrics
from supervised import backbones, flow_matching
from supervised.backbones.diffusion import Upsample, load_published, sinusoids
from supervised.diffusion import Diffusion, alpha_bars, guided
from supervised.evaluate import evaluate_run
from supervised.objectives.base import Objective
from supervised.objectives.denoising import Denoising
from tests.supervised.test_training import objective_of, settings_of, trained

ENTROPY = 0.5 * math.log2(2 * math.pi * math.e)
"""Of a unit Gaussian, bits."""


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last(steps: Any) -> Tensor:
    return list(steps)[-1][1]


# ---- networks ----


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        assert count(backbones.build("ddpm_cifar10")) == 35_746_307
        assert count(backbones.build("ddpm_256")) == 113_673_219


def unet2d(widths: tuple[int, ...], attends: tuple[bool, ...], **options: Any) -> Any:
    """diffusers' U-Net with weights that leave nothing at 0 or 1; options as of google/ddpm-cifar10-32."""
    diffusers = pytest.importorskip("diffusers")

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=2,
        attention_head_dim=None,  # type: ignore[arg-type]
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        **options,
    )
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return unet.eval()


def test_logits_are_those_of_diffusers() -> None:
    theirs = unet2d((128, 256, 256, 256), (False, True, False, False), sample_size=32)
    ours = backbones.build("ddpm_cifar10").eval()
    load_published(ours, theirs.state_dict())
    x, times = torch.randn(1, 3, 32, 32), torch.tensor([777])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, times), theirs(x, times).sample, rtol=1e-4, atol=1e-5)


def test_logits_with_classes_and_odd_sizes_are_those_of_diffusers() -> None:
    shape = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4}
    theirs = unet2d((8, 16, 16), (False, False, True), num_class_embeds=11, **shape)
    spec = {"in_chans": 1, "img_size": 28, "width": 8, "mults": (1, 2, 2), "attention": (7,), "groups": 4}
    ours = backbones.build("unet", num_classes=10, **spec).eval()
    load_published(ours, theirs.state_dict())
    x, times, labels = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        wanted = theirs(x, times, class_labels=labels).sample
        torch.testing.assert_close(ours(x, times, labels), wanted, rtol=1e-4, atol=1e-5)
        # No labels are the last class, and one time may stand for all.
        nothing = theirs(x, times[1], class_labels=torch.full((3,), 10)).sample
        torch.testing.assert_close(ours(x, times[1:2]), nothing, rtol=1e-4, atol=1e-5)


def test_weights_of_another_shape_are_refused_in_one_line() -> None:
    small = backbones.build("unet", width=8, groups=4)
    with pytest.raises(LabError, match=r"do not fit: condition.linear1.bias is \(64,\), not \(32,\)"):
        load_published(small, backbones.build("unet", width=16, groups=4).state_dict())


def test_the_transposed_convolution_is_upsampling_and_convolving() -> None:
    layer = Upsample(6).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.double)
    twice = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(layer(x), layer.conv(twice))


def test_sinusoids_by_hand() -> None:
    found = sinusoids(torch.tensor([2]), 4)[0]
    wanted = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize(
    ("name", "spec", "said"),
    [
        ("unet", {"img_size": 28, "mults": (1, 2, 2, 2)}, "cannot be halved 3 times"),
        ("unet", {"width": 40}, "groups 32 do not divide width 40"),
        ("unet", {"attention": (9,)}, "no such level, only [32, 16, 8]"),
        ("diffusion_mlp", {"width": 5}, "must be even"),
    ],
)
def test_networks_that_cannot_be(name: str, spec: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError) as caught:
        backbones.build(name, **spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_untrained_network_says_nothing() -> None:
    """Its last layers begin at 0 (Ho et al. 2020, published code)."""
    net = backbones.build("unet", width=8, groups=4, img_size=8, mults=(1, 2))
    assert not net(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).any()


# ---- forward ----


def test_schedules_by_published_values() -> None:
    linear = alpha_bars("linear", 1000)
    assert float(1 - linear[0]) == pytest.approx(1e-4)
    assert float(linear[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(1 - linear[-1] / linear[-2]) == pytest.approx(0.02)
    cosine = alpha_bars("cosine", 1000)
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(cosine[499]) == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2) ** 2 / start)
    assert 1 - float(cosine[-1] / cosine[-2]) == pytest.approx(0.999)
    assert float(alpha_bars("linear", 40)[-1]) < 1e-4


def test_moments_of_noised_samples() -> None:
    diffusion = Diffusion(alpha_bars("linear", 1000))
    x0, times = torch.full((200_000, 1), 3.0), torch.full((200_000,), 300)
    x = diffusion.diffuse(x0, times, torch.randn(x0.shape, generator=seeded()))
    left = float(alpha_bars("linear", 1000)[300])
    assert float(x.mean()) == pytest.approx(3 * left**0.5, abs=0.01)
    assert float(x.var()) == pytest.approx(1 - left, rel=0.01)


def test_posterior_by_hand() -> None:
    """Equation 7 with betas of 0.1, 0.2, 0.4: alpha_bars 0.9, 0.72, 0.432."""
    diffusion = Diffusion(torch.tensor([0.9, 0.72, 0.432], dtype=torch.float64))
    mean, variance = diffusion.posterior(torch.ones(2, 1), torch.full((2, 1), 2.0), torch.tensor([1, 2]))
    by_hand = [
        0.9**0.5 * 0.2 / 0.28 + 0.8**0.5 * 0.1 / 0.28 * 2,
        0.72**0.5 * 0.4 / 0.568 + 0.6**0.5 * 0.28 / 0.568 * 2,
    ]
    torch.testing.assert_close(mean[:, 0], torch.tensor(by_hand))
    torch.testing.assert_close(variance[:, 0], torch.tensor([0.1 / 0.28 * 0.2, 0.28 / 0.568 * 0.4]))


@pytest.mark.parametrize("predicts", ["epsilon", "v", "x0"])
def test_what_is_learned_leads_back_to_the_sample(predicts: str) -> None:
    diffusion = Diffusion(alpha_bars("cosine", 100), predicts=predicts)
    x0, epsilon = torch.rand(50, 2, 3), torch.randn(50, 2, 3)
    times = torch.arange(50)
    x = diffusion.diffuse(x0, times, epsilon)
    found = diffusion.to_x0(diffusion.target(x0, times, epsilon), x, times)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


def test_min_snr_weights_by_hand() -> None:
    left = torch.tensor([0.95, 0.5], dtype=torch.float64)  # signal to noise 19 and 1
    times = torch.arange(2)
    for predicts, wanted in (("x0", [5.0, 1.0]), ("epsilon", [5 / 19, 1.0]), ("v", [5 / 20, 1 / 2])):
        found = Diffusion(left, predicts=predicts).min_snr_weight(times)
        torch.testing.assert_close(found, torch.tensor(wanted))


# ---- back ----


def of_a_point(diffusion: Diffusion, point: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The right answer where all samples are the same: epsilon = (x - signal * point) / noise."""
    return lambda x, t: (x - diffusion.at("signal", t, x) * point) / diffusion.at("noise", t, x)


@pytest.mark.parametrize(("eta", "n_steps"), [(0.0, 1), (0.0, 7), (0.5, 10), (1.0, 0)])
def test_a_point_is_found_exactly(eta: float, n_steps: int) -> None:
    diffusion = Diffusion(alpha_bars("linear", 200))
    noise = torch.randn(5, 2, generator=seeded())
    steps = diffusion.reverse(of_a_point(diffusion, 0.7), noise, n_steps=n_steps, eta=eta, generator=seeded())
    torch.testing.assert_close(last(steps), torch.full((5, 2), 0.7), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddim_with_all_its_noise_is_ddpm(variance: str) -> None:
    """Each step's mean is the posterior's, and its variance the posterior's, or beta (algorithm 2)."""
    left = alpha_bars("linear", 30)
    diffusion = Diffusion(left, variance=variance)
    denoise = of_a_point(diffusion, -0.4)
    x = torch.randn(4, 2, generator=seeded(1))
    theirs = seeded(2)
    for to, after in diffusion.reverse(denoise, x, eta=1.0, generator=seeded(2)):
        times = torch.full((4,), to + 1)
        mean, posterior_variance = diffusion.posterior(diffusion.to_x0(denoise(x, times), x, times), x, times)
        if to >= 0:
            beta = 1 - float(left[to + 1] / left[to])
            wanted = float(posterior_variance[0]) if variance == "small" else beta
            mean = mean + wanted**0.5 * torch.randn(x.shape, generator=theirs)
        torch.testing.assert_close(after, mean, rtol=1e-4, atol=1e-5)
        x = after


def test_gaussian_samples_have_the_right_moments() -> None:
    """With the best denoiser of N(1, 0.5^2), samples are drawn from it, with and without noise on the way."""
    diffusion = Diffusion(alpha_bars("linear", 300), predicts="x0")

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        signal, noise = diffusion.at("signal", t, x), diffusion.at("noise", t, x)
        return 1 + 0.25 * signal / (0.25 * signal**2 + noise**2) * (x - signal)

    noise = torch.randn(20_000, 1, generator=seeded())
    for eta in (0.0, 1.0):
        found = last(diffusion.reverse(denoise, noise, eta=eta, generator=seeded(1)))
        assert float(found.mean()) == pytest.approx(1, abs=0.02)
        assert float(found.std()) == pytest.approx(0.5, abs=0.02)
        if eta == 0:  # every point moves along its quantile
            torch.testing.assert_close(found, 1 + 0.5 * noise, rtol=0.03, atol=0.02)


def test_times_of_fewer_steps_end_in_the_last() -> None:
    diffusion = Diffusion(alpha_bars("linear", 1000))
    times: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times.append(int(t))
        return x

    list(diffusion.reverse(denoise, torch.randn(1, 1), n_steps=50, eta=0.0))
    assert times == list(range(999, 0, -20))


def test_samples_depend_on_the_generator_alone() -> None:
    diffusion = Diffusion(alpha_bars("linear", 20))
    x = torch.randn(3, 1)
    a, b, c = (last(diffusion.reverse(lambda x, t: 0 * x, x, generator=seeded(seed))) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_guidance_by_hand() -> None:
    """Scale 0 knows no class, 1 is conditional, 3 goes on in the direction between them."""

    def model(x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        return x + times[:, None] + 10.0 * labels[:, None]

    x, times, labels = torch.zeros(2, 1), torch.tensor([1, 2]), torch.tensor([3, 4])
    for scale, wanted in ((0.0, [91.0, 92.0]), (1.0, [31.0, 42.0]), (3.0, [91 - 180.0, 92 - 150.0])):
        found = guided(model, labels, 9, scale)
        torch.testing.assert_close(found(x, times)[:, 0], torch.tensor(wanted))
    assert float(guided(model, labels, 9, 3.0)(x, torch.tensor([5]))[0]) == 95 - 180


# ---- flow matching ----


def of_gaussian(x: Tensor, t: Tensor, mean: float = 1.0, std: float = 0.5) -> Tensor:
    """The velocity that leads a unit Gaussian to N(mean, std^2), of lines between independent draws."""
    t = t.view(-1, 1)
    slope = (t * std**2 - (1 - t)) / (t.square() * std**2 + (1 - t).square())
    return mean + slope * (x - t * mean)


def test_lines_by_hand() -> None:
    x, velocity = flow_matching.along(torch.tensor([[4.0]]), torch.tensor([0.25]), torch.tensor([[2.0]]))
    assert float(x) == 2.5
    assert float(velocity) == 2


def test_euler_finds_a_point_exactly() -> None:
    noise = torch.randn(4, 3, generator=seeded())
    found = last(flow_matching.solve(lambda x, t: (0.3 - x) / (1 - t).view(-1, 1), noise, n_steps=7))
    torch.testing.assert_close(found, torch.full((4, 3), 0.3))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    noise = torch.randn(100, 1, generator=seeded(), dtype=torch.double)
    errors = [
        float(
            (last(flow_matching.solve(of_gaussian, noise, n_steps=n, solver=solver)) - 1 - 0.5 * noise)
            .abs()
            .max()
        )
        for n in (20, 40, 80)
    ]
    assert errors[-1] < 0.03
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


# ---- likelihood ----


def test_the_bound_of_a_gaussian_is_its_closed_form() -> None:
    """Of unit Gaussian samples the best denoiser is signal * x, and reverse steps have variance beta."""
    left = alpha_bars("linear", 50)
    diffusion = Diffusion(left, predicts="x0")
    x0 = torch.randn(50_000, 2, generator=seeded())
    found = diffusion.bound(
        lambda x, t: diffusion.at("signal", t, x) * x, x0, n_times=49, generator=seeded(1)
    )
    before = torch.cat((torch.ones(1, dtype=torch.float64), left[:-1]))
    beta = 1 - left / before
    posterior = (1 - before) / (1 - left) * beta
    error = before * beta.square() / (1 - left)  # of the posterior's mean: of_x0^2 * Var(x_0 | x_t)
    nats = 0.5 * ((beta / posterior).log() + (posterior + error) / beta - 1)[1:].sum()
    nats = nats + 0.5 * (math.log(2 * math.pi) + posterior[1].log() + beta[0] / posterior[1])
    wanted = float(nats) / math.log(2)
    assert float(found.mean()) == pytest.approx(wanted, abs=0.02)
    assert ENTROPY < wanted < ENTROPY + 0.02
    some = diffusion.bound(lambda x, t: diffusion.at("signal", t, x) * x, x0, n_times=7, generator=seeded(2))
    assert float(some.mean()) == pytest.approx(wanted, abs=0.02)


def test_the_bound_of_a_flow_to_a_gaussian_is_its_entropy() -> None:
    diffusion, denoise = flow_matching.as_diffusion(
        lambda x, t: of_gaussian(x, t, mean=0.0, std=1.0), 300, clip=False
    )
    x0 = torch.randn(5_000, 1, generator=seeded())
    found = diffusion.bound(denoise, x0, n_times=60, generator=seeded(1))
    assert float(found.mean()) == pytest.approx(ENTROPY, abs=0.05)


def test_a_network_that_knows_nothing_pays_for_it() -> None:
    diffusion = Diffusion(alpha_bars("linear", 50), predicts="x0")
    x0 = torch.randn(1_000, 1, generator=seeded())
    found = diffusion.bound(lambda x, t: 0 * x, x0, n_times=49, generator=seeded(1))
    assert float(found.mean()) > ENTROPY + 0.5


def test_pixel_probabilities_sum_to_one() -> None:
    """Equation 13, wherever the mean lies, and also where bins are in a Gaussian's far tails."""
    diffusion = Diffusion(alpha_bars("linear", 10), predicts="x0")
    pixels = torch.arange(256).view(-1, 1) / 127.5 - 1
    for mean in (-1.0, -0.3, 0.0, 0.9999):
        nats = diffusion.first_term(lambda x, t, mean=mean: torch.full_like(x, mean), pixels, 256, seeded())
        assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-4)
        assert nats.isfinite().all()


def test_the_prior_term_by_hand() -> None:
    diffusion = Diffusion(torch.tensor([0.5, 0.25], dtype=torch.float64))
    found = diffusion.prior_term(torch.tensor([[2.0, 0.0]]))
    assert float(found) == pytest.approx(0.5 * (2 * (0.75 - 1 - math.log(0.75)) + 0.25 * 4))


# ---- the objective ----


def digits(**objective: Any) -> dict[str, Any]:
    return {
        "objective": {"name": "denoising", "n_steps": 20, "bound_steps": 3, "bound_samples": 16, **objective},
        "data": {"source": "digits", "limit": 200},
        "model": {"backbone": "unet", "spec": {"width": 8, "mults": [1, 2], "groups": 4}},
        "batch_size": 32,
        "checkpoint": {"every_epochs": 1e6},
        "eval": {"every_epochs": 1e6},
    }


def evaluated(objective: Objective) -> dict[str, float]:
    with torch.inference_mode():
        return objective.evaluate(objective.players, objective.batches("test", torch.device("cpu")).epoch(0))


def test_an_evaluation_comes_out_the_same_again() -> None:
    for process in ({}, {"predicts": "v"}, {"process": "flow_matching"}):
        objective = objective_of(settings_of(digits(**process)))
        numbers = evaluated(objective)
        assert numbers == evaluated(objective)
        assert 3 < numbers["bits_per_dim"] < 40


def test_the_bound_is_of_samples_from_all_the_held_out_ones() -> None:
    """Files lie class by class: the first of them are of one."""
    objective = objective_of(settings_of(digits()))
    before, held_out = evaluated(objective), objective.data.test.tensors["inputs"]
    assert len(held_out) > 32
    held_out[16:] = 255 - held_out[16:]
    assert evaluated(objective) != before


def test_of_rows_of_numbers_the_bound_has_their_units() -> None:
    """Ten times as large a Gaussian has log2(10) more bits; the Gaussian beside it is exact."""
    settings = settings_of(
        {
            "objective": {"name": "denoising", "n_steps": 20, "bound_samples": 2000},
            "data": {"source": "swiss_roll"},
            "model": {"backbone": "diffusion_mlp", "spec": {"width": 8, "n_layer": 1}},
            "batch_size": 64,
        }
    )
    objective = objective_of(settings)
    assert isinstance(objective, Denoising)
    numbers = evaluated(objective)
    std = objective.data.train.tensors["inputs"].std(0)
    wanted = ENTROPY + float(std.log2().mean())
    assert numbers["gaussian_bits_per_dim"] == pytest.approx(wanted, abs=0.03)
    assert numbers["bits_per_dim"] > wanted


def test_samples_come_in_the_form_of_the_data_and_again() -> None:
    objective = objective_of(settings_of(digits(conditional=True, guidance=2.0, sampling_steps=3)))
    assert isinstance(objective, Denoising)
    first, again = (objective.generate(objective.players, 3) for _ in range(2))
    other = objective.generate(objective.players, 3, seed=1)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_classifier_says_what_is_recognised(tmp_path: Path) -> None:
    classifier = trained(
        settings_of(
            {
                "objective": {"name": "classification"},
                "data": {"source": "digits", "limit": 200},
                "model": {"backbone": "mlp", "spec": {"hidden": [8]}},
            }
        ),
        tmp_path / "classifier",
    )
    values = digits(
        conditional=True, judge=str(classifier.folder), judged_samples=20, sampling_steps=2, samples=40
    )
    run = trained(settings_of(values), tmp_path / "run")
    assert run.info["summary"]["eval/recognised"] * 20 == pytest.approx(
        round(run.info["summary"]["eval/recognised"] * 20)
    )
    state = json.loads((run.checkpoints / "best" / "state.json").read_text())
    assert state["spec"]["judge_sha256"] == checkpoint.weights_hash(classifier.checkpoints / "best")
    values["objective"] |= {"sampling_steps": 3, "guidance": 1.0}
    redrawn = trained(settings_of(values), tmp_path / "run", resume=True)
    last = list(read_metrics(redrawn.metrics))[-1]
    assert last["global_step"] == run.info["summary"]["global_step"]
    assert last["eval/recognised"] == redrawn.info["summary"]["eval/recognised"], "of the new sampler"
    assert last["eval/bits_per_dim"] == run.info["summary"]["eval/bits_per_dim"]
    result = evaluate_run(run, checkpoint.load(run.find_checkpoint("best")))
    assert {"bits_per_dim", "recognised", "frechet_features", "detector_accuracy"} <= result["eval"].keys()
    assert [note.partition(":")[0] for note in result["notes"][:2]] == [
        "frechet_features",
        "detector_accuracy",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": {"n_steps": 1}}, "objective.n_steps"),
        ({"objective": {"guidance": 2.0}}, "needs objective.conditional"),
        ({"objective": {"process": "flow_matching", "eta": 0.0}}, "objective.eta: is of diffusion"),
        ({"objective": {"solver": "heun"}}, "objective.solver: is of flow_matching"),
        ({"objective": {"predicts": "epsilom"}}, "'epsilom' is none of epsilon, v, x0"),
        ({"objective": {"conditional": True, "judge": "nowhere"}}, "objective.judge = 'nowhere': no run"),
        ({"data": {"source": "swiss_roll"}}, "Use one of diffusion_mlp."),
        ({"data": {"source": "python_library"}}, "holds text, and denoising learns from images or table"),
        (
            {"data": {"source": "photographs", "img_size": 16}, "objective": {"conditional": True}},
            "no labels",
        ),
        ({"data": {"augment": {"shift": 1}}}, "Use only flip"),
        ({"model": {"backbone": "resnet8", "spec": {}}}, "Use one of unet, ddpm_cifar10, ddpm_256."),
        ({"objective": {"name": "classification"}}, "does not read what there is here. Use one of mlp"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = digits()
    if values.get("objective", {}).get("name"):
        base["objective"] = {}
    with pytest.raises(LabError) as caught:
        trained(settings_of(base, **values), tmp_path / "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_data_without_answers_are_for_denoising_only(objective: str, tmp_path: Path) -> None:
    values = {
        "objective": {"name": objective},
        "data": {"source": "swiss_roll"},
        "model": {"backbone": "mlp"},
    }
    with pytest.raises(LabError, match=r"has no (labels|targets), which"):
        trained(settings_of(values), tmp_path / "run")
