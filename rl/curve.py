"""The learning curve of a run as a picture, with the published scores as lines."""

from pathlib import Path

from lab.figure import drawn, shown
from lab.tracking import read_metrics
from rl import games

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#e08a1e", "#666666"


def draw_curve(metrics: Path, game: str, frame_skip: int, title: str, path: Path) -> None:
    """Draws training and evaluation returns over agent steps to `path`, a PNG.

    Args:
        metrics: the run's metrics.jsonl.
        frame_skip: emulator frames of an agent step.
        game: for the lines of random play, the human tester and DQN in Mnih et al. 2015.
    """
    rows = read_metrics(metrics)
    train = [(r["global_step"], r["rollout/ep_rew_mean"]) for r in rows if "rollout/ep_rew_mean" in r]
    evals = [
        (r["global_step"], r["eval/mean_reward"], r["eval/std_reward"])
        for r in rows
        if "eval/mean_reward" in r
    ]
    with drawn(path, 8, 4.5) as figure:
        axes = figure.add_subplot()
        if train:
            axes.plot(*zip(*train, strict=True), color=_BLUE, label="training, mean of last 100 games")
        if evals:
            steps, means, stds = zip(*evals, strict=True)
            axes.errorbar(
                steps, means, stds, fmt="o", color=_ORANGE, capsize=3, label="evaluation, mean and std"
            )
        for name, score in games.landmarks(game):
            axes.axhline(score, color=_GREY, linewidth=0.9, linestyle="--", zorder=0)
            axes.annotate(
                f"{name} {score:g}",
                (1.005, score),
                xycoords=("axes fraction", "data"),
                color=_GREY,
                fontsize=8,
                va="center",
            )
        axes.set(
            title=shown(title),
            xlabel=f"agent steps ({frame_skip} frames each)",
            ylabel="return of whole games, unclipped",
        )
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k")
        axes.grid(alpha=0.25)
        if train or evals:
            axes.legend(loc="best", fontsize=8, framealpha=0.9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
