"""Writes docs/generative.md, four ways to make an image: `python -m benchmarks.generative_overview`.

Numbers and samples are those of benchmarks/results/; the diagrams are drawn from the modules themselves, of
which one image goes through each on the meta device.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gallery import minutes
from supervised import backbones
from supervised.figures import drawn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "generative.md"
DIAGRAMS = RESULTS / "generative_overview"
IMAGE = {"in_chans": 1, "img_size": [28, 28]}
"""The shape of Fashion-MNIST, which all of them make."""


@dataclass(frozen=True)
class Chain:
    """A row of a diagram: from what, through which modules of a backbone, to what."""

    before: str
    pattern: str
    """Matches the names of the modules that are shown."""
    after: str
    backbone: str = ""
    """Empty: that of the config."""


@dataclass(frozen=True)
class Family:
    """A way to make images."""

    title: str
    config: str
    text: str
    chains: Sequence[Chain]


FAMILIES = (
    Family(
        "Adversarial: the generator and its critic",
        "dcgan_fashion",
        "A generator makes an image of noise, at once. A critic learns to tell its images from real ones, "
        "and the generator to mislead it: two losses, two optimisers, one loop. Nobody can say how likely an "
        "image is. Here with R3GAN's loss, which compares real and made images in pairs and punishes steep "
        "critics. Both are told the class.",
        (
            Chain("noise", r"layers\.\d+", "image"),
            Chain("image, real\nor made", r"layers\.\d+", "how real", "dcgan_discriminator"),
        ),
    ),
    Family(
        "Variational: to a code and back",
        "vae_fashion",
        "An encoder says which codes an image may have, a decoder which images a code may stand for. What is "
        "learned is a lower bound on the likelihood: how well the image comes back, less what the code tells "
        "beyond the prior. The prior is learned, too: a flow between the codes of a class and noise. To make "
        "an image, turn noise into a code and decode it. What the code does not tell becomes blur.",
        (
            Chain("image", r"encoder\.\d+", "mean and spread\nof the code"),
            Chain("code,\nclass", r"prior\.\d+", "noise"),
            Chain("code", r"decoder\.\d+", "mean and spread\nof each pixel"),
        ),
    ),
    Family(
        "Flow: the same way back",
        "flow_fashion",
        "Every layer can be inverted, so that an image becomes noise and noise an image by one network, and "
        "the likelihood is exact: that of the noise, times how much the layers stretch. The price is that no "
        "layer may forget anything. Couplings are told the class, and each class has noise of its own.",
        (Chain("image,\nclass", r"levels\.\d+\.\d+|splits\.\d+|prior\.\d+", "noise"),),
    ),
    Family(
        "Diffusion: a little less noise, many times",
        "ddpm_fashion",
        "Noise is added to an image in a thousand steps until nothing is left of it; a network learns to say "
        "what was added. To make an image, begin with noise and take a little away, again and again. The "
        "variational bound of the whole way is a bound on the likelihood.",
        (
            Chain(
                "noisy image,\ntime, class",
                r"stem|(down|up)\.\d+\.(blocks\.\d+|resample)|middle\.blocks\.\d+|head",
                "its noise",
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Stage:
    """A module that an image went through."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of what came out, without the batch."""
    times: int = 1
    """How often it and those beside it with the same number follow one another."""


def stages(module: nn.Module, pattern: str) -> list[Stage]:
    """The modules whose names match, in the order in which one sample goes through them."""
    found: list[Stage] = []

    def seen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found.append(Stage(name, type(module).__name__.strip("_"), tuple(first.shape[1:])))

        return hook

    hooks = [
        part.register_forward_hook(seen(name))
        for name, part in module.named_modules()
        if re.fullmatch(pattern, name)
    ]
    with torch.no_grad():
        module.eval()(*module.example())  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found


