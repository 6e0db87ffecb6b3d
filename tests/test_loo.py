"""Leave-one-out against exact answers of conjugate models."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.posterior.arviz import load

pytestmark = pytest.mark.usefixtures("isolated")
N, D, NOISE = 30, 3, 1.0


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + torch.randn(N, generator=g).double()
    return x, y


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(D), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * beta[..., None, :]).sum(-1), NOISE), obs=y)


def posterior_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    precision = x.T @ x / NOISE**2 + torch.eye(D) / 4.0
    cov = precision.inverse()
    return cov @ (x.T @ y) / NOISE**2, cov


def exact(x: Tensor, y: Tensor) -> Tensor:
    """log p(y_i | the others), `(N,)`, in closed form."""
    found = []
    for i in range(len(y)):
        rest = torch.arange(len(y)) != i
        mean, cov = posterior_of(x[rest], y[rest])
        sd = (x[i] @ cov @ x[i] + NOISE**2).sqrt()
        found.append(dist.Normal(x[i] @ mean, sd).log_prob(y[i]))
    return torch.stack(found)


def gaussian(scale: float = 1.0) -> pvi.Posterior:
    """The exact posterior, its sds multiplied by `scale`."""
    x, y = data()
    mean, cov = posterior_of(x, y)
    tril = torch.linalg.cholesky(cov) * scale

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("beta", dist.MultivariateNormal(mean, scale_tril=tril))

    return pvi.Posterior(regression, guide, (x, y))


def az_elpd(posterior: pvi.Posterior, num: int) -> Any:
    tree = posterior.to_arviz(num, predictive=False, seed=0)
    return load().loo(tree, reff=1.0, pointwise=True)


def elpd_of(found: Any) -> float:
    return float(found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd)


@pytest.mark.parametrize("scale", [1.0, 0.8, 1.2])
def test_equals_exact_leave_one_out(scale: float) -> None:
    found = pvi.loo(gaussian(scale), 4000)
    truth = exact(*data())
    assert abs(found.elpd - float(truth.sum())) < 4 * found.mcse
    assert found.mcse < 0.1
    assert (found.pointwise - truth).abs().max() < 0.1
    assert found.reliable
    assert found.se == pytest.approx(float(truth.std()) * math.sqrt(N), rel=0.05)


def test_overconfident_guides_are_seen() -> None:
    """az.loo on the raw draws says that all is well."""
    posterior, truth = gaussian(0.2), float(exact(*data()).sum())
    found = pvi.loo(posterior, 4000)
    assert not found.reliable
    assert "khat is above 0.70 for 30 of 30 data" in found.reasons[0]
    naive = az_elpd(posterior, 1000)
    khat = torch.as_tensor(naive.pareto_k.values)
    assert khat.max() < 0.7
    assert elpd_of(naive) > truth + 0.5


def test_agrees_with_arviz_where_the_guide_is_exact() -> None:
    posterior = gaussian()
    naive, found = az_elpd(posterior, 4000), pvi.loo(posterior, 4000)
    assert found.elpd == pytest.approx(elpd_of(naive), abs=4 * math.sqrt(2) * found.mcse)
    assert found.p_loo == pytest.approx(
        float(getattr(naive, "p_loo", getattr(naive, "p", 0))), abs=0.3
    )


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_arviz_compares_it() -> None:
    arviz = load()
    good, bad = pvi.loo(gaussian()), pvi.loo(gaussian(1.2))
    table = arviz.compare({"a": good.to_arviz(), "b": bad.to_arviz()})
    name = "elpd_loo" if "elpd_loo" in table else "elpd"
    assert float(table.loc["a", name]) == pytest.approx(good.elpd, abs=0.6)  # 1.x rounds
    assert "elpd" in str(good.to_arviz())


G, PER = 8, 2  # groups, observations of each


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", y.shape[1]):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("each", y.shape[0]):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def groups() -> Tensor:
    g = torch.Generator().manual_seed(2)
    z = 0.7 + torch.randn(G, generator=g)
    return (z + torch.randn(PER, G, generator=g)).double()


def mu_given(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of mu; the mean of a group has variance 1 + 1 / PER given mu."""
    variance = 1 + 1 / PER
    precision = y.shape[1] / variance + 0.25
    return y.mean(0).sum() / variance / precision, torch.as_tensor(1 / precision).to(y)


