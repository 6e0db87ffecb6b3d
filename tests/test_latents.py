"""Information in latents, where the linear-Gaussian model has it in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.errors import GuideError

WEIGHTS = torch.tensor([2.0, 1.0, 0.0])  # x_d ~ N(w_d z_d, 1): the posterior factorises
PRECISION = 1 + WEIGHTS**2


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * WEIGHTS, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = x * WEIGHTS / PRECISION
        pyro.sample("z", dist.Normal(loc, PRECISION**-0.5).to_event(1))


def data(n: int = 3000) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, 3) * PRECISION.sqrt()


def test_kl_information_and_gap_of_the_exact_posterior() -> None:
    x = data()
    found = pvi.latents(pvi.Posterior(model, guide, x), batch_size=700)["z"]
    loc = x * WEIGHTS / PRECISION
    kl = 0.5 * (loc**2 + 1 / PRECISION - 1 + PRECISION.log())
    torch.testing.assert_close(found.kl_dims, kl.double().mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found.variance, loc.double().var(0, correction=0), atol=1e-5, rtol=1e-5
    )
    assert found.kl == pytest.approx(float(kl.sum(1).mean()), rel=1e-5)
    # the average posterior of many rows is the prior; all KL is information, log(1 + w^2) / 2 each
    exact = 0.5 * float(PRECISION.log().sum())
    finite = 0.02  # of 3,000 rows instead of all: about (number of regions) / 2N
    assert found.information == pytest.approx(exact, abs=4 * found.information_se + finite)
    assert abs(found.gap) < 4 * found.gap_se + finite
    assert found.active.tolist() == [True, True, False] and found.unused == pytest.approx(1 / 3)
    assert found.findings == () and "2 of 3 numbers active" in str(found)


def test_surgery_adds_up_and_batches_change_nothing() -> None:
    posterior = pvi.Posterior(model, guide, data(400))
    one = pvi.latents(posterior, num_draws=400)["z"]
    assert one.information + one.gap == pytest.approx(
        one.kl, abs=4 * (one.information_se + one.gap_se)
    )
    other = pvi.latents(posterior, num_draws=400, batch_size=37)["z"]
    torch.testing.assert_close(one.kl_dims, other.kl_dims)
    assert one.information == pytest.approx(other.information, abs=4 * one.information_se)


def test_a_wrong_average_is_a_gap() -> None:
    def shifted(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((3,), 2.0), 1.0).expand([3]).to_event(1))

    found = pvi.latents(pvi.Posterior(model, shifted, data(200)))["z"]
    # q(z) = N(2, I): KL to the prior 3 * 2^2 / 2; no information
    assert found.gap == pytest.approx(6.0, abs=4 * found.gap_se)
    assert found.information == pytest.approx(0.0, abs=1e-4)
    assert any("collapsed" in f and "FreeBits" in f for f in found.findings)
    assert any("unlike the latents" in f for f in found.findings)


def test_information_is_at_most_log_n() -> None:
    def sharp(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-4).to_event(1))

    found = pvi.latents(pvi.Posterior(model, sharp, data(50)))["z"]
    assert found.information == pytest.approx(math.log(50), abs=1e-3)
    assert "near its limit" in str(found)


def test_full_covariances_have_marginal_kls() -> None:
    def full(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale = x * WEIGHTS / PRECISION, (PRECISION**-0.5).diag()
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale))

    x = data(300)
    one, two = (pvi.latents(pvi.Posterior(model, g, x))["z"] for g in (guide, full))
    torch.testing.assert_close(one.kl_dims, two.kl_dims, atol=1e-5, rtol=1e-5)
    assert two.kl == pytest.approx(one.kl, abs=4 * two.kl_se)


def test_a_pvi_guide_and_a_frame() -> None:
    net = torch.nn.Linear(3, 6)
    posterior = pvi.fit(model, pvi.guides.Amortized(net), data=data(100), steps=5, seed=0).posterior
    found = pvi.latents(posterior, data(150), batch_size=64)
    assert found["z"].num_rows == 150
    frame = found.to_pandas()
    assert list(frame.columns) == ["number", "site", "kl", "variance", "active"] and len(frame) == 3


def test_models_without_local_latents_are_refused() -> None:
    def flat(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, 0])

    def its(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(GuideError, match="there are none"):
        pvi.latents(pvi.Posterior(flat, its, data(10)))
