"""Wrong answers that the checks of a posterior once gave, each as small as it can be."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.errors import ModelError

pytestmark = pytest.mark.usefixtures("isolated")


def series(y: Tensor) -> None:
    """Each value is drawn around the *given* one before it, not around the one just drawn."""
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    before = torch.cat([torch.zeros(1), y[:-1]])
    pyro.sample("y", dist.Normal(phi * before, 1.0).to_event(1), obs=y)


def prior_of_series(y: Tensor) -> None:
    pyro.sample("phi", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("method", ["iwae", "ais"])
def test_sandwich_refuses_what_it_cannot_simulate(method: str) -> None:
    """Its upper bound needs an exact posterior draw, and there was none."""
    with pytest.raises(ModelError, match="'y' has another density"):
        pvi.sandwich(series, prior_of_series, torch.ones(9), method=method, seed=0)


def encoder_of_series(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("phi", dist.Normal(loc + y.mean(), 1.0))


def test_sleep_refuses_what_it_cannot_simulate() -> None:
    """Its latents would be no draws given the simulated data."""
    with pytest.raises(ModelError, match="'y' has another density"):
        pvi.ReweightedWakeSleep(4, insomnia=0.5).differentiable_loss(series, encoder_of_series, torch.ones(9))
