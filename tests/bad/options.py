"""Arguments of `pvi.fit` other than programs and data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pvi
from pvi.errors import DataError, FitError, ModelError, ObjectiveError
from tests.bad.base import BadInput, data, model, row
from tests.scenarios import randn

STEPS, RATES, BATCHES, SEEDS, REST = (
    "steps",
    "optimisers and rates",
    "minibatches",
    "seeds and devices",
    "objectives, callbacks and names",
)


def refuse(
    group: str,
    name: str,
    option: str,
    value: Any,
    error: type[Exception],
    *names: str,
    right: Any = None,
    **call: Any,
) -> None:
    """Enter a wrong value of one option; it is right without it, or with `right`."""

    def make() -> BadInput:
        made = value() if isinstance(value, Lazy) else value
        mend = {option: right}
        return BadInput({option: made, **call}, error, option, names, mend, pyro=False)

    row(group, name)(make)


def accept(group: str, name: str, how: str, **call: Any) -> None:
    """Enter an option that looks odd and is taken."""
    row(group, name)(lambda: BadInput(call, how=how, pyro=False))


class Lazy:
    """A value to be made when it is needed."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        return self.make()


WHOLE = r"must be a whole number >= 1"
refuse(STEPS, "steps=0", "steps", 0, FitError, WHOLE, "got 0", right=3)
refuse(STEPS, "steps=1.5", "steps", 1.5, FitError, WHOLE, "got 1.5", right=3)
refuse(STEPS, "steps=True", "steps", True, FitError, WHOLE, "got True", right=3)
refuse(STEPS, 'steps="10"', "steps", "10", FitError, WHOLE, "got '10'", right=3)
refuse(STEPS, "epochs=-1", "epochs", -1, FitError, WHOLE, "got -1", steps=None, right=1)
refuse(STEPS, "steps and epochs", "epochs", 3, FitError, "not both")
accept(STEPS, "steps of numpy", "as a whole number", steps=np.int64(3))

