"""Seconds of a step: pvi, Pyro, PyTorch by hand and NumPyro side by side.

The same model, guide, draws and Adam on all sides, on one thread (pvi's rate falls along a cosine).
The contenders take turns, and each cell is the median over the turns. Minibatches are drawn by each
side itself. Compile seconds are what the first fit (or step) needs more than the uncompiled one,
with empty caches; "warm" is the same in later fits of this process. Break-even: the steps after
which they are won back, compile / (eager step - compiled step). Losses of a row, after the last
turn, show whether all do the same work; they have done different numbers of steps by then. The
share is that of a core which a contender had in its turns: far below 1, the machine was busy with
other things (or a compiler in another process was).

With `--numpyro PYTHON`, an interpreter that has numpyro and jax, its steps are measured in a
process of that. On a machine with CUDA the table is made for the GPU as well.
"""

import argparse
import os
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import parser, report
from benchmarks.speed_problems import ALL, Problem, make_problems
from benchmarks.speed_runners import Child, Hand, NumPyro, Pvi, Pyro, start_child

EAGER, COMPILED = "pvi eager", "pvi compiled"
PYRO, BARE, HAND, HAND_COMPILED = "Pyro", "Pyro, no validation", "by hand", "by hand, compiled"
GRAPH, JIT, SCAN = "by hand, CUDA graph", "NumPyro jit", "NumPyro scan"
WAYS = (EAGER, COMPILED, PYRO, BARE, HAND, HAND_COMPILED, GRAPH, JIT, SCAN)
STEPS = ["problem", *WAYS]
RATIOS = ["problem", f"{PYRO} / compiled", f"{BARE} / compiled", f"{PYRO} / eager"]
RATIOS += [f"compiled / {HAND}", f"compiled / {HAND_COMPILED}", f"compiled / {SCAN}"]
RATIOS += [f"compiled / {GRAPH}"]
COMPILE = ["problem", "pvi cold s", "pvi warm s", "break-even steps", "warm break-even"]
COMPILE += ["by hand cold s", "NumPyro jit s", "NumPyro scan s"]
CHECKS = ["problem", "contender", "loss of a row", "share", "wall / history", "notes"]


def contenders(
    name: str, problem: Problem, child: Child | None, device: str, way: bool | str
) -> dict[str, Any]:
    """All that can run here, by name."""
    found: dict[str, Any] = {
        EAGER: Pvi(problem, False, device),
        COMPILED: Pvi(problem, way, device),
        PYRO: Pyro(problem, True, device),
        BARE: Pyro(problem, False, device),
        HAND: Hand(problem, "eager", device),
        HAND_COMPILED: Hand(problem, "compiled", device),
    }
    if device != "cpu":
        found[GRAPH] = Hand(problem, "graph", device)
    if child is not None and (device == "cpu") == (child.hello["backend"] == "cpu"):
        found |= {JIT: NumPyro(child, name, "jit"), SCAN: NumPyro(child, name, "scan")}
    return found


