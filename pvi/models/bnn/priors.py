"""Priors over the weights of a network."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvi.errors import ModelError
from pvi.models.bnn.selection import Weight
from pvi.nn import Component


class Prior(Component):
    """The distribution of each random tensor of a network before any data.

    It is a program of the tensor: it may sample sites of its own, named after the tensor.
    """

    @abstractmethod
    def forward(self, weight: Weight) -> Any:
        """The distribution of one tensor, with the whole tensor as its event.

        Args:
            weight: its name, its shape and the layer that it belongs to.
        """


def as_prior(prior: Any) -> Prior:
    """A prior, from one, from a distribution of single numbers, or from means and sds by name."""
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, torch.distributions.Distribution):
        return Same(prior)
    if isinstance(prior, Mapping):
        return Normals(prior, FanIn())
    raise ModelError(
        "prior must be one of pvi.models.bnn such as FanIn(), or a distribution of single numbers; "
        f"got {prior!r}"
    )


def normal(loc: Any, scale: Any, weight: Weight) -> Any:
    """Independent normals over a tensor; `loc` and `scale` fit its shape from the right."""
    loc, scale = (torch.as_tensor(x).to(weight.value) for x in (loc, scale))
    shape = torch.broadcast_shapes(loc.shape, scale.shape, weight.shape)
    return dist.Normal(loc.expand(shape), scale.expand(shape)).to_event(len(weight.shape))


def inner(x: Tensor, weight: Weight) -> Tensor:
    """One number for a whole tensor, `(*batch)`, in a shape that broadcasts over the tensor's."""
    return x.reshape(x.shape + (1,) * len(weight.shape))


class Same(Prior):
    """One distribution for every number.

    Args:
        distribution: of a scalar.
    """

    def __init__(self, distribution: Any):
        super().__init__()
        if distribution.batch_shape or distribution.event_shape:
            raise ModelError(
                "a distribution as prior must be that of a single number, but has shape "
                f"{tuple(distribution.shape())}. Write a bnn.Prior for one that differs by weight."
            )
        self.distribution = distribution

    def forward(self, weight: Weight) -> Any:
        return self.distribution.expand(weight.shape).to_event(len(weight.shape))


class FanIn(Prior):
    """$w \\sim N(c, s^2 / n)$, where n weights are summed in an output: functions keep their scale
    however wide the layers are (Neal 1996).

    n is 1 for biases and embeddings; c is 1 for the gains of norms and 0 elsewhere.

    Args:
        scale: s.
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = _positive("scale", scale)

    def forward(self, weight: Weight) -> Any:
        return normal(weight.centre, self.scale / math.sqrt(weight.fan_in), weight)


class Laplace(Prior):
    """Laplace with the means and standard deviations of `FanIn`: more weights near 0 and far out.

    Args:
        scale: s.
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = _positive("scale", scale)

    def forward(self, weight: Weight) -> Any:
        centre = torch.full_like(weight.value, weight.centre)
        b = torch.full_like(centre, self.scale / math.sqrt(2.0 * weight.fan_in))
        return dist.Laplace(centre, b).to_event(len(weight.shape))


class _Mixture(dist.MixtureSameFamily):
    """One of parts whose support is all reals, as its own is then; torch does not tell."""

    support: Any = constraints.real


class ScaleMixture(Prior):
    """$w \\sim \\pi N(0, \\sigma_1^2) + (1 - \\pi) N(0, \\sigma_2^2)$ (Blundell et al. 2015).

    Args:
        pi: share of the first.
        sd1, sd2: standard deviations.
    """

    def __init__(self, pi: float = 0.5, sd1: float = 1.0, sd2: float = math.exp(-6.0)):
        super().__init__()
        if not 0.0 < pi < 1.0:
            raise ModelError(f"pi must be between 0 and 1, got {pi!r}")
        self.pi, self.sd1, self.sd2 = pi, _positive("sd1", sd1), _positive("sd2", sd2)

    def forward(self, weight: Weight) -> Any:
        shares, sds = (
            weight.value.new_tensor(pair).expand(*weight.shape, 2)
            for pair in ([self.pi, 1.0 - self.pi], [self.sd1, self.sd2])
        )
        parts = dist.Normal(torch.full_like(sds, weight.centre), sds)
        mixture = _Mixture(dist.Categorical(shares), parts)
        return mixture.to_event(len(weight.shape))


