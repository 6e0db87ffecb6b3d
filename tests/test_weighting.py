"""KL weights: schedules, free bits, capacity, beta-TC; what is recorded."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pvi
from pvi import schedules
from pvi.engine.weighting import stratified_log_weights
from pvi.errors import ObjectiveError
from tests.scenarios import (
    EXACT,
    FixedNoise,
    gradients,
    local_guide,
    local_model,
    mean_model,
    normal,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")
N, D, K = 6, 4, 3


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.5).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x: Tensor) -> None:
    """A different KL in every dimension, from 0 to about 2 nats."""
    slope = param("slope", torch.linspace(0.0, 2.0, D))
    scale = positive("scale", [1.5, 1.0, 0.5, 0.2])
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.unsqueeze(-1), scale).to_event(1))


def kl_of(x: Tensor) -> Tensor:
    """KL of every datum and dimension, `(N, D)`, written out."""
    slope, scale = pyro.param("slope"), pyro.param("scale")
    ratio = (scale / 1.5) ** 2
    return 0.5 * (ratio + (slope * x.unsqueeze(-1) / 1.5) ** 2 - 1 - ratio.log())


def likelihood(value: Any) -> Tensor:
    return value.terms.log_likelihood().mean()


class TestFreeBits:
    x = randn(N).double()

    @pytest.mark.parametrize("nats", [0.0, 0.3, 1.0, 5.0])
    @pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
    @pytest.mark.parametrize("per", ["site", "dimension", 2, 4])
    def test_closed_form(self, per: Any, batched: bool, nats: float) -> None:
        bits = pvi.FreeBits(nats, per=per)
        objective = pvi.ELBO(K, kl="exact", weighting=bits, vectorize_particles=batched)
        value = objective.evaluate(model, guide, (self.x,))
        groups = {"site": 1, "dimension": D}.get(per, per)
        kl = kl_of(self.x).unflatten(1, (groups, D // groups)).sum(2).mean(0)
        expected = N * kl.clamp(min=nats).sum() - likelihood(value)
        assert float((value.loss - expected).detach()) == pytest.approx(0, abs=EXACT)
        plain = likelihood(value) - kl_of(self.x).sum()
        assert float((value.bound - plain).detach()) == pytest.approx(0, abs=EXACT)
        torch.testing.assert_close(gradients(value.loss), gradients(expected))

    def test_default_guards_against_collapse(self) -> None:
        """At a KL of zero the free KL gives no gradient towards zero."""
        objective = pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(100.0))
        value = objective.evaluate(model, guide, (self.x,))
        torch.testing.assert_close(gradients(value.loss), gradients(-likelihood(value)))

    def test_a_sites_own_plates_scales_and_masks(self) -> None:
        """Subsampling multiplies the cost, a mask takes rows out of the mean."""
        keep = torch.tensor([True, False, True, True, False, True])
        pair = [poutine.mask(f, mask=keep) for f in (model, guide)]
        objective = pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(3.0))
        value = objective.evaluate(*pair, (self.x,))
        mean = kl_of(self.x)[keep].sum(1).mean()
        expected = 4 * mean.clamp(min=3.0) - likelihood(value)
        assert float((value.loss - expected).detach()) == pytest.approx(0, abs=EXACT)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "needs exact KLs"),
            ({"kl": "exact", "gradient": "score"}, None),
        ],
    )
    def test_refusals(self, options: dict, message: str | None) -> None:
        if message:
            with pytest.raises(ObjectiveError, match=message):
                pvi.ELBO(weighting=pvi.FreeBits(1.0), **options)
            return
        objective = pvi.ELBO(weighting=pvi.FreeBits(1.0), **options)
        with pytest.raises(ObjectiveError, match="no score gradient, but site 'z'"):
            objective.evaluate(model, guide, (self.x,))

    def test_sampled_sites_and_joint_dimensions(self) -> None:
        def joint(x: Tensor, observe: bool = False) -> None:
            with pyro.plate("data", len(x)):
                scale = torch.eye(D) * (1.0 if observe else param("s", 0.5)) + 0.1
                z = torch.zeros(len(x), D)
                z = pyro.sample("z", dist.MultivariateNormal(z, scale_tril=scale.tril()))
                if observe:
                    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def mixture(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                parts = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
                weights = dist.Categorical(torch.ones(2))
                z = pyro.sample("z", dist.MixtureSameFamily(weights, parts))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        make = pvi.TraceMeanFieldELBO
        with pytest.raises(ObjectiveError, match="not independent under its MultivariateNormal"):
            by_dimension = make(weighting=pvi.FreeBits(1.0, per="dimension"))
            by_dimension.evaluate(lambda x: joint(x, True), joint, (self.x,))
        pyro.clear_param_store()
        with pytest.raises(ObjectiveError, match=r"'z' is sampled \(sample: no closed form\)"):
            make(weighting=pvi.FreeBits(1.0)).evaluate(mixture, local_guide, (self.x,))
        pyro.clear_param_store()
        pyro.clear_param_store()
        with pytest.raises(ObjectiveError, match="don't divide"):
            make(weighting=pvi.FreeBits(1.0, per=3)).evaluate(model, guide, (self.x,))
        with pytest.raises(ObjectiveError, match=r"\['w'\] to apply it to; the latent sites"):
            make(weighting=pvi.FreeBits(1.0, sites=["w"])).evaluate(model, guide, (self.x,))


class TestCapacity:
    x = randn(N).double()

    @pytest.mark.parametrize("capacity", [0.0, 2.0, 30.0])
    @pytest.mark.parametrize("kl", ["exact", "sample"])
    def test_value(self, kl: Any, capacity: float) -> None:
        objective = pvi.ELBO(K, kl=kl, weighting=pvi.Capacity(capacity, gamma=7.0))
        value = objective.evaluate(model, guide, (self.x,))
        total = value.terms.kl()["z"]
        expected = 7.0 * (total - N * capacity).abs() - likelihood(value)
        assert float((value.loss - expected).detach()) == pytest.approx(0, abs=EXACT)
        torch.testing.assert_close(gradients(value.loss), gradients(expected))

    def test_schedule(self) -> None:
        ramp = schedules.linear(100, 0.0, 25.0)
        objective = pvi.ELBO(weighting=pvi.Capacity(ramp, gamma=7.0))
        assert objective.at(step=50).weighting == pvi.Capacity(12.5, gamma=7.0)

    def test_different_plates(self) -> None:
        def two(x: Tensor, obs: bool = True) -> None:
            pyro.sample("w", dist.Normal(0.0, 1.0))
            (model if obs else guide)(x)

        objective = pvi.ELBO(weighting=pvi.Capacity(1.0))
        with pytest.raises(ObjectiveError, match="'w' and 'z' are in different plates"):
            objective.evaluate(two, lambda x: two(x, False), (self.x,))


class TestBetaTC:
    x = randn(N).double()
    noise = randn(K, N, D, seed=1).double()

    def guide(self, x: Tensor, rows: Tensor | None = None, size: int = N) -> None:
        rows = torch.arange(len(x)) if rows is None else rows
        slope, scale = param("slope", torch.linspace(0.0, 2.0, D)), positive("scale", 0.7)
        with pyro.plate("data", size, subsample=rows):
            loc = slope * x[rows].unsqueeze(-1)
            noise = self.noise[:, rows]
            pyro.sample("z", FixedNoise(loc, scale.expand(loc.shape), noise).to_event(1))

    @staticmethod
    def model(x: Tensor, rows: Tensor | None = None, size: int = N) -> None:
        rows = torch.arange(len(x)) if rows is None else rows
        with pyro.plate("data", size, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.5).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[rows])

    def by_hand(self) -> dict[str, Tensor]:
        """The parts on all rows: the aggregate posterior is a plain mixture."""
        loc = pyro.param("slope") * self.x.unsqueeze(-1)
        z = loc + pyro.param("scale") * self.noise  # (K, N, D)
        pairs = normal(z.unsqueeze(2), loc, pyro.param("scale"))  # (K, i, j, D)
        joint = pairs.sum(-1).exp().mean(2).log().sum(1).mean()
        single = pairs.exp().mean(2).log().sum((1, 2)).mean()
        own = normal(z, loc, pyro.param("scale")).sum((1, 2)).mean()
        prior = normal(z, 0.0, 1.5).sum((1, 2)).mean()
        return {
            "mutual_information": own - joint,
            "total_correlation": joint - single,
            "dimension_wise_kl": single - prior,
        }

    @pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
    def test_full_batch(self, batched: bool) -> None:
        rule = pvi.BetaTC(6.0, mutual_information=0.5, dimension_wise=2.0)
        objective = pvi.ELBO(K, weighting=rule, vectorize_particles=batched)
        if not batched:
            self.noise = self.noise[:1].expand(K, N, D)
        value = objective.evaluate(self.model, self.guide, (self.x,))
        expected = self.by_hand()
        torch.testing.assert_close(dict(value.parts), expected)
        total = sum(value.parts.values())
        torch.testing.assert_close(total, value.terms.kl()["z"])
        weights = (0.5, 6.0, 2.0)
        cost = sum(w * e for w, e in zip(weights, expected.values(), strict=True))
        torch.testing.assert_close(value.loss, cost - likelihood(value))
        torch.testing.assert_close(gradients(value.loss), gradients(cost - likelihood(value)))

    @pytest.mark.parametrize("batch", [2, 3, 6])
    def test_parts_telescope_on_minibatches(self, batch: int) -> None:
        rows = torch.randperm(N)[:batch]
        rule = pvi.BetaTC(6.0)
        terms = pvi.ELBO(K, weighting=rule).terms(self.model, self.guide, self.x, rows)
        _, parts = rule.cost(rule.covers(terms))
        total = torch.stack(list(parts.values())).sum()
        torch.testing.assert_close(total, terms.kl()["z"])

    @pytest.mark.parametrize("batch", [2, 3, 5])
    def test_aggregate_is_unbiased(self, batch: int) -> None:
        """Over all batches that hold row 0, the mean of its estimate of q(z) is q(z)."""
        density = torch.rand(5)
        weights = stratified_log_weights(5, batch).exp()
        torch.testing.assert_close(weights.sum(1), torch.ones(batch))
        estimates = [
            weights[0] @ density[[0, *others]]
            for others in itertools.combinations(range(1, 5), batch - 1)
        ]
        torch.testing.assert_close(torch.stack(estimates).mean(), density.mean())

    def test_needs_one_plate(self) -> None:
        def program(y: Tensor, obs: bool = True) -> None:
            mu = pyro.sample("mu", dist.Normal(param("loc", 0.1) if not obs else 0.0, 1.0))
            if obs:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        objective = pvi.ELBO(weighting=pvi.BetaTC(2.0))
        with pytest.raises(ObjectiveError, match="'mu' in one plate"):
            objective.evaluate(program, lambda y: program(y, False), (torch.tensor(1.0),))

    def test_exact_kl_is_refused(self) -> None:
        with pytest.raises(ObjectiveError, match="BetaTC takes the sampled KL apart"):
            pvi.TraceMeanFieldELBO(weighting=pvi.BetaTC(2.0))


class TestSchedules:
    x = randn(N).double()

    def test_resolved_in_time(self) -> None:
        objective = pvi.BetaELBO({"z": schedules.linear(10, unit="epoch")}, kl="exact")
        losses = [
            objective.at(step=1000, epoch=e).evaluate(local_model, local_guide, (self.x,))
            for e in (0, 5, 20)
        ]
        kl = float(losses[0].terms.kl()["z"].detach())
        for share, value in zip((0.0, 0.5, 1.0), losses, strict=True):
            expected = share * kl - float(likelihood(value).detach())
            assert float(value.loss.detach()) == pytest.approx(expected, abs=EXACT)

    def test_needs_the_time(self) -> None:
        objective = pvi.BetaELBO(schedules.linear(10))
        with pytest.raises(ObjectiveError, match=r"needs to know the time.*objective.at\(step="):
            objective.loss(local_model, local_guide, self.x)
        assert math.isfinite(objective.bound(local_model, local_guide, self.x))
        assert "linear 0 to 1 in 10 steps" in str(
            objective.explain(local_model, local_guide, self.x)
        )

    @pytest.mark.parametrize(
        "make",
        [
            lambda: schedules.linear(0),
            lambda: schedules.linear(10, -1.0),
            lambda: schedules.linear(10, unit="day"),  # type: ignore[arg-type]
            lambda: schedules.cyclical(10, ramp=0.0),
            lambda: schedules.cyclical(10, cycles=0),
            lambda: schedules.sigmoid(10, steepness=0.0),
            lambda: pvi.FreeBits(-1.0),
            lambda: pvi.FreeBits(1.0, per=0),
            lambda: pvi.Capacity("much"),  # type: ignore[arg-type]
        ],
    )
    def test_bad_options(self, make: Any) -> None:
        with pytest.raises(ObjectiveError, match="must be"):
            make()

    def test_fit_follows_and_records(self) -> None:
        objective = pvi.BetaELBO(schedules.linear(100, 0.5), kl="exact")
        fit = pvi.fit(local_model, data=self.x, objective=objective, steps=150, seed=0)
        h = fit.history
        weight = (h["loss"] + h["log_likelihood"]) / h["kl/z"]
        expected = [min(0.5 + 0.5 * t / 100, 1.0) for t in range(150)]
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(expected).double())
        torch.testing.assert_close(h["bound"], h["log_likelihood"] - h["kl/z"])
        assert fit.posterior.caveats() == []  # the weight has reached 1

    def test_longer_than_the_fit(self) -> None:
        """A warm-up that never ends is the common mistake: said aloud, and not converged."""
        objective = pvi.BetaELBO(schedules.linear(400, unit="epoch"))
        with pytest.warns(UserWarning, match="ended after 30 steps, before the KL schedule did"):
            fit = pvi.fit(local_model, data=self.x, objective=objective, steps=30, seed=0)
        assert not fit.converged and "KL schedule ends at step 400" in fit.reason
        assert any("tempered" in caveat for caveat in fit.posterior.caveats())

    def test_no_early_end(self) -> None:
        """The bound is level long before, but the rate waits for the weight with its first fall."""
        y = randn(N)
        objective = pvi.BetaELBO(schedules.cyclical(300, 0.2, cycles=3), 4, kl="exact")
        plain = pvi.ELBO(4, kl="exact")
        falls = []
        for bound, end in ((plain, 800), (objective, 1250)):
            stop = [lambda step, end=end: step.step == end]
            options = {"optimizer": "adam", "callbacks": stop, "seed": 0}
            fit = pvi.fit(mean_model, data=y, objective=bound, **options)
            falls.append(int((fit.history["lr"] == fit.history["lr"][0]).sum()))
        assert falls[0] < 750  # where the weight reaches 1 for the last time
        assert 750 + 200 <= falls[1] < 1250  # at least a stage of 200 steps later
