"""Bounds and their gradients for any pair of Pyro programs."""

from pvi.engine.objective import (
    ELBO,
    IWAE,
    BetaELBO,
    Objective,
    RenyiELBO,
    TraceMeanFieldELBO,
)

__all__ = ["ELBO", "IWAE", "BetaELBO", "Objective", "RenyiELBO", "TraceMeanFieldELBO"]
