"""Optimise any model, guide and objective on any data."""

from pvi.fit.callbacks import Step
from pvi.fit.check import Check, check
from pvi.fit.entry import fit
from pvi.fit.result import Fit, History
from pvi.fit.saved import load

__all__ = ["Check", "Fit", "History", "Step", "check", "fit", "load"]
