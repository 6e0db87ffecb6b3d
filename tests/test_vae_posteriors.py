"""Posteriors: draws and densities of one distribution, divergences, and the data's part in them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import pvi
from pvi.models.vae import (
    VAE,
    AmortizedPosterior,
    Diagonal,
    FlowPosterior,
    FullCovariance,
    Gaussian,
)
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
DIM, HALF, CELLS = 5, 8.0, 101
SMALL = {"hidden_features": (8,), "transforms": 2}
POSTERIORS: dict[str, Callable[[int], AmortizedPosterior]] = {
    "diagonal": Diagonal,
    "full": FullCovariance,
    "iaf": lambda d: FlowPosterior(d, 4, options=SMALL),
    "nsf": lambda d: FlowPosterior(d, 4, "NSF", SMALL),
}


def made(name: str, latents: int = 2) -> VAE:
    torch.manual_seed(1)
    model = VAE(
        DIM,
        latents,
        likelihood=Gaussian(0.7),
        posterior=POSTERIORS[name](latents),
        hidden=(8,),
    )
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", POSTERIORS)
def test_density_and_draws(name: str) -> None:
    """The density integrates to one, and its moments are those of draws, within 4.5 errors."""
    model = made(name)
    fn = model.encoded(randn(DIM, seed=2).double())
    assert fn.batch_shape == () and fn.event_shape == (2,)
    axis = torch.linspace(-HALF, HALF, CELLS)
    z = torch.cartesian_prod(axis, axis)
    p = fn.log_prob(z).exp() * (axis[1] - axis[0]) ** 2
    assert abs(float(p.sum()) - 1) < 5e-3
    draws = fn.sample((10_000,))
    for f in (lambda z: z, torch.square, torch.tanh, lambda z: z.prod(-1, keepdim=True).tanh()):
        found = f(draws)
        se = found.std(0) / math.sqrt(len(draws))
        assert ((found.mean(0) - p @ f(z)).abs() < 4.5 * se + 5e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_know_their_density(name: str) -> None:
    """That of a draw, which flows keep, is that of the same value from elsewhere; rows apart."""
    model, x = made(name), randn(4, DIM, seed=2).double()
    fn = model.encoded(x).expand([3, 4])
    z = fn.rsample()
    assert z.shape == (3, 4, 2)
    for draws in (z, fn.rsample(), model.encoded(x).sample((3,))):
        assert len(draws.reshape(12, 2).unique(dim=0)) == 12  # one for each, not one for all
    assert torch.allclose(fn.log_prob(z), fn.log_prob(z.clone()), atol=1e-8)
    rows = torch.stack([model.encoded(x[i]).log_prob(z[:, i]) for i in range(4)], 1)
    assert torch.allclose(rows, fn.log_prob(z.clone()), atol=1e-8)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_number_of_the_encoder_counts(name: str) -> None:
    """Draws depend on the mean, the scale and the context of the flow, and so on the datum."""
    posterior = made(name).posterior
    h = randn(1, posterior.width, seed=3).double().requires_grad_()
    posterior(h).rsample((20,)).square().sum().backward()
    assert h.grad is not None and float(h.grad.abs().min()) > 0


@torch.no_grad()
def test_full_covariance_by_hand() -> None:
    posterior, h = FullCovariance(2), torch.tensor([0.5, -1.0, 0.3, 0.8, -0.6])
    a, b = (float(torch.nn.functional.softplus(h[i])) + 1e-4 for i in (2, 4))
    tril = torch.tensor([[a, 0.0], [0.8, b]])
    want = MultivariateNormal(h[:2], scale_tril=tril)
    z = randn(6, 2).double()
    assert torch.allclose(posterior(h).log_prob(z), want.log_prob(z), atol=EXACT)
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    model = VAE(DIM, 2)
    kl = kl_divergence(posterior(h), model.prior(model.inferred))
    assert torch.allclose(kl, kl_divergence(want, prior), atol=EXACT)


def mean_bound(objective: pvi.Objective, model: VAE, x: Tensor, calls: int = 10) -> Tensor:
    torch.manual_seed(3)
    found = torch.tensor([objective.bound(model.model, model.guide, x) for _ in range(calls)])
    return torch.stack([found.mean(), found.std() / math.sqrt(calls)])


@torch.no_grad()
@pytest.mark.parametrize("name", POSTERIORS)
def test_exact_and_sampled_divergence(name: str) -> None:
    model, x = made(name), randn(4, DIM, seed=2).double()
    a, b = (mean_bound(make(50), model, x) for make in (pvi.TraceMeanFieldELBO, pvi.ELBO))
    assert (a[0] - b[0]).abs() < 4 * (a[1] ** 2 + b[1] ** 2).sqrt()
    exact = "exact" in str(pvi.TraceMeanFieldELBO().explain(model.model, model.guide, x))
    assert exact == (name in ("diagonal", "full"))


@torch.no_grad()
@pytest.mark.parametrize("name", POSTERIORS)
def test_bounds_and_evidence(name: str) -> None:
    """ELBO <= IWAE <= evidence, of a model whose evidence a grid of latents tells."""
    model, x = made(name), randn(4, DIM, seed=2).double()
    axis = torch.linspace(-6, 6, 97)
    z = torch.cartesian_prod(axis, axis)
    joint = model.decoded(z[:, None]).expand([len(z), 4]).log_prob(x)
    joint = joint + model.prior(model.inferred).log_prob(z)[:, None]
    truth = joint.logsumexp(0) + 2 * math.log(float(axis[1] - axis[0]))
    found = model.score_samples(x, num_samples=1500, seed=0)
    assert ((found.log_evidence - truth).abs() < 4 * found.se + 1e-4).all()
    bounds = [mean_bound(o, model, x) for o in (pvi.ELBO(30), pvi.IWAE(5), pvi.IWAE(50))]
    for low, high in zip(bounds, [*bounds[1:], torch.tensor([truth.sum(), 0.0])], strict=True):
        assert low[0] < high[0] + 3 * (low[1] ** 2 + high[1] ** 2).sqrt()
    assert bounds[0][0] < bounds[2][0]


@pytest.mark.parametrize("name", ["iaf", "nsf"])
def test_means_of_flows_repeat_themselves(name: str) -> None:
    """They are of draws, but always of the same ones, and near the mean."""
    model, x = made(name), randn(3, DIM, seed=2).double()
    first = model.encode(x)
    state = torch.get_rng_state()
    assert torch.equal(model.encode(x), first) and torch.equal(torch.get_rng_state(), state)
    draws = model.encoded(x).sample((4000,))
    assert ((first - draws.mean(0)).abs() < 4.5 * draws.std(0) / 8).all()
