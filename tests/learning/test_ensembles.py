"""Ensembles and differences of experts, against scipy, scikit-learn and counting by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import jaccard_score

from longtail_experts.learning.ensembles import (
    ENSEMBLES,
    disagreement,
    error_overlap,
    mean_of_probabilities,
    product_of_experts,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 999))


def random_scores(shape) -> torch.Tensor:
    members, rows, classes, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(members, rows, classes, dtype=torch.float64, generator=generator)


@given(SHAPES)
def test_the_mean_is_that_of_probabilities(shape):
    scores = random_scores(shape)
    expected = softmax(scores.numpy(), axis=2).mean(0)
    assert np.allclose(mean_of_probabilities(list(scores)).exp().numpy(), expected)


@given(SHAPES)
def test_the_product_is_the_normalised_geometric_mean(shape):
    scores = random_scores(shape)
    geometric = np.exp(np.log(softmax(scores.numpy(), axis=2)).mean(0))
    expected = geometric / geometric.sum(1, keepdims=True)
    assert np.allclose(product_of_experts(list(scores)).exp().numpy(), expected)


@pytest.mark.parametrize("combine", ENSEMBLES.values(), ids=list(ENSEMBLES))
def test_a_member_with_itself_is_itself(combine):
    (scores,) = random_scores((1, 5, 4, 0))
    assert torch.allclose(combine([scores, scores, scores + 7]).exp(), scores.softmax(1))


def test_they_differ_where_one_member_is_sure_and_wrong():
    sure, unsure = torch.tensor([[0.99, 0.01]]).log(), torch.tensor([[0.2, 0.8]]).log()
    assert float(mean_of_probabilities([sure, unsure]).exp()[0, 1]) == pytest.approx(0.405)
    odds = (0.01 * 0.8 / (0.99 * 0.2)) ** 0.5
    assert float(product_of_experts([sure, unsure]).exp()[0, 1]) == pytest.approx(odds / (1 + odds))


def test_a_class_that_the_deployment_rules_out_stays_out():
    scores = torch.tensor([[0.0, 1.0, -torch.inf]])
    for combine in ENSEMBLES.values():
        assert combine([scores, scores]).exp()[0].tolist() == pytest.approx(
            [0.2689, 0.7311, 0], abs=1e-4
        )


def test_disagreement_counted_by_hand():
    a, b = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 0])
    assert disagreement([a, b]).tolist() == [[0, 0.5], [0.5, 0]]


def test_error_overlap_is_the_jaccard_index_of_the_errors():
    draw = np.random.RandomState(0)
    targets = draw.randint(0, 4, 200)
    predictions = [np.where(draw.rand(200) < 0.6, targets, draw.randint(0, 4, 200)) for _ in "abc"]
    overlap = error_overlap([torch.tensor(p) for p in predictions], torch.tensor(targets))
    for i, p in enumerate(predictions):
        for j, q in enumerate(predictions):
            assert float(overlap[i, j]) == pytest.approx(jaccard_score(p != targets, q != targets))


def test_two_experts_without_error_have_no_overlap_to_speak_of():
    targets = torch.tensor([0, 1])
    assert error_overlap([targets, targets], targets).isnan().all()
