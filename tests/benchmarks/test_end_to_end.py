"""The split of a wall time, where experts that train at the same time do several things at once."""

import pytest
from end_to_end import PRECEDENCE, seconds_of
from hypothesis import given
from hypothesis import strategies as st

moments = st.integers(0, 30)
spans = st.lists(st.tuples(moments, moments).map(sorted).map(tuple), max_size=6)


@given(st.fixed_dictionaries(dict.fromkeys(PRECEDENCE, spans)))
def test_each_second_counts_once_for_the_first_that_claims_it(by_bucket):
    expected = dict.fromkeys(PRECEDENCE, 0)
    for second in range(30):
        for bucket in PRECEDENCE:
            if any(start <= second < end for start, end in by_bucket[bucket]):
                expected[bucket] += 1
                break
    assert seconds_of(by_bucket) == expected


def test_one_thing_after_another_is_split_without_loss():
    one_by_one = {bucket: [(i, i + 0.5)] for i, bucket in enumerate(PRECEDENCE)}
    assert seconds_of(one_by_one) == pytest.approx(dict.fromkeys(PRECEDENCE, 0.5))
