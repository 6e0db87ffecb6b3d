"""One normal with a full covariance over all latents."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pvi.errors import GuideError
from pvi.guides.mean_field import NormalGuide, onto, unconstrained
from pvi.guides.normals import CholeskyNormal
from pvi.guides.prototype import Latent

LARGEST = 20_000  # numbers: a factor of 3 GB in float64, and four such tensors to train it


class FullRank(NormalGuide):
    """Multivariate normal over all latents in unconstrained space.

    $$q(u) = N(u;\\, m,\\, LL^\\top), \\qquad L = \\mathrm{diag}(s)\\,T,$$

    T lower triangular with ones on its diagonal, told site by site: given the sites before, with
    noise $\\epsilon_{<}$, site $j$ is normal with mean $m_j + L_{j<}\\epsilon_<$ and factor
    $L_{jj}$. So each of the model's sites has its own normal, and its KL against a normal prior is
    exact given the sites before it. Costs $O(D^2)$ memory and time a draw for D numbers. The
    parameter `correlation` is $1 + (T - 1)D^{1/4}$: steps of one size in all entries of a row add
    up, and without the factor those of a large guide make T singular.

    Args:
        model, init_loc_fn, init_scale: as in `Guide`.

    Reference:
        Kucukelbir et al. 2017 (full-rank ADVI).
    """

    joint = True
    correlation: Any  # PyroParam (D, D)

    def _build(self) -> None:
        super()._build()
        size, start = self._layout.size, self._layout.start()
        if size > LARGEST:
            raise GuideError(
                f"FullRank over {size} numbers needs {size * size:,} parameters. Use LowRank, "
                "Structured (a covariance within each element of a plate) or a Group."
            )
        eye = torch.eye(size, dtype=start.dtype, device=start.device)
        self.correlation = PyroParam(eye, constraints.unit_lower_cholesky)

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[str, Any]:
        return {"tril": self._tril()}

    def _tril(self) -> Tensor:
        """T of the equation, `(D, D)`."""
        tril: Tensor = self.correlation * self._layout.size**-0.25
        tril.diagonal().fill_(1.0)
        return tril

    def _distribution(self, latent: Latent, past: dict[str, Any]) -> Any:
        loc, scale = self._loc_scale(latent)
        rows, tril = self._layout.slices[latent.name], past["tril"]
        shift, spread = self._layout.flat(latent, loc), scale.reshape(-1, 1)
        if "noise" in past:
            before = tril[rows, : past["noise"].shape[-1]]
            shift = shift + scale.reshape(-1) * (past["noise"] @ before.mT)
        own = spread * tril[rows, rows]
        mean = self._layout.grid(latent, shift)
        past["fn"] = onto(latent, CholeskyNormal(mean, own, latent.event_dim, latent.loc.dim()))
        return past["fn"]

    def _passed(self, latent: Latent, value: Tensor, past: dict[str, Any]) -> None:
        """Remember the noise of this draw, which the sites after it depend on."""
        if latent.name == list(self.latents)[-1]:
            return
        normal, u = unconstrained(past["fn"], value)
        new = normal.whitened(u)
        new = new.reshape((*self._layout.flat(latent, u).shape[:-1], -1))
        if "noise" in past:
            noise = past["noise"].expand(*new.shape[:-1], past["noise"].shape[-1])
            new = torch.cat([noise, new], -1)
        past["noise"] = new

    def _marginals(self, past: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            loc, scale = self._loc_scale(latent)
            sd = past["tril"][self._layout.slices[name]].square().sum(-1).sqrt()
            found[name] = loc, scale * sd.reshape(scale.shape)
        return found

    def _mixed(self, noise: Tensor) -> Tensor:
        return noise @ self._tril().mT

    def place(self, mean: Tensor, precision: Tensor) -> None:
        self.place_covariance(mean, torch.linalg.inv(precision))

    def place_covariance(self, mean: Tensor, covariance: Tensor) -> None:
        """Become $N(u; m, \\Sigma)$ for these, which may be in higher precision."""
        tril = torch.linalg.cholesky(0.5 * (covariance + covariance.mT))
        scale = tril.diagonal()
        self._place(mean, scale)
        eye = torch.eye(len(tril), dtype=tril.dtype, device=tril.device)
        correlation = torch.lerp(eye, tril / scale.unsqueeze(-1), len(tril) ** 0.25)
        own = self.correlation  # LAPACK's order of memory is refused by safetensors
        self.correlation = correlation.contiguous().to(own)

    def covariance(self) -> Tensor:
        """Covariance of all latents in unconstrained space, in the model's order: `(D, D)`."""
        self._require_setup()
        tril = self._vectors()[1].unsqueeze(-1) * self._tril()
        return tril @ tril.mT
