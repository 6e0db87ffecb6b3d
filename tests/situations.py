"""Conjugate models with guides off the posterior, and their log weights written out by hand.

A weight function does not use pvi or Pyro, only noise: standard normal numbers `(K, M, dims)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.scenarios import normal, normal_log_z

X = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
PAIRS = torch.stack([X, 0.3 - X], 1)
KEEP = torch.tensor([True, False, True])
S = 0.7  # noise of the observations
COLUMN_SD = 0.5
SCALE = 0.3
NUM = 4  # particles


def order_mean(log_w: Tensor, alpha: float) -> Tensor:
    """Order-alpha mean over the first dimension."""
    if alpha == 1.0:
        return log_w.mean(0)
    return ((1 - alpha) * log_w).logsumexp(0).sub(math.log(len(log_w))) / (1 - alpha)


@dataclass(frozen=True)
class Weights:
    """One copy's log weights at given noise.

    Args:
        likelihood, ratio: log p(x | z) and log q(z) - log p(z), `(K, M, elements)`.
        outer: log q - log p of what is drawn once per bound, `(M,)` or 0.
    """

    likelihood: Tensor
    ratio: Tensor
    outer: Tensor | float = 0.0

    def bound(self, alpha: float, beta: tuple[float, float], inside: float = 1.0) -> Tensor:
        """`(M,)`; `inside` != 1 scales the log weights before the mean, as Pyro does.

        Args:
            beta: weights of the outer and of the other latents' KL.
        """
        log_w = inside * (self.likelihood - beta[1] * self.ratio)
        return order_mean(log_w, alpha).sum(-1) / inside - beta[0] * self.outer


@dataclass(frozen=True)
class Situation:
    """A model, a guide and their answers.

    Args:
        model, guide: `model(x, rows)` and `guide(raw, draw, x, rows)`, with `draw` from `tape`.
        weights: `(raw, outer noise, inner noise) -> Weights` of one copy.
        start, posterior: the guide's parameters off the posterior, and at it (of beta).
        dims: noise numbers drawn once per bound, and once per particle.
        log_z: evidence of one copy, nats.
        copies: what can be repeated in one plate gives many independent answers at once.
        factor: what the whole bound is multiplied with.
        wrong: factor that Pyro's RenyiELBO puts inside the weights here.
        mean: the expected bound `(raw, alpha, beta)` if not by noise.
    """

    model: Callable
    guide: Callable
    weights: Callable | None
    start: tuple[float, ...]
    posterior: Callable[[float], tuple[float, ...]] | None
    dims: tuple[int, int]
    log_z: float
    data: Tensor = X
    copies: int = 250
    nesting: int = 1
    factor: float = 1.0
    wrong: float = 1.0
    mean: Callable | None = None


# Models, guides and their weights. `part` has Pyro draw a third of the rows.


def rows_plate(x: Tensor, rows: Tensor | None, part: bool) -> Any:
    size = len(x) // 3 if part else None
    return pyro.plate("data", len(x), subsample_size=size, subsample=rows if part else None)


def local_model(x: Tensor, rows: Tensor | None = None, part: bool = False) -> None:
    """z_i ~ N(0, 1), x_i ~ N(z_i, S), either of any event shape."""
    event = x.dim() - 1
    with rows_plate(x, rows, part) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1:]), 1.0).to_event(event))
        pyro.sample("x", dist.Normal(z, S).to_event(event), obs=x[i])


def local_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None, part: bool = False) -> None:
    a, b, c = raw
    with rows_plate(x, rows, part) as i:
        draw("z", dist.Normal(a * x[i] + b, c.exp()), event=x.dim() - 1)


def local_weights(x: Tensor, raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    a, b, c = raw
    loc = a * x + b
    z = loc + c.exp() * inner.unflatten(-1, x.shape)
    parts = normal(x, z, S), normal(z, loc, c.exp()) - normal(z, 0.0, 1.0)
    likelihood, ratio = (p.reshape(*inner.shape[:-1], len(x), -1).sum(-1) for p in parts)
    return Weights(likelihood, ratio)


def local_posterior(beta: float) -> tuple[float, ...]:
    shrink = 1 / (1 + beta * S**2)
    return shrink, 0.0, 0.5 * math.log(1 - shrink)


def global_model(x: Tensor, rows: Tensor | None = None, part: bool = False) -> None:
    """mu ~ N(0, 2), x_i ~ N(mu, S)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with rows_plate(x, rows, part) as i:
        pyro.sample("x", dist.Normal(mu, S), obs=x[i])


