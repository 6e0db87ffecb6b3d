"""How good and how honest are predictions of many networks at once?

Draws of the weights come first: probabilities are `(S, N, C)` for S draws, N rows and C classes,
those of the mixture `(N, C)`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvi.diagnostics.scores import brier as brier_scores
from pvi.diagnostics.scores import reliability
from pvi.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-3  # by which probabilities in float32 may miss a sum of 1


def mixture_log_likelihood(log_likelihood: Any, scale: float = 1.0) -> Tensor:
    r"""Log density of each row under the mixture of all draws, nats.

    .. math:: \log \frac{1}{S} \sum_s p(y_i \mid x_i, \theta_s) - \log c

    It is what the mean of predictive densities scores, and never that of one normal with the
    mixture's mean and variance.

    Args:
        log_likelihood: `(S, N)`, log densities at each draw.
        scale: c, the unit of y in which the densities were taken: of data standardised by their
            standard deviation c the result is the density in original units.

    Returns:
        `(N,)`.

    Example:
        >>> mixture_log_likelihood([[0.0], [0.0]], scale=math.e)
        tensor([-1.])
    """
    values = _floats(log_likelihood, "log_likelihood", 2)
    if not scale > 0:
        raise DataError(f"scale: expected the unit of y, > 0, got {scale}")
    return torch.logsumexp(values, 0) - math.log(len(values)) - math.log(scale)


def brier(probabilities: Any, y: Any) -> float:
    r"""Mean Brier score :math:`\sum_c (p_{ic} - 1[y_i = c])^2`, 0 to 2; smaller is better.

    Args:
        probabilities: `(N, C)`.
        y: `(N,)` classes from 0.

    Reference:
        Brier (1950), Verification of Forecasts Expressed in Terms of Probability.

    Example:
        >>> brier([[0.5, 0.5]], [0])
        0.5
    """
    p, y = _classified(probabilities, y)
    hot = torch.nn.functional.one_hot(y, p.shape[1]).to(p)
    return float(brier_scores(p, hot, 0.0).mean())


def ece(probabilities: Any, y: Any, bins: int = 15) -> float:
    r"""Expected calibration error of the most probable class, over bins of equal width.

    .. math:: \sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    It is above 0 for calibrated predictions too, the more the fewer rows: `plot_reliability` says
    how much.

    Args:
        probabilities: `(N, C)`.
        y: `(N,)` classes from 0.
        bins: of the confidences in (0, 1].

    Reference:
        Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, eq. 5.

    Example:
        >>> round(ece([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 6)  # right half of the time
        0.3
    """
    p, y = _classified(probabilities, y)
    confidence, guess = p.max(-1)
    gap = (guess == y).double() - confidence.double()
    where = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    return float(gap.new_zeros(bins).index_add(0, where, gap).abs().sum() / len(y))


def auroc(inside: Any, outside: Any) -> float:
    r"""How well a score tells data from outside: by chance 1/2, without errors 1.

    .. math:: P(s_{out} > s_{in}) + P(s_{out} = s_{in}) / 2

    The area under the curve of true against false alarms.

    Args:
        inside: `(n,)` scores of data like the training data, such as `Uncertainty.total`.
        outside: `(m,)` scores of others, which should be larger.

    Reference:
        Hendrycks, Gimpel (2017), A Baseline for Detecting Misclassified and Out-of-Distribution
        Examples in Neural Networks.

    Example:
        >>> auroc([0.0, 1.0], [1.0, 2.0])
        0.875
    """
    low = _floats(inside, "inside", 1).double().sort().values
    high = _floats(outside, "outside", 1).double()
    below = torch.searchsorted(low, high, right=False) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / (2 * len(low)))


@dataclass(frozen=True)
class Uncertainty:
    """A prediction's uncertainty, and how it splits: total = aleatoric + epistemic, `(N,)` each.

    `aleatoric` would stay if the weights were known, `epistemic` is what the weights' posterior
    adds. For classes they are entropies, nats, and epistemic is the mutual information of class
    and weights; for numbers they are variances.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def class_uncertainty(probabilities: Any) -> Uncertainty:
    r"""The entropy of the mixture, and its split.

    .. math:: H[\bar p_i] = \frac{1}{S} \sum_s H[p_{si}] + I(y_i; \theta)

    Args:
        probabilities: `(S, N, C)`, at each draw of the weights.

    Reference:
        Houlsby, Huszar, Ghahramani, Lengyel (2011), Bayesian Active Learning for Classification
        and Preference Learning, eq. 2.

    Example:
        >>> split = class_uncertainty([[[1.0, 0.0]], [[0.0, 1.0]]])  # sure, but not of the same
        >>> round(float(split.epistemic), 4), float(split.aleatoric)
        (0.6931, 0.0)
    """
    p = _floats(probabilities, "probabilities", 3)
    _check_sums(p)
    total, each = _entropy(p.mean(0)), _entropy(p).mean(0)
    return Uncertainty(total, each, (total - each).clamp(min=0.0))  # below 0 by rounding alone


def variance_uncertainty(mean: Any, variance: Any) -> Uncertainty:
    r"""The variance of the mixture, and its split.

    .. math:: \mathrm{Var}[y_i] = \frac{1}{S} \sum_s \sigma_{si}^2
        + \frac{1}{S} \sum_s (\mu_{si} - \bar\mu_i)^2

    Args:
        mean, variance: `(S, N)`, of y given each draw of the weights.

    Reference:
        Depeweg, Hernandez-Lobato, Doshi-Velez, Udluft (2018), Decomposition of Uncertainty in
        Bayesian Deep Learning, eq. 5.

    Example:
        >>> split = variance_uncertainty([[0.0], [2.0]], [[3.0], [5.0]])
        >>> float(split.aleatoric), float(split.epistemic), float(split.total)
        (4.0, 1.0, 5.0)
    """
    means, variances = _floats(mean, "mean", 2), _floats(variance, "variance", 2)
    if means.shape != variances.shape:
        raise DataError(
            f"variance: expected the shape {tuple(means.shape)} of mean, got "
            f"{tuple(variances.shape)}"
        )
    noise, spread = variances.mean(0), means.var(0, correction=0)
    return Uncertainty(noise + spread, noise, spread)


def plot_reliability(probabilities: Any, y: Any, bins: int = 10) -> "Figure":
    """How often the most probable class was right, against its probability.

    Grey is where 95 % of the frequencies of calibrated predictions are. Bins hold about the same
    number of rows each.

    Args:
        probabilities: `(N, C)`.
        y: `(N,)` classes from 0.
        bins: how many.
    """
    from pvi.figures import new_figure, tidy
    from pvi.plots.checks import draw_reliability

    p, y = _classified(probabilities, y)
    confidence, guess = p.max(-1)
    figure = new_figure(4.5, 3.6)
    axes = figure.subplots()
    tidy(axes)
    draw_reliability(axes, reliability(confidence, (guess == y).double(), bins))
    axes.set(xlabel="probability of the most probable class", ylabel="how often it was right")
    return figure


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _classified(probabilities: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Probabilities `(N, C)` and classes `(N,)` that fit each other."""
    p, y = _floats(probabilities, "probabilities", 2), torch.as_tensor(y)
    _check_sums(p)
    if y.shape != p.shape[:1] or y.is_floating_point():
        raise DataError(
            f"y: expected {len(p)} classes as whole numbers, one for each row of probabilities, "
            f"got shape {tuple(y.shape)} of {y.dtype}"
        )
    if bool(((y < 0) | (y >= p.shape[1])).any()):
        raise DataError(
            f"y: expected classes from 0 to {p.shape[1] - 1}, as probabilities have "
            f"{p.shape[1]} columns, got {int(y.min())} to {int(y.max())}"
        )
    return p, y.long()


def _check_sums(p: Tensor) -> None:
    off = (p.sum(-1) - 1.0).abs().max()
    if bool(p.min() < 0) or bool(off > ROUNDING):
        raise DataError(
            "probabilities: expected numbers from 0 that sum to 1 over the last dimension, got "
            f"sums up to {float(off):.2g} away from it, the least number {float(p.min()):.2g}. "
            "Take the softmax of logits first."
        )


def _floats(values: Any, name: str, dim: int) -> Tensor:
    found = torch.as_tensor(values)
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    if found.dim() != dim or not found.numel():
        raise DataError(f"{name}: expected {dim} dimensions, none empty, got {tuple(found.shape)}")
    if bool(found.isnan().any()):
        raise DataError(f"{name}: {int(found.isnan().sum())} of {found.numel()} numbers are NaN")
    return found
