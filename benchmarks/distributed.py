"""Two processes under torchrun beside one: the same fit, and how much faster.

Both train a Bayesian neural network (20 - 64 - 1) on the same batches of 20,000 rows, one thread
each. The fit is the same because the order of rows and the noise of global latents are. Times are
medians over repeats; on two cores that other jobs use as well they say little.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report

SIZE, FEATURES, HIDDEN, BATCH, STEPS = 100_000, 20, 64, 20_000, 40


def model(x: Tensor, y: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(torch.zeros(FEATURES, HIDDEN), 0.3).to_event(2))
    second = pyro.sample("second", dist.Normal(torch.zeros(HIDDEN), 0.3).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ first).tanh() @ second, 0.5), obs=y)


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, FEATURES, generator=generator)
    return x, x[:, 0].sin() + 0.5 * torch.randn(SIZE, generator=generator)


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of this process's processor time."""
    return time.perf_counter(), time.process_time()


def work(repeats: int, out: Path) -> None:
    """The fits of one process, or of this one of several."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    data, seconds, found = make_data(), [], []
    data = tuple(x.double() for x in data)
    for _ in range(repeats):
        times: list[tuple[float, float]] = []
        fit = pvi.fit(
            model,
            data=data,
            batch_size=BATCH,
            steps=STEPS,
            objective=pvi.ELBO(kl="exact"),
            seed=0,
            progress=False,
            callbacks=[lambda step, times=times: times.append(clocks())],
        )
        spent = zip(times[9], times[-1], strict=True)
        seconds.append([(end - start) / (STEPS - 10) for start, end in spent])
        found = [x.reshape(-1).tolist() for x in fit.posterior.params.tensors().values()]
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps({"seconds": seconds, "values": found}))


def run(processes: int, repeats: int) -> dict[str, Any]:
    module = ["benchmarks.distributed", "--repeats", str(repeats)]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), *module]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", out], check=True, capture_output=True, env=environment)
        return json.loads(out.read_text())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--out", type=Path, help="do the work of one process and write it here")
    given = options.parse_args()
    if given.out:
        work(given.repeats, given.out)
        return
    found = {1: [], 2: []}
    for _ in range(given.repeats):  # in turns, for the load of the machine changes
        for processes, runs in found.items():
            runs.append(run(processes, 1))
    pairs = zip(found[1][0]["values"], found[2][0]["values"], strict=True)
    difference = max(abs(a - b) for xs, ys in pairs for a, b in zip(xs, ys, strict=True))
    rows, first = [], (0.0, 0.0)
    for processes, runs in found.items():
        wall, cpu = (median(one["seconds"][0][i] for one in runs) for i in (0, 1))
        first = (wall, cpu) if processes == 1 else first
        shares = [before / now / processes for before, now in zip(first, (wall, cpu), strict=True)]
        gap = 0.0 if processes == 1 else difference
        rows.append([processes, 1000 * wall, 1000 * cpu, *shares, gap])
    header = [
        "processes",
        "ms/step",
        "CPU ms/step of a process",
        "efficiency",
        "by CPU time",
        "max |parameter difference|",
    ]
    notes = {"batch": BATCH, "repeats": given.repeats, "shared": "other jobs ran on the 2 cores"}
    report("distributed", header, rows, given.results, more=notes)


if __name__ == "__main__":
    main()
