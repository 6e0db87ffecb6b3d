"""Scalars against each other, and the weights of their draws."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pvi.errors import PviError
from pvi.figures import new_figure, tidy
from pvi.plots.arviz_api import legend_line
from pvi.posterior.psis import psis, tail_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GUIDE, WEIGHTED = "C0", "C1"
MASSES = (0.94, 0.5)  # inside the two contours
BINS, SMOOTH = 60, 1.6  # of the histograms behind the contours, and the sd of the smoothing in bins
POINTS = 600  # draws shown one by one


def plot_pairs(values: Mapping[str, Any], weights: Any = None) -> "Figure":
    """Every scalar against every other: draws, and the regions that hold 50 % and 94 % of them.

    Args:
        values: name -> draws `(S,)` of at least two scalars.
        weights: `(S,)`, adding up to 1; with them, the weighted regions are drawn as well.

    Raises:
        PviError: fewer than two scalars.
    """
    draws = {name: np.asarray(x, float) for name, x in values.items()}
    if len(draws) < 2:
        raise PviError(f"plot_pairs: expected at least two scalars, got {list(draws)}")
    names, count = list(draws), len(draws)
    size = len(next(iter(draws.values())))
    layers = {"draws of the guide": (GUIDE, np.full(size, 1.0 / size))}
    if weights is not None:
        layers["weighted"] = (WEIGHTED, np.asarray(weights, float))
    figure = new_figure(1.6 + 1.35 * count, 1.3 + 1.25 * count)
    grid = figure.subplots(count, count, squeeze=False, sharex="col")
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axes = grid[i][j]
            if j > i:
                axes.set_visible(False)
            elif i == j:
                _draw_alone(axes, draws[row], layers)
            else:
                _draw_pair(axes, draws[column], draws[row], layers)
            _label(axes, column if i == count - 1 else "", row if j == 0 else "", i == j)
    lines = [legend_line(color) for color, _ in layers.values()]
    figure.legend(lines, list(layers), loc="upper right", frameon=False, fontsize=9)
    return figure


def _label(axes: "Axes", below: str, beside: str, alone: bool) -> None:
    axes.set_xlabel(_short(below), fontsize=9)
    axes.set_ylabel(_short(beside), fontsize=9)
    axes.tick_params(labelsize=7, labelbottom=bool(below), labelleft=bool(beside) and not alone)
    axes.locator_params(nbins=3)
    tidy(axes)
    if alone:
        axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:16]}..."


def _limits(x: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(x, (0.001, 0.999))
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_alone(axes: "Axes", x: np.ndarray, layers: Mapping[str, tuple[str, np.ndarray]]) -> None:
    edges = np.linspace(*_limits(x), 41)
    for color, weights in layers.values():
        heights, _ = np.histogram(x, edges, weights=weights)
        axes.stairs(heights, edges, color=color, linewidth=1.2)
    axes.set_xlim(edges[0], edges[-1])


def _draw_pair(
    axes: "Axes", x: np.ndarray, y: np.ndarray, layers: Mapping[str, tuple[str, np.ndarray]]
) -> None:
    axes.plot(x[:POINTS], y[:POINTS], ".", color=GUIDE, alpha=0.25, markersize=2, zorder=0)
    limits = _limits(x), _limits(y)
    for color, weights in layers.values():
        _draw_regions(axes, x, y, weights, limits, color)
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])


def _draw_regions(
    axes: "Axes", x: np.ndarray, y: np.ndarray, weights: np.ndarray, limits: Any, color: str
) -> None:
    """Lines around the densest places that together hold the `MASSES`."""
    from scipy.ndimage import gaussian_filter

    mass, *edges = np.histogram2d(x, y, BINS, limits, weights=weights)
    mass = gaussian_filter(mass, SMOOTH)
    ranked = np.sort(mass, axis=None)[::-1]
    inside = np.cumsum(ranked) / ranked.sum()
    levels = [ranked[np.searchsorted(inside, share)] for share in MASSES]
    if levels[0] < levels[1]:
        centers = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
        axes.contour(*centers, mass.T, levels, colors=color, linewidths=1.1)


def plot_weights(log_ratios: Any) -> "Figure":
    """The largest importance weights by rank, raw and smoothed, as shares of the whole weight.

    On both logarithmic axes a tail of index khat is a line that falls by khat decades a decade.

    Args:
        log_ratios: log p - log q of draws from the guide, `(S,)`, nats.
    """
    raw = torch.as_tensor(log_ratios, dtype=torch.float64)
    smoothed = psis(raw)
    count = min(len(raw), 4 * tail_size(len(raw)))
    shares = torch.softmax(raw, 0).sort(descending=True).values[:count]
    smooth = smoothed.log_weights.exp().sort(descending=True).values[:count]
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    ranks = np.arange(1, count + 1)
    axes.set(xscale="log", yscale="log")
    largest, smallest = float(shares.max()), float(shares[shares > 0].min())
    axes.set_ylim(min(smallest, 1 / len(raw)) / 2, 2 * largest)
    axes.plot(ranks, shares, ".", color=GUIDE, markersize=4, label="raw")
    axes.plot(ranks, smooth, color=WEIGHTED, linewidth=1.5, label="smoothed")
    axes.axhline(1 / len(raw), color="grey", linewidth=0.8, linestyle="--", label="all equal")
    axes.set_xlabel("rank of the draw, by weight")
    axes.set_ylabel("share of the whole weight")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
