"""A study as a picture: means with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from longtail_experts.learning.statistics import Interval
from longtail_experts.tracking import figures
from longtail_experts.tracking.figures import ALL, BEFORE, new_axes, save

COLUMNS = 3
MARKS = {**figures.MARKS, "before": (BEFORE, "s"), "after": (ALL, "D")}


class Panel(NamedTuple):
    """One measure, a row a group: its single values, and its intervals by kind."""

    title: str
    mark: str
    rows: Sequence[tuple[Sequence[float], Mapping[str, Interval | None]]]
    is_difference: bool = False


def intervals(
    labels: Sequence[str], panels: Sequence[Panel], kinds: Sequence[str], title: str, path: Path
) -> None:
    """Panels in rows of three, each on an axis of its own: an interval may be narrow beside what
    separates head from tail.

    The first of `kinds` is drawn thick, the other thin with caps; faint marks below are single
    trainings. A mean without an interval stands alone.
    """
    rows = -(-len(panels) // COLUMNS)
    height = 1.0 + rows * (0.75 + 0.42 * len(labels))
    figure, axes = new_axes(COLUMNS, 12.5, height, rows)
    places = np.arange(len(labels))[::-1].astype(float)
    for number, ax in enumerate(axes):
        if number >= len(panels):
            ax.set_axis_off()
            continue
        panel = panels[number]
        draw_panel(ax, panel, places, kinds)
        colour = MARKS[panel.mark][0]
        ax.set_title(panel.title, fontsize=10, color=ALL if colour == BEFORE else colour)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        numbers = [number_of(by_kind) for _, by_kind in panel.rows]
        if number % COLUMNS == 0:
            told = numbers
            beside = [f"{label}\n{n}" for label, n in zip(labels, numbers, strict=True)]
        else:  # n where it is another than at the beginning of the row
            beside = [n if n != first else "" for n, first in zip(numbers, told, strict=True)]
        ax.set_yticks(places, beside)
        ax.margins(x=0.08)
        ax.grid(visible=False, axis="y")
        if panel.is_difference:
            ax.axvline(0, color=BEFORE, lw=1, ls="--", zorder=0)
    figure.suptitle(title)
    says = [f"thick: 95 % interval, {kinds[0]}", *(f"thin with caps: {k}" for k in kinds[1:])]
    figure.supxlabel("; ".join([*says, "faint: single trainings"]), fontsize=9, color="#555555")
    save(figure, path)


def number_of(by_kind: Mapping[str, Interval | None]) -> str:
    known = [found for found in by_kind.values() if found is not None]
    return f"n = {count(known[0].n, known[0].num_groups)}" if known else ""


def count(n: int, num_splits: int) -> str:
    return f"{n} in {num_splits} splits" if num_splits > 1 else str(n)


def draw_panel(ax: Axes, panel: Panel, places: np.ndarray, kinds: Sequence[str]) -> None:
    colour, marker = MARKS[panel.mark]
    for place, (values, by_kind) in zip(places, panel.rows, strict=True):
        known = [found for found in by_kind.values() if found is not None]
        if not known:
            continue
        for number, kind in enumerate(kinds):
            found = by_kind.get(kind)
            if found is not None and found.is_known:
                ax.errorbar(
                    found.mean,
                    place,
                    xerr=found.half_width,
                    color=colour,
                    elinewidth=3.5 if number == 0 else 1.2,
                    capsize=0 if number == 0 else 4,
                    fmt="none",
                )
        ax.plot(known[0].mean, place, color=colour, marker=marker, ms=5.5, mec="white", mew=0.8)
        if len(values) > 1:
            ax.scatter(
                values,
                np.full(len(values), place - 0.22),
                s=12,
                color=colour,
                marker=marker,
                alpha=0.35,
                lw=0,
            )
