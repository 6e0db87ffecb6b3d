"""Pictures of a fit, as matplotlib figures: nothing is shown and pyplot keeps none of them."""

from pvi.figures import check_matplotlib
from pvi.fit.plot import plot_bound, plot_fit
from pvi.plots.images import plot_images
from pvi.plots.posterior import plot_forest, plot_ppc, scale_groups

__all__ = [
    "check_matplotlib",
    "plot_bound",
    "plot_fit",
    "plot_forest",
    "plot_images",
    "plot_ppc",
    "scale_groups",
]