def global_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None, part: bool = False) -> None:
    draw("mu", dist.Normal(raw[0], raw[1].exp()))


def global_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    m, r = raw
    mu = m + r.exp() * inner
    likelihood = normal(X, mu, S).sum(-1, keepdim=True)
    return Weights(likelihood, normal(mu, m, r.exp()) - normal(mu, 0.0, 2.0))


def global_posterior(beta: float) -> tuple[float, ...]:
    precision = 0.25 + len(X) / (beta * S**2)
    return float(X.sum()) / (beta * S**2) / precision, -0.5 * math.log(precision)


def nested_model(x: Tensor, rows: Tensor | None = None, part: bool = False) -> None:
    """theta ~ N(0, 1), z_i ~ N(theta, 1), x_i ~ N(z_i, S)."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with rows_plate(x, rows, part) as i:
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x[i])


def nested_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None, part: bool = False) -> None:
    m, r, a, b, c = raw
    theta = draw("theta", dist.Normal(m, r.exp()))
    with rows_plate(x, rows, part) as i:
        draw("z", dist.Normal(a * x[i] + b * theta, c.exp()))


def nested_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    m, r, a, b, c = raw
    theta = m + r.exp() * outer
    loc = a * X + b * theta
    z = loc + c.exp() * inner
    ratio = normal(z, loc, c.exp()) - normal(z, theta, 1.0)
    top = normal(theta, m, r.exp()) - normal(theta, 0.0, 1.0)
    return Weights(normal(X, z, S), ratio, top.squeeze(-1))


def nested_posterior(beta: float) -> tuple[float, ...]:
    variance = 1 + beta * S**2
    precision, shrink = 1 + len(X) / variance, 1 / variance
    mean = float(X.sum()) / variance / precision
    return mean, -0.5 * math.log(precision), shrink, 1 - shrink, 0.5 * math.log(1 - shrink)


def table_model(x: Tensor, rows: Any = None) -> None:
    """a_i ~ N(0, 1), z_ij ~ N(a_i, 0.5), x_ij ~ N(z_ij, S)."""
    with pyro.plate("rows", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(a, COLUMN_SD))
            pyro.sample("x", dist.Normal(z, S), obs=x)


def table_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None) -> None:
    p, r, u, v, c = raw
    with pyro.plate("rows", len(x), dim=-2):
        a = draw("a", dist.Normal(p * x.mean(1, keepdim=True), r.exp()))
        with pyro.plate("columns", x.shape[1], dim=-1):
            draw("z", dist.Normal(u * x + v * a, c.exp()))


def table_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    p, r, u, v, c = raw
    x = PAIRS.T
    top, low = inner[..., :2], inner[..., 2:].unflatten(-1, (2, 3))
    centre = p * x.mean(1)
    a = centre + r.exp() * top
    loc = u * x + v * a.unsqueeze(-1)
    z = loc + c.exp() * low
    ratio = normal(a, centre, r.exp()) - normal(a, 0.0, 1.0)
    ratio = ratio + (normal(z, loc, c.exp()) - normal(z, a.unsqueeze(-1), COLUMN_SD)).sum(-1)
    return Weights(normal(x, z, S).sum(-1), ratio)


def table_posterior(beta: float) -> tuple[float, ...]:
    noise, prior = beta * S**2, COLUMN_SD**2
    precision, shrink = 1 + 3 / (prior + noise), prior / (prior + noise)
    mean = 3 / (prior + noise) / precision
    sd = 0.5 * math.log(prior * (1 - shrink))
    return mean, -0.5 * math.log(precision), shrink, 1 - shrink, sd


def missing_model(x: Tensor, rows: Any = None) -> None:
    """Observations that `obs_mask` leaves out become latent."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x, obs_mask=kept(x))


def missing_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None) -> None:
    a, b, c, g, d, f = raw
    lost = (~kept(x)).to(x)
    with pyro.plate("data", len(x)):
        z = draw("z", dist.Normal(a * x * (1 - lost) + b, (c + g * lost).exp()))
        draw("x_unobserved", dist.Normal(d * z, f.exp()))