refuse(RATES, "lr=-0.1", "lr", -0.1, FitError, "lr must be a number > 0, got -0.1")
refuse(RATES, "lr=0", "lr", 0, FitError, "lr must be a number > 0, got 0")
refuse(RATES, "lr=NaN", "lr", float("nan"), FitError, "lr must be a number > 0, got nan")
refuse(RATES, "lr=inf", "lr", float("inf"), FitError, "lr must be a number > 0, got inf")
refuse(RATES, 'lr="0.1"', "lr", "0.1", FitError, "lr must be a number > 0, got '0.1'")
refuse(
    RATES,
    "lr beside an optimiser of one's own",
    "lr",
    0.1,
    FitError,
    "a rate lr= belongs to optimizer='auto'",
    optimizer=torch.optim.SGD,
)
ADVICE = "lambda"
refuse(RATES, 'optimizer="sgd"', "optimizer", "sgd", FitError, ADVICE, "'sgd'", right="auto")
refuse(
    RATES,
    "an optimiser of Pyro",
    "optimizer",
    Lazy(lambda: pyro.optim.Adam({"lr": 0.01})),
    FitError,
    "PyroOptim",
    "torch.optim",
    ADVICE,
    right="auto",
)
refuse(
    RATES,
    "an optimiser that is made already",
    "optimizer",
    Lazy(lambda: torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
    FitError,
    "Adam",
    "parameters",
    "none of this model or guide",
    right="auto",
)
refuse(
    RATES,
    "a function that makes no optimiser",
    "optimizer",
    lambda params: None,
    FitError,
    "must return a torch.optim.Optimizer, got None",
    right="auto",
)
refuse(
    RATES,
    "an optimiser of other parameters",
    "optimizer",
    lambda params: torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
    FitError,
    "none of the parameters",
    right="auto",
)
refuse(
    RATES,
    "an optimiser that refuses its rate",
    "optimizer",
    lambda params: torch.optim.Adam(params, lr=-1.0),
    FitError,
    "Invalid learning rate: -1.0",
    right="auto",
)
accept(RATES, "a class of torch.optim", "with its own defaults", optimizer=torch.optim.Adam)

for _value in (0, -1, 2.5, "8", True):
    _got = f"got {_value!r}"
    refuse(BATCHES, f"batch_size={_value!r}", "batch_size", _value, DataError, WHOLE, _got)
accept(BATCHES, "more rows in a batch than there are", "as all rows in each step", batch_size=50)
accept(BATCHES, "batches of one row", "as they are", batch_size=1)
accept(
    BATCHES,
    "a last batch that is not full",
    "its rows are left out of this epoch; each epoch is shuffled anew",
    batch_size=8,
)
accept(BATCHES, "batch_size of numpy", "as a whole number", batch_size=np.int32(5))


@row(BATCHES, "batch_size without rows")
def _() -> BadInput:
    rows = data()

    def closed() -> None:
        model(*rows)

    names = ("batch_size needs rows", "data=")
    call = {"model": closed, "data": (), "batch_size": 5}
    return BadInput(call, DataError, "batch_size", names, {"batch_size": None}, pyro=False)


@row(BATCHES, "batch_size beside a DataLoader")
def _() -> BadInput:
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    names = ("batch_size=5", "DataLoader", "4")
    call = {"data": loader, "batch_size": 5}
    return BadInput(call, DataError, "batch_size", names, {"batch_size": None}, pyro=False)


@row(BATCHES, "a DataLoader whose sampler leaves rows out")
def _() -> BadInput:
    rows = TensorDataset(*data())
    loader = DataLoader(rows, batch_size=4, sampler=SubsetRandomSampler(range(12)))
    names = ("SubsetRandomSampler", "12 rows", "20 rows", r"Subset\(dataset, indices\)")
    instead = DataLoader(Subset(rows, range(12)), batch_size=4, shuffle=True)
    return BadInput({"data": loader}, DataError, "sampler", names, {"data": instead}, pyro=False)


@row(BATCHES, "a DataLoader whose sampler prefers rows")
def _() -> BadInput:
    rows = TensorDataset(*data())
    loader = DataLoader(rows, batch_size=4, sampler=WeightedRandomSampler([0.1, 0.9] * 10, 20))
    names = ("WeightedRandomSampler", "20 rows", "without that sampler")
    instead = DataLoader(rows, batch_size=4, shuffle=True)
    return BadInput({"data": loader}, DataError, "sampler", names, {"data": instead}, pyro=False)


@row(BATCHES, "data in no plate")
def _() -> BadInput:
    def event(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)

    names = ("site 'y'", "in no plate", "pyro.plate")
    call = {"model": event, "batch_size": 5}
    return BadInput(call, ModelError, "y", names, {"batch_size": None}, pyro=False)


@row(BATCHES, "a plate of a fixed size")
def _() -> BadInput:
    def fixed(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    names = ("plate 'data'", "20", "len")
    call = {"model": fixed, "batch_size": 10}
    return BadInput(call, ModelError, "data", names, {"model": model}, pyro=False)


@row(BATCHES, "two plates of the batch's length around a site")
def _() -> BadInput:
    def pairs(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", len(x), dim=-2):
            pyro.sample("y", dist.Normal(w, 1.0), obs=x[:, None] - x)

    names = ("site 'y'", "two plates", "rows", "columns")
    call = {"model": pairs, "data": randn(20), "batch_size": 5}
    return BadInput(call, ModelError, "y", names, {"batch_size": None}, pyro=False)


@row(BATCHES, "two plates of the data's length beside each other")
def _() -> BadInput:
    def beside(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("one", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)
        with pyro.plate("two", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    return BadInput({"model": beside, "batch_size": 5}, how="both follow the batch", pyro=False)


@row(BATCHES, "a mean over the rows inside the model")
def _() -> BadInput:
    def centred(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * (x - x.mean()), 1.0), obs=y)

    names = ("site 'y'", "not a sum over rows", "mean")
    call = {"model": centred, "batch_size": 5}
    return BadInput(call, ModelError, "y", names, {"batch_size": None}, pyro=False)


UNKNOWN = ("does not exist", "'data'")
refuse(BATCHES, "plate= names no plate", "plate", "dat", ModelError, *UNKNOWN, batch_size=5)
refuse(BATCHES, "the same, without batch_size", "plate", "dat", ModelError, *UNKNOWN)
refuse(BATCHES, "plate=5", "plate", 5, ModelError, "name", "got 5", batch_size=5)

SEED = "seed must be a whole number >= 0"
refuse(SEEDS, "seed=-1", "seed", -1, FitError, SEED, "got -1")
refuse(SEEDS, "seed=1.5", "seed", 1.5, FitError, SEED, "got 1.5")
refuse(SEEDS, 'seed="0"', "seed", "0", FitError, SEED, "got '0'")
refuse(SEEDS, "seed=True", "seed", True, FitError, SEED, "got True")
refuse(SEEDS, "seed=2**70", "seed", 2**70, FitError, r"below 2\*\*64")
accept(SEEDS, "seed=None", "draws from the caller's random state", seed=None)
accept(SEEDS, "a seed of numpy", "as a whole number", seed=np.int64(3))
refuse(SEEDS, "a device that does not exist", "device", "gpu", FitError, "'gpu'", "cuda", "cpu")
refuse(SEEDS, "a device that is not there", "device", "cuda:99", FitError, "'cuda:99'", "cpu")
refuse(SEEDS, "device=0.5", "device", 0.5, FitError, "0.5", "cpu")

MADE = "objective must be an objective of pvi"
refuse(
    REST,
    "an objective of Pyro",
    "objective",
    Lazy(Trace_ELBO),
    ObjectiveError,
    MADE,
    r"pvi\.ELBO\(",
)
refuse(
    REST,
    "RenyiELBO of Pyro",
    "objective",
    Lazy(lambda: RenyiELBO(alpha=0.5, num_particles=4)),
    ObjectiveError,
    MADE,
    r"pvi\.RenyiELBO\(0\.5, 4\)",
)
refuse(
    REST, "an objective not called", "objective", pvi.ELBO, ObjectiveError, MADE, r"pvi\.ELBO\(\)"
)
refuse(REST, "an objective's class", "objective", Trace_ELBO, ObjectiveError, MADE, "class")
refuse(REST, 'objective="elbo"', "objective", "elbo", ObjectiveError, MADE, r"pvi\.ELBO\(\)")
refuse(REST, "one callback", "callbacks", print, FitError, "list", r"callbacks=\[", right=())
refuse(REST, "a callback that can't be called", "callbacks", ["log"], FitError, "'log'", right=())
refuse(REST, 'reparam="centred"', "reparam", "centred", ModelError, "noncentered", "got 'centred'")


@row(REST, "a callback that raises")
def _() -> BadInput:
    def mine(step: object) -> None:
        raise KeyError("mine")

    names = ("mine", "after 1 step of the fit", "in callback 'mine'")
    return BadInput({"callbacks": [mine]}, KeyError, "mine", names, {"callbacks": ()}, pyro=False)


def misnamed(name: str, value: Any, *names: str) -> None:
    """Enter an argument that `pvi.fit` does not have."""

    def make() -> BadInput:
        call = {name: value}
        return BadInput(call, FitError, name, (f"no argument '{name}'", *names), pyro=False)

    row(REST, f"{name}=")(make)


misnamed("num_steps", 100, "did you mean steps=")
misnamed("learning_rate", 0.1, "did you mean lr=")
misnamed("batchsize", 8, "did you mean batch_size=")
misnamed("loss", None, "did you mean objective=")
misnamed("foo", None, "It takes model, guide, data")
