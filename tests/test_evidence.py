"""Log evidence where it is known, and what is refused or called unreliable."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

import pvi
from pvi.diagnostics import weights
from pvi.diagnostics.ais import Annealing
from pvi.diagnostics.evidence import Options
from pvi.diagnostics.weights import Tally, make_target
from pvi.engine.simulate import simulate
from pvi.engine.traces import hidden
from pvi.errors import GuideError, ModelError, ObjectiveError
from pvi.posterior.psis import psis
from tests.linear import regression, regression_guide, regression_log_z, vae, vae_guide, vae_log_z
from tests.scenarios import (
    local_guide,
    local_model,
    nested_guide,
    nested_model,
    normal_log_z,
    param,
    positive,
    randn,
    switch_guide,
    switch_log_z,
    switch_model,
)

pytestmark = pytest.mark.usefixtures("isolated")


def evidence(model: Callable, guide: Callable | None, x: Tensor, **options: Any) -> pvi.Evidence:
    if guide is not None:
        with pyro.poutine.block():
            guide(x)  # its parameters now exist
    return pvi.evidence(model, guide, x, **{"seed": 0, "progress": False, **options})


def data(model: Callable, like: Tensor) -> Tensor:
    """Observations from the model, of the shape of `like`."""
    with hidden():
        torch.manual_seed(1)
        return simulate(model, (like,), {}).args[0]


def close(found: pvi.Evidence, exact: Tensor | float, most: float = 0.2) -> None:
    """Each within 4 standard errors, their sum within 3, which are small enough to mean it."""
    exact = torch.as_tensor(exact)
    assert bool(((found.log_evidence - exact).abs() < 4 * found.se + 1e-9).all())
    assert abs(found.total - float(exact.sum())) < 3 * found.total_se + 1e-9
    assert found.total_se < most


def narrow_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + 1.0, 0.2))


class TestValues:
    def test_global_latents(self) -> None:
        y = data(regression, torch.zeros(20))
        found = evidence(regression, regression_guide, y)
        assert found.log_evidence.shape == () and found.reliable
        close(found, regression_log_z(y))

    def test_two_layers_of_local_latents(self) -> None:
        x = data(vae, torch.zeros(30, 4))
        found = evidence(vae, vae_guide, x)
        assert found.log_evidence.shape == found.khat.shape == (30,) and found.reliable
        close(found, vae_log_z(x), most=0.5)

    def test_nested_is_unbiased_for_few_inner_draws(self) -> None:
        x = randn(4)
        found = evidence(nested_model, nested_guide, x, num_samples=2, num_outer=600)
        close(found, normal_log_z(x, shared=1.0), most=0.3)

    def test_prior_as_guide(self) -> None:
        x = 0.5 * randn(5)
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        close(evidence(local_model, None, x), exact)

    def test_discrete_latents(self) -> None:
        x = randn(6)
        found = evidence(switch_model, switch_guide, x)
        close(found, switch_log_z(x))

    def test_sum_over_discrete_latents(self) -> None:
        def model(x: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(mu + 2 * k, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            pyro.sample("mu", dist.Normal(0.0, 0.8))

        x, mu = randn(4), torch.linspace(-8, 8, 4001)
        joint = switch_log_z(x - mu[:, None]).sum(-1) + dist.Normal(0.0, 1.0).log_prob(mu)
        exact = torch.logsumexp(joint, 0) + math.log(16 / 4000)
        for options in ({}, {"method": "ais", "num_steps": 20}):
            close(evidence(model, guide, x, **options), exact)

    def test_no_latents(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        found = evidence(model, lambda x: None, randn(3))
        assert found.total == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(randn(3)).sum()))
        assert found.total_se == 0 and found.reliable and "exact" in str(found)

    def test_observation_outside_the_plate(self) -> None:
        def model(x: Tensor) -> None:
            pyro.sample("t", dist.Normal(0.0, 1.0), obs=torch.tensor(0.4))
            local_model(x)

        x, more = randn(4), float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.4)))
        for method in ("is", "ais"):
            found = evidence(model, None, x, method=method, num_steps=10)
            assert found.total == pytest.approx(float(found.log_evidence.sum()) + more)

    def test_masked_data(self) -> None:
        keep = torch.tensor([True, False, True])

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)), poutine.mask(mask=keep):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.tensor([0.5, math.nan, -0.2])
        exact = torch.where(keep, dist.Normal(0.0, 2**0.5).log_prob(x.nan_to_num()), 0.0)
        close(evidence(model, None, x), exact)
        close(evidence(model, None, x, method="ais", num_steps=20), exact, most=0.5)

    def test_autoguide(self) -> None:
        y = data(regression, torch.zeros(20))
        guide = AutoNormal(regression, init_scale=0.3)
        for options in ({"num_samples": 20_000}, {"method": "ais", "num_steps": 60}):
            close(evidence(regression, guide, y, **options), regression_log_z(y), most=0.5)


class TestDraws:
    def test_number_is_exact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[int] = []

        def counted(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.4 * x, 0.8))
            drawn.append(z.numel() // len(x))

        x = randn(6)
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        target = make_target(local_model, counted, (x,), {})
        monkeypatch.setattr(weights, "CHUNK", 300 * target.size)
        drawn.clear()
        log_w = torch.cat(list(weights.guide_weights(target, 1001, 1, lambda items: items)))
        assert drawn == [300, 300, 300, 101] and log_w.shape == (1001, 6)
        close(evidence(local_model, counted, x, num_samples=1001), exact, most=0.5)

    def test_tally_is_the_formula_in_any_chunks(self) -> None:
        log_w = 2 * randn(1001, 2)
        tally = Tally(1001)
        for chunk in log_w.split(90):
            tally.add(chunk)
        w = log_w.exp()
        assert torch.allclose(tally.log_mean(), w.mean(0).log())
        assert torch.allclose(tally.ess(), w.sum(0) ** 2 / (w**2).sum(0))
        assert torch.allclose(tally.se(), w.std(0, correction=0) / w.mean(0) / math.sqrt(1000))
        khat = [psis(column).khat for column in log_w.T]
        assert tally.khat().tolist() == pytest.approx(khat)

    def test_weights_of_zero(self) -> None:
        log_w = torch.stack([torch.full((40,), -math.inf), torch.zeros(40)], 1).double()
        tally = Tally(40)
        tally.add(log_w)
        assert tally.log_mean().tolist() == [-math.inf, 0.0]
        assert tally.se().tolist() == [math.inf, 0.0] and tally.khat().tolist() == [math.inf, 0.0]

    @pytest.mark.parametrize("method", ["is", "ais"])
    def test_one_by_one_where_programs_cannot_broadcast(self, method: str) -> None:
        def model(x: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(torch.stack([*w, w[0]]), 1.0), obs=x)

        x = torch.tensor([0.2, -0.4, 0.1, 0.3])
        cov = torch.eye(4) + torch.eye(4)
        cov[0, 3] = cov[3, 0] = 1.0
        exact = torch.distributions.MultivariateNormal(torch.zeros(4), cov).log_prob(x)
        assert not make_target(model, None, (x,), {}).plan.vectorized
        options = {"num_samples": 1500, "num_chains": 8, "num_steps": 12}
        close(evidence(model, None, x, method=method, **options), exact, most=0.4)

    def test_seed_and_state(self) -> None:
        x = randn(6)
        local_guide(x)
        store, rng = pyro.get_param_store(), torch.get_rng_state()
        before = {name: value.tolist() for name, value in store.items()}
        one, two = (pvi.evidence(local_model, local_guide, x, seed=3) for _ in range(2))
        assert torch.equal(one.log_evidence, two.log_evidence)
        assert {name: value.tolist() for name, value in store.items()} == before
        assert torch.equal(torch.get_rng_state(), rng)
        assert not one.log_evidence.requires_grad


class TestVerdict:
    def test_bad_guide(self) -> None:
        found = evidence(local_model, narrow_guide, randn(40))
        assert not found.reliable and found.total < normal_log_z(randn(40)) - 10
        text = str(found)
        assert "unreliable, probably too low" in text and "of 40 data" in text and "khat is" in text

    def test_joint_verdict_counts_no_data(self) -> None:
        y = data(regression, torch.zeros(20))
        found = evidence(regression, partial(regression_guide, shift=4.0, width=0.3), y)
        assert not found.reliable and "data:" not in str(found)

    def test_bias_is_downwards(self) -> None:
        x = randn(2000, seed=3)
        exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        error = evidence(local_model, local_guide, x, num_samples=3).log_evidence - exact
        assert error.mean() < -3 * error.std() / math.sqrt(2000)


def scaled_model(x: Tensor) -> None:
    with poutine.scale(scale=0.5):
        local_model(x)


def scaled_guide(x: Tensor) -> None:
    with poutine.scale(scale=0.5):
        local_guide(x)


def subsampled_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def subsampled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def analytic_model(x: Tensor) -> None:
    pvi.kl("w", dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0))
    local_model(x)


def auxiliary_guide(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 0.1), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + shift, 0.8))


REFUSED: dict[str, tuple[Callable, Callable, dict, str]] = {
    "point": (local_model, AutoDelta(local_model), {}, r"point \(Delta\) at site 'z'"),
    "scaled model": (scaled_model, local_guide, {}, r"scale is 0.5 at site 'z' in the model"),
    "scaled guide": (local_model, scaled_guide, {}, r"scale is 0.5 at site 'z' in the guide"),
    "subsample": (subsampled_model, subsampled_guide, {}, r"plate 'data' is subsampled \(2 of 6\)"),
    "analytic": (analytic_model, local_guide, {}, r"pvi\.kl 'w'"),
    "auxiliary": (local_model, auxiliary_guide, {}, "auxiliary site 'shift'"),
    "outer": (local_model, local_guide, {"num_outer": 3}, "num_outer=3"),
    "method": (local_model, local_guide, {"method": "smc"}, "method must be 'is' or 'ais'"),
    "number": (local_model, local_guide, {"num_samples": 0}, "num_samples must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    model, guide, options, message = REFUSED[case]
    with pytest.raises(ObjectiveError, match=message):
        evidence(model, guide, randn(6), **options)


def test_infinite_weights() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(z > 0, math.inf, 0.0))

    with pytest.raises(ModelError, match="NaN or infinite"):
        evidence(model, narrow_guide, torch.zeros(3))


class TestAnnealing:
    """E[w] = p(x) for any number of distributions, forwards; E[1/w] = 1/p(x) backwards."""

    def test_few_steps_are_unbiased(self) -> None:
        y = data(regression, torch.zeros(20))
        guide = partial(regression_guide, shift=1.5, width=0.8)
        found = evidence(regression, guide, y, method="ais", num_steps=4, num_chains=4000)
        close(found, regression_log_z(y), most=0.2)

    def test_reverse(self) -> None:
        torch.manual_seed(0)
        with hidden():
            made = simulate(vae, (torch.zeros(800, 4),), {})
            target = make_target(vae, partial(vae_guide, width=1.5), made.args, {})
            annealing = Annealing(target, 4, 4, Options(progress=False).bar)
            log_w = annealing.reverse({n: made.trace.nodes[n]["value"] for n in ("z1", "z2")})[0]
        error = log_w - vae_log_z(made.args[0])
        inverse = (-error).exp()
        assert abs(inverse.mean() - 1) < 3 * inverse.std() / math.sqrt(800)
        assert error.mean() > 3 * error.std() / math.sqrt(800)

    def test_beats_importance_sampling_with_a_bad_guide(self) -> None:
        x = randn(10)
        found = evidence(local_model, narrow_guide, x, method="ais", num_steps=100)
        plain = evidence(local_model, narrow_guide, x)
        assert abs(found.total - normal_log_z(x)) < 1.0 < normal_log_z(x) - plain.total

    def test_constrained_latents(self) -> None:
        def model(x: Tensor) -> None:
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            share = pyro.sample("share", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Poisson(rate), obs=x)
            pyro.sample("n", dist.Multinomial(3, share), obs=torch.tensor([2.0, 0.0, 1.0]))

        def guide(x: Tensor) -> None:
            pyro.sample("rate", dist.LogNormal(param("m", 0.5), positive("s", 0.8)))
            pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 2.0, 2.0])))

        x = torch.tensor([1.0, 3.0, 0.0, 2.0])
        lgamma, total = math.lgamma, float(x.sum())
        poisson = lgamma(2 + total) - (2 + total) * math.log(5) - float(torch.lgamma(x + 1).sum())
        up = {a: lgamma(a + n) - lgamma(a) for a, n in ((1, 2), (2, 0), (3, 1))}
        counts = math.log(3) + sum(up.values()) - (lgamma(9) - lgamma(6))
        for options in ({}, {"method": "ais", "num_steps": 40}):
            close(evidence(model, guide, x, **options), poisson + counts)

    def test_discrete_latents_are_refused(self) -> None:
        with pytest.raises(ObjectiveError, match=r"site 'k' is discrete \(Bernoulli\)"):
            evidence(switch_model, switch_guide, randn(3), method="ais")

    def test_moving_support_is_refused(self) -> None:
        def model(x: Tensor) -> None:
            top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Uniform(0.0, top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ObjectiveError, match="site 'z' has a support"):
            evidence(model, None, torch.tensor(0.3), method="ais")

    def test_hidden_randomness_is_refused(self) -> None:
        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.randn(len(x)), 1.0))

        with pytest.raises(ObjectiveError, match=r"outside of pyro\.sample"):
            evidence(local_model, guide, randn(3), method="ais")


class TestFit:
    def test_own_parameters_and_other_data(self) -> None:
        def guide(x: Tensor) -> None:
            slope, sd = param("slope", 0.4), positive("sd", 0.7)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * x, sd))

        x, new = randn(8), randn(5, seed=4)
        fit = pvi.fit(local_model, guide, data=x, steps=300, seed=0, progress=False)
        rng = torch.get_rng_state()
        found: dict[Any, pvi.Evidence] = {
            None: fit.evidence(seed=0),
            "new": fit.evidence(new, seed=0, num_samples=2000),
        }
        both = fit.sandwich(seed=0, method="iwae", num_samples=2000, num_simulations=1)
        assert abs(both.gap) < 0.2 and both.own.reliable
        assert len(pyro.get_param_store()) == 0 and torch.equal(torch.get_rng_state(), rng)
        for key, rows in {None: x, "new": new}.items():
            assert found[key].reliable
            close(found[key], dist.Normal(0.0, 2**0.5).log_prob(rows), most=0.1)

    def test_untrained_parameters_are_refused(self) -> None:
        with pytest.raises(GuideError, match="parameter 'loc' has no trained value"):
            pvi.evidence(local_model, local_guide, randn(4))
        assert len(pyro.get_param_store()) == 0

    def test_latents_of_training_rows(self) -> None:
        fit = pvi.fit(local_model, data=randn(8), steps=20, seed=0, progress=False)
        with pytest.raises(GuideError):
            fit.evidence(randn(5))
