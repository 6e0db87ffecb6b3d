"""Whether a posterior may be trusted, and how probable the data are: by importance weights."""

from pvi.diagnostics.diagnosis import Diagnosis, diagnose
from pvi.diagnostics.disentangling import MutualInformationGap, mutual_information_gap
from pvi.diagnostics.evidence import Evidence, evidence, posterior_evidence
from pvi.diagnostics.latents import Latents, latents
from pvi.diagnostics.loo import Loo, loo
from pvi.diagnostics.predictive_checks import PredictiveCheck, check_predictive
from pvi.diagnostics.sandwich import Sandwich, posterior_sandwich, sandwich
from pvi.posterior.psis import PSIS, psis

__all__ = [
    "PSIS",
    "Diagnosis",
    "Evidence",
    "Latents",
    "Loo",
    "MutualInformationGap",
    "PredictiveCheck",
    "Sandwich",
    "check_predictive",
    "diagnose",
    "evidence",
    "latents",
    "loo",
    "mutual_information_gap",
    "posterior_evidence",
    "posterior_sandwich",
    "psis",
    "sandwich",
]
