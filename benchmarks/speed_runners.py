"""The contenders of `benchmarks.speed`: each runs a problem for a while and times its steps."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim.pytorch_optimizers import Adam  # type: ignore

import pvi
from benchmarks.speed_hand import by_hand
from benchmarks.speed_problems import Problem, batches
from pvi.guides import MeanField

FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
LEAST = {False: 240, True: 30}  # steps of a short fit: of small models, of networks
CHUNK = 16  # steps between two looks at the clock


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Pvi:
    """`pvi.fit` with `steps` given: each burst is a fit of its own.

    A step is `typical` of `history["seconds"]` over the second half; as a check, `walls` holds the
    steps and the wall clock of whole fits.
    """

    def __init__(
        self, problem: Problem, compile: bool | str, device: str = "cpu", guide: Any = MeanField
    ):
        self.problem, self.compile_, self.device, self.guide = problem, compile, device, guide
        self.least = LEAST[bool(problem.sizes)]
        self.notes: list[str] = []
        self.walls: list[tuple[int, float]] = []
        self.loss = float("nan")
        self.cold = self.warm = 0.0

    def fit(self, steps: int, seed: int = 0) -> tuple[float, Any]:
        problem = self.problem
        model, guide = problem.programs()
        kinds = {"elbo": pvi.ELBO, "kl": pvi.TraceMeanFieldELBO, "iwae": pvi.IWAE}
        begun = time.perf_counter()
        fit = pvi.fit(
            model,
            guide or self.guide,
            problem.tensors(),
            objective=kinds[problem.bound](problem.particles),
            batch_size=problem.batch or None,
            optimizer="adam",
            lr=problem.rate,
            steps=steps,
            compile=self.compile_,
            device=None if self.device == "cpu" else self.device,
            seed=seed,
            progress=False,
        )
        return time.perf_counter() - begun, fit

    def prepare(self) -> None:
        self.cold, _ = self._timed(self.least)
        self._timed(self.least)

    def burst(self, seconds: float) -> float:
        """A short fit, and a long one of about so many seconds of steps."""
        _, each = self._timed(self.least)
        steps = int(min(max(seconds / each, 2 * self.least), 200_000))
        return self._timed(steps)[1]

    def _timed(self, steps: int) -> tuple[float, float]:
        """Wall clock of a fit, and seconds of a step in its second half."""
        wall, fit = self.fit(steps)
        self.walls.append((steps, wall))
        each = typical(fit.history["seconds"][steps // 2 :])
        loss = -float(np.mean(fit.history["bound"][-CHUNK:]))
        self.notes, self.loss = list(fit.notes), loss * self._share()
        return wall, each

    def _share(self) -> float:
        """pvi's bounds are those of all rows."""
        problem = self.problem
        return problem.batch / len(problem.data["y"]) if problem.batch else 1.0

    def by_wall(self) -> float | None:
        """Seconds of a step by the wall clock of whole fits, long against short."""
        short = [wall for steps, wall in self.walls[2:] if steps == self.least]
        long = [(steps, wall) for steps, wall in self.walls[2:] if steps > self.least]
        if not short or not long:
            return None
        base = float(np.median(short))
        return float(np.median([(wall - base) / (steps - self.least) for steps, wall in long]))

    def start(self) -> float:
        """Seconds of a warm fit that are not its steps: set-up and compilation."""
        walls = [wall for steps, wall in self.walls[2:] if steps == self.least]
        return float(np.median(walls)) if walls else float("nan")


def typical(seconds: np.ndarray, parts: int = 10) -> float:
    """The median of the means of ten stretches: a compiled fit now and then checks a step."""
    return float(np.median([part.mean() for part in np.array_split(seconds, parts)]))


