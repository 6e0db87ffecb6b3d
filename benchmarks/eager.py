"""One step of training without compilation: pvi beside Pyro's SVI, with validation on and off.

Both make the same step: one particle of the sampled ELBO, independent normals (or the VAE's own
guide), Adam. Single steps are timed one by one from the start of each to the start of the next, so
all that a fit does between them counts; medians over fits that take turns, in one process.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pvi
from benchmarks.common import parser, report

RATE, FIRST = 0.01, 20  # steps before the first that counts


class Problem(NamedTuple):
    """Programs, their arguments, and a guide for each library."""

    model: Callable[..., Any]
    args: tuple
    ours: Any
    theirs: Any


def schools() -> Problem:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    def model(sigma: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sigma)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    return Problem(model, (sigma, y), pvi.guides.MeanField(model), AutoNormal(model))


def logistic(rows: int = 500, columns: int = 10, groups: int = 20) -> Problem:
    x, group = torch.randn(rows, columns), torch.arange(rows) % groups
    y = (torch.rand(rows) < torch.sigmoid(x[:, 0])).float()

    def model(x: Tensor, group: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("groups", groups):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("rows", rows):
            logits = (x @ w.unsqueeze(-1)).squeeze(-1) + a[..., group]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return Problem(model, (x, group, y), pvi.guides.MeanField(model), AutoNormal(model))


def vae(batch: int = 128, pixels: int = 784, hidden: int = 400, code: int = 20) -> Problem:
    encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * code))
    decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, pixels))
    x = (torch.rand(batch, pixels) < 0.3).float()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(code), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return Problem(model, (x,), guide, guide)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "eight schools": schools,
    "hierarchical logistic 500x10": logistic,
    "VAE 784-400-20, batch 128": vae,
}


def ours(make: Callable[[], Problem], objective: Any, seed: int, steps: int) -> list[float]:
    """Seconds of each step of `pvi.fit`."""
    problem, times = make(), []

    def tick(step: Any) -> None:
        times.append(time.perf_counter())

    pvi.fit(
        problem.model,
        problem.ours,
        args=problem.args,
        objective=objective,
        seed=seed,
        steps=steps,
        lr=RATE,
        callbacks=[tick],
        progress=False,
        compile=False,
    )
    return [b - a for a, b in zip(times[FIRST:], times[FIRST + 1 :], strict=False)]


def theirs(make: Callable[[], Problem], validate: bool, seed: int, steps: int) -> list[float]:
    """Seconds of each step of Pyro's SVI."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    problem, times = make(), []
    with pyro.validation_enabled(validate):
        svi = SVI(problem.model, problem.theirs, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
        for _ in range(steps):
            svi.step(*problem.args)
            times.append(time.perf_counter())
    return [b - a for a, b in zip(times[FIRST:], times[FIRST + 1 :], strict=False)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5, help="fits of each kind")
    options.add_argument("--steps", type=int, default=300, help="steps in each fit")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, make in PROBLEMS.items():
        times: list[list[float]] = [[], [], [], []]
        for seed in range(given.seed, given.seed + given.repeats):
            run = (make, seed, given.steps)
            times[0].append(median(ours(make, pvi.ELBO(1), *run[1:])))
            times[1].append(median(ours(make, None, *run[1:])))
            times[2].append(median(theirs(make, True, *run[1:])))
            times[3].append(median(theirs(make, False, *run[1:])))
        one, default, on, off = (1e6 * median(x) for x in times)
        rows.append([name, one, default, on, off, one / on, one / off])
    header = ["problem", "pvi us", "pvi default us", "Pyro us", "Pyro unvalidated us"]
    header += ["ratio", "ratio unvalidated"]
    report("eager", header, rows, given.results)


if __name__ == "__main__":
    main()
