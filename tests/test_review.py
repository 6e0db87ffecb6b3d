"""Found by review: once wrong, ignored or unclear."""

import math
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
from pvi import schedules
from pvi.engine.simulate import simulate
from pvi.engine.traces import prior
from pvi.errors import ModelError, ObjectiveError
from tests.scenarios import (
    EXACT,
    amortised_guide,
    gradients,
    local_guide,
    local_model,
    mean_model,
    mean_se,
    normal,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(6).double()


class TestSleep:
    def test_guides_that_ignore_the_data(self) -> None:
        objective = pvi.ReweightedWakeSleep(2, insomnia=0.5)
        with pytest.raises(ObjectiveError, match="'z' is drawn alike for simulated data"):
            objective.evaluate(local_model, local_guide, (X,))

    def test_guides_without_the_site(self) -> None:
        guide = AutoNormal(local_model)
        guide(X)
        with pytest.raises(ObjectiveError, match="a Delta or auxiliary"):
            pvi.ReweightedWakeSleep(2, insomnia=0.5).evaluate(local_model, guide, (X,))

    def test_a_covariate_like_the_outcome(self) -> None:
        """It stays, though its values are those of the outcome."""

        def model(c: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(c)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Bernoulli(logits=z + c), obs=y)

        c, y = torch.ones(4), torch.ones(4)
        for _ in range(5):
            made = simulate(model, (c, y), {})
            assert made.args[0] is c and made.args[1] is not y


class TestPenalties:
    def test_score_of_a_global(self) -> None:
        """d/d logit of the mean of 10 k - log p(k) / q(k) is p (1 - p) (10 + logit p).

        The rest of the bound is exact: z comes from its posterior.
        """

        def model(x: Tensor) -> None:
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pvi.penalty("count", 10.0 * k)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            p = param("p", 0.3, constraint=constraints.unit_interval)
            pyro.sample("k", dist.Bernoulli(p))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

        objective = pvi.IWAE(3, num_outer=8)
        losses = (objective.evaluate(model, guide, (X,)).loss for _ in range(120))
        mean, se = mean_se(torch.stack([gradients(loss)["p"] for loss in losses]))
        expected = 0.3 * 0.7 * (10.0 + math.log(0.3 / 0.7))
        assert abs(float(mean) - expected) < 3.5 * float(se) and float(se) < 0.2

    def test_detached_draws(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pvi.penalty("square", 3.0 * z**2)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = X.repeat(300)
        objective = pvi.ReweightedWakeSleep(5)
        found = {}
        for name, program in {"loud": model, "bare": local_model}.items():
            rows = [
                gradients(objective.evaluate(program, amortised_guide, (x,)).loss)
                for _ in range(12)
            ]
            found[name] = mean_se(torch.stack([r["slope"] for r in rows]) / 300)
        expected = 6.0 * 0.3 * float((X**2).sum())
        gap = float(found["loud"][0] - found["bare"][0])
        error = math.hypot(*(float(f[1]) for f in found.values()))
        assert abs(gap - expected) < 3.5 * error and expected > 8 * error

    def test_rows_outside_the_plate(self) -> None:
        def model(x: Tensor) -> None:
            pvi.penalty("square", (x**2).sum())
            local_model(x)

        with pytest.raises(ModelError, match=r"pvi\.penalty 'square' depends on the batch's rows"):
            pvi.fit(model, data=X, batch_size=2, steps=1)
        fit = pvi.fit(model, data=X, steps=1, seed=0)
        assert fit.history["penalty"][0] == pytest.approx(float((X**2).sum()))

    def test_prior_as_guide(self) -> None:
        def model(x: Tensor) -> None:
            local_model(x)
            pvi.penalty("one", 1.0)

        assert math.isfinite(pvi.ELBO().bound(model, prior(model), X))

    def test_alone(self) -> None:
        def model() -> None:
            pvi.penalty("one", 1.0)

        with pytest.raises(ModelError, match="no sample site"):
            pvi.ELBO().bound(model, lambda: None)


class TestOwn:
    def test_discrete_guides_need_detached_draws(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("x", dist.Normal(k, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            p = param("p", 0.3, constraint=constraints.unit_interval)
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Bernoulli(p))

        objective = pvi.IWAE(3, gradient=lambda draws: -draws.log_w.sum())
        with pytest.raises(ObjectiveError, match="'k' has no reparameterised sampler"):
            objective.evaluate(model, guide, (X,))

    @pytest.mark.parametrize(
        "mean", [lambda w: w.amax(0), lambda w: torch.logsumexp(w.clamp(min=-3.0), 0)]
    )
    def test_kinks(self, mean: Any) -> None:
        with pytest.raises(ObjectiveError, match="has a kink"):
            pvi.Objective(5, mean=mean, gradient="path")
        pvi.Objective(5, mean=mean, gradient="score")

    def test_shape_of_a_mean(self) -> None:
        with pytest.raises(ObjectiveError, match=r"shape \(3, 6\) into \(6,\).*got \(\)"):
            pvi.Objective(3, mean=lambda w: w.mean()).bound(local_model, amortised_guide, X)

    def test_one_particle(self) -> None:
        shifted = pvi.Objective(1, mean=lambda w: w.mean(0) + 100.0)
        values = []
        for objective in (shifted, pvi.ELBO()):
            torch.manual_seed(0)
            values.append(objective.bound(local_model, amortised_guide, X))
        assert values[0] == pytest.approx(values[1] + 600.0)

    def test_unequal_scales(self) -> None:
        """Wake's losses are log p and log q as they are."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=0.3):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        seen = []

        def look(draws: pvi.WeightedDraws) -> Tensor:
            seen.append(draws)
            return draws.log_w.sum()

        guide = poutine.scale(amortised_guide, 0.3)
        pvi.IWAE(3, gradient=look).evaluate(model, guide, (X,))
        (draws,) = seen
        z = draws.terms["z"].sites[0].q.value
        log_p = 0.3 * normal(z, 0.0, 1.0) + normal(X, z, 1.0)
        torch.testing.assert_close(draws.log_p, log_p)
        log_q = (log_p - draws.log_w) / 0.3
        torch.testing.assert_close(draws.log_q, log_q)

    @pytest.mark.parametrize("losses", [None, torch.zeros(3), {}, {"loss": torch.zeros(())}])
    def test_what_it_returns(self, losses: Any) -> None:
        with pytest.raises(ObjectiveError, match=r"must return a scalar|can't be named 'loss'"):
            pvi.IWAE(3, gradient=lambda draws: losses).evaluate(local_model, amortised_guide, (X,))


class TestRules:
    @staticmethod
    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(param("loc", 0.3), positive("scale", 0.8)))

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("num_particles", [1, 3])
    def test_latents_outside_plates(self, num_particles: int, batched: bool) -> None:
        options: dict[str, Any] = {"kl": "exact", "vectorize_particles": batched}
        for rule in (pvi.FreeBits(5.0), pvi.FreeBits(5.0, per="dimension"), pvi.Capacity(5.0)):
            objective = pvi.ELBO(num_particles, weighting=rule, **options)
            value = objective.evaluate(mean_model, self.guide, (X,))
            kl = float(value.terms.kl()["mu"].detach())
            cost = abs(kl - 5.0) if isinstance(rule, pvi.Capacity) else max(kl, 5.0)
            rest = float(value.terms.log_likelihood().mean().detach())
            assert float(value.loss.detach()) == pytest.approx(cost - rest, abs=EXACT)

    def test_outer_draws(self) -> None:
        rule = pvi.BetaTC(6.0)
        value = pvi.Objective(2, num_outer=2, weighting=rule).evaluate(
            local_model, amortised_guide, (X,)
        )
        total = torch.stack(list(value.parts.values())).sum()
        torch.testing.assert_close(total, value.terms.kl()["z"])

    def test_beta_beside_a_rule(self) -> None:
        objective = pvi.ELBO(kl="exact", beta=5.0, weighting=pvi.FreeBits(0.1))
        with pytest.raises(ObjectiveError, match="'z' has beta = 5, but FreeBits takes the place"):
            objective.evaluate(local_model, local_guide, (X,))

    def test_points(self) -> None:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(param("loc", torch.zeros(len(x)), event_dim=0)))

        with pytest.raises(ObjectiveError, match="a Delta at site 'z'"):
            pvi.ELBO(weighting=pvi.Capacity(1.0)).evaluate(local_model, guide, (X,))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: pvi.ELBO(weighting="free_bits"),  # type: ignore[arg-type]
            lambda: pvi.ELBO(weighting=pvi.FreeBits),  # type: ignore[arg-type]
            lambda: schedules.linear("10"),  # type: ignore[arg-type]
            lambda: schedules.constant(None),  # type: ignore[arg-type]
        ],
    )
    def test_types(self, make: Any) -> None:
        with pytest.raises(ObjectiveError, match="must be"):
            make()

    def test_names(self) -> None:
        for sites in ("z", []):
            objective = pvi.ELBO(kl="exact", weighting=pvi.FreeBits(1.0, sites=sites))
            with pytest.raises(ObjectiveError, match="must be a list of names"):
                objective.evaluate(local_model, local_guide, (X,))


class TestSchedules:
    def test_the_time_that_is_needed(self) -> None:
        objective = pvi.BetaELBO({"z": schedules.linear(10, unit="epoch")})
        with pytest.raises(ObjectiveError, match=r"needs at\(epoch=...\)"):
            objective.at(step=1000)
        assert objective.at(epoch=20.0).beta == {"z": 1.0}

    def test_ends_with_the_fit(self) -> None:
        """No step was trained at weight 1, so nothing has converged to the posterior."""
        objective = pvi.BetaELBO(schedules.linear(100))
        fit = pvi.fit(local_model, data=X, objective=objective, steps=100, seed=0)
        assert not fit.converged and "came after the KL schedule's end" in fit.reason
        assert any("tempered" in caveat for caveat in fit.posterior.caveats())

    def test_epochs_of_a_model_that_subsamples(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=2) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        objective = pvi.BetaELBO(schedules.linear(10, unit="epoch"), kl="exact")
        fit = pvi.fit(model, data=X, objective=objective, steps=40, seed=0)
        h = fit.history
        weight = (h["loss"] + h["log_likelihood"]) / h["kl/z"]
        assert weight[15] == pytest.approx(0.5)  # six rows by twos: three steps an epoch
