"""Posteriors $q(z \\mid x)$ of the vector of latents of a datum, from the encoder's numbers."""

from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pvi.guides.normals import CholeskyNormal
from pvi.nn import Component

FLOOR = 1e-4  # of scales


class AmortizedPosterior(Component):
    """A family $q(z \\mid x)$; `width` is how many numbers the encoder gives for one."""

    width: int

    @abstractmethod
    def forward(self, h: Tensor) -> Any:
        """The distributions: batch shape `(*batch)`, event shape `(d,)`.

        Args:
            h: what the encoder gives, `(*batch, width)`.
        """

    def mean(self, fn: Any) -> Tensor:
        """The means of distributions that `forward` has made, `(*batch, d)`."""
        return fn.mean


class Diagonal(AmortizedPosterior):
    """$N(m, \\mathrm{diag}\\, s^2)$ with s = softplus of the encoder's number.

    Args:
        latents: d.

    Reference:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, eq. 9.
    """

    def __init__(self, latents: int):
        super().__init__()
        self.latents, self.width = latents, 2 * latents

    def forward(self, h: Tensor) -> Any:
        return diagonal(h)


def diagonal(h: Tensor) -> Any:
    """Independent normals, from means and scales before softplus: `(*batch, 2 d)`."""
    loc, raw = h.chunk(2, -1)
    return dist.Normal(loc, softplus(raw) + FLOOR).to_event(1)


class FullCovariance(AmortizedPosterior):
    """$N(m, L L^\\top)$, L lower triangular from the encoder, with a positive diagonal.

    Args:
        latents: d.

    Reference:
        Kingma and Welling (2019), An Introduction to Variational Autoencoders, section 2.5.1.
    """

    def __init__(self, latents: int):
        super().__init__()
        self.latents = latents
        self.width = latents + latents * (latents + 1) // 2

    def forward(self, h: Tensor) -> Any:
        d = self.latents
        loc, raw = h[..., :d], h[..., d:]
        rows, columns = torch.tril_indices(d, d, device=h.device)
        tril = raw.new_zeros(*raw.shape[:-1], d, d)
        tril[..., rows, columns] = raw
        diagonal = softplus(tril.diagonal(dim1=-2, dim2=-1)) + FLOOR
        return CholeskyNormal(loc, tril.tril(-1) + diagonal.diag_embed(), 1, 1)
