"""Bounds and their gradients for any pair of Pyro programs."""

from pvi.engine.constructors import ELBO, IWAE, BetaELBO, RenyiELBO, TraceMeanFieldELBO
from pvi.engine.objective import Objective

__all__ = ["ELBO", "IWAE", "BetaELBO", "Objective", "RenyiELBO", "TraceMeanFieldELBO"]
