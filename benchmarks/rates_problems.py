"""Posteriors that Adam fits, with what their fits are held against: for `benchmarks.rates`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvi
from pvi.guides import FullRank, MeanField

Score = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Problem:
    """What `pvi.fit` is given, its default rate, and how a guide is scored.

    Args:
        arguments: of `pvi.fit`, made anew for each fit.
        rate: the default of `pvi.fit`.
        score: of the guide as it stands, from the arguments; "gap" is in nats.
    """

    arguments: Callable[[], dict[str, Any]]
    rate: float
    score: Callable[[dict[str, Any]], dict[str, float]]


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


def network(x: Tensor, y: Tensor, width: int = 16) -> None:
    """A Bayesian network with one hidden layer, for one column."""
    size = 3 * width + 1
    w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1)).unsqueeze(-1)
    hidden = torch.tanh(3.0 * (w[..., :width, :] * x + w[..., width : 2 * width, :]))
    mean = (w[..., 2 * width : 3 * width, :] * hidden).sum(-2) + w[..., -1, :]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def network_data(rows: int = 200) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(3)
    x = 4.0 * torch.rand(rows, generator=make) - 2.0
    return x, torch.sin(3.0 * x) + 0.1 * torch.randn(rows, generator=make)


class Encoder(nn.Module):
    """Location and scale of the code of an image."""

    def __init__(self, width: int, code: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2 * code))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.net(x).chunk(2, -1)
        return loc, log_scale.exp()


def vae(width: int = 32, code: int = 5) -> dict[str, Any]:
    encoder = Encoder(width, code)
    decoder = nn.Sequential(nn.Linear(code, width), nn.Tanh(), nn.Linear(width, 64))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), code), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    return {"model": model, "guide": guide, "data": digits()[:1297], "batch_size": 100}


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(4))
    return (torch.tensor(load_digits().data)[order] > 7.5).to(torch.get_default_dtype())


def bound(arguments: dict[str, Any], data: tuple[Tensor, ...], repeats: int) -> float:
    """Mean bound of the programs as they stand, nats; the same draws each time."""
    objective = pvi.ELBO(kl="exact")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [
            objective.loss(arguments["model"], arguments["guide"], *data) for _ in range(repeats)
        ]
    return -sum(losses) / repeats


def normal_of(guide: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the vector of all latents in unconstrained space, in double."""
    noise = torch.cat([torch.zeros(1, guide.noise_size), torch.eye(guide.noise_size)])
    with torch.no_grad():
        points = guide.transport(noise).double()
    factor = points[1:] - points[0]
    return points[0], factor.T @ factor


def against(reference: tuple[Tensor, Tensor], arguments: dict[str, Any]) -> dict[str, float]:
    """KL(q | q*) in nats, largest errors of means in sds and of log sds."""
    (mean, cov), (m, c) = reference, normal_of(arguments["guide"])
    sd = cov.diagonal().sqrt()
    inverse = torch.linalg.inv(cov)
    gap = 0.5 * (
        (inverse * c).sum() - len(m) + (m - mean) @ inverse @ (m - mean)
        + torch.logdet(cov) - torch.logdet(c)
    )
    ratio = c.diagonal().sqrt() / sd
    return {
        "gap": float(gap),
        "mean": float(((m - mean) / sd).abs().max()),
        "sd": float(ratio.log().abs().max()),
    }


def normal_problem(
    model: Any, guide: Any, data: tuple[Tensor, ...], batch_size: int | None
) -> Problem:
    """A normal guide, held against the optimum of its family from the deterministic route."""

    def arguments() -> dict[str, Any]:
        return {"model": model, "guide": guide(model), "data": data, "batch_size": batch_size}

    reference = pvi.fit(model, guide(model), data, seed=0, progress=False)
    assert reference.converged, reference.reason
    return Problem(arguments, 0.05, partial(against, normal_of(reference.guide)))


def problems(names: Sequence[str]) -> dict[str, Callable[[], Problem]]:
    """Makers of problems by name; their references take seconds."""

    def bayesian_network() -> Problem:
        data = network_data()
        return Problem(
            lambda: {"model": network, "guide": MeanField(network), "data": data, "batch_size": 50},
            0.05,
            lambda arguments: {"gap": -bound(arguments, data, 1000)},
        )

    def digit_vae() -> Problem:
        held = digits()[1297:]
        return Problem(vae, 2e-3, lambda arguments: {"gap": -bound(arguments, (held,), 20) / 500})

    both = {"mean field": MeanField, "full rank": FullRank}
    makers: dict[str, Callable[[], Problem]] = {}
    for word, guide in both.items():
        makers[f"logistic, {word}"] = partial(normal_problem, logistic, guide, logistic_data(), 100)
        makers[f"valley, {word}"] = partial(normal_problem, valley, guide, valley_data(), None)
    makers["hierarchy"] = partial(normal_problem, hierarchy, MeanField, (hierarchy_data(),), 30)
    makers["network"] = bayesian_network
    makers["VAE"] = digit_vae
    return {name: makers[name] for name in names or makers}
