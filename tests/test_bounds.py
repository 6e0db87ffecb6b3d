"""Values and gradients of the bounds where they are known, and Pyro's are wrong."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.errors import ObjectiveError
from tests.scenarios import (
    FixedNoise,
    amortised_guide,
    isolated,
    local_guide,
    local_model,
    mean_model,
    mean_posterior,
    mean_se,
    nested_guide,
    nested_model,
    normal_log_z,
    param,
    positive,
    prior_guide,
    randn,
    repeat,
)

EXACT = 1e-10
K = 5
ALPHAS = {"elbo": 1.0, "iwae": 0.0, "renyi 0.5": 0.5, "renyi 2": 2.0}
BATCHED = {"batched": True, "looped": False}


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


def objective(alpha: float, num_particles: int = K, **options: Any) -> pvi.Objective:
    if alpha == 1.0:
        return pvi.ELBO(num_particles, **options)
    return pvi.RenyiELBO(alpha, num_particles, **options)


def power_mean(log_w: Tensor, alpha: float) -> Tensor:
    """The definition, without any care for overflow: `(K, ...) -> (...)`."""
    if alpha == 1.0:
        return log_w.mean(0)
    return (log_w.exp() ** (1.0 - alpha)).mean(0).log() / (1.0 - alpha)


def normal(x: Any, loc: Any, scale: Any) -> Tensor:
    """log N(x; loc, scale), written out."""
    x, loc, scale = (torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in (x, loc, scale))
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def gradients(loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters in the store, by name."""
    leaves = {n: p.unconstrained() for n, p in pyro.get_param_store().items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), found, strict=True)
    }


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
        log_w = normal(z, theta, 1.0) + normal(self.x, z, 1.0) - normal_of(z, loc, p["z_scale"])
        ratio = normal(theta, 0.0, 1.0) - normal_of(theta, p["theta_loc"], p["theta_scale"])
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
        iwae, elbo = pvi.IWAE(K, vectorize_particles=batched), pvi.ELBO()
        mean, se = mean_se(repeat(lambda: iwae.bound(nested_model, nested_guide, self.x), 600))
        low, low_se = mean_se(repeat(lambda: elbo.bound(nested_model, nested_guide, self.x), 600))
        generator = torch.Generator().manual_seed(5)
        theta = 0.3 + 0.7 * torch.randn(20_000, 1, generator=generator)
        loc = 0.4 * self.x + 0.2 * theta
        z = loc + 0.8 * torch.randn(K, 20_000, 6, generator=generator)
        log_w = normal(z, theta, 1.0) + normal(self.x, z, 1.0) - normal(z, loc, 0.8)
        ratio = (normal(theta, 0.0, 1.0) - normal(theta, 0.3, 0.7)).squeeze(1)
        expected, expected_se = mean_se(ratio + power_mean(log_w, 0.0).sum(1))
        assert abs(mean - expected) < 3 * math.hypot(se, expected_se)
        assert mean < normal_log_z(self.x, shared=1.0) + 3 * se
        assert mean > low + 3 * math.hypot(se, low_se)

    def test_num_outer(self) -> None:
        """`num_outer` averages bounds: the same mean, a smaller variance."""
        one = repeat(lambda: pvi.IWAE(3).bound(nested_model, nested_guide, self.x), 200)
        many = pvi.IWAE(3, num_outer=16)
        four = repeat(lambda: many.bound(nested_model, nested_guide, self.x), 50)
        (a, a_se), (b, b_se) = mean_se(one), mean_se(four)
        assert abs(a - b) < 3 * math.hypot(a_se, b_se)
        assert four.var() < one.var() / 5


