"""Variational autoencoders, composed from networks, likelihoods, priors and posteriors."""

from pvi.models.vae.autoencoder import KLAutoencoder
from pvi.models.vae.autoregressive import AutoregressiveLikelihood, AutoregressiveModel
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.conditional import ConditionalVAE, SemiSupervisedVAE
from pvi.models.vae.counts import (
    DiscretizedLogistic,
    NegativeBinomial,
    ZeroInflatedNegativeBinomial,
)
from pvi.models.vae.diffusion import DiffusionVAE, NoiseSchedule
from pvi.models.vae.exact import ExactModel
from pvi.models.vae.factor import FactorVAE
from pvi.models.vae.flow_model import FlowModel
from pvi.models.vae.flows import Autoregressive, FlowPosterior, FlowPrior
from pvi.models.vae.gan import GAN
from pvi.models.vae.ladder import HierarchicalVAE, LadderVAE
from pvi.models.vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    Laplace,
    Likelihood,
    Poisson,
)
from pvi.models.vae.posteriors import AmortizedPosterior, Diagonal, FullCovariance
from pvi.models.vae.priors import Mixture, Prior, Standard, Vamp
from pvi.models.vae.vae import VAE
from pvi.models.vae.vq import VQVAE

__all__ = [
    "GAN",
    "VAE",
    "VQVAE",
    "AmortizedPosterior",
    "Autoregressive",
    "AutoregressiveLikelihood",
    "AutoregressiveModel",
    "Bernoulli",
    "Categorical",
    "ConditionalVAE",
    "ContinuousBernoulli",
    "Diagonal",
    "DiffusionVAE",
    "DiscretizedLogistic",
    "ExactModel",
    "FactorVAE",
    "FlowModel",
    "FlowPosterior",
    "FlowPrior",
    "FullCovariance",
    "Gaussian",
    "HierarchicalVAE",
    "KLAutoencoder",
    "LadderVAE",
    "Laplace",
    "LatentVariableModel",
    "Likelihood",
    "Mixture",
    "NegativeBinomial",
    "NoiseSchedule",
    "Poisson",
    "Prior",
    "SemiSupervisedVAE",
    "Standard",
    "Vamp",
    "ZeroInflatedNegativeBinomial",
]
