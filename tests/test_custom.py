"""Bounds and gradients of one's own; reweighted wake-sleep."""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.engine.simulate import simulate
from pvi.errors import ObjectiveError
from tests.scenarios import (
    EXACT,
    FixedNoise,
    K,
    amortised_guide,
    gradients,
    local_model,
    mean_se,
    nested_guide,
    nested_model,
    normal,
    normal_log_z,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(6).double() * 1.4


def log_mean(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def jackknife(log_w: Tensor) -> Tensor:
    """K L_K - (K - 1) mean_k L_{K-1} without draw k (Nowozin 2018)."""
    count = len(log_w)
    rest = torch.stack([log_mean(torch.cat([log_w[:k], log_w[k + 1 :]])) for k in range(count)])
    return count * log_mean(log_w) - (count - 1) * rest.mean(0)


def surrogate(draws: pvi.WeightedDraws) -> Tensor:
    """IWAE again, written as a loss."""
    return -draws.outer - draws.size * log_mean(draws.log_w).sum()


class TestMean:
    @pytest.mark.parametrize("gradient", ["reparam", "path", "score"])
    @pytest.mark.parametrize("nested", [False, True], ids=["local", "nested"])
    def test_iwae_written_anew(self, nested: bool, gradient: Any) -> None:
        pair = (nested_model, nested_guide) if nested else (local_model, amortised_guide)
        found = []
        options: dict[str, Any] = {"gradient": gradient, "num_outer": 2}
        for objective in (pvi.IWAE(K, **options), pvi.Objective(K, mean=log_mean, **options)):
            torch.manual_seed(1)
            value = objective.evaluate(*pair, (X,))
            found.append((value.loss.detach(), gradients(value.loss)))
        torch.testing.assert_close(found[0], found[1])

    def test_jackknife(self) -> None:
        """Nearer to the evidence than IWAE, and its path gradient has the mean of reparam's."""
        x = X.repeat(200)
        values = {}
        for name, mean in {"iwae": log_mean, "jackknife": jackknife}.items():
            objective = pvi.Objective(K, mean=mean)
            values[name] = objective.bound(local_model, amortised_guide, x) / 200
        log_z = normal_log_z(X)
        assert abs(values["jackknife"] - log_z) < 0.5 * abs(values["iwae"] - log_z)
        found = {g: self.slopes(jackknife, g, X.repeat(300)) for g in ("reparam", "path", "score")}
        wrong = self.slopes(log_mean, "path", X.repeat(300))
        for name, (expected, error) in found["reparam"].items():
            for gradient in ("path", "score"):
                mean, se = found[gradient][name]
                assert abs(float(mean - expected)) < 3.5 * math.hypot(float(se), float(error))
        gap = {n: found["path"][n][0] - wrong[n][0] for n in wrong}
        errors = {n: math.hypot(*(float(f[n][1]) for f in (found["path"], wrong))) for n in wrong}
        assert any(abs(float(gap[n])) > 6 * errors[n] for n in gap)  # IWAE's would be noticed

    @staticmethod
    def slopes(mean: Any, gradient: Any, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        objective = pvi.Objective(K, mean=mean, gradient=gradient)
        rows = [
            gradients(objective.evaluate(local_model, amortised_guide, (x,)).loss)
            for _ in range(16)
        ]
        return {n: mean_se(torch.stack([r[n] for r in rows])) for n in rows[0]}

    def test_explain_and_refusals(self) -> None:
        objective = pvi.Objective(K, mean=jackknife)
        text = str(objective.explain(local_model, amortised_guide, X))
        assert "bound: jackknife, 5 particle(s)" in text and "yours to know" in text
        with pytest.raises(ObjectiveError, match="in the place of alpha"):
            pvi.Objective(K, mean=jackknife, alpha=0.0)
        with pytest.raises(ObjectiveError, match="got a mean of your own"):
            pvi.Objective(K, mean=jackknife, kl="exact")


class TestGradient:
    @pytest.mark.parametrize("nested", [False, True], ids=["local", "nested"])
    def test_iwae_written_anew(self, nested: bool) -> None:
        pair = (nested_model, nested_guide) if nested else (local_model, amortised_guide)
        found = []
        for gradient in ("reparam", surrogate):
            torch.manual_seed(1)
            value = pvi.IWAE(K, gradient=gradient).evaluate(*pair, (X,))  # type: ignore[arg-type]
            found.append((value.loss.detach(), gradients(value.loss)))
        torch.testing.assert_close(found[0], found[1])

    def test_own_score(self) -> None:
        """REINFORCE written by hand, with detached draws."""

        def reinforce(draws: pvi.WeightedDraws) -> Tensor:
            log_w = draws.log_w
            return -draws.size * (log_w + log_w.detach() * draws.log_q).mean(0).sum()

        reinforce.detach_draws = True  # type: ignore[attr-defined]
        x = X.repeat(500)
        found = {}
        for name, gradient in {"own": reinforce, "reparam": "reparam"}.items():
            objective = pvi.ELBO(K, gradient=gradient)  # type: ignore[arg-type]
            rows = [
                gradients(objective.evaluate(local_model, amortised_guide, (x,)).loss)
                for _ in range(10)
            ]
            found[name] = {n: mean_se(torch.stack([r[n] for r in rows])) for n in rows[0]}
        for name, (mean, se) in found["own"].items():
            expected, error = found["reparam"][name]
            assert abs(float(mean - expected)) < 3.5 * math.hypot(float(se), float(error))
            assert abs(float(expected)) > 5 * float(se)

    def test_recorded_by_name(self) -> None:
        def two(draws: pvi.WeightedDraws) -> Mapping[str, Tensor]:
            return {"one": surrogate(draws), "two": 0.0 * draws.log_q.sum()}

        fit = pvi.fit(
            local_model, amortised_guide, X, objective=pvi.IWAE(K, gradient=two), steps=3, seed=0
        )
        assert {"one", "two", "bound", "kl/z", "log_likelihood"} <= set(fit.history)

    def test_refusals(self) -> None:
        with pytest.raises(ObjectiveError, match="a gradient of your own"):
            pvi.ELBO(K, gradient=surrogate, beta=2.0)
        with pytest.raises(ObjectiveError, match="FreeBits needs gradient"):
            pvi.ELBO(K, kl="exact", gradient=surrogate, weighting=pvi.FreeBits(1.0))


def learned_model(x: Tensor) -> None:
    """A model with a parameter of its own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(param("slope_p", 0.8) * z, 1.0), obs=x)


class TestWakeSleep:
    noise = randn(K, 6, seed=1).double()

    def guide(self, x: Tensor) -> None:
        slope, scale = param("slope", 0.3), positive("scale", 0.9)
        with pyro.plate("data", len(x)):
            pyro.sample("z", FixedNoise(slope * x, scale.expand(len(x)), self.noise[:, : len(x)]))

    def test_wake(self) -> None:
        """Weighted log densities at draws that are held fixed."""
        value = pvi.ReweightedWakeSleep(K).evaluate(learned_model, self.guide, (X,))
        slope_p, slope, scale = (pyro.param(n) for n in ("slope_p", "slope", "scale"))
        z = (slope * X + scale * self.noise).detach()
        log_q = -0.5 * ((z - slope * X) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
        log_p = normal(z, 0.0, 1.0) - 0.5 * (X - slope_p * z) ** 2 - 0.5 * math.log(2 * math.pi)
        v = torch.softmax((log_p - log_q).detach(), 0)
        expected = -(v * log_p).sum() - (v * log_q).sum()
        torch.testing.assert_close(gradients(value.loss), gradients(expected))
        bound = log_mean(log_p - log_q).sum()
        assert float((value.loss + bound).detach()) == pytest.approx(0, abs=EXACT)

    def test_model_follows_iwae(self) -> None:
        got = []
        for objective in (pvi.IWAE(K), pvi.ReweightedWakeSleep(K)):
            value = objective.evaluate(learned_model, self.guide, (X,))
            got.append(gradients(value.loss)["slope_p"])
        torch.testing.assert_close(got[0], got[1])

    def test_sleep(self) -> None:
        """-E_p log q(z | x) has its minimum where q is the exact posterior, whatever the data."""

        def best(x: Tensor) -> None:
            slope, scale = param("best", 0.5), positive("best_sd", math.sqrt(0.5))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * x, scale))

        objective = pvi.ReweightedWakeSleep(2, insomnia=0.0)
        x = 5.0 + torch.zeros(2000)
        for guide, at_best in ((best, True), (amortised_guide, False)):
            rows = [gradients(objective.evaluate(local_model, guide, (x,)).loss) for _ in range(30)]
            means = [mean_se(torch.stack([r[n] for r in rows])) for n in rows[0]]
            z = [abs(float(mean / se)) for mean, se in means if float(se) > 0]
            assert max(z) < 3.5 if at_best else max(z) > 20

    def test_discrete_latents(self) -> None:
        """The guide needs no reparameterisation and finds the exact posterior."""
        x = torch.tensor([-1.0, 0.0, 0.5, 2.0])

        def coins(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                start = torch.full((4,), 0.5)
                probs = param("probs", start, constraint=constraints.unit_interval, event_dim=0)
                pyro.sample("k", dist.Bernoulli(probs))

        objective = pvi.ReweightedWakeSleep(100)
        fit = pvi.fit(coins, guide, x, objective=objective, steps=250, lr=0.1, seed=0)
        odds = 0.3 / 0.7 * (normal(x, 2.0, 1.0) - normal(x, 0.0, 1.0)).exp()
        found = fit.posterior.sample(20_000, seed=0)["k"].mean(0)
        torch.testing.assert_close(found, odds / (1 + odds), atol=0.02, rtol=0)

    def test_refusals(self) -> None:
        with pytest.raises(ObjectiveError, match="'theta' is drawn once per bound"):
            pvi.ReweightedWakeSleep(K).evaluate(nested_model, nested_guide, (X,))
        with pytest.raises(ObjectiveError, match="insomnia must be between 0 and 1"):
            pvi.ReweightedWakeSleep(K, insomnia=2.0)

        def closure() -> None:
            local_model(X)

        with pytest.raises(ObjectiveError, match="site 'x' is no argument"):
            objective = pvi.ReweightedWakeSleep(K, insomnia=0.5)
            objective.evaluate(closure, lambda: self.guide(X))


class TestSimulate:
    def test_arguments_are_replaced(self) -> None:
        made = simulate(local_model, (X,), {})
        assert torch.equal(made.args[0], made.trace.nodes["x"]["value"]) and not made.hidden
        assert not torch.equal(made.args[0], X)

    def test_law(self) -> None:
        draws = torch.stack([simulate(local_model, (X,), {}).args[0] for _ in range(400)])
        assert float(draws.var()) == pytest.approx(2.0, abs=3 * 2.0 * math.sqrt(2 / draws.numel()))

    def test_factor(self) -> None:
        def model() -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -(z**2))

        with pytest.raises(ObjectiveError, match=r"site 'f' comes from pyro\.factor"):
            simulate(model, (), {})
