"""Bayesian neural networks: any module with random weights, as a Pyro model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pvi.models.bnn import metrics
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
from pvi.models.bnn.training import Recipe, he

if TYPE_CHECKING:
    from pvi.models.bnn.classifier import BNNClassifier
    from pvi.models.bnn.regressor import BNNRegressor

__all__ = [
    "BNNClassifier",
    "BNNRegressor",
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
    "Recipe",
    "ScaleMixture",
    "StudentT",
    "Weight",
    "bayesianize",
    "factors",
    "he",
    "last_layer",
    "metrics",
    "plot_prior",
    "posterior_as_prior",
    "prior_draws",
    "rank_one",
    "weights",
]


ESTIMATORS = {"BNNClassifier": "classifier", "BNNRegressor": "regressor"}


def __getattr__(name: str) -> Any:
    """The estimators, which need scikit-learn, at their first use."""
    if name not in ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pvi.models.bnn.{ESTIMATORS[name]}"), name)
