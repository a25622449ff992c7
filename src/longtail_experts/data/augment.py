"""The strong augmentation of long-tail papers: AutoAugment or RandAugment, Cutout, mixup.

Order: crop and flip, operations of the policy, normalisation, Cutout, mixup. What chance decides
is drawn here as plain values, a row an image, and applied to a whole batch at once.

The operations, their magnitudes and their chances are those of `torchvision.transforms.AutoAugment`
and `RandAugment` on tensors, bit for bit (`transforms.v2` rounds some of them differently). The
published long-tail results come from other code, PaCo's and BalPoE-CalibratedLT's, which differs:

- Their `CIFAR10Policy` is the port of AutoAugment to PIL by DeepVoltaire. Sub-policies, levels and
  probabilities agree, but what a shear, a shift or a rotation uncovers is grey (128), with
  torchvision black; angles are positive, here of either sign; shears are bicubic, here of the
  nearest pixel; shifts are not cut to whole pixels, and solarize counts from 256 instead of 255.
- They normalise CIFAR-100 by CIFAR-10's means and deviations, as LDAM's code does; here by its own.
- They cut out before the normalisation: a black hole. Here it is 0 after it, the mean colour, as
  in DeVries and Taylor's paper and code.
- Like them, and unlike Cubuk et al., whose own code runs the policy first, crop and flip come
  before the policy.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtail_experts.data.sources import SIZE


class Augmentation(NamedTuple):
    """What is done to training images beside crop and flip."""

    policy: str = "plain"  # or "autoaugment", "randaugment"
    cutout: int = 0  # side of the hole in pixels; 0: none
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); 0: none


PLAIN = Augmentation()

# --- operations -------------------------------------------------------------------------------


class Operation(NamedTuple):
    name: str
    magnitude: float = 0.0


# The 25 sub-policies found on CIFAR-10: (operation, probability, level of 0..9) twice. Cubuk et
# al., AutoAugment (CVPR 2019), appendix. Operations without a magnitude have level 0 here.
AUTOAUGMENT = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
AUTOAUGMENT_LEVELS = 10
# Cubuk et al., RandAugment (2020), with torchvision's defaults: 2 operations an image, each at
# level 9 of 0..30.
RANDAUGMENT = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
RANDAUGMENT_OPERATIONS, RANDAUGMENT_LEVEL, RANDAUGMENT_LEVELS = 2, 9, 31

# Magnitudes that have a sign, by the largest: tangent of the shear, pixels of the shift, degrees of
# the rotation, and what is added to the factor 1 of an enhancement.
SIGNED = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331 * SIZE,
    "TranslateY": 150 / 331 * SIZE,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}


def magnitude(name: str, level: int, num_levels: int) -> float:
    """Without its sign; of Posterize the bits kept, of Solarize the first grey that is inverted."""
    if name in SIGNED:
        return float(torch.linspace(0, SIGNED[name], num_levels)[level])
    if name == "Solarize":
        return float(torch.linspace(255, 0, num_levels)[level])
    return 8.0 - round(4 * level / (num_levels - 1)) if name == "Posterize" else 0.0


def either_sign(name: str, level: int, num_levels: int) -> tuple[Operation, Operation]:
    """(minus, plus); twice the same where the magnitude has no sign."""
    plus = magnitude(name, level, num_levels)
    return Operation(name, -plus if name in SIGNED else plus), Operation(name, plus)


def _pixels() -> Any:
    """torchvision's functions on images. It brings torch's compiler with it, which takes seconds
    that plain batches need not wait for."""
    import torchvision.transforms.functional as functional

    return functional


def _equalize(images: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(images)


def _shift(images: Tensor, x: float = 0, y: float = 0) -> Tensor:
    return _pixels().affine(images, angle=0, translate=[int(x), int(y)], scale=1, shear=[0.0, 0.0])


def _shear(images: Tensor, x: float = 0, y: float = 0) -> Tensor:
    """About the upper left corner, by tangents."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _pixels().affine(
        images, angle=0, translate=[0, 0], scale=1, shear=degrees, center=[0, 0]
    )


# (images uint8 [B, 3, H, W], magnitude) -> the same shape. All treat the images of a batch one by
# one. `equalize` is v2's: the same pixels as the other, which loops over images and channels.
KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda images, _: images,
    "ShearX": lambda images, tangent: _shear(images, x=tangent),
    "ShearY": lambda images, tangent: _shear(images, y=tangent),
    "TranslateX": lambda images, pixels: _shift(images, x=pixels),
    "TranslateY": lambda images, pixels: _shift(images, y=pixels),
    "Rotate": lambda images, degrees: _pixels().rotate(images, degrees),
    "Brightness": lambda images, extra: _pixels().adjust_brightness(images, 1 + extra),
    "Color": lambda images, extra: _pixels().adjust_saturation(images, 1 + extra),
    "Contrast": lambda images, extra: _pixels().adjust_contrast(images, 1 + extra),
    "Sharpness": lambda images, extra: _pixels().adjust_sharpness(images, 1 + extra),
    "Posterize": lambda images, bits: _pixels().posterize(images, int(bits)),
    "Solarize": lambda images, threshold: _pixels().solarize(images, threshold),
    "AutoContrast": lambda images, _: _pixels().autocontrast(images),
    "Equalize": lambda images, _: _equalize(images),
    "Invert": lambda images, _: _pixels().invert(images),
}

