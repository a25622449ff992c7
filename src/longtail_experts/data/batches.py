"""Augmentation and batching of uint8 images that live on the device.

The random draws of an epoch are plain values, made on the CPU from (expert seed, epoch): the
same on every device, and resuming at an epoch needs no generator state.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail_experts.data.augment import (
    PLAIN,
    Augmentation,
    apply_operations,
    cut_out,
    draw_holes,
    draw_operations,
    draw_shares,
    mix,
    partners,
)

PADDING = 4
GPU_BATCH = 1024
# Per channel, of the 50,000 CIFAR-100 training images scaled to [0, 1].
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)
_ON_THE_CPU = torch.tensor(MEAN), torch.tensor(STD)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) from anything that prints, the same on every machine and version."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in channels-last memory."""
    mean, std = _mean_and_std(images.device)
    return (images / 255).sub_(mean).div_(std).permute(0, 3, 1, 2)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Once a device: while a CUDA graph is recorded, nothing can be sent there. For the CPU at the
    import: made while torch.export traces, they would have no values."""
    if device.type == "cpu":
        return _ON_THE_CPU
    with torch.inference_mode(False):
        return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def pad(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] with PADDING black pixels on every side."""
    num, height, width, channels = images.shape
    padded = images.new_zeros(num, height + 2 * PADDING, width + 2 * PADDING, channels)
    padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = images
    return padded


class EpochDraws(NamedTuple):
    """What chance decides in one epoch, a row an image, in the order in which they are visited.

    The last three have as many columns as there is to do: none, unless an augmentation asks.
    """

    order: Tensor  # int64 [N], a permutation
    top: Tensor  # int64 [N], 0..2*PADDING, first row of the crop
    left: Tensor  # int64 [N]
    flip: Tensor  # bool [N]
    operations: Tensor  # int64 [N, 0 or 2], places in augment.OPERATIONS; on the CPU
    holes: Tensor  # int64 [N, 0 or 1, 4], edges of what Cutout blanks
    share: Tensor  # float32 [N, 0 or 1], of mixup; a batch takes that of its first image


def draw_epoch(
    num_images: int,
    expert_seed: int,
    epoch: int,
    device: str = "cpu",
    augmentation: Augmentation = PLAIN,
) -> EpochDraws:
    """Each kind of draw has its own seed: order, crop and flip are the same under every
    augmentation, and mixup changes nothing of the policy."""
    generator = torch.Generator().manual_seed(derive_seed(expert_seed, "epoch", epoch))
    order = torch.randperm(num_images, generator=generator)
    offsets = torch.randint(0, 2 * PADDING + 1, (2, num_images), generator=generator)
    flip = torch.rand(num_images, generator=generator) < 0.5
    policy, cutout, mixup = augmentation
    operations = draw_operations(policy, num_images, derive_seed(expert_seed, policy, epoch))
    holes = draw_holes(cutout, num_images, derive_seed(expert_seed, "cutout", epoch))
    share = draw_shares(mixup, num_images, derive_seed(expert_seed, "mixup", epoch))
    order, top, left, flip, holes, share = (
        x.to(device) for x in (order, *offsets, flip, holes, share)
    )
    return EpochDraws(order, top, left, flip, operations, holes, share)


def crop_and_flip(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Images `index` of `padded`, each cropped at (top, left), mirrored where `flip`.

    padded uint8 [N, H + 8, W + 8, 3]; index, top, left int64 [B]; flip bool [B]
    -> uint8 [B, H, W, 3]. Index arithmetic only, so it can be captured in a CUDA graph.
    """
    height, width = padded.shape[1] - 2 * PADDING, padded.shape[2] - 2 * PADDING
    rows = top[:, None] + torch.arange(height, device=padded.device)  # [B, H]
    across = torch.arange(width, device=padded.device).expand(len(index), -1)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - across, across)  # [B, W]
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches_of(draws: EpochDraws, batch_size: int) -> Iterator[EpochDraws]:
    """The draws of one batch after another; the last may be short."""
    return map(EpochDraws._make, zip(*(x.split(batch_size) for x in draws), strict=True))


def load_batch(
    padded: Tensor,
    targets: Tensor,
    index: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    operations: Tensor,
    holes: Tensor,
    share: Tensor,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
    """(images float32 [B, 3, H, W], targets int64 [B]) of a batch's draws.

    With mixup the targets are three: own int64 [B], the partners' int64 [B], share float32 []; the
    loss is share * L(own) + (1 - share) * L(partners'). Without a policy nothing is read back from
    the device and nothing sent there, so it can be recorded with the step that follows.
    """
    pixels = crop_and_flip(padded, index, top, left, flip)
    if operations.shape[1]:
        planes = apply_operations(pixels.permute(0, 3, 1, 2), operations)
        pixels = planes.permute(0, 2, 3, 1).contiguous()
    images, own = cut_out(normalise(pixels), holes), targets[index]
    if share.shape[1]:
        return mix(images, share[0, 0]), (own, partners(own), share[0, 0])
    return images, own


def loader_of(pixels: Tensor, targets: Tensor, device: str) -> Callable[..., Any]:
    """`load_batch` of images uint8 [N, H, W, 3] and their targets, which live on `device`."""
    return functools.partial(load_batch, pad(pixels).to(device), targets.to(device))


def plain_batches(images: Tensor, batch_size: int, device: str) -> Iterator[Tensor]:
    """Normalised batches, in order and without augmentation, of uint8 images [N, H, W, 3].

    On a GPU of at least GPU_BATCH: a forward pass of few images costs what its kernels cost to
    start, and keeps nothing for a backward pass.
    """
    for part in images.split(batch_size if device == "cpu" else max(batch_size, GPU_BATCH)):
        yield normalise(part.to(device))