def normal_of(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """`normal` that keeps the graph of all its arguments."""
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


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
        x = randn(6)
        mean, se = mean_se(repeat(lambda: objective(alpha).bound(local_model, local_guide, x), 400))
        assert mean < normal_log_z(x) - 3 * se


class TestScales:
    """The user's `poutine.scale` and `poutine.mask` in the model, the guide or both."""

    @staticmethod
    def programs(p: dict[str, Any], q: dict[str, Any]) -> tuple[Callable, Callable]:
        """A model whose likelihood does not depend on z: with exact KL its loss is not random."""

        def wrap(options: dict[str, Any]) -> Any:
            ((kind, value),) = options.items() or [("scale", 1.0)]
            return poutine.scale(scale=value) if kind == "scale" else poutine.mask(mask=value)

        def model() -> None:
            with wrap(p), pyro.plate("rows", 3):
                pyro.sample("z", dist.Normal(0.5, 2.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.7))

        def guide() -> None:
            loc, scale = param("loc", [0.1, -0.3, 0.8]), positive("scale", [0.5, 1.0, 1.5])
            with wrap(q), pyro.plate("rows", 3):
                pyro.sample("z", dist.Normal(loc, scale))

        return model, guide

    @staticmethod
    def closed_form(s_p: Any, s_q: Any) -> Tensor:
        """Loss: s_q E log q - s_p E log p - log p(x)."""
        loc, scale = pyro.param("loc"), pyro.param("scale")
        log_q = -scale.log() - 0.5 * math.log(2 * math.pi) - 0.5
        log_p = -0.5 * ((loc - 0.5) ** 2 + scale**2) / 4 - math.log(2) - 0.5 * math.log(2 * math.pi)
        return (s_q * log_q - s_p * log_p).sum() - normal(0.7, 0.0, 1.0)

    @pytest.mark.parametrize(
        ("p", "q"),
        [
            ({}, {}),
            ({"scale": 0.1}, {}),
            ({}, {"scale": 0.1}),
            ({"scale": 0.3}, {"scale": 0.3}),
            ({"scale": 0.3}, {"scale": 0.7}),
            ({"mask": torch.tensor([True, False, True])}, {}),
            ({}, {"mask": torch.tensor([True, False, True])}),
            (
                {"mask": torch.tensor([True, False, True])},
                {"mask": torch.tensor([True, False, True])},
            ),
            ({"mask": False}, {"scale": 0.4}),
            (
                {"mask": torch.tensor([True, False, False])},
                {"mask": torch.tensor([True, True, False])},
            ),
        ],
        ids=str,
    )
    def test_exact(self, p: dict[str, Any], q: dict[str, Any]) -> None:
        model, guide = self.programs(p, q)
        exact = pvi.ELBO(kl="exact")
        loss = exact.evaluate(model, guide).loss
        s_p, s_q = (float_of(next(iter(side.values()), 1.0)) for side in (p, q))
        expected = self.closed_form(s_p, s_q)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=EXACT)
        torch.testing.assert_close(gradients(loss), gradients(expected), atol=EXACT, rtol=EXACT)
        assert exact.terms(model, guide)["z"].how == "exact"

    def test_sample_has_the_same_mean(self) -> None:
        model, guide = self.programs({"scale": 0.1}, {"scale": 0.7})
        mean, se = mean_se(repeat(lambda: pvi.ELBO(100).loss(model, guide), 100))
        expected = float(self.closed_form(0.1, 0.7).detach())
        assert abs(mean - expected) < 3 * se
        assert abs(expected - float(self.closed_form(0.7, 0.7).detach())) > 30 * se  # Pyro's value

    def test_common_scale_multiplies_the_bound(self) -> None:
        """The same scale everywhere stays outside the weights."""
        x, noise = randn(6), randn(K, 6, seed=1)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", FixedNoise(0.3 * x, torch.full((6,), 0.9), noise))

        plain = pvi.IWAE(K).bound(local_model, guide, x)
        model, guide = poutine.scale(local_model, 0.3), poutine.scale(guide, 0.3)
        assert pvi.IWAE(K).bound(model, guide, x) == pytest.approx(0.3 * plain, abs=EXACT)

    def test_unequal_scales_are_labelled(self) -> None:
        """Scales inside the weights do not give a bound, and `explain` says so."""
        model = poutine.scale(local_model, 0.3)
        assert "not a bound" in str(pvi.IWAE(K).explain(model, prior_guide, randn(6)))
        assert "not a bound" not in str(pvi.IWAE(K).explain(local_model, prior_guide, randn(6)))


def float_of(scale: Any) -> Any:
    return scale.to(torch.get_default_dtype()) if isinstance(scale, Tensor) else float(scale)


