"""The demonstration's regression: robust, with shrinkage, first with the simplest guide."""

from pathlib import Path

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pvi
from pvi.cli.output import heading, write
from pvi.datasets import diabetes
from pvi.report import Section

SHOWN = ("intercept", "beta", "shrinkage", "sigma", "nu")


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Student-t errors, and coefficients that share one scale."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    shrinkage = pyro.sample("shrinkage", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("feature", x.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(0.0, shrinkage))
    with pyro.plate("patient", len(x)):
        mean = intercept + (x * beta.unsqueeze(-2)).sum(-1)
        pyro.sample("y", dist.StudentT(nu, mean, sigma), obs=y)


def run(out: Path, *, seed: int = 0, quick: bool = False) -> Section:
    """Fit, check, follow the advice, and save the better posterior."""
    heading("A robust regression: progression of diabetes in 442 patients")
    table = diabetes()
    data, steps = (table.x, table.y), 200 if quick else None
    draws = 2_000 if quick else 20_000

    print("\nIndependent normals for all parameters (the default guide):")
    simple = pvi.fit(model, data=data, steps=steps, seed=seed)
    first = simple.diagnose(draws, seed=seed)
    print(first)

    print("\nA normal with correlations (Pyro's AutoMultivariateNormal):")
    full = pvi.fit(model, AutoMultivariateNormal(model), data=data, steps=steps, seed=seed)
    second = full.diagnose(draws, seed=seed)
    print(second)

    better = second.bound >= first.bound
    fit, diagnosis = (full, second) if better else (simple, first)
    kind = "correlated" if better else "independent"
    print(f"\nThe {kind} guide has the higher bound; its posterior:\n")
    idata = fit.to_arviz(200 if quick else 1000, seed=seed, coords={"feature": list(table.columns)})
    text = (
        "Student-t regression of disease progression on ten measurements, all standardised. "
        f"Independent normals: {first.verdict}, bound {first.bound:.2f} nats. With correlations: "
        f"{second.verdict}, bound {second.bound:.2f} nats. Shown: the {kind} guide."
    )
    title = "Robust regression, diabetes data"
    return write(
        fit,
        diagnosis,
        idata,
        out,
        title=title,
        text=text,
        var_names=SHOWN,
        forest_names=[name for name in SHOWN if name != "nu"],  # of another order of magnitude
    )
