"""What is built on sums over discrete sites: bounds, minibatches, fits, posteriors, errors."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.ops.indexing import Vindex
from torch import Tensor

import pvi
from pvi.engine.data import as_data
from pvi.fit.minibatch import Minibatches
from pvi.guides import MeanField
from tests.enumerated import LOCS, MARK, PROBS, STEP, SUMMED, X, k_guide, nothing
from tests.scenarios import (
    EXACT,
    amortised_guide,
    gradients,
    mean_se,
    normal,
    param,
    positive,
    power_mean,
    randn,
    repeat,
)

pytestmark = pytest.mark.usefixtures("isolated")


def mixture_prior(x: Tensor) -> None:
    """z_i from a mixture, x_i ~ N(z_i, 1)."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PROBS), infer=MARK)
        z = pyro.sample("z", dist.Normal(LOCS[k], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def log_mixture(z: Tensor, sd: float = 1.0) -> Tensor:
    """log sum_k p_k N(z; m_k, sd), written out."""
    return (PROBS.log() + normal(z.unsqueeze(-1), LOCS, sd)).logsumexp(-1)


class TestBounds:
    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
    def test_per_datum(self, alpha: float, batched: bool) -> None:
        """Renyi bounds from the same draws, the densities written out."""
        torch.manual_seed(3)
        objective = pvi.RenyiELBO(alpha, 4, vectorize_particles=batched)
        loss = objective.differentiable_loss(mixture_prior, amortised_guide, X)
        torch.manual_seed(3)
        slope, scale = pyro.param("slope"), pyro.param("scale")
        z = slope * X + scale * torch.randn(4, 3)
        log_w = log_mixture(z) + normal(X, z, 1.0) - normal(z, slope * X, scale)
        expected = -power_mean(log_w, alpha).sum()
        torch.testing.assert_close(loss, expected, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(gradients(loss), gradients(expected), atol=EXACT, rtol=EXACT)

    def test_below_the_evidence(self) -> None:
        evidence = float(log_mixture(X, 2.0**0.5).sum())

        def bound(num: int) -> tuple[Tensor, Tensor]:
            objective = pvi.IWAE(num)
            return mean_se(repeat(lambda: objective.bound(mixture_prior, amortised_guide, X), 40))

        (few, _), (many, se) = bound(2), bound(500)
        assert few + 0.05 < many < evidence + 3 * se
        assert many > evidence - 0.05

    @pytest.mark.parametrize("alpha", [1.0, 0.0])
    def test_path(self, alpha: float) -> None:
        """The path gradient is that of the same prior without a discrete site."""

        def plain(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                parts = dist.Categorical(PROBS), dist.Normal(LOCS, 1.0)
                z = pyro.sample("z", dist.MixtureSameFamily(*parts))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        found = []
        for model in (mixture_prior, plain):
            torch.manual_seed(3)
            objective = pvi.RenyiELBO(alpha, 4, gradient="path")
            found.append(gradients(objective.differentiable_loss(model, amortised_guide, X)))
        torch.testing.assert_close(found[0], found[1], atol=EXACT, rtol=EXACT)
        assert all(float(g.abs()) > 1e-3 for g in found[0].values())

    def test_score_elsewhere(self) -> None:
        """A discrete site that is drawn has a score gradient, whose mean is the exact one."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(PROBS))
                j = pyro.sample("j", dist.Bernoulli(0.2 + 0.5 * k), infer=MARK)
                pyro.sample("x", dist.Normal(LOCS[k] + j, 0.5), obs=x)

        drawn = poutine.infer_config(k_guide, lambda site: {"enumerate": None})
        exact = gradients(pvi.ELBO().differentiable_loss(model, k_guide, X))["logits"]
        objective = pvi.ELBO(1000, vectorize_particles=True)
        losses = [objective.differentiable_loss(model, drawn, X) for _ in range(20)]
        mean, se = mean_se(torch.stack([gradients(loss)["logits"] for loss in losses]))
        assert bool(((mean - exact).abs() < 4 * se).all()) and bool((se < 0.1).all())

    def test_extreme_factors(self) -> None:
        """Factors that disagree by more than the floats' range do not vanish."""
        far = torch.tensor(300.0)

        def model() -> None:
            k = pyro.sample("k", dist.Bernoulli(0.5), infer=MARK)
            with pyro.plate("one", 2):
                pyro.factor("a", far * k)
            with pyro.plate("two", 2):
                pyro.factor("b", -far * k - 1.0)

        assert pvi.ELBO().loss(lambda: model(), lambda: None) == pytest.approx(2.0)
        torch.set_default_dtype(torch.float32)
        assert pvi.ELBO().loss(lambda: model(), lambda: None) == pytest.approx(2.0, abs=1e-3)


def w_model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(w)), infer=MARK)
        pyro.sample("x", dist.Normal(w + 2.0 * k, 1.0), obs=x)


def w_guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(param("w_loc", 0.3), positive("w_scale", 0.2)))


class TestMinibatches:
    @pytest.mark.parametrize(
        ("model", "name", "objective"),
        [
            (w_model, "w", pvi.ELBO()),
            (w_model, "w", pvi.ELBO(3)),
            (mixture_prior, "z", pvi.ELBO(kl="exact")),
            (mixture_prior, "z", pvi.IWAE(3)),
        ],
    )
    def test_batches_add_up(self, model: Callable, name: str, objective: pvi.Objective) -> None:
        """The mean over batches is the value for all data, where draws have no noise."""
        x = randn(8)

        def guide(x: Tensor) -> None:
            loc = param("slope", 0.3) * x if name == "z" else param("loc", 0.3)
            with pyro.plate("data", len(x)) if name == "z" else poutine.trace():
                pyro.sample(name, dist.Normal(loc, 1e-30))

        batched = Minibatches(model, guide, frozenset({"data"}), as_data(x, (), None, model))
        whole, values = objective.bound(model, guide, x), []
        for rows in torch.arange(8).split(4):
            batched.select(rows, 8)
            values.append(objective.bound(batched.model, batched.guide, x[rows]))
        assert values[0] != pytest.approx(values[1])
        assert sum(values) / 2 == pytest.approx(whole, abs=1e-8)

    def test_declared_in_the_model(self) -> None:
        x = randn(9)

        def model() -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 9, subsample_size=3) as rows:
                k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(w)), infer=MARK)
                pyro.sample("x", dist.Normal(w + 2.0 * k, 1.0), obs=x[rows])

        def guide() -> None:
            w_guide(x)

        values = []
        for objective in (pvi.ELBO(3), TraceEnum_ELBO(3, max_plate_nesting=1)):
            torch.manual_seed(0)
            if isinstance(objective, TraceEnum_ELBO):
                objective.vectorize_particles, objective.max_plate_nesting = True, 2
            values.append(objective.loss(model, guide))
        assert values[0] == pytest.approx(values[1], abs=EXACT)

    @pytest.mark.parametrize("batch_size", [None, 50])
    def test_fit_of_a_mixture(self, batch_size: int | None) -> None:
        """Means that lie 4 sds apart are found, and all data belong where they came from."""
        truth = torch.arange(200) % 2
        x = 4.0 * truth + randn(200)

        def model(x: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=MARK)
                pyro.sample("x", dist.Normal(Vindex(mu)[..., k], 1.0), obs=x)

        start = init_to_value(values={"mu": torch.tensor([1.0, 2.0])})
        guide = MeanField(model, init_loc_fn=start)
        fit = pvi.fit(model, guide, x, steps=300, batch_size=batch_size, seed=0)
        draws = fit.posterior.sample(200, seed=0)
        expected = torch.stack([x[truth == 0].mean(), x[truth == 1].mean()])
        assert bool(((draws["mu"].mean(0) - expected).abs() < 0.1).all())
        assert bool(((draws["mu"].std(0) - 0.1).abs() < 0.03).all())
        assert float((draws["k"] == truth).double().mean()) > 0.95


