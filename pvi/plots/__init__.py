"""Pictures of a fit, as matplotlib figures: nothing is shown and pyplot keeps none of them."""

from pvi.plots.bound import plot_bound
from pvi.plots.figures import check_matplotlib
from pvi.plots.images import plot_images
from pvi.plots.posterior import plot_forest, plot_ppc, scale_groups

__all__ = [
    "check_matplotlib",
    "plot_bound",
    "plot_forest",
    "plot_images",
    "plot_ppc",
    "scale_groups",
]
