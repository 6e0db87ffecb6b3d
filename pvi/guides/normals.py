"""Correlated normals, written element by element.

A normal vector $z = m + L\\epsilon$ with triangular $L$ has the density
$\\prod_i q(z_i \\mid z_{<i})$, $q(z_i \\mid z_{<i}) = N(c_i, s_i^2)$: each element has a density of
its own. So a vector that runs through all elements of a plate still says one number for each of
them, which masks and scales apply to, and its divergence from independent normals is exact element
by element:

$$\\mathrm{KL}_i = \\log\\frac{\\sigma_i}{s_i}
    + \\frac{v_i + (m_i - \\mu_i)^2}{2\\sigma_i^2} - \\frac12, \\qquad v_i = \\mathrm{Var}(z_i).$$
"""

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    constraints,
    register_kl,
)
from torch.distributions.kl import kl_divergence
from torch.distributions.utils import _standard_normal
from torch.types import _size

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class PlainNormal(dist.Normal):
    """Independent normals whose density at their own draw is made of its noise.

    Their parameters are not checked: guides make them finite and positive, or the loss is not.

    Args:
        validate_args: `None` for Pyro's setting, where they come from an encoder.
    """

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = False):
        self._drawn: dict[str, Tensor] = {}  # the last draw and its noise, shared with `expand`
        if loc.shape != scale.shape:
            loc, scale = torch.broadcast_tensors(loc, scale)
        self.loc, self.scale = loc, scale
        Distribution.__init__(self, loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "PlainNormal":
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        new = PlainNormal(self.loc.expand(shape), self.scale.expand(shape))
        new._drawn = self._drawn
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        white = _standard_normal(
            self._extended_shape(sample_shape), self.loc.dtype, self.loc.device
        )
        value = self.loc + white * self.scale
        if torch.is_grad_enabled():  # looks at programs compare densities of one formula
            self._drawn |= {"value": value, "white": white}
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """$-\\epsilon^2/2 - \\log s - \\log\\sqrt{2\\pi}$ at a draw $m + s\\epsilon$ of its own.

        The gradient is that of the draw and its density together.
        """
        if self._drawn.get("value") is not value:
            return super().log_prob(value)
        return (-0.5 * self._drawn["white"].square() - HALF_LOG_2PI) - self.scale.log()


class Pushed(dist.TransformedDistribution):
    """A distribution under a map of single numbers, whose shapes are the same before and after."""

    def __init__(self, base: Any, transform: Any):
        self.base_dist, self.transforms = base, [transform]
        Distribution.__init__(self, base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Pushed":
        base = self.base_dist.expand(torch.Size(batch_shape))
        return self if base is self.base_dist else Pushed(base, self.transforms[0])


PlainNormal.__name__, Pushed.__name__ = "Normal", "TransformedDistribution"  # as tables show them


class JointNormal(TorchDistribution):
    """A normal over `joint_dims` rightmost dimensions of `loc` together.

    Args:
        loc: mean, `(*batch, *event)`.
        event_dim: dimensions of an event; density and KL are summed over them.
        joint_dims: how many rightmost dimensions of `loc` are correlated, at least `event_dim`: the
            others are independent, or particles.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, event_dim: int, joint_dims: int):
        self.loc, self._event_dim, self.joint_dims = loc, event_dim, joint_dims
        self._drawn: dict[str, Tensor] = {}  # the last draw and its noise, shared with `expand`
        batch = loc.dim() - event_dim
        super().__init__(loc.shape[:batch], loc.shape[batch:], validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self._grid(self.marginal_variance).expand(self.loc.shape)

    def expand(self, batch_shape: _size, _instance: object = None) -> "JointNormal":
        new = self._at(self.loc.expand(torch.Size(batch_shape) + self.event_shape))
        new._drawn = self._drawn
        return new

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        loc = self.loc.expand(torch.Size(sample_shape) + self.loc.shape)
        shift, white = self._noise(self._flat(loc))
        value = loc + shift.reshape(loc.shape)
        if white is not None:
            self._drawn |= {"value": value, "white": white}
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.loc.shape)
        white = self.whitened(value)
        return self._sum(-0.5 * white.square() - self.log_scale - HALF_LOG_2PI, shape)

    def whitened(self, value: Tensor) -> Tensor:
        """$(z_i - c_i) / s_i$, `(..., n)`: the noise itself of a value drawn here.

        It is not found again by a solve, whose errors grow with the condition of the factor.
        """
        if self._drawn.get("value") is value:
            return self._drawn["white"]
        return self._whiten(self._flat(value - self.loc))

    def entropy(self) -> Tensor:
        return self._sum(self.log_scale + HALF_LOG_2PI + 0.5, self.loc.shape)

    def divergence(self, loc: Tensor, scale: Tensor) -> Tensor:
        """KL against independent normals of these means and scales, `(*batch)`, nats."""
        shape = torch.broadcast_shapes(self.loc.shape, loc.shape, scale.shape)
        loc, scale = (self._flat(x.expand(shape)) for x in (loc, scale))
        second_moment = self.marginal_variance + (self._flat(self.loc) - loc).square()
        kl = scale.log() - self.log_scale + 0.5 * (second_moment / scale.square() - 1.0)
        return self._sum(kl, shape)

    def _flat(self, x: Tensor) -> Tensor:
        """The correlated dimensions as one vector, `(..., n)`."""
        return x.reshape((*x.shape[: x.dim() - self.joint_dims], -1))

    def _grid(self, x: Tensor) -> Tensor:
        """The inverse of `_flat`."""
        return x.reshape((*x.shape[:-1], *self.loc.shape[self.loc.dim() - self.joint_dims :]))

    def _sum(self, elements: Tensor, shape: torch.Size) -> Tensor:
        elements = self._grid(elements).expand(shape)
        return elements.sum(tuple(range(-self._event_dim, 0))) if self._event_dim else elements

    @abstractmethod
    def _at(self, loc: Tensor) -> "JointNormal":
        """The same distribution around another mean."""

    @abstractmethod
    def _noise(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draws around zero in the shape of `like` `(..., n)`, and their whitened form if known."""

    @abstractmethod
    def _whiten(self, difference: Tensor) -> Tensor:
        """The whitened form of $z - m$, `(..., n)`."""

    @property
    @abstractmethod
    def log_scale(self) -> Tensor:
        """$\\log s_i$: conditional on the elements before, `(..., n)`."""

    @property
    @abstractmethod
    def marginal_variance(self) -> Tensor:
        """$v_i$, `(..., n)`."""


class CholeskyNormal(JointNormal):
    """$N(m, LL^\\top)$ with a lower triangular `scale_tril` `(..., n, n)`."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, event_dim: int, joint_dims: int):
        super().__init__(loc, event_dim, joint_dims)
        self.scale_tril = scale_tril

    def _at(self, loc: Tensor) -> "CholeskyNormal":
        return CholeskyNormal(loc, self.scale_tril, self._event_dim, self.joint_dims)

    def _noise(self, like: Tensor) -> tuple[Tensor, Tensor]:
        white = torch.randn_like(like)
        return (self.scale_tril @ white.unsqueeze(-1)).squeeze(-1), white

    def _whiten(self, difference: Tensor) -> Tensor:
        return solve_lower(self.scale_tril, difference)

    @property
    def log_scale(self) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log()

    @property
    def marginal_variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1)


class LowRankNormal(JointNormal):
    """$N(m, WW^\\top + \\mathrm{diag}(d^2))$ with `factor` W `(n, r)` and `diagonal` d `(n)`.

    With $z = m + Wu + d\\epsilon$, what the elements before i tell of u is a normal with precision
    $P_i = I + \\sum_{j<i} w_j w_j^\\top / d_j^2$: all are computed at once, by a cumulative sum,
    $O(nr^3)$. One event needs the sum over its elements only: $O(nr^2)$, from
    $C = I + W^\\top \\mathrm{diag}(d^{-2}) W$ (Woodbury).
    """

    def __init__(
        self,
        loc: Tensor,
        factor: Tensor,
        diagonal: Tensor,
        event_dim: int,
        joint_dims: int,
    ):
        super().__init__(loc, event_dim, joint_dims)
        self.factor, self.diagonal = factor, diagonal

    def _at(self, loc: Tensor) -> "LowRankNormal":
        new = LowRankNormal(loc, self.factor, self.diagonal, self._event_dim, self.joint_dims)
        known = {"_before", "_capacitance"} & self.__dict__.keys()
        new.__dict__.update({name: self.__dict__[name] for name in known})
        return new

    def _noise(self, like: Tensor) -> tuple[Tensor, None]:
        u = torch.randn_like(like[..., :1].expand(*like.shape[:-1], self.factor.shape[-1]))
        along = (self.factor @ u.unsqueeze(-1)).squeeze(-1)
        return along + self.diagonal * torch.randn_like(like), None

    def log_prob(self, value: Tensor) -> Tensor:
        if self.joint_dims > self._event_dim:
            return super().log_prob(value)
        white = self._flat(value - self.loc) / self.diagonal
        along = solve_lower(self._capacitance, white @ (self.factor / self.diagonal.unsqueeze(-1)))
        square = white.square().sum(-1) - along.square().sum(-1)
        return -0.5 * square - (self.log_scale + HALF_LOG_2PI).sum(-1)

    @cached_property
    def _capacitance(self) -> Tensor:
        """The Cholesky factor of C, `(r, r)`."""
        w = self.factor / self.diagonal.unsqueeze(-1)
        eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        return torch.linalg.cholesky(eye + w.mT @ w)

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        """$P_i^{-1} w_i$ `(..., n, r)` and $s_i$ `(..., n)`."""
        w, d = self.factor, self.diagonal
        outer = w.unsqueeze(-1) * w.unsqueeze(-2) / d.square()[..., None, None]
        eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        precision = eye + outer.cumsum(-3) - outer
        gain = torch.cholesky_solve(w.unsqueeze(-1), torch.linalg.cholesky(precision)).squeeze(-1)
        return gain, (d.square() + (w * gain).sum(-1)).sqrt()

    def _whiten(self, difference: Tensor) -> Tensor:
        gain, scale = self._before
        seen = difference.unsqueeze(-1) * (self.factor / self.diagonal.square().unsqueeze(-1))
        return (difference - ((seen.cumsum(-2) - seen) * gain).sum(-1)) / scale

    @property
    def log_scale(self) -> Tensor:
        if self.joint_dims > self._event_dim:
            return self._before[1].log()
        shared = self._capacitance.diagonal(dim1=-2, dim2=-1).log().mean(-1, keepdim=True)
        return self.diagonal.log() + shared * (self.factor.shape[-1] / self.factor.shape[-2])

    @property
    def marginal_variance(self) -> Tensor:
        return self.factor.square().sum(-1) + self.diagonal.square()


class KroneckerNormal(JointNormal):
    """The matrix normal $W = M + A E B^\\top$: $N(\\mathrm{vec}\\,M, AA^\\top \\otimes BB^\\top)$.

    `rows` A `(..., r, r)` and `columns` B `(..., c, c)` are lower triangular, and so is
    $A \\otimes B$, the Cholesky factor of the matrix read row by row (Gupta and Nagar 1999).
    """

    def __init__(self, loc: Tensor, rows: Tensor, columns: Tensor, event_dim: int):
        super().__init__(loc, event_dim, event_dim)
        self.rows, self.columns = rows, columns

    def _at(self, loc: Tensor) -> "KroneckerNormal":
        return KroneckerNormal(loc, self.rows, self.columns, self._event_dim)

    def _matrix(self, x: Tensor) -> Tensor:
        return x.reshape((*x.shape[:-1], self.rows.shape[-1], self.columns.shape[-1]))

    def _noise(self, like: Tensor) -> tuple[Tensor, Tensor]:
        white = torch.randn_like(like)
        return (self.rows @ self._matrix(white) @ self.columns.mT).flatten(-2), white

    def _whiten(self, difference: Tensor) -> Tensor:
        left = torch.linalg.solve_triangular(self.rows, self._matrix(difference), upper=False)
        both = torch.linalg.solve_triangular(self.columns, left.mT, upper=False)
        return both.mT.flatten(-2)

    @property
    def log_scale(self) -> Tensor:
        rows, columns = (x.diagonal(dim1=-2, dim2=-1).log() for x in (self.rows, self.columns))
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)

    @property
    def marginal_variance(self) -> Tensor:
        rows, columns = (x.square().sum(-1) for x in (self.rows, self.columns))
        return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def solve_lower(tril: Tensor, x: Tensor) -> Tensor:
    """$L^{-1}x$ for vectors `(..., n)`, many of them against one matrix in one call."""
    if tril.dim() == 2:
        flat = x.reshape(-1, x.shape[-1]).mT
        return torch.linalg.solve_triangular(tril, flat, upper=False).mT.reshape(x.shape)
    return torch.linalg.solve_triangular(tril, x.unsqueeze(-1), upper=False).squeeze(-1)


@register_kl(JointNormal, Normal)
def _kl_normal(q: JointNormal, p: Normal) -> Tensor:
    return q.divergence(p.loc, p.scale)


@register_kl(JointNormal, Independent)
def _kl_independent(q: JointNormal, p: Independent) -> Tensor:
    base = p.base_dist
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, Normal):
        raise NotImplementedError
    return q.divergence(base.loc, base.scale)


@register_kl(CholeskyNormal, MultivariateNormal)
def _kl_multivariate(q: CholeskyNormal, p: MultivariateNormal) -> Tensor:
    if q.joint_dims != 1:  # rows depend on each other
        raise NotImplementedError
    tril = q.scale_tril.expand(*q.loc.shape, q.loc.shape[-1])
    return kl_divergence(MultivariateNormal(q.loc, scale_tril=tril, validate_args=False), p)
