"""Which fits the deterministic route may take: it maximises the very bound, or steps aside."""

from collections import namedtuple
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.fit.deterministic import Deterministic, smooth_density
from pvi.fit.double import doubled
from pvi.fit.fixed_draws import SINGLY, FixedDraws
from pvi.guides import Flow, FullRank, LowRank, MatrixNormal, MeanField, Structured
from pvi.guides.mode import LogJoint
from tests.scenarios import isolated, mean_model, mean_posterior, randn

pytestmark = pytest.mark.usefixtures("isolated")
KEEP: Any = torch.arange(8) > 2


def penalised(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pvi.penalty("pull", 50.0 * (mu - 3.0) ** 2)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked(y: Tensor) -> None:
    with pyro.plate("data", len(y)), pyro.poutine.mask(mask=KEEP):
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def masked_by_itself(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(KEEP))
        pyro.sample("y", dist.Normal(z, 1.0).mask(KEEP), obs=y)


def partly_observed(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=KEEP)


def matrix(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.sum((-1, -2)), 1.0), obs=y)


def by_hand(y: Tensor) -> None:
    """Python looks at the draw, so that each is run on its own."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    slope = 1.5 if float(mu.detach()[0]) > 50.0 else 1.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((slope * mu.sum()).exp()), obs=y.abs().round())


def taken(model: Any, guide: Any = None, **options: Any) -> bool:
    """Whether the first steps are those of this route."""
    stop = [lambda step: step.step == 3]
    fit = pvi.fit(model, guide, randn(8), callbacks=stop, seed=0, **options)
    return "num_draws" in fit.history


class TestSteppingAside:
    @pytest.mark.parametrize(
        "model", [penalised, masked, masked_by_itself, partly_observed], ids=lambda f: f.__name__
    )
    def test_another_bound(self, model: Any) -> None:
        """Penalties count in the loss alone; entries that are masked out have no entropy."""
        assert not taken(model)
        with pytest.raises(pvi.FitError, match=r"pvi.penalty|masks elements"):
            pvi.fit(model, data=randn(8), steps=3, seed=0).linear_response()

    @pytest.mark.parametrize("guide", [MatrixNormal, Flow])
    def test_other_normals(self, guide: Any) -> None:
        assert not taken(matrix, guide)
        with pytest.raises(pvi.FitError, match="normal families"):
            pvi.fit(matrix, guide, randn(8), steps=3, seed=0).linear_response()

    def test_subclass(self) -> None:
        """It may draw otherwise than its class."""

        class Shifted(MeanField):
            def _distribution(self, latent: Any, past: Any) -> Any:
                loc, scale = self._loc_scale(latent)
                return dist.Normal(loc + 5.0, scale)

        assert not taken(mean_model, Shifted) and taken(mean_model, MeanField)

    def test_frozen(self) -> None:
        guide = MeanField(mean_model).setup(randn(8))
        guide.loc.mu_unconstrained.requires_grad_(False)
        start = guide.loc.mu.detach().clone()
        assert not taken(mean_model, guide) and torch.equal(guide.loc.mu, start)

    def test_kl_counts(self) -> None:
        """N(0, 2^2), 8 data and 4 KL(N(mu, 1), N(3, 1)): all of them quadratic."""

        def model(y: Tensor) -> None:
            mean_model(y)
            mu = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pvi.kl("more", dist.Normal(mu, 1.0), dist.Normal(torch.tensor(3.0), 1.0), scale=4.0)

        guide = MeanField()
        fit = pvi.fit(model, guide, randn(8), seed=0)
        assert "num_draws" in fit.history and fit.converged
        assert float(guide.loc.shift.detach()) == pytest.approx(12.0 / 5.0, abs=1e-4)
        assert float(guide.scale.shift.detach()) == pytest.approx(5.0**-0.5, abs=1e-4)


class TestValue:
    """The density and the entropy make up the ELBO, for guides far from the posterior."""

    @pytest.mark.parametrize("family", [MeanField, FullRank, LowRank, Structured])
    def test_is_the_bound(self, family: Any) -> None:
        def model(x: Tensor) -> None:
            sigma = pyro.sample("sigma", dist.Gamma(2.0, 2.0))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            with pyro.poutine.scale(scale=0.7), pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(p[..., 0], sigma))
                k = pyro.sample("k", dist.Bernoulli(p[..., 1]), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

        x = randn(4)
        guide = family(model).setup(x)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            points = guide.transport(torch.randn(400, guide.noise_size, generator=generator))
            mine = LogJoint(model, guide.layout, (x,), {}).many(points) + guide.entropy()
        elbo = pvi.ELBO(20)
        other = torch.tensor([elbo.bound(model, guide, x) for _ in range(20)])
        error = (mine.var() / len(mine) + other.var() / len(other)).sqrt()
        assert float((mine.mean() - other.mean()).abs()) < 4.0 * float(error)


class TestPrecision:
    def test_products_in_double(self) -> None:
        """A product of the data and a draw needs both in one precision."""
        seen = set()

        def model(x: Tensor, y: Tensor) -> None:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            seen.add(b.dtype)
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

        with isolated(torch.float32):
            pvi.fit(model, data=(randn(8, 2), randn(8)), seed=0)
        assert torch.float64 in seen

    def test_single_precision_model(self) -> None:
        """A constant of the model that can't be multiplied by double numbers."""
        x = randn(8, 2).float()

        def model(y: Tensor) -> None:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)

        with isolated(torch.float32):
            fit = pvi.fit(model, data=randn(8), seed=0)
            assert fit.converged and "num_draws" in fit.history
            with pytest.raises(pvi.FitError, match="float64 draws"):
                fit.linear_response()

    def test_arguments(self) -> None:
        """Containers of the user's own keep their kind."""
        pair, kind = namedtuple("pair", "x y"), type("Settings", (dict,), {})
        one = torch.ones(1, dtype=torch.float32)
        found = doubled((pair(one, 2), [one], kind(x=one), {"x": one.int()}))
        assert isinstance(found[0], pair) and found[0].x.dtype == torch.float64
        assert found[1][0].dtype == torch.float64 and isinstance(found[2], kind)
        assert found[3]["x"].dtype == torch.int32


