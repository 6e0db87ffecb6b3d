"""`MeanField`: a normal at the model's own sites, on every support, in plates of any kind."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor, nn
from torch.distributions import constraints

import pvi
from pvi.errors import GuideError, ModelError
from pvi.guides import Guide, MeanField, prior_median
from tests.scenarios import (
    EXACT,
    local_model,
    mean_model,
    mean_posterior,
    nested_model,
    normal,
    randn,
)

pytestmark = pytest.mark.usefixtures("isolated")

GUIDES: dict[str, Callable[..., Guide]] = {"MeanField": MeanField}


@pytest.fixture(params=GUIDES.values(), ids=GUIDES)
def make(request: Any) -> Callable[..., Guide]:
    return request.param


def one_site(prior: Callable[[], Any], *, used: bool = True) -> Callable[..., None]:
    """A model with one latent; if the likelihood uses it, it does not broadcast over particles."""

    def model() -> None:
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z.sum() if used else 0.0, 1.0), obs=torch.tensor(0.3))

    return model


SUPPORTS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "real": (lambda: dist.Normal(0.0, 1.0), ()),
    "positive": (lambda: dist.HalfCauchy(1.0), ()),
    "gamma": (lambda: dist.Gamma(2.0, 1.0), ()),
    "interval": (lambda: dist.Uniform(-2.0, 3.0), ()),
    "unit": (lambda: dist.Beta(2.0, 5.0), ()),
    "greater than": (lambda: dist.Pareto(1.0, 3.0), ()),
    "vector": (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), (3,)),
    "matrix": (lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), (2, 3)),
    "multivariate": (lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), (3,)),
    "positive vector": (lambda: dist.LogNormal(torch.zeros(3), 1.0).to_event(1), (3,)),
    "simplex": (lambda: dist.Dirichlet(torch.ones(4)), (4,)),
    "corr_cholesky": (lambda: dist.LKJCholesky(3, 1.0), (3, 3)),
    "improper": (lambda: dist.ImproperUniform(constraints.real, (), ()), ()),
    "improper positive": (lambda: dist.ImproperUniform(constraints.positive, (), (2,)), (2,)),
    "cauchy": (lambda: dist.Cauchy(1.0, 2.0), ()),
    "student": (lambda: dist.StudentT(1.0, 3.0, 1.0), ()),
}


class TestSupports:
    @pytest.mark.parametrize("name", SUPPORTS)
    def test_draws_are_inside(self, name: str, make: Callable[..., Guide]) -> None:
        prior, shape = SUPPORTS[name]
        model = one_site(prior)
        guide = make(model)
        trace = poutine.trace(guide).get_trace()
        node = trace.nodes["z"]
        assert node["value"].shape == shape
        assert node["value"].dtype == torch.float64
        assert bool(prior().support.check(node["value"]).all())
        assert node["fn"].event_shape == prior().event_shape
        assert node["fn"].batch_shape == prior().batch_shape
        assert bool(node["fn"].log_prob(node["value"]).isfinite().all())
        assert node["fn"].has_rsample

    @pytest.mark.parametrize("name", SUPPORTS)
    def test_density_is_that_of_the_draws(self, name: str, make: Callable[..., Guide]) -> None:
        """log q(z) = log N(u; m, s) - log |dz / du| at z = t(u), by Pyro's own AutoNormal."""
        model = one_site(SUPPORTS[name][0])
        guide = make(model).setup()
        auto = AutoNormal(model, init_loc_fn=prior_median, init_scale=0.1)
        auto()
        torch.manual_seed(3)
        ours = poutine.trace(guide).get_trace()
        torch.manual_seed(3)
        theirs = poutine.trace(auto).get_trace()
        torch.testing.assert_close(
            ours.nodes["z"]["value"], theirs.nodes["z"]["value"], atol=EXACT, rtol=EXACT
        )
        log_q = [float(trace.log_prob_sum().detach()) for trace in (ours, theirs)]
        assert log_q[0] == pytest.approx(log_q[1], abs=1e-8)

    @pytest.mark.parametrize("name", SUPPORTS)
    def test_fit_in_plain_pyro(self, name: str, make: Callable[..., Guide]) -> None:
        """A step of SVI with Pyro's own ELBO moves every parameter."""
        model = one_site(SUPPORTS[name][0])
        guide = make(model).setup()
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        assert math.isfinite(svi.step())
        for parameter, value in guide.named_parameters():
            assert bool((value.detach() != before[parameter]).any()), parameter


