import hashlib
from itertools import starmap

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF

from longtail_experts.data.batches import (
    MEAN,
    PADDING,
    STD,
    batches_of,
    crop_and_flip,
    derive_seed,
    draw_epoch,
    loader_of,
    normalise,
    pad,
    plain_batches,
)


def random_images(num: int, height: int = 32, width: int = 32) -> torch.Tensor:
    random = np.random.RandomState(num)
    return torch.from_numpy(random.randint(0, 256, (num, height, width, 3), dtype=np.uint8))


def torchvision_crop(image, top, left, flip):
    """One uint8 [H, W, 3] image the usual way: pad 4, crop, mirror."""
    chw = image.permute(2, 0, 1)
    cropped = TF.crop(TF.pad(chw, [4]), int(top), int(left), *chw.shape[1:])
    return (TF.hflip(cropped) if flip else cropped).permute(1, 2, 0)


# --- seeds ------------------------------------------------------------------------------------


def test_derived_seeds_are_pinned():
    assert derive_seed(42, "pool", 0) == 227_361_664
    assert derive_seed(0, "ce") == 1_839_768_192


@pytest.mark.parametrize("parts", [(42, "pool", 0), (0, "ce"), ("é", 7), ()])
def test_derived_seed_is_the_head_of_a_sha256(parts):
    text = ":".join(map(str, parts))
    assert derive_seed(*parts) == int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) // 2


def test_derived_seeds_differ_and_fit():
    seeds = {derive_seed(s, what, c) for s in range(5) for what in ("a", "b") for c in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**31 for seed in seeds)


# --- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, 5])
def test_normalise_equals_torchvision(num):
    images = random_images(num)
    usual = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    expected = [usual(image.numpy()) for image in images]
    got = normalise(images)
    assert got.shape == (num, 3, 32, 32)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_mean_and_deviation_are_those_of_cifar100():
    assert MEAN == (0.5071, 0.4865, 0.4409)
    assert STD == (0.2673, 0.2564, 0.2762)


def test_pad_equals_torchvision():
    images = random_images(3, 32, 20)
    expected = TF.pad(images.permute(0, 3, 1, 2), [4]).permute(0, 2, 3, 1)
    assert torch.equal(pad(images), expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (8, 12)])
def test_every_crop_equals_torchvision(size, flip):
    images = random_images(3, *size)
    corners = [(top, left) for top in range(2 * PADDING + 1) for left in range(2 * PADDING + 1)]
    top, left = torch.tensor(corners).T
    index = torch.arange(len(corners)) % 3
    got = crop_and_flip(pad(images), index, top, left, torch.full((len(corners),), flip))
    assert got.dtype == torch.uint8
    expected = [
        torchvision_crop(images[i], t, x, flip) for i, t, x in zip(index, top, left, strict=True)
    ]
    assert torch.equal(got, torch.stack(expected))


def test_each_image_of_a_batch_has_its_own_crop_and_flip():
    images = random_images(20)
    draws = draw_epoch(20, expert_seed=1, epoch=0)
    assert 0 < draws.flip.sum() < 20
    expected = [torchvision_crop(images[i], t, x, f) for i, t, x, f in zip(*draws[:4], strict=True)]
    assert torch.equal(crop_and_flip(pad(images), *draws[:4]), torch.stack(expected))


# --- draws ------------------------------------------------------------------------------------


def test_draws_are_a_permutation_and_within_range():
    draws = draw_epoch(5000, expert_seed=3, epoch=2)
    assert torch.equal(draws.order.sort().values, torch.arange(5000))
    for offset in (draws.top, draws.left):
        share = torch.bincount(offset, minlength=9) / 5000
        assert len(share) == 9
        assert ((share - 1 / 9).abs() < 0.03).all()  # 6.8 standard errors
    assert draws.flip.dtype == torch.bool
    assert abs(draws.flip.float().mean() - 0.5) < 0.05
    assert not torch.equal(draws.top, draws.left)


def test_draws_are_pinned():
    """An expert trained yesterday and one resumed today must see the same images."""
    draws = draw_epoch(8, expert_seed=7, epoch=3)
    assert [x.int().tolist() for x in draws[:4]] == [
        [3, 0, 4, 6, 1, 5, 7, 2],
        [3, 8, 2, 0, 4, 4, 4, 5],
        [8, 0, 8, 5, 6, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 1],
    ]


def test_draws_depend_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = draw_epoch(100, expert_seed=7, epoch=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = draw_epoch(100, expert_seed=7, epoch=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("change", [{"expert_seed": 8}, {"epoch": 4}])
def test_another_seed_or_epoch_draws_anew(change):
    first = draw_epoch(100, **{"expert_seed": 7, "epoch": 3})
    other = draw_epoch(100, **{"expert_seed": 7, "epoch": 3} | change)
    assert not any(torch.equal(a, b) for a, b in zip(first[:4], other[:4], strict=True))


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 5, [3]), (1, 1, [1])],
)
def test_an_epoch_visits_each_image_once(num, batch_size, sizes):
    draws = draw_epoch(num, expert_seed=0, epoch=0)
    load = loader_of(random_images(num), torch.arange(num) * 11, "cpu")
    batches = list(starmap(load, batches_of(draws, batch_size)))
    assert [len(images) for images, _ in batches] == sizes
    assert [len(part) for _, part in batches] == sizes
    assert torch.equal(torch.cat([part for _, part in batches]), draws.order * 11)


def test_batches_hold_the_augmented_image_of_each_target():
    images, draws = random_images(10), draw_epoch(10, expert_seed=5, epoch=1)
    batches = list(starmap(loader_of(images, torch.arange(10), "cpu"), batches_of(draws, 4)))
    usual = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    got = torch.cat([part for part, _ in batches])
    for k, (i, top, left, flip) in enumerate(zip(*draws[:4], strict=True)):
        expected = usual(torchvision_crop(images[i], top, left, flip).numpy())
        torch.testing.assert_close(got[k], expected, rtol=0, atol=1e-6)


def test_plain_batches_keep_order_and_pixels():
    images = random_images(10)
    batches = list(plain_batches(images, 4, "cpu"))
    assert [len(part) for part in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), normalise(images))
