"""Likelihoods $p(x \\mid h)$ of the elements of a datum, given the decoder's numbers $h$.

A decoder gives `width` numbers for each element of a datum, as `(*batch, width, *shape)` or
anything that can be reshaped so (a convolutional one has `width * channels` channels).
"""

import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvi.errors import ModelError
from pvi.models.support import check_support
from pvi.nn import Component

FLOOR = 1e-4  # of scales
COUNTS = "whole numbers from 0"
NEAR = 0.03  # a logit of 0: series are as precise
MOMENTUM = 0.05  # share of a step in a running mean


class Likelihood(Component):
    """How data are distributed around what is decoded.

    `width` is how many numbers the decoder gives for each element. `watched` are those that can do
    without latents: a fit then looks whether these are used.
    """

    width: int = 1
    watched: bool = False
    values: str  # what the data may be, in words
    advice: str = "Use another likelihood."  # what to do about others

    @abstractmethod
    def elements(self, h: Tensor) -> Any:
        """The distribution of single elements.

        Args:
            h: `(width, *batch, *shape)`.

        Returns:
            A distribution of batch shape `(*batch, *shape)`.
        """

    @abstractmethod
    def supports(self, x: Tensor) -> Tensor:
        """Which elements of x have a density, elementwise."""

    def features(self, x: Tensor) -> Tensor:
        """What the encoder reads in the place of x."""
        return x

    def forward(
        self, h: Tensor, shape: tuple[int, ...], batch: tuple[int, ...] | None = None
    ) -> Any:
        """The distribution of a datum.

        Args:
            h: what the decoder gives, `(*batch, *any)` with `width` numbers for each element.
            shape: of a datum.
            batch: where it is known; else it is told from the other shapes, and with a width of 1
                there must be no dimension for it.

        Returns:
            Batch shape `(*batch)`, event shape `shape`.
        """
        batch = batch_of(h, self.width, shape, batch)
        h = h.reshape(*batch, self.width, *shape).movedim(-1 - len(shape), 0)
        return self.elements(h).to_event(len(shape))

    def mean(self, fn: Any) -> Tensor:
        """What is shown of a distribution `forward` has made: its mean, `(*batch, *shape)`."""
        return fn.mean

    def learn(self, fn: Any, x: Tensor) -> None:
        """Take note of data and their distribution in a step of a fit, outside of the gradient.

        Runs without gradients are no steps: looks at the model, which must find it unchanged.
        """

    def check(self, x: Tensor) -> None:
        """Refuse data that have no density.

        Raises:
            DataError: naming the first element, and what to do.
        """
        kind = type(self).__name__
        check_support(kind, self.values, self.advice, self.supports(x), x)


