"""The normal at the posterior's mode."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.full_rank import FullRank
from pvi.guides.init import InitLoc
from pvi.guides.mode import LogJoint
from pvi.guides.prototype import Latent
from pvi.optim.mode import maximize

STEEP = 1e-2  # posterior sds: the last Newton step may be no longer
NEWTON = 5  # steps of Newton's method after the search


class Laplace(FullRank):
    """Laplace's approximation in unconstrained space.

    $$q(u) = N(u;\\, \\hat u,\\, H^{-1}), \\qquad \\hat u = \\arg\\max \\log p(x, u), \\quad
    H = -\\nabla^2 \\log p(x, \\hat u).$$

    `setup` finds the mode by L-BFGS and takes the Hessian; there is nothing left to train, and
    `pvi.fit` returns it as it is. Costs D backward passes for D numbers.

    Args:
        model, init_loc_fn: as in `Guide`.

    Reference:
        MacKay 2003, chapter 27.
    """

    sitewise = False

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
    ):
        super().__init__(model, init_loc_fn)

    def _build(self) -> None:
        super()._build()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def adopt(self, found: Iterable[Latent], args: tuple, kwargs: Mapping) -> None:
        super().adopt(found, args, kwargs)
        if self.model is None:
            raise GuideError("Laplace needs the model to find its mode")
        f = LogJoint(self.model, self._layout, args, kwargs)
        mode, off = maximize(f, self._layout.start()), math.inf
        for _ in range(NEWTON):
            gradient, curvature = f.derivatives(mode)
            root = self._root(curvature)
            step = torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
            mode, off = mode + step, float((gradient @ step).clamp(min=0).sqrt())
            if off <= STEEP:
                self.place_covariance(mode, torch.cholesky_inverse(root))
                return
        raise GuideError(
            f"Laplace's search ended {off:.2g} posterior sds from the mode. Start nearer "
            "(init_loc_fn=), or use float64 (torch.set_default_dtype(torch.float64))."
        )

    def _root(self, curvature: Tensor) -> Tensor:
        """The Cholesky factor of the curvature, which a mode has."""
        root, info = torch.linalg.cholesky_ex(curvature)
        if int(info) or not bool(root.isfinite().all()):
            raise GuideError(
                "Laplace found no mode: at the best point the density curves upwards along some "
                f"direction, most at site '{self._worst(curvature)}'. The posterior may "
                "have no mode there (a scale that runs to 0, a flat prior): reparameterise the "
                "model, or use FullRank, which needs none."
            )
        return root

    def _worst(self, curvature: Tensor) -> str:
        """The site along which the density curves upwards most."""
        if not bool(curvature.isfinite().all()):
            return next(iter(self.latents))
        direction = torch.linalg.eigh(curvature).eigenvectors[:, 0].square()
        share = {name: float(direction[rows].sum()) for name, rows in self._layout.slices.items()}
        return max(share, key=lambda name: share[name])
