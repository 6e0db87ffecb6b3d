"""A bound and a gradient of your own, trained like the built-in ones.

The bound is CIWAE (Rainforth et al. 2018), halfway between the ELBO and IWAE. The gradient is that
of IWAE for the model and of the inclusive KL for the guide.
"""

import math

import pyro
import pyro.distributions as dist
import torch

import pvi


def combination(log_w):
    """From log weights (K, *plates) to (*plates): half the ELBO, half IWAE; a bound as they are."""
    iwae = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    return 0.5 * log_w.mean(0) + 0.5 * iwae


def inclusive(draws):
    """Weighted maximum likelihood of the guide; `draws` is a `pvi.WeightedDraws`."""
    weights = torch.softmax(draws.log_w.detach(), 0)
    model = -draws.outer - draws.size * (weights * draws.log_p).sum()
    guide = -draws.size * (weights * draws.log_q).sum()
    return {"model": model, "guide": guide}  # recorded by name, added up


inclusive.detach_draws = True  # the gradient goes through the densities, not through the draws


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, scale))


x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2**0.5
log_z = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())
print(f"log evidence {log_z:.2f} nats")
for name, objective in {
    "IWAE": pvi.IWAE(8),
    "combination": pvi.Objective(8, mean=combination, gradient="path"),
    "inclusive": pvi.IWAE(8, gradient=inclusive),
}.items():
    before = objective.bound(model, guide, x)
    fit = pvi.fit(model, guide, x, objective=objective, steps=400, lr=0.02, seed=0)
    bound = fit.history["bound"][-100:].mean()
    slope = fit.posterior.sample(2000, seed=0)["z"].mean(0).dot(x) / x.dot(x)
    print(f"{name}: {before:.2f} before, {bound:.2f} after; slope {slope:.3f} (exact 0.5)")
