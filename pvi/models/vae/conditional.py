"""Autoencoders of data that come with something else: conditions, or some labels."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import pvi
from pvi.errors import DataError, ModelError
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.likelihoods import Bernoulli, Likelihood
from pvi.models.vae.posteriors import AmortizedPosterior, Diagonal
from pvi.nn import MLP, JointMLP
from pvi.nn.mlp import Shape, as_shape

SURE = 1e4  # a logit that leaves no probability to other classes


class _Conditioned(LatentVariableModel):
    """The parts that models with a second input c have in common."""

    def __init__(
        self,
        shape: Shape,
        conditions: int,
        latents: int,
        encoder: nn.Module | None,
        decoder: nn.Module | None,
        likelihood: Likelihood | None,
        posterior: AmortizedPosterior | None,
        hidden: Sequence[int],
    ):
        super().__init__()
        self.shape, self.latents, self.hidden = as_shape(shape), latents, tuple(hidden)
        self.likelihood = likelihood or Bernoulli()
        self.posterior = posterior or Diagonal(latents)
        seen = tuple(self.likelihood.features(torch.zeros(1, *self.shape)).shape[1:])
        numbers = self.likelihood.width * torch.Size(self.shape).numel()
        if encoder is None:
            encoder = JointMLP((seen, conditions), self.posterior.width, hidden)
        if decoder is None:
            decoder = JointMLP((latents, conditions), numbers, hidden)
        self.encoder, self.decoder = encoder, decoder

    def encoded(self, x: Tensor, c: Tensor) -> Any:
        """$q(z \\mid x, c)$ as distributions."""
        return self.posterior(self.encoder(self.likelihood.features(x), c))

    def decoded(self, z: Tensor, c: Tensor) -> Any:
        """$p(x \\mid z, c)$ as distributions."""
        batch = torch.broadcast_shapes(z.shape[:-1], c.shape[:-1])
        return self.likelihood(self.decoder(z, c), self.shape, batch)


class ConditionalVAE(_Conditioned):
    """$z \\sim p(z \\mid c)$, $x \\sim p(x \\mid z, c)$, for data with conditions c.

    The second argument y of the methods holds the conditions: classes `(N,)`, or vectors `(N, C)`.

    Args:
        shape: of a datum.
        classes: how many there are; 0 for conditions that are vectors.
        conditions: length C of these vectors.
        latents, likelihood, posterior, hidden: as of `VAE`.
        encoder: from (features of x, c), by default a `JointMLP`; classes are one-hot.
        decoder: from (z, c).
        learned_prior: p(z | c) is a normal from a network of c, instead of N(0, I).

    Reference:
        Sohn, Lee, Yan (2015), Learning Structured Output Representation using Deep Conditional
        Generative Models.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int = 0,
        *,
        conditions: int = 0,
        latents: int = 20,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        posterior: AmortizedPosterior | None = None,
        hidden: Sequence[int] = (256, 256),
        learned_prior: bool = True,
    ):
        if (classes > 0) == (conditions > 0):
            raise DataError("give either classes, their number, or conditions, their length")
        width = classes or conditions
        super().__init__(shape, width, latents, encoder, decoder, likelihood, posterior, hidden)
        self.classes, self.conditions, self.learned_prior = classes, conditions, learned_prior
        if learned_prior:
            self.prior_network = MLP(width, 2 * latents, hidden)

    def prior(self, c: Tensor) -> Any:
        """$p(z \\mid c)$ as distributions, for conditions `(B, C)`."""
        if self.learned_prior:
            return Diagonal(self.latents)(self.prior_network(c))
        return dist.Normal(c.new_zeros(*c.shape[:-1], self.latents), 1.0).to_event(1)

    def model(self, x: Tensor, c: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(c))
            fn = self.decoded(z, c)
            self.likelihood.learn(fn, x)
            pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoded(x, c))

    def rows(self, X: Any, y: Any = None) -> tuple[Tensor, ...]:
        x = self.data(X)
        return x, self.condition(y, len(x))

    def condition(self, y: Any, number: int) -> Tensor:
        """Conditions as vectors `(N, C)`, classes one-hot.

        Raises:
            DataError: there are none, or others than there should be.
        """
        want = "one class for each row" if self.classes else f"{self.conditions} numbers a row"
        if y is None:
            raise DataError(f"a ConditionalVAE needs y, the conditions: {want}")
        c = self.numbers(y, "y")
        shape = (number,) if self.classes else (number, self.conditions)
        if tuple(c.shape) != shape:
            raise DataError(f"y must have shape {shape}: {want}; got {tuple(c.shape)}")
        if not self.classes:
            if not bool(c.isfinite().all()):
                row = int((~c.isfinite()).any(1).nonzero()[0])
                raise DataError(f"y[{row}] has values that are not finite: drop or impute the row")
            return c
        if not bool(((c >= 0) & (c < self.classes) & (c == c.floor())).all()):
            raise DataError(f"y must be classes from 0 to {self.classes - 1}")
        return one_hot(c.long(), self.classes).to(c)

    def encode(self, X: Any, y: Any = None) -> Tensor:
        return self.in_batches(
            lambda x, c: self.posterior.mean(self.encoded(x, c)), *self.rows(X, y)
        )

    def decode(self, z: Any, y: Any = None) -> Tensor:
        z = self.numbers(z, "z")
        c = self.condition(y, len(z))
        return self.in_batches(lambda z, c: self.likelihood.mean(self.decoded(z, c)), z, c)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        c = self.condition(given[0] if given else None, num_samples)
        return self.decoded(self.prior(c).sample(), c)


