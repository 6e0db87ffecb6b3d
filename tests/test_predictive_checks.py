"""Scores against closed forms; checks that pass under the truth and name what is wrong else."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.diagnostics.scores import brier, crps, ecdf_band, pit, reliability
from pvi.errors import DataError


def even(num: int) -> Tensor:
    return torch.full((num, 1), 1.0 / num, dtype=torch.float64)


def normal_crps(y: float) -> float:
    """Of N(0, 1) at y (Gneiting and Raftery 2007, eq. 21)."""
    cdf = 0.5 * (1 + math.erf(y / math.sqrt(2)))
    pdf = math.exp(-y * y / 2) / math.sqrt(2 * math.pi)
    return y * (2 * cdf - 1) + 2 * pdf - 1 / math.sqrt(math.pi)


@pytest.mark.parametrize("y", [-1.5, 0.0, 2.0])
def test_crps_of_a_normal_is_unbiased_from_few_draws(y: float) -> None:
    torch.manual_seed(0)
    draws = torch.randn(5, 40_000, dtype=torch.float64)
    found = crps(draws, torch.full((40_000,), y, dtype=torch.float64), even(5))
    se = float(found.std()) / 200
    assert abs(float(found.mean()) - normal_crps(y)) < 4 * se  # unfair: off by 0.11


def test_weighted_crps_is_its_double_sum() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 1).double() + 1e6, torch.tensor([1e6]).double()
    w = torch.rand(6, 1).double().softmax(0)
    double = (w * w.T * (x - x.T).abs()).sum()
    expected = (w * (x - y).abs()).sum() - double / 2 / (1 - w.square().sum())
    torch.testing.assert_close(crps(x, y, w)[0], expected)


def test_brier_is_unbiased_from_few_draws() -> None:
    torch.manual_seed(0)
    p = (torch.rand(4, 100_000, 1).double() < 0.3).double().mean(0)
    found = brier(p, torch.ones(100_000, 1), 0.25)
    assert abs(float(found.mean()) - 0.49) < 4 * float(found.std()) / 100_000**0.5


def test_reliability_by_hand() -> None:
    p = torch.tensor([0.2] * 10 + [0.8] * 10)
    y = torch.tensor([1.0] * 4 + [0.0] * 6 + [1.0] * 8 + [0.0] * 2)
    found = reliability(p, y)
    assert found.count.tolist() == [10, 10]
    assert found.frequency.tolist() == pytest.approx([0.4, 0.8])
    assert found.ece == pytest.approx(0.1)
    # a mean of two mean absolute deviations of Bin(10, 0.2) / 10
    mad = sum(math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) * abs(k / 10 - 0.2) for k in range(11))
    assert found.ece_calibrated == pytest.approx(mad, abs=4 * 0.06 / math.sqrt(1000))


def test_pits_of_counts_are_uniform_and_bands_hold_their_level() -> None:
    torch.manual_seed(0)
    inside = []
    for _ in range(100):
        counts = torch.poisson(torch.full((21, 100), 1.5)).double()
        inside.append(ecdf_band(pit(counts[1:], counts[0], even(20))).inside)
    assert abs(sum(inside) / 100 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 100)


# y_i ~ N(mu, sd), mu ~ N(0, 1): the posterior is known
def model(y: Tensor, sd: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def guide(y: Tensor, sd: float = 1.0) -> None:
    precision = 1 + len(y) / sd**2
    pyro.sample("mu", dist.Normal(y.sum() / sd**2 / precision, precision**-0.5))


def normal_posterior(n: int, sd: float = 1.0) -> tuple[pvi.Posterior, Tensor]:
    torch.manual_seed(1)
    y = 0.5 + torch.randn(n)
    return pvi.Posterior(model, guide, y, kwargs={"sd": sd}), y


def test_exact_leave_one_out() -> None:
    posterior, y = normal_posterior(30)
    site = pvi.check_predictive(posterior, num_draws=4000).sites[0]
    rest = (y.sum() - y) / 30  # mean of mu given the others; precision 1 + 29
    exact = dist.Normal(rest, (1 + 1 / 30) ** 0.5)
    # weights of sd 0.2 at most: the error of a log score is below 1 / sqrt(4000) of a datum
    assert site.log_score == pytest.approx(float(exact.log_prob(y).mean()), abs=4e-3)
    assert site.pit is not None
    # two randomised draws apart: binomial noise of 4,000 draws, and the weights'
    assert float((site.pit - exact.cdf(y)).abs().max()) < 5 * 0.5 / 4000**0.5
    assert site.bad_khat == 0.0


def test_truth_passes_and_covers() -> None:
    posterior, _ = normal_posterior(400)
    found = pvi.check_predictive(posterior, 0.5 + torch.randn(400))
    site = found["y"]
    assert site.findings == ()
    assert all(abs(share - level) < 4 * se for level, share, se in site.coverage)
    assert "nothing found" in str(found) and "held-out" in str(found)


@pytest.mark.parametrize(("sd", "word"), [(0.5, "too narrow"), (2.0, "too wide")])
def test_wrong_noise_is_named(sd: float, word: str) -> None:
    found = pvi.check_predictive(normal_posterior(200, sd)[0])["y"]
    assert any(word in finding for finding in found.findings)
    assert found.statistics["sd"][2] == (1.0 if sd == 2.0 else 0.0)


def test_biased_predictions_are_named() -> None:
    posterior, y = normal_posterior(200)
    assert "too low" in str(pvi.check_predictive(posterior, y + 1.0))


# z_i ~ N(0, 1), y_i ~ N(z_i, 1): p(y_i) = N(0, 2)
def local_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))


def test_local_latents_are_integrated_over_on_held_out_data() -> None:
    torch.manual_seed(0)
    y, new = (2**0.5 * torch.randn(n) for n in (100, 300))
    posterior = pvi.Posterior(local_model, local_guide, y)
    found = pvi.check_predictive(posterior, new, num_draws=4000)
    exact = dist.Normal(0.0, 2**0.5).log_prob(new).mean()
    assert found["y"].log_score == pytest.approx(float(exact), abs=0.01)
    assert found["y"].findings == ()
    seen = pvi.check_predictive(posterior, new, local="posterior")
    assert "too wide" in str(seen) and "have seen the row" in str(seen)


def test_masked_nan_is_left_out_and_statistics_are_the_users() -> None:
    y = torch.tensor([1.0, 2.0, math.nan, 0.5])

    def with_mask(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=~y.isnan()):  # type: ignore
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def its_guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(3.5 / 4, 0.5))

    posterior = pvi.Posterior(with_mask, its_guide, (), kwargs={"y": y})
    site = pvi.check_predictive(posterior, statistics={"sum": torch.nansum})["y"]
    assert site.num == 3
    assert site.statistics["sum"][0] == pytest.approx(3.5)
    with pytest.raises(DataError, match="statistic 'bad' of site 'y'"):
        pvi.check_predictive(posterior, statistics={"bad": torch.sum})


def classes(x: Tensor, y: Any = None, b: Any = None, v: Any = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        logits = torch.stack([w * x, -w * x, 0 * w * x], -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        pyro.sample("b", dist.Bernoulli(logits=w * x), obs=b)
        loc = torch.stack([w * x, x + 0 * w], -1)
        pyro.sample("v", dist.Normal(loc, 1.0).to_event(1), obs=v)


def classes_guide(x: Tensor, y: Any = None, b: Any = None, v: Any = None) -> None:
    pyro.sample("w", dist.Normal(1.0, 0.01))


def test_classes_binary_and_vectors_together() -> None:
    torch.manual_seed(3)
    x = torch.randn(300)
    p = torch.stack([x, -x, 0 * x], -1).softmax(-1)
    y, b = torch.multinomial(p, 1)[:, 0], torch.bernoulli(x.sigmoid())
    v = torch.stack([x, x], -1) + torch.randn(300, 2)
    found = pvi.check_predictive(pvi.Posterior(classes, classes_guide, (x, y, b, v)), (x, y, b, v))
    truth = torch.nn.functional.one_hot(y, 3)
    # probabilities of 1,000 draws, each off by at most 0.5 / sqrt(1000), in a mean of 300
    assert found["y"].brier == pytest.approx(float((p - truth).square().sum(1).mean()), abs=0.01)
    assert found["b"].brier == pytest.approx(float((x.sigmoid() - b).square().mean()), abs=0.01)
    assert [s.kind for s in found.sites] == ["categorical", "binary", "continuous"]
    assert found["v"].num == 600 and found["y"].pit is None
    assert [f for s in found.sites for f in s.findings] == []
    flipped = pvi.check_predictive(pvi.Posterior(classes, classes_guide, (x, y, 1 - b, v)))
    assert any("probabilities are off" in f for f in flipped["b"].findings)
    assert {"ece", "log_score", "coverage_90%"} <= set(found.to_pandas().columns)


def test_errors_say_what_to_give() -> None:
    posterior, _ = normal_posterior(10)
    with pytest.raises(DataError, match="expected some of the observed sites"):
        pvi.check_predictive(posterior, sites=["x"])
    with pytest.raises(DataError, match="local must be"):
        pvi.check_predictive(posterior, local="both")


def test_plots_show_each_site() -> None:
    from pvi.plots import plot_coverage, plot_pit, plot_reliability

    found = pvi.check_predictive(normal_posterior(40)[0])
    assert [len(plot(found).axes) for plot in (plot_pit, plot_coverage)] == [1, 1]
    with pytest.raises(pvi.PviError, match="no observed site has a reliability"):
        plot_reliability(found)
