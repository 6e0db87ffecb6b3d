"""The normal guides as one distribution: noise, entropy and draws are those of the sites."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvi
from pvi.fit.fixed_draws import FAMILIES
from pvi.guides import Flow, MatrixNormal, MeanField

NUM = 20_000


def correlated(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3):
        shift = pyro.sample("shift", dist.Normal(0.0, scale))
    with pyro.plate("rows", len(y)):
        mean = (x @ w.unsqueeze(-1)).squeeze(-1) + shift[..., torch.arange(len(y)) % 3]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def data() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[0.1 * i, (i % 4) - 1.5] for i in range(12)])
    return x, x @ torch.tensor([1.0, -0.5]) + 0.3 * torch.sin(torch.arange(12.0))


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_distribution(kind: Any) -> None:
    """Moments of transported noise are those of the sites' draws; entropy is -E[log q]."""
    fit = pvi.fit(correlated, kind, data=data(), seed=0, progress=False)
    assert "num_draws" in fit.history
    guide = fit.guide
    torch.manual_seed(0)
    with torch.no_grad():
        moved = guide.transport(torch.randn(NUM, guide.noise_size))
        draws = fit.posterior.sample(NUM, seed=1)
        parts = {n: latent.unconstrained(draws[n]) for n, latent in guide.latents.items()}
        own = torch.cat([u.reshape(NUM, -1) for u in parts.values()], 1)
        jacobian = sum(  # from the space of the sites to unconstrained space
            latent.transform.log_abs_det_jacobian(parts[n], draws[n]).reshape(NUM, -1).sum(1)
            for n, latent in guide.latents.items()
        )
        log_q = guide.log_prob(draws, *data()) + jacobian
        entropy = float(guide.entropy())
    error = (moved.std(0).square() + own.std(0).square()).div(NUM).sqrt()
    assert bool(((moved.mean(0) - own.mean(0)).abs() < 5 * error).all())
    a, b = torch.cov(moved.mT), torch.cov(own.mT)
    spread = (a.diagonal().unsqueeze(0) * a.diagonal().unsqueeze(1) + a.square()).sqrt()
    assert bool(((a - b).abs() < 5 * spread * (2 / NUM) ** 0.5).all())
    assert abs(entropy + float(log_q.mean())) < 5 * float(log_q.std()) / NUM**0.5


class Shifted(MeanField):
    """Somebody's own: normal, but not the one that its base class tells of."""

    def _distribution(self, latent: Any, past: Any) -> Any:
        loc, scale = self._loc_scale(latent)
        return dist.Normal(loc + 1.0, scale).to_event(latent.event_dim)


def two(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b.sum((-1, -2)), 1.0), obs=y)


@pytest.mark.parametrize("kind", [Flow, MatrixNormal, Shifted])
def test_others_are_trained_by_adam(kind: Any) -> None:
    """They share a base class with the normal families, but not the distribution."""
    y = torch.tensor([1.0, 2.0, 3.0])
    fit = pvi.fit(two, kind, data=y, seed=0, progress=False, callbacks=[_Stop(150)])
    assert "num_draws" not in fit.history
    with pytest.raises(pvi.errors.FitError, match="normal families"):
        fit.linear_response()


class _Stop:
    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, step: Any) -> str | None:
        return "enough" if step.step >= self.steps else None


Y = torch.tensor([0.3, 1.9, 1.1, -0.4, 2.2])


def penalised(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    pvi.penalty("pull", 50.0 * (mu - 5.0).square())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def masked(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=y > 0.0):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_penalties_are_part_of_the_loss() -> None:
    """The optimum of the bound minus the penalty: precisions add."""
    fit = pvi.fit(penalised, data=Y, seed=0, progress=False)
    precision = 1 / 9 + len(Y) + 100.0
    mean = (float(Y.sum()) + 500.0) / precision
    assert "num_draws" not in fit.history
    assert abs(float(fit.guide.mean()["mu"]) - mean) < 0.3 * precision**-0.5


def test_latents_that_a_mask_leaves_out() -> None:
    """The bound says nothing of them, so that it must not gain by their entropy."""
    fit = pvi.fit(masked, data=Y, seed=0, progress=False)
    kept = Y[Y > 0]
    precision = 1 / 9 + len(kept) / 2
    mean = float(kept.sum()) / 2 / precision
    assert "num_draws" not in fit.history
    assert abs(float(fit.guide.mean()["mu"]) - mean) < 0.3 * precision**-0.5
    assert fit.history["bound"][-1] < 0.0
