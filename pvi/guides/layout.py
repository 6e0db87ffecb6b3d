"""All latent sites as one vector in unconstrained space, and back."""

from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from pvi.guides.prototype import Latent


class Layout:
    """Where each site's numbers are in the vector of a joint distribution.

    A site's values have the shape `(*outer, *plates, *event)`: the plates' dimensions are counted
    from the right, with 1 where a site is not in a plate, and whatever lies left of the deepest
    plate of these sites is particles.
    """

    def __init__(self, latents: Iterable[Latent]):
        self.latents = {latent.name: latent for latent in latents}
        sizes = [latent.loc.numel() for latent in self.latents.values()]
        starts = [0, *accumulate(sizes)]
        self.slices = {
            name: slice(start, start + size)
            for name, start, size in zip(self.latents, starts, sizes, strict=False)
        }
        self.size = sum(sizes)
        depths = [len(latent.batch_shape) for latent in self.latents.values()]
        self.nesting = max(depths, default=0)

    def flat(self, latent: Latent, u: Tensor) -> Tensor:
        """One site's unconstrained values as vectors, `(*outer, n)`."""
        outer = u.shape[: max(0, u.dim() - self.nesting - latent.event_dim)]
        return u.reshape((*outer, latent.loc.numel()))

    def grid(self, latent: Latent, flat: Tensor) -> Tensor:
        """Vectors `(*outer, n)` in the shape of the site."""
        shape, outer = latent.loc.shape, flat.shape[:-1]
        if not outer:
            return flat.reshape(shape)
        missing = self.nesting - len(latent.batch_shape)
        return flat.reshape((*outer, *(1,) * missing, *shape))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """All sites' vectors in one, `(*outer, size)`."""
        vectors = [parts[name] for name in self.latents]
        outer = torch.broadcast_shapes(*(x.shape[:-1] for x in vectors))
        return torch.cat([x.expand(*outer, x.shape[-1]) for x in vectors], -1)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of all sites, in their shapes."""
        return {
            name: self.grid(latent, vector[..., self.slices[name]])
            for name, latent in self.latents.items()
        }

    def start(self) -> Tensor:
        """The starting points of all sites, `(size)`."""
        return torch.cat([latent.loc.reshape(-1) for latent in self.latents.values()])
