"""Super-resolution: its measures by hand and by scikit-image, its pairs of images, and its two stages."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lab.errors import LabError
from lab.run import Run
from supervised import data
from supervised.data.config import DataConfig
from supervised.objectives.super_resolution import Perception, downscaled, luma, psnr, spectral_distance, ssim
from tests.supervised.test_generators import super_resolution
from tests.supervised.test_training import CPU, objective_of, settings_of, trained


def pictures(n: int = 3) -> torch.Tensor:
    patches = data.load(DataConfig(source="photographs", img_size=64)).train.tensors["inputs"]
    return patches[:: len(patches) // n][:n]


def test_psnr_by_hand() -> None:
    a = torch.full((2, 1, 8, 8), 100.0)
    b = a.clone()
    b[0] += 5  # a mean squared error of 25
    b[1, :, :4] += 10  # of 100 in half of it
    wanted = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 50)]
    assert psnr(a, b).tolist() == pytest.approx(wanted)


def test_luma_reaches_from_16_to_235() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8)[:, :, None, None]
    assert luma(colours).flatten().tolist() == pytest.approx([16, 235, 81.481], abs=1e-3)
    assert luma(torch.tensor([[[[7]]]], dtype=torch.uint8)).item() == 7


def test_ssim_by_hand() -> None:
    """Of constant images only the means count: (2 a b + c) / (a^2 + b^2 + c)."""
    a, b = torch.full((1, 1, 16, 16), 100.0), torch.full((1, 1, 16, 16), 150.0)
    c = (0.01 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c))
    assert ssim(a, a).item() == pytest.approx(1)


def test_ssim_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a = luma(pictures())
    b = (a + 12 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = [
        metrics.structural_similarity(x[0].double().numpy(), y[0].double().numpy(), data_range=255, **options)
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b).numpy(), theirs, rtol=1e-9)
    pairs = zip(a.numpy(), b.numpy(), strict=True)
    theirs = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    np.testing.assert_allclose(psnr(a, b).numpy(), theirs, rtol=1e-5)


def test_the_spectrum_misses_what_is_blurred_and_does_not_mind_where_it_is() -> None:
    images = luma(pictures())
    blurred = F.avg_pool2d(F.pad(images, (2,) * 4, mode="reflect"), 5, 1)
    assert spectral_distance(images, images).tolist() == [0, 0, 0]
    exact = spectral_distance(blurred, images)
    assert (exact > 6).all()
    noise = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert spectral_distance(noise[:1], noise[1:]) < 1.5  # the same texture elsewhere
    with torch.autocast("cpu", torch.bfloat16):  # as during an evaluation
        torch.testing.assert_close(spectral_distance(blurred, images), exact, rtol=0, atol=0)
    assert spectral_distance(2 * noise, noise).tolist() == pytest.approx([20 * math.log10(2)] * 2, abs=1e-3)


def test_small_images_are_what_bytes_can_hold() -> None:
    from PIL import Image

    image = pictures(1)
    small = downscaled(image.float() / 255, 4)
    assert small.shape == (1, 3, 16, 16)
    assert torch.equal((small * 255).round(), small * 255)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert (255 * small[0] - theirs).abs().max() <= 1


def test_pieces_are_of_the_images_at_any_place() -> None:
    objective: Any = objective_of(settings_of({**super_resolution(0.0), "data": {**PLAIN}}))
    height = torch.arange(48)[:, None].expand(48, 48)
    image = torch.stack((height, height.T, height * 0)).to(torch.uint8)
    torch.manual_seed(0)
    small, large = objective._pair(image.expand(500, -1, -1, -1))
    assert small.shape == (500, 3, 8, 8)
    assert large.shape == (500, 3, 32, 32)
    rows, columns = (255 * large).round()[:, :2].unbind(1)
    assert torch.equal(rows - rows[:, :1], height[:32, :32].float().expand(500, -1, -1))
    for corner in (rows[:, 0, 0], columns[:, 0, 0]):
        assert set(corner.tolist()) == set(range(17))


PLAIN = {"source": "photographs", "img_size": 48, "limit": 40}


def test_what_bicubic_interpolation_misses_may_be_all_that_is_learned() -> None:
    values = super_resolution(0.0)
    values["objective"] |= {"residual": True}
    objective: Any = objective_of(settings_of(values))
    for parameter in objective.players["generator"].backbone.last.parameters():
        torch.nn.init.zeros_(parameter)
    objective.players["generator"].eval()
    with torch.no_grad():
        found = objective.evaluate(objective.players, objective.batches("test", CPU.device).epoch(0))
    assert found["psnr"] == found["bicubic_psnr"]


def test_the_second_stage_begins_with_the_first_and_keeps_it_beside(tmp_path: Path) -> None:
    first = trained(settings_of(super_resolution(0.0)), tmp_path / "pixels")
    best = load_file(first.checkpoints / "best" / "model.safetensors")
    values = super_resolution()
    values["model"] = {**values["model"], "start_from": str(first.folder)}
    run = trained(settings_of(values), tmp_path / "srgan")
    assert [parent["run_id"] for parent in run.info["parents"]] == [first.info["id"]]
    after = load_file(run.checkpoints / "latest" / "model.safetensors")
    for name, value in best.items():
        key = name.removeprefix("generator.")
        assert torch.equal(after[f"before.{key}"], value)
        if value.dim() == 4:
            assert not torch.equal(after[f"generator.{key}"], value)
    summary, told = run.info["summary"], first.info["summary"]
    assert summary["eval/before_psnr"] == pytest.approx(told["eval/best_psnr"], abs=1e-4)
    assert summary["eval/bicubic_psnr"] == pytest.approx(told["eval/bicubic_psnr"])


def test_a_run_of_several_players_is_begun_from_by_its_generator(tmp_path: Path) -> None:
    first = trained(settings_of(super_resolution()), tmp_path / "first")
    values = super_resolution()
    values["model"] = {**values["model"], "start_from": str(first.folder)}
    made = objective_of(settings_of(values)).players["generator"].state_dict()
    best = load_file(first.checkpoints / "best" / "model.safetensors")
    assert all(torch.equal(best[f"generator.{key}"], value) for key, value in made.items())


def test_numbers_are_of_luma_without_the_border() -> None:
    objective: Any = objective_of(settings_of(super_resolution(0.0)))
    batch = next(objective.batches("test", CPU.device).epoch(0))
    objective.players["generator"].eval()
    with torch.no_grad():
        found = objective.evaluate(objective.players, [batch])
    images = batch["inputs"]
    small = F.interpolate(images.float() / 255, scale_factor=0.25, mode="bicubic", antialias=True)
    bicubic = F.interpolate((small.clamp(0, 1) * 255).round() / 255, scale_factor=4, mode="bicubic")
    pair = [luma(x)[:, :, 4:-4, 4:-4] for x in ((bicubic.clamp(0, 1) * 255).round(), images)]
    assert found["bicubic_psnr"] == pytest.approx(float(psnr(pair[0], pair[1]).mean()), rel=1e-5)
    assert found["bicubic_ssim"] == pytest.approx(float(ssim(pair[0], pair[1]).mean()), rel=1e-5)


def judge_of_noise(folder: Path, backbone: str, spec: dict[str, Any], **more: Any) -> Run:
    """A classifier that has hardly learned, of two kinds of 32 x 32 pixels in colour."""
    rows = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=rows, labels=np.arange(40) % 2)
    classifier = {
        "objective": {"name": "classification"},
        "data": {"source": str(folder / "noise.npz")},
        "model": {"backbone": backbone, "spec": spec},
    }
    return trained(settings_of(classifier, **more), folder / "judge")


def test_features_of_a_classifier_may_count_too(tmp_path: Path) -> None:
    """Those of its last convolution, through which gradients reach the generator, and none the classifier."""
    judge = judge_of_noise(tmp_path, "resnet8", {"width": 4}, max_steps=2)
    values = super_resolution(0.0)
    values["objective"] |= {"judge": str(judge.folder), "perceptual_weight": 1.0, "pixel_weight": 0.0}
    objective: Any = objective_of(settings_of(values))
    batch = next(objective.batches("train", CPU.device).epoch(0))
    loss = objective.loss("generator", batch)
    assert loss.value.item() == pytest.approx(loss.metrics["perceptual_loss"].item())
    loss.value.backward()
    assert all(p.grad is not None for p in objective.players["generator"].parameters())
    assert not any(p.requires_grad for p in objective.perceive.net.parameters())
    seen = objective.perceive(torch.rand(2, 3, 32, 32))
    assert seen.shape == (2, 16, 8, 8)
    last = objective.perceive.net.backbone.stages[-1][-1].conv2
    last.weight.data.zero_()
    assert not objective.perceive(torch.rand(2, 3, 32, 32)).any(), (
        "it is the last block's, not the shortcut's"
    )


def test_features_are_not_those_of_an_auxiliary_classifier(tmp_path: Path) -> None:
    judge = judge_of_noise(tmp_path, "googlenet_bn", {"aux": True}, max_steps=1, batch_size=4)
    seen = Perception(str(judge.folder), (3, 32, 32))(torch.rand(2, 3, 32, 32))
    assert seen.shape[:2] == (2, 128), "the projection behind the last inception block's pooling"


def test_mistakes_say_what_to_do() -> None:
    for values, said in (
        ({"objective": {"name": "super_resolution", "patch": 30}}, "must be divisible by 4"),
        ({"objective": {"name": "super_resolution", "patch": 64}}, "the images have 48 x 48 pixels"),
        ({"data": {**PLAIN, "augment": {"shift": 2}}}, "nothing but flip"),
    ):
        with pytest.raises(LabError, match=said):
            objective_of(settings_of({**super_resolution(), **values}))


def test_whole_photographs_are_held_out_where_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match="pip install scikit-image"):
        data.load(DataConfig(source="more_photographs"))
    monkeypatch.undo()
    pytest.importorskip("skimage")
    found = data.load(DataConfig(source="more_photographs", img_size=192))
    assert len(found.test) == 2 * 2 + 3 * 2  # of 512 x 512 and of 600 x 400 pixels
    assert found.train.tensors["inputs"].shape[1:] == (3, 192, 192)
