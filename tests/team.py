"""Fits for `test_distributed.py`, in one process or in several: `torchrun -m tests.team FILE`."""

import json
import math
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import pvi
from pvi.errors import PviError
from tests.scenarios import randn

STEPS, SIZE, BATCH = 25, 41, 10
X = randn(SIZE, 3).double()
Y = X.sum(1) + randn(SIZE, seed=1).double()


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def unplated(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def local(x: Tensor, y: Tensor) -> None:
    """A latent for each row: the posterior means of z are (y - w x) / 2 given w."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + z, 1.0), obs=y)


class Faulty:
    """A regression that fails at one row of the data, which one process has, at some steps.

    Args:
        steps: those, from 1.
        raises: whether as an error of torch's, else as a density that is NaN.
    """

    ROW = 17

    def __init__(self, *steps: int, raises: bool = False):
        self.steps, self.raises, self.step = steps, raises, 1

    def __call__(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        loc = (x * w.unsqueeze(-2)).sum(-1)
        if self.step in self.steps and torch.is_grad_enabled():
            bad = y == Y[self.ROW]
            loc = loc + torch.where(bad, torch.nan, 0.0)
        with pyro.plate("data", len(x)):
            normal = dist.Normal(loc, 1.0, validate_args=self.raises)
            pyro.sample("y", normal, obs=y)

    def count(self, step: Any) -> None:
        self.step = step.step + 1


class Encoded(nn.Module):
    """A guide with a network and dropout, of gamma latents: rejection draws unequal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1), nn.Softplus())

    def model(self, x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    def forward(self, x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("scale", dist.LogNormal(loc, 0.1))
        rate = self.net(x).squeeze(-1) + 0.1
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(rate, 1.0))


class Stream(IterableDataset):
    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Any:
        return zip(X + self.rank, Y, strict=True)


def encoded(**options: Any) -> pvi.Fit:
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # unequal starts: the first one's count
    guide = Encoded()
    torch.manual_seed(0)
    return fit(guide.model, guide, batch_size=BATCH, **options)


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH, **options)


def fit(model: Any = regression, guide: Any = None, data: Any = (X, Y), **options: Any) -> pvi.Fit:
    return pvi.fit(model, guide, data, **{"steps": STEPS, "seed": 0, "progress": False} | options)


def faulty(*steps: int, raises: bool = False, **options: Any) -> pvi.Fit:
    model = Faulty(*steps, raises=raises)
    return fit(model, callbacks=[model.count], **options)


def late() -> pvi.Fit:
    """As on an accelerator: numbers are looked at after every fourth step."""
    with patch.object(sys.modules["pvi.fit.training"], "looks", return_value=4):
        return faulty(15, raises=True)  # of all rows: versions of torch shuffle otherwise


def stopped() -> pvi.Fit:
    """By a callback that only the last process has."""
    last = os.environ.get("RANK", "1") == "1"
    stop = lambda step: "enough" if step.step == 7 else None  # noqa: E731
    return fit(batch_size=BATCH, callbacks=[stop] if last else [])


def staged(fit: Callable[..., pvi.Fit], **options: Any) -> pvi.Fit:
    """Through the end of two stages of Adam, whose averages are compared."""
    stop = lambda step: "enough" if step.step == 650 else None  # noqa: E731
    return fit(steps=None, optimizer="adam", callbacks=[stop], **options)


