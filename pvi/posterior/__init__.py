"""From a fitted guide to draws, predictions and arviz."""

from pvi.posterior.draws import Draws
from pvi.posterior.posterior import Posterior, from_svi

__all__ = ["Draws", "Posterior", "from_svi"]