def exact_groups(y: Tensor) -> Tensor:
    found = []
    for i in range(G):
        mean, variance = mu_given(y[:, [j for j in range(G) if j != i]])
        cov = torch.eye(PER) + (1.0 + variance) * torch.ones(PER, PER)
        found.append(dist.MultivariateNormal(mean.expand(PER), cov.to(y)).log_prob(y[:, i]))
    return torch.stack(found)


def group_guide(y: Tensor, wider: float = 1.3) -> None:
    """Wider than the posterior, so that the weights matter."""
    mean, variance = mu_given(groups())
    mu = pyro.sample("mu", dist.Normal(mean, wider * variance.sqrt()))
    with pyro.plate("group", y.shape[1]):
        precision = 1.0 + PER
        loc = (mu + y.sum(0)) / precision
        pyro.sample("z", dist.Normal(loc, wider / math.sqrt(precision)))


def test_local_latents_are_integrated_out() -> None:
    y = groups()
    found = pvi.loo(pvi.Posterior(hierarchy, group_guide, (y,)), 4000)
    truth = exact_groups(y)
    assert found.pointwise.shape == (G,)
    assert found.reliable
    assert found.unit == "elements of plate group"
    assert abs(found.elpd - float(truth.sum())) < 4 * found.mcse
    assert found.mcse < 0.1
    assert (found.pointwise - truth).abs().max() < 0.1


def test_few_inner_draws_are_seen() -> None:
    posterior = pvi.Posterior(hierarchy, group_guide, (groups(),))
    found = pvi.loo(posterior, 200, num_inner=1)
    assert found.reliable or "num_inner" not in str(found)  # one draw can't tell
    narrow = pvi.Posterior(hierarchy, lambda y: group_guide(y, 3.0), (groups(),))
    assert "raise num_inner" in str(pvi.loo(narrow, 1000, num_inner=40))


def test_tied_local_latents_are_refused() -> None:
    def guide(y: Tensor) -> None:
        fn = dist.MultivariateNormal(torch.zeros(G), torch.eye(G) + 0.5)
        both = pyro.sample("all", fn, infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Normal(0.5, 0.5))
        with pyro.plate("group", G):
            pyro.sample("z", dist.Delta(both))

    with pytest.raises(pvi.DataError, match="is local to plate 'group'"):
        pvi.loo(pvi.Posterior(hierarchy, guide, (groups(),)))


def test_local_latents_alone_are_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))

    with pytest.raises(pvi.DataError, match="use evidence"):
        pvi.loo(pvi.Posterior(model, guide, (data()[1],)))


def test_points_and_tempered_fits_are_refused() -> None:
    x, y = data()
    point = pvi.fit(regression, pvi.guides.Delta, data=(x, y), seed=0, steps=10)
    with pytest.raises(pvi.ObjectiveError, match="Delta"):
        pvi.loo(point)
    tempered = pvi.fit(regression, data=(x, y), objective=pvi.BetaELBO(2.0), seed=0, steps=10)
    with pytest.raises(pvi.ObjectiveError, match="leave-one-out needs log weights"):
        pvi.loo(tempered)


def test_masked_data_count_for_nothing() -> None:
    keep: Any = torch.arange(N) < 20

    def masked(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(D), 2.0).to_event(1))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=keep):
            pyro.sample("y", dist.Normal((x * beta[..., None, :]).sum(-1), NOISE), obs=y)

    x, y = data()
    mean, cov = posterior_of(x[keep], y[keep])

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("beta", dist.MultivariateNormal(mean, cov))

    found = pvi.loo(pvi.Posterior(masked, guide, (x, y)), 4000)
    truth = exact(x[keep], y[keep])
    assert found.elpd == pytest.approx(float(truth.sum()), abs=4 * found.mcse)
    assert found.se == pytest.approx(float(truth.std()) * math.sqrt(20), rel=0.05)
    assert (found.pointwise[~keep] == 0).all()
