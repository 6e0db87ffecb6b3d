"""What other packages get wrong, next to what pvi gives: no mistake of theirs comes in here.

Pyro's own objectives are run; the formulas of pythae and scvi-tools are written out.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from torch import Tensor
from torch.distributions import constraints

import pvi
from tests.conjugate import Cell, reference
from tests.scenarios import (
    EXACT,
    gradients,
    local_model,
    mean_se,
    nested_model,
    normal,
    normal_log_z,
    param,
    positive,
    prior_guide,
    randn,
    repeat,
)
from tests.situations import NESTED, NUM, S, X, order_mean
from tests.test_matrix import check_gradient, measure

pytestmark = pytest.mark.usefixtures("isolated")


def same_draws(*values: Callable[[], Any]) -> list[Any]:
    """Each computed from the same random state."""
    results = []
    for value in values:
        torch.manual_seed(1)
        results.append(value())
    return results


class TestPythae:
    """Values of importance-weighted bounds."""

    x = randn(8) * 1.4

    def log_weights(self, num: int) -> Tensor:
        """Of draws from the prior, `(num, 8)`: the same as those of `prior_guide`."""
        z = torch.randn(num, 8)
        return normal(self.x, z, 1.0)

    def test_iwae_value(self) -> None:
        """log mean w, not sum softmax log w, which is above it by up to log K."""
        bound, log_w = same_draws(
            lambda: pvi.IWAE(50).bound(local_model, prior_guide, self.x),
            lambda: self.log_weights(50),
        )
        theirs = float((torch.softmax(log_w, 0) * log_w).sum())
        assert bound == pytest.approx(float(order_mean(log_w, 0.0).sum()), abs=EXACT)
        assert 1.0 < theirs - bound < 8 * math.log(50)

    def test_optimism_exceeds_the_evidence(self) -> None:
        """Their value is no bound: it passes log Z, to which the bound itself comes near."""
        log_z = normal_log_z(self.x)
        values = [self.log_weights(200) for _ in range(100)]
        theirs = [float((torch.softmax(w, 0) * w).sum()) for w in values]
        mean, se = mean_se(torch.tensor(theirs))
        assert mean > log_z + 10 * se
        iwae = pvi.IWAE(200)
        ours, se = mean_se(repeat(lambda: iwae.bound(local_model, prior_guide, self.x), 100))
        assert log_z - 0.5 < ours < log_z + 3 * se

    def test_outer_draws_are_not_in_the_mean(self) -> None:
        """MIWAE: num_outer M averages bounds of K, each a log of a mean over K and not over M."""
        outer, inner = 3, 7
        miwae = pvi.IWAE(inner, num_outer=outer)
        miwae.bound(local_model, prior_guide, self.x)  # makes the plan
        bound, log_w = same_draws(
            lambda: miwae.bound(local_model, prior_guide, self.x),
            lambda: torch.stack([self.log_weights(inner) for _ in range(outer)]),
        )
        sums = torch.logsumexp(log_w, 1)  # (M, rows)
        right, theirs = (float((sums - math.log(n)).sum(1).mean()) for n in (inner, outer))
        assert bound == pytest.approx(right, abs=EXACT)
        assert abs(theirs - right) == pytest.approx(8 * math.log(inner / outer), abs=EXACT)


class TestAnnealing:
    """scvi-tools on Pyro reports the annealed loss as the ELBO."""

    x = randn(8)

    @pytest.mark.parametrize("beta", [0.1, {"z": 3.0}], ids=str)
    @pytest.mark.parametrize("make", [pvi.BetaELBO, lambda b: pvi.IWAE(5, beta=b)], ids=["1", "5"])
    def test_bound_is_unweighted(self, make: Callable, beta: Any) -> None:
        weighted = make(beta)
        plain = make(1.0)
        for objective in (weighted, plain):
            objective.bound(local_model, self.guide, self.x)
        (value, bound), reported = same_draws(
            lambda: self.both(weighted), lambda: plain.bound(local_model, self.guide, self.x)
        )
        assert bound == pytest.approx(reported, abs=EXACT)
        assert abs(-value - reported) > 0.1

    def both(self, objective: pvi.Objective) -> tuple[float, float]:
        value = objective.evaluate(local_model, self.guide, (self.x,))
        return float(value.loss.detach()), float(value.bound)

    @staticmethod
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.6 * x, positive("scale", 0.4)))

    def test_history_is_unweighted(self) -> None:
        """A fit with weight 0 on the KL: its loss has no KL, its record of the bound has."""
        objective = pvi.BetaELBO(0.0, kl="exact")
        options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "steps": 3, "seed": 0}
        fit = pvi.fit(local_model, self.guide, data=self.x, objective=objective, **options)
        loc, scale = 0.6 * self.x, torch.tensor(0.4)
        kl = float((0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum())
        difference = fit.history["loss"] + fit.history["bound"]
        assert difference == pytest.approx([-kl] * 3, abs=1e-4)  # fits run in single precision
        assert kl > 1.0


class TestPyroRenyi:
    """`pyro.infer.RenyiELBO`."""

    size, batch = 50, 10

    def test_minibatch_value(self) -> None:
        """It puts N / B inside the log of the mean: above the evidence."""
        x = randn(self.size) * 1.4

        def program(obs: bool, x: Tensor) -> None:
            with pyro.plate("data", self.size, subsample_size=self.batch) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if obs:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        model, guide = partial(program, True), partial(program, False)
        log_z = normal_log_z(x)
        iwae = pvi.IWAE(5)
        ours, se = mean_se(repeat(lambda: iwae.bound(model, guide, x), 400))
        theirs = infer.RenyiELBO(0.0, 5, vectorize_particles=True, max_plate_nesting=1)
        values = repeat(lambda: -theirs.loss(model, guide, x), 400)
        above, above_se = mean_se(values)
        assert log_z - 10 < ours < log_z + 3 * se
        assert above > log_z + 20 * above_se

    def test_discrete_guide(self) -> None:
        """Its gradient for the probability of a discrete guide is 0; the true one isn't."""

        def model() -> None:
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(1.5))

        def guide() -> None:
            pyro.sample("z", dist.Bernoulli(param("p", 0.15, constraint=constraints.unit_interval)))

        guide()
        ones = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # of two particles
        p = pyro.param("p")
        log_q = torch.where(ones == 1, p.log(), (1 - p).log())
        log_p = torch.where(ones == 1, math.log(0.3), math.log(0.7)) + normal(1.5, 2 * ones, 1.0)
        bound = (log_q.sum(1).exp() * order_mean((log_p - log_q).T, 0.0)).sum()
        true = gradients(-bound)["p"]
        theirs = infer.RenyiELBO(0.0, 2, vectorize_particles=True, max_plate_nesting=0)
        for _ in range(20):
            theirs.loss_and_grads(model, guide)
        assert float(p.unconstrained().grad.abs()) == 0.0  # type: ignore[attr-defined]
        ours = pvi.IWAE(2)
        draws = [gradients(ours.evaluate(model, guide).loss)["p"] for _ in range(1000)]
        mean, se = mean_se(torch.stack(draws))
        assert abs(mean - true) < 3 * se
        assert abs(true) > 10 * se

    def test_globals_above_locals(self) -> None:
        """One global site, and it weights whole batches: far below what the locals allow."""
        x = randn(40) * 1.4
        precision = 1 + len(x) / 2

        def guide(x: Tensor) -> None:
            loc, sd = x.sum() / 2 / precision, precision**-0.5
            theta = pyro.sample("theta", dist.Normal(loc, sd))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.2 * x + 0.3 * theta, 1.0))

        ours = pvi.IWAE(20)
        theirs = infer.RenyiELBO(0.0, 20, vectorize_particles=True, max_plate_nesting=1)
        high, se = mean_se(repeat(lambda: ours.bound(nested_model, guide, x), 200))
        low, low_se = mean_se(repeat(lambda: -theirs.loss(nested_model, guide, x), 200))
        assert low + 10 * math.hypot(se, low_se) < high
        assert high < normal_log_z(x, shared=1.0) + 3 * se


