"""Fits in several threads take turns, for Pyro's handlers are global."""

from threading import Thread

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi

Y = torch.linspace(-1.0, 3.0, 10)


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fitted(seed: int) -> list[float]:
    options = {"optimizer": "adam", "steps": 60, "seed": seed, "progress": False}
    fit = pvi.fit(model, pvi.guides.MeanField, Y, objective=pvi.ELBO(), **options)  # type: ignore
    return list(fit.history.losses)


def test_threads_get_what_they_would_alone() -> None:
    alone = [fitted(seed) for seed in range(4)]
    found: dict[int, list[float]] = {}
    threads = [Thread(target=lambda s=s: found.update({s: fitted(s)})) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == alone
