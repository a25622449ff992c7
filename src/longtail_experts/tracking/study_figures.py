"""A study as a picture: means with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from longtail_experts.learning.statistics import Interval
from longtail_experts.tracking.figures import ALL, BEFORE, HEAD, TAIL, new_axes, save

MARKS = {"head": (HEAD, "o"), "balanced": (ALL, "D"), "tail": (TAIL, "^")}
# A series: for each row of the figure, its single values and its intervals by kind.
Series = Sequence[tuple[Sequence[float], Mapping[str, Interval]]]


def intervals(
    labels: Sequence[str],
    accuracy: Mapping[str, Series],
    difference: Mapping[str, Series],
    ece: Mapping[str, Series],
    kinds: Sequence[str],
    title: str,
    path: Path,
) -> None:
    """A row a group: accuracies by group of classes, their paired differences from cross-entropy
    where there are some, and ECE before and after the temperature; fractions.

    The first of `kinds` is drawn thick, the other thin with caps; faint marks are single
    trainings. A mean without an interval stands alone.
    """
    panels = [(accuracy, "accuracy on test_balanced, %", MARKS)]
    if any(values for series in difference.values() for values, _ in series):
        panels.append((difference, "difference from ce, same seed and splits, points", MARKS))
    if ece:
        before_after = {"T = 1": (BEFORE, "s"), "calibrated": (ALL, "D")}
        panels.append((ece, "ECE on test_balanced, %", before_after))
    height = 2.3 + 0.62 * len(labels)
    figure, axes = new_axes(len(panels), 1.5 + 4.6 * len(panels), height)
    places = np.arange(len(labels))[::-1].astype(float)
    for ax, (series, name, marks) in zip(axes, panels, strict=True):
        for number, (label, of_rows) in enumerate(series.items()):
            colour, marker = marks[label]
            shift = 0.22 * (1 - number) if len(series) == 3 else 0.14 * (1 - 2 * number)
            draw_series(ax, of_rows, places + shift, kinds, colour, marker, label)
        if series is difference:
            ax.axvline(0, color=BEFORE, lw=1, ls="--", zorder=0)
        else:
            ax.set_xlim(left=0)
        ax.set_xlabel(name)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        ax.set_yticks(places, labels if ax is axes[0] else [""] * len(labels))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)
    figure.suptitle(title)
    drawn = ["thick: 95 % interval, " + kinds[0]]
    drawn += [f"thin with caps: {kind}" for kind in kinds[1:]]
    figure.supxlabel("; ".join([*drawn, "faint: single trainings"]), fontsize=9, color="#555555")
    save(figure, path)


def draw_series(
    ax: Axes,
    of_rows: Series,
    places: np.ndarray,
    kinds: Sequence[str],
    colour: str,
    marker: str,
    label: str,
) -> None:
    for place, (values, by_kind) in zip(places, of_rows, strict=True):
        known = [found for found in by_kind.values() if found is not None]
        if not known:
            continue
        if len(values) > 1:
            ax.scatter(
                100 * np.array(values),
                np.full(len(values), place - 0.07),
                s=10,
                color=colour,
                marker=marker,
                alpha=0.3,
                lw=0,
            )
        for number, kind in enumerate(kinds):
            found = by_kind.get(kind)
            if found is not None and found.is_known:
                ax.errorbar(
                    100 * found.mean,
                    place,
                    xerr=100 * found.half_width,
                    color=colour,
                    elinewidth=3.0 if number == 0 else 1.0,
                    capsize=0 if number == 0 else 3,
                    fmt="none",
                )
        ax.plot(100 * known[0].mean, place, color=colour, marker=marker, ms=6, ls="", label=label)
        label = "_nolegend_"
