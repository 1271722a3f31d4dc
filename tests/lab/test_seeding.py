"""Seeds: words give different ones, and a step draws what it would after torch's own seeding."""

import itertools

import torch

from lab.seeding import derive_seed, seed_step


def test_every_word_of_a_seed_matters() -> None:
    seeds = {derive_seed(*words) for words in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**30 for seed in seeds)


def test_a_step_is_seeded_as_torch_does_it() -> None:
    torch.manual_seed(11)
    expected = torch.randn(5)
    seed_step(11, torch.device("cpu"))
    assert torch.equal(torch.randn(5), expected)
