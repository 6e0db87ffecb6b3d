"""Fixed draws beside Pathfinder and batch and match: as alternatives, and from their normals.

Ten published posteriors. Errors are max over parameters of |mean - reference| / reference sd and
|sd / reference sd - 1|, medians over seeds; bounds in nats over the same 20,000 draws for all
normals. `gradients` are evaluations of the log density's gradient at one point. Multi-path
Pathfinder has 20 paths of 1,000 draws, resampled by smoothed importance weights. "fixed draws
from ..." is pvi's search begun at that normal; its own start is the better one of Laplace's
approximation and the guide's.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.alternatives import Counted, Normal, batch_and_match, pathfinder
from benchmarks.common import parser, report
from benchmarks.posteriors import DRAWS, POSTERIORS, Draws, Posterior, errors
from pvi.errors import PviError
from pvi.fit.double import doubled
from pvi.fit.fixed_draws import FixedDraws
from pvi.guides import FullRank
from pvi.guides.mode import LogJoint
from pvi.optim.mode import maximize
from pvi.posterior.psis import psis
from tests.scenarios import isolated

PATHS, PATH_DRAWS = 20, 1000
HEADER = ["posterior", "method", "mean error", "worst", "sd error", "worst sd", "bound"]
HEADER += ["gradients", "seconds", "failed"]
Found = Normal | Tensor | None  # a normal, draws, or nothing


class Problem:
    """One posterior in unconstrained space."""

    def __init__(self, case: Posterior, args: tuple):
        self.case, self.args = case, doubled(args)
        self.guide = FullRank(case.model).setup(*self.args)
        self.density = LogJoint(case.model, self.guide.layout, self.args, {})
        self.counted = Counted(self.density.many)
        self.start = self.guide.layout.start().detach()

    def parameters(self, points: Tensor) -> Draws:
        """What the reference names, of points in unconstrained space."""
        parts = self.guide.layout.split(points)
        latents = self.guide.layout.latents
        return self.case.parameters({n: latents[n].transform(u) for n, u in parts.items()})

    def random_start(self) -> Tensor:
        return 4.0 * torch.rand(len(self.start)) - 2.0  # Stan's

    def wide(self) -> Normal:
        return Normal(self.start, torch.eye(len(self.start)))

    def laplace(self) -> Normal | None:
        """Laplace's approximation; it counts a gradient for each latent of the curvature."""

        def density(u: Tensor) -> Tensor:
            self.counted.gradients += 1
            return self.density(u)

        try:
            mode = maximize(density, self.start)
            _, curvature = self.density.derivatives(mode)
        except PviError:
            return None
        self.counted.gradients += len(mode)
        precision, failed = torch.linalg.cholesky_ex(curvature)
        if int(failed) or not bool(precision.isfinite().all()):
            return None
        return Normal(mode, torch.linalg.cholesky(torch.cholesky_inverse(precision)))

    def fixed(self, start: Normal | None) -> Normal | None:
        """pvi's search, from this normal or its own start."""
        count = [0]

        def after(bound: float, norm: float, num: int) -> None:
            count[0] += num

        route = FixedDraws(self.guide, self.density, after)
        if start is None:
            route.run()
        else:
            covariance = start.factor @ start.factor.mT
            precision, failed = torch.linalg.inv_ex(covariance)
            if int(failed) or int(torch.linalg.cholesky_ex(precision).info):
                return None
            route.run(start.mean, precision)
        self.counted.gradients += count[0]
        mean = self.guide.transport(torch.zeros(1, len(self.start)))[0].detach()
        factor, failed = torch.linalg.cholesky_ex(self.guide.covariance().detach())
        return None if int(failed) else Normal(mean, factor)


def single(problem: Problem) -> Normal | None:
    return pathfinder(problem.counted, problem.random_start())


def several(problem: Problem) -> Tensor | None:
    """Multi-path Pathfinder: draws from all paths' normals, resampled."""
    found = [single(problem) for _ in range(PATHS)]
    normals = [normal for normal in found if normal is not None]
    if not normals:
        return None
    drawn = [normal.draw(PATH_DRAWS) for normal in normals]
    log_q = [normal.log_prob(x) for normal, x in zip(normals, drawn, strict=True)]
    points = torch.cat(drawn)
    log_w = problem.counted.value(points) - torch.cat(log_q)
    points, log_w = points[log_w.isfinite()], log_w[log_w.isfinite()]
    weights = torch.softmax(psis(log_w).log_weights, 0)
    return points[torch.multinomial(weights, DRAWS, replacement=True)]


METHODS: dict[str, Callable[[Problem], Found]] = {
    "Laplace": lambda problem: problem.laplace(),
    "Pathfinder": single,
    "Pathfinder, 20 paths, resampled": several,
    "batch and match": lambda problem: batch_and_match(problem.counted, problem.wide()),
    "batch and match from Laplace": lambda problem: _matched(problem, problem.laplace()),
    "fixed draws (pvi)": lambda problem: problem.fixed(None),
    "fixed draws from Pathfinder": lambda problem: _from(problem, single(problem)),
    "fixed draws from batch and match": lambda problem: _from(
        problem, batch_and_match(problem.counted, problem.wide())
    ),
}


def _matched(problem: Problem, start: Normal | None) -> Normal | None:
    return None if start is None else batch_and_match(problem.counted, start)


def _from(problem: Problem, start: Normal | None) -> Normal | None:
    return None if start is None else problem.fixed(start)


def one(case: Posterior, posterior: dict, method: str, seed: int) -> list[float] | None:
    """Errors, bound, gradients and seconds of a method, or `None` where it found nothing."""
    with isolated(torch.float64, seed):
        problem, begin = Problem(case, case.arguments(posterior["data"])), time.perf_counter()
        found = METHODS[method](problem)
        seconds = time.perf_counter() - begin
        if found is None:
            return None
        gradients, bound = problem.counted.gradients, math.nan
        points = found if isinstance(found, Tensor) else found.draw(DRAWS)
        with torch.no_grad():
            if isinstance(found, Normal):
                bound = float((problem.counted.value(points) - found.log_prob(points)).mean())
            cells = errors(problem.parameters(points), posterior["reference"])
    return [*cells, bound, gradients, seconds]


def compare(name: str, folder: Path, seeds: range, methods: list[str]) -> list[list[Any]]:
    case, rows = POSTERIORS[name], []
    posterior = json.loads((folder / f"{case.file}.json").read_text())
    for method in methods:
        runs = [one(case, posterior, method, seed) for seed in seeds]
        kept = [run for run in runs if run is not None and all(map(math.isfinite, run[:2]))]
        cells: list[Any] = [None] * 7
        if kept:
            mean, sd, bound, gradients, seconds = zip(*kept, strict=True)
            bounds = [b for b in bound if math.isfinite(b)]
            cells = [median(mean), max(mean), median(sd), max(sd)]
            cells += [median(bounds) if bounds else None, median(gradients), median(seconds)]
        rows.append([name, method, *cells, len(runs) - len(kept)])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__, data=True)
    arguments.add_argument("--names", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS))
    arguments.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments.add_argument("--seeds", type=int, default=3, help="how many")
    options = arguments.parse_args()
    seeds, rows = range(options.seed, options.seed + options.seeds), []
    for name in options.names:
        rows += compare(name, options.data, seeds, options.methods)
    report("starts", HEADER, rows, options.results, more={"draws": DRAWS})


if __name__ == "__main__":
    main()
