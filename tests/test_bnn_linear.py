"""The closed forms of linear regression, against scipy, scikit-learn and quadrature."""

import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import BayesianRidge

from pvi.errors import DataError
from pvi.models.bnn.linear import best_linear_posterior, linear_posterior
from tests.scenarios import randn

PHI = randn(40, 3, seed=1).double() @ torch.tensor(
    [[1.0, 0.8, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64
)
Y = PHI @ torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64) + 0.4 * randn(40, seed=2).double()


def test_evidence_is_the_density_of_the_data() -> None:
    found = linear_posterior(PHI, Y, noise=0.4, prior_scale=1.5)
    cov = 1.5**2 * PHI @ PHI.T + 0.4**2 * torch.eye(40, dtype=torch.float64)
    exact = multivariate_normal(cov=cov.numpy()).logpdf(Y.numpy())
    assert found.log_evidence == pytest.approx(exact, abs=1e-8)


def test_mean_field_bound_is_the_bound_at_its_optimum() -> None:
    """E_q[log p(y, w)] + H[q] by formula; a step away in any scale or mean is worse."""
    found = linear_posterior(PHI, Y, noise=0.4, prior_scale=1.5)

    def bound(mean: torch.Tensor, sd: torch.Tensor) -> float:
        q = torch.distributions.Normal(mean, sd)
        expected = torch.distributions.Normal(PHI @ mean, 0.4).log_prob(Y).sum()
        expected = expected - (PHI.square() @ sd.square()).sum() / (2 * 0.4**2)
        prior = torch.distributions.Normal(torch.zeros_like(mean), 1.5)
        return float(expected - torch.distributions.kl_divergence(q, prior).sum())

    sd = found.precision.diagonal().rsqrt()
    assert bound(found.mean, sd) == pytest.approx(found.mean_field_bound, abs=1e-8)
    for i in range(3):
        step = torch.eye(3, dtype=torch.float64)[i]
        for sign in (-1, 1):
            assert bound(found.mean + sign * 0.01 * step, sd) < found.mean_field_bound
            assert bound(found.mean, sd * (1 + sign * 0.1 * step)) < found.mean_field_bound
    assert found.mean_field_bound < found.log_evidence


def test_best_scales_are_those_of_sklearn() -> None:
    """`BayesianRidge` with flat hyperpriors maximises the same evidence."""
    flat = {"alpha_1": 0.0, "alpha_2": 0.0, "lambda_1": 0.0, "lambda_2": 0.0}
    ridge = BayesianRidge(fit_intercept=False, tol=1e-10, max_iter=3000, **flat)
    ridge.fit(PHI.numpy(), Y.numpy())
    found = best_linear_posterior(PHI, Y)
    assert found.noise == pytest.approx(ridge.alpha_**-0.5, rel=1e-4)
    assert found.prior_scale == pytest.approx(ridge.lambda_**-0.5, rel=1e-4)
    mean, sd = ridge.predict(PHI.numpy(), return_std=True)
    own, variance = found.predict(PHI)
    torch.testing.assert_close(own, torch.as_tensor(mean), rtol=1e-4, atol=1e-4)
    total = (variance + found.noise**2).sqrt()
    torch.testing.assert_close(total, torch.as_tensor(sd), rtol=1e-4, atol=1e-4)


def test_best_scales_are_a_maximum() -> None:
    best = best_linear_posterior(PHI, Y)
    for noise, scale in ((1.05, 1.0), (0.95, 1.0), (1.0, 1.1), (1.0, 0.9)):
        near = linear_posterior(PHI, Y, best.noise * noise, best.prior_scale * scale)
        assert near.log_evidence < best.log_evidence


@pytest.mark.parametrize("phi", [torch.ones(1, 2), torch.ones(5, 8), torch.zeros(4, 2)])
def test_degenerate_data_give_finite_numbers(phi: torch.Tensor) -> None:
    found = best_linear_posterior(phi, torch.linspace(0.0, 1.0, len(phi)))
    mean, variance = found.predict(phi)
    assert bool(mean.isfinite().all()) and bool((variance >= 0).all()) and found.noise > 0


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match="features"):
        linear_posterior(torch.ones(3, 2), torch.ones(4), 1.0, 1.0)