class TestPosterior:
    def test_local(self) -> None:
        """k_i given z_i and x_i: frequencies are the probabilities of Bayes' rule."""
        amortised_guide(X)
        posterior = pvi.Posterior(mixture_prior, amortised_guide, X)
        draws = posterior.sample(4000, seed=0)
        assert draws["k"].shape == (4000, 3)
        log_p = PROBS.log() + normal(draws["z"].unsqueeze(-1), LOCS, 1.0)
        expected = log_p.softmax(-1)[..., 1]
        error, se = mean_se(draws["k"].double() - expected)
        assert bool((error.abs() < 4 * se).all())
        again = posterior.draws(4000, seed=0)
        assert list(again.values) == ["z"] and torch.equal(again.values["z"], draws["z"])
        log_w = log_mixture(draws["z"]) + normal(X, draws["z"], 1.0)
        torch.testing.assert_close(again.log_p, log_w.sum(-1), atol=EXACT, rtol=EXACT)

    @pytest.mark.parametrize("batched", [True, False])
    def test_chain(self, batched: bool) -> None:
        """States of a chain, given all observations; also where draws are made one by one."""

        def model(x: Tensor) -> None:
            k: Any = 0
            for t in pyro.markov(range(len(x))):
                k = pyro.sample(f"k{t}", dist.Categorical(STEP[k]), infer=MARK)
                if not batched and k.numel() > 2:
                    raise RuntimeError("no batches")
                pyro.sample(f"x{t}", dist.Normal(LOCS[k], 1.0), obs=x[t])

        posterior = pvi.Posterior(model, nothing, X)
        draws = posterior.sample(2000 if batched else 300, seed=0)
        found = torch.stack([draws[f"k{t}"] for t in range(3)], -1)
        paths = torch.tensor(list(product([0, 1], repeat=3)))
        log_p = normal(X, LOCS[paths], 1.0).sum(-1)
        log_p = log_p + STEP[torch.tensor(0), paths[:, 0]].log()
        log_p = log_p + (STEP[paths[:, 0], paths[:, 1]] * STEP[paths[:, 1], paths[:, 2]]).log()
        hits = (found.unsqueeze(1) == paths).all(-1).double()
        mean, se = mean_se(hits)
        assert bool(((mean - log_p.softmax(0)).abs() < 4 * se + 1e-3).all())

    def test_log_likelihood_and_predictions(self) -> None:
        case = SUMMED["two observations"]()

        def model(x: Tensor) -> None:
            case.model(x)
            pyro.deterministic("twice", 2.0 * x)

        case.guide(X)
        posterior = pvi.Posterior(model, case.guide, X)
        found = posterior.log_likelihood(3, seed=0)
        with torch.no_grad():
            terms = pvi.ELBO(3).terms(case.model, case.guide, X)
        assert {name: value.shape for name, value in found.items()} == {"x, y": (3, 3)}
        assert float(found["x, y"][0].sum()) == pytest.approx(float(terms.log_likelihood()[0]))
        assert posterior.predict(num_draws=4)["y"].shape == (4, 3)
        tree = posterior.to_datatree(4)
        assert tree["posterior"]["k"].dims == ("chain", "draw", "data")
        assert tree["log_likelihood"]["x, y"].dims == ("chain", "draw", "data")

    def test_global(self) -> None:
        """A sum outside of the rows keeps its posterior for new rows; one inside follows them."""

        def model(x: Tensor) -> None:
            j = pyro.sample("j", dist.Bernoulli(0.5), infer=MARK)
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer=MARK)
                pyro.sample("x", dist.Normal(100.0 * j + 10.0 * k, 1.0), obs=x)

        posterior = pvi.Posterior(model, nothing, torch.tensor([110.0, 100.0, 110.0]))
        draws = posterior.sample(20, seed=0)
        assert bool((draws["j"] == 1).all())
        assert bool((draws["k"] == torch.tensor([1.0, 0.0, 1.0])).all())
        # these rows alone would say j = 0
        new = posterior.predict(torch.tensor([20.0, 0.0]), num_draws=20, seed=0)["x"]
        assert new.shape == (20, 2) and bool(((new - 100.0).abs() < 6.0).all())

    def test_open_outcomes(self) -> None:
        """Without its outcome a row says nothing of k; with part of them they may depend."""

        def model(x: Tensor | None, y: Tensor | None, n: int = 3) -> None:
            with pyro.plate("data", n):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer=MARK)
                x = pyro.sample("x", dist.Normal(100.0 * k, 1.0), obs=x)
                pyro.sample("y", dist.Normal(x, 1.0), obs=y)

        def guide(x: Tensor | None, y: Tensor | None, n: int = 3) -> None:
            pass

        posterior = pvi.Posterior(model, guide, (X, X))
        new = posterior.predict(n=2, num_draws=400, seed=0)["y"]
        assert abs(float((new > 50.0).double().mean()) - 0.5) < 0.1
        with pytest.raises(pvi.DataError, match="'k' can't be drawn given site 'y' of the new"):
            posterior.predict(y=torch.zeros(2), n=2)

    def test_diagnosis(self) -> None:
        """Log weights are those of the latents that the guide has."""
        fit = pvi.fit(w_model, w_guide, randn(20), steps=300, seed=0)
        found = pvi.diagnose(fit, num_draws=2000)
        assert found.verdict in ("good", "correctable")
        assert [row.name for row in found.table] == ["w"]
        w = torch.linspace(-6.0, 6.0, 2001)
        p = torch.sigmoid(w)[:, None]
        x = randn(20)
        log_p = (p.log() + normal(x, w[:, None] + 2.0, 1.0)).logaddexp(
            (1 - p).log() + normal(x, w[:, None], 1.0)
        )
        joint = log_p.sum(-1) + normal(w, 0.0, 1.0)
        evidence = float((joint + math.log(0.006)).logsumexp(0))
        assert found.evidence == pytest.approx(evidence, abs=0.02)


def test_unmarked_programs_are_run_once_a_step() -> None:
    """After the first look an evaluation runs each program once, as without enumeration."""
    runs = []

    def model(x: Tensor) -> None:
        runs.append(1)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    objective = pvi.ELBO()
    objective.loss(model, w_guide, X)
    first = len(runs)
    for _ in range(5):
        objective.loss(model, w_guide, X)
    assert first == 2 and len(runs) == first + 5


def test_documentation() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "enumeration.md").read_text("utf-8")
    code = text.split("```python")[1].split("```")[0].replace("seed=0)", "seed=0, steps=200)", 1)
    names: dict[str, Any] = {}
    exec(code, names)
    probabilities = names["draws"]["k"].double().mean(0)
    assert float(probabilities[:50].mean()) < 0.2 < 0.8 < float(probabilities[50:].mean())


def test_mean_field_skips_what_is_summed_out() -> None:
    guide = MeanField(SUMMED["mixture"]().model).setup(X)
    assert list(guide.latents) == ["mu"]
