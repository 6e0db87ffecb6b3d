"""PSIS: known tail indices, agreement with arviz, exact edge cases."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pvi.errors import PviError
from pvi.posterior.psis import khat_threshold, psis


def uniform(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, generator=generator, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_khat_is_the_pareto_index(k: float) -> None:
    # exponential guide of rate 1, target of rate 1 - k: w ~ exp(k x), P(w > t) ~ t^(-1/k)
    khats = [psis(-k * torch.log(uniform(20_000, seed))).khat for seed in range(20)]
    assert np.mean(khats) == pytest.approx(k, abs=0.05)  # sd of one khat is 0.06 to 0.09
    assert np.std(khats) < 0.15


def test_khat_of_normals() -> None:
    # target N(0, 1), guide N(0, s): k = 1 - s^2
    khats = [psis(normal(20_000, seed=s) ** 2 * (1 - 0.7**2) / 2).khat for s in range(20)]
    assert np.mean(khats) == pytest.approx(0.51, abs=0.06)


def test_khat_of_student_t() -> None:
    # target Student t with 2 degrees of freedom, guide with 3: w ~ |x| where P(|x| > t) ~ t^-3
    p = torch.distributions.StudentT(torch.tensor(2.0, dtype=torch.float64))
    q = torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64))
    khats = []
    for seed in range(20):
        gamma = (
            -2 * torch.log(uniform(20_000, seed)) + normal(20_000, seed=seed + 100) ** 2
        )  # chi2(3)
        x = normal(20_000, seed=seed + 200) / torch.sqrt(gamma / 3)
        khats.append(psis(p.log_prob(x) - q.log_prob(x)).khat)
    assert np.mean(khats) == pytest.approx(1 / 3, abs=0.08)


# Square numbers: arviz 1 rounds the number of tail values, 3 sqrt(S), down and not up.
RATIOS = {
    "pareto": lambda: -0.6 * torch.log(uniform(2500)),
    "normal": lambda: 3 * normal(784),
    "light": lambda: uniform(4900),
    "large scale": lambda: 40 * normal(900) - 1e4,
    "zero weights": lambda: torch.cat([normal(400), torch.full((225,), -math.inf)]),
    "short": lambda: normal(30),
    "ties": lambda: (2 * normal(1250)).repeat(2),
}


def by_arviz(ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed log weights and khat; arviz 1 takes the ratios of LOO, which are negative."""
    arviz = pytest.importorskip("arviz")
    with np.errstate(all="ignore"):
        if int(arviz.__version__.split(".")[0]) < 1:
            return arviz.psislw(ratios.copy())
        return pytest.importorskip("arviz_stats.base").array_stats.psislw(-ratios)


@pytest.mark.parametrize("name", RATIOS)
def test_agrees_with_arviz(name: str) -> None:
    ratios = RATIOS[name]()
    log_weights, khat = by_arviz(ratios.numpy())
    ours = psis(ratios)
    # sorted, because arviz orders tied ratios at random
    expected = torch.tensor(np.sort(log_weights))
    torch.testing.assert_close(ours.log_weights.sort().values, expected, rtol=0, atol=1e-8)
    assert ours.khat == pytest.approx(float(khat), abs=1e-8)


PEAK = """
import resource, torch
from pvi.posterior.psis import psis
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
psis(torch.randn(10_000, dtype=torch.float64))
x = 0.3 * torch.randn({num}, dtype=torch.float64)
before = peak()
got = psis(x)
print(peak() - before, got.khat, got.ess / {num}, got.log_mean)
"""