class TestPyroMeanField:
    """`pyro.infer.TraceMeanField_ELBO`."""

    num = 4000

    def losses(self, model: Callable, guide: Callable) -> tuple[tuple[Tensor, Tensor], float]:
        """Ours with its standard error, and theirs."""
        theirs = infer.TraceMeanField_ELBO(self.num, vectorize_particles=True, max_plate_nesting=1)
        ours = pvi.TraceMeanFieldELBO(self.num)
        ours.bound(model, guide)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
            wrong = theirs.loss(model, guide)
        return mean_se(repeat(lambda: ours.loss(model, guide), 20)), wrong

    def test_scaled_prior(self) -> None:
        """It takes the guide's scale for the prior too."""
        loc, sd, scale = 0.4 * X, 0.6, 0.1

        def model() -> None:
            with pyro.plate("data", 3):
                with poutine.scale(scale=scale):
                    z = pyro.sample("z", dist.Normal(2.0, 0.5))
                pyro.sample("x", dist.Normal(z, S), obs=X)

        def guide() -> None:
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(loc, sd))

        def mean_log(a: Any, b: Any, width: float) -> Tensor:
            """E log N(a; b, width) where a - b has the standard deviation of z."""
            return (normal(a, b, width) - 0.5 * (sd / width) ** 2).sum()

        entropy = 3 * (math.log(sd) + 0.5 * math.log(2 * math.pi) + 0.5)
        expected = -float(mean_log(X, loc, S) + scale * mean_log(loc, 2.0, 0.5) + entropy)
        (mean, se), theirs = self.losses(model, guide)
        assert abs(mean - expected) < 3 * se
        assert theirs - expected > 10.0

    def test_bottom_up_guide(self) -> None:
        """It takes a KL given `top` for exact, though the guide draws `top` after `low`."""
        x, s, b, t, prior = 2.0, 0.5, 0.7, 0.4, 0.2

        def model() -> None:
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(top, prior))
            pyro.sample("x", dist.Normal(low, 1.0), obs=torch.tensor(x))

        def guide() -> None:
            low = pyro.sample("low", dist.Normal(0.6 * x, s))
            pyro.sample("top", dist.Normal(b * low, t))

        square = (0.6 * x) ** 2 + s**2
        quadratic = b**2 * square + t**2 + ((1 - b) ** 2 * square + t**2) / prior**2
        quadratic += (0.4 * x) ** 2 + s**2
        constant = 0.5 * math.log(2 * math.pi) + math.log(prior) - 1 - math.log(s * t)
        expected = constant + 0.5 * quadratic
        (mean, se), theirs = self.losses(model, guide)
        assert abs(mean - expected) < 3 * se
        assert theirs - expected > 3.0