def diagram(path: Path, family: Family, results: Path = RESULTS) -> Path:
    """Draws a family's networks: a box a module, the higher its images and the wider its channels are."""
    rows = [(chain, *_row(family, chain, results)) for chain in family.chains]
    rows = [(chain, folded(found), title) for chain, found, title in rows]
    longest = max(len(found) for _, found, _ in rows)
    with drawn(path, 2.8 + 0.62 * longest, 0.3 + 2.1 * len(rows)) as figure:
        for index, (chain, found, title) in enumerate(rows, start=1):
            axes = figure.add_subplot(len(rows), 1, index)
            axes.set_axis_off()
            axes.set_title(title, loc="left", fontsize=8)
            axes.set_xlim(-1.9, longest + 1.3)
            axes.set_ylim(-1.15, 0.95 if handed_across(found) else 0.62)
            _draw(axes, chain, found)
    return path


def _row(family: Family, chain: Chain, results: Path) -> tuple[list[Stage], str]:
    """The modules of a chain, and what it is: as it was trained, at the sizes of Fashion-MNIST."""
    values = json.loads((results / f"{family.config}.json").read_text())["config"]
    model = values["model"]
    name, spec = model["backbone"], dict(model.get("spec", {}))
    if chain.backbone:
        critic = values["objective"].get("critic", {})
        name, spec = chain.backbone, dict(critic.get("spec", {}))
    given = {**IMAGE, "num_classes": 10 if values["objective"].get("conditional") else 0}
    takes = backbones.arguments(name)
    with torch.device("meta"):
        module = backbones.build(name, **{k: v for k, v in given.items() if k in takes}, **spec)
    n_parameters = sum(p.numel() for p in module.parameters())
    return stages(module, chain.pattern), f"{name}, {n_parameters:,} parameters"


def folded(found: Sequence[Stage]) -> list[Stage]:
    """Of several modules that come again and again in the same order, only the first ones."""
    folded, at = [], 0
    alike = [(stage.kind, stage.shape) for stage in found]
    while at < len(found):
        period = next((p for p in (2, 3, 4) if alike[at : at + p] == alike[at + p : at + 2 * p] != []), 1)
        cycle, times = alike[at : at + period], 1
        while period > 1 and alike[at + times * period : at + (times + 1) * period] == cycle:
            times += 1
        if len(set(cycle)) == 1:  # one and the same module: it may have a place in a U
            period, times = 1, 1
        folded += [replace(stage, times=times) for stage in found[at : at + period]]
        at += period * times
    return folded


def handed_across(found: Sequence[Stage]) -> list[tuple[int, int]]:
    """From which module to which a U-Net hands what it has seen on the way down."""
    seen, handed = [], []
    for index, stage in enumerate(found):
        if stage.name == "stem" or stage.name.startswith("down."):
            seen.append(index)
        elif stage.name.startswith("up.") and ".blocks." in stage.name:
            handed.append((seen.pop(), index))
    return handed


def _draw(axes: Any, chain: Chain, found: Sequence[Stage]) -> None:
    from matplotlib.patches import Rectangle

    tallest = max(_height(stage) for stage in found)
    kinds = list(dict.fromkeys(stage.kind for stage in found))
    end = len(found) - 0.3
    axes.annotate(
        "", (end, 0), (-0.5, 0), arrowprops={"arrowstyle": "->", "lw": 0.7, "color": "0.4"}, zorder=0
    )
    axes.text(-0.55, 0, chain.before, ha="right", va="center", fontsize=8)
    axes.text(end + 0.05, 0, chain.after, ha="left", va="center", fontsize=8)
    axes.text(-0.55, -0.56, "channels\npixels a side", ha="right", va="top", fontsize=6, color="0.4")
    for x, stage in enumerate(found):
        high = max(0.06, 0.95 * _height(stage) / tallest)
        wide = min(0.86, 0.14 + 0.1 * stage.shape[0] ** 0.45)
        color = f"C{kinds.index(stage.kind) % 10}"
        axes.add_patch(Rectangle((x - wide / 2, -high / 2), wide, high, facecolor=color, edgecolor="white"))
        axes.text(x, -0.56, "\n".join(map(str, stage.shape[:2])), ha="center", va="top", fontsize=6)
        if stage.times > 1 and (x == 0 or found[x - 1].times == 1):
            n = next((n for n, other in enumerate(found[x:]) if other.times == 1), len(found) - x)
            axes.plot([x - 0.4, x + n - 0.6], [-0.9, -0.9], color="0.4", lw=0.7)
            axes.text(x + n / 2 - 0.5, -0.89, f"{stage.times} times", ha="center", fontsize=6, va="bottom")
    for start, stop in handed_across(found):
        arrow = {"arrowstyle": "->", "lw": 0.5, "color": "0.5", "connectionstyle": "arc3,rad=-0.12"}
        axes.annotate("", (stop - 0.2, 0.49), (start + 0.1, 0.49), arrowprops=arrow)
    for index, kind in enumerate(kinds):
        axes.text(index * 1.9 - 0.4, -1.14, f"\u25a0 {kind}", color=f"C{index % 10}", fontsize=7, va="bottom")


