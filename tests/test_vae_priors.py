"""Priors: densities that integrate to one, draws that follow them, and dimensions in front."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pvi
from pvi.models.vae import (
    VAE,
    Autoregressive,
    Diagonal,
    FlowPosterior,
    FlowPrior,
    FullCovariance,
    Gaussian,
    Mixture,
    Prior,
    Standard,
    Vamp,
)
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
DIM, HALF = 5, 12.0
GRIDS = {1: (16_001, 1e-5), 2: (401, 5e-4)}  # points along an axis, error of the integral
PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard": Standard,
    "mixture": lambda d: Mixture(d, 3),
    "vamp": lambda d: Vamp(DIM, 4, mean=0.0, sd=2.0),
    "maf": lambda d: FlowPrior(d, options={"hidden_features": (8,)}),
    "nsf": lambda d: FlowPrior(d, "NSF", {"hidden_features": (8,), "transforms": 2}),
    "autoregressive": lambda d: Autoregressive(d, (8,)),
}


def made(name: str, latents: int = 2, **options: Any) -> VAE:
    torch.manual_seed(1)
    prior = PRIORS[name](latents)
    for p in prior.parameters():  # away from where they start
        p.data += 0.1 * torch.randn_like(p)
    return VAE(DIM, latents, likelihood=Gaussian(0.7), prior=prior, hidden=(8,), **options)


def grid(latents: int) -> tuple[Tensor, float]:
    """Centres of the cells of a square, and the size of a cell."""
    axis = torch.linspace(-HALF, HALF, GRIDS[latents][0])
    z = torch.cartesian_prod(*[axis] * latents).reshape(-1, latents)
    return z, float(axis[1] - axis[0]) ** latents


@torch.no_grad()
@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("name", PRIORS)
def test_density_and_draws(name: str, latents: int) -> None:
    """The density integrates to one, and its moments are those of draws, within 4.5 errors.

    The rectangle rule is exact to rounding for smooth densities. At the kinks of splines and of
    ReLU its error falls with the square of the spacing: for NSF in one dimension 3e-5 at 4,000
    points, 3e-6 at 16,000, 3e-8 at 64,000; in two 1.4e-4 at 401 x 401, 1.5e-5 at 601 x 601.
    """
    model = made(name, latents)
    fn = model.prior(model.inferred)
    assert fn.batch_shape == () and fn.event_shape == (latents,)
    z, cell = grid(latents)
    p = fn.log_prob(z).exp() * cell
    tolerance = GRIDS[latents][1]
    assert abs(float(p.sum()) - 1) < tolerance
    draws = fn.expand([10_000]).sample()
    for f in (lambda z: z, torch.square, torch.tanh, lambda z: z.prod(-1, keepdim=True).tanh()):
        found = f(draws)
        se = found.std(0) / math.sqrt(len(draws))
        assert ((found.mean(0) - p @ f(z)).abs() < 4.5 * se + tolerance).all()


@torch.no_grad()
@pytest.mark.parametrize("name", PRIORS)
def test_dimensions_in_front(name: str) -> None:
    model = made(name)
    fn, z = model.prior(model.inferred), randn(3, 4, 2, seed=2).double()
    each = torch.stack([torch.stack([fn.log_prob(z[i, j]) for j in range(4)]) for i in range(3)])
    assert torch.allclose(fn.log_prob(z), each, atol=EXACT)
    assert torch.allclose(fn.expand([3, 4]).log_prob(z), each, atol=EXACT)
    for draws in (fn.expand([3, 4]).sample(), fn.sample((3, 4)), fn.expand([4]).sample((3,))):
        assert draws.shape == z.shape
        assert len(draws.reshape(12, 2).unique(dim=0)) == 12  # one for each, not one for all


@torch.no_grad()
def test_mixture_by_hand() -> None:
    prior, z = Mixture(2, 2), [0.4, -1.1]
    prior.logits.data = torch.tensor([0.3, -0.5])
    prior.loc.data = torch.tensor([[0.5, -1.0], [2.0, 0.1]])
    prior.raw_scale.data = torch.tensor([[0.2, -0.7], [1.5, -2.0]])
    share, total = math.exp(0.3) / (math.exp(0.3) + math.exp(-0.5)), 0.0
    for weight, loc, raw in zip((share, 1 - share), prior.loc, prior.raw_scale, strict=True):
        for x, m, r in zip(z, loc.tolist(), raw.tolist(), strict=True):
            s = math.log1p(math.exp(r)) + 1e-4
            weight *= math.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        total += weight
    found = prior(lambda x: x).log_prob(torch.tensor(z))
    assert float(found) == pytest.approx(math.log(total), abs=EXACT)
    start = Mixture(2, 2)
    assert torch.allclose(start(lambda x: x).component_distribution.stddev, torch.tensor(1.0001))


@torch.no_grad()
def test_autoregressive_factors() -> None:
    """Each number is normal given those before it: the log density is a parabola in it."""
    fn = made("autoregressive", 3).prior(lambda x: x)
    z = randn(3, seed=4).double().expand(5, 3).clone()
    z[:, 2] = torch.arange(5) * 0.5 - 1.0
    assert float(fn.log_prob(z).diff(n=3).abs().max()) < 1e-9
    assert float(fn.log_prob(z).diff(n=2).max()) < -1e-3


@torch.no_grad()
@pytest.mark.parametrize("posterior", [Diagonal, FullCovariance, FlowPosterior])
def test_vamp_is_the_mean_of_posteriors(posterior: Any) -> None:
    model = made("vamp", posterior=posterior(2))
    assert isinstance(model.prior, Vamp)
    z, inputs = randn(7, 2, seed=3).double(), model.prior.inputs
    parts = torch.stack([model.encoded(u).log_prob(z) for u in inputs])
    want = parts.logsumexp(0) - math.log(len(inputs))
    assert torch.allclose(model.prior(model.inferred).log_prob(z), want, atol=1e-8)


def test_vamp_learns_encoder_and_inputs() -> None:
    """Through the prior too: the encoder's gradient is not that of the guide alone."""
    model, x = made("vamp"), randn(6, DIM).double()
    assert isinstance(model.prior, Vamp)
    z = model.encoded(x).rsample().detach()
    model.prior(model.inferred).log_prob(z).sum().backward()
    for p in (model.prior.inputs, *model.encoder.parameters()):
        assert p.grad is not None and float(p.grad.abs().max()) > 0


