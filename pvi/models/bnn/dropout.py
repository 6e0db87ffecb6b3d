"""Dropout as a variational family."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pvi.engine.reads import read
from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides import Guide
from pvi.guides.init import InitLoc
from pvi.guides.mean_field import independent, onto
from pvi.guides.prototype import Latent


class ColumnDropout(TorchDistribution):
    """Columns of a weight that are all there or not: input units that are dropped.

    $$q(W) = \\prod_j \\left[(1 - r)\\, N(w_j; m_j, s^2 I) + r\\, N(w_j; 0, s^2 I)\\right]$$

    Args:
        loc: m, `(*batch, outputs, inputs, *rest)`, as in linear layers and convolutions.
        scale: s, a number.
        rate: r, the share that is dropped.
        event_dim: dimensions of the tensor, at least 2.
    """

    has_rsample = True  # the choice of columns has no parameters

    def __init__(self, loc: Tensor, scale: float, rate: float, event_dim: int):
        self.loc, self.scale, self.rate = loc, scale, rate
        cut = loc.dim() - event_dim
        super().__init__(loc.shape[:cut], loc.shape[cut:], validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return (1.0 - self.rate) * self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale**2 + self.rate * (1.0 - self.rate) * self.loc.square()

    def expand(self, batch_shape: _size, _instance: Any = None) -> "ColumnDropout":
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return ColumnDropout(loc, self.scale, self.rate, self.event_dim)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        loc = self.loc.expand(self._extended_shape(sample_shape))
        column = loc.movedim(-self.event_dim, 0)[:1].movedim(0, -self.event_dim)
        column = column[(..., *(slice(1),) * (self.event_dim - 2))]
        there = torch.rand_like(column) >= self.rate
        return loc * there + self.scale * torch.randn_like(loc)

    def log_prob(self, value: Tensor) -> Tensor:
        there = self._columns(value - self.loc) + math.log1p(-self.rate)
        dropped = self._columns(value) + math.log(self.rate)
        return torch.logaddexp(there, dropped).sum(-1)

    def _columns(self, difference: Tensor) -> Tensor:
        """Log densities of the columns at such differences from their means, `(*batch, n)`."""
        log_norm = math.log(self.scale) + 0.5 * math.log(2.0 * math.pi)
        log_prob = -0.5 * (difference / self.scale).square() - log_norm
        dims = [-self.event_dim, *range(2 - self.event_dim, 0)]
        return log_prob.sum(dims)


class MCDropout(Guide):
    """Dropout of input units at every weight (Gal and Ghahramani 2016), as a guide with a density.

    At sites of two dimensions or more each input unit is dropped with probability `rate`, for all
    data together, and around what is left there is a normal of a small fixed scale; other sites
    have that normal only. It is a proper distribution, so that its ELBO is a bound and its
    diagnosis holds; that of a narrow scale is low, for the mass is in a few points.

    Args:
        rate: share of the units that is dropped, between 0 and 1; not learned.
        model, init_loc_fn, init_scale: as in `Guide`; the scale stays as it is.
    """

    sitewise = True

    def __init__(
        self,
        rate: float = 0.1,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.01,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        if not 0.0 < rate < 1.0:
            raise GuideError(f"rate must be between 0 and 1, got {rate!r}")
        self.rate = rate
        self.loc = PyroModule()

    def moments(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and sd of every real-valued site, of units there and dropped together."""
        self._require_setup()
        with torch.no_grad():
            fns = {n: self._distribution(x, None) for n, x in self.latents.items() if x.is_real}
            return {n: (fn.mean, fn.stddev) for n, fn in fns.items()}

    def _build(self) -> None:
        self._empty("loc")
        for latent in self.latents.values():
            setattr(self.loc, latent.key, PyroParam(latent.loc, constraints.real, latent.event_dim))

    def _distribution(self, latent: Latent, past: Any) -> Any:
        loc = read(self._modules["loc"], latent.key)  # type: ignore[arg-type]
        if latent.event_dim < 2:
            return independent(latent, loc, torch.full_like(loc, self.init_scale))
        return onto(latent, ColumnDropout(loc, self.init_scale, self.rate, latent.event_dim))
