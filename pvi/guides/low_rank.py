"""One normal over all latents, correlated along a few directions."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.init import InitLoc
from pvi.guides.mean_field import NormalGuide, onto
from pvi.guides.normals import LowRankNormal
from pvi.guides.prototype import Latent


class LowRank(NormalGuide):
    """Normal with a low-rank plus diagonal covariance over all latents in unconstrained space.

    $$q(u) = N(u;\\, m,\\, WW^\\top + \\mathrm{diag}(d^2)), \\qquad u = m + Wv + d\\epsilon,$$

    told site by site: what the sites before say of $v$ (r numbers) is a normal, so each site has
    its own low-rank normal given them, and its KL against a normal prior is exact given them. Costs
    $O(Dr^2)$ a step, $O(Dr^3)$ for sites in plates, and $D(r + 2)$ parameters.

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.
        rank: r; by default the square root of the number of latents, at most 20.

    Reference:
        Ong, Nott, Smith 2018.
    """

    joint = True
    factor: Any  # PyroParam (D, r)

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
        *,
        rank: int | None = None,
    ):
        super().__init__(model, init_loc_fn, init_scale)
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise GuideError(f"rank must be a whole number >= 1, got {rank!r}")
        self.rank = rank

    def _build(self) -> None:
        super()._build()
        start = self._layout.start()
        rank = self.rank or max(1, min(20, round(self._layout.size**0.5)))
        # Not zero, where the gradient of W is zero too; small beside d; the same in every run.
        generator, like = torch.Generator().manual_seed(0), {"dtype": start.dtype, "device": "cpu"}
        factor = torch.randn(self._layout.size, rank, generator=generator, **like)
        self.factor = PyroParam(0.1 * factor.to(start) / rank**0.5, constraints.real)

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[str, Tensor]:
        """W in units of d, and what is known of v: its precision, and that times its mean."""
        factor = self.factor
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return {"factor": factor, "precision": eye, "information": torch.zeros_like(factor[0])}

    def _distribution(self, latent: Latent, past: dict[str, Tensor]) -> Any:
        loc, scale = self._loc_scale(latent)
        d = scale.reshape(-1)
        factor = past["factor"][self._layout.slices[latent.name]]
        root = torch.linalg.cholesky(past["precision"])
        mean = torch.cholesky_solve(past["information"].unsqueeze(-1), root).squeeze(-1)
        shift = self._layout.flat(latent, loc) + d * (mean @ factor.mT)
        own = torch.linalg.solve_triangular(root, factor.mT, upper=False).mT
        shift = self._layout.grid(latent, shift)
        normal = LowRankNormal(shift, d.unsqueeze(-1) * own, d, latent.event_dim, latent.loc.dim())
        return onto(latent, normal)

    def _passed(self, latent: Latent, value: Tensor, past: dict[str, Tensor]) -> None:
        loc, scale = (self._layout.flat(latent, x) for x in self._loc_scale(latent))
        factor = past["factor"][self._layout.slices[latent.name]]
        white = (self._layout.flat(latent, latent.unconstrained(value)) - loc) / scale
        past["precision"] = past["precision"] + factor.mT @ factor
        past["information"] = past["information"] + white @ factor

    def _marginals(self, past: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            loc, scale = self._loc_scale(latent)
            factor = past["factor"][self._layout.slices[name]]
            found[name] = loc, scale * (1.0 + factor.square().sum(-1)).sqrt().reshape(scale.shape)
        return found

    @property
    def noise_size(self) -> int:
        return self.layout.size + self.factor.shape[-1]

    def _mixed(self, noise: Tensor) -> Tensor:
        size = self.layout.size
        return noise[:, :size] + noise[:, size:] @ self.factor.mT

    def entropy(self) -> Tensor:
        factor = self.factor
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return super().entropy() + 0.5 * torch.logdet(eye + factor.mT @ factor)

    def place(self, mean: Tensor, precision: Tensor) -> None:
        """d by the sds given all other latents, W by the directions with most beyond those."""
        d = precision.diagonal().rsqrt()
        self._place(mean, d)
        excess = torch.linalg.inv(d.unsqueeze(-1) * precision * d)
        values, vectors = torch.linalg.eigh(0.5 * (excess + excess.mT))
        rank = self.factor.shape[-1]
        with torch.no_grad():
            extra = (values[-rank:] - 1.0).clamp(min=1e-2).sqrt()
            self.factor_unconstrained[:, : len(extra)] = vectors[:, -rank:] * extra

    def covariance(self) -> Tensor:
        """Covariance of all latents in unconstrained space, in the model's order: `(D, D)`."""
        self._require_setup()
        d = self._vectors()[1]
        factor = d.unsqueeze(-1) * self.factor
        return factor @ factor.mT + d.square().diag()
