import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    recall_score,
)
from torchmetrics.classification import MulticlassCalibrationError

from longtail_experts.learning.metrics import (
    accuracies,
    balanced_accuracy_standard_error,
    brier_per_image,
    expected_calibration_error,
    mean_over,
    nll_per_image,
    per_class_recall,
    proper_scores,
    reliability,
)

CLASSES = 8


def random_case(seed: int, num_images: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float64 [N, 8], targets [N]); class 3 has no image, class 7 few."""
    random = np.random.RandomState(seed)
    frequencies = np.array([30, 20, 15, 0, 10, 8, 5, 1]) / 89
    targets = random.choice(CLASSES, num_images, p=frequencies)
    scores = 1.5 * random.randn(num_images, CLASSES)
    scores[np.arange(num_images), targets] += 1.5
    return torch.tensor(scores), torch.tensor(targets)


def slow_ece(probabilities: np.ndarray, targets: np.ndarray) -> float:
    gap = 0.0
    for low in range(15):
        held = [
            (p.max(), float(p.argmax() == t))
            for p, t in zip(probabilities, targets, strict=True)
            if low / 15 < p.max() <= (low + 1) / 15
        ]
        if held:
            confidence, correct = np.mean(held, axis=0)
            gap += len(held) / len(targets) * abs(confidence - correct)
    return gap


def one_confidence(confidence: float, num_classes: int = 30) -> torch.Tensor:
    """A probability vector [1, 30] that gives class 0 this confidence and the rest equal parts."""
    p = torch.full((1, num_classes), (1 - confidence) / (num_classes - 1), dtype=torch.float64)
    p[0, 0] = confidence
    return p


@pytest.mark.parametrize("seed", range(5))
def test_accuracies_against_scikit_learn(seed):
    scores, targets = random_case(seed)
    predictions = scores.argmax(1)
    groups = {
        "head": torch.arange(CLASSES) < 4,
        "tail": torch.arange(CLASSES) >= 4,
        "few": torch.arange(CLASSES) == 7,
    }
    values = accuracies(predictions, targets, groups, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # class 3 is predicted but has no image
        balanced = balanced_accuracy_score(targets, predictions)
    expected = {
        "accuracy": accuracy_score(targets, predictions),
        "balanced_accuracy": balanced,
    }
    present = set(targets.tolist())
    for name, classes in (("head", [0, 1, 2]), ("tail", [4, 5, 6, 7]), ("few", [7])):
        labels = [c for c in classes if c in present]
        if labels:
            expected[f"{name}_accuracy"] = recall_score(
                targets, predictions, labels=labels, average="macro"
            )
    assert values == pytest.approx(expected)


def test_accuracy_counts_images_and_balanced_accuracy_classes():
    targets = torch.tensor([0] * 8 + [1] * 2)
    predictions = torch.zeros(10, dtype=torch.long)
    values = accuracies(predictions, targets, {}, 2)
    assert values == {"accuracy": 0.8, "balanced_accuracy": 0.5}


def test_a_group_without_classes_or_images_is_left_out():
    targets, predictions = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    groups = {
        "head": torch.tensor([True, True, False]),
        "tail": torch.tensor([False, False, True]),  # a class, no image
        "few": torch.tensor([False, False, False]),  # no class
    }
    values = accuracies(predictions, targets, groups, 3)
    assert set(values) == {"accuracy", "balanced_accuracy", "head_accuracy"}
    assert values["head_accuracy"] == 0.75


def test_recall_of_a_class_without_images_is_nan():
    recall, total = per_class_recall(torch.tensor([2, 2, 0]), torch.tensor([2, 0, 0]), 3)
    assert total.tolist() == [2, 0, 1]
    assert recall.dtype == torch.float64
    assert recall[[0, 2]].tolist() == [0.5, 1.0]
    assert math.isnan(recall[1])


def test_mean_over_skips_nan_and_is_nan_without_any_class():
    recall = torch.tensor([0.5, float("nan"), 1.0], dtype=torch.float64)
    assert mean_over(recall) == 0.75
    assert mean_over(recall, torch.tensor([False, True, True])) == 1.0
    assert math.isnan(mean_over(recall, torch.tensor([False, True, False])))
    assert math.isnan(mean_over(recall, torch.tensor([False, False, False])))


@pytest.mark.parametrize("seed", range(5))
def test_ece_against_torchmetrics_and_a_slow_loop(seed):
    scores, targets = random_case(seed)
    probabilities = scores.softmax(1)
    ece = expected_calibration_error(probabilities, targets)
    judge = MulticlassCalibrationError(num_classes=CLASSES, n_bins=15, norm="l1")
    assert ece == pytest.approx(float(judge(probabilities, targets)), abs=1e-6)
    assert ece == pytest.approx(slow_ece(probabilities.numpy(), targets.numpy()), abs=1e-12)
    assert ece > 0.01


@pytest.mark.parametrize("edge", range(1, 16))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(edge):
    bins = reliability(one_confidence(edge / 15), torch.tensor([0]))
    assert np.flatnonzero(bins[:, 0]).tolist() == [edge - 1]


@pytest.mark.parametrize("edge", range(1, 15))
def test_a_confidence_above_an_edge_belongs_to_the_bin_above(edge):
    bins = reliability(one_confidence(edge / 15 + 1e-9), torch.tensor([0]))
    assert np.flatnonzero(bins[:, 0]).tolist() == [edge]


def test_certainty_right_and_wrong():
    certain = one_confidence(1.0)
    assert expected_calibration_error(certain, torch.tensor([0])) == 0
    assert expected_calibration_error(certain, torch.tensor([1])) == 1
    half = certain.expand(2, -1)
    assert expected_calibration_error(half, torch.tensor([0, 1])) == 0.5


def test_reliability_rows():
    probabilities = torch.cat([one_confidence(c) for c in (0.50, 0.52, 0.90)])
    bins = reliability(probabilities, torch.tensor([0, 1, 0]))
    assert bins.shape == (15, 3)
    assert bins.dtype == np.float64
    assert bins[7] == pytest.approx([2, 0.51, 0.5])
    assert bins[13] == pytest.approx([1, 0.90, 1.0])
    assert not np.delete(bins, [7, 13], axis=0).any()


@pytest.mark.parametrize("seed", range(3))
def test_nll_and_brier_against_scikit_learn(seed):
    scores, targets = random_case(seed)
    probabilities = scores.softmax(1)
    labels = list(range(CLASSES))
    nll = log_loss(targets, probabilities, labels=labels)
    assert float(nll_per_image(scores, targets).mean()) == pytest.approx(nll)
    brier = brier_score_loss(targets, probabilities, labels=labels, scale_by_half=False)
    assert float(brier_per_image(probabilities, targets).mean()) == pytest.approx(brier)


def test_brier_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    per_image = brier_per_image(probabilities, torch.tensor([0, 1, 2]))
    assert per_image.dtype == torch.float64
    assert per_image.tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.0, 2.0], abs=1e-7)


def test_nll_by_hand_and_far_from_overflow():
    scores = torch.tensor([[0.0, math.log(3)], [2e4, 0.0], [2e4, 0.0]])
    per_image = nll_per_image(scores, torch.tensor([1, 1, 0]))
    assert per_image.dtype == torch.float64
    assert per_image.tolist() == pytest.approx([math.log(4 / 3), 2e4, 0.0])


def test_nll_does_not_see_a_constant_per_image():
    scores, targets = random_case(0)
    constants = torch.linspace(-50, 50, len(targets), dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        nll_per_image(scores + constants, targets), nll_per_image(scores, targets)
    )


def test_proper_scores_group_by_true_class_and_ece_by_prediction():
    scores, targets = random_case(1)
    head = torch.arange(CLASSES) < 2
    values = proper_scores(scores, targets, head)
    exponentials = np.exp(scores.numpy())
    p, t = exponentials / exponentials.sum(1, keepdims=True), targets.numpy()
    nll = -np.log(p[np.arange(len(t)), t])
    brier = ((p - np.eye(CLASSES)[t]) ** 2).sum(1)
    expected = {"nll": nll.mean(), "brier": brier.mean(), "ece": slow_ece(p, t)}
    for name, true, predicted in (
        ("head", t < 2, p.argmax(1) < 2),
        ("tail", t >= 2, p.argmax(1) >= 2),
    ):
        assert (true != predicted).any()
        expected[f"{name}_nll"] = nll[true].mean()
        expected[f"{name}_brier"] = brier[true].mean()
        expected[f"{name}_ece"] = slow_ece(p[predicted], t[predicted])
    assert values == pytest.approx(expected)


def test_a_perfect_model_has_no_ece_in_either_group():
    """Targets drawn from the probabilities; grouped by label, the same model would look bad."""
    generator = torch.Generator().manual_seed(0)
    log_prior = torch.tensor([3.0, 2.0, 0.0, -0.5], dtype=torch.float64)
    scores = log_prior + 2 * torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    probabilities = scores.softmax(1)
    targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    head = torch.tensor([True, True, False, False])
    values = proper_scores(scores, targets, head)
    assert max(values[f"{name}ece"] for name in ("", "head_", "tail_")) < 0.02
    of_label = ~head[targets]
    assert expected_calibration_error(probabilities[of_label], targets[of_label]) > 0.15


def test_groups_without_images_are_left_out():
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    head = torch.tensor([True, True, False])
    values = proper_scores(scores, torch.tensor([0, 1]), head)
    overall = {"nll", "brier", "ece"}
    assert set(values) == overall | {"head_nll", "head_brier", "head_ece"}
    values = proper_scores(scores, torch.tensor([2, 2]), head)
    assert set(values) == overall | {"tail_nll", "tail_brier", "head_ece"}


def test_standard_error_by_hand():
    targets = torch.tensor([0] * 10 + [1] * 4 + [3])
    predictions = torch.tensor([0] * 7 + [1] * 3 + [1] * 4 + [0])
    variance = [8 / 12 * 4 / 12 / 10, 5 / 6 * 1 / 6 / 4, 1 / 3 * 2 / 3 / 1]
    error = balanced_accuracy_standard_error(predictions, targets, 4)
    assert error == pytest.approx(math.sqrt(sum(variance)) / 3)
    tail = torch.tensor([False, True, True, True])  # class 2 has no image
    error = balanced_accuracy_standard_error(predictions, targets, 4, tail)
    assert error == pytest.approx(math.sqrt(sum(variance[1:])) / 2)


def test_standard_error_is_the_spread_of_repeated_draws():
    random = np.random.RandomState(0)
    sizes, chances = np.array([200, 50, 30, 20]), np.array([0.8, 0.6, 0.5, 0.3])
    draws = random.binomial(sizes, chances, (4000, 4)) / sizes
    spread = draws.mean(1).std()
    hits = (sizes * chances).round().astype(int)
    targets = np.repeat(np.arange(4), sizes)
    predictions = np.concatenate(
        [
            np.r_[np.full(h, c), np.full(n - h, (c + 1) % 4)]
            for c, (h, n) in enumerate(zip(hits, sizes, strict=True))
        ]
    )
    error = balanced_accuracy_standard_error(torch.tensor(predictions), torch.tensor(targets), 4)
    assert error == pytest.approx(spread, rel=0.05)


@st.composite
def scored(draw):
    num_images, num_classes = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    values = st.floats(-800, 800) | st.floats(-2, 2)
    scores = draw(hnp.arrays(np.float64, (num_images, num_classes), elements=values))
    targets = draw(hnp.arrays(np.int64, num_images, elements=st.integers(0, num_classes - 1)))
    return torch.tensor(scores), torch.tensor(targets)


@settings(max_examples=80, deadline=None)
@given(scored())
def test_bounds(case):
    scores, targets = case
    probabilities = scores.softmax(1)
    rounding = 1e-12
    assert 0 <= expected_calibration_error(probabilities, targets) <= 1 + rounding
    brier = brier_per_image(probabilities, targets)
    assert -rounding <= float(brier.min()) <= float(brier.max()) <= 2 + rounding
    assert float(nll_per_image(scores, targets).min()) >= -rounding * 800
    assert reliability(probabilities, targets)[:, 0].sum() == len(targets)


@settings(max_examples=40, deadline=None)
@given(scored())
def test_ece_equals_the_slow_loop_everywhere(case):
    scores, targets = case
    probabilities = scores.softmax(1)
    confidence = probabilities.max(1).values * 15
    on_edge = (confidence - confidence.round()).abs() < 1e-9  # rounding decides the bin there
    kept = ~on_edge
    if kept.any():
        expected = slow_ece(probabilities[kept].numpy(), targets[kept].numpy())
        ece = expected_calibration_error(probabilities[kept], targets[kept])
        assert ece == pytest.approx(expected, abs=1e-12)
