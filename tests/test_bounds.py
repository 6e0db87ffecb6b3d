"""Values and gradients of the bounds where they are known, and Pyro's are wrong."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from pvi.engine.bounds import renyi_mean
from pvi.errors import ObjectiveError
from tests.scenarios import (
    ALPHAS,
    BATCHED,
    EXACT,
    FixedNoise,
    K,
    gradients,
    local_guide,
    local_model,
    mean_model,
    mean_posterior,
    mean_se,
    nested_guide,
    nested_model,
    normal,
    normal_log_z,
    objective,
    param,
    positive,
    power_mean,
    prior_guide,
    randn,
    repeat,
)

pytestmark = pytest.mark.usefixtures("isolated")


def per_datum_reference(x: Tensor, alpha: float, draws: int = 40_000) -> tuple[float, float]:
    """sum_i of the order-alpha bound at q = prior, K particles: own Monte Carlo, with se."""
    z = torch.randn(draws, K, generator=torch.Generator().manual_seed(99))
    total = torch.zeros(draws)
    for value in x:
        total += power_mean(normal(value, z, 1.0).T, alpha)
    mean, se = mean_se(total)
    return float(mean), float(se)


class TestMinibatchBound:
    """N = 50, B = 10, K = 5, x ~ N(z, 1), z ~ N(0, 1), q = prior."""

    size, batch = 50, 10

    def model(self, x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", self.size, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(self, x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", self.size, subsample=rows):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def epochs(self, bound: pvi.Objective, x: Tensor, times: int) -> Tensor:
        """Mean of the bound over the batches of a random partition, `times` times."""
        means = []
        for _ in range(times):
            batches = torch.randperm(self.size).split(self.batch)
            values = [bound.bound(self.model, self.guide, x, rows) for rows in batches]
            means.append(sum(values) / len(values))
        return torch.tensor(means)

    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_mean_is_the_per_datum_bound(self, alpha: float) -> None:
        x = randn(self.size) * 1.4
        mean, se = mean_se(self.epochs(objective(alpha), x, 150))
        expected, expected_se = per_datum_reference(x, alpha)
        assert abs(mean - expected) < 3 * math.hypot(se, expected_se)
        assert se < 0.5  # far below the 30 nats by which Pyro's RenyiELBO is off
        assert mean < normal_log_z(x) + 3 * se

    def test_elbo_is_exact(self) -> None:
        """With q = prior and exact KL only the likelihood is random, and its mean is known."""
        x = randn(self.size) * 1.4
        mean, se = mean_se(self.epochs(pvi.ELBO(K, kl="exact"), x, 150))
        expected = float((-0.5 * math.log(2 * math.pi) - 0.5 * (x**2 + 1)).sum())
        assert abs(mean - expected) < 3 * se

    @pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
    def test_partition_equals_the_full_batch(self, alpha: float) -> None:
        """Same noise: the mean over the batches is the full batch, value and gradient."""
        x, noise = randn(self.size), randn(K, self.size, seed=1)

        def guide(x: Tensor, rows: Tensor) -> None:
            slope, scale = param("slope", 0.3), positive("scale", 0.9)
            with pyro.plate("data", self.size, subsample=rows):
                pyro.sample(
                    "z", FixedNoise(slope * x[rows], scale.expand(len(rows)), noise[:, rows])
                )

        bound = objective(alpha, vectorize_particles=True)
        rows = torch.randperm(self.size)
        whole = bound.evaluate(self.model, guide, (x, torch.arange(self.size))).loss
        parts = [
            bound.evaluate(self.model, guide, (x, batch)).loss for batch in rows.split(self.batch)
        ]
        mean = torch.stack(parts).mean()
        assert float(mean.detach()) == pytest.approx(float(whole.detach()), abs=EXACT)
        torch.testing.assert_close(gradients(mean), gradients(whole), atol=EXACT, rtol=EXACT)
        # one batch is not the whole, so the equality above says something
        assert abs(float(parts[0].detach()) - float(whole.detach())) > 1e-3


class TestNested:
    """Globals are drawn once per bound, locals K times: independent brute force."""

    x = randn(6).double() * 1.4
    noise = randn(K, 6, seed=1).double()
    outer = torch.full((1,), 0.7, dtype=torch.float64)

    def guide(self, x: Tensor) -> None:
        loc, scale = param("theta_loc", 0.3), positive("theta_scale", 0.7)
        theta = pyro.sample("theta", FixedNoise(loc, scale, self.outer))
        slope, weight, sd = param("slope", 0.4), param("weight", 0.2), positive("z_scale", 0.8)
        with pyro.plate("data", len(x)):
            loc = slope * x + weight * theta
            pyro.sample("z", FixedNoise(loc, sd.expand(len(x)), self.noise))

    def brute_force(self, alpha: float) -> Tensor:
        """log p(theta) / q(theta) + sum_i M_alpha_k p(x_i, z_ik | theta) / q(z_ik | theta)."""
        p = {n: pyro.param(n) for n in ("theta_loc", "theta_scale", "slope", "weight", "z_scale")}
        theta = p["theta_loc"] + p["theta_scale"] * self.outer[0]
        loc = p["slope"] * self.x + p["weight"] * theta
        z = loc + p["z_scale"] * self.noise
        log_w = normal(z, theta, 1.0) + normal(self.x, z, 1.0) - normal(z, loc, p["z_scale"])
        ratio = normal(theta, 0.0, 1.0) - normal(theta, p["theta_loc"], p["theta_scale"])
        return ratio + power_mean(log_w, alpha).sum()

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
    def test_value_and_gradient(self, alpha: float) -> None:
        bound = objective(alpha, vectorize_particles=True)
        value = bound.evaluate(nested_model, self.guide, (self.x,))
        expected = self.brute_force(alpha)
        assert float(value.bound) == pytest.approx(float(expected.detach()), abs=EXACT)
        got, want = gradients(value.loss), gradients(-expected)
        torch.testing.assert_close(got, want, atol=EXACT, rtol=EXACT)
        assert all(float(g.abs()) > 1e-6 for g in want.values())

    def test_explain_says_so(self) -> None:
        text = str(pvi.IWAE(K).explain(nested_model, nested_guide, self.x))
        assert "per element of data" in text
        assert "drawn once per bound: theta" in text

    @pytest.mark.parametrize("batched", BATCHED.values(), ids=BATCHED)
    def test_mean(self, batched: bool) -> None:
        """The mean equals brute force on other draws, and lies between ELBO and log Z."""
        iwae = pvi.IWAE(K, vectorize_particles=batched)
        mean, se = mean_se(repeat(lambda: iwae.bound(nested_model, nested_guide, self.x), 400))
        generator = torch.Generator().manual_seed(5)
        theta = 0.3 + 0.7 * torch.randn(20_000, 1, generator=generator)
        loc = 0.4 * self.x + 0.2 * theta
        z = loc + 0.8 * torch.randn(K, 20_000, 6, generator=generator)
        log_w = normal(z, theta, 1.0) + normal(self.x, z, 1.0) - normal(z, loc, 0.8)
        ratio = (normal(theta, 0.0, 1.0) - normal(theta, 0.3, 0.7)).squeeze(1)
        expected, expected_se = mean_se(ratio + power_mean(log_w, 0.0).sum(1))
        low, low_se = mean_se(ratio + power_mean(log_w, 1.0).sum(1))
        assert abs(mean - expected) < 3 * math.hypot(se, expected_se)
        assert mean < normal_log_z(self.x, shared=1.0) + 3 * se
        assert mean > low + 3 * math.hypot(se, low_se)

    def test_num_outer(self) -> None:
        """`num_outer` averages bounds: the same mean, a smaller variance."""
        single, average = pvi.IWAE(3), pvi.IWAE(3, num_outer=16)
        one = repeat(lambda: single.bound(nested_model, nested_guide, self.x), 200)
        many = repeat(lambda: average.bound(nested_model, nested_guide, self.x), 50)
        (a, a_se), (b, b_se) = mean_se(one), mean_se(many)
        assert abs(a - b) < 3 * math.hypot(a_se, b_se)
        assert many.var() < one.var() / 5


class TestScope:
    def test_joint_and_per_datum(self) -> None:
        """On the same draws: `joint` weights whole draws, the default datum by datum."""
        x, noise = randn(6), randn(K, 6, seed=1)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", FixedNoise(0.3 * x, torch.full((6,), 0.9), noise))

        z = 0.3 * x + 0.9 * noise
        log_w = normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, 0.3 * x, 0.9)
        for alpha in (0.0, 0.5):
            per_datum = power_mean(log_w, alpha).sum()
            joint = power_mean(log_w.sum(1), alpha)
            for scope, value in (("auto", per_datum), ("per_datum", per_datum), ("joint", joint)):
                got = pvi.RenyiELBO(alpha, K, bound=scope).bound(local_model, guide, x)
                assert got == pytest.approx(float(value), abs=EXACT)

    def test_global_only_is_joint(self) -> None:
        y, got = randn(6), []

        def recording(y: Tensor) -> None:
            got.append(pyro.sample("mu", dist.Normal(0.3, 0.5)))

        value = pvi.IWAE(K).bound(mean_model, recording, y)
        mu = got[-1].reshape(K)
        likelihood = normal(y, mu.unsqueeze(1), 1.0).sum(1)
        log_w = normal(mu, 0.0, 2.0) + likelihood - normal(mu, 0.3, 0.5)
        assert value == pytest.approx(float(power_mean(log_w, 0.0)), abs=EXACT)

    @pytest.mark.parametrize("lag", [1, 2, 4])
    def test_rows_that_mix_are_joint(self, lag: int) -> None:
        """Random walks from steps in a plate: weighted row by row they would exceed the evidence.

        With a lag (seasons) there are `lag` walks: rows i, i + lag, i + 2 lag ...
        """
        x = torch.tensor([2.0, -2.0]).repeat(3).repeat_interleave(lag)

        def walk(x: Tensor) -> None:
            with pyro.plate("steps", len(x)):
                step = pyro.sample("step", dist.Normal(0.0, 1.0))
                sums = step.unflatten(-1, (-1, lag)).cumsum(-2).flatten(-2)
                pyro.sample("x", dist.Normal(sums, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("steps", len(x)):
                pyro.sample("step", dist.Normal(torch.zeros(len(x)), 1.0))

        sums = torch.ones(6, 6).tril()
        marginal = dist.MultivariateNormal(torch.zeros(6), sums @ sums.T + torch.eye(6))
        log_z = lag * float(marginal.log_prob(x[::lag]))
        iwae = pvi.IWAE(50)
        mean, se = mean_se(repeat(lambda: iwae.bound(walk, guide, x), 100))
        assert mean < log_z + 3 * se
        assert "weights: joint" in str(iwae.explain(walk, guide, x))

    def test_observation_outside_the_plate_is_joint(self) -> None:
        """A sum of the rows' latents is observed: the rows are not independent given the data."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            total = z.sum(-1, keepdim=z.dim() > 1)
            pyro.sample("total", dist.Normal(total, 1.0), obs=torch.tensor(0.5))

        assert "weights: joint" in str(pvi.IWAE(K).explain(model, prior_guide, randn(4)))

    def test_automatic_guide_of_globals_and_locals(self) -> None:
        """AutoNormal is no other guide than one with normals at the model's own sites."""
        guide = AutoNormal(nested_model)
        guide(randn(4))
        text = str(pvi.IWAE(K).explain(nested_model, guide, randn(4)))
        assert "per element of data" in text

    def test_sequential_plate_is_what_explain_says(self) -> None:
        """A Python loop over a plate: the value belongs to the scope that `explain` names."""
        x, seen = randn(4), []

        def model(x: Tensor) -> None:
            for i in pyro.plate("data", 4):
                z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

        def guide(x: Tensor) -> None:
            draws = [pyro.sample(f"z{i}", dist.Normal(0.3, 0.9)) for i in pyro.plate("data", 4)]
            seen.append(torch.stack([z.reshape(-1) for z in draws], -1))

        iwae = pvi.IWAE(K, vectorize_particles=True)
        value = iwae.bound(model, guide, x)
        z = seen[-1]
        log_w = normal(z, 0.0, 1.0) + normal(x, z, 1.0) - normal(z, 0.3, 0.9)
        joint, per_datum = power_mean(log_w.sum(1), 0.0), power_mean(log_w, 0.0).sum()
        says_joint = "weights: joint" in str(iwae.explain(model, guide, x))
        assert value == pytest.approx(float(joint if says_joint else per_datum), abs=EXACT)

    def test_subsampled_sequential_plate_is_refused_or_right(self) -> None:
        x, seen = randn(6), []

        def model(x: Tensor) -> None:
            for i in pyro.plate("data", 6, subsample=torch.arange(3)):
                z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

        def guide(x: Tensor) -> None:
            plate = pyro.plate("data", 6, subsample=torch.arange(3))
            draws = [pyro.sample(f"z{i}", dist.Normal(0.3, 0.9)) for i in plate]
            seen.append(torch.stack([z.reshape(-1) for z in draws], -1))

        try:
            value = pvi.IWAE(K, vectorize_particles=True).bound(model, guide, x)
        except ObjectiveError as error:
            assert "subsampled" in str(error)
            return
        z = seen[-1]
        log_w = normal(z, 0.0, 1.0) + normal(x[:3], z, 1.0) - normal(z, 0.3, 0.9)
        assert value == pytest.approx(2 * float(power_mean(log_w, 0.0).sum()), abs=EXACT)


