"""The problems of `benchmarks.speed`: data from seeds, and Pyro programs for pvi and Pyro.

Minibatches are of rows that all have latents of their own, so that the scale of the data, which
Adam would not notice, is left out of the models.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.posteriors import POSTERIORS, eight_schools_nc, radon_noncentered

Arrays = dict[str, np.ndarray]
Programs = Callable[[], tuple[Callable, Any]]  # model and guide, with networks of their own
WORDS = 100  # in each document


@dataclass(frozen=True)
class Problem:
    """A model, its guide and what is taken of them in a step.

    Args:
        data: rows by name, in the order of the model's arguments.
        programs: returns the model, and the guide if it is not independent normals.
        bound: "elbo" by draws alone, "kl" with exact KLs, "iwae".
        batch: rows in a step; all of them if 0.
        particles: draws in a step.
        rate: of Adam.
        sizes: of the networks.
        like: the problem whose hand-written twins it shares.
    """

    data: Arrays
    programs: Programs
    bound: Literal["elbo", "kl", "iwae"] = "elbo"
    batch: int = 0
    particles: int = 1
    rate: float = 0.01
    sizes: dict[str, int] = field(default_factory=dict)
    like: str = ""

    @property
    def rows(self) -> int:
        """Rows in a step."""
        return self.batch or len(self.data["y"])

    def tensors(self, device: str = "cpu") -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(a).to(device) for a in self.data.values())

    def described(self) -> dict[str, Any]:
        """What the other side of a process needs to know."""
        names = ("bound", "batch", "particles", "rate", "sizes", "like")
        return {name: getattr(self, name) for name in names}


def batches(data: tuple[Tensor, ...], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """All rows again and again, or shuffled batches of them."""
    while not batch:
        yield data
    while True:
        for rows in torch.randperm(len(data[0]), device=data[0].device).split(batch):
            yield tuple(x[rows] for x in data)


def fixed(model: Callable) -> Programs:
    return lambda: (model, None)


def logistic(x: Tensor, group: Tensor, y: Tensor, groups: int = 20) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", groups):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        logits = a[..., group] + (x @ w.unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def bnn(x: Tensor, y: Tensor, hidden: int = 50) -> None:
    inputs = x.shape[1]

    def weights(name: str, *shape: int) -> Tensor:
        prior = dist.Normal(x.new_zeros(shape), shape[0] ** -0.5 if len(shape) > 1 else 1.0)
        return pyro.sample(name, prior.to_event(len(shape)))

    w1, b1 = weights("w1", inputs, hidden), weights("b1", hidden)
    w2, b2 = weights("w2", hidden, 1), weights("b2", 1)
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        mean = torch.relu(x @ w1 + b1.unsqueeze(-2)) @ w2 + b2.unsqueeze(-2)
        mean = mean.reshape(*mean.shape[:-3], len(y))  # particles are at -2, as in sigma
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


class Encoder(nn.Module):
    """Means and scales of latents."""

    def __init__(self, data: int, hidden: int, latents: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(data, hidden), nn.Linear(hidden, 2 * latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.out(torch.relu(self.hidden(x))).chunk(2, -1)
        return loc, log_scale.exp()


def decoder(data: int, hidden: int, latents: int) -> nn.Module:
    return nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, data))


def vae(data: int, hidden: int, latents: int) -> tuple[Callable, Callable]:
    encode, decode = Encoder(data, hidden, latents), decoder(data, hidden, latents)

    def model(y: Tensor) -> None:
        pyro.module("decoder", decode)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(latents), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decode(z)).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encode)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(*encode(y)).to_event(1))

    return model, guide


class Topics(nn.Module):
    """Logits of words from topic weights, as ProdLDA has them."""

    def __init__(self, data: int, latents: int, **_: int):
        super().__init__()
        self.words, self.norm = nn.Linear(latents, data, bias=False), nn.BatchNorm1d(data)
        self.drop = nn.Dropout(0.2)

    def forward(self, theta: Tensor) -> Tensor:
        return self.norm(self.words(self.drop(theta)))


class Documents(nn.Module):
    """Means and scales of topic weights, from counts."""

    def __init__(self, data: int, hidden: int, latents: int):
        super().__init__()
        self.first, self.second = nn.Linear(data, hidden), nn.Linear(hidden, hidden)
        self.loc, self.log_scale = nn.Linear(hidden, latents), nn.Linear(hidden, latents)
        self.norms = nn.ModuleList([nn.BatchNorm1d(latents) for _ in range(2)])
        self.drop = nn.Dropout(0.2)

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(softplus(self.second(softplus(self.first(counts)))))
        loc, log_scale = self.norms[0](self.loc(h)), self.norms[1](self.log_scale(h))
        return loc, (0.5 * log_scale).exp()


def prodlda(data: int, hidden: int, latents: int) -> tuple[Callable, Callable]:
    topics, documents = Topics(data, latents), Documents(data, hidden, latents)

    def model(y: Tensor) -> None:
        pyro.module("topics", topics)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(latents), 1.0).to_event(1))
            logits = topics(z.softmax(-1))
            pyro.sample("y", dist.Multinomial(WORDS, logits=logits), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("documents", documents)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(*documents(y)).to_event(1))

    return model, guide


def schools_data() -> Arrays:
    sigma, y = [15, 10, 16, 11, 9, 11, 10, 18], [28, 8, -3, 7, -1, 1, 18, 12]
    return {"sigma": np.array(sigma, np.float32), "y": np.array(y, np.float32)}


def logistic_data(rows: int = 500, columns: int = 10, groups: int = 20) -> Arrays:
    make = np.random.default_rng(0)
    x = make.normal(size=(rows, columns)).astype(np.float32)
    group = make.integers(0, groups, rows)
    eta = x @ make.normal(size=columns) + make.normal(size=groups)[group]
    y = make.random(rows) < 1 / (1 + np.exp(-eta))
    return {"x": x, "group": group, "y": y.astype(np.float32)}


def radon_data(folder: Path | None) -> Arrays:
    """The real data, or made-up data of their size: 919 houses in 85 counties."""
    names = ("x", "county", "y")
    if folder is not None:
        known = POSTERIORS["radon_nc"].arguments(read(folder)["data"])
        return {name: t.numpy() for name, t in zip(names, known, strict=True)}
    make = np.random.default_rng(0)
    county = make.integers(0, 85, 919)
    uranium, floor = make.normal(size=85)[county] * 0.35, make.random(919) < 0.17
    y = 1.5 + make.normal(size=85)[county] * 0.2 + 0.7 * uranium - 0.65 * floor
    y = y + make.normal(size=919) * 0.75
    found = (np.stack([uranium, floor], -1).astype(np.float32), county, y.astype(np.float32))
    return dict(zip(names, found, strict=True))


def read(folder: Path) -> dict[str, Any]:
    """Radon's data and reference."""
    file = f"{POSTERIORS['radon_nc'].file}.json"
    return json.loads((folder / "posteriordb" / file).read_text())


