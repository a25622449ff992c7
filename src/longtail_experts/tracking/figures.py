"""Figures of runs, in colours safe for colour-blind readers (Okabe and Ito's, some of Tol's).

Head, tail and all classes are marked the same way everywhere, and nothing else in these colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from longtail_experts.data.longtail import MANY_ABOVE, TAIL_AT_MOST

HEAD, TAIL, ALL, BEFORE = "#0072B2", "#D55E00", "#000000", "#999999"
MARKS = {"balanced": (ALL, "D"), "head": (HEAD, "o"), "tail": (TAIL, "^")}
# Of experts and of splits: no two alike, none that of head, of tail or of all classes.
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933")
TEST_SPLITS = ("val_lt", "test_lt", "test_balanced")
FEW_IN_A_BIN = 10  # images, below which the accuracy of a bin says little
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "legend.frameon": False,
    "text.parse_math": False,  # people name sweeps, and what stands between two $ is their own
}


def new_axes(
    columns: int = 1,
    width: float = 7.0,
    height: float = 4.0,
    rows: int = 1,
    font_size: int = 10,
) -> tuple[Figure, list[Axes]]:
    plt.rcParams.update({**STYLE, "font.size": font_size})
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    return figure, list(axes.flat)


def plain_numbers_on_log_axis(axis: Axis) -> None:
    """What is drawn on the axis must be there already."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def mark_groups(axes: Axes, pool_counts: np.ndarray) -> None:
    """Names of the groups along the top of an axis of pool images; room for them is made."""
    low, high = pool_counts.min(), pool_counts.max()
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.13 * (top - bottom))
    lines = (
        (TAIL_AT_MOST, "tail", TAIL, "head", HEAD, "--", 0.99),
        (MANY_ABOVE, "medium", BEFORE, "many", BEFORE, ":", 0.935),
    )
    for last, left, left_colour, right, right_colour, style, height in lines:
        if not low <= last < high:
            continue
        axes.axvline(last + 0.5, color=BEFORE, lw=1, ls=style, zorder=0)
        for x, side, name, colour in (
            ((last + 0.5) / 1.06, "right", left, left_colour),
            ((last + 0.5) * 1.06, "left", right, right_colour),
        ):
            axes.text(
                x,
                height,
                name,
                ha=side,
                va="top",
                color=colour,
                fontsize=9,
                transform=axes.get_xaxis_transform(),
            )


def save(figure: Figure, path: Path, dpi: int = 130) -> None:
    """The same file as of `savefig`, which draws everything twice: once for the layout alone."""
    figure.set_dpi(dpi)
    figure.canvas.print_png(path)
    plt.close(figure)


def lr_schedule(rates: Sequence[float], steps_per_epoch: int, path: Path) -> None:
    """Learning rate over steps, logarithmic, with epochs along the top."""
    figure, (axes,) = new_axes()
    axes.step(range(len(rates)), rates, where="post", color=ALL)
    axes.set(yscale="log", xlabel="optimiser step", ylabel="learning rate", title="Learning rate")
    plain_numbers_on_log_axis(axes.yaxis)
    top = axes.secondary_xaxis(
        "top", functions=(lambda s: s / steps_per_epoch, lambda e: e * steps_per_epoch)
    )
    top.set_xlabel("epoch")
    save(figure, path)


def learning_curves(
    histories: Mapping[str, Sequence[tuple[int, float]]],
    num_images: Mapping[str, int],
    best_step: int | None,
    path: Path,
) -> None:
    """Rate, training loss, and validation accuracy: balanced, head and tail, then many, medium and
    few. Without validations, rate and loss alone.

    histories: (step, value) pairs by metric name; num_images: of val_lt, by group; best_step: of
    the checkpoint that was chosen. 640 pixels wide, as wide as a description shows it whole.
    """
    by_frequency = zip(("many", "medium", "few"), zip(OTHERS, "osv", strict=False), strict=True)
    panels = {
        "Validation on val_lt (images)": MARKS,
        "The same by frequency (images)": dict(by_frequency),
    }
    rows = 1 + any(histories.get(f"val/{group}_accuracy") for group in MARKS)
    figure, axes = new_axes(2, 6.4, 2.7 * rows, rows, font_size=8)
    rates, losses = histories["lr"], histories["train/loss"]
    last_step = losses[-1][0]
    steps, values = zip(*rates, (last_step, rates[-1][1]), strict=True)
    axes[0].plot(steps, values, color=ALL, drawstyle="steps-post")
    axes[0].set(yscale="log", title="Learning rate")
    plain_numbers_on_log_axis(axes[0].yaxis)
    mark = "o" if len(losses) == 1 else None  # a line of one point is not to be seen
    axes[1].plot(*zip(*losses, strict=True), color=ALL, marker=mark, ms=3)
    axes[1].set(ylabel="nats", title="Training loss (mean over images)")
    for ax, (title, marks) in zip(axes[2:], panels.items(), strict=False):
        for group, (colour, marker) in marks.items():
            if points := histories.get(f"val/{group}_accuracy"):
                steps, values = np.array(points).T
                label = f"{group} ({num_images[group]:,})"
                ax.plot(steps, 100 * values, marker=marker, ms=3, color=colour, label=label)
        ax.set(ylabel="accuracy, %", title=title)
        ax.set_ylim(bottom=0)
        if best_step is not None:
            ax.axvline(best_step, color=BEFORE, lw=1, ls=":", label="chosen checkpoint")
        # Below the curves, which leave it no corner: they begin low and cross the middle.
        ax.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for ax in axes:
        ax.set_xlabel("optimiser step")
        ax.set_xlim(left=0)
        ax.locator_params(axis="x", nbins=5)  # numbers of steps are wide
    save(figure, path, dpi=100)


