"""Pictures and a table that arviz makes of pvi's posteriors, on arviz 0.23 and on 1.x.

python examples/arviz_gallery.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist

import pvi

OLD = az.__version__.startswith("0.")
NAMES = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrence", "St Paul's", "Hermon"]
SIGMA = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
EFFECT = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def line(x, y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, noise), obs=y)


def forest(data):
    options = {"ci_probs": (0.5, 0.94)} if not OLD else {"hdi_prob": 0.94}
    return az.plot_forest(data, var_names=["theta"], combined=True, **options)


def posterior(data):
    plot = az.plot_posterior if OLD else az.plot_dist
    return plot(data, var_names=["mu", "tau"])


def ridge(data):
    if OLD:
        return az.plot_forest(data, var_names=["theta"], kind="ridgeplot", combined=True)
    return az.plot_ridge(data, var_names=["theta"])


def pair(data):
    options = {"kind": "scatter", "marginals": True} if OLD else {}
    return az.plot_pair(data, var_names=["intercept", "slope", "noise"], **options)


def ppc(data):
    if OLD:
        return az.plot_ppc(data, num_pp_samples=50, random_seed=0)
    return az.plot_ppc_dist(data, num_samples=50)


def ecdf_pit(data):
    """Of simulation-based calibration (`pvi.SBC.to_arviz`); only arviz 1.x reads it."""
    return az.plot_ecdf_pit(data, var_names=["intercept", "slope", "noise"])


def save(plot, data, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arviz's own, about xarray and matplotlib
        made = plot(data)
    figure = plt.gcf() if OLD else made.get_viz("figure")
    figure.savefig(path, dpi=60, bbox_inches="tight")
    plt.close("all")


def main(folder, num_sims=100):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    x = generator.uniform(0.0, 4.0, 40)
    y = 1.0 + 0.5 * x + 0.6 * generator.normal(size=40)

    fit = pvi.fit(schools, data=(SIGMA, EFFECT), seed=0)
    eight = fit.to_arviz(2000, correct="psis", coords={"school": NAMES}, seed=0)
    for plot in (forest, posterior, ridge):
        save(plot, eight, folder / f"arviz_{plot.__name__}.png")
    print(az.summary(eight, var_names=["mu", "tau", "theta"], kind="stats"))

    fit = pvi.fit(line, pvi.guides.FullRank, data=(x, y), seed=0)
    regression = fit.to_arviz(2000, seed=0)
    for plot in (pair, ppc):
        save(plot, regression, folder / f"arviz_{plot.__name__}.png")
    if not OLD:
        found = pvi.sbc(
            line,
            pvi.guides.FullRank,
            (x, y),
            num_simulations=num_sims,
            num_draws=199,
            seed=0,
        )
        save(ecdf_pit, found.to_arviz(), folder / "arviz_ecdf_pit.png")


if __name__ == "__main__":
    main(sys.argv[1])
