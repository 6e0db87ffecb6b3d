"""NUTS from a guide, against exact answers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi

pytestmark = pytest.mark.usefixtures("isolated")


def model(y: Tensor) -> None:
    """mu and sigma2 by hand: sigma2 ~ inverse gamma, so that its support is a half line."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.deterministic("twice", 2 * mu)
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.sample("n", dist.Poisson(rate), obs=torch.tensor([1.0, 3.0, 2.0]))


Y = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
MU = (4.5 / 3.25, 1 / math.sqrt(3.25))
RATE = (9.0 / 5.0, 3.0 / 5.0)  # Gamma(3 + 6, 2 + 3)


def test_draws_the_posterior() -> None:
    """From a guide that is off: mu by 1 sd, its sd by a factor of 2."""

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(MU[0] + MU[1], 2 * MU[1]))
        pyro.sample("rate", dist.Gamma(6.0, 4.0))

    posterior = pvi.Posterior(model, guide, (Y,))
    chains = pvi.nuts(posterior, 500, warmup=100, num_chains=2)
    ess = {row.name: row.ess for row in chains.against.rows}
    for name, (mean, sd) in {"mu": MU, "rate": RATE}.items():
        draws = chains.draws[name]
        assert draws.shape == (2, 500)
        assert abs(float(draws.mean()) - mean) < 4 * sd / math.sqrt(ess[name])
        assert float(draws.std()) == pytest.approx(sd, rel=4 / math.sqrt(ess[name]))
    assert torch.allclose(chains.draws["twice"], 2 * chains.draws["mu"])
    row = next(row for row in chains.against.rows if row.name == "mu")
    assert abs(row.error - 1.0) < 4 * row.error_se
    assert abs(row.sd_ratio - 2.0) < 4 * row.sd_ratio_se
    assert chains.gradients > 2 * 600

    data = chains.to_arviz()
    assert dict(data["posterior"].sizes) == {"chain": 2, "draw": 500}
    assert not data["sample_stats"]["diverging"].values.any()
    assert "2 chains of 500 draws" in str(chains)


def test_same_seed_same_draws() -> None:
    fit = pvi.fit(model, data=(Y,), seed=0)
    one, two = (pvi.nuts(fit, 20, warmup=20, num_chains=1, seed=3) for _ in range(2))
    assert torch.equal(one.draws["mu"], two.draws["mu"])


def test_discrete_latents_are_refused() -> None:
    def coin(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(0.3))

    with pytest.raises(pvi.ModelError, match="latent 'k' is discrete"):
        pvi.nuts(pvi.Posterior(coin, guide, (Y,)))


def test_subsampled_plates_are_refused() -> None:
    def part(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 2.0))

    with pytest.raises(pvi.ModelError, match="subsampled plate"):
        pvi.nuts(pvi.Posterior(part, guide, (Y,)))


def test_counts_are_checked() -> None:
    with pytest.raises(pvi.DataError, match="num_chains"):
        pvi.nuts(pvi.fit(model, data=(Y,), seed=0), num_chains=0)
