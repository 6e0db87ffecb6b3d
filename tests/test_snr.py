"""More particles drown the encoder's gradient in noise with "reparam", but not with "path".

Rainforth et al. (2018): the signal-to-noise ratio |mean| / sd of IWAE's gradient falls as K^-1/2
for the encoder. Tucker et al. (2019): without the score part it does not. `benchmarks/gradients.py`
has more of it.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from tests.scenarios import mean_se, param

X = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
GROUPS, COPIES = 20, 2_000
OFFSET = 0.03  # from the posterior N(x / 2, sqrt(1/2))

pytestmark = pytest.mark.usefixtures("isolated")


def plates() -> tuple[pyro.plate, pyro.plate]:
    return pyro.plate("copies", COPIES, dim=-2), pyro.plate("rows", len(X), dim=-1)


def model() -> None:
    outer, inner = plates()
    with outer, inner:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def encoder() -> None:
    """Every copy has its own parameters, so that one gradient holds independent replicates."""
    start = torch.tensor([0.5, 0.0, 0.5 * math.log(0.5)]) + OFFSET
    slope, shift, log_scale = param("raw", start.expand(COPIES, 3)).unsqueeze(-1).unbind(1)
    outer, inner = plates()
    with outer, inner:
        pyro.sample("z", dist.Normal(slope * X + shift, log_scale.exp()))


def gradients(gradient: str, num_particles: int) -> Tensor:
    """Replicates of the encoder's gradient, `(GROUPS, copies of a group, 3)`."""
    loss = pvi.IWAE(num_particles, gradient=gradient).differentiable_loss(model, encoder)
    (found,) = torch.autograd.grad(loss, pyro.param("raw").unconstrained())
    return found.reshape(GROUPS, -1, 3)


def log_snr(gradient: str, num_particles: int) -> tuple[float, float]:
    """Log of the SNR, averaged over parameters, and its standard error.

    The mean is that of "path" for both: they agree (`test_gradients.py`), and where the SNR is
    small the own mean would be mostly error.
    """
    mean = gradients("path", num_particles).mean(1).abs()
    ratios = mean / gradients(gradient, num_particles).std(1)
    value, se = mean_se(ratios.mean(1).log())
    return float(value), float(se)


@pytest.mark.parametrize("few", [1, 4])
@pytest.mark.parametrize(("gradient", "exponent"), [("path", 0.5), ("reparam", -0.5)])
def test_signal_to_noise(gradient: str, exponent: float, few: int) -> None:
    many = 128
    (low, low_se), (high, high_se) = log_snr(gradient, few), log_snr(gradient, many)
    rise, error = high - low, math.hypot(low_se, high_se)
    assert rise > -3 * error if gradient == "path" else rise < -3 * error
    # The theory is about large K, so its exponents are met to a tenth only; the fall of the one is
    # far outside the other's tolerance, so either assertion fails for the wrong gradient.
    assert rise / math.log(many / few) == pytest.approx(exponent, abs=0.1)
