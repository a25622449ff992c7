import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from longtail_experts.learning.losses import (
    LOSSES,
    SHIFTED,
    Knobs,
    balancing_weights,
    ldam_margins,
    mixed,
    objective_of,
    prior_of,
)

POOL_COUNTS = torch.tensor([int(500 * 100 ** (-c / 99)) for c in range(100)])


def loss_of(name, logits, targets, counts, tau=1.0) -> torch.Tensor:
    """In float64 where the logits are."""
    loss = LOSSES[name]
    return loss.function(logits, targets, **loss.terms(counts, Knobs(tau=tau)))


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
        offset = LOSSES[name].log_offset(self.counts, Knobs(tau=tau))
        torch.testing.assert_close((f + offset).softmax(1), posterior)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_shift_and_log_offset_differ_by_a_constant(name, tau):
    loss, knobs = LOSSES[name], Knobs(tau=tau)
    difference = loss.terms(POOL_COUNTS, knobs)["shift"] - loss.log_offset(POOL_COUNTS, knobs)
    assert difference.dtype == torch.float64
    torch.testing.assert_close(difference, difference[:1].expand(100))


def test_log_offsets_on_three_classes():
    counts = torch.tensor([6, 3, 1])
    expected = [math.log(0.6), math.log(0.3), math.log(0.1)]
    assert LOSSES["ce"].log_offset(counts, Knobs(tau=2.0)).tolist() == [0, 0, 0]
    assert LOSSES["balanced_softmax"].log_offset(counts, Knobs(tau=2.0)).tolist() == pytest.approx(
        expected
    )
    doubled = LOSSES["logit_adjust"].log_offset(counts, Knobs(tau=2.0)).tolist()
    assert doubled == pytest.approx([2 * x for x in expected])


def test_prior_of_counts():
    prior = prior_of(torch.tensor([5, 3, 2]))
    assert prior.dtype == torch.float64
    assert prior.tolist() == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"ce", "focal"}))
@pytest.mark.parametrize("part", ["terms", "log_offset"])
def test_a_class_without_images_is_refused_by_number(name, part):
    with pytest.raises(ValueError, match=r"classes \[1, 3\]"):
        getattr(LOSSES[name], part)(torch.tensor([4, 0, 2, 0]), Knobs())


def test_prior_of_refuses_a_class_without_images():
    with pytest.raises(ValueError, match=r"classes \[0\]"):
        prior_of(torch.tensor([0, 2]))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_sum_is_taken_in_float32_for_bf16_logits(name):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 100, generator=generator)).bfloat16()
    targets = torch.randint(100, (64,), generator=generator)
    loss = objective_of(name, POOL_COUNTS, Knobs())(logits, targets)
    assert loss.dtype == torch.float32
    expected = loss_of(name, logits.double(), targets, POOL_COUNTS)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


# --- losses that are no shift: each by the equation of its paper, in plain Python --------------


def softmax(f) -> list[float]:
    top = max(f)
    e = [math.exp(v - top) for v in f]
    return [v / sum(e) for v in e]


def cui_weights(counts, beta) -> list[float]:
    """Eq. 2, 1 / E_n with E_n = (1 - beta^n) / (1 - beta), made to sum to C (section 4.1)."""
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(counts) * w / sum(raw) for w in raw]


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.9, 0.99, 0.9999]))
def test_class_balanced_is_eq_3_of_cui(case, beta):
    counts, logits, targets = case
    objective = objective_of("class_balanced", torch.tensor(counts), Knobs(beta=beta))
    ours = float(objective(torch.tensor(logits), torch.tensor(targets)))
    weights = cui_weights(counts, beta)
    terms = [
        -weights[y] * math.log(max(softmax(f)[y], 1e-300))
        for f, y in zip(logits.tolist(), targets, strict=True)
    ]
    assert ours == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=1e-4)


