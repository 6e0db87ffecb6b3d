"""How Adam's rate is set and when it stops: stages with averages (`pvi.fit`) beside other ways.

Every method starts from the same parameters, with the first rate of `pvi.fit` times 0.1, 1 and 10,
and three seeds each. "gap" is how far the bound of the last parameters is below that of the
family's optimum (from the deterministic route), or below the best of all runs where none is known,
in nats; for the VAE on images that were not trained on, nats an image. Errors of means are in
posterior sds, those of sds in their logarithm, the largest over all latents. "averaged" is the
same with the parameters averaged over the last quarter of the run. Medians of the seeds. "bounds"
is how often a method evaluates the bound of a batch without a gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser, report
from benchmarks.rates_problems import PROBLEMS, Problem
from pvi.fit.schedule import TOLERANCE
from pvi.optim.schedule import Plateau, Stages, cosine
from tests.scenarios import isolated

SEEDS, FACTORS = 3, (0.1, 1.0, 10.0)
BLOCK, MOST, FIRST = 50, 20_000, 200
HEADER = ["method", "rate x", "steps", "bounds", "ended", "gap", "gap, averaged"]
HEADER += ["mean error", "mean error, averaged", "sd error", "sd error, averaged"]


class Runs:
    """The rows of parameters `p` `(R, P)` that are trained at once, and their noise.

    Args:
        problem: what is fitted.
        rates: `(R)`, first rates.
        seed: of rows and noise.
    """

    def __init__(self, problem: Problem, rates: Tensor, seed: int):
        self.problem, self.rates = problem, rates.unsqueeze(-1)
        self.p = problem.start.repeat(len(rates), 1)
        self.make = torch.Generator().manual_seed(seed)
        self.m, self.v, self.step = torch.zeros_like(self.p), torch.zeros_like(self.p), 0
        self.blocks: list[Tensor] = []  # means over `BLOCK` steps
        self.sum = torch.zeros_like(self.p)
        self.order = torch.zeros(len(rates), 0, dtype=torch.long)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Gradients and losses of the next batches."""
        problem, count = self.problem, len(self.p)
        if self.order.shape[1] < problem.batch:
            self.order = torch.rand(count, problem.rows, generator=self.make).argsort(-1)
        rows, self.order = self.order[:, : problem.batch], self.order[:, problem.batch :]
        shape = (count, problem.particles, problem.noise)
        noise = torch.randn(shape, generator=self.make)
        p = self.p.clone().requires_grad_()
        losses = torch.vmap(problem.loss)(p, rows, noise)
        return torch.autograd.grad(losses.sum(), p)[0], losses.detach()

    def adam(self, g: Tensor, factor: Tensor) -> None:
        """One step at a factor `(R, 1)` on the first rates."""
        self.step += 1
        self.m.lerp_(g, 0.1)
        self.v.lerp_(g.square(), 0.01)
        m, v = self.m / (1 - 0.9**self.step), self.v / (1 - 0.99**self.step)
        self.p.sub_(self.rates * factor * m / (v.sqrt() + 1e-8))

    def remember(self) -> None:
        self.sum += self.p
        if self.step % BLOCK == 0:
            self.blocks.append(self.sum / BLOCK)
            self.sum = torch.zeros_like(self.p)

    def averaged(self) -> Tensor:
        """Over the last quarter."""
        return torch.stack(self.blocks[-math.ceil(len(self.blocks) / 4) :]).mean(0)


class Fixed:
    """A rate that is a function of the step alone, and a fixed number of steps."""

    bounds = 0

    def __init__(self, runs: Runs, steps: int, shape: Callable[[int, int], float]):
        self.runs, self.steps, self.shape = runs, steps, shape

    def update(self, g: Tensor, losses: Tensor) -> Any:
        """Make a step; the runs that end with it."""
        runs = self.runs
        runs.adam(g, torch.tensor(self.shape(runs.step, self.steps)))
        return range(len(g)) if runs.step == self.steps else ()


