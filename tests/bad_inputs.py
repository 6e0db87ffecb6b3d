"""Bad inputs that could give a wrong posterior in silence, for the tests and the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pvi.errors import DataError, GuideError, ModelError, PviError
from tests.scenarios import param, positive, randn

SIZE = 20


@dataclass(frozen=True)
class BadInput:
    """Arguments of `pvi.fit`, the error they deserve, and what it must name.

    Args:
        names: regular expressions that the message must contain: the culprit and the way out.
    """

    model: Callable[..., Any]
    guide: Any
    data: Any
    error: type[PviError]
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def guide(x: Tensor, y: Tensor) -> None:
    pyro.sample("w", dist.Normal(param("w_loc", 0.1), positive("w_scale", 0.3)))


def _data() -> tuple[Tensor, Tensor]:
    return randn(SIZE), randn(SIZE, seed=1)


def _with(position: int, index: int, value: float) -> tuple[Tensor, Tensor]:
    data = _data()
    data[position][index] = value
    return data


def _nan_in_y() -> BadInput:
    names = ("'y'", "NaN in 1 of 20", r"index \[3\]", "obs_mask")
    return BadInput(model, None, _with(1, 3, float("nan")), DataError, names)


def _inf_in_x() -> BadInput:
    names = ("argument 'x'", "inf in 1 of 20", r"index \[5\]", "Remove or clip")
    return BadInput(model, None, _with(0, 5, float("inf")), DataError, names)


def _lengths() -> BadInput:
    x, y = _data()
    names = ("'x' has 20", "'y' has 19", "args= or kwargs=")
    return BadInput(model, None, (x, y[:-1]), DataError, names)


def _empty() -> BadInput:
    return BadInput(
        model, None, (torch.zeros(0), torch.zeros(0)), DataError, ("empty", "'x' has no rows")
    )


def _missing_site() -> BadInput:
    def incomplete(x: Tensor, y: Tensor) -> None:
        param("unused", 0.0)

    names = ("site 'w'", "guide does not sample it", r"pyro.sample\('w'")
    return BadInput(model, incomplete, _data(), GuideError, names)


def _extra_site() -> BadInput:
    def extra(x: Tensor, y: Tensor) -> None:
        guide(x, y)
        pyro.sample("weight", dist.Normal(param("v_loc", 0.1), 1.0))

    names = ("site 'weight'", "not in the model", "Remove or rename", "is_auxiliary")
    return BadInput(model, extra, _data(), GuideError, names)


def _support() -> BadInput:
    def scale_model(x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, sigma), obs=y)

    def normal_guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("sigma", dist.Normal(param("s_loc", 1.0), positive("s_scale", 0.1)))

    names = ("site 'sigma'", "Normal can leave the support", "HalfNormal", "MeanField")
    return BadInput(scale_model, normal_guide, _data(), GuideError, names)


def _duplicate() -> BadInput:
    def twice(x: Tensor, y: Tensor) -> None:
        model(x, y)
        pyro.sample("w", dist.Normal(0.0, 1.0))

    return BadInput(twice, guide, _data(), ModelError, ("two sites named 'w'", "own name"))


def _outside() -> BadInput:
    def counts(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((w * x).exp()), obs=y)

    x, y = _data()
    y = y.round().abs()
    y[7] = -2.0
    names = ("site 'y'", "1 of 20", r"index \[7\]", "support", "Poisson")
    return BadInput(counts, None, (x, y), DataError, names)


def _unobserved() -> BadInput:
    def prior(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0))

    return BadInput(prior, None, _data(), ModelError, ("no observed site", r"obs=", "'w', 'y'"))


TEN: dict[str, Callable[[], BadInput]] = {
    "NaN in y": _nan_in_y,
    "inf in x": _inf_in_x,
    "lengths differ": _lengths,
    "no data": _empty,
    "guide lacks a site": _missing_site,
    "guide has an extra site": _extra_site,
    "guide leaves the support": _support,
    "two sites of one name": _duplicate,
    "observation outside the support": _outside,
    "no observed site": _unobserved,
}


def _nan_in_x() -> BadInput:
    return BadInput(model, None, _with(0, 2, float("nan")), DataError, ("argument 'x'", "NaN in 1"))


def _column() -> BadInput:
    """y of shape (N, 1) broadcasts against the plate: N x N densities."""
    x, y = _data()
    return BadInput(model, None, (x, y.unsqueeze(1)), DataError, ("site 'y'", r"20"))


def _column_mean() -> BadInput:
    """x of shape (N, 1) makes a mean of N x 1, and the plate N x N densities of it."""
    x, y = _data()
    return BadInput(model, None, (x.unsqueeze(1), y), PviError, ("site 'y'", r"20"))


def _columns() -> BadInput:
    x, y = _data()
    return BadInput(model, None, (x.unsqueeze(1), y.unsqueeze(1)), PviError, ("site 'y'", r"20"))


def _local(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


def _scalar_guide() -> BadInput:
    """One draw for all rows: the model counts its prior N times, the guide its density once."""

    def scalar(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(param("z_loc", 0.1), 0.5))

    return BadInput(_local, scalar, _data(), GuideError, ("site 'z'", r"20"))


def _column_guide() -> BadInput:
    def column(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal(param("z_loc", torch.zeros(SIZE, 1)), 0.5))

    return BadInput(_local, column, _data(), GuideError, ("site 'z'", r"20"))


def _discrete() -> BadInput:
    def mixture(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)

    names = ("site 'z'", "Bernoulli", "discrete", "sum it out")
    return BadInput(mixture, None, _data(), GuideError, names)


def _no_rows() -> BadInput:
    x, y = _data()

    def closed() -> None:
        model(x, y)

    names = ("batch_size needs rows", "data=")
    return BadInput(closed, None, (), DataError, names, {"batch_size": 5})


def _arguments() -> BadInput:
    names = ("model takes", "1 positional argument", "'y'", "args=")
    return BadInput(model, None, _data()[:1], DataError, names)


def _guide_arguments() -> BadInput:
    def short(x: Tensor) -> None:
        guide(x, x)

    return BadInput(model, short, _data(), DataError, ("guide takes", "same arguments"))


def _guide_class() -> BadInput:
    return BadInput(
        model, AutoNormal, _data(), GuideError, ("class AutoNormal", r"AutoNormal\(model\)")
    )


def _guide_samples_data() -> BadInput:
    def greedy(x: Tensor, y: Tensor) -> None:
        guide(x, y)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0))

    return BadInput(model, greedy, _data(), GuideError, ("site 'y'", "observed in the model"))


def _event_shapes() -> BadInput:
    def vector(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[..., :1] * x, 1.0), obs=y)

    def naked(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(param("loc", [0.1, 0.2]), 1.0))

    return BadInput(
        vector, naked, _data(), GuideError, ("site 'w'", r"event shape \(2,\)", "to_event")
    )


def _text() -> BadInput:
    import numpy as np

    names = ("dtype", "numbers")
    return BadInput(model, None, (np.array(["a", "b"]), torch.zeros(2)), DataError, names)


def _no_latents() -> BadInput:
    def fixed(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return BadInput(fixed, None, _data(), ModelError, ("no latent site",))


def _overflow() -> BadInput:
    def degenerate(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(1e200 * w * x, 1.0), obs=y)

    return BadInput(degenerate, None, _data(), ModelError, ("site 'y'", "not finite", "scale"))


MORE: dict[str, Callable[[], BadInput]] = {
    "NaN in x": _nan_in_x,
    "y is a column": _column,
    "x is a column": _column_mean,
    "x and y are columns": _columns,
    "guide draws one value for all rows": _scalar_guide,
    "guide draws a column": _column_guide,
    "discrete latent": _discrete,
    "batch_size without rows": _no_rows,
    "wrong number of arguments": _arguments,
    "guide takes other arguments": _guide_arguments,
    "guide is a class": _guide_class,
    "guide samples the data": _guide_samples_data,
    "event shapes differ": _event_shapes,
    "text": _text,
    "no latents": _no_latents,
    "density overflows": _overflow,
}
