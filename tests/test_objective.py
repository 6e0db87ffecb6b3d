"""Objectives as values: options, refusals, particles, `explain`."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.errors import ObjectiveError, PviError
from tests.scenarios import (
    ALPHAS,
    BATCHED,
    EXACT,
    K,
    amortised_guide,
    gradients,
    local_guide,
    local_model,
    mean_model,
    mean_se,
    nested_guide,
    nested_model,
    normal,
    objective,
    param,
    power_mean,
    prior_guide,
    randn,
    repeat,
)

pytestmark = pytest.mark.usefixtures("isolated")


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
            pvi.ELBO(kl=kl, gradient="reparam").evaluate(model, guide, (x,))
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

    def test_shapes_that_no_plate_declares(self) -> None:
        """A column `(N, 1)` makes N x N densities; Pyro's losses refuse it, so do these."""
        y = randn(5).unsqueeze(1)

        def guide(y: Tensor) -> None:
            pyro.sample("mu", dist.Normal(0.3, 0.5))

        with pytest.raises(PviError, match="'y'"):
            pvi.ELBO().loss(mean_model, guide, y)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: pvi.ELBO(0), "num_particles must be a whole number >= 1, got 0"),
            (lambda: pvi.ELBO(2.5), "num_particles must be a whole number"),  # type: ignore[arg-type]
            (lambda: pvi.ELBO(kl="mc"), "kl must be one of 'sample', 'exact', got 'mc'"),  # type: ignore
            (lambda: pvi.ELBO(gradient="magic"), "gradient must be one of"),  # type: ignore
            (lambda: pvi.RenyiELBO(0.0, 2, bound="local"), "bound must be one of"),  # type: ignore
            (lambda: pvi.BetaELBO(-1.0), "beta must be a finite number >= 0 .* got -1.0"),
            (lambda: pvi.BetaELBO({"z": float("nan")}), r"beta\['z'\] must be a finite number"),
            (lambda: pvi.IWAE(2, num_outer=0), "num_outer must be a whole number"),
            (lambda: pvi.RenyiELBO(float("nan"), 2), "alpha"),
        ],
    )
    def test_bad_options(self, make: Callable[[], pvi.Objective], message: str) -> None:
        with pytest.raises(ObjectiveError, match=message):
            make()


class TestParticles:
    @pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
    def test_looped_and_batched_agree(self, alpha: float) -> None:
        """In the mean, on draws of their own; many copies of the data give many answers at once.

        On the same draws they agree exactly: `test_loop` in `test_matrix.py`.
        """
        copies, means = 100, []
        x = randn(4).repeat(copies)
        for batched in BATCHED.values():
            bound = objective(alpha, vectorize_particles=batched)
            draws = repeat(lambda b=bound: b.bound(local_model, amortised_guide, x), 30)
            means.append(mean_se(draws / copies))
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
                scale = 1.0 if float(w.detach().sum()) < 100.0 else 2.0  # no vmap either
                pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

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
        """A model that runs with a particle dimension but means something else is mapped."""
        y = randn(size)

        def model(y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(w.mean() * torch.ones(len(y)), 1.0), obs=y)

        def guide(y: Tensor) -> None:
            pyro.sample("w", dist.Normal(param("loc", 0.2), 0.5))

        text = str(pvi.ELBO(4).explain(model, guide, y))
        assert "particles: mapped: site 'y' has another log density" in text

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
