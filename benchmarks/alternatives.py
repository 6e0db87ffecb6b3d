"""Two published ways to a normal approximation, on a log density in unconstrained space.

Pathfinder: Zhang, Carpenter, Gelman, Vehtari 2022. Batch and match: Cai, Modi, Pillaud-Vivien,
Margossian, Gower, Blei, Saul 2024. Both are written from the papers' equations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

HISTORY, MAX_ITERATIONS, TOLERANCE = 6, 1000, 1e-8  # of L-BFGS, as in Stan
ELBO_DRAWS = 25  # for each normal along a path, as in Stan
BATCH, ROUNDS = 32, 300  # of batch and match


@dataclass
class Counted:
    """A log density with gradients, `(K, D)` to `(K)`, that counts its evaluations."""

    many: Callable[[Tensor], Tensor]
    values: int = 0
    gradients: int = 0

    def value(self, points: Tensor) -> Tensor:
        """Densities, without gradients; -inf where the model fails."""
        self.values += len(points)
        with torch.no_grad():
            return self.many(points).nan_to_num(nan=-math.inf)

    def slope(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Densities and their gradients."""
        self.gradients += len(points)
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            value = self.many(points)
            (gradient,) = torch.autograd.grad(value.sum(), points)
        return value.detach(), gradient


@dataclass(frozen=True)
class Normal:
    """A normal by mean `(D)` and a factor of its covariance `(D, D)`."""

    mean: Tensor
    factor: Tensor

    def draw(self, num: int) -> Tensor:
        return self.mean + torch.randn(num, len(self.mean)) @ self.factor.mT

    def log_prob(self, points: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(self.mean, scale_tril=self.factor)
        return normal.log_prob(points)

    def bound(self, density: Counted, num: int) -> float:
        points = self.draw(num)
        return float((density.value(points) - self.log_prob(points)).mean())


def pathfinder(density: Counted, start: Tensor) -> Normal | None:
    """The normal with the highest bound among those that L-BFGS passes on its way to a mode."""
    xs, gradients = _path(density, start)
    best, highest = None, -math.inf
    diagonal, pairs = torch.ones_like(start), []
    for i in range(1, len(xs)):
        s, y = xs[i] - xs[i - 1], gradients[i - 1] - gradients[i]
        if float(s @ y) > 1e-12 * float(y @ y):
            diagonal = _diagonal(diagonal, s, y)
            pairs = [*pairs, (s, y)][-HISTORY:]
        covariance = _inverse_hessian(diagonal, pairs)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed) or not bool(factor.isfinite().all()):
            continue
        normal = Normal(xs[i] + covariance @ gradients[i], factor)
        bound = normal.bound(density, ELBO_DRAWS)
        if bound > highest:
            best, highest = normal, bound
    return best


def _path(density: Counted, start: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The iterates of L-BFGS and the gradients of the log density there."""
    known: dict[bytes, Tensor] = {}

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = density.slope(torch.from_numpy(x.copy()).unsqueeze(0))
        known[x.tobytes()] = gradient[0]
        finite = bool(value.isfinite().all() and gradient.isfinite().all())
        return (-float(value), -gradient[0].numpy()) if finite else (1e300, np.zeros_like(x))

    first = start.numpy().copy()
    loss(first)
    xs = [first]
    options = {"maxcor": HISTORY, "maxiter": MAX_ITERATIONS, "ftol": 1e-13, "gtol": TOLERANCE}
    minimize(
        loss, first, jac=True, method="L-BFGS-B", options=options,
        callback=lambda x: xs.append(x.copy()),
    )  # fmt: skip
    xs = [x for x in xs if x.tobytes() in known]
    return [torch.from_numpy(x) for x in xs], [known[x.tobytes()] for x in xs]


def _diagonal(diagonal: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The diagonal's update (Gilbert and Lemarechal 1989), the paper's equation for alpha."""
    a, b, c = y @ (diagonal * y), y @ s, s @ (s / diagonal)
    return 1.0 / (a / (b * diagonal) + y.square() / b - a * (s / diagonal).square() / (b * c))


def _inverse_hessian(diagonal: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """L-BFGS's inverse Hessian from its diagonal and the last steps (Byrd et al. 1994)."""
    if not pairs:
        return diagonal.diag()
    s, y = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
    scaled, product = diagonal.unsqueeze(-1) * y, s.mT @ y
    upper = torch.linalg.inv(product.triu())
    corner = upper.mT @ (product.diagonal().diag() + y.mT @ scaled) @ upper
    found = diagonal.diag() + s @ corner @ s.mT - scaled @ upper @ s.mT - s @ upper.mT @ scaled.mT
    return 0.5 * (found + found.mT)


def batch_and_match(density: Counted, start: Normal) -> Normal | None:
    """The normal whose score matches that of the density, by the paper's closed-form updates."""
    mean, covariance, size = start.mean, start.factor @ start.factor.mT, len(start.mean)
    eye = torch.eye(size, dtype=mean.dtype)
    for t in range(ROUNDS):
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed) or not bool(factor.isfinite().all()):
            return None
        points = Normal(mean, factor).draw(BATCH)
        _, scores = density.slope(points)
        if not bool(scores.isfinite().all()):
            return None
        rate = BATCH * size / (t + 1.0)
        shrink = rate / (1.0 + rate)
        z, g = points.mean(0), scores.mean(0)
        u = rate * torch.cov(scores.mT, correction=0) + shrink * torch.outer(g, g)
        v = covariance + rate * torch.cov(points.mT, correction=0)
        v = v + shrink * torch.outer(mean - z, mean - z)
        half, failed = torch.linalg.cholesky_ex(v)
        if int(failed):
            return None
        values, vectors = torch.linalg.eigh(half.mT @ u @ half)
        middle = vectors / (1.0 + (1.0 + 4.0 * values.clamp_min(0.0)).sqrt()) @ vectors.mT
        covariance = 2.0 * half @ middle @ half.mT
        covariance = 0.5 * (covariance + covariance.mT) + 1e-14 * eye
        mean = shrink * (covariance @ g + z) + mean / (1.0 + rate)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if int(failed) else Normal(mean, factor)
