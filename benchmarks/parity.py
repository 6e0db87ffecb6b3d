"""pvi's objectives against Pyro's, same seeds; and the minibatch IWAE against its closed value.

The first table has the largest absolute difference of loss and gradients over all the ways to run
particles (one, 4 batched, 4 looped), in float64. The second has a bound that Pyro gets wrong.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from tests.scenarios import (
    CASES,
    ELBO_ONLY,
    Case,
    isolated,
    mean_se,
    normal,
    normal_log_z,
    power_mean,
    randn,
)

OBJECTIVES = {
    "ELBO": (pvi.ELBO, Trace_ELBO),
    "mean field": (pvi.TraceMeanFieldELBO, TraceMeanField_ELBO),
    "IWAE": (pvi.IWAE, lambda **options: RenyiELBO(alpha=0.0, **options)),
    "Renyi 0.5": (
        lambda **options: pvi.RenyiELBO(0.5, **options),
        lambda **options: RenyiELBO(alpha=0.5, **options),
    ),
}
RUNS = [(1, False), (4, True), (4, False)]


def evaluate(objective: Any, case: Case, seed: int) -> tuple[float, Tensor]:
    """Loss, and all gradients in one vector."""
    leaves = [p.unconstrained() for _, p in pyro.get_param_store().items()]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(seed)
    loss = float(objective.loss_and_grads(case.model, case.guide, *case.args))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    return loss, torch.cat([g.flatten() for g in grads])


def compare(name: str, objective: str, seed: int) -> tuple[float, float]:
    """Largest |pvi - Pyro| of loss and gradients."""
    ours, theirs = OBJECTIVES[objective]
    values, gradients = [], []
    for num_particles, batched in RUNS:
        with isolated():
            case = CASES[name]()
            case.guide(*case.args)
            case.model(*case.args)
            options = {"num_particles": num_particles, "vectorize_particles": batched}
            loss, gradient = evaluate(ours(**options), case, seed)
            options["max_plate_nesting"] = case.nesting
            expected, expected_gradient = evaluate(theirs(**options), case, seed)
            values.append(abs(loss - expected))
            gradients.append(float((gradient - expected_gradient).abs().max()))
    return max(values), max(gradients)


def minibatch(batch: int, epochs: int, seed: int) -> list[list[Any]]:
    """IWAE, K = 5: N = 50, x ~ N(z, 1), z ~ N(0, 1), q = prior; mean over random partitions."""
    size, k = 50, 5
    x = randn(size) * 1.4

    def model(rows: Tensor) -> None:
        with pyro.plate("data", size, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(rows: Tensor) -> None:
        with pyro.plate("data", size, subsample=rows):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    z = torch.randn(100_000, k, generator=torch.Generator().manual_seed(99))
    totals = [power_mean(normal(value, z, 1.0).T, 0.0) for value in x]
    exact, exact_se = mean_se(torch.stack(totals).sum(0))
    row: list[Any] = [batch]
    theirs = RenyiELBO(alpha=0.0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    for objective in (pvi.IWAE(k), theirs):
        torch.manual_seed(seed)
        values = []
        for _ in range(epochs):
            batches = torch.randperm(size).split(batch)
            losses = [objective.loss(model, guide, rows) for rows in batches]
            values.append(-sum(losses) / len(losses))
        mean, se = mean_se(torch.tensor(values))
        row += [float(mean), float(se)]
    return [*row, float(exact), float(exact_se), normal_log_z(x)]


def main() -> None:
    options = parser(__doc__).parse_args()
    rows = []
    for objective in OBJECTIVES:
        for name in CASES:
            if (objective, name) == ("mean field", "AutoMultivariateNormal"):
                continue  # Pyro's closed form drops the log density of a Delta, the Jacobian
            if objective in ("ELBO", "mean field") or name not in ELBO_ONLY:
                rows.append([objective, name, *compare(name, objective, options.seed)])
    header = ["objective", "model", "|loss - Pyro|", "|gradient - Pyro|"]
    report("parity", header, rows, options.results)
    with isolated():
        rows = [minibatch(batch, 200, options.seed) for batch in (50, 25, 10)]
    header = ["batch", "pvi IWAE", "se", "Pyro RenyiELBO(0)", "se of Pyro"]
    header += ["true bound", "se of truth", "log Z"]
    report("parity", header, rows, options.results, key="minibatch_iwae")
    worst = max(abs(r[1] - r[5]) / math.hypot(r[2], r[6]) for r in rows)
    print(f"largest distance of pvi from the truth: {worst:.1f} standard errors")


if __name__ == "__main__":
    main()
