"""Autoregressive distributions of data: as a likelihood given latents, and as a model."""

import math
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.types import _size

from pvi.errors import ModelError
from pvi.models.vae.exact import ExactModel
from pvi.models.vae.likelihoods import Bernoulli, Likelihood, batch_of
from pvi.nn import MADE, PixelCNN
from pvi.nn.mlp import Shape, as_shape


class AutoregressiveDistribution(TorchDistribution):
    """$\\log p(x \\mid c) = \\sum_i \\log p(x_i \\mid x_{<i}, c)$, in nats.

    The density takes one pass of the network, a draw one for each element.

    Args:
        network: a masked network such as `MADE`, with its `order`.
        part: the likelihood of single elements, given the network's numbers.
        shape: of a datum.
        batch: the batch shape.
        context: `(*batch, context, *shape)`, or `None`.
    """

    has_rsample = False

    def __init__(
        self,
        network: Any,
        part: Likelihood,
        shape: tuple[int, ...],
        batch: _size = torch.Size(),  # noqa: B008
        context: Tensor | None = None,
    ):
        self.network, self.part, self.context = network, part, context
        super().__init__(torch.Size(batch), torch.Size(shape), validate_args=False)

    @property
    def arg_constraints(self) -> dict:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        like = self.part.elements(torch.zeros(self.part.width, *self.event_shape))
        return constraints.independent(like.support, len(self.event_shape))

    def expand(self, batch_shape: _size, _instance: Any = None) -> "AutoregressiveDistribution":
        batch, context = torch.Size(batch_shape), self.context
        if context is not None:
            context = context.expand(*batch, *context.shape[-1 - len(self.event_shape) :])
        shape = tuple(self.event_shape)
        return AutoregressiveDistribution(self.network, self.part, shape, batch, context)

    def given(self, value: Tensor) -> Any:
        """The distributions of all elements, each given those of `value` before it.

        Args:
            value: `(*any, *batch, *shape)`.
        """
        h, n = self.network(self.part.features(value), self.context), len(self.event_shape)
        return self.part(h.flatten(-1 - n, -n), tuple(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        found = self.given(value).log_prob(value)
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return found.expand(torch.broadcast_shapes(lead, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        like = next(self.network.parameters())
        x = like.new_zeros(self._extended_shape(sample_shape))
        flat = x.view(*x.shape[: x.dim() - len(self.event_shape)], -1)
        for i in self.network.order.tolist():
            flat[..., i] = self.given(x).sample().reshape(flat.shape)[..., i]
        return x


class AutoregressiveLikelihood(Likelihood):
    """$p(x \\mid h) = \\prod_i p(x_i \\mid x_{<i}, h_i)$: a decoder that sees what it has written.

    With it, a VAE's latents have to say only what the elements before do not. A network that needs
    no latents will leave them without meaning: look at `pvi.latents(model.fit_)`; `fit` looks too,
    and notes what it found in `fit_.notes`.

    Args:
        shape: of a datum.
        part: the likelihood of an element; `Bernoulli` by default.
        network: `PixelCNN` for images `(C, H, W)`, else `MADE`, by default; with `context` numbers
            for each element.
        context: how many numbers the decoder gives for each element.

    Reference:
        Gulrajani et al. (2017), PixelVAE; Chen et al. (2017), Variational Lossy Autoencoder.
    """

    watched = True

    def __init__(
        self,
        shape: Shape,
        part: Likelihood | None = None,
        network: nn.Module | None = None,
        context: int = 1,
    ):
        super().__init__()
        self.shape, self.part = as_shape(shape), part or Bernoulli()
        self.context = self.width = context
        self.values = self.part.values
        check_part(self.part)
        if network is None:
            network = masked_network(self.shape, self.part, context)
        self.network = network

    def elements(self, h: Tensor) -> Any:
        raise ModelError("the elements of an AutoregressiveLikelihood are not independent")

    def forward(
        self, h: Tensor, shape: tuple[int, ...], batch: tuple[int, ...] | None = None
    ) -> Any:
        batch = batch_of(h, self.context, shape, batch)
        h = h.reshape(*batch, self.context, *shape)
        return AutoregressiveDistribution(self.network, self.part, self.shape, batch, h)

    def mean(self, fn: Any) -> Tensor:
        """A draw: the mean has no closed form."""
        return fn.sample()

    def features(self, x: Tensor) -> Tensor:
        return self.part.features(x)

    def supports(self, x: Tensor) -> Tensor:
        return self.part.supports(x)


class AutoregressiveModel(ExactModel):
    """$\\log p(x) = \\sum_i \\log p(x_i \\mid x_{<i})$: no latents, so the bound is the evidence.

    Args:
        shape: of a datum, `D` or `(C, H, W)`.
        likelihood: of an element; `Bernoulli` by default.
        network: from (features of x) to `likelihood.width` numbers for each element, with an
            `order`; `PixelCNN` for images `(C, H, W)`, else `MADE`, by default.

    Reference:
        Germain et al. (2015); van den Oord et al. (2016).
    """

    def __init__(
        self,
        shape: Shape,
        *,
        likelihood: Likelihood | None = None,
        network: nn.Module | None = None,
    ):
        super().__init__()
        self.shape, self.likelihood = as_shape(shape), likelihood or Bernoulli()
        check_part(self.likelihood)
        if network is None:
            network = masked_network(self.shape, self.likelihood)
        self.network = network

    @property
    def density(self) -> AutoregressiveDistribution:
        """p(x), batch shape `()`."""
        return AutoregressiveDistribution(self.network, self.likelihood, self.shape)

    def model(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.density, obs=x)

    def log_density(self, x: Tensor) -> Tensor:
        return self.density.log_prob(x)

    def draws(self, num_samples: int) -> Tensor:
        return self.density.sample((num_samples,))


def masked_network(shape: tuple[int, ...], part: Likelihood, context: int = 0) -> nn.Module:
    """The default network for elements of a likelihood.

    Args:
        shape: of a datum.
        part: the likelihood of an element.
        context: numbers for each element that are given besides.
    """
    seen = part.features(torch.zeros(1, *shape))
    kind = PixelCNN if len(shape) == 3 else MADE
    features = seen.numel() // math.prod(shape)
    return kind(shape, part.width, features=features, context=context)


def check_part(part: Likelihood) -> None:
    """Refuse a likelihood that is no distribution of single elements with parameters of its own.

    Raises:
        ModelError: naming it.
    """
    if getattr(part, "scale", None) == "optimal" or isinstance(part, AutoregressiveLikelihood):
        raise ModelError(
            f"{type(part).__name__} can't be the likelihood of an element here: use one of single "
            "elements, and scale='learned' or 'decoded' in the place of 'optimal'"
        )
