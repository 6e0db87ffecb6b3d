"""Peak memory and time of exports of many local latents, in memory and to a file.

200 draws of 11,000 rows with 50 numbers each are 440 MB, 800 are 1,760 MB. Each export runs in a
process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pvi
from benchmarks.common import parser, report

ROWS, WIDTH = 11_000, 50
CASES = (("memory", 200), ("file", 200), ("file", 800))  # where, draws


def model(y: torch.Tensor) -> None:
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def guide(y: torch.Tensor) -> None:
    with pyro.plate("row", len(y)):
        loc = (y / (WIDTH + 1))[:, None].expand(-1, WIDTH)
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(where: str, draws: int, seed: int) -> None:
    torch.manual_seed(seed)
    posterior = pvi.Posterior(model, guide, torch.randn(ROWS))
    posterior.to_datatree(2, seed=seed)
    before, start = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draws.nc" if where == "file" else None
        tree = posterior.to_datatree(draws, seed=seed, path=path)
        export, seconds = peak() - before, time.perf_counter() - start
        start = time.perf_counter()
        tree["posterior"]["z"][:, :, 5].mean("draw").load()
        summary = time.perf_counter() - start
        size = path.stat().st_size / 2**20 if path else None
        tree.close()
    print(json.dumps([where, draws, before, export, seconds, summary, peak() - before, size]))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--one", choices=["memory", "file"])
    options.add_argument("--draws", type=int)
    found = options.parse_args()
    if found.one:
        return one(found.one, found.draws, found.seed)
    rows = []
    for where, draws in CASES:
        command = [sys.executable, "-m", "benchmarks.export", "--one", where]
        command += ["--draws", str(draws), "--seed", str(found.seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    header = ("draws in", "draws", "before, MB", "export adds, MB", "export, s")
    header += ("mean of one row, s", "all adds, MB", "file, MB")
    report("export", header, rows, found.results)


if __name__ == "__main__":
    main()
