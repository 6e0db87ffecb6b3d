"""Independent normals: the simplest family, and the one with exact KL almost everywhere."""

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.reads import read
from pvi.engine.traces import Program
from pvi.guides.guide import Guide
from pvi.guides.init import InitLoc
from pvi.guides.layout import Layout
from pvi.guides.normals import PlainNormal, Pushed
from pvi.guides.prototype import Latent
from pvi.guides.summaries import is_elementwise


class LocScaleGuide(Guide):
    """A guide whose sites have their own means and scales in unconstrained space."""

    sitewise = True

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        self.loc = PyroModule()
        self.scale = PyroModule()

    def _build(self) -> None:
        self._empty("loc", "scale")
        for latent in self.latents.values():
            self._create_normal(latent)

    def _create_normal(self, latent: Latent) -> None:
        scale, dims = torch.full_like(latent.loc, self.init_scale), latent.event_dim
        setattr(self.loc, latent.key, PyroParam(latent.loc, constraints.real, dims))
        setattr(self.scale, latent.key, PyroParam(scale, constraints.positive, dims))

    def _loc_scale(self, latent: Latent) -> tuple[Tensor, Tensor]:
        modules = self._modules  # not by name: a PyroModule looks at what it is asked for
        loc, scale = modules["loc"], modules["scale"]
        return read(loc, latent.key), read(scale, latent.key)  # type: ignore[arg-type]


class NormalGuide(LocScaleGuide):
    """A normal in unconstrained space.

    As a joint distribution over the vector of all latents it is $u = m + \\mathrm{diag}(s) A
    \\epsilon$, which `transport`, `entropy` and `place` tell.
    """

    def _build(self) -> None:
        self._layout = Layout(self.latents.values())
        super()._build()

    @property
    def layout(self) -> Layout:
        """Where each site is in the vector of all latents."""
        self._require_setup()
        return self._layout

    @property
    def noise_size(self) -> int:
        """Standard normals that a draw is made of."""
        return self.layout.size

    def transport(self, noise: Tensor) -> Tensor:
        """Draws of the vector of all latents in unconstrained space, from standard normals.

        Args:
            noise: `(K, noise_size)`.

        Returns:
            `(K, D)`, with gradients to the parameters.
        """
        loc, scale = self._vectors()
        return loc + scale * self._mixed(noise)

    def entropy(self) -> Tensor:
        """Entropy in unconstrained space, nats."""
        _, scale = self._vectors()
        return scale.log().sum() + 0.5 * len(scale) * (1.0 + math.log(2.0 * math.pi))

    def place(self, mean: Tensor, precision: Tensor) -> None:
        """Move to about the best approximation of a normal over the vector of all latents.

        Args:
            mean: `(D)`.
            precision: `(D, D)`, positive definite.
        """
        self._place(mean, precision.diagonal().rsqrt())

    def _place(self, loc: Tensor, scale: Tensor) -> None:
        locs, scales = self.layout.split(loc), self.layout.split(scale)
        with torch.no_grad():
            for name, latent in self.latents.items():
                getattr(self.loc, f"{latent.key}_unconstrained").copy_(locs[name])
                getattr(self.scale, f"{latent.key}_unconstrained").copy_(scales[name].log())

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """Means and scales of all sites, `(D)` each."""
        pairs = [self._loc_scale(latent) for latent in self.layout.latents.values()]
        loc, scale = (torch.cat([x.reshape(-1) for x in part]) for part in zip(*pairs, strict=True))
        return loc, scale

    def _mixed(self, noise: Tensor) -> Tensor:
        """The noise of all latents in units of their scales, `(K, D)`."""
        return noise


class MeanField(NormalGuide):
    """Fully factorised normal guide.

    At a site with real support, $q(z) = N(z; m, \\mathrm{diag}(s^2))$ at the model's own site
    name, so that its KL against a normal prior is exact. Elsewhere the normal is pushed through
    the bijection $t$ from unconstrained space onto the support: $q(z) = N(t^{-1}(z); m,
    s^2)\\,|dt^{-1}/dz|$ (Kucukelbir et al. 2017, ADVI).

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
    >>> guide = MeanField(model).setup(torch.zeros(5))
    >>> sorted(name for name, _ in guide.named_parameters())
    ['loc.mu_unconstrained', 'scale.mu_unconstrained']
    """

    def _distribution(self, latent: Latent, past: Any) -> Any:
        return independent(latent, *self._loc_scale(latent))

    def _marginals(self, past: Any) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: self._loc_scale(latent) for name, latent in self.latents.items()}


def independent(
    latent: Latent, loc: Tensor, scale: Tensor, validate_args: bool | None = False
) -> Any:
    """Independent normals for the numbers of a site, pushed onto its support."""
    return onto(latent, PlainNormal(loc, scale, validate_args).to_event(latent.event_dim))


def onto(latent: Latent, normal: Any) -> Any:
    """A distribution in unconstrained space, pushed onto the support of its site.

    The transform remembers its last point, so that the density of a draw needs no inverse.
    """
    if latent.is_real:
        return normal
    transform = latent.transform.with_cache()
    if is_elementwise(transform):
        return Pushed(normal, transform)
    return dist.TransformedDistribution(normal, [transform])


def unconstrained(fn: Any, value: Tensor) -> tuple[Any, Tensor]:
    """The normal below a distribution made by `onto`, and a value in its space."""
    if not isinstance(fn, dist.TransformedDistribution):
        return fn, value
    (transform,) = fn.transforms
    return fn.base_dist, transform.inv(value)
