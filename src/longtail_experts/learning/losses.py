"""The losses an expert can be trained under, and what its logits mean afterwards.

With class counts n_c of the `train` split and prior pi_c = n_c / n, a loss is a function of
logits f [N, C] and targets int64 [N], and of terms [C] that follow from the counts. Which f
minimises it differs. `log_offset` says it: `f + log_offset` is the log-posterior under the
training prior, up to a constant per image. Calibration and every later change of prior start
from that. Where no constant vector makes it so (focusing, margins), the offset is that of the loss
without them, and the loss is marked as approximate.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longtail_experts.learning.resnet import COSINE_SCALE

LARGEST_MARGIN = 0.5  # of LDAM, in cosines: the authors' value


class Knobs(NamedTuple):
    """What some losses can be tuned by."""

    tau: float = 1.0  # logit_adjust: strength of the adjustment
    beta: float = 0.9999  # class_balanced, ldam_drw: of the effective number of images
    gamma: float = 2.0  # focal: how much easy images are played down


Objective = Callable[[Tensor, Tensor], Tensor]  # (logits [N, C], targets [N]) -> mean loss, nats


# --- what follows from the counts -------------------------------------------------------------


def prior_of(class_counts: Tensor) -> Tensor:
    """Class frequencies [C], float64, of counts [C] that are all at least one."""
    if not bool((class_counts > 0).all()):
        empty = torch.nonzero(class_counts <= 0).flatten().tolist()
        raise ValueError(f"class_counts: classes {empty} have no training image")
    counts = class_counts.to(torch.float64)
    return counts / counts.sum()


def zeros(class_counts: Tensor, knobs: Knobs) -> Tensor:
    return torch.zeros(len(class_counts), dtype=torch.float64)


def log_counts(class_counts: Tensor, knobs: Knobs) -> Tensor:
    prior_of(class_counts)  # refuses an empty class
    return class_counts.to(torch.float64).log()


def log_prior(class_counts: Tensor, knobs: Knobs) -> Tensor:
    return prior_of(class_counts).log()


def tau_log_prior(class_counts: Tensor, knobs: Knobs) -> Tensor:
    return knobs.tau * log_prior(class_counts, knobs)


def balancing_weights(class_counts: Tensor, knobs: Knobs) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), scaled to a mean of 1: Cui, Jia, Lin, Song, Belongie,
    *Class-balanced loss based on effective number of samples* (CVPR 2019), eq. 2 and sec. 4.1."""
    prior_of(class_counts)
    weights = (1 - knobs.beta) / (1 - knobs.beta ** class_counts.to(torch.float64))
    return weights / weights.mean()


def minus_log_weights(class_counts: Tensor, knobs: Knobs) -> Tensor:
    """Weights w multiply each class's part of the risk: f learns log posterior + log w."""
    return -balancing_weights(class_counts, knobs).log()


def ldam_margins(class_counts: Tensor, knobs: Knobs) -> Tensor:
    """n_c^(-1/4), scaled so that the largest is 0.5 in cosines: Cao et al. (2019), eq. 13."""
    prior_of(class_counts)
    margins = class_counts.to(torch.float64) ** -0.25
    return COSINE_SCALE * LARGEST_MARGIN * margins / margins.max()


# --- losses: means over the batch, in nats, summed in float32 or wider ------------------------


def shifted_cross_entropy(logits: Tensor, targets: Tensor, shift: Tensor) -> Tensor:
    """-log softmax(f + shift)[y]; shift [C].

    0: cross-entropy; tau log prior: Menon et al., *Long-tail learning via logit adjustment*
    (ICLR 2021), eq. 10; log counts: Ren et al., *Balanced meta-softmax for long-tailed visual
    recognition* (NeurIPS 2020), eqs. 3, 4.
    """
    return F.cross_entropy(logits.float() + shift, targets)


def class_balanced_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """w_y (-log softmax(f)[y]), weights w [C] of mean 1: Cui et al. (CVPR 2019), sec. 4."""
    return (weights[targets] * F.cross_entropy(logits.float(), targets, reduction="none")).mean()


def focal(logits: Tensor, targets: Tensor, gamma: Tensor) -> Tensor:
    """(1 - p_y)^gamma (-log p_y), p = softmax(f): Lin, Goyal, Girshick, He, Dollár, *Focal loss
    for dense object detection* (ICCV 2017), eq. 4, with softmax for many classes."""
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    # 1 - p is at least one rounding step, so that the gradient of its power stays finite.
    missing = (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).eps)
    return (missing**gamma * nll).mean()


