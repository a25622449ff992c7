"""The learning rate, a pure function of the optimiser step. Steps and epochs count from 0."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence


def lr_at(
    step: int,
    *,
    lr: float,
    lr_decay: float,
    milestones: tuple[int, ...],
    warmup_steps: int,
    steps_per_epoch: int,
    warmup_epochs: int = 0,
    cosine_epochs: int | None = None,
) -> float:
    """lr * lr_decay^(milestones passed) * min(1, (step + 1) / warmup_steps).

    Milestones are epochs: m acts from step m * steps_per_epoch on. The linear warm-up reaches
    its full value at step warmup_steps - 1; 0 and 1 both mean none. `warmup_epochs` E: a factor
    min(1, (epoch + 1) / E), constant within an epoch, as in the code of LDAM (Cao et al., NeurIPS
    2019). `cosine_epochs` E, in place of milestones: (1 + cos(pi step / (E steps_per_epoch))) / 2
    (Loshchilov and Hutter, ICLR 2017, eq. 5, without restarts).
    """
    epoch = step // steps_per_epoch
    if cosine_epochs is None:
        rate = lr * lr_decay ** bisect_right(milestones, epoch)
    else:
        rate = lr * (1 + math.cos(math.pi * step / (cosine_epochs * steps_per_epoch))) / 2
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if warmup_epochs:
        warmup *= min(1.0, (epoch + 1) / warmup_epochs)
    return rate * warmup


def reweighted_from(reweight_from: int | None, milestones: Sequence[int]) -> int:
    """The epoch from which a deferred loss weighs classes; the first milestone if none is given."""
    return min(milestones, default=0) if reweight_from is None else reweight_from


def steps_worth_logging(*, warmup_steps: int, steps_per_epoch: int, epochs: int) -> list[int]:
    """Each warm-up step, then the first of each epoch (every change falls on one of these, but
    for a cosine's, which is drawn with a point an epoch)."""
    total = steps_per_epoch * epochs
    warm = range(min(warmup_steps, total))
    return sorted({*warm, *range(0, total, steps_per_epoch)})


def lr_by_epoch(
    lr_of: Callable[[int], float], epochs: int, steps_per_epoch: int
) -> list[tuple[int, int, float, float]]:
    """(first epoch, last epoch, rate at its first step, rate at its last step), where epochs of
    one and the same rate share a row."""
    rows: list[tuple[int, int, float, float]] = []
    for epoch in range(epochs):
        start, end = lr_of(epoch * steps_per_epoch), lr_of((epoch + 1) * steps_per_epoch - 1)
        if rows and start == end and rows[-1][2:] == (start, end):
            rows[-1] = (rows[-1][0], epoch, start, end)
        else:
            rows.append((epoch, epoch, start, end))
    return rows
