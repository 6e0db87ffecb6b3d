"""Likelihoods: densities against scipy or by hand, shapes, and data that are refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import softplus

from pvi.errors import DataError, ModelError
from pvi.models.vae import (
    VAE,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from pvi.models.vae.likelihoods import FLOOR
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
SHAPES = [(3,), (1,), (2, 4, 3), (1, 1, 5)]
ALL: dict[str, tuple[Callable[[], Likelihood], str]] = {
    "bernoulli": (Bernoulli, "bits"),
    "continuous": (ContinuousBernoulli, "unit"),
    "fixed": (lambda: Gaussian(0.5), "real"),
    "learned": (Gaussian, "real"),
    "decoded": (lambda: Gaussian("decoded"), "real"),
    "optimal": (lambda: Gaussian("optimal"), "real"),
    "laplace": (lambda: Laplace(0.5), "real"),
    "levels": (lambda: DiscretizedLogistic(4), "bits"),
    "mixture": (lambda: DiscretizedLogistic(4, 3), "bits"),
    "categorical": (lambda: Categorical(4), "bits"),
    "poisson": (Poisson, "bits"),
    "negative_binomial": (NegativeBinomial, "bits"),
    "zero_inflated": (ZeroInflatedNegativeBinomial, "bits"),
}


def values(kind: str, *shape: int) -> Tensor:
    x = randn(*shape, seed=3).double()
    return {"bits": (x > 0).double(), "unit": x.sigmoid(), "real": x}[kind]


def single(likelihood: Likelihood, x: float | np.ndarray, *h: float) -> np.ndarray:
    """log p of single numbers, given the decoder's numbers."""
    value = torch.as_tensor(x).double().reshape(-1, 1)
    fn = likelihood(torch.tensor(h).expand(len(value), -1), (1,))
    return fn.log_prob(value).detach().numpy()


def rate(h: float) -> float:
    return float(softplus(torch.tensor(h))) + FLOOR


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_layouts(name: str, shape: tuple[int, ...]) -> None:
    """One density for each datum, from vectors, maps and channels, with particles in front."""
    make, kind = ALL[name]
    likelihood, x = make(), values(kind, 5, *shape)
    h = randn(2, 5, likelihood.width, *shape).double()
    fn = likelihood(h, shape, (2, 5))
    assert fn.batch_shape == (2, 5) and fn.event_shape == shape
    want = fn.log_prob(x)
    channels = h.reshape(2, 5, likelihood.width * shape[0], *shape[1:])
    for other in (h.flatten(2), channels):
        assert torch.equal(likelihood(other, shape).log_prob(x), want)
        assert torch.equal(likelihood(other, shape, (2, 5)).log_prob(x), want)
    assert torch.allclose(likelihood(h[1], shape, (5,)).log_prob(x), want[1], atol=EXACT)
    assert torch.allclose(fn.expand([3, 2, 5]).log_prob(x), want.expand(3, 2, 5), atol=EXACT)
    elements = likelihood.elements(h.movedim(2, 0)).log_prob(x)
    assert torch.allclose(elements.flatten(2).sum(-1), want, atol=EXACT)
    assert likelihood.mean(fn).shape == fn.sample().shape == (2, 5, *shape)
    likelihood.check(fn.sample())


def test_a_decoder_of_another_width() -> None:
    with pytest.raises(ModelError, match=r"shape \(7, 9\).*must end in 10 numbers"):
        Gaussian("decoded")(torch.zeros(7, 9), (5,))
    with pytest.raises(ModelError, match=r"after the batch dimensions \(4, 7\)"):
        Gaussian("decoded")(torch.zeros(7, 10), (5,), (4, 7))


def test_bernoulli() -> None:
    want = stats.bernoulli.logpmf([0, 1], 1 / (1 + math.exp(-0.7)))
    assert np.allclose(single(Bernoulli(), np.array([0, 1]), 0.7), want)


def test_normal_and_laplace() -> None:
    x = np.linspace(-3, 3, 5)
    assert np.allclose(single(Gaussian(0.7), x, 0.3), stats.norm.logpdf(x, 0.3, 0.7))
    assert np.allclose(single(Gaussian(), x, 0.3), stats.norm.logpdf(x, 0.3, 1.0))
    assert np.allclose(single(Laplace(0.7), x, 0.3), stats.laplace.logpdf(x, 0.3, 0.7))
    s = rate(-1.0)
    assert np.allclose(single(Gaussian("decoded"), x, 0.3, -1.0), stats.norm.logpdf(x, 0.3, s))


