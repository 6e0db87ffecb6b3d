"""Simulation-based calibration: planted errors are found, exact guides pass, false alarms are rare.

A regression on two nearly equal columns, 10 rows, and two means that are independent. Each case is
one run of `pvi.sbc`; "adjusted p" is the smallest of all scalars after Holm's correction. Then the
closed-form posterior of the regression under many seeds: how often p-values are below 0.05.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from pvi.guides import FullRank, MeanField
from pvi.workflow.simulation import LOG_JOINT
from tests.calibrated import X, Y, exact, halved, line, widened

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "sbc.png"
SIMULATIONS, SEEDS, EACH = 200, 80, 100
HEADER = ["case", "expected", "adjusted p", "p of log_joint", "verdict", "90 % covers"]


def separate(y: Tensor) -> None:
    """Two means with data of their own: the posterior is a product of normals."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def tight_line(x: Tensor, y: Tensor) -> None:
    """The regression with a prior that is too narrow by half."""
    line(x, y, prior_sd=0.5)


def posterior(guide: Callable) -> pvi.Posterior:
    return pvi.Posterior(line, guide, (X, Y))


Case = tuple[Callable, Any, Any, str, dict[str, Any]]
CASES: dict[str, Case] = {
    "regression, closed form": (line, posterior(exact), (X, Y), "passes", {}),
    "regression, FullRank": (line, FullRank, (X, Y), "passes", {}),
    "regression, MeanField": (line, MeanField, (X, Y), "found", {}),
    "two means, MeanField": (separate, MeanField, torch.zeros(5, 2), "passes", {}),
    "regression, prior of half the sd": (
        tight_line,
        FullRank,
        (X, Y),
        "found",
        {"simulator": line},
    ),
    "regression, half of the data": (line, posterior(halved), (X, Y), "found", {}),
    "regression, sds times 2.2": (line, posterior(widened), (X, Y), "found", {}),
    "the same, PSIS": (line, posterior(widened), (X, Y), "passes", {"correct": "psis"}),
}


def measure(name: str, seed: int) -> tuple[list[Any], pvi.SBC]:
    model, guide, data, expected, options = CASES[name]
    run: Any = {"num_simulations": SIMULATIONS, "seed": seed, "progress": False, **options}
    found = pvi.sbc(model, guide, data, **run)
    sites = [n for n in found.pit if n != LOG_JOINT]
    cover = min(float(found.coverage([0.9])[n].min()) for n in sites)
    verdict = "passes" if found.calibrated else "found"
    joint = float(found.pvalues[LOG_JOINT])
    return [name, expected, found.pvalue, joint, verdict, cover], found


def false_alarms() -> list[list[Any]]:
    """Shares of p-values below 0.05, over seeds, with their standard errors."""
    single, together = [], []
    for seed in range(SEEDS):
        run: Any = {"num_simulations": EACH, "num_draws": 99, "seed": 1000 + seed}
        found = pvi.sbc(line, posterior(exact), **run, progress=False)
        single.append([*found.pvalues["b"], float(found.pvalues[LOG_JOINT])])
        together.append(found.pvalue)
    rows = [("one scalar", np.array(single)), ("all, after Holm", np.array(together))]
    result = []
    for name, p in rows:
        share = float((p < 0.05).mean())
        # scalars of one run are not independent: the error is that of runs
        errors = (p < 0.05).reshape(SEEDS, -1).mean(1)
        result.append([name, p.size, share, float(errors.std(ddof=1)) / SEEDS**0.5])
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--figure", type=Path, default=FIGURE)
    options = arguments.parse_args()
    rows = []
    for name in CASES:
        row, found = measure(name, options.seed)
        print(f"{name}\n{found}\n", flush=True)
        rows.append(row)
        if name == "regression, MeanField":
            options.figure.parent.mkdir(parents=True, exist_ok=True)
            found.plot().savefig(options.figure)
    more = {"simulations": SIMULATIONS, "runs of false alarms": [SEEDS, EACH]}
    report("sbc", HEADER, rows, options.results, more=more)
    alarms = false_alarms()
    report(
        "sbc", ["p-values of", "number", "below 0.05", "se"], alarms, options.results, key="null"
    )


if __name__ == "__main__":
    main()
