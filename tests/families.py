"""All guides of pvi by name, as functions that make them without a model, and models for them.

A new guide joins `GUIDES` and is tested like the others. An amortised guide is for site z, in the
plates of the models' argument x.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvi.guides import (
    Amortized,
    Delta,
    Flow,
    FullRank,
    Group,
    Guide,
    Laplace,
    LowRank,
    MatrixNormal,
    MeanField,
    Mixture,
    Structured,
)
from tests.scenarios import Program


class Rows(nn.Module):
    """A small encoder: `width` numbers for each number of x."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(-1))


# From the numbers of an event of site z (in unconstrained space) to a guide.
GUIDES: dict[str, Callable[[int], Guide]] = {
    "MeanField": lambda size: MeanField(),
    "LowRank": lambda size: LowRank(rank=2),
    "FullRank": lambda size: FullRank(),
    "Flow": lambda size: Flow(transforms=2, hidden_features=(8,), bins=4),
    "Delta": lambda size: Delta(),
    "Laplace": lambda size: Laplace(),
    "Structured": lambda size: Structured(),
    "Amortized": lambda size: Group({"z": Amortized(Rows(2 * size))}),
    "Group": lambda size: Group({"z": FullRank, ...: Structured}),
    "MatrixNormal": lambda size: MatrixNormal(),
    "Mixture": lambda size: Mixture(3, spread=0.3),
    "Mixture of FullRank": lambda size: Mixture(2, FullRank, spread=0.3),
}
DRAWN = [name for name in GUIDES if name != "Delta"]  # those that have a density
TRAINED = [name for name in GUIDES if name != "Laplace"]
EXACT_KL = ["MeanField", "LowRank", "FullRank", "Structured", "MatrixNormal"]
GAUSSIAN = ["MeanField", "LowRank", "FullRank", "Laplace", "Structured", "MatrixNormal"]


def make(name: str, size: int = 1) -> Guide:
    """A guide by name; its networks are the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GUIDES[name](size)


def perturbed(guide: Guide, by: float = 0.2, seed: int = 1) -> Guide:
    """Move all parameters away from their start, where gradients may be zero by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in guide.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(by * noise.to(parameter))
    return guide


def ready(name: str, model: Program, *args: Any, size: int = 1) -> Guide:
    """A guide for this model, off its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guide = GUIDES[name](size).bind(model).setup(*args)
    return perturbed(guide)


# Models. The latents in the data's plate are called z.


def world(x: Tensor) -> None:
    """Sites of every shape, globals and rows: real, positive, vector, matrix, bounded."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("scale.tau", dist.LogNormal(0.0, 0.5))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    m = pyro.sample("m", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, tau))
        mean = z + w.sum(-1) * x + m.sum((-1, -2)) * x.square()
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def linear_world(x: Tensor) -> None:
    """The same with normal priors only, so that every KL can be exact."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    m = pyro.sample("m", dist.Normal(torch.zeros(2, 2), 2.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        mean = z + w.sum(-1) * x + m.sum((-1, -2)) * x.square()
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def _one(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _none(x: Tensor) -> None:
    a = pyro.sample("z", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, s), obs=x)


def _nested(x: Tensor) -> None:
    with pyro.plate("rows", x.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _crossed(x: Tensor) -> None:
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    columns = pyro.plate("columns", x.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with columns:
        b = pyro.sample("b", dist.HalfNormal(1.0))
    with rows, columns:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a.sum(-1) + b * z, 1.0), obs=x)


def _outer(x: Tensor) -> None:
    """Latents in the outer plate only, a global after them."""
    rows = pyro.plate("rows", x.shape[0], dim=-2)
    with rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with rows, pyro.plate("columns", x.shape[1], dim=-1):
        pyro.sample("x", dist.Normal(z, s), obs=x)


Shapes = dict[str, tuple[int, ...]]
PLATES: dict[str, tuple[Program, tuple[int, ...], Shapes]] = {
    "none": (_none, (5,), {"z": (), "s": ()}),
    "one": (_one, (5,), {"a": (), "z": (5,)}),
    "nested": (_nested, (4, 3), {"a": (4, 1), "z": (4, 3)}),
    "crossed": (_crossed, (4, 3), {"a": (4, 1, 2), "b": (3,), "z": (4, 3)}),
    "outer": (_outer, (4, 3), {"z": (4, 1), "s": ()}),
}