def mean_gradient(model: VAE, objective: pvi.Objective, x: Tensor, calls: int = 25) -> Tensor:
    """Of the encoder's last bias: mean and standard error `(2, n)`."""
    last = list(model.encoder.parameters())[-1]
    found = []
    for _ in range(calls):
        model.zero_grad()
        objective.differentiable_loss(model.model, model.guide, x).backward()
        assert last.grad is not None
        found.append(last.grad.clone())
    stacked = torch.stack(found)
    return torch.stack([stacked.mean(0), stacked.std(0) / math.sqrt(calls)])


def test_vamp_path_gradient() -> None:
    """The encoder is in guide and model: only the guide's density is held fixed by "path"."""
    model, x = made("vamp"), randn(4, DIM).double().repeat(50, 1)
    torch.manual_seed(5)
    for make in (pvi.ELBO, pvi.IWAE):
        a = mean_gradient(model, make(4, gradient="reparam"), x)
        b = mean_gradient(model, make(4, gradient="path"), x)
        assert ((a[0] - b[0]).abs() < 4 * (a[1] ** 2 + b[1] ** 2).sqrt()).all(), (a, b)


@torch.no_grad()
@pytest.mark.parametrize("name", PRIORS)
def test_vectorised_particles(name: str) -> None:
    """All at once or one after the other: one bound, within its error."""
    model, x = made(name), randn(4, DIM).double()
    found = []
    for batched in (True, False):
        torch.manual_seed(6)
        objective = pvi.ELBO(40, vectorize_particles=batched)
        values = torch.tensor([objective.bound(model.model, model.guide, x) for _ in range(10)])
        found.append((values.mean(), values.std() / math.sqrt(10)))
    (a, sa), (b, sb) = found
    assert abs(a - b) < 4 * torch.hypot(sa, sb)