class TestCost:
    def test_one_by_one(self) -> None:
        """Thousands of runs in each evaluation would take minutes."""
        y = randn(8)
        guide = FullRank(by_hand).setup(y)
        density = smooth_density(by_hand, guide.layout, (y,), {})
        assert density is not None and not density.together
        assert FixedDraws(guide, density).most == SINGLY

    def test_large_between_sites(self) -> None:
        """A Gaussian process keeps matrices that are no sites."""
        x = randn(100, 1)

        def process(y: Tensor) -> None:
            length = pyro.sample("length", dist.Gamma(2.0, 2.0))
            kernel = torch.exp(-0.5 * ((x - x.T) / length) ** 2) + torch.eye(len(y))
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), kernel), obs=y)

        y = randn(100)
        guide = MeanField(process).setup(y)
        density = smooth_density(process, guide.layout, (y,), {})
        assert density is not None and 20_000 < density.kept < 200_000
        assert FixedDraws(guide, density).most < 2e7 / 4_000


def test_optimism_is_that_of_the_best_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """With restarts the promise is of the mode that is kept, not of the last one tried."""
    promised = []
    measure = Deterministic._measure

    def spy(self: Deterministic) -> str:
        promised.append(self._promised)
        return measure(self)

    monkeypatch.setattr(Deterministic, "_measure", spy)

    def two(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        peaks = torch.stack([dist.Normal(at, 0.1).log_prob(z) for at in (2.0, -2.0)], -1)
        pyro.factor("peaks", (peaks + torch.tensor([2.0, 1.0]).log()).logsumexp(-1))

    fit = pvi.fit(two, data=randn(1), restarts=8, seed=0)
    assert len(fit.modes) == 2 and promised == [fit.modes[0].bound]


def test_second_fit_of_a_guide() -> None:
    """A guide that was trained on other data ends where a new one does."""
    guide = MeanField()
    for y in (randn(30) + 5.0, randn(30, seed=1)):
        fit = pvi.fit(mean_model, guide, y, seed=0)
        mean, sd = mean_posterior(y)
        assert fit.converged and float(guide.loc.mu.detach()) == pytest.approx(mean, abs=1e-3)
        assert float(guide.scale.mu.detach()) == pytest.approx(sd, rel=1e-3)


def test_no_optimum() -> None:
    """Separable data and a flat prior: the slope has no end, and the fit says so."""
    x = torch.linspace(-2.0, 2.0, 20)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), (2,)))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=b[0] + b[1] * x), obs=y)

    fit = pvi.fit(model, data=(x, (x > 0).to(x)), seed=0)
    assert not fit.converged and "may have no maximum" in fit.reason
