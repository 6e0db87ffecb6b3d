"""Bounds and their gradients for any pair of Pyro programs."""

from pvi.engine import schedules
from pvi.engine.constructors import (
    ELBO,
    IWAE,
    BetaELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceMeanFieldELBO,
)
from pvi.engine.custom import WeightedDraws
from pvi.engine.effects import kl, penalty
from pvi.engine.local import local_reparam
from pvi.engine.objective import Objective
from pvi.engine.weighting import BetaTC, Capacity, FreeBits

__all__ = [
    "ELBO",
    "IWAE",
    "BetaELBO",
    "BetaTC",
    "Capacity",
    "FreeBits",
    "Objective",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "TraceMeanFieldELBO",
    "WeightedDraws",
    "kl",
    "local_reparam",
    "penalty",
    "schedules",
]
