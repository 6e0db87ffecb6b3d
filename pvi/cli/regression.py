"""The demonstration's regression: the simplest guide, its diagnosis, and the advice followed."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

import pvi
from pvi.cli.output import (
    heading,
    indented,
    paragraph,
    predictive_check,
    save_draws,
    save_picture,
    summary,
)
from pvi.datasets import Table, diabetes
from pvi.fit.plot import plot_bound
from pvi.page import Section
from pvi.plots import plot_forest

SITES = ("intercept", "beta", "shrinkage", "sigma", "nu")
DRAWN = ("intercept", "beta", "shrinkage", "sigma")  # nu is of another order of magnitude
TITLE = "Robust regression, diabetes data"
ABOUT = (
    "Progression of diabetes in 442 patients, regressed on ten measurements (all standardised), "
    "with Student-t errors and coefficients that share one scale."
)


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


def run(out: Path, *, seed: int = 0, quick: bool = False) -> list[Section]:
    """Fit, check, follow the advice, and save the better posterior."""
    heading("1. A robust regression with shrinkage: diabetes")
    print(paragraph(ABOUT), flush=True)
    table = diabetes()
    guides = {
        "independent normals": None,  # the default guide
        "correlated normals": pvi.guides.FullRank,
    }
    fits: dict[str, pvi.Fit] = {}
    verdicts: dict[str, pvi.Diagnosis] = {}
    for name, guide in guides.items():
        steps = 200 if quick else None
        fits[name] = pvi.fit(model, guide, (table.x, table.y), steps=steps, seed=seed)
        verdicts[name] = fits[name].diagnose(2_000 if quick else 20_000, seed=seed)
        print(f"\nGuide: {name}. {fits[name]}\n{indented(verdicts[name])}", flush=True)
    best = max(verdicts, key=lambda name: verdicts[name].bound)
    print(f"\nThe guide of {best} has the higher bound. Its posterior is kept:\n", flush=True)
    draws = {name: _draws(fit, table, seed, quick) for name, fit in fits.items()}
    save_draws(draws[best], out / "posterior.nc")
    text = summary(draws[best], SITES)
    print(indented(text), flush=True)
    pictures = {n: out / ("bound.png" if n == best else "bound-other.png") for n in guides}
    sections = [_section(n, fits[n], verdicts[n], picture) for n, picture in pictures.items()]
    return [*sections, _comparison(draws, best, text, out)]


def _draws(fit: pvi.Fit, table: Table, seed: int, quick: bool) -> Any:
    coords = {"feature": list(table.columns)}
    return fit.to_arviz(200 if quick else 1000, seed=seed, coords=coords, dims={"x": ["feature"]})


def _section(name: str, fit: pvi.Fit, diagnosis: pvi.Diagnosis, picture: Path) -> Section:
    """One fit on the page: its diagnosis and how the bound rose."""
    return Section(
        f"{TITLE}: {name}",
        f"{ABOUT} {len(fit.history):,} steps.",
        diagnosis.verdict,
        (("Diagnosis", str(diagnosis)),),
        (save_picture(plot_bound(fit.history), picture, "Bound during training, nats"),),
    )


def _comparison(draws: dict[str, Any], best: str, text: str, out: Path) -> Section:
    """Both posteriors beside each other, and the better one in full."""
    caption = "The posterior under both guides"
    figures = [save_picture(plot_forest(draws, DRAWN), out / "forest.png", caption)]
    figures += predictive_check(draws[best], out / "ppc.png")
    lead = f"The higher bound wins: {best}. Its draws are in posterior.nc."
    return Section(f"{TITLE}: the posterior", lead, "", (("Summary", text),), tuple(figures))
