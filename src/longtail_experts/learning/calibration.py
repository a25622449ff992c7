"""Temperature scaling under a shifted prior.

Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks* (ICML 2017), on the logits
alone: the scores are f / T + log_offset, so T leaves what the loss has added to the logits in
training as it is. What the logits hold of the class frequencies themselves (all of it under `ce`,
whose offset is 0) is divided by T with them. The mean NLL is convex in 1/T; hence its derivative
in log T changes sign at most once, and a bracketing root finder is exact.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

LOG_T_BOUND = 4.0
NUM_RESAMPLES = 1000
GRID_POINTS = 801  # of log T in [-4, 4]: a step of 0.01
AT_ONCE = 20  # of them at the most; the logits of an ImageNet one by one
HELD = 20_000_000  # float64 values a tensor of so many times the logits may have: 160 MB


class Temperature(NamedTuple):
    value: float
    low: float  # 95 % percentile bootstrap over the calibration rows
    high: float
    at_bound: bool


def scores(logits: Tensor, temperature: float | Tensor, log_offset: Tensor) -> Tensor:
    """f / T + log_offset, float64 [N, C]: log-posterior under the training prior. T is one number,
    or float64 [N, 1], one a row."""
    return logits.double() / temperature + log_offset.double()


def deployment_scores(
    logits: Tensor,
    temperature: float | Tensor,
    log_offset: Tensor,
    prior: Tensor,
    deployment: Tensor,
) -> Tensor:
    """f / T + log_offset + log q - log prior: log-posterior under the deployment prior q [C].

    A class with q = 0 gets the score -inf. Saerens et al. (2002); Menon et al. (2021), eq. 9.
    """
    return scores(logits, temperature, log_offset) + (
        deployment.double().log() - prior.double().log()
    )


def posthoc_scores(
    logits: Tensor, temperature: float | Tensor, log_offset: Tensor, prior: Tensor, tau: float
) -> Tensor:
    """f / T + log_offset - tau log prior, float64 [N, C]: post-hoc logit adjustment.

    Menon et al., *Long-tail learning via logit adjustment* (ICLR 2021), section 4.1, eq. 9, of
    calibrated scores. tau 0 is the posterior under the training prior, tau 1 under the uniform.
    """
    return scores(logits, temperature, log_offset) - tau * prior.double().log()


def slope_per_image(
    logits: Tensor, targets: Tensor, log_offset: Tensor, log_t: float | np.ndarray
) -> Tensor:
    """d NLL_i / d log T, float64 [N]: (f_target - E_p[f]) / T with p = softmax(f / T + offset).

    Of several log T [G, 1, 1]: [G, N].
    """
    logits = logits.double()
    temperature = torch.as_tensor(np.exp(log_t), device=logits.device)
    p = scores(logits, temperature, log_offset).softmax(-1)
    # The difference is taken inside the sum: outside it, rounding could turn the sign.
    margin = logits.gather(1, targets[:, None]) - logits
    return (p * margin).sum(-1) / temperature.squeeze(-1)


def fit_temperature(
    logits: Tensor, targets: Tensor, log_offset: Tensor, *, bootstrap_seed: int
) -> Temperature:
    """The T that minimises the mean NLL (nats) of softmax(f / T + log_offset), and its interval.

    logits [N, C], targets int64 [N], log_offset [C], on any device; float64 throughout. log T is
    sought in [-4, 4] until |d NLL / d log T| < 1e-6; `at_bound` says that the minimum lies at an
    end of that range. Raises ValueError without rows or with logits that are not finite.
    """
    value, at_bound = minimise_nll(logits, targets, log_offset)
    low, high = _bootstrap_interval(logits, targets, log_offset, bootstrap_seed)
    return Temperature(value, low, high, at_bound)


def minimise_nll(logits: Tensor, targets: Tensor, log_offset: Tensor) -> tuple[float, bool]:
    """(T, whether it lies at a bound), as `fit_temperature` says."""
    if len(targets) == 0:
        raise ValueError("temperature: the calibration split holds no image")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("temperature: some calibration logits are not finite")

    def slope(log_t: float) -> float:
        return float(slope_per_image(logits, targets, log_offset, log_t).mean())

    if slope(-LOG_T_BOUND) >= 0:
        log_t, at_bound = -LOG_T_BOUND, True
    elif slope(LOG_T_BOUND) <= 0:
        log_t, at_bound = LOG_T_BOUND, True
    else:
        log_t, at_bound = brentq(slope, -LOG_T_BOUND, LOG_T_BOUND, xtol=1e-13), False
        if abs(slope(log_t)) >= 1e-6:
            raise RuntimeError(f"temperature: slope {slope(log_t):.3g} at log T = {log_t:.6g}")
    return float(np.exp(log_t)), at_bound


class CrossFit(NamedTuple):
    """Two-fold: the rows of one half are scored with the T fitted on the other."""

    halves: tuple[float, float]  # T fitted on the rows of half 0, and of half 1
    per_row: Tensor  # float64 [N, 1], the T of the other half
    at_bound: bool


def cross_fit_temperature(
    logits: Tensor, targets: Tensor, log_offset: Tensor, *, seed: int
) -> CrossFit:
    """For test images without a calibration split: no row is scored with a T that has seen it."""
    half = stratified_halves(targets, seed)
    fits = [minimise_nll(logits[half == h], targets[half == h], log_offset) for h in (0, 1)]
    halves = (fits[0][0], fits[1][0])
    at_bound = any(at_bound for _, at_bound in fits)
    return CrossFit(halves, of_the_other_half(halves, targets, seed), at_bound)


def of_the_other_half(halves: tuple[float, float], targets: Tensor, seed: int) -> Tensor:
    """float64 [N, 1]: for each row the T of the half that it is not in."""
    half = stratified_halves(targets, seed)
    return torch.tensor(halves, dtype=torch.float64)[1 - half][:, None]


def stratified_halves(targets: Tensor, seed: int) -> Tensor:
    """int64 [N], 0 or 1: the images of each class, shuffled, are dealt to the two in turn; so each
    holds half of every class, and of all, within one image."""
    random, labels = np.random.RandomState(seed), targets.cpu().numpy()
    order = np.concatenate(
        [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    )
    half = np.empty(len(labels), dtype=np.int64)
    half[order] = np.arange(len(labels)) % 2
    return torch.from_numpy(half)


def _bootstrap_interval(
    logits: Tensor, targets: Tensor, log_offset: Tensor, seed: int
) -> tuple[float, float]:
    """2.5 % and 97.5 % points of T over resamples of the rows.

    The slope of every row is tabulated once over a grid of log T; a resample is a weighting of
    rows, and its root is interpolated linearly in a cell of width 0.01 (an error of some 1e-5).
    """
    grid = np.linspace(-LOG_T_BOUND, LOG_T_BOUND, GRID_POINTS)
    # Few large calls: thousands of small ones, each on all cores, take seconds where there are 16.
    at_once = max(1, min(AT_ONCE, HELD // logits.numel()))
    parts = np.split(grid[:, None, None], range(at_once, GRID_POINTS, at_once))
    table = torch.cat([slope_per_image(logits, targets, log_offset, part) for part in parts])
    random, num_rows = np.random.RandomState(seed), len(targets)
    weights = np.empty((NUM_RESAMPLES, num_rows))
    for row in weights:
        row[:] = np.bincount(random.randint(0, num_rows, num_rows), minlength=num_rows)
    slopes = weights @ table.cpu().numpy().T / num_rows  # [resamples, grid]
    log_t = [_root(grid, of_resample) for of_resample in slopes]
    low, high = np.exp(np.percentile(log_t, [2.5, 97.5]))
    return float(low), float(high)


def _root(grid: np.ndarray, slopes: np.ndarray) -> float:
    """Where slopes, negative then positive, pass zero; an end of the grid where they never do."""
    rising = np.flatnonzero(slopes >= 0)
    if len(rising) == 0:
        return float(grid[-1])
    right = rising[0]
    if right == 0:
        return float(grid[0])
    left = right - 1
    part = -slopes[left] / (slopes[right] - slopes[left])
    return float(grid[left] + part * (grid[right] - grid[left]))
