"""Ten published posteriors as Pyro programs, with the parameters of their references.

Stan's models of posteriordb (Magnusson et al. 2024), written anew; the references are long runs of
Stan, read from JSON files (see `POSTERIORS` for their names).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

DRAWS = 20_000
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """A model, how to read its arguments, and from its draws the parameters of the reference."""

    file: str
    model: Callable[..., None]
    arguments: Callable[[dict[str, Any]], tuple[Tensor, ...]]
    parameters: Callable[[Draws], Draws]


def flat(shape: int | None = None, support: Any = constraints.real) -> Any:
    return dist.ImproperUniform(support, (), () if shape is None else (shape,))


def tensors(*names: str) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    return lambda data: tuple(
        torch.tensor(data[name], dtype=torch.get_default_dtype()) for name in names
    )


def columns(name: str, values: Tensor) -> Draws:
    """beta (S, J) as beta[1], beta[2], ..."""
    return {f"{name}[{j + 1}]": values[:, j] for j in range(values.shape[1])}


def numbers(draws: Draws) -> Draws:
    """Vectors as their columns, numbers as they are."""
    found: Draws = {}
    for name, values in draws.items():
        rows = values.reshape(len(values), -1)
        found |= columns(name, rows) if values.dim() > 1 else {name: rows[:, 0]}
    return found


def wells(dist_: Tensor, switched: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    with pyro.plate("data", len(dist_)):
        pyro.sample("switched", dist.Bernoulli(logits=beta[0] + beta[1] * dist_), obs=switched)


def kidscore(mom_iq: Tensor, kid_score: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(mom_iq)):
        pyro.sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma), obs=kid_score)


def earn_height(height: Tensor, earn: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", flat(support=constraints.positive))
    with pyro.plate("data", len(height)):
        pyro.sample("earn", dist.Normal(beta[0] + beta[1] * height, sigma), obs=earn)


def autoregression(y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha + sum(beta[k] * y[4 - k : len(y) - 1 - k] for k in range(5))
    with pyro.plate("time", len(y) - 5):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[5:])


def dogs(y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    shocks = torch.cumsum(y, 1) - y
    avoided = torch.arange(y.shape[1], dtype=y.dtype) - shocks
    with pyro.plate("dogs", len(y), dim=-2), pyro.plate("trials", y.shape[1], dim=-1):
        logits = beta[0] + beta[1] * avoided + beta[2] * shocks
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def poisson(year: Tensor, count: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta = [pyro.sample(f"beta{k}", dist.Uniform(-10.0, 10.0)) for k in (1, 2, 3)]
    log_rate = alpha + sum(b * year**k for k, b in enumerate(beta, 1))
    with pyro.plate("years", len(year)):
        pyro.sample("C", dist.Poisson(log_rate.exp()), obs=count)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_nc(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def schools(draws: Draws) -> Draws:
    mu, tau = (draws[name].reshape(-1, 1) for name in ("mu", "tau"))
    theta = draws["theta"] if "theta" in draws else mu + tau * draws["effect"]
    return numbers({"mu": mu[:, 0], "tau": tau[:, 0], "theta": theta.reshape(len(mu), -1)})


def mixture(y: Tensor) -> None:
    mu = pyro.sample("mu", flat(2, constraints.ordered_vector))
    pyro.factor("prior of mu", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(y)):
        weights = torch.stack([theta, 1.0 - theta], -1)
        parts = dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(mu, sigma))
        pyro.sample("y", parts, obs=y)


def radon_priors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    sigma = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    return mu, beta, sigma, pyro.sample("sigma_y", dist.HalfNormal(1.0))


def radon_outcomes(
    alpha: Tensor, beta: Tensor, noise: Tensor, x: Tensor, county: Tensor, y: Tensor
):
    with pyro.plate("rows", len(y)):
        mean = alpha[..., county] + beta[..., 0] * x[:, 0] + beta[..., 1] * x[:, 1]
        pyro.sample("log_radon", dist.Normal(mean, noise), obs=y)


def radon_noncentered(x: Tensor, county: Tensor, y: Tensor) -> None:
    """The reference's own form: effects of counties in units of their sd."""
    mu, beta, sigma, noise = radon_priors()
    with pyro.plate("counties", 85):
        raw = pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    radon_outcomes(mu + sigma * raw, beta, noise, x, county, y)


