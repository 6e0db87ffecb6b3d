r"""Are numbers uniform on [0, 1]? A simultaneous band around their ECDF, and tests from it.

At :math:`K - 1` points :math:`t_i = i / K` the count of N uniform numbers up to :math:`t_i` is
binomial. Its two-sided tail probability is smallest at some point: that smallest one is the test
statistic, and all counts whose tail probability is larger form the band.
"""

from functools import lru_cache

import numpy as np
import torch

CELLS = 100  # points of the ECDF that are looked at, at most
CHUNK = 256  # statistics whose paths are followed at once
SMALLEST = 1e-10  # p-values below are rounding


def uniformity_pvalues(values: np.ndarray) -> np.ndarray:
    r"""Exact p-values of the ECDF's largest departure from that of uniform numbers.

    .. math::
        \gamma = \min_i 2 \min\{P(B_i \le c_i),\, P(B_i \ge c_i)\}, \qquad
        B_i \sim \mathrm{Binomial}(N, t_i)

    with :math:`c_i` the count of values up to :math:`t_i`. :math:`P(\gamma' \le \gamma)` under
    uniformity follows from the counts as Markov chain, taken as those of a Poisson process given
    its total, so that all steps share one kernel.

    Args:
        values: `(N, *shape)` in [0, 1], independent along the first dimension.

    Returns:
        `(*shape)`; p-values below 1e-10 are given as 1e-10.

    Reference:
        Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison.

    Example:
        >>> float(uniformity_pvalues((np.arange(50) + 0.5) / 50)) > 0.99
        True
    """
    flat = values.reshape(len(values), -1)
    table = _tails(len(values))
    cells = len(table) + 1
    inside = np.minimum((flat * cells).astype(int), cells - 1)
    counts = np.stack([np.bincount(column, minlength=cells) for column in inside.T], 1)
    steps = np.arange(cells - 1)[:, None]
    gamma = table[steps, counts.cumsum(0)[:-1]].min(0, initial=1.0)
    levels, where = np.unique(gamma, return_inverse=True)
    return _pvalues(levels, table)[where].reshape(values.shape[1:])


def uniformity_band(num: int, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, and the lowest and highest ECDF there, that N uniform numbers keep to throughout.

    Args:
        num: N.
        prob: of staying inside at all points at once; at least this, as counts are whole.

    Returns:
        Three arrays `(K + 1,)` that begin at 0 and end at 1.

    Example:
        >>> points, low, high = uniformity_band(100)
        >>> bool(low[50] < 0.5 < high[50])
        True
    """
    table = _tails(num)
    kept = table > _level(num, prob)
    counts = np.arange(num + 1)
    lower = np.where(kept, counts, num).min(1) / num
    upper = np.where(kept, counts, 0).max(1) / num
    points = np.linspace(0.0, 1.0, len(table) + 2)
    return points, np.r_[0.0, lower, 1.0], np.r_[0.0, upper, 1.0]


def asymmetry_pvalues(values: np.ndarray) -> np.ndarray:
    r"""Exact p-values of the Kolmogorov-Smirnov distance between the values p and 1 - p.

    In the order of :math:`|p - 1/2|`, the largest first, N times the distance is the largest
    absolute partial sum of the signs of :math:`p - 1/2`: under symmetry a fair walk of N steps.

    Args:
        values: `(N, *shape)` in [0, 1].

    Returns:
        `(*shape)`.

    Reference:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?, section 3.2 (with the two
        samples taken as independent, which they are not).

    Example:
        >>> float(asymmetry_pvalues(np.array([0.9, 0.8, 0.7, 0.6])))
        0.125
    """
    flat = values.reshape(len(values), -1) - 0.5
    order = np.argsort(-np.abs(flat), axis=0, kind="stable")
    signs = np.sign(np.take_along_axis(flat, order, 0))
    reach = np.abs(signs.cumsum(0)).max(0).astype(int)
    found = [_walk_reaches(int(far), len(values)) for far in reach]
    return np.array(found).reshape(values.shape[1:])


def holm(pvalues: np.ndarray) -> np.ndarray:
    """P-values adjusted for their number, so that the chance of any false alarm is kept (Holm
    1979); NaN stays NaN and does not count.

    Args:
        pvalues: `(n,)`.

    Example:
        >>> holm(np.array([0.01, 0.5, 0.04])).round(2).tolist()
        [0.03, 0.5, 0.08]
    """
    adjusted = np.full(len(pvalues), np.nan)
    order = np.argsort(pvalues)[: int(np.isfinite(pvalues).sum())]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(pvalues[order] * factors), 1.0)
    return adjusted


@lru_cache(maxsize=64)
def _level(num: int, prob: float) -> float:
    """The largest statistic that is as small with a probability of at most 1 - `prob`."""
    table, low, high = _tails(num), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        outside = _pvalues(np.array([middle]), table)[0] <= 1 - prob
        low, high = (middle, high) if outside else (low, middle)
    return low


@lru_cache(maxsize=4)
def _tails(num: int) -> np.ndarray:
    """Twice the smaller tail probability of each count at each inner point, `(K - 1, N + 1)`."""
    cells = max(2, min(num, CELLS))
    share = np.arange(1, cells)[:, None] / cells
    counts = np.arange(num + 1)
    log_fact = _log_factorials(num)
    log_pmf = log_fact[num] - log_fact - log_fact[::-1]
    pmf = np.exp(log_pmf + counts * np.log(share) + (num - counts) * np.log1p(-share))
    up = np.minimum(pmf.cumsum(1), 1.0)
    down = np.minimum(pmf[:, ::-1].cumsum(1)[:, ::-1], 1.0)
    return np.minimum(2 * np.minimum(up, down), 1.0)


def _pvalues(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The chance that N uniform numbers have a statistic of at most each level, `(n,)`."""
    num, cells = table.shape[1] - 1, len(table) + 1
    rate = num / cells
    log_fact = _log_factorials(num)
    counts = np.arange(num + 1)
    kernel = np.exp(counts * np.log(rate) - rate - log_fact)
    size = 2 * num + 2
    spectrum = np.fft.rfft(kernel, size)
    total = np.exp(num * np.log(num) - num - log_fact[num])
    found = []
    for start in range(0, len(levels), CHUNK):
        chunk = levels[start : start + CHUNK, None]
        paths = np.zeros((len(chunk), num + 1))
        paths[:, 0] = 1.0
        for tails in table:
            moved = np.fft.irfft(np.fft.rfft(paths, size) * spectrum, size)[:, : num + 1]
            paths = np.where(tails > chunk * (1 + 1e-9), np.maximum(moved, 0.0), 0.0)
        found.append(1 - (paths * kernel[::-1]).sum(1) / total)
    return np.clip(np.concatenate(found), SMALLEST, 1.0)


@lru_cache(maxsize=4096)
def _walk_reaches(far: int, steps: int) -> float:
    """The chance that a fair walk of so many steps gets this far from 0 in either direction."""
    if far <= 1:
        return 1.0
    chances = np.zeros(2 * far - 1)
    chances[far - 1] = 1.0
    for _ in range(steps):
        chances[1:-1], chances[0], chances[-1] = (
            (chances[2:] + chances[:-2]) / 2,
            chances[1] / 2,
            chances[-2] / 2,
        )
    return float(max(1 - chances.sum(), SMALLEST))


def _log_factorials(num: int) -> np.ndarray:
    return torch.lgamma(torch.arange(1, num + 2, dtype=torch.float64, device="cpu")).numpy()
