"""Posteriors for `benchmarks.rates`: losses of many runs at once, and what they are held against.

Each run is a row of parameters. A step of all runs costs about what a step of one does, so that
schedules can be compared over seeds and rates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pvi
from pvi.guides import FullRank, MeanField

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A negative bound and where its optimum is.

    Args:
        start: `(P)`, the parameters that a fit starts from.
        rate: the default rate of `pvi.fit`.
        rows, batch: of the data, and in a step.
        noise: numbers in one draw.
        numbers: latent numbers; the tolerance of `Stages` grows with them.
        loss: of parameters `(P)`, row numbers `(batch)` and noise `(K, noise)`, nats.
        best: `(P)`, the optimum of the family, where it is known.
        errors: of parameters `(R, P)`: largest error of a mean in sds, and of a log sd.
        held: of parameters `(R, P)`: the loss on data that are not trained on, where that counts.
        particles: draws in a step.
    """

    start: Tensor
    rate: float
    rows: int
    batch: int
    noise: int
    numbers: int
    loss: Loss
    best: Tensor | None = None
    errors: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    held: Callable[[Tensor], Tensor] | None = None
    particles: int = 8

    @property
    def passes(self) -> int:
        """Batches that hold all rows once."""
        return self.rows // self.batch


LogJoint = Callable[[Tensor, Tensor], Tensor]  # of latents (K, D) and rows: (K)


def normal_problem(
    log_joint: LogJoint,
    guide: Any,
    data: tuple[Tensor, ...],
    start: Tensor,
    batch: int,
    full_rank: bool,
    local: int = 0,
) -> Problem:
    """A normal guide with the parameters of `pvi.guides`, from the deterministic route's optimum.

    Args:
        log_joint: scaled to all rows; of the global and then the batch's local latents.
        guide: of `pvi`, fitted.
        local: latents that belong to rows, the last of D.
    """
    size = len(start)
    eye, shrink = torch.eye(size), size**-0.25
    entropy = 0.5 * size * (1.0 + math.log(2.0 * math.pi))

    def factor(p: Tensor) -> Tensor:
        entries = p[..., 2 * size :].unflatten(-1, (size, size))
        return p[..., size : 2 * size, None].exp() * (torch.tril(entries * shrink, -1) + eye)

    def loss(p: Tensor, rows: Tensor, noise: Tensor) -> Tensor:
        loc, log_scale = p[:size], p[size : 2 * size]
        if full_rank:
            return -(log_joint(loc + noise @ factor(p).mT, rows).mean() + log_scale.sum() + entropy)
        z = loc + log_scale.exp() * noise
        own = log_scale
        if local:  # the batch's, and their entropy for all
            globals_ = size - local
            places = torch.cat([torch.arange(globals_), globals_ + rows])
            z, weight = z[:, places], local / len(rows)
            own = torch.cat([log_scale[:globals_], weight * log_scale[globals_ + rows]])
        return -(log_joint(z, rows).mean() + own.sum() + entropy)

    def spread(p: Tensor) -> Tensor:
        return factor(p).norm(dim=-1) if full_rank else p[..., size : 2 * size].exp()

    mean, covariance = normal_of(guide)
    sds = covariance.diagonal().sqrt().float()
    best = torch.cat([mean.float(), sds.log()])
    if full_rank:
        tril = torch.linalg.cholesky(covariance)
        scale = tril.diagonal()
        entries = torch.tril(tril / scale[:, None], -1) / shrink
        best = torch.cat([mean, scale.log(), entries.reshape(-1)]).float()

    def errors(p: Tensor) -> tuple[Tensor, Tensor]:
        off = ((p[:, :size] - mean.float()) / sds).abs().amax(-1)
        return off, (spread(p) / sds).log().abs().amax(-1)

    begin = torch.cat([start, torch.full((size,), math.log(0.1))])
    if full_rank:
        begin = torch.cat([begin, torch.zeros(size * size)])
    return Problem(begin, 0.05, len(data[0]), batch, size, size, loss, best, errors)