class SemiSupervisedVAE(_Conditioned):
    """M2: $y \\sim p(y)$, $z \\sim N(0, I)$, $x \\sim p(x \\mid z, y)$; some labels y are known.

    $$\\mathcal L(x) = \\sum_y q(y \\mid x)\\,[\\mathcal L(x, y) - \\log q(y \\mid x)]$$
    for a row without a label, summed exactly, and $\\mathcal L(x, y)$ for the others. The
    classifier also learns from the labels, by a penalty $-\\alpha \\log q(y \\mid x)$ that is no
    part of the bound. Labels are the second argument y of the methods, -1 where unknown, as in
    scikit-learn. `score_samples` estimates $\\log p(x)$ for a row without a label, summed over
    labels, and $\\log p(x, y)$ for one with a label.

    Args:
        shape: of a datum.
        classes: how many.
        latents, likelihood, posterior, hidden: as of `VAE`.
        encoder, decoder: as of `ConditionalVAE`.
        classifier: from features of x to `classes` logits; `MLP` by default.
        alpha: weight of the penalty of a labelled row; 0.1 N / (labelled rows) in the paper.

    Raises:
        ModelError: the likelihood's scale is "optimal".

    Reference:
        Kingma, Rezende, Mohamed, Welling (2014), Semi-supervised Learning with Deep Generative
        Models, eqs. 6 to 9.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        latents: int = 20,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        classifier: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        posterior: AmortizedPosterior | None = None,
        hidden: Sequence[int] = (256, 256),
        alpha: float = 1.0,
    ):
        super().__init__(shape, classes, latents, encoder, decoder, likelihood, posterior, hidden)
        self.classes, self.alpha = classes, alpha
        if getattr(self.likelihood, "scale", None) == "optimal":
            raise ModelError(
                "scale='optimal' would be the error over all labels, likely or not: use 'learned' "
                "or 'decoded' where labels are summed out"
            )
        seen = tuple(self.likelihood.features(torch.zeros(1, *self.shape)).shape[1:])
        self.classifier = MLP(seen, classes, hidden) if classifier is None else classifier

    def model(self, x: Tensor, y: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.Categorical(logits=x.new_zeros(self.classes)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latents), 1.0).to_event(1))
            fn = self.decoded(z, self._one_hot(label, x))
            self.likelihood.learn(fn, x)
            pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """A known label has all of q(y): the sum over labels is then its term alone."""
        self.registered()
        known = y >= 0
        labels = y.clamp(min=0).long()
        logits = self.classifier(self.likelihood.features(x))
        told = (self._one_hot(labels, logits) - 1.0) * SURE
        with pyro.plate("data", len(x)):
            wrong = cross_entropy(logits, labels, reduction="none")
            pvi.penalty("labels", self.alpha * torch.where(known, wrong, 0.0))
            fn = dist.Categorical(logits=torch.where(known.unsqueeze(-1), told, logits))
            label = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            pyro.sample("z", self.encoded(x, self._one_hot(label, x)))

    def _one_hot(self, label: Tensor, like: Tensor) -> Tensor:
        return one_hot(label.long(), self.classes).to(like)

    def rows(self, X: Any, y: Any = None) -> tuple[Tensor, ...]:
        x = self.data(X)
        return x, self.labels(y, len(x))

    def labels(self, y: Any, number: int, lowest: int = -1) -> Tensor:
        """Labels as whole numbers `(N,)`; -1 for all where there are none.

        Raises:
            DataError: there are others than there should be.
        """
        found = self.numbers([-1] * number if y is None else y, "y")
        good = (found >= lowest) & (found < self.classes) & (found == found.floor())
        if tuple(found.shape) != (number,) or not bool(good.all()):
            unknown = ", or -1 where unknown" if lowest < 0 else ""
            raise DataError(
                f"y must be {number} labels from 0 to {self.classes - 1}{unknown}; got "
                f"shape {tuple(found.shape)}, values {found.unique()[:5].tolist()}"
            )
        return found.long()

    def predict_proba(self, X: Any) -> Tensor:
        """$q(y \\mid x)$ `(N, classes)`.

        Args:
            X: data `(N, *shape)`.
        """
        features = self.likelihood.features
        return self.in_batches(lambda x: self.classifier(features(x)).softmax(-1), self.data(X))

    def predict(self, X: Any) -> Tensor:
        """The most probable label of each datum `(N,)`.

        Args:
            X: data `(N, *shape)`.
        """
        return self.predict_proba(X).argmax(-1)

    def encode(self, X: Any, y: Any = None) -> Tensor:
        """Posterior means of z given the labels y; where there are none, those predicted."""
        return self.in_batches(
            lambda x, y: self.posterior.mean(self.encoded(x, self._one_hot(y, x))),
            *self._completed(X, y),
        )

    def decode(self, z: Any, y: Any = None) -> Tensor:
        if y is None:
            raise DataError("decode needs y, the label of each row of z")
        z = self.numbers(z, "z")
        return self.in_batches(
            lambda z, y: self.likelihood.mean(self.decoded(z, self._one_hot(y, z))),
            z,
            self.labels(y, len(z), lowest=0),
        )

    def reconstruct(self, X: Any, y: Any = None) -> Tensor:
        x, labels = self._completed(X, y)
        return self.decode(self.encode(x, labels), labels)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        like = next(self.parameters())
        z = torch.randn(num_samples, self.latents, dtype=like.dtype, device=like.device)
        if given:
            labels = self.labels(given[0], num_samples, lowest=0)
        else:
            labels = torch.randint(self.classes, (num_samples,), device=z.device)
        return self.decoded(z, self._one_hot(labels, z))

    def _completed(self, X: Any, y: Any) -> tuple[Tensor, ...]:
        """Rows whose unknown labels are those predicted."""
        x, labels = self.rows(X, y)
        known = labels >= 0
        return x, labels if bool(known.all()) else labels.where(known, self.predict(x))
