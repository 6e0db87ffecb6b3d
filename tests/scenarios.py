"""Models and guides shared by the tests and the benchmarks, with the answers where they are known.

Every guide is off the posterior and off the prior, so that no term or gradient is zero by accident.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor, nn
from torch.distributions import constraints

import pvi

Program = Callable[..., Any]

EXACT = 1e-10  # two ways to compute the same number in double precision
K = 5  # particles
ALPHAS = {"elbo": 1.0, "iwae": 0.0, "renyi 0.5": 0.5, "renyi 2": 2.0}
BATCHED = {"batched": True, "looped": False}


@contextmanager
def isolated(dtype: torch.dtype = torch.float64, seed: int = 0) -> Iterator[None]:
    """Run in `dtype` with an empty parameter store and a fixed seed; put everything back."""
    default = torch.get_default_dtype()
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(default)
        pyro.clear_param_store()


def objective(alpha: float, num_particles: int = K, **options: Any) -> pvi.Objective:
    if alpha == 1.0:
        return pvi.ELBO(num_particles, **options)
    return pvi.RenyiELBO(alpha, num_particles, **options)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def param(name: str, value: Any, **options: Any) -> Tensor:
    """A `pyro.param` that starts at `value`, in the default dtype."""
    start = torch.as_tensor(value, dtype=torch.get_default_dtype())
    return pyro.param(name, start.clone(), **options)


def positive(name: str, value: Any, **options: Any) -> Tensor:
    return param(name, value, constraint=constraints.positive, **options)


def mean_se(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def repeat(value: Callable[[], float], times: int) -> Tensor:
    """Independent evaluations `(times,)`."""
    return torch.tensor([value() for _ in range(times)])


class FixedNoise(dist.Normal):
    """A normal whose draws are loc + scale * noise, with `noise` `(K, *batch)` given.

    With it the value of an objective is a function of the parameters, so two ways to compute it can
    be compared to the last digit. A run without a particle dimension takes the noise of particle 0.
    """

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor, **options: Any):
        self.noise = noise
        super().__init__(loc, scale, **options)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FixedNoise":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return FixedNoise(loc, scale, self.noise, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        depth = len(self.batch_shape) - (self.noise.dim() - 1)
        noise = self.noise[: self.batch_shape[0]] if depth else self.noise[0]
        if depth:  # particles, then dimensions that other sites use
            noise = noise.reshape(len(noise), *(1,) * (depth - 1), *noise.shape[1:])
        return self.loc + self.scale * noise


def normal(x: Any, loc: Any, scale: Any) -> Tensor:
    """log N(x; loc, scale), written out."""
    x, loc, scale = (torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in (x, loc, scale))
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def power_mean(log_w: Tensor, alpha: float) -> Tensor:
    """The definition, without any care for overflow: `(K, ...) -> (...)`."""
    if alpha == 1.0:
        return log_w.mean(0)
    return (log_w.exp() ** (1.0 - alpha)).mean(0).log() / (1.0 - alpha)


def gradients(loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters in the store, by name."""
    leaves = {n: p.unconstrained() for n, p in pyro.get_param_store().items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), found, strict=True)
    }


@dataclass(frozen=True)
class Case:
    """A model and a guide that Pyro evaluates correctly.

    Args:
        nesting: number of plate dimensions, for Pyro's max_plate_nesting.
    """

    model: Program
    guide: Program
    args: tuple
    nesting: int


# Known answers.


def normal_log_z(x: Tensor, shared: float = 0.0, noise: float = 2.0) -> float:
    """log N(x; 0, noise I + shared 11'), the evidence of the normal models below."""
    n = len(x)
    cov = noise * torch.eye(n, dtype=x.dtype) + shared * torch.ones(n, n, dtype=x.dtype)
    zeros = torch.zeros(n, dtype=x.dtype)
    return float(torch.distributions.MultivariateNormal(zeros, cov).log_prob(x))


def mean_model(y: Tensor) -> None:
    """mu ~ N(0, 2), y_i ~ N(mu, 1): the posterior is `mean_posterior`."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_posterior(y: Tensor) -> tuple[float, float]:
    """Mean and sd of mu given y under `mean_model`."""
    precision = len(y) + 0.25
    return float(y.sum()) / precision, precision**-0.5


def local_model(x: Tensor) -> None:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1): z_i | x_i ~ N(x_i / 2, sqrt(1/2)); `normal_log_z(x)`."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    """A row of parameters for every datum."""
    n = len(x)
    with pyro.plate("data", n):
        loc = param("loc", torch.linspace(-1.0, 1.0, n), event_dim=0)
        scale = positive("scale", torch.linspace(0.5, 1.5, n), event_dim=0)
        pyro.sample("z", dist.Normal(loc, scale))


def amortised_guide(x: Tensor) -> None:
    """z_i ~ N(slope x_i, scale), off the posterior."""
    slope, scale = param("slope", 0.3), positive("scale", 0.9)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


def prior_guide(x: Tensor) -> None:
    """q = prior: then IWAE's value depends on the data alone. The parameter is a shift of 0."""
    shift = param("shift", 0.0)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(shift.expand(len(x)), 1.0))


