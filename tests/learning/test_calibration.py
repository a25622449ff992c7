import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from longtail_experts.learning import calibration
from longtail_experts.learning.calibration import (
    cross_fit_temperature,
    deployment_scores,
    fit_temperature,
    minimise_nll,
    scores,
    slope_per_image,
    stratified_halves,
)
from longtail_experts.learning.losses import LOSSES, Knobs

CLASSES = 5
NO_OFFSET = torch.zeros(CLASSES, dtype=torch.float64)
LOG_PRIOR = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01], dtype=torch.float64).log()
OFFSETS = pytest.mark.parametrize("offset", [NO_OFFSET, LOG_PRIOR], ids=["none", "log_prior"])
MAX_RATIO = math.exp(4)


def synthetic(
    true_t: float, offset: torch.Tensor, num_images: int = 500, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float32, targets) for which softmax(f / true_t + offset) is the true posterior."""
    generator = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(num_images, CLASSES, generator=generator)
    posterior = (f.double() + offset).softmax(1)
    return true_t * f, torch.multinomial(posterior, 1, generator=generator)[:, 0]


def test_slopes_at_several_temperatures_are_those_at_each():
    logits, targets = synthetic(1.7, LOG_PRIOR)
    log_t = np.linspace(-4, 4, 7)
    together = slope_per_image(logits, targets, LOG_PRIOR, log_t[:, None, None])
    each = [slope_per_image(logits, targets, LOG_PRIOR, float(u)) for u in log_t]
    assert torch.equal(together, torch.stack(each))


def test_the_interval_is_that_of_resampled_rows():
    """Found anew for every resample, with the same draws."""
    logits, targets = synthetic(1.7, LOG_PRIOR, num_images=120)
    found = fit_temperature(logits, targets, LOG_PRIOR, bootstrap_seed=5)
    random, fits = np.random.RandomState(5), []
    for _ in range(calibration.NUM_RESAMPLES):
        rows = torch.from_numpy(random.randint(0, 120, 120))
        fits.append(minimise_nll(logits[rows], targets[rows], LOG_PRIOR)[0])
    expected = np.percentile(np.log(fits), [2.5, 97.5])
    assert np.log([found.low, found.high]) == pytest.approx(expected, abs=1e-4)


def mean_nll(logits: np.ndarray, targets: np.ndarray, offset: np.ndarray, log_t: float) -> float:
    s = logits.astype(np.float64) / math.exp(log_t) + offset
    top = s.max(1)
    log_sum = top + np.log(np.exp(s - top[:, None]).sum(1))
    return float((log_sum - s[np.arange(len(targets)), targets]).mean())


def brute_force_log_t(logits, targets, offset) -> float:
    """A fine grid, then golden sections around its lowest point."""

    def nll(log_t: float) -> float:
        return mean_nll(logits.numpy(), targets.numpy(), offset.numpy(), log_t)

    grid = np.linspace(-4, 4, 401)
    lowest = int(np.argmin([nll(u) for u in grid]))
    low, high = grid[max(lowest - 1, 0)], grid[min(lowest + 1, 400)]
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if nll(left) < nll(right) else (left, high)
    return (low + high) / 2


@OFFSETS
@pytest.mark.parametrize("true_t", [0.5, 1.0, 2.0, 5.0])
def test_temperature_is_the_brute_force_minimum(true_t, offset):
    logits, targets = synthetic(true_t, offset)
    fitted = fit_temperature(logits, targets, offset, bootstrap_seed=42)
    expected = brute_force_log_t(logits, targets, offset)
    assert math.log(fitted.value) == pytest.approx(expected, abs=1e-6)
    assert fitted.value == pytest.approx(true_t, rel=0.15)
    assert fitted.low <= fitted.value <= fitted.high
    assert not fitted.at_bound
    slope = slope_per_image(logits, targets, offset, math.log(fitted.value)).mean()
    assert abs(float(slope)) < 1e-6


@OFFSETS
@pytest.mark.parametrize("log_t", [-1.0, 0.0, 0.7, 2.0])
def test_slope_against_finite_differences(offset, log_t):
    logits, targets = synthetic(2.0, offset, num_images=60)
    slopes = slope_per_image(logits, targets, offset, log_t)
    assert slopes.dtype == torch.float64
    h = 1e-5
    for i in range(len(targets)):
        row = logits[i : i + 1].numpy(), targets[i : i + 1].numpy(), offset.numpy()
        difference = (mean_nll(*row, log_t + h) - mean_nll(*row, log_t - h)) / (2 * h)
        assert float(slopes[i]) == pytest.approx(difference, abs=1e-7, rel=1e-6)


@pytest.mark.parametrize(("target_of", "bound"), [("argmax", 1 / MAX_RATIO), ("argmin", MAX_RATIO)])
def test_logits_all_right_or_all_wrong_end_at_a_bound(target_of, bound):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(40, CLASSES, generator=generator)
    targets = getattr(logits, target_of)(1)
    fitted = fit_temperature(logits, targets, NO_OFFSET, bootstrap_seed=0)
    assert fitted.at_bound
    assert fitted.value == pytest.approx(bound)
    assert (fitted.low, fitted.high) == pytest.approx((bound, bound))


def test_interval_against_a_direct_bootstrap(monkeypatch):
    assert calibration.NUM_RESAMPLES == 1000
    monkeypatch.setattr(calibration, "NUM_RESAMPLES", 30)
    logits, targets = synthetic(2.0, LOG_PRIOR, num_images=200)
    fitted = fit_temperature(logits, targets, LOG_PRIOR, bootstrap_seed=7)
    random, temperatures = np.random.RandomState(7), []
    for _ in range(30):
        rows = random.randint(0, 200, 200)
        f, t = logits.numpy()[rows], targets.numpy()[rows]
        found = minimize_scalar(
            lambda u, f=f, t=t: mean_nll(f, t, LOG_PRIOR.numpy(), u),
            bounds=(-4, 4),
            method="bounded",
            options={"xatol": 1e-8},
        )
        temperatures.append(math.exp(found.x))
    low, high = np.percentile(temperatures, [2.5, 97.5])
    assert fitted.low == pytest.approx(low, rel=1e-3)
    assert fitted.high == pytest.approx(high, rel=1e-3)


def test_interval_has_the_width_of_the_asymptotic_one():
    """sd(log T) = sd(slope) / (curvature sqrt(N)), the sandwich formula of an M-estimator."""
    logits, targets = synthetic(2.0, NO_OFFSET)
    fitted = fit_temperature(logits, targets, NO_OFFSET, bootstrap_seed=42)
    log_t, h = math.log(fitted.value), 1e-4
    slopes = slope_per_image(logits, targets, NO_OFFSET, log_t).numpy()
    nll = [
        mean_nll(logits.numpy(), targets.numpy(), np.zeros(CLASSES), log_t + d) for d in (-h, 0, h)
    ]
    curvature = (nll[0] - 2 * nll[1] + nll[2]) / h**2
    error = slopes.std() / curvature / math.sqrt(len(targets))
    assert math.log(fitted.high / fitted.low) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_seed_decides_the_interval_and_nothing_else():
    logits, targets = synthetic(2.0, NO_OFFSET, num_images=100)
    first, again, other = (
        fit_temperature(logits, targets, NO_OFFSET, bootstrap_seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert other.value == first.value
    assert (other.low, other.high) != (first.low, first.high)


@pytest.mark.parametrize(("held", "at_once"), [(10**6, 20), (7 * 100 * CLASSES, 7), (1, 1)])
def test_the_interval_takes_no_more_memory_than_it_may(held, at_once, monkeypatch):
    logits, targets = synthetic(2.0, LOG_PRIOR, num_images=100)
    expected = fit_temperature(logits, targets, LOG_PRIOR, bootstrap_seed=1)
    sizes, slope = [], slope_per_image

    def noted(logits, targets, log_offset, log_t):
        sizes.append(np.size(log_t))
        return slope(logits, targets, log_offset, log_t)

    monkeypatch.setattr(calibration, "slope_per_image", noted)
    monkeypatch.setattr(calibration, "HELD", held)
    assert fit_temperature(logits, targets, LOG_PRIOR, bootstrap_seed=1) == expected
    assert max(sizes) == at_once


def test_global_random_state_is_left_alone():
    logits, targets = synthetic(2.0, NO_OFFSET, num_images=20)
    np.random.seed(3)
    fit_temperature(logits, targets, NO_OFFSET, bootstrap_seed=1)
    after = np.random.rand()
    np.random.seed(3)
    assert np.random.rand() == after


def test_scaled_logits_scale_the_temperature():
    logits, targets = synthetic(1.0, LOG_PRIOR, num_images=200)
    plain = fit_temperature(logits, targets, LOG_PRIOR, bootstrap_seed=0)
    scaled = fit_temperature(8 * logits, targets, LOG_PRIOR, bootstrap_seed=0)
    assert scaled.value == pytest.approx(8 * plain.value, rel=1e-6)
    assert scaled.low == pytest.approx(8 * plain.low, rel=1e-3)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no image"):
        fit_temperature(
            torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(3), bootstrap_seed=0
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits, targets = synthetic(1.0, NO_OFFSET, num_images=10)
    logits[4, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(logits, targets, NO_OFFSET, bootstrap_seed=0)


def test_scores_divide_the_logits_and_not_the_offset():
    f, offset = torch.tensor([[4.0, -2.0]]), torch.tensor([0.5, -1.0])
    result = scores(f, 2.0, offset)
    assert result.dtype == torch.float64
    assert result.tolist() == [[2.5, -2.0]]


def bayes(likelihood: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """p(y | x) [X, C] of p(x | y) [X, C] and p(y) [C]."""
    posterior = np.zeros_like(likelihood)
    for x, y in np.ndindex(*likelihood.shape):
        evidence = sum(likelihood[x, z] * prior[z] for z in range(len(prior)))
        posterior[x, y] = likelihood[x, y] * prior[y] / evidence
    return posterior


COUNTS = torch.tensor([60, 30, 10])
LIKELIHOOD = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])  # [X, C]
DEPLOYMENTS = pytest.mark.parametrize(
    "deployment", [(1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7), (0.6, 0.3, 0.1), (0.5, 0.0, 0.5)]
)


@DEPLOYMENTS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("name", "tau"),
    [("ce", 1.0), ("logit_adjust", 1.0), ("logit_adjust", 0.5), ("balanced_softmax", 1.0)],
)
def test_deployment_scores_are_bayes_rule(name, tau, temperature, deployment):
    prior = COUNTS.double() / 100
    kept = {"ce": 1.0, "logit_adjust": 1 - tau, "balanced_softmax": 0.0}[name]
    per_image = torch.tensor([[1.0], [-2.0], [0.0]])
    f = temperature * (torch.tensor(LIKELIHOOD).log() + kept * prior.log() + per_image)
    offset = LOSSES[name].log_offset(COUNTS, Knobs(tau=tau))
    q = torch.tensor(deployment, dtype=torch.float64)
    posterior = deployment_scores(f, temperature, offset, prior, q).softmax(1).numpy()
    np.testing.assert_allclose(posterior, bayes(LIKELIHOOD, np.array(deployment)), rtol=1e-9)


def test_a_class_that_deployment_excludes_has_no_probability():
    q = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    prior = COUNTS.double() / 100
    result = deployment_scores(torch.full((2, 3), 50.0), 1.0, prior.log(), prior, q)
    assert result[:, [0, 2]].tolist() == [[-math.inf, -math.inf]] * 2
    assert result.softmax(1).tolist() == [[0.0, 1.0, 0.0]] * 2


def test_the_training_prior_as_deployment_changes_nothing():
    f, prior = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), COUNTS.double() / 100
    torch.testing.assert_close(
        deployment_scores(f, 2.0, prior.log(), prior, prior), scores(f, 2.0, prior.log())
    )


def test_rounding_does_not_turn_the_slope_of_separable_logits():
    logits = torch.tensor([[10.655, 10.0]] * 20, dtype=torch.float64)
    fitted = fit_temperature(
        logits, torch.zeros(20, dtype=torch.long), torch.zeros(2), bootstrap_seed=0
    )
    assert fitted.at_bound


# --- cross-fitting on test images -------------------------------------------------------------


def test_halves_hold_half_of_every_class():
    targets = torch.tensor([0] * 7 + [1] * 4 + [2] * 5 + [3])
    half = stratified_halves(targets, seed=3)
    for c in range(4):
        sizes = torch.bincount(half[targets == c], minlength=2)
        assert abs(int(sizes[0] - sizes[1])) <= 1
    assert torch.bincount(half).tolist() in ([9, 8], [8, 9])
    assert half.tolist() == stratified_halves(targets, seed=3).tolist()
    assert half.tolist() != stratified_halves(targets, seed=4).tolist()


@OFFSETS
def test_no_row_is_scored_with_a_temperature_that_has_seen_it(offset):
    logits, targets = synthetic(2.0, offset)
    crossed = cross_fit_temperature(logits, targets, offset, seed=0)
    half = stratified_halves(targets, 0)
    for h in (0, 1):
        rows = half == h
        (of_rows,) = crossed.per_row[rows].unique().tolist()
        assert of_rows == crossed.halves[1 - h]
        other = math.exp(brute_force_log_t(logits[~rows], targets[~rows], offset))
        assert of_rows == pytest.approx(other, rel=1e-5)
    spoilt = logits.clone()  # what one half says changes the scores of the other alone
    spoilt[half == 0] *= 3
    again = cross_fit_temperature(spoilt, targets, offset, seed=0)
    assert torch.equal(again.per_row[half == 0], crossed.per_row[half == 0])
    assert not torch.equal(again.per_row[half == 1], crossed.per_row[half == 1])


def test_a_temperature_a_row_divides_that_row():
    logits, log_offset = torch.randn(4, CLASSES), LOG_PRIOR
    t = torch.tensor([[0.5], [1.0], [2.0], [4.0]], dtype=torch.float64)
    together = scores(logits, t, log_offset)
    one_by_one = [scores(logits[i : i + 1], float(t[i, 0]), log_offset)[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(one_by_one))