class TestNestedPath:
    """Sticking the landing with globals above locals, as published for one level only."""

    def test_freezing_parameters_alone_is_biased(self) -> None:
        """log q(z | theta) must not see theta: with it the gradient has another mean."""
        mean, se = mean_se(torch.stack([self.naive() for _ in range(20)]))
        expected = reference("global + local", 0.0, (1.0, 1.0))
        error = (mean - expected.gradient).abs() / (se**2 + expected.gradient_se**2).sqrt()
        assert error.max() > 20
        cell = Cell("IWAE", "path", "global + local")
        check_gradient(cell, measure(cell))

    @staticmethod
    def naive() -> Tensor:
        """Gradient of IWAE, the parameters of q frozen, those of draws times their weights."""
        raw = torch.tensor(NESTED.start).requires_grad_()
        m, r, a, b, c = raw
        fm, fr, fa, fb, fc = raw.detach()
        theta = m + r.exp() * torch.randn(5000, 1)
        z = a * X + b * theta + c.exp() * torch.randn(NUM, 5000, 3)
        ratio = []
        view = z.view_as(z)
        view.register_hook(lambda gradient: gradient * ratio[0])
        log_w = normal(X, view, S) + normal(view, theta, 1.0)
        log_w = log_w - normal(view, fa * X + fb * theta, fc.exp())
        ratio.append(torch.softmax(log_w.detach(), 0))
        top = normal(theta, 0.0, 1.0) - normal(theta, fm, fr.exp())
        bound = top.squeeze(1) + order_mean(log_w, 0.0).sum(1)
        (gradient,) = torch.autograd.grad(bound.mean(), raw)
        return gradient
