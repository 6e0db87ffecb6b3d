"""Ten million rows from disk: memory, and rows per second of one epoch, beside Pyro and torch.

Logistic regression on 20 features in a float32 memmap (800 MB) that was just written, so it mostly
comes from the page cache. Memory is anonymous memory (RssAnon), without the page cache; each
way runs in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pvi
from benchmarks.common import parser, report

FEATURES, BATCH, PIECE = 20, 10_000, 500_000
LIMITED = 1_000_000  # rows of the ways that would take minutes for all
HEADER = ["way", "rows", "file, MB", "before, MB", "peak, MB", "s", "rows/s", "max |error|"]


def weights() -> Tensor:
    return torch.linspace(-1.0, 1.0, FEATURES)


def make(folder: Path, rows: int, seed: int) -> None:
    """The files, written piece by piece."""
    rng = np.random.default_rng(seed)
    open_ = np.lib.format.open_memmap
    x = open_(folder / "x.npy", "w+", np.float32, (rows, FEATURES))
    y = open_(folder / "y.npy", "w+", np.float32, (rows,))
    for start in range(0, rows, PIECE):
        part = rng.standard_normal((min(PIECE, rows - start), FEATURES), np.float32)
        chance = 1.0 / (1.0 + np.exp(-part @ weights().numpy()))
        x[start : start + len(part)] = part
        y[start : start + len(part)] = rng.random(len(part)) < chance


def model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def arrays(folder: Path, mode: Any = "r") -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.load(folder / f"{name}.npy", mmap_mode=mode) for name in "xy")
    return x, y


def with_pvi(data: Any, **options: Any) -> Tensor:
    fit = pvi.fit(
        model,
        data=data,
        batch_size=BATCH,
        epochs=1,
        objective=pvi.ELBO(kl="exact"),
        seed=0,
        progress=False,
        **options,
    )
    guide: Any = fit.guide
    return guide.loc.w.detach()


def with_pyro(batches: Iterator[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Plain SVI with the scale that the model then needs, Adam 0.05 as pvi's."""

    def scaled(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    torch.manual_seed(0)
    guide = AutoNormal(scaled)
    svi = SVI(scaled, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for x, y in batches:
        svi.step(x, y)
    return guide.locs.w.detach()


def by_hand(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of a memmap as one would write them: its rows by sorted numbers."""
    x, y = arrays(folder)
    for numbers in torch.randperm(len(x)).split(BATCH)[: LIMITED // BATCH]:
        ordered = numbers.sort().values.numpy()
        yield torch.from_numpy(x[ordered]), torch.from_numpy(y[ordered])


class Rows(Dataset):
    """A row an item, as torch's tutorials have it."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.x, self.y = arrays(folder)
        self.rows = min(rows, len(self.x))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.float32]:
        return np.array(self.x[i]), self.y[i]


def items(folder: Path) -> DataLoader:
    return DataLoader(Rows(folder, LIMITED), batch_size=BATCH, shuffle=True)


WAYS: dict[str, tuple[int | None, Callable[[Path], Tensor]]] = {
    "pvi, memmap": (None, lambda folder: with_pvi(arrays(folder))),
    "pvi, arrays in memory": (None, lambda folder: with_pvi(arrays(folder, None))),
    "Pyro SVI, memmap by hand": (
        LIMITED,
        lambda folder: with_pyro(by_hand(folder), len(arrays(folder)[0])),
    ),
    "pvi, DataLoader of items": (
        LIMITED,
        lambda folder: with_loader(folder),
    ),
    "Pyro SVI, DataLoader of items": (
        LIMITED,
        lambda folder: with_pyro(iter(items(folder)), LIMITED),
    ),
}


def with_loader(folder: Path) -> Tensor:
    fit = pvi.fit(
        model,
        data=items(folder),
        epochs=1,
        objective=pvi.ELBO(kl="exact"),
        seed=0,
        progress=False,
    )
    guide: Any = fit.guide
    return guide.loc.w.detach()


def anonymous() -> float:
    """Anonymous memory of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not tell anonymous memory")


def child(way: str, folder: Path) -> None:
    """One way, in this process; prints what it found."""
    pvi.fit(model, data=(torch.randn(64, FEATURES), torch.ones(64)), steps=2, progress=False)
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    found = WAYS[way][1](folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    error = float((found - weights()).abs().max())
    print(json.dumps([before, peak[0], seconds, error]))


def run(way: str, folder: Path) -> list[Any]:
    rows = WAYS[way][0] or len(arrays(folder)[0])
    command = [sys.executable, "-m", "benchmarks.big_data", "--child", way, "--folder", str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, peak, seconds, error = json.loads(out.splitlines()[-1])
    size = sum((folder / f"{name}.npy").stat().st_size for name in "xy") / 1e6
    return [way, rows, size, before, peak, seconds, rows / seconds, error]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--child", choices=WAYS, help="run this way only, here")
    options.add_argument("--folder", type=Path, help="where --child finds its files")
    given = options.parse_args()
    if given.child:
        child(given.child, given.folder)
        return
    table = []
    for rows in (given.rows // 10, given.rows):
        with tempfile.TemporaryDirectory() as name:
            make(Path(name), rows, given.seed)
            ways = WAYS if rows == given.rows else ["pvi, memmap"]
            table += [run(way, Path(name)) for way in ways]
    notes = {
        "features": FEATURES,
        "batch": BATCH,
        "page cache": "warm: the files were just written",
    }
    report("big_data", HEADER, table, given.results, more=notes)


if __name__ == "__main__":
    main()
