"""KL terms: closed forms and when to use them, scales and masks, beta."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from tests.scenarios import (
    EXACT,
    FixedNoise,
    K,
    gradients,
    local_model,
    mean_se,
    nested_guide,
    nested_model,
    normal,
    param,
    positive,
    power_mean,
    prior_guide,
    randn,
    repeat,
)

pytestmark = pytest.mark.usefixtures("isolated")


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
            u = pyro.sample("u", dist.Normal(param("loc", 0.4), 0.3), infer={"is_auxiliary": True})
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
