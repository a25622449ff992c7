import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from longtail_experts.learning.losses import LOSSES, prior_of, shifted_cross_entropy

POOL_COUNTS = torch.tensor([int(500 * 100 ** (-c / 99)) for c in range(100)])


def loss_of(name, logits, targets, counts, tau=1.0) -> torch.Tensor:
    return shifted_cross_entropy(logits, targets, LOSSES[name].train_shift(counts, tau))


def menon_eq_10(logits, targets, counts, tau) -> float:
    """Mean of log(1 + sum_{y' != y} (pi_y' / pi_y)^tau e^{f_y' - f_y})."""
    prior, total = [n / sum(counts) for n in counts], 0.0
    for f, y in zip(logits, targets, strict=True):
        others = [z for z in range(len(counts)) if z != y]
        total += math.log1p(
            sum((prior[z] / prior[y]) ** tau * math.exp(f[z] - f[y]) for z in others)
        )
    return total / len(targets)


def ren_eq_3(logits, targets, counts) -> float:
    """Mean of -log(n_y e^{f_y} / sum_i n_i e^{f_i})."""
    total = 0.0
    for f, y in zip(logits, targets, strict=True):
        weighted = [n * math.exp(value) for n, value in zip(counts, f, strict=True)]
        total -= math.log(weighted[y] / sum(weighted))
    return total / len(targets)


@st.composite
def cases(draw):
    """(counts list, logits float64 [N, C], targets list)."""
    num_classes, num_images = draw(st.integers(2, 8)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(1, 5000), min_size=num_classes, max_size=num_classes))
    values = st.floats(-20, 20, width=32)
    logits = draw(hnp.arrays(np.float64, (num_images, num_classes), elements=values))
    target = st.integers(0, num_classes - 1)
    return counts, logits, draw(st.lists(target, min_size=num_images, max_size=num_images))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.5, 1.0, 1.5]))
def test_losses_equal_the_equations_of_their_papers(case, tau):
    counts, logits, targets = case
    tensors = torch.tensor(logits), torch.tensor(targets), torch.tensor(counts)
    adjusted = float(loss_of("logit_adjust", *tensors, tau))
    assert adjusted == pytest.approx(menon_eq_10(logits, targets, counts, tau), rel=1e-5, abs=1e-5)
    balanced = float(loss_of("balanced_softmax", *tensors, tau))
    assert balanced == pytest.approx(ren_eq_3(logits, targets, counts), rel=1e-5, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_at_tau_1_logit_adjust_and_balanced_softmax_are_one_function(case):
    counts, logits, targets = (torch.tensor(x) for x in case)
    values, gradients = [], []
    for name in ("logit_adjust", "balanced_softmax"):
        f = logits.clone().requires_grad_()
        value = loss_of(name, f, targets, counts)
        value.backward()
        values.append(value.detach())
        gradients.append(f.grad)
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_tau_0_is_cross_entropy(case):
    counts, logits, targets = (torch.tensor(x) for x in case)
    expected = F.cross_entropy(logits.float(), targets)
    for name in ("ce", "logit_adjust"):
        loss = loss_of(name, logits, targets, counts, tau=0.0)
        torch.testing.assert_close(loss.float(), expected)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_ce_knows_no_counts_and_balanced_softmax_no_tau(tau):
    counts, logits = torch.tensor([50, 7, 1]), torch.tensor([[0.3, -1.0, 2.0]])
    target = torch.tensor([2])
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss_of("ce", logits, target, counts, tau).float(), expected)
    torch.testing.assert_close(
        loss_of("balanced_softmax", logits, target, counts, tau),
        loss_of("balanced_softmax", logits, target, counts, 1.0),
    )


@pytest.mark.parametrize("name", ["logit_adjust", "balanced_softmax"])
@pytest.mark.parametrize(("target", "difference"), [(0, -1.53), (99, 3.08)])
def test_offsets_on_the_pool_of_imbalance_100(name, target, difference):
    assert int(POOL_COUNTS.sum()) == 10_847
    uniform, target = torch.zeros(1, 100), torch.tensor([target])
    ce = loss_of("ce", uniform, target, POOL_COUNTS)
    assert float(ce) == pytest.approx(math.log(100))
    shifted = loss_of(name, uniform, target, POOL_COUNTS)
    assert float(shifted - ce) == pytest.approx(difference, abs=0.005)