class Pyro:
    """Pyro's SVI with its Adam."""

    def __init__(
        self, problem: Problem, validation: bool, device: str = "cpu", guide: Any = AutoNormal
    ):
        self.problem, self.validation, self.device = problem, validation, device
        self.compile = self.loss = 0.0
        pyro.clear_param_store()
        self.store = pyro.get_param_store().get_state()
        with torch.device(device):
            model, program = problem.programs()
            made = guide(model, init_scale=0.1) if program is None else program
        k = problem.particles
        options = {"num_particles": k, "vectorize_particles": k > 1, "max_plate_nesting": 1}
        if problem.bound == "iwae":
            loss = RenyiELBO(0, **options)
        else:
            kind = TraceMeanField_ELBO if problem.bound == "kl" else Trace_ELBO
            loss = kind(**options)
        self.svi = SVI(model, made, Adam({"lr": problem.rate}), loss)
        self.batches = batches(problem.tensors(device), problem.batch)

    def prepare(self) -> None:
        self.burst(0.0)

    def burst(self, seconds: float) -> float:
        with self.here():
            return timed(self.step, seconds, self.device)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Its own parameters, device and validation."""
        store, device = pyro.get_param_store(), torch.device(self.device)
        checks = pyro.validation_enabled(self.validation)
        with store.scope(self.store) as self.store, device, checks:
            yield

    def step(self) -> None:
        self.loss = cast(float, self.svi.step(*next(self.batches)))


def timed(step: Callable[[], Any], seconds: float, device: str) -> float:
    """Seconds of a step, over so many of them."""
    steps, begun = 0, time.perf_counter()
    while True:
        for _ in range(CHUNK):
            step()
        steps += CHUNK
        synchronise(device)
        spent = time.perf_counter() - begun
        if spent >= seconds:
            return spent / steps


class Hand:
    """Plain PyTorch with fused Adam: as it is, under `torch.compile`, or as a CUDA graph."""

    def __init__(self, problem: Problem, way: str = "eager", device: str = "cpu"):
        self.problem, self.way, self.device = problem, way, device
        self.leaves, self.function = by_hand(problem, device)
        capturable = way == "graph"
        self.adam = torch.optim.Adam(
            self.leaves, lr=problem.rate, fused=True, capturable=capturable
        )
        self.batches = batches(problem.tensors(device), problem.batch)
        self.cold, self.run = 0.0, self.step

    def step(self) -> None:
        self.update(next(self.batches))

    def update(self, batch: Sequence[torch.Tensor]) -> None:
        self.adam.zero_grad()
        self.function(*batch).backward()
        self.adam.step()

    def prepare(self) -> None:
        begun = time.perf_counter()
        if self.way == "compiled":
            self.function = torch.compile(self.function, fullgraph=True, dynamic=False)
        if self.way == "graph":
            self.run = self.captured()
        self.run()
        synchronise(self.device)
        self.cold = time.perf_counter() - begun
        self.burst(0.0)

    def captured(self) -> Callable[[], None]:
        """The whole step as a CUDA graph; batches are copied to where it reads them."""
        place = [x.clone() for x in next(self.batches)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update(place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update(place)

        def run() -> None:
            if self.problem.batch:
                for there, new in zip(place, next(self.batches), strict=True):
                    there.copy_(new)
            graph.replay()

        return run

    def burst(self, seconds: float) -> float:
        return timed(self.run, seconds, self.device)

    @property
    def loss(self) -> float:
        with torch.no_grad():
            return float(np.mean([float(self.function(*next(self.batches))) for _ in range(CHUNK)]))


class Child:
    """NumPyro in another interpreter, which answers one request a line."""

    def __init__(self, python: str, problems: Mapping[str, Problem]):
        self.folder = tempfile.TemporaryDirectory()
        for name, problem in problems.items():
            np.savez(Path(self.folder.name) / f"{name}.npz", **problem.data)  # type: ignore
            spec = json.dumps(problem.described())
            (Path(self.folder.name) / f"{name}.json").write_text(spec)
        script = Path(__file__).with_name("speed_numpyro.py")
        environment = {**os.environ, "XLA_FLAGS": FLAGS, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, str(script), self.folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.hello = self.ask(kind="hello")

    def ask(self, **what: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            RuntimeError: it failed, or the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": "the process has ended"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def start_child(python: str | None, problems: Mapping[str, Problem]) -> Child | None:
    """NumPyro's process, or `None` with a line that says why there is none."""
    if python is None:
        print("NumPyro is left out: give --numpyro PYTHON, an interpreter that has it", flush=True)
        return None
    try:
        return Child(python, problems)
    except (OSError, RuntimeError) as error:
        print(f"NumPyro is left out: {error}", file=sys.stderr, flush=True)
        return None


class NumPyro:
    """One problem in NumPyro's process: "jit", a step a call, or "scan", many."""

    def __init__(self, child: Child, name: str, way: str):
        self.child, self.name, self.way = child, name, way
        self.cold = self.loss = self.share = 0.0

    def prepare(self) -> None:
        self.burst(0.01)

    def burst(self, seconds: float) -> float:
        found = self.child.ask(kind="burst", name=self.name, way=self.way, seconds=seconds)
        self.cold, self.loss, self.share = found["compile"], found["loss"], found["share"]
        return found["step"]