def nested_model(x: Tensor) -> None:
    """theta ~ N(0, 1), z_i ~ N(theta, 1), x_i ~ N(z_i, 1); `normal_log_z(x, shared=1)`."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nested_guide(x: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(param("theta_loc", 0.3), positive("theta_scale", 0.7)))
    slope, weight, scale = param("slope", 0.4), param("weight", 0.2), positive("z_scale", 0.8)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x + weight * theta, scale))


def switch_model(x: Tensor) -> None:
    """k_i ~ Bernoulli(0.3), x_i ~ N(2 k_i, 1)."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)


def switch_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Bernoulli(torch.sigmoid(x)))


def switch_log_z(x: Tensor) -> Tensor:
    """log p(x_i), `(N,)`."""
    parts = [dist.Normal(2.0 * k, 1.0).log_prob(x) + math.log((0.7, 0.3)[k]) for k in (0, 1)]
    return torch.logsumexp(torch.stack(parts), 0)


# Cases in which Pyro is right, for parity.


def _local() -> Case:
    return Case(local_model, local_guide, (randn(6),), 1)


def _regression() -> Case:
    x, y = randn(8, 3), randn(8, seed=1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = (x * w).sum(-1)  # unlike x @ w, broadcasts over particles
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        scale = positive("w_scale", [0.3, 0.5, 0.7])
        pyro.sample("w", dist.Normal(param("w_loc", [0.1, -0.4, 0.8]), scale).to_event(1))
        pyro.sample("sigma", dist.LogNormal(param("s_loc", 0.2), positive("s_scale", 0.4)))

    return Case(model, guide, (x, y), 1)


def _hierarchical() -> Case:
    return Case(nested_model, nested_guide, (randn(5),), 1)


def _multivariate() -> Case:
    x, a = randn(6, 3), randn(3, 3, seed=2)

    def model(x: Tensor) -> None:
        cov = torch.eye(3) + 0.3 * a @ a.T
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(3), cov))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, torch.eye(3)), obs=x)

    def guide(x: Tensor) -> None:
        tril = param("tril", torch.eye(3) * 0.5 + 0.1, constraint=constraints.lower_cholesky)
        mu = dist.MultivariateNormal(param("mu_loc", [0.3, -0.2, 0.5]), scale_tril=tril)
        pyro.sample("mu", mu)

    return Case(model, guide, (x,), 1)


def _masked() -> Case:
    x, keep = randn(6), torch.tensor([True, True, False, True, False, True])
    return Case(poutine.mask(local_model, mask=keep), poutine.mask(local_guide, mask=keep), (x,), 1)


def _scaled() -> Case:
    model, guide = poutine.scale(nested_model, 0.3), poutine.scale(nested_guide, 0.3)
    return Case(model, guide, (randn(5),), 1)


def _subsampled() -> Case:
    x = randn(12)

    def model(x: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        pyro.sample("theta", dist.Normal(param("t_loc", 0.3), positive("t_scale", 0.7)))
        with pyro.plate("data", len(x), subsample_size=5):
            loc = param("loc", torch.linspace(-1, 1, len(x)), event_dim=0)
            pyro.sample("z", dist.Normal(loc, positive("scale", 0.8)))

    return Case(model, guide, (x,), 1)


def _nested_plates() -> Case:
    x = randn(4, 3)

    def model(x: Tensor) -> None:
        rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with columns:
                z = pyro.sample("z", dist.Normal(a, 0.5))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-2):
            loc = param("loc", randn(4, 1, seed=3))
            a = pyro.sample("a", dist.Normal(loc, positive("a_sd", 0.6)))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("z", dist.Normal(0.4 * x + param("w", 0.3) * a, positive("z_sd", 0.7)))

    return Case(model, guide, (x,), 2)


def _dirichlet() -> Case:
    counts = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 4.0], [1.0, 1.0, 1.0], [5.0, 0.0, 2.0]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.7, 1.0, 1.5])))
            pyro.sample("x", dist.Multinomial(probs=p, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        offset = positive("offset", [0.8, 1.2, 1.6])
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Dirichlet(0.7 * x + offset))

    return Case(model, guide, (counts,), 1)


def _auto_normal() -> Case:
    x = randn(5)
    start = {"theta": torch.tensor(0.3), "z": torch.linspace(-1, 1, 5)}
    guide = AutoNormal(nested_model, init_loc_fn=init_to_value(values=start), init_scale=0.6)
    return Case(nested_model, guide, (x,), 1)


def _auto_multivariate() -> Case:
    case = _regression()
    start = {"w": torch.tensor([0.1, -0.4, 0.8]), "sigma": torch.tensor(1.3)}
    guide = AutoMultivariateNormal(
        case.model, init_loc_fn=init_to_value(values=start), init_scale=0.4
    )
    return Case(case.model, guide, case.args, 1)


def _networks() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Case(model, guide, ((randn(6, 3) > 0).to(torch.get_default_dtype()),), 1)


CASES: dict[str, Callable[[], Case]] = {
    "local latents": _local,
    "regression": _regression,
    "hierarchical": _hierarchical,
    "multivariate": _multivariate,
    "masked": _masked,
    "scaled": _scaled,
    "subsampled": _subsampled,
    "nested plates": _nested_plates,
    "dirichlet": _dirichlet,
    "AutoNormal": _auto_normal,
    "AutoMultivariateNormal": _auto_multivariate,
    "networks": _networks,
}

# Where Pyro's RenyiELBO is wrong: globals above locals, and scales inside the weights.
ELBO_ONLY = frozenset({"hierarchical", "scaled", "subsampled", "AutoNormal"})
