"""Figures of runs. Colours are Okabe and Ito's, safe for colour-blind readers; head and tail are
marked the same way everywhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

HEAD, TAIL, ALL, BEFORE = "#0072B2", "#D55E00", "#000000", "#999999"
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "legend.frameon": False,
}


def new_axes(
    columns: int = 1, width: float = 7.0, height: float = 4.0, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes.flat)


def plain_numbers_on_log_axis(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def lr_schedule(rates: Sequence[float], steps_per_epoch: int, path: Path) -> None:
    """Learning rate over steps, logarithmic, with epochs along the top."""
    figure, (axes,) = new_axes()
    axes.step(range(len(rates)), rates, where="post", color=ALL)
    axes.set(yscale="log", xlabel="optimiser step", ylabel="learning rate", title="LR schedule")
    top = axes.secondary_xaxis(
        "top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch)
    )
    top.set_xlabel("epoch")
    save(figure, path)


def learning_curves(histories: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Training loss beside validation accuracy: balanced, head, tail; histories by metric name.
    Without validations, the loss alone."""
    has_validation = any(points for name, points in histories.items() if name != "train/loss")
    figure, (left, *others) = new_axes(1 + has_validation, 5.0 + 5.0 * has_validation, 4.0)
    left.plot(*zip(*histories["train/loss"], strict=True), color=ALL)
    left.set(xlabel="optimiser step", ylabel="nats", title="Training loss (mean over images)")
    if not has_validation:
        save(figure, path)
        return
    (right,) = others
    for name, colour, label in (
        ("val/head_accuracy", HEAD, "head"),
        ("val/balanced_accuracy", ALL, "balanced"),
        ("val/tail_accuracy", TAIL, "tail"),
    ):
        if histories.get(name):
            steps, values = zip(*histories[name], strict=True)
            right.plot(steps, 100 * np.array(values), marker="o", ms=3, color=colour, label=label)
    right.set(xlabel="optimiser step", ylabel="accuracy, %", title="Validation on val_lt")
    right.set_ylim(bottom=0)
    right.legend()
    save(figure, path)


def per_class_accuracy(
    recall: np.ndarray, pool_counts: np.ndarray, is_head: np.ndarray, path: Path
) -> None:
    """Recall on test_balanced of each class over its images in the LT pool."""
    figure, (axes,) = new_axes()
    for mask, colour, marker, name in ((is_head, HEAD, "o", "head"), (~is_head, TAIL, "^", "tail")):
        if mask.any():
            mean = 100 * np.nanmean(recall[mask])
            axes.scatter(
                pool_counts[mask],
                100 * recall[mask],
                s=22,
                c=colour,
                marker=marker,
                label=f"{name}: {mask.sum()} classes, mean {mean:.1f} %",
            )
            axes.hlines(mean, pool_counts[mask].min(), pool_counts[mask].max(), color=colour, lw=1)
    axes.set(
        xscale="log",
        xlabel="images of the class in the LT pool",
        ylabel="recall on test_balanced, %",
        title="Per-class accuracy against class frequency",
        ylim=(-3, 103),
    )
    plain_numbers_on_log_axis(axes.xaxis)
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


def reliability(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Accuracy over confidence, before and after scaling; panels title -> {label: bins [15, 3]}.

    The bins are (images, confidence, accuracy); empty ones are not drawn, and the size of a
    marker grows with its share of the images.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = new_axes(columns, 5.0 * columns, 4.6 * rows, rows)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        ax.plot([0, 100], [0, 100], color=BEFORE, lw=1, ls="--")
        for (label, bins), colour, marker in zip(
            curves.items(), (TAIL, HEAD), ("s", "o"), strict=False
        ):
            count, confidence, accuracy = bins[bins[:, 0] > 0].T
            ece = (count * abs(accuracy - confidence)).sum() / count.sum()
            ax.plot(100 * confidence, 100 * accuracy, color=colour, lw=1)
            ax.scatter(
                100 * confidence,
                100 * accuracy,
                s=8 + 150 * count / count.sum(),
                c=colour,
                marker=marker,
                label=f"{label}: ECE {100 * ece:.1f} %",
            )
        ax.set(
            xlabel="confidence, %",
            ylabel="accuracy, %",
            title=title,
            xlim=(0, 100),
            ylim=(0, 100),
        )
        ax.legend(loc="upper left")
    save(figure, path)


def split_counts(
    class_counts: Mapping[str, np.ndarray], pool_counts: np.ndarray, path: Path
) -> None:
    """Images a class in every split, classes from the most frequent to the rarest."""
    figure, axes = new_axes(2, 11.0, 4.2)
    order = np.argsort(-pool_counts, kind="stable")
    colours = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
    for (split, counts), colour in zip(class_counts.items(), colours, strict=False):
        ax = axes[split in ("val_lt", "test_lt", "test_balanced")]
        total = int(counts.sum())
        ax.plot(np.maximum(counts[order], 0.5), lw=1.3, color=colour, label=f"{split}: {total:,}")
    for ax, title in zip(axes, ("from the training images", "from the test images"), strict=True):
        ax.set(
            yscale="log",
            xlabel="classes, most frequent first",
            ylabel="images (0 drawn at 0.5)",
            title=f"Splits {title}",
        )
        plain_numbers_on_log_axis(ax.yaxis)
        ax.legend()
    save(figure, path)
