"""Normalising flows as priors and posteriors, by zuko."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus
from torch.types import _size

from pvi.guides.flow import FlowDistribution, make_flow
from pvi.models.vae.posteriors import FLOOR, AmortizedPosterior
from pvi.models.vae.priors import Encode, Prior

DRAWS = 64  # in a mean that has no closed form


class FlowDensity(TorchDistribution):
    """$\\log p(z) = \\log N(f(z); 0, I) + \\log|\\det \\partial f / \\partial z|$.

    The density is what zuko computes at once; draws go through the inverse, number by number for
    autoregressive flows.

    Args:
        transform: f.
        zero: zeros `(*batch, d)`.
    """

    has_rsample = True

    def __init__(self, transform: Any, zero: Tensor):
        self.transform, self.zero = transform, zero
        super().__init__(zero.shape[:-1], zero.shape[-1:], validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    def expand(self, batch_shape: _size, _instance: Any = None) -> "FlowDensity":
        shape = torch.Size(batch_shape) + self.event_shape
        return FlowDensity(self.transform, self.zero.expand(shape))

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.zero.shape
        return self.transform.inv(torch.randn_like(self.zero.expand(shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.to(self.zero)  # looks at a model start sites in the default precision
        noise, log_det = self.transform.call_and_ladj(value)
        found = -0.5 * (noise.square() + math.log(2.0 * math.pi)).sum(-1) + log_det
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


class FlowPrior(Prior):
    """A normalising flow, whose density is fast.

    $$\\log p(z) = \\log N(f(z); 0, I) + \\log|\\det \\partial f / \\partial z|$$

    Its draws take one pass for each number where f is autoregressive.

    Args:
        latents: d.
        kind: a class of `zuko.flows`: "NSF", "MAF", ...
        options: of it, such as `transforms=3`, `hidden_features=(64, 64)`.

    Reference:
        Chen et al. (2017), Variational Lossy Autoencoder.
    """

    zero: Tensor

    def __init__(self, latents: int, kind: str = "MAF", options: dict[str, Any] | None = None):
        super().__init__()
        self.latents, self.kind, self.options = latents, kind, options
        self.flow = make_flow(kind, latents, 0, options or {})
        self.register_buffer("zero", torch.zeros(latents), persistent=False)

    def forward(self, encode: Encode) -> Any:
        return FlowDensity(self.flow(None).transform, self.zero)


class Autoregressive(FlowPrior):
    """$p(z) = \\prod_i N(z_i;\\, m_i(z_{<i}), s_i(z_{<i})^2)$ by one masked network.

    Args:
        latents: d.
        hidden: units of its hidden layers.

    Reference:
        Papamakarios, Pavlakou, Murray (2017), Masked Autoregressive Flow for Density Estimation.
    """

    def __init__(self, latents: int, hidden: tuple[int, ...] = (64, 64)):
        super().__init__(latents, "MAF", {"transforms": 1, "hidden_features": tuple(hidden)})
        self.hidden = tuple(hidden)


class FlowPosterior(AmortizedPosterior):
    """$z = m + s \\odot f_h(\\epsilon)$ with m, s and the context h of a flow from the encoder.

    The flow goes in the direction in which draws and their densities are computed at once: with
    "MAF" it is an inverse autoregressive flow, "NSF" has monotonic splines instead.

    Args:
        latents: d.
        context: how many numbers h.
        kind, options: as of `FlowPrior`.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow.
    """

    def __init__(
        self,
        latents: int,
        context: int = 32,
        kind: str = "MAF",
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.latents, self.context, self.kind = latents, context, kind
        self.options = options
        self.width = 2 * latents + context
        self.flow = make_flow(kind, latents, context, options or {})

    def forward(self, h: Tensor) -> Any:
        loc, raw, context = h.split((self.latents, self.latents, self.context), -1)
        return FlowDistribution(self.flow(context).transform, loc, softplus(raw) + FLOOR)

    def mean(self, fn: Any) -> Tensor:
        """The mean of 64 draws."""
        return fn.sample((DRAWS,)).mean(0)
