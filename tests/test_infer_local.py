"""Latents of new rows: learned from their observations, with all else as it was."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.errors import DataError, FitError, GuideError
from pvi.guides import Delta, Flow, Group, LowRank, MeanField, Structured
from tests.scenarios import randn

pytestmark = pytest.mark.usefixtures("isolated")

NOISE, STEPS = 0.5, 400


def model(x: Tensor, y: Tensor) -> None:
    """Two measurements of each row's z; given mu, z has precision 1 + 2 / NOISE^2 = 9."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = 1.0 + torch.randn(40, dtype=torch.float64)
    return z + NOISE * torch.randn_like(z), z + NOISE * torch.randn_like(z)


def fitted(data: tuple[Tensor, Tensor], guide: type = MeanField) -> pvi.Fit:
    return pvi.fit(model, guide, data, steps=400, seed=0)


@pytest.mark.parametrize("guide", [MeanField, Structured, lambda: Group({"mu": MeanField})])
def test_rows_have_their_own_posterior(data: tuple[Tensor, Tensor], guide: type) -> None:
    """E[z | x, y, mu] = (mu + 4 (x + y)) / 9 at the mean of mu, sd 1/3."""
    fit = fitted(data, guide() if not isinstance(guide, type) else guide)
    before = {name: value.clone() for name, value in fit.guide.state_dict().items()}
    x = torch.tensor([0.0, 3.0, 5.0])
    torch.manual_seed(1)
    posterior = fit.posterior.on((x, x), infer_local=STEPS)
    draws = posterior.sample(4000, seed=0)
    expected = (draws["mu"].mean() + 8.0 * x) / 9.0
    # the optimiser's noise at its last rates: some hundredths of the sd of 1/3
    assert float((draws["z"].mean(0) - expected).abs().max()) < 0.15 / 3
    assert float((draws["z"].std(0) * 3.0 - 1.0).abs().max()) < 0.15
    old = fit.posterior.sample(4000, seed=0)["mu"]
    assert float(old.mean()) == pytest.approx(float(draws["mu"].mean()), abs=4 * 0.2 / 4000**0.5)
    for name, value in fit.guide.state_dict().items():
        assert torch.equal(value, before[name]), name
    predicted = fit.posterior.predict(x, x, infer_local=STEPS, num_draws=4000, seed=0)["x"]
    assert predicted.shape == (4000, 3)
    assert float(predicted.std(0).mean()) == pytest.approx(math.hypot(1 / 3, NOISE), rel=0.05)


def test_as_many_rows_as_before(data: tuple[Tensor, Tensor]) -> None:
    """New rows of the same number don't take the training rows' latents."""
    fit, x = fitted(data), torch.full((40,), 4.0)
    draws = fit.posterior.on((x, x), infer_local=STEPS).sample(2000, seed=0)
    expected = (float(draws["mu"].mean()) + 32.0) / 9.0
    assert float((draws["z"].mean(0) - expected).abs().max()) < 0.15 / 3 + 4 / 3 / 2000**0.5


def test_plates_of_other_things(data: tuple[Tensor, Tensor]) -> None:
    """A plate that has as many elements as the data have rows by chance is not theirs."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("features", 6):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    fit = pvi.fit(model, MeanField, (data[0][:6], data[1][:6]), steps=50, seed=0)
    before = fit.posterior.sample(100, seed=0)["w"].mean(0)
    for rows in (3, 6):
        new = torch.full((rows,), 9.0)
        draws = fit.posterior.on((new, new), infer_local=50).sample(100, seed=0)
        torch.testing.assert_close(draws["w"].mean(0), before, atol=0.5, rtol=0)
        assert draws["z"].shape == (100, rows)
        assert float(draws["z"].mean()) > 2.0


def test_sites_named_like_weights(data: tuple[Tensor, Tensor]) -> None:
    """The networks of a flow over the globals stay as they were."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            bias = pyro.sample("bias", dist.Normal(a + b, 1.0))
            pyro.sample("x", dist.Normal(bias, NOISE), obs=x)

    flow = Flow(transforms=3, hidden_features=(8,), randperm=True)
    fit = pvi.fit(model, Group({"bias": MeanField, ...: flow}), data[0], steps=100, seed=0)
    new: Any = fit.posterior.on(torch.zeros(3), infer_local=5).guide
    old, found = fit.guide.state_dict(), new.state_dict()
    weights = [name for name in old if ".flow." in name]  # and the random order of their inputs
    assert weights
    assert all(torch.equal(old[name], found[name]) for name in weights)


def test_points(data: tuple[Tensor, Tensor]) -> None:
    fit, x = fitted(data, Delta), torch.tensor([0.0, 3.0])
    draws = fit.posterior.on((x, x), infer_local=STEPS).sample(2, seed=0)
    expected = (draws["mu"][0] + 8.0 * x) / 9.0
    torch.testing.assert_close(draws["z"][0], expected, atol=0.02, rtol=0)


def test_refusals(data: tuple[Tensor, Tensor]) -> None:
    x = randn(3)
    with pytest.raises(GuideError, match="LowRank ties the elements of plate 'data' together"):
        fitted(data, LowRank).posterior.predict(x, x, infer_local=3)
    posterior = fitted(data).posterior
    with pytest.raises(DataError, match=r"other latents \(\['y'\]\)"):
        posterior.predict(x, infer_local=3)
    with pytest.raises(FitError, match="infer_local must be a whole number of steps"):
        posterior.predict(x, x, infer_local=0)

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("mu", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    by_hand = pvi.fit(model, guide, data, steps=2, seed=0).posterior
    with pytest.raises(GuideError, match=r"needs one of pvi\.guides"):
        by_hand.predict(x, x, infer_local=3)
