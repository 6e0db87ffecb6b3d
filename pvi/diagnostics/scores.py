r"""Proper scores and calibration of predictions that are given as weighted draws.

Draws are `(S, n)`, observed values `(n,)`, weights `(S, n)` or `(S, 1)`, each column summing to 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LEVELS = (0.5, 0.8, 0.9, 0.95)  # of the central intervals
BINS = 10  # of a reliability diagram, with equal numbers of predictions
SIMULATIONS = 1000  # of data from calibrated predictions


def pit(draws: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    r"""Randomised probability integral transforms: uniform on (0, 1) under a right prediction.

    .. math:: u_i = F_i(y_i^-) + v_i \, (F_i(y_i) - F_i(y_i^-)), \qquad v_i \sim U(0, 1)

    The observed value counts as one draw more. So with S unweighted draws u is exactly uniform,
    for counts and for numbers with ties as well.

    Returns:
        `(n,)`, random.

    Reference:
        Czado, Gneiting, Held (2009), Predictive Model Assessment for Count Data, Biometrics 65.
    """
    one = 1.0 / len(draws)
    below = (weights * (draws < observed)).sum(0)
    equal = (weights * (draws == observed)).sum(0)
    v = torch.rand(observed.shape, dtype=weights.dtype, device=weights.device)
    return (below + v * (equal + one)) / (1 + one)


def crps(draws: Tensor, observed: Tensor, weights: Tensor) -> Tensor:
    r"""Continuous ranked probability score, in units of the data; smaller is better.

    .. math:: \mathrm{CRPS}_i = \sum_s w_s |x_s - y_i|
        - \frac{\sum_{s,t} w_s w_t |x_s - x_t|}{2 (1 - \sum_s w_s^2)}

    Fair: with equal weights its expectation is the score of the distribution that was drawn from,
    whatever S.

    Returns:
        `(n,)`; NaN where one draw has all of the weight.

    Reference:
        Ferro (2014), Fair scores for ensemble forecasts, QJRMS 140, eq. 7; Gneiting, Raftery
        (2007), Strictly Proper Scoring Rules, JASA 102.

    Example:
        >>> half = torch.full((2, 1), 0.5)
        >>> crps(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0]), half)  # 1/2 - 1/2
        tensor([0.])
    """
    weights = weights.expand(draws.shape)
    error = (weights * (draws - observed).abs()).sum(0)
    x, order = draws.sort(0)
    w = weights.gather(0, order)
    centred = x - x.mean(0)  # else large numbers cancel
    below, sums = w.cumsum(0) - w, (w * centred).cumsum(0) - w * centred
    spread = (w * (centred * below - sums)).sum(0)  # half the double sum
    left = 1 - w.square().sum(0)  # one draw with all of the weight has no spread to tell
    return torch.where(left > 1e-6, error - spread / left, math.nan)


def brier(probabilities: Tensor, observed: Tensor, squares: Tensor | float) -> Tensor:
    r"""Brier score :math:`\sum_c (p_c - 1[y = c])^2`, fair for frequencies of weighted draws.

    For binary data give the probability of a 1 alone: the score is then :math:`(p - y)^2`.

    Args:
        probabilities: `(n, C)`, weighted frequencies of the classes among draws.
        observed: `(n, C)`, 0 or 1.
        squares: `(n, 1)`, :math:`\sum_s w_s^2`, 1 / S for S equal weights; 0 where the
            probabilities are exact.

    Returns:
        `(n,)`, 0 to 2.

    Reference:
        Brier (1950); Ferro (2014), Fair scores for ensemble forecasts, QJRMS 140.

    Example:
        >>> brier(torch.tensor([[0.5]]), torch.ones(1, 1), 0.0)
        tensor([0.2500])
    """
    noise = probabilities * (1 - probabilities) * squares / (1 - squares)
    return ((probabilities - observed).square() - noise).sum(-1)


def coverage(pits: Tensor) -> tuple[tuple[float, float, float], ...]:
    """Level, share of values inside the central interval, and the share's binomial standard error
    if the level were right and the values were independent.
    """
    away = (pits - 0.5).abs()
    n = max(len(pits), 1)
    return tuple(
        (level, float((away <= level / 2).double().mean()), (level * (1 - level) / n) ** 0.5)
        for level in LEVELS
    )


@dataclass(frozen=True)
class Reliability:
    r"""How often what was predicted with confidence p has happened.

    The expected calibration error :math:`\sum_b \frac{n_b}{n} |\bar y_b - \bar p_b|` is above 0
    even for calibrated predictions, for :math:`\bar y_b` is noisy: `ece_calibrated` says by how
    much. Training data are compared with the fitted probabilities: those of leave-one-out are lower
    for whatever has happened, and where all are alike that looks like a miscalibration.

    Attributes:
        confidence: `(bins,)` mean predicted probability of each bin.
        frequency: `(bins,)` how often it was right.
        count: `(bins,)` predictions in it.
        low, high: `(bins,)` where 95 % of the frequencies of calibrated predictions are.
        ece: Expected calibration error.
        ece_calibrated: Its mean over data drawn from the predictions themselves.
        ece_limit: Its 99 % quantile there.

    Reference:
        Naeini, Cooper, Hauskrecht (2015), Obtaining Well Calibrated Probabilities Using Bayesian
        Binning, AAAI; Broecker, Smith (2007), Increasing the Reliability of Reliability Diagrams.
    """

    confidence: np.ndarray
    frequency: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ece: float
    ece_calibrated: float
    ece_limit: float


def reliability(probability: Tensor, right: Tensor, bins: int = BINS, seed: int = 0) -> Reliability:
    """The diagram of predicted probabilities `(n,)` and what happened `(n,)`, 0 or 1.

    Bins are adaptive: of about the same number of predictions each, equal ones together.
    """
    p = probability.detach().cpu().double().numpy()
    y = right.detach().cpu().double().numpy()
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]))
    where = np.searchsorted(edges, p, side="right")
    _, where = np.unique(where, return_inverse=True)
    count = np.bincount(where)

    def means(x: np.ndarray) -> np.ndarray:
        return np.bincount(where, x) / count

    confidence, frequency = means(p), means(y)
    rng = np.random.default_rng(seed)
    random = np.stack([means(rng.random(len(p)) < p) for _ in range(SIMULATIONS)])

    def ece(x: np.ndarray) -> np.ndarray:
        return (np.abs(x - confidence) * count).sum(-1) / len(p)

    low, high = np.quantile(random, (0.025, 0.975), axis=0)
    null = ece(random)
    return Reliability(
        confidence,
        frequency,
        count,
        low,
        high,
        float(ece(frequency)),
        float(null.mean()),
        float(np.quantile(null, 0.99)),
    )


@dataclass(frozen=True)
class Band:
    """The empirical distribution function of PITs and where it is for uniform ones.

    Attributes:
        x: `(k,)` points in (0, 1).
        ecdf: `(k,)` share of PITs up to each.
        low, high: `(k,)` simultaneous band: uniform PITs are inside at all points with `level`.
        inside: Whether these are.
    """

    x: np.ndarray
    ecdf: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float

    @property
    def inside(self) -> bool:
        return bool(((self.ecdf >= self.low) & (self.ecdf <= self.high)).all())


def ecdf_band(pits: Tensor, level: float = 0.95, seed: int = 0) -> Band:
    r"""Simultaneous confidence band of the ECDF of uniform PITs, by simulation.

    Pointwise :math:`n F(x_k) \sim \mathrm{Bin}(n, x_k)`; the pointwise level is the one at which
    `level` of simulated ECDFs leave no point's interval.

    Reference:
        Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its
        applications, Statistics and Computing 32, algorithm 1.
    """
    values = np.sort(pits.detach().cpu().double().numpy())
    x, low, high = _uniform_band(len(values), level, seed)
    ecdf = np.searchsorted(values, x, side="right") / len(values)
    return Band(x, ecdf, low, high, level)


@lru_cache(maxsize=32)
def _uniform_band(n: int, level: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, and the lower and upper ends of the band there, for n PITs."""
    from scipy.stats import binom

    k = max(2, min(n, 100))
    x = np.arange(1, k) / k
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(k, 1 / k), SIMULATIONS).cumsum(1)[:, :-1]
    tails = np.minimum(binom.cdf(counts, n, x), binom.sf(counts - 1, n, x))
    gamma = 2 * np.quantile(tails.min(1), 1 - level)
    return x, binom.ppf(gamma / 2, n, x) / n, binom.ppf(1 - gamma / 2, n, x) / n
