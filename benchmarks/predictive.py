"""Predictive checks: false alarms on true models with their exact posteriors, misfits found.

Truths are drawn from the prior, so the model is right. "band" is the share of data sets whose PITs
leave the 95 % band, "ECE" whose calibration error is above its 99 % limit, "statistics" where a
p-value is within 0.005 of 0 or 1, "any" with any finding. Misfits are planted in the data.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from pvi.progress import progress

SEEDS, ROWS, GROUPS, DRAWS = 200, 50, 5, 500
HEADER = ["case", "data", "band", "ECE", "statistics", "any", "se of any"]


def normal(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def normal_guide(y: Tensor) -> None:
    precision = 1.0 + len(y)
    pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(4.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def counts_guide(y: Tensor) -> None:
    pyro.sample("rate", dist.Gamma(4.0 + y.sum(), 1.0 + len(y)))


def binary(group: Tensor, y: Tensor) -> None:
    with pyro.plate("group", GROUPS):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(p[..., group]), obs=y)


def binary_guide(group: Tensor, y: Tensor) -> None:
    ones = torch.zeros(GROUPS).index_add(0, group, y)
    count = torch.bincount(group, minlength=GROUPS)
    with pyro.plate("group", GROUPS):
        pyro.sample("p", dist.Beta(1 + ones, 1 + count - ones))


def made_normal() -> Tensor:
    return torch.randn(()) + torch.randn(2 * ROWS)


def made_counts(spread: float = 0.0) -> Tensor:
    rate = dist.Gamma(4.0, 1.0).sample()
    if spread:
        rate = rate * dist.Gamma(1 / spread, 1 / spread).sample((2 * ROWS,))
    return torch.poisson(rate.expand(2 * ROWS))


def made_binary(flip: float = 0.0) -> tuple[Tensor, Tensor]:
    group = torch.arange(2 * ROWS) % GROUPS
    p = torch.rand(GROUPS)[group]
    late = torch.arange(2 * ROWS) >= ROWS  # held-out rows are other than those of the fit
    return group, torch.bernoulli(torch.where(late, flip + (1 - 2 * flip) * p, p))


def noise(df: float, scale: float) -> Tensor:
    return torch.randn(()) + scale * dist.StudentT(df).sample((2 * ROWS,))


Case = tuple[Callable, Callable, Callable[[], Any]]
CASES: dict[str, Case] = {
    "normal, true": (normal, normal_guide, made_normal),
    "counts, true": (counts, counts_guide, made_counts),
    "binary, true": (binary, binary_guide, made_binary),
    "normal, noise of 1.3 sds": (normal, normal_guide, lambda: noise(1e6, 1.3)),
    "normal, noise of 0.7 sds": (normal, normal_guide, lambda: noise(1e6, 0.7)),
    "normal, noise Student t(3)": (normal, normal_guide, lambda: noise(3.0, 1.0)),
    "counts, overdispersed (variance of rates 0.3)": (
        counts,
        counts_guide,
        lambda: made_counts(0.3),
    ),
    "binary, a quarter flipped later": (binary, binary_guide, lambda: made_binary(0.25)),
}


def alarms(name: str, held_out: bool, seed: int) -> list[bool]:
    """Of the band, of the ECE, of the statistics, of any."""
    model, guide, make = CASES[name]
    torch.manual_seed(seed)
    made = make()
    made = made if isinstance(made, tuple) else (made,)
    data, new = (tuple(x[part] for x in made) for part in (slice(ROWS), slice(ROWS, None)))
    posterior = pvi.Posterior(model, guide, data)
    site = pvi.check_predictive(posterior, new if held_out else None, num_draws=DRAWS, seed=seed)[
        "y"
    ]
    r = site.reliability
    extreme = any(min(p, 1 - p) < 0.005 for *_, p in site.statistics.values())
    band = site.band is not None and not site.band.inside
    return [band, r is not None and r.ece > r.ece_limit, extreme, bool(site.findings)]


def main() -> None:
    options = parser(__doc__).parse_args()
    rows = []
    for name in CASES:
        for where in ("training", "held out"):
            seeds = progress(range(options.seed, options.seed + SEEDS), f"{name}, {where}")
            found = [alarms(name, where == "held out", seed) for seed in seeds]
            shares = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
            rows.append([name, where, *shares, (shares[3] * (1 - shares[3]) / SEEDS) ** 0.5])
    more = {"data sets": SEEDS, "rows": ROWS, "draws": DRAWS}
    report("predictive", HEADER, rows, options.results, more=more)


if __name__ == "__main__":
    main()
