"""Pictures of calibration: are numbers that should be uniform on [0, 1] uniform?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pvi.diagnostics.uniformity import uniformity_band
from pvi.errors import PviError
from pvi.figures import new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND, LINE, OUTSIDE = "#d9d9d9", "#1f77b4", "#d62728"
BINS = 20  # bars at most


def plot_calibration(
    pits: Mapping[str, np.ndarray], note: str = "", prob: float = 0.95
) -> "Figure":
    """Histogram, ECDF minus its expectation, and coverage of central intervals, a row for each.

    The bands hold uniform numbers throughout with `prob`: all bars, all points of a line. Lines
    that leave theirs are red.

    Args:
        pits: label -> `(N,)` PIT values (normalised ranks) in [0, 1].
        note: written below.
        prob: of the bands.

    Raises:
        PviError: nothing to draw, or values outside [0, 1].
    """
    if not pits:
        raise PviError("expected PIT values of at least one site, got none")
    for label, pit in pits.items():
        if pit.ndim != 1 or not len(pit) or not bool(((pit >= 0) & (pit <= 1)).all()):
            raise PviError(f"'{label}': expected values (N,) in [0, 1], got shape {pit.shape}")
    figure = new_figure(9.0, 0.9 + 1.7 * len(pits))
    grid = figure.subplots(len(pits), 3, squeeze=False, sharex="col")
    for row, (label, pit) in zip(grid, pits.items(), strict=True):
        _histogram(row[0], pit, prob)
        _difference(row[1], pit, prob)
        _difference(row[2], np.abs(2 * pit - 1), prob)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axes in row:
            axes.tick_params(labelsize=8)
            tidy(axes)
    titles = ("ranks of the truth", "ECDF - expected", "coverage - nominal")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    labels = ("share of draws below the truth",) * 2 + ("probability of central interval",)
    for axes, label in zip(grid[-1], labels, strict=True):
        axes.set_xlabel(label, fontsize=9)
    text = f"grey: where all bars, or the line, of calibrated fits stay with probability {prob:g}"
    figure.supxlabel("; ".join(filter(None, [text, note])), fontsize=8, color="#606060")
    return figure


def _histogram(axes: "Axes", pit: np.ndarray, prob: float) -> None:
    """Bars with a band that holds all of them with at least `prob` (Bonferroni)."""
    bins = int(np.clip(len(pit) // 10, 2, BINS))
    low, high = _bar_limits(len(pit), bins, prob)
    counts = np.histogram(pit, bins, (0.0, 1.0))[0]
    colors = [LINE if low <= count <= high else OUTSIDE for count in counts]
    axes.axhspan(low, high, color=BAND, zorder=0, linewidth=0)
    axes.axhline(len(pit) / bins, color="black", linewidth=0.8)
    axes.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color=colors, alpha=0.8)
    axes.set(xlim=(0, 1), yticks=[])
    axes.spines["left"].set_visible(False)


def _bar_limits(num: int, bins: int, prob: float) -> tuple[int, int]:
    """Counts that one bar keeps to with probability 1 - (1 - prob) / bins."""
    log_pmf = np.zeros(num + 1)
    counts = np.arange(1, num + 1)
    log_pmf[1:] = np.cumsum(np.log((num - counts + 1) / counts / (bins - 1)))
    pmf = np.exp(log_pmf + num * np.log1p(-1 / bins))
    tail = (1 - prob) / bins / 2
    return int((pmf.cumsum() <= tail).sum()), int((pmf[::-1].cumsum()[::-1] > tail).sum() - 1)


def _difference(axes: "Axes", values: np.ndarray, prob: float) -> None:
    """ECDF of values minus that of uniform ones, with its simultaneous band."""
    points, low, high = uniformity_band(len(values), prob)
    shares = (values[:, None] < points).mean(0)
    shares[-1] = 1.0
    slack = 1e-9
    left = bool(((shares < low - slack) | (shares > high + slack)).any())
    axes.fill_between(points, low - points, high - points, color=BAND, zorder=0, linewidth=0)
    axes.axhline(0.0, color="black", linewidth=0.8)
    color = OUTSIDE if left else LINE
    axes.plot(points, shares - points, color=color, linewidth=1.5)
    axes.set(xlim=(0, 1))
