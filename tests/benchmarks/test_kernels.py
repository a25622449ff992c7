"""What is said of a trace of a GPU's kernels."""

import pytest
from kernels import longest, summary

# Two steps of one expert: two kernels in one line, then two beside each other, then a pause.
KERNELS = [("a", 0, 2), ("b", 2, 3), ("a", 5, 9), ("b", 7, 9)]


def test_summary_by_hand():
    found = summary(KERNELS, 2)
    assert found["kernels_a_step"] == 2
    assert found["kernel_ms_a_step"] == pytest.approx((2 + 1 + 4 + 2) / 2 / 1000)
    assert found["ms_a_step"] == pytest.approx(9 / 2 / 1000)
    assert found["busy_share"] == pytest.approx(7 / 9)  # idle from 3 to 5
    assert found["kernels_at_once"] == pytest.approx(9 / 7)
    assert found["median_kernel_us"] == 2


def test_the_longest_come_first_with_how_often_and_how_long_a_step():
    first, second = (line.split() for line in longest(KERNELS, 2))
    assert first == ["1.0", "3.0", "us", "a", "step", "a"]
    assert second == ["1.0", "1.5", "us", "a", "step", "b"]
