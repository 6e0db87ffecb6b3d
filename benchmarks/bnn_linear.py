"""Bayesian linear regression through `bayesianize` and by other packages, against the truth.

For y ~ N(x w + b, noise) with N(0, 1) priors the best factorised normal is known in closed form,
and so are its bound and the evidence. Peers take 600 steps of Adam, pvi its default without
minibatches (L-BFGS on fixed draws), and with local reparameterisation 8,000 steps of Adam whose
rate falls. What a package ends at is put into the exact bound.
"""

from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from benchmarks.bnn_peers import PEERS, Found, run, version
from benchmarks.common import parser, report
from pvi.models import bnn
from pvi.models.bnn.continual import posterior_as_prior
from pvi.models.bnn.linear import LinearPosterior, linear_posterior

ROWS, NOISE = 50, 0.5
PARTICLES = (1, 8)
LOCAL_STEPS = 8000
HEADER = (
    "package",
    "particles",
    "bound below the best, nats",
    "reported minus exact bound",
    "sds off by, %",
    "means off by, sds",
    "error",
)
MEANING = {
    "bound below the best": "exact ELBO at the means and sds found, below that of the best mean "
    "field (full rank: below the evidence)",
    "reported minus exact bound": "its own bound or minus loss, minus the exact one there",
    "sds off by": "largest error of an sd, relative to the best one",
}


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Rows with correlated columns, float64."""
    torch.manual_seed(seed)
    mixing = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 1.0]])
    x = torch.randn(ROWS, 3) @ mixing
    y = x @ torch.tensor([1.0, -0.5, 0.2]) + 0.3 + NOISE * torch.randn(ROWS)
    return x.double(), y.double()


def exact(x: Tensor, y: Tensor) -> LinearPosterior:
    return linear_posterior(with_one(x), y, NOISE, 1.0)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def bound(x: Tensor, y: Tensor, mean: Tensor, cov: Tensor) -> float:
    """The exact ELBO of N(mean, cov) for weights and bias, nats."""
    phi, p = with_one(x), len(mean)
    fit = torch.distributions.Normal(phi @ mean, NOISE).log_prob(y).sum()
    fit = fit - (phi @ cov * phi).sum() / (2 * NOISE**2)
    kl = 0.5 * (cov.trace() + mean.square().sum() - p - torch.logdet(cov))
    return float(fit - kl)


def ours(x: Tensor, y: Tensor, particles: int, local: bool, guide: Any) -> tuple[Any, float]:
    """Mean and covariance of weights and bias, and the mean bound of fresh draws."""
    model = bnn.bayesianize(
        nn.Linear(x.shape[1], 1).double(),
        prior=pyro_normal(),
        likelihood=bnn.Gaussian(NOISE),
    )
    program = pvi.local_reparam(model) if local else model
    objective = pvi.ELBO(particles, kl="exact")
    options = {"objective": objective, "seed": 0, "progress": False}
    if local:
        decay = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=LOCAL_STEPS)
        options |= {"steps": LOCAL_STEPS, "lr": 0.02, "scheduler": decay}
    fit = pvi.fit(program, guide, (x, y), **options)
    reported = float(fit.posterior.log_weights(20_000, seed=1).mean())
    if isinstance(guide, pvi.guides.MeanField):
        both = zip(*posterior_as_prior(fit).values.values(), strict=True)
        mean, sd = (torch.cat([x.flatten() for x in each]) for each in both)
        return (mean, torch.diag(sd.square())), reported
    draws = fit.posterior.sample(400_000, seed=0)
    flat = torch.cat([draws["weight"].flatten(1), draws["bias"].flatten(1)], 1)
    return (flat.mean(0), flat.T.cov()), reported


def pyro_normal() -> Any:
    return dist.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))


def our_rows(x: Tensor, y: Tensor) -> list[list[Any]]:
    best, found = exact(x, y), []
    for particles in PARTICLES:
        for local in (False, True):
            (mean, cov), reported = ours(x, y, particles, local, pvi.guides.MeanField())
            name = "pvi, local reparam" if local else "pvi"
            sd = cov.diagonal().sqrt()
            here = bound(x, y, mean, cov)
            found.append(
                line(name, particles, best, mean, sd, best.mean_field_bound, here, reported)
            )
        (mean, cov), reported = ours(x, y, particles, False, pvi.guides.FullRank())
        here, sd = bound(x, y, mean, cov), cov.diagonal().sqrt()
        row = line("pvi, full rank", particles, best, mean, sd, best.log_evidence, here, reported)
        row[4] = 100 * float((sd / best.covariance.diagonal().sqrt() - 1).abs().max())
        found.append(row)
    return found


def line(
    name: str,
    particles: int,
    best: LinearPosterior,
    mean: Tensor,
    sd: Tensor,
    optimum: float,
    here: float,
    reported: float,
) -> list[Any]:
    wanted = best.precision.diagonal().rsqrt()
    away = 100 * float((sd / wanted - 1).abs().max())
    shift = float(((mean - best.mean) / wanted).abs().max())
    return [name, particles, optimum - here, reported - here, away, shift, ""]


def peer_rows(x: Tensor, y: Tensor) -> list[list[Any]]:
    best, rows = exact(x, y), []
    for name in PEERS:
        label = f"{name} {version(PEERS[name][0]) or ''}".strip()
        for particles in PARTICLES:
            torch.manual_seed(0)
            found = run(name, x, y, NOISE, particles)
            if not isinstance(found, Found):
                rows.append([label, particles, None, None, None, None, found])
                continue
            mean, sd = found.mean.double(), found.sd.double()
            here = bound(x, y, mean, torch.diag(sd.square()))
            optimum = best.mean_field_bound
            rows.append(line(label, particles, best, mean, sd, optimum, here, found.reported))
    return rows


def part(results: Any, seed: int) -> None:
    """Print the table and keep it."""
    x, y = data(seed)
    rows = our_rows(x, y) + peer_rows(x, y)
    shown = [[round(cell, 3) if isinstance(cell, float) else cell for cell in row] for row in rows]
    report("bnn", HEADER, shown, results, key="linear", more={"linear_meaning": MEANING})


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    part(given.results, given.seed)
