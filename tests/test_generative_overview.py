"""The page of the generative families: diagrams drawn from modules, a table from results."""

import pytest
import torch

from benchmarks import generative_overview as overview
from benchmarks.generative_overview import Stage
from supervised import backbones


def unet() -> list[Stage]:
    with torch.device("meta"):
        net = backbones.build("unet", in_chans=1, img_size=[8, 8], width=8, mults=[1, 2], n_res=1, groups=4)
    return overview.stages(net, overview.FAMILIES[-1].chains[0].pattern)


def test_stages_are_the_modules_in_the_order_of_the_data() -> None:
    assert [(stage.name, stage.kind, stage.shape) for stage in unet()] == [
        ("stem", "Conv2d", (8, 8, 8)),
        ("down.0.blocks.0", "ResBlock", (8, 8, 8)),
        ("down.0.resample", "Downsample", (8, 4, 4)),
        ("down.1.blocks.0", "ResBlock", (16, 4, 4)),
        ("middle.blocks.0", "ResBlock", (16, 4, 4)),
        ("middle.blocks.1", "ResBlock", (16, 4, 4)),
        ("up.0.blocks.0", "ResBlock", (16, 4, 4)),
        ("up.0.blocks.1", "ResBlock", (16, 4, 4)),
        ("up.0.resample", "Upsample", (16, 8, 8)),
        ("up.1.blocks.0", "ResBlock", (8, 8, 8)),
        ("up.1.blocks.1", "ResBlock", (8, 8, 8)),
        ("head", "Conv2d", (1, 8, 8)),
    ]


def test_what_a_unet_hands_across_is_what_its_channels_say() -> None:
    found = unet()
    with torch.device("meta"):
        net = backbones.build("unet", in_chans=1, img_size=[8, 8], width=8, mults=[1, 2], n_res=1, groups=4)
    modules = dict(net.named_modules())
    for start, stop in overview.handed_across(found):
        takes = modules[found[stop].name].conv1.in_channels
        assert takes == found[stop - 1].shape[0] + found[start].shape[0]
    assert len(overview.handed_across(found)) == 4


def test_steps_that_come_again_are_drawn_once() -> None:
    with torch.device("meta"):
        flow = backbones.build("flow", in_chans=1, img_size=[8, 8], levels=1, depth=3, hidden=4)
    folded = overview.folded(overview.stages(flow, r"levels\.\d+\.\d+|splits\.\d+"))
    assert [(stage.kind, stage.times) for stage in folded] == [
        ("Squeeze", 1),
        ("ActNorm", 3),
        ("Mix", 3),
        ("Coupling", 3),
    ]
    assert overview.folded(unet()) == unet()


def test_the_page_is_what_its_command_writes_of_the_results() -> None:
    assert overview.PAGE.read_text() == overview.page()


@pytest.mark.parametrize("family", overview.FAMILIES, ids=lambda family: family.config)
def test_each_family_has_its_diagram(family: overview.Family) -> None:
    assert (overview.DIAGRAMS / f"{family.config}.png").read_bytes().startswith(b"\x89PNG")