def radon_centered(x: Tensor, county: Tensor, y: Tensor) -> None:
    mu, beta, sigma, noise = radon_priors()
    with pyro.plate("counties", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu, sigma))
    radon_outcomes(alpha, beta, noise, x, county, y)


def radon_parameters(draws: Draws) -> Draws:
    """The reference's 90 numbers, of draws from either form."""
    count = len(draws["mu_alpha"])
    flat = {name: value.reshape(count, -1) for name, value in draws.items()}
    if "alpha" not in flat:
        flat["alpha"] = flat["mu_alpha"] + flat["sigma_alpha"] * flat["alpha_raw"]
    scalars = {name: flat[name][:, 0] for name in ("mu_alpha", "sigma_alpha", "sigma_y")}
    return columns("alpha", flat["alpha"]) | columns("beta", flat["beta"]) | scalars


def radon_arguments(data: dict[str, Any]) -> tuple[Tensor, ...]:
    uranium, floor, y = tensors("log_uppm", "floor_measure", "log_radon")(data)
    return torch.stack([uranium, floor], -1), torch.tensor(data["county_idx"]) - 1, y


POSTERIORS = {
    "wells_dist": Posterior("wells_data-wells_dist", wells, tensors("dist", "switched"), numbers),
    "kidscore_momiq": Posterior(
        "kidiq-kidscore_momiq", kidscore, tensors("mom_iq", "kid_score"), numbers
    ),
    "earn_height": Posterior(
        "earnings-earn_height", earn_height, tensors("height", "earn"), numbers
    ),
    "arK": Posterior("arK-arK", autoregression, tensors("y"), numbers),
    "dogs": Posterior("dogs-dogs", dogs, tensors("y"), numbers),
    "GLM_Poisson": Posterior(
        "GLM_Poisson_Data-GLM_Poisson_model", poisson, tensors("year", "C"), numbers
    ),
    "eight_schools_nc": Posterior(
        "eight_schools-eight_schools_noncentered", eight_schools_nc, tensors("sigma", "y"), schools
    ),
    "radon_nc": Posterior(
        "radon_mn-radon_hierarchical_intercept_noncentered",
        radon_noncentered,
        radon_arguments,
        radon_parameters,
    ),
    "eight_schools": Posterior(
        "eight_schools-eight_schools_centered", eight_schools, tensors("sigma", "y"), schools
    ),
    "mixture": Posterior("low_dim_gauss_mix-low_dim_gauss_mix", mixture, tensors("y"), numbers),
}


def errors(parameters: Draws, reference: dict[str, Any]) -> tuple[float, float]:
    """Largest error of a mean in reference sds, and largest relative error of an sd."""
    if parameters.keys() != reference.keys():
        raise ValueError(f"parameters differ: {sorted(parameters.keys() ^ reference.keys())}")
    means, sds = [], []
    for name, values in parameters.items():
        mean, sd = reference[name]["mean"], reference[name]["sd"]
        means.append(abs(float(values.mean()) - mean) / sd)
        sds.append(abs(float(values.std()) / sd - 1))
    return max(means), max(sds)


def floor(posterior: dict[str, Any], names: list[str]) -> float:
    """The sd error of independent normals, max_j |1 / sqrt(cov_jj prec_jj) - 1|, from the
    reference correlation of the numbers that the guide has.
    """
    order = list(posterior["reference"])
    keep = [order.index(n) for n in names]
    corr = torch.tensor(posterior["corr"], dtype=torch.float64)[keep][:, keep]
    return float((torch.linalg.inv(corr).diagonal().rsqrt() - 1).abs().max())
