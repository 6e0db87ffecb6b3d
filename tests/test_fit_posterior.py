"""Fits of conjugate models agree with the closed form, and know nothing of each other."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from pvi.guides import MeanField
from tests.scenarios import (
    local_model,
    mean_model,
    mean_posterior,
    mean_se,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")


class TestPosterior:
    """Conjugate normal mean: fits agree with the closed form."""

    size, fits, steps = 256, 5, 400

    @pytest.mark.parametrize("batch_size", [None, 32])
    def test_conjugate(self, batch_size: int | None) -> None:
        """Means and sds of 5 fits; tolerance: 3 standard errors over the fits.

        A fit errs by the noise of its draws and batches that the falling rate has not averaged out;
        fits with other seeds err independently, so their spread is the standard error. It must be
        small against what a wrong weight does: without N / B the sd is sqrt(8) times too large.
        To the log sd come 0.02: Adam divides a skewed gradient by its own size, which leaves about
        one percent.
        """
        y = randn(self.size) * 1.1 + 0.7
        options = {"batch_size": batch_size, "steps": self.steps}
        fitted = [pvi.fit(mean_model, data=y, seed=s, **options) for s in range(self.fits)]
        found = [self.parameters(fit) for fit in fitted]
        mean, sd = mean_posterior(y)
        expected = torch.tensor([mean, math.log(sd)])
        values, se = mean_se(torch.tensor(found))
        assert float(se[0]) < 0.1 * sd and float(se[1]) < 0.1
        assert bool(((values - expected).abs() < 3 * se + torch.tensor([1e-4, 0.02])).all())

    @staticmethod
    def parameters(fit: pvi.Fit) -> tuple[float, float]:
        loc, scale = fit.guide.loc.mu, fit.guide.scale.mu  # type: ignore[attr-defined]
        return float(loc.detach()), float(scale.detach().log())

    def test_local_rows(self) -> None:
        """Every row finds its own posterior N(x / 2, 1/2) although each step sees 16 of 64."""
        x = randn(64)
        options = {"batch_size": 16, "epochs": 150, "seed": 0}
        fit = pvi.fit(local_model, data=x, **options)
        draws = fit.posterior.sample(4000, seed=1)["z"]
        sd = math.sqrt(0.5)
        # 64 rows: |error| of a mean over 4,000 draws < 4.5 se with probability 0.9996, plus 0.1 sd
        # for the optimiser: 150 visits of a row at rates from 0.05 to 0.00005
        tolerance = 4.5 * sd / math.sqrt(4000) + 0.1 * sd
        assert float((draws.mean(0) - x / 2).abs().max()) < tolerance
        assert float((draws.std(0) / sd - 1).abs().max()) < 4.5 / math.sqrt(8000) + 0.15

    def test_subsampling_by_the_model(self) -> None:
        """`subsample_size=` in the model keeps working, without batch_size."""

        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(y), subsample_size=32) as rows:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

        y = randn(self.size) * 1.1 + 0.7
        mean, sd = mean_posterior(y)
        fit = pvi.fit(model, data=y, steps=self.steps, seed=0)
        loc, log_scale = self.parameters(fit)
        assert abs(loc - mean) < 0.5 * sd  # 5 times the spread allowed above
        assert abs(log_scale - math.log(sd)) < 0.5  # against log sqrt(8) = 1.04


class TestConvergence:
    """A fit that claims convergence is near; one that is near has proved so and may end."""

    def test_is_not_claimed_far_from_the_optimum(self) -> None:
        """Poisson regression with wide priors: at first a step's noise hides that the bound rises.

        Either the fit gets there, or it says that it did not. The truth is the normal at the mode:
        with counts of 20 to 200 the posterior is normal to a few percent of an sd.
        """
        t = torch.linspace(-1.67, 1.67, 40)
        design = torch.stack([t**k for k in range(4)], 1)
        y = (design @ torch.tensor([4.29, 1.25, 0.07, -0.23])).exp().round()

        width = torch.tensor([20.0, 10.0, 10.0, 10.0])

        def model(design: Tensor, y: Tensor) -> None:
            b = pyro.sample("b", dist.Uniform(-width, width).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Poisson((design * b).sum(-1).exp()), obs=y)

        mode = torch.tensor([4.0, 0.0, 0.0, 0.0])
        for _ in range(50):  # Newton
            rate = (design @ mode).exp()
            precision = design.T @ (design * rate.unsqueeze(1))
            mode = mode + torch.linalg.solve(precision, design.T @ (y - rate))
        sd = torch.linalg.inv(precision).diagonal().sqrt()
        best = precision.diagonal().rsqrt()  # sd of a mean-field guide
        guide = MeanField(model)

        def near(sd: Tensor) -> bool:
            noise = torch.randn(4000, 4)
            draws = guide.latents["b"].transform(guide.loc.b + guide.scale.b * noise).detach()
            close = (draws.mean(0) - mode).abs() < 2 * sd
            return bool(close.all() and (draws.std(0) < 2 * sd).all())

        stop = [lambda step: step.step % 100 == 0 and near(0.55 * best)]
        options = {"optimizer": "adam", "callbacks": stop, "seed": 0}
        fit = pvi.fit(model, guide, data=(design, y), **options)
        assert len(fit.history) > 600  # it is far at first
        assert near(sd) or not fit.converged

    def test_is_not_claimed_in_a_narrow_valley(self) -> None:
        """An uncentred covariate correlates intercept and slope by -0.99: Adam creeps along.

        The best mean-field bound is known: log Z - (sum log precision_jj - log det precision) / 2.
        """
        x = 100.0 + 15.0 * randn(60)
        design = torch.stack([torch.ones(60), x], 1)
        y = design @ torch.tensor([26.0, 0.6]) + 18.0 * randn(60, seed=1)

        def model(design: Tensor, y: Tensor) -> None:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 100.0).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal((design * b).sum(-1), 18.0), obs=y)

        cov = 18.0**2 * torch.eye(60) + 100.0**2 * design @ design.T
        log_z = float(dist.MultivariateNormal(torch.zeros(60), cov).log_prob(y))
        precision = design.T @ design / 18.0**2 + torch.eye(2) / 100.0**2
        best = log_z - 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
        seen: list[float] = []

        def near(step: Any) -> bool:
            seen.append(step.bound)
            return len(seen) >= 400 and sum(seen[-200:]) / 200 > best - 1.0

        fit = pvi.fit(model, data=(design, y), optimizer="adam", callbacks=[near], seed=0)
        assert len(seen) > 500  # it was far
        bounds = torch.tensor(fit.history["bound"][-200:])
        se = float(bounds.std()) / math.sqrt(200)
        assert float(bounds.mean()) < best + 3 * se
        assert float(bounds.mean()) > best - 1.0 - 3 * se or not fit.converged

    def test_own_optimizer(self) -> None:
        y = randn(40) + 1.0
        optimizer = lambda params: torch.optim.Adam(params, lr=0.05)  # noqa: E731
        fit = pvi.fit(mean_model, data=y, optimizer=optimizer, steps=400, seed=0)
        assert set(fit.history["lr"]) == {0.05}
        mean, sd = mean_posterior(y)
        # Adam at a constant rate keeps jumping: its spread is about sqrt(rate * noise / curvature)
        assert abs(float(fit.guide.loc.mu.detach()) - mean) < 2 * sd  # type: ignore[attr-defined]


class TestIsolation:
    """Parameters belong to their fit."""

    @staticmethod
    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(param("loc", 0.0), positive("scale", 1.0)))

    @pytest.mark.parametrize("batch_size", [None, 8])
    def test_two_fits(self, batch_size: int | None) -> None:
        """The same guide function and parameter names, other data: neither sees the other."""
        options = {"batch_size": batch_size, "steps": 100, "lr": 0.2}
        one = pvi.fit(mean_model, self.guide, data=randn(40) + 3.0, seed=0, **options)
        before = one.posterior.sample(500, seed=1)["mu"]
        two = pvi.fit(mean_model, self.guide, data=randn(40) - 3.0, seed=0, **options)
        assert torch.equal(one.posterior.sample(500, seed=1)["mu"], before)
        assert float(before.mean()) > 2.0
        assert float(two.posterior.sample(500, seed=1)["mu"].mean()) < -2.0
        assert len(pyro.get_param_store()) == 0

    def test_shared_module(self) -> None:
        """One guide object fitted twice: the first posterior keeps its values."""
        guide = AutoNormal(mean_model)
        one = pvi.fit(mean_model, guide, data=randn(40) + 3.0, steps=100, lr=0.2, seed=0)
        before = one.posterior.sample(500, seed=1)["mu"]
        two = pvi.fit(mean_model, guide, data=randn(40) - 3.0, steps=100, lr=0.2, seed=0)
        assert torch.equal(one.posterior.sample(500, seed=1)["mu"], before)
        assert float(two.posterior.sample(500, seed=1)["mu"].mean()) < -2.0

    def test_guides_of_two_fits(self) -> None:
        """An objective on each fit's guide sees that guide, and leaves it as it is."""
        data = [randn(40) + 3.0, randn(40) - 3.0]
        options = {"steps": 100, "lr": 0.2, "seed": 0}
        fits: list[Any] = [pvi.fit(mean_model, data=y, **options) for y in data]
        states = [{n: v.clone() for n, v in f.guide.state_dict().items()} for f in fits]
        pairs = zip(fits, data, strict=True)
        bounds = [pvi.ELBO(100).bound(mean_model, f.guide, y) for f, y in pairs]
        for fit, state, bound in zip(fits, states, bounds, strict=True):
            assert bound == pytest.approx(fit.history["bound"][-50:].mean(), abs=2.0)
            for name, value in fit.guide.state_dict().items():
                assert torch.equal(value, state[name]), name

    def test_the_users_store_is_untouched(self) -> None:
        mine = pyro.param("loc", torch.tensor(7.0))
        pvi.fit(mean_model, self.guide, data=randn(40), batch_size=8, steps=20, seed=0)
        assert list(pyro.get_param_store().keys()) == ["loc"]
        assert float(mine.detach()) == 7.0
        assert float(pyro.param("loc").detach()) == 7.0

    def test_same_seed_same_fit(self) -> None:
        options = {"data": randn(40), "batch_size": 8, "steps": 30}
        one, two, other = (
            pvi.fit(mean_model, seed=s, **options).history["loss"] for s in (3, 3, 4)
        )
        assert (one == two).all()
        assert (one != other).any()

    def test_seed_leaves_the_callers_random_state(self) -> None:
        state = torch.get_rng_state()
        pvi.fit(mean_model, data=randn(40), batch_size=8, steps=5, seed=3)
        assert torch.equal(torch.get_rng_state(), state)


