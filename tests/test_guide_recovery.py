"""Exact recovery: each family on a posterior that it contains, against closed forms."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pvi
from pvi.errors import GuideError
from pvi.guides import (
    Delta,
    FullRank,
    Guide,
    Laplace,
    LowRank,
    MatrixNormal,
    MeanField,
    Mixture,
    Structured,
)
from pvi.guides.mode import LogJoint
from tests.scenarios import Program, isolated, nested_model, normal_log_z, randn

PATH: Any = {"gradient": "path"}  # no noise at an optimum that is exact
STEPS = 700


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


def fitted(model: Program, guide: Guide, x: Any, steps: int = STEPS) -> Any:
    objective = pvi.ELBO(8, **PATH)
    return pvi.fit(model, guide, x, objective=objective, steps=steps, seed=0).guide


def regression(cov: Tensor, design: Tensor) -> Program:
    """w ~ N(0, cov), y ~ N(X w, 1): the posterior is normal and correlated."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(len(cov)), cov))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((design * w).sum(-1), 1.0), obs=y)

    return model


def posterior_of(cov: Tensor, design: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    covariance = (cov.inverse() + design.T @ design).inverse()
    return covariance @ design.T @ y, covariance


def two_sites(y: Tensor) -> None:
    """Two sites that the data tie together: mean and covariance in `two_sites_posterior`."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.5, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a.sum(-1) + b, 1.0), obs=y)


def two_sites_posterior(y: Tensor) -> tuple[Tensor, Tensor]:
    prior = torch.tensor([1.0, 1.0, 0.25])
    precision = prior.diag() + len(y) * torch.ones(3, 3)
    covariance = precision.inverse()
    return covariance @ (torch.tensor([0.0, 0.0, 0.125]) + y.sum()), covariance


def close(guide: Any, mean: Tensor, covariance: Tensor, tolerance: float = 1e-3) -> None:
    loc = torch.cat([getattr(guide.loc, n).reshape(-1) for n in guide.latents])
    torch.testing.assert_close(loc, mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(guide.covariance(), covariance, atol=tolerance, rtol=0)


class TestNormal:
    def test_full_rank(self) -> None:
        a, design = randn(3, 3, seed=1), randn(6, 3, seed=2)
        cov, y = a @ a.T + torch.eye(3), randn(6)
        guide = fitted(regression(cov, design), FullRank(), y)
        close(guide, *posterior_of(cov, design, y))

    def test_full_rank_across_sites(self) -> None:
        y = randn(3) + 1.0
        close(fitted(two_sites, FullRank(), y, 900), *two_sites_posterior(y))

    def test_low_rank(self) -> None:
        """Data that say nothing: the posterior is the prior, diagonal plus rank 1."""
        w = torch.tensor([1.0, -0.5, 0.8, 0.3])
        cov = w.outer(w) + torch.tensor([0.5, 0.2, 0.4, 0.3]).diag()
        y, design = torch.zeros(1), torch.zeros(1, 4)
        guide = fitted(regression(cov, design), LowRank(rank=1), y, 1000)
        close(guide, *posterior_of(cov, design, y))

    @pytest.mark.parametrize("seed", [0, 1])
    def test_laplace(self, seed: int) -> None:
        a, design = randn(3, 3, seed=seed), randn(5, 3, seed=seed + 2)
        cov, y = a @ a.T + 0.5 * torch.eye(3), randn(5, seed=seed)
        guide = Laplace(regression(cov, design)).setup(y)
        close(guide, *posterior_of(cov, design, y), tolerance=1e-6)
        guide = Laplace(two_sites).setup(y)
        close(guide, *two_sites_posterior(y), tolerance=1e-6)


class TestStructured:
    @staticmethod
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            cov = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
            theta = pyro.sample("theta", dist.MultivariateNormal(mu, cov))
            pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=x)

    def test_vectors_in_a_plate(self) -> None:
        x = randn(4, 2)
        guide = fitted(self.model, Structured(), x, 900)
        eye, cov = torch.eye(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]])
        marginal = torch.kron(torch.ones(4, 4), eye) + torch.kron(torch.eye(4), cov + eye)
        log_z = float(MultivariateNormal(torch.zeros(8), marginal).log_prob(x.reshape(-1)))
        assert pvi.ELBO(500).bound(self.model, guide, x) == pytest.approx(log_z, abs=1e-3)
        # joint of (mu, theta) a priori, conditioned on x = theta + noise
        read = torch.cat([eye, *[eye] * 4])
        prior = read @ read.T + torch.block_diag(0 * eye, *[cov] * 4)
        gain = prior[:, 2:] @ marginal.inverse()
        mean = gain @ x.reshape(-1)
        sd = (prior - gain @ prior[2:]).diagonal().sqrt()
        found = guide._marginals({})
        for k, expected in enumerate((mean, sd)):
            both = torch.cat([found[n][k].reshape(-1) for n in ("mu", "theta")])
            torch.testing.assert_close(both, expected, atol=1e-3, rtol=0)

    def test_evidence_of_scalars(self) -> None:
        x = randn(6)
        guide = fitted(nested_model, Structured(), x)
        bound = pvi.ELBO(200).bound(nested_model, guide, x)
        assert bound == pytest.approx(normal_log_z(x, shared=1.0), abs=1e-3)

    def test_without_dependence_the_bound_is_lower(self) -> None:
        x = randn(6)
        guide = fitted(nested_model, Structured(depends_on={"z": []}), x, 200)
        assert pvi.ELBO(500).bound(nested_model, guide, x) < normal_log_z(x, shared=1.0) - 0.1


def test_matrix_normal() -> None:
    """W ~ MN(0, U, V) without data in the way: the Kronecker factors come back."""
    a, b = randn(2, 2, seed=1), randn(3, 3, seed=2)
    u, v = a @ a.T + torch.eye(2), b @ b.T + torch.eye(3)
    scale, mean = torch.linalg.cholesky(torch.kron(u, v)), randn(6)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), (2, 3)))
        flat = w.reshape(*w.shape[:-2], 6)
        pyro.sample("y", dist.MultivariateNormal(flat, scale_tril=scale), obs=y)

    guide: Any = fitted(model, MatrixNormal(), mean, 1000)
    rows, columns = guide.rows.w, guide.columns.w
    found = torch.kron(rows @ rows.T, columns @ columns.T)
    torch.testing.assert_close(found, torch.kron(u, v), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(guide.loc.w.reshape(-1), mean, atol=1e-3, rtol=0)


class TestModes:
    @staticmethod
    def logistic(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.5).to_event(1))
        with pyro.plate("data", len(y)):
            logits = (x * w).sum(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def test_logistic_regression(self) -> None:
        """The mode solves X'(y - p) = w / s^2, the Hessian is X' p (1 - p) X + 1 / s^2."""
        x, y = randn(20, 2), (randn(20, seed=1) > 0).double()
        guide: Any = Laplace(self.logistic).setup(x, y)
        w = guide.loc.w.detach()
        p = torch.sigmoid(x @ w)
        torch.testing.assert_close(x.T @ (y - p), w / 1.5**2, atol=1e-6, rtol=0)
        hessian = x.T @ ((p * (1 - p)).unsqueeze(-1) * x) + torch.eye(2) / 1.5**2
        torch.testing.assert_close(guide.covariance(), hessian.inverse(), atol=1e-6, rtol=0)

    def test_delta_is_map(self) -> None:
        """Beta-Bernoulli in the model's own space: (a + k - 1) / (a + b + n - 2)."""

        def model(y: Tensor) -> None:
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Bernoulli(p), obs=y)

        y = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
        guide: Any = pvi.fit(model, Delta, y, steps=1500, seed=0).guide
        assert float(guide.point.p.detach()) == pytest.approx(5 / 9, abs=1e-4)
        laplace: Any = Laplace(model).setup(y)  # the mode in unconstrained space: (a+k) / (a+b+n)
        assert float(torch.sigmoid(laplace.loc.p.detach())) == pytest.approx(6 / 11, abs=1e-7)

    def test_a_step_too_far(self) -> None:
        """Where a distribution would refuse its parameters, the density is not finite."""

        def model() -> None:
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, s), obs=torch.tensor(0.4))

        guide: Any = Laplace(model).setup()
        f = LogJoint(model, guide._layout, (), {})
        assert not any(bool(f(torch.tensor([u])).isfinite()) for u in (-1000.0, 1000.0))
        assert bool(f(torch.tensor([1.0])).isfinite())

    def test_no_mode(self) -> None:
        def model() -> None:
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z.square(), 1.0), obs=torch.tensor(-0.5))
            pyro.factor("up", 3.0 * z.square())

        with pytest.raises(GuideError, match=r"found no mode.*site 'z'"):
            Laplace(model).setup()