def _height(stage: Stage) -> int:
    return stage.shape[1] if len(stage.shape) == 3 else 1


def page(results: Path = RESULTS) -> str:
    """The page as Markdown, with links as they are from docs/."""
    lines = [
        "# Four ways to make an image",
        "",
        "Adversarial, variational, flow and diffusion: the same clothes (Fashion-MNIST), one training loop,",
        "one measure. Written by `python -m benchmarks.generative_overview` from benchmarks/results/ and the",
        "modules themselves.",
        "",
        "- **bits per dimension**: what a held-out image costs by the model's likelihood, or by a bound on",
        "  it.",
        "- **distance**: Fréchet distance of generated from real images on the features of our own",
        "  classifier. It is no FID. Its floor is what real held-out images have.",
        "- **detector**: the share that a classifier, trained to tell real from generated, gets right on",
        "  images it has not seen, with its 95% interval. 50% is as good as a coin: nobody could tell.",
        "- **recognised**: images that the classifier takes for the class that was asked for.",
        "",
        *table(results),
        "",
        f"{_compared(results)}. Times are of the machine in the result files.",
    ]
    for family in FAMILIES:
        picture = f"../benchmarks/results/generative_overview/{family.config}.png"
        samples = f"../benchmarks/results/{family.config}/samples.png"
        command = f"`lab train configs/supervised/{family.config}.yaml`"
        lines += ["", f"## {family.title}", "", family.text, "", command]
        lines += [
            "",
            f"![{family.config}, its modules]({picture})",
            "",
            f"![{family.config}, samples]({samples})",
        ]
    return "\n".join(lines) + "\n"


def table(results: Path = RESULTS) -> Iterator[str]:
    """The generators side by side, as rows of Markdown."""
    yield "| config | bits per dimension | distance (floor) | detector | recognised | training | one image |"
    yield "|---|---|---|---|---|---|---|"
    for family in FAMILIES:
        run = json.loads((results / f"{family.config}.json").read_text())["runs"][0]
        e = run["evaluation"]
        bits = f"{e['bits_per_dim']:.2f}" if "bits_per_dim" in e else "none"
        recognised = f"{e['recognised']:.0%}" if "recognised" in e else "no classes"
        low, high = e["detector_accuracy_low"], e["detector_accuracy_high"]
        yield (
            f"| {family.config} | {bits} | {e['frechet_features']:.1f} ({e['frechet_features_floor']:.1f}) | "
            f"{e['detector_accuracy']:.1%} ({low:.1%} to {high:.1%}) | {recognised} | {minutes(run)} | "
            f"{e['ms_to_sample_one']:.3g} ms |"
        )


def _compared(results: Path) -> str:
    """What the distances are of.

    Raises:
        ValueError: it was not the same for all.
    """
    runs = [json.loads((results / f"{family.config}.json").read_text())["runs"][0] for family in FAMILIES]
    said = {run["notes"][0] for run in runs}
    if len(said) != 1:
        raise ValueError(f"the generators were judged in different ways: {sorted(said)}")
    return said.pop()


def main() -> None:
    DIAGRAMS.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        diagram(DIAGRAMS / f"{family.config}.png", family)
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
