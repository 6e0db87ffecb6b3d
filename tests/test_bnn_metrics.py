"""Metrics of predictions against closed forms and scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from pvi.errors import DataError
from pvi.models.bnn import metrics

N, C = 400, 4


@pytest.fixture
def draws() -> torch.Tensor:
    """Probabilities `(S, N, C)`."""
    torch.manual_seed(0)
    return torch.randn(7, N, C, dtype=torch.float64).mul(2).softmax(-1)


@pytest.fixture
def y() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(C, (N,))


def test_mixture_of_normals_in_original_units() -> None:
    """The density of y = c t is that of t divided by c, for each of the mixture's parts."""
    torch.manual_seed(0)
    mean, c = torch.randn(5, N, dtype=torch.float64), 3.7
    y = torch.randn(N, dtype=torch.float64) * c
    parts = torch.distributions.Normal(mean * c, 0.8 * c)
    direct = parts.log_prob(y).exp().mean(0).log()
    standardised = torch.distributions.Normal(mean, 0.8).log_prob(y / c)
    torch.testing.assert_close(metrics.mixture_log_likelihood(standardised, scale=c), direct)


def test_mixture_is_above_the_mean_of_log_densities(draws: torch.Tensor, y: torch.Tensor) -> None:
    log_lik = draws.log()[:, torch.arange(N), y]
    mixed = metrics.mixture_log_likelihood(log_lik)
    assert bool((mixed >= log_lik.mean(0)).all())  # Jensen
    assert float(-mixed.mean()) == pytest.approx(log_loss(y, draws.mean(0)), rel=1e-9)


def test_mixture_of_far_away_parts_does_not_underflow() -> None:
    found = metrics.mixture_log_likelihood([[-2000.0], [-3000.0]])
    assert float(found) == pytest.approx(-2000.0 - math.log(2))


def test_brier_of_two_classes_is_twice_the_binary_score(y: torch.Tensor) -> None:
    from sklearn.metrics import brier_score_loss

    p = torch.linspace(0.01, 0.99, N, dtype=torch.float64)
    binary = (y > 1).long()
    found = metrics.brier(torch.stack([1 - p, p], -1), binary)
    assert found == pytest.approx(2 * brier_score_loss(binary, p), rel=1e-9)


def test_ece_against_the_calibration_curve_of_sklearn(draws: torch.Tensor, y: torch.Tensor) -> None:
    p = draws.mean(0)
    confidence, guess = (x.numpy() for x in p.max(-1))
    right = guess == y.numpy()
    frequency, mean = calibration_curve(right, confidence, n_bins=15)
    counts = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = (counts[counts > 0] * np.abs(frequency - mean)).sum() / N
    assert metrics.ece(p, y, 15) == pytest.approx(expected, rel=1e-9)


def test_ece_tells_overconfidence() -> None:
    """Labels drawn from the probabilities are calibrated; those of sharpened ones are not."""
    torch.manual_seed(0)
    logits = torch.randn(20_000, C)
    y = torch.distributions.Categorical(logits=logits).sample()
    assert metrics.ece(logits.softmax(-1), y) < 0.015
    assert metrics.ece((3 * logits).softmax(-1), y) > 0.15


def test_confidence_of_exactly_one_is_counted() -> None:
    assert metrics.ece([[1.0, 0.0], [0.0, 1.0]], [0, 0]) == pytest.approx(0.5)


def test_auroc_against_sklearn_with_ties() -> None:
    torch.manual_seed(0)
    inside, outside = torch.randn(300).mul(3).round(), torch.randn(200).add(0.5).mul(3).round()
    labels = torch.cat([torch.zeros(300), torch.ones(200)])
    expected = roc_auc_score(labels, torch.cat([inside, outside]))
    assert metrics.auroc(inside, outside) == pytest.approx(expected, rel=1e-9)


def test_split_of_entropies(draws: torch.Tensor) -> None:
    """Mutual information as the mean KL of each draw's prediction to the mixture."""
    split = metrics.class_uncertainty(draws)
    mixture = draws.mean(0)
    kl = (draws * (draws.log() - mixture.log())).sum(-1).mean(0)
    torch.testing.assert_close(split.epistemic, kl)
    torch.testing.assert_close(split.total, split.aleatoric + split.epistemic)


def test_equal_draws_have_no_epistemic_part(draws: torch.Tensor) -> None:
    split = metrics.class_uncertainty(draws[:1].expand(5, -1, -1))
    torch.testing.assert_close(split.epistemic, torch.zeros(N, dtype=torch.float64))


def test_split_of_variances_is_that_of_simulated_numbers() -> None:
    """The variance of y drawn from the mixture, within 5 standard errors."""
    torch.manual_seed(0)
    mean, sd = torch.tensor([[0.0], [2.0], [3.0]]), torch.tensor([[1.0], [0.5], [2.0]])
    split = metrics.variance_uncertainty(mean, sd.square())
    part = torch.randint(3, (200_000,))
    y = torch.normal(mean[part, 0], sd[part, 0])
    centred = (y - y.mean()).square()
    se = float(centred.std() / len(y) ** 0.5)
    assert float(split.total) == pytest.approx(float(centred.mean()), abs=5 * se)
    assert float(split.aleatoric) == pytest.approx((1 + 0.25 + 4) / 3)


def test_reliability_picture(draws: torch.Tensor, y: torch.Tensor) -> None:
    figure = metrics.plot_reliability(draws.mean(0), y)
    (axes,) = figure.axes
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert 5 <= len(points.get_xdata()) <= 10
    assert "ECE" in axes.get_title()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.brier([[0.2, 0.2]], [0]), "sum to 1"),
        (lambda: metrics.brier([[2.0, -1.0]], [0]), "softmax"),
        (lambda: metrics.brier([[0.5, 0.5]], [2]), "classes from 0 to 1"),
        (lambda: metrics.ece([[0.5, 0.5]], [0.0]), "whole numbers"),
        (lambda: metrics.ece([[0.5, 0.5]], [0, 1]), "one for each row"),
        (lambda: metrics.auroc([float("nan")], [1.0]), "NaN"),
        (lambda: metrics.class_uncertainty([[0.5, 0.5]]), "3 dimensions"),
        (lambda: metrics.mixture_log_likelihood([[0.0]], scale=0.0), "unit of y"),
        (lambda: metrics.variance_uncertainty([[0.0]], [[1.0, 1.0]]), "variance"),
    ],
)
def test_errors_say_what_is_wrong(call, words: str) -> None:
    with pytest.raises(DataError, match=words):
        call()
