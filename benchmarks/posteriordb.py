"""Ten published posteriors with trusted references: pvi with no argument but the guide, and Pyro.

Errors are max over parameters of |mean - reference| / reference sd and |sd / reference sd - 1|,
medians and largest over the seeds. `floor` is the smallest sd error that independent normals can
have, where it can be told from the reference correlation. The Monte Carlo error of a reference mean
is 0.01 to 0.015 sd. Pyro: its usual Adam(0.01), 5,000 steps, and tuned: ClippedAdam, 0.05 falling
1,000 times over 20,000 steps, ended after 30 s; starts at 0 where a flat prior has no draw.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_feasible
from torch import Tensor
from torch.distributions import transform_to

import pvi
from benchmarks.common import parser, report, timed
from benchmarks.posteriors import DRAWS, POSTERIORS, Draws, Posterior, errors, floor
from pvi.guides import Flow, FullRank, LowRank, MeanField, Structured
from tests.scenarios import isolated

LONG = "Flow, 10,000 steps"
GUIDES = {g.__name__: (g, {}) for g in (MeanField, FullRank, LowRank, Structured, Flow)}
GUIDES[LONG] = (Flow, {"steps": 10_000})
RICHER = ("radon_nc", "eight_schools_nc", "eight_schools", "mixture")  # where Flow is tried too
SECONDS = 30.0  # for tuned Pyro
RESPONSE = "MeanField, linear response"
HEADER = ["posterior", "method", "mean error", "worst", "sd error", "worst sd", "floor"]
HEADER += ["seconds", "steps", "converged", "verdict"]


def with_pvi(case: Posterior, args: tuple, seed: int, name: str) -> dict[str, list[Any]]:
    """Cells by method: the guide's, and with MeanField also linear response."""
    with timed() as seconds:
        guide, options = GUIDES[name]
        fit = pvi.fit(case.model, guide, args=args, seed=seed, progress=False, **options)
    verdict = fit.diagnose(seed=seed).verdict
    end = [len(fit.history), "yes" if fit.converged else fit.reason.split(";")[0], verdict]
    found = {f"pvi {name}": [fit.posterior.sample(DRAWS, seed=seed), seconds[0], *end]}
    if name == "MeanField" and "num_draws" in fit.history:
        with timed() as more:
            corrected = fit.linear_response()
        draws = corrected.sample(DRAWS, seed=seed)
        found[f"pvi {RESPONSE}"] = [draws, seconds[0] + more[0], len(fit.history), end[1], "-"]
    return found


def start(site: dict[str, Any]) -> Tensor:
    """Pyro's default start; 0 in unconstrained space at flat priors, where that raises."""
    if isinstance(site["fn"], dist.ImproperUniform):
        return transform_to(site["fn"].support)(torch.zeros(site["fn"].shape()))
    return init_to_feasible(site)


def with_pyro(case: Posterior, args: tuple, seed: int, guide: Any, tuned: bool) -> list[Any]:
    torch.manual_seed(seed)
    guide = guide(case.model, init_loc_fn=start)
    steps = 20_000 if tuned else 5_000
    decayed = {"lr": 0.05, "lrd": 1e-3 ** (1 / steps)}
    optimizer = pyro.optim.ClippedAdam(decayed) if tuned else pyro.optim.Adam({"lr": 0.01})
    svi, begin = SVI(case.model, guide, optimizer, Trace_ELBO()), time.monotonic()
    for step in range(steps):  # noqa: B007
        svi.step(*args)
        if tuned and time.monotonic() - begin > SECONDS:
            break
    seconds = time.monotonic() - begin
    depth = 3  # of the deepest plate, and one more
    with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-depth):
        draws = guide(*args)
    draws = {
        name: x.reshape(DRAWS, *[n for n in x.shape[1:] if n > 1]) for name, x in draws.items()
    }
    return [draws, seconds, step + 1, "-", "-"]


PYRO: dict[str, Callable] = {
    "Pyro AutoNormal, Adam 0.01": lambda *a: with_pyro(*a, AutoNormal, False),
    "Pyro AutoMultivariateNormal, Adam 0.01": lambda *a: with_pyro(
        *a, AutoMultivariateNormal, False
    ),
    "Pyro AutoMultivariateNormal, tuned": lambda *a: with_pyro(*a, AutoMultivariateNormal, True),
}


def least(name: str, posterior: dict[str, Any]) -> float | None:
    """The family's floor, where the reference has the guide's own numbers."""
    if name in ("eight_schools_nc", "radon_nc", "mixture"):
        return None
    return floor(posterior, list(posterior["reference"]))


def compare(name: str, folder: Path, seeds: range, families: list[str], peers: bool) -> list[list]:
    case = POSTERIORS[name]
    posterior = json.loads((folder / f"{case.file}.json").read_text())
    found: dict[str, list[list[Any]]] = {}

    def note(method: str, draws: Draws, *rest: Any) -> None:
        cells = [*errors(case.parameters(draws), posterior["reference"]), *rest]
        found.setdefault(method, []).append(cells)
        print(name, method, cells, flush=True)

    for seed in seeds:
        for family in families:
            if "Flow" in family and (name not in RICHER or seed != seeds[0]):
                continue
            with isolated(torch.float32):
                cells = with_pvi(case, case.arguments(posterior["data"]), seed, family)
                for method, values in cells.items():
                    note(method, *values)
        if peers and seed == seeds[0]:
            for method, run in PYRO.items():
                with isolated(torch.float32):
                    note(method, *run(case, case.arguments(posterior["data"]), seed))
    return [row(name, method, runs, posterior) for method, runs in found.items()]


def row(name: str, method: str, runs: list[list[Any]], posterior: dict[str, Any]) -> list[Any]:
    means, sds, seconds, steps, *ends = zip(*runs, strict=True)
    bound = least(name, posterior) if "MeanField" in method or "AutoNormal" in method else None
    ends = ["; ".join(dict.fromkeys(map(str, end))) for end in ends]
    numbers = [median(means), max(means), median(sds), max(sds), bound, median(seconds)]
    return [name, method, *numbers, median(steps), *ends]


def main() -> None:
    arguments = parser(__doc__, data=True)
    arguments.add_argument("--names", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS))
    arguments.add_argument("--guides", nargs="*", default=list(GUIDES), choices=list(GUIDES))
    arguments.add_argument("--seeds", type=int, default=3, help="how many")
    arguments.add_argument("--no-pyro", action="store_true", help="pvi alone")
    options = arguments.parse_args()
    seeds, rows = range(options.seed, options.seed + options.seeds), []
    for name in options.names:
        rows += compare(name, options.data, seeds, options.guides, not options.no_pyro)
    report("posteriordb", HEADER, rows, options.results, more={"draws": DRAWS})


if __name__ == "__main__":
    main()
