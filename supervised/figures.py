"""Pictures of what a model was shown, made and learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.figure import drawn, shown

BLUE, ORANGE, GREY = "#2a6fbb", "#e08a1e", "#666666"
LARGEST, LABELS = 22.0, 60
"""Inches of a matrix's side, and rows or columns up to which each has its name: a thousand would take
gigabytes to draw, and nobody could read them."""


def image_grid(
    path: Path,
    images: np.ndarray,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    wrong: Sequence[bool] = (),
) -> Path:
    """Images side by side.

    Args:
        images: (n, channels, height, width), 0..255 or 0..1.
        titles: one each.
        wrong: whose title is to be orange.
    """
    rows = -(-len(images) // columns)
    high = 1.0 if titles is None else 1.25
    with drawn(path, 1.1 * columns, 1.1 * high * rows) as figure:
        for i, image in enumerate(images):
            axes = figure.add_subplot(rows, columns, i + 1)
            _show(axes, image)
            if titles is not None:
                color = ORANGE if wrong and wrong[i] else "black"
                axes.set_title(shown(titles[i]), fontsize=7, color=color, pad=2)
    return path


def mosaic(
    path: Path, images: np.ndarray, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> Path:
    """Rows of images, (rows, columns, channels, height, width) in 0..255, with names of rows and columns."""
    n_rows, n_columns, channels, height, width = images.shape
    spaced = np.full((channels, n_rows * (height + 1), n_columns * (width + 1)), 255, np.uint8)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            top, left = i * (height + 1), j * (width + 1)
            spaced[:, top : top + height, left : left + width] = image
    wide = 0.7 * n_columns + (1.2 if row_names else 0.1)
    with drawn(path, wide, 0.7 * height / width * n_rows + 0.3) as figure:
        axes = figure.add_subplot()
        _show(axes, spaced)
        axes.axis("on")
        rows = [i * (height + 1) + height / 2 for i in range(len(row_names))]
        columns = [j * (width + 1) + width / 2 for j in range(len(column_names))]
        axes.set_yticks(rows, row_names, fontsize=8)
        axes.set_xticks(columns, column_names, fontsize=8)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return path


def side_by_side(path: Path, columns: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> Path:
    """The same images in several versions, a column each.

    Args:
        columns: of each a title, the images (n, channels, height, width), and what to write below each.
    """
    n, _, height, width = columns[0][1].shape
    with drawn(path, 2.2 * len(columns), 2.2 * (height / width + 0.12) * n) as figure:
        for x, (title, images, below) in enumerate(columns):
            for y, (image, text) in enumerate(zip(images, below, strict=True)):
                axes = figure.add_subplot(n, len(columns), y * len(columns) + x + 1)
                _show(axes, image)
                axes.text(0.5, -0.02, text, ha="center", va="top", fontsize=7, transform=axes.transAxes)
                if not y:
                    axes.set_title(title, fontsize=9)
    return path


def confusion(path: Path, counts: np.ndarray, classes: Sequence[str]) -> Path:
    """How often a class (row) is taken for another (column), of all its samples."""
    n = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(3.5, 0.45 * n + 1.5), LARGEST)
    with drawn(path, size + 0.6, size) as figure:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if n <= LABELS:
            names = [shown(name) for name in classes]
            axes.set_xticks(range(n), names, rotation=45, ha="right", fontsize=8)
            axes.set_yticks(range(n), names, fontsize=8)
        axes.set(xlabel="taken for", ylabel="is")
        if n <= 20:
            for row in range(n):
                for column in range(n):
                    if shares[row, column] >= 0.005:
                        color = "white" if shares[row, column] > 0.5 else "black"
                        text = f"{100 * shares[row, column]:.0f}"
                        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        axes.set_title(
            f"per cent of each class; {np.trace(counts) / max(counts.sum(), 1):.1%} right in all", fontsize=9
        )
    return path


def scatter(path: Path, wanted: np.ndarray, found: np.ndarray) -> Path:
    """Numbers (n,) that a model found over those wanted, and the line on which they would agree."""
    with drawn(path, 4, 4) as figure:
        axes = figure.add_subplot()
        axes.plot(wanted, found, ".", color=BLUE, markersize=4, alpha=0.5)
        ends = [float(np.min(wanted)), float(np.max(wanted))]
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.set(xlabel="wanted", ylabel="found")
        axes.grid(alpha=0.25)
    return path


def learning_curve(path: Path, rows: Sequence[Mapping[str, Any]], headline: str) -> Path:
    """A run's losses and its headline over optimiser steps, with what others reach where that is known.

    Args:
        rows: of metrics.jsonl.
        headline: the evaluation's number that counts, e.g. "accuracy".
    """

    def line(axes: Any, key: str, color: str, label: str, **style: Any) -> None:
        points = [(row["global_step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=label, **style)

    names = ["loss"] + [headline] * (headline != "loss")
    with drawn(path, 5 * len(names), 3.6) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            training = "training, as it is minimised" if name == "loss" else "training"
            line(axes, f"train/{name}", BLUE, training, linewidth=1)
            line(axes, f"eval/{name}", ORANGE, "held-out", marker="o", markersize=3)
            others = {key: row[key] for row in rows for key in row if key.endswith(f"_{name}")}
            for style, (key, value) in zip(("--", ":"), sorted(others.items()), strict=False):
                other = key.removeprefix("eval/").removesuffix(f"_{name}")
                axes.axhline(value, color=GREY, linestyle=style, label=shown(other))
            axes.set(xlabel="optimiser steps", ylabel=name.replace("_", " "))
            axes.grid(alpha=0.25)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.legend(fontsize=8)
    return path


def errors_by_step(path: Path, dreamed: np.ndarray, copied: np.ndarray) -> Path:
    """Mean squared errors (frames,) of a world model's rollout, and of the last real frame repeated."""
    with drawn(path, 5, 3.6) as figure:
        axes = figure.add_subplot()
        steps = range(1, len(dreamed) + 1)
        axes.plot(steps, copied, color=GREY, marker="o", markersize=3, label="last frame repeated")
        axes.plot(steps, dreamed, color=BLUE, marker="o", markersize=3, label="dreamed")
        axes.set(xlabel="frames since the last real one", ylabel="mean squared error (pixels 0 to 1)")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(fontsize=8)
    return path


