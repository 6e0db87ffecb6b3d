"""The same model on all rows and on batches of 32, beside the closed form and Pyro.

Regression on orthogonal features with known noise: the posterior is a product of normals, so a
mean-field guide can be exact. Errors are in units of the posterior sd.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from benchmarks.common import parser, report, timed
from tests.scenarios import isolated, randn

SIZE, FEATURES, BATCH = 512, 4, 32


def model(x: Tensor, y: Tensor) -> None:
    """y ~ N(x w, 1), w ~ N(0, 2)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def subsampling_model(x: Tensor, y: Tensor) -> None:
    """The same, edited for minibatches as Pyro wants it."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=BATCH) as rows:
        pyro.sample("y", dist.Normal((x[rows] * w).sum(-1), 1.0), obs=y[rows])


def make_data() -> tuple[Tensor, Tensor]:
    x = torch.linalg.qr(randn(SIZE, FEATURES)).Q * SIZE**0.5
    return x, x @ torch.tensor([0.5, -1.0, 0.0, 2.0]) + randn(SIZE, seed=1)


def posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sds of w: the features are orthogonal, so its precision is diagonal."""
    precision = (x**2).sum(0) + 0.25
    return x.T @ y / precision, precision.rsqrt()


def with_pvi(x: Tensor, y: Tensor, batch_size: int | None, seed: int) -> tuple[Tensor, Tensor, int]:
    fit = pvi.fit(model, data=(x, y), batch_size=batch_size, seed=seed, progress=False)
    guide: Any = fit.guide
    return guide.loc.w.detach(), guide.scale.w.detach(), len(fit.history)


def with_pyro(x: Tensor, y: Tensor, program: Any, seed: int) -> tuple[Tensor, Tensor, int]:
    """Adam 0.01, 5,000 steps; `model` is given batches as they are, as a first try would."""
    torch.manual_seed(seed)
    guide = AutoNormal(program)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(5000):
        rows = torch.randperm(SIZE)[:BATCH] if program is model else slice(None)
        svi.step(x[rows], y[rows])
    return guide.locs.w.detach(), guide.scales.w.detach(), 5000


def main() -> None:
    options = parser(__doc__).parse_args()
    rows: list[list[Any]] = []
    with isolated():
        x, y = make_data()
        mean, sd = posterior(x, y)
        methods = {
            "pvi, all rows": lambda: with_pvi(x, y, None, options.seed),
            f"pvi, batches of {BATCH}": lambda: with_pvi(x, y, BATCH, options.seed),
            "Pyro, subsample_size in the model": lambda: with_pyro(
                x, y, subsampling_model, options.seed
            ),
            "Pyro, batches as arguments": lambda: with_pyro(x, y, model, options.seed),
        }
        found = {"closed form": (mean, sd, 0, 0.0)}
        for name, method in methods.items():
            pyro.clear_param_store()
            with timed() as seconds:
                result = method()
            found[name] = (*result, seconds[0])
    for name, (loc, scale, steps, seconds) in found.items():
        error = float(((loc - mean) / sd).abs().max())
        spread = float((scale / sd - 1).abs().max())
        shown = [" ".join(f"{v:.4f}" for v in values.tolist()) for values in (loc, scale)]
        rows.append([name, *shown, error, spread, steps, seconds])
    header = ["method", "means", "sds", "max |mean error| / sd", "max |sd ratio - 1|", "steps", "s"]
    report("minibatch", header, rows, options.results, more={"rows": SIZE, "batch": BATCH})


if __name__ == "__main__":
    main()