class TestMixture:
    """p(z) = 0.3 N(-2, 0.4) + 0.7 N(1.5, 0.6), told by a factor, with a known constant."""

    LOG_Z = 0.25

    @classmethod
    def log_density(cls, z: Tensor) -> Tensor:
        parts = [
            math.log(w) + dist.Normal(m, s).log_prob(z)
            for w, m, s in ((0.3, -2.0, 0.4), (0.7, 1.5, 0.6))
        ]
        return torch.stack(parts).logsumexp(0) + cls.LOG_Z

    @classmethod
    def model(cls) -> None:
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("density", cls.log_density(z))

    def test_both_modes(self) -> None:
        guide, single = (
            pvi.fit(self.model, g, objective=pvi.ELBO(8), steps=500, seed=0).guide
            for g in (Mixture(2, spread=2.0), MeanField)
        )
        guide.requires_grad_(False)
        order = sorted(
            (float(part.loc.z), float(part.scale.z), float(weight))
            for part, weight in zip(guide._parts, guide.weights, strict=True)
        )
        for found, expected in zip(order, ((-2.0, 0.4, 0.3), (1.5, 0.6, 0.7)), strict=True):
            assert found == pytest.approx(expected, abs=0.05)
        bounds = [pvi.ELBO(4000).bound(self.model, g) for g in (guide, single)]
        assert bounds[0] == pytest.approx(self.LOG_Z, abs=0.01)
        assert bounds[1] < self.LOG_Z - 0.2

    def test_equals_quadrature(self) -> None:
        """The bound and its gradient in every parameter, the weights included."""
        guide: Any = Mixture(2, model=self.model).setup()
        values = {"locs": (-1.0, 0.8), "scales": (0.7, 0.9)}
        with torch.no_grad():
            for part, m, s in zip(guide._parts, *values.values(), strict=True):
                part.loc.z, part.scale.z = torch.tensor(m), torch.tensor(s)
            guide.weights = torch.tensor([0.35, 0.65])
        z = torch.linspace(-12.0, 12.0, 20_001)
        parts = [dist.Normal(part.loc.z, part.scale.z).log_prob(z) for part in guide._parts]
        log_q = (guide.weights.log().unsqueeze(-1) + torch.stack(parts)).logsumexp(0)
        expected = torch.trapezoid(log_q.exp() * (self.log_density(z) - log_q), z)
        parameters = list(guide.parameters())
        gradient = torch.autograd.grad(expected, parameters)
        rows = []
        for _ in range(40):
            loss = pvi.ELBO(500).differentiable_loss(self.model, guide)
            grads = torch.autograd.grad(loss, parameters)
            rows.append(torch.cat([-loss.detach().reshape(1), *(-g.reshape(-1) for g in grads)]))
        found = torch.stack(rows)
        truth = torch.cat([expected.detach().reshape(1), *(g.reshape(-1) for g in gradient)])
        se = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - truth).abs() < 4.5 * se + 1e-6).all())
        assert float(se[0]) < 0.02