_AUTO = [
    [either_sign(name, level, AUTOAUGMENT_LEVELS) for name, _, level in pair]
    for pair in AUTOAUGMENT
]
_RAND = [either_sign(name, RANDAUGMENT_LEVEL, RANDAUGMENT_LEVELS) for name in RANDAUGMENT]
# Everything that can be drawn; a draw is a place in this list, 0 is Identity.
OPERATIONS = tuple(
    dict.fromkeys(
        [Operation("Identity")]
        + [operation for pair in _AUTO for signs in pair for operation in signs]
        + [operation for signs in _RAND for operation in signs]
    )
)
_AUTO_PLACES = torch.tensor([[[OPERATIONS.index(o) for o in s] for s in pair] for pair in _AUTO])
_RAND_PLACES = torch.tensor([[OPERATIONS.index(o) for o in signs] for signs in _RAND])
_AUTO_CHANCES = torch.tensor([[probability for _, probability, _ in p] for p in AUTOAUGMENT])


def autoaugment_operations(which: Tensor, chance: Tensor, sign: Tensor) -> Tensor:
    """int64 [N, 2], the operations of sub-policies `which` [N].

    One acts where its chance, float [N, 2] in [0, 1), is at most its probability; sign int64
    [N, 2]: 0 minus, 1 plus.
    """
    places = _AUTO_PLACES[which].gather(2, sign[..., None])[..., 0]
    return torch.where(chance <= _AUTO_CHANCES[which], places, 0)


def randaugment_operations(which: Tensor, sign: Tensor) -> Tensor:
    """int64 [N, K] places in OPERATIONS; which int64 [N, K] places in RANDAUGMENT."""
    return _RAND_PLACES[which, sign]


def apply_operations(images: Tensor, operations: Tensor) -> Tensor:
    """images uint8 [B, 3, H, W], each through the operations of its row, one after another.

    operations int64 [B, K], on the CPU: it is there that the kernels are chosen, each for all
    images of the batch that go through it together.
    """
    for column in operations.T:
        order = column.argsort(stable=True)
        places, counts = column[order].unique_consecutive(return_counts=True)
        order = order.to(images.device)
        parts = images[order].split(counts.tolist())
        done = [
            KERNELS[OPERATIONS[place].name](part, OPERATIONS[place].magnitude)
            for place, part in zip(places.tolist(), parts, strict=True)
        ]
        images = torch.cat(done)[order.argsort()]
    return images


# --- holes and mixtures -----------------------------------------------------------------------


def cut_out(images: Tensor, holes: Tensor) -> Tensor:
    """images float32 [B, 3, H, W], 0 in the holes of each: int64 [B, K, 4] (top, bottom, left,
    right), without bottom and right themselves; may stick out of the image."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    for top, bottom, left, right in holes[..., None].permute(1, 2, 0, 3):  # each [B, 1]
        in_rows = (rows >= top) & (rows < bottom)  # [B, H]
        in_columns = (columns >= left) & (columns < right)  # [B, W]
        inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
        images = torch.where(inside, 0.0, images)
    return images


def mix(values: Tensor, share: Tensor) -> Tensor:
    """values float [B, ...], each with its partner: share * own + (1 - share) * partner's."""
    return share * values + (1 - share) * partners(values)


def partners(values: Tensor) -> Tensor:
    """What each is mixed with: the one before it in the batch, the last for the first.

    Zhang et al. permute the batch at random. Its order is random already, and so none is mixed
    with itself, unless it is alone.
    """
    return values.roll(1, 0)


# --- draws ------------------------------------------------------------------------------------


def draw_operations(policy: str, num_images: int, seed: int) -> Tensor:
    """int64 [N, K], places in OPERATIONS; K is 0 for "plain", else 2."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, 2)
    if policy == "plain":
        return torch.empty((num_images, 0), dtype=torch.int64)
    if policy == "autoaugment":
        which = torch.randint(len(AUTOAUGMENT), (num_images,), generator=generator)
        chance = torch.rand(shape, generator=generator)
        sign = torch.randint(2, shape, generator=generator)
        return autoaugment_operations(which, chance, sign)
    if policy == "randaugment":
        shape = (num_images, RANDAUGMENT_OPERATIONS)
        which = torch.randint(len(RANDAUGMENT), shape, generator=generator)
        return randaugment_operations(which, torch.randint(2, shape, generator=generator))
    raise ValueError(f"no policy {policy!r}: plain, autoaugment or randaugment")


def draw_holes(side: int, num_images: int, seed: int) -> Tensor:
    """int64 [N, K, 4], for `cut_out`; K is 0 where `side` is, else 1.

    Squares around a pixel anywhere in the image: DeVries and Taylor, Improved regularization of
    convolutional neural networks with Cutout (2017). At an even side, from side/2 before the
    pixel to side/2 - 1 behind it, as theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(SIZE, (num_images, int(side > 0), 2), generator=generator)
    first = centre - side // 2
    return torch.stack([first, first + side], dim=3).flatten(2)


def draw_shares(alpha: float, num_images: int, seed: int) -> Tensor:
    """float32 [N, K] of Beta(alpha, alpha); K is 0 where `alpha` is, else 1.

    A batch takes the share of its first image: one share a batch, as Zhang et al., mixup (ICLR
    2018). From numpy's RandomState, whose streams never change.
    """
    if alpha == 0:
        return torch.empty(num_images, 0)
    shares = np.random.RandomState(seed).beta(alpha, alpha, (num_images, 1))
    return torch.from_numpy(shares).float()
