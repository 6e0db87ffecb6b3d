"""Kinds of data that are taken as they are, and kinds that can't be."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from pvi.errors import DataError
from tests.bad.base import SIZE, BadInput, data, model, row
from tests.scenarios import randn

GROUP = "types"


def single(likelihood: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A model of `y` alone, from its likelihood given a real number."""

    def program(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood(z), obs=y)

    return program


COUNTS = single(lambda z: dist.Poisson(z.exp()))
COIN = single(lambda z: dist.Bernoulli(logits=z))
LABELS = single(lambda z: dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)))
NORMAL = single(lambda z: dist.Normal(z, 1.0))
BITS = randn(SIZE) > 0

ACCEPTED: dict[str, tuple[Callable, Any, str]] = {
    "counts as int64": (COUNTS, BITS.long(), "as they are"),
    "counts as int32 of numpy": (COUNTS, BITS.numpy().astype(np.int32), "as they are"),
    "labels as int64": (LABELS, BITS.long(), "as they are"),
    "labels as floats": (LABELS, BITS.double(), "as they are"),
    "truth values for a Bernoulli": (COIN, BITS, "as 0 and 1"),
    "truth values of numpy": (COIN, BITS.numpy(), "as 0 and 1"),
    "0 and 1 as int64 for a Bernoulli": (COIN, BITS.long(), "as they are"),
    "whole numbers for a Normal": (NORMAL, BITS.long(), "as they are; `pvi.check` mentions it"),
    "a list of numbers": (NORMAL, [0.5, 1.5, 2.5], "as one argument"),
    "a list of whole numbers": (COUNTS, [0, 3, 2], "as one argument"),
    "float32 of numpy": (NORMAL, np.ones(5, np.float32), "in torch's default dtype"),
    "a float64 tensor beside float32": (NORMAL, torch.ones(5).double(), "as torch mixes them"),
    "a read-only or strided array": (NORMAL, np.broadcast_to(np.ones(1), 6), "as a copy"),
    "a Dataset": (NORMAL, TensorDataset(randn(6)), "as its items, in a batch"),
}


def _accept(name: str, program: Callable, rows: Any, how: str) -> None:
    kinds = (np.ndarray, list, TensorDataset)
    plain = not isinstance(rows, kinds)
    row(GROUP, name)(lambda: BadInput({"model": program, "data": rows}, how=how, pyro=plain))


for _name, _values in ACCEPTED.items():
    _accept(_name, *_values)


@row(GROUP, "a pandas Series")
def _() -> BadInput:
    import pandas

    return BadInput({"model": NORMAL, "data": pandas.Series([0.5, 1.5])}, how="as an array")


@row(GROUP, "columns of a pandas DataFrame, by name")
def _() -> BadInput:
    import pandas

    frame = pandas.DataFrame({"x": [0.5, 1.5], "y": [1.0, 2.0]})
    return BadInput({"data": {"x": frame["x"], "y": frame["y"]}}, how="as arrays")


def refuse(name: str, value: Callable[[], Any], names: tuple[str, ...]) -> None:
    """Enter a value of `x` that can't be used, beside a good `y`."""

    def make() -> BadInput:
        call = {"data": {"x": value(), "y": data()[1]}}
        return BadInput(call, DataError, "x", ("argument 'x'", *names), {"data": data()})

    row(GROUP, name)(make)


def _series() -> Any:
    import pandas

    return pandas.Series(["a", "b"] * (SIZE // 2))


def _missing() -> Any:
    import pandas

    return pandas.Series([1, None] * (SIZE // 2), dtype="Int64")


refuse("text", lambda: np.array(["a", "b"] * (SIZE // 2)), ("dtype <U1", "numbers"))
refuse("text in pandas", _series, ("dtype", "numbers"))
refuse("text in a list", lambda: ["a", "b"] * (SIZE // 2), ("dtype <U1", "numbers"))
refuse("an object array", lambda: np.array([1, None] * 10, object), ("dtype object", "numbers"))
refuse("None in a list", lambda: [1.0, None] * (SIZE // 2), ("dtype object", "numbers"))
refuse("missing values in pandas' Int64", _missing, ("NaN in 10 of 20",))
refuse("lists of different lengths", lambda: [[1.0], [1.0, 2.0]] * 10, ("different lengths",))
refuse("dates", lambda: np.array(["2020-01-01"] * SIZE, "datetime64[D]"), ("dtype datetime64",))
refuse("a string", lambda: "data.csv", ("str", "numbers"))
refuse("a set", lambda: {1.0, 2.0}, ("set", "numbers"))
refuse("a generator", lambda: (float(i) for i in range(SIZE)), ("generator", "list"))


@row(GROUP, "a generator as data=")
def _() -> BadInput:
    names = ("data is a generator", "list")
    call = {"data": (float(i) for i in range(SIZE))}
    return BadInput(call, DataError, "data", names, {"data": data()}, pyro=False)


@row(GROUP, "a file name as data=")
def _() -> BadInput:
    names = ("data is a str", "'rows.csv'", "tensor")
    return BadInput({"data": "rows.csv"}, DataError, "data", names, {"data": data()}, pyro=False)


@row(GROUP, "a program as data=")
def _() -> BadInput:
    names = ("data is a program", "model, guide, data")
    return BadInput({"data": model}, DataError, "data", names, {"data": data()}, pyro=False)


@row(GROUP, "a stream without a length")
def _() -> BadInput:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield torch.zeros(1)

    names = ("unknown length", "num_data=")
    return BadInput({"data": Stream()}, DataError, "data", names, {"data": data()}, pyro=False)


@row(GROUP, "a stream without a batch size")
def _() -> BadInput:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return zip(*data(), strict=True)

    call = {"data": Stream(), "num_data": SIZE}
    names = ("IterableDataset", "DataLoader")
    return BadInput(call, DataError, "batch_size=", names, {"batch_size": 5}, pyro=False)


@row(GROUP, "num_data beside data that know their rows")
def _() -> BadInput:
    call = {"num_data": 2 * SIZE}
    return BadInput(call, DataError, "num_data", ("streams",), {"num_data": None}, pyro=False)


@row(GROUP, "an empty Dataset")
def _() -> BadInput:
    call = {"data": TensorDataset(torch.zeros(0))}
    names = ("empty", "argument 'x' has no rows")
    return BadInput(call, DataError, "data", names, {"data": data()}, pyro=False)


@row(GROUP, "float64 and float32 in one product")
def _() -> BadInput:
    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        table = torch.ones(3, 3, dtype=torch.float32 if x.is_floating_point() else x.dtype)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ table @ w, 1.0), obs=y)

    call = {"model": regression, "data": (randn(SIZE, 3), randn(SIZE))}
    names = ("in the model, after site 'w'", "float64", "one dtype", r"\.float\(\)")
    return BadInput(call, DataError, "x", names, {"model": _same_dtype})


def _same_dtype(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@row(GROUP, "args= is one tensor")
def _() -> BadInput:
    names = ("args must be a tuple", r"args=\(", "Tensor")
    call = {"data": data()[:1], "args": data()[1]}
    return BadInput(call, DataError, "args", names, {"args": (data()[1],)}, pyro=False)


@row(GROUP, "kwargs= is no dict")
def _() -> BadInput:
    names = ("kwargs must be a dict", "Tensor")
    call = {"data": data()[:1], "kwargs": data()[1]}
    return BadInput(call, DataError, "kwargs", names, {"kwargs": {"y": data()[1]}}, pyro=False)
