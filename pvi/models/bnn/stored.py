"""A fitted estimator as tensors and plain data, for pickles and for folders."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from pvi.models.bnn.fitted import Fitted, Units
from pvi.models.bnn.linear import LinearPosterior
from pvi.models.bnn.priors import FanIn, Normals

State = dict[str, Any]


def state_of(estimator: Any) -> State:
    """All that fitting has made of an estimator.

    Args:
        estimator: a fitted `BNNRegressor` or `BNNClassifier`.
    """
    fitted: Fitted = estimator._fitted
    attributes = {k: v for k, v in vars(estimator).items() if k.endswith("_") and k != "fit_"}
    memory = None
    if estimator._memory is not None:
        prior, noise = estimator._memory
        pair = None if noise is None else (noise.loc, noise.scale)
        memory = {"weights": {n: tuple(x) for n, x in prior.values.items()}, "noise": pair}
    return {
        "attributes": attributes,
        "units": vars(fitted.units),
        "head": None if fitted.head is None else vars(fitted.head),
        "factor": fitted.factor,
        "memory": memory,
        "fit": _files(fitted.fit),
    }


def restore(estimator: Any, state: State) -> None:
    """Make an estimator with the same arguments what the fitted one was.

    Args:
        estimator: with the constructor's arguments alone.
        state: of `state_of`.
    """
    for name, value in state["attributes"].items():
        setattr(estimator, name, value)
    memory = state["memory"]
    estimator._memory = None
    if memory is not None:
        noise = None if memory["noise"] is None else dist.LogNormal(*memory["noise"])
        estimator._memory = Normals(memory["weights"], FanIn()), noise
    units = Units(**state["units"])
    fit = _load(estimator, units, state["fit"])
    head = None if state["head"] is None else LinearPosterior(**state["head"])
    estimator._fitted = Fitted(fit, units, head, state["factor"])
    estimator.fit_ = fit


def _files(fit: pvi.Fit) -> dict[str, Tensor]:
    """The files of `Fit.save` as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        fit.save(path)
        raw = {file.name: bytearray(file.read_bytes()) for file in path.iterdir()}
    return {name: torch.frombuffer(content, dtype=torch.uint8) for name, content in raw.items()}


def _load(estimator: Any, units: Units, files: Mapping[str, Tensor]) -> pvi.Fit:
    """The fit, on two rows of zeros in the place of the training data."""
    inputs, targets = np.zeros((2, len(units.x_mean))), np.zeros(2)
    rows = estimator._rows(
        Units(np.zeros_like(units.x_mean), np.ones_like(units.x_sd)), inputs, targets
    )
    model = estimator._model(len(units.x_mean))
    program = estimator._recipe(estimator.kl_weight_).program(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        path.mkdir()
        for name, content in files.items():
            (path / Path(name).name).write_bytes(content.numpy().tobytes())
        return pvi.load(path, program, pvi.guides.MeanField(), rows)


def plain(value: Any) -> Any:
    """What `pvi.fit.storage` can write; `from_plain` gives the same value back."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            return {"array": torch.from_numpy(value.copy())}
        return {"list": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {"pairs": [[plain(k), plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [plain(x) for x in value]}
    return value


def from_plain(value: Any) -> Any:
    """The inverse of `plain`."""
    if not isinstance(value, Mapping):
        return value
    if "array" in value:
        return value["array"].numpy()
    if "list" in value:
        return np.array(value["list"], dtype=value["dtype"])
    if "pairs" in value:
        return {from_plain(k): from_plain(v) for k, v in value["pairs"]}
    return tuple(from_plain(x) for x in value["tuple"])
