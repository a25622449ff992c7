"""Figures that show several experts beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from longtail_experts.tracking.figures import (
    ALL,
    BEFORE,
    HEAD,
    MARKS,
    OTHERS,
    TAIL,
    mark_groups,
    new_axes,
    plain_numbers_on_log_axis,
    save,
)

# A colour and a shape an expert.
EXPERTS = tuple(zip(OTHERS, ("o", "s", "^", "D", "v", "P", "X"), strict=True))
NEIGHBOURS = 9  # classes in a running mean


def marks(number: int) -> tuple[str, str]:
    """Colour and marker of an expert; no two of the first 49 have the same pair."""
    again, place = divmod(number, len(EXPERTS))
    return EXPERTS[place][0], EXPERTS[(place + again) % len(EXPERTS)][1]


def line_style(number: int) -> str:
    """Another for every seven experts, whose colours repeat."""
    return ("-", "--", ":", "-.")[number // len(EXPERTS) % 4]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, fewer at the ends; nan is left out. [C] -> [C]."""
    half = NEIGHBOURS // 2
    return np.array(
        [np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def per_class(recalls: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """(recall [C], images in its pool [C]) of every expert: classes as dots, running means as
    lines."""
    figure, (axes,) = new_axes(1, 8.0, 4.6)
    for number, (label, (recall, pool_counts)) in enumerate(recalls.items()):
        colour, marker = marks(number)
        order = np.argsort(-pool_counts, kind="stable")
        frequency, values = pool_counts[order], 100 * recall[order]
        axes.scatter(frequency, values, s=9, color=colour, marker=marker, alpha=0.3, lw=0)
        axes.plot(
            frequency,
            running_mean(values),
            color=colour,
            ls=line_style(number),
            lw=2,
            label=label,
        )
    axes.set(
        xscale="log",
        xlabel="images of the class in the LT pool",
        ylabel="recall on test_balanced, %",
        title=f"Per-class accuracy (lines: running mean of {NEIGHBOURS} classes)",
        ylim=(-3, 103),
    )
    plain_numbers_on_log_axis(axes.xaxis)
    everywhere = np.concatenate([pool_counts for _, pool_counts in recalls.values()])
    mark_groups(axes, everywhere)
    figure.legend(loc="outside lower center", ncols=min(len(recalls), 3))
    save(figure, path)


def head_tail_plane(
    points: Mapping[str, Sequence[tuple[float, float]]],
    ensembles: Mapping[str, tuple[float, float]],
    head_share: float,
    title: str,
    path: Path,
) -> None:
    """(head, tail) accuracy of each expert: of argmax f, then, where it is given, adjusted to the
    deployment prior; and of the ensembles. The diagonals are lines of equal balanced accuracy."""
    figure, (axes,) = new_axes(1, 7.0, 5.6)
    everything = np.array([p for pair in points.values() for p in pair] + [*ensembles.values()])
    low = np.maximum(100 * everything.min(0) - 5, 0)
    high = np.minimum(100 * everything.max(0) + 5, 100)
    has_adjusted = any(len(pair) > 1 for pair in points.values())
    adjusted = "filled: argmax f; open: adjusted; " if has_adjusted else "argmax f; "
    head = np.linspace(low[0], high[0], 50)
    for level in range(0, 101, 2 if (high - low).max() < 30 else 5):
        tail = (level - head_share * head) / (1 - head_share)
        inside = (tail >= low[1]) & (tail <= high[1])
        if inside.any():
            axes.plot(head[inside], tail[inside], color=BEFORE, lw=0.7, alpha=0.6)
            end = np.flatnonzero(inside)[-1]
            axes.text(head[end], tail[end], f"{level}", color=BEFORE, fontsize=8, va="bottom")
    for number, (label, pair) in enumerate(points.items()):
        colour, marker = marks(number)
        heads, tails = 100 * np.array(pair).T
        axes.plot(heads, tails, color=colour, lw=0.8, ls=":")
        shape = {"s": 60, "marker": marker, "clip_on": False, "zorder": 3}
        axes.scatter(heads[0], tails[0], color=colour, label=label, **shape)
        axes.scatter(heads[1:], tails[1:], facecolors="none", edgecolors=colour, **shape)
    for (label, (x, y)), marker in zip(ensembles.items(), ("*", "p"), strict=False):
        shape = {"s": 130, "marker": marker, "clip_on": False, "zorder": 3}
        axes.scatter(100 * x, 100 * y, color=ALL, label=label, **shape)
    axes.set(
        xlabel="head accuracy, % (mean over classes)",
        ylabel="tail accuracy, % (mean over classes)",
        title=f"{title}\n{adjusted}grey lines: equal balanced accuracy, %",
        xlim=(low[0], high[0]),
        ylim=(low[1], high[1]),
    )
    axes.xaxis.label.set_color(HEAD)
    axes.yaxis.label.set_color(TAIL)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def posthoc(found: Mapping[str, Mapping[float, Mapping[str, float]]], path: Path) -> None:
    """Accuracies over tau, a panel a group of classes and a line an expert; found label -> tau ->
    accuracies. The dotted line at tau 1 is the uniform prior."""
    figure, axes = new_axes(3, 12.0, 4.4)
    panels = (("balanced", ALL), ("head", HEAD), ("tail", TAIL))
    for ax, (group, title_colour) in zip(axes, panels, strict=True):
        for number, (label, by_tau) in enumerate(found.items()):
            colour, marker = marks(number)
            values = [100 * of.get(f"{group}_accuracy", np.nan) for of in by_tau.values()]
            ax.plot(
                list(by_tau),
                values,
                color=colour,
                marker=marker,
                ls=line_style(number),
                ms=4,
                label=label,
            )
        ax.axvline(1, color=BEFORE, lw=1, ls=":", zorder=0)
        ax.set_xlabel("tau")
        ax.set_title(f"{group}, %", color=title_colour)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(
        "Post-hoc logit adjustment on test_balanced (tau 0: training prior, 1: uniform)"
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(found), 4))
    save(figure, path)


def pairs(
    labels: Sequence[str], disagreement: np.ndarray, overlap: np.ndarray, title: str, path: Path
) -> None:
    """Two matrices [M, M] side by side, numbers in the cells."""
    size = max(3.6, 0.9 * len(labels) + 1.6)
    figure, axes = new_axes(2, 2 * size + 1, size)
    for ax, values, name in (
        (axes[0], disagreement, "predicted differently, % of images"),
        (axes[1], overlap, "wrong by both / by at least one, %"),
    ):
        ax.imshow(100 * values, vmin=0, vmax=100, cmap="cividis")
        ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        ax.set_yticks(range(len(labels)), labels)
        ax.grid(visible=False)
        ax.set_title(name, fontsize=10)
        for (i, j), value in np.ndenumerate(100 * values):
            ax.text(
                j, i, f"{value:.1f}", ha="center", va="center", color="w" if value < 55 else "k"
            )
    figure.suptitle(title)
    save(figure, path)


def ensemble(
    rows: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float]],
    num_members: int,
    title: str,
    path: Path,
) -> None:
    """Balanced, head and tail accuracy with standard errors, and NLL, of members and ensembles.

    rows label -> metrics; errors label -> standard error of {balanced,head,tail}_accuracy. The
    first `num_members` rows are members.
    """
    names = list(rows)
    height = 1.6 + 0.42 * len(names)
    figure, (left, right) = new_axes(2, 11.0, height)
    places = np.arange(len(names))[::-1]
    for group, (colour, marker) in MARKS.items():
        key = f"{group}_accuracy"
        values = [100 * rows[name].get(key, np.nan) for name in names]
        spread = [100 * errors[name].get(key, np.nan) for name in names]
        left.errorbar(
            values, places, xerr=spread, fmt=marker, color=colour, capsize=2, ms=5, label=group
        )
    left.set(xlabel="accuracy, % (± standard error)", xlim=(0, None))
    right.barh(
        places,
        [rows[name]["nll"] for name in names],
        color=[BEFORE] * num_members + [ALL] * (len(names) - num_members),
        height=0.6,
    )
    for place, name in zip(places, names, strict=True):
        right.text(rows[name]["nll"], place, f" {rows[name]['nll']:.3f}", va="center")
    right.set(xlabel="NLL, nats (lower is better)")
    right.margins(x=0.15)
    for ax in (left, right):
        ax.set_yticks(places, names)
        ax.axhline(len(names) - num_members - 0.5, color=BEFORE, lw=1, ls="--")
    right.set_yticks(places, [""] * len(names))
    figure.suptitle(title)
    figure.legend(loc="outside lower left", ncols=3)
    save(figure, path)