def test_beta_0_is_cross_entropy_and_beta_near_1_weighs_by_inverse_frequency():
    counts = torch.tensor([500, 50, 5])
    assert balancing_weights(counts, Knobs(beta=0.0)).tolist() == pytest.approx([1, 1, 1])
    inverse = 1 / counts.double()
    nearly = balancing_weights(counts, Knobs(beta=1 - 1e-9))
    torch.testing.assert_close(nearly, inverse / inverse.mean(), rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
def test_focal_is_eq_4_of_lin(case, gamma):
    counts, logits, targets = case
    objective = objective_of("focal", torch.tensor(counts), Knobs(gamma=gamma))
    ours = float(objective(torch.tensor(logits), torch.tensor(targets)))
    terms = []
    for f, y in zip(logits.tolist(), targets, strict=True):
        p = softmax(f)
        others = sum(p[:y] + p[y + 1 :])
        terms.append(-(others**gamma) * math.log(max(p[y], 1e-300)))
    assert ours == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_network_is_certain(gamma):
    f = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    objective = objective_of("focal", torch.tensor([3, 2, 1]), Knobs(gamma=gamma))
    objective(f, torch.tensor([0, 0])).backward()
    assert torch.isfinite(f.grad).all()


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_ldam_is_eq_12_of_cao(case, is_reweighted):
    """-log(e^{z_y - D_y} / (e^{z_y - D_y} + sum_{j != y} e^{z_j})), D_j = const / n_j^(1/4), the
    logits 30 cosines; averaged over the batch with the class's weight."""
    counts, logits, targets = case
    objective = objective_of(
        "ldam_drw", torch.tensor(counts), Knobs(beta=0.99), is_reweighted=is_reweighted
    )
    ours = float(objective(torch.tensor(logits), torch.tensor(targets)))
    weights = cui_weights(counts, 0.99) if is_reweighted else [1.0] * len(counts)
    largest = max(n**-0.25 for n in counts)
    margins = [30 * 0.5 * n**-0.25 / largest for n in counts]
    total = 0.0
    for f, y in zip(logits.tolist(), targets, strict=True):
        lowered = [v - margins[y] * (j == y) for j, v in enumerate(f)]
        total -= weights[y] * (
            lowered[y] - max(lowered) - math.log(sum(math.exp(v - max(lowered)) for v in lowered))
        )
    expected = total / sum(weights[y] for y in targets)
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_ldam_margins_of_the_benchmark():
    margins = ldam_margins(POOL_COUNTS, Knobs()) / 30
    assert float(margins[99]) == 0.5  # the rarest class, 5 images
    assert float(margins[0]) == pytest.approx(0.5 * (5 / 500) ** 0.25)


def test_only_deferred_losses_change_when_the_weights_begin_to_act():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    counts = torch.tensor([500, 50, 5])
    for name, loss in LOSSES.items():
        before, after = (
            float(objective_of(name, counts, Knobs(), is_reweighted=late)(logits, targets))
            for late in (False, True)
        )
        assert (before != after) is loss.is_deferred, name


def test_class_balanced_learns_the_posterior_times_its_weights():
    """At f = log p(y | x) + log w_y the gradient of the risk vanishes, and log_offset undoes w."""
    joint = torch.tensor([[0.5, 0.03, 0.002], [0.3, 0.05, 0.003], [0.1, 0.01, 0.005]]).double()
    counts, knobs = torch.tensor([90, 9, 1]), Knobs(beta=0.9)
    posterior = joint / joint.sum(1, keepdim=True)
    weights = balancing_weights(counts, knobs)
    f = (posterior * weights).log().requires_grad_()
    risk = sum(
        joint[x, y] * weights[y] * F.cross_entropy(f[x : x + 1], torch.tensor([y]))
        for x in range(3)
        for y in range(3)
    )
    risk.backward()
    torch.testing.assert_close(f.grad, torch.zeros_like(f), rtol=0, atol=1e-12)
    offset = LOSSES["class_balanced"].log_offset(counts, knobs)
    torch.testing.assert_close((f + offset).softmax(1), posterior)


def test_which_offsets_are_exact():
    assert [name for name, loss in LOSSES.items() if not loss.is_exact] == ["focal", "ldam_drw"]


def test_a_mixed_batch_has_the_mixture_of_two_losses():
    """For cross-entropy that is the loss of mixed one-hot targets: Zhang et al., eq. 2."""
    logits, own = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    partners, share = own.roll(1), torch.tensor(0.3)
    objective = objective_of("ce", torch.tensor([5, 3, 1]), Knobs())
    ours = mixed(objective, logits, (own, partners, share))
    soft = 0.3 * F.one_hot(own, 3) + 0.7 * F.one_hot(partners, 3)
    torch.testing.assert_close(ours, F.cross_entropy(logits, soft))
    assert mixed(objective, logits, own) == objective(logits, own)
