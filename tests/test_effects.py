"""`pvi.kl` and `pvi.penalty`: terms that a program adds without a sample site."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pvi
from pvi.errors import ModelError, ObjectiveError
from tests.scenarios import (
    BATCHED,
    EXACT,
    FixedNoise,
    K,
    gradients,
    local_guide,
    local_model,
    mean_se,
    param,
    positive,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(6).double()


def terms_of_latent(n: int) -> tuple[Any, Any]:
    """q and p of a latent that is never drawn."""
    loc = param("w_loc", torch.linspace(-1.0, 1.0, 6), event_dim=0)
    return dist.Normal(loc[:n], positive("w_scale", 0.7)), dist.Normal(0.2, 1.5)


def kl_model(x: Tensor, scale: float = 3.0) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pvi.kl("w", *terms_of_latent(len(x)), scale=scale)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        noise = randn(K, len(x), seed=1)
        pyro.sample("z", FixedNoise(param("slope", 0.3) * x, torch.full((len(x),), 0.9), noise))


def divergence() -> Tensor:
    q, p = terms_of_latent(6)
    return torch.distributions.kl_divergence(q, p)


class TestKL:
    @pytest.mark.parametrize("kl", ["exact", "sample"])
    @pytest.mark.parametrize("batched", BATCHED.values(), ids=BATCHED)
    def test_value_and_gradient(self, batched: bool, kl: Any) -> None:
        objective = pvi.ELBO(K, kl=kl, vectorize_particles=batched)
        plain = objective.evaluate(local_model, guide, (X,)).loss
        value = objective.evaluate(kl_model, guide, (X,))
        expected = plain + 3.0 * divergence().sum()
        assert float((value.loss - expected).detach()) == pytest.approx(0, abs=EXACT)
        assert float((value.bound + expected).detach()) == pytest.approx(0, abs=EXACT)
        torch.testing.assert_close(gradients(value.loss), gradients(expected))
        kl_w = float(value.terms.kl()["w"].detach())
        assert kl_w == pytest.approx(3.0 * float(divergence().sum().detach()))

    def test_beta_weights_it(self) -> None:
        losses = [
            pvi.BetaELBO({"w": b}).evaluate(kl_model, guide, (X,)).loss for b in (0.0, 1.0, 5.0)
        ]
        total = 3.0 * divergence().sum()
        torch.testing.assert_close(losses[1] - losses[0], total)
        torch.testing.assert_close(losses[2] - losses[0], 5.0 * total)
        bounds = [pvi.BetaELBO({"w": b}).bound(kl_model, guide, X) for b in (0.0, 5.0)]
        assert bounds[0] == bounds[1]

    def test_handlers_around_it(self) -> None:
        """Scale, mask and subsampling of the plates around count as at a sample site."""
        keep = torch.tensor([True, False, True, True, False, True])

        def model(x: Tensor) -> None:
            latent = terms_of_latent(6)
            rows = pyro.plate("data", 12, subsample=torch.arange(6))
            with rows, poutine.scale(scale=0.5), poutine.mask(mask=keep):
                pvi.kl("w", *latent)
            pyro.sample("x", dist.Normal(param("m", 0.0), 1.0), obs=x)

        value = pvi.ELBO().evaluate(model, lambda x: None, (torch.tensor(1.0),))
        expected = 2 * 0.5 * divergence()[keep].sum()
        torch.testing.assert_close(value.terms.kl()["w"], expected)

    def test_expands_to_its_plate(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pvi.kl("w", dist.Normal(0.5, 1.0), dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

        terms = pvi.ELBO().terms(model, lambda x: None, X)
        assert float(terms.kl()["w"]) == pytest.approx(6 * 0.125)

    def test_refusals(self) -> None:
        with pytest.raises(ObjectiveError, match=r"pvi\.kl 'w' is a term of the ELBO.*pvi.ELBO"):
            pvi.IWAE(K).evaluate(kl_model, guide, (X,))

        def clash(x: Tensor) -> None:
            local_model(x)
            pvi.penalty("z", 1.0)

        with pytest.raises(ModelError, match="'z' names two things"):
            pvi.ELBO().evaluate(clash, guide, (X,))
        with pytest.raises(ModelError, match="none is known for StudentT and Normal"):
            pvi.kl("w", dist.StudentT(3.0), dist.Normal(0.0, 1.0))

        def shape(x: Tensor) -> None:
            local_model(x)
            pvi.kl("w", dist.Normal(torch.zeros(4), 1.0), dist.Normal(0.0, 1.0))

        with pytest.raises(ModelError, match=r"pvi\.kl 'w' has a value of shape \(4,\).*none"):
            pvi.ELBO().evaluate(shape, guide, (X,))

    def test_posterior_has_no_weights(self) -> None:
        fit = pvi.fit(kl_model, local_guide, X, steps=5, seed=0)
        assert "pvi.kl 'w' integrates a latent" in fit.posterior.caveats()[0]
        assert fit.diagnose(100).verdict == "not assessed"
        assert "kl/w" in fit.history

    def test_outside_pvi(self) -> None:
        """Any other handler leaves it alone, and it enters no trace."""
        trace = poutine.trace(kl_model).get_trace(X)
        assert "w" not in trace.nodes


class TestPenalty:
    @staticmethod
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pvi.penalty("ridge", (z**2) * param("p", 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def squares(self) -> Tensor:
        z = pyro.param("slope") * X + 0.9 * randn(K, 6, seed=1)
        return pyro.param("p") * (z**2).sum(1).mean()

    @pytest.mark.parametrize("alpha", [1.0, 0.0])
    @pytest.mark.parametrize("batched", BATCHED.values(), ids=BATCHED)
    def test_in_the_loss_only(self, batched: bool, alpha: float) -> None:
        objective = pvi.Objective(K, alpha=alpha, vectorize_particles=batched)
        if not batched:
            pytest.skip("a loop repeats the noise of particle 0")
        plain = objective.evaluate(local_model, guide, (X,))
        value = objective.evaluate(self.model, guide, (X,))
        expected = plain.loss + self.squares()
        torch.testing.assert_close(value.loss, expected)
        torch.testing.assert_close(value.bound, plain.bound)
        torch.testing.assert_close(gradients(value.loss), gradients(expected))
        torch.testing.assert_close(value.terms.log_weights(), plain.terms.log_weights())

    def test_looped_is_batched(self) -> None:
        for batched in BATCHED.values():
            torch.manual_seed(0)
            objective = pvi.ELBO(K, vectorize_particles=batched)
            draws = []
            with torch.no_grad():
                for _ in range(200):
                    value = objective.evaluate(self.model, local_guide, (X,))
                    draws.append(value.terms.penalty().mean())
            mean, se = mean_se(torch.stack(draws))
            loc, scale = torch.linspace(-1, 1, 6), torch.linspace(0.5, 1.5, 6)
            assert abs(float(mean) - 0.5 * float((loc**2 + scale**2).sum())) < 3 * float(se)

    def test_in_the_guide(self) -> None:
        def committed(x: Tensor) -> None:
            guide(x)
            pvi.penalty("commitment", 2.0)

        value = pvi.ELBO().evaluate(local_model, committed, (X,))
        assert float((value.loss + value.bound).detach()) == pytest.approx(2.0)
        for gradient in ("path", "score"):
            value = pvi.ELBO(2, gradient=gradient).evaluate(local_model, committed, (X,))
            assert float((value.loss + value.bound).detach()) == pytest.approx(2.0)

    @pytest.mark.parametrize("alpha", [1.0, 0.0])
    def test_score_gradient_sees_it(self, alpha: float) -> None:
        """A penalty on a discrete draw has the mean 10 p: its gradient comes by scores."""
        copies = 2_000

        def program(loud: bool) -> Any:
            def model() -> None:
                with pyro.plate("copies", copies):
                    z = pyro.sample("z", dist.Bernoulli(0.5))
                    if loud:
                        pvi.penalty("count", 10.0 * z.expand(*z.shape[:-1], copies))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(copies))

            return model

        def coins() -> None:
            p = param("p", 0.3, constraint=constraints.unit_interval)
            with pyro.plate("copies", copies):
                pyro.sample("z", dist.Bernoulli(p))

        def slope(model: Any) -> Tensor:
            objective = pvi.Objective(4, alpha=alpha)
            rows = [gradients(objective.evaluate(model, coins).loss)["p"] for _ in range(20)]
            return torch.stack(rows) / copies

        (mean, se), (bare, bare_se) = (mean_se(slope(program(loud))) for loud in (True, False))
        expected = 0.3 * 0.7 * 10.0  # through the logistic transform
        error = float((se**2 + bare_se**2).sqrt())
        assert abs(float(mean - bare) - expected) < 3.5 * error
        assert expected > 10 * error

    def test_minibatches(self) -> None:
        fit = pvi.fit(self.model, guide=local_guide, data=X, batch_size=2, steps=2, seed=0)
        assert "penalty" in fit.history

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pvi.penalty("count", torch.ones(len(x)))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        fit = pvi.fit(model, local_guide, data=X, batch_size=2, steps=2, seed=0)
        assert list(fit.history["penalty"]) == [6.0, 6.0]

    def test_refusals(self) -> None:
        with pytest.raises(ObjectiveError, match=r"pvi\.penalty 'ridge' with it"):
            pvi.IWAE(K, gradient="path").evaluate(self.model, guide, (X,))

        def model(x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pvi.penalty("ridge", 1.0)
            local_model(x)

        with pytest.raises(ModelError, match=r"pvi\.penalty 'ridge'.*one value for each"):
            pvi.ELBO().evaluate(model, guide, (X,))
