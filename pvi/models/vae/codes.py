"""Distributions over vectors of a codebook, under the counting measure."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.types import _size

EXACT = "donot_use_mm_for_euclid_dist"  # so that a code is nearest to itself


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The codes of the nearest vectors, `(*batch, P)`.

    Args:
        z: `(*batch, P, D)`.
        codebook: `(K, D)`.
    """
    with torch.no_grad():
        flat = z.reshape(-1, z.shape[-1]).to(codebook)
        return torch.cdist(flat, codebook, compute_mode=EXACT).argmin(-1).reshape(z.shape[:-1])


class _InCodebook(constraints.Constraint):
    """P vectors of a codebook.

    Args:
        codebook: `(K, D)`.
    """

    is_discrete = True
    event_dim = 2

    def __init__(self, codebook: Tensor):
        self.codebook = codebook

    def check(self, value: Tensor) -> Tensor:
        known = self.codebook[nearest(value, self.codebook)]
        return (known == value).flatten(-2).all(-1)


class _OfCodebook(TorchDistribution):
    """What both distributions share.

    Args:
        codebook: `(K, D)`.
        positions: P.
        batch: the batch shape.
    """

    def __init__(self, codebook: Tensor, positions: int, batch: _size):
        self.codebook = codebook
        event = torch.Size((positions, codebook.shape[1]))
        super().__init__(torch.Size(batch), event, validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return _InCodebook(self.codebook)


class Codes(_OfCodebook):
    """A prior over the codes of P positions: $K^{-P}$ each, or that of an autoregressive model.

    Args:
        codebook: `(K, D)`.
        positions: P.
        density: a distribution over codes of any event shape of P numbers, or `None`.
        batch: the batch shape.
    """

    def __init__(
        self,
        codebook: Tensor,
        positions: int,
        density: Any = None,
        batch: _size = torch.Size(),  # noqa: B008
    ):
        self.density, self.positions = density, positions
        super().__init__(codebook, positions, batch)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Codes":
        return Codes(self.codebook, self.positions, self.density, batch_shape)

    def of(self, codes: Tensor) -> Tensor:
        """Log probability of codes `(*batch, P)`: `(*batch)`, nats."""
        if self.density is None:
            each = -self.positions * math.log(len(self.codebook))
            return self.codebook.new_full(codes.shape[:-1], each)
        event = self.density.event_shape
        return self.density.log_prob(codes.to(self.codebook).reshape(*codes.shape[:-1], *event))

    def log_prob(self, value: Tensor) -> Tensor:
        codes = nearest(value, self.codebook)
        inside = (self.codebook[codes] == value).flatten(-2).all(-1)
        found = torch.where(inside, self.of(codes), -math.inf)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        batch = torch.Size(sample_shape) + self.batch_shape
        if self.density is None:
            shape, place = (*batch, self.positions), self.codebook.device
            return self.codebook[torch.randint(len(self.codebook), shape, device=place)]
        codes = self.density.sample(batch).long()
        return self.codebook[codes.reshape(*batch, self.positions)]


class Quantised(_OfCodebook):
    """All mass at the codes nearest to z, whose gradient goes to z ("straight-through").

    $$e = e_k + (z - \\mathrm{sg}\\,z), \\qquad \\log q(e) = 0$$

    Args:
        z: `(*batch, P, D)`.
        codebook: `(K, D)`.
        codes: those of z, if they are known.

    Reference:
        van den Oord, Vinyals, Kavukcuoglu (2017), Neural Discrete Representation Learning, eq. 1.
    """

    has_rsample = True
    certain = True

    def __init__(self, z: Tensor, codebook: Tensor, codes: Tensor | None = None):
        self.z, self.codes = z, nearest(z, codebook) if codes is None else codes
        super().__init__(codebook, z.shape[-2], z.shape[:-2])

    @property
    def embedded(self) -> Tensor:
        """The vectors of the codes, `(*batch, P, D)`."""
        return self.codebook[self.codes]

    @property
    def mean(self) -> Tensor:
        return self.embedded

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Quantised":
        shape, event = torch.Size(batch_shape), self.event_shape
        codes = self.codes.expand(*shape, event[0])
        return Quantised(self.z.expand(*shape, *event), self.codebook, codes)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        value = self.embedded + (self.z - self.z.detach())  # exactly the code: x - x is 0
        return value.expand(*sample_shape, *value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        same = (value == self.embedded).flatten(-2).all(-1)
        return torch.where(same, 0.0, -math.inf).to(self.codebook)

    def entropy(self) -> Tensor:
        return self.codebook.new_zeros(self.batch_shape)


@register_kl(Quantised, Codes)
def _kl(q: Quantised, p: Codes) -> Tensor:
    if q.codebook is not p.codebook:
        raise NotImplementedError
    return -p.of(q.codes)