class TestStart:
    @pytest.mark.parametrize(
        ("prior", "expected"),
        [
            (lambda: dist.Normal(1.5, 2.0), 1.5),
            (lambda: dist.Cauchy(1.0, 2.0), 1.0),
            (lambda: dist.LogNormal(0.7, 1.0), math.exp(0.7)),
            (lambda: dist.HalfNormal(1.0), 0.6744897501960817),
            (lambda: dist.Uniform(-2.0, 3.0), 0.5),
            (lambda: dist.Gamma(2.0, 4.0), 0.5),  # no median in closed form: the mean
            (lambda: dist.ImproperUniform(constraints.real, (), ()), 0.0),
            (lambda: dist.ImproperUniform(constraints.positive, (), ()), 1.0),
        ],
    )
    def test_prior_median(self, prior: Callable[[], Any], expected: float) -> None:
        guide = MeanField(one_site(prior)).setup()
        node = poutine.trace(guide).get_trace().nodes["z"]
        start = guide.latents["z"].transform(guide.loc.z)
        assert float(start.detach()) == pytest.approx(expected, abs=1e-7)
        assert float(guide.scale.z.detach()) == pytest.approx(0.1)
        assert node["value"].shape == ()

    def test_is_not_random(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        MeanField(nested_model).setup(randn(5))
        assert torch.equal(torch.get_rng_state(), state)

    def test_init_loc_fn_and_scale(self) -> None:
        values = {"theta": torch.tensor(0.7), "z": torch.arange(3.0)}
        guide = MeanField(nested_model, init_to_value(values=values), init_scale=0.3).setup(
            randn(3)
        )
        assert float(guide.loc.theta.detach()) == pytest.approx(0.7)
        torch.testing.assert_close(guide.loc.z.detach(), torch.arange(3.0))
        torch.testing.assert_close(guide.scale.z.detach(), torch.full((3,), 0.3))

    def test_outside_the_support(self) -> None:
        model = one_site(lambda: dist.HalfNormal(1.0))
        guide = MeanField(model, init_to_value(values={"z": torch.tensor(-1.0)}))
        with pytest.raises(GuideError, match=r"site 'z'.*not inside its support"):
            guide.setup()

    def test_no_latents(self) -> None:
        def model() -> None:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

        with pytest.raises(ModelError, match="no latent site"):
            MeanField(model).setup()

    def test_discrete(self) -> None:
        with pytest.raises(GuideError, match=r"site 'z'.*discrete"):
            MeanField(one_site(lambda: dist.Bernoulli(0.5))).setup()


class TestExactKL:
    def test_normal_sites(self) -> None:
        """Normal against normal: `explain` has no "sample", the terms have the closed form."""
        x = randn(4)
        guide = MeanField(nested_model).setup(x)
        exact = pvi.ELBO(kl="exact")
        terms = exact.terms(nested_model, guide, x)
        assert [terms[name].how for name in ("theta", "z")] == ["exact", "exact"]
        assert "sample" not in str(exact.explain(nested_model, guide, x))
        expected = 0.5 * (0.1**2 + 0.0 - 1) - math.log(0.1)
        assert float(terms.kl()["theta"].detach()) == pytest.approx(expected, abs=EXACT)

    @pytest.mark.parametrize("name", ["multivariate", "vector", "matrix"])
    def test_other_shapes(self, name: str) -> None:
        model = one_site(SUPPORTS[name][0])
        assert pvi.ELBO(kl="exact").terms(model, MeanField(model).setup())["z"].how == "exact"

    @pytest.mark.parametrize("name", SUPPORTS)
    def test_mean_of_the_samples(self, name: str) -> None:
        """Exact or not, the KL is the mean of the sampled one."""
        model = one_site(SUPPORTS[name][0], used=False)
        guide = MeanField(model, init_scale=0.4).setup()
        with torch.no_grad():
            exact = pvi.ELBO(2000, kl="exact").terms(model, guide)["z"].per_particle()
            sample = pvi.ELBO(2000).terms(model, guide)["z"].per_particle()
        se = math.sqrt(float(exact.var() + sample.var()) / 2000)
        assert abs(float(exact.mean() - sample.mean())) < 3 * se + EXACT


class TestModule:
    @staticmethod
    def model(x: Tensor) -> None:
        a = pyro.sample("level.a", dist.Normal(0.0, 1.0))
        tau = pyro.sample("level.tau", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(a, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def test_parameters_exist_after_setup(self, make: Callable[..., Guide]) -> None:
        guide = make(self.model)
        assert list(guide.parameters()) == []
        assert guide.setup(randn(5)) is guide
        shapes = {n: tuple(p.shape) for n, p in guide.named_parameters()}
        assert sorted(shapes.values()) == [(), (), (), (), (5,), (5,)]
        assert all(p.requires_grad and p.dtype == torch.float64 for p in guide.parameters())

    def test_first_call_sets_up(self, make: Callable[..., Guide]) -> None:
        guide = make(self.model)
        values = guide(randn(5))
        assert sorted(values) == ["level.a", "level.tau", "z"]
        assert len(list(guide.parameters())) == 6

    def test_setup_starts_afresh(self, make: Callable[..., Guide]) -> None:
        guide = make(self.model).setup(randn(5))
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(1.0)
        guide.setup(randn(7))
        fresh = make(self.model).setup(randn(7))
        assert guide.state_dict().keys() == fresh.state_dict().keys()
        for name, value in fresh.state_dict().items():
            assert torch.equal(guide.state_dict()[name], value), name
        assert guide(randn(7))["z"].shape == (7,)

    def test_state_dict_round_trip(self, make: Callable[..., Guide]) -> None:
        x = randn(5)
        trained = pvi.fit(self.model, make(self.model), data=x, steps=20, seed=0).guide
        state = {name: value.clone() for name, value in trained.state_dict().items()}
        guide = make(self.model).setup(x)
        assert any(not torch.equal(v, state[n]) for n, v in guide.state_dict().items())
        guide.load_state_dict(state)
        draws = []
        for program in (trained, guide):
            torch.manual_seed(3)
            draws.append(program(x))
        for name in draws[0]:
            assert torch.equal(draws[0][name], draws[1][name]), name

    def test_dotted_names_stay(self, make: Callable[..., Guide]) -> None:
        fitted = pvi.fit(self.model, make(self.model), data=randn(5), steps=3, seed=0)
        assert sorted(fitted.posterior.sample(4)) == ["level.a", "level.tau", "z"]

    def test_model_is_no_part_of_it(self, make: Callable[..., Guide]) -> None:
        """A network in the model does not become a parameter of the guide."""

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(1, 1)

            def forward(self, x: Tensor) -> None:
                mean_model(self.layer(x.unsqueeze(1)).squeeze(1).detach())

        guide = make(Network()).setup(randn(5))
        assert sorted(dict(guide.named_parameters())) == [
            "loc.mu_unconstrained",
            "scale.mu_unconstrained",
        ]

    def test_float32(self) -> None:
        torch.set_default_dtype(torch.float32)
        guide = MeanField(self.model).setup(randn(5))
        assert all(p.dtype == torch.float32 for p in guide.parameters())
        fitted = pvi.fit(self.model, data=randn(5), steps=3, seed=0)
        assert fitted.posterior.sample(4)["z"].dtype == torch.float32


class TestPlates:
    @staticmethod
    def model(x: Tensor) -> None:
        rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.HalfNormal(1.0))
        with rows, columns:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b * z.sum(-1), 1.0), obs=x)

    def test_shapes(self, make: Callable[..., Guide]) -> None:
        values = make(self.model)(randn(4, 3))
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        assert shapes == {"a": (4, 1), "b": (3,), "z": (4, 3, 2)}

    @pytest.mark.parametrize("batched", [True, False])
    def test_particles(self, make: Callable[..., Guide], batched: bool) -> None:
        """Batched and looped particles agree, and with Pyro too."""
        x = randn(4, 3)
        guide = make(self.model).setup(x)
        options = {"num_particles": 3, "vectorize_particles": batched}
        pairs = [(pvi.ELBO, Trace_ELBO), (pvi.TraceMeanFieldELBO, TraceMeanField_ELBO)]
        for ours, theirs in pairs:
            values = []
            for objective in (ours(**options), theirs(**options, max_plate_nesting=2)):
                torch.manual_seed(2)
                values.append(objective.loss(self.model, guide, x))
            assert values[0] == pytest.approx(values[1], abs=EXACT)

    def test_model_that_subsamples(self, make: Callable[..., Guide]) -> None:
        """A row of parameters for every element, also for those outside the first subsample."""

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=4) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        x = torch.arange(10.0) / 3
        guide = make(model).setup(x)
        assert {tuple(p.shape) for p in guide.parameters()} == {(10,)}
        pvi.fit(model, guide, data=x, steps=600, seed=0)
        found = guide.loc.z.detach()  # type: ignore[attr-defined]
        # the optimiser's noise: 240 visits of each row, rates down to 0.00005; sd of z is 0.7
        assert float((found - x / 2).abs().max()) < 0.15


