"""Pictures of a posterior, as matplotlib figures; nothing is shown, pyplot keeps none."""

from pvi.figures import check_matplotlib
from pvi.plots.calibration import plot_calibration
from pvi.plots.images import plot_images
from pvi.plots.pairs import plot_pairs, plot_weights
from pvi.plots.posterior import plot_forest, plot_ppc, scale_groups

__all__ = [
    "check_matplotlib",
    "plot_calibration",
    "plot_forest",
    "plot_images",
    "plot_pairs",
    "plot_ppc",
    "plot_weights",
    "scale_groups",
]
