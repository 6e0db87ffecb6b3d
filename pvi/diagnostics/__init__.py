"""Whether a posterior may be trusted, judged by its importance weights."""

from pvi.diagnostics.diagnosis import Diagnosis, diagnose
from pvi.diagnostics.psis import PSIS, psis

__all__ = ["PSIS", "Diagnosis", "diagnose", "psis"]