WORSE = {"validation_data": (X[:13], -Y[:13]), "validate_every": 3, "patience": 2}
CASES: dict[str, Callable[..., pvi.Fit]] = {
    "odd batches": lambda: fit(batch_size=7),
    "all rows": lambda: fit(guide=pvi.guides.FullRank),
    "loader": lambda: fit(data=loader(shuffle=True)),  # the last batch has one row
    "stream": lambda: fit(data=Stream(), batch_size=BATCH, num_data=SIZE),
    "accumulated": lambda: fit(batch_size=7, accumulate=3, clip_norm=9.0),
    "early stop": lambda: fit(batch_size=BATCH, **WORSE),
    "validation, all rows": lambda: fit(**WORSE),
    "validation by a stream": lambda: fit(
        batch_size=BATCH, **WORSE | {"validation_data": Stream()}
    ),
    "one bad step": lambda: faulty(5),
    "an error in a step": lambda: faulty(5, raises=True),
    "bad steps apart": lambda: faulty(5, 8, 11),
    "errors in a row": lambda: faulty(5, 6, 7, raises=True),
    "bad rows of a loader": lambda: faulty(*range(9, 20), data=loader()),
    "callback": stopped,
    "stages": lambda: staged(fit, batch_size=20),
    "laplace": lambda: fit(guide=pvi.guides.Laplace),
}
NOISY: dict[str, Callable[..., pvi.Fit]] = {
    "rows": lambda: fit(local, steps=200),
    "encoder": encoded,
    "stages of an encoder": lambda: staged(encoded),
    "late": late,
    "errors in accumulated batches": lambda: faulty(
        5, 6, 7, STEPS, raises=True, batch_size=20, accumulate=4, seed=None
    ),
}


def distributed_loader() -> pvi.Fit:
    data = TensorDataset(X[:40], Y[:40])
    return fit(data=DataLoader(data, batch_size=5, sampler=DistributedSampler(data, seed=3)))


REFUSED: dict[str, Callable[[], pvi.Fit]] = {
    "weighting": lambda: fit(objective=pvi.ELBO(kl="exact", weighting=pvi.FreeBits(0.1)), steps=2),
    "no plate": lambda: fit(unplated),
    "other batches": lambda: fit(
        data=Stream(int(os.environ["RANK"])), batch_size=BATCH, num_data=SIZE
    ),
    "bad row": lambda: faulty(*range(6, STEPS), batch_size=20, accumulate=2),
    "bad start": lambda: faulty(1, 2, 3, raises=True),
    "several modes": lambda: pvi.fit(regression, data=(X, Y), restarts=2, progress=False),
    "no rows": lambda: pvi.fit(lambda: regression(X, Y), steps=2, progress=False),
}


COLUMNS = ("bound", "loss", "grad_norm", "lr", "log_likelihood", "validation_bound")


def numbers(column: Any) -> list[float | None]:
    """NaN as `None`, which equals itself."""
    return [x if math.isfinite(x) else None for x in column.tolist()]


def outcome(found: pvi.Fit) -> dict[str, Any]:
    return {
        "history": {k: numbers(found.history[k]) for k in COLUMNS if k in found.history},
        "parameters": parameters(found),
        "random after it": zlib.crc32(torch.get_rng_state().numpy().tobytes()),
        "end": [found.converged, found.reason, *found.notes],
    }


def parameters(found: pvi.Fit) -> dict[str, Any]:
    return {name: x.tolist() for name, x in found.posterior.params.tensors().items()}


def killed_once() -> bool:
    """A process dies in the middle of a fit; all come back and go on from the checkpoint."""
    folder = Path(os.environ["FOLDER"])

    def die(step: Any) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and step.step == 23 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    run = {"batch_size": BATCH, "checkpoint": folder, "every": 5}
    two = encoded(callbacks=[die], **{k: v for k, v in run.items() if k != "batch_size"})
    numbers = sorted(p.name for p in folder.iterdir())
    one = encoded()
    same = parameters(one) == parameters(two)
    return same and numbers[-1] == f"step-{STEPS:06d}"


def main(path: str) -> None:
    torch.set_default_dtype(torch.float64)
    result: dict[str, Any] = {"killed": killed_once()}
    for name, case in (CASES | NOISY | {"sampler": distributed_loader}).items():
        torch.manual_seed(0)
        result[name] = outcome(case())
    for name, case in REFUSED.items():
        try:
            result[name] = f"no error, but {case()}"
        except PviError as error:
            result[name] = f"{type(error).__name__}: {error}"
    result["rank"], result["restarts"] = (
        int(os.environ[k]) for k in ("RANK", "TORCHELASTIC_RESTART_COUNT")
    )
    Path(f"{path}.{result['rank']}").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