class TestExactKL:
    """The closed form is used where it is right, else sampled."""

    @staticmethod
    def two_layers(x: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    @staticmethod
    def bottom_up(x: Tensor) -> None:
        low = pyro.sample("low", dist.Normal(0.6 * x, 0.5))
        pyro.sample("top", dist.Normal(0.7 * low, 0.4))

    @staticmethod
    def top_down(x: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.3 * x, 0.6))
        pyro.sample("low", dist.Normal(0.5 * top + 0.2 * x, 0.5))

    def test_bottom_up_guide_falls_back(self) -> None:
        x = torch.tensor(2.0)
        exact = pvi.ELBO(50, kl="exact")
        text = str(exact.explain(self.two_layers, self.bottom_up, x))
        assert "'top', later in the guide" in text
        m, s, b, t = 0.6 * 2.0, 0.5, 0.7, 0.4  # low ~ N(m, s), top | low ~ N(b low, t)
        square = m**2 + s**2
        quadratic = b**2 * square + t**2 + (1 - b) ** 2 * square + t**2 + (2.0 - m) ** 2 + s**2
        expected = -1.5 * math.log(2 * math.pi) - 0.5 * quadratic
        expected += math.log(2 * math.pi) + 1 + math.log(s * t)
        for bound in (exact, pvi.ELBO(50, kl="sample")):
            draws = repeat(lambda b=bound: b.bound(self.two_layers, self.bottom_up, x), 200)
            mean, se = mean_se(draws)
            assert abs(mean - expected) < 3 * se
            assert se < 0.02

    def test_same_order_is_exact(self) -> None:
        x = torch.tensor(2.0)
        exact, sample = pvi.ELBO(50, kl="exact"), pvi.ELBO(50, kl="sample")
        terms = exact.terms(self.two_layers, self.top_down, x)
        assert [terms[name].how for name in ("top", "low")] == ["exact", "exact"]
        one, two = (
            repeat(lambda b=b: b.bound(self.two_layers, self.top_down, x), 200)
            for b in (exact, sample)
        )
        (a, a_se), (b, b_se) = mean_se(one), mean_se(two)
        assert abs(a - b) < 3 * math.hypot(a_se, b_se)

    def test_no_closed_form_is_sampled(self) -> None:
        def model() -> None:
            z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

        def guide() -> None:
            pyro.sample("z", dist.StudentT(3.0, 0.5, 0.5))

        values = []
        for kl in ("exact", "sample"):
            torch.manual_seed(2)
            values.append(pvi.ELBO(4, kl=kl).bound(model, guide))
        assert values[0] == pytest.approx(values[1], abs=EXACT)
        assert "no closed form" in str(pvi.ELBO(kl="exact").explain(model, guide))

    @pytest.mark.parametrize("auto", [True, False], ids=["AutoNormal", "own Delta"])
    def test_point_masses_keep_their_density(self, auto: bool) -> None:
        """A Delta that restates an auxiliary draw carries a Jacobian; "exact" must keep it."""
        x = randn(5)

        def model(x: Tensor) -> None:
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Exponential(rate), obs=x.abs())

        def own(x: Tensor) -> None:
            u = pyro.sample("u", dist.Normal(param("u", 0.4), 0.3), infer={"is_auxiliary": True})
            pyro.sample("rate", dist.Delta(u.exp(), log_density=-u))

        guide = AutoNormal(model, init_scale=0.3) if auto else own
        guide(x)
        losses = []
        for kl in ("exact", "sample"):
            torch.manual_seed(2)
            losses.append(pvi.ELBO(kl=kl).evaluate(model, guide, (x,)).loss)
        a, b = losses
        assert float(a.detach()) == pytest.approx(float(b.detach()), abs=EXACT)
        torch.testing.assert_close(gradients(a), gradients(b), atol=EXACT, rtol=EXACT)