def normal_of(guide: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the vector of all latents in unconstrained space, in double."""
    noise = torch.cat([torch.zeros(1, guide.noise_size), torch.eye(guide.noise_size)])
    with torch.no_grad():
        points = guide.transport(noise).double()
    factor = points[1:] - points[0]
    return points[0], factor.T @ factor


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        logits = (x @ w.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def logistic_data(rows: int = 10_000, columns: int = 20) -> tuple[Tensor, Tensor]:
    """Neighbouring columns correlate by 0.9; their sds run from 0.1 to 10."""
    make = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, columns, generator=make)
    x = noise.clone()
    for j in range(1, columns):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * noise[:, j]
    scales = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=make)]
    w = torch.randn(columns, generator=make) / 3
    y = torch.bernoulli(torch.sigmoid(x @ w), generator=make)
    return x * scales, y


def logistic_problem(family: Any) -> Problem:
    x, y = logistic_data()

    def log_joint(w: Tensor, rows: Tensor) -> Tensor:
        logits = w @ x[rows].mT
        each = (y[rows] * logits - softplus(logits)).sum(-1)
        return len(x) / len(rows) * each - 0.005 * w.square().sum(-1)

    guide = _fitted(logistic, family, (x, y))
    start = torch.zeros(x.shape[1])
    return normal_problem(log_joint, guide, (x, y), start, 100, family is FullRank)


def valley(x: Tensor, y: Tensor) -> None:
    """The kidscore regression: an intercept far from the data and its slope."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 100.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(x)):
        mean = beta[..., 0].unsqueeze(-1) + beta[..., 1].unsqueeze(-1) * x
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)), obs=y)


def valley_data(rows: int = 434) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(2)
    x = 100.0 + 15.0 * torch.randn(rows, generator=make)
    return x, 25.8 + 0.61 * x + 18.3 * torch.randn(rows, generator=make)


def valley_problem(family: Any) -> Problem:
    x, y = valley_data()

    def log_joint(z: Tensor, rows: Tensor) -> Tensor:
        a, b, log_sigma = (z[:, j, None] for j in range(3))
        each = (-log_sigma - 0.5 * ((y - a - b * x) * (-log_sigma).exp()) ** 2).sum(-1)
        prior = -0.5 * (z[:, :2] / 100).square().sum(-1)
        return each + prior - softplus(2 * (log_sigma[:, 0] - math.log(2.5))) + log_sigma[:, 0]

    start = torch.tensor([0.0, 0.0, math.log(2.5)])
    guide = _fitted(valley, family, (x, y))
    return normal_problem(log_joint, guide, (x, y), start, len(x), family is FullRank)


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        mean = theta.unsqueeze(-1).expand(*theta.shape, y.shape[-1])
        pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def hierarchy_data(groups: int = 300, each: int = 5) -> Tensor:
    make = torch.Generator().manual_seed(1)
    theta = 1.5 + 0.5 * torch.randn(groups, 1, generator=make)
    return theta + 0.8 * torch.randn(groups, each, generator=make)


def hierarchy_problem(family: Any) -> Problem:
    y = hierarchy_data()

    def log_joint(z: Tensor, rows: Tensor) -> Tensor:
        mu, log_tau, log_sigma, theta = *(z[:, j, None] for j in range(3)), z[:, 3:]
        scales = torch.cat([log_tau, log_sigma], -1)
        prior = -0.02 * mu[:, 0].square() + (scales - 0.125 * (2 * scales).exp()).sum(-1)
        local = -log_tau - 0.5 * ((theta - mu) * (-log_tau).exp()) ** 2
        away = (y[rows] - theta.unsqueeze(-1)) * (-log_sigma).exp().unsqueeze(-1)
        each = (-log_sigma.unsqueeze(-1) - 0.5 * away**2).sum(-1)
        return prior + len(y) / len(rows) * (local + each).sum(-1)

    middle = math.log(2.0 * 0.6745)
    start = torch.tensor([0.0, middle, middle] + [0.0] * len(y))
    guide = _fitted(hierarchy, family, (y,))
    return normal_problem(log_joint, guide, (y,), start, 30, False, len(y))


