"""Intervals against scipy.stats, a linear model solved by hand, and their own promise: coverage."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from longtail_experts.learning.statistics import (
    between_interval,
    paired_differences,
    within_interval,
)

VALUES = st.floats(-100, 100).map(lambda v: round(v, 6))
SAMPLES = st.lists(VALUES, min_size=2, max_size=12)
GROUPS = st.lists(st.lists(VALUES, min_size=1, max_size=5), min_size=1, max_size=5)


@given(SAMPLES, st.sampled_from([0.8, 0.95, 0.99]))
def test_one_group_has_students_interval(values, level):
    found = within_interval([values], level)
    assume(np.std(values) > 1e-6)
    expected = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.n, found.num_groups) == (len(values), 1)
    assert found.half_width == pytest.approx((expected[1] - expected[0]) / 2)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=10))
def test_a_difference_has_the_interval_of_the_paired_t_test(pairs):
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    assume(np.std(ours - theirs) > 1e-6)
    # The orders differ, and each side has a seed that the other lacks: keys decide, not places.
    values = dict(enumerate(ours)) | {"only here": 7.0}
    reference = {"only there": -7.0} | dict(reversed(list(enumerate(theirs))))
    differences = paired_differences(values, reference)
    assert set(differences) == set(range(len(pairs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = within_interval([list(differences.values())])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@given(GROUPS)
def test_within_groups_it_is_that_of_a_linear_model(groups):
    """A mean a group by least squares; the interval of their average from its covariance."""
    values = np.concatenate(groups)
    design = np.zeros((len(values), len(groups)))
    design[np.arange(len(values)), np.repeat(range(len(groups)), list(map(len, groups)))] = 1
    means, *_ = np.linalg.lstsq(design, values, rcond=None)
    degrees = len(values) - len(groups)
    found = within_interval(groups)
    assert found.mean == pytest.approx(means.mean(), abs=1e-9)
    assert (found.n, found.num_groups) == (len(values), len(groups))
    if degrees == 0:
        assert not found.is_known
        return
    variance = ((values - design @ means) ** 2).sum() / degrees
    contrast = np.full(len(groups), 1 / len(groups))
    error = math.sqrt(variance * contrast @ np.linalg.inv(design.T @ design) @ contrast)
    half = stats.t.ppf(0.975, degrees) * error
    assert found.high - found.mean == pytest.approx(half, abs=1e-9)
    assert found.mean - found.low == pytest.approx(half, abs=1e-9)


@given(GROUPS)
def test_between_groups_the_group_means_are_the_values(groups):
    means = [np.mean(values) for values in groups]
    found = between_interval(groups)
    assert found.mean == pytest.approx(np.mean(means), abs=1e-9)
    assert (found.n, found.num_groups) == (sum(map(len, groups)), len(groups))
    if len(groups) == 1:
        assert not found.is_known
    elif np.std(means) > 1e-6:
        expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@given(GROUPS, VALUES)
def test_a_shift_moves_everything_by_itself(groups, shift):
    moved = [[value + shift for value in values] for values in groups]
    for interval in (within_interval, between_interval):
        before, after = interval(groups), interval(moved)
        assert after.mean == pytest.approx(before.mean + shift, abs=1e-9)
        assert after.half_width == pytest.approx(before.half_width, abs=1e-6, nan_ok=True)


def test_one_value_has_a_mean_and_no_interval():
    for found in (between_interval([[0.4]]), within_interval([[0.4]])):
        assert found.mean == 0.4
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert not found.is_known
        assert found.n == 1


def test_equal_values_have_an_interval_of_no_width():
    found = within_interval([[0.25, 0.25, 0.25]])
    assert found.is_known
    assert found.low == found.mean == found.high == 0.25


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []], [[1.0, math.nan]], [[math.inf, 1.0]]])
def test_what_cannot_be_averaged_is_refused(groups):
    for interval in (within_interval, between_interval):
        with pytest.raises(ValueError, match=r"no values|not finite"):
            interval(groups)


def coverage(interval, split_effect: float) -> float:
    """Share of 2,000 studies of 4 splits x 3 seeds whose interval holds the true mean, 0."""
    random = np.random.RandomState(0)
    splits = split_effect * random.randn(2000, 4, 1)
    studies = splits + random.randn(2000, 4, 3)
    found = [interval(study.tolist()) for study in studies]
    return float(np.mean([f.low <= 0 <= f.high for f in found]))


def test_intervals_hold_what_they_promise_and_no_more():
    """±3 standard errors of a share of 0.95 in 2,000 are 0.015."""
    assert coverage(within_interval, 0.0) == pytest.approx(0.95, abs=0.015)
    assert coverage(between_interval, 0.0) == pytest.approx(0.95, abs=0.015)
    # Where splits matter, only the one over splits covers new splits.
    assert coverage(between_interval, 2.0) == pytest.approx(0.95, abs=0.015)
    assert coverage(within_interval, 2.0) < 0.6
    assert coverage(lambda study: within_interval([np.concatenate(study)]), 2.0) < 0.85
