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
from pvi.nn.mlp import Shape, as_shape

FLOOR = 1e-4  # of scales
Encode = Callable[[Tensor], Any]


class Prior(Component):
    """A distribution over vectors `(d,)`."""

    @abstractmethod
    def forward(self, encode: Encode) -> Any:
        """The distribution, batch shape `()`, event shape `(d,)`.

        Args:
            encode: from inputs of the encoder `(n, *shape)` to posteriors, for priors made of
                these.
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
        components: how many; their means start at draws from N(0, I), their scales at 1.

    Reference:
        Tomczak and Welling (2018), VAE with a VampPrior, who compare with it.
    """

    def __init__(self, latents: int, components: int = 20):
        super().__init__()
        self.latents, self.components = latents, components
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latents))
        self.raw_scale = nn.Parameter(torch.full((components, latents), math.log(math.e - 1)))

    def forward(self, encode: Encode) -> Any:
        scale = softplus(self.raw_scale) + FLOOR
        parts = dist.Normal(self.loc, scale, validate_args=False).to_event(1)
        weights = dist.Categorical(logits=self.logits, validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False)


class Vamp(Prior):
    """$\\frac1K \\sum_k q(z \\mid u_k)$: the posteriors of learned pseudo-inputs (VampPrior).

    Args:
        shape: of what the encoder reads, which is the shape of a datum for most likelihoods.
        components: K.
        mean, sd: of the normals at which the pseudo-inputs start; choose them like the data.

    Reference:
        Tomczak and Welling (2018), VAE with a VampPrior, eq. 9.
    """

    def __init__(self, shape: Shape, components: int = 100, *, mean: float = 0.5, sd: float = 0.1):
        super().__init__()
        self.shape, self.components, self.mean, self.sd = as_shape(shape), components, mean, sd
        self.inputs = nn.Parameter(mean + sd * torch.randn(components, *self.shape))

    def forward(self, encode: Encode) -> Any:
        weights = dist.Categorical(logits=self.inputs.new_zeros(self.components))
        return dist.MixtureSameFamily(weights, encode(self.inputs))
