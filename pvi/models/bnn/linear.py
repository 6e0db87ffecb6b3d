"""Bayesian linear regression in closed form: the exact posterior of a network's last layer."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvi.errors import DataError

ROUNDS = 1000
CLOSE = 1e-8  # relative change of both scales at which the evidence is level
LEAST = 1e-6  # a noise sd, in units of the targets'


@dataclass(frozen=True)
class LinearPosterior:
    r"""The posterior of w in :math:`y \sim N(\Phi w, \sigma^2)`, :math:`w \sim N(0, \alpha^2)`.

    Attributes:
        mean: `(p,)`.
        covariance: `(p, p)`.
        noise, prior_scale: sigma and alpha.
        log_evidence: :math:`\log p(y)`, nats.
    """

    mean: Tensor
    covariance: Tensor
    noise: float
    prior_scale: float
    log_evidence: float

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        r"""Means :math:`\Phi m` and variances :math:`\phi_i^\top V \phi_i` of the function.

        Args:
            features: `(N, p)`.

        Returns:
            `(N,)` each; the variance of y has `noise` squared besides.
        """
        features = features.to(self.mean)
        return features @ self.mean, (features @ self.covariance * features).sum(-1)

    def draws(self, features: Tensor, num_draws: int, rng: np.random.Generator) -> np.ndarray:
        """Draws of the function at some features, `(num_draws, N)`.

        Args:
            features: `(N, p)`.
            num_draws: how many.
            rng: for their weights, which all rows share.
        """
        noise = torch.as_tensor(rng.standard_normal((num_draws, len(self.mean))))
        weights = self.mean + noise @ torch.linalg.cholesky(self.covariance).T
        return (weights @ features.to(weights).T).numpy()

    @property
    def mean_field_bound(self) -> float:
        r"""The ELBO of the best factorised normal, nats.

        .. math:: \log p(y) - \tfrac12 \Big(\log |V| + \sum_i \log (V^{-1})_{ii}\Big)

        It has the right means, and precisions that are the diagonal of the posterior's.
        """
        gap = self.precision.diagonal().log().sum() + torch.logdet(self.covariance)
        return self.log_evidence - 0.5 * float(gap)

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, `(p, p)`."""
        return torch.linalg.inv(self.covariance)


def linear_posterior(
    features: Tensor, y: Tensor, noise: float, prior_scale: float
) -> LinearPosterior:
    r"""The exact posterior and evidence, for known scales.

    .. math:: V^{-1} = \alpha^{-2} I + \sigma^{-2} \Phi^\top \Phi, \qquad
        m = \sigma^{-2} V \Phi^\top y

    Args:
        features: `(N, p)`, with a column of ones for a bias.
        y: `(N,)`.
        noise, prior_scale: sigma and alpha.

    Reference:
        Bishop (2006), Pattern Recognition and Machine Learning, eq. 3.53, 3.54, 3.86.

    Example:
        >>> one = torch.ones(3, 1)
        >>> found = linear_posterior(one, torch.tensor([1.0, 2.0, 3.0]), 1.0, 1.0)
        >>> float(found.mean), float(found.covariance)
        (1.5, 0.25)
    """
    phi, y = _checked(features, y)
    n, p = phi.shape
    precision = phi.T @ phi / noise**2 + torch.eye(p, dtype=phi.dtype) / prior_scale**2
    factor = torch.linalg.cholesky(precision)
    covariance = torch.cholesky_inverse(factor)
    mean = covariance @ (phi.T @ y) / noise**2
    error = (y - phi @ mean).square().sum() / noise**2 + mean.square().sum() / prior_scale**2
    log_det = 2.0 * factor.diagonal().log().sum() + 2.0 * p * math.log(prior_scale)
    constant = n * math.log(2.0 * math.pi * noise**2)
    evidence = -0.5 * float(error + log_det + constant)
    return LinearPosterior(mean, covariance, noise, prior_scale, evidence)


def best_linear_posterior(features: Tensor, y: Tensor) -> LinearPosterior:
    r"""The same at the scales that maximise the evidence, by MacKay's fixed point.

    .. math:: \gamma = p - \alpha^{-2} \operatorname{tr} V, \quad
        \alpha^2 \leftarrow \|m\|^2 / \gamma, \quad
        \sigma^2 \leftarrow \|y - \Phi m\|^2 / (N - \gamma)

    Args:
        features: `(N, p)`.
        y: `(N,)`.

    Reference:
        MacKay (1992), Bayesian Interpolation, Neural Computation 4, section 4.
    """
    phi, y = _checked(features, y)
    n = len(y)
    values, vectors = torch.linalg.eigh(phi.T @ phi)
    values, target = values.clamp(min=0.0), vectors.T @ (phi.T @ y)
    least = LEAST * max(float(y.square().mean().sqrt()), LEAST)
    alpha, noise = 1.0, max(float(y.square().mean().sqrt()), least)
    for _ in range(ROUNDS):
        precision = values / noise**2 + 1.0 / alpha**2
        mean = target / (noise**2 * precision)
        used = float((1.0 - 1.0 / (alpha**2 * precision)).sum())
        error = float((y - phi @ (vectors @ mean)).square().sum())
        before = alpha, noise
        alpha = max(math.sqrt(float(mean.square().sum()) / max(used, LEAST)), LEAST)
        noise = max(math.sqrt(error / max(n - used, 1.0)), least)
        if all(abs(a / b - 1.0) < CLOSE for a, b in zip(before, (alpha, noise), strict=True)):
            break
    return linear_posterior(phi, y, noise, alpha)


def _checked(features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or y.shape != features.shape[:1]:
        raise DataError(
            f"expected features (N, p) and targets y (N,), got {tuple(features.shape)} and "
            f"{tuple(y.shape)}"
        )
    return features.double(), y.double()