def measure(
    runs: dict[str, Any], repeats: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step of each, in turns, and shares of a core; one that fails says why."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        order = deque(runs)
        order.rotate(turn)
        for name in order:
            try:
                if turn == 0:
                    runs[name].prepare()
                else:
                    used, begun = time.process_time(), time.perf_counter()
                    taken[name].append(runs[name].burst(seconds))
                    share = (time.process_time() - used) / (time.perf_counter() - begun)
                    shares[name].append(getattr(runs[name], "share", share))
            except Exception as error:  # of any of six libraries: the others go on
                first = str(error).strip().split("\n")[0][:300]
                print(f"{name} is left out: {type(error).__name__}: {first}", flush=True)
                del runs[name], taken[name]
    return taken, shares


def over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def ratios(step: Mapping[str, float]) -> list[float | None]:
    def get(name: str) -> float | None:
        return step.get(name)

    compiled = get(COMPILED)
    slower = [over(get(name), compiled) for name in (PYRO, BARE)]
    others = [over(compiled, get(name)) for name in (HAND, HAND_COMPILED, SCAN, GRAPH)]
    return [*slower, over(get(PYRO), get(EAGER)), *others]


def compiling(runs: dict[str, Any], step: Mapping[str, float]) -> list[float | None]:
    """Seconds of compilation, and the steps after which they are won back."""
    cells: list[float | None] = [None] * 4
    if EAGER in step and COMPILED in step:
        eager, compiled = runs[EAGER], runs[COMPILED]
        gain = step[EAGER] - step[COMPILED]
        saved = compiled.least * gain  # by the steps of these fits
        cold = compiled.cold - eager.cold + saved
        warm = compiled.start() - eager.start() + saved
        won = [s / gain if gain > 0 else None for s in (cold, warm)]
        cells = [cold, warm, *won]
    return [*cells, *(runs[n].cold if n in step else None for n in (HAND_COMPILED, JIT, SCAN))]


def checks(
    name: str,
    problem: Problem,
    runs: dict[str, Any],
    step: Mapping[str, float],
    shares: Mapping[str, list[float]],
) -> list[list[Any]]:
    """What shows whether all did the same work, and whether the clock is right."""
    rows = []
    for way in step:
        run = runs[way]
        wall = over(run.by_wall(), step[way]) if isinstance(run, Pvi) else None
        notes = "; ".join(run.notes) if isinstance(run, Pvi) else ""
        rows.append([name, way, run.loss / problem.rows, median(shares[way]), wall, notes])
    return rows


def compare(
    problems: dict[str, Problem], child: Child | None, device: str, options: argparse.Namespace
) -> None:
    """The tables for one device."""
    tables: dict[str, list[list[Any]]] = {"steps": [], "ratios": [], "compile": [], "checks": []}
    raw: dict[str, Any] = {}
    for name, problem in problems.items():
        print(f"-- {name}, {device}", flush=True)
        runs = contenders(name, problem, child, device, options.compile)
        taken, shares = measure(runs, options.repeats, options.seconds)
        step = {way: median(times) for way, times in taken.items()}
        raw[name] = taken
        cells = [1e6 * step[way] if way in step else None for way in WAYS]
        tables["steps"].append([name, *cells])
        tables["ratios"].append([name, *ratios(step)])
        tables["compile"].append([name, *compiling(runs, step)])
        tables["checks"] += checks(name, problem, runs, step, shares)
        torch.compiler.reset()
        print(
            "   us:", *(f"{w} {c:.4g};" for w, c in zip(WAYS, cells, strict=True) if c), flush=True
        )
    versions = child.hello if child else {}
    setting = {"repeats": options.repeats, "seconds": options.seconds, "compile": options.compile}
    more = {"numpyro": versions, "setting": setting, f"{device} raw seconds": raw}
    headers = {"steps": STEPS, "ratios": RATIOS, "compile": COMPILE, "checks": CHECKS}
    for key, rows in tables.items():
        title = "us a step" if key == "steps" else key
        print(f"{device}: {title}")
        used = [
            j for j in range(len(headers[key])) if j == 0 or any(r[j] is not None for r in rows)
        ]
        header = [headers[key][j] for j in used]
        shown = [[row[j] for j in used] for row in rows]
        report("speed", header, shown, options.results, key=f"{device} {key}", more=more)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--problems", nargs="+", choices=ALL, default=list(ALL))
    arguments.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    arguments.add_argument("--seconds", type=float, default=2.0, help="of steps in a turn")
    arguments.add_argument("--quick", action="store_true", help="2 turns of 0.3 s")
    arguments.add_argument("--numpyro", help="an interpreter that has numpyro and jax")
    arguments.add_argument("--data", type=Path, help="folder with the data sets, for radon's own")
    arguments.add_argument("--compile", default=True, help="of the compiled pvi.fit (True)")
    arguments.add_argument("--device", choices=["cpu", "cuda"], help="by default all there are")
    options = arguments.parse_args()
    if options.quick:
        options.repeats, options.seconds = 2, 0.3
    torch.set_num_threads(1)
    problems = make_problems(options.problems, options.data)
    child = start_child(options.numpyro, problems)
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        for device in [options.device] if options.device else found:
            compare(problems, child, device, options)
    finally:
        if child is not None:
            child.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as caches:  # so that first compilations are cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        main()
