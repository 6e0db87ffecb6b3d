"""The deterministic route of "auto": exact where the posterior is normal, and honest."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.fit.fixed_draws import Moments
from pvi.fit.linear_response import normal_with
from pvi.guides import FullRank, LowRank, MeanField, Structured
from pvi.optim.draws import matched_normals
from pvi.optim.lbfgs import Search
from tests.linear import regression, regression_log_z
from tests.scenarios import isolated, local_model, mean_model, normal_log_z, randn

pytestmark = pytest.mark.usefixtures("isolated")

X = torch.stack(
    [torch.ones(60), 100.0 + 15.0 * randn(60)], 1
).double()  # correlates the weights by -0.99
Y = X @ torch.tensor([26.0, 0.6]).double() + 18.0 * randn(60, seed=1)
PRECISION = X.T @ X / 18.0**2 + torch.eye(2) / 100.0**2
MEAN, COVARIANCE = torch.linalg.solve(PRECISION, X.T @ Y / 18.0**2), torch.linalg.inv(PRECISION)
OF_DATA = 18.0**2 * torch.eye(60) + 100.0**2 * X @ X.T
LOG_Z = float(dist.MultivariateNormal(torch.zeros(60).double(), OF_DATA).log_prob(Y))


def valley(x: Tensor, y: Tensor) -> None:
    """Written for one draw of the weights: it can't broadcast particles."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 100.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ b, 18.0), obs=y)


def poisson(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((b[0] + b[1] * x).exp()), obs=y)


