"""Wall clock to a finished fit, compilation included: pvi, Pyro and NumPyro.

Radon with a normal of full rank: `pvi.fit` with its defaults, which ends by itself, beside
`AutoMultivariateNormal` with Adam at 0.01, of Pyro and NumPyro, which are stopped at the first
multiple of 500 steps where all 90 means are within 0.1 reference sds, at the latest after 20,000
steps; each from its own default start. Their means are those of 20,000 draws, taken while the clock
is stopped. The reference is Stan's with `--data`, the folder of the data sets; else that of 10,000
draws of NumPyro's NUTS on made-up data. (Sds are left out: no normal comes near them all.)

A VAE 64-128-8 on scikit-learn's digits, all with the same number of epochs in batches of 128; the
bounds in nats for a digit are the mean over the batches of the last epoch. pvi's rate falls along a
cosine, the others' stays.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pvi
from benchmarks.common import parser, report
from benchmarks.posteriors import radon_noncentered, radon_parameters
from benchmarks.speed_problems import Problem, fixed, radon_data, read, vae
from benchmarks.speed_runners import Child, Hand, Pvi, Pyro, start_child
from pvi.guides import FullRank

EVERY, DRAWS, WITHIN = 500, 20_000, 0.1
HEADER = ["problem", "contender", "s", "steps", "mean error", "bound", "end"]
TORCH = ("pvi eager", "pvi compiled", "Pyro", "Pyro, no validation", "by hand", "by hand, compiled")
SIZES = {"data": 64, "hidden": 128, "latents": 8}
Means = dict[str, float]
Way = Iterator[tuple[float, int, Means]]  # seconds so far, steps so far, means


def digits() -> Problem:
    from sklearn.datasets import load_digits

    y = (np.asarray(load_digits(return_X_y=True)[0]) > 7).astype(np.float32)
    return Problem({"y": y}, partial(vae, **SIZES), "kl", 128, 1, 1e-3, SIZES, "vae")


def radon_problem(folder: Path | None) -> Problem:
    return Problem(radon_data(folder), fixed(radon_noncentered), like="radon")


def flat(means: Mapping[str, Any]) -> Means:
    """NumPyro's means by the names of the reference."""
    found: Means = {}
    for name, value in means.items():
        rows = np.atleast_1d(value)
        keys = [f"{name}[{j + 1}]" for j in range(len(rows))] if np.ndim(value) else [name]
        found |= dict(zip(keys, map(float, rows), strict=True))
    return found


def of_draws(draws: dict[str, Tensor]) -> Means:
    return {k: float(v.double().mean()) for k, v in radon_parameters(draws).items()}


def with_pvi(problem: Problem, compile: bool, seed: int) -> Way:
    begun = time.perf_counter()
    fit = pvi.fit(
        radon_noncentered,
        FullRank,
        problem.tensors(),
        compile=compile,
        seed=seed,
        progress=False,
    )
    spent = time.perf_counter() - begun
    yield spent, len(fit.history), of_draws(fit.posterior.sample(DRAWS, seed=seed + 1))


def with_pyro(problem: Problem, validation: bool, seed: int, most: int) -> Way:
    begun = time.perf_counter()
    torch.manual_seed(seed)
    run = Pyro(problem, validation, guide=AutoMultivariateNormal)
    spent = time.perf_counter() - begun
    for steps in range(EVERY, most + 1, EVERY):
        begun = time.perf_counter()
        with run.here():
            for _ in range(EVERY):
                run.step()
            spent += time.perf_counter() - begun
            posterior = pvi.from_svi(run.svi, args=problem.tensors())
        yield spent, steps, of_draws(posterior.sample(DRAWS, seed=seed + 1))


def with_numpyro(child: Child, way: str, most: int) -> Way:
    spent = 0.0
    for steps in range(EVERY, most + 1, EVERY):
        ask: dict[str, Any] = {"name": "radon", "way": way, "guide": "full_rank"}
        found = child.ask(kind="advance", steps=EVERY, draws=DRAWS, **ask)
        spent += found["seconds"]
        yield spent, steps, flat(found["means"])


def until_near(way: Way, means: Means, sds: Means) -> list[Any]:
    """Seconds, steps and the largest error of a mean where it first is small, or at the end."""
    cells: list[Any] = []
    for seconds, steps, now in way:
        error = max(abs(now[name] - means[name]) / sds[name] for name in means)
        cells = [seconds, steps, error]
        if error < WITHIN:
            break
    return cells


def torch_radon(
    name: str, folder: Path | None, seed: int, most: int, means: Means, sds: Means
) -> list[Any]:
    """One contender on radon, in this process."""
    torch.set_num_threads(1)
    problem = radon_problem(folder)
    ways: dict[str, Callable[[], Way]] = {
        "pvi, defaults": lambda: with_pvi(problem, False, seed),
        "pvi, compile=True": lambda: with_pvi(problem, True, seed),
        "Pyro": lambda: with_pyro(problem, True, seed, most),
        "Pyro, no validation": lambda: with_pyro(problem, False, seed, most),
    }
    return until_near(ways[name](), means, sds)