def missing_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    a, b, c, g, d, f = raw
    lost = (~KEEP).to(X)
    loc, scale = a * X * (1 - lost) + b, (c + g * lost).exp()
    z = loc + scale * inner[..., :3]
    x = d * z + f.exp() * inner[..., 3:]
    ratio = normal(z, loc, scale) - normal(z, 0.0, 1.0)
    ratio = ratio + lost * (normal(x, d * z, f.exp()) - normal(x, z, S))
    return Weights((1 - lost) * normal(X, z, S), ratio)


def missing_posterior(beta: float) -> tuple[float, ...]:
    a, b, c = local_posterior(beta)
    return a, b, c, -c, 1.0, math.log(S)


def auxiliary_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None) -> None:
    """z = 2 u restates an auxiliary draw, with its Jacobian, as Pyro's automatic guides do."""
    a, b, c = raw
    with pyro.plate("data", len(x)):
        u = draw("u", dist.Normal(a * x + b, c.exp()), infer={"is_auxiliary": True})
        jacobian = torch.full_like(u, math.log(2.0))
        pyro.sample("z", dist.Delta(2 * u, log_density=-jacobian))


def auxiliary_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    a, b, c = raw
    u = a * X + b + c.exp() * inner
    log_q = normal(u, a * X + b, c.exp()) - math.log(2.0)
    return Weights(normal(X, 2 * u, S), log_q - normal(2 * u, 0.0, 1.0))


def auxiliary_posterior(beta: float) -> tuple[float, ...]:
    a, b, c = local_posterior(beta)
    return a / 2, b / 2, c - math.log(2.0)


def point_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(raw[0] * x + raw[1]))


def point_weights(raw: Tensor, outer: Tensor, inner: Tensor) -> Weights:
    z = raw[0] * X + raw[1] + inner.sum(-1, keepdim=True)
    return Weights(normal(X, z, S), -normal(z, 0.0, 1.0))


def coin_model(x: Tensor, rows: Any = None) -> None:
    """k_i ~ Bernoulli(0.4), x_i ~ N(2 k_i, S)."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(2 * k, S), obs=x)


def coin_guide(raw: Tensor, draw: Any, x: Tensor, rows: Any = None) -> None:
    with pyro.plate("data", len(x)):
        draw("k", dist.Bernoulli(logits=raw[0] * x + raw[1]))


def coin_mean(raw: Tensor, alpha: float, beta: tuple[float, float]) -> Tensor:
    """The bound summed over all outcomes of all particles."""
    ones = torch.tensor(list(product([0.0, 1.0], repeat=NUM)), dtype=X.dtype).T.unsqueeze(-1)
    log_q = -torch.nn.functional.softplus((1 - 2 * ones) * (raw[0] * X + raw[1]))
    log_p = torch.where(ones == 1, math.log(0.4), math.log(0.6))
    log_w = normal(X, 2 * ones, S) - beta[1] * (log_q - log_p)
    return (log_q.sum(0).exp() * order_mean(log_w, alpha)).sum()


def coin_log_z() -> float:
    ways = torch.stack([normal(X, 2.0, S) + math.log(0.4), normal(X, 0.0, S) + math.log(0.6)])
    return float(torch.logsumexp(ways, 0).sum())


def kept(x: Tensor) -> Tensor:
    return KEEP.repeat(len(x) // len(KEEP))


def both_masked(program: Callable) -> Callable:
    """Either program ends in the arguments `x, rows`."""
    return lambda *args: poutine.mask(program, mask=kept(args[-2]))(*args)


def log_z(x: Tensor, shared: float = 0.0, noise: float = 1.0 + S**2) -> float:
    return normal_log_z(x, shared, noise)


LOCAL = Situation(
    local_model,
    local_guide,
    partial(local_weights, X),
    start=(-0.4, 1.2, -0.9),
    posterior=local_posterior,
    dims=(0, 3),
    log_z=log_z(X),
)
GLOBAL = Situation(
    global_model,
    global_guide,
    global_weights,
    start=(-0.8, -1.2),
    posterior=global_posterior,
    dims=(0, 1),
    log_z=log_z(X, 4.0, S**2),
    copies=1,
)
NESTED = Situation(
    nested_model,
    nested_guide,
    nested_weights,
    start=(-2.2, -1.0, -0.2, -0.5, -0.7),
    posterior=nested_posterior,
    dims=(1, 3),
    log_z=log_z(X, 1.0),
    copies=1,
)
