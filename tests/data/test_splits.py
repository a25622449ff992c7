import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longtail_experts.data import splits as splits_module
from longtail_experts.data.sources import DataError, ImageData, load_images
from longtail_experts.data.splits import (
    POOL_SPLITS,
    SPLITS,
    TEST_SPLITS,
    Splits,
    check_disjoint,
    deal,
    lt_test_counts,
    make_splits,
    manifest,
    num_in_several_splits,
    split_images,
)

# A busy machine is slow, not wrong.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# int(500 * 100^(-c / 99)) without floating point.
POOL = [max(n for n in range(501) if n**99 * 100**c <= 500**99) for c in range(100)]
RECIPE = {
    "imbalance_profile": "exp",
    "imbalance_factor": 100.0,
    "images_per_class": None,
    "split_seed": 42,
}
NATURAL = RECIPE | {"imbalance_profile": "natural"}
SIZES = {
    "train": 8677,
    "tuneV": 868,
    "val_small": 651,
    "calib": 651,
    "val_lt": 1072,
    "test_lt": 4287,
    "test_balanced": 8928,
}
# sha256 of the indices of all splits in order, little-endian int64: `cifar` under RECIPE.
PINNED_INDICES = "98c7291214bd5c6d33b7aa87165527e5bde92a635a3c8e6169440c127defa47b"
PINNED_TRAIN = [0, 1, 2, 3, 8, 14, 16, 22]


def blank_images(train_labels, test_labels, num_classes, **fields) -> ImageData:
    """Images of one pixel of four bytes, all different."""
    numbers = np.arange(len(train_labels) + len(test_labels), dtype="<u4")
    pixels = numbers.view(np.uint8).reshape(-1, 1, 1, 4)
    return ImageData(
        train_images=pixels[: len(train_labels)].copy(),
        train_labels=np.asarray(train_labels, dtype=np.int64),
        test_images=pixels[len(train_labels) :].copy(),
        test_labels=np.asarray(test_labels, dtype=np.int64),
        class_names=tuple(f"name{c}" for c in range(num_classes)),
        **{"source": "fake", "fingerprint": "f00d", "index_space": "f00d", "largest_class": 500}
        | fields,
    )


def images_with(train_counts, test_counts, **fields) -> ImageData:
    """Classes of these sizes, their images scattered over the source."""
    num_classes = len(train_counts)
    random = np.random.RandomState(len(train_counts) + sum(train_counts))
    train, test = (
        random.permutation(np.repeat(np.arange(num_classes), counts))
        for counts in (train_counts, test_counts)
    )
    return blank_images(train, test, num_classes, **fields)


@pytest.fixture(scope="module")
def cifar() -> ImageData:
    return blank_images(np.arange(50_000) % 100, np.arange(10_000) % 100, 100)


@pytest.fixture(scope="module")
def recipe(cifar) -> SimpleNamespace:
    splits = make_splits(cifar, **RECIPE)
    return SimpleNamespace(splits=splits, counts=counts_by_split(splits, cifar))


def counts_by_split(splits: Splits, images: ImageData) -> dict[str, np.ndarray]:
    num_classes = len(images.class_names)
    counts = {}
    for name, index in splits.indices.items():
        labels = images.train_labels if name in POOL_SPLITS else images.test_labels
        counts[name] = np.bincount(labels[index], minlength=num_classes)
    return counts


def proportional(places: int, counts: list[int]) -> list[int]:
    """Largest remainder with fractions, then one place at least for each class."""
    quotas = [Fraction(places * n, sum(counts)) for n in counts]
    shares = [int(q) for q in quotas]
    ranked = sorted(range(len(counts)), key=lambda c: (shares[c] - quotas[c], c))
    for c in ranked[: places - sum(shares)]:
        shares[c] += 1
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def digest(splits: Splits) -> str:
    return hashlib.sha256(
        b"".join(splits.indices[name].astype("<i8").tobytes() for name in SPLITS)
    ).hexdigest()


