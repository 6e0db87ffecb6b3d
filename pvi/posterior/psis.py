"""Pareto-smoothed importance sampling: can draws from q be reweighted to p, by what weights?"""

import math
from dataclasses import dataclass

import torch

from pvi.errors import DataError

MIN_TAIL = 5  # with fewer tail values a two-parameter fit says nothing
FLAT = 1e-6  # nats: ratios that differ by less are equal, up to float32 rounding
PRIOR_WEIGHT, PRIOR_KHAT = 10.0, 0.5  # the prior on k is worth 10 tail values at k = 0.5


@dataclass(frozen=True)
class PSIS:
    r"""Smoothed importance weights and what they are worth.

    Attributes:
        log_weights: `(S,)` float64, normalised: `logsumexp(log_weights) = 0`.
        khat: Tail index of the raw weights; they have about `1 / khat` finite moments. 0 for a flat
            upper tail (all ratios equal, say), inf where the tail is too short to be fitted.
        ess: Absolute effective sample size :math:`1 / \sum_s w_s^2`, in draws (divide by S for the
            relative one). It is optimistic where `khat` is above `khat_threshold(S)`.
        log_mean: :math:`\log \frac1S \sum_s r_s` of the smoothed, unnormalised ratios, in nats:
            the estimate of `log Z` where the ratios are `log p(x, z) - log q(z)`.
    """

    log_weights: torch.Tensor
    khat: float
    ess: float
    log_mean: float


def psis(log_ratios: torch.Tensor) -> PSIS:
    r"""Smooth the largest importance ratios by a generalized Pareto distribution fitted to them.

    The :math:`M = \lceil \min(S/5, 3\sqrt S) \rceil` largest ratios are replaced by the quantiles
    :math:`F^{-1}((m - 1/2)/M)` of the fit, truncated at the largest raw ratio. Nothing is smoothed
    if the tail has fewer than 5 values (S <= 20, or nearly all ratios are `-inf` or negligible):
    `khat` is then inf, because it cannot be known. If the `M + 1` largest ratios are equal, or all
    are, the weights are bounded and flat: `khat` is 0, and constant ratios give `ess = S`.

    Args:
        log_ratios: `(S,)`, log p - log q in nats, each up to a constant. `-inf` is a zero weight.

    Returns:
        Weights, `khat`, ESS and log mean ratio, computed in float64 on the ratios' device.

    Raises:
        DataError: Not one-dimensional, empty, NaN or `+inf` present, or no ratio is finite.

    Reference:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto Smoothed Importance Sampling, JMLR
        25(72); Zhang and Stephens (2009), Technometrics 51(3), for the fit.

    Example:
        >>> round(psis(torch.zeros(100)).ess, 6)
        100.0
    """
    raw = _checked(log_ratios)
    largest = raw.max()
    x = raw - largest
    order = x.topk(min(tail_size(len(x)) + 1, len(x)), sorted=False).indices.sort().values
    top, rank = x[order].sort(stable=True)  # ascending, the largest is 0; ties as they came
    order = order[rank]
    flat = len(x) > 1 and bool(x.min() >= -FLAT)
    tail, khat = (top[len(top) :], 0.0) if flat else smooth_tail(top)
    x[order[len(order) - len(tail) :]] = tail
    log_sum = torch.logsumexp(x, 0)
    x -= log_sum
    return PSIS(
        log_weights=x,
        khat=khat,
        ess=torch.exp(-torch.logsumexp(2 * x, 0)).item(),
        log_mean=(log_sum + largest).item() - math.log(len(x)),
    )


def khat_threshold(num_draws: int) -> float:
    r"""Bound on `khat` below which S draws are usable, :math:`\min(1 - 1/\log_{10}S, 0.7)`.

    Reference:
        Vehtari et al. (2024), the sample-size dependent threshold of khat.

    Example:
        >>> round(khat_threshold(100), 2), khat_threshold(20_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_draws), 0.7) if num_draws > 1 else -math.inf


def num_not_weights(log_ratios: torch.Tensor) -> int:
    """How many are NaN or +inf, which no weight can be."""
    return int((log_ratios.isnan() | log_ratios.isposinf()).sum())


def _checked(log_ratios: torch.Tensor) -> torch.Tensor:
    """The ratios `(S,)` in float64, or an error that says what is wrong with them."""
    if log_ratios.ndim != 1 or len(log_ratios) == 0:
        shape = tuple(log_ratios.shape)
        raise DataError(f"psis expects log ratios of shape (S,) with S >= 1, got {shape}.")
    raw = log_ratios.detach().to(torch.float64)
    num_bad = num_not_weights(raw)
    if num_bad or torch.isneginf(raw).all():
        what = f"{num_bad} that are NaN or +inf" if num_bad else "only -inf"
        raise DataError(
            f"psis expects {len(raw)} log ratios that are finite or -inf, got {what}: look for an "
            "overflow in the model, or a guide outside the model's support."
        )
    return raw


def tail_size(num_draws: int) -> int:
    r"""How many of the largest ratios the fit uses, :math:`\lceil\min(S/5, 3\sqrt S)\rceil`."""
    return math.ceil(min(0.2 * num_draws, 3 * math.sqrt(num_draws)))


def smooth_tail(top: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Smoothed upper tail `(M,)` and khat, from the `tail_size(S) + 1` largest of S log ratios,
    ascending, the largest 0.
    """
    nothing = top[len(top) :]
    if len(top) <= MIN_TAIL:
        return nothing, math.inf
    # Below the root of the smallest float a weight is nothing beside the largest.
    cutoff = top[0].clamp(min=math.log(torch.finfo(top.dtype).tiny) / 2)
    if cutoff >= -FLAT:
        return nothing, 0.0
    tail = top[top > cutoff]
    if len(tail) < MIN_TAIL:
        return nothing, math.inf
    k, sigma = _fit_pareto(torch.expm1(tail - cutoff))  # excesses in units of exp(cutoff)
    p = (torch.arange(len(tail), dtype=top.dtype, device=top.device) + 0.5) / len(tail)
    exponential = -torch.log1p(-p)
    quantile = sigma * torch.where(k == 0, exponential, torch.expm1(k * exponential) / k)
    return (cutoff + torch.log1p(quantile)).clamp(max=0.0), k.item()


def _fit_pareto(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Shape k and scale sigma of a generalized Pareto distribution, for ascending `y > 0` `(n,)`.

    With :math:`b = -k/\sigma` the likelihood is profiled,
    :math:`k(b) = \frac1n\sum\log(1 - b y_i)` and :math:`\ell(b) = -n(\log\sigma(b) + k(b) + 1)`;
    b is its mean under the likelihood and the prior of Zhang and Stephens, by quadrature. Then k is
    shrunk: :math:`(n k + 10 \cdot 0.5) / (n + 10)`.
    """
    n = len(y)
    m = 30 + math.isqrt(n)
    step = torch.arange(1, m + 1, dtype=y.dtype, device=y.device) - 0.5
    b = 1 / y[-1] + (1 - torch.sqrt(m / step)) / (3 * y[int(n / 4 + 0.5) - 1])

    def shape_and_scale(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = torch.log1p(-b[..., None] * y).mean(-1)
        return k, torch.where(b == 0, y.mean(), -k / b)

    k, sigma = shape_and_scale(b)
    weight = torch.softmax(-n * (sigma.log() + k + 1), 0)
    k, sigma = shape_and_scale((weight * b).sum())
    return (n * k + PRIOR_WEIGHT * PRIOR_KHAT) / (n + PRIOR_WEIGHT), sigma
