"""The autoencoder of latent diffusion."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pvi
from pvi.models.vae.adversarial import Adversarial
from pvi.models.vae.likelihoods import Laplace, Likelihood
from pvi.models.vae.posteriors import AmortizedPosterior
from pvi.models.vae.priors import Prior
from pvi.models.vae.vae import VAE
from pvi.nn import ConvDecoder, ConvEncoder, PatchDiscriminator
from pvi.nn.conv import image_shape, sizes


class KLAutoencoder(Adversarial, VAE):
    """A convolutional VAE with maps as latents, next to no KL, and a patch discriminator.

    Its loss is

    $$-E_q[\\log p(x \\mid z)] + \\beta\\,\\mathrm{KL} + w\\,D\\,\\|f(x) - f(\\hat x)\\|^2 / n
    + \\lambda\\,\\mathrm{term}(\\hat x)$$

    with $\\beta = 10^{-6}$, the D numbers of a datum, n features f, and the weight $\\lambda$ set
    in each step by the gradients at the decoder's last weight. That is no bound: `summary` says so
    beside the ELBO at beta = 1, and `score_samples` evaluates the model p(z) p(x | z) as it is,
    which such a training does not aim at.

    There are no features by default: the paper's come from a network trained on photographs
    (LPIPS), which is not part of pvi. The latents are vectors of `channels * height * width`
    numbers, so that every prior and posterior fits; `latent_shape` tells the map.

    Args:
        shape: `(C, H, W)`.
        latent_channels: c of the maps.
        channels: of each level; each halves height and width.
        blocks: residual blocks at each level.
        beta: weight of the KL, what `fit` uses unless it is given an objective.
        features: a fixed network from `(n, C, H, W)` to features; its parameters stay as they are.
        feature_weight: w.
        discriminator: from `(n, C, H, W)` to scores `(n, any)`; `PatchDiscriminator` by default.
        adversary_weight: of the discriminator's term, relative to the rest's gradient.
        adversary_start: epochs before it begins.
        lr: the discriminator's rate.
        encoder, decoder, likelihood, prior, posterior: as of `VAE`; by default `ConvEncoder`,
            `ConvDecoder` and `Laplace`, whose scale is learned.

    Reference:
        Rombach et al. (2022), High-Resolution Image Synthesis with Latent Diffusion Models,
        equation 25; Esser et al. (2021), equation 7.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent_channels: int = 4,
        *,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        beta: float = 1e-6,
        features: nn.Module | None = None,
        feature_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversary_weight: float = 0.5,
        adversary_start: int = 0,
        lr: float = 2e-4,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | None = None,
        posterior: AmortizedPosterior | None = None,
    ):
        image = image_shape(shape)
        c, (h, w) = latent_channels, sizes(image, len(channels))[-1]
        likelihood = likelihood or Laplace()
        width = posterior.width if posterior else 2 * c * h * w
        convs = {"channels": channels, "blocks": blocks}
        seen = tuple(likelihood.features(torch.zeros(1, *image)).shape[1:])
        out = (likelihood.width * image[0], *image[1:])
        numbers = width if width % (h * w) else (width // (h * w), h, w)  # as maps where possible
        encoder = ConvEncoder(seen, numbers, **convs) if encoder is None else encoder
        decoder = ConvDecoder((c, h, w), out, **convs) if decoder is None else decoder
        super().__init__(
            image,
            c * h * w,
            encoder=encoder,
            decoder=decoder,
            likelihood=likelihood,
            prior=prior,
            posterior=posterior,
        )
        self.latent_shape, self.latent_channels = (c, h, w), c
        self.channels, self.blocks, self.beta, self.lr = tuple(channels), blocks, beta, lr
        self.features, self.feature_weight = features, feature_weight
        if features is not None:
            features.requires_grad_(False)
        self.adversary_weight, self.adversary_start = adversary_weight, adversary_start
        if discriminator is None:
            discriminator = PatchDiscriminator(image, channels)
        weights = [p for p in decoder.parameters() if p.dim() > 1]
        self.adversary = pvi.Adversary(
            discriminator,
            name="patches",
            weight=adversary_weight,
            adaptive=weights[-1] if weights else None,
            start=adversary_start,
            unit="epoch",
            event_dim=3,
            lr=lr,
        )

    def objective(self) -> pvi.Objective:
        return pvi.BetaELBO(self.beta, kl="exact")

    def besides(self, x: Tensor, z: Tensor, fn: Any) -> None:
        shown = self.likelihood.mean(fn)
        if self.features is not None:
            pvi.penalty("features", self.feature_weight * self.distance(x, shown))
        self.adversary(shown, x)

    def distance(self, x: Tensor, shown: Tensor) -> Tensor:
        """Mean squared difference of features times the numbers of a datum, `(*batch)`.

        Args:
            x: data `(B, C, H, W)`.
            shown: `(*batch, C, H, W)`, B the last of the batch.
        """
        features: Any = self.features
        features.eval()
        ours = features(shown.reshape(-1, *self.shape)).flatten(1)
        theirs = features(x).flatten(1)
        ours = ours.reshape(*shown.shape[: -len(self.shape)], -1)
        return torch.Size(self.shape).numel() * (ours - theirs).square().mean(-1)