@pytest.mark.parametrize(
    ("name", "tau"),
    [
        ("ce", 1.0),
        ("ce", 1.5),
        ("logit_adjust", 0.5),
        ("logit_adjust", 1.0),
        ("logit_adjust", 1.5),
        ("balanced_softmax", 1.0),
        ("balanced_softmax", 1.5),
    ],
)
class TestPopulationMinimiser:
    """A world of five images and three classes in which p(x | y) and the prior are known.

    Logits with f_y(x) = log p(x | y) + kept * log pi_y are what each loss should learn: ce keeps
    the whole prior, logit adjustment 1 - tau of it, balanced softmax nothing.
    """

    counts = torch.tensor([90, 9, 1])
    likelihood = torch.tensor(
        [[0.5, 0.2, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.1, 0.1], [0.05, 0.05, 0.1, 0.2, 0.6]],
        dtype=torch.float64,
    )  # p(x | y) [C, X]

    def world(self, name: str, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(joint p(x, y) [X, C], the logits [X, C] that the loss should learn)."""
        prior = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
        kept = {"ce": 1.0, "logit_adjust": 1 - tau, "balanced_softmax": 0.0}[name]
        any_constant = torch.tensor([3.0, -1.0, 0.0, 0.5, 2.0])[:, None]  # per image
        return (
            self.likelihood.T * prior,
            self.likelihood.T.log() + kept * prior.log() + any_constant,
        )

    def test_gradient_vanishes_there(self, name, tau):
        joint, f = self.world(name, tau)
        f.requires_grad_()
        risk = sum(
            joint[x, y] * loss_of(name, f[x : x + 1], torch.tensor([y]), self.counts, tau)
            for x in range(5)
            for y in range(3)
        )
        risk.backward()
        torch.testing.assert_close(f.grad, torch.zeros_like(f), rtol=0, atol=1e-7)

    def test_log_offset_makes_it_the_posterior_under_the_training_prior(self, name, tau):
        joint, f = self.world(name, tau)
        posterior = joint / joint.sum(1, keepdim=True)
        offset = LOSSES[name].log_offset(self.counts, tau)
        torch.testing.assert_close((f + offset).softmax(1), posterior)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_train_shift_and_log_offset_differ_by_a_constant(name, tau):
    loss = LOSSES[name]
    difference = loss.train_shift(POOL_COUNTS, tau) - loss.log_offset(POOL_COUNTS, tau)
    assert difference.dtype == torch.float64
    torch.testing.assert_close(difference, difference[:1].expand(100))


def test_log_offsets_on_three_classes():
    counts = torch.tensor([6, 3, 1])
    expected = [math.log(0.6), math.log(0.3), math.log(0.1)]
    assert LOSSES["ce"].log_offset(counts, 2.0).tolist() == [0, 0, 0]
    assert LOSSES["balanced_softmax"].log_offset(counts, 2.0).tolist() == pytest.approx(expected)
    doubled = LOSSES["logit_adjust"].log_offset(counts, 2.0).tolist()
    assert doubled == pytest.approx([2 * x for x in expected])


def test_prior_of_counts():
    prior = prior_of(torch.tensor([5, 3, 2]))
    assert prior.dtype == torch.float64
    assert prior.tolist() == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("name", ["logit_adjust", "balanced_softmax"])
@pytest.mark.parametrize("part", ["train_shift", "log_offset"])
def test_a_class_without_images_is_refused_by_number(name, part):
    with pytest.raises(ValueError, match=r"classes \[1, 3\]"):
        getattr(LOSSES[name], part)(torch.tensor([4, 0, 2, 0]), 1.0)


def test_prior_of_refuses_a_class_without_images():
    with pytest.raises(ValueError, match=r"classes \[0\]"):
        prior_of(torch.tensor([0, 2]))


def test_the_sum_is_taken_in_float32_for_bf16_logits():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 100, generator=generator)).bfloat16()
    targets = torch.randint(100, (64,), generator=generator)
    shift = LOSSES["logit_adjust"].train_shift(POOL_COUNTS, 1.0).float()
    loss = shifted_cross_entropy(logits, targets, shift)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double() + shift.double(), targets)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
