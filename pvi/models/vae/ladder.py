"""Hierarchies of latents $z_L \\to \\dots \\to z_1 \\to x$, inferred from the top or the bottom."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvi.errors import DataError, ModelError
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.likelihoods import Bernoulli, Likelihood
from pvi.models.vae.posteriors import FLOOR, diagonal
from pvi.models.vae.priors import Prior, Standard
from pvi.nn import MLP, JointMLP
from pvi.nn.mlp import Shape, as_shape

MERGES = ("precision", "residual")


class Hierarchy(LatentVariableModel):
    """The model of `LadderVAE` and `HierarchicalVAE`; their guides differ."""

    latents: tuple[int, ...]
    prior: Prior
    priors: nn.ModuleList
    decoder: nn.Module

    def _generative(
        self,
        shape: Shape,
        latents: Sequence[int],
        likelihood: Likelihood | None,
        prior: Prior | None,
        priors: Sequence[nn.Module] | None,
        decoder: nn.Module | None,
        hidden: Sequence[int],
    ) -> tuple[int, ...]:
        """Make the parts of the model.

        Returns:
            The shape of what an encoder reads of a datum.
        """
        self.shape, self.latents, self.hidden = as_shape(shape), tuple(latents), tuple(hidden)
        if not self.latents:
            raise ModelError("latents must name at least one layer, z_1 first, got none")
        self.likelihood = likelihood or Bernoulli()
        self.prior = prior or Standard(self.latents[-1])
        pairs = zip(self.latents, self.latents[1:], strict=False)
        self.priors = self._layers(
            "priors", priors or [MLP(above, 2 * d, hidden) for d, above in pairs], -1
        )
        numbers = self.likelihood.width * torch.Size(self.shape).numel()
        self.decoder = MLP(self.latents[0], numbers, hidden) if decoder is None else decoder
        return tuple(self.likelihood.features(torch.zeros(1, *self.shape)).shape[1:])

    def _layers(self, name: str, parts: Sequence[nn.Module], more: int = 0) -> nn.ModuleList:
        need = len(self.latents) + more
        if len(parts) != need:
            raise ModelError(
                f"{name} must be {need} networks for {len(self.latents)} layers of latents, z_1 "
                f"first, got {len(parts)}"
            )
        return nn.ModuleList(parts)

    def model(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            z = None
            for level in range(len(self.latents), 0, -1):
                z = pyro.sample(f"z_{level}", self.given(level, z))
            fn = self.decoded(z)
            self.likelihood.learn(fn, x)
            pyro.sample("x", fn, obs=x)

    @abstractmethod
    def guide(self, x: Tensor) -> None:
        """The guide of a batch, with the sites of the model."""

    @abstractmethod
    def means(self, inputs: Tensor) -> list[Tensor]:
        """Means of $z_1, \\dots, z_L$, each at those of the layers it is drawn from.

        Args:
            inputs: the likelihood's features of data.
        """

    @abstractmethod
    def top(self, inputs: Tensor) -> Any:
        """The posterior of $z_L$ as distributions, for priors that are made of these."""

    def given(self, level: int, above: Any) -> Any:
        """$p(z_l \\mid z_{l+1})$ as distributions; $p(z_L)$ at the top.

        Args:
            level: l, from 1 to L.
            above: $z_{l+1}$ `(*batch, d)`; not read at the top.
        """
        if level == len(self.latents):
            return self.prior(self.top)
        return diagonal(self.priors[level - 1](above))

    def decoded(self, z: Any) -> Any:
        """$p(x \\mid z_1)$ as distributions, for z_1 `(*batch, d)`."""
        return self.likelihood(self.decoder(z), self.shape, z.shape[:-1])

    def encode(self, X: Any, y: Any = None, *, level: int = 1) -> Tensor:
        """Means of one layer's latents, given the means of the layers that its guide reads.

        Args:
            X: data, as in `fit`.
            level: of the layer, 1 next to the data to L; or `z_1` by default.

        Returns:
            `(N, latents[level - 1])`.
        """
        self._check_level(level)
        return self.in_batches(
            lambda x: self.means(self.likelihood.features(x))[level - 1], self.data(X)
        )

    def decode(
        self, z: Any, y: Any = None, *, level: int = 1, draw: bool = False, seed: int | None = None
    ) -> Tensor:
        """Means of the data, given the latents of one layer.

        Args:
            z: $z_l$ `(N, latents[level - 1])`.
            level: l, from 1 to L.
            draw: draw the layers below it, rather than take their means.
            seed: makes the draws repeatable.

        Returns:
            `(N, *shape)`.

        Raises:
            DataError: there is no such layer, or z has another shape.
        """
        self._check_level(level)
        z = self.numbers(z, "z")
        if z.dim() != 2 or z.shape[1] != self.latents[level - 1]:
            raise DataError(
                f"z_{level} must have shape (N, {self.latents[level - 1]}), got {tuple(z.shape)}; "
                "level= says of which layer it is"
            )
        return self.in_batches(lambda z: self._down(z, level, draw), z, seed=seed if draw else 0)

    def reconstruct(self, X: Any, y: Any = None, *, level: int = 1) -> Tensor:
        """Means of the data, given what one layer knows of them: `(N, *shape)`.

        Args:
            X: data, as in `fit`.
            level: of the layer; the layers below are at their means given it.
        """
        return self.decode(self.encode(X, level=level), level=level)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        z = self.given(len(self.latents), None).expand([num_samples]).sample()
        return self.decoded(self._below(z, len(self.latents), True))

    def _down(self, z: Tensor, level: int, draw: bool) -> Tensor:
        return self.likelihood.mean(self.decoded(self._below(z, level, draw)))

    def _below(self, z: Tensor, level: int, draw: bool) -> Tensor:
        """$z_1$, from $z_l$."""
        for lower in range(level - 1, 0, -1):
            fn = self.given(lower, z)
            z = fn.sample() if draw else fn.mean
        return z

    def _check_level(self, level: int) -> None:
        if level not in range(1, len(self.latents) + 1):
            raise DataError(f"level must be from 1 to {len(self.latents)}, got {level!r}")


class LadderVAE(Hierarchy):
    """Layers of latents that are inferred from the top down, in the model's order.

    $$p(x, z) = p(z_L) \\prod_{l<L} p(z_l \\mid z_{l+1})\\, p(x \\mid z_1), \\qquad
    q(z \\mid x) = q(z_L \\mid x) \\prod_{l<L} q(z_l \\mid z_{l+1}, x)$$
    so that each layer's KL is in closed form, given a draw of the layer above. An upward pass
    $d_l = \\mathrm{encoder}_l(d_{l-1})$ from $d_0 = x$ tells each layer of the data. Its head gives
    $\\hat m_l, \\hat s_l$, and with $p(z_l \\mid z_{l+1}) = N(m, s^2)$ the posterior is

    - `merge="precision"`: their product, $N\\big(\\sigma^2 (\\hat m_l \\hat s_l^{-2} + m s^{-2}),
      \\sigma^2\\big)$ with $\\sigma^{-2} = \\hat s_l^{-2} + s^{-2}$;
    - `merge="residual"`: $N(m + s\\, \\hat m_l, (s\\, \\hat s_l)^2)$; here heads
      also read $z_{l+1}$.

    Args:
        shape: of a datum, `D` or `(C, H, W)`.
        latents: numbers of $z_1, \\dots, z_L$, the layer next to the data first.
        encoders: L networks, the first from the likelihood's features of a datum.
        heads: L networks from `(*batch, features)` to `2 * latents[l]` numbers, the means and the
            scales before softplus; with "residual", all but the last take $d_l$ and $z_{l+1}$.
        priors: L - 1 networks from $z_{l+1}$ to `2 * latents[l]` numbers.
        decoder: from $z_1$ to `likelihood.width` numbers for each element.
        likelihood: `Bernoulli` by default.
        prior: of $z_L$, `Standard` by default.
        merge: "precision" or "residual".
        features: numbers that default encoders give.
        hidden: units of the hidden layers of default networks, each an `MLP`.

    Raises:
        ModelError: a list of networks has another length than the layers, or merge is unknown.

    Reference:
        Sonderby et al. (2016), Ladder Variational Autoencoders; residual: Vahdat and
        Kautz (2020), NVAE, section 3.2, where the shift is not in units of s.
    """

    def __init__(
        self,
        shape: Shape,
        latents: Sequence[int] = (20, 10),
        *,
        encoders: Sequence[nn.Module] | None = None,
        heads: Sequence[nn.Module] | None = None,
        priors: Sequence[nn.Module] | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        merge: str = "precision",
        features: int = 128,
        hidden: Sequence[int] = (256,),
    ):
        super().__init__()
        if merge not in MERGES:
            raise ModelError(f"merge must be one of {MERGES}, got {merge!r}")
        self.merge, self.features = merge, features
        seen = self._generative(shape, latents, likelihood, prior, priors, decoder, hidden)
        reads = [seen, *[features] * (len(self.latents) - 1)]
        encoders = encoders or [MLP(n, features, hidden) for n in reads]
        self.encoders = self._layers("encoders", encoders)
        self.heads = self._layers("heads", heads or self._heads(features))

    def _heads(self, features: int) -> list[nn.Module]:
        above = self.latents[1:] if self.merge == "residual" else ()
        lower = [JointMLP((features, a), 2 * d, ()) for d, a in zip(self.latents, above)]  # noqa: B905
        return [*lower, *(MLP(features, 2 * d, ()) for d in self.latents[len(lower) :])]

    def guide(self, x: Tensor) -> None:
        self.registered()
        seen = self._upward(self.likelihood.features(x))
        with pyro.plate("data", len(x)):
            z = None
            for level in range(len(self.latents), 0, -1):
                z = pyro.sample(f"z_{level}", self.inferred(level, seen, z))

    def inferred(self, level: int, seen: list[Tensor], above: Any) -> Any:
        """$q(z_l \\mid z_{l+1}, x)$ as distributions.

        Args:
            level: l, from 1 to L.
            seen: $d_1, \\dots, d_L$, each `(*batch, features)`.
            above: $z_{l+1}$ `(*batch, d)`; not read at the top.
        """
        head, d = self.heads[level - 1], seen[level - 1]
        if level == len(self.latents):
            return diagonal(head(d))
        prior = self.given(level, above).base_dist
        if self.merge == "residual":
            loc, raw = head(d, above).chunk(2, -1)
            scale = prior.scale * (softplus(raw) + FLOOR)
            return dist.Normal(prior.loc + prior.scale * loc, scale).to_event(1)
        own = diagonal(head(d)).base_dist
        precision, before = own.scale**-2, prior.scale**-2
        variance = 1 / (precision + before)
        loc = variance * (own.loc * precision + prior.loc * before)
        return dist.Normal(loc, variance.sqrt()).to_event(1)

    def top(self, inputs: Tensor) -> Any:
        return self.inferred(len(self.latents), self._upward(inputs), None)

    def means(self, inputs: Tensor) -> list[Tensor]:
        seen, found, z = self._upward(inputs), [], None
        for level in range(len(self.latents), 0, -1):
            z = self.inferred(level, seen, z).mean
            found.insert(0, z)
        return found

    def _upward(self, inputs: Tensor) -> list[Tensor]:
        found = []
        for encoder in self.encoders:
            inputs = encoder(inputs)
            found.append(inputs)
        return found


class HierarchicalVAE(Hierarchy):
    """Layers of latents that are inferred from the bottom up, as in the paper of IWAE.

    $$p(x, z) = p(z_L) \\prod_{l<L} p(z_l \\mid z_{l+1})\\, p(x \\mid z_1), \\qquad
    q(z \\mid x) = q(z_1 \\mid x) \\prod_{l<L} q(z_{l+1} \\mid z_l)$$
    The guide draws $z_1$ before $z_2$, on which the prior of $z_1$ depends: a KL in closed form
    would be of a prior at a draw that has seen $z_1$. So `TraceMeanFieldELBO` takes it for $z_L$
    only, and samples the others.

    Args:
        shape: of a datum, `D` or `(C, H, W)`.
        latents: numbers of $z_1, \\dots, z_L$, the layer next to the data first.
        encoders: L networks to `2 * latents[l]` numbers, the means and the scales before softplus:
            the first from the likelihood's features of a datum, the next from $z_1$, and so on.
        priors: L - 1 networks from $z_{l+1}$ to `2 * latents[l]` numbers.
        decoder: from $z_1$ to `likelihood.width` numbers for each element.
        likelihood: `Bernoulli` by default.
        prior: of $z_L$, `Standard` by default.
        hidden: units of the hidden layers of default networks, each an `MLP`.

    Raises:
        ModelError: a list of networks has another length than the layers.

    Reference:
        Burda, Grosse, Salakhutdinov (2016), Importance Weighted Autoencoders.
    """

    def __init__(
        self,
        shape: Shape,
        latents: Sequence[int] = (100, 50),
        *,
        encoders: Sequence[nn.Module] | None = None,
        priors: Sequence[nn.Module] | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        hidden: Sequence[int] = (200, 200),
    ):
        super().__init__()
        seen = self._generative(shape, latents, likelihood, prior, priors, decoder, hidden)
        reads = [seen, *self.latents[:-1]]
        pairs = zip(reads, self.latents, strict=True)
        self.encoders = self._layers(
            "encoders", encoders or [MLP(n, 2 * d, hidden) for n, d in pairs]
        )

    def guide(self, x: Tensor) -> None:
        self.registered()
        below: Any = self.likelihood.features(x)
        with pyro.plate("data", len(x)):
            for level, encoder in enumerate(self.encoders, 1):
                below = pyro.sample(f"z_{level}", diagonal(encoder(below)))

    def top(self, inputs: Tensor) -> Any:
        *lower, last = self.encoders
        for encoder in lower:
            inputs = diagonal(encoder(inputs)).mean  # a draw would be another prior each time
        return diagonal(last(inputs))

    def means(self, inputs: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for encoder in self.encoders:
            inputs = diagonal(encoder(inputs)).mean
            found.append(inputs)
        return found