def moments(fit: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the guide in unconstrained space."""
    noise = matched_normals(4096, fit.guide.noise_size, seed=1)
    with torch.no_grad():
        draws = fit.guide.transport(noise.to(fit.guide.layout.start()))
    return draws.mean(0), draws.T.cov(correction=0)


class TestDraws:
    @pytest.mark.parametrize(("num", "size"), [(64, 16), (64, 3), (64, 40), (2, 5)])
    def test_moments(self, num: int, size: int) -> None:
        draws = matched_normals(num, size, seed=0)
        second = draws.T @ draws / num
        assert draws.shape == (num, size) and float(draws.mean(0).abs().max()) < 1e-15
        assert torch.allclose(second.diagonal(), torch.ones(size, dtype=torch.float64))
        assert torch.allclose(second, torch.eye(size, dtype=torch.float64)) == (num >= 4 * size)

    def test_seeds(self) -> None:
        first, again, other = (matched_normals(8, 2, seed=s) for s in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)


class TestSearch:
    def test_rosenbrock(self) -> None:
        def f(x: Tensor) -> tuple[float, Tensor]:
            x = x.detach().requires_grad_()
            value = (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2
            return float(value.detach()), torch.autograd.grad(value, x)[0]

        point = Search(f, torch.tensor([-1.2, 1.0])).run(1e-8)
        assert torch.allclose(point.x, torch.ones(2), atol=1e-6)

    def test_wall(self) -> None:
        """The function ends at 1, close to its minimum, and the first step goes far beyond."""

        def f(x: Tensor) -> tuple[float, Tensor]:
            if bool((x >= 1.0).any()):
                return math.nan, x * math.nan
            return float((-(-x).log1p() - 50.0 * x).sum()), 1.0 / (1.0 - x) - 50.0

        point = Search(f, torch.zeros(1)).run(1e-6)
        assert float(point.x) == pytest.approx(0.98, abs=1e-6)

    def test_no_finite_start(self) -> None:
        point = Search(lambda x: (math.nan, x), torch.ones(2)).run(1e-6)
        assert not point.is_finite and point.evaluations == 1


class TestGaussian:
    """Fixed draws with the right moments give the exact optimum."""

    @pytest.mark.parametrize("family", [FullRank, Structured, LowRank])
    def test_exact(self, family: Any) -> None:
        fit = pvi.fit(valley, family, data=(X, Y), seed=0)
        mean, covariance = moments(fit)
        sd = COVARIANCE.diagonal().sqrt()
        assert fit.converged, fit.reason
        assert float(((mean - MEAN) / sd).abs().max()) < 2e-3
        assert float((covariance - COVARIANCE).div(torch.outer(sd, sd)).abs().max()) < 4e-3

    def test_mean_field(self) -> None:
        """The optimum of the family: exact means, conditional sds, a known loss of bound."""
        fit = pvi.fit(valley, data=(X, Y), seed=0)
        mean, covariance = moments(fit)
        sd = PRECISION.diagonal().rsqrt()
        assert fit.converged, fit.reason
        assert float(((mean - MEAN) / sd).abs().max()) < 2e-2
        assert torch.allclose(covariance.diagonal().sqrt(), sd, rtol=2e-3)
        best = LOG_Z - 0.5 * float(PRECISION.diagonal().log().sum() - PRECISION.logdet())
        found = fit.history["bound"][~torch.tensor(fit.history["num_draws"]).isnan().numpy()][-1]
        assert found == pytest.approx(best, abs=1e-3)

    def test_single_precision(self) -> None:
        """The fit runs in double: the last digits of such a bound hide the optimum."""
        with isolated(torch.float32):
            fit = pvi.fit(valley, FullRank, data=(X.float(), Y.float()), seed=0)
        assert {p.dtype for p in fit.guide.parameters()} == {torch.float32}
        mean, _ = moments(fit)
        assert float(((mean - MEAN) / COVARIANCE.diagonal().sqrt()).abs().max()) < 1e-2

    def test_plates(self) -> None:
        """A latent for each row: the exact posterior, at the exact evidence."""
        x = randn(12)
        fit = pvi.fit(local_model, data=x, seed=0)
        assert fit.converged, fit.reason
        bound = pvi.ELBO(8).bound(local_model, fit.guide, x)  # the same at each draw
        assert bound == pytest.approx(normal_log_z(x), abs=1e-4)

    def test_bound(self) -> None:
        """The last rows of the history are of fresh draws."""
        y = randn(20)
        fit = pvi.fit(regression, FullRank, data=y, seed=0)
        bounds = fit.history["bound"][-20:]
        error = 4.0 * bounds.std(ddof=1) / math.sqrt(20)
        assert bounds.mean() == pytest.approx(float(regression_log_z(y).sum()), abs=error)
        assert pvi.ELBO(8).bound(regression, fit.guide, y) == pytest.approx(
            float(regression_log_z(y).sum()), abs=1e-4
        )


class TestPoisson:
    x = torch.linspace(-1.5, 1.5, 40).double()
    y = (2.0 + 0.7 * x).exp().round()

    def test_against_adam(self) -> None:
        """Another optimiser on fresh draws finds no higher bound, by 3 standard errors."""
        found, other = (
            pvi.fit(poisson, FullRank, data=(self.x, self.y), seed=0, **options)
            for options in ({}, {"steps": 800})
        )
        assert found.converged, found.reason
        bounds = []
        for fit in (found, other):
            torch.manual_seed(3)
            elbo = pvi.ELBO(64)
            bounds.append(
                torch.tensor([elbo.bound(poisson, fit.guide, self.x, self.y) for _ in range(20)])
            )
        gain = bounds[1] - bounds[0]
        assert float(gain.mean()) < 3.0 * float(gain.std()) / math.sqrt(20) + 1e-3

    def test_draws_double(self) -> None:
        fit = pvi.fit(poisson, FullRank, data=(self.x, self.y), seed=0)
        draws = fit.history["num_draws"]
        counts = sorted({int(n) for n in draws if n == n})
        assert counts == [64 * 2**i for i in range(len(counts))] and len(counts) > 1

    def test_repeatable(self) -> None:
        first, second = (pvi.fit(poisson, data=(self.x, self.y), seed=s).guide for s in (0, 1))
        assert all(map(torch.equal, first.parameters(), second.parameters()))


class TestNoMode:
    """Centred eight schools: the density has no limit where the scale is 0."""

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double()
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double()

    def test_spike_is_left(self) -> None:
        def schools(sigma: Tensor, y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            tau = pyro.sample("tau", dist.HalfCauchy(5.0))
            with pyro.plate("schools", len(y)):
                theta = pyro.sample("theta", dist.Normal(mu, tau))
                pyro.sample("y", dist.Normal(theta, sigma), obs=y)

        fit = pvi.fit(schools, FullRank, data=(self.sigma, self.y), seed=0)
        assert 1.0 < float(fit.posterior.sample(2000, seed=0)["tau"].median()) < 5.0
        assert fit.diagnose(5000, seed=0).verdict == "unreliable"


class TestOtherRoutes:
    """Where the route can't be taken, Adam is, without a word lost."""

    def test_random_model(self) -> None:
        def noisy(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu + 0.1 * torch.randn(len(y)), 1.0), obs=y)

        fit = pvi.fit(noisy, data=randn(5), callbacks=[lambda step: step.step == 30], seed=0)
        assert "num_draws" not in fit.history and len(fit.history) == 30

    @pytest.mark.parametrize(
        "options",
        [
            {"objective": pvi.IWAE(4)},
            {"objective": pvi.BetaELBO(0.5)},
            {"batch_size": 10},
            {"optimizer": "adam"},
            {"lr": 0.01},
            {"steps": 20},
        ],
        ids=str,
    )
    def test_not_asked_for(self, options: dict[str, Any]) -> None:
        stop = [lambda step: step.step == 20]
        fit = pvi.fit(mean_model, data=randn(40), callbacks=stop, seed=0, **options)
        assert "num_draws" not in fit.history

    def test_parameters_of_the_model(self) -> None:
        def model(y: Tensor) -> None:
            scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, scale), obs=y)

        fit = pvi.fit(model, data=randn(5), callbacks=[lambda step: step.step == 9], seed=0)
        assert "num_draws" not in fit.history

    def test_callback_and_interrupt(self) -> None:
        def interrupt(step: Any) -> None:
            raise KeyboardInterrupt

        stopped = pvi.fit(poisson, data=(TestPoisson.x, TestPoisson.y), callbacks=[lambda s: True])
        assert (stopped.reason, len(stopped.history)) == ("stopped by a callback", 1)
        ended = pvi.fit(poisson, data=(TestPoisson.x, TestPoisson.y), callbacks=[interrupt])
        assert (ended.reason, ended.converged) == ("interrupted", False)
        assert ended.posterior.sample(3)["b"].shape == (3, 2)


