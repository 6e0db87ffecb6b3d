"""Two linear normal models with known evidence, and amortised guides some way off the posterior."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.scenarios import randn

NOISE = 0.5
FEATURES = randn(20, 3, seed=5).double()
UPPER, LOWER = randn(3, 2, seed=6).double(), randn(4, 3, seed=7).double()
INNER = 0.7  # sd of z1 given z2
X_COV = LOWER @ (UPPER @ UPPER.T + INNER**2 * torch.eye(3)) @ LOWER.T + NOISE**2 * torch.eye(4)


def regression(y: Tensor) -> None:
    """w ~ N(0, 1), y ~ N(features w, NOISE): global latents."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((FEATURES * w).sum(-1), NOISE), obs=y)


def regression_guide(y: Tensor, shift: float = 0.5, width: float = 1.3) -> None:
    """Means that are `shift` sds off, without correlations."""
    precision = FEATURES.T @ FEATURES / NOISE**2 + torch.eye(3)
    sd = precision.diagonal().rsqrt()
    mean = torch.linalg.solve(precision, FEATURES.T @ y) / NOISE**2
    pyro.sample("w", dist.Normal(mean + shift * sd, width * sd).to_event(1))


def regression_log_z(y: Tensor) -> Tensor:
    """log p(y), a scalar, nats."""
    cov = FEATURES @ FEATURES.T + NOISE**2 * torch.eye(len(y))
    return torch.distributions.MultivariateNormal(torch.zeros(len(y)), cov).log_prob(y)


def vae(x: Tensor) -> None:
    """z2 ~ N(0, 1), z1 ~ N(UPPER z2, INNER), x ~ N(LOWER z1, NOISE): two local layers."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2 @ UPPER.T, INNER).to_event(1))
        pyro.sample("x", dist.Normal(z1 @ LOWER.T, NOISE).to_event(1), obs=x)


def vae_guide(x: Tensor, shift: float = 0.3, width: float = 1.2) -> None:
    """Bottom up, z1 and then z2: the right means but for `shift` sds, without correlations."""
    prior = UPPER @ UPPER.T + INNER**2 * torch.eye(3)
    first = torch.linalg.inv(prior) + LOWER.T @ LOWER / NOISE**2
    second = torch.eye(2) + UPPER.T @ UPPER / INNER**2
    with pyro.plate("data", len(x)):
        mean, sd = x @ (torch.linalg.solve(first, LOWER.T) / NOISE**2).T, first.diagonal().rsqrt()
        z1 = pyro.sample("z1", dist.Normal(mean + shift * sd, width * sd).to_event(1))
        mean = z1 @ (torch.linalg.solve(second, UPPER.T) / INNER**2).T
        pyro.sample("z2", dist.Normal(mean, width * second.diagonal().rsqrt()).to_event(1))


def vae_log_z(x: Tensor) -> Tensor:
    """log p(x_i), `(N,)`, nats."""
    return torch.distributions.MultivariateNormal(torch.zeros(4), X_COV).log_prob(x)
