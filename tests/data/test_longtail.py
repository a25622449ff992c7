from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtail_experts.data.longtail import (
    class_groups,
    head_mask,
    profile_counts,
    share,
    share_at_least_one,
)

# A busy machine is slow, not wrong.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def exact_exp_counts(num_classes: int, largest: int, factor: int) -> list[int]:
    """int(largest * factor^(-c / (C - 1))) without floating point: the largest n with
    n^(C-1) * factor^c <= largest^(C-1)."""
    last, counts, n = num_classes - 1, [], largest
    for c in range(num_classes):
        while n**last * factor**c > largest**last:
            n -= 1
        counts.append(n)
    return counts


def largest_remainder(places: int, weights: list[int]) -> list[int]:
    quotas = [Fraction(places * w, sum(weights)) for w in weights]
    shares = [q.numerator // q.denominator for q in quotas]
    left = list(range(len(weights)))
    for _ in range(places - sum(shares)):
        best = max(left, key=lambda i: (quotas[i] - shares[i], -i))
        shares[best] += 1
        left.remove(best)
    return shares


weights = st.lists(st.integers(0, 500), min_size=1, max_size=30).filter(any)
class_counts = st.lists(st.integers(1, 60), min_size=1, max_size=13)


@st.composite
def counts_and_places(draw) -> tuple[list[int], int]:
    counts = draw(class_counts)
    return counts, draw(st.integers(len(counts), sum(counts)))


# --- profiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "total"), [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_exp_totals_of_cifar100(factor, total):
    counts = profile_counts("exp", 100, 500, factor)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (500, 500 // factor)
    assert counts == exact_exp_counts(100, 500, factor)


def test_exp_of_the_recipe_is_pinned():
    counts = profile_counts("exp", 100, 500, 100.0)
    assert counts[:6] == [500, 477, 455, 434, 415, 396]
    assert counts[-6:] == [6, 6, 5, 5, 5, 5]
    assert counts == sorted(counts, reverse=True)


@relaxed
@given(st.integers(2, 40), st.integers(1, 600), st.data())
def test_exp_equals_integer_arithmetic(num_classes, largest, data):
    factor = data.draw(st.integers(1, largest))
    assert profile_counts("exp", num_classes, largest, factor) == exact_exp_counts(
        num_classes, largest, factor
    )


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_factor_one_is_balanced(profile):
    assert profile_counts(profile, 7, 30, 1) == [30] * 7


@pytest.mark.parametrize(
    ("num_classes", "largest", "factor", "counts"),
    [
        (100, 500, 100, [500] * 50 + [5] * 50),
        (5, 9, 2, [9, 9, 4, 4, 4]),
        (2, 10, 10, [10, 1]),
        (1, 10, 5, [2]),
    ],
)
def test_step(num_classes, largest, factor, counts):
    assert profile_counts("step", num_classes, largest, factor) == counts


def test_a_whole_number_of_images_survives_the_rounding_of_its_formula():
    assert 49 * 49**-1.0 < 1
    assert profile_counts("exp", 3, 49, 49) == [49, 7, 1]


def test_exp_of_a_single_class():
    assert profile_counts("exp", 1, 12, 4) == [12]


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_factor_may_reach_the_largest_class_and_no_more(profile):
    assert profile_counts(profile, 100, 500, 500)[-1] == 1
    with pytest.raises(ValueError, match=r"^imbalance_factor=501: .* at most 500 is possible$"):
        profile_counts(profile, 100, 500, 501)


def test_the_first_class_without_images_is_named():
    with pytest.raises(ValueError, match="class 1 would have no image when the largest has 3"):
        profile_counts("exp", 3, 3, 100)


def test_unknown_profile_is_named():
    with pytest.raises(ValueError, match="imbalance_profile='natural'"):
        profile_counts("natural", 3, 10, 2)


# --- sharing ----------------------------------------------------------------------------------


@relaxed
@given(st.integers(0, 5000), weights)
def test_share_is_exact(places, weights):
    shares, total = share(places, weights), sum(weights)
    assert sum(shares) == places
    for got, weight in zip(shares, weights, strict=True):
        assert abs(got - Fraction(places * weight, total)) < 1
    assert shares == largest_remainder(places, weights)


@relaxed
@given(st.integers(0, 5000), weights)
def test_share_follows_weights_and_ties_go_to_the_lower_index(places, weights):
    shares = share(places, weights)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    in_order = [shares[i] for i in order]
    assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize(
    ("places", "weights", "shares"),
    [
        (10_847, (80, 8, 6, 6), [8677, 868, 651, 651]),
        (5359, (20, 80), [1072, 4287]),
        (2, (1, 1, 1), [1, 1, 0]),
        (5, (1, 1, 1, 1), [2, 1, 1, 1]),
        (0, (3, 4), [0, 0]),
        (7, (0, 5, 0), [0, 7, 0]),
        (10**30 + 1, (1, 2), [(10**30 - 1) // 3 + 1, 2 * (10**30 - 1) // 3 + 1]),
    ],
)
def test_share_by_hand(places, weights, shares):
    assert share(places, weights) == shares


@relaxed
@given(counts_and_places())
def test_every_class_gets_a_place_and_none_more_than_it_has(case):
    counts, places = case
    shares = share_at_least_one(places, counts)
    assert sum(shares) == places
    assert all(1 <= got <= there for got, there in zip(shares, counts, strict=True))


@relaxed
@given(counts_and_places())
def test_a_place_of_an_empty_class_comes_from_the_largest(case):
    counts, places = case
    expected = largest_remainder(places, counts)
    while 0 in expected:
        donor = expected.index(max(expected))
        expected[donor] -= 1
        expected[expected.index(0)] = 1
    assert share_at_least_one(places, counts) == expected


@pytest.mark.parametrize(
    ("places", "counts", "shares"),
    [
        (1, [1], [1]),
        (3, [1, 1, 1], [1, 1, 1]),
        (3, [500, 1, 1], [1, 1, 1]),
        (4, [10, 10, 1], [1, 2, 1]),  # share gives 2, 2, 0: the lower of two equals pays
        (5, [500, 1, 1], [3, 1, 1]),
    ],
)
def test_at_least_one_by_hand(places, counts, shares):
    assert share_at_least_one(places, counts) == shares


@pytest.mark.parametrize(
    ("places", "counts"), [(2, [5, 5, 5]), (16, [5, 5, 5]), (3, [5, 0, 5]), (0, [1])]
)
def test_impossible_places_are_named(places, counts):
    with pytest.raises(ValueError, match=rf"^{places} places .* {len(counts)} classes"):
        share_at_least_one(places, counts)


# --- groups -----------------------------------------------------------------------------------


def test_groups_of_the_recipe():
    groups = class_groups(exact_exp_counts(100, 500, 100))
    sizes = {name: int(mask.sum()) for name, mask in groups.items()}
    assert sizes == {"head": 69, "tail": 31, "many": 35, "medium": 35, "few": 30}
    assert all(mask.shape == (100,) and mask.dtype == bool for mask in groups.values())


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (101, {"head", "many"}),
        (100, {"head", "medium"}),
        (21, {"head", "medium"}),
        (20, {"tail", "medium"}),
        (19, {"tail", "few"}),
        (1, {"tail", "few"}),
    ],
)
def test_group_boundaries(images, names):
    groups = class_groups([images])
    assert {name for name, mask in groups.items() if mask[0]} == names
    assert head_mask([images]).tolist() == ["head" in names]


@relaxed
@given(class_counts)
def test_groups_partition_the_classes(counts):
    groups = class_groups(counts)
    assert np.array_equal(groups["head"], ~groups["tail"])
    three = np.stack([groups[name] for name in ("many", "medium", "few")])
    assert (three.sum(0) == 1).all()
