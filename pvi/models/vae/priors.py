"""Priors $p(z)$ over the vector of latents of a datum."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvi.nn import Component

Encode = Callable[[Tensor], Any]


class Prior(Component):
    """A distribution over vectors `(d,)`."""

    @abstractmethod
    def forward(self, encode: Encode) -> Any:
        """The distribution, batch shape `()`, event shape `(d,)`.

        Args:
            encode: from data `(n, *shape)` to their posteriors; for priors made of these.
        """


class Standard(Prior):
    """$N(0, I)$.

    Args:
        latents: d.
    """

    zero: Tensor

    def __init__(self, latents: int):
        super().__init__()
        self.latents = latents
        self.register_buffer("zero", torch.zeros(latents), persistent=False)

    def forward(self, encode: Encode) -> Any:
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)


class Mixture(Prior):
    """$\\sum_k \\pi_k N(m_k, \\mathrm{diag}\\, s_k^2)$, all learned.

    Args:
        latents: d.
        components: how many; they start at draws from N(0, I).
    """

    def __init__(self, latents: int, components: int = 20):
        super().__init__()
        self.latents, self.components = latents, components
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latents))
        self.raw_scale = nn.Parameter(torch.full((components, latents), math.log(math.e - 1)))

    def forward(self, encode: Encode) -> Any:
        parts = dist.Normal(self.loc, softplus(self.raw_scale), validate_args=False).to_event(1)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False)
