"""NUTS from a guide beside Pyro's default warm-up, on the eight schools: gradients, seconds, ESS.

Both are Pyro's sampler on the same model. By default it starts at a random point with a unit mass
matrix and spends as many draws on the warm-up as it keeps; `pvi.nuts` starts at draws of the guide,
in its coordinates.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

import pvi
from benchmarks.common import parser, report, timed
from pvi.posterior.arviz import load

SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
HEADER = ("model", "start", "warm-up", "draws", "gradients", "seconds", "least ESS", "per 1000")


def centred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def least_ess(draws: dict[str, Tensor]) -> float:
    """Of the means of all scalars, from draws `(chains, draws, *shape)`."""
    columns = [x.reshape(*x.shape[:2], -1).unbind(-1) for x in draws.values()]
    return min(float(load().ess(c.numpy(), method="mean")) for group in columns for c in group)


def plain(model, draws: int, seed: int) -> tuple[dict[str, Tensor], int]:
    """Pyro's defaults, with a count of gradients; the default warm-up has as many draws."""
    pyro.set_rng_seed(seed)
    start, potential, transforms, _ = initialize_model(model, (SIGMA, Y))
    count = 0

    def counted(params: dict[str, Tensor]) -> Tensor:
        nonlocal count
        count += 1
        return potential(params)

    mcmc = MCMC(NUTS(potential_fn=counted), draws, initial_params=start, disable_progbar=True)
    mcmc.run()
    found = mcmc.get_samples(group_by_chain=True)
    return {name: transforms[name].inv(x) for name, x in found.items()}, count


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--draws", type=int, default=500)
    chosen = options.parse_args()
    rows = []
    for model in (noncentred, centred):
        name = model.__name__
        with timed() as spent:
            draws, gradients = plain(model, chosen.draws, chosen.seed)
        found = [(name, "Pyro's defaults", chosen.draws, spent[0], draws, gradients)]
        for guide in (pvi.guides.MeanField, pvi.guides.FullRank):
            warmup = chosen.draws // 3
            with timed() as spent:
                fit = pvi.fit(model, guide, data=(SIGMA, Y), seed=chosen.seed)
                chains = pvi.nuts(fit, chosen.draws, warmup=warmup, num_chains=1, seed=chosen.seed)
            found.append((name, guide.__name__, warmup, spent[0], chains.draws, chains.gradients))
        for which, start, warmup, seconds, draws, gradients in found:
            ess = least_ess(draws)
            rate = 1000 * ess / gradients
            rows.append((which, start, warmup, chosen.draws, gradients, seconds, ess, rate))
    report("escalate", HEADER, rows, chosen.results)


if __name__ == "__main__":
    main()