class TestExactPosterior:
    """At q = posterior every bound is log Z, whatever the draws."""

    @pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
    def test_local(self, alpha: float) -> None:
        x = randn(6)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

        value = objective(alpha).bound(local_model, guide, x)
        assert value == pytest.approx(normal_log_z(x), abs=EXACT)

    @pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
    def test_global(self, alpha: float) -> None:
        y = randn(6)
        mean, sd = mean_posterior(y)

        def guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(mean, sd))

        value = objective(alpha).bound(mean_model, guide, y)
        assert value == pytest.approx(normal_log_z(y, shared=4.0, noise=1.0), abs=EXACT)

    @pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
    def test_not_above_log_z_elsewhere(self, alpha: float) -> None:
        """Many copies of the data in one plate make one bound an average over many."""
        x, copies, bound = randn(6), 20, objective(alpha)
        draws = repeat(lambda: bound.bound(local_model, local_guide, x.repeat(copies)), 40)
        mean, se = mean_se(draws / copies)
        assert mean < normal_log_z(x) - 3 * se


class TestGradientMean:
    """The mean of the gradient estimates is the gradient of the closed form, off the posterior."""

    y = randn(5).double()

    @staticmethod
    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(param("loc", 0.3), positive("scale", 0.8)))

    def closed_form(self) -> dict[str, Tensor]:
        """Gradients of -ELBO of `mean_model`."""
        loc, scale = pyro.param("loc"), pyro.param("scale")
        likelihood = -0.5 * ((self.y - loc) ** 2 + scale**2).sum()
        kl = 0.5 * (loc**2 + scale**2) / 4.0 - scale.log()
        return gradients(kl - likelihood)

    def draws(self, bound: pvi.Objective, times: int = 400) -> dict[str, Tensor]:
        """Gradients of the loss, `(times,)`, by name."""
        self.guide(self.y)
        losses = (bound.evaluate(mean_model, self.guide, (self.y,)).loss for _ in range(times))
        rows = [gradients(loss) for loss in losses]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def check(self, draws: dict[str, Tensor]) -> None:
        for name, expected in self.closed_form().items():
            mean, se = mean_se(draws[name])
            assert abs(mean - expected) < 3 * se + EXACT, name

    @pytest.mark.parametrize("kl", ["sample", "exact"])
    @pytest.mark.parametrize("num_particles", [1, 4])
    def test_elbo(self, kl: Any, num_particles: int) -> None:
        """And a gradient that is zeroed, shrunk or flipped would fail."""
        draws = self.draws(pvi.ELBO(num_particles, kl=kl))
        self.check(draws)
        for factor in (0.0, 0.8, -1.0):
            with pytest.raises(AssertionError):
                self.check({name: factor * values for name, values in draws.items()})


@pytest.mark.parametrize("order", [0.0, 0.5, 2.0])
def test_negligible_weights_have_no_denormal_gradients(order: float) -> None:
    """A share of e^-100 is no share: as a denormal number it would slow down matrix products."""
    spread = torch.tensor([[0.0, -1.0], [-30.0, -45.0], [-100.0, -90.0], [-math.inf, -200.0]])
    log_w = (spread / (1 - order)).requires_grad_()  # so that the shares are those of `spread`
    value = renyi_mean(log_w, order)
    plain = torch.logsumexp(spread, 0) - math.log(4)
    torch.testing.assert_close(value, plain / (1 - order), rtol=1e-6, atol=0.0)
    value.sum().backward()
    assert log_w.grad is not None and bool(log_w.grad.isfinite().all())
    small = log_w.grad[(log_w.grad != 0)].abs()
    assert float(small.min()) > 1e-20 and len(small) >= 4
