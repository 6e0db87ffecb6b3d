"""Fits for `test_distributed.py`, in one process or in several: `torchrun -m tests.team FILE`."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    def __iter__(self) -> Any:
        return zip(X + self.rank, Y, strict=True)


def encoded(**options: Any) -> pvi.Fit:
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # unequal starts: the first one's count
    guide = Encoded()
    return fit(guide.model, guide, batch_size=BATCH, **options)


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH, **options)


def fit(model: Any = regression, guide: Any = None, data: Any = (X, Y), **options: Any) -> pvi.Fit:
    return pvi.fit(model, guide, data, **{"steps": STEPS, "seed": 0, "progress": False} | options)


CASES: dict[str, Callable[..., pvi.Fit]] = {
    "odd batches": lambda: fit(batch_size=7),
    "all rows": lambda: fit(guide=pvi.guides.FullRank),
    "loader": lambda: fit(data=loader(shuffle=True)),  # the last batch has one row
    "stream": lambda: fit(data=Stream(), batch_size=BATCH, num_data=SIZE),
    "laplace": lambda: fit(guide=pvi.guides.Laplace),
}
NOISY: dict[str, Callable[..., pvi.Fit]] = {
    "rows": lambda: fit(local, steps=200),
    "encoder": encoded,
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
    "no rows": lambda: pvi.fit(lambda: regression(X, Y), steps=2, progress=False),
}


def outcome(found: pvi.Fit) -> dict[str, Any]:
    return {
        "history": {k: found.history[k].tolist() for k in ("bound", "loss", "grad_norm", "lr")},
        "parameters": parameters(found),
        "converged": found.converged,
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
