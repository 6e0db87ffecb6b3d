"""Optimise any model, guide and objective on any data."""

from pvi.fit.adversary import Adversary, Game
from pvi.fit.callbacks import Callback, Step
from pvi.fit.check import Check, check
from pvi.fit.entry import fit
from pvi.fit.history import History
from pvi.fit.restarts import Mode
from pvi.fit.result import Fit
from pvi.fit.saved import load

__all__ = [
    "Adversary",
    "Callback",
    "Check",
    "Fit",
    "Game",
    "History",
    "Mode",
    "Step",
    "check",
    "fit",
    "load",
]