# --- the full recipe --------------------------------------------------------------------------


def test_sizes_of_the_recipe(recipe):
    assert {name: len(index) for name, index in recipe.splits.indices.items()} == SIZES
    assert recipe.splits.pool_counts == tuple(POOL)


def test_indices_are_ascending_int64(recipe):
    for index in recipe.splits.indices.values():
        assert index.dtype == np.int64
        assert (np.diff(index) > 0).all()


def test_indices_of_the_recipe_are_pinned(recipe):
    assert digest(recipe.splits) == PINNED_INDICES
    assert recipe.splits.indices["train"][:8].tolist() == PINNED_TRAIN


def test_train_is_proportional_to_the_pool(recipe):
    train = recipe.counts["train"]
    assert train.tolist() == proportional(8677, POOL)
    assert (train[0], train[-1], (train < 10).sum()) == (400, 4, 19)
    assert -(-len(recipe.splits.indices["train"]) // 128) == 68


def test_pool_splits_take_exactly_the_pool(recipe):
    assert sum(recipe.counts[name] for name in POOL_SPLITS).tolist() == POOL


def test_dealt_splits_are_near_proportional_in_every_class(recipe):
    """A hand is never more than 2/3 ahead of its quota nor 4/3 behind, so a class is within 2."""
    left = np.array(POOL) - recipe.counts["train"]
    for name, quota in (("tuneV", 868), ("val_small", 651), ("calib", 651)):
        assert np.abs(recipe.counts[name] - left * quota / 2170).max() <= 2


def test_lt_test_counts_of_the_recipe():
    counts = lt_test_counts([100] * 100, POOL)
    exact = [Fraction(10_000 * n, 10_847) for n in POOL]
    rounded = [int(x + Fraction(1, 2)) for x in exact]
    assert counts == [min(100, max(1, n)) for n in rounded]
    assert sum(counts) == 5359
    assert (sum(n >= 100 for n in rounded), min(counts)) == (33, 5)


@pytest.mark.parametrize(
    ("test_counts", "pool_counts", "expected"),
    [
        ([5, 5], [1, 1], [5, 5]),
        ([6, 4], [3, 1], [6, 3]),  # 7.5 capped, 2.5 rounds up
        ([9, 1], [1000, 1], [9, 1]),  # 0.01 still has one
        ([1, 1, 1], [7, 7, 7], [1, 1, 1]),
    ],
)
def test_lt_test_counts_by_hand(test_counts, pool_counts, expected):
    assert lt_test_counts(test_counts, pool_counts) == expected


def test_val_lt_is_a_fifth_of_the_lt_test_images(recipe):
    lt = lt_test_counts([100] * 100, POOL)
    val = recipe.counts["val_lt"]
    assert val.tolist() == proportional(1072, lt)
    assert (val.min(), val.max()) == (1, 20)
    assert val[np.array(POOL) <= 20].sum() == 59
    assert (val + recipe.counts["test_lt"]).tolist() == lt


def test_test_balanced_is_all_that_val_lt_leaves(recipe):
    index = recipe.splits.indices
    assert np.isin(index["test_lt"], index["test_balanced"]).all()
    both = np.concatenate([index["val_lt"], index["test_balanced"]])
    assert np.array_equal(np.sort(both), np.arange(10_000))


def test_no_image_serves_two_masters(recipe):
    index = {name: set(i.tolist()) for name, i in recipe.splits.indices.items()}
    for a, b in [*combinations(POOL_SPLITS, 2), *(("val_lt", x) for x in TEST_SPLITS[1:])]:
        assert not index[a] & index[b]


@pytest.mark.parametrize("factor", [10, 50])
def test_other_factors_keep_the_percentages(cifar, factor):
    splits = make_splits(cifar, **RECIPE | {"imbalance_factor": factor})
    total = {10: 19_573, 50: 12_608}[factor]
    for name, percent in zip(POOL_SPLITS, (80, 8, 6, 6), strict=True):
        assert abs(len(splits.indices[name]) - total * percent / 100) < 1
    assert sum(splits.pool_counts) == total


def test_step_profile(cifar):
    splits = make_splits(cifar, **RECIPE | {"imbalance_profile": "step"})
    assert splits.pool_counts == (500,) * 50 + (5,) * 50
    counts = counts_by_split(splits, cifar)
    assert counts["train"].tolist() == [400] * 50 + [4] * 50
    # 10,000 * 500 / 25,250 = 198 of 100, and 10,000 * 5 / 25,250 = 1.98
    assert (counts["val_lt"] + counts["test_lt"]).tolist() == [100] * 50 + [2] * 50


def test_natural_profile_takes_every_training_image():
    train, test = [40, 3, 1, 17], [9, 9, 9, 9]
    splits = make_splits(images_with(train, test), **NATURAL)
    assert splits.pool_counts == tuple(train)
    taken = np.concatenate([splits.indices[name] for name in POOL_SPLITS])
    assert np.array_equal(np.sort(taken), np.arange(61))
    assert splits.settings["imbalance_factor"] is None


def test_images_per_class_shrinks_the_pool():
    images = images_with([30] * 4, [10] * 4, largest_class=30)
    splits = make_splits(images, **RECIPE | {"images_per_class": 20, "imbalance_factor": 8})
    assert splits.pool_counts == (20, 10, 5, 2)


# --- seeds and the hash -----------------------------------------------------------------------


def test_same_settings_same_splits(cifar, recipe):
    again = make_splits(cifar, **RECIPE)
    assert digest(again) == digest(recipe.splits)
    assert again.sha256 == recipe.splits.sha256


def test_split_seed_changes_every_split_but_no_size(cifar, recipe):
    other = make_splits(cifar, **RECIPE | {"split_seed": 43})
    assert (recipe.splits.settings["split_seed"], other.settings["split_seed"]) == (42, 43)
    assert other.sha256 != recipe.splits.sha256
    for name in SPLITS:
        assert len(other.indices[name]) == SIZES[name]
        assert not np.array_equal(other.indices[name], recipe.splits.indices[name])
    for name in ("train", "tuneV", "val_small", "calib"):
        counts = counts_by_split(other, cifar)[name]
        assert counts.tolist() == recipe.counts[name].tolist()


def test_hash_is_of_the_content_not_of_the_name_of_the_source():
    def sha256(**fields):
        return make_splits(images_with([9, 9], [5, 5], **fields), **NATURAL).sha256

    assert len(sha256()) == 64
    assert sha256(source="another") == sha256()
    assert sha256(fingerprint="beef") != sha256()


def test_settings_that_change_no_index_do_not_change_the_hash(cifar, recipe):
    explicit = make_splits(cifar, **(RECIPE | {"images_per_class": 500}))
    assert explicit.sha256 == recipe.splits.sha256


def test_one_moved_index_changes_the_hash():
    splits = make_splits(images_with([9, 9], [5, 5]), **NATURAL)
    before = splits.sha256
    splits.indices["train"][0] += 1
    assert splits.sha256 != before


# --- any data set -----------------------------------------------------------------------------


@st.composite
def small_sources(draw) -> ImageData:
    num_classes = draw(st.integers(1, 8))
    sizes = st.lists(st.integers(1, 30), min_size=num_classes, max_size=num_classes)
    return images_with(draw(sizes), draw(sizes))


def check_properties(splits: Splits, images: ImageData) -> None:
    counts = counts_by_split(splits, images)
    pool = list(splits.pool_counts)
    test = np.bincount(images.test_labels, minlength=len(pool)).tolist()
    sizes = [len(splits.indices[name]) for name in POOL_SPLITS]
    assert sum(counts[name] for name in POOL_SPLITS).tolist() == pool
    assert counts["train"].tolist() == proportional(sizes[0], pool)
    assert counts["train"].min() >= 1
    if sizes[0] > len(pool):
        for size, percent in zip(sizes, (80, 8, 6, 6), strict=True):
            assert abs(size - sum(pool) * percent / 100) < 1
    lt = (counts["val_lt"] + counts["test_lt"]).tolist()
    assert lt == lt_test_counts(test, pool)
    assert counts["val_lt"].min() >= 1
    assert (counts["val_lt"] + counts["test_balanced"]).tolist() == test
    assert set(splits.indices["test_lt"]) <= set(splits.indices["test_balanced"])
    for a, b in [*combinations(POOL_SPLITS, 2), *(("val_lt", x) for x in TEST_SPLITS[1:])]:
        assert not set(splits.indices[a]) & set(splits.indices[b])


@relaxed
@given(small_sources(), st.integers(0, 2**31 - 1))
def test_properties_of_the_natural_profile(images, seed):
    config = NATURAL | {"split_seed": seed}
    splits = make_splits(images, **config)
    check_properties(splits, images)
    assert make_splits(images, **config).sha256 == splits.sha256


@relaxed
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from(["exp", "step"]), st.data())
def test_properties_of_the_formulas(num_classes, largest, profile, data):
    factor = data.draw(st.floats(1, largest))
    images = images_with([largest] * num_classes, [5] * num_classes, largest_class=largest)
    config = RECIPE | {"imbalance_profile": profile, "imbalance_factor": factor}
    check_properties(make_splits(images, **config), images)


