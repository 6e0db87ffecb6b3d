"""Bayesian neural networks: any module with random weights, as a Pyro model."""

from pvi.models.bnn.bayesian import BayesianModule, bayesianize
from pvi.models.bnn.continual import posterior_as_prior
from pvi.models.bnn.dropout import MCDropout
from pvi.models.bnn.functions import plot_prior, prior_draws
from pvi.models.bnn.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
)
from pvi.models.bnn.priors import (
    EmpiricalBayes,
    FanIn,
    Hierarchical,
    Horseshoe,
    Laplace,
    Pretrained,
    Prior,
    ScaleMixture,
)
from pvi.models.bnn.rank_one import factors, rank_one
from pvi.models.bnn.selection import Weight, last_layer, weights

__all__ = [
    "BayesianModule",
    "Bernoulli",
    "Categorical",
    "EmpiricalBayes",
    "FanIn",
    "Gaussian",
    "Hierarchical",
    "Horseshoe",
    "Laplace",
    "Likelihood",
    "MCDropout",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Pretrained",
    "Prior",
    "ScaleMixture",
    "StudentT",
    "Weight",
    "bayesianize",
    "factors",
    "last_layer",
    "plot_prior",
    "posterior_as_prior",
    "prior_draws",
    "rank_one",
    "weights",
]
