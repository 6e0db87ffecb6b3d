"""How the cost of a step grows: with rows N, draws K and latents D.

Each point is a process of its own: the median step, and the most memory, with the data, less what
the same process has after a small problem of the kind (libraries, compilers). N and K: hierarchical
logistic regression, all rows in a step. D: independent observations of D latents, `MeanField`, and
with all correlations `FullRank`. The exponents are slopes of the logarithms over the last three
points.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from benchmarks.common import parser, report
from benchmarks.speed_problems import Arrays, Problem, fixed, logistic, logistic_data
from benchmarks.speed_runners import Child, Pvi, Pyro
from pvi.guides import FullRank, MeanField

GRIDS: dict[str, list[int]] = {
    "rows N": [10**j for j in range(2, 7)],
    "draws K": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "latents D, MeanField": [10**j for j in range(1, 6)],
    "latents D, FullRank": [10, 50, 200, 500, 1000, 2000],
}
WAYS = ("pvi eager", "pvi compiled", "Pyro", "NumPyro scan")
COLORS = dict(zip(WAYS, ("#7aa6c2", "#1f4e79", "#c44e52", "#8c8c8c"), strict=True))
HEADER = ["grows", "size", "contender", "us a step", "MB", "notes"]
LAST = 3  # points that an exponent is told from
SHORT = 30  # steps of the fits that only tell how long the next one may be


def normals(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def logistic_of_draws(x: Tensor, group: Tensor, y: Tensor, groups: int = 20) -> None:
    """The regression so that many draws broadcast; the other's `x @ w` would pair each draw of the
    weights with each of the groups, of which Pyro takes no notice.
    """
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", groups):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        logits = a[..., group] + (x * w).sum(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def make(grows: str, size: int, data: Arrays | None = None) -> Problem:
    """The problem of one point, on new data or given ones."""
    particles = size if grows == "draws K" else 1
    if grows.startswith("latents"):
        y = np.random.default_rng(0).normal(size=size).astype(np.float32)
        return Problem(data or {"y": y}, fixed(normals), like="normals")
    data = data or logistic_data(size if grows == "rows N" else 500)
    model = logistic_of_draws if grows == "draws K" else logistic
    return Problem(data, fixed(model), particles=particles, like="logistic")


def peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now() -> float:
    """The memory that this process has at the moment, MB; `peak` starts from it where Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def contender(grows: str, way: str, problem: Problem) -> Pvi | Pyro:
    full = grows.endswith("FullRank")
    if way == "Pyro":
        return Pyro(problem, True, guide=AutoMultivariateNormal if full else AutoNormal)
    return Pvi(problem, way == "pvi compiled", guide=FullRank if full else MeanField)


def point(grows: str, size: int, way: str, seconds: float, file: str) -> dict[str, Any]:
    """One point, in this process; what making the data takes is no part of its memory."""
    torch.set_num_threads(1)
    small = contender(grows, way, make(grows, GRIDS[grows][0]))
    if isinstance(small, Pvi):
        small.fit(SHORT)
    else:
        small.burst(0.05)
    base = now()
    with np.load(file) as arrays:
        problem = make(grows, size, dict(arrays))
    run = contender(grows, way, problem)
    if isinstance(run, Pvi):
        run.least = SHORT
        each = run.burst(seconds)
    else:
        run.prepare()
        each = median(run.burst(seconds / 3) for _ in range(3))
    notes = "; ".join(run.notes) if isinstance(run, Pvi) else ""
    return {"step": each, "peak": peak() - base, "notes": notes}


