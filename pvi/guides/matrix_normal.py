"""Matrix normals for weight matrices."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.traces import Program
from pvi.guides.init import InitLoc
from pvi.guides.mean_field import LocScaleGuide, independent, onto
from pvi.guides.normals import KroneckerNormal
from pvi.guides.prototype import Latent


class MatrixNormal(LocScaleGuide):
    """Matrix normal at every site whose event is a matrix, independent normals elsewhere.

    $$W = M + A\\,E\\,B^\\top, \\qquad
    \\mathrm{cov}(\\mathrm{vec}\\,W) = AA^\\top \\otimes BB^\\top,$$

    with A $(r \\times r)$ and B $(c \\times c)$ lower triangular: correlations between the units of
    a layer and between its inputs, for $r^2 + c^2$ parameters instead of $(rc)^2$. A convolution's
    weight counts as the matrix of its output channels by the rest.

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.

    Reference:
        Louizos and Welling 2016.
    """

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        self.rows = PyroModule()
        self.columns = PyroModule()

    def _build(self) -> None:
        self._empty("loc", "scale", "rows", "columns")
        for latent in self.latents.values():
            if latent.event_dim < 2:
                self._create_normal(latent)
                continue
            loc, shape = latent.loc, latent.event_shape
            setattr(self.loc, latent.key, PyroParam(loc, constraints.real, latent.event_dim))
            sizes = (self.rows, shape[0], self.init_scale), (self.columns, shape[1:].numel(), 1.0)
            for part, size, scale in sizes:
                eye = scale * torch.eye(size, dtype=loc.dtype, device=loc.device)
                eye = eye.expand(*latent.batch_shape, size, size).clone()
                setattr(part, latent.key, PyroParam(eye, constraints.lower_cholesky, 2))

    def _distribution(self, latent: Latent, past: Any) -> Any:
        if latent.event_dim < 2:
            return independent(latent, *self._loc_scale(latent))
        return onto(latent, self._matrix(latent))

    def _matrix(self, latent: Latent) -> KroneckerNormal:
        loc, rows, columns = (getattr(x, latent.key) for x in (self.loc, self.rows, self.columns))
        return KroneckerNormal(loc, rows, columns, latent.event_dim)

    def _marginals(self, past: Any) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            if latent.event_dim < 2:
                found[name] = self._loc_scale(latent)
            else:
                normal = self._matrix(latent)
                found[name] = normal.loc, normal.stddev
        return found
