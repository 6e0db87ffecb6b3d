"""Models that can't broadcast particles, run for all of them at once."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.engine.plan import make_plan, particle_slice
from pvi.engine.traces import particles, run, sample_nodes, total_log_prob
from pvi.guides import FullRank, MeanField
from tests.scenarios import randn

pytestmark = pytest.mark.usefixtures("isolated")


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.deterministic("twice", 2.0 * w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def nested(x: Tensor, y: Tensor) -> None:
    """Plates, a local latent, a scale, a mask and a subsample, around a product of matrices."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("groups", 2, dim=-2):
        s = pyro.sample("s", dist.Gamma(2.0, 2.0)).squeeze(-1)
    mean = (x @ w.T) * s
    with pyro.plate("data", len(x), subsample_size=4) as rows, pyro.poutine.scale(scale=0.7):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=torch.arange(4) != 1):
            pyro.sample("y", dist.Normal(mean[rows, 0] + mean[rows, 1] + z, 1.0), obs=y[rows])


def single(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        logits = torch.einsum("n,nd,->n", z, x, w)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=(y > 0).to(y))


MODELS = [(regression, FullRank), (nested, MeanField), (single, MeanField)]
DATA = randn(6, 3).double(), randn(6, seed=1).double()


@pytest.mark.parametrize(("model", "family"), MODELS)
def test_equals_single_runs(model: Any, family: Any) -> None:
    """Log density and gradients at five draws, together and one by one."""
    guide = family(model).setup(*DATA)
    for p in guide.parameters():
        p.data += 0.1 * torch.randn_like(p)
    plan = make_plan(model, guide, DATA, {}, "joint")
    assert plan.mapped and plan.vectorized and "cannot broadcast" in plan.reason
    drawn = run(particles(guide, 5, plan.nesting), DATA, {})
    alone = run(guide, DATA, {})
    parts = [particle_slice(drawn, alone, k, plan.nesting) for k in range(5)]
    together = total_log_prob(sample_nodes(plan.run_model(model, DATA, {}, drawn, 5)))
    singly = sum(total_log_prob(sample_nodes(run(model, DATA, {}, part))) for part in parts)
    assert float(together.detach()) == pytest.approx(float(singly.detach()), rel=1e-12)
    moved = list(guide.parameters())
    options = {"retain_graph": True, "allow_unused": True}
    slopes = (torch.autograd.grad(x, moved, **options) for x in (together, singly))
    for a, b in zip(*slopes, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize(("model", "family"), MODELS[:1])
def test_weights_are_exact(model: Any, family: Any) -> None:
    """log p at the draws, by hand."""
    posterior = pvi.fit(model, family, data=DATA, seed=0).posterior
    draws = posterior.draws(50, seed=0)
    w = draws.values["w"]
    x, y = DATA
    expected = dist.Normal(0.0, 1.0).log_prob(w).sum(1)
    expected = expected + dist.Normal(w @ x.T, 1.0).log_prob(y).sum(1)
    assert torch.allclose(draws.log_p, expected)
    values = posterior.sample(9, seed=0)
    assert torch.allclose(values["twice"], 2.0 * values["w"])


def test_predictive() -> None:
    """Observations are drawn one run at a time, each with its own noise."""
    posterior = pvi.fit(regression, FullRank, data=DATA, seed=0).posterior
    drawn = posterior.predict(num_draws=400, seed=0)["y"]
    mean = posterior.sample(400, seed=0)["w"] @ DATA[0].T
    assert drawn.shape == (400, 6)
    assert float((drawn - mean).var()) == pytest.approx(1.0, abs=3 * (2 / 2400) ** 0.5)


def test_evidence() -> None:
    x, y = DATA
    fit = pvi.fit(regression, FullRank, data=DATA, seed=0)
    cov = torch.eye(6) + x @ x.T
    log_z = float(dist.MultivariateNormal(torch.zeros(6), cov).log_prob(y))
    found = fit.evidence(num_samples=2000, seed=0)
    assert float(found.total) == pytest.approx(log_z, abs=1e-3)


def test_what_cannot_be_mapped_is_looped() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = 1.0 if float(w.detach().sum()) < 100.0 else 2.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    guide = MeanField(model).setup(*DATA)
    plan = make_plan(model, guide, DATA, {}, "joint")
    assert not plan.mapped and not plan.vectorized
    assert "looped" in str(pvi.ELBO(3).explain(model, guide, *DATA))


def test_penalties_are_looped() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pvi.penalty("size", w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = MeanField(model).setup(*DATA)
    assert not make_plan(model, guide, DATA, {}, "joint").mapped
    assert pvi.ELBO(3).evaluate(model, guide, DATA).terms.penalty().shape == (3,)


def test_closed_forms_stay() -> None:
    """A prior that is the same for all particles keeps its exact KL; another has none."""
    model, family = MODELS[1]
    guide = family(model).setup(*DATA)
    terms = pvi.ELBO(4, kl="exact").terms(model, guide, *DATA)
    assert {t.name: t.how for t in terms if t.kind == "latent"} == {
        "w": "exact",
        "s": "sample: no closed form",
        "z": "exact",
    }
    w = dist.Normal(guide.loc.w, guide.scale.w)
    exact = torch.distributions.kl_divergence(w, dist.Normal(0.0, 1.0)).sum()
    assert torch.allclose(terms.kl()["w"], exact)
