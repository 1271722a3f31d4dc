"""Augmentation: what each does to an image, that a generator decides it, and that nothing waits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.config import ConfigError
from supervised.data.augment import Augment, Normalize, shift
from supervised.data.config import AugmentConfig
from tests.host_reads import HostReads

IMAGES = torch.arange(1.0, 1 + 64 * 3 * 8 * 6).view(64, 3, 8, 6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EVERYTHING: dict[str, Any] = {"shift": 2, "flip": True, "cutout": 3}
KINDS: list[dict[str, Any]] = [{"shift": 2}, {"flip": True}, {"cutout": 3}, EVERYTHING]


def test_normalized_data_has_mean_0_and_variance_1() -> None:
    data = torch.randint(0, 256, (500, 3, 5, 4), dtype=torch.uint8, generator=generator())
    data[:, 1] = 7
    normalize = Normalize.of(data)
    out = normalize(data)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.tensor([1.0, 0, 1]), atol=1e-5)
    assert torch.allclose(normalize.undo(out), data.float(), atol=1e-3)
    assert torch.equal(Normalize(**normalize.spec())(data), out)


def test_columns_of_a_table_are_normalized_each() -> None:
    data = torch.tensor([[1.0, 1000.0], [3.0, 3000.0]])
    assert Normalize.of(data)(data).tolist() == [[-1.0, -1.0], [1.0, 1.0]]


def test_chunks_of_large_data_add_up() -> None:
    data = torch.randint(0, 256, (3, 2, 1024, 700), dtype=torch.uint8, generator=generator())
    normalize = Normalize.of(data)
    values = data.double().transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(normalize.mean, dtype=torch.float64), values.mean(1))
    assert torch.allclose(torch.tensor(normalize.std, dtype=torch.float64), values.std(1, correction=0))


def test_a_shift_moves_all_pixels_alike() -> None:
    moves = torch.tensor([[0, 2, 4], [2, 2, 3]])
    out = shift(IMAGES[:3], 2, moves)
    assert torch.equal(out[1], IMAGES[1])
    assert torch.equal(out[0, :, 2:], IMAGES[0, :, :-2])  # a crop from further up: all moves down
    assert not out[0, :, :2].any()
    assert torch.equal(out[2, :, :-2, :-1], IMAGES[2, :, 2:, 1:])
    assert not out[2, :, -2:].any()
    assert not out[2, :, :, -1].any()


def test_all_shifts_occur() -> None:
    images = torch.zeros(2000, 1, 5, 5)
    images[:, 0, 2, 2] = 1
    seen = Augment(AugmentConfig(shift=1))(images, generator()).flatten(1).sum(0).view(5, 5)
    assert seen.sum() == 2000
    assert seen[1:4, 1:4].min() > 160  # 2000 / 9 = 222 of each


def test_a_flip_mirrors_half_of_the_images() -> None:
    out = Augment(AugmentConfig(flip=True))(IMAGES, generator())
    mirrored = (out == IMAGES.flip(-1)).flatten(1).all(1)
    assert torch.equal(out[~mirrored], IMAGES[~mirrored])
    assert 20 < mirrored.sum() < 44


@given(side=st.integers(1, 12), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_cutout_wipes_out_one_square(side: int, seed: int) -> None:
    out = Augment(AugmentConfig(cutout=side))(IMAGES, generator(seed))
    gone = out == 0
    assert torch.equal(out[~gone], IMAGES[~gone])
    assert torch.equal(gone[:, 0], gone[:, 2])
    rows, columns = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert torch.equal(gone[:, 0].flatten(1).sum(1), rows * columns)
    assert rows.min() >= min(side // 2, 8)
    assert rows.max() <= side
    if side in (4, 6):
        assert (rows == side).any()


def test_mixup_mixes_images_and_labels_alike() -> None:
    labels = torch.arange(64) % 4
    images = torch.nn.functional.one_hot(labels, 4).float()[:, None, None] * torch.ones(64, 1, 3, 1)
    mixed, target = Augment(AugmentConfig(mixup=1.0)).mix(images, labels, 4, generator())
    assert torch.allclose(mixed, target[:, None, None].expand(mixed.shape))
    assert torch.allclose(target.sum(1), torch.ones(64))
    shares = target.amax(1)
    assert ((shares > 0.55) & (shares < 0.95)).sum() > 15  # alpha = 1: evenly spread


def test_cutmix_weighs_labels_by_area() -> None:
    labels = torch.arange(64) % 64
    images = labels.float().view(64, 1, 1, 1).expand(64, 1, 9, 7)
    mixed, target = Augment(AugmentConfig(cutmix=1.0)).mix(images, labels, 64, generator())
    for image, share in zip(mixed, target, strict=True):
        area = torch.bincount(image.long().flatten(), minlength=64) / 63
        assert torch.allclose(area, share, atol=1e-6)
    assert (target.amax(1) < 0.9).sum() > 20


def test_without_mixing_labels_stay_classes() -> None:
    labels = torch.arange(64)
    images, same = Augment(AugmentConfig()).mix(IMAGES, labels, 64)
    assert images is IMAGES
    assert same is labels
    assert Augment(AugmentConfig())(IMAGES) is IMAGES


@pytest.mark.parametrize("config", KINDS)
def test_the_generator_decides(config: dict[str, Any]) -> None:
    augment = Augment(AugmentConfig(**config))
    assert torch.equal(augment(IMAGES, generator(1)), augment(IMAGES, generator(1)))
    assert not torch.equal(augment(IMAGES, generator(1)), augment(IMAGES, generator(2)))
    torch.manual_seed(1)
    assert torch.equal(augment(IMAGES), augment(IMAGES, generator(1)))  # torch's own, if none is given


@pytest.mark.parametrize("config", [*KINDS, {"mixup": 0.2}, {"cutmix": 1.0}])
def test_nothing_waits_for_the_device(config: dict[str, Any]) -> None:
    augment, normalize = Augment(AugmentConfig(**config)), Normalize([1.0] * 3, [2.0] * 3)
    labels = torch.zeros(64, dtype=torch.int64)
    with HostReads() as reads:
        augment.mix(augment(normalize(IMAGES)), labels, 4)
    assert not reads.seen
    out, target = augment.mix(augment(normalize(IMAGES.to("meta"))), labels.to("meta"), 4)
    assert out.shape == IMAGES.shape
    assert out.device.type == target.device.type == "meta"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": -1}, "data.augment.shift: must not be"),
        ({"mixup": 1.0, "cutmix": 1.0}, "together with mixup"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**values)


@pytest.mark.parametrize("unit", [1e-30, 1e-14, 1.0, 1e12])
def test_numbers_are_scaled_whatever_their_unit(unit: float) -> None:
    numbers = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    numbers[:, 1] = 0.1
    data = (numbers * unit).float()
    scaled = Normalize.of(data)(data)
    assert scaled.std(0, correction=0).tolist() == pytest.approx([1, 0], abs=1e-5)
