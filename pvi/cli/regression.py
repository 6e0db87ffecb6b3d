"""The demonstration's regression: the simplest guide, its diagnosis, and the advice followed."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

import pvi
from pvi.cli.output import heading, indented, paragraph, save_draws, summary
from pvi.datasets import Table, diabetes
from pvi.fit.report import Material, compose, gather
from pvi.fit.report_pictures import course, predictive
from pvi.fit.report_tables import numbers, parameters, verdict
from pvi.page import Picture, Section
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
    found: dict[str, Material] = {}
    for name, guide in guides.items():
        fit = pvi.fit(model, guide, (table.x, table.y), steps=200 if quick else None, seed=seed)
        found[name] = gather(fit, 2_000 if quick else 20_000, seed=seed, **_names(table))
        print(f"\nGuide: {name}. {fit}\n{indented(found[name].diagnosis)}", flush=True)
    best = max(found, key=lambda name: found[name].diagnosis.bound)
    print(f"\nThe guide of {best} has the higher bound. Its posterior is kept:\n", flush=True)
    draws = {name: _draws(each.fit, table, seed, quick) for name, each in found.items()}
    save_draws(draws[best], out / "posterior.nc")
    print(indented(summary(draws[best], SITES)), flush=True)
    compose(found[best], f"{TITLE}: {best}").write(out / "regression.html")
    sections = {name: _section(name, each) for name, each in found.items()}
    end = _comparison(draws, found[best], best)
    for picture in [*sections[best].pictures, *end.pictures]:
        picture.save(out)
    return [*sections.values(), end]


def _names(table: Table) -> dict[str, Any]:
    return {"coords": {"feature": list(table.columns)}, "dims": {"x": ["feature"]}}


def _draws(fit: pvi.Fit, table: Table, seed: int, quick: bool) -> Any:
    return fit.to_arviz(200 if quick else 1000, seed=seed, **_names(table))


def _section(name: str, found: Material) -> Section:
    """One fit on the page: its verdict, numbers and course."""
    parts = [ABOUT, *verdict(found).parts, *numbers(found).parts, *course(found).parts]
    return Section(f"{TITLE}: {name}", parts, found.diagnosis.verdict)


def _comparison(draws: dict[str, Any], found: Material, best: str) -> Section:
    """Both posteriors beside each other, and the better one in full."""
    lead = (
        f"The higher bound wins: {best}. Its draws are in posterior.nc, and all there is to say of "
        "it in regression.html."
    )
    caption = "The posterior under both guides"
    forest = Picture.of(plot_forest(draws, DRAWN), "forest.png", caption)
    parts = [lead, forest, *predictive(found).parts, *parameters(found).parts]
    return Section(f"{TITLE}: the posterior", parts)
