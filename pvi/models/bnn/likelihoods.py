"""Likelihoods $p(y \\mid f(x))$ of the targets of a datum, given the network's numbers."""

import copy
from abc import abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pvi.errors import ModelError
from pvi.models.support import check_support
from pvi.nn import Component

FLOOR = 1e-4  # of scales
COUNTS = "whole numbers from 0"
Latents = dict[str, Tensor]


class Likelihood(Component):
    """How targets are distributed around what the network gives for a datum.

    `width` is how many numbers the network must give for each target: those of one kind for all
    targets come first, as `(..., width * targets)`.
    """

    width: int = 1
    values: str  # what targets may be, in words
    advice: str = "Use another likelihood."  # what to do about others

    @abstractmethod
    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        """The distribution of single targets.

        Args:
            h: `(width, *batch)` or, with several targets, `(width, *batch, targets)`.
            latents: of `latents`.
        """

    @abstractmethod
    def supports(self, y: Tensor) -> Tensor:
        """Which targets have a density, elementwise."""

    def latents(self, f: Tensor) -> Latents:
        """Sample what the likelihood has for unknowns that all data share.

        Args:
            f: what the network gives, for its device and the number of targets.
        """
        return {}

    def forward(self, f: Tensor, **latents: Tensor) -> Any:
        """The distribution of the targets of each datum.

        Args:
            f: what the network gives, `(*batch, width * targets)`.
            latents: what `latents` gave.

        Returns:
            Batch shape `(*batch)`; event shape `()` for one target, else `(targets)`.
        """
        targets = self.targets(f)
        h = f.reshape(*f.shape[:-1], self.width, targets).movedim(-2, 0)
        if targets == 1:
            return self.elements(h.squeeze(-1), **latents)
        return self.elements(h, **latents).to_event(1)

    def targets(self, f: Tensor) -> int:
        """How many targets the network's numbers are for."""
        if f.shape[-1] % self.width or not f.shape[-1]:
            raise ModelError(
                f"the module gives {f.shape[-1]} numbers for a datum, but {type(self).__name__} "
                f"needs {self.width} for each target"
            )
        return f.shape[-1] // self.width

    def check(self, y: Tensor) -> None:
        """Refuse targets that have no density.

        Raises:
            DataError: naming the first, and what to do.
        """
        kind = type(self).__name__
        check_support(kind, self.values, self.advice, self.supports(y), y, "y")

    def _shared(self, name: str, prior: Any, f: Tensor) -> Latents:
        """One positive unknown for each target."""
        targets = self.targets(f)
        fn = prior.expand([targets]).to_event(1) if targets > 1 else prior
        return {name: pyro.sample(name, fn).to(f)}


