"""Variational autoencoders, composed from networks, likelihoods, priors and posteriors."""

from pvi.models.vae.autoencoder import KLAutoencoder
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.conditional import ConditionalVAE, SemiSupervisedVAE
from pvi.models.vae.factor import FactorVAE
from pvi.models.vae.gan import GAN
from pvi.models.vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    Laplace,
    Likelihood,
    Poisson,
)
from pvi.models.vae.posteriors import AmortizedPosterior, Diagonal
from pvi.models.vae.priors import Mixture, Prior, Standard
from pvi.models.vae.vae import VAE

__all__ = [
    "GAN",
    "VAE",
    "AmortizedPosterior",
    "Bernoulli",
    "Categorical",
    "ConditionalVAE",
    "ContinuousBernoulli",
    "Diagonal",
    "FactorVAE",
    "Gaussian",
    "KLAutoencoder",
    "Laplace",
    "LatentVariableModel",
    "Likelihood",
    "Mixture",
    "Poisson",
    "Prior",
    "SemiSupervisedVAE",
    "Standard",
]
