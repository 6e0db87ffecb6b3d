"""Predictive checks of angles, heavy tails, vectors and weights that fail, at known posteriors."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.diagnostics.site_check import SiteCheck

ROWS = 300


def checked(of: Callable[[Tensor], Any], y: Tensor, num_draws: int = 500) -> SiteCheck:
    """Of a site whose parameter is known to 0.001."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 0.001))
        with pyro.plate("row", len(y)):
            pyro.sample("y", of(m), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 0.001))

    return pvi.check_predictive(pvi.Posterior(model, guide, (y,)), num_draws=num_draws)["y"]


def draw(fn: Any) -> Tensor:
    torch.manual_seed(1)
    return fn.sample((ROWS,))


def test_angles_do_not_depend_on_where_the_circle_is_cut() -> None:
    results = []
    for centre in (0.0, math.pi - 0.01):
        y = draw(dist.VonMises(0.0, 4.0)) + centre
        y = torch.remainder(y + math.pi, 2 * math.pi) - math.pi
        results.append(checked(lambda m, c=centre: dist.VonMises(m + c, 4.0), y))
    for site in results:
        assert site.kind == "circular" and site.findings == ()
        assert math.isnan(site.rmse) and math.isnan(site.crps)
        assert set(site.statistics) == {"concentration"}
        assert all(abs(share - level) < 4 * se for level, share, se in site.coverage)
    first, second = (site.pit for site in results)
    assert first is not None and second is not None
    # two sets of 500 predictions: each PIT has an sd of at most 0.5 / sqrt(500), twice
    assert float((first - second).abs().max()) < 5 * (0.5 / 500) ** 0.5
    wide = checked(lambda m: dist.VonMises(m + 3.0, 1.0), draw(dist.VonMises(3.0, 4.0)))
    assert any("too wide" in finding for finding in wide.findings)


@pytest.mark.parametrize(
    ("of", "crps"),
    [(lambda m: dist.Cauchy(m, 1.0), False), (lambda m: dist.StudentT(1.5, m, 1.0), True)],
)
def test_scores_that_are_infinite_are_not_given(of: Callable, crps: bool) -> None:
    site = checked(of, draw(of(torch.tensor(0.0))))
    assert math.isnan(site.crps) != crps and math.isnan(site.rmse)
    assert "median" in site.statistics and not {"mean", "sd"} & set(site.statistics)
    assert site.findings == ()


def test_continuous_bernoulli_is_not_binary() -> None:
    fn = dist.ContinuousBernoulli(logits=torch.tensor(1.0))
    site = checked(lambda m: dist.ContinuousBernoulli(logits=m + 1.0), draw(fn))
    assert site.kind == "continuous" and site.reliability is None and site.findings == ()


def test_vectors_count_each_number() -> None:
    cov = torch.eye(2) + 0.5
    y = draw(dist.MultivariateNormal(torch.zeros(2), cov))
    site = checked(lambda m: dist.MultivariateNormal(m[..., None] + torch.zeros(2), cov), y)
    assert site.num == 2 * ROWS
    exact = dist.MultivariateNormal(torch.zeros(2), cov).log_prob(y)
    assert site.log_score == pytest.approx(float(exact.mean()), abs=0.001)
    # the mean of 500 predictions of sd 1.22 adds 0.2 % of the variance
    assert site.rmse == pytest.approx(float(y.square().mean().sqrt()), rel=0.01)


def test_failed_weights_come_first_and_give_no_crps() -> None:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1e-3), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))  # a thousand times too wide

    y = 1e-3 * draw(dist.Normal(0.0, 1.0))
    site = pvi.check_predictive(pvi.Posterior(model, guide, (y,)), num_draws=300)["y"]
    assert "khat" in site.findings[0]
    assert math.isnan(site.crps)