class TestBeta:
    x, noise = randn(6).double(), randn(1, 6, seed=1).double()

    def parts(self) -> tuple[float, float, Tensor, Tensor]:
        """log likelihood at the draws, KL(z), and per draw log p and log q of z."""
        loc, scale = 0.3 * self.x, torch.tensor(0.9)
        z = loc + 0.9 * self.noise[0]
        kl = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
        log_q = normal(z, loc, 0.9)
        return float(normal(self.x, z, 1.0).sum()), float(kl.sum()), normal(z, 0.0, 1.0), log_q

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", FixedNoise(0.3 * x, torch.full((6,), 0.9), self.noise))

    @pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0, {"z": 4.0}], ids=str)
    def test_exact(self, beta: Any) -> None:
        likelihood, kl, _, _ = self.parts()
        weight = beta["z"] if isinstance(beta, dict) else beta
        value = pvi.BetaELBO(beta, kl="exact").evaluate(local_model, self.guide, (self.x,))
        assert float(value.loss) == pytest.approx(weight * kl - likelihood, abs=EXACT)
        assert float(value.bound) == pytest.approx(likelihood - kl, abs=EXACT)
        bound = pvi.BetaELBO(beta, kl="exact").bound(local_model, self.guide, self.x)
        assert bound == pytest.approx(likelihood - kl, abs=EXACT)

    def test_sample(self) -> None:
        likelihood, _, log_p, log_q = self.parts()
        ratio = float((log_q - log_p).sum())
        value = pvi.BetaELBO(3.0).evaluate(local_model, self.guide, (self.x,))
        assert float(value.loss) == pytest.approx(3 * ratio - likelihood, abs=EXACT)
        assert float(value.bound) == pytest.approx(likelihood - ratio, abs=EXACT)

    def test_iwae(self) -> None:
        """Inside importance weights too: log w = log p(x|z) - beta (log q - log p)."""
        noise = randn(K, 6, seed=1)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", FixedNoise(0.3 * x, torch.full((6,), 0.9), noise))

        z = 0.3 * self.x + 0.9 * noise
        ratio = normal(z, 0.3 * self.x, 0.9) - normal(z, 0.0, 1.0)
        likelihood = normal(self.x, z, 1.0)
        value = pvi.IWAE(K, beta=2.0).evaluate(local_model, guide, (self.x,))
        loss, bound = (power_mean(likelihood - b * ratio, 0.0).sum() for b in (2.0, 1.0))
        assert float(value.loss) == pytest.approx(-float(loss), abs=EXACT)
        assert float(value.bound) == pytest.approx(float(bound), abs=EXACT)

    def test_per_site(self) -> None:
        """A dict weights the sites it names, the others count once."""
        x = randn(5)
        terms = {}
        losses = {}
        for name, beta in {"none": {}, "theta": {"theta": 3.0}, "z": {"z": 0.5}}.items():
            torch.manual_seed(1)
            objective = pvi.BetaELBO(beta)
            value = objective.evaluate(nested_model, nested_guide, (x,))
            losses[name], terms = float(value.loss.detach()), value.terms.kl()
        plain, kl = losses["none"], {n: float(t.detach()) for n, t in terms.items()}
        assert losses["theta"] == pytest.approx(plain + 2.0 * kl["theta"], abs=EXACT)
        assert losses["z"] == pytest.approx(plain - 0.5 * kl["z"], abs=EXACT)
        assert abs(kl["theta"]) > 1e-3 and abs(kl["z"]) > 1e-3

    def test_explain_says_so(self) -> None:
        text = str(pvi.BetaELBO({"z": 4.0}).explain(local_model, self.guide, self.x))
        assert "not a bound" in text
        assert next(line for line in text.splitlines() if line.startswith("z ")).split()[-2] == "4"


