"""Variational inference on Pyro: a model and a guide go in, a checked posterior comes out."""

from pvi import guides
from pvi.diagnostics import Diagnosis, diagnose
from pvi.engine import ELBO, IWAE, BetaELBO, Objective, RenyiELBO, TraceMeanFieldELBO
from pvi.errors import DataError, FitError, GuideError, ModelError, ObjectiveError, PviError
from pvi.fit import Fit, fit
from pvi.posterior import Posterior, from_svi

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "BetaELBO",
    "DataError",
    "Diagnosis",
    "Fit",
    "FitError",
    "GuideError",
    "ModelError",
    "Objective",
    "ObjectiveError",
    "Posterior",
    "PviError",
    "RenyiELBO",
    "TraceMeanFieldELBO",
    "diagnose",
    "fit",
    "from_svi",
    "guides",
]