def test_one_image_a_class_all_goes_to_train():
    splits = make_splits(images_with([1] * 5, [2] * 5), **NATURAL)
    sizes = {name: len(index) for name, index in splits.indices.items()}
    assert sizes == {
        "train": 5,
        "tuneV": 0,
        "val_small": 0,
        "calib": 0,
        "val_lt": 5,
        "test_lt": 5,
        "test_balanced": 5,
    }


# --- dealing ----------------------------------------------------------------------------------


@relaxed
@given(st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_hands_end_with_their_quota_and_never_drift(quotas):
    """The hand that is dealt to is the furthest behind, by 1/3 or more: it is then ahead by 2/3
    or less, and so no hand is ever behind by more than 4/3."""
    num = sum(quotas)
    hands = deal(np.arange(num) + 1000, quotas)
    assert [len(hand) for hand in hands] == quotas
    assert sorted(np.concatenate(hands).tolist()) == list(range(1000, 1000 + num))
    for hand, quota in zip(hands, quotas, strict=True):
        assert (np.diff(hand) > 0).all()
        held = np.searchsorted(hand, 1000 + np.arange(num + 1))
        ahead = held - quota * np.arange(num + 1) / max(num, 1)
        assert ahead.min() >= -4 / 3 - 1e-9
        assert ahead.max() <= 2 / 3 + 1e-9


@pytest.mark.parametrize(
    ("quotas", "hands"),
    [
        ([1, 1, 1], [[0], [1], [2]]),
        ([2, 1, 1], [[0, 3], [1], [2]]),
        ([0, 3, 0], [[], [0, 1, 2], []]),
        ([0, 0, 0], [[], [], []]),
    ],
)
def test_deal_by_hand(quotas, hands):
    assert [hand.tolist() for hand in deal(np.arange(sum(quotas)), quotas)] == hands


# --- what cannot be split ---------------------------------------------------------------------


def test_too_few_images_names_class_asked_and_present():
    images = images_with([20, 20, 4], [5, 5, 5], largest_class=20)
    with pytest.raises(DataError, match=r"^class 2 \(name2\): 10 training .* asked, 4 present"):
        make_splits(images, **RECIPE | {"imbalance_factor": 2})


def test_images_per_class_beyond_what_is_there():
    images = images_with([20, 20], [5, 5])
    with pytest.raises(DataError, match=r"^class 0 \(name0\): 21 .* asked, 20 present"):
        make_splits(images, **RECIPE | {"images_per_class": 21, "imbalance_factor": 2})


@pytest.mark.parametrize(
    ("source", "counts", "factor", "remedy"),
    [
        ("cifar100", [8, 20], 2, "; give images_per_class=8 or less, or add images"),
        ("images", [8, 20], 2, "or less, .*; imbalance_profile=natural takes the images as they"),
        ("images", [20, 8], 2, "; raise imbalance_factor, lower images_per_class, or add images"),
        ("images", [0, 20], 2, "; add images, or take the class away"),
    ],
)
def test_the_remedy_is_one(source, counts, factor, remedy):
    """The first class has as many as the largest at any factor."""
    images = replace(images_with(counts, [5, 5], largest_class=20), source=source)
    with pytest.raises(DataError, match=remedy):
        make_splits(images, **RECIPE | {"imbalance_factor": factor})


def test_natural_profile_refuses_a_class_without_training_images():
    with pytest.raises(DataError, match=r"^class 1 \(name1\): 1 .* asked, 0 present"):
        make_splits(images_with([20, 0, 20], [5, 5, 5]), **NATURAL)


def test_class_without_test_images_is_named():
    with pytest.raises(DataError, match=r"^class 2 \(name2\): no test image"):
        make_splits(images_with([20] * 4, [5, 5, 0, 5]), **NATURAL)


def test_factor_beyond_the_largest_class_is_named():
    images = images_with([20] * 3, [5] * 3, largest_class=20)
    with pytest.raises(DataError, match=r"^imbalance_factor=21: "):
        make_splits(images, **RECIPE | {"imbalance_factor": 21})


def planted_overlap(a: str, b: str) -> Splits:
    indices = {name: np.array([10 * k]) for k, name in enumerate(SPLITS)}
    indices[a] = indices[b] = np.array([7])
    return Splits(indices, (1,), {})


@pytest.mark.parametrize(
    ("a", "b"),
    [*combinations(POOL_SPLITS, 2), ("val_lt", "test_lt"), ("val_lt", "test_balanced")],
)
def test_leak_check_finds_a_shared_index(a, b):
    with pytest.raises(AssertionError, match=rf"{a} and {b} share indices \[7\]"):
        check_disjoint(planted_overlap(a, b))


@pytest.mark.parametrize(("a", "b"), [("test_lt", "test_balanced"), ("train", "val_lt")])
def test_leak_check_allows_what_is_no_leak(a, b):
    check_disjoint(planted_overlap(a, b))


def test_splits_that_leak_are_never_handed_out(monkeypatch):
    same = {name: np.arange(3) for name in TEST_SPLITS}
    monkeypatch.setattr(splits_module, "split_test", lambda *arguments: same)
    with pytest.raises(AssertionError, match="val_lt and test_lt share indices"):
        make_splits(images_with([9, 9], [5, 5]), **NATURAL)


# --- manifest ---------------------------------------------------------------------------------


def test_manifest_of_the_recipe(cifar, recipe):
    page = json.loads(json.dumps(manifest(recipe.splits, cifar)))
    assert page.items() >= RECIPE.items()
    assert page["source"] == "fake"
    assert page["fingerprint"] == page["index_space"] == "f00d"
    assert page["sha256"] == recipe.splits.sha256
    assert page["class_names"] == list(cifar.class_names)
    assert page["pool_counts"] == POOL
    assert page["identical_images"] == []
    assert list(page["splits"]) == list(SPLITS)
    for name, row in page["splits"].items():
        assert row["size"] == SIZES[name]
        assert row["class_counts"] == recipe.counts[name].tolist()
        assert row["absent_classes"] == [c for c in range(100) if recipe.counts[name][c] == 0]


def test_about_a_dozen_tail_classes_are_absent_from_each_small_split(cifar, recipe):
    table = manifest(recipe.splits, cifar)["splits"]
    for name in ("tuneV", "val_small", "calib"):
        absent = table[name]["absent_classes"]
        assert 10 <= len(absent) <= 14
        assert max(POOL[c] for c in absent) <= 20
    for name in ("train", *TEST_SPLITS):
        assert table[name]["absent_classes"] == []


def test_planted_duplicates_are_found():
    images = images_with([60, 30, 10], [20, 20, 20], largest_class=40)
    splits = make_splits(images, **RECIPE | {"imbalance_factor": 4})
    i, j = splits.indices["train"][3], splits.indices["calib"][0]
    v, t = splits.indices["val_lt"][1], splits.indices["test_lt"][2]
    images.train_images[j] = images.train_images[i]
    images.test_images[[v, t]] = 255
    assert manifest(splits, images)["identical_images"] == [
        [f"train {i} (train)", f"train {j} (calib)"],
        [f"test {v} (val_lt)", f"test {t} (test_balanced)"],
    ]


def test_duplicates_across_train_and_test_are_one_group():
    images = images_with([20, 20], [20, 20])
    splits = make_splits(images, **NATURAL)
    i, v = splits.indices["tuneV"][0], splits.indices["val_lt"][0]
    images.test_images[v] = images.train_images[i]
    assert manifest(splits, images)["identical_images"] == [
        [f"train {i} (tuneV)", f"test {v} (val_lt)"]
    ]


def test_groups_that_lie_in_several_splits_are_counted():
    within, across = (
        ["train 1 (train)", "train 2 (train)"],
        ["train 1 (train)", "train 2 (calib)", "test 3 (val_lt)"],
    )
    assert num_in_several_splits([]) == num_in_several_splits([within]) == 0
    assert num_in_several_splits([across, within, across]) == 2


def test_duplicates_outside_the_splits_are_not_reported():
    images = images_with([40, 40], [5, 5], largest_class=10)
    splits = make_splits(images, **RECIPE | {"imbalance_factor": 2})
    used = np.concatenate([splits.indices[name] for name in POOL_SPLITS])
    images.train_images[np.setdiff1d(np.arange(80), used)] = 255
    assert manifest(splits, images)["identical_images"] == []


@pytest.mark.parametrize("name", SPLITS)
def test_split_images_are_of_the_right_half(name):
    images = images_with([5], [3])
    half = "test" if name in ("val_lt", "test_lt", "test_balanced") else "train"
    pixels, labels = split_images(name, images)
    assert pixels is getattr(images, f"{half}_images")
    assert labels is getattr(images, f"{half}_labels")


# --- the real images --------------------------------------------------------------------------


@pytest.mark.real
def test_real_cifar100(real_data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGTAIL_CACHE_DIR", str(tmp_path))
    images = load_images("cifar100", real_data_dir, download=False)
    assert images.test_images.shape == (10_000, 32, 32, 3)
    assert images.class_names[:2] == ("apple", "aquarium_fish")
    page = manifest(make_splits(images, **RECIPE), images)
    assert {name: row["size"] for name, row in page["splits"].items()} == SIZES
    assert page["pool_counts"] == POOL
    twins = page["identical_images"]
    assert twins  # CIFAR-100 has some; by pixels, not only by hash:
    for group in twins:
        halves = {"train": images.train_images, "test": images.test_images}
        pixels = [halves[half][int(i)] for half, i, _ in (text.split() for text in group)]
        assert all(np.array_equal(pixels[0], other) for other in pixels[1:])


# --- the literature's protocol ----------------------------------------------------------------

LITERATURE = RECIPE | {"protocol": "literature"}


def ldam_subset(labels: np.ndarray, factor: float) -> list[int]:
    """As the authors' data loader goes about it, with numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(0)
    chosen = []
    for c in range(100):
        wanted = int(500 * (1 / factor) ** (c / 99))
        of_class = np.where(labels == c)[0]
        np.random.shuffle(of_class)
        chosen += of_class[:wanted].tolist()
    np.random.set_state(state)
    return chosen


@pytest.mark.parametrize(("factor", "size"), [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_ldam_takes_the_images_that_its_code_takes(factor, size):
    labels = np.random.RandomState(7).permutation(np.arange(50_000) % 100)
    images = blank_images(labels, np.arange(10_000) % 100, 100, index_space="torchvision")
    rule = {"subset_rule": "ldam", "imbalance_factor": float(factor)}
    splits = make_splits(images, **LITERATURE | rule)
    assert len(splits.indices["train"]) == size
    assert splits.indices["train"].tolist() == sorted(ldam_subset(labels, factor))
    pool = make_splits(images, **RECIPE | rule)  # the experts' splits of the same pool
    together = np.concatenate([pool.indices[name] for name in POOL_SPLITS])
    assert sorted(together) == splits.indices["train"].tolist()
    own = make_splits(images, **LITERATURE | {"imbalance_factor": float(factor)})
    assert own.indices["train"].tolist() != splits.indices["train"].tolist()


@pytest.mark.parametrize(
    ("source", "folder"), [("cifar100", "cifar-100-python"), ("cifar10", "cifar-10-batches-py")]
)
def test_ldam_is_refused_where_the_order_is_not_the_official_one(cifar, source, folder):
    images = replace(cifar, source=source)
    with pytest.raises(DataError, match=rf"official files.* give those \({folder}/\)"):
        make_splits(images, **LITERATURE | {"subset_rule": "ldam"})


def test_literature_trains_on_the_whole_pool_and_tests_on_everything(cifar, recipe):
    splits = make_splits(cifar, **LITERATURE)
    assert splits.names == ("train", "test_balanced")
    pool = np.concatenate([recipe.splits.indices[name] for name in POOL_SPLITS])
    assert splits.indices["train"].tolist() == sorted(pool)
    assert splits.indices["test_balanced"].tolist() == list(range(10_000))
    assert splits.pool_counts == recipe.splits.pool_counts
    about = manifest(splits, cifar)
    assert list(about["splits"]) == ["train", "test_balanced"]
    assert (about["protocol"], about["subset_rule"]) == ("literature", "own")
    assert splits.sha256 != recipe.splits.sha256


@pytest.mark.parametrize(("counts", "is_refused"), [([20, 30], False), ([20, 31], True)])
def test_literature_needs_test_images_that_are_about_balanced(counts, is_refused):
    """Under another prior than that of its images T is no maximum of their likelihood."""
    images = blank_images(np.arange(100) % 2, np.repeat([0, 1], counts), 2, largest_class=50)
    expected = nullcontext()
    if is_refused:
        expected = pytest.raises(DataError, match="protocol=literature: the test images are 20 to")
    with expected:
        make_splits(images, **LITERATURE | {"imbalance_factor": 2})


def test_cifar10_lt_by_the_same_code():
    labels = np.arange(50_000) % 10
    images = blank_images(labels, np.arange(10_000) % 10, 10, largest_class=5000)
    splits = make_splits(images, **LITERATURE)
    expected = [int(5000 * 100 ** (-c / 9) + 1e-9) for c in range(10)]
    assert list(splits.pool_counts) == expected
    assert sum(expected) == 12_406  # CIFAR-10-LT at imbalance factor 100


def test_a_pool_of_which_one_image_a_class_is_too_much_still_deals_8_6_6():
    """120 images of 100 classes: train keeps 100, and 20 are dealt out as 8 : 6 : 6."""
    pool = [np.arange(2) + 10 * c for c in range(20)] + [np.array([1000 + c]) for c in range(80)]
    found = splits_module.split_pool(pool)
    assert {name: len(images) for name, images in found.items()} == {
        "train": 100,
        "tuneV": 8,
        "val_small": 6,
        "calib": 6,
    }