def filters(path: Path, kernels: np.ndarray) -> Path:
    """Kernels of a first layer, (n, channels, height, width), each stretched to its own range."""
    low, high = (f(kernels, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return image_grid(path, (kernels - low) / np.maximum(high - low, 1e-12))


def attention(path: Path, weights: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> Path:
    """Attention weights (rows, columns): how much each row's token looks at each column's."""
    width, height = (min(0.32 * len(tokens) + 2, LARGEST) for tokens in (columns, rows))
    with drawn(path, width, height) as figure:
        axes = figure.add_subplot()
        axes.imshow(weights, cmap="Blues", vmin=0)
        if len(columns) <= LABELS:
            axes.set_xticks(range(len(columns)), map(shown, columns), rotation=60, ha="right", fontsize=8)
        if len(rows) <= LABELS:
            axes.set_yticks(range(len(rows)), map(shown, rows), fontsize=8)
        axes.set_xlabel("looked at", fontsize=8, color=GREY)
        axes.set_ylabel("looks", fontsize=8, color=GREY)
    return path


def heat(path: Path, images: np.ndarray, maps: np.ndarray, columns: int = 8) -> Path:
    """Images (n, channels, height, width) with where a model looked, maps (n, rows, columns), over them."""
    rows = -(-len(images) // columns)
    with drawn(path, 1.1 * columns, 1.1 * rows) as figure:
        for i, (image, weights) in enumerate(zip(images, maps, strict=True)):
            axes = figure.add_subplot(rows, columns, i + 1)
            _show(axes, image)
            extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
            axes.imshow(weights, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
    return path


def diffusion(
    path: Path,
    titles: Sequence[str],
    forward: Sequence[np.ndarray],
    reverse: Sequence[np.ndarray],
    places: np.ndarray,
    drift: Sequence[np.ndarray],
) -> Path:
    """Points in the plane on the way into noise and back, a column a time (arXiv 1503.03585, figure 1).

    Args:
        titles: of the columns.
        forward, reverse: points (n, 2) at each time.
        places: where the drift is shown, (m, 2).
        drift: of the way back at each time, (m, 2).
    """
    rows = (("into noise", BLUE, forward), ("out of noise", ORANGE, reverse), ("drift", GREY, drift))
    with drawn(path, 2.4 * len(titles), 7.4) as figure:
        axes = figure.subplots(len(rows), len(titles), squeeze=False, sharex=True, sharey=True)
        for i, (name, color, columns) in enumerate(rows):
            for j, values in enumerate(columns):
                panel = axes[i, j]
                if name == "drift":
                    panel.quiver(*places.T, *values.T, color=color, angles="xy", width=0.004)
                else:
                    panel.scatter(*values.T, s=1, color=color, alpha=0.5, linewidths=0)
                panel.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(), yticks=(), aspect="equal")
            axes[i, 0].set_ylabel(name, fontsize=10)
        for panel, title in zip(axes[0], titles, strict=True):
            panel.set_title(title, fontsize=10)
    return path


def _show(axes: Any, image: np.ndarray) -> None:
    """One image (channels, height, width)."""
    pixels = image.transpose(1, 2, 0) if len(image) in (3, 4) else image.mean(0)
    whole = 255 if image.dtype == np.uint8 else 1.0
    axes.imshow(np.clip(pixels / whole, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
