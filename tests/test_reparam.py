"""`pvi.fit(..., reparam=)`: the same posterior in other coordinates."""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule
from torch import Tensor, nn

import pvi
from pvi.errors import ModelError
from pvi.guides import FullRank, Structured
from tests.scenarios import isolated, local_model, nested_model, normal_log_z, randn

Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated():
        yield


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def data() -> tuple[Tensor, Tensor]:
    return torch.tensor(Y), torch.tensor(SIGMA)


class TestSchools:
    @pytest.mark.parametrize(
        "how",
        ["noncentered", "learned", {"theta": LocScaleReparam(0.0)}],
        ids=["0", "learned", "dict"],
    )
    def test_sites_stay_and_the_bound_rises(self, how: Any) -> None:
        options: Any = {"steps": 400, "seed": 0}
        plain = pvi.fit(schools, data=data(), **options)
        other = pvi.fit(schools, data=data(), reparam=how, **options)
        draws = other.posterior.sample(2000, seed=0)
        assert {"mu", "tau", "theta"} < draws.keys()
        assert draws["theta"].shape == (2000, 8)
        assert other.posterior.predict(num_draws=3)["y"].shape == (3, 8)
        bounds = [float(f.posterior.log_weights(2000, seed=0).mean()) for f in (plain, other)]
        assert bounds[1] > bounds[0] + 0.5

    def test_theta_is_what_it_says(self) -> None:
        fit = pvi.fit(schools, data=data(), reparam="noncentered", steps=50, seed=0)
        draws = fit.posterior.sample(5, seed=0)
        expected = (
            draws["mu"].unsqueeze(-1) + draws["tau"].unsqueeze(-1) * draws["theta_decentered"]
        )
        torch.testing.assert_close(draws["theta"], expected)


def test_diagnosis_advises_it() -> None:
    """Where a location or scale is latent and the weights are not good; not afterwards."""
    centred = pvi.fit(schools, data=data(), steps=300, seed=0)
    assert any("reparam='noncentered'" in reason for reason in centred.diagnose(2000).reasons)
    other = pvi.fit(schools, data=data(), reparam="noncentered", steps=300, seed=0)
    assert not any("reparam" in reason for reason in other.diagnose(2000).reasons)


@pytest.mark.parametrize("how", ["noncentered", "learned"])
def test_evidence_is_the_same(how: str) -> None:
    """Importance sampling of a model whose evidence is known, in the new coordinates."""
    x = randn(4)
    fit = pvi.fit(nested_model, Structured, x, reparam=how, steps=300, seed=0)
    log_w = fit.posterior.log_weights(4000, seed=0)
    log_z = float(log_w.logsumexp(0)) - math.log(4000)
    se = float((log_w - log_w.max()).exp().std() / (log_w - log_w.max()).exp().mean()) / 4000**0.5
    assert abs(log_z - normal_log_z(x, shared=1.0)) < 4 * se + 1e-6
    assert se < 0.05


class TestFamilies:
    @pytest.mark.parametrize("how", ["noncentered", "learned"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda m, s: dist.LogNormal(m, s),
            lambda m, s: dist.StudentT(3.0, m, s),
            lambda m, s: dist.Laplace(m, s),
            lambda m, s: dist.Normal(m.unsqueeze(-1).expand(*m.shape, 2), 1.0).to_event(1),
            lambda m, s: dist.LogNormal(m.unsqueeze(-1).expand(*m.shape, 2), 1.0).to_event(1),
        ],
        ids=["LogNormal", "StudentT", "Laplace", "vector", "vector LogNormal"],
    )
    def test_location_scale(self, make: Any, how: str) -> None:
        def model(x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            s = pyro.sample("s", dist.HalfNormal(1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", make(m, s))
                loc = z.sum(-1) if make(torch.tensor(0.0), torch.tensor(1.0)).event_shape else z
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        x = randn(5)
        fit = pvi.fit(model, data=x, reparam=how, steps=5, seed=0)
        draws = fit.posterior.sample(50, seed=0)
        fn = make(torch.tensor(0.0), torch.tensor(1.0))
        assert draws["z"].shape == (50, 5, *fn.event_shape)
        assert bool(fn.support.check(draws["z"]).all())
        trace = pyro.poutine.trace(fit.model).get_trace(x)
        assert trace.nodes["z"]["is_observed"]  # a function of the others now

    def test_joint_density_of_a_reparameterised_site(self) -> None:
        """The model's density moves by exactly the Jacobian of the map."""
        x = randn(3)
        fit = pvi.fit(nested_model, FullRank, x, reparam="noncentered", steps=5, seed=0)
        draws = fit.posterior.draws(4, seed=0)
        theta, eps = draws.values["theta"], draws.values["z_decentered"]
        z = theta.unsqueeze(-1) + eps
        normal = torch.distributions.Normal(0.0, 1.0)
        expected = normal.log_prob(theta) + (normal.log_prob(eps) + normal.log_prob(x - z)).sum(-1)
        torch.testing.assert_close(draws.log_p, expected)


class TestRefusals:
    def test_nothing_to_do(self) -> None:
        with pytest.raises(ModelError, match="nothing to do"):
            pvi.fit(local_model, data=randn(4), reparam="noncentered")

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("centred", r"\['learned', 'noncentered'\].*got 'centred'"),
            ({"zeta": LocScaleReparam(0.0)}, r"site 'zeta', which is no latent.*'theta', 'z'"),
            ({"x": LocScaleReparam(0.0)}, "site 'x', which is no latent"),
            (3, "must be a string, a dict or a strategy"),
        ],
    )
    def test_wrong(self, how: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            pvi.fit(nested_model, data=randn(4), reparam=how)

    def test_masked_distributions_stay(self) -> None:
        """`.mask(...)` hides the family from Pyro's reparameteriser: the site stays as it is."""

        def model(x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(m, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(m, 1.0).mask(x > 0.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.tensor([1.0, -1.0])
        fit = pvi.fit(model, data=x, reparam="noncentered", steps=3, seed=0)
        assert {"m", "a_decentered", "z"} <= fit.posterior.sample(2).keys()
        assert "z_decentered" not in fit.posterior.sample(2)

    def test_base_of_a_transformed_site(self) -> None:
        def model(x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.LogNormal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        how = {"z": TransformReparam(), "z_base": LocScaleReparam(0.0)}
        fit = pvi.fit(model, data=torch.tensor(1.0), reparam=how, steps=3, seed=0)
        assert {"m", "z", "z_base_decentered"} <= fit.posterior.sample(2).keys()


@pytest.mark.parametrize("kind", [nn.Module, PyroModule])
def test_modules_keep_their_parameters(kind: type) -> None:
    class Network(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                shift = self.layer(x.unsqueeze(-1)).squeeze(-1)
                pyro.sample("y", dist.Normal(z + shift, 1.0), obs=x)

    network, x = Network(), randn(5)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    fit = pvi.fit(network, data=x, reparam="noncentered", steps=3, seed=0)
    assert (
        before.keys() == {"layer.weight", "layer.bias"} == dict(network.named_parameters()).keys()
    )
    assert all(bool((p != before[n]).all()) for n, p in network.named_parameters())
    assert fit.posterior.sample(2)["z"].shape == (2, 5)
