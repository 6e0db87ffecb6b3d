"""Independent normals: the simplest family, and the one with exact KL almost everywhere."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.guide import Guide
from pvi.guides.prototype import InitLoc, Latent, prior_median


class MeanField(Guide):
    """Fully factorised normal guide.

    At a site with real support, $q(z) = N(z; m, \\mathrm{diag}(s^2))$ at the model's own site
    name, so that its KL against a normal prior is exact. Elsewhere the normal is pushed through
    the bijection $t$ from unconstrained space onto the support: $q(z) = N(t^{-1}(z); m,
    s^2)\\,|dt^{-1}/dz|$ (Kucukelbir et al. 2017, ADVI).

    Args:
        model: a Pyro program with continuous latents.
        init_loc_fn: starting values; by default the prior's median, 0 in unconstrained space for
            flat priors.
        init_scale: starting standard deviation in unconstrained space, > 0.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
    >>> guide = MeanField(model).setup(torch.zeros(5))
    >>> sorted(name for name, _ in guide.named_parameters())
    ['loc.mu_unconstrained', 'scale.mu_unconstrained']
    """

    def __init__(
        self, model: Program, init_loc_fn: InitLoc = prior_median, init_scale: float = 0.1
    ):
        super().__init__(model, init_loc_fn)
        if not init_scale > 0:
            raise GuideError(f"init_scale must be > 0, got {init_scale!r}")
        self.init_scale = init_scale
        self.loc = PyroModule()
        self.scale = PyroModule()

    def _create(self, latent: Latent) -> None:
        scale = torch.full_like(latent.loc, self.init_scale)
        key = _key(latent.name)
        setattr(self.loc, key, PyroParam(latent.loc, constraints.real, latent.event_dim))
        setattr(self.scale, key, PyroParam(scale, constraints.positive, latent.event_dim))

    def _distribution(self, latent: Latent) -> Any:
        key = _key(latent.name)
        normal = dist.Normal(getattr(self.loc, key), getattr(self.scale, key))
        normal = normal.to_event(latent.event_dim)
        if latent.is_real:
            return normal
        return dist.TransformedDistribution(normal, [latent.transform])


def _key(name: str) -> str:
    """A site's name as an attribute: modules forbid dots."""
    return name.replace(".", "/")