class TestRefusals:
    """Each says which site, plate or option, and what to do."""

    def test_exact_kl_with_alpha(self) -> None:
        with pytest.raises(ObjectiveError, match=r"kl='exact'.*alpha = 0.*Use kl='sample'"):
            pvi.Objective(num_particles=4, alpha=0.0, kl="exact")

    def test_subsampled_plate_with_a_global_latent(self) -> None:
        def model(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(y), subsample_size=3) as rows:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

        def guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(0.3, 0.5))

        message = r"plate 'data' is subsampled \(3 of 9\) at site 'y'.*use pvi.ELBO"
        with pytest.raises(ObjectiveError, match=message):
            pvi.IWAE(K).bound(model, guide, randn(9))
        assert math.isfinite(pvi.ELBO(K).bound(model, guide, randn(9)))

    def test_crossed_subsampled_plates(self) -> None:
        def program(guide: bool) -> Callable[[Tensor], None]:
            def run(x: Tensor) -> None:
                users = pyro.plate("users", 6, subsample_size=3, dim=-2)
                items = pyro.plate("items", 4, dim=-1)
                with users as u:
                    a = pyro.sample("a", dist.Normal(0.0, 1.0))
                with items:
                    b = pyro.sample("b", dist.Normal(0.0, 1.0))
                if not guide:
                    with users, items:
                        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x[u])

            return run

        with pytest.raises(ObjectiveError, match=r"plate 'users' is subsampled \(3 of 6\)"):
            pvi.IWAE(K).bound(program(False), program(True), randn(6, 4))

    def test_inner_subsampled_plate(self) -> None:
        """Latents per row, observations of a subsample of columns."""

        def model(x: Tensor) -> None:
            with pyro.plate("rows", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("columns", 6, subsample_size=2, dim=-1) as c:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, c])

        def guide(x: Tensor) -> None:
            with pyro.plate("rows", 3, dim=-2):
                pyro.sample("z", dist.Normal(0.3, torch.full((3, 1), 0.5)))

        with pytest.raises(ObjectiveError, match=r"plate 'columns' is subsampled \(2 of 6\)"):
            pvi.IWAE(K).bound(model, guide, randn(3, 6))

    def test_unknown_beta_site(self) -> None:
        with pytest.raises(ObjectiveError, match=r"beta names \['w'\].*latents are \['z'\]"):
            pvi.BetaELBO({"w": 2.0}).bound(local_model, prior_guide, randn(3))

    def test_per_datum_without_local_latents(self) -> None:
        def guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(0.3, 0.5))

        with pytest.raises(ObjectiveError, match="bound='per_datum' needs a plate"):
            pvi.RenyiELBO(0.0, K, bound="per_datum").bound(mean_model, guide, randn(3))

    @pytest.mark.parametrize("kl", ["sample", "exact"])
    def test_site_without_reparameterised_sampler(self, kl: Any) -> None:
        """Pathwise gradients miss how the draw depends on the parameters, whatever the KL."""

        def model(x: Tensor) -> None:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            probs = param("probs", 0.4, constraint=constraints.unit_interval)
            pyro.sample("z", dist.Bernoulli(probs))

        x = torch.tensor(1.0)
        with pytest.raises(
            ObjectiveError, match="'z' has parameters but no reparameterised sampler"
        ):
            pvi.ELBO(kl=kl).evaluate(model, guide, (x,))
        assert math.isfinite(pvi.ELBO(kl=kl).bound(model, guide, x))  # the value is right

    @pytest.mark.parametrize("kl", ["sample", "exact"])
    def test_discrete_site_without_parameters_is_fine(self, kl: Any) -> None:
        def model(x: Tensor) -> None:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z + w, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("w", dist.Normal(param("loc", 0.1), 0.5))

        loss = pvi.ELBO(kl=kl).evaluate(model, guide, (torch.tensor(1.0),)).loss
        assert float(gradients(loss)["loc"]) != 0.0

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: pvi.ELBO(0), "num_particles must be a whole number >= 1, got 0"),
            (lambda: pvi.ELBO(2.5), "num_particles must be a whole number"),  # type: ignore[arg-type]
            (lambda: pvi.ELBO(kl="mc"), "kl must be one of 'sample', 'exact', got 'mc'"),  # type: ignore
            (lambda: pvi.ELBO(gradient="score"), "gradient must be one of"),  # type: ignore
            (lambda: pvi.RenyiELBO(0.0, 2, bound="local"), "bound must be one of"),  # type: ignore
            (lambda: pvi.BetaELBO(-1.0), "beta must be >= 0, got -1.0"),
            (lambda: pvi.BetaELBO({"z": float("nan")}), "beta must be >= 0"),
            (lambda: pvi.IWAE(2, num_outer=0), "num_outer must be a whole number"),
            (lambda: pvi.RenyiELBO(float("nan"), 2), "alpha"),
        ],
    )
    def test_bad_options(self, make: Callable[[], pvi.Objective], message: str) -> None:
        with pytest.raises(ObjectiveError, match=message):
            make()