class TestInterrupt:
    @pytest.mark.parametrize("batch_size", [None, 8])
    def test_returns_what_is_there(self, batch_size: int | None) -> None:
        def stop(step: Any) -> None:
            if step.step == 50:
                raise KeyboardInterrupt

        options = {"batch_size": batch_size, "optimizer": "adam", "callbacks": [stop], "seed": 0}
        fit = pvi.fit(mean_model, data=randn(40) + 3.0, **options)
        assert (len(fit.history), fit.converged, fit.reason) == (50, False, "interrupted")
        assert fit.posterior.sample(5, seed=0)["mu"].shape == (5,)
        assert len(pyro.get_param_store()) == 0

    def test_guide_works_on_all_the_data_afterwards(self) -> None:
        """The guide's plates have their full size again after a fit on batches."""
        for make in (MeanField, AutoNormal):
            fit = pvi.fit(
                local_model, make(local_model), data=randn(40), batch_size=8, steps=9, seed=0
            )
            assert fit.posterior.sample(5, seed=0)["z"].shape == (5, 40)

    def test_a_callback_stops(self) -> None:
        options = {"optimizer": "adam", "callbacks": [lambda s: s.step == 7], "seed": 0}
        fit = pvi.fit(mean_model, data=randn(40), **options)
        assert (len(fit.history), fit.converged) == (7, False)
