"""Pictures of a posterior, as matplotlib figures; nothing is shown, pyplot keeps none."""

from pvi.figures import check_matplotlib
from pvi.plots.compare import plot_against, plot_compare
from pvi.plots.images import plot_images
from pvi.plots.posterior import plot_forest, plot_ppc, scale_groups

__all__ = [
    "check_matplotlib",
    "plot_against",
    "plot_compare",
    "plot_forest",
    "plot_images",
    "plot_ppc",
    "scale_groups",
]
