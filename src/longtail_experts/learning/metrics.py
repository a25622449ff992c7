"""Accuracies and proper scores out of logits and targets.

Fractions in [0, 1] and nats; the Brier score, a sum over classes, lies in [0, 2]. Everything is
summed in float64.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15


def per_class_recall(
    predictions: Tensor, targets: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """(recall float64 [C], images int64 [C]); recall is nan for a class without images."""
    total = torch.bincount(targets, minlength=num_classes)
    hits = torch.bincount(targets[predictions == targets], minlength=num_classes)
    return hits.double() / total, total


def mean_over(recall: Tensor, classes: Tensor | None = None) -> float:
    """Mean recall of the classes that have images; nan where none has."""
    chosen = recall if classes is None else recall[classes]
    return float(chosen.nanmean()) if len(chosen) else float("nan")


def accuracies(
    predictions: Tensor, targets: Tensor, groups: Mapping[str, Tensor], num_classes: int
) -> dict[str, float]:
    """accuracy (mean over images), balanced_accuracy and <group>_accuracy (means over classes).

    predictions, targets int64 [N]; groups name -> bool [C]. A group without images is left out.
    """
    recall, _ = per_class_recall(predictions, targets, num_classes)
    values = {
        "accuracy": float((predictions == targets).double().mean()),
        "balanced_accuracy": mean_over(recall),
    }
    values |= {f"{name}_accuracy": mean_over(recall, mask) for name, mask in groups.items()}
    return {name: value for name, value in values.items() if not np.isnan(value)}


def balanced_accuracy_standard_error(
    predictions: Tensor, targets: Tensor, num_classes: int, classes: Tensor | None = None
) -> float:
    """Standard error of the mean of per-class recalls, from the images drawn of each class.

    sqrt(sum_c p_c (1 - p_c) / n_c) / C with p_c = (hits + 1) / (n_c + 2), Laplace's rule of
    succession: the plain p_c would give a class with one image no error at all.
    """
    recall, total = per_class_recall(predictions, targets, num_classes)
    chosen = total > 0 if classes is None else (total > 0) & classes
    n, hits = total[chosen].double(), (recall * total)[chosen]
    p = (hits + 1) / (n + 2)
    return float((p * (1 - p) / n).sum().sqrt() / chosen.sum())


def nll_per_image(scores: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(scores)[target], nats, float64 [N]."""
    scores = scores.double()
    return scores.logsumexp(1) - scores.gather(1, targets[:, None]).squeeze(1)


def brier_per_image(probabilities: Tensor, targets: Tensor) -> Tensor:
    """sum_c (p_c - [c = target])^2, float64 [N] in [0, 2] (Brier, 1950)."""
    p = probabilities.double()
    return (p**2).sum(1) - 2 * p.gather(1, targets[:, None]).squeeze(1) + 1


def reliability(probabilities: Tensor, targets: Tensor, num_bins: int = NUM_BINS) -> np.ndarray:
    """float64 [num_bins, 3]: images, mean confidence and accuracy of each equal-width bin.

    A bin holds the confidences in (low, high]; the means of an empty one are 0.
    """
    confidence, predictions = probabilities.double().max(1)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    count = torch.bincount(bins, minlength=num_bins).double()
    of_bin = count.clamp(min=1)
    correct = (predictions == targets).double()
    return torch.stack(
        [
            count,
            torch.bincount(bins, confidence, num_bins) / of_bin,
            torch.bincount(bins, correct, num_bins) / of_bin,
        ],
        dim=1,
    ).numpy()


def expected_calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """sum over 15 equal-width bins of (images / N) |accuracy - confidence| (Guo et al., 2017)."""
    count, confidence, accuracy = reliability(probabilities, targets).T
    return float((count * abs(accuracy - confidence)).sum() / count.sum())


def proper_scores(scores: Tensor, targets: Tensor, head: Tensor) -> dict[str, float]:
    """nll, brier and ece of log-posterior scores [N, C], overall and for head and tail.

    Head and tail group NLL and Brier by the true class and ECE by the predicted one: grouping
    ECE by the label biases it even for a perfect model. head is bool [C]; a group without
    images is left out.
    """
    probabilities = scores.double().softmax(1)
    nll, brier = nll_per_image(scores, targets), brier_per_image(probabilities, targets)
    values = {
        "nll": float(nll.mean()),
        "brier": float(brier.mean()),
        "ece": expected_calibration_error(probabilities, targets),
    }
    predictions = probabilities.argmax(1)
    for group, classes in (("head", head), ("tail", ~head)):
        true, predicted = classes[targets], classes[predictions]
        if bool(true.any()):
            values[f"{group}_nll"] = float(nll[true].mean())
            values[f"{group}_brier"] = float(brier[true].mean())
        if bool(predicted.any()):
            values[f"{group}_ece"] = expected_calibration_error(
                probabilities[predicted], targets[predicted]
            )
    return values