def _fitted(model: Any, family: Any, data: tuple[Tensor, ...]) -> Any:
    fit = pvi.fit(model, family(model), data, seed=0, progress=False)
    assert fit.converged, fit.reason
    return fit.guide


def network_problem(width: int = 16, rows: int = 200) -> Problem:
    """A Bayesian network with one hidden layer for one column, `MeanField`; many equal optima."""
    make = torch.Generator().manual_seed(3)
    x = 4.0 * torch.rand(rows, generator=make) - 2.0
    y = torch.sin(3.0 * x) + 0.1 * torch.randn(rows, generator=make)
    size, batch = 3 * width + 1, 50

    def loss(p: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
        loc, log_scale = p[:size], p[size:]
        w = (loc + log_scale.exp() * noise).unsqueeze(-1)
        hidden = torch.tanh(3.0 * (w[:, :width] * x[chosen] + w[:, width : 2 * width]))
        mean = (w[:, 2 * width : 3 * width] * hidden).sum(-2) + w[:, -1]
        each = (-0.5 * ((y[chosen] - mean) / 0.1) ** 2 - math.log(0.1 * 2.5066283)).sum(-1).mean()
        kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1.0) - log_scale
        return kl.sum() - rows / len(chosen) * each

    # hidden units that start alike stay alike: spread them, as random starts of networks do
    loc = 0.5 * torch.randn(size, generator=make)
    start = torch.cat([loc, torch.full((size,), math.log(0.1))])
    return Problem(start, 0.05, rows, batch, size, size, loss)


def vae_problem(width: int = 32, code: int = 5) -> Problem:
    """An encoder and a decoder on 1,297 digits; scored on 500 others, nats an image."""
    from sklearn.datasets import load_digits

    make = torch.Generator().manual_seed(4)
    order = torch.randperm(1797, generator=make)
    pixels: Any = load_digits(return_X_y=True)[0]
    images = (torch.tensor(pixels)[order] > 7.5).float()
    shapes = [(width, 64), (width,), (2 * code, width), (2 * code,)]
    shapes += [(width, code), (width,), (64, width), (64,)]
    sizes = [math.prod(shape) for shape in shapes]

    def bound(p: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = (
            part.reshape(shape) for part, shape in zip(p.split(sizes), shapes, strict=True)
        )
        loc, log_scale = (torch.tanh(x @ a.mT + b) @ c.mT + d).chunk(2, -1)
        z = loc + log_scale.exp() * noise.reshape(-1, code)[: len(x)]
        logits = torch.tanh(z @ e.mT + f) @ g.mT + h
        kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1.0) - log_scale
        return (x * logits - softplus(logits)).sum(-1) - kl.sum(-1)

    def loss(p: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
        return -1297 / len(chosen) * bound(p, images[chosen], noise[0]).sum()

    def held(p: Tensor) -> Tensor:
        noise = torch.randn(500 * code, generator=torch.Generator().manual_seed(5))
        return -torch.vmap(lambda row: bound(row, images[1297:], noise).mean())(p)

    parts = [
        torch.randn(n, generator=make) * (s[-1] ** -0.5 if len(s) > 1 else 0.0)
        for n, s in zip(sizes, shapes, strict=True)
    ]
    size = 1297 * code
    return Problem(
        torch.cat(parts), 2e-3, 1297, 100, 100 * code, size, loss, held=held, particles=1
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "logistic, mean field": partial(logistic_problem, MeanField),
    "logistic, full rank": partial(logistic_problem, FullRank),
    "hierarchy, mean field": partial(hierarchy_problem, MeanField),
    "valley, mean field": partial(valley_problem, MeanField),
    "valley, full rank": partial(valley_problem, FullRank),
    "Bayesian network": network_problem,
    "VAE": vae_problem,
}
