"""Fits side by side, and a posterior beside Markov chains, as figures."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pvi.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 40
COLOR, FLOOR = "C0", "grey"


def plot_compare(entries: Sequence[Any]) -> "Figure":
    """Bound, log evidence and leave-one-out density of each fit, with one standard error.

    Args:
        entries: of a `Comparison`.
    """
    panels = {"bound": "bound_se", "evidence": "evidence_se", "elpd_diff": "diff_se"}
    titles = {"bound": "bound", "evidence": "log evidence", "elpd_diff": "elpd_loo - best"}
    count = {n: sum(math.isfinite(getattr(entry, n)) for entry in entries) for n in panels}
    kept = [n for n in panels if count[n] > (n == "elpd_diff")] or ["bound"]
    figure = new_figure(1.5 + 2.8 * len(kept), 1.1 + 0.35 * len(entries))
    axes = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for panel, name in zip(axes, kept, strict=True):
        values = [getattr(entry, name) for entry in entries]
        _points(panel, values, [getattr(entry, panels[name]) for entry in entries])
        panel.set_xlabel(f"{titles[name]}, nats")
    _rows(axes, [entry.name for entry in entries])
    return figure


def plot_against(rows: Sequence[Any]) -> "Figure":
    """Errors of means and ratios of sds with two Monte Carlo errors; the worst 40 rows.

    Args:
        rows: of an `Against`.
    """
    rows = rows[:MAX_ROWS]
    figure = new_figure(7.0, 1.1 + 0.25 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    _points(axes[0], [row.error for row in rows], [2 * row.error_se for row in rows])
    _points(axes[1], [row.sd_ratio for row in rows], [2 * row.sd_ratio_se for row in rows])
    for panel, truth in zip(axes, (0.0, 1.0), strict=True):
        panel.axvline(truth, color=FLOOR, linewidth=0.8, zorder=0)
    axes[0].set_xlabel("error of the mean, sds of the chains")
    axes[1].set_xlabel("sd / sd of the chains")
    _rows(axes, [row.name for row in rows])
    return figure


def _points(axes: "Axes", values: Sequence[float], errors: Sequence[float]) -> None:
    shown = [e if math.isfinite(e) else 0.0 for e in errors]
    axes.errorbar(values, range(len(values)), xerr=shown, fmt="o", color=COLOR, markersize=4)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.ticklabel_format(axis="x", useOffset=False)
    tidy(axes, "left")


def _rows(axes: Sequence["Axes"], names: Sequence[str]) -> None:
    """Names at the rows of the first panel, the first one at the top."""
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for panel in axes:
        panel.tick_params(axis="y", left=False)
        panel.locator_params(axis="x", nbins=4)
