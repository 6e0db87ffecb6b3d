"""Pictures of a posterior, as matplotlib figures; nothing is shown, pyplot keeps none."""

from pvi.figures import check_matplotlib
from pvi.plots.calibration import plot_calibration
from pvi.plots.checks import plot_coverage, plot_latents, plot_pit, plot_reliability
from pvi.plots.compare import plot_against, plot_compare
from pvi.plots.images import plot_images
from pvi.plots.latents import (
    plot_interpolations,
    plot_reconstructions,
    plot_samples,
    plot_traversals,
)
from pvi.plots.pairs import plot_pairs, plot_weights
from pvi.plots.posterior import plot_forest, plot_ppc, scale_groups

__all__ = [
    "check_matplotlib",
    "plot_against",
    "plot_calibration",
    "plot_compare",
    "plot_coverage",
    "plot_forest",
    "plot_images",
    "plot_interpolations",
    "plot_latents",
    "plot_pairs",
    "plot_pit",
    "plot_ppc",
    "plot_reconstructions",
    "plot_reliability",
    "plot_samples",
    "plot_traversals",
    "plot_weights",
    "scale_groups",
]