def other_process(grows: str, size: int, way: str, seconds: float) -> dict[str, Any]:
    """The same in a new process; an "error" where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "data.npz")
        np.savez(file, **make(grows, size).data)  # type: ignore
        ask = json.dumps([grows, size, way, seconds, file])
        command = [sys.executable, "-m", "benchmarks.growth", "--point", ask]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            return {"error": "more than 15 minutes"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {"error": said[-1][:200] if said else f"exit {done.returncode}"}
    return json.loads(lines[-1])


def with_numpyro(grows: str, size: int, seconds: float, python: str) -> dict[str, Any]:
    problems = {"small": make(grows, GRIDS[grows][0]), "point": make(grows, size)}
    guide = "full_rank" if grows.endswith("FullRank") else "mean_field"
    child = Child(python, problems)
    try:
        setting: dict[str, Any] = {"kind": "burst", "way": "scan", "guide": guide}
        child.ask(name="small", seconds=0.05, **setting)
        base = child.ask(kind="now")["peak"]
        found = child.ask(name="point", seconds=seconds, **setting)
        return {"step": found["step"], "peak": found["peak"] - base, "notes": ""}
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        child.close()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of the logarithms over the last points."""
    if len(sizes) < LAST or min(values[-LAST:]) <= 0:
        return None
    x, y = (np.log(np.asarray(v[-LAST:], float)) for v in (sizes, values))
    return float(np.polyfit(x, y, 1)[0])


def exponents(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Of time and memory, for what grows and each contender."""
    found = []
    for grows in GRIDS:
        for way in WAYS:
            mine = [r for r in rows if r[0] == grows and r[2] == way and r[3] is not None]
            sizes = [r[1] for r in mine]
            if sizes:
                cells = [exponent(sizes, [r[j] for r in mine]) for j in (3, 4)]
                found.append([grows, way, *cells])
    return found


def plot(rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Times above, memory below, one column for each thing that grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grids = [g for g in GRIDS if any(r[0] == g for r in rows)]
    shape = {"figsize": (3.4 * len(grids), 5.6), "squeeze": False, "sharex": "col"}
    figure, axes = plt.subplots(2, len(grids), layout="constrained", **shape)
    for column, grows in enumerate(grids):
        for way in WAYS:
            mine = [r for r in rows if r[0] == grows and r[2] == way and r[3] is not None]
            if not mine:
                continue
            sizes = [r[1] for r in mine]
            style: dict[str, Any] = {"color": COLORS[way], "marker": "o", "ms": 3.5, "label": way}
            axes[0, column].loglog(sizes, [r[3] for r in mine], **style)
            used = [(n, r[4]) for n, r in zip(sizes, mine, strict=True) if r[4] >= 1]
            axes[1, column].loglog([n for n, _ in used], [m for _, m in used], **style)
        axes[1, column].set_xlabel(grows)
    axes[0, 0].set_ylabel("a step, µs")
    axes[1, 0].set_ylabel("peak memory, MB")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--grows", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    arguments.add_argument("--seconds", type=float, default=2.0, help="of steps at a point")
    arguments.add_argument("--quick", action="store_true", help="three points of each, 0.3 s")
    arguments.add_argument("--numpyro", help="an interpreter that has numpyro and jax")
    arguments.add_argument("--point", help="one point, in this process: used by the others")
    options = arguments.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.point:
        print(json.dumps(point(*json.loads(options.point))))
        return
    seconds = 0.3 if options.quick else options.seconds
    if not options.numpyro:
        print("NumPyro is left out: give --numpyro PYTHON, an interpreter that has it")
    rows = []
    for grows in options.grows:
        grid = GRIDS[grows]
        for size in (grid[0], grid[len(grid) // 2], grid[-1]) if options.quick else grid:
            for way in WAYS:
                if way == "NumPyro scan":
                    if not options.numpyro:
                        continue
                    found = with_numpyro(grows, size, seconds, options.numpyro)
                else:
                    found = other_process(grows, size, way, seconds)
                each = found.get("step")
                us = None if each is None or not math.isfinite(each) else 1e6 * each
                notes = found.get("error", found.get("notes", ""))
                rows.append([grows, size, way, us, found.get("peak"), notes])
                print(rows[-1], flush=True)
    report("growth", HEADER, rows, options.results)
    header = ["grows", "contender", "exponent of time", "of memory"]
    report("growth", header, exponents(rows), options.results, key="exponents")
    plot(rows, options.results / "growth.png")


if __name__ == "__main__":
    main()