def per_class_accuracy(
    recall: np.ndarray,
    pool_counts: np.ndarray,
    is_head: np.ndarray,
    path: Path,
) -> None:
    """Recall on test_balanced of each class over its images in the LT pool."""
    figure, (axes,) = new_axes()
    for name, mask in (("head", is_head), ("tail", ~is_head)):
        mask = mask & np.isfinite(recall)  # a class may have no image there
        if mask.any():
            colour, marker = MARKS[name]
            mean = 100 * recall[mask].mean()
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
    mark_groups(axes, pool_counts)
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


def reliability(panels: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> None:
    """Accuracy over confidence, before and after scaling; panels title -> {label: bins [15, 3]}.

    The bins are (images, confidence, accuracy). Empty ones are not drawn; those of few images are
    pale, and no line goes to them; the size of a marker grows with its share of the images.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = new_axes(columns, 5.0 * columns, 4.6 * rows, rows)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        ax.plot([0, 100], [0, 100], color=BEFORE, lw=1, ls="--")
        for (label, bins), colour, marker in zip(
            curves.items(), (BEFORE, ALL), ("s", "o"), strict=False
        ):
            count, confidence, accuracy = bins[bins[:, 0] > 0].T
            ece = (count * abs(accuracy - confidence)).sum() / count.sum()
            many = count >= FEW_IN_A_BIN
            ax.plot(100 * confidence[many], 100 * accuracy[many], color=colour, lw=1)
            ax.scatter(
                100 * confidence,
                100 * accuracy,
                s=12 + 150 * count / count.sum(),
                c=colour,
                marker=marker,
                alpha=np.where(many, 1, 0.3),
                clip_on=False,
                zorder=3,
            )
            ax.scatter(
                [], [], s=30, c=colour, marker=marker, label=f"{label}: ECE {100 * ece:.1f} %"
            )
        ax.set(
            xlabel=f"confidence, % (pale: under {FEW_IN_A_BIN} images)",
            ylabel="accuracy, %",
            title=title,
            xlim=(0, 100),
            ylim=(0, 100),
        )
        ax.legend(loc="upper left")
    save(figure, path)


def split_counts(
    class_counts: Mapping[str, np.ndarray],
    pool_counts: np.ndarray,
    path: Path,
) -> None:
    """Images a class in every split, classes from the most frequent to the rarest."""
    figure, axes = new_axes(2, 11.0, 4.2)
    order = np.argsort(-pool_counts, kind="stable")
    num_head = int((pool_counts > TAIL_AT_MOST).sum())
    for ax, title, of_test in zip(axes, ("training", "test"), (False, True), strict=True):
        shown = {s: n for s, n in class_counts.items() if (s in TEST_SPLITS) == of_test}
        for (split, counts), colour in zip(shown.items(), (ALL, *OTHERS), strict=False):
            label = f"{split}: {int(counts.sum()):,}"
            ax.plot(np.maximum(counts[order], 0.5), lw=1.5, color=colour, label=label)
        ax.set(
            yscale="log",
            xlabel="classes, most frequent first",
            ylabel="images (0 drawn at 0.5)",
            title=f"Splits of the {title} images",
        )
        plain_numbers_on_log_axis(ax.yaxis)
        if 0 < num_head < len(pool_counts):
            ax.axvline(num_head - 0.5, color=BEFORE, lw=1, ls="--", zorder=0)
            for x, side, name, colour in (
                (num_head - 1.5, "right", "head", HEAD),
                (num_head + 0.5, "left", "tail", TAIL),
            ):
                place = ax.get_xaxis_transform()
                ax.text(x, 0.99, name, ha=side, va="top", color=colour, transform=place)
        if shown:
            ax.legend(loc="lower left")
    save(figure, path)
