"""Likelihoods of whole numbers: levels of a picture, counts."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus
from torch.types import _size

from pvi.errors import ModelError
from pvi.models.vae.likelihoods import COUNTS, FLOOR, Likelihood
from pvi.nn.mlp import Shape, as_shape


class DiscretizedLogisticDistribution(TorchDistribution):
    """The levels 0 to L - 1 as intervals of a logistic distribution on [-1, 1].

    $$p(k) = \\sigma\\Big(\\frac{e_{k+1} - m}{s}\\Big) - \\sigma\\Big(\\frac{e_k - m}{s}\\Big)$$
    with edges $e_k = (2k - 1) / (L - 1) - 1$; the first and last intervals have no outer edge.

    Args:
        loc, scale: m and s, of one shape.
        levels: L.

    Reference:
        Salimans, Karpathy, Chen, Kingma (2017), PixelCNN++, eq. 2.
    """

    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None):
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(loc.shape, validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict:
        return {"loc": constraints.real, "scale": constraints.positive}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The location as a level; that of the distribution but for rounding and the ends."""
        return (0.5 * (self.loc.clamp(-1.0, 1.0) + 1.0)) * (self.levels - 1)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Any:
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return DiscretizedLogisticDistribution(loc, scale, self.levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = 1.0 / (self.levels - 1)
        centre = 2.0 * value * half - 1.0 - self.loc
        upper, lower = (centre + half) / self.scale, (centre - half) / self.scale
        # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)), which never cancels
        inside = (-torch.expm1(-2.0 * half / self.scale)).log()
        inside = inside + logsigmoid(upper) + logsigmoid(-lower)
        last = value >= self.levels - 1
        return torch.where(value <= 0, logsigmoid(upper), inside.where(~last, logsigmoid(-lower)))

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp(1e-6, 1.0 - 1e-6)
        x = self.loc + self.scale * (u.log() - (-u).log1p())
        return (0.5 * (x + 1.0) * (self.levels - 1)).round().clamp(0, self.levels - 1)


class DiscretizedLogistic(Likelihood):
    """Levels 0, 1, ..., L - 1, as of pixels: a discretised logistic, or a mixture of them.

    $$p(k) = \\sum_c \\pi_c \\Big[\\sigma\\Big(\\frac{e_{k+1} - m_c}{s_c}\\Big)
    - \\sigma\\Big(\\frac{e_k - m_c}{s_c}\\Big)\\Big], \\qquad e_k = \\frac{2k - 1}{L - 1} - 1$$

    with $e_0 = -\\infty$ and $e_L = \\infty$. The elements of a datum are independent given the
    decoder's numbers.

    Args:
        levels: L.
        components: of the mixture.

    Raises:
        ModelError: levels < 2 or components < 1.

    Reference:
        Salimans et al. (2017), PixelCNN++.
    """

    def __init__(self, levels: int = 256, components: int = 1):
        super().__init__()
        if levels < 2 or components < 1:
            raise ModelError(f"needs levels >= 2 and components >= 1, got {levels}, {components}")
        self.levels, self.components = levels, components
        self.width = 2 if components == 1 else 3 * components
        self.values = f"whole numbers from 0 to {levels - 1}"
        self.advice = (
            f"Round them to levels, such as (X * {levels - 1}).round() of values in [0, 1]."
        )

    def elements(self, h: Tensor) -> Any:
        if self.components == 1:
            return DiscretizedLogisticDistribution(h[0], softplus(h[1]) + FLOOR, self.levels)
        logits, loc, raw = (x.movedim(0, -1) for x in h.chunk(3))
        parts = DiscretizedLogisticDistribution(loc, softplus(raw) + FLOOR, self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x < self.levels) & (x == x.floor())

    def features(self, x: Tensor) -> Tensor:
        """From -1 to 1."""
        return 2.0 * x / (self.levels - 1) - 1.0


class NegativeBinomial(Likelihood):
    """Counts of mean $\\mu$ = softplus(h) and variance $\\mu + \\mu^2 / r$.

    Args:
        shape: of a datum, for one learned r for each element; by default r is decoded.

    Reference:
        Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics.
    """

    values = COUNTS
    advice = "Use Gaussian for values that are no counts."

    def __init__(self, shape: Shape | None = None):
        super().__init__()
        self.shape = shape
        self.width = 2 if shape is None else 1
        if shape is not None:
            self.raw = nn.Parameter(torch.full(as_shape(shape), math.log(math.e - 1)))

    def elements(self, h: Tensor) -> Any:
        mean, count = self._mean_and_count(h)
        return dist.NegativeBinomial(count, logits=mean.log() - count.log())

    def _mean_and_count(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and r, in the shape of h[0]."""
        count = softplus(h[-1] if self.shape is None else self.raw.expand(h[0].shape)) + FLOOR
        return softplus(h[0]) + FLOOR, count

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x == x.floor()) & x.isfinite()

    def features(self, x: Tensor) -> Tensor:
        return x.log1p()


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """A negative binomial that is 0 with a further probability $\\pi$, whose logit is decoded.

    $$p(x) = \\pi\\,[x = 0] + (1 - \\pi)\\,\\mathrm{NB}(x; \\mu, r)$$

    The decoder gives the numbers of $\\mu$, of $\\pi$, and of r where it is decoded.

    Args:
        shape: as of `NegativeBinomial`.

    Reference:
        Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics.
    """

    def __init__(self, shape: Shape | None = None):
        super().__init__(shape)
        self.width += 1

    def elements(self, h: Tensor) -> Any:
        mean, count = self._mean_and_count(h[:1] if self.shape is not None else h[::2])
        logits = mean.log() - count.log()
        return dist.ZeroInflatedNegativeBinomial(count, logits=logits, gate_logits=h[1])
