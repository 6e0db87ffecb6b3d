"""The variational autoencoder."""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pvi
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.likelihoods import Bernoulli, Likelihood
from pvi.models.vae.posteriors import AmortizedPosterior, Diagonal
from pvi.models.vae.priors import Prior, Standard
from pvi.nn import MLP
from pvi.nn.mlp import Shape, as_shape


class VAE(LatentVariableModel):
    """$z \\sim p(z)$, $x \\sim p(x \\mid \\mathrm{decoder}(z))$, $q(z \\mid x)$ from an encoder.

    $$\\mathcal L(x) = E_{q(z \\mid x)}[\\log p(x \\mid z)] - \\mathrm{KL}(q(z \\mid x) \\| p(z))$$

    Other members of the family are other arguments: `likelihood`, `prior`, `posterior`, and the
    objective of `fit`: `pvi.IWAE(50)`, `pvi.ELBO(weighting=pvi.BetaTC(6.0))`, ...

    Args:
        shape: of a datum, `D` or `(C, H, W)`.
        latents: d.
        encoder: from the likelihood's features of a datum, by default the datum itself, to
            `posterior.width` numbers; `MLP` by default.
        decoder: from `(*batch, d)` to `likelihood.width` numbers for each element; `MLP` by
            default.
        likelihood, prior, posterior: parts from `pvi.models.vae`, or others like them; `Bernoulli`,
            `Standard` and `Diagonal` by default.
        hidden: units of the hidden layers of default networks.
        beta: weight of the KL where `fit` is given no objective (Higgins et al. 2017).

    Reference:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes.
    """

    def __init__(
        self,
        shape: Shape,
        latents: int = 20,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        posterior: AmortizedPosterior | None = None,
        hidden: Sequence[int] = (256, 256),
        beta: float = 1.0,
    ):
        super().__init__()
        self.shape, self.latents, self.hidden = as_shape(shape), latents, tuple(hidden)
        self.beta = beta
        self.likelihood = likelihood or Bernoulli()
        self.prior = prior or Standard(latents)
        self.posterior = posterior or Diagonal(latents)
        seen = tuple(self.likelihood.features(torch.zeros(1, *self.shape)).shape[1:])
        numbers = self.likelihood.width * torch.Size(self.shape).numel()
        self.encoder = MLP(seen, self.posterior.width, hidden) if encoder is None else encoder
        self.decoder = MLP(latents, numbers, hidden) if decoder is None else decoder

    def objective(self) -> pvi.Objective:
        return pvi.BetaELBO(self.beta, kl="exact")

    def model(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(self.inferred))
            fn = self.decoded(z)
            self.likelihood.learn(fn, x)
            self.besides(x, z, fn)
            pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoded(x))

    def besides(self, x: Tensor, z: Tensor, fn: Any) -> None:
        """What the model is to minimise besides, by `pvi.penalty`, inside the plate of the data.

        Args:
            x: data `(B, *shape)`.
            z: latents `(*particles, B, d)`.
            fn: $p(x \\mid z)$ as distributions.
        """

    def encoded(self, x: Tensor) -> Any:
        """$q(z \\mid x)$ as distributions, for x `(*batch, *shape)`."""
        return self.inferred(self.likelihood.features(x))

    def inferred(self, inputs: Tensor) -> Any:
        """The posteriors for inputs of the encoder."""
        return self.posterior(self.encoder(inputs))

    def decoded(self, z: Tensor) -> Any:
        """$p(x \\mid z)$ as distributions, for z `(*batch, d)`."""
        return self.likelihood(self.decoder(z), self.shape, z.shape[:-1])

    def encode(self, X: Any, y: Any = None) -> Tensor:
        return self.in_batches(lambda x: self.posterior.mean(self.encoded(x)), self.data(X))

    def decode(self, z: Any, y: Any = None) -> Tensor:
        z = self.numbers(z, "z")
        return self.in_batches(lambda z: self.likelihood.mean(self.decoded(z)), z)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        return self.decoded(self.prior(self.inferred).expand([num_samples]).sample())
