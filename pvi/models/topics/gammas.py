"""Shares as normalised gamma variables, with gamma or Weibull posteriors."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import softplus

from pvi.models.topics.families import FLOOR, Family

EULER = 0.5772156649015329
TAIL = 16.0  # where integrands are below 1e-7
NODES = 128


class GammaShares(Family):
    """$z_k \\sim \\mathrm{Gamma}(\\alpha, 1)$, $\\theta = z / \\sum_k z_k$: a Dirichlet prior.

    The posterior is a gamma for each topic, by implicit reparameterisation, with an exact KL.

    Args:
        topics: K.
        concentration: $\\alpha$.

    Reference:
        Joo, Lee, Park and Moon (2020), Dirichlet variational autoencoder.
    """

    def __init__(self, topics: int, concentration: float = 0.1):
        super().__init__()
        self.topics, self.concentration, self.width = topics, concentration, 2 * topics
        self.register_buffer("alpha", torch.full((topics,), float(concentration)), persistent=False)

    def prior(self, shift: Tensor | None = None) -> Any:
        alpha: Any = self.alpha
        return dist.Gamma(alpha, torch.ones_like(alpha), validate_args=False).to_event(1)

    def posterior(self, h: Tensor) -> Any:
        shape, rate = (softplus(h) + FLOOR).chunk(2, -1)
        return dist.Gamma(shape, rate, validate_args=False).to_event(1)

    def shares(self, z: Tensor) -> Tensor:
        z = z + torch.finfo(z.dtype).tiny
        return z / z.sum(-1, keepdim=True)

    def mean(self, q: Any, noise: Tensor) -> Tensor:
        """By an integral over t, for whose logarithm the trapezoidal rule is exact enough.

        $$E\\Bigl[\\frac{z_k}{\\sum_i z_i}\\Bigr] = \\int_0^\\infty E[z_k e^{-t \\sum_i z_i}]\\,dt
          = \\int_0^\\infty \\frac{a_k}{b_k + t} \\prod_i (1 + t / b_i)^{-a_i}\\,dt$$
        """
        a, b = q.base_dist.concentration, q.base_dist.rate
        low = b.log().amin(-1, keepdim=True) - TAIL
        high = b.log().amax(-1, keepdim=True) + TAIL / a.sum(-1, keepdim=True).clamp(min=0.05)
        nodes = torch.linspace(0.0, 1.0, NODES, dtype=a.dtype).reshape(-1, *[1] * a.dim())
        log_t = low + (high - low) * nodes  # (NODES, *batch, 1)
        others = (a * softplus(log_t - b.log())).sum(-1, keepdim=True)
        terms = a.log() + log_t - torch.logaddexp(b.log(), log_t) - others
        return terms.logsumexp(0).softmax(-1)


class WeibullDraws(dist.Weibull):
    """torch's, whose divergence from a gamma is known here."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(WeibullDraws, _instance)
        return super().expand(batch_shape, _instance=new)


class WeibullShares(GammaShares):
    """$z_k \\sim \\mathrm{Gamma}(\\alpha, 1)$ with a Weibull posterior for each topic.

    A Weibull is near to a gamma and has a draw in closed form, $\\lambda (-\\log u)^{1/k}$.

    Args:
        topics, concentration: as of `GammaShares`.

    Reference:
        Zhang, Chen, Guo and Zhou (2018), WHAI: Weibull hybrid autoencoding inference for deep topic
        modeling, eq. 5.
    """

    def posterior(self, h: Tensor) -> Any:
        shape, scale = softplus(h).chunk(2, -1)
        return WeibullDraws(scale + FLOOR, shape + 0.1, validate_args=False).to_event(1)

    def mean(self, q: Any, noise: Tensor) -> Tensor:
        if isinstance(q.base_dist, dist.Gamma):  # the prior
            return super().mean(q, noise)
        fn = q.base_dist
        z = fn.scale * (-noise.unsqueeze(-2).log()) ** (1.0 / fn.concentration)
        return self.shares(z).mean(0)


@register_kl(WeibullDraws, dist.Gamma)
def _kl_weibull_gamma(q: Any, p: Any) -> Tensor:
    k, scale, shape, rate = q.concentration, q.scale, p.concentration, p.rate
    return (
        EULER * shape / k
        - shape * scale.log()
        + k.log()
        + rate * scale * torch.lgamma(1.0 + 1.0 / k).exp()
        - EULER
        - 1.0
        - shape * rate.log()
        + torch.lgamma(shape)
    )
