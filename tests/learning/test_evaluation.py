import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    recall_score,
)
from torchmetrics.classification import MulticlassCalibrationError

from longtail_experts.learning.evaluation import (
    deployment_priors,
    evaluate,
    evaluate_scores,
    label_frequencies,
    posthoc_accuracies,
    prior_weighted_accuracy,
)

CLASSES, IMAGES = 6, 500
PRIOR = np.array([0.5, 0.25, 0.12, 0.08, 0.04, 0.01])
GROUPS = {
    "head": torch.tensor([True] * 3 + [False] * 3),
    "tail": torch.tensor([False] * 3 + [True] * 3),
    "many": torch.tensor([True] + [False] * 5),
    "few": torch.zeros(CLASSES, dtype=torch.bool),
}


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32 [N, C], targets [N]) of an over-confident network."""
    random = np.random.RandomState(seed)
    targets = random.choice(CLASSES, IMAGES, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    logits = 3 * random.randn(IMAGES, CLASSES)
    logits[np.arange(IMAGES), targets] += 3
    return (logits + np.log(PRIOR)).astype(np.float32), targets


def evaluated(logits, targets, temperature, offset, deployment, groups=GROUPS) -> dict[str, float]:
    return evaluate(
        torch.tensor(logits),
        torch.tensor(targets),
        temperature=temperature,
        log_offset=torch.tensor(offset),
        prior=torch.tensor(PRIOR),
        deployment=torch.tensor(deployment),
        groups=groups,
    )


def posterior(logits, temperature, offset, deployment) -> np.ndarray:
    """Proportional to e^(f / T) e^offset q / pi, float64 [N, C]."""
    weights = np.exp(logits.astype(np.float64) / temperature) * np.exp(offset) * deployment / PRIOR
    return weights / weights.sum(1, keepdims=True)


def ece(probabilities: np.ndarray, targets: np.ndarray) -> float:
    judge = MulticlassCalibrationError(num_classes=CLASSES, n_bins=15, norm="l1")
    return float(judge(torch.tensor(probabilities), torch.tensor(targets)))


def first_principles(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    labels, predictions = list(range(CLASSES)), probabilities.argmax(1)
    everyone = np.ones(IMAGES, bool)
    values = {}
    for name, true, predicted in (
        ("", everyone, everyone),
        ("head_", targets < 3, predictions < 3),
        ("tail_", targets >= 3, predictions >= 3),
    ):
        p, t = probabilities[true], targets[true]
        values[f"{name}nll"] = log_loss(t, p, labels=labels)
        values[f"{name}brier"] = brier_score_loss(t, p, labels=labels, scale_by_half=False)
        values[f"{name}ece"] = ece(probabilities[predicted], targets[predicted])
    return values


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("offset", [np.zeros(CLASSES), np.log(PRIOR)], ids=["ce", "adjusted"])
@pytest.mark.parametrize("deployment", ["uniform", "labels"])
def test_every_figure_from_first_principles(seed, offset, deployment):
    logits, targets = random_case(seed)
    q = np.full(CLASSES, 1 / 6) if deployment == "uniform" else np.bincount(targets) / IMAGES
    values = evaluated(logits, targets, 2.5, offset, q)

    raw = logits.argmax(1)
    calibrated, plain = (posterior(logits, t, offset, q) for t in (2.5, 1.0))
    adjusted = calibrated.argmax(1)
    expected = {
        "accuracy": accuracy_score(targets, raw),
        "balanced_accuracy": balanced_accuracy_score(targets, raw),
        "head_accuracy": recall_score(targets, raw, labels=[0, 1, 2], average="macro"),
        "tail_accuracy": recall_score(targets, raw, labels=[3, 4, 5], average="macro"),
        "many_accuracy": recall_score(targets, raw, labels=[0], average="macro"),
        "adjusted_accuracy": accuracy_score(targets, adjusted),
        "adjusted_balanced_accuracy": balanced_accuracy_score(targets, adjusted),
        **first_principles(calibrated, targets),
    }
    uncalibrated = first_principles(plain, targets)
    expected |= {f"{name}_uncalibrated": value for name, value in uncalibrated.items()}
    assert set(values) == set(expected)
    assert values == pytest.approx(expected, abs=1e-6)
    assert values["nll"] != pytest.approx(values["nll_uncalibrated"], abs=0.01)


def test_scores_as_they_are_from_first_principles():
    logits, targets = random_case(5)
    probabilities = posterior(logits, 2.5, np.log(PRIOR), np.full(CLASSES, 1 / 6))
    scores = torch.tensor(np.log(probabilities))
    values = evaluate_scores(scores, torch.tensor(targets), GROUPS)
    expected = first_principles(probabilities, targets)
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    predictions = probabilities.argmax(1)
    assert values["balanced_accuracy"] == balanced_accuracy_score(targets, predictions)


def test_for_ce_under_the_uniform_prior_adjusted_is_post_hoc_logit_adjustment():
    logits, targets = random_case(2)
    values = evaluated(logits, targets, 1.0, np.zeros(CLASSES), np.full(CLASSES, 1 / 6))
    post_hoc = (logits - np.log(PRIOR)).argmax(1)
    expected = balanced_accuracy_score(targets, post_hoc)
    assert values["adjusted_balanced_accuracy"] == pytest.approx(expected)
    assert values["adjusted_balanced_accuracy"] > values["balanced_accuracy"]


def test_temperature_leaves_the_plain_accuracies_alone():
    logits, targets = random_case(3)
    q, offset = np.full(CLASSES, 1 / 6), np.log(PRIOR)
    cold, hot = (evaluated(logits, targets, t, offset, q) for t in (0.7, 4.0))
    for name in cold:
        if not name.endswith("_uncalibrated") and "accuracy" not in name:
            assert cold[name] != hot[name]
        elif not name.startswith("adjusted"):
            assert cold[name] == hot[name]


def test_at_temperature_1_both_halves_are_equal():
    logits, targets = random_case(4)
    values = evaluated(logits, targets, 1.0, np.log(PRIOR), np.full(CLASSES, 1 / 6))
    names = [name for name in values if name.endswith("_uncalibrated")]
    assert len(names) == 9
    assert all(values[name] == values[name.removesuffix("_uncalibrated")] for name in names)


def test_a_class_absent_from_the_split_leaves_every_figure_finite():
    logits, targets = random_case(5)
    kept = targets != 5
    logits, targets = logits[kept], targets[kept]
    q = np.bincount(targets, minlength=CLASSES) / len(targets)
    values = evaluated(logits, targets, 2.0, np.log(PRIOR), q)
    assert q[5] == 0
    assert np.isfinite(list(values.values())).all()


def test_prior_weighted_accuracy_by_hand():
    logits = torch.eye(3)[[0, 0, 1, 2, 0]]  # predicts 0 0 1 2 0
    targets = torch.tensor([0, 0, 1, 1, 2])  # recalls 1, 1/2, 0
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert prior_weighted_accuracy(logits, targets, weights) == pytest.approx(0.65)
    without_the_last = prior_weighted_accuracy(logits[:4], targets[:4], weights)
    assert math.isnan(without_the_last)  # no image of a class: not the sum over the others


def test_prior_weighted_accuracy_lies_between_its_two_special_cases():
    logits, targets = (torch.tensor(x) for x in random_case(6))
    frequencies = label_frequencies(targets, CLASSES)
    predictions = logits.argmax(1)
    assert prior_weighted_accuracy(logits, targets, frequencies) == pytest.approx(
        accuracy_score(targets, predictions)
    )
    assert prior_weighted_accuracy(logits, targets, torch.ones(CLASSES) / CLASSES) == pytest.approx(
        balanced_accuracy_score(targets, predictions)
    )


def test_label_frequencies():
    frequencies = label_frequencies(torch.tensor([2, 0, 0, 2, 2]), 4)
    assert frequencies.dtype == torch.float64
    assert frequencies.tolist() == pytest.approx([0.4, 0.0, 0.6, 0.0])


def test_deployment_priors():
    priors = deployment_priors(torch.tensor([0, 0, 0, 2]), 4)
    assert priors["test_lt"].tolist() == [0.75, 0, 0.25, 0]
    assert priors["test_balanced"].tolist() == [0.25] * 4
    assert {q.dtype for q in priors.values()} == {torch.float64}


def posthoc(logits, targets, temperature, offset, *taus):
    return posthoc_accuracies(
        torch.tensor(logits),
        torch.tensor(targets),
        temperature=temperature,
        log_offset=torch.tensor(offset),
        prior=torch.tensor(PRIOR),
        groups=GROUPS,
        taus=taus,
    )


@pytest.mark.parametrize("offset", [np.zeros(CLASSES), np.log(PRIOR)], ids=["none", "log_prior"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.75])
def test_posthoc_adjustment_is_that_of_menon_image_by_image(offset, tau):
    """The class whose calibrated posterior over pi^tau is largest."""
    logits, targets = random_case(3)
    hits = np.zeros(CLASSES)
    for f, target in zip(logits.astype(np.float64), targets, strict=True):
        p = [math.exp(f[c] / 1.7) * math.exp(offset[c]) for c in range(CLASSES)]
        best = max(range(CLASSES), key=lambda c: p[c] / PRIOR[c] ** tau)
        hits[target] += best == target
    recall = hits / np.bincount(targets, minlength=CLASSES)
    found = posthoc(logits, targets, 1.7, offset, tau)[tau]
    assert found["balanced_accuracy"] == pytest.approx(recall.mean())
    assert found["head_accuracy"] == pytest.approx(recall[:3].mean())
    assert found["tail_accuracy"] == pytest.approx(recall[3:].mean())
    assert "few_accuracy" not in found


def test_posthoc_adjustment_at_tau_one_is_the_uniform_prior_and_at_zero_the_training_prior():
    logits, targets = random_case(4)
    offset = 0.5 * np.log(PRIOR)
    found = posthoc(logits, targets, 2.0, offset, 0.0, 1.0)
    for tau, q in ((1.0, np.full(CLASSES, 1 / CLASSES)), (0.0, PRIOR)):
        values = evaluated(logits, targets, 2.0, offset, q)
        assert found[tau]["balanced_accuracy"] == values["adjusted_balanced_accuracy"]
        assert found[tau]["accuracy"] == values["adjusted_accuracy"]
    assert found[0.0] != found[1.0]
    assert found[1.0]["tail_accuracy"] > found[0.0]["tail_accuracy"]