def radon(options: argparse.Namespace, child: Child | None) -> list[list[Any]]:
    if options.data:
        reference = read(options.data)["reference"]
        means = {k: v["mean"] for k, v in reference.items()}
        sds = {k: v["sd"] for k, v in reference.items()}
    elif child is not None:
        found = child.ask(kind="nuts", name="radon")
        means, sds = flat(found["means"]), flat(found["sds"])
    else:
        print("radon is left out: its reference needs --data or --numpyro", flush=True)
        return []
    rows = []

    def add(name: str, cells: list[Any]) -> None:
        end = "within 0.1 sd" if cells[2] < WITHIN else "not within 0.1 sd"
        rows.append(["radon, full rank", name, *cells, None, end])
        print(rows[-1], flush=True)

    for name in ("pvi, defaults", "pvi, compile=True", "Pyro", "Pyro, no validation"):
        add(name, alone(torch_radon, name, options.data, options.seed, options.steps, means, sds))
    for way in ("jit", "scan"):
        if child is not None:
            add(f"NumPyro {way}", until_near(with_numpyro(child, way, options.steps), means, sds))
    return rows


def torch_digits(name: str, epochs: int, seed: int) -> list[Any]:
    """One contender on the digits, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    problem = digits()
    size = len(problem.data["y"])
    per = -(-size // problem.batch)
    steps = epochs * per
    if name.startswith("pvi"):
        seconds, fit = Pvi(problem, name == "pvi compiled").fit(steps, seed)
        bound = float(fit.history["bound"][-per:].mean()) / size
        return ["VAE on digits", name, seconds, steps, None, bound, "; ".join(fit.notes)]
    makers: dict[str, Callable[[], Pyro | Hand]] = {
        "Pyro": lambda: Pyro(problem, True),
        "Pyro, no validation": lambda: Pyro(problem, False),
        "by hand": lambda: Hand(problem),
        "by hand, compiled": lambda: Hand(problem, "compiled"),
    }
    begun = time.perf_counter()
    losses = trained(makers[name](), steps)
    seconds = time.perf_counter() - begun
    return ["VAE on digits", name, seconds, steps, None, -sum(losses[-per:]) / size, ""]


def vae_on_digits(
    options: argparse.Namespace, child: Child | None, problem: Problem
) -> list[list[Any]]:
    rows = []
    for name in TORCH:
        rows.append(alone(torch_digits, name, options.epochs, options.seed))
        print(rows[-1], flush=True)
    full = len(problem.data["y"]) // problem.batch
    for way in ("jit", "scan"):
        if child is None:
            break
        seconds = loss = 0.0
        for _ in range(options.epochs):
            found = child.ask(kind="advance", name="digits", way=way, steps=full)
            seconds, loss = seconds + found["seconds"], found["loss"]
        bound, end = -loss / problem.batch, "full batches only"  # shapes have to stay
        steps = options.epochs * full
        rows.append(["VAE on digits", f"NumPyro {way}", seconds, steps, None, bound, end])
        print(rows[-1], flush=True)
    return rows


def alone(function: Callable[..., list[Any]], *args: Any) -> list[Any]:
    """A call in a process of its own, so that nobody finds a compiler that another has loaded."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def trained(run: Pyro | Hand, steps: int) -> list[float]:
    """Losses of so many steps; those of plain PyTorch become numbers only at the end."""
    if isinstance(run, Pyro):
        losses = []
        with run.here():
            for _ in range(steps):
                run.step()
                losses.append(run.loss)
        return losses
    losses = []
    if run.way != "eager":
        run.function = torch.compile(run.function)
    for _ in range(steps):
        run.adam.zero_grad()
        loss = run.function(*next(run.batches))
        loss.backward()
        run.adam.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with the data sets")
    arguments.add_argument("--numpyro", help="an interpreter that has numpyro and jax")
    arguments.add_argument("--steps", type=int, default=20_000, help="of radon, at most")
    arguments.add_argument("--epochs", type=int, default=100, help="of the digits")
    arguments.add_argument("--only", choices=["radon", "digits"], help="by default both")
    options = arguments.parse_args()
    problems = {"radon": radon_problem(options.data), "digits": digits()}
    child = start_child(options.numpyro, problems)
    rows: list[list[Any]] = []
    try:
        if options.only != "digits":
            rows += radon(options, child)
        if options.only != "radon":
            rows += vae_on_digits(options, child, problems["digits"])
    finally:
        if child is not None:
            child.close()
    data = "the published ones" if options.data else "made up"
    more = {"epochs": options.epochs, "steps": options.steps, "radon's data": data}
    report("wall", HEADER, rows, options.results, more=more)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as caches:  # so that compilation is cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        main()