def ldam(logits: Tensor, targets: Tensor, margins: Tensor, weights: Tensor) -> Tensor:
    """w_y (-log softmax(f - margin_y e_y)[y]) / (mean of w_y over the batch); margins, weights [C].

    Cao, Wei, Gaidon, Arechiga, Ma, *Learning imbalanced datasets with label-distribution-aware
    margin loss* (NeurIPS 2019), eq. 12; the mean is weighted as in the authors' code. f are
    cosines times 30, margins are in the same units.
    """
    lowered = logits.float() - F.one_hot(targets, logits.shape[1]) * margins
    return F.cross_entropy(lowered, targets, weight=weights)


MixedTargets = tuple[Tensor, Tensor, Tensor]  # own [N], partners' [N], share [] of the own


def mixed(objective: Objective, logits: Tensor, targets: Tensor | MixedTargets) -> Tensor:
    """share * L(f, own) + (1 - share) * L(f, partners'): Zhang, Cisse, Dauphin, Lopez-Paz, *mixup*
    (ICLR 2018), eq. 2 in the form of the authors' code, which is the same for cross-entropy."""
    if isinstance(targets, Tensor):
        return objective(logits, targets)
    own, partners, share = targets
    return share * objective(logits, own) + (1 - share) * objective(logits, partners)


class Loss(NamedTuple):
    """`terms` and `log_offset` map (class_counts [C], knobs) to float64 tensors [C]."""

    function: Callable[..., Tensor]
    terms: Callable[[Tensor, Knobs], dict[str, Tensor]]
    log_offset: Callable[[Tensor, Knobs], Tensor]
    is_exact: bool = True  # whether f + log_offset is the log-posterior for the minimiser f
    is_deferred: bool = False  # weights act late in the training only
    head: str = "linear"  # of the network


# At tau 1, logit_adjust and balanced_softmax are the same function: log n_c and log pi_c differ
# by the constant log n, which softmax does not see. Two experts of theirs differ by seed alone.
LOSSES = {
    "ce": Loss(shifted_cross_entropy, lambda n, k: {"shift": zeros(n, k)}, zeros),
    "logit_adjust": Loss(
        shifted_cross_entropy, lambda n, k: {"shift": tau_log_prior(n, k)}, tau_log_prior
    ),
    "balanced_softmax": Loss(
        shifted_cross_entropy, lambda n, k: {"shift": log_counts(n, k)}, log_prior
    ),
    "class_balanced": Loss(
        class_balanced_cross_entropy,
        lambda n, k: {"weights": balancing_weights(n, k)},
        minus_log_weights,
    ),
    "focal": Loss(
        focal,
        lambda n, k: {"gamma": torch.tensor(k.gamma, dtype=torch.float64)},
        zeros,
        is_exact=False,
    ),
    "ldam_drw": Loss(
        ldam,
        lambda n, k: {"margins": ldam_margins(n, k), "weights": balancing_weights(n, k)},
        minus_log_weights,
        is_exact=False,
        is_deferred=True,
        head="cosine",
    ),
}
# Knobs that act under some losses only; elsewhere the same expert comes out at any value.
KNOBS_OF: dict[str, tuple[str, ...]] = {
    "ce": (),
    "logit_adjust": ("tau",),
    "balanced_softmax": (),
    "class_balanced": ("beta",),
    "focal": ("gamma",),
    "ldam_drw": ("beta", "reweight_from"),
}
SHIFTED = tuple(name for name, loss in LOSSES.items() if loss.function is shifted_cross_entropy)


def objective_of(
    name: str,
    class_counts: Tensor,
    knobs: Knobs,
    device: str | torch.device = "cpu",
    is_reweighted: bool = True,
) -> Objective:
    """The loss `name` with its terms, float32, on `device`.

    is_reweighted False: what a deferred loss is before its weights act (Cao et al., alg. 1).
    """
    loss = LOSSES[name]
    terms = loss.terms(class_counts, knobs)
    if loss.is_deferred and not is_reweighted:
        terms["weights"] = torch.ones_like(terms["weights"])
    return partial(loss.function, **{key: t.float().to(device) for key, t in terms.items()})