def images(rows: int, pixels: int) -> Arrays:
    make = np.random.default_rng(0)
    shares = make.random((10, pixels))[make.integers(0, 10, rows)]
    return {"y": (make.random((rows, pixels)) < shares**3).astype(np.float32)}


def regression_data(rows: int = 500, columns: int = 13) -> Arrays:
    make = np.random.default_rng(0)
    x = make.normal(size=(rows, columns))
    y = np.sin(x[:, 0]) + 0.3 * x[:, 1] * x[:, 2] + 0.2 * make.normal(size=rows)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def counts_data(rows: int = 2000, words: int = 2000, topics: int = 50) -> Arrays:
    make = np.random.default_rng(0)
    shares = make.dirichlet(np.full(topics, 0.1), rows) @ make.dirichlet(
        np.full(words, 0.05), topics
    )
    shares /= shares.sum(-1, keepdims=True)
    return {"y": make.multinomial(WORDS, shares).astype(np.float32)}


NETWORKS = ("vae", "iwae", "prodlda")


def make_problems(names: list[str], folder: Path | None = None) -> dict[str, Problem]:
    """The problems of these names; data are made only for them.

    Args:
        folder: of the real radon data.
    """
    mnist = {"data": 784, "hidden": 400, "latents": 20}
    topics = {"data": 2000, "hidden": 100, "latents": 50}

    def bayesian(particles: int) -> Problem:
        return Problem(regression_data(), fixed(bnn), particles=particles, like="bnn")

    def image_model() -> Problem:
        y, make = images(1280, 784), partial(vae, **mnist)
        return Problem(y, make, "kl", batch=128, rate=1e-3, sizes=mnist, like="vae")

    makers: dict[str, Callable[[], Problem]] = {
        "eight_schools": lambda: Problem(schools_data(), fixed(eight_schools_nc)),
        "logistic": lambda: Problem(logistic_data(), fixed(logistic)),
        "radon": lambda: Problem(radon_data(folder), fixed(radon_noncentered)),
        "vae": image_model,
        "iwae": lambda: replace(image_model(), bound="iwae", batch=32, particles=50),
        "bnn1": lambda: bayesian(1),
        "bnn32": lambda: bayesian(32),
        "prodlda": lambda: Problem(
            counts_data(),
            partial(prodlda, **topics),
            "kl",
            batch=200,
            rate=1e-3,
            sizes=topics,
            like="prodlda",
        ),
    }
    return {name: _named(makers[name](), name) for name in names}


def _named(problem: Problem, name: str) -> Problem:
    return problem if problem.like else replace(problem, like=name)


ALL = ("eight_schools", "logistic", "radon", "vae", "iwae", "bnn1", "bnn32", "prodlda")
