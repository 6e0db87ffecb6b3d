"""Optimise any model, guide and objective on any data."""

from pvi.fit.callbacks import Callback, Step
from pvi.fit.check import Check, check
from pvi.fit.entry import fit
from pvi.fit.history import History
from pvi.fit.restarts import Mode
from pvi.fit.result import Fit
from pvi.fit.saved import load

__all__ = ["Callback", "Check", "Fit", "History", "Mode", "Step", "check", "fit", "load"]