@pytest.mark.parametrize("num", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_memory_is_a_few_copies_of_the_ratios(num: int) -> None:
    if sys.platform != "linux":
        pytest.skip("ru_maxrss has other units")
    command = [sys.executable, "-c", PEAK.format(num=num)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    peak, khat, share, log_mean = map(float, found)
    assert peak * 1024 < 5 * 8 * num
    assert khat < 0.3
    assert share == pytest.approx(math.exp(-(0.3**2)), abs=0.01)
    assert log_mean == pytest.approx(0.3**2 / 2, abs=4 * 0.3 / math.sqrt(num))


@pytest.mark.parametrize("name", RATIOS)
def test_invariants(name: str) -> None:
    ratios = RATIOS[name]()
    got = psis(ratios)
    assert got.log_weights.dtype == torch.float64
    assert torch.logsumexp(got.log_weights, 0).item() == pytest.approx(0, abs=1e-10)
    assert got.ess == pytest.approx(1 / (got.log_weights.exp() ** 2).sum().item())
    assert 1 <= got.ess <= len(ratios)
    # monotone in the raw ratios, the body untouched, nothing above the largest raw ratio
    assert (got.log_weights[ratios.argsort(stable=True)].diff().nan_to_num() >= -1e-12).all()
    raw = got.log_weights + got.log_mean + math.log(len(ratios))
    body = ratios <= ratios.quantile(0.79)
    torch.testing.assert_close(raw[body], ratios[body], rtol=0, atol=1e-8)
    assert (raw <= ratios.max() + 1e-8).all()


def test_tail_is_the_fitted_quantiles() -> None:
    # a bounded tail and one outlier: smoothing pulls the outlier in
    ratios = torch.cat([uniform(1000), torch.tensor([3.0])])
    got = psis(ratios)
    raw = got.log_weights + got.log_mean + math.log(1001)
    assert raw[-1].item() < 2.9
    assert raw[-1] == raw.max()


def test_shift_and_scale_free() -> None:
    ratios = 2 * normal(4000)
    a, b = psis(ratios), psis(ratios + 1e4)
    assert b.khat == pytest.approx(a.khat, abs=1e-8)
    assert b.log_mean == pytest.approx(a.log_mean + 1e4, abs=1e-8)


def test_mean_moves_to_the_truth() -> None:
    # target N(1, 1), guide N(0, 1), both normalised up to log Z = 3
    x = normal(20_000)
    got = psis(x - 0.5 + 3.0)
    weights = got.log_weights.exp()
    assert x.mean().item() == pytest.approx(0, abs=0.05)
    assert (weights * x).sum().item() == pytest.approx(1, abs=0.05)
    assert got.log_mean == pytest.approx(3, abs=0.05)
    assert got.ess == pytest.approx(20_000 / math.e, rel=0.1)  # E w^2 = e


@pytest.mark.parametrize("num", [2, 10, 1000])
@pytest.mark.parametrize("value", [0.0, -700.3])
def test_constant_ratios(num: int, value: float) -> None:
    got = psis(torch.full((num,), value))
    assert got.khat == 0
    assert got.ess == pytest.approx(num)
    assert got.log_mean == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(got.log_weights.exp(), torch.full((num,), 1 / num).double())


@pytest.mark.parametrize("num", [10, 1000])
def test_rounding_is_constant(num: int) -> None:
    got = psis(5 + 1e-8 * normal(num))
    assert got.khat == 0
    assert got.ess == pytest.approx(num)


def test_flat_top_is_bounded() -> None:
    got = psis(torch.cat([torch.zeros(300), torch.full((700,), -math.inf)]))
    assert got.khat == 0
    assert got.ess == pytest.approx(300)


def test_short_tails_have_no_khat() -> None:
    assert psis(normal(20)).khat == math.inf
    assert psis(torch.zeros(1)).khat == math.inf
    one_heavy = psis(torch.cat([torch.zeros(1), torch.full((999,), -2000.0)]))
    assert one_heavy.khat == math.inf
    assert one_heavy.ess == pytest.approx(1)
    assert math.isfinite(psis(normal(21)).khat)


def test_minus_infinity_is_zero_weight() -> None:
    ratios = torch.cat([normal(900), torch.full((100,), -math.inf)])
    got = psis(ratios)
    assert (got.log_weights[900:] == -math.inf).all()
    assert got.log_weights[:900].isfinite().all()
    assert got.log_mean < psis(ratios[:900]).log_mean


def test_extreme_ratios_stay_finite() -> None:
    got = psis(80 * normal(20_000))
    assert math.isfinite(got.khat)
    assert got.khat > 2
    assert got.log_weights.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), "1 that are NaN"),
        (torch.tensor([math.inf, math.nan, 1.0]), "2 that are NaN"),
        (torch.full((5,), -math.inf), "only -inf"),
        (torch.zeros(2, 3), r"\(2, 3\)"),
        (torch.zeros(0), r"\(0,\)"),
    ],
)
def test_bad_input(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(PviError, match=message):
        psis(bad)


def test_input_is_not_changed_and_no_graph_is_kept() -> None:
    ratios = normal(100).requires_grad_()
    before = ratios.detach().clone()
    assert not psis(ratios).log_weights.requires_grad
    assert torch.equal(ratios.detach(), before)


def test_khat_threshold() -> None:
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(20_000) == 0.7
    assert khat_threshold(1) == -math.inf
