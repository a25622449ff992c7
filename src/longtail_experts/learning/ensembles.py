"""Experts together: their scores combined, and where they differ.

Members are given as log-posterior scores [N, C] under one and the same deployment prior
(`calibration.deployment_scores`): scores under different training priors are of different things.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_probabilities(members: Sequence[Tensor]) -> Tensor:
    """log of the mean over members of softmax(scores), float64 [N, C]."""
    stacked = torch.stack([scores.double().log_softmax(1) for scores in members])
    return stacked.logsumexp(0) - math.log(len(members))


def product_of_experts(members: Sequence[Tensor]) -> Tensor:
    """log of the normalised geometric mean over members of softmax(scores), float64 [N, C].

    Hinton, *Products of experts* (1999). Of calibrated members it is consistent for the
    balanced error: Sanchez Aimar, Jonnarth, Felsberg, Kuhlmann, *Balanced product of
    calibrated experts for long-tailed recognition* (CVPR 2023).
    """
    stacked = torch.stack([scores.double().log_softmax(1) for scores in members])
    return stacked.mean(0).log_softmax(1)


ENSEMBLES = {
    "mean of probabilities": mean_of_probabilities,
    "product of experts": product_of_experts,
}


def disagreement(predictions: Sequence[Tensor]) -> Tensor:
    """Share of images that two members predict differently, float64 [M, M]; predictions [N]."""
    stacked = torch.stack(list(predictions))  # [M, N]
    return torch.stack([(stacked != row).double().mean(1) for row in stacked])


def error_overlap(predictions: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Images that both of two members get wrong / that at least one does, float64 [M, M].

    1: the same errors; 0: never both wrong. nan where neither makes an error.
    """
    wrong = torch.stack([p != targets for p in predictions]).double()  # [M, N]
    both, errors = wrong @ wrong.T, wrong.sum(1)
    return both / (errors[:, None] + errors - both)