class TestLinearResponse:
    def test_exact_on_a_gaussian(self) -> None:
        fit = pvi.fit(valley, data=(X, Y), seed=0)
        corrected = fit.linear_response().guide
        sd = COVARIANCE.diagonal().sqrt()
        error = (corrected.covariance().detach() - COVARIANCE) / torch.outer(sd, sd)
        assert float(error.abs().max()) < 1e-6

    def test_own_space(self) -> None:
        """tau's posterior has the tail of a Gamma, not of its logarithm's normal."""

        def model(y: Tensor) -> None:
            tau = pyro.sample("tau", dist.Gamma(1.5, 0.5))
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(y - y + 0.0 * tau + b.sum(-1), 1.0).to_event(1), obs=y)

        y = torch.tensor([0.7]).double()
        fit = pvi.fit(model, data=y, seed=0)
        draws = fit.linear_response().sample(20_000, seed=0)
        own = fit.posterior.sample(20_000, seed=0)["tau"]
        covariance = torch.linalg.inv(torch.eye(2) + torch.ones(2, 2))
        found = draws["b"].T.cov()
        assert torch.allclose(found, covariance.double(), atol=0.03)
        assert float(draws["tau"].mean()) == pytest.approx(float(own.mean()), rel=0.03)
        assert float(draws["tau"].std()) == pytest.approx(1.5**0.5 / 0.5, rel=0.1)

    def test_normal_with(self) -> None:
        """A lognormal of a given mean and sd, known in closed form; an interval without room."""
        centre, sd = torch.tensor([0.3, 0.3, 0.2]).double(), torch.tensor([0.5, 0.5, 1.0]).double()

        def values(u: Tensor) -> Tensor:
            return torch.stack([u[:, 0], u[:, 1].exp(), u[:, 2].sigmoid()], -1)

        wanted = torch.tensor([0.7, 2.0, 0.9]).double()
        m, s = normal_with(values, Moments(centre, sd), wanted)
        mean = math.exp(0.3 + 0.125)
        square = math.log1p((2.0 / mean) ** 2)
        assert m.tolist()[:2] == pytest.approx([0.3, math.log(mean) - 0.5 * square], abs=1e-5)
        assert s.tolist()[:2] == pytest.approx([0.7, square**0.5], abs=1e-5)
        slope = torch.sigmoid(0.2 + 1.0 * randn(100_000).double())
        rate = float((slope * (1.0 - slope)).mean())
        assert float(m[2]) == 0.2 and float(s[2]) == pytest.approx(0.9 / rate, rel=0.01)

    @pytest.mark.parametrize("family", [FullRank, LowRank, Structured])
    def test_families(self, family: Any) -> None:
        """Those that have covariances already say the same, whatever their flat directions."""
        fit = pvi.fit(poisson, family, data=(TestPoisson.x, TestPoisson.y), seed=0)
        _, own = moments(fit)
        found = fit.linear_response().guide.covariance().detach()
        sd = own.diagonal().sqrt()
        assert float(((found - own) / torch.outer(sd, sd)).abs().max()) < 0.03

    def test_not_at_the_optimum(self) -> None:
        fit = pvi.fit(poisson, data=(TestPoisson.x, TestPoisson.y), steps=20, seed=0)
        with pytest.raises(pvi.FitError, match="posterior sds from it"):
            fit.linear_response()

    def test_refused(self) -> None:
        fit = pvi.fit(mean_model, pvi.guides.Delta, data=randn(4), steps=5, seed=0)
        with pytest.raises(pvi.FitError, match="normal families, such as MeanField, not Delta"):
            fit.linear_response()

    def test_needs_a_maximum(self) -> None:
        def two(y: Tensor) -> None:
            a = pyro.sample("a", dist.Normal(0.0, 3.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(a.square(), 0.3), obs=y)

        fit = pvi.fit(two, MeanField(init_loc_fn={"a": 0.0}), data=torch.ones(3), steps=1, lr=1e-6)
        with pytest.raises(pvi.FitError, match="flat or curves upwards"):
            fit.linear_response()


class TestRestarts:
    """Two modes at +-2, of which one holds two thirds of the mass."""

    @staticmethod
    def two(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        at = torch.tensor([[2.0, 0.0], [-2.0, 1.0]], dtype=z.dtype)
        peaks = dist.Normal(at, 0.1).log_prob(z.unsqueeze(-2)).sum(-1)
        pyro.factor("peaks", (peaks + torch.tensor([2.0, 1.0]).log()).logsumexp(-1))

    def test_modes(self) -> None:
        fit = pvi.fit(self.two, data=randn(1), restarts=8, seed=0)
        first, second = fit.modes
        assert torch.allclose(first.mean["z"], torch.tensor([2.0, 0.0]).double(), atol=0.02)
        assert torch.allclose(second.mean["z"], torch.tensor([-2.0, 1.0]).double(), atol=0.02)
        prior = dist.Normal(torch.zeros(2), (9.0 + 0.01) ** 0.5)
        log_z = [float(prior.log_prob(m.mean["z"]).sum()) for m in fit.modes]
        odds = 2.0 * math.exp(log_z[0] - log_z[1])
        assert first.share == pytest.approx(odds / (1.0 + odds), abs=0.01)
        assert torch.allclose(fit.guide.loc.z, first.mean["z"], atol=1e-6)
        found = fit.diagnose(2000, seed=0)
        assert found.verdict == "unreliable" and "has 2 modes" in found.reasons[0]
        assert pvi.fit(self.two, data=randn(1), seed=0).diagnose(2000).verdict == "good"  # unseen

    def test_one_mode(self) -> None:
        fit = pvi.fit(poisson, data=(TestPoisson.x, TestPoisson.y), restarts=3, seed=0)
        (mode,) = fit.modes
        assert mode.share == 1.0 and fit.converged

    def test_refused(self) -> None:
        with pytest.raises(pvi.FitError, match=r"needs the deterministic route.*minibatches"):
            pvi.fit(mean_model, data=randn(40), batch_size=10, restarts=2)
        with pytest.raises(pvi.FitError, match="restarts must be a whole number"):
            pvi.fit(mean_model, data=randn(40), restarts=-1)