def wsd(step: int, steps: int) -> float:
    """Warm-up over a twentieth, level until three quarters, then linear to 0."""
    return min(20.0 * (step + 1) / steps, 1.0, 4.0 * (1.0 - step / steps))


class ByPlateau:
    """Times 0.3 whenever the bound stops rising, to the end at a thousandth: pvi before stages."""

    bounds = 0

    def __init__(self, runs: Runs):
        self.runs = runs
        self.rules = [Plateau(max(FIRST, runs.problem.passes)) for _ in runs.p]

    def update(self, g: Tensor, losses: Tensor) -> Any:
        self.runs.adam(g, torch.tensor([[rule.factor] for rule in self.rules]))
        for rule, loss in zip(self.rules, losses.tolist(), strict=True):
            rule.update(-loss)
        return [i for i, rule in enumerate(self.rules) if rule.converged]


class ByStages:
    """`pvi.fit`: the best of two averages and the last parameters starts the next stage."""

    def __init__(self, runs: Runs):
        self.runs, self.bounds = runs, 0
        problem, first = runs.problem, max(FIRST, runs.problem.passes)
        tolerance = TOLERANCE * math.sqrt(problem.numbers)
        self.rules = [Stages(first, MOST, tolerance) for _ in runs.p]
        self.best = runs.p.clone()
        self.halves = torch.zeros(2, *runs.p.shape)

    def update(self, g: Tensor, losses: Tensor) -> Any:
        runs = self.runs
        runs.adam(g, torch.tensor([[rule.factor] for rule in self.rules]))
        ended = []
        for i, rule in enumerate(self.rules):
            if rule.ended:
                if runs.step >= (rule.finished or 0):
                    runs.p[i] = self.best[i]
                    ended.append(i)
                continue
            late = int(runs.step - rule.start > rule.length // 2)
            self.halves[late, i] += runs.p[i]
            if runs.step == rule.end:
                self._judge(i, rule)
        return ended

    def _judge(self, i: int, rule: Stages) -> None:
        length = rule.end - rule.start
        second = self.halves[1, i] / max(length - rule.length // 2, 1)
        whole = self.halves[:, i].sum(0) / length
        candidates = torch.stack([self.best[i], whole, second, self.runs.p[i]])
        bounds = compare(self.runs.problem, candidates, length)
        self.bounds += bounds.numel() / len(self.rules)
        winner = int(bounds[1:].mean(-1).argmax()) + 1
        gains = bounds[winner] - bounds[0]
        error = float(gains.std()) / len(gains) ** 0.5 if self.runs.problem.passes == 1 else 0.0
        if float(gains.mean()) > 0.0:
            self.best[i] = candidates[winner]
        self.runs.p[i], self.halves[:, i] = self.best[i], 0.0
        rule.judge(float(gains.mean()), error, winner > 1)


def compare(problem: Problem, p: Tensor, length: int) -> Tensor:
    """Bounds of candidates `(C, P)` with the same rows and noise: `(C, batches)`."""
    make, passes = torch.Generator().manual_seed(0), problem.passes
    count = max(24, length // 16) if passes == 1 else passes * math.ceil(24 / passes)
    shape, found, order = (problem.particles, problem.noise), [], torch.zeros(0)
    for _ in range(count):
        if len(order) < problem.batch:
            order = torch.randperm(problem.rows, generator=make)
        rows, order = order[: problem.batch], order[problem.batch :]
        noise = torch.randn(shape, generator=make)
        found.append(-torch.vmap(problem.loss, (0, None, None))(p, rows, noise))
    return torch.stack(found, -1)


class Rabvi:
    """Halve the rate once split R-hat finds the parameters at rest; go on from their average.

    R-hat is of means of blocks over the later half of a rate's steps, and must be below 1.2; the
    Monte Carlo error of the average must be below a tenth of an sd, as must be the change from the
    average before for the fit to end. After Welandawe et al. 2022.
    """

    bounds = 0

    def __init__(self, runs: Runs, steps: int):
        self.runs, self.steps = runs, steps
        count = len(runs.p)
        self.factor, self.first = torch.ones(count, 1), [0] * count
        self.before: list[Any] = [None] * count

    def update(self, g: Tensor, losses: Tensor) -> Any:
        runs = self.runs
        runs.adam(g, self.factor)
        if runs.step == self.steps:
            return range(len(g))
        if runs.step % 200:
            return ()
        return [i for i in range(len(g)) if self._rests(i)]

    def _rests(self, i: int) -> bool:
        blocks, size = self.runs.blocks[self.first[i] :], self.runs.problem.numbers
        if len(blocks) < 16:
            return False
        rows = torch.stack([block[i] for block in blocks[len(blocks) // 2 :]])
        sds = torch.ones(rows.shape[-1])
        sds[:size] = self.runs.p[i, size : 2 * size].exp()
        halves = torch.stack([half[: len(rows) // 2] for half in rows.tensor_split(2)])
        within = halves.var(1).mean(0).clamp(min=1e-20)
        ratio = (1.0 + halves.mean(1).var(0) / within).sqrt()
        if float(ratio.max()) > 1.2 or float((within / len(rows)).sqrt().div(sds).max()) > 0.1:
            return False
        mean, before = rows.mean(0), self.before[i]
        self.before[i], self.first[i] = mean, len(self.runs.blocks)
        self.runs.p[i] = mean
        self.factor[i] *= 0.5
        return before is not None and float(((mean - before) / sds).abs().max()) < 0.1


class RateFree:
    """Prodigy (Mishchenko and Defazio 2024): Adam times an estimate of the distance to go; and DoWG
    (Khaled et al. 2023): r^2 g / sqrt(sum r^2 |g|^2), r the largest distance so far.
    """

    bounds = 0

    def __init__(self, runs: Runs, steps: int, prodigy: bool):
        self.runs, self.steps, self.prodigy = runs, steps, prodigy
        self.start, self.s = runs.p.clone(), torch.zeros_like(runs.p)
        self.d, self.sum = 1e-3 * runs.rates / 0.05, torch.zeros(len(runs.p), 1)

    def update(self, g: Tensor, losses: Tensor) -> Any:
        runs = self.runs
        runs.step += 1
        if self.prodigy:
            runs.p -= self._prodigy(g)
        else:
            self.d = torch.maximum(self.d, (runs.p - self.start).norm(dim=-1, keepdim=True))
            self.sum += self.d**2 * g.square().sum(-1, keepdim=True)
            runs.p -= self.d**2 * g / self.sum.sqrt()
        return range(len(g)) if runs.step == self.steps else ()

    def _prodigy(self, g: Tensor) -> Tensor:
        runs, d, root = self.runs, self.d, 0.99**0.5
        runs.m.lerp_(d * g, 0.1)
        runs.v.lerp_(d**2 * g.square(), 0.01)
        away = (g * (self.start - runs.p)).sum(-1, keepdim=True)
        self.sum = root * self.sum + (1 - root) * d**2 * away
        self.s = root * self.s + (1 - root) * d**2 * g
        self.d = torch.maximum(d, self.sum / self.s.abs().sum(-1, keepdim=True).clamp(min=1e-30))
        return d * runs.m / (runs.v.sqrt() + d * 1e-8)


METHODS: dict[str, Callable[[Runs], Any]] = {
    "stages with averages": ByStages,
    "plateaus": ByPlateau,
    "cosine, 1,000": lambda runs: Fixed(runs, 1000, cosine),
    "cosine, 4,000": lambda runs: Fixed(runs, 4000, cosine),
    "cosine, 16,000": lambda runs: Fixed(runs, 16_000, cosine),
    "warm-up, stable, decay, 4,000": lambda runs: Fixed(runs, 4000, wsd),
    "constant, 4,000": lambda runs: Fixed(runs, 4000, lambda *_: 1.0),
    "RABVI, at most 16,000": lambda runs: Rabvi(runs, 16_000),
    "Prodigy, 4,000": lambda runs: RateFree(runs, 4000, True),
    "DoWG, 4,000": lambda runs: RateFree(runs, 4000, False),
}


def train(problem: Problem, method: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Any]:
    """All factors and seeds: last and averaged parameters `(R, P)`, steps `(R)`, and the method."""
    runs = Runs(problem, problem.rate * torch.tensor(FACTORS).repeat_interleave(SEEDS), seed)
    rule = METHODS[method](runs)
    last, averaged = runs.p.clone(), runs.p.clone()
    steps = torch.zeros(len(runs.p))
    while not bool(steps.all()) and runs.step < MOST:
        g, losses = runs.gradient()
        ended = rule.update(g, losses)
        runs.remember()
        for i in ended if runs.step < MOST else range(len(steps)):
            if not steps[i]:
                steps[i], last[i], averaged[i] = runs.step, runs.p[i], runs.averaged()[i]
    return last, averaged, steps, rule


def score(problem: Problem, p: Tensor) -> Tensor:
    """Losses `(R)` over all rows or those held out, the same draws for all, nats."""
    if problem.held is not None:
        return problem.held(p)
    make, total = torch.Generator().manual_seed(1), torch.zeros(len(p))
    rows = torch.arange(problem.rows)
    for _ in range(20):
        noise = torch.randn(32, problem.noise, generator=make)
        total += torch.stack([problem.loss(row, rows, noise) for row in p]) / 20
    return total


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=PROBLEMS)
    options = arguments.parse_args()
    for name in options.problems:
        with isolated(), torch.no_grad():
            torch.set_default_dtype(torch.float32)
            with torch.enable_grad():
                problem = PROBLEMS[name]()
            rows, best = (
                [],
                score(problem, problem.best[None]) if problem.best is not None else None,
            )
            found = {}
            for method in METHODS:
                if method.startswith("RABVI") and problem.held is not None:
                    continue  # it is about sds of a normal guide
                with torch.enable_grad():
                    *parameters, steps, rule = train(problem, method, options.seed)
                scores = [score(problem, p) for p in parameters]
                errors = [problem.errors(p) if problem.errors else None for p in parameters]
                found[method] = steps, rule, scores, errors
                print(f"{name}: {method}", steps.tolist(), scores[0].tolist(), flush=True)
            if best is None:
                best = min(s.min() for _, _, scores, _ in found.values() for s in scores)
            for method, (steps, rule, scores, errors) in found.items():
                rows += cells(method, steps, rule, [s - best for s in scores], errors)
        print(name)
        report("rates", HEADER, rows, options.results, key=name)


def cells(method: str, steps: Tensor, rule: Any, gaps: list[Tensor], errors: Any) -> list[Any]:
    """One row for each factor: medians over seeds."""
    rows = []
    for f, factor in enumerate(FACTORS):
        part = slice(f * SEEDS, (f + 1) * SEEDS)
        middle = [float(gap[part].median()) for gap in gaps]
        off = [None if e is None else float(e[k][part].median()) for k in (0, 1) for e in errors]
        limit = MOST if not isinstance(rule, Rabvi) else rule.steps
        ended = sum(float(s) < limit for s in steps[part])
        if isinstance(rule, ByStages):
            ended = sum(r.converged for r in rule.rules[part])
        told = None if isinstance(rule, Fixed | RateFree) else f"{ended} of {SEEDS}"
        count = int(steps[part].median())
        rows.append([method, factor, count, int(rule.bounds), told, *middle, *off])
    return rows


if __name__ == "__main__":
    main()
