"""Long-tail arithmetic: class counts of a profile, fair sharing of places, groups of classes.

All sharing is integer arithmetic on Python ints, so it is exact and the same on every machine.
"""

from collections.abc import Sequence

import numpy as np

TAIL_AT_MOST = 20  # pool images; the rest of the classes are head
MANY_ABOVE, FEW_BELOW = 100, 20  # many > 100, medium 20-100, few < 20


def profile_counts(
    profile: str, num_classes: int, largest: int, imbalance_factor: float
) -> list[int]:
    """Images wanted of each class under the "exp" or "step" profile.

    exp: int(largest * IF^(-c / (C - 1))), as in Cui et al., *Class-balanced loss* (CVPR 2019);
    step: the first half of the classes `largest`, the rest int(largest / IF), as in Buda et al.
    (2018). Raises ValueError where a class would get none.
    """
    if profile == "exp":
        last = max(num_classes - 1, 1)
        exact = [largest * imbalance_factor ** (-c / last) for c in range(num_classes)]
    elif profile == "step":
        half = num_classes // 2
        exact = [largest] * half + [largest / imbalance_factor] * (num_classes - half)
    else:
        raise ValueError(f"imbalance_profile={profile!r}: has no formula")
    counts = [int(x + 1e-9) for x in exact]  # 4.999... that is 5 in exact arithmetic stays 5
    if min(counts) < 1:
        raise ValueError(
            f"imbalance_factor={imbalance_factor:g}: class {counts.index(0)} would have no image "
            f"when the largest has {largest}; at most {largest} is possible"
        )
    return counts


def share(places: int, weights: Sequence[int]) -> list[int]:
    """`places` shared in proportion to `weights` by largest remainder; ties to the lower index."""
    total = sum(weights)
    shares = [places * w // total for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(places * weights[i] % total), i))
    for i in by_remainder[: places - sum(shares)]:
        shares[i] += 1
    return shares


def share_at_least_one(places: int, counts: Sequence[int]) -> list[int]:
    """`share` among classes, but one place for every class, and never more than it has images.

    Needs len(counts) <= places <= sum(counts) and no empty class. A place given to a class that
    would have had none comes from the class with the most (ties to the lower).
    """
    if min(counts) < 1 or not len(counts) <= places <= sum(counts):
        raise ValueError(f"{places} places cannot give each of {len(counts)} classes one")
    shares = share(places, counts)
    for c in range(len(shares)):
        if shares[c] == 0:
            shares[c] = 1
            shares[max(range(len(shares)), key=lambda i: (shares[i], -i))] -= 1
    return shares


def head_mask(pool_counts: Sequence[int]) -> np.ndarray:
    """bool [C]: classes with more than 20 images in the LT pool."""
    return np.asarray(pool_counts) > TAIL_AT_MOST


def class_groups(pool_counts: Sequence[int]) -> dict[str, np.ndarray]:
    """bool [C] for each of head, tail, many, medium, few (some may hold no class)."""
    counts = np.asarray(pool_counts)
    head = head_mask(counts)
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {"head": head, "tail": ~head, "many": many, "medium": ~many & ~few, "few": few}
