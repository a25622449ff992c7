"""Means over trainings with intervals, by Student's t (Student, *The probable error of a mean*,
Biometrika 1908).

Trainings come in groups: those of one group saw the same splits and differ by seed alone. Two
different questions have two different intervals, both around the mean of the group means:

`within_interval`   other seeds on these very splits ("training noise only")
`between_interval`  other splits and other seeds

The plain interval over all trainings at once would answer neither where groups hold several:
trainings on the same split share what that split did to them, and are not independent draws.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
K = TypeVar("K", bound=Hashable)


class Interval(NamedTuple):
    """A mean and where it may lie; low and high are nan where the values say nothing about it."""

    mean: float
    low: float
    high: float
    n: int  # values
    num_groups: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.low)


def within_interval(groups: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """What other draws within these same groups would give.

    The variance is pooled over the N values of G groups, N - G degrees of freedom, and taken to be
    the same in all; of one group it is the usual interval. No interval where no group has two
    values. Raises ValueError without values, and where one is not finite.
    """
    arrays = _checked(groups)
    sizes = np.array([len(values) for values in arrays])
    degrees = int(sizes.sum() - len(arrays))
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in arrays)
    error = math.nan
    if degrees:
        error = math.sqrt(squares / degrees * float((1 / sizes).sum())) / len(arrays)
    return _interval(arrays, error, degrees, level)


def between_interval(groups: Sequence[Sequence[float]], level: float = LEVEL) -> Interval:
    """What other groups would give: the G group means are the independent values, G - 1 degrees
    of freedom.

    Covers what groups and draws within them both do, where groups have about equally many values
    and what one draw does in a group says nothing about what it does in another. One group has no
    interval. Raises ValueError as `within_interval` does.
    """
    arrays = _checked(groups)
    means = np.array([values.mean() for values in arrays])
    degrees = len(means) - 1
    error = float(means.std(ddof=1)) / math.sqrt(len(means)) if degrees else math.nan
    return _interval(arrays, error, degrees, level)


def paired_differences(values: Mapping[K, float], reference: Mapping[K, float]) -> dict[K, float]:
    """value - reference for each key that both have: of the same seed on the same splits.

    The interval of a difference is that of these differences; what a split does to both sides
    cancels in them.
    """
    return {key: value - reference[key] for key, value in values.items() if key in reference}


def _checked(groups: Sequence[Sequence[float]]) -> list[np.ndarray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in groups]
    if not arrays or any(len(values) == 0 for values in arrays):
        raise ValueError("no values to average")
    if not all(np.isfinite(values).all() for values in arrays):
        raise ValueError("some of the values to average are not finite")
    return arrays


def _interval(arrays: list[np.ndarray], error: float, degrees: int, level: float) -> Interval:
    mean = float(np.mean([values.mean() for values in arrays]))
    half = float(stdtrit(degrees, (1 + level) / 2)) * error if degrees else math.nan
    n = sum(len(values) for values in arrays)
    return Interval(mean, mean - half, mean + half, n, len(arrays))
