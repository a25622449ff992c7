"""The losses an expert can be trained under, and what its logits mean afterwards.

With class counts n_c of the `train` split and prior pi_c = n_c / n, every loss here is softmax
cross-entropy of shifted logits. What differs is the shift, and so which function f is fitted.
`log_offset` says it: `f + log_offset` is the log-posterior under the training prior, up to a
constant per image. Calibration and every later change of prior start from that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def prior_of(class_counts: Tensor) -> Tensor:
    """Class frequencies [C], float64, of counts [C] that are all at least one."""
    if not bool((class_counts > 0).all()):
        empty = torch.nonzero(class_counts <= 0).flatten().tolist()
        raise ValueError(f"class_counts: classes {empty} have no training image")
    counts = class_counts.to(torch.float64)
    return counts / counts.sum()


def no_shift(class_counts: Tensor, tau: float) -> Tensor:
    return torch.zeros(len(class_counts), dtype=torch.float64)


def log_counts(class_counts: Tensor, tau: float) -> Tensor:
    prior_of(class_counts)  # refuses an empty class
    return class_counts.to(torch.float64).log()


def log_prior(class_counts: Tensor, tau: float) -> Tensor:
    return prior_of(class_counts).log()


def tau_log_prior(class_counts: Tensor, tau: float) -> Tensor:
    return tau * log_prior(class_counts, tau)


class Loss(NamedTuple):
    """`train_shift` and `log_offset` map (class_counts [C], tau) to float64 [C]."""

    train_shift: Callable[[Tensor, float], Tensor]
    log_offset: Callable[[Tensor, float], Tensor]


# At tau 1, logit_adjust and balanced_softmax are the same function: log n_c and log pi_c differ
# by the constant log n, which softmax does not see. Two experts of theirs differ by seed alone.
LOSSES = {
    "ce": Loss(no_shift, no_shift),
    # Menon et al., Long-tail learning via logit adjustment (ICLR 2021), eq. 10
    "logit_adjust": Loss(tau_log_prior, tau_log_prior),
    # Ren et al., Balanced Meta-Softmax for long-tailed visual recognition (NeurIPS 2020)
    "balanced_softmax": Loss(log_counts, log_prior),
}


def shifted_cross_entropy(logits: Tensor, targets: Tensor, shift: Tensor) -> Tensor:
    """Mean over the batch, in nats, of -log softmax(logits + shift)[target].

    logits [N, C], targets int64 [N], shift [C]; the sum is taken in float32 or wider.
    """
    return F.cross_entropy(logits.float() + shift, targets)