class TestParticles:
    @pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
    @pytest.mark.parametrize("nested", [False, True], ids=["local", "nested"])
    def test_looped_and_batched_agree(self, alpha: float, nested: bool) -> None:
        x = randn(4)
        model, guide = (nested_model, nested_guide) if nested else (local_model, amortised_guide)
        means = []
        for batched in BATCHED.values():
            bound = objective(alpha, vectorize_particles=batched)
            means.append(mean_se(repeat(lambda b=bound: b.bound(model, guide, x), 300)))
        (a, a_se), (b, b_se) = means
        assert abs(a - b) < 3 * math.hypot(a_se, b_se)

    def test_iwae_of_one_particle_is_the_elbo(self) -> None:
        values = []
        for bound in (pvi.IWAE(1), pvi.ELBO()):
            torch.manual_seed(1)
            values.append(bound.bound(local_model, local_guide, randn(4)))
        assert values[0] == values[1]

    def test_a_model_that_cannot_broadcast_is_looped(self) -> None:
        x, y, seen = randn(8, 3), randn(8, seed=1), []

        def model(x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

        def guide(x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(param("loc", [0.1, -0.4, 0.8]), 0.5).to_event(1))
            seen.append(w.detach())

        iwae = pvi.IWAE(K)
        text = str(iwae.explain(model, guide, x, y))
        assert "particles: looped: the programs cannot broadcast" in text
        iwae.bound(model, guide, x, y)  # makes the plan
        seen.clear()
        value = iwae.bound(model, guide, x, y)
        assert len(seen) == K
        w = torch.stack(seen)
        q = normal(w, torch.tensor([0.1, -0.4, 0.8]), 0.5).sum(1)
        log_w = normal(w, 0.0, 1.0).sum(1) + normal(y, w @ x.T, 1.0).sum(1) - q
        assert value == pytest.approx(float(power_mean(log_w, 0.0)), abs=EXACT)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_silent_broadcasting_is_noticed(self, size: int) -> None:
        """A model that runs with a particle dimension but means something else is looped."""
        y = randn(size)

        def model(y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(w.mean() * torch.ones(len(y)), 1.0), obs=y)

        def guide(y: Tensor) -> None:
            pyro.sample("w", dist.Normal(param("loc", 0.2), 0.5))

        text = str(pvi.ELBO(4).explain(model, guide, y))
        assert "particles: looped: site 'y' has another log density" in text

    def test_batched_is_said_too(self) -> None:
        text = str(pvi.ELBO(4).explain(local_model, prior_guide, randn(3)))
        assert "particles: batched" in text


class TestExplain:
    def test_rows(self) -> None:
        text = str(pvi.ELBO(kl="exact").explain(nested_model, nested_guide, randn(5)))
        rows = {line.split()[0]: line.split() for line in text.splitlines()}
        assert rows["theta"] == ["theta", "latent", "-", "exact", "reparam", "1", "1"]
        assert rows["z"] == ["z", "latent", "data", "(5)", "exact", "reparam", "1", "1"]
        assert rows["x"] == ["x", "likelihood", "data", "(5)", "-", "-", "-", "1"]
        assert "bound: ELBO, 1 particle(s)" in text

    def test_subsampled_plate(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=2) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        assert "data (2 of 5)" in str(pvi.IWAE(3).explain(model, guide, randn(5)))

    def test_leaves_no_trace(self) -> None:
        """No random numbers of the caller are used up for nothing, no gradient is left behind."""
        torch.manual_seed(4)
        pvi.ELBO(4).explain(local_model, local_guide, randn(3))
        assert all(p.grad is None for p in pyro.get_param_store()._params.values())


class TestValues:
    """Objectives are values."""

    def test_equal_options_equal_objectives(self) -> None:
        one, two = pvi.BetaELBO(2.0, 4), pvi.BetaELBO(2.0, 4)
        one.bound(local_model, prior_guide, randn(3))  # a plan is no option
        assert one == two and hash(one) == hash(two)
        assert one != pvi.BetaELBO(3.0, 4)

    def test_with_a_dict_too(self) -> None:
        one, two = pvi.BetaELBO({"z": 2.0}), pvi.BetaELBO({"z": 2.0})
        assert one == two and hash(one) == hash(two)


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

    def check(self, loss: Callable[[], Tensor], times: int = 400) -> None:
        self.guide(self.y)
        draws = [gradients(loss()) for _ in range(times)]
        for name, expected in self.closed_form().items():
            mean, se = mean_se(torch.stack([d[name] for d in draws]))
            assert abs(mean - expected) < 3 * se + EXACT, name

    def loss(self, bound: pvi.Objective) -> Tensor:
        return bound.evaluate(mean_model, self.guide, (self.y,)).loss

    @pytest.mark.parametrize("kl", ["sample", "exact"])
    @pytest.mark.parametrize("num_particles", [1, 4])
    def test_elbo(self, kl: Any, num_particles: int) -> None:
        self.check(lambda: self.loss(pvi.ELBO(num_particles, kl=kl)))

    @pytest.mark.parametrize("factor", [0.0, 0.8, -1.0])
    def test_teeth(self, factor: float) -> None:
        """A gradient that is zeroed, shrunk or flipped fails the test above."""
        mutant = lambda: factor * self.loss(pvi.ELBO(4))  # noqa: E731
        with pytest.raises(AssertionError):
            self.check(mutant)
