"""Arrays that take a normal step from each time to the next."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl
from torch.types import _size

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class RandomWalk(TorchDistribution):
    """$x_1 \\sim N(m_1, s^2)$, $x_t \\sim N(x_{t-1} + m_t - m_{t-1}, d^2)$, in each element.

    Its divergence from independent normals is exact.

    Args:
        loc: means m, `(T, *shape)`, all of it the event.
        spread, step: s and d.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, spread: float, step: float, batch_shape: _size = ()):
        self.loc, self.spread, self.step = loc, spread, step
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: _size, _instance: Any = None) -> "RandomWalk":
        return RandomWalk(self.loc, self.spread, self.step, batch_shape)

    def scales(self) -> Tensor:
        """Of the first value and of each step `(T, 1, ...)`."""
        scales = self.loc.new_full((len(self.loc),), self.step)
        scales[0] = self.spread
        return scales.reshape(-1, *[1] * (self.loc.dim() - 1))

    def steps(self, x: Tensor) -> Tensor:
        """The first value and the steps of arrays `(*batch, T, *shape)`, without their means."""
        x, time = x - self.loc, -self.loc.dim()
        before = x.narrow(time, 0, x.shape[time] - 1)
        return torch.cat(
            [x.narrow(time, 0, 1), x.narrow(time, 1, x.shape[time] - 1) - before], time
        )

    def log_prob(self, value: Tensor) -> Tensor:
        white = self.steps(value) / self.scales()
        each = -0.5 * white.square() - self.scales().log() - HALF_LOG_2PI
        return each.flatten(-self.loc.dim()).sum(-1)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        white = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (white * self.scales()).cumsum(-self.loc.dim())


@register_kl(Independent, RandomWalk)
def _kl_independent_walk(q: Any, p: RandomWalk) -> Tensor:
    """Steps have the mean $m_t - m_{t-1}$ and the variance $s_t^2 + s_{t-1}^2$."""
    normal = q.base_dist
    if not isinstance(normal, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    time, variance = -p.loc.dim(), normal.variance
    before = torch.zeros_like(variance)
    count = variance.shape[time] - 1
    before.narrow(time, 1, count).copy_(variance.narrow(time, 0, count))
    second = p.steps(normal.mean).square() + variance + before
    each = second / (2.0 * p.scales().square()) + p.scales().log() - normal.stddev.log() - 0.5
    return each.flatten(time).sum(-1)
