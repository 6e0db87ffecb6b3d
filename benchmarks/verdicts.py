"""Is `diagnose` right? Its verdicts beside the true errors of many fits, good ones and bad ones.

The posteriors of `benchmarks.posteriors`, whose references are long runs of Stan, and linear
regressions with known noise, whose posterior is a normal in closed form. Each is fitted by several
guides for several numbers of steps, far too few among them. The error of a fit is the largest over
all parameters of |mean - reference mean| / reference sd and of |sd / reference sd - 1|, by 20,000
draws; `corrected` is the same with PSIS weights on the draws. No limit of the verdicts was chosen
by these fits.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report, timed
from benchmarks.posteriors import DRAWS, POSTERIORS, Draws, numbers
from pvi.diagnostics import psis
from pvi.guides import Flow, FullRank, LowRank, MeanField, Mixture
from pvi.progress import progress
from tests.scenarios import isolated

NORMAL = (MeanField, FullRank, LowRank)
STEPS = (None, 50, 600)  # None: by pvi.fit itself
RICHER = ("eight_schools_nc", "eight_schools")  # also fitted by Flow and Mixture
VERDICTS = ("good", "correctable", "unreliable", "not assessed")
LIMITS = (0.1, 0.2, 0.5)
HEADER = ["posterior", "reference", "guide", "steps", "seed", "converged", "verdict", "khat", "ess"]
HEADER += ["sd of log ratio", "mean error", "sd error", "corrected mean", "corrected sd", "seconds"]
HEADER += ["reasons"]


@dataclass(frozen=True)
class Case:
    """A model with its arguments, its parameters from draws, and their true means and sds."""

    name: str
    source: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    parameters: Callable[[Draws], Draws]
    reference: dict[str, dict[str, float]]


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), 0.7), obs=y)


def conjugate(size: int) -> Case:
    """Correlated columns; the posterior is N(m, C) with C^-1 = X'X / 0.49 + I / 4."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(40, size, generator=generator)
    x = x + 1.5 * torch.randn(40, 1, generator=generator)
    y = x.sum(1) + 0.7 * torch.randn(40, generator=generator)
    wide = x.double()
    cov = torch.linalg.inv(wide.T @ wide / 0.49 + torch.eye(size, dtype=torch.float64) / 4)
    mean, sd = cov @ wide.T @ y.double() / 0.49, cov.diagonal().sqrt()
    reference = {
        f"beta[{j + 1}]": {"mean": float(mean[j]), "sd": float(sd[j])} for j in range(size)
    }
    return Case(f"regression, {size}", "exact", regression, (x, y), numbers, reference)


def published(name: str, folder: Path) -> Case:
    known = POSTERIORS[name]
    stored = json.loads((folder / f"{known.file}.json").read_text())
    args = known.arguments(stored["data"])
    return Case(name, "published", known.model, args, known.parameters, stored["reference"])


def errors(case: Case, draws: Draws, weights: Tensor) -> tuple[float, float]:
    """Largest error of a mean in reference sds and largest relative error of an sd."""
    means, sds = [], []
    for name, x in case.parameters(draws).items():
        mean = weights @ x.double()
        sd = (weights @ (x.double() - mean) ** 2).sqrt()
        true = case.reference[name]
        means.append(abs(float(mean) - true["mean"]) / true["sd"])
        sds.append(abs(float(sd) / true["sd"] - 1))
    return max(means), max(sds)


class Once:
    """A posterior whose draws are made once, for the verdict and for the errors."""

    def __init__(self, posterior: Any):
        self.posterior, self.made = posterior, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.posterior, name)

    def draws(self, num: int, *, seed: int) -> Any:
        if num not in self.made:
            self.made[num] = self.posterior.draws(num, seed=seed)
        return self.made[num]


def judged(case: Case, guide: Any, steps: int | None, seed: int) -> list[Any]:
    """A row: one fit, its verdict and its errors."""
    name = guide.__name__ if isinstance(guide, type) else "Mixture(2)"
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    with isolated(torch.float32), timed() as seconds, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = pvi.fit(case.model, guide, args=case.args, seed=seed, progress=False, **options)
        once = Once(fit.posterior)
        found = pvi.diagnose(replace(fit, posterior=once), DRAWS, seed=seed)
        draws = once.draws(DRAWS, seed=seed)
    ratios = (draws.log_p - draws.log_q).double()
    plain = errors(case, draws.values, torch.full_like(ratios, 1 / DRAWS))
    corrected = errors(case, draws.values, psis(ratios).log_weights.exp())
    head = [case.name, case.source, name, len(fit.history) if steps is None else steps, seed]
    numbers_ = [found.khat, found.ess, found.sd_log_ratio, *plain, *corrected, seconds[0]]
    return [*head, fit.converged, found.verdict, *numbers_, "; ".join(found.reasons)]


def fits(folder: Path, names: list[str], seeds: range) -> Iterator[tuple[Case, Any, Any, int]]:
    """All that is fitted."""
    cases = [published(name, folder) for name in names] + [conjugate(3), conjugate(12)]
    for case in cases:
        for guide, steps in product(NORMAL, STEPS):
            yield case, guide, steps, seeds[0]
        for seed, steps in product(seeds[1:], (None, 600)):
            yield case, FullRank, steps, seed
        if case.name in RICHER:
            for guide, steps in product((Flow, Mixture(2)), (100, 2000)):
                yield case, guide, steps, seeds[0]


def confusion(rows: list[list[Any]]) -> list[list[Any]]:
    """How many fits had which verdict, by source of the reference and by true error."""
    bands = list(zip((0.0, *LIMITS), (*LIMITS, float("inf")), strict=True))
    counts = []
    for source, kind in product(("published", "exact"), ("mean and sd", "mean")):
        for low, high in bands:
            found = [r for r in rows if r[1] == source and low <= error(r, kind) < high]
            verdicts = [r[6] for r in found]
            mended = [error(r, kind, after=True) for r in found if r[6] == "correctable"]
            counts.append([source, kind, f"{low:g} to {high:g}", *map(verdicts.count, VERDICTS)])
            counts[-1].append(max(mended, default=None))
    return counts


def error(row: list[Any], kind: str, after: bool = False) -> float:
    mean, sd = row[12:14] if after else row[10:12]
    return mean if kind == "mean" else max(mean, sd)


def main() -> None:
    arguments = parser(__doc__, data=True)
    arguments.add_argument("--names", nargs="*", default=list(POSTERIORS), choices=list(POSTERIORS))
    arguments.add_argument("--seeds", type=int, default=2, help="how many")
    options = arguments.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    jobs = list(fits(options.data, options.names, seeds))
    rows = [judged(*job) for job in progress(jobs, "fits")]
    report("verdicts", HEADER, rows, options.results, more={"draws": DRAWS})
    header = ["reference", "error of", "true error", *VERDICTS, "worst corrected"]
    report("verdicts", header, confusion(rows), options.results, key="confusion")


if __name__ == "__main__":
    main()