class Hierarchical(Prior):
    """A latent precision for each tensor: $w \\sim N(c, 1 / (\\tau n))$, $\\tau \\sim
    \\mathrm{Gamma}(a, b)$.

    Its site is named "NAME.precision"; c and n are those of `FanIn`.

    Args:
        shape, rate: a and b.
    """

    def __init__(self, shape: float = 2.0, rate: float = 2.0):
        super().__init__()
        self.shape, self.rate = _positive("shape", shape), _positive("rate", rate)

    def forward(self, weight: Weight) -> Any:
        new = weight.value.new_tensor
        gamma = dist.Gamma(new(self.shape), new(self.rate))
        precision = inner(pyro.sample(f"{weight.name}.precision", gamma), weight)
        return normal(weight.centre, (precision * weight.fan_in).rsqrt(), weight)


class Horseshoe(Prior):
    """$w_i \\sim N(0, \\tau^2 \\lambda_i^2)$ with half-Cauchy $\\lambda_i$ and $\\tau$ (Carvalho,
    Polson, Scott 2010): most weights near 0, some as large as they like.

    Its sites are named "NAME.global" and "NAME.local".

    Args:
        scale: of the half-Cauchy of tau, divided by the root of the fan-in.
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = _positive("scale", scale)

    def forward(self, weight: Weight) -> Any:
        half = dist.HalfCauchy(weight.value.new_tensor(self.scale / math.sqrt(weight.fan_in)))
        tau = inner(pyro.sample(f"{weight.name}.global", half), weight)
        each = dist.HalfCauchy(torch.ones_like(weight.value)).to_event(len(weight.shape))
        local = pyro.sample(f"{weight.name}.local", each)
        return normal(weight.centre, tau * local, weight)


class Normals(Prior):
    """Independent normals of given means and standard deviations.

    Args:
        values: mean and standard deviation of tensors, by name.
        default: the prior of tensors that are not there.
    """

    def __init__(self, values: Mapping[str, tuple[Tensor, Tensor]], default: Prior):
        super().__init__()
        self.values, self.default = dict(values), default

    def forward(self, weight: Weight) -> Any:
        if weight.name not in self.values:
            return self.default(weight)
        return normal(*self.values[weight.name], weight)


class Pretrained(Prior):
    """$w \\sim N(w_0, s^2)$ around given weights.

    Args:
        module: a network with parameters of the same names, whose present values are $w_0$; or a
            dict of tensors.
        scale: s.
    """

    def __init__(self, module: nn.Module | Mapping[str, Tensor], scale: float = 0.1):
        super().__init__()
        values = module.named_parameters() if isinstance(module, nn.Module) else module.items()
        self.values = {name: x.detach().clone() for name, x in values}
        self.scale = _positive("scale", scale)

    def forward(self, weight: Weight) -> Any:
        if weight.name not in self.values:
            raise ModelError(f"Pretrained has no weight '{weight.name}'")
        centre = self.values[weight.name]
        if centre.shape != weight.shape:
            raise ModelError(
                f"Pretrained has '{weight.name}' of shape {tuple(centre.shape)}, but the network's "
                f"is {tuple(weight.shape)}"
            )
        return normal(centre, self.scale, weight)


class EmpiricalBayes(Prior):
    """$w \\sim N(c, s^2)$ with one s for each tensor, learned with the guide (MacKay 1992).

    The parameters are named "NAME.scale" and start from `FanIn(scale)`. They maximise the bound: it
    is one on the evidence of the best prior.

    Args:
        scale: of the start.
    """

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = _positive("scale", scale)

    def forward(self, weight: Weight) -> Any:
        start = weight.value.new_tensor(self.scale / math.sqrt(weight.fan_in))
        scale = pyro.param(f"{weight.name}.scale", start, constraint=constraints.positive)
        return normal(weight.centre, scale, weight)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, float | int) and value > 0):
        raise ModelError(f"{name} must be a number > 0, got {value!r}")
    return value
