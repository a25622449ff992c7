from itertools import starmap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from longtail_experts.data.augment import (
    AUTOAUGMENT,
    KERNELS,
    OPERATIONS,
    PLAIN,
    RANDAUGMENT,
    Augmentation,
    Operation,
    apply_operations,
    autoaugment_operations,
    cut_out,
    draw_holes,
    draw_operations,
    draw_shares,
    magnitude,
    mix,
    partners,
    randaugment_operations,
)
from longtail_experts.data.batches import (
    EpochDraws,
    batches_of,
    crop_and_flip,
    derive_seed,
    draw_epoch,
    loader_of,
    normalise,
    pad,
)

relaxed = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
auto = AutoAugment(AutoAugmentPolicy.CIFAR10)
rand = RandAugment()
SPACES = {
    10: auto._augmentation_space(10, (32, 32)),
    31: rand._augmentation_space(31, (32, 32)),
}
STRONG = Augmentation("autoaugment", 16, 0.4)
augmentations = st.builds(
    Augmentation,
    st.sampled_from(["plain", "autoaugment", "randaugment"]),
    st.integers(0, 32),
    st.sampled_from([0.0, 0.001, 0.4, 1.0, 10.0]),
)


def images_of_all_kinds(num: int = 24) -> torch.Tensor:
    """uint8 [N, 3, 32, 32]: noise, low contrast, one colour, and smooth."""
    random = np.random.RandomState(5)
    noise = random.randint(0, 256, (num, 3, 32, 32))
    flat = np.broadcast_to(random.randint(0, 256, (num, 3, 1, 1)), noise.shape)
    slope = np.add.outer(np.arange(32), np.arange(32)) * 4 * random.rand(num, 3, 1, 1)
    kinds = np.stack([noise, noise // 8 + 60, flat, slope])[np.arange(num) % 4, np.arange(num)]
    return torch.from_numpy(kinds.astype(np.uint8))


def torchvision_op(image, name, value):
    return _apply_op(image, name, value, InterpolationMode.NEAREST, None)


# --- operations -------------------------------------------------------------------------------


def test_the_policy_is_torchvisions():
    assert len(AUTOAUGMENT) == 25
    for pair, theirs in zip(AUTOAUGMENT, auto.policies, strict=True):
        assert [(name, p, level) for name, p, level in pair] == [
            (name, p, level or 0) for name, p, level in theirs
        ]


def test_randaugment_is_torchvisions():
    assert list(SPACES[31]) == list(RANDAUGMENT)
    assert (rand.num_ops, rand.magnitude, rand.num_magnitude_bins) == (2, 9, 31)
    assert rand.interpolation == auto.interpolation == InterpolationMode.NEAREST
    assert rand.fill is None
    assert auto.fill is None


def every_operation():
    for num_levels, space in SPACES.items():
        for name, (values, signed) in space.items():
            for level, value in enumerate(values.tolist() if values.ndim else [0.0]):
                for sign in (-1, 1) if signed else (1,):
                    yield name, level, num_levels, sign, value


@pytest.mark.parametrize("num_levels", [10, 31])
def test_every_magnitude_is_torchvisions(num_levels):
    for name, level, levels, _, value in every_operation():
        if levels == num_levels:
            assert magnitude(name, level, levels) == value, (name, level)


@pytest.mark.parametrize("name", KERNELS)
def test_a_batch_goes_through_every_operation_as_its_images_alone_through_torchvisions(name):
    images, changed = images_of_all_kinds(), 0
    for found, level, num_levels, sign, value in every_operation():
        if found == name:
            got = KERNELS[name](images, sign * magnitude(name, level, num_levels))
            expected = torch.stack([torchvision_op(image, name, sign * value) for image in images])
            assert torch.equal(got, expected), (level, num_levels, sign)
            changed += not torch.equal(got, images)
    assert bool(changed) == (name != "Identity")


def test_every_operation_that_can_be_drawn_is_in_the_list_once():
    assert OPERATIONS[0] == Operation("Identity")
    assert len(set(OPERATIONS)) == len(OPERATIONS)
    which, sign = torch.meshgrid(torch.arange(25), torch.arange(2), indexing="ij")
    which, sign = which.flatten(), sign.flatten()[:, None].expand(-1, 2)
    drawn = set(autoaugment_operations(which, torch.zeros(50, 2), sign).flatten().tolist())
    for value in (0, 1):
        kinds = torch.arange(len(RANDAUGMENT))[:, None]
        drawn |= set(
            randaugment_operations(kinds, torch.full_like(kinds, value)).flatten().tolist()
        )
    assert drawn | {0} == set(range(len(OPERATIONS)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_of_all_operations_equals_its_images_alone(layout):
    random = np.random.RandomState(0)
    images = images_of_all_kinds(3 * len(OPERATIONS))
    places = torch.from_numpy(random.permutation(np.arange(len(images)) % len(OPERATIONS)))
    places = torch.stack([places, places.flip(0)], dim=1)
    got = apply_operations(images.contiguous(memory_format=layout), places)
    for k, image in enumerate(images):
        for place in places[k].tolist():
            image = torchvision_op(image, *OPERATIONS[place])
        assert torch.equal(got[k], image), [OPERATIONS[p] for p in places[k]]


def test_no_column_is_no_operation():
    images = images_of_all_kinds(3)
    assert torch.equal(apply_operations(images, torch.empty((3, 0), dtype=torch.int64)), images)


# --- whole policies ---------------------------------------------------------------------------


def test_autoaugment_equals_torchvision_given_the_same_draws(monkeypatch):
    """All 25 sub-policies, all signs, chances below, at and above the probabilities."""
    num = 25 * 12
    generator = torch.Generator().manual_seed(3)
    which = torch.arange(num) % 25
    chance = torch.rand((num, 2), generator=generator)
    at = torch.tensor([[p for _, p, _ in pair] for pair in AUTOAUGMENT])[which]
    chance = torch.where(torch.arange(num)[:, None] < 50, at, chance)
    sign = torch.randint(2, (num, 2), generator=generator)
    images = images_of_all_kinds(num)
    got = apply_operations(images, autoaugment_operations(which, chance, sign))
    for k, image in enumerate(images):
        draws = (int(which[k]), chance[k], sign[k])
        monkeypatch.setattr(auto, "get_params", lambda _, draws=draws: draws)
        assert torch.equal(got[k], auto(image)), auto.policies[which[k]]


def test_randaugment_equals_torchvision_given_the_same_draws(monkeypatch):
    num, generator = 200, torch.Generator().manual_seed(4)
    which = torch.randint(14, (num, 2), generator=generator)
    sign = torch.randint(2, (num, 2), generator=generator)
    images = images_of_all_kinds(num)
    got = apply_operations(images, randaugment_operations(which, sign))
    for k, image in enumerate(images):
        answers = []
        for place, plus in zip(which[k].tolist(), sign[k].tolist(), strict=True):
            has_sign = SPACES[31][RANDAUGMENT[place]][1]
            answers += [torch.tensor([place])] + [torch.tensor([1 - plus])] * has_sign
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *_, answers=answers: answers.pop(0))
            expected = rand(image)
        assert not answers
        assert torch.equal(got[k], expected)


def name_shares(operations: torch.Tensor) -> dict[str, float]:
    names = [OPERATIONS[place].name for place in operations.flatten().tolist()]
    return {name: names.count(name) / len(names) for name in KERNELS}


def test_autoaugment_draws_each_operation_as_often_as_its_probabilities_say():
    num = 40_000
    operations = draw_operations("autoaugment", num, 1)
    expected = dict.fromkeys(KERNELS, 0.0)
    for pair in AUTOAUGMENT:
        for name, probability, _ in pair:
            expected[name] += probability / 50
            expected["Identity"] += (1 - probability) / 50
    for name, share in name_shares(operations).items():
        assert abs(share - expected[name]) < 0.012, name  # 4.8 standard errors of n = 40,000
    for column, k in zip(operations.T, (0, 1), strict=True):
        for pair in AUTOAUGMENT:
            assert any(OPERATIONS[p].name == pair[k][0] for p in column.unique().tolist())


def test_randaugment_draws_each_operation_as_often():
    operations = draw_operations("randaugment", 40_000, 1)
    for name, share in name_shares(operations).items():
        assert abs(share - (name in RANDAUGMENT) / 14) < 0.005, name  # 5 standard errors
    first, second = operations.T
    assert abs((first == second).double().mean() - (5 + 9 / 2) / 14**2) < 0.005


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_both_signs_are_drawn_as_often(policy):
    drawn = [OPERATIONS[p] for p in draw_operations(policy, 40_000, 2).flatten().tolist()]
    for name in ("TranslateY", "Brightness", "Sharpness", "ShearY", "Rotate", "Color"):
        minus = [value < 0 for found, value in drawn if found == name and value]
        assert abs(np.mean(minus) - 0.5) < 0.05, name  # 5 standard errors of n = 2,700
    unsigned = [value for found, value in drawn if found in ("Solarize", "Posterize")]
    assert min(unsigned) > 0


def test_sub_policies_keep_their_two_operations_together():
    """An image that is rotated may be shifted sideways, and nothing else, after it."""
    operations = draw_operations("autoaugment", 5000, 6)
    follow = {OPERATIONS[b].name for a, b in operations.tolist() if OPERATIONS[a].name == "Rotate"}
    assert follow == {"TranslateX", "Identity"}


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="no policy 'trivial': plain, autoaugment or randaugment"):
        draw_operations("trivial", 3, 0)


# --- cutout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 7, 16, 31, 32])
def test_cutout_equals_a_loop_over_pixels(side):
    num = 60
    centre = torch.randint(32, (num, 1, 2), generator=torch.Generator().manual_seed(9))
    images = torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    holes = draw_holes(side, num, 9)
    expected = images.clone()
    for k in range(num):
        y, x = centre[k, 0].tolist()
        for row in range(y - side // 2, y - side // 2 + side):
            for column in range(x - side // 2, x - side // 2 + side):
                if 0 <= row < 32 and 0 <= column < 32:
                    expected[k, :, row, column] = 0
    before = images.clone()
    assert torch.equal(cut_out(images, holes), expected)
    assert torch.equal(images, before)


def test_holes_lie_anywhere_and_stick_out():
    holes = draw_holes(16, 20_000, 0)
    top, bottom, left, right = holes[:, 0].T
    for first, last in ((top, bottom), (left, right)):
        assert set((last - first).tolist()) == {16}
        counts = torch.bincount(first + 8, minlength=32) / 20_000
        assert len(counts) == 32
        assert ((counts - 1 / 32).abs() < 0.0065).all()  # 5.2 standard errors
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.03
    hidden = (cut_out(torch.ones(20_000, 1, 32, 32), holes) == 0).double().mean((1, 2, 3))
    assert hidden.min() == 64 / 1024  # a quarter of the hole, in a corner
    assert hidden.max() == 256 / 1024


def test_no_hole_is_the_image_itself():
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(cut_out(images, draw_holes(0, 2, 0)), images)


# --- mixup ------------------------------------------------------------------------------------


def test_mixtures_by_hand():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    expected = torch.tensor([[1.75, 17.5], [1.75, 17.5], [3.5, 35.0]])
    assert torch.equal(mix(values, torch.tensor(0.75)), expected)
    assert partners(torch.tensor([5, 6, 7])).tolist() == [7, 5, 6]


@pytest.mark.parametrize("alpha", [0.4, 1.0, 10.0])
def test_shares_have_the_moments_of_beta(alpha):
    shares = draw_shares(alpha, 50_000, 3).double()
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.005


def test_shares_are_pinned():
    """numpy's RandomState never changes: nor may a training that is resumed."""
    expected = np.random.RandomState(7).beta(0.4, 0.4, 3).astype(np.float32)
    assert draw_shares(0.4, 3, 7)[:, 0].tolist() == expected.tolist()
    shares = draw_epoch(3, 7, 3, augmentation=STRONG).share[:, 0].tolist()
    assert shares == pytest.approx([0.0852132, 0.9313657, 0.4757851], abs=1e-6)


# --- an epoch ---------------------------------------------------------------------------------


def epoch_of(num, augmentation, batch_size, seen=0):
    random = np.random.RandomState(num)
    pixels = torch.from_numpy(random.randint(0, 256, (num, 32, 32, 3), dtype=np.uint8))
    draws = draw_epoch(num, 1, 2, augmentation=augmentation)
    left = EpochDraws(*(values[seen:] for values in draws))
    load = loader_of(pixels, torch.arange(num) * 3, "cpu")
    return list(starmap(load, batches_of(left, batch_size)))


def drawn(augmentation):
    operations = draw_epoch(6, expert_seed=7, epoch=3, augmentation=augmentation).operations
    found = [[OPERATIONS[place] for place in row] for row in operations[:4].tolist()]
    return [[(name, round(value, 2)) for name, value in row] for row in found]


def test_strong_draws_are_pinned():
    """An expert trained yesterday and one resumed today must see the same images."""
    nothing = ("Identity", 0.0)
    assert drawn(STRONG) == [
        [nothing, nothing],
        [nothing, ("TranslateY", -14.5)],
        [("ShearY", 0.27), ("TranslateY", 14.5)],
        [("TranslateY", -14.5), nothing],
    ]
    assert drawn(Augmentation("randaugment")) == [
        [("TranslateX", 4.35), ("Solarize", 178.5)],
        [("TranslateX", 4.35), ("Rotate", -9.0)],
        [("TranslateX", -4.35), ("TranslateX", 4.35)],
        [("TranslateX", 4.35), ("Brightness", -0.27)],
    ]
    holes = draw_epoch(6, expert_seed=7, epoch=3, augmentation=STRONG).holes[:4, 0]
    assert holes.tolist() == [[12, 28, 22, 38], [10, 26, 16, 32], [5, 21, 15, 31], [8, 24, 2, 18]]


@relaxed
@given(augmentation=augmentations, num=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_strong_draws_leave_the_plain_ones_alone_and_are_repeatable(augmentation, num, seed):
    plain = draw_epoch(num, seed, 5)
    strong, again = (draw_epoch(num, seed, 5, augmentation=augmentation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], strong[:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(strong, again, strict=True))
    assert all(len(values) == num for values in strong)
    policy, cutout, mixup = augmentation
    assert strong.operations.shape == (num, 2 * (policy != "plain"))
    assert strong.holes.shape == (num, int(cutout > 0), 4)
    assert strong.share.shape == (num, int(mixup > 0))
    dtypes = (torch.int64, torch.int64, torch.float32)
    assert tuple(values.dtype for values in strong[4:]) == dtypes
    assert bool(((strong.share >= 0) & (strong.share <= 1)).all())


def test_one_kind_of_draw_does_not_move_another():
    alone = draw_epoch(50, 1, 2, augmentation=Augmentation("autoaugment"))
    assert torch.equal(alone.operations, draw_epoch(50, 1, 2, augmentation=STRONG).operations)
    assert torch.equal(
        draw_epoch(50, 1, 2, augmentation=Augmentation(cutout=16)).holes,
        draw_epoch(50, 1, 2, augmentation=STRONG).holes,
    )


@pytest.mark.parametrize("change", [{"expert_seed": 2}, {"epoch": 3}])
@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_another_seed_or_epoch_draws_anew(policy, change):
    augmentation = Augmentation(policy, 16, 0.4)
    first = draw_epoch(100, **{"expert_seed": 1, "epoch": 2}, augmentation=augmentation)
    values = {"expert_seed": 1, "epoch": 2} | change
    other = draw_epoch(100, **values, augmentation=augmentation)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@relaxed
@given(augmentation=augmentations, num=st.integers(1, 20), batch_size=st.integers(1, 8))
def test_batches_have_their_shapes(augmentation, num, batch_size):
    batches = epoch_of(num, augmentation, batch_size)
    sizes = [min(batch_size, num - start) for start in range(0, num, batch_size)]
    assert [len(batch[0]) for batch in batches] == sizes
    for images, targets in batches:
        targets = targets if augmentation.mixup else (targets,)
        assert images.shape[1:] == (3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert bool(torch.isfinite(images).all())
        for part in targets[:2]:
            assert part.shape == (len(images),)
            assert part.dtype == torch.int64
        if augmentation.mixup:
            assert targets[2].shape == ()
            assert targets[2].dtype == torch.float32
    order = draw_epoch(num, 1, 2).order
    own = [batch[1][0] if augmentation.mixup else batch[1] for batch in batches]
    assert torch.equal(torch.cat(own), order * 3)


@relaxed
@given(augmentation=augmentations, seen=st.integers(0, 5))
def test_an_epoch_resumed_in_its_middle_goes_on_as_it_would_have(augmentation, seen):
    whole = epoch_of(22, augmentation, 4)
    rest = epoch_of(22, augmentation, 4, seen=4 * seen)
    assert len(rest) == 6 - seen
    for (images, targets), (others, their_targets) in zip(whole[seen:], rest, strict=True):
        assert torch.equal(images, others)
        if not augmentation.mixup:
            targets, their_targets = (targets,), (their_targets,)
        assert all(torch.equal(a, b) for a, b in zip(targets, their_targets, strict=True))


def test_an_epoch_goes_through_crop_policy_normalisation_cutout_and_mixup_in_this_order():
    num, batch_size = 22, 8
    random = np.random.RandomState(num)
    padded = pad(torch.from_numpy(random.randint(0, 256, (num, 32, 32, 3), dtype=np.uint8)))
    draws = draw_epoch(num, 1, 2, augmentation=STRONG)
    assert (draws.operations != 0).any(0).all()
    images = []
    for k in range(num):
        one = slice(k, k + 1)
        pixels = crop_and_flip(padded, *(values[one] for values in draws[:4]))
        image = pixels[0].permute(2, 0, 1)
        for place in draws.operations[k].tolist():
            image = torchvision_op(image, *OPERATIONS[place])
        top, bottom, left, right = draws.holes[k, 0].clamp(0, 32).tolist()
        image = normalise(image.permute(1, 2, 0)[None])[0]
        image[:, top:bottom, left:right] = 0
        images.append(image)
    for number, (got, (targets, partner, share)) in enumerate(epoch_of(num, STRONG, batch_size)):
        members = list(range(number * batch_size, min(num, (number + 1) * batch_size)))
        assert share == draws.share[members[0], 0]
        for row, k in enumerate(members):
            other = members[row - 1]
            expected = share * images[k] + (1 - share) * images[other]
            torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-6)
            assert targets[row] == draws.order[k] * 3
            assert partner[row] == draws.order[other] * 3


def test_plain_is_nothing():
    assert Augmentation("plain", 0, 0.0) == PLAIN
    for values in draw_epoch(5, 1, 1)[4:]:
        assert values.shape[1] == 0


def test_seeds_of_the_draws_are_derived_from_their_names():
    draws = draw_epoch(9, 1, 2, augmentation=STRONG)
    seeds = {name: derive_seed(1, name, 2) for name in ("autoaugment", "cutout", "mixup")}
    assert torch.equal(draws.operations, draw_operations("autoaugment", 9, seeds["autoaugment"]))
    assert torch.equal(draws.holes, draw_holes(16, 9, seeds["cutout"]))
    assert torch.equal(draws.share, draw_shares(0.4, 9, seeds["mixup"]))
