"""What each guide costs, and what it can represent: step times, known targets, other coordinates.

`cost`: a step of `pyro.infer.SVI` (loss, backward, Adam) on D latents with a standard normal prior
and a normal likelihood, float32, median over steps; Pyro's autoguides in the same run. A guide that
needs more than 8 GB, 10 s a step or a minute in all is left out there, and `note` says so.

`targets`: densities in two dimensions, normalised in closed form, so that log Z = 0 and minus the
bound is the whole error of a guide, in nats; and the picture of them.

`gaussian`: how near the full-rank normal comes to a normal posterior.

`schools`: the eight schools, centred, and reparameterised by `pvi.fit(reparam=)`.
"""

import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor
from torch.distributions import constraints

import pvi
from benchmarks.common import parser, report, timed
from benchmarks.posteriors import DRAWS, columns
from pvi.errors import PviError
from pvi.figures import new_figure
from pvi.guides import Flow, FullRank, Laplace, LowRank, MeanField, Mixture, Structured
from tests.scenarios import isolated, randn

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "guides.png"

# ---------------------------------------------------------------------------------------- cost

SIZES = (10, 100, 1000, 10_000)
PARTICLES = (1, 8)
MEMORY = 8 * 2**30  # bytes that a guide may take
SLOWEST = 10.0  # seconds a step
BUDGET, MOST = 1.0, 50  # seconds and steps of one measurement
PATIENCE = 60.0  # seconds for one guide at one size
FORK = multiprocessing.get_context("fork")
FAMILIES: dict[str, Callable] = {
    "MeanField": MeanField,
    "Pyro AutoNormal": AutoNormal,
    "LowRank": LowRank,
    "Pyro AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "FullRank": FullRank,
    "Pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "Structured": Structured,
    "Flow (NSF, 3 transforms)": Flow,
    "Flow (MAF, 3 transforms)": lambda model: Flow(model, kind="MAF"),
    "Pyro AutoIAFNormal": AutoIAFNormal,
    "Mixture(3)": lambda model: Mixture(3, model=model),
    "Laplace": Laplace,
}


def latents(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Allocations beyond `MEMORY` fail, as on a machine that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def step_time(svi: SVI, x: Tensor) -> float:
    """Median seconds of a step, after one that creates the optimiser's state.

    Raises:
        TimeoutError: a step takes longer than `SLOWEST`.
    """
    times: list[float] = []
    while len(times) < 2 or (sum(times[1:]) < BUDGET and len(times) <= MOST):
        start = time.perf_counter()
        svi.step(x)
        times.append(time.perf_counter() - start)
        if times[-1] > SLOWEST:
            raise TimeoutError(f"a step takes {times[-1]:.0f} s")
    return statistics.median(times[1:])


def cost(name: str, size: int) -> list[Any]:
    """A row: parameters, seconds to set up, ms a step with 1 and 8 particles, and why not."""
    count, setup, note, steps = None, None, "", [None] * len(PARTICLES)
    x = randn(size).float()
    try:
        with timed() as seconds:
            guide = FAMILIES[name](latents)
            guide.setup(x) if isinstance(guide, pvi.guides.Guide) else guide(x)
        setup = seconds[0]
        count = sum(p.numel() for p in guide.parameters())
        for i, particles in enumerate(PARTICLES if name != "Laplace" else ()):
            batched = {"vectorize_particles": True, "max_plate_nesting": 0}
            theirs = Trace_ELBO(particles, **batched if particles > 1 else {})
            loss = theirs if name.startswith("Pyro") else pvi.ELBO(particles, kl="exact")
            svi = SVI(latents, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
            steps[i] = 1e3 * step_time(svi, x)
    except (RuntimeError, MemoryError, TimeoutError, PviError) as error:
        out = "memory" in str(error).lower() or isinstance(error, MemoryError)
        note = f"more than {MEMORY >> 30} GB" if out else str(error).splitlines()[0]
    return [name, size, count, setup, *steps, note]


def alone(name: str, size: int, seed: int) -> list[Any]:
    """`cost` in a process of its own, which may run out of memory or time."""

    def work() -> None:
        with isolated(torch.float32, seed), limited_memory():
            send.send(cost(name, size))

    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work)
    process.start()
    send.close()
    why = f"not done in {PATIENCE:.0f} s"
    try:
        if receive.poll(PATIENCE):
            return receive.recv()
    except EOFError:
        why = f"more than {MEMORY >> 30} GB"
    finally:
        process.kill()
        process.join()
    return [name, size, *[None] * (2 + len(PARTICLES)), why]


def costs(options: Any) -> None:
    rows = []
    for name in FAMILIES:
        for size in SIZES:
            rows.append(alone(name, size, options.seed))
            print(rows[-1], flush=True)
    header = ["guide", "latents", "parameters", "setup s", *(f"ms, K={k}" for k in PARTICLES)]
    report("guides", [*header, "note"], rows, options.results, key="cost")


# ------------------------------------------------------------------------------------- targets


def normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    return dist.Normal(loc, scale).log_prob(x)


def correlated(z: Tensor) -> Tensor:
    x, y, r = z[..., 0], z[..., 1], 0.9
    return normal(x, 0.0, 1.0) + normal(y, r * x, math.sqrt(1 - r**2))


def banana(z: Tensor) -> Tensor:
    x, y = z[..., 0], z[..., 1]
    return normal(x, 0.0, 1.0) + normal(y, x**2 - 1.0, 0.5)


def funnel(z: Tensor, sd: float = 1.5) -> Tensor:
    x, v = z[..., 0], z[..., 1]
    return normal(v, 0.0, sd) + normal(x, 0.0, (v / 2).exp())


def wide_funnel(z: Tensor) -> Tensor:
    return funnel(z, 3.0)


def two_modes(z: Tensor) -> Tensor:
    x, y = z[..., 0], z[..., 1]
    left = math.log(0.6) + normal(x, -1.5, 0.5) + normal(y, -0.5, 0.8)
    return torch.logaddexp(left, math.log(0.4) + normal(x, 1.5, 0.5) + normal(y, 0.8, 0.5))


# name -> log density, and the window of the picture
TARGETS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "correlated": (correlated, (-3.5, 3.5, -3.5, 3.5)),
    "banana": (banana, (-3.5, 3.5, -3.2, 6.8)),
    "funnel": (funnel, (-6.0, 6.0, -4.5, 4.5)),
    "two modes": (two_modes, (-3.8, 3.8, -3.8, 3.8)),
    "Neal's funnel": (wide_funnel, ()),
}
WIDE = {"init_scale": 1.0}  # as wide as the targets: a narrow start sees one mode
# how to make it; steps; particles and gradient of the ELBO
GUIDES: dict[str, tuple[Callable[[], Any], int, int, str]] = {
    "MeanField": (lambda: MeanField(**WIDE), 3000, 16, "path"),
    "FullRank": (lambda: FullRank(**WIDE), 3000, 16, "path"),
    "Laplace": (Laplace, 1, 16, "path"),
    "Mixture(4)": (lambda: Mixture(4), 3000, 16, "auto"),
    "Flow (MAF)": (lambda: Flow(kind="MAF", **WIDE), 2000, 64, "auto"),
    "Flow": (lambda: Flow(**WIDE), 2000, 64, "auto"),
}
PICTURED = ("MeanField", "FullRank", "Laplace", "Mixture(4)", "Flow")


