"""Every figure of one expert on one test split, out of its logits."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from longtail_experts.learning.calibration import deployment_scores, posthoc_scores
from longtail_experts.learning.metrics import (
    accuracies,
    mean_over,
    per_class_recall,
    proper_scores,
)


def evaluate(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    log_offset: Tensor,
    prior: Tensor,
    deployment: Tensor,
    groups: Mapping[str, Tensor],
) -> dict[str, float]:
    """Accuracies of argmax f, and the scores under the deployment prior q, at T and at T = 1.

    logits [N, C], targets int64 [N]; temperature a number, or [N, 1], one a row; log_offset,
    prior, deployment float64 [C]; groups name -> bool [C], head among them. `nll`, `brier`, `ece`
    (and head_, tail_ of each) use f / T + log_offset + log q - log prior, whose own argmax gives
    `adjusted_accuracy` and `adjusted_balanced_accuracy`; `_uncalibrated` is the same at T = 1.
    """
    num_classes = logits.shape[1]
    values = accuracies(logits.argmax(1), targets, groups, num_classes)
    calibrated = deployment_scores(logits, temperature, log_offset, prior, deployment)
    adjusted = calibrated.argmax(1)
    recall, _ = per_class_recall(adjusted, targets, num_classes)
    values["adjusted_accuracy"] = float((adjusted == targets).double().mean())
    values["adjusted_balanced_accuracy"] = mean_over(recall)
    values |= proper_scores(calibrated, targets, groups["head"])
    plain = deployment_scores(logits, 1.0, log_offset, prior, deployment)
    uncalibrated = proper_scores(plain, targets, groups["head"])
    return values | {f"{name}_uncalibrated": value for name, value in uncalibrated.items()}


def evaluate_scores(
    scores: Tensor, targets: Tensor, groups: Mapping[str, Tensor]
) -> dict[str, float]:
    """Accuracies of the argmax, nll, brier and ece of log-posterior scores [N, C], as they are."""
    values = accuracies(scores.argmax(1), targets, groups, scores.shape[1])
    return values | proper_scores(scores, targets, groups["head"])


def posthoc_accuracies(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    log_offset: Tensor,
    prior: Tensor,
    groups: Mapping[str, Tensor],
    taus: Iterable[float],
) -> dict[float, dict[str, float]]:
    """tau -> accuracies of the argmax of `posthoc_scores`; shapes as in `evaluate`."""
    found = {}
    for tau in taus:
        predictions = posthoc_scores(logits, temperature, log_offset, prior, tau).argmax(1)
        found[tau] = accuracies(predictions, targets, groups, logits.shape[1])
    return found


def prior_weighted_accuracy(logits: Tensor, targets: Tensor, pool_prior: Tensor) -> float:
    """sum over classes of pool_prior * recall: accuracy if test frequencies were the pool's."""
    recall, _ = per_class_recall(logits.argmax(1), targets, logits.shape[1])
    return float((pool_prior.double() * recall).sum())


def deployment_priors(test_lt_targets: Tensor | None, num_classes: int) -> dict[str, Tensor]:
    """The prior q, float64 [C], under which each test split is scored: its own label frequencies
    on test_lt, where there is that split, uniform on test_balanced."""
    priors = {}
    if test_lt_targets is not None:
        priors["test_lt"] = label_frequencies(test_lt_targets, num_classes)
    priors["test_balanced"] = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    return priors


def label_frequencies(targets: Tensor, num_classes: int) -> Tensor:
    """float64 [C]."""
    return torch.bincount(targets, minlength=num_classes).double() / len(targets)
