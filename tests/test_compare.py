"""Fits side by side, and beside Markov chains."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

import pvi
from pvi.workflow.against import wasserstein
from tests.test_loo import data, exact, gaussian, regression

pytestmark = pytest.mark.usefixtures("isolated")


def smaller(x: Tensor, y: Tensor) -> None:
    """The regression without its second, strongest column."""
    regression(torch.cat([x[:, :1], 0 * x[:, 1:2], x[:, 2:]], 1), y)


def test_better_models_come_first() -> None:
    x, y = data()
    reduced = pvi.fit(smaller, pvi.guides.FullRank, data=(x, y), seed=0)
    found = pvi.compare({"small": reduced, "large": gaussian()}, num_draws=2000)
    large, small = found.entries
    assert (large.name, small.name) == ("large", "small")
    gap = exact(x * torch.tensor([1.0, 0.0, 1.0]), y) - exact(x, y)
    errors = math.hypot(found.loos["large"].mcse, found.loos["small"].mcse)
    assert abs(small.elpd_diff - float(gap.sum())) < 4 * errors
    assert small.diff_se == pytest.approx(float(gap.std()) * math.sqrt(len(y)), rel=0.05)
    assert large.elpd_diff == 0.0
    evidence = dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 4 * x @ x.T)
    assert large.evidence == pytest.approx(float(evidence.log_prob(y)), abs=1e-6)
    assert large.bound == pytest.approx(large.evidence, abs=1e-6)
    assert "elpd_loo" in str(found)
    assert list(found.to_pandas().index) == ["large", "small"]
    assert len(found.plot().axes) == 3


def test_what_is_missing_is_nan_with_a_reason() -> None:
    x, y = data()
    point = pvi.fit(regression, pvi.guides.Delta, data=(x, y), seed=0, steps=20)
    found = pvi.compare({"point": point, "exact": gaussian()}, num_draws=500)
    last = found.entries[-1]
    assert last.name == "point"
    assert last.verdict == "not assessed"
    assert math.isnan(last.elpd)
    assert math.isnan(last.evidence)
    assert any(r.startswith("point: no loo: ") and "Delta" in r for r in found.reasons)


def test_other_observations_are_refused() -> None:
    x, y = data()
    other = pvi.Posterior(regression, gaussian().guide, (x, y + 1.0))
    with pytest.raises(pvi.DataError, match="different observations"):
        pvi.compare({"a": gaussian(), "b": other})
    with pytest.raises(pvi.DataError, match="two or more"):
        pvi.compare({"a": gaussian()})


@pytest.mark.parametrize("sizes", [(50, 50), (50, 30), (7, 64)])
def test_wasserstein_is_exact(sizes: tuple[int, int]) -> None:
    x, y = torch.randn(sizes[0]), 2 * torch.randn(sizes[1]) + 1
    assert wasserstein(x, y, 1.0) == pytest.approx(wasserstein_distance(x, y), rel=1e-9)
    assert wasserstein(x, x + 0.5, 2.0) == pytest.approx(0.5, rel=1e-9)


def guide() -> None:
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def two() -> None:
    guide()
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def test_against_finds_what_is_off() -> None:
    """Against draws of N(1, 2) the standard normal is 0.5 sds off, and W2 is known."""
    draws = {"a": torch.randn(4, 1000, 2), "b": 1 + 2 * torch.randn(4, 1000)}
    draws["a"][..., 1] = 0.8 * draws["a"][..., 0] + 0.6 * draws["a"][..., 1]
    found = pvi.against(pvi.Posterior(two, guide), draws)
    worst = found.rows[0]
    assert worst.name == "b"
    assert abs(worst.error + 0.5) < 4 * worst.error_se
    assert abs(worst.sd_ratio - 0.5) < 4 * worst.sd_ratio_se
    assert worst.w2 == pytest.approx(math.sqrt(0.5), abs=4 * worst.error_se + 0.03)
    assert worst.error_se == pytest.approx(math.sqrt(1 / 4000 + 0.25 / 4000), rel=0.15)
    assert found.pair == ("a[0]", "a[1]")
    assert abs(found.correlation_gap - 0.8) < 4 * found.correlation_se
    for row in found.rows[1:]:
        assert row.w2 < 4 * row.floor
        assert abs(row.error) < 4 * row.error_se
    assert str(found).startswith("furthest off: b")
    assert found.to_pandas().index[0] == "b"
    assert len(found.plot().axes) == 2


def test_against_reads_every_form() -> None:
    posterior = pvi.Posterior(two, guide)
    one = pvi.against(posterior, posterior.to_arviz(500, seed=1), num_draws=500)
    two_ = pvi.against(posterior, posterior.sample(500, seed=1), num_draws=500)
    assert [row.w2 for row in one.rows] == pytest.approx([row.w2 for row in two_.rows], abs=1e-6)


def test_against_refuses_what_does_not_fit() -> None:
    posterior = pvi.Posterior(two, guide)
    with pytest.raises(pvi.DataError, match="no site in common"):
        pvi.against(posterior, {"c": torch.randn(100)})
    with pytest.raises(pvi.DataError, match="'a' have shape"):
        pvi.against(posterior, {"a": torch.randn(4, 100, 3)})
    with pytest.raises(pvi.DataError, match="finite"):
        pvi.against(posterior, {"b": torch.full((100,), math.nan)})
    with pytest.raises(pvi.DataError, match="InferenceData"):
        pvi.against(posterior, 3)
