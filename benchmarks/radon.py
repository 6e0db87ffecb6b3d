"""Radon in 85 counties: pvi's guides beside Pyro's, against reference draws.

A hierarchical regression of 919 rows with 90 numbers to infer. Errors are max over the 90 of
|mean - reference| / reference sd and |sd / reference sd - 1|. Bounds are in nats, from 20,000 draws
of the guide, and khat is that of the weights of these draws. The Monte Carlo error of the reference
is about 0.01 sd, so that the largest of 90 is about 0.03.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

import pvi
from benchmarks.common import parser, report, timed
from benchmarks.posteriors import (
    DRAWS,
    errors,
    radon_centered,
    radon_noncentered,
    radon_parameters,
)
from pvi.errors import PviError
from pvi.guides import Flow, FullRank, Laplace, LowRank, MeanField, Structured
from tests.scenarios import isolated

FILE = "radon_mn-radon_hierarchical_intercept_noncentered.json"
PYRO_STEPS = 20_000
HEADER = ["guide", "setting", "bound", "se", "khat", "mean error", "sd error", "s", "steps", "end"]


ADAM = "optimizer='adam'"
LEARNED = "centred model, reparam='learned'"
RUNS: list[tuple[str, str, Callable, Any, dict[str, Any]]] = [
    *(
        (guide.__name__, "defaults", radon_noncentered, guide, {})
        for guide in (MeanField, LowRank, FullRank, Structured, Flow, Laplace)
    ),
    *(
        (guide.__name__, ADAM, radon_noncentered, guide, {"optimizer": "adam"})
        for guide in (FullRank, Structured)
    ),
    ("MeanField", "centred model", radon_centered, MeanField, {}),
    ("MeanField", LEARNED, radon_centered, MeanField, {"reparam": "learned"}),
    ("Structured", LEARNED, radon_centered, Structured, {"reparam": "learned"}),
]
PEERS = (AutoNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal)


def with_pvi(model: Callable, guide: Any, options: dict, args: tuple, seed: int):
    fit = pvi.fit(model, guide, args=args, seed=seed, progress=False, **options)
    end = "converged" if fit.converged else fit.reason
    return fit.posterior, len(fit.history), end


def with_pyro(guide: Any, args: tuple, seed: int) -> tuple[pvi.Posterior, int, str]:
    torch.manual_seed(seed)
    optimizer = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(radon_noncentered, guide(radon_noncentered), optimizer, Trace_ELBO())
    for _ in range(PYRO_STEPS):
        svi.step(*args)
    return pvi.from_svi(svi, args=args), PYRO_STEPS, "-"


def row(
    name: str,
    setting: str,
    run: Callable,
    reference: dict,
    seed: int,
) -> list[Any]:
    with isolated(torch.float32, seed):
        try:
            with timed() as seconds:
                posterior, steps, end = run()
        except PviError as error:
            print(f"{name}, {setting}: {error}", flush=True)
            return [name, setting, *[None] * 7, str(error).split(". ")[0]]
        found = pvi.diagnose(posterior, DRAWS, seed=seed)
        mean, sd = errors(radon_parameters(posterior.sample(DRAWS, seed=seed + 1)), reference)
    weights = [found.bound, found.bound_se, found.khat]
    known = [x if math.isfinite(x) else None for x in weights]  # a guide that can't be weighed
    cells = [name, setting, *known, mean, sd]
    print(cells, [seconds[0], steps, end], flush=True)
    return [*cells, seconds[0], steps, end]


def main() -> None:
    options = parser(__doc__, data=True).parse_args()
    content = json.loads((options.data / FILE).read_text())
    data, reference, seed = content["data"], content["reference"], options.seed
    county = torch.tensor(data["county_idx"]) - 1

    def args() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.tensor([data["log_uppm"], data["floor_measure"]]).mT
        return x, county, torch.tensor(data["log_radon"])

    rows = []
    for name, setting, model, guide, more in RUNS:
        run = partial(lambda *chosen: with_pvi(*chosen, args=args(), seed=seed), model, guide, more)
        rows.append(row(name, setting, run, reference, seed))
    for peer in PEERS:
        run = partial(lambda peer: with_pyro(peer, args(), seed), peer)
        rows.append(row(f"Pyro {peer.__name__}", "Adam 0.01", run, reference, seed))
    report("radon", HEADER, rows, options.results, more={"draws": DRAWS})


if __name__ == "__main__":
    main()