class Gaussian(Likelihood):
    """$N(f, s^2)$.

    Args:
        scale: s. `None` for a latent one of each target, the site "noise"; a number; or "decoded"
            for a second number of the network's for each target, $s = \\mathrm{softplus}(h)$.
        prior: of a latent scale; by default the logarithm is N(-1, 1), for targets that are
            standardised: between 0.05 and 2.6 in 95 %.
    """

    values = "finite values"

    def __init__(self, scale: float | str | None = None, prior: Any = None):
        super().__init__()
        is_number = isinstance(scale, float | int) and scale > 0
        if not (scale is None or scale == "decoded" or is_number):
            raise ModelError(f"scale must be None, a number > 0 or 'decoded', got {scale!r}")
        if prior is not None and scale is not None:
            raise ModelError("prior= is that of a latent scale: leave scale=None")
        self.scale, self.prior = scale, prior
        self.width = 2 if scale == "decoded" else 1

    def latents(self, f: Tensor) -> Latents:
        if self.scale is not None:
            return {}
        prior = self.prior or dist.LogNormal(f.new_tensor(-1.0), f.new_tensor(1.0))
        return self._shared("noise", prior, f)

    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        return dist.Normal(h[0], self._scale(h, **latents))

    def _scale(self, h: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.scale == "decoded":
            return softplus(h[1]) + FLOOR
        return h.new_tensor(self.scale) if noise is None else noise

    def supports(self, y: Tensor) -> Tensor:
        return y.isfinite()


class StudentT(Gaussian):
    """Student's t around f: targets some of which are far out.

    Args:
        df: degrees of freedom, a number, or `None` for the latent site "df" with the prior
            Gamma(2, 0.1) (Juarez and Steel 2010).
        scale, prior: as of `Gaussian`.
    """

    def __init__(self, df: float | None = None, scale: Any = None, prior: Any = None):
        super().__init__(scale, prior)
        if df is not None and not df > 0:
            raise ModelError(f"df must be None or a number > 0, got {df!r}")
        self.df = df

    def latents(self, f: Tensor) -> Latents:
        found = super().latents(f)
        if self.df is None:
            found |= self._shared("df", dist.Gamma(f.new_tensor(2.0), f.new_tensor(0.1)), f)
        return found

    def elements(self, h: Tensor, df: Tensor | None = None, **latents: Tensor) -> Any:
        degrees = h.new_tensor(self.df) if df is None else df
        return dist.StudentT(degrees, h[0], self._scale(h, **latents))


class Categorical(Likelihood):
    """One of `num_classes` classes 0, 1, ..., with a logit of the network's for each.

    Args:
        num_classes: how many.
    """

    values = "whole numbers, one for each class from 0"
    advice = "Number the classes from 0, or give num_classes another value."

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = self.width = num_classes

    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        return dist.Categorical(logits=h.movedim(0, -1))

    def supports(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y < self.num_classes) & (y == y.floor())


class Bernoulli(Likelihood):
    """0 or 1, with f the logit."""

    values = "values of 0 or 1"
    advice = "Use Categorical for more classes."

    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        return dist.Bernoulli(logits=h[0])

    def supports(self, y: Tensor) -> Tensor:
        return (y == 0) | (y == 1)


class Poisson(Likelihood):
    """Counts of rate $e^f$."""

    values = COUNTS
    advice = "Use Gaussian for values that are no counts."

    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        return dist.Poisson(h[0].exp())

    def supports(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y == y.floor()) & y.isfinite()


class NegativeBinomial(Poisson):
    """Counts of mean $m = e^f$ and variance $m + m^2 / r$.

    Args:
        shape: r, a number, or `None` for the latent site "shape", whose logarithm is N(0, 1).
    """

    def __init__(self, shape: float | None = None):
        super().__init__()
        if shape is not None and not shape > 0:
            raise ModelError(f"shape must be None or a number > 0, got {shape!r}")
        self.shape = shape

    def latents(self, f: Tensor) -> Latents:
        if self.shape is not None:
            return {}
        return self._shared("shape", dist.LogNormal(f.new_tensor(0.0), f.new_tensor(1.0)), f)

    def elements(self, h: Tensor, shape: Tensor | None = None, **latents: Tensor) -> Any:
        r = h.new_tensor(self.shape) if shape is None else shape
        return dist.GammaPoisson(r, r * (-h[0]).exp())


class Ordinal(Likelihood):
    """Ordered classes 0, 1, ..., $P(y \\le k) = \\sigma(c_k - f)$ (McCullagh 1980).

    The cut points c are the latent site "cutpoints": the first is $N(-1, 1)$, the logarithms of the
    distances between them are $N(0, 1)$.

    Args:
        num_classes: how many.
    """

    values = "whole numbers, one for each class from 0"
    advice = "Number the classes in their order from 0, or give num_classes another value."

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 2:
            raise ModelError(f"num_classes must be at least 2, got {num_classes!r}")
        self.num_classes = num_classes

    def latents(self, f: Tensor) -> Latents:
        if self.targets(f) > 1:
            raise ModelError("Ordinal is for one target: the module must give one number a datum")
        loc = f.new_zeros(self.num_classes - 1)
        loc[0] = -1.0
        base = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
        fn = dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
        return {"cutpoints": pyro.sample("cutpoints", fn)}

    def elements(self, h: Tensor, **latents: Tensor) -> Any:
        return dist.OrderedLogistic(h[0], latents["cutpoints"])

    def supports(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y < self.num_classes) & (y == y.floor())


def with_prior(likelihood: Likelihood, prior: Any) -> Likelihood:
    """A copy of a likelihood with a latent noise, with another prior of that noise."""
    made: Any = copy.copy(likelihood)
    made.prior = prior
    return made
