"""FactorVAE: the total correlation of the latents as a penalty, by an adversary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pvi
from pvi.models.vae.adversarial import Adversarial
from pvi.models.vae.likelihoods import Likelihood
from pvi.models.vae.posteriors import AmortizedPosterior
from pvi.models.vae.priors import Prior
from pvi.models.vae.vae import VAE
from pvi.nn import MLP
from pvi.nn.mlp import Shape


class FactorVAE(Adversarial, VAE):
    """A VAE whose loss has $\\gamma$ times the total correlation of its latents besides.

    $$\\mathcal L(x) - \\gamma\\,\\mathrm{KL}\\Big(q(z) \\,\\Big\\|\\, \\prod_j q(z_j)\\Big)$$

    where q(z) is the mean of $q(z \\mid x)$ over the data. The divergence is that of the log ratio
    which a discriminator learns between latents and latents whose dimensions are permuted, each
    for itself, over a batch. (In the paper these come from a batch of their own.) It is an
    estimate, no bound; it is recorded as `history["adversary/total_correlation/term"]`, nats.

    Args:
        shape, latents, encoder, decoder, likelihood, prior, posterior, hidden: as of `VAE`.
        gamma: weight of the total correlation of a datum.
        discriminator: from `(n, d)` to `(n, 1)`; an `MLP` by default.
        lr: the discriminator's rate.

    Reference:
        Kim and Mnih (2018), Disentangling by Factorising, equation 2.
    """

    def __init__(
        self,
        shape: Shape,
        latents: int = 10,
        *,
        gamma: float = 10.0,
        discriminator: nn.Module | None = None,
        lr: float = 1e-3,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        posterior: AmortizedPosterior | None = None,
        hidden: Sequence[int] = (256, 256),
    ):
        networks: dict[str, Any] = {"encoder": encoder, "decoder": decoder, "hidden": hidden}
        super().__init__(
            shape, latents, likelihood=likelihood, prior=prior, posterior=posterior, **networks
        )
        self.gamma, self.lr = gamma, lr
        self.adversary = pvi.Adversary(
            MLP(latents, 1, (256, 256, 256)) if discriminator is None else discriminator,
            name="total_correlation",
            loss="ratio",
            weight=gamma,
            lr=lr,
        )

    def besides(self, x: Tensor, z: Tensor, fn: Any) -> None:
        self.adversary(z, permuted)


def permuted(z: Tensor) -> Tensor:
    """Each dimension permuted over the rows, for itself: `(n, d)`."""
    order = torch.rand_like(z).argsort(0)
    return z.gather(0, order)
