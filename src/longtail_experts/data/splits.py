"""Which image serves what: the six splits and the balanced remainder, or the literature's two.

A pure function of the labels, the imbalance settings and the split seed. Randomness comes from
numpy's legacy RandomState, whose streams are frozen (NEP 19), so equal inputs give equal splits
on every machine and under every version.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtail_experts.data.batches import derive_seed
from longtail_experts.data.longtail import profile_counts, share, share_at_least_one
from longtail_experts.data.sources import CIFARS, DataError, ImageData

POOL_SPLITS = ("train", "tuneV", "val_small", "calib")  # indices into the training images
TEST_SPLITS = ("val_lt", "test_lt", "test_balanced")  # indices into the test images
SPLITS = POOL_SPLITS + TEST_SPLITS
LITERATURE_SPLITS = ("train", "test_balanced")
POOL_PERCENT = (80, 8, 6, 6)
VAL_LT_PERCENT = 20
# Images of the largest test class over those of the smallest, up to which the uniform prior is
# taken for theirs; of CIFAR it is 1, and without val_lt 99 / 80.
MOST_UNEVEN = 1.5


@dataclass(frozen=True)
class Splits:
    """Ascending int64 indices by split name, and the class counts of the LT pool.

    Under the protocol "experts" all of SPLITS are there, under "literature" train, the whole pool,
    and test_balanced, all test images.
    """

    indices: dict[str, np.ndarray]
    pool_counts: tuple[int, ...]
    settings: dict[str, Any]  # source, fingerprint and everything else that decides the indices

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are there, in the order of SPLITS."""
        return tuple(name for name in SPLITS if name in self.indices)

    @property
    def sha256(self) -> str:
        """Of what the splits are: which images, by the source's fingerprint, fall in which."""
        content = {
            "fingerprint": self.settings["fingerprint"],
            "indices": {name: self.indices[name].tolist() for name in self.names},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def split_images(split: str, images: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of the half of the source that `split` indexes."""
    if split in POOL_SPLITS:
        return images.train_images, images.train_labels
    return images.test_images, images.test_labels


def make_splits(
    images: ImageData,
    *,
    imbalance_profile: str,
    imbalance_factor: float,
    images_per_class: int | None,
    split_seed: int,
    protocol: str = "experts",
    subset_rule: str = "own",
) -> Splits:
    """All splits of a source; raises DataError naming the class that has too few images, or the
    subset rule that cannot be followed."""
    num_classes = len(images.class_names)
    present = np.bincount(images.train_labels, minlength=num_classes).tolist()
    if imbalance_profile == "natural":
        pool_counts = present
    else:
        largest = images_per_class or images.largest_class
        try:
            pool_counts = profile_counts(imbalance_profile, num_classes, largest, imbalance_factor)
        except ValueError as error:
            raise DataError(str(error)) from None
    for c, (asked, there) in enumerate(zip(pool_counts, present, strict=True)):
        if asked > there or there == 0:
            remedy = "raise imbalance_factor, lower images_per_class, or add images"
            if imbalance_profile == "natural" or there == 0:
                remedy = "add images, or take the class away"
            elif asked == max(pool_counts):  # whatever the factor
                remedy = f"give images_per_class={there} or less, or add images"
                if images.source == "images":
                    remedy += "; imbalance_profile=natural takes the images as they are"
            raise DataError(
                f"class {c} ({images.class_names[c]}): {max(asked, 1)} training images asked, "
                f"{there} present; {remedy}"
            )
    test_counts = np.bincount(images.test_labels, minlength=num_classes).tolist()
    if min(test_counts) == 0:
        c = test_counts.index(0)
        raise DataError(f"class {c} ({images.class_names[c]}): no test image present")
    if protocol == "literature" and max(test_counts) > MOST_UNEVEN * min(test_counts):
        raise DataError(
            f"protocol=literature: the test images are {min(test_counts)} to {max(test_counts)} a "
            "class, but are scored, and T is fitted on them, under the uniform prior; give equally "
            "many of each, or protocol=experts"
        )
    if subset_rule == "ldam":
        if images.index_space != "torchvision":
            raise DataError(
                "subset_rule=ldam: which images it takes depends on their order in the official "
                f"files, and these are not they; give those ({CIFARS[images.source].folder}/), or "
                "subset_rule=own"
            )
        by_class = ldam_order(images.train_labels, num_classes)
    else:
        by_class = own_order(images.train_labels, num_classes, split_seed)
    pool = [order[:n] for order, n in zip(by_class, pool_counts, strict=True)]
    if protocol == "literature":
        everything = np.arange(len(images.test_labels))
        indices = dict(zip(LITERATURE_SPLITS, (np.concatenate(pool), everything), strict=True))
    else:
        indices = split_pool(pool)
        indices |= split_test(images.test_labels, pool_counts, split_seed)
    settings = {
        "source": images.source,
        "fingerprint": images.fingerprint,
        "index_space": images.index_space,
        "imbalance_profile": imbalance_profile,
        "imbalance_factor": None if imbalance_profile == "natural" else float(imbalance_factor),
        "images_per_class": images_per_class,
        "split_seed": split_seed,
        "protocol": protocol,
        "subset_rule": subset_rule,
    }
    splits = Splits({k: np.sort(v) for k, v in indices.items()}, tuple(pool_counts), settings)
    check_disjoint(splits)
    return splits


def _shuffled_class(labels: np.ndarray, c: int, split_seed: int, what: str) -> np.ndarray:
    random = np.random.RandomState(derive_seed(split_seed, what, c))
    return random.permutation(np.flatnonzero(labels == c))


def own_order(labels: np.ndarray, num_classes: int, split_seed: int) -> list[np.ndarray]:
    """The images of each class in the order in which the pool takes them."""
    return [_shuffled_class(labels, c, split_seed, "pool") for c in range(num_classes)]


def ldam_order(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """The same as in the code of LDAM (Cao et al., NeurIPS 2019), which most of the field uses:
    after np.random.seed(0), the images of class 0, 1, ... are shuffled one class after another.
    labels must be in the order of the official files."""
    random = np.random.RandomState(0)
    by_class = [np.flatnonzero(labels == c) for c in range(num_classes)]
    for images in by_class:
        random.shuffle(images)
    return by_class


def split_pool(pool: list[np.ndarray]) -> dict:
    """The LT pool into train / tuneV / val_small / calib, 80 : 8 : 6 : 6; indices by class.

    train shares its places among the classes by largest remainder, at least one each. What is
    left, class by class in shuffled order, is dealt one image at a time to whichever of the
    other three is furthest behind its quota.
    """
    pool_counts = [len(images) for images in pool]
    total, num_classes = sum(pool_counts), len(pool_counts)
    num_train, *quotas = share(total, POOL_PERCENT)
    if num_train < num_classes:
        num_train = num_classes
        quotas = share(total - num_classes, POOL_PERCENT[1:])
    train_counts = share_at_least_one(num_train, pool_counts)
    train = [images[:n] for images, n in zip(pool, train_counts, strict=True)]
    left = [images[n:] for images, n in zip(pool, train_counts, strict=True)]
    dealt = deal(np.concatenate(left), quotas)
    return dict(zip(POOL_SPLITS, [np.concatenate(train), *dealt], strict=True))


def deal(items: np.ndarray, quotas: list[int]) -> list[np.ndarray]:
    """Deal items in order, each to the hand furthest behind its quota (ties to the first).

    After t of n items a hand of quota q should hold q * t / n. Hands end with exactly their quota.
    """
    hands: list[list] = [[] for _ in quotas]
    for t, item in enumerate(items, start=1):
        behind = [
            q * t - len(hand) * len(items) if len(hand) < q else -np.inf
            for q, hand in zip(quotas, hands, strict=True)
        ]
        hands[behind.index(max(behind))].append(item)
    return [np.array(hand, dtype=np.int64) for hand in hands]


def lt_test_counts(test_counts: list[int], pool_counts: list[int]) -> list[int]:
    """Test images of each class in the pool's proportions: round(num_test * pool_prior), within
    [1, images there are]; halves round up."""
    num_test, total = sum(test_counts), sum(pool_counts)
    return [
        min(there, max(1, (2 * num_test * n + total) // (2 * total)))
        for there, n in zip(test_counts, pool_counts, strict=True)
    ]


def split_test(labels: np.ndarray, pool_counts: list[int], split_seed: int) -> dict:
    """The test images into val_lt / test_lt (20 : 80 of an LT-proportioned draw), and
    test_balanced: every test image that is not in val_lt (test_lt lies inside it)."""
    num_classes = len(pool_counts)
    test_counts = np.bincount(labels, minlength=num_classes).tolist()
    lt_counts = lt_test_counts(test_counts, pool_counts)
    num_val, _ = share(sum(lt_counts), (VAL_LT_PERCENT, 100 - VAL_LT_PERCENT))
    val_counts = share_at_least_one(max(num_val, num_classes), lt_counts)
    val, lt, balanced = [], [], []
    for c in range(num_classes):
        shuffled = _shuffled_class(labels, c, split_seed, "test")
        val.append(shuffled[: val_counts[c]])
        lt.append(shuffled[val_counts[c] : lt_counts[c]])
        balanced.append(shuffled[val_counts[c] :])
    return dict(zip(TEST_SPLITS, map(np.concatenate, (val, lt, balanced)), strict=True))


def check_disjoint(splits: Splits) -> None:
    """Raises AssertionError where an image would serve two masters."""
    pairs = [(a, b) for i, a in enumerate(POOL_SPLITS) for b in POOL_SPLITS[i + 1 :]]
    pairs += [("val_lt", "test_lt"), ("val_lt", "test_balanced")]
    for a, b in pairs:
        if a not in splits.indices or b not in splits.indices:
            continue
        shared = np.intersect1d(splits.indices[a], splits.indices[b])
        if len(shared):
            raise AssertionError(f"splits {a} and {b} share indices {shared[:5].tolist()}")


def identical_images(splits: Splits, images: ImageData) -> list[list[str]]:
    """Groups of images of the splits with identical pixels, each as "train 17 (calib)".

    CIFAR-100 itself has some; they are reported, never removed. A test image is named once,
    under test_balanced, or under val_lt.
    """
    seen: dict[bytes, list[str]] = {}
    for name in splits.names:
        if name == "test_lt":
            continue
        pixels, _ = split_images(name, images)
        half = "train" if name in POOL_SPLITS else "test"
        for i in splits.indices[name]:
            digest = hashlib.blake2b(pixels[i].tobytes(), digest_size=16).digest()
            seen.setdefault(digest, []).append(f"{half} {i} ({name})")
    return [group for group in seen.values() if len(group) > 1]


def num_in_several_splits(identical: Iterable[Iterable[str]]) -> int:
    """How many groups of `identical_images` lie in more than one split."""
    return sum(len({image.rpartition("(")[2] for image in group}) > 1 for group in identical)


def manifest(splits: Splits, images: ImageData) -> dict[str, Any]:
    """splits/manifest.json: settings, hash, and for each split its size and class counts."""
    num_classes = len(images.class_names)
    table = {}
    for name in splits.names:
        _, labels = split_images(name, images)
        counts = np.bincount(labels[splits.indices[name]], minlength=num_classes)
        absent = np.flatnonzero(counts == 0).tolist()
        table[name] = {
            "size": int(counts.sum()),
            "class_counts": counts.tolist(),
            "absent_classes": absent,
        }
    identical = identical_images(splits, images)
    return {
        **splits.settings,
        "sha256": splits.sha256,
        "class_names": list(images.class_names),
        "pool_counts": list(splits.pool_counts),
        "splits": table,
        "num_identical_groups": len(identical),
        "identical_images": identical,
    }
