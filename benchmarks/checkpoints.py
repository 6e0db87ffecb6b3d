"""Kill a checkpointed fit again and again, with SIGKILL, and compare what comes out in the end.

Half of the kills come at random moments, the other half inside a write: in the middle of a file,
between files, before and after the renaming, while older checkpoints are removed. The next process
resumes. In the end parameters and history must be those of a fit that was never interrupted.
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from benchmarks.common import parser, report, timed
from pvi.fit import entry, storage
from pvi.fit.checkpoint import Checkpoints
from tests.scenarios import isolated, randn

SIZE, FEATURES, BATCH = 200, 3, 16
MOMENTS = ("half of the tensors", "after them", "half of the state", "renaming", "removing")


def model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), sigma), obs=y)


def fit(steps: int, **options: Any) -> pvi.Fit:
    x = randn(SIZE, FEATURES).double()
    y = x.sum(-1) + randn(SIZE, seed=1).double()
    guide = pvi.guides.FullRank()
    run = {"batch_size": BATCH, "steps": steps, "seed": 0, "progress": False}
    return pvi.fit(model, guide, (x, y), **run, **options)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(moment: str, after: int) -> None:
    """Arrange for this process to be killed inside its write number `after`."""
    count = [0]
    to_disk, rename, rmtree = storage._to_disk, os.rename, shutil.rmtree

    def dying_to_disk(path: Path, raw: bytes) -> None:
        count[0] += path.name == storage.TENSORS
        at = {storage.TENSORS: "half of the tensors", storage.STATE: "half of the state"}
        if count[0] == after and moment == at[path.name]:
            path.write_bytes(raw[: len(raw) // 2])
            die()
        to_disk(path, raw)
        if count[0] == after and moment == "after them" and path.name == storage.TENSORS:
            die()

    def dying_rename(*paths: Any) -> None:
        if count[0] == after and moment == "renaming":
            die()
        rename(*paths)

    def dying_rmtree(path: Path, **options: Any) -> None:
        if count[0] == after and moment == "removing" and path.name.startswith("step-"):
            for file in list(path.iterdir())[:1]:
                file.unlink()
            die()
        rmtree(path, **options)

    storage._to_disk, os.rename, shutil.rmtree = dying_to_disk, dying_rename, dying_rmtree


def attempt(
    folder: Path, steps: int, every: int, moment: str | None, rng: random.Random
) -> tuple[bool, list[int]]:
    """One process: whether it was killed, and the steps that it made."""
    read, write = os.pipe()
    after, wait, early = rng.randrange(3, 6), rng.uniform(0.0, 0.15), rng.random() < 0.2
    child = os.fork()
    if child == 0:
        try:
            if moment is not None:
                die_in_write(moment, after)
            tell = [lambda step: os.write(write, f"{step.step}\n".encode()) and None]
            fit(steps, checkpoint=folder, every=every, callbacks=tell)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    begun = b"" if early else os.read(read, 64)  # else also while it starts or reads
    if moment is None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    rest = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a process failed with {code} instead of going on")
    return code != 0, [int(line) for line in (begun + rest).split()]


def same(one: pvi.Fit, two: pvi.Fit) -> bool:
    histories = [fit.history.tensors() for fit in (one, two)]
    for history in histories:
        del history["seconds"]
    pairs = [(histories[0], histories[1])]
    pairs += [(one.guide.state_dict(), two.guide.state_dict())]  # type: ignore[attr-defined]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def runs(kills: int, steps: int, every: int, seed: int) -> Iterator[list[Any]]:
    """Rows of the table: fits that are killed until all kills are used up."""
    rng, left = random.Random(seed), kills
    whole = fit(steps)
    with tempfile.TemporaryDirectory() as root:
        while left:
            folder = Path(root) / str(left)
            killed, in_write, lost, last = 0, 0, [0], 0
            while left:
                moment = rng.choice(MOMENTS) if left % 2 else None
                dead, made = attempt(folder, steps, every, moment, rng)
                if made:
                    lost.append(last - (made[0] - 1))
                    last = made[-1]
                if not dead:
                    break
                left, killed, in_write = left - 1, killed + 1, in_write + (moment is not None)
            made = []
            tell = [lambda step, made=made: made.append(step.step)]
            final = fit(steps, checkpoint=folder, every=every, callbacks=tell)
            lost.append(last - (made[0] - 1) if made else 0)
            yield [killed, in_write, every, max(lost), same(whole, final)]


def overhead(steps: int, every: int) -> dict[str, float]:
    """Median milliseconds that a checkpoint takes, and the size of the last."""
    times: list[float] = []

    class Timed(Checkpoints):
        def write(self, training: Any) -> None:
            with timed() as seconds:
                super().write(training)
            times.append(seconds[0])

    with tempfile.TemporaryDirectory() as root, mock.patch.object(entry, "Checkpoints", Timed):
        fit(steps, checkpoint=Path(root), every=every)
        newest = max(Path(root).iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    return {"ms a checkpoint": 1e3 * median(times), "kB a checkpoint": size / 1e3}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--every", type=int, default=20)
    given = options.parse_args()
    torch.set_num_threads(1)  # a fork of a process with threads may wait for them for ever
    header = ["kills", "in a write", "every", "most steps lost", "bit-identical"]
    with isolated(), timed() as seconds:
        rows = list(runs(given.kills, given.steps, given.every, given.seed))
        more: dict[str, Any] = {"steps": given.steps, **overhead(given.steps, given.every)}
    more |= {"seconds": seconds[0]}
    report("checkpoints", header, rows, given.results, more=more)


if __name__ == "__main__":
    main()
