"""Variational inference on Pyro: a model and a guide go in, a checked posterior comes out."""

from pvi import guides
from pvi.compiled import compile
from pvi.diagnostics import Diagnosis, Evidence, Loo, Sandwich, diagnose, evidence, loo, sandwich
from pvi.engine import (
    ELBO,
    IWAE,
    BetaELBO,
    BetaTC,
    Capacity,
    FreeBits,
    Objective,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceMeanFieldELBO,
    WeightedDraws,
    kl,
    penalty,
    schedules,
)
from pvi.errors import (
    CheckpointError,
    DataError,
    FitError,
    GuideError,
    ModelError,
    ObjectiveError,
    PviError,
)
from pvi.fit import Check, Fit, check, fit, load
from pvi.posterior import Posterior, from_svi
from pvi.workflow import Against, Chains, Comparison, against, compare, nuts

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "Against",
    "BetaELBO",
    "BetaTC",
    "Capacity",
    "Chains",
    "Check",
    "CheckpointError",
    "Comparison",
    "DataError",
    "Diagnosis",
    "Evidence",
    "Fit",
    "FitError",
    "FreeBits",
    "GuideError",
    "Loo",
    "ModelError",
    "Objective",
    "ObjectiveError",
    "Posterior",
    "PviError",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "Sandwich",
    "TraceMeanFieldELBO",
    "WeightedDraws",
    "against",
    "check",
    "compare",
    "compile",
    "diagnose",
    "evidence",
    "fit",
    "from_svi",
    "guides",
    "kl",
    "load",
    "loo",
    "nuts",
    "penalty",
    "sandwich",
    "schedules",
]
