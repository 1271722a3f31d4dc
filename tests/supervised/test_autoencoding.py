"""Autoencoding: what is small counts, what is corrupted, how it is judged; and frames of games as samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.errors import LabError
from supervised.objectives.autoencoding import pixel_statistics
from supervised.trainer import Trainer
from tests.supervised.test_training import (
    CPU,
    frames,
    objective_of,
    restored_digits,
    settings_of,
)


def make(values: dict[str, Any], **objective: Any) -> Any:
    values["objective"] |= objective
    return objective_of(settings_of(values))


# ---- what counts ----


def test_mean_and_deviation_of_each_pixel() -> None:
    images = torch.randint(256, (3000, 2, 3), dtype=torch.uint8)  # more than are taken at once
    mean, std = pixel_statistics(images)
    torch.testing.assert_close(mean, (images / 255).mean(0))
    torch.testing.assert_close(std, (images / 255).std(0, correction=0))


def test_a_ball_of_one_pixel_counts_more_than_its_plain_pixels_would(tmp_path: Path) -> None:
    """Beside a bright half that changes as a whole, whose plain pixels deviate a hundred times as much."""
    values = frames(tmp_path)
    play = dict(np.load(tmp_path / "frames.npz"))
    still = play["frames"]
    still[:, :6] = np.where(np.arange(200) % 50 < 25, 20, 200)[:, None, None]  # the ball is left below
    np.savez(tmp_path / "frames.npz", **play)  # type: ignore[arg-type]
    shares = {}
    for least in (1e-3, 1.0):
        objective = make(values, least_std=least, noise=0.0, mask=0.0)
        batch = next(objective.batches("train", CPU.device).epoch(0))
        _, wanted, _ = objective._parts(objective.players["model"], batch)
        squares = wanted.square().sum((0, 1))
        shares[least] = float(squares[6:].sum() / squares.sum())
    assert shares[1.0] < 0.03
    assert shares[1e-3] > 5 * shares[1.0]


def test_r2_by_hand(tmp_path: Path) -> None:
    """The mean image restores nothing, the image itself all."""
    objective = make(restored_digits(tmp_path))
    model = objective.players["model"].eval()
    batches = list(objective.batches("test", CPU.device).epoch(0))
    wanted = torch.cat([objective._parts(model, batch)[1] for batch in batches])

    class Says(torch.nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.mean, self.std, self.share, self.at = model.mean, model.std, share, 0

        def forward(self, shown: torch.Tensor) -> torch.Tensor:
            self.at += len(shown)
            return self.share * wanted[self.at - len(shown) : self.at]

    for share, r2 in ((0.0, 0.0), (0.5, 0.75), (1.0, 1.0)):
        found = objective.evaluate({"model": Says(share)}, batches)
        assert found["r2"] == pytest.approx(r2, abs=1e-6)
        assert found["r2_pixels"] == pytest.approx(r2, abs=1e-6)
        assert found["loss"] == pytest.approx((1 - r2) * float(wanted.square().mean()), rel=1e-5, abs=1e-9)


def test_evaluations_are_all_of_the_same_corruption(tmp_path: Path) -> None:
    objective = make(restored_digits(tmp_path))
    objective.players["model"].eval()
    batches, found = list(objective.batches("test", CPU.device).epoch(0)), []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(objective.evaluate(objective.players, batches))
    assert found[0] == found[1]


# ---- what is shown ----


def test_what_is_corrupted_and_how(tmp_path: Path) -> None:
    images, mean = torch.full((64, 4, 12, 12), 0.5), torch.full((4, 12, 12), 0.25)
    objective = make(frames(tmp_path), noise=0.0, mask=0.25, patch=5)  # 5 does not divide 12
    wiped = objective._corrupted(images, mean, None) == 0.25
    assert wiped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    squares = wiped[:, :, :10, :10].unflatten(2, (2, 5)).unflatten(4, (2, 5))
    assert torch.equal(squares.all(5).all(3), squares.any(5).any(3))
    assert not torch.equal(wiped[:, 0], wiped[:, 1])  # of each frame others
    noisy = make(frames(tmp_path), noise=0.1, mask=0.0)._corrupted(images, mean, None) - images
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02)
    plain = make(frames(tmp_path), noise=0.0, mask=0.0)
    assert torch.equal(plain._corrupted(images, mean, None), images)


def test_a_frame_that_is_foretold_is_not_seen(tmp_path: Path) -> None:
    objective = make(frames(tmp_path))
    batch = next(objective.batches("train", CPU.device).epoch(0))
    other = {"frames": batch["frames"].clone()}
    other["frames"][:, -1] = 255 - other["frames"][:, -1]
    model = objective.players["model"].eval()
    one, two = (objective._parts(model, b, torch.Generator().manual_seed(0)) for b in (batch, other))
    assert one[0].shape[1] == 4
    assert torch.equal(one[2], two[2])
    assert not torch.equal(one[1][:, -1], two[1][:, -1])


def test_a_moving_ball_is_learned(tmp_path: Path) -> None:
    """Even where it will be, on held-out frames of a course that was learned from."""
    values = frames(tmp_path)
    seen = np.load(tmp_path / "frames.npz")
    twice = {name: np.concatenate([seen[name]] * 2) for name in seen}
    np.savez(tmp_path / "frames.npz", **twice)  # type: ignore[arg-type]
    values["data"]["held_out"] = 0.5
    values["objective"]["least_std"] = 0.01
    optimizer = {"learning_rate": 3e-3}
    settings = settings_of(values, max_steps=300, epochs=1000.0, optimizer=optimizer)
    objective: Any = objective_of(settings)
    trainer = Trainer(objective, objective.batches("train", CPU.device), settings, CPU)
    list(trainer.iterate())
    with trainer.judged() as players:
        found = objective.evaluate(players, objective.batches("test", CPU.device).epoch(0))
    assert found["r2"] > 0.15
    assert found["r2_foretold"] > 0.15


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"objective": {"name": "autoencoding", "foretell": 1}},
            "is for frames of a game, and digits holds",
        ),
        ({"model": {"backbone": "mlp"}}, "model.backbone = 'mlp': does not read what there is here"),
        ({"data": {"source": "iris"}}, "autoencoding learns from images or frames"),
        ({"data": {"source": "digits", "augment": {"flip": True}}}, "data.augment: what is shown"),
        ({"data": {"source": "digits", "img_size": 6}}, "Use larger images."),
        ({"objective": {"name": "autoencoding", "noise": -1.0}}, "objective.noise"),
        ({"objective": {"name": "autoencoding", "mask": 1.0}}, "objective.mask"),
        ({"objective": {"name": "autoencoding", "patch": 0}}, "objective.patch"),
        ({"objective": {"name": "autoencoding", "foretell": -1}}, "objective.foretell"),
        ({"objective": {"name": "autoencoding", "decoder_width": 0}}, "objective.decoder_width"),
        ({"objective": {"name": "autoencoding", "least_std": 0.0}}, "objective.least_std"),
        ({"objective": {"name": "autoencoding", "frames": 0}}, "objective.frames"),
        (
            {"batch_size": 3, "accumulate": 2},
            "batch_size: features are compared over a batch, and 3 images in 2",
        ),
    ],
)
def test_mistakes_say_what_to_do(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(LabError) as caught:
        objective_of(settings_of({**restored_digits(tmp_path), **values}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
