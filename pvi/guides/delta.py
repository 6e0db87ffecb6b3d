"""A point estimate."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pvi.engine.traces import Program
from pvi.guides.guide import Guide
from pvi.guides.init import InitLoc
from pvi.guides.prototype import Latent


class Delta(Guide):
    """Point masses: maximum a posteriori in the model's own space, $\\max_z \\log p(x, z)$.

    No posterior: its objective is the log joint density, not a bound, so evidence, khat and LOO are
    refused. The mode depends on the parameterisation; `Laplace` takes that of unconstrained space.

    Args:
        model, init_loc_fn: as in `Guide`.
    """

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
    ):
        super().__init__(model, init_loc_fn)
        self.point = PyroModule()

    def _build(self) -> None:
        self._empty("point")
        for latent in self.latents.values():
            value = latent.transform(latent.loc)
            setattr(self.point, latent.key, PyroParam(value, latent.support, latent.value_dim))

    def _distribution(self, latent: Latent, past: Any) -> dist.Delta:
        return dist.Delta(getattr(self.point, latent.key), event_dim=latent.value_dim)

    def _marginals(self, past: Any) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            u = latent.unconstrained(getattr(self.point, latent.key))
            found[name] = u, u.new_zeros(u.shape)
        return found
