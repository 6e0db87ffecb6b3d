"""A regression on two nearly equal columns, with guides that are right or wrong in one known way.

In a module of its own, so that worker processes can import it.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from tests.scenarios import randn

X = randn(10, 2, seed=3) @ torch.tensor([[1.0, 0.95], [0.0, 0.31]])
Y = torch.zeros(10)
PRECISION = X.T @ X + torch.eye(2)
COV = torch.linalg.inv(PRECISION)


def line(x: Tensor, y: Tensor, prior_sd: float = 1.0) -> None:
    """b ~ N(0, prior_sd), y ~ N(x b, 1)."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), prior_sd).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ b if b.dim() == 1 else (x * b).sum(-1), 1.0), obs=y)


def wide_line(x: Tensor, y: Tensor) -> None:
    """The same with another prior."""
    line(x, y, prior_sd=3.0)


def renamed(x: Tensor, y: Tensor) -> None:
    """The same with another name of its latent."""
    c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ c, 1.0), obs=y)


def exact(x: Tensor, y: Tensor, rows: int = 10, shift: float = 0.0, width: float = 1.0) -> None:
    """The posterior given the first `rows`, moved by `shift` sds, its sds times `width`."""
    cov = torch.linalg.inv(x[:rows].T @ x[:rows] + torch.eye(2))
    mean = cov @ x[:rows].T @ y[:rows] + shift * cov.diagonal().sqrt()
    pyro.sample("b", dist.MultivariateNormal(mean, width**2 * cov))


def factorised(x: Tensor, y: Tensor) -> None:
    """The best independent normals: the right means, and sds of each number given the other."""
    sd = PRECISION.diagonal().rsqrt()
    pyro.sample("b", dist.Normal(COV @ x.T @ y, sd).to_event(1))


def halved(x: Tensor, y: Tensor) -> None:
    exact(x, y, rows=5)


def shifted(x: Tensor, y: Tensor) -> None:
    exact(x, y, shift=0.6)


def widened(x: Tensor, y: Tensor) -> None:
    exact(x, y, width=2.2)


def local(x: Tensor) -> None:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Encoder(nn.Module):
    """The posterior of `local`, as the encoder of an amortised guide."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.log_sd = nn.Parameter(torch.tensor(0.5).log() / 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope * x, self.log_sd.exp().expand_as(x)


def coins(x: Tensor) -> None:
    """Which of two normals each number is from, summed out."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)


def series(y: Tensor) -> None:
    """Each number depends on the one before, which is read from the data."""
    phi = pyro.sample("phi", dist.Normal(0.0, 0.5))
    with pyro.plate("time", len(y) - 1):
        pyro.sample("y", dist.Normal(phi * y[:-1], 1.0), obs=y[1:])


def residual(x: Tensor, y: Tensor) -> None:
    """With a deterministic site that is made from the observations."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b * x[:, 0], 1.0), obs=y)
    pyro.deterministic("left", (y - b * x[:, 0]).sum(-1, keepdim=True), event_dim=1)


def part(y: Tensor) -> None:
    """The model takes some of its rows a call."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])