class TestConjugate:
    """The exact posterior is normal: fits reach it; more in `test_fit_posterior.py`."""

    def test_default_fit_converges(self) -> None:
        """Without `steps` the fit ends by itself at the posterior."""
        y = randn(30) + 1.0
        mean, sd = mean_posterior(y)
        fit = pvi.fit(mean_model, data=y, seed=0)
        assert fit.converged, fit.reason
        draws = fit.posterior.sample(20_000, seed=1)["mu"]
        assert abs(float(draws.mean()) - mean) < 3 * sd / math.sqrt(20_000) + 0.05 * sd
        assert abs(float(draws.std()) / sd - 1) < 3 / math.sqrt(40_000) + 0.05
        bound = pvi.ELBO(1000).bound(mean_model, fit.guide, y)
        log_z = float(normal(y, 0.0, 1.0).sum()) + 0.5 * (mean / sd) ** 2 + math.log(sd / 2)
        assert bound == pytest.approx(log_z, abs=0.01)

    def test_rows(self) -> None:
        x = randn(20)
        fit = pvi.fit(local_model, data=x, steps=600, seed=0)
        loc, scale = fit.guide.loc.z.detach(), fit.guide.scale.z.detach()  # type: ignore[attr-defined]
        sd = math.sqrt(0.5)
        # one Monte Carlo draw a step and rates from 0.05 to 0.00005: a few hundredths of an sd
        assert float((loc - x / 2).abs().max()) < 0.1 * sd
        assert float((scale / sd - 1).abs().max()) < 0.1