def model_of(log_density: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """A model whose posterior has this density: log Z = 0."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("target", log_density(z))

    return model


def fit_target(target: str, name: str, seed: int) -> tuple[Any, list[Any]]:
    make, steps, particles, gradient = GUIDES[name]
    objective = pvi.ELBO(particles, gradient=gradient)
    model = model_of(TARGETS[target][0])
    with timed() as seconds:
        fit = pvi.fit(model, make(), objective=objective, steps=steps, seed=seed, progress=False)
    found = pvi.diagnose(fit.posterior, DRAWS, seed=seed)
    numbers = [-found.bound, found.bound_se, found.khat, found.verdict]
    return fit, [target, name, *numbers, len(fit.history), seconds[0]]


def targets(options: Any) -> None:
    rows, densities = [], {}
    for target, (_, window) in TARGETS.items():
        for name in GUIDES:
            with isolated(seed=options.seed):
                try:
                    fit, row = fit_target(target, name, options.seed)
                except PviError as error:
                    print(f"{name} on {target}: {error}", flush=True)
                    row = [target, name, *[None] * 6]
                else:
                    if window and name in PICTURED:
                        z = grid(window)[2]
                        with torch.no_grad():
                            densities[target, name] = fit.guide.log_prob({"z": z})
                rows.append(row)
                print(row, flush=True)
    header = ["target", "guide", "log Z - bound", "se", "khat", "verdict", "steps", "s"]
    report("guides", header, rows, options.results, key="targets")
    plot(rows, densities, options.figure)


POINTS = 241


def grid(window: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, and all points of the grid as draws `(POINTS^2, 2)`."""
    x, y = (torch.linspace(*window[i : i + 2], POINTS) for i in (0, 2))
    return x, y, torch.cartesian_prod(x, y)


def levels(log_density: Tensor, masses: tuple[float, ...]) -> list[float]:
    """The densities whose regions hold these masses, rising."""
    p = log_density.exp().sort(descending=True).values
    share = p.cumsum(0) / p.sum()
    return sorted({float(p[int((share < mass).sum()).__index__()]) for mass in masses})


def plot(rows: list[list[Any]], densities: dict, path: Path) -> None:
    """Each guide's regions of 50 and 95 % over those of each target."""
    shown = [target for target, (_, window) in TARGETS.items() if window]
    gaps = {(row[0], row[1]): row[2] for row in rows}
    figure = new_figure(1.75 * len(PICTURED), 1.75 * len(shown))
    panels = figure.subplots(len(shown), len(PICTURED), sharex="row", sharey="row")
    for line, target in zip(panels, shown, strict=True):
        log_density, window = TARGETS[target]
        x, y, z = grid(window)
        truth = log_density(z)
        for axes, name in zip(line, PICTURED, strict=True):
            edges = levels(truth, (0.5, 0.95))
            p = truth.exp().reshape(POINTS, POINTS).mT
            axes.contourf(x, y, p, [*edges, float("inf")], colors=["0.87", "0.72"])
            if (target, name) in densities:
                q = densities[target, name]
                lines = q.exp().reshape(POINTS, POINTS).mT
                axes.contour(x, y, lines, levels(q, (0.5, 0.95)), colors="C3", linewidths=1.1)
            gap = gaps.get((target, name))
            text = "no mode" if gap is None else f"{max(gap, 0.0):.3f}"
            axes.text(0.96, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="0.7", lw=0.6)
    for axes, name in zip(panels[0], PICTURED, strict=True):
        axes.set_title(name, fontsize=10)
    for axes, target in zip(panels[:, 0], shown, strict=True):
        axes.set_ylabel(target, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ------------------------------------------------------------------------------------ gaussian


def gaussian(options: Any) -> None:
    """Posterior of regression weights with correlated inputs, known in closed form."""
    rows = []
    for size in (2, 10, 50):
        with isolated(seed=options.seed):
            x = randn(100, size) + 2.0 * randn(100, 1, seed=1)
            y = x @ randn(size, seed=2) + randn(100, seed=3)

            def model(x: Tensor, y: Tensor, size: int = size) -> None:
                w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))
                with pyro.plate("rows", len(x)):
                    pyro.sample("y", dist.Normal((x @ w.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

            covariance = torch.linalg.inv(x.mT @ x + torch.eye(size))
            mean = covariance @ x.mT @ y
            sd = covariance.diagonal().sqrt()
            for optimizer in ("auto", "adam"):
                guide = FullRank()
                with timed() as seconds:
                    fit = pvi.fit(
                        model,
                        guide,
                        args=(x, y),
                        optimizer=optimizer,
                        seed=options.seed,
                        progress=False,
                    )
                with torch.no_grad():
                    off = (guide.mean()["w"] - mean) / sd
                    spread = (guide.covariance() - covariance) / torch.outer(sd, sd)
                worst = float(off.abs().max()), float(spread.abs().max())
                correlation = (covariance / torch.outer(sd, sd)).fill_diagonal_(0.0)
                extreme = float(correlation.abs().max())
                rows.append([size, extreme, optimizer, *worst, len(fit.history), seconds[0]])
                print(rows[-1], flush=True)
    header = ["latents", "largest correlation", "optimizer", "mean error", "covariance error"]
    report("guides", [*header, "steps", "s"], rows, options.results, key="gaussian")


# ------------------------------------------------------------------------------------- schools

SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
# mean and sd of the reference draws of posteriordb's eight_schools-eight_schools_noncentered
REFERENCE = {"mu": (4.4105, 3.3093), "tau": (3.6021, 3.1985), "theta[1]": (6.1508, 5.5988)}


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools(options: Any) -> None:
    rows = []
    for guide in (MeanField, FullRank, Structured, Flow):
        for reparam in (None, "noncentered", "learned"):
            with isolated(seed=options.seed):
                args = torch.tensor(SIGMA), torch.tensor(EFFECTS)
                with timed() as seconds:
                    fit = pvi.fit(
                        schools,
                        guide,
                        args=args,
                        reparam=reparam,
                        seed=options.seed,
                        progress=False,
                    )
                found = pvi.diagnose(fit, DRAWS, seed=options.seed)
                draws = fit.posterior.sample(DRAWS, seed=options.seed + 1)
            draws |= columns("theta", draws["theta"].reshape(DRAWS, -1))
            moments = [
                number
                for name in ("mu", "tau")
                for number in (float(draws[name].mean()), float(draws[name].std()))
            ]
            cells = [found.bound, found.bound_se, found.khat, found.verdict, *moments]
            rows.append([guide.__name__, reparam, *cells, len(fit.history), seconds[0]])
            print(rows[-1], flush=True)
    header = ["guide", "reparam", "bound", "se", "khat", "verdict", "mean of mu", "sd of mu"]
    header += ["mean of tau", "sd of tau", "steps", "s"]
    reference = {"reference of schools": REFERENCE}
    report("guides", header, rows, options.results, key="schools", more=reference)


PARTS = {"cost": costs, "targets": targets, "gaussian": gaussian, "schools": eight_schools}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments.add_argument("--figure", type=Path, default=FIGURE)
    options = arguments.parse_args()
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
