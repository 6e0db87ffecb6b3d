"""Rows that differ in number, and shapes that broadcast to something else than was meant."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from pvi.errors import DataError, GuideError, PviError
from tests.bad.base import SIZE, BadInput, data, model, row
from tests.scenarios import param, randn

GROUP = "shapes"


@row(GROUP, "arguments of different length")
def _() -> BadInput:
    x, y = data()
    names = ("'x' has 20", "'y' has 19", "args= or kwargs=")
    return BadInput({"data": (x, y[:-1])}, DataError, "y", names, {"data": data()})


@row(GROUP, "no rows")
def _() -> BadInput:
    call = {"data": (torch.zeros(0), torch.zeros(0))}
    return BadInput(call, DataError, "x", ("empty", "'x' has no rows"), {"data": data()})


@row(GROUP, "y is a column (N, 1)")
def _() -> BadInput:
    x, y = data()
    names = ("site 'y'", r"\(20, 1\)", "squeeze")
    return BadInput({"data": (x, y[:, None])}, DataError, "y", names, {"data": data()})


@row(GROUP, "x is a column (N, 1)")
def _() -> BadInput:
    """The mean is a column, and the plate N x N densities of it."""
    x, y = data()
    names = ("site 'y'", r"\(20, 20\)", "squeeze")
    return BadInput({"data": (x[:, None], y)}, PviError, "y", names, {"data": data()})


@row(GROUP, "x and y are columns")
def _() -> BadInput:
    x, y = data()
    names = ("site 'y'", r"20", "squeeze")
    return BadInput({"data": (x[:, None], y[:, None])}, PviError, "y", names, {"data": data()})


@row(GROUP, "y is a row (1, N)")
def _() -> BadInput:
    x, y = data()
    names = ("'x' has 20", "'y' has 1")
    return BadInput({"data": (x, y[None])}, DataError, "y", names, {"data": data()})


@row(GROUP, "y of one number for N rows")
def _() -> BadInput:
    call = {"model": shared, "data": (randn(SIZE),), "kwargs": {"y": torch.tensor(0.5)}}
    names = ("site 'y'", "one value", "20", "expand")
    return BadInput(call, DataError, "y", names, {"kwargs": {"y": randn(SIZE)}})


def shared(x: Tensor, y: Tensor) -> None:
    model(x, y)


@row(GROUP, "two columns of y")
def _() -> BadInput:
    x, _ = data()
    names = ("site 'y'", r"\(20, 2\)")
    return BadInput({"data": (x, randn(SIZE, 2))}, DataError, "y", names, {"data": data()})


@row(GROUP, "observations of another event size")
def _() -> BadInput:
    def pairs(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu * torch.ones(2), torch.eye(2)), obs=y)

    call = {"model": pairs, "data": randn(SIZE, 3)}
    names = ("site 'y'", r"\(20, 3\)", r"\(20, 2\)")
    return BadInput(call, DataError, "y", names, {"data": randn(SIZE, 2)})


@row(GROUP, "a transposed matrix")
def _() -> BadInput:
    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    call = {"model": regression, "data": (randn(3, SIZE), randn(SIZE))}
    names = ("'x' has 3", "'y' has 20")
    return BadInput(call, DataError, "x", names, {"data": (randn(SIZE, 3), randn(SIZE))})


@row(GROUP, "shapes that torch can't multiply")
def _() -> BadInput:
    """The error is torch's own, of the line in the model; a note holds what the model was given."""

    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    call = {"model": regression, "data": (randn(SIZE, 2), randn(SIZE))}
    names = ("in the model, after site 'w'", r"x: \(20, 2\)")
    return BadInput(call, RuntimeError, "x", names, {"data": (randn(SIZE, 3), randn(SIZE))})


@row(GROUP, "event shapes of model and guide differ")
def _() -> BadInput:
    def vector(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[..., :1] * x, 1.0), obs=y)

    def naked(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("loc", [0.1, 0.2]), 1.0))

    names = ("site 'w'", r"event shape \(2,\)", "to_event")
    call = {"model": vector, "guide": naked}
    return BadInput(call, GuideError, "w", names, {"guide": None})


def local(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


@row(GROUP, "guide draws one value for all rows")
def _() -> BadInput:
    """The model counts its prior N times, the guide its density once."""

    def scalar(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(param("z_loc", 0.1), 0.5))

    names = ("site 'z'", r"20", "same plates")
    return BadInput({"model": local, "guide": scalar}, GuideError, "z", names, {"guide": None})


@row(GROUP, "guide draws a column")
def _() -> BadInput:
    def column(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(param("z_loc", torch.zeros(SIZE, 1)), 0.5))

    call = {"model": local, "guide": column}
    return BadInput(call, GuideError, "z", ("site 'z'", r"20"), {"guide": None})


@row(GROUP, "guide has parameters for other rows")
def _() -> BadInput:
    def short(x: Tensor, y: Tensor) -> None:
        loc = param("z_loc", torch.zeros(SIZE - 1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    names = ("site 'z'", "plate 'data'", "20", "19", "guide")
    return BadInput({"model": local, "guide": short}, GuideError, "z", names, {"guide": None})


@row(GROUP, "guide was set up for other rows")
def _() -> BadInput:
    guide = pvi.guides.MeanField(local)
    guide.setup(randn(SIZE - 1), randn(SIZE - 1))
    names = ("site 'z'", "20", "19", "set up the guide again")
    call = {"model": local, "guide": guide}
    return BadInput(call, GuideError, "z", names, {"guide": pvi.guides.MeanField}, pyro=False)


@row(GROUP, "one row")
def _() -> BadInput:
    return BadInput({"data": (randn(1), randn(1, seed=1))}, how="fitted")