class TestContinuousBernoulli:
    LOGITS = (-60.0, -9.0, -0.031, -0.029, -1e-5, 0.0, 1e-4, 0.029, 0.031, 2.0, 40.0)

    @pytest.mark.parametrize("h", LOGITS)
    def test_density_integrates_to_one(self, h: float) -> None:
        """Also near a probability of 1/2, and where it rounds to 0 or 1."""
        nodes, weights = np.polynomial.legendre.leggauss(100)
        x = (nodes + 1) / 2
        p = np.exp(single(ContinuousBernoulli(), x, h))
        assert abs((p * weights).sum() / 2 - 1) < 1e-8
        mean = float(ContinuousBernoulli()(torch.tensor([[h]]), (1,)).mean)
        assert abs((p * x * weights).sum() / 2 - mean) < 1e-7

    @pytest.mark.parametrize("h", LOGITS)
    def test_single_precision(self, h: float) -> None:
        like = ContinuousBernoulli()(torch.tensor([[h]], dtype=torch.float32), (1,))
        want = single(ContinuousBernoulli(), 0.25, h)
        assert np.allclose(like.log_prob(torch.tensor([[0.25]])), want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("h", LOGITS)
    def test_draws_follow_it(self, h: float) -> None:
        """The distribution function at the draws is uniform: F(x) = (e^hx - 1) / (e^h - 1)."""
        x = ContinuousBernoulli()(torch.tensor([[h]]), (1,)).sample(torch.Size([4000])).flatten()
        a = -abs(h)  # seen from the side that does not overflow
        t = 1 - x if h > 0 else x
        u = torch.expm1(a * t) / math.expm1(a) if h else x
        assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


class TestDiscretizedLogistic:
    @pytest.mark.parametrize("h", [(0.0, 0.0), (0.3, -6.0), (-1.5, -2.0), (3.0, 2.0), (0.1, -50.0)])
    def test_levels_by_hand(self, h: tuple[float, float]) -> None:
        """Intervals of the logistic distribution; the ends have the tails."""
        k = np.arange(256)
        found = single(DiscretizedLogistic(), k, *h)
        assert abs(np.exp(found).sum() - 1) < 1e-10
        edges = np.concatenate([[-np.inf], (2 * k[1:] - 1) / 255 - 1, [np.inf]])
        want = np.diff(stats.logistic.cdf(edges, h[0], rate(h[1])))
        assert np.allclose(np.exp(found), want, atol=1e-12)
        assert np.isfinite(found).all()

    def test_mixture(self) -> None:
        k, logits = np.arange(8), np.array([0.5, -0.2])
        weights = np.exp(logits) / np.exp(logits).sum()
        parts = [np.exp(single(DiscretizedLogistic(8), k, m, s)) for m, s in [(0.2, -1), (-1, 0.4)]]
        found = single(DiscretizedLogistic(8, 2), k, *logits, 0.2, -1.0, -1.0, 0.4)
        assert np.allclose(np.exp(found), weights @ parts) and abs(np.exp(found).sum() - 1) < EXACT

    def test_draws_follow_it(self) -> None:
        likelihood = DiscretizedLogistic(6, 2)
        h = (0.0, 1.0, -0.8, 0.5, -1.0, -2.0)
        x = likelihood(torch.tensor([h]), (1,)).sample(torch.Size([20_000])).flatten()
        found = torch.bincount(x.long(), minlength=6).numpy()
        want = 20_000 * np.exp(single(likelihood, np.arange(6), *h))
        assert stats.chisquare(found, want * found.sum() / want.sum()).pvalue > 1e-3

    def test_needs_levels(self) -> None:
        with pytest.raises(ModelError, match="levels >= 2"):
            DiscretizedLogistic(1)


def test_categorical() -> None:
    h = torch.tensor([0.1, -1.0, 2.0])
    want = h.log_softmax(0).numpy()
    assert np.allclose(single(Categorical(3), np.arange(3), *h.tolist()), want)
    x = torch.tensor([[0.0, 2.0]])
    assert Categorical(3).features(x).tolist() == [[[1, 0, 0], [0, 0, 1]]]
    fn = Categorical(3)(torch.tensor([[0.0, 5.0, 1.0, 0.0, 2.0, 1.0]]), (2,))
    assert Categorical(3).mean(fn).tolist() == [[2, 0]]


class TestCounts:
    K = np.array([0, 1, 2, 7, 300])

    def test_poisson(self) -> None:
        assert np.allclose(single(Poisson(), self.K, 0.4), stats.poisson.logpmf(self.K, rate(0.4)))

    @staticmethod
    def reference(mean: float, r: float) -> Any:
        """scipy counts failures before r successes, whose probability is r / (r + mean)."""
        return stats.nbinom(r, r / (r + mean))

    def test_negative_binomial(self) -> None:
        mean, r = rate(1.3), rate(-0.5)
        want = self.reference(mean, r)
        assert np.isclose(want.var(), mean + mean**2 / r)
        assert np.allclose(single(NegativeBinomial(), self.K, 1.3, -0.5), want.logpmf(self.K))
        fn = NegativeBinomial()(torch.tensor([[1.3, -0.5]]), (1,))
        assert np.isclose(float(fn.mean), mean) and np.isclose(float(fn.variance), want.var())
        learned = NegativeBinomial(1)  # r starts at 1
        want = self.reference(mean, 1.0 + FLOOR).logpmf(self.K)
        assert np.allclose(single(learned, self.K, 1.3), want)

    @pytest.mark.parametrize("shape", [None, 1])
    def test_zero_inflated(self, shape: int | None) -> None:
        mean, gate = rate(1.3), 1 / (1 + math.exp(0.8))
        r = rate(-0.5) if shape is None else 1.0 + FLOOR
        want = (1 - gate) * self.reference(mean, r).pmf(self.K) + gate * (self.K == 0)
        h = (1.3, -0.8, -0.5)[: 3 if shape is None else 2]
        likelihood = ZeroInflatedNegativeBinomial(shape)
        assert np.allclose(single(likelihood, self.K, *h), np.log(want))
        assert np.isclose(
            float(likelihood(torch.tensor([h]), (1,)).mean.detach()), (1 - gate) * mean
        )


@pytest.mark.parametrize(("kind", "power"), [(Gaussian, 2), (Laplace, 1)])
def test_optimal_scale(kind: type[Gaussian], power: int) -> None:
    """The running scale ends at the most likely one, and only training moves it."""
    likelihood = kind("optimal")
    x, h = 3.0 * randn(50, 4, seed=1).double(), torch.zeros(50, 4)
    before = likelihood(h, (4,)).log_prob(x)
    for _ in range(400):
        likelihood.learn(likelihood(h, (4,)), x)
    best = float(x.abs().pow(power).mean()) ** (1 / power)
    assert abs(float(likelihood.running) - best) < 1e-6
    assert (likelihood(h, (4,)).log_prob(x).sum() > before.sum()).item()
    for scale in (0.9 * best, 1.1 * best):
        assert likelihood(h, (4,)).log_prob(x).sum() > kind(scale)(h, (4,)).log_prob(x).sum()
    likelihood.eval()
    likelihood.learn(likelihood(h, (4,)), 10.0 * x)
    assert abs(float(likelihood.running) - best) < 1e-6


@pytest.mark.parametrize("scale", [0.0, -1.0, "best", None])
def test_wrong_scales(scale: object) -> None:
    with pytest.raises(ModelError, match="scale must be > 0"):
        Gaussian(scale)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bernoulli", 0.5, r"0 or 1.*first X\[3, 1\] = 0.5.*ContinuousBernoulli"),
        ("bernoulli", math.nan, r"X\[3, 1\] = nan. Drop or impute"),
        ("continuous", 1.5, r"from 0 to 1.*X\[3, 1\] = 1.5.*X / 255"),
        ("continuous", math.nan, "Drop or impute"),
        ("fixed", math.inf, r"finite.*X\[3, 1\] = inf. Drop or impute"),
        ("laplace", math.nan, r"finite.*X\[3, 1\] = nan. Drop or impute"),
        ("levels", 4, r"0 to 3.*X\[3, 1\] = 4. Round"),
        ("mixture", 0.5, r"0 to 3.*X\[3, 1\] = 0.5. Round"),
        ("levels", math.nan, "Drop or impute"),
        ("categorical", 4, r"X\[3, 1\] = 4. Number the classes"),
        ("categorical", -1, r"X\[3, 1\] = -1"),
        ("poisson", 1.5, r"whole numbers from 0.*X\[3, 1\] = 1.5. Use Gaussian"),
        ("poisson", math.inf, "Drop or impute"),
        ("negative_binomial", -1, r"X\[3, 1\] = -1. Use Gaussian"),
        ("zero_inflated", math.nan, "Drop or impute"),
    ],
)
def test_data_outside_the_support(name: str, value: float, message: str) -> None:
    """Refused by all that reads data, naming the row and the column."""
    make, kind = ALL[name]
    x = values(kind, 6, 3)
    x[3, 1] = value
    model = VAE(3, 1, likelihood=make(), hidden=())
    for method in (model.fit, model.encode, model.score_samples, model.reconstruct):
        with pytest.raises(DataError, match=message):
            method(x)
