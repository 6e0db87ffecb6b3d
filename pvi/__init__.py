"""Variational inference on Pyro: a model and a guide go in, a checked posterior comes out."""

from pvi import guides
from pvi.compiled import compile
from pvi.diagnostics import (
    Diagnosis,
    Evidence,
    Latents,
    PredictiveCheck,
    Sandwich,
    check_predictive,
    diagnose,
    evidence,
    latents,
    sandwich,
)
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
from pvi.workflow import SBC, sbc

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "SBC",
    "BetaELBO",
    "BetaTC",
    "Capacity",
    "Check",
    "CheckpointError",
    "DataError",
    "Diagnosis",
    "Evidence",
    "Fit",
    "FitError",
    "FreeBits",
    "GuideError",
    "Latents",
    "ModelError",
    "Objective",
    "ObjectiveError",
    "Posterior",
    "PredictiveCheck",
    "PviError",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "Sandwich",
    "TraceMeanFieldELBO",
    "WeightedDraws",
    "check",
    "check_predictive",
    "compile",
    "diagnose",
    "evidence",
    "fit",
    "from_svi",
    "guides",
    "kl",
    "latents",
    "load",
    "penalty",
    "sandwich",
    "sbc",
    "schedules",
]
