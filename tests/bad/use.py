"""Mistakes in the use of a fit."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pvi
from pvi.errors import DataError, PviError
from tests.bad.base import BadInput, row
from tests.scenarios import randn

GROUP = "the posterior"


def misuse(
    name: str,
    use: Callable[[pvi.Fit], Any],
    error: type[Exception],
    culprit: str,
    *names: str,
    **call: Any,
) -> None:
    """Enter a wrong call on a fit that is right."""
    row(GROUP, name)(lambda: BadInput(call, error, culprit, names, use=use, pyro=False))


DRAWS = "num_draws must be a whole number >= 1"
misuse("sample(0)", lambda fit: fit.posterior.sample(0), PviError, "num_draws", DRAWS, "got 0")
misuse("sample(-5)", lambda fit: fit.posterior.sample(-5), PviError, "num_draws", "got -5")
misuse("sample(1.5)", lambda fit: fit.posterior.sample(1.5), PviError, "num_draws", "got 1.5")
misuse(
    "predict(num_draws=-1)",
    lambda fit: fit.posterior.predict(num_draws=-1),
    PviError,
    "num_draws",
    DRAWS,
)
misuse("log_weights(0)", lambda fit: fit.posterior.log_weights(0), PviError, "num_draws", DRAWS)
misuse("to_arviz(0)", lambda fit: fit.to_arviz(0), PviError, "num_draws", DRAWS)
misuse("diagnose(0)", lambda fit: fit.diagnose(0), PviError, "num_draws", "num_draws >= 2, got 0")
misuse(
    'sample(seed="a")',
    lambda fit: fit.posterior.sample(5, seed="a"),
    PviError,
    "seed",
    "whole number",
    "got 'a'",
)
misuse(
    "predict without an argument",
    lambda fit: fit.posterior.predict(y=randn(3)),
    DataError,
    "x",
    "'x'",
    "predict",
)
misuse(
    "predict with too many arguments",
    lambda fit: fit.posterior.predict(randn(3), randn(3), randn(3)),
    DataError,
    "predict",
    "predict got 3 arguments",
    r"\['x', 'y'\]",
)
misuse(
    "predict with an unknown argument",
    lambda fit: fit.posterior.predict(z=randn(3)),
    DataError,
    "z",
    "'z'",
    "model takes",
)
misuse(
    "predict with one argument twice",
    lambda fit: fit.posterior.predict(randn(3), x=randn(3)),
    DataError,
    "x",
    "'x'",
    "twice",
)
misuse(
    "predict with rows that differ",
    lambda fit: fit.posterior.predict(randn(3), randn(4)),
    DataError,
    "y",
    "'x' has 3, 'y' has 4",
)
misuse(
    "predict with NaN",
    lambda fit: fit.posterior.predict(torch.full((3,), float("nan"))),
    DataError,
    "x",
    "argument 'x'",
    "NaN in 3 of 3",
)
misuse(
    "predict with a column",
    lambda fit: fit.posterior.predict(randn(3, 1)),
    DataError,
    "x",
    r"'x' has rows of shape \(1,\)",
    r"\(\)",
)
misuse(
    "predict with text",
    lambda fit: fit.posterior.predict(["a", "b"]),
    DataError,
    "x",
    "argument 'x'",
    "dtype",
)


def several(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.sum(-1, keepdim=True) * x, 1.0), obs=y)


for _name, _options, _culprit, _names in (
    ("dims of no site", {"dims": {"v": ["k"]}}, "v", ("dims", "no site 'v'", "'w'")),
    ("dims of a wrong number", {"dims": {"w": ["k", "l"]}}, "w", ("dims", "'w'", "2", "1")),
    ("coords of no dimension", {"coords": {"k": [1, 2]}}, "k", ("coords", "no dimension 'k'")),
    (
        "coords of a wrong length",
        {"dims": {"w": ["k"]}, "coords": {"k": [1, 2, 3]}},
        "k",
        ("coords", "'k'", "3", "2"),
    ),
):
    misuse(
        f"to_arviz with {_name}",
        lambda fit, options=_options: fit.to_arviz(5, seed=0, **options),
        PviError,
        _culprit,
        *_names,
        model=several,
    )
