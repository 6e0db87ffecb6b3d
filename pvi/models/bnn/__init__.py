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
from pvi.models.bnn.training import Recipe, he

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
    "Recipe",
    "ScaleMixture",
    "StudentT",
    "Weight",
    "bayesianize",
    "he",
    "last_layer",
    "weights",
]
