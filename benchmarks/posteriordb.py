"""Published posteriors with trusted references: pvi at its defaults beside Pyro's usual SVI.

Errors are max over parameters of |mean - reference| / reference sd and |sd / reference sd - 1|.
`floor` is the smallest sd error that independent normals can have, from the reference correlation.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from torch import Tensor
from torch.distributions import constraints

import pvi
from benchmarks.common import parser, report, timed
from tests.scenarios import isolated

DRAWS = 20_000
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Posterior:
    """A model, how to read its arguments, and from its draws the parameters of the reference."""

    file: str
    model: Callable[..., None]
    arguments: Callable[[dict[str, Any]], tuple[Tensor, ...]]
    parameters: Callable[[Draws], Draws]


def flat(shape: int | None = None) -> Any:
    return dist.ImproperUniform(constraints.real, (), () if shape is None else (shape,))


def tensors(*names: str) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    dtype = torch.get_default_dtype()
    return lambda data: tuple(torch.tensor(data[name], dtype=dtype) for name in names)


def columns(name: str, values: Tensor) -> Draws:
    """beta (S, J) as beta[1], beta[2], ..."""
    return {f"{name}[{j + 1}]": values[:, j] for j in range(values.shape[1])}


def wells(dist_: Tensor, switched: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    with pyro.plate("data", len(dist_)):
        logits = beta[..., :1] + beta[..., 1:] * dist_
        pyro.sample("switched", dist.Bernoulli(logits=logits), obs=switched)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def schools_parameters(draws: Draws) -> Draws:
    mu, tau = (draws[name].reshape(-1) for name in ("mu", "tau"))
    theta = mu.unsqueeze(1) + tau.unsqueeze(1) * draws["effect"].reshape(len(mu), -1)
    return {"mu": mu, "tau": tau, **columns("theta", theta)}


def kidscore(mom_iq: Tensor, kid_score: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(mom_iq)):
        mean = beta[..., :1] + beta[..., 1:] * mom_iq
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def dogs(y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    before = torch.cumsum(y, 1) - y
    trials = torch.arange(y.shape[1], dtype=y.dtype)
    b = [beta[..., j, None, None] for j in range(3)]
    with pyro.plate("dogs", len(y), dim=-2), pyro.plate("trials", y.shape[1], dim=-1):
        logits = b[0] + b[1] * (trials - before) + b[2] * before
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def poisson(year: Tensor, count: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta = [pyro.sample(f"beta{k}", dist.Uniform(-10.0, 10.0)) for k in (1, 2, 3)]
    log_rate = alpha + sum(b * year**k for k, b in enumerate(beta, 1))
    with pyro.plate("years", len(year)):
        pyro.sample("C", dist.Poisson(log_rate.exp()), obs=count)


def regression_parameters(draws: Draws) -> Draws:
    beta = draws["beta"]
    result = columns("beta", beta.reshape(len(beta), -1))
    return result | {n: v.reshape(-1) for n, v in draws.items() if n == "sigma"}


POSTERIORS = {
    "wells_dist": Posterior(
        "wells_data-wells_dist", wells, tensors("dist", "switched"), regression_parameters
    ),
    "eight_schools_nc": Posterior(
        "eight_schools-eight_schools_noncentered",
        eight_schools,
        tensors("sigma", "y"),
        schools_parameters,
    ),
    "kidscore_momiq": Posterior(
        "kidiq-kidscore_momiq", kidscore, tensors("mom_iq", "kid_score"), regression_parameters
    ),
    "dogs": Posterior("dogs-dogs", dogs, tensors("y"), regression_parameters),
    "GLM_Poisson": Posterior(
        "GLM_Poisson_Data-GLM_Poisson_model",
        poisson,
        tensors("year", "C"),
        lambda draws: {name: values.reshape(-1) for name, values in draws.items()},
    ),
}


def with_pvi(model: Any, args: tuple, seed: int) -> tuple[Draws, int, str]:
    fit = pvi.fit(model, args=args, seed=seed, progress=False)
    draws = fit.posterior.sample(DRAWS, seed=seed)
    return draws, len(fit.history), "yes" if fit.converged else "no"


def start(site: dict[str, Any]) -> Tensor:
    """Pyro's default start; 0 at flat priors, where that raises."""
    if isinstance(site["fn"], dist.ImproperUniform):
        return torch.zeros(site["fn"].shape())
    return init_to_feasible(site)


def with_pyro(model: Any, args: tuple, seed: int) -> tuple[Draws, int, str]:
    torch.manual_seed(seed)
    guide = AutoNormal(model, init_loc_fn=start)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(5000):
        svi.step(*args)
    with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-3):
        return guide(*args), 5000, "-"


def errors(parameters: Draws, reference: dict[str, Any]) -> tuple[float, float]:
    """Largest error of a mean in reference sds, and largest relative error of an sd."""
    means, sds = [], []
    for name, values in parameters.items():
        mean, sd = reference[name]["mean"], reference[name]["sd"]
        means.append(abs(float(values.mean()) - mean) / sd)
        sds.append(abs(float(values.std()) / sd - 1))
    return max(means), max(sds)


def floor(posterior: dict[str, Any], names: list[str]) -> float:
    """max_j |1 / sqrt(cov_jj prec_jj) - 1| of the sampled parameters' reference correlation."""
    order = list(posterior["reference"])
    keep = [order.index(n) for n in names]
    corr = torch.tensor(posterior["corr"], dtype=torch.float64)[keep][:, keep]
    return float((torch.linalg.inv(corr).diagonal().rsqrt() - 1).abs().max())


def compare(name: str, folder: Path, seed: int) -> list[list[Any]]:
    """One row for pvi, one for Pyro."""
    case, rows = POSTERIORS[name], []
    posterior = json.loads((folder / f"{case.file}.json").read_text())
    for method, run in (("pvi MeanField", with_pvi), ("Pyro AutoNormal", with_pyro)):
        with isolated(torch.float32), timed() as seconds:
            draws, steps, converged = run(case.model, case.arguments(posterior["data"]), seed)
        parameters = case.parameters(draws)
        if parameters.keys() != posterior["reference"].keys():
            raise ValueError(f"{name}: parameters differ from the reference")
        # theta of the eight schools is no parameter of the guide, so its correlation sets no floor
        least = None if "theta[1]" in parameters else floor(posterior, list(parameters))
        mean, sd = errors(parameters, posterior["reference"])
        rows.append([name, method, mean, sd, least, seconds[0], steps, converged])
    return rows


def main() -> None:
    arguments = parser(__doc__, data=True)
    arguments.add_argument("--names", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS))
    options = arguments.parse_args()
    rows: list[list[Any]] = []
    for name in options.names:
        rows += compare(name, options.data, options.seed)
    header = ["posterior", "method", "mean error", "sd error", "floor", "seconds"]
    header += ["steps", "converged"]
    report("posteriordb", header, rows, options.results, more={"draws": DRAWS})


if __name__ == "__main__":
    main()
