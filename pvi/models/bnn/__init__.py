"""Bayesian neural networks: any module with random weights, as a Pyro model."""

from pvi.models.bnn.bayesian import BayesianModule, bayesianize
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
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "Pretrained",
    "Prior",
    "ScaleMixture",
    "StudentT",
    "Weight",
    "bayesianize",
    "last_layer",
    "weights",
]