def batch_of(
    h: Tensor, width: int, shape: tuple[int, ...], batch: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The batch dimensions of what a decoder gives, `batch` where they are known."""
    need = width * torch.Size(shape).numel()
    if batch is not None:
        found = len(batch) if tuple(h.shape[: len(batch)]) == tuple(batch) else None
    elif tuple(h.shape[-len(shape) :]) == (width * shape[0], *shape[1:]):  # with sides of 1 too
        found = h.dim() - len(shape)
    else:
        ends = range(h.dim() - 1, -1, -1)
        found = next((i for i in ends if h.shape[i:].numel() == need), None)
    if found is None or h.shape[found:].numel() != need:
        raise ModelError(
            f"the decoder gives a tensor of shape {tuple(h.shape)}; it must end in {need:,} "
            f"numbers for each datum ({width} for each element of shape {shape})"
            + (f", after the batch dimensions {tuple(batch)} of the latents" if batch else "")
        )
    return tuple(h.shape[:found])


class Bernoulli(Likelihood):
    """$p(x) = \\sigma(h)^x \\sigma(-h)^{1-x}$ for x of 0 and 1."""

    values = "values of 0 or 1"
    advice = "Make them so (X > 0.5), or use ContinuousBernoulli for values between."

    def elements(self, h: Tensor) -> Any:
        return dist.Bernoulli(logits=h[0])

    def supports(self, x: Tensor) -> Tensor:
        return (x == 0) | (x == 1)


class ContinuousBernoulliDistribution(dist.ContinuousBernoulli):
    """torch's, by the logit h, which stays right where $\\sigma(h)$ rounds to 0, 1/2 or 1.

    $$\\log p(x) = x h - \\log(1 + e^h) + \\log\\frac{h}{\\tanh(h / 2)}$$
    """

    @property
    def mean(self) -> Tensor:
        h, safe, small = self._logit()
        return torch.where(small, 0.5 + h / 12, -1.0 / torch.expm1(-safe) - 1.0 / safe)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        h, safe, small = self._logit()
        log_norm = torch.where(
            small, math.log(2.0) + h.square() / 12, (safe / torch.tanh(safe / 2)).log()
        )
        return value * h - softplus(h) + log_norm

    def icdf(self, value: Tensor) -> Tensor:
        h = self.logits
        a = -h.abs().clamp(min=1e-6)
        u = torch.where(h > 0, 1.0 - value, value)
        x = (torch.log1p(u * torch.expm1(a)) / a).clamp(max=1.0)
        return torch.where(h > 0, 1.0 - x, x)

    def _logit(self) -> tuple[Tensor, Tensor, Tensor]:
        """h, the same away from 0, and where that differs."""
        small = self.logits.abs() < NEAR
        return self.logits, self.logits.masked_fill(small, NEAR), small


class ContinuousBernoulli(Likelihood):
    """$p(x) = C(\\lambda) \\lambda^x (1-\\lambda)^{1-x}$ (Loaiza-Ganem and Cunningham 2019)."""

    values = "values from 0 to 1"
    advice = "Scale them to this range (X / 255 for pixels), or use Gaussian."

    def elements(self, h: Tensor) -> Any:
        return ContinuousBernoulliDistribution(logits=h[0])

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)


class Gaussian(Likelihood):
    """$N(h, s^2)$.

    Args:
        scale: s, a number; "learned" for one parameter; "decoded" for one for each element, from
            the decoder; "optimal" for the root of the mean squared error (Rybkin et al. 2021,
            eq. 6) as a running mean over the steps of a fit, which has no gradient.
    """

    values = "finite values"
    running: Tensor

    def __init__(self, scale: float | str = "learned"):
        super().__init__()
        self.scale = scale
        self.width = 2 if scale == "decoded" else 1
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif scale == "optimal":
            self.register_buffer("running", torch.ones(()))
        elif scale != "decoded" and not (isinstance(scale, float | int) and scale > 0):
            raise ModelError(f"scale must be > 0, 'learned', 'decoded' or 'optimal', got {scale!r}")

    def elements(self, h: Tensor) -> Any:
        return self._kind(h[0], self._scale(h))

    _kind = dist.Normal

    def _scale(self, h: Tensor) -> Tensor:
        if self.scale == "decoded":
            return softplus(h[1]) + FLOOR
        if self.scale == "learned":
            return self.log_scale.exp().expand(h[0].shape)
        if self.scale == "optimal":
            return self.running.clone().expand(h[0].shape)
        return h.new_tensor(self.scale).expand(h[0].shape)

    def learn(self, fn: Any, x: Tensor) -> None:
        if self.scale == "optimal" and self.training and torch.is_grad_enabled():
            now = self._deviation(x - fn.mean.detach())
            self.running.lerp_(now.to(self.running).clamp(min=FLOOR), MOMENTUM)

    @staticmethod
    def _deviation(error: Tensor) -> Tensor:
        """The most likely scale, given errors."""
        return error.square().mean().sqrt()

    def supports(self, x: Tensor) -> Tensor:
        return x.isfinite()


class Laplace(Gaussian):
    """$\\mathrm{Laplace}(h, s)$, the absolute error as a log density.

    Args:
        scale: as of `Gaussian`.
    """

    _kind = dist.Laplace

    @staticmethod
    def _deviation(error: Tensor) -> Tensor:
        return error.abs().mean()


class Categorical(Likelihood):
    """Each element one of `num_classes` classes, 0, 1, ...

    Args:
        num_classes: how many.
    """

    values = "whole numbers, one for each class from 0"
    advice = "Number the classes from 0, or give num_classes another value."

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = self.width = num_classes

    def elements(self, h: Tensor) -> Any:
        return dist.Categorical(logits=h.movedim(0, -1))

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x < self.num_classes) & (x == x.floor())

    def features(self, x: Tensor) -> Tensor:
        """One-hot, in the last dimension."""
        return nn.functional.one_hot(x.long(), self.num_classes).to(torch.get_default_dtype())

    def mean(self, fn: Any) -> Tensor:
        """The most probable class."""
        return fn.base_dist.probs.argmax(-1)


class Poisson(Likelihood):
    """Counts of rate softplus(h)."""

    values = COUNTS
    advice = "Use Gaussian for values that are no counts."

    def elements(self, h: Tensor) -> Any:
        return dist.Poisson(softplus(h[0]) + FLOOR)

    def supports(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x == x.floor()) & x.isfinite()

    def features(self, x: Tensor) -> Tensor:
        return x.log1p()
